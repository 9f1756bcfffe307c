//! `peer=sink`: takes what the driver sends, and sends nothing.

use std::sync::Arc;

use underpass::net::checksum;
use underpass::net::headers::Headers;

use super::{Frame, Peer, PeerCounters};

pub(super) struct Sink {
    verify: bool,
    counters: Arc<PeerCounters>,
}

impl Sink {
    /// A sink that counts wrong checksums if it is to `verify` them.
    pub(super) fn new(verify: bool) -> Self {
        Self { verify, counters: Arc::default() }
    }
}

impl Peer for Sink {
    fn transmit(&mut self, frame: Frame<'_>) -> bool {
        self.counters.sent(frame.bytes);
        if self.verify && has_wrong_checksum(frame.bytes) {
            self.counters.bad_checksums.add(1);
        }
        true
    }

    fn receive(&mut self) -> Option<Frame<'_>> {
        None
    }

    fn carries_offloads(&self) -> bool {
        !self.verify
    }

    fn counters(&self) -> Arc<PeerCounters> {
        Arc::clone(&self.counters)
    }
}

fn has_wrong_checksum(frame: &[u8]) -> bool {
    let headers = Headers::parse(frame);
    [checksum::check_ip(frame, &headers), checksum::check_l4(frame, &headers)].contains(&Some(false))
}
