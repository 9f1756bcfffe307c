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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio_net::model::peer::{PeerSpec, Traffic};

    #[test]
    fn wrong_checksums_are_counted_if_they_are_asked_for() {
        let spec = PeerSpec::Generator(Traffic { flows: 1, ..Traffic::default() });
        let mut generator = spec.open(1, underpass::net::MacAddr([2; 6])).unwrap().remove(0);
        let mut sink = Sink::new(true);
        for at in 0..64 {
            let mut bytes = generator.receive().unwrap().bytes.to_vec();
            sink.transmit(Frame::finished(&bytes));
            // Behind the Ethernet header everything is covered by one checksum or the other. Without its version and
            // length a header is none, and has no checksum.
            bytes[at] ^= 1;
            sink.transmit(Frame::finished(&bytes));
        }
        let counters = sink.counters();
        assert_eq!((counters.tx_frames.get(), counters.bad_checksums.get()), (128, 64 - 15));
    }
}
