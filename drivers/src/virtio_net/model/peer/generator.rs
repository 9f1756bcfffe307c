//! `peer=generator`: frames of many flows, as many as are asked for.
//!
//! A frame is made once, for each flow. What changes from one to the next is a sequence number, and the length if it is
//! to vary, with the checksums over them.

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use underpass::Transport;
use underpass::net::headers::{Flow, L4Checksum};
use underpass::net::{MacAddr, checksum};

use super::random::Random;
use super::{Frame, Peer, PeerCounters};

/// Bytes of the headers, none of which has options.
const ETHERNET: usize = 14;
const IP_HEADER: usize = 20;

/// Where things are in a frame.
const IP_LEN: usize = ETHERNET + 2;
const IP_CHECKSUM: usize = ETHERNET + 10;
const L4: usize = ETHERNET + IP_HEADER;
const UDP_LEN: usize = L4 + 4;
const UDP_CHECKSUM: usize = L4 + 6;
const UDP_PAYLOAD: usize = L4 + 8;
const TCP_SEQUENCE: usize = L4 + 4;
const TCP_CHECKSUM: usize = L4 + 16;
const TCP_PAYLOAD: usize = L4 + 20;

/// The addresses that RFC 2544, appendix C.2.2, sets apart for such traffic: each flow has its own source.
const SOURCES: u32 = u32::from_be_bytes([198, 18, 0, 0]);
const DESTINATION: Ipv4Addr = Ipv4Addr::new(198, 19, 0, 1);
/// The port that discards what it gets (RFC 863).
const DISCARD: u16 = 9;
const FIRST_EPHEMERAL: u16 = 49152;
/// A station that no real one is: locally administered, and none that [`MacAddr::local`] gives to a port.
const STATION: MacAddr = MacAddr([0x06, 0, 0, 0, 0, 0x01]);

/// What a generator sends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Traffic {
    /// Bytes of the shortest and the longest frame, without the frame check sequence; sizes between are equally likely.
    pub size: (u16, u16),
    /// How many flows take turns, at most [`MAX_FLOWS`](Self::MAX_FLOWS).
    pub flows: u32,
    /// Frames a second, all queue pairs together; `None` is as many as there are buffers for.
    pub rate: Option<u64>,
    /// What the frames carry.
    pub protocol: TrafficProtocol,
    /// What decides the sizes.
    pub seed: u64,
}

/// The transport protocol of generated traffic.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum TrafficProtocol {
    /// UDP datagrams; the first four bytes of their payload count them, flow by flow.
    #[default]
    Udp,
    /// TCP segments whose sequence numbers go on, flow by flow. There is no connection.
    Tcp,
}

impl Traffic {
    /// The most flows: each has a source address of its own.
    pub const MAX_FLOWS: u32 = 1 << 16;
    /// The sizes that frames can have: from the shortest of Ethernet to the longest of IP.
    pub const SIZES: std::ops::RangeInclusive<u16> = 60..=u16::MAX;
    /// Bytes of the longest frames of all flows together, at most: so much memory is used.
    pub const MAX_MEMORY: u64 = 256 << 20;
}

impl Default for Traffic {
    fn default() -> Self {
        Self { size: (64, 64), flows: 16, rate: None, protocol: TrafficProtocol::Udp, seed: 0 }
    }
}

/// The flows of one queue pair.
struct Generator {
    flows: Vec<Template>,
    /// Whose turn it was last.
    turn: usize,
    protocol: TrafficProtocol,
    shortest: u16,
    /// How many sizes there are.
    sizes: u32,
    random: Random,
    limit: Option<RateLimit>,
    counters: Arc<PeerCounters>,
}

/// One generator for each queue pair, which share the flows. Frames are addressed to `station`.
pub(super) fn open(traffic: &Traffic, station: MacAddr, pairs: usize) -> Vec<Box<dyn Peer>> {
    let (shortest, longest) = traffic.size;
    let generator = |pair| {
        let flows: Vec<_> = (0..traffic.flows)
            .skip(pair)
            .step_by(pairs)
            .map(|flow| Template::new(flow, station, traffic))
            .collect();
        let limit = traffic.rate.map(|rate| RateLimit::new(rate, flows.len(), traffic.flows));
        let mut generator = Generator {
            flows,
            turn: 0,
            protocol: traffic.protocol,
            shortest,
            sizes: u32::from(longest - shortest) + 1,
            random: Random::new(traffic.seed, pair),
            limit,
            counters: Arc::default(),
        };
        // All but the last, as if that had just had its turn.
        generator.turn = generator.flows.len().saturating_sub(1);
        (0..generator.turn).for_each(|flow| generator.prepare(flow));
        Box::new(generator) as Box<dyn Peer>
    };
    (0..pairs).map(generator).collect()
}

impl Generator {
    /// Makes the next frame of a flow.
    #[inline]
    fn prepare(&mut self, flow: usize) {
        let size = match self.sizes {
            1 => self.shortest,
            sizes => self.shortest + self.random.below(sizes) as u16,
        };
        self.flows[flow].prepare(self.protocol, size);
    }
}

impl Peer for Generator {
    fn transmit(&mut self, frame: Frame<'_>) -> bool {
        self.counters.sent(frame.bytes);
        true
    }

    fn receive(&mut self) -> Option<Frame<'_>> {
        if self.flows.is_empty() || !self.limit.as_mut().is_none_or(|limit| limit.grants(&self.counters)) {
            return None;
        }
        // The flow that had its turn gets its next frame now, not when that is due: the copy out of a frame that was written
        // just before would stall.
        self.prepare(self.turn);
        self.turn = if self.turn + 1 == self.flows.len() { 0 } else { self.turn + 1 };
        let bytes = self.flows[self.turn].frame();
        self.counters.received(bytes);
        Some(Frame::finished(bytes))
    }

    fn sorts_flows(&self) -> bool {
        true
    }

    fn carries_offloads(&self) -> bool {
        true
    }

    fn counters(&self) -> Arc<PeerCounters> {
        Arc::clone(&self.counters)
    }
}

/// A flow's frame, in its full length.
struct Template {
    bytes: Box<[u8]>,
    /// Bytes of the frame that is ready.
    size: u16,
    /// The number of the next frame (UDP) or of its first byte (TCP).
    sequence: u32,
}

impl Template {
    fn new(flow: u32, station: MacAddr, traffic: &Traffic) -> Self {
        let mut bytes = vec![0; traffic.size.1.into()].into_boxed_slice();
        let headers = Flow {
            source_mac: STATION,
            destination_mac: station,
            vlan: None,
            source: Ipv4Addr::from(SOURCES + flow).into(),
            destination: DESTINATION.into(),
            transport: match traffic.protocol {
                TrafficProtocol::Udp => Transport::Udp,
                TrafficProtocol::Tcp => Transport::Tcp,
            },
            source_port: FIRST_EPHEMERAL + (flow % (1 << 14)) as u16,
            destination_port: DISCARD,
        };
        let written = headers.write(&mut bytes, L4Checksum::Full);
        debug_assert!(written.is_some(), "sizes are in range");
        Self { bytes, size: traffic.size.1, sequence: 0 }
    }

    /// The frame that is ready.
    #[inline]
    fn frame(&self) -> &[u8] {
        &self.bytes[..self.size.into()]
    }

    /// Makes the next frame, of `size` bytes. Behind the headers there are only zeros but for a number, so that what is cut off
    /// does not count in the checksum.
    #[inline]
    fn prepare(&mut self, protocol: TrafficProtocol, size: u16) {
        let (number, step, checksum_at) = match protocol {
            TrafficProtocol::Udp => (UDP_PAYLOAD, 1, UDP_CHECKSUM),
            TrafficProtocol::Tcp => (TCP_SEQUENCE, u32::from(size) - TCP_PAYLOAD as u32, TCP_CHECKSUM),
        };
        let mut checksum = self.word(checksum_at);
        let (len, old_len) = (size - ETHERNET as u16, self.word(IP_LEN));
        if len != old_len {
            let ip_checksum = checksum::update(self.word(IP_CHECKSUM), old_len, len);
            self.put(IP_CHECKSUM, ip_checksum);
            self.put(IP_LEN, len);
            // The pseudo header's length and UDP's own change by as much as IP's.
            checksum = checksum::update(checksum, old_len, len);
            if protocol == TrafficProtocol::Udp {
                self.replace(UDP_LEN, len - IP_HEADER as u16, &mut checksum);
            }
        }
        self.replace(number, (self.sequence >> 16) as u16, &mut checksum);
        self.replace(number + 2, self.sequence as u16, &mut checksum);
        if protocol == TrafficProtocol::Udp && checksum == 0 {
            // 0 would mean that there is none (RFC 768).
            checksum = 0xffff;
        }
        self.put(checksum_at, checksum);
        self.sequence = self.sequence.wrapping_add(step);
        self.size = size;
    }

    /// Puts another word in, and into the checksum that covers it.
    #[inline]
    fn replace(&mut self, at: usize, new: u16, checksum: &mut u16) {
        let old = self.word(at);
        if new != old {
            *checksum = checksum::update(*checksum, old, new);
            self.put(at, new);
        }
    }

    #[inline]
    fn word(&self, at: usize) -> u16 {
        u16::from_be_bytes([self.bytes[at], self.bytes[at + 1]])
    }

    #[inline]
    fn put(&mut self, at: usize, word: u16) {
        self.bytes[at..at + 2].copy_from_slice(&word.to_be_bytes());
    }
}

/// How many frames are due.
struct RateLimit {
    /// Frames in so many nanoseconds.
    frames: u128,
    nanoseconds: u128,
    /// Frames that are let through together, so that the clock is read once for them.
    batch: u64,
    /// Frames that are made up for at most, after a time in which the device took none.
    arrears: u64,
    /// When the first was asked for.
    start: Option<Instant>,
    /// Frames that were due since, as far as they were let through or given up.
    due: u64,
    /// Of those, how many have yet to be taken.
    granted: u64,
}

impl RateLimit {
    /// For `part` of the `whole` of a traffic of `rate` frames a second.
    fn new(rate: u64, part: usize, whole: u32) -> Self {
        Self {
            frames: u128::from(rate) * part as u128,
            nanoseconds: u128::from(whole) * 1_000_000_000,
            // What is due in 10 microseconds, and in 10 milliseconds.
            batch: (rate / 100_000).clamp(1, 32),
            arrears: (rate / 100).max(64),
            start: None,
            due: 0,
            granted: 0,
        }
    }

    /// Whether one more frame is due. What is given up is counted.
    #[inline]
    fn grants(&mut self, counters: &PeerCounters) -> bool {
        if self.granted == 0 {
            let now = Instant::now();
            let start = *self.start.get_or_insert(now);
            counters.skipped.add(self.refill(now - start));
        }
        let grants = self.granted != 0;
        self.granted -= u64::from(grants);
        grants
    }

    /// Grants what is due at this time after the start, and returns how many frames of it are given up.
    fn refill(&mut self, elapsed: Duration) -> u64 {
        let due = (elapsed.as_nanos() * self.frames / self.nanoseconds) as u64;
        let more = due - self.due;
        if more < self.batch {
            return 0;
        }
        self.granted = more.min(self.arrears);
        self.due = due;
        more - self.granted
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    const OURS: MacAddr = MacAddr([0x52, 0x54, 0, 1, 2, 3]);

    /// The ones' complement sum, word by word.
    fn sum(parts: &[&[u8]]) -> u16 {
        let words = parts.iter().flat_map(|part| part.chunks(2));
        let mut sum: u32 =
            words.map(|word| u32::from(word[0]) << 8 | word.get(1).map_or(0, |low| u32::from(*low))).sum();
        while sum > 0xffff {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        sum as u16
    }

    fn word(frame: &[u8], at: usize) -> u16 {
        u16::from_be_bytes([frame[at], frame[at + 1]])
    }

    /// Whether it is a right frame of its length; which flow and which number it has.
    fn check(frame: &[u8], protocol: TrafficProtocol) -> ((Ipv4Addr, u16), u32) {
        assert_eq!(frame[..6], OURS.0);
        assert_eq!(word(frame, 12), 0x0800);
        assert_eq!(usize::from(word(frame, 16)), frame.len() - 14);
        assert_eq!(sum(&[&frame[14..34]]), 0xffff, "the IP header's checksum");
        let len = (frame.len() - 34) as u16;
        let number = match protocol {
            TrafficProtocol::Udp => {
                assert_eq!((frame[23], word(frame, 38)), (17, len));
                assert_ne!(word(frame, 40), 0, "0 is no checksum");
                42
            }
            TrafficProtocol::Tcp => {
                assert_eq!(frame[23], 6);
                38
            }
        };
        let pseudo = [&frame[26..34], &[0, frame[23]], &len.to_be_bytes()];
        assert_eq!(sum(&[pseudo[0], pseudo[1], pseudo[2], &frame[34..]]), 0xffff, "the transport's checksum");
        let source = Ipv4Addr::new(frame[26], frame[27], frame[28], frame[29]);
        let number = frame[number..number + 4].try_into().unwrap();
        ((source, word(frame, 34)), u32::from_be_bytes(number))
    }

    #[test]
    fn every_frame_is_right_and_each_flow_counts_its_own() {
        for protocol in [TrafficProtocol::Udp, TrafficProtocol::Tcp] {
            let traffic = Traffic { size: (60, 1500), flows: 3, protocol, ..Traffic::default() };
            let mut peer = open(&traffic, OURS, 1).remove(0);
            let mut next = HashMap::new();
            let mut sizes = Vec::new();
            for at in 0..3000 {
                let frame = peer.receive().unwrap();
                let (flow, number) = check(frame.bytes, protocol);
                let expected = next.entry(flow).or_insert(0);
                assert_eq!(number, *expected, "frame {at}");
                *expected += match protocol {
                    TrafficProtocol::Udp => 1,
                    TrafficProtocol::Tcp => frame.bytes.len() as u32 - 54,
                };
                sizes.push(frame.bytes.len());
            }
            assert_eq!(next.len(), 3);
            sizes.sort_unstable();
            sizes.dedup();
            assert!(
                sizes[0] < 80 && sizes[sizes.len() - 1] > 1480 && sizes.len() > 1000,
                "sizes vary over the whole range"
            );
        }
    }

    #[test]
    fn the_source_is_no_address_that_a_port_gets() {
        let (one, all) = (MacAddr::local(0), MacAddr::local(u32::MAX));
        let ports = one.0.iter().zip(all.0).take_while(|(a, b)| **a == *b).count();
        let mut peer = open(&Traffic::default(), OURS, 1).remove(0);
        let frame = peer.receive().unwrap().bytes;
        assert_ne!(frame[6..6 + ports], one.0[..ports]);
        assert_eq!(frame[6] & 3, 2, "a locally administered station");
    }

    #[test]
    fn checksums_stay_right_through_every_value() {
        let traffic = Traffic { flows: 1, ..Traffic::default() };
        let mut peer = open(&traffic, OURS, 1).remove(0);
        for expected in 0..70_000 {
            let (_, number) = check(peer.receive().unwrap().bytes, TrafficProtocol::Udp);
            assert_eq!(number, expected);
        }
        let counters = peer.counters();
        assert_eq!((counters.rx_frames.get(), counters.rx_bytes.get()), (70_000, 70_000 * 64));
    }

    #[test]
    fn queue_pairs_share_the_flows() {
        let traffic = Traffic { flows: 5, ..Traffic::default() };
        let mut peers = open(&traffic, OURS, 8);
        let mut flows = Vec::new();
        for peer in &mut peers {
            for _ in 0..10 {
                flows.extend(peer.receive().map(|frame| check(frame.bytes, TrafficProtocol::Udp).0));
            }
        }
        assert_eq!(flows.len(), 50, "five pairs have one flow each, the others none");
        flows.sort_unstable();
        flows.dedup();
        assert_eq!(flows.len(), 5);
    }

    #[test]
    fn a_rate_is_kept_by_all_pairs_together() {
        // 3 of 16 flows of a million frames a second, looked at every 40 microseconds.
        let mut limit = RateLimit::new(1_000_000, 3, 16);
        let mut frames = 0;
        for look in 0..=25_000 {
            limit.refill(Duration::from_micros(40) * look);
            frames += std::mem::take(&mut limit.granted);
        }
        assert!((187_490..=187_500).contains(&frames), "{frames} in a second");

        // After a pause it makes up for 10 milliseconds at most.
        let before = limit.due;
        let given_up = limit.refill(Duration::from_secs(60));
        assert_eq!(std::mem::take(&mut limit.granted), 10_000);
        assert_eq!(given_up, 60 * 187_500 - before - 10_000);
        limit.refill(Duration::from_secs(60));
        assert_eq!(limit.granted, 0);
    }
}
