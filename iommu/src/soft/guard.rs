//! How unmapping waits for DMA in flight, while DMA waits for nothing.
//!
//! A device's translations have a [`Generation`], and each of its buses a [`Slot`]: 0 between accesses, and during one
//! the generation that the bus saw when it began. To take a translation away, one clears it, begins a new
//! generation, issues the heavy barrier and waits for every slot that holds an older one. Either the bus saw the
//! cleared translation, or the waiter sees the bus inside: that is the store-buffering (Dekker) pattern, and
//! it needs a full barrier on both sides. As accesses are many and unmaps few, the two sides are uneven where the
//! kernel offers it: `membarrier(2)` with `PRIVATE_EXPEDITED` makes every running thread of the process execute a
//! full barrier, so that the bus's own side is a compiler fence. Elsewhere (and under loom, which models this
//! file) both sides are `fence(SeqCst)`.
//!
//! A bus never reads its own slot: an access is two independent stores, with no chain from one to the next.

#[cfg(loom)]
use loom::sync::atomic::{AtomicU64, Ordering, fence};
#[cfg(not(loom))]
use std::sync::atomic::{AtomicU64, Ordering, fence};

use std::sync::Arc;

use crossbeam::utils::CachePadded;

/// Counts what makes a device's cached translations void. Starts at 1, so that 0 can mean "none".
#[derive(Debug)]
pub(super) struct Generation(CachePadded<AtomicU64>);

impl Generation {
    pub(super) fn first() -> Self {
        Self(CachePadded::new(AtomicU64::new(1)))
    }

    /// The present one. What was cleared before it began is seen as cleared. What a translation is compared with is to
    /// be read inside the access.
    #[inline]
    pub(super) fn now(&self) -> u64 {
        // Acquire: pairs with `begin_next`.
        self.0.load(Ordering::Acquire)
    }

    /// Begins a new one, after translations were cleared; returns it.
    pub(super) fn begin_next(&self) -> u64 {
        // Release: pairs with `now`. AcqRel, as two unmaps may do it at once.
        self.0.fetch_add(1, Ordering::AcqRel) + 1
    }
}

/// One bus's sign that it is inside an access. Written by that bus alone.
#[derive(Debug)]
pub(super) struct Slot {
    /// 0, or the generation at the beginning of the access.
    inside: CachePadded<AtomicU64>,
    /// `membarrier` does the waiter's and the bus's barrier.
    asymmetric: bool,
}

impl Slot {
    pub(super) fn new() -> Self {
        Self { inside: CachePadded::new(AtomicU64::new(0)), asymmetric: barrier::asymmetric() }
    }

    /// Begins an access. What is translated until [`exit`](Self::exit) stays valid until then.
    #[inline]
    pub(super) fn enter(&self, generation: &Generation) {
        // Release: a waiter that finds the bus in its next access already must still see the one before as over.
        self.inside.store(generation.now(), Ordering::Release);
        // Pairs with the heavy barrier in `wait_for`.
        if self.asymmetric {
            std::sync::atomic::compiler_fence(Ordering::SeqCst);
        } else {
            fence(Ordering::SeqCst);
        }
    }

    /// Ends the access, if one is under way.
    #[inline]
    pub(super) fn exit(&self) {
        // Release: pairs with the Acquire in `wait_for`; the access happens before the waiter goes on.
        self.inside.store(0, Ordering::Release);
    }
}

/// Slots of one device, and the generation from which on an access can not see what was cleared.
pub(super) type Waiting = (u64, Vec<Arc<Slot>>);

/// Returns once every access that could have seen a translation cleared before its generation is over.
pub(super) fn wait_for(devices: &[Waiting]) {
    barrier::heavy();
    for (generation, slots) in devices {
        for slot in slots {
            let is_over = || {
                let inside = slot.inside.load(Ordering::Acquire);
                inside == 0 || inside >= *generation
            };
            barrier::wait_until(is_over);
        }
    }
}

#[cfg(not(loom))]
mod barrier {
    use std::sync::atomic::{AtomicU8, Ordering, fence};

    const UNKNOWN: u8 = 0;
    const REFUSED: u8 = 1;
    const REGISTERED: u8 = 2;

    /// Whether the process is registered for expedited barriers. Asked before the first slot exists; asking twice
    /// at once does no harm, and the answer never changes.
    static STATE: AtomicU8 = AtomicU8::new(UNKNOWN);

    pub(super) fn asymmetric() -> bool {
        if STATE.load(Ordering::Acquire) == UNKNOWN {
            let registered = membarrier(libc::MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED).is_ok();
            let answer = if registered { REGISTERED } else { REFUSED };
            // The first answer stays: slots and waiters must agree.
            let _ = STATE.compare_exchange(UNKNOWN, answer, Ordering::AcqRel, Ordering::Acquire);
        }
        STATE.load(Ordering::Acquire) == REGISTERED
    }

    pub(super) fn heavy() {
        fence(Ordering::SeqCst);
        if STATE.load(Ordering::Acquire) == REGISTERED {
            while let Err(error) = membarrier(libc::MEMBARRIER_CMD_PRIVATE_EXPEDITED) {
                // Once registered it fails only for lack of kernel memory, or if a seccomp filter came later. The buses
                // have no barrier of their own, so to go on could free memory under a device.
                if !matches!(error.raw_os_error(), Some(libc::ENOMEM | libc::EAGAIN | libc::EINTR)) {
                    tracing::error!(
                        "membarrier(2) worked and is refused now ({error}): DMA can not be stopped safely; \
                         allow membarrier in the seccomp filter"
                    );
                    std::process::abort();
                }
                std::thread::yield_now();
            }
        }
    }

    /// An access covers at most 64 KiB of data and waits for nothing, so this is short. But its thread may not be
    /// running: give way, and then sleep, which also lets a thread of lower priority on.
    pub(super) fn wait_until(is_over: impl Fn() -> bool) {
        for turn in 0_u64.. {
            if is_over() {
                return;
            }
            if turn < 100 {
                std::thread::yield_now();
            } else {
                std::thread::sleep(std::time::Duration::from_micros(50));
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

    pub(super) fn wait_until(is_over: impl Fn() -> bool) {
        while !is_over() {
            loom::thread::yield_now();
        }
    }
}

#[cfg(all(test, loom))]
mod loom_tests {
    use super::*;
    use loom::cell::UnsafeCell;

    /// A bus that uses a page if it is mapped or cached, against an unmap that frees the page afterwards. Loom fails if
    /// in any interleaving the page is used while or after it is freed.
    #[test]
    fn loom_unmap_waits_for_the_access_in_flight() {
        loom::model(|| {
            let slot = Arc::new(Slot::new());
            let generation = loom::sync::Arc::new(Generation::first());
            let entry = loom::sync::Arc::new(AtomicU64::new(1));
            let page = loom::sync::Arc::new(UnsafeCell::new(0_u64));

            let bus = {
                let (slot, generation) = (slot.clone(), generation.clone());
                let (entry, page) = (entry.clone(), page.clone());
                loom::thread::spawn(move || {
                    let mut cached = 0;
                    for _ in 0..2 {
                        slot.enter(&generation);
                        let now = generation.now();
                        if cached == now || entry.load(Ordering::Acquire) != 0 {
                            cached = now;
                            // SAFETY: loom checks that no other access is concurrent.
                            page.with_mut(|p| unsafe { *p += 1 });
                        }
                        slot.exit();
                    }
                })
            };

            entry.store(0, Ordering::Release);
            let next = generation.begin_next();
            wait_for(&[(next, vec![slot])]);
            // SAFETY: loom checks that no other access is concurrent.
            page.with_mut(|p| unsafe { *p = u64::MAX });
            bus.join().unwrap();
        });
    }
}
