//! What a queue counts.

use std::sync::atomic::{AtomicU64, Ordering};

use crossbeam::utils::CachePadded;

/// Counters of one queue: one writer, any number of readers, in lines of their own.
#[derive(Debug, Default)]
pub struct Counters(CachePadded<Words>);

#[derive(Debug, Default)]
struct Words {
    packets: AtomicU64,
    bytes: AtomicU64,
    runts: AtomicU64,
    oversize: AtomicU64,
    refused: AtomicU64,
    unsent: AtomicU64,
    no_buffers: AtomicU64,
    errors: AtomicU64,
    broken: AtomicU64,
}

/// [`Counters`] at one moment, or what is to be added to them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Values {
    /// Packets that were received, or that the device took to send.
    pub packets: u64,
    /// Bytes of those as on the wire, from the Ethernet header on, VLAN tags that are taken out or put in included, without the
    /// checksum at a frame's end.
    pub bytes: u64,
    /// Dropped: shorter than an Ethernet header.
    pub runts: u64,
    /// Dropped: over the MTU.
    pub oversize: u64,
    /// Dropped on transmit: in memory that the port does not map, in more segments than the device takes, or asking for an
    /// offload that was not granted.
    pub refused: u64,
    /// Dropped on transmit: still with the device when the port was stopped.
    pub unsent: u64,
    /// Buffers for receiving that the pool did not have. Nothing is dropped by that alone: the device has fewer buffers,
    /// and what it drops for the lack of any it alone knows.
    pub no_buffers: u64,
    /// Dropped because of what the device said of them.
    pub errors: u64,
    /// Times that the queue broke down, as the device did what no device may do. These are no packets.
    pub broken: u64,
}

impl Values {
    /// All packets that were dropped.
    pub const fn dropped(&self) -> u64 {
        self.runts + self.oversize + self.refused + self.unsent + self.errors
    }
}

impl Counters {
    /// For the queue alone: adds to each counter. Single writer: a load and a store, no locked instruction.
    #[inline]
    pub fn add(&self, delta: Values) {
        let Values { packets, bytes, runts, oversize, refused, unsent, no_buffers, errors, broken } = delta;
        for (word, delta) in [
            (&self.0.packets, packets),
            (&self.0.bytes, bytes),
            (&self.0.runts, runts),
            (&self.0.oversize, oversize),
            (&self.0.refused, refused),
            (&self.0.unsent, unsent),
            (&self.0.no_buffers, no_buffers),
            (&self.0.errors, errors),
            (&self.0.broken, broken),
        ] {
            if delta != 0 {
                word.store(word.load(Ordering::Relaxed).wrapping_add(delta), Ordering::Relaxed);
            }
        }
    }

    /// The values now.
    pub fn values(&self) -> Values {
        let read = |word: &AtomicU64| word.load(Ordering::Relaxed);
        Values {
            packets: read(&self.0.packets),
            bytes: read(&self.0.bytes),
            runts: read(&self.0.runts),
            oversize: read(&self.0.oversize),
            refused: read(&self.0.refused),
            unsent: read(&self.0.unsent),
            no_buffers: read(&self.0.no_buffers),
            errors: read(&self.0.errors),
            broken: read(&self.0.broken),
        }
    }
}
