//! What is different when loom runs a ring: its own atomics, and slots in which it sees every access.

use std::mem::MaybeUninit;
use std::sync::atomic::Ordering;

use loom::cell::UnsafeCell;
use loom::sync::atomic::AtomicU64;

use super::index::{Run, Word};

impl Word for AtomicU64 {
    fn load(&self, order: Ordering) -> u64 {
        self.load(order)
    }

    fn store(&self, value: u64, order: Ordering) {
        self.store(value, order);
    }

    fn exchange(&self, old: u64, new: u64) -> Result<(), u64> {
        self.compare_exchange_weak(old, new, Ordering::Release, Ordering::Acquire).map(drop)
    }

    fn wait(_turn: u32) {
        loom::thread::yield_now();
    }
}

pub(super) struct Slots<T>(Vec<UnsafeCell<MaybeUninit<T>>>);

impl<T> Slots<T> {
    pub(super) fn new(capacity: usize) -> Self {
        Self((0..capacity.next_power_of_two()).map(|_| UnsafeCell::new(MaybeUninit::uninit())).collect())
    }

    /// # Safety
    /// As without loom.
    pub(super) unsafe fn write(&self, run: Run, items: *const T) {
        for n in 0..run.count as usize {
            // SAFETY: there are as many, and each is read once.
            let item = unsafe { items.add(n).read() };
            // SAFETY: loom checks that no other access is concurrent.
            self.slot(run, n).with_mut(|slot| unsafe { (*slot).write(item) });
        }
    }

    /// # Safety
    /// As without loom.
    pub(super) unsafe fn read(&self, run: Run, items: *mut T) {
        for n in 0..run.count as usize {
            // SAFETY: loom checks that no other access is concurrent, and the caller that there is an item. `with_mut`,
            // because it is moved out.
            let item = self.slot(run, n).with_mut(|slot| unsafe { (*slot).assume_init_read() });
            // SAFETY: there is memory for as many.
            unsafe { items.add(n).write(item) };
        }
    }

    fn slot(&self, run: Run, n: usize) -> &UnsafeCell<MaybeUninit<T>> {
        &self.0[(run.at as usize + n) & (self.0.len() - 1)]
    }
}
