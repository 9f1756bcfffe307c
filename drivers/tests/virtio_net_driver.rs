//! The virtio-net driver against the software device, which checks leases and every rule that a device can: whatever
//! the driver does wrong shows as a violation or as a fault.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::VecDeque;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use underpass::iommu::soft::{SoftIommu, SoftOptions};
use underpass::net::headers::{Flow, Headers, L4Checksum};
use underpass::net::toeplitz::Toeplitz;
use underpass::net::{
    Config, DeviceDrops, Link, MacAddr, Offloads, Port, Rss, RxQueue, Started, State, TxQueue, Values,
    checksum,
};
use underpass::pci::{PciDevice, Run};
use underpass::{Burst, Checksum, ErrorKind, Packet, Pool, Transport, TxOffload};
use underpass_drivers::virtio_net::driver::VirtioNet;
use underpass_drivers::virtio_net::model::peer::{Frame, Offload, Peer, PeerCounters};
use underpass_drivers::virtio_net::model::{Count, Features, Profile, VirtioNetControl, VirtioNetModel};

const PATIENCE: Duration = Duration::from_secs(20);

/// A frame, and what is still to be done to it.
type Owned = (Vec<u8>, Offload);

/// The other end of a cable that the test holds: what was sent, and what is to be received.
#[derive(Clone, Default)]
struct Wire {
    sent: Arc<Mutex<Vec<Owned>>>,
    coming: Arc<Mutex<VecDeque<Owned>>>,
    now: Vec<u8>,
    carries_offloads: bool,
}

impl Wire {
    fn sent(&self) -> Vec<Owned> {
        std::mem::take(&mut self.sent.lock().unwrap())
    }

    fn frames(&self) -> Vec<Vec<u8>> {
        self.sent().into_iter().map(|(bytes, _)| bytes).collect()
    }

    fn arrive(&self, bytes: &[u8]) {
        self.coming.lock().unwrap().push_back((bytes.to_vec(), Offload::default()));
    }
}

impl Peer for Wire {
    fn transmit(&mut self, frame: Frame<'_>) -> bool {
        self.sent.lock().unwrap().push((frame.bytes.to_vec(), frame.offload));
        true
    }

    fn receive(&mut self) -> Option<Frame<'_>> {
        let (bytes, offload) = self.coming.lock().unwrap().pop_front()?;
        self.now = bytes;
        Some(Frame { bytes: &self.now, offload })
    }

    fn carries_offloads(&self) -> bool {
        self.carries_offloads
    }

    fn counters(&self) -> Arc<PeerCounters> {
        Arc::default()
    }
}

/// A port on a software device.
struct Rig {
    port: VirtioNet,
    control: VirtioNetControl,
    pool: Pool,
}

fn open(model: VirtioNetModel, run: Run, pool: Pool) -> Rig {
    let control = model.control();
    let iommu = SoftIommu::new(SoftOptions { check_leases: true, ..SoftOptions::default() });
    let device = PciDevice::in_process("soft:virtio-net", Box::new(model), &iommu, run).unwrap();
    Rig { port: VirtioNet::open(device).unwrap(), control, pool }
}

fn pool() -> Pool {
    Pool::builder(2048).cache(0).build().unwrap()
}

/// The device runs on the driver's time.
fn rig(profile: Profile) -> Rig {
    open(VirtioNetModel::new(profile).unwrap(), Run::Inline, pool())
}

fn wired(profile: Profile) -> (Rig, Wire) {
    let wire = Wire::default();
    let model = VirtioNetModel::with_peers(profile, vec![Box::new(wire.clone())]);
    (open(model, Run::Inline, pool()), wire)
}

impl Rig {
    fn config(&self) -> Config {
        Config { rx_depth: 64, tx_depth: 64, ..Config::new(&self.pool) }
    }

    fn start(&mut self, config: &Config) -> Queues {
        self.port.start(config).unwrap().into()
    }

    fn packet(&self, bytes: &[u8]) -> Packet {
        let mut packet = self.pool.alloc().unwrap();
        packet.append(bytes.len()).unwrap().copy_from_slice(bytes);
        packet
    }

    /// Nothing went wrong, and nothing is lost.
    fn finish(mut self) {
        self.port.stop().unwrap();
        self.check();
        drop(self.port);
        assert_eq!(self.pool.available(), self.pool.capacity());
    }

    fn check(&mut self) {
        assert_eq!(self.control.violation(), None);
        if let Some(fault) = self.port.next_fault() {
            panic!("{fault:?}");
        }
        if let Some(error) = self.port.next_error() {
            panic!("{error}");
        }
    }

    fn rx_values(&self, queue: usize) -> Values {
        self.port.counters().0[queue].values()
    }

    fn tx_values(&self, queue: usize) -> Values {
        self.port.counters().1[queue].values()
    }
}

/// Started queues.
struct Queues {
    rx: Vec<Box<dyn RxQueue>>,
    tx: Vec<Box<dyn TxQueue>>,
    offloads: Offloads,
}

impl From<Started> for Queues {
    fn from(started: Started) -> Self {
        Self { rx: started.rx, tx: started.tx, offloads: started.offloads }
    }
}

impl Queues {
    /// Sends all of them, and waits until they are sent.
    fn send(&mut self, queue: usize, packets: Vec<Packet>) {
        let mut burst = Burst::with_capacity(packets.len());
        burst.extend(packets.into_iter());
        let until = Instant::now() + PATIENCE;
        while !burst.is_empty() || self.tx[queue].reclaim() != 0 {
            self.tx[queue].tx_burst(&mut burst);
            assert!(Instant::now() < until, "{} are not sent", burst.len());
        }
    }

    /// Receives until there are `count`.
    fn receive(&mut self, queue: usize, count: usize) -> Vec<Packet> {
        let (mut burst, mut all) = (Burst::with_capacity(32), Vec::new());
        let until = Instant::now() + PATIENCE;
        while all.len() < count {
            self.rx[queue].rx_burst(&mut burst);
            all.extend(burst.drain_all());
            assert!(Instant::now() < until, "{} of {count} were received", all.len());
        }
        all
    }

    /// Nothing more comes.
    fn nothing(&mut self, queue: usize) {
        let mut burst = Burst::with_capacity(32);
        for _ in 0..10 {
            assert_eq!(self.rx[queue].rx_burst(&mut burst), 0);
        }
    }
}

/// A frame of `len` bytes that is no IP, each unlike the others.
fn frame(n: usize, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    for (at, byte) in bytes.iter_mut().enumerate() {
        *byte = (n * 31 + at * 7) as u8;
    }
    bytes[..12].copy_from_slice(&[2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2]);
    bytes[12..14].copy_from_slice(&[0x88, 0xb5]);
    bytes
}

fn flow(transport: Transport, ipv6: bool) -> Flow {
    let ip = |host: u8| -> IpAddr {
        if ipv6 {
            Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, host.into()).into()
        } else {
            Ipv4Addr::new(10, 0, 0, host).into()
        }
    };
    Flow {
        source_mac: MacAddr::local(2),
        destination_mac: MacAddr::local(1),
        vlan: None,
        source: ip(1),
        destination: ip(2),
        transport,
        source_port: 1000,
        destination_port: 2000,
    }
}

fn bytes_of(packet: &Packet) -> Vec<u8> {
    packet.segments().flat_map(|segment| segment.data().iter().copied()).collect()
}

/// Feature sets that change how rings are used.
fn flavours() -> Vec<(&'static str, Profile)> {
    let rings = Features::RING_PACKED
        | Features::IN_ORDER
        | Features::EVENT_IDX
        | Features::INDIRECT_DESC
        | Features::NOTIFICATION_DATA
        | Features::NOTIF_CONFIG_DATA;
    let with = |features| Profile { features: (Profile::SUPPORTED - rings) | features, ..Profile::default() };
    let all = [
        ("split", Features::NONE),
        ("split, in order", Features::IN_ORDER),
        ("split, events, indirect", Features::EVENT_IDX | Features::INDIRECT_DESC),
        ("split, everything", rings - Features::RING_PACKED),
        ("packed", Features::RING_PACKED),
        ("packed, in order", Features::RING_PACKED | Features::IN_ORDER),
        ("packed, everything", rings),
    ];
    let mut flavours = Vec::new();
    for (name, features) in all {
        for notified in [false, true] {
            flavours.push((name, Profile { notified, ..with(features) }));
        }
    }
    flavours
}

#[test]
fn what_is_sent_comes_back_as_it_was_on_every_kind_of_ring() {
    for (name, profile) in flavours() {
        println!("{name}, notified: {}", profile.notified);
        let mut rig = rig(profile);
        let mut queues = rig.start(&rig.config());
        for round in 0..40 {
            let frames: Vec<_> =
                (0..32).map(|n| frame(round * 32 + n, 14 + (round * 32 + n) % 1501)).collect();
            queues.send(0, frames.iter().map(|bytes| rig.packet(bytes)).collect());
            let back = queues.receive(0, frames.len());
            for (packet, bytes) in back.iter().zip(&frames) {
                assert_eq!(&bytes_of(packet), bytes);
                assert_eq!((packet.port(), packet.queue(), packet.checksum()), (0, 0, Checksum::Unknown));
            }
        }
        let bytes: usize = (0..40 * 32).map(|n| 14 + n % 1501).sum();
        let expected = Values { packets: 40 * 32, bytes: bytes as u64, ..Values::default() };
        drop(queues);
        assert_eq!((rig.rx_values(0), rig.tx_values(0)), (expected, expected));
        rig.finish();
    }
}

#[test]
fn packets_of_several_buffers_go_both_ways() {
    for (name, profile) in flavours() {
        println!("{name}, notified: {}", profile.notified);
        let mut rig = rig(Profile { mtu: 9000, ..profile });
        let small = Pool::builder(1024).buffer_len(512).cache(0).name("small").build().unwrap();
        let config = Config {
            pools: vec![small.clone()],
            mtu: Some(9000),
            offloads: Offloads::RX_SCATTER,
            ..rig.config()
        };
        rig.port.map(&rig.pool).unwrap();
        let mut queues = rig.start(&config);
        assert_eq!(queues.offloads, Offloads::RX_SCATTER);
        for round in 0..20_usize {
            let mut packets = Vec::new();
            let mut frames = Vec::new();
            for n in 0..4 {
                let bytes = frame(round * 4 + n, 20 + 997 * n + 61 * round);
                // In uneven pieces, some of them empty.
                let mut pieces = bytes.chunks(1 + bytes.len() / (1 + n)).rev();
                let mut packet = rig.packet(pieces.next().unwrap());
                for piece in pieces {
                    let mut before = rig.packet(piece);
                    if n == 2 {
                        before.chain(rig.packet(&[]));
                    }
                    before.chain(packet);
                    packet = before;
                }
                packets.push(packet);
                frames.push(bytes);
            }
            queues.send(0, packets);
            let back = queues.receive(0, frames.len());
            for (packet, bytes) in back.iter().zip(&frames) {
                assert_eq!(&bytes_of(packet), bytes);
                assert_eq!(packet.segments().count(), (bytes.len() + 12).div_ceil(512 - 116));
            }
        }
        drop(queues);
        rig.finish();
        assert_eq!(small.available(), small.capacity());
    }
}

#[test]
fn packets_that_can_not_be_sent_are_dropped_and_counted() {
    for (name, profile) in flavours() {
        println!("{name}, notified: {}", profile.notified);
        let (mut rig, wire) = wired(profile);
        let other = pool();
        let mut queues = rig.start(&rig.config());
        let good = frame(1, 1514);
        let without_headroom = |bytes: &[u8]| {
            let mut packet = rig.pool.alloc().unwrap();
            packet.reset(0);
            packet.append(bytes.len()).unwrap().copy_from_slice(bytes);
            packet
        };
        let mut long_chain = rig.packet(&good[..100]);
        for _ in 0..50 {
            long_chain.chain(rig.packet(&good[..20]));
        }
        let mut half_mapped = rig.packet(&good[..100]);
        half_mapped.chain(
            other
                .alloc()
                .map(|mut packet| {
                    packet.append(10).unwrap();
                    packet
                })
                .unwrap(),
        );
        let tagged_frame = [&good[..12], &[0x81, 0, 0, 7], &good[12..]].concat();
        let mut tagged = rig.packet(&good[..100]);
        tagged.set_vlan(Some(5));
        let mut offloaded = rig.packet(&good[..100]);
        offloaded.set_tx_offload(Some(tcp(0, true)));
        let mut unmapped = other.alloc().unwrap();
        unmapped.append(100).unwrap();

        queues.send(
            0,
            vec![
                rig.packet(&good),
                rig.packet(&good[..13]),
                rig.packet(&[]),
                rig.packet(&[&good[..], &[0]].concat()),
                // A tag is not counted in the MTU.
                rig.packet(&tagged_frame),
                rig.packet(&[&tagged_frame[..], &[0]].concat()),
            ],
        );
        queues.send(0, vec![long_chain, half_mapped, tagged, without_headroom(&good), offloaded, unmapped]);
        queues.send(0, vec![rig.packet(&good[..14])]);
        assert_eq!(wire.frames(), [&good[..], &tagged_frame, &good, &good[..14]]);
        let expected = Values {
            packets: 4,
            bytes: 2 * 1514 + 1518 + 14,
            runts: 2,
            oversize: 2,
            refused: 5,
            ..Values::default()
        };
        assert_eq!(rig.tx_values(0), expected);
        drop(queues);
        rig.finish();
        assert_eq!(other.available(), other.capacity());
    }
}

#[test]
fn a_packet_that_can_not_be_sent_is_counted_also_behind_a_ring_that_is_full() {
    for (name, profile) in flavours() {
        println!("{name}, notified: {}", profile.notified);
        let (mut rig, wire) = wired(profile);
        let mut queues = rig.start(&rig.config());
        let mut long_chain = rig.packet(&frame(0, 100));
        (0..50).for_each(|n| long_chain.chain(rig.packet(&frame(n, 20))));
        let mut packets: Vec<_> = (0..64).map(|n| rig.packet(&frame(n, 60))).collect();
        packets.push(long_chain);
        queues.send(0, packets);
        assert_eq!(wire.frames().len(), 64);
        let expected = Values { packets: 64, bytes: 64 * 60, refused: 1, ..Values::default() };
        assert_eq!(rig.tx_values(0), expected);
        drop(queues);
        rig.finish();
    }
}

/// Headers of TCP over IPv4.
fn tcp(segment: u16, checksum: bool) -> TxOffload {
    TxOffload {
        l2_len: 14,
        l3_len: 20,
        l4_len: 20,
        ipv6: false,
        transport: Transport::Tcp,
        ip_checksum: true,
        l4_checksum: checksum,
        segment,
    }
}

/// A packet of `flow` with so many bytes of payload, whose checksums are left to the device.
fn unfinished(rig: &Rig, flow: &Flow, payload: usize, segment: u16) -> Packet {
    let mut bytes = vec![0; flow.headers_len() + payload];
    for (n, byte) in bytes.iter_mut().enumerate() {
        *byte = (n * 13) as u8;
    }
    let headers = flow.write(&mut bytes, L4Checksum::Offload).unwrap();
    if !ipv6(flow) {
        bytes[headers.l3_offset() + 10..][..2].fill(0xee);
    }
    let mut pieces = bytes.chunks(2000).rev();
    let mut packet = rig.packet(pieces.next().unwrap());
    for piece in pieces {
        let mut before = rig.packet(piece);
        before.chain(packet);
        packet = before;
    }
    packet.set_tx_offload(Some(TxOffload {
        l2_len: headers.l3_offset() as u8,
        l3_len: (headers.l4_offset() - headers.l3_offset()) as u16,
        l4_len: (headers.payload_offset() - headers.l4_offset()) as u8,
        ipv6: ipv6(flow),
        transport: flow.transport,
        ip_checksum: !ipv6(flow),
        l4_checksum: true,
        segment,
    }));
    packet
}

fn ipv6(flow: &Flow) -> bool {
    flow.source.is_ipv6()
}

#[test]
fn checksums_and_segments_are_left_to_the_device() {
    let wanted = Offloads::TX_CHECKSUM | Offloads::TX_TCP_SEGMENT | Offloads::TX_UDP_SEGMENT;
    for (transport, ipv6) in
        [Transport::Tcp, Transport::Udp].into_iter().flat_map(|t| [(t, false), (t, true)])
    {
        let (mut rig, wire) = wired(Profile::default());
        let mut queues = rig.start(&Config { offloads: wanted, required: wanted, ..rig.config() });
        assert_eq!(queues.offloads, wanted);
        let flow = flow(transport, ipv6);
        queues.send(0, vec![unfinished(&rig, &flow, 1000, 0), unfinished(&rig, &flow, 10_000, 1200)]);
        let frames = wire.frames();
        let payloads: Vec<_> = frames
            .iter()
            .map(|bytes| {
                let headers = Headers::parse(bytes);
                assert_ne!(checksum::check_ip(bytes, &headers), Some(false));
                assert_eq!(checksum::check_l4(bytes, &headers), Some(true));
                bytes.len() - flow.headers_len()
            })
            .collect();
        assert_eq!(payloads, [1000, 1200, 1200, 1200, 1200, 1200, 1200, 1200, 1200, 400]);
        assert_eq!(rig.tx_values(0).refused, 0);
        drop(queues);
        rig.finish();
    }
}

#[test]
fn what_the_device_knows_of_checksums_and_segments_comes_with_the_packet() {
    for mergeable in [true, false] {
        let mut profile = Profile::default();
        if !mergeable {
            profile.features = profile.features - Features::MRG_RXBUF;
        }
        let mut rig = rig(profile);
        let buffers = if mergeable { 2048 } else { 70_000 };
        let large = Pool::builder(64).buffer_len(128 + buffers).cache(0).build().unwrap();
        let wanted = Offloads::RX_CHECKSUM
            | Offloads::RX_LARGE
            | Offloads::RX_SCATTER
            | Offloads::TX_CHECKSUM
            | Offloads::TX_TCP_SEGMENT;
        let granted = if mergeable { wanted } else { wanted.without(Offloads::RX_SCATTER) };
        let config = Config { pools: vec![large.clone()], offloads: wanted, ..rig.config() };
        rig.port.map(&rig.pool).unwrap();
        let mut queues = rig.start(&config);
        assert_eq!(queues.offloads, granted);
        let flow = flow(Transport::Tcp, false);
        queues.send(0, vec![unfinished(&rig, &flow, 30_000, 1400), unfinished(&rig, &flow, 500, 0)]);
        let back = queues.receive(0, 2);
        assert_eq!(back[0].len(), 30_054, "one packet, not cut on a cable in this process");
        assert_eq!(back[0].checksum(), Checksum::Partial);
        assert_eq!(back[1].checksum(), Checksum::Partial);
        assert_eq!((back[0].segment_size(), back[1].segment_size()), (Some(1400), None));
        drop((back, queues));
        rig.finish();
        assert_eq!(large.available(), large.capacity());
    }
}

#[test]
fn vlan_tags_are_taken_out_and_put_in() {
    let (mut rig, wire) = wired(Profile::default());
    let wanted = Offloads::RX_VLAN | Offloads::TX_VLAN | Offloads::TX_CHECKSUM;
    let mut queues = rig.start(&Config { offloads: wanted, ..rig.config() });
    assert_eq!(queues.offloads, wanted);
    let plain = frame(1, 300);
    let tag = [0x81, 0x00, 0x60, 0x07];
    let tagged = [&plain[..12], &tag, &plain[12..]].concat();

    let mut with_headroom = rig.packet(&plain);
    with_headroom.set_vlan(Some(0x6007));
    let mut without = rig.pool.alloc().unwrap();
    without.reset(3);
    without.append(plain.len()).unwrap().copy_from_slice(&plain);
    without.set_vlan(Some(0x6007));
    let mut longest = rig.packet(&frame(2, 1515));
    longest.set_vlan(Some(1));
    let mut checksummed = unfinished(&rig, &flow(Transport::Udp, false), 100, 0);
    checksummed.set_vlan(Some(9));
    queues.send(0, vec![with_headroom, without, longest, checksummed]);
    let sent = wire.frames();
    assert_eq!(sent[..2], [&tagged[..], &tagged]);
    let headers = Headers::parse(&sent[2]);
    assert_eq!(headers.vlan, Some(9));
    assert_eq!(checksum::check_l4(&sent[2], &headers), Some(true));
    assert_eq!(rig.tx_values(0).oversize, 1, "an MTU of 1500, 14 bytes and a tag are 1518");

    wire.arrive(&tagged);
    wire.arrive(&plain);
    wire.arrive(&tagged[..17]);
    let back = queues.receive(0, 3);
    assert_eq!((bytes_of(&back[0]), back[0].vlan()), (plain.clone(), Some(0x6007)));
    assert_eq!((bytes_of(&back[1]), back[1].vlan()), (plain, None));
    assert_eq!((back[2].len(), back[2].vlan()), (17, None));
    // Both count what is on the wire.
    assert_eq!(rig.rx_values(0).bytes, 304 + 300 + 17);
    assert_eq!(rig.tx_values(0).bytes, sent.iter().map(|frame| frame.len() as u64).sum::<u64>());
    drop((back, queues));
    rig.finish();
}

#[test]
fn packets_are_distributed_by_their_hash_and_carry_it() {
    for features in [Profile::SUPPORTED, Profile::SUPPORTED - Features::RSS] {
        let mut rig = rig(Profile { queue_pairs: 4, features, ..Profile::default() });
        let wanted = Offloads::RSS | Offloads::RSS_HASH;
        let has_rss = features.contains(Features::RSS);
        let mut queues = rig.start(&Config { rx_queues: 4, tx_queues: 2, offloads: wanted, ..rig.config() });
        assert_eq!(queues.offloads, if has_rss { wanted } else { Offloads::RSS_HASH });
        assert_eq!((queues.rx.len(), queues.tx.len()), (4, 2));
        let (info, mut key) = (rig.port.info(), underpass::net::toeplitz::DEFAULT_KEY);
        let mut table: Vec<u16> = (0..128).map(|n| n % 4).collect();
        for round in 0..2 {
            for port in 0..64_u16 {
                let flow = Flow { source_port: port, ..flow(Transport::Udp, port % 2 == 0) };
                let mut bytes = vec![0; 100];
                let headers = flow.write(&mut bytes, L4Checksum::Full).unwrap();
                let hash =
                    Toeplitz::new(&key).hash(headers.addresses(&bytes).unwrap(), headers.ports(&bytes));
                queues.send(usize::from(port % 2), vec![rig.packet(&bytes)]);
                let queue = if has_rss { table[hash as usize % table.len()] } else { port % 2 };
                let packet = &queues.receive(queue.into(), 1)[0];
                assert_eq!((packet.rss_hash(), packet.queue()), (Some(hash), queue), "{round}: {flow:?}");
            }
            key.rotate_left(3);
            table = vec![3, 2, 2, 1];
            let change = rig.port.set_rss(&Rss { key: key.to_vec(), table: table.clone() });
            if !has_rss {
                assert_eq!(change.unwrap_err().kind(), ErrorKind::Unsupported);
                break;
            }
            change.unwrap();
            assert_eq!((info.rss_key_len, info.rss_table_len >= 128), (40, true));
            for (key, table) in [(39, vec![0]), (40, vec![0, 1, 2]), (40, vec![4]), (40, vec![])] {
                let error = rig.port.set_rss(&Rss { key: vec![0; key], table }).unwrap_err();
                assert_eq!(error.kind(), ErrorKind::InvalidInput);
            }
        }
        drop(queues);
        rig.finish();
    }
}

#[test]
fn filters_and_the_link_change_while_it_runs_and_outlive_a_restart() {
    let (mut rig, wire) = wired(Profile { speed: Some(25_000), ..Profile::default() });
    let to = |mac: MacAddr, vlan: Option<u8>| {
        let mut bytes = frame(0, 60);
        bytes[..6].copy_from_slice(&mac.octets());
        if let Some(vlan) = vlan {
            bytes[12..16].copy_from_slice(&[0x81, 0, 0, vlan]);
        }
        bytes
    };
    let (own, other) = (rig.port.mac(), MacAddr::local(77));
    let (group, other_group) = (MacAddr([0x33, 0x33, 0, 0, 0, 1]), MacAddr([0x33, 0x33, 0, 0, 0, 2]));
    assert_eq!(own, MacAddr::local(1));
    rig.port.set_vlan_filter(5, true).unwrap();
    let mut queues = rig.start(&Config { promiscuous: false, ..rig.config() });
    // Which of these come through.
    let seen = |queues: &mut Queues| {
        let all = [
            to(own, None),
            to(other, None),
            to(group, None),
            to(other_group, None),
            to(own, Some(5)),
            to(own, Some(6)),
        ];
        for bytes in &all {
            wire.arrive(bytes);
        }
        wire.arrive(&to(MacAddr::BROADCAST, None));
        let mut seen = String::new();
        while !seen.ends_with('b') {
            for packet in queues.receive(0, 1) {
                let at = all.iter().position(|bytes| *bytes == bytes_of(&packet));
                seen.push(at.map_or('b', |at| char::from(b'0' + at as u8)));
            }
        }
        seen
    };
    assert_eq!(seen(&mut queues), "04b");
    rig.port.set_all_multicast(true).unwrap();
    assert_eq!(seen(&mut queues), "0234b");
    rig.port.set_all_multicast(false).unwrap();
    rig.port.set_mac_filter(&[group, other]).unwrap();
    assert_eq!(seen(&mut queues), "0124b");
    rig.port.set_mac(other).unwrap();
    rig.port.set_mac_filter(&[]).unwrap();
    assert_eq!((seen(&mut queues).as_str(), rig.port.mac()), ("1b", other));
    rig.port.set_mac(own).unwrap();
    rig.port.set_vlan_filter(6, true).unwrap();
    rig.port.set_vlan_filter(5, false).unwrap();
    assert_eq!(seen(&mut queues), "05b");
    assert_eq!(rig.port.set_vlan_filter(6, false).unwrap_err().kind(), ErrorKind::Busy, "it is the last");
    assert_eq!(rig.port.set_vlan_filter(4096, true).unwrap_err().kind(), ErrorKind::InvalidInput);
    assert_eq!(rig.port.set_mac(group).unwrap_err().kind(), ErrorKind::InvalidInput);
    let too_many = vec![MacAddr::local(3); 2000];
    assert_eq!(rig.port.set_mac_filter(&too_many).unwrap_err().kind(), ErrorKind::InvalidInput);
    rig.port.set_mac_filter(&[group]).unwrap();

    let up = Link { up: true, speed: Some(25_000), full_duplex: Some(true) };
    assert_eq!(rig.port.link(), up);
    rig.control.set_link(false);
    assert_eq!(rig.port.link(), Link { up: false, ..up });
    rig.control.set_link(true);

    drop(queues);
    rig.port.stop().unwrap();
    let mut queues = rig.start(&Config { promiscuous: false, ..rig.config() });
    assert_eq!(seen(&mut queues), "025b");
    rig.port.set_promiscuous(true).unwrap();
    assert_eq!(seen(&mut queues), "012345b");
    drop(queues);
    rig.port.stop().unwrap();
    rig.port.set_vlan_filter(6, false).unwrap();
    let mut queues = rig.start(&Config { promiscuous: false, ..rig.config() });
    assert_eq!(seen(&mut queues), "0245b");
    assert_eq!(rig.port.set_vlan_filter(5, true).unwrap_err().kind(), ErrorKind::Busy);
    drop(queues);
    rig.finish();
}

#[test]
fn a_device_without_a_feature_says_so() {
    let features = Features::VERSION_1 | Features::ACCESS_PLATFORM;
    let mut rig = rig(Profile { features, queue_pairs: 3, ..Profile::default() });
    let info = rig.port.info();
    assert_eq!((info.max_rx_queues, info.max_tx_queues), (1, 1));
    assert_eq!((info.rss_key_len, info.rss_table_len), (0, 0));
    assert_eq!(info.offloads, Offloads::RX_VLAN | Offloads::TX_VLAN);
    let mut queues =
        rig.start(&Config { offloads: Offloads::TX_CHECKSUM, promiscuous: false, ..rig.config() });
    assert_eq!(queues.offloads, Offloads::NONE);
    let unsupported = |result: underpass::Result<()>| {
        assert_eq!(result.unwrap_err().kind(), ErrorKind::Unsupported);
    };
    unsupported(rig.port.set_mac(MacAddr::local(9)));
    unsupported(rig.port.set_promiscuous(true));
    unsupported(rig.port.set_all_multicast(true));
    unsupported(rig.port.set_mac_filter(&[]));
    unsupported(rig.port.set_vlan_filter(1, true));
    unsupported(queues.rx[0].wait(Duration::ZERO));
    assert_eq!(rig.port.link(), Link { up: true, speed: None, full_duplex: None });
    queues.send(0, vec![rig.packet(&frame(1, 100))]);
    queues.receive(0, 1);
    queues.nothing(0);
    drop(queues);
    rig.finish();
}

#[test]
fn a_configuration_that_can_not_be_is_refused_and_starts_nothing() {
    let mut rig = rig(Profile { queue_pairs: 2, max_queue_size: 128, mtu: 4000, ..Profile::default() });
    let small = Pool::builder(1024).buffer_len(300).build().unwrap();
    let few = Pool::builder(100).build().unwrap();
    let config = rig.config();
    let base = || config.clone();
    let refused = [
        (ErrorKind::InvalidInput, Config { rx_queues: 3, ..base() }),
        (ErrorKind::InvalidInput, Config { tx_queues: 3, ..base() }),
        (ErrorKind::InvalidInput, Config { tx_queues: 2, ..base() }),
        (ErrorKind::InvalidInput, Config { rx_depth: 129, ..base() }),
        (ErrorKind::InvalidInput, Config { tx_depth: 1 << 20, ..base() }),
        (ErrorKind::InvalidInput, Config { mtu: Some(4001), ..base() }),
        (ErrorKind::InvalidInput, Config { mtu: Some(67), ..base() }),
        (ErrorKind::InvalidInput, Config { mtu: Some(4000), ..base() }),
        (ErrorKind::InvalidInput, Config { pools: Vec::new(), ..base() }),
        (ErrorKind::InvalidInput, Config { pools: vec![small.clone()], ..base() }),
        (ErrorKind::InvalidInput, Config { pools: vec![few.clone()], rx_depth: 128, ..base() }),
        (ErrorKind::InvalidInput, Config { pools: vec![few.clone()], rx_queues: 2, ..base() }),
        (ErrorKind::Unsupported, Config { required: Offloads::RX_TIMESTAMP, ..base() }),
        (ErrorKind::Unsupported, Config { required: Offloads::RX_LARGE, ..base() }),
        (
            ErrorKind::InvalidInput,
            Config { offloads: Offloads::RSS, rss: Some(Rss { key: vec![0; 40], table: vec![1] }), ..base() },
        ),
    ];
    for (kind, config) in &refused {
        let error = rig.port.start(config).unwrap_err();
        assert_eq!((error.kind(), error.device_name()), (*kind, Some("soft:virtio-net")), "{error}");
    }
    let started = rig.port.start(&config).unwrap();
    assert_eq!(started.mtu, 1500);
    assert_eq!(rig.port.start(&config).unwrap_err().kind(), ErrorKind::Busy);
    assert_eq!(rig.port.map(&small).unwrap_err().kind(), ErrorKind::Busy);
    drop(started);
    rig.finish();
}

#[test]
fn queues_may_be_as_short_as_a_device_has_them() {
    for features in [Profile::SUPPORTED, Profile::SUPPORTED - Features::RING_PACKED] {
        for max_queue_size in [2, 4, 8] {
            let mut rig = rig(Profile { max_queue_size, features, ..Profile::default() });
            let mut queues = rig.start(&Config { rx_depth: 0, tx_depth: 0, ..rig.config() });
            for n in 0..20 {
                queues.send(0, vec![rig.packet(&frame(n, 100))]);
                assert_eq!(bytes_of(&queues.receive(0, 1)[0]), frame(n, 100));
                rig.port.set_promiscuous(n % 2 == 0).unwrap();
            }
            drop(queues);
            rig.finish();
        }
    }
}

#[test]
fn pools_that_the_start_has_mapped_are_not_mapped_once_it_is_stopped() {
    let mut rig = rig(Profile::default());
    let (own, other) = (pool(), rig.pool.clone());
    rig.port.map(&own).unwrap();
    for pool in [&own, &other] {
        let config = Config { pools: vec![pool.clone()], ..rig.config() };
        let started = rig.port.start(&config).unwrap();
        drop(started);
        rig.port.stop().unwrap();
    }
    assert_eq!(rig.port.unmap(&other).unwrap_err().kind(), ErrorKind::NotFound);
    rig.port.unmap(&own).unwrap();
    rig.finish();
}

#[test]
fn a_device_that_goes_past_the_iommu_or_is_a_legacy_one_is_not_driven() {
    let features = Profile::SUPPORTED - Features::ACCESS_PLATFORM;
    let model = VirtioNetModel::new(Profile { features, ..Profile::default() }).unwrap();
    let iommu = SoftIommu::new(SoftOptions::default());
    let device = PciDevice::in_process("soft:virtio-net", Box::new(model), &iommu, Run::Stepped).unwrap();
    let error = VirtioNet::open(device).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert!(error.to_string().contains("iommu_platform=on"), "{error}");
}

#[test]
fn queues_come_back_and_go_out_again_with_another_configuration() {
    let mut rig = rig(Profile { queue_pairs: 4, ..Profile::default() });
    let mut sent = 0;
    for (n, depth) in [(1, 16), (4, 64), (2, 128), (3, 2), (4, 0)] {
        let config = Config {
            rx_queues: n,
            tx_queues: n,
            rx_depth: depth,
            tx_depth: depth,
            port: n as u16,
            ..rig.config()
        };
        let mut queues = rig.start(&config);
        for queue in 0..n {
            let bytes = frame(n, 100);
            queues.send(queue, vec![rig.packet(&bytes)]);
            let packet = &queues.receive(queue, 1)[0];
            assert_eq!((bytes_of(packet), packet.port(), packet.queue()), (bytes, n as u16, queue as u16));
        }
        sent += 1;
        // Packets stay in the rings, both ways, when it stops.
        let mut burst = Burst::with_capacity(2);
        burst.extend([rig.packet(&frame(1, 60)), rig.packet(&frame(2, 60))].into_iter());
        assert_eq!(queues.tx[0].tx_burst(&mut burst), 2);

        assert_eq!(rig.port.stop().unwrap_err().kind(), ErrorKind::Busy);
        assert!(queues.rx.iter().all(|queue| queue.state() == State::Quiesced));
        assert_eq!(queues.rx[0].rx_burst(&mut Burst::with_capacity(8)), 0);
        let tx = queues.tx.pop().unwrap();
        drop(queues);
        assert_eq!(rig.port.stop().unwrap_err().kind(), ErrorKind::Busy);
        drop(tx);
        rig.port.stop().unwrap();
        rig.port.stop().unwrap();
        assert_eq!(rig.pool.available(), rig.pool.capacity());
    }
    let values = rig.tx_values(0);
    assert_eq!(values.packets + values.unsent, 3 * sent, "{values:?}");
    rig.finish();
}

#[test]
fn queues_outlive_their_port() {
    let mut rig = rig(Profile::default());
    let mut queues = rig.start(&rig.config());
    let packet = rig.packet(&frame(1, 100));
    queues.send(0, vec![packet]);
    let Rig { port, control, pool } = rig;
    drop(port);
    assert_eq!(queues.rx[0].state(), State::Quiesced);
    queues.nothing(0);
    let mut burst = Burst::with_capacity(1);
    burst.extend(std::iter::once(pool.alloc().unwrap()));
    assert_eq!(queues.tx[0].tx_burst(&mut burst), 0);
    drop((queues, burst));
    assert_eq!(control.violation(), None);
    assert_eq!(pool.available(), pool.capacity());
}

#[test]
fn a_pool_that_runs_dry_is_counted_once_a_buffer_and_recovers() {
    let (mut rig, wire) = wired(Profile::default());
    let small = Pool::builder(64).cache(0).build().unwrap();
    let mut queues = rig.start(&Config { pools: vec![small.clone()], ..rig.config() });
    (0..200).for_each(|n| wire.arrive(&frame(n, 64)));
    let held = queues.receive(0, 64);
    queues.nothing(0);
    assert_eq!(rig.rx_values(0).no_buffers, 64);
    let exhausted = small.exhausted();
    (0..10).for_each(|_| queues.nothing(0));
    assert_eq!(small.exhausted(), exhausted, "the same buffers are asked for in vain again and again");
    drop(held);
    let mut n = 64;
    while n < 200 {
        for packet in queues.receive(0, 1) {
            assert_eq!(bytes_of(&packet), frame(n, 64));
            n += 1;
        }
    }
    // The ring and the burst in the test's hands share the pool: it is short again and again.
    let no_buffers = rig.rx_values(0).no_buffers;
    assert!((65..400).contains(&no_buffers), "{no_buffers}");
    assert_eq!(rig.rx_values(0), Values { packets: 200, bytes: 200 * 64, no_buffers, ..Values::default() });
    drop(queues);
    rig.finish();
}

#[test]
fn frames_that_are_too_long_or_too_short_are_not_received() {
    let (mut rig, wire) = wired(Profile { mtu: 3000, ..Profile::default() });
    let mut queues = rig.start(&Config { mtu: Some(1000), ..rig.config() });
    for len in [1014, 1015, 14, 13] {
        wire.arrive(&frame(0, 1015)[..len]);
    }
    let mut tagged = frame(0, 1019);
    tagged[12..14].copy_from_slice(&[0x81, 0]);
    wire.arrive(&tagged[..1018]);
    wire.arrive(&tagged);
    wire.arrive(&frame(0, 15));
    let lens: Vec<_> = queues.receive(0, 4).iter().map(Packet::len).collect();
    assert_eq!(lens, [1014, 14, 1018, 15]);
    let values = rig.rx_values(0);
    assert_eq!((values.packets, values.oversize), (4, 2));
    assert_eq!(values.runts + rig.control.count(Count::RxOversize), 1, "the model lets runts through");
    drop(queues);
    rig.finish();
}

#[test]
fn the_device_tells_what_it_dropped() {
    for (name, profile) in flavours() {
        let (mut rig, wire) = wired(profile.clone());
        assert_eq!(rig.port.device_drops().unwrap(), None, "{name}: it is stopped");
        let mut queues = rig.start(&rig.config());
        assert_eq!(rig.port.device_drops().unwrap(), Some(DeviceDrops::default()), "{name}");
        for len in [9000, 1519, 1000, 1520] {
            wire.arrive(&frame(0, len));
        }
        assert_eq!(queues.receive(0, 1)[0].len(), 1000);
        queues.nothing(0);
        rig.control.set_link(false);
        queues.send(0, vec![rig.packet(&frame(1, 100)), rig.packet(&frame(2, 100))]);
        assert_eq!(rig.port.device_drops().unwrap(), Some(DeviceDrops { rx: 3, tx: 2 }), "{name}");
        assert_eq!(
            rig.rx_values(0).dropped() + rig.tx_values(0).dropped(),
            0,
            "the driver knows nothing of it"
        );
        drop(queues);
        rig.finish();

        let features = profile.features - Features::DEVICE_STATS;
        let (mut rig, _) = wired(Profile { features, ..profile });
        let queues = rig.start(&rig.config());
        assert_eq!(rig.port.device_drops().unwrap(), None, "{name}: it does not count");
        drop(queues);
        rig.finish();
    }
}

#[test]
fn a_queue_sleeps_until_a_packet_comes() {
    for (name, profile) in flavours() {
        for run in [Run::Inline, Run::Threads { cores: Vec::new() }] {
            println!("{name}, notified: {}, {run:?}", profile.notified);
            let wire = Wire::default();
            let model = VirtioNetModel::with_peers(profile.clone(), vec![Box::new(wire.clone())]);
            let mut rig = open(model, run, pool());
            assert!(rig.port.info().interrupts);
            let mut queues = rig.start(&Config { interrupts: true, ..rig.config() });
            let begun = Instant::now();
            queues.rx[0].wait(Duration::from_millis(5)).unwrap();
            assert!(begun.elapsed() >= Duration::from_millis(5));
            for n in 0..3 {
                std::thread::scope(|scope| {
                    let wire = &wire;
                    scope.spawn(move || {
                        std::thread::sleep(Duration::from_millis(2));
                        wire.arrive(&frame(n, 100));
                    });
                    let mut burst = Burst::with_capacity(8);
                    while queues.rx[0].rx_burst(&mut burst) == 0 {
                        queues.rx[0].wait(PATIENCE).unwrap();
                        assert!(begun.elapsed() < PATIENCE, "the signal was lost");
                    }
                    assert_eq!(bytes_of(&burst[0]), frame(n, 100));
                });
            }
            drop(queues);
            rig.finish();
        }
    }
}
