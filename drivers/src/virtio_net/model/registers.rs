//! The registers: common configuration, and what the driver reads of the device's own ("Common configuration structure
//! layout", 4.1.4.3, and "Device configuration layout", 5.1.4).

use std::sync::Arc;
use std::sync::atomic::Ordering;

use underpass::Iova;
use underpass::model::{Doorbell, Width};

use super::Profile;
use super::config_space::{DEVICE, ISR, MSIX_PBA, MSIX_TABLE, NOTIFY_MULTIPLIER};
use super::device::Device;
use super::rules::HASH_TYPES;
use super::spec::net::{self, HASH_KEY_LEN, INDIRECTION_TABLE_LEN, config, link};
use super::spec::pci::{NO_VECTOR, common, queue_size_is_valid, status};
use super::spec::{Features, split};
use super::virtqueue::{Broken, Config};

/// What is in a queue's notification beyond its index, with `NOTIF_CONFIG_DATA`: a value that nobody guesses.
const NOTIFY_DATA: u16 = 0x5a00;

/// The register file.
#[derive(Debug)]
pub(super) struct Registers {
    device_feature_select: u32,
    driver_feature_select: u32,
    driver_features: u64,
    /// The driver has accepted features over 63, which nobody offers.
    unknown_features: bool,
    generation: u8,
    queue_select: u16,
    queues: Box<[Queue]>,
    msix_table: Box<[u32]>,
}

/// A queue's registers.
#[derive(Debug, Clone, Copy)]
struct Queue {
    size: u16,
    enabled: bool,
    /// Descriptor, driver and device area.
    areas: [u64; 3],
}

impl Registers {
    /// As after power-on.
    pub(super) fn new(profile: &Profile) -> Self {
        let queues = profile.queues();
        Self {
            device_feature_select: 0,
            driver_feature_select: 0,
            driver_features: 0,
            unknown_features: false,
            generation: 0,
            queue_select: 0,
            queues: vec![Queue::new(profile); queues].into(),
            msix_table: vec![0; 4 * profile.vectors()].into(),
        }
    }

    /// A function-level reset.
    pub(super) fn reset(&mut self, device: &Device) {
        self.reset_device(device);
        self.msix_table.fill(0);
    }

    /// Zero in the status. The MSI-X table is the PCI function's, and stays.
    fn reset_device(&mut self, device: &Device) {
        device.reset();
        let msix_table = std::mem::take(&mut self.msix_table);
        *self = Self { generation: self.generation, msix_table, ..Self::new(&device.profile) };
    }

    /// A read of any width, naturally aligned.
    pub(super) fn read(&mut self, device: &Device, offset: u64, width: Width) -> u64 {
        let part = |bytes: &[u8], at: u64| {
            let bytes = bytes.iter().skip(at as usize).take(width.bytes() as usize).rev();
            bytes.fold(0, |value, byte| value << 8 | u64::from(*byte))
        };
        match offset {
            0..ISR => part(&self.common(device), offset),
            ISR => device.take_isr().into(),
            DEVICE..MSIX_TABLE => {
                // So that a driver that reads the generation before and after sees a change in between, however often
                // it reads.
                if device.take_config_change() {
                    self.generation = self.generation.wrapping_add(1);
                }
                part(&device_config(device), offset - DEVICE)
            }
            MSIX_TABLE..MSIX_PBA => {
                let at = (offset - MSIX_TABLE) as usize;
                let word = |n: usize| self.msix_table.get(n).copied().unwrap_or(0).to_le_bytes();
                let (low, high) = (word(at / 4), word(at / 4 + 1));
                part(&[low, high].concat(), at as u64 % 4)
            }
            _ => 0,
        }
    }

    /// The common configuration, as bytes.
    fn common(&self, device: &Device) -> [u8; 64] {
        let mut image = [0; 64];
        let mut put = |at: u64, bytes: &[u8]| image[at as usize..][..bytes.len()].copy_from_slice(bytes);
        let window = |features: u64, select: u32| match select {
            0 => features as u32,
            1 => (features >> 32) as u32,
            _ => 0,
        };
        let offered = device.profile.offered();
        let queues = self.queues.len();
        put(common::DEVICE_FEATURE_SELECT, &self.device_feature_select.to_le_bytes());
        put(common::DEVICE_FEATURE, &window(offered.0, self.device_feature_select).to_le_bytes());
        put(common::DRIVER_FEATURE_SELECT, &self.driver_feature_select.to_le_bytes());
        let accepted = self.driver_features & offered.0;
        put(common::DRIVER_FEATURE, &window(accepted, self.driver_feature_select).to_le_bytes());
        let vector = |index: usize| device.vector(index).load(Ordering::Acquire).to_le_bytes();
        put(common::CONFIG_MSIX_VECTOR, &vector(queues));
        put(common::NUM_QUEUES, &(queues as u16).to_le_bytes());
        put(common::DEVICE_STATUS, &[device.status()]);
        put(common::CONFIG_GENERATION, &[self.generation]);
        put(common::QUEUE_SELECT, &self.queue_select.to_le_bytes());
        put(common::QUEUE_MSIX_VECTOR, &NO_VECTOR.to_le_bytes());
        let index = self.queue_select;
        let Some(queue) = self.queues.get(usize::from(index)) else { return image };
        put(common::QUEUE_SIZE, &queue.size.to_le_bytes());
        put(common::QUEUE_MSIX_VECTOR, &vector(index.into()));
        put(common::QUEUE_ENABLE, &u16::from(queue.enabled).to_le_bytes());
        put(common::QUEUE_NOTIFY_OFF, &index.to_le_bytes());
        put(common::QUEUE_DESC, &queue.areas[0].to_le_bytes());
        put(common::QUEUE_DRIVER, &queue.areas[1].to_le_bytes());
        put(common::QUEUE_DEVICE, &queue.areas[2].to_le_bytes());
        if device.features().contains(Features::NOTIF_CONFIG_DATA) {
            put(common::QUEUE_NOTIFY_DATA, &(NOTIFY_DATA + index).to_le_bytes());
        }
        // A queue's reset is over when the write to its register is.
        put(common::QUEUE_RESET, &[0; 2]);
        image
    }

    /// A write, naturally aligned.
    pub(super) fn write(&mut self, device: &Device, offset: u64, width: Width, value: u64) {
        let written = match offset {
            0..ISR => self.write_common(device, offset, width, value),
            MSIX_TABLE..MSIX_PBA => {
                let at = (offset - MSIX_TABLE) as usize / 4;
                let words = [value as u32, (value >> 32) as u32];
                let count = (width.bytes() as usize).div_ceil(4);
                for (place, word) in self.msix_table.iter_mut().skip(at).zip(&words[..count]) {
                    *place = *word;
                }
                Ok(())
            }
            _ => Err("a register was written that is read-only, or none at all"),
        };
        if let Err(rule) = written {
            device.violated(None, Broken::Rule(rule));
        }
    }

    fn write_common(
        &mut self,
        device: &Device,
        offset: u64,
        width: Width,
        value: u64,
    ) -> Result<(), &'static str> {
        let negotiated = device.status() & status::FEATURES_OK != 0;
        let index = self.queue_select;
        match (offset, width) {
            (common::DEVICE_FEATURE_SELECT, Width::Bits32) => self.device_feature_select = value as u32,
            (common::DRIVER_FEATURE_SELECT, Width::Bits32) => self.driver_feature_select = value as u32,
            (common::DRIVER_FEATURE, Width::Bits32) if negotiated => {
                return Err("features were accepted after FEATURES_OK");
            }
            (common::DRIVER_FEATURE, Width::Bits32) => match self.driver_feature_select {
                0 => self.driver_features = self.driver_features & !0xffff_ffff | value,
                1 => self.driver_features = self.driver_features & 0xffff_ffff | value << 32,
                _ => self.unknown_features |= value != 0,
            },
            (common::CONFIG_MSIX_VECTOR, Width::Bits16) => {
                set_vector(device, self.queues.len(), value as u16);
            }
            (common::DEVICE_STATUS, Width::Bits8) => return self.set_status(device, value as u8),
            (common::QUEUE_SELECT, Width::Bits16) => self.queue_select = value as u16,
            (common::QUEUE_SIZE, Width::Bits16) => {
                let size = value as u16;
                if size == 0 || size > device.profile.max_queue_size {
                    return Err("a queue's size was set to zero, or over the largest");
                }
                self.stopped_queue()?.size = size;
            }
            (common::QUEUE_MSIX_VECTOR, Width::Bits16) => {
                if usize::from(index) < self.queues.len() {
                    set_vector(device, index.into(), value as u16);
                }
            }
            (common::QUEUE_ENABLE, Width::Bits16) => return self.enable(device, value),
            (common::QUEUE_RESET, Width::Bits16) => return self.reset_queue(device, value),
            (common::QUEUE_DESC..common::QUEUE_NOTIFY_DATA, Width::Bits64) => {
                let area = (offset - common::QUEUE_DESC) as usize / 8;
                self.stopped_queue()?.areas[area] = value;
            }
            (common::QUEUE_DESC..common::QUEUE_NOTIFY_DATA, Width::Bits32) => {
                let at = (offset - common::QUEUE_DESC) as usize;
                let area = &mut self.stopped_queue()?.areas[at / 8];
                let shift = 8 * (at % 8);
                *area = *area & !(0xffff_ffff << shift) | value << shift;
            }
            _ => {
                return Err(
                    "a register was written that is read-only, with another width than its own, or none",
                );
            }
        }
        Ok(())
    }

    /// The selected queue, to be configured.
    fn stopped_queue(&mut self) -> Result<&mut Queue, &'static str> {
        match self.queues.get_mut(usize::from(self.queue_select)) {
            None => Err("a queue was configured that does not exist"),
            Some(queue) if queue.enabled => Err("a queue was configured while it was enabled"),
            Some(queue) => Ok(queue),
        }
    }

    fn set_status(&mut self, device: &Device, value: u8) -> Result<(), &'static str> {
        const STEPS: [u8; 4] = [status::ACKNOWLEDGE, status::DRIVER, status::FEATURES_OK, status::DRIVER_OK];
        if value == 0 {
            self.reset_device(device);
            return Ok(());
        }
        let before = device.status();
        let known = STEPS.iter().fold(status::FAILED, |known, step| known | step);
        let value = value & known;
        if before & known & !value != 0 {
            return Err("a status bit was cleared other than by a reset");
        }
        let mut now = before | value;
        if now & !before & status::FEATURES_OK != 0 && !self.features_are_acceptable(&device.profile) {
            // The driver finds out by reading ("Device Initialization", 3.1.1).
            now &= !status::FEATURES_OK;
        }
        if STEPS.windows(2).any(|steps| now & steps[0] == 0 && now & steps[1] != 0) {
            return Err("a step of the initialization was left out");
        }
        let new = now & !before;
        if new & status::FEATURES_OK != 0 {
            device.set_features(Features(self.driver_features));
        }
        device.set_status(new);
        if new & status::DRIVER_OK != 0 {
            for index in 0..self.queues.len() as u16 {
                if self.queues[usize::from(index)].enabled {
                    self.install(device, index);
                }
            }
        }
        Ok(())
    }

    /// Whether the device works with what the driver has accepted.
    fn features_are_acceptable(&self, profile: &Profile) -> bool {
        let accepted = Features(self.driver_features);
        let offered = profile.offered();
        // A device behind an IOMMU can do nothing with a driver that gives it other addresses.
        let needed = Features::VERSION_1 | offered & Features::ACCESS_PLATFORM;
        !self.unknown_features
            && offered.contains(accepted)
            && accepted.contains(needed)
            && accepted.consistent() == accepted
    }

    fn enable(&mut self, device: &Device, value: u64) -> Result<(), &'static str> {
        let (status, index) = (device.status(), self.queue_select);
        if value != 1 {
            return Err("something other than one was written to queue_enable");
        }
        if status & status::FEATURES_OK == 0 {
            return Err("a queue was enabled before the features were negotiated");
        }
        let live = status & status::DRIVER_OK != 0;
        if live && !device.features().contains(Features::RING_RESET) {
            return Err("a queue was enabled after DRIVER_OK, without RING_RESET");
        }
        self.stopped_queue()?.enabled = true;
        self.config(device, index).check()?;
        if live {
            self.install(device, index);
        }
        Ok(())
    }

    fn reset_queue(&mut self, device: &Device, value: u64) -> Result<(), &'static str> {
        if !device.features().contains(Features::RING_RESET) {
            return Err("a queue was reset without RING_RESET");
        }
        if value != 1 {
            return Err("something other than one was written to queue_reset");
        }
        let index = self.queue_select;
        let Some(queue) = self.queues.get_mut(usize::from(index)) else {
            return Err("a queue was reset that does not exist");
        };
        *queue = Queue::new(&device.profile);
        device.remove(index);
        device.vector(index.into()).store(NO_VECTOR, Ordering::Release);
        Ok(())
    }

    fn install(&self, device: &Device, index: u16) {
        device.install(index, self.config(device, index));
    }

    fn config(&self, device: &Device, index: u16) -> Config {
        let Queue { size, areas: [desc, avail, used], .. } = self.queues[usize::from(index)];
        let [desc, avail, used] = [desc, avail, used].map(Iova::new);
        Config { size, desc, avail, used, features: device.features() }
    }
}

impl Queue {
    fn new(profile: &Profile) -> Self {
        Self { size: profile.max_queue_size, enabled: false, areas: [0; 3] }
    }
}

fn set_vector(device: &Device, index: usize, vector: u16) {
    // A vector that there is not can not be mapped, which the driver finds out by reading ("MSI-X Vector
    // Configuration", 4.1.5.1.2).
    let there = usize::from(vector) < device.profile.vectors();
    device.vector(index).store(if there { vector } else { NO_VECTOR }, Ordering::Release);
}

/// `struct virtio_net_config`, as bytes; fields of features that are not offered are zero.
fn device_config(device: &Device) -> [u8; config::LEN as usize] {
    let profile = &device.profile;
    let offered = profile.offered();
    let mut image = [0; config::LEN as usize];
    let mut put = |features: Features, at: u64, bytes: &[u8]| {
        if offered.intersects(features) {
            image[at as usize..][..bytes.len()].copy_from_slice(bytes);
        }
    };
    let up = if device.link_is_up() { link::UP } else { 0 };
    let announce = if device.is_announcing() { link::ANNOUNCE } else { 0 };
    let hashes = Features::RSS | Features::HASH_REPORT;
    put(Features::MAC, config::MAC, &device.mac().0);
    put(Features::STATUS, config::STATUS, &(up | announce).to_le_bytes());
    put(Features::MQ | Features::RSS, config::MAX_VIRTQUEUE_PAIRS, &profile.queue_pairs.to_le_bytes());
    put(Features::MTU, config::MTU, &profile.mtu.to_le_bytes());
    put(Features::SPEED_DUPLEX, config::SPEED, &profile.speed.unwrap_or(config::SPEED_UNKNOWN).to_le_bytes());
    let duplex = if profile.speed.is_some() { config::DUPLEX_FULL } else { config::DUPLEX_UNKNOWN };
    put(Features::SPEED_DUPLEX, config::DUPLEX, &[duplex]);
    put(hashes, config::RSS_MAX_KEY_SIZE, &[HASH_KEY_LEN as u8]);
    let table = (INDIRECTION_TABLE_LEN as u16).to_le_bytes();
    put(Features::RSS, config::RSS_MAX_INDIRECTION_TABLE_LENGTH, &table);
    put(hashes, config::SUPPORTED_HASH_TYPES, &HASH_TYPES.to_le_bytes());
    image
}

/// The notification area ("Available Buffer Notifications", 4.1.5.2).
pub(super) struct Notifications(pub(super) Arc<Device>);

impl Doorbell for Notifications {
    fn post64(&self, _offset: u64, _data: &[u8; 64]) {
        self.wrong();
    }

    fn enqueue64(&self, _offset: u64, _data: &[u8; 64]) -> bool {
        self.wrong();
        true
    }

    fn write(&self, offset: u64, width: Width, value: u64) {
        let device = &self.0;
        let status = device.status();
        if status & status::DRIVER_OK == 0 {
            // A reset may overtake a notification, but nothing is notified while the device is being set up.
            if status != 0 {
                device.violated(None, Broken::Rule("a queue was notified before DRIVER_OK"));
            }
            return;
        }
        let features = device.features();
        let index = (offset / u64::from(NOTIFY_MULTIPLIER)) as u16;
        let with_data = features.contains(Features::NOTIFICATION_DATA);
        let expected =
            if features.contains(Features::NOTIF_CONFIG_DATA) { NOTIFY_DATA + index } else { index };
        let is_right = offset.is_multiple_of(NOTIFY_MULTIPLIER.into())
            && width == if with_data { Width::Bits32 } else { Width::Bits16 }
            && value as u16 == expected
            && device.role(index).is_some();
        if is_right { device.doorbell(index) } else { self.wrong() }
    }
}

impl Notifications {
    fn wrong(&self) {
        self.0.violated(None, Broken::Rule("a notification is not as the queue's should be"));
    }
}

const _: () = assert!(
    net::control_queue(Profile::MAX_QUEUE_PAIRS).is_some()
        && queue_size_is_valid(split::MAX_SIZE, false)
        && common::LEN <= 64
        && ISR >= common::LEN
        && NOTIFY_DATA as u32 + 2 * (Profile::MAX_QUEUE_PAIRS as u32) < 0x1_0000,
    "the registers hold what the largest device has"
);
