//! The virtio-net driver against the software device, which checks leases and every rule that a device can: whatever
//! the driver does wrong shows as a violation or as a fault.

use std::collections::VecDeque;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use underpass::iommu::soft::{SoftIommu, SoftOptions};
use underpass::net::headers::{Flow, Headers, L4Checksum};
use underpass::net::toeplitz::Toeplitz;
use underpass::net::{
    Config, Link, MacAddr, Offloads, Port, Rss, RxQueue, Started, State, TxQueue, Values, checksum,
};
use underpass::pci::{PciDevice, Run};
use underpass::{Burst, Checksum, ErrorKind, Packet, Pool, Transport, TxOffload};
use underpass_drivers::virtio_net::driver::VirtioNet;
use underpass_drivers::virtio_net::model::peer::{Frame, Offload, Peer, PeerCounters, PeerSpec, SegmentKind};
use underpass_drivers::virtio_net::model::{Count, Features, Profile, VirtioNetControl, VirtioNetModel};

const PATIENCE: Duration = Duration::from_secs(20);

/// The other end of a cable that the test holds: what was sent, and what is to be received.
#[derive(Clone, Default)]
struct Wire {
    sent: Arc<Mutex<Vec<(Vec<u8>, Offload)>>>,
    coming: Arc<Mutex<VecDeque<(Vec<u8>, Offload)>>>,
    now: Vec<u8>,
    carries_offloads: bool,
}

impl Wire {
    fn sent(&self) -> Vec<(Vec<u8>, Offload)> {
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
    Pool::builder(1024).cache(0).build().unwrap()
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
                (0..32).map(|n| frame(round * 32 + n, 14 + (round * 32 + n) % 1505)).collect();
            queues.send(0, frames.iter().map(|bytes| rig.packet(bytes)).collect());
            let back = queues.receive(0, frames.len());
            for (packet, bytes) in back.iter().zip(&frames) {
                assert_eq!(&bytes_of(packet), bytes);
                assert_eq!((packet.port(), packet.queue(), packet.checksum()), (0, 0, Checksum::Unknown));
            }
        }
        let bytes: usize = (0..40 * 32).map(|n| 14 + n % 1505).sum();
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
