//! Memory for a power of two of items.

use std::cell::{Cell, UnsafeCell};
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ptr;

use super::copy::copy;
use super::index::{Line, Run};

/// What slots are made of, so that they start with a cache line.
type Block = UnsafeCell<Line<MaybeUninit<[u8; BLOCK]>>>;
const BLOCK: usize = align_of::<Line<()>>();

/// Invariant in `T`, as whatever several own and change: at a shorter lifetime, one end would put in what the other one
/// takes for a longer-lived item.
///
/// ```compile_fail
/// fn shorter<'a>(end: underpass::ring::Producer<&'static str>) -> underpass::ring::Producer<&'a str> { end }
/// ```
/// ```compile_fail
/// fn shorter<'a>(end: underpass::ring::MpProducer<&'static str>) -> underpass::ring::MpProducer<&'a str> { end }
/// ```
/// ```compile_fail
/// fn shorter<'a>(end: underpass::ring::Consumer<&'static str>) -> underpass::ring::Consumer<&'a str> { end }
/// ```
/// ```compile_fail
/// fn shorter<'a>(end: underpass::ring::MpConsumer<&'static str>) -> underpass::ring::MpConsumer<&'a str> { end }
/// ```
/// ```
/// fn same<'a>(end: underpass::ring::Producer<&'a str>) -> underpass::ring::Producer<&'a str> { end }
/// ```
pub(super) struct Slots<T> {
    blocks: Box<[Block]>,
    mask: usize,
    _type: PhantomData<Cell<T>>,
}

impl<T> Slots<T> {
    /// No fewer than `capacity`.
    pub(super) fn new(capacity: usize) -> Self {
        const { assert!(align_of::<T>() <= BLOCK, "items are aligned to no more than two cache lines") };
        let slots = capacity.checked_next_power_of_two().expect("a ring that fits into memory");
        let bytes = slots.checked_mul(size_of::<T>()).expect("a ring that fits into memory");
        let blocks =
            (0..bytes.div_ceil(BLOCK)).map(|_| UnsafeCell::new(Line(MaybeUninit::uninit()))).collect();
        Self { blocks, mask: slots - 1, _type: PhantomData }
    }

    /// Moves `run.count` items from `items` to the run's slots.
    ///
    /// # Safety
    /// `items` points to as many, which are no longer the caller's. The run is reserved by this thread.
    #[inline]
    pub(super) unsafe fn write(&self, run: Run, items: *const T) {
        let (first, count, rest) = self.split(run);
        // SAFETY: `first` is the index of a slot.
        let to = unsafe { self.start().add(first) };
        if run.count == 1 {
            // SAFETY: there is one, and nobody else uses the slot while it is reserved.
            return unsafe { ptr::copy_nonoverlapping(items, to, 1) };
        }
        // SAFETY: from there on, `count` slots are before the end. Nobody else uses them while they are reserved.
        unsafe { copy(items, to, count) };
        if rest > 0 {
            // SAFETY: there are `count + rest` items.
            let items = unsafe { items.add(count) };
            // SAFETY: the run goes on in the first slots, up to before `first`. Rare, so by a call.
            unsafe { ptr::copy_nonoverlapping(items, self.start(), rest) };
        }
    }

    /// Moves the items in a run's slots to `items`.
    ///
    /// # Safety
    /// `items` points to memory for `run.count` items. The run is reserved by this thread, and holds items, which are the
    /// caller's from now on.
    #[inline]
    pub(super) unsafe fn read(&self, run: Run, items: *mut T) {
        let (first, count, rest) = self.split(run);
        // SAFETY: `first` is the index of a slot.
        let from = unsafe { self.start().add(first) };
        if run.count == 1 {
            // SAFETY: there is memory for one, and nobody else uses the slot while it is reserved.
            return unsafe { ptr::copy_nonoverlapping(from, items, 1) };
        }
        // SAFETY: from there on, `count` slots are before the end. Nobody else uses them while they are reserved.
        unsafe { copy(from, items, count) };
        if rest > 0 {
            // SAFETY: there is memory for `count + rest` items.
            let items = unsafe { items.add(count) };
            // SAFETY: the run goes on in the first slots, up to before `first`. Rare, so by a call.
            unsafe { ptr::copy_nonoverlapping(self.start(), items, rest) };
        }
    }

    /// The index of a run's first slot, how many of its slots come before the end, and how many go on at the start.
    #[inline]
    fn split(&self, run: Run) -> (usize, usize, usize) {
        let (first, all) = (run.at as usize & self.mask, run.count as usize);
        let count = all.min(self.mask + 1 - first);
        (first, count, all - count)
    }

    #[inline]
    fn start(&self) -> *mut T {
        UnsafeCell::raw_get(self.blocks.as_ptr()).cast()
    }
}
