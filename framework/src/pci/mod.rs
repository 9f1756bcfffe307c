//! A PCI function as a driver sees it: configuration space, BARs, interrupts, reset.
//!
//! [`PciDevice`] is one type whatever the function is: a driver is not generic over it and can not tell a model in this
//! process from one that the kernel hands out ([`vfio`]). What is under it speaks through one small trait.

mod address;
mod config;
pub mod host;
mod in_process;

use std::fmt;
use std::sync::Arc;

use underpass_iommu::soft::SoftIommu;
use underpass_iommu::{Attachable, AttachableKind, Error, ErrorKind, Fault, IommuBackend, Result};

pub use address::PciAddress;
pub(crate) use config::COMMAND;
pub use config::{CONFIG_LEN, Config, ConfigSpace};

use crate::bar::Bar;
use crate::interrupt::Interrupt;
use crate::model::{Model, Width};
use crate::vfio;
use in_process::InProcess;

/// Bits of the command register (PCI Express Base Specification 6.0, 7.5.1.1.3).
pub mod command {
    /// The function answers at its memory BARs.
    pub const MEMORY: u16 = 1 << 1;
    /// The function may do DMA.
    pub const BUS_MASTER: u16 = 1 << 2;
}

/// Capability ids (PCI Code and ID Assignment Specification 1.15, section 2).
pub mod cap {
    /// Power management.
    pub const POWER_MANAGEMENT: u8 = 0x01;
    /// Message-signalled interrupts.
    pub const MSI: u8 = 0x05;
    /// Vendor-specific.
    pub const VENDOR: u8 = 0x09;
    /// PCI Express.
    pub const PCIE: u8 = 0x10;
    /// Message-signalled interrupts in a table of their own.
    pub const MSIX: u8 = 0x11;
}

/// Extended capability ids (PCI Code and ID Assignment Specification 1.15, section 3).
pub mod ext_cap {
    /// Address translation services: the device has an IOTLB of its own.
    pub const ATS: u16 = 0x0f;
    /// Page requests: the device can ask for a page.
    pub const PRI: u16 = 0x13;
    /// Process address space ids.
    pub const PASID: u16 = 0x1b;
}

/// Accesses to a function that are a call each: what its [`Config`] and its BARs are over.
pub(crate) trait Registers: Send + Sync {
    /// Reads a register. `offset` is inside the BAR and a multiple of the width.
    fn read(&self, bar: usize, offset: u64, width: Width) -> u64;
    /// Writes a register, likewise.
    fn write(&self, bar: usize, offset: u64, width: Width, value: u64);
    /// Reads configuration space, inside it.
    fn read_config(&self, offset: u16, width: Width) -> u32;
    /// Writes configuration space, inside it.
    fn write_config(&self, offset: u16, width: Width, value: u32);
}

/// What is behind a [`PciDevice`].
pub(crate) trait Function: Registers {
    /// The device's name, for messages.
    fn name(&self) -> &str;
    /// What is attached to an address space.
    fn kind(&self) -> AttachableKind<'_>;
    /// The IOMMU that it is behind.
    fn iommu(&self) -> &dyn IommuBackend;
    /// See [`PciDevice::interrupts`].
    fn interrupts(&self, count: usize) -> Result<Vec<Interrupt>>;
    /// See [`PciDevice::reset`].
    fn reset(&self) -> Result<()>;
    /// Ends the device's interrupts and DMA: its owner is done with it. Accesses still get an answer.
    fn stop(&self);
    /// See [`PciDevice::is_gone`].
    fn is_gone(&self) -> bool {
        false
    }
    /// See [`PciDevice::next_fault`].
    fn next_fault(&self) -> Option<Fault> {
        None
    }
    /// See [`PciDevice::numa_node`].
    fn numa_node(&self) -> Option<u32> {
        None
    }
    /// See [`PciDevice::engine_cores`].
    fn engine_cores(&self) -> Vec<Option<usize>> {
        Vec::new()
    }
    /// See [`PciDevice::failure`].
    fn failure(&self) -> Option<Error> {
        None
    }
    /// See [`PciDevice::step`].
    fn step(&self) -> bool {
        false
    }
}

/// Who runs a software device's engines.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Run {
    /// A thread each.
    Threads {
        /// Engine n runs on `cores[n % cores.len()]`; empty leaves them to the scheduler.
        cores: Vec<usize>,
    },
    /// Whoever calls [`PciDevice::step`], and every register read, so that a driver that polls a status register
    /// makes progress. What happens when is then up to the caller alone.
    Stepped,
    /// As [`Stepped`](Self::Stepped), and the driver lends its own time where it looks at a queue
    /// ([`PciDevice::lend`]): a worker runs its device along with itself, on one core.
    Inline,
}

/// A PCI function that this process drives.
///
/// Dropping it ends the device's DMA: engine threads are stopped and joined. [`Bar`]s taken from it stay valid. Behind
/// those of a software device nothing works any more; a device of the kernel's stays open, and can not be opened anew or
/// unplugged, until the last of them is dropped.
pub struct PciDevice {
    // Unmapped before what they belong to is closed.
    bars: Vec<(usize, Bar)>,
    function: Arc<dyn Function>,
    /// The same, if drivers lend its engines their time: on the data path this is one branch.
    inline: Option<Arc<InProcess>>,
    config: Config,
}

impl PciDevice {
    /// A software device in this process, behind `iommu`. Memory decoding is on; bus mastering is not yet.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] for a core that does not exist; [`ErrorKind::InvalidInput`] for a model whose BARs make
    /// no sense; the operating system's refusal to start a thread.
    pub fn in_process(name: &str, model: Box<dyn Model>, iommu: &SoftIommu, run: Run) -> Result<Self> {
        let specs = model.bars();
        let inline = run == Run::Inline;
        let function = InProcess::start(model, name, iommu, run)?;
        let bars = specs
            .into_iter()
            .map(|spec| Ok((spec.index, in_process::bar(&function, spec)?)))
            .collect::<Result<_>>()
            .map_err(|error| error.device(name.to_owned()));
        let inline = inline.then(|| Arc::clone(&function));
        // Before the error goes on: dropping the device is what stops its engines.
        let mut this = Self::new(function, inline);
        this.set_bars(bars?);
        Ok(this)
    }

    /// The PCI function at `address`, which is bound to vfio-pci. The kernel resets it; memory decoding is on, bus
    /// mastering is not yet.
    ///
    /// By its character device and [`Iommufd::shared`](crate::iommu::iommufd::Iommufd::shared) where the kernel has both; else by
    /// its group, with the type1 IOMMU interface. A device that no IOMMU holds is opened only with
    /// [`Options::unprotected`](vfio::Options::unprotected).
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] if there is no such device, or it is bound to no driver; [`ErrorKind::Busy`] if another
    /// driver or process has it; [`ErrorKind::Permission`] if this user may not, or no IOMMU holds it;
    /// [`ErrorKind::Unsupported`] where the kernel can not.
    pub fn open(address: PciAddress, options: &vfio::Options) -> Result<Self> {
        vfio::open(address, options).map(Self::over_vfio)
    }

    /// The mediated device that is `/sys/bus/mdev/devices/UUID`, likewise.
    ///
    /// # Errors
    /// As for [`open`](Self::open); [`ErrorKind::InvalidInput`] if `uuid` is none.
    pub fn open_mdev(uuid: &str, options: &vfio::Options) -> Result<Self> {
        vfio::open_mdev(uuid, options).map(Self::over_vfio)
    }

    fn over_vfio((device, bars): (Arc<vfio::Device>, Vec<(usize, Bar)>)) -> Self {
        let mut this = Self::new(device, None);
        this.set_bars(bars);
        this
    }

    fn new(function: Arc<dyn Function>, inline: Option<Arc<InProcess>>) -> Self {
        let config = Config::new(Arc::clone(&function) as Arc<dyn Registers>);
        Self { function, inline, config, bars: Vec::new() }
    }

    fn set_bars(&mut self, bars: Vec<(usize, Bar)>) {
        let name = self.name();
        let named = |(index, bar): (usize, Bar)| (index, bar.named(format!("BAR {index} of {name}")));
        self.bars = bars.into_iter().map(named).collect();
    }

    /// The device's name: "soft:dsa", "0000:3b:00.0".
    pub fn name(&self) -> &str {
        self.function.name()
    }

    /// Its configuration space.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// One of its BARs.
    ///
    /// # Errors
    /// [`ErrorKind::Device`] if it has no such BAR: a driver that knows the device expects it.
    pub fn bar(&self, index: usize) -> Result<Bar> {
        let found = self.bars.iter().find(|(found, _)| *found == index);
        found.map(|(_, bar)| bar.clone()).ok_or_else(|| {
            self.error(ErrorKind::Device, format!("use BAR {index}"), "the device has no such memory BAR")
        })
    }

    /// Its interrupt vectors from 0 to `count` - 1, signalled from now on. Those asked for before fall silent.
    ///
    /// A message-signalled interrupt is a write of the device's: it takes bus mastering.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] if it has fewer; the kernel's refusal.
    pub fn interrupts(&self, count: usize) -> Result<Vec<Interrupt>> {
        self.function.interrupts(count)
    }

    /// Resets the function. Configuration space, bus mastering included, is as before: like the kernel's reset, this
    /// restores it.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] for a device that the kernel knows no way to reset alone.
    pub fn reset(&self) -> Result<()> {
        self.function.reset()
    }

    /// Whether the device is gone, or about to go: it was unplugged, the kernel asks for it back, or it had an error that
    /// ends its use. Never false again. A call and one relaxed load: cheap enough for a worker's loop.
    ///
    /// Whoever sees it stops using the device and drops it; the kernel waits for that. Until then no access fails:
    /// registers of a device that has left read as all ones.
    #[inline]
    pub fn is_gone(&self) -> bool {
        self.function.is_gone()
    }

    /// Lets the function do DMA, or not.
    ///
    /// # Errors
    /// [`ErrorKind::Device`] if the bit does not stay as written.
    pub fn set_bus_master(&self, on: bool) -> Result<()> {
        self.config.set_bus_master(on);
        let operation = format!("switch bus mastering {}", if on { "on" } else { "off" });
        if !self.config.answers() {
            return Err(self
                .error(ErrorKind::Gone, operation, "nothing answers in configuration space")
                .mend("check that the device is still there: lspci"));
        }
        if self.config.bus_master() == on {
            return Ok(());
        }
        Err(self
            .error(ErrorKind::Device, operation, "the command register does not keep what is written")
            .mend("reset the device"))
    }

    /// The IOMMU that it is behind.
    pub fn iommu(&self) -> &dyn IommuBackend {
        self.function.iommu()
    }

    /// The next access of the device that the IOMMU refused.
    pub fn next_fault(&self) -> Option<Fault> {
        self.function.next_fault()
    }

    /// The NUMA node that it is at, if it is at one.
    pub fn numa_node(&self) -> Option<u32> {
        self.function.numa_node()
    }

    /// The core that each engine thread is pinned to; `None` for one that is not. Empty when they are stepped.
    pub fn engine_cores(&self) -> Vec<Option<usize>> {
        self.function.engine_cores()
    }

    /// Why the device will not finish what it was given: it [is gone](Self::is_gone), or an engine of a software device
    /// runs no more.
    pub fn failure(&self) -> Option<Error> {
        self.function.failure()
    }

    /// Under [`Run::Stepped`] and [`Run::Inline`], steps each engine once and returns whether any did work. Those that
    /// another thread steps at this moment are left out; false where they have threads of their own.
    pub fn step(&self) -> bool {
        self.function.step()
    }

    /// For a driver, before it looks at queue `queue`: under [`Run::Inline`] one step of engine `queue`, modulo their
    /// number. For any other device nothing happens. Returns whether the device lives on time lent to it, so that whoever
    /// sleeps until it signals would sleep for ever.
    #[inline]
    #[allow(clippy::must_use_candidate, reason = "called to lend, mostly")]
    pub fn lend(&self, queue: usize) -> bool {
        match &self.inline {
            Some(function) => function.lend(queue),
            None => false,
        }
    }

    fn error(&self, kind: ErrorKind, operation: String, why: impl Into<String>) -> Error {
        Error::new(kind, operation, why.into()).device(self.name().to_owned())
    }
}

/// The refusal of more interrupt vectors than a device has.
pub(crate) fn too_few_vectors(count: usize, vectors: usize) -> Error {
    Error::new(
        ErrorKind::Unsupported,
        format!("use {count} interrupt vectors"),
        format!("the device has {vectors}"),
    )
    .mend("use fewer queues with interrupts, or poll")
}

impl Attachable for PciDevice {
    fn name(&self) -> &str {
        self.function.name()
    }

    fn kind(&self) -> AttachableKind<'_> {
        self.function.kind()
    }
}

impl fmt::Debug for PciDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PciDevice")
            .field("name", &self.name())
            .field("config", &self.config)
            .field("bars", &self.bars)
            .finish_non_exhaustive()
    }
}

impl Drop for PciDevice {
    fn drop(&mut self) {
        // BARs may live on: what ends now is what the device does by itself.
        self.function.stop();
    }
}
