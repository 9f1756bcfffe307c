//! The software twin of the device: it answers the registers, takes descriptors at its portals and does what they say,
//! behind the software IOMMU. It is what the driver is tested against, so it checks what the specification says a
//! device checks, and believes nothing that a driver or a guest writes.
//!
//! What is where: `queue` takes descriptors at the portals, lock-free; `engine` takes them from there, `check`
//! refuses bad ones and `execute` does the others; `registers` is the register file, `command` what a write to
//! CMD starts; `device` is what all of them share.
//!
//! Where the public documents leave something open, the model does this:
//! - *Abort* drops descriptors that have not begun, ends the others after the piece of data at hand, and writes no
//!   completion records for them. Descriptors that are submitted while the abort runs may be dropped with them.
//! - Commands that wait (disable, drain, abort, reset) complete in an engine's step or at a register access.
//! - A disabled or draining queue drops what is posted, with a software error, and answers a deferrable write
//!   with retry. So does a dedicated queue to a deferrable write.
//! - PASIDs are enabled in the PASID capability from the start: that register belongs to whoever owns the IOMMU.
//! - Switching bus mastering off stops the engines where they are; switching it on lets them go on.
//!
//! The default profile has the numbers of a Sapphire Rapids part, which reads GENCAP as 0x40915f0107. The model's differs
//! in these bits:
//! - *Block on fault* (0) is missing: it needs page requests to the IOMMU. Every fault ends its descriptor.
//! - *Cache control for flushes* (3) is added: a flush that keeps the lines does here what one that drops them does.
//! - *Interrupt message storage* (30:25, 8 there) is 0: there are the MSI-X vectors. Its portal pages take descriptors,
//!   as on all parts, but not interrupt handles.
//! - Bit 38 is 0: it is reserved in the public documents.
//!
mod check;
mod command;
mod config_space;
mod device;
mod engine;
mod execute;
mod queue;
mod registers;

use std::fmt;
use std::sync::Arc;

use underpass::model::{BarKind, BarSpec, Doorbell, Engine, Host, Model, Width};
use underpass::pci::ConfigSpace;

use self::device::Device;
use self::queue::PortalPage;
use super::spec;

/// What kind of device a model is.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(clippy::struct_excessive_bools, reason = "each is a capability bit of the device")]
pub struct DsaProfile {
    /// Work queues, 1 to [`MAX_WQS`](Self::MAX_WQS).
    pub wqs: usize,
    /// Engines, 1 to [`MAX_ENGINES`](Self::MAX_ENGINES).
    pub engines: usize,
    /// Groups, 1 to [`MAX_GROUPS`](Self::MAX_GROUPS).
    pub groups: usize,
    /// Entries that all work queues share.
    pub wq_entries: u16,
    /// VERSION.
    pub version: u32,
    /// log2 of the largest transfer, at most 31.
    pub max_transfer_shift: u32,
    /// log2 of the largest batch, at most 15.
    pub max_batch_shift: u32,
    /// Memory move takes overlapping buffers.
    pub overlapping_copy: bool,
    /// There are shared work queues.
    pub shared: bool,
    /// There are dedicated work queues.
    pub dedicated: bool,
    /// Operations can be switched off for each queue (WQCFGs have 64 bytes then).
    pub op_config: bool,
    /// CMDCAP says which commands there are. Without it there are the same, except for those of interrupt handles.
    pub command_capabilities: bool,
    /// Interrupt handles must be requested by command; otherwise a handle is a vector's number. CMDCAP tells a driver,
    /// so this comes with `command_capabilities`.
    pub interrupt_handles: bool,
    /// Operations: bit n for opcode n.
    pub operations: u64,
}

impl DsaProfile {
    /// The most work queues.
    pub const MAX_WQS: usize = 32;
    /// The most engines.
    pub const MAX_ENGINES: usize = 32;
    /// The most groups.
    pub const MAX_GROUPS: usize = 16;

    /// The same profile with everything brought into its range.
    fn in_range(mut self) -> Self {
        self.wqs = self.wqs.clamp(1, Self::MAX_WQS);
        self.engines = self.engines.clamp(1, Self::MAX_ENGINES);
        self.groups = self.groups.clamp(1, Self::MAX_GROUPS);
        self.wq_entries = self.wq_entries.max(1);
        self.max_transfer_shift = self.max_transfer_shift.min(31);
        self.max_batch_shift = self.max_batch_shift.min(15);
        self.command_capabilities |= self.interrupt_handles;
        self
    }
}

impl Default for DsaProfile {
    /// A Sapphire Rapids part, as far as [the model](self) goes.
    fn default() -> Self {
        Self {
            wqs: 8,
            engines: 4,
            groups: 4,
            wq_entries: 128,
            version: 0x100,
            max_transfer_shift: 31,
            max_batch_shift: 10,
            overlapping_copy: true,
            shared: true,
            dedicated: true,
            op_config: false,
            command_capabilities: false,
            interrupt_handles: false,
            operations: spec::Opcode::ALL.iter().fold(0, |bits, opcode| bits | opcode.bit()),
        }
    }
}

/// Interrupt vectors: 0 for the device's own causes, the others for completions.
const VECTORS: usize = 9;

/// A software DSA.
pub struct DsaModel {
    device: Arc<Device>,
}

impl DsaModel {
    /// A disabled device of this kind. What is out of range in the profile is brought into it.
    pub fn new(profile: DsaProfile) -> Self {
        Self { device: Arc::new(Device::new(profile.in_range())) }
    }
}

impl Default for DsaModel {
    fn default() -> Self {
        Self::new(DsaProfile::default())
    }
}

impl fmt::Debug for DsaModel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DsaModel").field("profile", &self.device.profile).finish_non_exhaustive()
    }
}

impl Model for DsaModel {
    fn config_space(&self) -> ConfigSpace {
        config_space::config_space()
    }

    fn bars(&self) -> Vec<BarSpec> {
        let pages = self.device.profile.wqs as u64 * spec::PORTALS_PER_WQ;
        let portal = |page| {
            let wq = (page / spec::PORTALS_PER_WQ) as usize;
            Arc::new(PortalPage::new(Arc::clone(&self.device), wq, spec::Portal::from_page(page)))
                as Arc<dyn Doorbell>
        };
        let targets = (0..pages.next_power_of_two()).map(portal).collect();
        vec![
            BarSpec { index: spec::REGISTER_BAR, len: spec::REGISTER_BAR_LEN, kind: BarKind::Registers },
            BarSpec {
                index: spec::PORTAL_BAR,
                len: pages.next_power_of_two() * spec::PORTAL_PAGE,
                kind: BarKind::Doorbells { page: spec::PORTAL_PAGE, targets },
            },
        ]
    }

    fn vectors(&self) -> usize {
        VECTORS
    }

    fn start(&mut self, host: Arc<dyn Host>) -> Vec<Box<dyn Engine>> {
        self.device.start(&*host);
        engine::engines(&self.device, &*host)
    }

    fn read(&mut self, bar: usize, offset: u64, width: Width) -> u64 {
        if bar != spec::REGISTER_BAR {
            return 0;
        }
        let mut control = self.device.control();
        command::progress(&self.device, &mut control);
        control.read(&self.device, offset, width)
    }

    fn write(&mut self, bar: usize, offset: u64, width: Width, value: u64) {
        if bar != spec::REGISTER_BAR {
            return;
        }
        let mut control = self.device.control();
        command::progress(&self.device, &mut control);
        // The registers are 32 and 64 bits wide; narrower writes are dropped.
        match width {
            Width::Bits8 | Width::Bits16 => {}
            Width::Bits32 => control.write(&self.device, offset, value as u32),
            Width::Bits64 => {
                control.write(&self.device, offset, value as u32);
                control.write(&self.device, offset + 4, (value >> 32) as u32);
            }
        }
    }

    fn config_written(&mut self, config: &ConfigSpace) {
        self.device.set_functions(config_space::functions(config));
    }

    fn reset(&mut self) {
        let mut control = self.device.control();
        self.device.quiesce();
        control.reset(&self.device);
    }
}
