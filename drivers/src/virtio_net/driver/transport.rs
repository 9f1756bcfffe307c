//! Virtio over PCI ("Virtio Over PCI Bus", 4.1): finds the device's structures and speaks to them. The control plane:
//! slow, and distrustful of every place and size that the device reports.

use std::fmt;
use std::hint;
use std::thread;
use std::time::{Duration, Instant};

use underpass::bar::Bar;
use underpass::pci::{PciDevice, cap};
use underpass::{Error, ErrorKind, Iova, Result};
use zerocopy::FromBytes;

use super::virtqueue::Areas;
use crate::virtio_net::spec::pci::{
    Cap, DEVICE_ID, NO_VECTOR, NotifyCap, TRANSITIONAL_DEVICE_ID, VENDOR_ID, cfg_type, common, notification,
    queue_size_is_valid, status,
};
use crate::virtio_net::spec::{Features, net};

/// A device that has not answered to a reset or a command for so long never will. Real ones take milliseconds.
pub(super) const DEADLINE: Duration = Duration::from_secs(2);

/// Bytes of the common configuration without the fields that version 1.2 added.
const COMMON_LEN_1_0: u64 = common::QUEUE_NOTIFY_DATA;

/// The first 256 bytes of configuration space, where capabilities are.
const CONFIG_SPACE: u16 = 256;

/// Where the device's structures are.
pub(super) struct Transport {
    common: Bar,
    notify: Bar,
    /// Where that is in its BAR.
    notify_offset: u64,
    notify_multiplier: u32,
    /// What only a network device has; `None` where it has none of it.
    device: Option<DeviceConfig>,
}

/// How one queue is set up.
pub(super) struct QueueSetup {
    pub index: u16,
    pub size: u16,
    pub areas: Areas,
    /// The MSI-X vector that it signals.
    pub vector: Option<u16>,
}

/// Where the device is told that a queue has new buffers ("Available Buffer Notifications", 4.1.5.2).
pub(super) struct Notifier {
    register: Bar,
    id: u16,
    /// Each carries the queue's position (`NOTIFICATION_DATA`).
    with_position: bool,
}

impl Notifier {
    /// Says that there is something new, up to the queue's `position`.
    #[inline]
    pub(super) fn notify(&self, position: u16) {
        if self.with_position {
            self.register.write32(0, notification(self.id, position));
        } else {
            self.register.write16(0, self.id);
        }
    }
}

/// The device reports what makes no sense.
pub(super) fn nonsense(what: impl fmt::Display, why: impl fmt::Display) -> Error {
    Error::new(ErrorKind::Device, "use its registers", format!("{what}: {why}"))
        .mend("the device is broken or no virtio-net device; take another")
}

/// Asks `done` until it has an answer; `None` if it has none within [`DEADLINE`].
pub(super) fn poll<T>(mut done: impl FnMut() -> Option<T>) -> Option<T> {
    let begun = Instant::now();
    for turn in 0_u32.. {
        // Asked once more after the deadline: this thread may have slept through it.
        let late = begun.elapsed() >= DEADLINE;
        if let Some(answer) = done() {
            return Some(answer);
        }
        if late {
            return None;
        }
        if turn < 1000 {
            hint::spin_loop();
        } else {
            thread::sleep(Duration::from_micros(20));
        }
    }
    None
}

impl Transport {
    /// Finds the structures that the device's capabilities point to: the first of each kind that makes sense ("Driver
    /// Requirements: Virtio Structure PCI Capabilities", 4.1.4.1).
    pub(super) fn discover(device: &PciDevice) -> Result<Self> {
        let config = device.config();
        let (vendor, id) = (config.vendor_id(), config.device_id());
        if vendor != VENDOR_ID || !matches!(id, DEVICE_ID | TRANSITIONAL_DEVICE_ID) {
            let why = format!("its PCI ids are {vendor:04x}:{id:04x}");
            return Err(Error::new(ErrorKind::Unsupported, "drive it as a virtio-net device", why)
                .mend(format!("take a {VENDOR_ID:04x}:{DEVICE_ID:04x}, or a transitional {VENDOR_ID:04x}:{TRANSITIONAL_DEVICE_ID:04x}")));
        }
        let (mut common, mut notify, mut specific) = (None, None, None);
        for (_, at) in config.capabilities().filter(|(id, _)| *id == cap::VENDOR) {
            let mut bytes = [0; size_of::<NotifyCap>()];
            let len = usize::from(config.read8(at + 2)).min(bytes.len());
            if len < size_of::<Cap>() || usize::from(at) + len > CONFIG_SPACE.into() {
                continue;
            }
            for (n, word) in bytes[..len & !3].chunks_exact_mut(4).enumerate() {
                word.copy_from_slice(&config.read32(at + 4 * n as u16).to_le_bytes());
            }
            let NotifyCap { cap, notify_off_multiplier } =
                NotifyCap::read_from_bytes(&bytes).expect("as many bytes");
            let window = || device.bar(cap.bar.into())?.window(cap.offset.into(), cap.length.into());
            // Fields are reached with their own widths, which the registers beneath want aligned.
            let aligned = cap.offset.is_multiple_of(4);
            match cap.cfg_type {
                cfg_type::COMMON
                    if common.is_none() && aligned && u64::from(cap.length) >= COMMON_LEN_1_0 =>
                {
                    common = window().ok();
                }
                cfg_type::NOTIFY if notify.is_none() && len == bytes.len() => {
                    notify = window().ok().map(|window| (window, cap.offset, notify_off_multiplier));
                }
                cfg_type::DEVICE if specific.is_none() && aligned => specific = window().ok(),
                _ => {}
            }
        }
        let missing =
            |name| nonsense(name, "no capability points to it, or only to where the device has no memory");
        let (notify, notify_offset, notify_multiplier) =
            notify.ok_or_else(|| missing("the notification structure"))?;
        let common = common.ok_or_else(|| missing("the common configuration structure"))?;
        Ok(Self {
            common,
            notify,
            notify_offset: notify_offset.into(),
            notify_multiplier,
            device: specific.map(DeviceConfig),
        })
    }

    /// Resets the device, which does no DMA once this has returned without an error; then says that there is a driver
    /// ("Device Initialization", 3.1.1, steps 1 to 3).
    pub(super) fn reset(&self) -> Result<()> {
        self.common.write8(common::DEVICE_STATUS, 0);
        let quiet = poll(|| (self.common.read8(common::DEVICE_STATUS) == 0).then_some(()));
        if quiet.is_none() {
            let status = self.status();
            let (kind, why) = if status == u8::MAX {
                (ErrorKind::Gone, "nothing answers at its registers".to_owned())
            } else {
                (ErrorKind::Timeout, format!("its status is still {status:#04x} after {DEADLINE:?}"))
            };
            return Err(Error::new(kind, "reset it", why).mend("reset the whole function, or take another"));
        }
        self.add_status(status::ACKNOWLEDGE);
        self.add_status(status::DRIVER);
        Ok(())
    }

    pub(super) fn status(&self) -> u8 {
        self.common.read8(common::DEVICE_STATUS)
    }

    fn add_status(&self, bit: u8) {
        self.common.write8(common::DEVICE_STATUS, self.status() | bit);
    }

    /// The features that the device offers.
    pub(super) fn offered(&self) -> Features {
        let half = |select| {
            self.common.write32(common::DEVICE_FEATURE_SELECT, select);
            u64::from(self.common.read32(common::DEVICE_FEATURE))
        };
        Features(half(0) | half(1) << 32)
    }

    /// Accepts these features (3.1.1, steps 4 to 6).
    pub(super) fn accept(&self, features: Features) -> Result<()> {
        for (select, half) in [(0, features.0 as u32), (1, (features.0 >> 32) as u32)] {
            self.common.write32(common::DRIVER_FEATURE_SELECT, select);
            self.common.write32(common::DRIVER_FEATURE, half);
        }
        self.add_status(status::FEATURES_OK);
        if self.status() & status::FEATURES_OK != 0 {
            return Ok(());
        }
        let why = format!("it offers these features and does not take them together: {features}");
        Err(Error::new(ErrorKind::Device, "agree on features", why)
            .mend("ask for fewer offloads, or have the device offer fewer features"))
    }

    /// Lets the device use its queues (3.1.1, step 8).
    pub(super) fn go(&self) {
        self.add_status(status::DRIVER_OK);
    }

    /// The most entries that queue `index` can have: 0 if there is no such queue.
    pub(super) fn max_queue_size(&self, index: u16) -> u16 {
        if index >= self.common.read16(common::NUM_QUEUES) {
            return 0;
        }
        self.common.write16(common::QUEUE_SELECT, index);
        self.common.read16(common::QUEUE_SIZE)
    }

    /// Sets a queue up and enables it ("Virtqueue Configuration", 4.1.5.1.3). Returns where to notify it.
    pub(super) fn enable_queue(&self, setup: &QueueSetup, features: Features) -> Result<Notifier> {
        let QueueSetup { index, size, areas, vector } = setup;
        let wrong = |why: String| nonsense(format_args!("queue {index}"), why);
        let packed = features.contains(Features::RING_PACKED);
        let most = self.max_queue_size(*index);
        if *size > most || !queue_size_is_valid(*size, packed) {
            return Err(wrong(format!("it can not have {size} entries, {most} at most")));
        }
        // max_queue_size has selected it.
        let registers = &self.common;
        registers.write16(common::QUEUE_SIZE, *size);
        let write64 = |at: u64, address: Iova| {
            registers.write32(at, address.get() as u32);
            registers.write32(at + 4, (address.get() >> 32) as u32);
        };
        write64(common::QUEUE_DESC, areas.desc);
        write64(common::QUEUE_DRIVER, areas.driver);
        write64(common::QUEUE_DEVICE, areas.device);
        if let Some(vector) = *vector {
            registers.write16(common::QUEUE_MSIX_VECTOR, vector);
            if registers.read16(common::QUEUE_MSIX_VECTOR) == NO_VECTOR {
                return Err(Error::new(
                    ErrorKind::Exhausted,
                    format!("have queue {index} signal interrupt vector {vector}"),
                    "the device has no resources for it",
                )
                .mend("use fewer queues with interrupts, or poll"));
            }
        }
        let notifier = self.notifier(*index, features)?;
        registers.write16(common::QUEUE_ENABLE, 1);
        if registers.read16(common::QUEUE_ENABLE) != 1 {
            return Err(wrong("it does not let itself be enabled".to_owned()));
        }
        Ok(notifier)
    }

    /// Of the queue that is selected.
    fn notifier(&self, index: u16, features: Features) -> Result<Notifier> {
        let with_position = features.contains(Features::NOTIFICATION_DATA);
        let (width, bytes) = if with_position { ("32", 4) } else { ("16", 2) };
        let at = u64::from(self.common.read16(common::QUEUE_NOTIFY_OFF)) * u64::from(self.notify_multiplier);
        let register = self.notify.window(at, bytes)?;
        if !(self.notify_offset + at).is_multiple_of(bytes) {
            let why = format!("its notification register at {at:#x} is not aligned to {width} bits");
            return Err(nonsense(format_args!("queue {index}"), why));
        }
        let id = if features.contains(Features::NOTIF_CONFIG_DATA) {
            self.common.read16(common::QUEUE_NOTIFY_DATA)
        } else {
            index
        };
        Ok(Notifier { register, id, with_position })
    }

    /// Whether the common configuration has the fields that version 1.2 added.
    pub(super) fn has_notify_data(&self) -> bool {
        self.common.len() >= common::QUEUE_RESET
    }

    /// Reads the device's own configuration through `read`, again if it changed meanwhile ("Driver Requirements: Device
    /// Configuration Space", 2.5.2).
    pub(super) fn config<T>(&self, read: impl Fn(&DeviceConfig) -> Result<T>) -> Result<T> {
        let Some(device) = &self.device else {
            return Err(nonsense("the device configuration structure", "no capability points to it"));
        };
        let generation = || self.common.read8(common::CONFIG_GENERATION);
        let answer = poll(|| {
            let before = generation();
            let value = read(device);
            (generation() == before).then_some(value)
        });
        answer.unwrap_or_else(|| {
            let why = format!("it kept changing for {DEADLINE:?}");
            Err(Error::new(ErrorKind::Timeout, "read its configuration", why).mend("reset the device"))
        })
    }
}

/// The fields of `struct virtio_net_config`.
pub(super) struct DeviceConfig(Bar);

impl DeviceConfig {
    fn check(&self, offset: u64, bytes: u64) -> Result<()> {
        if offset + bytes <= self.0.len() {
            return Ok(());
        }
        let why = format!("its {} bytes do not reach to a field at {offset}", self.0.len());
        Err(nonsense("the device configuration structure", why))
    }

    pub(super) fn mac(&self) -> Result<[u8; 6]> {
        self.check(net::config::MAC, 6)?;
        Ok(std::array::from_fn(|n| self.0.read8(net::config::MAC + n as u64)))
    }

    pub(super) fn read8(&self, offset: u64) -> Result<u8> {
        self.check(offset, 1)?;
        Ok(self.0.read8(offset))
    }

    pub(super) fn read16(&self, offset: u64) -> Result<u16> {
        self.check(offset, 2)?;
        Ok(self.0.read16(offset))
    }

    pub(super) fn read32(&self, offset: u64) -> Result<u32> {
        self.check(offset, 4)?;
        Ok(self.0.read32(offset))
    }
}
