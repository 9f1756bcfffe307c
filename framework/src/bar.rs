//! A BAR: the registers, doorbells or memory that a PCI function shows, whatever stands behind them.
//!
//! # Why this module is unsafe, and what makes it sound
//! Real registers are reached through raw pointers into mappings of the device (`mmio` has what is done with them).
//! The invariant: whoever makes an `Area` vouches for its bytes as long as it lives, every [`Bar`] over them holds it,
//! and `Bar::at` is the only way to an offset: it lets nothing through that is misaligned or does not end inside the
//! window. No reference to MMIO is ever made.
//!
//! # Ordering
//! Writes come after everything that this thread did before, and reads before everything that it does after: what a
//! doorbell announces is in memory by then. On MMIO that is a fence for the compiler and, on x86-64, nothing for the
//! CPU: uncached accesses are reordered neither with each other nor with earlier stores (Intel SDM vol. 3A, "Memory
//! Ordering").

mod mmio;

use std::any::Any;
use std::fmt;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use underpass_iommu::{Error, ErrorKind, Result};

pub(crate) use mmio::Area;
use mmio::cpu_has_movdir64b;

use crate::model::{Doorbell, Width};
use crate::pci::Registers;

/// A BAR, or a [`window`](Self::window) of one. Clones show the same registers.
///
/// Accesses are naturally aligned and lie inside; anything else is a driver's bug and panics. An offset that the
/// *device* reported is another matter: make a [`window`](Self::window) of it, which returns an error.
#[derive(Clone)]
pub struct Bar {
    target: Target,
    /// Where the window starts in the target.
    start: u64,
    len: u64,
    name: Arc<str>,
}

/// What is behind a BAR.
#[derive(Clone)]
enum Target {
    /// A real device, mapped as far as the window reaches.
    Mmio { area: Area, can_post: bool },
    /// A real device of which only parts are mapped; the rest takes a call each.
    Parts { areas: Arc<[Area]>, can_post: bool, bar: usize, rest: Arc<dyn Registers> },
    /// Registers that take a call each.
    Registers { bar: usize, function: Arc<dyn Registers> },
    /// A model's doorbells and portals: page n is `targets[n]`.
    Doorbells { shift: u32, targets: Arc<[Arc<dyn Doorbell>]> },
    /// Memory, which the model or a test reads through another clone.
    Memory(Arc<[AtomicU64]>),
}

impl Bar {
    /// Zeroed plain memory of `len` bytes in place of a device, for shared-memory BARs and tests. `len` is rounded up
    /// to a multiple of 64.
    ///
    /// 64-bit accesses are single atomic ones. A narrower one takes or, by compare-and-swap, changes its part of
    /// the 64-bit word, so that concurrent writers of one word do not undo each other.
    pub fn memory(len: u64) -> Self {
        let words = (0..len.div_ceil(64) * 8).map(|_| AtomicU64::new(0)).collect::<Arc<[_]>>();
        let len = words.len() as u64 * 8;
        Self { target: Target::Memory(words), start: 0, len, name: "memory".into() }
    }

    /// Registers of a real device, mapped at `ptr`.
    ///
    /// # Panics
    /// If `ptr` is not aligned to 64 bytes; a mapping of a BAR is aligned to a page.
    ///
    /// # Safety
    /// While `keep` lives, the `len` bytes at `ptr` stay mapped, readable and writable, and nothing makes a
    /// reference to them. They may be accessed from any thread.
    pub unsafe fn from_mmio(ptr: NonNull<u8>, len: u64, keep: Arc<dyn Any + Send + Sync>) -> Self {
        assert!(ptr.addr().get().is_multiple_of(64), "MMIO at {ptr:?} is not aligned to 64 bytes");
        // SAFETY: the caller's.
        let area = unsafe { Area::new(0, ptr, len, keep) };
        let target = Target::Mmio { area, can_post: cpu_has_movdir64b() };
        Self { target, start: 0, len, name: "MMIO".into() }
    }

    /// `bar` of a real device: `areas` of it, aligned to 64 bytes, are mapped, and the rest takes a call each.
    pub(crate) fn device(areas: Vec<Area>, rest: Arc<dyn Registers>, bar: usize, len: u64) -> Self {
        let can_post = cpu_has_movdir64b();
        let target = Target::Parts { areas: areas.into(), can_post, bar, rest };
        let whole = Self { target, start: 0, len, name: "MMIO".into() };
        whole.narrowed()
    }

    /// The same, but straight to the mapping if that has the whole window.
    fn narrowed(self) -> Self {
        let Target::Parts { areas, can_post, .. } = &self.target else { return self };
        let Some(area) = areas.iter().find(|area| area.holds(self.start, self.len)) else { return self };
        let target = Target::Mmio { area: area.clone(), can_post: *can_post };
        Self { target, ..self }
    }

    /// Registers that are a call each, of `bar` of `function`.
    pub(crate) fn registers(function: Arc<dyn Registers>, bar: usize, len: u64) -> Self {
        Self { target: Target::Registers { bar, function }, start: 0, len, name: "registers".into() }
    }

    /// Doorbell pages of `page` bytes, a power of two.
    pub(crate) fn doorbells(targets: Arc<[Arc<dyn Doorbell>]>, page: u64, len: u64) -> Self {
        let target = Target::Doorbells { shift: page.trailing_zeros(), targets };
        Self { target, start: 0, len, name: "doorbells".into() }
    }

    /// The same BAR under this name ("soft:dsa BAR 2"), for messages.
    pub(crate) fn named(mut self, name: impl Into<Arc<str>>) -> Self {
        self.name = name.into();
        self
    }

    /// Length in bytes.
    #[allow(clippy::len_without_is_empty, reason = "an empty BAR does not exist")]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// The `len` bytes at `offset` as a BAR of their own. For every offset that the device reported:
    /// [`ErrorKind::Device`] if they are not all inside this BAR, or there are none.
    pub fn window(&self, offset: u64, len: u64) -> Result<Self> {
        if len == 0 || offset.checked_add(len).is_none_or(|end| end > self.len) {
            return Err(Error::new(
                ErrorKind::Device,
                format!("use {len:#x} bytes at {offset:#x} of {}", self.name),
                format!("it has {:#x} bytes; the device reported a wrong place", self.len),
            )
            .mend("reset the device; if it stays so, it is broken or not what its ids say"));
        }
        Ok(Self { start: self.start + offset, len, ..self.clone() }.narrowed())
    }

    /// Reads 8 bits. See [`read64`](Self::read64).
    #[inline]
    pub fn read8(&self, offset: u64) -> u8 {
        self.read(offset, Width::Bits8) as u8
    }

    /// Reads 16 bits. See [`read64`](Self::read64).
    #[inline]
    pub fn read16(&self, offset: u64) -> u16 {
        self.read(offset, Width::Bits16) as u16
    }

    /// Reads 32 bits. See [`read64`](Self::read64).
    #[inline]
    pub fn read32(&self, offset: u64) -> u32 {
        self.read(offset, Width::Bits32) as u32
    }

    /// Reads 64 bits. A place where nothing answers, such as a doorbell, reads as all ones.
    ///
    /// # Panics
    /// If the access is misaligned or does not lie inside.
    #[inline]
    pub fn read64(&self, offset: u64) -> u64 {
        self.read(offset, Width::Bits64)
    }

    /// Writes 8 bits. See [`write64`](Self::write64).
    #[inline]
    pub fn write8(&self, offset: u64, value: u8) {
        self.write(offset, Width::Bits8, value.into());
    }

    /// Writes 16 bits. See [`write64`](Self::write64).
    #[inline]
    pub fn write16(&self, offset: u64, value: u16) {
        self.write(offset, Width::Bits16, value.into());
    }

    /// Writes 32 bits. See [`write64`](Self::write64).
    #[inline]
    pub fn write32(&self, offset: u64, value: u32) {
        self.write(offset, Width::Bits32, value.into());
    }

    /// Writes 64 bits.
    ///
    /// # Panics
    /// If the access is misaligned or does not lie inside.
    #[inline]
    pub fn write64(&self, offset: u64, value: u64) {
        self.write(offset, Width::Bits64, value);
    }

    /// Whether [`post64`](Self::post64) works here: ask once, before the first.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] for the registers of a real device on a CPU without MOVDIR64B, or that are not mapped.
    pub fn can_post64(&self) -> Result<()> {
        match self.target {
            Target::Mmio { can_post: false, .. } => Err(Error::new(
                ErrorKind::Unsupported,
                format!("post descriptors to {}", self.name),
                "this CPU has no MOVDIR64B instruction (CPUID leaf 7, ECX bit 28)",
            )
            .mend("use a CPU that has it (Intel Sapphire Rapids or later), or a software device: soft:dsa")),
            Target::Parts { .. } => Err(Error::new(
                ErrorKind::Unsupported,
                format!("post descriptors to {}", self.name),
                "these registers are reached by system calls, of 8 bytes at most",
            )
            .mend("give the kernel's own driver the device, or a software device: soft:dsa")),
            _ => Ok(()),
        }
    }

    /// Posts 64 bytes as one write, after all earlier stores: how a descriptor gets to a dedicated work queue.
    ///
    /// MOVDIR64B on the registers of a real device (Intel SDM vol. 2: a 64-byte direct store with write atomicity), a
    /// call on a model's doorbell; on memory and on registers that take a call each, eight 64-bit writes in
    /// ascending order, of which the last one releases.
    ///
    /// # Panics
    /// If `offset` is misaligned or the write does not lie inside; where [`can_post64`](Self::can_post64) is an error.
    #[inline]
    pub fn post64(&self, offset: u64, data: &[u8; 64]) {
        let at = self.at(offset, 64);
        match &self.target {
            Target::Memory(words) => {
                let words = &words[(at / 8) as usize..][..8];
                for (n, word) in words.iter().enumerate() {
                    // Release on the last one alone: who loads it with Acquire sees the others.
                    let order = if n == 7 { Ordering::Release } else { Ordering::Relaxed };
                    word.store(nth_word(data, n), order);
                }
            }
            Target::Doorbells { shift, targets } => {
                if let Some(target) = targets.get((at >> shift) as usize) {
                    target.post64(at & ((1 << shift) - 1), data);
                }
            }
            Target::Mmio { area, can_post } => {
                assert!(*can_post, "post64 on {} without can_post64", self.name);
                // SAFETY: at() checked that all 64 bytes lie inside the mapping, aligned; the CPU has the instruction
                // (can_post).
                unsafe { area.post64(at, data) };
            }
            Target::Parts { .. } => panic!("post64 on {} without can_post64", self.name),
            Target::Registers { bar, function } => {
                for n in 0..8 {
                    function.write(*bar, at + n as u64 * 8, Width::Bits64, nth_word(data, n));
                }
            }
        }
    }

    /// Offers 64 bytes to a shared work queue (a deferrable memory write, as ENQCMD makes one). False is the device's
    /// "retry": it did not take them. Memory takes all.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] on the registers of a real device: user-mode ENQCMD takes its PASID from an MSR
    /// (`IA32_PASID`) that only a kernel driver loads. Also on registers that are no portal.
    ///
    /// # Panics
    /// If `offset` is misaligned or the write does not lie inside.
    #[inline]
    pub fn enqueue64(&self, offset: u64, data: &[u8; 64]) -> Result<bool> {
        match &self.target {
            Target::Doorbells { shift, targets } => {
                let at = self.at(offset, 64);
                let target = targets.get((at >> shift) as usize);
                Ok(target.is_some_and(|target| target.enqueue64(at & ((1 << shift) - 1), data)))
            }
            Target::Memory(_) => {
                self.post64(offset, data);
                Ok(true)
            }
            _ => Err(self.no_enqueue()),
        }
    }

    #[cold]
    fn no_enqueue(&self) -> Error {
        let why = match self.target {
            Target::Mmio { .. } | Target::Parts { .. } => {
                "user-mode ENQCMD takes its PASID from an MSR that only a kernel driver can load"
            }
            _ => "these are registers, not a submission portal",
        };
        Error::new(
            ErrorKind::Unsupported,
            format!("submit to a shared work queue through {}", self.name),
            why,
        )
        .mend("configure the work queue as dedicated")
    }

    /// Where `bytes` (a power of two) at `offset` of the window are in the target.
    #[inline]
    fn at(&self, offset: u64, bytes: u64) -> u64 {
        let inside = self.len.checked_sub(bytes).is_some_and(|last| offset <= last);
        // What matters is the place in the target: a device may report a window at any offset.
        let at = self.start.wrapping_add(offset);
        if !inside || at & (bytes - 1) != 0 {
            self.refuse(offset, bytes);
        }
        at
    }

    #[cold]
    #[inline(never)]
    fn refuse(&self, offset: u64, bytes: u64) -> ! {
        panic!(
            "{}: access of {bytes} bytes at {offset:#x} is outside or misaligned (window of {:#x} bytes at {:#x})",
            self.name, self.len, self.start
        )
    }

    #[inline]
    fn read(&self, offset: u64, width: Width) -> u64 {
        let at = self.at(offset, width.bytes());
        match &self.target {
            // SAFETY: at() checked that the access lies inside the mapping, aligned.
            Target::Mmio { area, .. } => unsafe { area.read(at, width) },
            Target::Parts { areas, bar, rest, .. } => {
                match areas.iter().find(|area| area.holds(at, width.bytes())) {
                    // SAFETY: the area holds all of the access, which at() checked to be aligned.
                    Some(area) => unsafe { area.read(at, width) },
                    None => rest.read(*bar, at, width) & ones(width),
                }
            }
            Target::Memory(words) => {
                let word = words[(at / 8) as usize].load(Ordering::Acquire);
                (word >> (at % 8 * 8)) & ones(width)
            }
            Target::Registers { bar, function } => function.read(*bar, at, width) & ones(width),
            Target::Doorbells { .. } => ones(width),
        }
    }

    #[inline]
    fn write(&self, offset: u64, width: Width, value: u64) {
        let at = self.at(offset, width.bytes());
        match &self.target {
            // SAFETY: at() checked that the access lies inside the mapping, aligned.
            Target::Mmio { area, .. } => unsafe { area.write(at, width, value) },
            Target::Parts { areas, bar, rest, .. } => {
                match areas.iter().find(|area| area.holds(at, width.bytes())) {
                    // SAFETY: the area holds all of the access, which at() checked to be aligned.
                    Some(area) => unsafe { area.write(at, width, value) },
                    None => rest.write(*bar, at, width, value),
                }
            }
            Target::Memory(words) => {
                let word = &words[(at / 8) as usize];
                if width == Width::Bits64 {
                    word.store(value, Ordering::Release);
                    return;
                }
                let shift = at % 8 * 8;
                let change = |old: u64| old & !(ones(width) << shift) | value << shift;
                let _: Result<_, u64> =
                    word.fetch_update(Ordering::AcqRel, Ordering::Relaxed, |old| Some(change(old)));
            }
            Target::Registers { bar, function } => function.write(*bar, at, width, value),
            Target::Doorbells { shift, targets } => {
                if let Some(target) = targets.get((at >> shift) as usize) {
                    target.write(at & ((1 << shift) - 1), width, value);
                }
            }
        }
    }
}

impl fmt::Debug for Bar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match &self.target {
            Target::Mmio { .. } => "MMIO",
            Target::Parts { .. } => "MMIO, in part mapped",
            Target::Registers { .. } => "registers",
            Target::Doorbells { .. } => "doorbells",
            Target::Memory(_) => "memory",
        };
        write!(f, "Bar({}, {kind}, {:#x} bytes at {:#x})", self.name, self.len, self.start)
    }
}

/// All bits of an access of `width`.
#[inline]
fn ones(width: Width) -> u64 {
    u64::MAX >> (64 - 8 * width.bytes())
}

/// The n-th 64-bit word of `data`, as it lies in memory.
#[inline]
fn nth_word(data: &[u8; 64], n: usize) -> u64 {
    let (words, _) = data.as_chunks::<8>();
    u64::from_le_bytes(words[n])
}

#[cfg(test)]
mod tests;
