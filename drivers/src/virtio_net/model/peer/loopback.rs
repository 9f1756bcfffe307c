//! `peer=loop`: what the driver sends comes back to it.

use std::sync::Arc;

use super::slot::Slot;
use super::{Frame, Peer, PeerCounters};

/// Frames that are under way at most: as many as a usual transmit queue holds.
const DEPTH: usize = 512;

/// A ring of frames under way.
pub(super) struct Loopback {
    slots: Box<[Slot]>,
    /// Frames ever put in and taken out since the ring was empty: their difference is what is under way.
    put: usize,
    taken: usize,
    counters: Arc<PeerCounters>,
}

impl Loopback {
    pub(super) fn new() -> Self {
        let slots = (0..DEPTH).map(|_| Slot::new()).collect();
        Self { slots, put: 0, taken: 0, counters: Arc::default() }
    }
}

impl Peer for Loopback {
    fn transmit(&mut self, frame: Frame<'_>) -> bool {
        if self.put == self.taken {
            // Begins with the first slots again: they are in the cache.
            (self.put, self.taken) = (0, 0);
        }
        if self.put - self.taken == DEPTH {
            return false;
        }
        self.slots[self.put % DEPTH].put(frame);
        self.put += 1;
        self.counters.sent(frame.bytes);
        true
    }

    fn receive(&mut self) -> Option<Frame<'_>> {
        if self.taken == self.put {
            return None;
        }
        let frame = self.slots[self.taken % DEPTH].frame();
        self.taken += 1;
        self.counters.received(frame.bytes);
        Some(frame)
    }

    fn carries_offloads(&self) -> bool {
        true
    }

    fn counters(&self) -> Arc<PeerCounters> {
        Arc::clone(&self.counters)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio_net::model::peer::Offload;

    #[test]
    fn what_goes_in_comes_out_in_order_and_a_full_ring_refuses() {
        let mut peer = Loopback::new();
        let offload = Offload { checksum: Some((34, 16)), segment: None };
        // Not a divisor of the depth, so that the ring goes round in every way; never empty but at the start.
        let (mut sent, mut received) = (0u64, 0u64);
        for round in 0..40 {
            let goal = if round % 2 == 0 { DEPTH as u64 } else { 100 };
            while sent - received < goal {
                let bytes = sent.to_le_bytes().repeat(8 + sent as usize % 500);
                assert!(peer.transmit(Frame { bytes: &bytes, offload }));
                sent += 1;
            }
            if goal == DEPTH as u64 {
                assert!(!peer.transmit(Frame::finished(&[0xff; 60])), "no room, so it must not be taken");
            }
            while sent - received > 37 {
                let frame = peer.receive().unwrap();
                assert_eq!(frame.bytes, received.to_le_bytes().repeat(8 + received as usize % 500));
                assert_eq!(frame.offload, offload);
                received += 1;
            }
        }
        while peer.receive().is_some() {
            received += 1;
        }
        let counters = peer.counters();
        assert_eq!((counters.tx_frames.get(), counters.rx_frames.get()), (sent, received));
        assert_eq!(sent, received);
        assert_eq!(counters.tx_bytes.get(), counters.rx_bytes.get());
    }
}
