//! VFIO devices: PCI functions, and mediated devices, that the kernel hands to this process.
//!
//! [`PciDevice::open`](crate::pci::PciDevice::open) finds the best way in that the machine has: the device's character
//! device with iommufd; else its group with the type1 IOMMU interface; a device that no IOMMU holds only if the caller
//! takes responsibility ([`Options::unprotected`]). What a driver sees is the same.
//!
//! Sources: `Documentation/driver-api/vfio.rst` and `include/uapi/linux/vfio.h` of Linux 7.3.
//!
//! `unsafe` is in `ioctl` (requests to the kernel) and `map` (registers in this process's memory).

mod events;
mod ioctl;
mod map;
mod open;
mod region;

use std::fmt;
use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use rustix::io::Errno;
use rustix::param::page_size;
use underpass_iommu::{AttachableKind, Error, ErrorKind, IommuBackend, Result, UnprotectedDma};
use vfio_bindings::bindings::vfio;

use self::events::Events;
use self::ioctl::{Handle, Irq};
use self::region::RegionInfo;
use crate::bar::Bar;
use crate::interrupt::{Interrupt, Line};
use crate::model::Width;
use crate::pci::{COMMAND, Config, Function, Registers, cap, command, too_few_vectors};

pub(crate) use open::{open, open_mdev};

/// How a VFIO device is opened.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// The secret that the user of a physical function shares with those of its virtual functions: a UUID.
    pub vf_token: Option<[u8; 16]>,
    /// Also open a device that no IOMMU holds.
    pub unprotected: Option<UnprotectedDma>,
}

/// BARs of a PCI function.
const BARS: usize = 6;

/// The devices that this process has open: a group would open one a second time.
static OPEN: Mutex<Vec<String>> = Mutex::new(Vec::new());

/// A device's place among those that are open.
#[derive(Debug)]
struct Claim(String);

impl Claim {
    fn new(name: &str) -> Result<Self> {
        let mut open = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
        if open.iter().any(|other| other == name) {
            return Err(Error::new(ErrorKind::Busy, "open the device", "this process has it open already")
                .device(name.to_owned())
                .mend("name each device once"));
        }
        open.push(name.to_owned());
        Ok(Self(name.to_owned()))
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        OPEN.lock().unwrap_or_else(PoisonError::into_inner).retain(|name| *name != self.0);
    }
}

/// An open VFIO device.
pub(crate) struct Device {
    events: Events,
    handle: Arc<Handle>,
    iommu: Box<dyn IommuBackend>,
    config: RegionInfo,
    bars: [RegionInfo; BARS],
    /// The kind of vectors that are on.
    vectors: Mutex<Option<Irq>>,
    can_reset: bool,
    numa_node: Option<u32>,
    /// A failed access was logged; the others are not.
    complained: AtomicBool,
    /// Given up when all else is closed, mappings of its registers among that. It has the name.
    claim: Arc<Claim>,
}

impl Device {
    /// Asks the device what it has.
    fn new(
        claim: Claim,
        handle: Handle,
        iommu: Box<dyn IommuBackend>,
        numa_node: Option<u32>,
    ) -> Result<Self> {
        let refused = |what| move |error: io::Error| Error::os(what, "the kernel refuses", error);
        let info = ioctl::device_info(&handle).map_err(refused("ask what the device is"))?;
        if !info.is_pci {
            return Err(Error::new(ErrorKind::Unsupported, "open the device", "it is no PCI device")
                .mend("use one that underpass devices lists"));
        }
        let region = |index: u32| {
            let said = ioctl::region_info(&handle, index);
            RegionInfo::parse(&said.map_err(refused("ask what regions the device has"))?).ok_or_else(|| {
                Error::new(
                    ErrorKind::Device,
                    format!("use region {index} of the device"),
                    "what the kernel says of it makes no sense",
                )
            })
        };
        let mut bars: [RegionInfo; BARS] = Default::default();
        for (index, bar) in (vfio::VFIO_PCI_BAR0_REGION_INDEX..).zip(&mut bars) {
            *bar = region(index)?;
        }
        let config = region(vfio::VFIO_PCI_CONFIG_REGION_INDEX)?;
        let events = Events::watch(&claim.0, &handle)?;
        Ok(Self {
            events,
            handle: Arc::new(handle),
            iommu,
            config,
            bars,
            vectors: Mutex::new(None),
            can_reset: info.can_reset,
            numa_node,
            complained: AtomicBool::new(false),
            claim: Arc::new(claim),
        })
    }

    /// Its BARs, mapped as far as that can be, with memory decoding on.
    fn map_bars(self: &Arc<Self>) -> Vec<(usize, Bar)> {
        let registers = Arc::clone(self) as Arc<dyn Registers>;
        let config = Config::new(Arc::clone(&registers));
        config.enable_memory();
        let table = msix_table(&config);
        let there = self.bars.iter().enumerate().filter(|(_, region)| region.size != 0);
        let bars = there.map(|(index, region)| {
            let table = table.clone().filter(|(bar, _)| *bar == index).map(|(_, place)| place);
            let areas = region.areas(page_size() as u64, table);
            let bar = map::bar(&self.handle, &self.claim, &registers, index, region, &areas);
            (index, bar)
        });
        bars.collect()
    }

    /// Reads `width` at `offset` of a region. As on a bus, what does not answer reads as all ones.
    fn pread(&self, region: &RegionInfo, offset: u64, width: Width) -> u64 {
        let len = width.bytes() as usize;
        let mut value = [0xff; 8];
        let done = rustix::io::pread(self.handle.as_fd(), &mut value[..len], region.offset + offset);
        if done != Ok(len) {
            self.complain("read", offset, done);
            return u64::MAX;
        }
        u64::from_le_bytes(value)
    }

    fn pwrite(&self, region: &RegionInfo, offset: u64, width: Width, value: u64) {
        let len = width.bytes() as usize;
        let done =
            rustix::io::pwrite(self.handle.as_fd(), &value.to_le_bytes()[..len], region.offset + offset);
        if done != Ok(len) {
            self.complain("write", offset, done);
        }
    }

    #[cold]
    fn complain(&self, access: &str, offset: u64, done: Result<usize, Errno>) {
        if !self.complained.swap(true, Ordering::Relaxed) {
            tracing::error!(
                "{}: cannot {access} at {offset:#x}: {done:?}; later ones are not logged",
                self.name()
            );
        }
    }

    /// The command register; all ones where nothing answers ([`Config::answers`]).
    fn command(&self) -> u16 {
        self.read_config(COMMAND, Width::Bits16) as u16
    }

    fn vectors(&self) -> MutexGuard<'_, Option<Irq>> {
        self.vectors.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn os(&self, operation: impl Into<String>, why: &'static str, error: io::Error) -> Error {
        Error::os(operation.into(), why, error).device(self.name().to_owned())
    }

    fn error(&self, kind: ErrorKind, operation: impl Into<String>, why: impl Into<String>) -> Error {
        Error::new(kind, operation.into(), why.into()).device(self.name().to_owned())
    }

    fn disable(&self, vectors: &mut Option<Irq>) -> Result<()> {
        let Some(irq) = vectors.take() else { return Ok(()) };
        ioctl::disable_irqs(&self.handle, irq)
            .map_err(|error| self.os("switch interrupts off", "the kernel refuses", error))
    }

    /// The kind of vectors to use for `count`: the newest that has as many.
    fn kind_for(&self, count: usize) -> Result<Irq> {
        let mut most = 0;
        for irq in [Irq::Msix, Irq::Msi, Irq::Intx] {
            let there = ioctl::irq_count(&self.handle, irq).map_err(|error| {
                self.os("ask what interrupts the device has", "the kernel refuses", error)
            })?;
            if there as usize >= count {
                return Ok(irq);
            }
            most = most.max(there as usize);
        }
        Err(too_few_vectors(count, most).device(self.name().to_owned()))
    }
}

/// The BAR that has the MSI-X table, and where in it (PCI Express Base Specification 6.0, 7.7.2).
fn msix_table(config: &Config) -> Option<(usize, std::ops::Range<u64>)> {
    let at = config.capability(cap::MSIX)?;
    let (control, place) = (config.read16(at + 2), config.read32(at + 4));
    let start = u64::from(place & !7);
    let entries = u64::from(control & 0x7ff) + 1;
    Some(((place & 7) as usize, start..start + entries * 16))
}

impl Registers for Device {
    fn read(&self, bar: usize, offset: u64, width: Width) -> u64 {
        self.pread(&self.bars[bar], offset, width)
    }

    fn write(&self, bar: usize, offset: u64, width: Width, value: u64) {
        self.pwrite(&self.bars[bar], offset, width, value);
    }

    fn read_config(&self, offset: u16, width: Width) -> u32 {
        // Of a conventional device there are 256 bytes.
        if u64::from(offset) + width.bytes() > self.config.size {
            return u32::MAX;
        }
        self.pread(&self.config, offset.into(), width) as u32
    }

    fn write_config(&self, offset: u16, width: Width, value: u32) {
        if u64::from(offset) + width.bytes() <= self.config.size {
            self.pwrite(&self.config, offset.into(), width, value.into());
        }
    }
}

impl Line for Handle {
    fn unmask(&self) {
        if let Err(error) = ioctl::unmask_intx(self) {
            // Interrupts of another kind were asked for since, or none: this one is silent by its owner's wish.
            tracing::debug!("a line interrupt stays masked: {error}");
        }
    }
}

impl Function for Device {
    fn name(&self) -> &str {
        &self.claim.0
    }

    fn kind(&self) -> AttachableKind<'_> {
        self.handle.attachable()
    }

    fn iommu(&self) -> &dyn IommuBackend {
        &*self.iommu
    }

    fn interrupts(&self, count: usize) -> Result<Vec<Interrupt>> {
        let mut vectors = self.vectors();
        self.disable(&mut vectors)?;
        if count == 0 {
            return Ok(Vec::new());
        }
        let irq = self.kind_for(count)?;
        let interrupts = (0..count).map(|_| Interrupt::new()).collect::<Result<Vec<_>>>()?;
        let fds: Vec<_> = interrupts.iter().map(AsFd::as_fd).collect();
        let operation = format!("use {count} interrupt vectors");
        match ioctl::set_irqs(&self.handle, irq, &fds) {
            Ok(0) => *vectors = Some(irq),
            Ok(granted) => {
                return Err(self
                    .error(ErrorKind::Exhausted, operation, format!("the machine has only {granted} for it"))
                    .mend("use fewer queues with interrupts, or poll"));
            }
            Err(error) => return Err(self.os(operation, "the kernel refuses", error)),
        }
        if irq == Irq::Intx {
            let line = Arc::downgrade(&self.handle) as Weak<dyn Line>;
            return Ok(interrupts
                .into_iter()
                .map(|interrupt| interrupt.of_line(Weak::clone(&line)))
                .collect());
        }
        Ok(interrupts)
    }

    fn reset(&self) -> Result<()> {
        let operation = "reset the device";
        if !self.can_reset {
            return Err(self
                .error(
                    ErrorKind::Unsupported,
                    operation,
                    "it has no function-level reset, and the kernel can not reset its bus without other devices",
                )
                .mend("stop it by its own registers; a device alone behind its port can be reset with the port"));
        }
        ioctl::reset(&self.handle).map_err(|error| match error.raw_os_error() {
            // Who takes it away holds it until it is closed: it will not be had again.
            Some(libc::EAGAIN) => self.failure().unwrap_or_else(|| {
                self.error(ErrorKind::Busy, operation, "the kernel is at work on it, or on its bus")
                    .mend("try again")
            }),
            _ => self.os(operation, "the kernel's reset failed", error),
        })?;
        if self.command() == u16::MAX {
            return Err(self
                .error(ErrorKind::Gone, operation, "nothing answers in configuration space after it")
                .mend("check that the device is still there: lspci"));
        }
        Ok(())
    }

    fn stop(&self) {
        if let Err(error) = self.disable(&mut self.vectors()) {
            tracing::error!("{error}");
        }
        let now = self.command();
        if now & command::BUS_MASTER != 0 && now != u16::MAX {
            // With memory decoding, whatever is read: BARs may live on, and a touch of theirs would be SIGBUS.
            let without = now & !command::BUS_MASTER | command::MEMORY;
            self.write_config(COMMAND, Width::Bits16, without.into());
        }
        self.events.stop();
    }

    #[inline]
    fn is_gone(&self) -> bool {
        self.events.gone().is_some()
    }

    fn failure(&self) -> Option<Error> {
        self.events.gone().map(|gone| gone.error().device(self.name().to_owned()))
    }

    fn numa_node(&self) -> Option<u32> {
        self.numa_node
    }
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "vfio::Device({}, {:?})", self.name(), self.handle)
    }
}
