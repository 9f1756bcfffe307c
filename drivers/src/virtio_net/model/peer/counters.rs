//! What a peer counts.

use std::sync::atomic::{AtomicU64, Ordering};

/// A count with one writer and any number of readers.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// The count now.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    /// For the one writer: a load and a store, no locked instruction.
    #[inline]
    pub(super) fn add(&self, delta: u64) {
        self.0.store(self.0.load(Ordering::Relaxed).wrapping_add(delta), Ordering::Relaxed);
    }
}

/// What the peer of one queue pair counts; the directions are named as the driver sees them. Every frame that was taken
/// from the driver and went nowhere is in one of the other counts.
#[derive(Debug, Default)]
#[repr(align(128))]
pub struct PeerCounters {
    /// Frames taken from the driver, whatever became of them.
    pub tx_frames: Counter,
    /// Bytes of those.
    pub tx_bytes: Counter,
    /// Frames given to the device.
    pub rx_frames: Counter,
    /// Bytes of those.
    pub rx_bytes: Counter,
    /// Lost on the cable, as its `loss` asks.
    pub lost: Counter,
    /// Overtaken by the frame sent after them, as the cable's `reorder` asks.
    pub reordered: Counter,
    /// Lost because the cable's other end was not there, or went away.
    pub unplugged: Counter,
    /// Frames with a wrong IPv4, TCP, UDP or ICMP checksum, if the sink verifies them.
    pub bad_checksums: Counter,
    /// Lost because the system did not take or give them: a full disk, a tap interface that is down.
    pub failed: Counter,
    /// Of the frames that were taken from the driver, those that are in `unplugged` or `failed`.
    pub undelivered: Counter,
    /// Frames that were due, as the generator's `rate` asks, and were given up because the device did not take them in time.
    pub skipped: Counter,
}

impl PeerCounters {
    #[inline]
    pub(super) fn sent(&self, bytes: &[u8]) {
        self.tx_frames.add(1);
        self.tx_bytes.add(bytes.len() as u64);
    }

    /// The system did not take so many of the driver's frames.
    #[cold]
    pub(super) fn not_taken(&self, frames: u64) {
        self.failed.add(frames);
        self.undelivered.add(frames);
    }

    #[inline]
    pub(super) fn received(&self, bytes: &[u8]) {
        self.rx_frames.add(1);
        self.rx_bytes.add(bytes.len() as u64);
    }
}
