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

use crate::ring::{Mpmc, copy};

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

    /// Takes items back. Those that do not fit into the slot's cache move the oldest there to the ring, so that the
    /// cache is nearly half full in the end: then neither taking nor putting soon has to go to the ring again.
    ///
    /// # Safety
    /// The calling thread holds `slot`, or `slot` is of no cache. With `items`, there are no more than the capacity.
    #[inline]
    pub(super) unsafe fn put(&self, slot: usize, items: &[T]) {
        let Some(cache) = self.caches.get(slot) else { return self.share(items) };
        let len = cache.len();
        let put = |cached: &mut [MaybeUninit<T>]| match cached.get_mut(len..len + items.len()) {
            Some(free) => {
                // SAFETY: both are as long, and nobody else has the free ones, so that they do not overlap.
                unsafe { copy(items.as_ptr(), free.as_mut_ptr().cast(), items.len()) };
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
        let len = cache.len();
        let spill = |cached: &mut [MaybeUninit<T>]| {
            // Less than what `refill` leaves. Were it as much, a load that takes and puts the same number in turns, no more
            // than fit, would do both in each turn, for ever. As it is, what is left at the end of a turn shrinks, until all
            // that the next one takes and puts has room in the cache.
            let most = cached.len() / 2 - cached.len() / 16;
            let kept = most.checked_sub(items.len())?;
            // At least 1, as `len + items.len()` is more than fits; at most `len`.
            let oldest = len - kept;
            // Subtracted before they are in the ring, where they count again: see `home`.
            cache.len.store(kept, Ordering::Relaxed);
            // SAFETY: the first `len` are initialised.
            self.share(unsafe { initialised(&cached[..oldest]) });
            cached.copy_within(oldest..len, 0);
            cached[kept..most].copy_from_slice(maybe_uninit(items));
            Some(most)
        };
        // SAFETY: the caller holds the slot.
        match unsafe { cache.with(spill) } {
            // Release: pairs with the Acquire in `home`. Not before `with` is over: after it, the items may be gone.
            Some(len) => cache.len.store(len, Ordering::Release),
            None => self.share(items),
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
        let len = cache.len();
        if let Some(left) = len.checked_sub(out.len()) {
            let take = |cached: &mut [MaybeUninit<T>]| {
                let freshest = &cached[left..len];
                // SAFETY: both are as long, and `out` is the caller's, not in the cache.
                unsafe { copy(freshest.as_ptr(), out.as_mut_ptr(), freshest.len()) };
            };
            // SAFETY: the caller holds the slot.
            unsafe { cache.with(take) };
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
        let len = cache.len();
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
        let len = cache.len();
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
    /// The length, for the slot's holder.
    #[inline]
    fn len(&self) -> usize {
        #[cfg(not(loom))]
        return self.len.load(Ordering::Relaxed);
        // loom only knows a word's last access. If that is the writer's own, it leaves out what others could have read
        // before the store that follows.
        #[cfg(loom)]
        // SAFETY: this thread alone stores it.
        return unsafe { self.len.unsync_load() };
    }

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

#[cfg(all(test, loom))]
mod loom_tests {
    use loom::cell::UnsafeCell;
    use loom::sync::{Arc, Mutex};
    use loom::thread;

    use super::*;

    /// A thread without a slot.
    const NONE: usize = usize::MAX;

    /// Items and what they stand for, which only whoever has taken an item may use.
    struct Pool {
        free: FreeList<usize>,
        buffers: Vec<UnsafeCell<()>>,
    }

    impl Pool {
        /// All items are home, in the ring.
        fn new(count: usize, cached: usize) -> Arc<Self> {
            let buffers = (0..count).map(|_| UnsafeCell::new(())).collect();
            let pool = Self { free: FreeList::new(count, 2, cached), buffers };
            // SAFETY: of no cache, and there is room for as many.
            unsafe { pool.free.put(NONE, &(0..count).collect::<Vec<_>>()) };
            Arc::new(pool)
        }

        fn get(&self, slot: usize, count: usize) -> Vec<usize> {
            let mut out = vec![MaybeUninit::uninit(); count];
            // SAFETY: each test lets one thread at a time use a slot.
            let got = unsafe { self.free.get(slot, &mut out) };
            // SAFETY: the first `got` were written.
            let items = unsafe { initialised(&out[..got]) }.to_vec();
            items.iter().for_each(|item| self.buffers[*item].with_mut(|_| ()));
            items
        }

        fn put(&self, slot: usize, items: &[usize]) {
            items.iter().for_each(|item| self.buffers[*item].with_mut(|_| ()));
            // SAFETY: as in `get`; and they were taken.
            unsafe { self.free.put(slot, items) };
        }

        /// What the drop of the last handle does. True if the memory is given back.
        fn close(&self) -> bool {
            let home = self.free.home();
            assert!(home <= self.buffers.len(), "a buffer counts twice");
            if home < self.buffers.len() {
                return false;
            }
            // Nobody is at work in it.
            self.buffers.iter().for_each(|buffer| buffer.with_mut(|_| ()));
            self.free.caches.iter().for_each(|cache| cache.items.with_mut(|_| ()));
            true
        }
    }

    /// Threads with and without a slot take and put. No item is with two of them, and none is lost.
    #[test]
    fn loom_threads_with_and_without_a_slot_never_share_an_item() {
        for cached in [1, 2] {
            loom::model(move || {
                let pool = Pool::new(2, cached);
                let other = {
                    let pool = pool.clone();
                    thread::spawn(move || {
                        let items = pool.get(0, 1);
                        pool.put(0, &items);
                        // SAFETY: this thread holds the slot.
                        unsafe { pool.free.flush(0) };
                    })
                };
                let items = pool.get(NONE, 1);
                pool.put(NONE, &items);
                other.join().unwrap();
                assert!(pool.close());
            });
        }
    }

    /// A slot goes from one thread to another, with what is in its cache.
    #[test]
    fn loom_a_slot_is_handed_over_with_its_cache() {
        loom::model(|| {
            let pool = Pool::new(2, 2);
            let held = Arc::new(Mutex::new(()));
            let use_slot = |pool: Arc<Pool>, held: Arc<Mutex<()>>| {
                let slot = held.lock().unwrap();
                let items = pool.get(0, 2);
                assert_eq!(items.len(), 2, "nobody else takes any");
                pool.put(0, &items);
                drop(slot);
            };
            let other = {
                let (pool, held) = (pool.clone(), held.clone());
                thread::spawn(move || use_slot(pool, held))
            };
            use_slot(pool.clone(), held);
            other.join().unwrap();
            assert!(pool.close());
        });
    }

    /// All buffers are put back, by these slots, while the last handle is dropped: if all are found home, nobody touches
    /// the memory any more.
    fn close_while_put_back(cached: usize, threads: &'static [&'static [usize]]) {
        let mut model = loom::model::Builder::new();
        // More take minutes with three threads, and have found nothing else.
        model.preemption_bound = Some(3);
        model.check(move || {
            let pool = Pool::new(threads.concat().len(), cached);
            let mut items = pool.get(NONE, pool.buffers.len()).into_iter();
            let put_back = |slots: &'static [usize]| {
                let (pool, items) = (pool.clone(), items.by_ref().take(slots.len()).collect::<Vec<_>>());
                thread::spawn(move || {
                    slots.iter().zip(items).for_each(|(slot, item)| pool.put(*slot, &[item]))
                })
            };
            let threads: Vec<_> = threads.iter().copied().map(put_back).collect();
            // Behind the others, so that loom compares its loads with their stores.
            let last = {
                let pool = pool.clone();
                thread::spawn(move || pool.close())
            };
            threads.into_iter().for_each(|thread| thread.join().unwrap());
            assert!(last.join().unwrap() || pool.close());
        });
    }

    #[test]
    fn loom_the_last_handle_finds_all_in_caches_or_leaves_the_memory() {
        close_while_put_back(1, &[&[0], &[1]]);
        close_while_put_back(2, &[&[0, 0]]);
    }

    #[test]
    fn loom_the_last_handle_finds_all_in_the_ring_or_leaves_the_memory() {
        close_while_put_back(1, &[&[NONE], &[NONE]]);
        close_while_put_back(1, &[&[0], &[NONE]]);
    }

    /// The third goes to a full cache, which spills the two others to the ring.
    #[test]
    fn loom_the_last_handle_counts_nothing_twice_that_is_spilled() {
        close_while_put_back(2, &[&[0, 0, 0]]);
    }
}
