//! The free buffers of a pool: a ring that all threads share, and a cache for each slot.
//!
//! # Why this module is unsafe, and what makes it sound
//! A cache is used without a lock and without atomic read-modify-writes. The invariant: what is in cache `n` is touched by
//! the thread that holds slot `n` alone; a slot goes from one thread to the next through a mutex (module `slot`). Other
//! threads only read a cache's length.
//!
//! Which way items count as [`home`](FreeList::home), so that a pool can be given back, is part of the invariant too: `put`
//! counts its items by its *last* access, a Release store, and until then has subtracted whatever it has moved.

#[cfg(loom)]
use loom::{
    cell::UnsafeCell,
    hint::spin_loop,
    sync::atomic::{AtomicUsize, Ordering},
};
#[cfg(not(loom))]
use std::{
    hint::spin_loop,
    sync::atomic::{AtomicUsize, Ordering},
};

use std::mem::MaybeUninit;

use crate::ring::Mpmc;

/// Items that are free to be taken. At most as many come in as it was made for.
pub(super) struct FreeList<T> {
    ring: Mpmc<T>,
    caches: Box<[Cache<T>]>,
}

/// In two cache lines of its own, since processors fetch lines in pairs.
#[repr(align(128))]
struct Cache<T> {
    /// How many of the items are there, the first ones. The slot's holder changes it.
    len: AtomicUsize,
    /// The one that came last is taken first: its memory is the likeliest to be in the processor's caches.
    items: UnsafeCell<Box<[MaybeUninit<T>]>>,
}

// SAFETY: the ring is Sync; a cache's items are touched by one thread at a time (module invariant), and may be sent.
unsafe impl<T: Send> Sync for FreeList<T> {}

impl<T: Copy + Send> FreeList<T> {
    /// An empty one with room for `capacity` items, and caches of up to `cached` for as many slots.
    pub(super) fn new(capacity: usize, slots: usize, cached: usize) -> Self {
        let cache =
            |_| Cache { len: AtomicUsize::new(0), items: UnsafeCell::new(Box::new_uninit_slice(cached)) };
        let slots = if cached == 0 { 0 } else { slots };
        Self { ring: Mpmc::new(capacity), caches: (0..slots).map(cache).collect() }
    }

    /// Takes items back. One that does not fit into the slot's cache moves the oldest there to the ring, so that the cache
    /// is half full in the end: then neither taking nor putting soon has to go to the ring again.
    ///
    /// # Safety
    /// The calling thread holds `slot`, or `slot` is of no cache. With `items`, there are no more than the capacity.
    #[inline]
    pub(super) unsafe fn put(&self, slot: usize, items: &[T]) {
        let Some(cache) = self.caches.get(slot) else { return self.share(items) };
        let len = cache.len.load(Ordering::Relaxed);
        let put = |cached: &mut [MaybeUninit<T>]| match cached.get_mut(len..len + items.len()) {
            Some(free) => {
                free.copy_from_slice(maybe_uninit(items));
                true
            }
            None => false,
        };
        // SAFETY: the caller holds the slot.
        if unsafe { cache.with(put) } {
            // Release: pairs with the Acquire in `home`.
            cache.len.store(len + items.len(), Ordering::Release);
        } else {
            // SAFETY: likewise.
            unsafe { self.spill(cache, items) };
        }
    }

    /// [`put`](Self::put) into a cache that has no room for as many.
    ///
    /// # Safety
    /// The calling thread holds the cache's slot.
    #[cold]
    unsafe fn spill(&self, cache: &Cache<T>, items: &[T]) {
        let len = cache.len.load(Ordering::Relaxed);
        let spill = |cached: &mut [MaybeUninit<T>]| {
            let half = cached.len() / 2;
            let Some(kept) = half.checked_sub(items.len()) else { return false };
            // At least 1, as `len + items.len()` is more than fits; at most `len`.
            let oldest = len - kept;
            // Subtracted before they are in the ring, where they count again: see `home`.
            cache.len.store(kept, Ordering::Relaxed);
            // SAFETY: the first `len` are initialised.
            self.share(unsafe { initialised(&cached[..oldest]) });
            cached.copy_within(oldest..len, 0);
            cached[kept..half].copy_from_slice(maybe_uninit(items));
            // Release: pairs with the Acquire in `home`.
            cache.len.store(half, Ordering::Release);
            true
        };
        // SAFETY: the caller holds the slot.
        if !unsafe { cache.with(spill) } {
            self.share(items);
        }
    }

    /// Puts items into the ring.
    #[inline(never)]
    fn share(&self, items: &[T]) {
        // There is room, but the ring may look full to a thread that has not yet seen how far others took items out.
        while !self.ring.push(items) {
            spin_loop();
        }
    }

    /// Takes up to `out.len()` items: writes them to the start of `out`, and returns how many. Where the cache has too few
    /// it is filled to the half along the way.
    ///
    /// # Safety
    /// The calling thread holds `slot`, or `slot` is of no cache.
    #[inline]
    pub(super) unsafe fn get(&self, slot: usize, out: &mut [MaybeUninit<T>]) -> usize {
        let Some(cache) = self.caches.get(slot) else { return self.unshare(out) };
        let len = cache.len.load(Ordering::Relaxed);
        if let Some(left) = len.checked_sub(out.len()) {
            // SAFETY: the caller holds the slot.
            unsafe { cache.with(|cached| out.copy_from_slice(&cached[left..len])) };
            // Relaxed: it only tells others that there are fewer.
            cache.len.store(left, Ordering::Relaxed);
            return out.len();
        }
        // SAFETY: likewise.
        unsafe { self.refill(cache, out) }
    }

    /// [`get`](Self::get) of more than the cache has.
    ///
    /// # Safety
    /// The calling thread holds the cache's slot.
    #[cold]
    unsafe fn refill(&self, cache: &Cache<T>, out: &mut [MaybeUninit<T>]) -> usize {
        let len = cache.len.load(Ordering::Relaxed);
        let refill = |cached: &mut [MaybeUninit<T>]| {
            let (first, rest) = out.split_at_mut(len);
            first.copy_from_slice(&cached[..len]);
            let (half, missing) = (cached.len() / 2, rest.len());
            if missing > half {
                cache.len.store(0, Ordering::Relaxed);
                return len + self.unshare(rest);
            }
            let got = self.unshare(&mut cached[..half + missing]);
            let left = got.saturating_sub(missing);
            rest[..got - left].copy_from_slice(&cached[left..got]);
            cache.len.store(left, Ordering::Relaxed);
            len + got - left
        };
        // SAFETY: the caller holds the slot.
        unsafe { cache.with(refill) }
    }

    /// Takes items out of the ring.
    #[inline(never)]
    fn unshare(&self, out: &mut [MaybeUninit<T>]) -> usize {
        self.ring.pop(out)
    }

    /// Moves what is in a slot's cache to the ring, for all.
    ///
    /// # Safety
    /// The calling thread holds `slot`.
    pub(super) unsafe fn flush(&self, slot: usize) {
        let Some(cache) = self.caches.get(slot) else { return };
        let len = cache.len.load(Ordering::Relaxed);
        cache.len.store(0, Ordering::Relaxed);
        // SAFETY: the first `len` are initialised.
        let flush = |cached: &mut [MaybeUninit<T>]| self.share(unsafe { initialised(&cached[..len]) });
        // SAFETY: the caller holds the slot.
        unsafe { cache.with(flush) };
    }

    /// How many items are here, in all caches too.
    ///
    /// While other threads take items or flush it is a moment's figure, and may be off. While others at most *put*, it is
    /// never more than what has been put in whole, and all that was done in those `put`s happened before this returns.
    /// For that the ring comes first: whoever put items there from its cache had subtracted them from its length before,
    /// which is what is read here then.
    pub(super) fn home(&self) -> usize {
        let shared = self.ring.len();
        self.caches.iter().map(|cache| cache.len.load(Ordering::Acquire)).sum::<usize>() + shared
    }

    /// How many items it was made for.
    pub(super) fn capacity(&self) -> usize {
        self.ring.capacity()
    }
}

impl<T> Cache<T> {
    /// # Safety
    /// The calling thread holds the cache's slot.
    #[inline]
    unsafe fn with<R>(&self, body: impl FnOnce(&mut [MaybeUninit<T>]) -> R) -> R {
        // SAFETY: no other thread touches the items (module invariant); this one does not while it is in `body`, which is
        // the code above.
        self.items.with_mut(|items| body(unsafe { &mut *items }))
    }
}

fn maybe_uninit<T: Copy>(items: &[T]) -> &[MaybeUninit<T>] {
    // SAFETY: the same layout, and an initialised one is a possibly uninitialised one.
    unsafe { std::slice::from_raw_parts(items.as_ptr().cast(), items.len()) }
}

/// # Safety
/// All of them are.
unsafe fn initialised<T: Copy>(items: &[MaybeUninit<T>]) -> &[T] {
    // SAFETY: the same layout, and the caller's promise.
    unsafe { std::slice::from_raw_parts(items.as_ptr().cast(), items.len()) }
}

/// The standard cell, in the form of loom's.
#[cfg(not(loom))]
struct UnsafeCell<T>(std::cell::UnsafeCell<T>);

#[cfg(not(loom))]
impl<T> UnsafeCell<T> {
    fn new(value: T) -> Self {
        Self(std::cell::UnsafeCell::new(value))
    }

    #[inline]
    fn with_mut<R>(&self, body: impl FnOnce(*mut T) -> R) -> R {
        body(self.0.get())
    }
}
