//! The virtio-net model's control queue, filters, steering and offloads, against references of the test's own.

mod raw_virtio;

use std::collections::BTreeSet;

use raw_virtio::*;
use underpass_drivers::virtio_net::model::peer::{Frame, Offload, Segment, SegmentKind};
use underpass_drivers::virtio_net::model::{Count, Profile};

const OK: u8 = 0;
const ERR: u8 = 1;

const ALL_CONTROL: u64 = CTRL_VQ
    | CTRL_RX
    | CTRL_RX_EXTRA
    | CTRL_VLAN
    | CTRL_MAC_ADDR
    | GUEST_ANNOUNCE
    | MQ
    | RSS
    | HASH_REPORT
    | CTRL_GUEST_OFFLOADS
    | GUEST_CSUM
    | GUEST_TSO4
    | MAC
    | STATUS;

// References

fn sum(bytes: &[u8]) -> u32 {
    bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0))).sum()
}

fn folded(mut sum: u32) -> u16 {
    while sum > 0xffff {
        sum = (sum >> 16) + (sum & 0xffff);
    }
    sum as u16
}

/// The hash, a bit at a time.
fn toeplitz(key: &[u8], input: &[u8]) -> u32 {
    let bit = |bytes: &[u8], n: usize| bytes[n / 8] >> (7 - n % 8) & 1;
    (0..8 * input.len())
        .filter(|n| bit(input, *n) == 1)
        .fold(0, |hash, n| hash ^ (n..n + 32).fold(0, |window, at| window << 1 | u32::from(bit(key, at))))
}

/// An IP packet in an Ethernet frame: addresses of 4 or 16 bytes.
#[derive(Clone)]
struct Packet {
    source: Vec<u8>,
    destination: Vec<u8>,
    ports: (u16, u16),
    tcp: bool,
    payload: Vec<u8>,
}

impl Packet {
    fn v4(source: [u8; 4], destination: [u8; 4], ports: (u16, u16), tcp: bool) -> Self {
        let payload = b"payload".to_vec();
        Self { source: source.into(), destination: destination.into(), ports, tcp, payload }
    }

    fn v6(last: u8, ports: (u16, u16), tcp: bool) -> Self {
        let mut source = vec![0x20; 16];
        source[15] = last;
        Self { source, destination: vec![0x30; 16], ports, tcp, payload: b"six".to_vec() }
    }

    fn reply(&self) -> Self {
        let (source, destination) = (self.destination.clone(), self.source.clone());
        Self { source, destination, ports: (self.ports.1, self.ports.0), ..self.clone() }
    }

    fn input(&self, ports: bool) -> Vec<u8> {
        let mut input = [&self.source[..], &self.destination[..]].concat();
        if ports {
            input.extend(self.ports.0.to_be_bytes());
            input.extend(self.ports.1.to_be_bytes());
        }
        input
    }

    fn l3_len(&self) -> usize {
        if self.source.len() == 4 { 20 } else { 40 }
    }

    fn headers_len(&self) -> usize {
        14 + self.l3_len() + if self.tcp { 20 } else { 8 }
    }

    /// The frame. The transport checksum is complete, or just the pseudo header's sum.
    fn frame(&self, complete: bool) -> Vec<u8> {
        let v4 = self.source.len() == 4;
        let l4_len = self.headers_len() - 14 - self.l3_len() + self.payload.len();
        let protocol = if self.tcp { 6 } else { 17 };
        let mut bytes = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2];
        bytes.extend(if v4 { [0x08, 0x00] } else { [0x86, 0xdd] });
        if v4 {
            let mut ip = vec![0x45, 0];
            ip.extend((20 + l4_len as u16).to_be_bytes());
            ip.extend([0x12, 0x34, 0x40, 0, 64, protocol, 0, 0]);
            ip.extend(self.input(false));
            let checksum = !folded(sum(&ip));
            ip[10..12].copy_from_slice(&checksum.to_be_bytes());
            bytes.extend(ip);
        } else {
            bytes.extend([0x60, 0, 0, 0]);
            bytes.extend((l4_len as u16).to_be_bytes());
            bytes.extend([protocol, 64]);
            bytes.extend(self.input(false));
        }
        let start = bytes.len();
        bytes.extend(self.ports.0.to_be_bytes());
        bytes.extend(self.ports.1.to_be_bytes());
        if self.tcp {
            // Sequence 1000, acknowledged 1; ACK, PSH and FIN.
            bytes.extend([0, 0, 3, 232, 0, 0, 0, 1, 0x50, 0x19, 1, 0, 0, 0, 0, 0]);
        } else {
            bytes.extend((l4_len as u16).to_be_bytes());
            bytes.extend([0, 0]);
        }
        bytes.extend(&self.payload);
        let field = start + if self.tcp { 16 } else { 6 };
        let pseudo = sum(&self.input(false)) + l4_len as u32 + u32::from(protocol);
        let value = if complete { !folded(pseudo + sum(&bytes[start..])) } else { folded(pseudo) };
        bytes[field..field + 2].copy_from_slice(&value.to_be_bytes());
        bytes
    }
}

/// A header for a frame to send: checksum left out, and segments of `size` if that is not 0.
fn offload(packet: &Packet, size: u16) -> Vec<u8> {
    let v4 = packet.source.len() == 4;
    let gso = match (size, packet.tcp, v4) {
        (0, ..) => 0,
        (_, true, true) => 1,
        (_, true, false) => 4,
        (_, false, _) => 5,
    };
    let mut header = vec![1, gso];
    for value in
        [packet.headers_len() as u16, size, 14 + packet.l3_len() as u16, if packet.tcp { 16 } else { 6 }]
    {
        header.extend(value.to_le_bytes());
    }
    header
}

/// A device with `pairs` queue pairs whose peers the test holds, buffers posted on all of them.
fn device(features: u64, pairs: u16) -> (Rig, Vec<Hand>, Vec<(Queue, Queue)>, Queue) {
    let (hands, peers) = Hand::peers(pairs.into());
    let mut rig = Rig::with_peers(Profile { queue_pairs: pairs, ..Profile::default() }, peers);
    let (mut queues, control) = rig.start(features, pairs, 64);
    for (rx, _) in &mut queues {
        for _ in 0..64 {
            rig.post(rx, &[2048], false);
        }
    }
    (rig, hands, queues, control.expect("the tests here negotiate it"))
}

// Commands

fn rss(types: u32, table: &[u16], unclassified: u16, transmit: u16, key: &[u8]) -> Vec<u8> {
    let mut data = types.to_le_bytes().to_vec();
    data.extend((table.len() as u16).wrapping_sub(1).to_le_bytes());
    data.extend(unclassified.to_le_bytes());
    data.extend(table.iter().flat_map(|queue| queue.to_le_bytes()));
    data.extend(transmit.to_le_bytes());
    data.push(key.len() as u8);
    data.extend(key);
    data
}

#[test]
fn commands_are_done_if_they_are_whole_and_negotiated() {
    let (mut rig, _, _, mut control) = device(ALL_CONTROL, 4);
    let key = [7; 40];
    let table =
        |addresses: &[[u8; 6]]| [&(addresses.len() as u32).to_le_bytes()[..], &addresses.concat()].concat();
    let (unicast, multicast) = ([2, 0, 0, 0, 0, 9], [1, 0, 0x5e, 0, 0, 1]);
    let hash = |types: u32, reserved: u8, key: &[u8]| {
        [&types.to_le_bytes()[..], &[reserved, 0, 0, 0, 0, 0, 0, 0, key.len() as u8], key].concat()
    };
    let cases = [
        (0, 0, vec![1], OK),
        (0, 0, vec![2], ERR),
        (0, 0, vec![], ERR),
        (0, 0, vec![1, 0], ERR),
        (0, 1, vec![0], OK),
        (0, 5, vec![1], OK),
        (0, 6, vec![1], ERR),
        (1, 0, [table(&[]), table(&[])].concat(), OK),
        (1, 0, [table(&[unicast; 300]), table(&[multicast; 5])].concat(), OK),
        (1, 0, [table(&[multicast]), table(&[])].concat(), ERR),
        (1, 0, [table(&[]), table(&[unicast])].concat(), ERR),
        (1, 0, table(&[unicast]), ERR),
        (1, 0, [table(&[]), table(&[]), vec![0]].concat(), ERR),
        (1, 0, [vec![0xff; 4], table(&[unicast])].concat(), ERR),
        (1, 1, unicast.to_vec(), OK),
        (1, 1, multicast.to_vec(), ERR),
        (1, 1, unicast[..5].to_vec(), ERR),
        (2, 0, vec![5, 0], OK),
        (2, 0, vec![0xff, 0x0f], OK),
        (2, 0, vec![0, 0x10], ERR),
        (2, 1, vec![5, 0], OK),
        (2, 1, vec![5], ERR),
        (3, 0, vec![], OK),
        (3, 0, vec![0], ERR),
        (4, 0, vec![4, 0], OK),
        (4, 0, vec![0, 0], ERR),
        (4, 0, vec![5, 0], ERR),
        (4, 0, vec![1, 0, 0], ERR),
        (4, 1, rss(0x3f, &[0, 1, 2, 3], 0, 4, &key), OK),
        (4, 1, rss(0, &[0], 3, 1, &[]), OK),
        (4, 1, rss(0x3f, &[0; 128], 0, 4, &key), OK),
        (4, 1, rss(0x3f, &[0; 256], 0, 4, &key), ERR),
        (4, 1, rss(0x3f, &[0; 3], 0, 4, &key), ERR),
        (4, 1, rss(0x40, &[0; 4], 0, 4, &key), ERR),
        (4, 1, rss(0x3f, &[4; 4], 0, 4, &key), ERR),
        (4, 1, rss(0x3f, &[0x8000; 4], 0, 4, &key), ERR),
        (4, 1, rss(0x3f, &[0; 4], 4, 4, &key), ERR),
        (4, 1, rss(0x3f, &[0; 4], 0, 0, &key), ERR),
        (4, 1, rss(0x3f, &[0; 4], 0, 5, &key), ERR),
        (4, 1, rss(0x3f, &[0; 4], 0, 4, &[7; 41]), ERR),
        (4, 1, rss(0x3f, &[0; 4], 0, 4, &key)[..50].to_vec(), ERR),
        (4, 1, vec![0; 7], ERR),
        (4, 2, hash(0x3f, 0, &key), OK),
        (4, 2, hash(0x3f, 1, &key), ERR),
        (4, 2, hash(0x200, 0, &key), ERR),
        (4, 3, vec![], ERR),
        (5, 0, 0x2_u64.to_le_bytes().to_vec(), OK),
        (5, 0, 0x82_u64.to_le_bytes().to_vec(), OK),
        (5, 0, 0_u64.to_le_bytes().to_vec(), OK),
        (5, 0, 0x80_u64.to_le_bytes().to_vec(), ERR),
        (5, 0, 0x102_u64.to_le_bytes().to_vec(), ERR),
        (5, 0, vec![2; 7], ERR),
        (6, 0, vec![], ERR),
        (255, 255, vec![0; 60_000], ERR),
        (1, 0, vec![0; 70_000], ERR),
    ];
    for (n, (class, command, data, answer)) in cases.into_iter().enumerate() {
        assert_eq!(rig.command(&mut control, class, command, &data), answer, "case {n}: {class} {command}");
    }
    assert!(rig.control.violation().is_none());
    // Without the features nothing of it is known.
    let (mut rig, _, _, mut control) = device(CTRL_VQ, 1);
    let commands = [
        (0, 0, 1),
        (0, 2, 1),
        (1, 0, 8),
        (1, 1, 6),
        (2, 0, 2),
        (3, 0, 0),
        (4, 0, 2),
        (4, 2, 13),
        (5, 0, 8),
        (8, 0, 0),
        (8, 1, 16),
    ];
    for (class, command, len) in commands {
        assert_eq!(rig.command(&mut control, class, command, &vec![0; len]), ERR, "{class} {command}");
    }
}

/// A request for statistics: queue, reserved bits, types.
fn stats(queue: u16, reserved: u16, types: u64) -> Vec<u8> {
    let words = [queue, reserved, 0, 0].map(u16::to_le_bytes).concat();
    [words, types.to_le_bytes().to_vec()].concat()
}

#[test]
fn statistics_tell_what_became_of_the_frames() {
    const RX: u64 = 1;
    const TX: u64 = 1 << 16;
    let (mut rig, hands, mut queues, mut control) = device(ALL_CONTROL | DEVICE_STATS, 2);
    let (answer, types) = rig.ask(&mut control, 8, 0, &[], 8);
    assert_eq!((answer, types), (OK, (RX | TX).to_le_bytes().to_vec()));

    // Three good ones, two over the MTU, and one for somebody else, which is no drop.
    for len in [100, 1518, 1519, 60, 9000] {
        hands[0].give(&frame(0, len));
    }
    let mut other = frame(0, 100);
    other[5] = 77;
    hands[0].give(&other);
    rig.step_all();
    assert_eq!(rig.received(&mut queues[0].0).len(), 3);
    // Two good ones, a runt, an over-long one.
    for len in [14, 1000, 13, 1519] {
        rig.send(&mut queues[0].1, &[], &frame(0, len), &[], false);
    }
    rig.notify(1);
    rig.step_all();
    assert_eq!(hands[0].sent().len(), 2);

    let (answer, result) =
        rig.ask(&mut control, 8, 1, &[stats(0, 0, RX), stats(3, 0, TX), stats(1, 0, TX)].concat(), 500);
    assert_eq!((answer, result.len()), (OK, 3 * 56));
    let reply = |n: usize| {
        let reply = &result[56 * n..][..56];
        let word = |at: usize| u16::from_le_bytes([reply[at], reply[at + 1]]);
        let counters: Vec<_> =
            reply[8..].as_chunks::<8>().0.iter().map(|bytes| u64::from_le_bytes(*bytes)).collect();
        assert_eq!((reply[1], word(4), word(6)), (0, 0, 56));
        ((reply[0], word(2)), [0, 1, 2, 4, 5].map(|n| counters[n]))
    };
    // Notifications, packets, bytes, drops, and those of them that are told apart.
    assert_eq!(reply(0), ((0, 0), [0, 3, 1678, 2, 0]));
    assert_eq!(reply(1), ((16, 3), [0; 5]));
    assert_eq!(reply(2), ((16, 1), [1, 2, 1014, 2, 1]));

    // As much as there is room for.
    for room in [0, 8, 55, 56] {
        let (answer, part) = rig.ask(&mut control, 8, 1, &stats(0, 0, RX), room);
        assert_eq!((answer, &part[..]), (OK, &result[..room]));
    }
    for (n, wrong) in [
        vec![],
        stats(0, 0, RX)[..15].to_vec(),
        stats(0, 1, RX),
        stats(0, 0, TX),
        stats(1, 0, RX),
        stats(0, 0, RX | 2),
        stats(4, 0, 1 << 32),
        stats(5, 0, RX),
        stats(0xffff, 0, 0),
        [stats(0, 0, RX), stats(1, 0, RX)].concat(),
    ]
    .into_iter()
    .enumerate()
    {
        assert_eq!(rig.ask(&mut control, 8, 1, &wrong, 200), (ERR, vec![]), "case {n}");
    }
    assert_eq!(rig.ask(&mut control, 8, 0, &[0], 8), (ERR, vec![]));
    assert_eq!(rig.ask(&mut control, 8, 2, &[], 8), (ERR, vec![]));
    assert!(rig.control.violation().is_none());
}

#[test]
fn setting_the_address_changes_the_configuration_and_a_reset_brings_it_back() {
    let (mut rig, _, _, mut control) = device(ALL_CONTROL, 1);
    let mac = |rig: &Rig| (0..6).map(|at| rig.config.read8(at)).collect::<Vec<_>>();
    let before = mac(&rig);
    assert_eq!(rig.command(&mut control, 1, 1, &[2, 9, 8, 7, 6, 5]), OK);
    assert_eq!(mac(&rig), [2, 9, 8, 7, 6, 5]);
    rig.reset();
    assert_eq!(mac(&rig), before);
}

// Filters

const OWN: [u8; 6] = [2, 0, 0, 0, 0, 1];
const OTHER: [u8; 6] = [2, 0, 0, 0, 0, 7];
const BROADCAST: [u8; 6] = [0xff; 6];
const MULTICAST: [u8; 6] = [1, 0, 0x5e, 1, 2, 3];
const GROUP: [u8; 6] = [1, 0, 0x5e, 9, 9, 9];
const ALL: [[u8; 6]; 5] = [OWN, OTHER, BROADCAST, MULTICAST, GROUP];

/// Class, command and data; what passes then.
type Step = (u8, u8, Vec<u8>, &'static [[u8; 6]]);

#[test]
fn filters_let_through_what_they_are_set_to() {
    let (mut rig, hands, mut queues, mut control) = device(ALL_CONTROL & !CTRL_VLAN, 1);
    let mut pass = |rig: &mut Rig| {
        for to in ALL {
            hands[0].give(&[&to[..], &frame(1, 60)[6..]].concat());
        }
        rig.step_all();
        let rx = &mut queues[0].0;
        let received = rig.received(rx);
        for _ in &received {
            rig.post(rx, &[2048], false);
        }
        received.into_iter().map(|frame| frame.bytes[..6].try_into().unwrap()).collect::<Vec<[u8; 6]>>()
    };
    assert_eq!(pass(&mut rig), [OWN, BROADCAST], "as it starts");
    let steps: [Step; 12] = [
        (0, 1, vec![1], &[OWN, BROADCAST, MULTICAST, GROUP]),
        (0, 3, vec![1], &[OWN, BROADCAST]),
        (0, 0, vec![1], &ALL),
        (0, 0, vec![0], &[OWN, BROADCAST]),
        (0, 3, vec![0], &[OWN, BROADCAST, MULTICAST, GROUP]),
        (0, 5, vec![1], &[OWN, MULTICAST, GROUP]),
        (0, 1, vec![0], &[OWN]),
        (0, 2, vec![1], &[OWN, OTHER]),
        (0, 4, vec![1], &[]),
        (0, 2, vec![0], &[]),
        (0, 4, vec![0], &[OWN]),
        (1, 1, OTHER.to_vec(), &[OTHER]),
    ];
    for (class, command, data, expected) in steps {
        assert_eq!(rig.command(&mut control, class, command, &data), OK);
        assert_eq!(pass(&mut rig), expected, "after {command} {data:?}");
    }
    let table = [&1_u32.to_le_bytes()[..], &OWN, &1_u32.to_le_bytes(), &GROUP].concat();
    assert_eq!(rig.command(&mut control, 1, 0, &table), OK);
    assert_eq!(pass(&mut rig), [OWN, OTHER, GROUP]);
    assert!(rig.control.count(Count::RxFiltered) > 20);
}

#[test]
fn vlans_are_kept_out_until_they_are_added() {
    let (mut rig, hands, mut queues, mut control) = device(ALL_CONTROL, 1);
    let tagged = |id: u16| {
        let plain = frame(3, 60);
        [&plain[..12], &[0x81, 0], &(0x6000 | id).to_be_bytes(), &plain[12..]].concat()
    };
    let mut pass = |rig: &mut Rig| {
        for bytes in [frame(3, 60), tagged(5), tagged(4095)] {
            hands[0].give(&bytes);
        }
        rig.step_all();
        rig.received(&mut queues[0].0).iter().map(|frame| frame.bytes.len()).collect::<Vec<_>>()
    };
    assert_eq!(pass(&mut rig), [60]);
    rig.command(&mut control, 2, 0, &[5, 0]);
    assert_eq!(pass(&mut rig), [60, 64]);
    rig.command(&mut control, 2, 0, &[0xff, 0x0f]);
    assert_eq!(pass(&mut rig), [60, 64, 64]);
    rig.command(&mut control, 2, 1, &[5, 0]);
    assert_eq!(pass(&mut rig), [60, 64]);
}

// Steering

/// The key of Microsoft's verification suite.
const KEY: [u8; 40] = [
    0x6d, 0x5a, 0x56, 0xda, 0x25, 0x5b, 0x0e, 0xc2, 0x41, 0x67, 0x25, 0x3d, 0x43, 0xa3, 0x8f, 0xb0, 0xd0,
    0xca, 0x2b, 0xcb, 0xae, 0x7b, 0x30, 0xb4, 0x77, 0xcb, 0x2d, 0xa3, 0x80, 0x30, 0xf2, 0x0c, 0x6a, 0x42,
    0xb7, 0x3b, 0xbe, 0xac, 0x01, 0xfa,
];

#[test]
fn hashes_choose_the_queue_and_are_reported() {
    let known = Packet::v4([66, 9, 149, 187], [161, 142, 100, 80], (2794, 1766), true);
    assert_eq!(toeplitz(&KEY, &known.input(true)), 0x51cc_c178, "the reference itself");
    assert_eq!(toeplitz(&KEY, &known.input(false)), 0x323e_8fc2);
    let (mut rig, hands, mut queues, mut control) = device(ALL_CONTROL, 4);
    let table: Vec<u16> = (0..16).map(|n| [0, 1, 3, 1][n % 4]).collect();
    let mut seen = BTreeSet::new();
    for types in [0x3f, 0x09, 0x02, 0x24, 0] {
        assert_eq!(rig.command(&mut control, 4, 1, &rss(types, &table, 2, 4, &KEY)), OK);
        for n in 0..24_u16 {
            let (ports, tcp) = ((1000 + n, 80), n % 2 == 0);
            let v6 = n % 3 == 0;
            let packet = match n {
                1 => known.clone(),
                _ if v6 => Packet::v6(n as u8, ports, tcp),
                _ => Packet::v4([10, 0, 0, n as u8], [10, 0, 1, 1], ports, tcp),
            };
            let base = if v6 { 3 } else { 0 };
            let wanted = |offset: u32| types >> (base + offset) & 1 == 1;
            let transport = if packet.tcp { 1 } else { 2 };
            let hash = if wanted(transport) {
                Some((toeplitz(&KEY, &packet.input(true)), base + transport + 1))
            } else {
                wanted(0).then(|| (toeplitz(&KEY, &packet.input(false)), base + 1))
            };
            // Through any peer.
            hands[usize::from(n % 4)].give(&packet.frame(true));
            rig.step_all();
            let queue = hash.map_or(2, |(hash, _)| table[hash as usize % 16]);
            let expected = hash.map_or((0, 0), |(hash, kind)| (hash, kind as u16));
            let rx = &mut queues[usize::from(queue)].0;
            let received = rig.received(rx);
            assert_eq!(received.len(), 1, "types {types:#x}, packet {n} on queue {queue}");
            assert_eq!((&received[0].bytes, received[0].hash()), (&packet.frame(true), expected));
            rig.post(rx, &[2048], false);
            seen.insert(queue);
        }
    }
    assert_eq!(seen.len(), 4, "all queues were used");
    // What has no hash: ARP, and a later fragment of TCP by its addresses.
    rig.command(&mut control, 4, 1, &rss(0x3f, &table, 2, 4, &KEY));
    hands[0].give(&frame(1, 60));
    let mut fragment = known.frame(true);
    fragment[21] = 5;
    hands[0].give(&fragment);
    rig.step_all();
    assert_eq!(rig.received(&mut queues[2].0)[0].hash(), (0, 0));
    let queue = table[0x323e_8fc2 % 16];
    assert_eq!(rig.received(&mut queues[usize::from(queue)].0)[0].hash(), (0x323e_8fc2, 1));
}

#[test]
fn a_flow_comes_back_on_the_queue_that_it_was_sent_on() {
    let (mut rig, hands, mut queues, mut control) = device(CTRL_VQ | MQ, 4);
    let flow = |n: u8| match n % 2 {
        0 => Packet::v4([10, 0, 0, n], [10, 9, 9, 9], (1000 + u16::from(n), 53), n.is_multiple_of(4)),
        _ => Packet::v6(n, (7, 9), true),
    };
    // Before multiqueue is on, everything comes on the first.
    for n in 0..8 {
        hands[usize::from(n % 4)].give(&flow(n).frame(true));
    }
    rig.step_all();
    assert_eq!(rig.received(&mut queues[0].0).len(), 8);
    assert_eq!(rig.command(&mut control, 4, 0, &[4, 0]), OK);
    for n in 0..32_u8 {
        let pair = usize::from(n % 4);
        rig.send(&mut queues[pair].1, &[], &flow(n).frame(true), &[], false);
    }
    rig.step_all();
    for n in 0..32 {
        // The answers come through any peer.
        hands[usize::from(n / 8 % 4)].give(&flow(n).reply().frame(true));
    }
    rig.step_all();
    for pair in 0..4_u8 {
        let mut received: Vec<_> =
            rig.received(&mut queues[usize::from(pair)].0).into_iter().map(|frame| frame.bytes).collect();
        let mut expected: Vec<_> =
            (0..32).filter(|n| n % 4 == pair).map(|n| flow(n).reply().frame(true)).collect();
        received.sort();
        expected.sort();
        assert_eq!(received, expected, "queue {pair}");
    }
    // One queue again: all that the others had in the way is delivered or counted, and nothing goes to them.
    assert_eq!(rig.command(&mut control, 4, 0, &[1, 0]), OK);
    for n in 0..8 {
        hands[usize::from(n % 4)].give(&flow(n).reply().frame(true));
    }
    rig.step_all();
    assert_eq!(rig.received(&mut queues[0].0).len(), 8);
    assert!(queues[1..].iter_mut().all(|(rx, _)| rig.received(rx).is_empty()));
}

#[test]
fn a_frame_for_another_queue_waits_there_and_goes_elsewhere_when_that_is_reset() {
    let (hands, peers) = Hand::peers(2);
    let mut rig = Rig::with_peers(pairs(2), peers);
    let (mut queues, control) = rig.start(CTRL_VQ | MQ | RING_RESET, 2, 64);
    let mut control = control.unwrap();
    assert_eq!(rig.command(&mut control, 4, 0, &[2, 0]), OK);
    let flow = Packet::v4([10, 0, 0, 1], [10, 0, 0, 2], (5, 6), false);
    rig.send(&mut queues[1].1, &[], &flow.frame(true), &[], false);
    rig.post(&mut queues[0].0, &[2048], false);
    rig.step_all();
    // Through the first pair's peer, for the second queue, which has no buffers: none is lost, however many.
    for _ in 0..400 {
        hands[0].give(&flow.frame(true));
    }
    rig.step_all();
    for _ in 0..8 {
        for _ in 0..50 {
            rig.post(&mut queues[1].0, &[2048], false);
        }
        rig.step_all();
        assert_eq!(rig.received(&mut queues[1].0).len(), 50);
    }
    rig.common.write16(22, 2);
    rig.common.write16(58, 1);
    hands[0].give(&flow.frame(true));
    rig.step_all();
    assert_eq!(rig.received(&mut queues[0].0).len(), 1);
    assert_eq!(rig.command(&mut control, 4, 0, &[2, 0]), ERR, "one of the two is not there");
}

// Offloads

#[test]
fn checksums_are_completed_for_peers_and_drivers_that_do_not_know_them() {
    let packets = [
        Packet::v4([10, 0, 0, 1], [10, 0, 0, 2], (5, 6), true),
        Packet::v4([10, 0, 0, 1], [10, 0, 0, 2], (5, 6), false),
        Packet::v6(4, (5, 6), true),
        Packet::v6(4, (5, 6), false),
    ];
    for (features, carries) in [(CSUM, false), (CSUM, true), (CSUM | GUEST_CSUM, true)] {
        let (hands, peers) = Hand::peers(1);
        hands[0].0.lock().unwrap().carries = carries;
        let mut rig = Rig::with_peers(pairs(1), peers);
        let (mut queues, _) = rig.start(features, 1, 64);
        let (rx, tx) = &mut queues[0];
        for packet in &packets {
            rig.post(rx, &[2048], false);
            rig.send(tx, &offload(packet, 0), &packet.frame(false), &[], false);
        }
        rig.step_all();
        let mut held = hands[0].0.lock().unwrap();
        let sent = std::mem::take(&mut held.sent);
        assert_eq!(sent.len(), 4);
        for (packet, (bytes, offload)) in packets.iter().zip(&sent) {
            assert_eq!(bytes, &packet.frame(!carries));
            assert_eq!(offload.checksum.is_some(), carries);
        }
        held.to_receive.extend(sent);
        drop(held);
        rig.step_all();
        let received = rig.received(rx);
        for (packet, received) in packets.iter().zip(&received) {
            let guest = features & GUEST_CSUM != 0;
            assert_eq!(received.bytes, packet.frame(!guest));
            let start = 14 + packet.l3_len() as u16;
            let expected = if guest { (1, start, if packet.tcp { 16 } else { 6 }) } else { (0, 0, 0) };
            assert_eq!((received.header[0], received.u16(6), received.u16(8)), expected);
        }
        assert_eq!(received.len(), 4);
    }
}

#[test]
fn only_checksums_that_are_right_are_called_valid() {
    let (mut rig, hands, mut queues, mut control) = device(CTRL_VQ | CTRL_GUEST_OFFLOADS | GUEST_CSUM, 1);
    let good = Packet::v4([10, 0, 0, 1], [10, 0, 0, 2], (5, 6), false).frame(true);
    let mut bad = good.clone();
    *bad.last_mut().unwrap() ^= 1;
    for bytes in [&good, &bad, &frame(1, 60)] {
        hands[0].give(bytes);
    }
    rig.step_all();
    let flags: Vec<_> = rig.received(&mut queues[0].0).iter().map(|frame| frame.header[0]).collect();
    assert_eq!(flags, [2, 0, 0]);
    rig.command(&mut control, 5, 0, &[0; 8]);
    hands[0].give(&good);
    rig.step_all();
    assert_eq!(rig.received(&mut queues[0].0)[0].header[0], 0, "the offload is off");
}

/// What `packet` should be cut into.
fn segments(packet: &Packet, size: usize) -> Vec<Vec<u8>> {
    let count = packet.payload.chunks(size).count();
    let cut = |(n, payload): (usize, &[u8])| {
        let part = Packet { payload: payload.to_vec(), ..packet.clone() };
        let mut frame = part.frame(true);
        let l3 = 14;
        let l4 = l3 + packet.l3_len();
        if packet.source.len() == 4 {
            let id = 0x1234 + n as u16;
            frame[l3 + 4..l3 + 6].copy_from_slice(&id.to_be_bytes());
            frame[l3 + 10..l3 + 12].fill(0);
            let checksum = !folded(sum(&frame[l3..l4]));
            frame[l3 + 10..l3 + 12].copy_from_slice(&checksum.to_be_bytes());
        }
        if packet.tcp {
            let sequence = 1000 + (n * size) as u32;
            frame[l4 + 4..l4 + 8].copy_from_slice(&sequence.to_be_bytes());
            frame[l4 + 13] = if n + 1 == count { 0x19 } else { 0x10 };
            frame[l4 + 16..l4 + 18].fill(0);
            let pseudo = sum(&part.input(false)) + (frame.len() - l4) as u32 + 6;
            let checksum = !folded(pseudo + sum(&frame[l4..]));
            frame[l4 + 16..l4 + 18].copy_from_slice(&checksum.to_be_bytes());
        }
        frame
    };
    packet.payload.chunks(size).enumerate().map(cut).collect()
}

#[test]
fn large_frames_are_cut_for_peers_and_drivers_that_do_not_take_them() {
    let payload: Vec<u8> = (0..6000_u32).map(|n| (n * 31) as u8).collect();
    let packets = [
        Packet { payload: payload.clone(), ..Packet::v4([10, 0, 0, 1], [10, 0, 0, 2], (5, 6), true) },
        Packet { payload: payload.clone(), ..Packet::v4([10, 0, 0, 1], [10, 0, 0, 2], (5, 6), false) },
        Packet { payload: payload.clone(), ..Packet::v6(4, (5, 6), true) },
        Packet { payload, ..Packet::v6(4, (5, 6), false) },
    ];
    let host = CSUM | HOST_TSO4 | HOST_TSO6 | HOST_USO | GUEST_HDRLEN;
    let guest = GUEST_CSUM | GUEST_TSO4 | MRG_RXBUF;
    for (features, carries) in [(host, false), (host | guest, true), (host | MRG_RXBUF | CTRL_VQ, true)] {
        let (hands, peers) = Hand::peers(1);
        hands[0].0.lock().unwrap().carries = carries;
        let mut rig = Rig::with_peers(pairs(1), peers);
        let (mut queues, _) = rig.start(features, 1, 64);
        let (rx, tx) = &mut queues[0];
        for packet in &packets {
            rig.send(tx, &offload(packet, 1000), &packet.frame(false), &[12, 66, 3000], false);
        }
        rig.step_all();
        assert_eq!(tx.take_used(&rig.memory).len(), 4, "{:?}", rig.control.violation());
        let sent = std::mem::take(&mut hands[0].0.lock().unwrap().sent);
        if !carries {
            let expected: Vec<_> = packets.iter().flat_map(|packet| segments(packet, 1000)).collect();
            assert_eq!(sent.iter().map(|(bytes, _)| bytes.clone()).collect::<Vec<_>>(), expected);
            continue;
        }
        hands[0].0.lock().unwrap().to_receive.extend(sent);
        let mut received = Vec::new();
        // A few buffers at a time, so that the device has to stop in the middle of its segments.
        for _ in 0..40 {
            for _ in 0..3.min(rx.free()) {
                rig.post(rx, &[700], false);
            }
            rig.step_all();
            received.extend(rig.received(rx));
        }
        let takes_tcp4 = features & GUEST_TSO4 != 0;
        let whole = if takes_tcp4 { vec![packets[0].frame(false)] } else { segments(&packets[0], 1000) };
        let rest = packets[1..].iter().flat_map(|packet| segments(packet, 1000));
        let expected: Vec<_> = whole.into_iter().chain(rest).collect();
        assert_eq!(received.iter().map(|frame| frame.bytes.clone()).collect::<Vec<_>>(), expected);
        if takes_tcp4 {
            let head = &received[0];
            assert_eq!(head.header[..2], [1, 1]);
            assert_eq!([2, 4, 6, 8].map(|at| head.u16(at)), [54, 1000, 34, 16]);
            assert!(
                received[1..].iter().all(|frame| frame.header[..2] == [2, 0]),
                "verified, and not to be cut"
            );
        }
    }
}

#[test]
fn segmentation_that_does_not_fit_the_frame_is_a_counted_drop() {
    let (hands, peers) = Hand::peers(1);
    let mut rig = Rig::with_peers(pairs(1), peers);
    let (mut queues, _) = rig.start(CSUM | HOST_TSO4 | HOST_TSO6 | HOST_USO | HOST_ECN | GUEST_HDRLEN, 1, 64);
    let tx = &mut queues[0].1;
    let packet = Packet { payload: vec![3; 3000], ..Packet::v4([10, 0, 0, 1], [10, 0, 0, 2], (5, 6), true) };
    let good = offload(&packet, 1000);
    let with = |at: usize, value: u8| {
        let mut header = good.clone();
        header[at] = value;
        header
    };
    // IPv6, UDP, other header lengths, another start, another offset.
    let bad = [with(1, 4), with(1, 5), with(2, 50), with(6, 35), with(8, 6)];
    for header in &bad {
        rig.send(tx, header, &packet.frame(false), &[], false);
    }
    rig.send(tx, &with(1, 0x81), &packet.frame(false), &[], false);
    rig.step_all();
    assert_eq!(tx.take_used(&rig.memory).len(), 6);
    assert_eq!(rig.control.count(Count::TxMalformed), bad.len() as u64);
    assert_eq!(hands[0].sent().len(), 3);
    assert!(rig.control.violation().is_none());
}

#[test]
fn ecn_is_told_only_to_drivers_that_know_it() {
    let mut packet = Packet::v4([10, 0, 0, 1], [10, 0, 0, 2], (5, 6), true);
    packet.payload = vec![1; 2500];
    let mut bytes = packet.frame(false);
    bytes[14 + 20 + 13] |= 0x80;
    let offload = Offload {
        checksum: Some((34, 16)),
        segment: Some(Segment { kind: SegmentKind::Tcp4, size: 1000, header_len: 54 }),
    };
    for (features, expected) in [(1 << 9, vec![0x81]), (0, vec![0, 0, 0])] {
        let (hands, peers) = Hand::peers(1);
        let mut rig = Rig::with_peers(pairs(1), peers);
        let (mut queues, _) = rig.start(GUEST_CSUM | GUEST_TSO4 | MRG_RXBUF | features, 1, 64);
        let rx = &mut queues[0].0;
        for _ in 0..64 {
            rig.post(rx, &[2048], false);
        }
        hands[0].0.lock().unwrap().to_receive.push_back((bytes.clone(), offload));
        rig.step_all();
        let received = rig.received(rx);
        assert_eq!(received.iter().map(|frame| frame.header[1]).collect::<Vec<_>>(), expected);
        let cwr: Vec<_> = received.iter().map(|frame| frame.bytes[47] & 0x80 != 0).collect();
        assert!(cwr[0] && !cwr[1..].contains(&true), "only the first segment has CWR");
    }
}

/// The peers' trait is what others implement, too.
#[test]
fn a_peer_of_ones_own_ends_the_cable() {
    let (hands, mut peers) = Hand::peers(1);
    assert!(peers[0].transmit(Frame::finished(&[1, 2, 3])));
    assert_eq!(hands[0].sent(), [[1, 2, 3]]);
    hands[0].0.lock().unwrap().refuses = true;
    let mut rig = Rig::with_peers(pairs(1), peers);
    let (mut queues, _) = rig.start(0, 1, 8);
    rig.send(&mut queues[0].1, &[], &frame(1, 60), &[], false);
    rig.send(&mut queues[0].1, &[], &frame(2, 60), &[], false);
    rig.step_all();
    assert!(queues[0].1.take_used(&rig.memory).is_empty(), "it is offered again");
    hands[0].0.lock().unwrap().refuses = false;
    rig.step_all();
    assert_eq!(hands[0].sent(), [frame(1, 60), frame(2, 60)]);
    assert_eq!(queues[0].1.take_used(&rig.memory).len(), 2);
}
