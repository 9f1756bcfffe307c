//! How a port lends its queues: the ring, with all that is posted on it, is in its [`Home`] or in one [`Lease`].

use std::fmt;
use std::mem;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use underpass::net::State;

/// Why a queue of a device that leaves does nothing any more ([`underpass::pci::PciDevice::is_gone`]).
pub(super) const GONE: &str = "it was unplugged, or the kernel wants it back";

/// What a queue's worker and its port tell each other.
#[derive(Debug, Default)]
pub(super) struct Status {
    /// A [`State`] as a number.
    state: AtomicU8,
    broken: OnceLock<String>,
}

impl Status {
    #[inline]
    pub(super) fn get(&self) -> State {
        // Relaxed: the state guards no memory.
        match self.state.load(Ordering::Relaxed) {
            0 => State::Running,
            1 => State::Quiesced,
            _ => State::Gone,
        }
    }

    #[inline]
    pub(super) fn is_running(&self) -> bool {
        self.state.load(Ordering::Relaxed) == State::Running as u8
    }

    /// The port wants the queue back.
    pub(super) fn quiesce(&self) {
        let (running, quiesced) = (State::Running as u8, State::Quiesced as u8);
        let _ = self.state.compare_exchange(running, quiesced, Ordering::Relaxed, Ordering::Relaxed);
    }

    /// The queue is of no use any more; the first reason given stays. Whether this is the first.
    #[cold]
    pub(super) fn break_down(&self, why: impl Into<String>) -> bool {
        let is_first = self.broken.set(why.into()).is_ok();
        self.state.store(State::Gone as u8, Ordering::Relaxed);
        is_first
    }

    /// Why it broke down.
    pub(super) fn broken(&self) -> Option<&str> {
        self.broken.get().map(String::as_str)
    }
}

/// A ring that can be lent.
pub(super) trait Ring: Send {
    /// The device was reset: gives all buffers back to their pools.
    fn close(&mut self);
}

/// Where a ring lives while it is not lent out.
pub(super) struct Home<R> {
    place: Mutex<Place<R>>,
}

enum Place<R> {
    Here(R),
    Out,
    /// The device did not stop: whatever comes home stays allocated.
    Leaked,
}

impl<R> Place<R> {
    fn take(&mut self) -> Option<R> {
        match mem::replace(self, Self::Out) {
            Self::Here(ring) => Some(ring),
            other => {
                *self = other;
                None
            }
        }
    }
}

/// A home, whatever its ring is.
pub(super) trait AnyHome: Send + Sync {
    fn is_out(&self) -> bool;
    /// Closes the ring and drops it, if it is here.
    fn close(&self);
    /// The device did not stop: nothing that it may still write is ever freed.
    fn leak(&self);
}

impl<R: Ring> Home<R> {
    pub(super) fn new(ring: R) -> Arc<Self> {
        Arc::new(Self { place: Mutex::new(Place::Here(ring)) })
    }

    fn place(&self) -> MutexGuard<'_, Place<R>> {
        // Nothing panics while it is locked.
        self.place.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lends the ring, if it is here.
    pub(super) fn lend(self: &Arc<Self>) -> Option<Lease<R>> {
        let ring = self.place().take()?;
        Some(Lease { ring: Some(ring), home: Arc::clone(self) })
    }
}

impl<R: Ring> AnyHome for Home<R> {
    fn is_out(&self) -> bool {
        matches!(*self.place(), Place::Out)
    }

    fn close(&self) {
        let ring = self.place().take();
        if let Some(mut ring) = ring {
            ring.close();
        }
    }

    fn leak(&self) {
        #[allow(clippy::mem_forget, reason = "the device's last write has no time")]
        mem::forget(mem::replace(&mut *self.place(), Place::Leaked));
    }
}

/// A ring on loan: dropping it brings the ring home.
pub(super) struct Lease<R: Ring> {
    ring: Option<R>,
    home: Arc<Home<R>>,
}

impl<R: Ring> Lease<R> {
    /// The ring; `None` only while the lease is being dropped.
    #[inline]
    pub(super) fn ring(&self) -> Option<&R> {
        self.ring.as_ref()
    }

    #[inline]
    pub(super) fn ring_mut(&mut self) -> Option<&mut R> {
        self.ring.as_mut()
    }
}

impl<R: Ring> Drop for Lease<R> {
    fn drop(&mut self) {
        let Some(ring) = self.ring.take() else { return };
        let mut place = self.home.place();
        if let Place::Leaked = *place {
            #[allow(clippy::mem_forget, reason = "the device's last write has no time")]
            mem::forget(ring);
        } else {
            *place = Place::Here(ring);
        }
    }
}

impl<R: Ring + fmt::Debug> fmt::Debug for Lease<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.ring.fmt(f)
    }
}
