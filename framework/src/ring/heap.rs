//! A ring in this process's memory.

#[cfg(not(loom))]
use std::sync::atomic::AtomicU64;

#[cfg(loom)]
use loom::sync::atomic::AtomicU64;

use std::mem::MaybeUninit;

use super::index::{Amount, Mode, Refused, Side, Single, View};
use super::slots::Slots;

/// What the ends of one ring share.
pub(super) struct Heap<T> {
    producers: Side<AtomicU64>,
    consumers: Side<AtomicU64>,
    capacity: u64,
    slots: Slots<T>,
}

// SAFETY: items are moved from one thread to another, which `T: Send` allows. No two threads are ever at one slot, since
// slots are reserved, and what one thread did to a slot happens before another reserves it (see `index`).
unsafe impl<T: Send> Sync for Heap<T> {}

#[allow(
    clippy::inline_always,
    reason = "one item takes a fraction of the code of a run: the compiler is to see which"
)]
impl<T> Heap<T> {
    pub(super) fn new(capacity: usize) -> Self {
        Self {
            producers: Side::default(),
            consumers: Side::default(),
            capacity: capacity as u64,
            slots: Slots::new(capacity),
        }
    }

    pub(super) fn capacity(&self) -> usize {
        self.capacity as usize
    }

    /// How many items there are, at some moment during the call if only this thread pushes or pops.
    pub(super) fn len(&self) -> usize {
        // The consumers' first: they can not be ahead of what the producers have published by then.
        let popped = self.consumers.tail();
        let pushed = self.producers.tail();
        // Both go on in between.
        (pushed - popped).min(self.capacity) as usize
    }

    /// The mode of a producer that is to be the only one.
    pub(super) fn only_producer(&self) -> Single {
        Single::new(&self.producers)
    }

    /// The mode of a consumer that is to be the only one.
    pub(super) fn only_consumer(&self) -> Single {
        Single::new(&self.consumers)
    }

    /// Moves as much as `amount` says from `items` into the ring; returns how many.
    ///
    /// # Safety
    /// `items` points to `amount.most()` items. Those moved, the first ones, are no longer the caller's. All producers at
    /// any one time use [`Multi`](super::index::Multi), or one uses [`Single`].
    #[inline(always)]
    pub(super) unsafe fn push(&self, mode: &mut impl Mode, items: *const T, amount: Amount) -> usize {
        let ring = View {
            ours: &self.producers,
            theirs: &self.consumers,
            lead: self.capacity,
            capacity: self.capacity,
            patience: None,
        };
        let run = match mode.reserve(&ring, amount) {
            Ok(run) => run,
            Err(refused) => return none(refused),
        };
        // SAFETY: the caller's promise, as the run is no longer than `amount.most()`; and this thread has reserved it.
        unsafe { self.slots.write(run, items) };
        // Positions that only this algorithm writes are never corrupt.
        let _ = mode.publish(&ring, run);
        run.count as usize
    }

    /// Moves as much as `amount` says out of the ring to `items`; returns how many.
    ///
    /// # Safety
    /// `items` points to memory for `amount.most()` items. All consumers at any one time use
    /// [`Multi`](super::index::Multi), or one uses [`Single`].
    #[inline(always)]
    pub(super) unsafe fn pop(&self, mode: &mut impl Mode, items: *mut T, amount: Amount) -> usize {
        let ring = View {
            ours: &self.consumers,
            theirs: &self.producers,
            lead: 0,
            capacity: self.capacity,
            patience: None,
        };
        let run = match mode.reserve(&ring, amount) {
            Ok(run) => run,
            Err(refused) => return none(refused),
        };
        // SAFETY: the caller's promise, as the run is no longer than `amount.most()`; this thread has reserved it, and it
        // lies before the producers' tail, so that it holds items.
        unsafe { self.slots.read(run, items) };
        // As in `push`.
        let _ = mode.publish(&ring, run);
        run.count as usize
    }
}

/// No items. Positions that only this algorithm writes are never corrupt, which the tests see here.
#[inline]
fn none(refused: Refused) -> usize {
    if cfg!(test) {
        assert_eq!(refused, Refused::TooFew);
    }
    0
}

impl<T> Drop for Heap<T> {
    /// Drops what is still in it. If the drop of an item panics, those behind it are leaked.
    fn drop(&mut self) {
        if !std::mem::needs_drop::<T>() {
            return;
        }
        let mut consumer = self.only_consumer();
        let mut item = MaybeUninit::uninit();
        // SAFETY: there is memory for one; and nobody else has the ring any more.
        while unsafe { self.pop(&mut consumer, item.as_mut_ptr(), Amount::exactly(1)) } == 1 {
            // SAFETY: it was popped just now, and once.
            unsafe { item.assume_init_drop() };
        }
    }
}
