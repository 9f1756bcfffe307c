//! `peer=tap:NAME`: a tap interface of the kernel, one queue of it for each queue pair.
//!
//! Each frame is a system call, and so is each look for one.

use std::fs::File;
use std::io::{Read, Write};
use std::sync::Arc;

use underpass::{Result, tap};

use super::{Frame, Peer, PeerCounters};

/// The longest frame that an interface sends: an IP packet's 64 KiB, its Ethernet header and a VLAN tag.
const MAX_FRAME: usize = (1 << 16) + 18;

struct Tap {
    file: File,
    frame: Box<[u8]>,
    counters: Arc<PeerCounters>,
}

pub(super) fn open(name: &str, pairs: usize) -> Result<Vec<Box<dyn Peer>>> {
    let peer = |file| {
        let frame = vec![0; MAX_FRAME].into_boxed_slice();
        Box::new(Tap { file, frame, counters: Arc::default() }) as Box<dyn Peer>
    };
    Ok(tap::open(name, pairs)?.into_iter().map(peer).collect())
}

impl Peer for Tap {
    fn transmit(&mut self, frame: Frame<'_>) -> bool {
        self.counters.sent(frame.bytes);
        // A tap takes a frame whole. One that is down takes none.
        if self.file.write(frame.bytes).is_err() {
            self.counters.not_taken(1);
        }
        true
    }

    fn receive(&mut self) -> Option<Frame<'_>> {
        // No frame is lost by a read that fails: there is none, or the interface is gone.
        let len = self.file.read(&mut self.frame).ok()?;
        let frame = Frame::finished(&self.frame[..len]);
        self.counters.received(frame.bytes);
        Some(frame)
    }

    fn counters(&self) -> Arc<PeerCounters> {
        Arc::clone(&self.counters)
    }
}
