//! Which thread uses which cache of every pool.

use std::cell::Cell;
use std::fmt;
use std::marker::PhantomData;
use std::ptr::NonNull;
use std::sync::{Mutex, MutexGuard, PoisonError};

use bitvec::BitArr;
use bitvec::array::BitArray;

use super::Shared;

/// How many threads can have a cache at the same time.
pub(super) const SLOTS: usize = 128;

/// The slot of a thread that has none: of no cache.
const NONE: usize = usize::MAX;

thread_local! {
    /// Nothing to initialise and nothing to drop, so that reading it is one load.
    static CURRENT: Cell<usize> = const { Cell::new(NONE) };
}

/// The slot that the calling thread holds, or one that is of no cache.
#[inline]
pub(super) fn current() -> usize {
    CURRENT.get()
}

/// The lock is for starting and ending threads and for making and dropping pools, never for packets.
static REGISTRY: Mutex<Registry> = Mutex::new(Registry { held: BitArray::ZERO, pools: Vec::new() });

struct Registry {
    held: BitArr!(for SLOTS),
    /// All pools that have a handle.
    pools: Vec<NonNull<Shared>>,
}

// SAFETY: the pools are Sync, and reached under the lock.
unsafe impl Send for Registry {}

fn registry() -> MutexGuard<'static, Registry> {
    // Each change is one call that does not panic halfway.
    REGISTRY.lock().unwrap_or_else(PoisonError::into_inner)
}

/// From now on, who gives a slot back looks for buffers in this pool too.
pub(super) fn register(pool: NonNull<Shared>) {
    registry().pools.push(pool);
}

/// When this returns, nobody who gives a slot back is at work in the pool, nor ever will be.
pub(super) fn unregister(pool: NonNull<Shared>) {
    registry().pools.retain(|other| *other != pool);
}

/// A thread's claim to a cache in every [`Pool`](super::Pool). Workers claim one by themselves; any other thread that moves
/// packets should do so before it starts. Without one, a thread takes buffers from the ring that all threads share, and
/// puts them there: slower, and otherwise no different.
///
/// Dropping it moves what its caches hold to where others find it.
#[must_use = "dropping it gives the slot back"]
pub struct Slot {
    pub(super) index: usize,
    /// It stays with its thread.
    _not_send: PhantomData<*const ()>,
}

impl Slot {
    /// Claims the lowest slot that is free for this thread. `None` if it has one already, or if 128 others have.
    pub fn claim() -> Option<Self> {
        if current() != NONE {
            return None;
        }
        let mut registry = registry();
        let index = registry.held.first_zero()?;
        registry.held.set(index, true);
        CURRENT.set(index);
        Some(Self { index, _not_send: PhantomData })
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let mut registry = registry();
        for pool in &registry.pools {
            // SAFETY: a pool lives while it is registered, and that does not change under the lock.
            let pool = unsafe { pool.as_ref() };
            // SAFETY: this thread holds the slot.
            unsafe { pool.free.flush(self.index) };
        }
        CURRENT.set(NONE);
        registry.held.set(self.index, false);
    }
}

impl fmt::Debug for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Slot({})", self.index)
    }
}
