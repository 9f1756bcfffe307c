//! What is at the other end of the software device's cable: a [`Peer`] for each queue pair, made by a [`PeerSpec`].

mod cable;
mod counters;
mod generator;
mod loopback;
mod options;
mod pcap;
mod random;
mod sink;
mod slot;
mod tap;

pub use cable::Impairments;
pub use counters::{Counter, PeerCounters};
pub use generator::{Traffic, TrafficProtocol};
pub use options::{PeerOption, PeerSpec};
pub use pcap::Pace;
pub use random::Chance;

use std::sync::Arc;

/// An Ethernet frame on the cable.
#[derive(Debug, Clone, Copy)]
pub struct Frame<'a> {
    /// From the Ethernet header on, without the frame check sequence.
    pub bytes: &'a [u8],
    /// What is still to be done to it.
    pub offload: Offload,
}

/// What a sender left to the device. A frame with any of it is not finished: as it is, no real cable could carry it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Offload {
    /// A checksum is missing: where in the frame the bytes that it covers start (the transport header), and its own
    /// offset from there. The sum of the pseudo header stands in its place.
    pub checksum: Option<(u16, u16)>,
    /// The payload is to be cut into segments.
    pub segment: Option<Segment>,
}

/// How a frame is to be cut into segments.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// Which headers it has.
    pub kind: SegmentKind,
    /// Payload bytes of each segment.
    pub size: u16,
    /// Bytes of all headers, repeated in front of each segment.
    pub header_len: u16,
}

/// The protocol of a frame that is to be cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SegmentKind {
    /// TCP over IPv4.
    Tcp4,
    /// TCP over IPv6.
    Tcp6,
    /// UDP over IPv4 or IPv6.
    Udp,
}

impl<'a> Frame<'a> {
    /// A frame that is finished.
    pub const fn finished(bytes: &'a [u8]) -> Self {
        Self { bytes, offload: Offload { checksum: None, segment: None } }
    }
}

/// The other end of the cable, as one queue pair of the device sees it.
pub trait Peer: Send {
    /// Takes a frame that the driver sent. False if there is no room now: the device keeps the frame and offers it again.
    /// A peer that does not [carry offloads](Self::carries_offloads) never refuses one.
    fn transmit(&mut self, frame: Frame<'_>) -> bool;

    /// The next frame for the driver. The device asks only while it has buffers for one, and also while the link is down:
    /// what was under way still arrives.
    fn receive(&mut self) -> Option<Frame<'_>>;

    /// Whether the link is up.
    fn link_up(&self) -> bool {
        true
    }

    /// Whether it takes frames that are not finished. For others the device finishes them first.
    fn carries_offloads(&self) -> bool {
        false
    }

    /// Whether all frames of a flow come to the same queue pair. The device then leaves a flow there until the driver sends
    /// some of it on another; those of other peers it spreads.
    fn sorts_flows(&self) -> bool {
        false
    }

    /// What it counts.
    fn counters(&self) -> Arc<PeerCounters>;
}
