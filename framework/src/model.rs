//! What a software device implements: the other side of the registers, doorbells and DMA that a driver uses.
//!
//! A [`Model`] is the register side. Its BARs are served under a lock, as slow paths are; doorbell and portal
//! pages are not: each is a lock-free [`Doorbell`], usually around a [`Mailbox`] (a full one is a shared queue's
//! "retry"). The work is done by [`Engine`]s, which take what those mailboxes hold, move data
//! through a [`Bus`] of their own, and signal through [`Interrupts`]. An engine runs on a thread of its own, or is
//! stepped by a test or by the worker.

mod mailbox;

use std::fmt;
use std::sync::Arc;

pub use underpass_iommu::soft::{Bus, DmaFault};

pub use self::mailbox::{Mailbox, Refused};
use crate::interrupt::Interrupts;
use crate::pci::ConfigSpace;

/// How wide a register access is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[allow(missing_docs, reason = "the names say it")]
pub enum Width {
    Bits8 = 1,
    Bits16 = 2,
    Bits32 = 4,
    Bits64 = 8,
}

impl Width {
    /// Bytes of such an access.
    #[inline]
    pub const fn bytes(self) -> u64 {
        self as u64
    }
}

/// How one BAR is served.
#[non_exhaustive]
pub enum BarKind {
    /// Every access is a call to [`Model::read`] or [`Model::write`].
    Registers,
    /// Pages of `page` bytes; an access to page n goes to doorbell n.
    Doorbells {
        /// Bytes in a page, a power of two.
        page: u64,
        /// One a page, from the first on. Pages behind the last take no writes.
        targets: Vec<Arc<dyn Doorbell>>,
    },
    /// Plain shared memory; the model reads it through the same [`Bar`](crate::bar::Bar).
    Memory(crate::bar::Bar),
}

impl fmt::Debug for BarKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Registers => f.write_str("Registers"),
            Self::Doorbells { page, targets } => write!(f, "Doorbells({} pages of {page})", targets.len()),
            Self::Memory(_) => f.write_str("Memory"),
        }
    }
}

/// One BAR of a model.
#[derive(Debug)]
pub struct BarSpec {
    /// Which, 0 to 5.
    pub index: usize,
    /// Bytes, a power of two from 64 up.
    pub len: u64,
    /// How it is served.
    pub kind: BarKind,
}

/// A page of doorbells or a submission portal: lock-free, because several threads ring at once.
pub trait Doorbell: Send + Sync {
    /// A posted write of 64 bytes (MOVDIR64B) at `offset` in the page, a multiple of 64. What does not fit is the
    /// model's to report.
    fn post64(&self, offset: u64, data: &[u8; 64]);

    /// A deferrable write of 64 bytes (ENQCMD). False is the device's "retry".
    fn enqueue64(&self, offset: u64, data: &[u8; 64]) -> bool;

    /// A smaller write, of `width` bytes at `offset`.
    fn write(&self, offset: u64, width: Width, value: u64);
}

/// What a model gets to work with when it is started.
pub trait Host: Send + Sync {
    /// A way to memory, for one engine.
    fn bus(&self) -> Bus;
    /// The device's interrupt vectors.
    fn interrupts(&self) -> Interrupts;
    /// The device's name, for messages.
    fn name(&self) -> &str;
}

/// The register side of a software device.
pub trait Model: Send {
    /// Its configuration space at reset, with which bits can be written.
    fn config_space(&self) -> ConfigSpace;

    /// Its BARs. Asked once, before [`start`](Self::start).
    fn bars(&self) -> Vec<BarSpec>;

    /// How many interrupt vectors it has.
    fn vectors(&self) -> usize;

    /// Starts the device and returns its engines, which run until the device is dropped.
    fn start(&mut self, host: Arc<dyn Host>) -> Vec<Box<dyn Engine>>;

    /// A register read. `offset` is inside the BAR and a multiple of the width.
    fn read(&mut self, bar: usize, offset: u64, width: Width) -> u64;

    /// A register write, likewise.
    fn write(&mut self, bar: usize, offset: u64, width: Width, value: u64);

    /// Configuration space was written: what is in it now. Called before [`start`](Self::start), too.
    fn config_written(&mut self, config: &ConfigSpace);

    /// A function-level reset: everything as after power-on. Returns when no engine does DMA any more for work
    /// that was accepted before. It may wait for a step in progress, never for one that has yet to begin: stepped
    /// engines get none meanwhile, and one that panicked never does. Configuration space follows by
    /// [`config_written`](Self::config_written), as the host restores it.
    fn reset(&mut self);
}

/// What does a device's work.
pub trait Engine: Send {
    /// Does a bounded piece of work, of some hundred microseconds at most, and returns whether there was any. A reset, a
    /// command and the thread that steps the engine may have to wait for a step to end.
    fn step(&mut self) -> bool;
}
