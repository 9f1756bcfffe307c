//! The numbers of regions, and where in an address space each would like to be.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use bitvec::vec::BitVec;

use crate::Iova;

/// Which region of this process one is. Numbers are small, and used again once a region is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(transparent)]
pub struct RegionId(u32);

impl RegionId {
    /// The number, as the index of a table.
    #[inline]
    pub const fn index(self) -> usize {
        self.0 as usize
    }
}

/// The numbers that are in use.
static USED: Mutex<BitVec> = Mutex::new(BitVec::EMPTY);

fn used() -> MutexGuard<'static, BitVec> {
    // Each change is one call that does not panic halfway.
    USED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A number that no other region has; free again once this is dropped.
pub(super) struct Slot(RegionId);

impl Slot {
    /// The lowest that is free.
    pub(super) fn take() -> Self {
        let mut used = used();
        let index = used.first_zero().unwrap_or_else(|| {
            used.push(false);
            used.len() - 1
        });
        used.set(index, true);
        // The kernel lets a process have some 2^16 mappings, so that the number is far from 2^32.
        Self(RegionId(index as u32))
    }

    pub(super) fn id(&self) -> RegionId {
        self.0
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        used().set(self.0.index(), false);
    }
}

/// The addresses that regions prefer: above what 32-bit devices and MSI windows take, below the 39 bits that the
/// smallest IOMMUs in use translate.
pub(super) static PREFERRED: Window = Window { next: AtomicU64::new(1 << 32), end: 1 << 38 };

/// Addresses that are given away from the lowest to the highest, each once.
pub(super) struct Window {
    next: AtomicU64,
    end: u64,
}

impl Window {
    /// The next `len` bytes at a multiple of `alignment`; `None`, and nothing is taken, if there are not as many.
    pub(super) fn take(&self, len: u64, alignment: u64) -> Option<Iova> {
        let start = |next: u64| next.checked_next_multiple_of(alignment);
        let end = |next: u64| start(next)?.checked_add(len).filter(|&end| end <= self.end);
        // Relaxed: the number is all that is shared.
        let before = self.next.fetch_update(Ordering::Relaxed, Ordering::Relaxed, end).ok()?;
        start(before).map(Iova::new)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_window_gives_each_address_once_and_ends() {
        let window = Window { next: AtomicU64::new(0x3000), end: 0x10_0000 };
        assert_eq!(window.take(0x1000, 0x1000), Some(Iova::new(0x3000)));
        assert_eq!(window.take(0x8000, 0x4000), Some(Iova::new(0x4000)));
        assert_eq!(window.take(0x1000, 0x8000), Some(Iova::new(0x1_0000)));
        assert_eq!(window.take(0x10_0000, 0x1000), None, "too large for what is left");
        assert_eq!(window.take(u64::MAX, 0x1000), None);
        assert_eq!(window.take(0xe_f000, 0x1000), Some(Iova::new(0x1_1000)), "a refusal takes nothing");
        assert_eq!(window.take(0x1000, 0x1000), None);
    }
}
