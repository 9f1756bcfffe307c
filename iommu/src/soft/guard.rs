//! How unmapping waits for DMA in flight, while DMA waits for nothing.
//!
//! Each bus has a [`Slot`]: a counter that is odd while the bus is inside an access. To take a translation
//! away, one clears it, issues the heavy barrier and then waits for every slot that is odd to move on. Either the
//! bus saw the cleared translation, or the waiter sees the bus inside: that is the store-buffering (Dekker)
//! pattern, and it needs a full barrier on both sides. As accesses are many and unmaps few, the two sides are
//! uneven where the kernel offers it: `membarrier(2)` with `PRIVATE_EXPEDITED` makes every running thread of the
//! process execute a full barrier, so that the bus's own side is a compiler fence. Elsewhere (and under loom,
//! which models this file) both sides are `fence(SeqCst)`.

#[cfg(loom)]
use loom::{
    sync::atomic::{AtomicU64, Ordering, fence},
    thread::yield_now,
};
#[cfg(not(loom))]
use std::{
    sync::atomic::{AtomicU64, Ordering, fence},
    thread::yield_now,
};

use std::sync::Arc;

use crossbeam::utils::CachePadded;

/// One bus's sign that it is inside an access. Written by that bus alone.
#[derive(Debug)]
pub(super) struct Slot {
    /// Odd: inside.
    count: CachePadded<AtomicU64>,
    /// `membarrier` does the waiter's and the bus's barrier.
    asymmetric: bool,
}

impl Slot {
    pub(super) fn new() -> Self {
        Self { count: CachePadded::new(AtomicU64::new(0)), asymmetric: barrier::asymmetric() }
    }

    /// Begins an access. What is translated until [`exit`](Self::exit) stays valid until then.
    #[inline]
    pub(super) fn enter(&self) {
        let count = self.count.load(Ordering::Relaxed);
        debug_assert!(count.is_multiple_of(2), "a bus does one access at a time");
        // Release: a waiter that finds the bus in its next access already must still see the one before as over.
        self.count.store(count + 1, Ordering::Release);
        // Pairs with the heavy barrier in `wait_for`.
        if self.asymmetric {
            std::sync::atomic::compiler_fence(Ordering::SeqCst);
        } else {
            fence(Ordering::SeqCst);
        }
    }

    /// Ends an access.
    #[inline]
    pub(super) fn exit(&self) {
        let count = self.count.load(Ordering::Relaxed);
        // Release: pairs with the Acquire in `wait_for`; the access happens before the waiter goes on.
        self.count.store(count + 1, Ordering::Release);
    }

    /// Ends the access that is under way, if one is.
    pub(super) fn leave(&self) {
        if !self.count.load(Ordering::Relaxed).is_multiple_of(2) {
            self.exit();
        }
    }
}

/// Returns once every access that could have seen a translation cleared before this call is over.
pub(super) fn wait_for(slots: &[Arc<Slot>]) {
    barrier::heavy();
    for slot in slots {
        let seen = slot.count.load(Ordering::Acquire);
        if seen.is_multiple_of(2) {
            continue;
        }
        // An access covers at most 64 KiB of data and waits for nothing, so this is short: but its thread may
        // not be running, so give way.
        while slot.count.load(Ordering::Acquire) == seen {
            yield_now();
        }
    }
}

#[cfg(not(loom))]
mod barrier {
    use std::sync::LazyLock;
    use std::sync::atomic::{Ordering, fence};

    /// Whether the process is registered for expedited barriers: asked once, before the first slot exists.
    static REGISTERED: LazyLock<bool> =
        LazyLock::new(|| membarrier(libc::MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED).is_ok());

    pub(super) fn asymmetric() -> bool {
        *REGISTERED
    }

    pub(super) fn heavy() {
        fence(Ordering::SeqCst);
        if *REGISTERED {
            // Once registered it fails only for lack of kernel memory. The buses have no barrier of their own
            // then, and going on could free memory under a device.
            while membarrier(libc::MEMBARRIER_CMD_PRIVATE_EXPEDITED).is_err() {
                std::thread::yield_now();
            }
        }
    }

    fn membarrier(command: libc::membarrier_cmd) -> Result<(), std::io::Error> {
        // SAFETY: membarrier(2) takes three integers and touches no memory of the caller.
        let result = unsafe { libc::syscall(libc::SYS_membarrier, command, 0, 0) };
        if result < 0 { Err(std::io::Error::last_os_error()) } else { Ok(()) }
    }
}

#[cfg(loom)]
mod barrier {
    pub(super) fn asymmetric() -> bool {
        false
    }

    pub(super) fn heavy() {
        loom::sync::atomic::fence(loom::sync::atomic::Ordering::SeqCst);
    }
}

#[cfg(all(test, loom))]
mod loom_tests {
    use super::*;
    use loom::cell::UnsafeCell;

    /// A bus that uses a page if it is mapped, against an unmap that frees the page afterwards. Loom fails if in any
    /// interleaving the page is used while or after it is freed.
    #[test]
    fn loom_unmap_waits_for_the_access_in_flight() {
        loom::model(|| {
            let slot = Arc::new(Slot::new());
            let entry = loom::sync::Arc::new(AtomicU64::new(1));
            let page = loom::sync::Arc::new(UnsafeCell::new(0_u64));

            let bus = {
                let (slot, entry, page) = (slot.clone(), entry.clone(), page.clone());
                loom::thread::spawn(move || {
                    for _ in 0..2 {
                        slot.enter();
                        if entry.load(Ordering::Acquire) != 0 {
                            // SAFETY: loom checks that no other access is concurrent.
                            page.with_mut(|p| unsafe { *p += 1 });
                        }
                        slot.exit();
                    }
                })
            };

            entry.store(0, Ordering::Release);
            wait_for(&[slot]);
            // SAFETY: loom checks that no other access is concurrent.
            page.with_mut(|p| unsafe { *p = u64::MAX });
            bus.join().unwrap();
        });
    }
}
