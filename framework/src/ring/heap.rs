//! A ring's slots in this process's memory.

#[cfg(loom)]
use loom::cell::UnsafeCell;
#[cfg(not(loom))]
use std::cell::UnsafeCell;
use std::mem::MaybeUninit;
#[cfg(not(loom))]
use std::ptr;
use std::sync::atomic::Ordering;

use super::index::{Amount, Mode, Run, Side, Single, Word};

#[cfg(loom)]
type Position = loom::sync::atomic::AtomicU64;
#[cfg(not(loom))]
type Position = std::sync::atomic::AtomicU64;

/// What the ends of one ring share.
pub(super) struct Heap<T> {
    producers: Side<Position>,
    consumers: Side<Position>,
    /// How many items fit.
    capacity: u64,
    /// A power of two of them, no fewer than the capacity.
    slots: Box<[UnsafeCell<MaybeUninit<T>>]>,
}

// SAFETY: items are moved from one thread to another, which `T: Send` allows. No two threads are ever at one slot, since
// runs of slots are reserved, and what one thread did to a slot happens before another reserves it (see `index`).
unsafe impl<T: Send> Sync for Heap<T> {}

impl<T> Heap<T> {
    pub(super) fn new(capacity: usize) -> Self {
        let slots = capacity.checked_next_power_of_two().expect("a ring that fits into memory");
        Self {
            producers: Side::default(),
            consumers: Side::default(),
            capacity: capacity as u64,
            slots: (0..slots).map(|_| UnsafeCell::new(MaybeUninit::uninit())).collect(),
        }
    }

    pub(super) fn capacity(&self) -> usize {
        self.capacity as usize
    }

    /// How many items there are at some moment during the call.
    pub(super) fn len(&self) -> usize {
        // The consumers' first: they can not be ahead of what the producers have published by then.
        let popped = self.consumers.tail(Ordering::Acquire);
        let pushed = self.producers.tail(Ordering::Acquire);
        // Both go on in between.
        (pushed - popped).min(self.capacity) as usize
    }

    /// Moves as much as `amount` says from `items` into the ring; returns how many.
    ///
    /// # Safety
    /// `items` points to `amount.most` initialised items. Those moved, the first ones, are no longer the caller's. With
    /// [`Single`](super::index::Single), it is the ring's only producer.
    #[inline]
    pub(super) unsafe fn push<M: Mode>(&self, mode: &mut M, items: *const T, amount: Amount) -> usize {
        let Some(run) = mode.reserve(&self.producers, &self.consumers, self.capacity, amount) else {
            return 0;
        };
        // SAFETY: the caller's promise, as the run is no longer than `amount.most`; and this thread has just reserved it.
        unsafe { self.write(run, items) };
        mode.publish(&self.producers, run);
        run.count as usize
    }

    /// Moves as much as `amount` says out of the ring to `items`; returns how many.
    ///
    /// # Safety
    /// `items` points to memory for `amount.most` items. With [`Single`](super::index::Single), it is the ring's only
    /// consumer.
    #[inline]
    pub(super) unsafe fn pop<M: Mode>(&self, mode: &mut M, items: *mut T, amount: Amount) -> usize {
        let Some(run) = mode.reserve(&self.consumers, &self.producers, 0, amount) else { return 0 };
        // SAFETY: the caller's promise, as the run is no longer than `amount.most`; this thread has just reserved it, and
        // it lies before the producers' tail, so that it holds items.
        unsafe { self.read(run, items) };
        mode.publish(&self.consumers, run);
        run.count as usize
    }
}

/// Where the items are. Loom needs to see each access to each slot; otherwise runs of slots are copied as memory.
#[cfg(not(loom))]
impl<T> Heap<T> {
    /// # Safety
    /// `items` points to `run.count` items, which become the ring's; the run is reserved by this thread.
    #[inline]
    unsafe fn write(&self, run: Run, items: *const T) {
        let (first, count, rest) = self.split(run);
        let slots = self.slots();
        // SAFETY: `first` is the index of a slot.
        let to = unsafe { slots.add(first) };
        // SAFETY: `count` slots from there on are before the end, nobody else uses them while they are reserved, and the
        // caller's items are not in the ring's memory.
        unsafe { ptr::copy_nonoverlapping(items, to, count) };
        if rest > 0 {
            // SAFETY: there are `count + rest` items.
            let items = unsafe { items.add(count) };
            // SAFETY: as above, from the first slot on.
            unsafe { ptr::copy_nonoverlapping(items, slots, rest) };
        }
    }

    /// # Safety
    /// `items` points to memory for `run.count` items, which become the caller's; the run is reserved by this thread and
    /// holds items.
    #[inline]
    unsafe fn read(&self, run: Run, items: *mut T) {
        let (first, count, rest) = self.split(run);
        let slots = self.slots();
        // SAFETY: `first` is the index of a slot.
        let from = unsafe { slots.add(first) };
        // SAFETY: `count` slots from there on are before the end, nobody else uses them while they are reserved, and the
        // caller's memory is not the ring's.
        unsafe { ptr::copy_nonoverlapping(from, items, count) };
        if rest > 0 {
            // SAFETY: there is memory for `count + rest` items.
            let items = unsafe { items.add(count) };
            // SAFETY: as above, from the first slot on.
            unsafe { ptr::copy_nonoverlapping(slots, items, rest) };
        }
    }

    /// The index of a run's first slot, how many of it come before the end of the slots, and how many after it.
    #[inline]
    fn split(&self, run: Run) -> (usize, usize, usize) {
        let (first, all) = (run.at as usize & (self.slots.len() - 1), run.count as usize);
        let count = all.min(self.slots.len() - first);
        (first, count, all - count)
    }

    #[inline]
    fn slots(&self) -> *mut T {
        UnsafeCell::raw_get(self.slots.as_ptr()).cast()
    }
}

#[cfg(loom)]
impl<T> Heap<T> {
    unsafe fn write(&self, run: Run, items: *const T) {
        for n in 0..run.count as usize {
            // SAFETY: as without loom.
            let item = unsafe { items.add(n).read() };
            // SAFETY: loom checks that no other access is concurrent.
            self.slot(run, n).with_mut(|slot| unsafe { (*slot).write(item) });
        }
    }

    unsafe fn read(&self, run: Run, items: *mut T) {
        for n in 0..run.count as usize {
            // SAFETY: as without loom; and loom checks that no other access is concurrent.
            let item = self.slot(run, n).with(|slot| unsafe { (*slot).assume_init_read() });
            // SAFETY: as without loom.
            unsafe { items.add(n).write(item) };
        }
    }

    fn slot(&self, run: Run, n: usize) -> &UnsafeCell<MaybeUninit<T>> {
        &self.slots[(run.at as usize + n) & (self.slots.len() - 1)]
    }
}

impl<T> Drop for Heap<T> {
    /// Drops what is still in it. If the drop of an item panics, some others are leaked.
    fn drop(&mut self) {
        let mut consumer = Single::at(&self.consumers);
        let mut item = MaybeUninit::uninit();
        // SAFETY: there is room for one; and nobody else has the ring any more.
        while unsafe { self.pop(&mut consumer, item.as_mut_ptr(), Amount::exactly(1)) } == 1 {
            // SAFETY: it was popped just now, and once.
            unsafe { item.assume_init_drop() };
        }
    }
}

#[cfg(not(loom))]
impl Word for Position {
    #[inline]
    fn load(&self, order: Ordering) -> u64 {
        self.load(order)
    }

    #[inline]
    fn store(&self, value: u64, order: Ordering) {
        self.store(value, order);
    }

    #[inline]
    fn exchange(&self, old: u64, new: u64) -> Result<(), u64> {
        self.compare_exchange_weak(old, new, Ordering::Relaxed, Ordering::Relaxed).map(drop)
    }

    #[inline]
    fn wait(&self, turn: u32) {
        if turn < 64 { std::hint::spin_loop() } else { std::thread::yield_now() }
    }
}

#[cfg(loom)]
impl Word for Position {
    fn load(&self, order: Ordering) -> u64 {
        self.load(order)
    }

    fn store(&self, value: u64, order: Ordering) {
        self.store(value, order);
    }

    fn exchange(&self, old: u64, new: u64) -> Result<(), u64> {
        self.compare_exchange_weak(old, new, Ordering::Relaxed, Ordering::Relaxed).map(drop)
    }

    fn wait(&self, _turn: u32) {
        loom::thread::yield_now();
    }
}
