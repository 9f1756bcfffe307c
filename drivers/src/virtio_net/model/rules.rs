//! What the driver has set by features and control commands: which frames it receives, on which queue, with which hash
//! and offloads ("Packet Receive Filtering" and what follows, 5.1.6.5).

use std::sync::atomic::{AtomicU16, Ordering};

use underpass::net::MacAddr;
use underpass::net::headers::{Fragment, Headers, Ip, protocol};
use underpass::net::toeplitz::Toeplitz;

use super::Profile;
use super::spec::net::{hash_report, hash_type};
use super::spec::{Features, net};

/// The hash types that the device computes: not those with the addresses of IPv6 extension headers, which are skipped.
pub(super) const HASH_TYPES: u32 = hash_type::IPV4
    | hash_type::TCPV4
    | hash_type::UDPV4
    | hash_type::IPV6
    | hash_type::TCPV6
    | hash_type::UDPV6;

/// The offloads that the driver can switch while it runs.
pub(super) const GUEST_OFFLOADS: Features = Features(
    Features::GUEST_CSUM.0
        | Features::GUEST_TSO4.0
        | Features::GUEST_TSO6.0
        | Features::GUEST_ECN.0
        | Features::GUEST_USO4.0
        | Features::GUEST_USO6.0,
);

/// A frame's hash, and what it was computed of ([`hash_report`]).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Hash {
    pub(super) value: u32,
    pub(super) report: u16,
}

/// The rules. Engine 0 replaces them as a whole; each engine keeps the ones that it works by.
#[derive(Debug, Clone)]
pub(super) struct Rules {
    pub(super) features: Features,
    /// Of [`GUEST_OFFLOADS`], those that are on.
    pub(super) offloads: Features,
    /// Bytes of the header in front of each frame.
    pub(super) header_len: usize,
    /// The longest frame without segmentation, in bytes.
    pub(super) max_frame: usize,
    /// Queue pairs that transmit.
    pub(super) transmitting: u16,
    pub(super) steering: Steering,
    /// [`hash_type`]s to use.
    pub(super) hash_types: u32,
    pub(super) toeplitz: Toeplitz,
    pub(super) filter: Filter,
}

/// Which frames are received.
#[derive(Debug, Clone, Default)]
#[allow(clippy::struct_excessive_bools, reason = "each is a mode of its own that the driver switches")]
pub(super) struct Filter {
    pub(super) promiscuous: bool,
    pub(super) all_multicast: bool,
    pub(super) all_unicast: bool,
    pub(super) no_multicast: bool,
    pub(super) no_unicast: bool,
    pub(super) no_broadcast: bool,
    pub(super) mac: MacAddr,
    pub(super) unicast: Vec<MacAddr>,
    pub(super) multicast: Vec<MacAddr>,
    /// A bit for each VLAN that is received; `None`: all of them.
    pub(super) vlans: Option<Box<[u64; 64]>>,
}

/// How frames are distributed to receive queues.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Steering {
    /// All to the first.
    First,
    /// To the queue pair that a frame of the same flow was sent on, of so many.
    Flows(u16),
    /// By the hash.
    Table { entries: Box<[u16]>, unclassified: u16 },
}

impl Steering {
    /// Whether it may choose that receive queue.
    #[inline]
    pub(super) fn uses(&self, queue: u16) -> bool {
        match self {
            Self::First => queue == 0,
            Self::Flows(pairs) => queue < *pairs,
            Self::Table { entries, unclassified } => queue == *unclassified || entries.contains(&queue),
        }
    }
}

/// Where a frame goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Way {
    /// The receive queue; `None` if there is none.
    pub(super) queue: Option<u16>,
    pub(super) hash: Option<Hash>,
}

impl Rules {
    /// As they are when these features have been negotiated.
    pub(super) fn new(profile: &Profile, features: Features) -> Self {
        let has = |feature| features.contains(feature);
        let header_len =
            if has(Features::HASH_REPORT) { size_of::<net::HashHeader>() } else { size_of::<net::Header>() };
        Self {
            features,
            offloads: features & GUEST_OFFLOADS,
            header_len,
            max_frame: usize::from(profile.mtu) + underpass::net::FRAME_OVERHEAD,
            transmitting: 1,
            steering: Steering::First,
            hash_types: 0,
            toeplitz: Toeplitz::default(),
            filter: Filter {
                // A driver that can not set filters gets everything.
                promiscuous: !has(Features::CTRL_RX),
                mac: profile.mac,
                vlans: has(Features::CTRL_VLAN).then(|| Box::new([0; 64])),
                ..Filter::default()
            },
        }
    }

    pub(super) fn has(&self, feature: Features) -> bool {
        self.features.contains(feature)
    }

    /// Whether the frame is received at all, and if so where. `receiving` has a bit for each receive queue that is there.
    /// A flow of which nothing is known goes to `usual`, if that is given. `None`: the filters keep it out.
    #[inline]
    pub(super) fn route(
        &self,
        frame: &[u8],
        flows: &Flows,
        receiving: u32,
        usual: Option<u16>,
    ) -> Option<Way> {
        let plain = self.filter.promiscuous && self.hash_types == 0 && self.steering == Steering::First;
        if plain {
            return Some(Way { queue: (receiving & 1 != 0).then_some(0), hash: None });
        }
        let headers = Headers::parse(frame);
        if !self.filter.accepts(frame, &headers) {
            return None;
        }
        let hash = self.hash(frame, &headers);
        let is_there = |queue: &u16| receiving & 1 << *queue != 0;
        let queue = match &self.steering {
            Steering::First => Some(0).filter(is_there),
            Steering::Flows(pairs) => {
                // "The device SHOULD re-select another random queue."
                let wanted = flows.queue(frame, &headers, *pairs, usual);
                (0..*pairs).map(|n| (wanted + n) % *pairs).find(is_there)
            }
            Steering::Table { entries, unclassified } => {
                let entry = hash.map(|hash| entries[hash.value as usize & (entries.len() - 1)]);
                Some(entry.unwrap_or(*unclassified)).filter(is_there)
            }
        };
        Some(Way { queue, hash: hash.filter(|_| self.has(Features::HASH_REPORT)) })
    }

    /// "Hash calculation for incoming packets", 5.1.6.4.3. A fragment has no ports.
    fn hash(&self, frame: &[u8], headers: &Headers) -> Option<Hash> {
        let (tcp, udp, ip) = match headers.ip? {
            Ip::V4 => (
                (hash_type::TCPV4, hash_report::TCPV4),
                (hash_type::UDPV4, hash_report::UDPV4),
                (hash_type::IPV4, hash_report::IPV4),
            ),
            Ip::V6 => (
                (hash_type::TCPV6, hash_report::TCPV6),
                (hash_type::UDPV6, hash_report::UDPV6),
                (hash_type::IPV6, hash_report::IPV6),
            ),
        };
        let transport = match headers.protocol {
            protocol::TCP => Some(tcp),
            protocol::UDP => Some(udp),
            _ => None,
        };
        let ports = headers.ports(frame).filter(|_| headers.fragment == Fragment::Whole);
        let wanted = |(bit, _): &(u32, u16)| self.hash_types & bit != 0;
        let addresses = headers.addresses(frame)?;
        let (ports, (_, report)) = match transport.filter(wanted).and_then(|kind| Some((ports?, kind))) {
            Some((ports, kind)) => (Some(ports), kind),
            None => (None, Some(ip).filter(wanted)?),
        };
        Some(Hash { value: self.toeplitz.hash(addresses, ports), report })
    }
}

impl Filter {
    fn accepts(&self, frame: &[u8], headers: &Headers) -> bool {
        let Some(destination) = frame.first_chunk() else { return false };
        if self.promiscuous {
            return true;
        }
        if let (Some(vlans), Some(tag)) = (&self.vlans, headers.vlan) {
            let id = usize::from(tag & 0xfff);
            if vlans[id / 64] & 1 << (id % 64) == 0 {
                return false;
            }
        }
        let destination = MacAddr(*destination);
        if destination.is_broadcast() {
            !self.no_broadcast
        } else if destination.is_multicast() {
            !self.no_multicast && (self.all_multicast || self.multicast.contains(&destination))
        } else {
            !self.no_unicast
                && (self.all_unicast || destination == self.mac || self.unicast.contains(&destination))
        }
    }
}

/// Flows that are told apart.
const FLOWS: usize = 4096;

/// Which queue pair each flow was sent on last ("Automatic receive steering in multiqueue mode").
#[derive(Debug)]
pub(super) struct Flows(Box<[AtomicU16]>);

impl Flows {
    /// The driver sent nothing of that flow yet.
    const UNKNOWN: u16 = u16::MAX;

    pub(super) fn new() -> Self {
        Self((0..FLOWS).map(|_| AtomicU16::new(Self::UNKNOWN)).collect())
    }

    pub(super) fn clear(&self) {
        self.0.iter().for_each(|queue| queue.store(Self::UNKNOWN, Ordering::Relaxed));
    }

    /// The driver sent this frame on transmit queue `pair`.
    #[inline]
    pub(super) fn learn(&self, frame: &[u8], pair: u16) {
        let place = &self.0[flow(frame, &Headers::parse(frame))];
        if place.load(Ordering::Relaxed) != pair {
            place.store(pair, Ordering::Relaxed);
        }
    }

    fn queue(&self, frame: &[u8], headers: &Headers, pairs: u16, usual: Option<u16>) -> u16 {
        let flow = flow(frame, headers);
        let queue = self.0[flow].load(Ordering::Relaxed);
        if queue < pairs { queue } else { usual.unwrap_or(flow as u16) % pairs }
    }
}

/// The frame's flow: the same for both directions.
fn flow(frame: &[u8], headers: &Headers) -> usize {
    let sum = |bytes: &[u8]| {
        let (words, rest) = bytes.as_chunks::<4>();
        let words = words.iter().fold(0_u32, |sum, word| sum.wrapping_add(u32::from_ne_bytes(*word)));
        rest.iter().fold(words, |sum, byte| sum.wrapping_add((*byte).into()))
    };
    // Sums do not care which end is the source. Ports lie in one word, so they are added one by one.
    let addresses = headers.addresses(frame).unwrap_or_else(|| frame.get(..12).unwrap_or_default());
    let ports = headers.ports(frame).filter(|_| headers.fragment == Fragment::Whole);
    let ports = ports.map_or(0, |[a, b, c, d]| {
        u32::from(u16::from_be_bytes([*a, *b])) + u32::from(u16::from_be_bytes([*c, *d]))
    });
    let half = addresses.len() / 2;
    let (source, destination) = addresses.split_at(half);
    let mixed = (sum(source) ^ sum(destination)).wrapping_add(ports << 3).wrapping_mul(0x9e37_79b9);
    (mixed >> (u32::BITS - FLOWS.ilog2())) as usize
}
