//! Accesses to mapped registers.
//!
//! # Why this module is unsafe, and what makes it sound
//! A register is a volatile access through a raw pointer, and a descriptor is posted with an instruction that has no
//! intrinsic. The invariant: who makes an [`Area`] vouches for its bytes for as long as it lives ([`Area::new`]), and who
//! uses it stays inside.

use std::any::Any;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use crate::model::Width;

/// A mapped part of a BAR.
#[derive(Clone)]
pub(crate) struct Area {
    /// Where it starts in the BAR.
    start: u64,
    len: u64,
    base: NonNull<u8>,
    _keep: Arc<dyn Any + Send + Sync>,
}

// SAFETY: the pointer is to device registers, which any thread may access (new's contract).
unsafe impl Send for Area {}
// SAFETY: likewise: an Area has no state of its own, and volatile accesses from several threads are the device's to
// order.
unsafe impl Sync for Area {}

impl Area {
    /// The `len` bytes from `start` on of a BAR, mapped at `base`.
    ///
    /// # Safety
    /// While `keep` lives, the `len` bytes at `base` stay mapped, readable and writable, and nothing makes a
    /// reference to them. They may be accessed from any thread. `start` is as aligned as `base` is, up to 64 bytes.
    pub(crate) unsafe fn new(
        start: u64,
        base: NonNull<u8>,
        len: u64,
        keep: Arc<dyn Any + Send + Sync>,
    ) -> Self {
        Self { start, len, base, _keep: keep }
    }

    /// Whether it has all of the `bytes` at `at` of the BAR.
    #[inline]
    pub(super) fn holds(&self, at: u64, bytes: u64) -> bool {
        at.checked_sub(self.start).and_then(|at| self.len.checked_sub(at)).is_some_and(|left| bytes <= left)
    }

    /// # Safety
    /// The area holds `at` of the BAR.
    #[inline]
    unsafe fn place(&self, at: u64) -> NonNull<u8> {
        // SAFETY: the caller's: `at` is inside the bytes that new's caller vouched for.
        unsafe { self.base.add((at - self.start) as usize) }
    }

    /// # Safety
    /// The area holds `width` at `at` of the BAR, a multiple of it.
    #[inline]
    pub(super) unsafe fn read(&self, at: u64, width: Width) -> u64 {
        // SAFETY: the caller's.
        let from = unsafe { self.place(at) };
        // SAFETY: `from` is `width` mapped bytes, by the caller's word, and aligned, as `at` is and as base and start
        // are to each other (new).
        let value = unsafe { read_volatile(from, width) };
        // Later loads of memory are not made before this one: what a status register announces is there.
        fence(Ordering::Acquire);
        value
    }

    /// # Safety
    /// As for [`read`](Self::read).
    #[inline]
    pub(super) unsafe fn write(&self, at: u64, width: Width, value: u64) {
        // Earlier stores to memory are made before this one: what a doorbell announces is there.
        fence(Ordering::Release);
        // SAFETY: the caller's.
        let to = unsafe { self.place(at) };
        // SAFETY: `to` is `width` mapped bytes, by the caller's word, and aligned, as in read.
        unsafe { write_volatile(to, width, value) };
    }

    /// # Safety
    /// The area holds 64 bytes at `at` of the BAR, a multiple of 64, and the CPU has MOVDIR64B.
    #[inline]
    pub(super) unsafe fn post64(&self, at: u64, data: &[u8; 64]) {
        // SAFETY: the caller's.
        let to = unsafe { self.place(at) };
        // SAFETY: `to` is 64 mapped bytes, by the caller's word, and aligned, as in read; the CPU has the instruction.
        unsafe { movdir64b(to, data) };
    }
}

/// # Safety
/// `from` must point to a mapped register of `width`, aligned to it.
#[inline]
unsafe fn read_volatile(from: NonNull<u8>, width: Width) -> u64 {
    match width {
        // SAFETY: the caller's.
        Width::Bits8 => unsafe { from.read_volatile() }.into(),
        // SAFETY: the caller's.
        Width::Bits16 => unsafe { from.cast::<u16>().read_volatile() }.into(),
        // SAFETY: the caller's.
        Width::Bits32 => unsafe { from.cast::<u32>().read_volatile() }.into(),
        // SAFETY: the caller's.
        Width::Bits64 => unsafe { from.cast::<u64>().read_volatile() },
    }
}

/// # Safety
/// `to` must point to a mapped register of `width`, aligned to it.
#[inline]
unsafe fn write_volatile(to: NonNull<u8>, width: Width, value: u64) {
    match width {
        // SAFETY: the caller's.
        Width::Bits8 => unsafe { to.write_volatile(value as u8) },
        // SAFETY: the caller's.
        Width::Bits16 => unsafe { to.cast::<u16>().write_volatile(value as u16) },
        // SAFETY: the caller's.
        Width::Bits32 => unsafe { to.cast::<u32>().write_volatile(value as u32) },
        // SAFETY: the caller's.
        Width::Bits64 => unsafe { to.cast::<u64>().write_volatile(value) },
    }
}

/// Whether the CPU has MOVDIR64B: CPUID leaf 7, subleaf 0, ECX bit 28 (Intel SDM vol. 2, CPUID).
#[cfg(target_arch = "x86_64")]
pub(super) fn cpu_has_movdir64b() -> bool {
    use std::arch::x86_64::{__cpuid, __cpuid_count};
    __cpuid(0).eax >= 7 && __cpuid_count(7, 0).ecx & 1 << 28 != 0
}

#[cfg(not(target_arch = "x86_64"))]
pub(super) fn cpu_has_movdir64b() -> bool {
    false
}

/// Stores 64 bytes as one write, after all earlier stores.
///
/// # Safety
/// `to` must be 64 mapped bytes, aligned to 64, and the CPU must have MOVDIR64B.
#[cfg(target_arch = "x86_64")]
#[inline]
unsafe fn movdir64b(to: NonNull<u8>, data: &[u8; 64]) {
    // The store is weakly ordered: without the fence it could overtake the stores that filled the buffers which the
    // descriptor names (Intel SDM vol. 2, MOVDIR64B).
    // SAFETY: the caller's; the instructions read `data`, write `to` and touch neither stack nor flags.
    unsafe {
        std::arch::asm!(
            "sfence",
            "movdir64b {to}, [{from}]",
            to = in(reg) to.as_ptr(),
            from = in(reg) data.as_ptr(),
            options(nostack, preserves_flags),
        );
    }
}

/// # Safety
/// None to keep: `can_post` is false on this architecture, so it is never called.
#[cfg(not(target_arch = "x86_64"))]
unsafe fn movdir64b(_to: NonNull<u8>, _data: &[u8; 64]) {
    unreachable!("post64 on MMIO needs MOVDIR64B, an x86-64 instruction")
}
