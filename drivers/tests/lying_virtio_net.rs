//! A virtio-net device that lies: whatever it answers, writes or leaves out, the driver never panics, reads out of
//! bounds or waits without end, and no packet reaches the application while the device may still write it.
//!
//! The liar is the real model behind taps. Its engines rest, and the test plays the device: it reads the rings that the
//! driver set up and writes through the device's own bus what it likes, so that each lie comes at a known moment. All of
//! it runs with `check=leases`: a write to memory that the device was not given is refused.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "rig/net/mod.rs"]
mod rig;

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use underpass::iommu::FaultReason;
use underpass::model::{Bus, Width};
use underpass::net::{Config, MacAddr, Offloads, Port, Started, State};
use underpass::pci::ConfigSpace;
use underpass::{Burst, Error, ErrorKind, Iova, Packet, Pool, Result};
use underpass_drivers::virtio_net::driver::VirtioNet;
use underpass_drivers::virtio_net::model::VirtioNetModel;
use underpass_drivers::virtio_net::spec::net::{Header, config, control_queue, header_flag};
use underpass_drivers::virtio_net::spec::packed::{self, Handshake};
use underpass_drivers::virtio_net::spec::pci::{CAP_ID, NO_VECTOR, cfg_type, common, status};
use underpass_drivers::virtio_net::spec::{Features, net};
use zerocopy::IntoBytes;

use rig::frames::{identify, numbered};
use rig::ring::{Chain, DeviceRing};
use rig::tapped::{Register, Tapped};
use rig::virtio::{Kind, stepped};
use rig::{Bench, Random, Taps, Wire, burst, contents, packet, pool, until};

/// How long a driver may take to give a device up.
const SOON: Duration = Duration::from_secs(8);

const SPLIT: Kind = Kind::new(stepped, true, &[Features::RING_PACKED, Features::IN_ORDER]);
const PACKED: Kind = Kind::new(stepped, true, &[Features::IN_ORDER]);
const IN_ORDER: [Kind; 2] =
    [Kind::new(stepped, true, &[Features::RING_PACKED]), Kind::new(stepped, true, &[])];

fn is_packed(kind: &Kind) -> bool {
    !kind.without.contains(Features::RING_PACKED)
}

/// A started port whose device the test plays.
struct Stage {
    bench: Bench,
    kind: Kind,
    pool: Pool,
    config: Config,
    started: Option<Started>,
    rx: DeviceRing,
    tx: DeviceRing,
}

impl Stage {
    fn new(kind: &Kind) -> Self {
        Self::with(kind, |_| ())
    }

    fn with(kind: &Kind, change: impl FnOnce(&mut Config)) -> Self {
        let bench = Bench { control: None, ..kind.open(&Wire::echo(1)) };
        let pool = pool(64);
        let mut config = Config { rx_depth: 16, tx_depth: 16, ..Config::new(&pool) };
        change(&mut config);
        let ring = DeviceRing::unused();
        let (rx, tx) = (ring.clone(), ring);
        let mut stage = Self { bench, kind: kind.clone(), pool, config, started: None, rx, tx };
        stage.start();
        stage
    }

    /// Starts with an honest device, which rests from then on.
    fn start(&mut self) {
        self.bench.taps.be_honest();
        self.started = Some(self.bench.start(&self.config));
        self.bench.taps.mute(true);
        let ring = |index| DeviceRing::new(self.bench.taps.queue(index), is_packed(&self.kind));
        (self.rx, self.tx) = (ring(net::receive_queue(0)), ring(net::transmit_queue(0)));
    }

    fn with_bus<T>(&self, use_it: impl FnOnce(&mut Bus) -> T) -> T {
        self.bench.taps.with_bus(use_it)
    }

    fn queues(&mut self) -> &mut Started {
        self.started.as_mut().unwrap()
    }

    /// Plays the device on the receive ring.
    fn on_rx<T>(&mut self, play: impl FnOnce(&mut DeviceRing, &mut Bus) -> T) -> T {
        let ring = &mut self.rx;
        self.bench.taps.with_bus(|bus| play(ring, bus))
    }

    fn on_tx<T>(&mut self, play: impl FnOnce(&mut DeviceRing, &mut Bus) -> T) -> T {
        let ring = &mut self.tx;
        self.bench.taps.with_bus(|bus| play(ring, bus))
    }

    fn receive(&mut self) -> Vec<Packet> {
        let mut received = Burst::with_capacity(32);
        let count = self.queues().rx[0].rx_burst(&mut received);
        assert_eq!(count, received.len());
        received.drain_all().collect()
    }

    fn send(&mut self, frames: &[Vec<u8>]) {
        let mut packets = burst(frames.iter().map(|frame| packet(&self.pool, frame)));
        assert_eq!(self.queues().tx[0].tx_burst(&mut packets), frames.len());
    }

    fn state(&mut self) -> (State, State) {
        let queues = self.queues();
        (queues.rx[0].state(), queues.tx[0].state())
    }

    /// How often the first queue of each kind broke down.
    fn broken(&self) -> u64 {
        let (rx, tx) = self.bench.counted();
        rx.broken + tx.broken
    }

    /// The port has noticed that a queue is broken, and says so once.
    fn complains(&mut self) {
        assert!(self.broken() > 0, "a lie was not counted");
        let error = self.bench.port.next_error().expect("a queue that is gone has a reason");
        assert_eq!(error.kind(), ErrorKind::Device, "{error}");
        assert!(error.mend_text().is_some(), "{error}: and now?");
        assert!(self.bench.port.next_error().is_none(), "the same error over and over");
    }

    /// Stops, with every buffer home, and starts again with a device that is honest; what it sends comes back.
    fn recovers(mut self) {
        drop(self.started.take());
        self.bench.taps.be_honest();
        self.bench.port.stop().unwrap();
        assert_home(&self.pool);
        while self.bench.port.next_error().is_some() || self.bench.port.next_fault().is_some() {}
        let mut started = self.bench.start(&self.config);
        self.bench.works(&mut started, &self.pool);
        self.bench.stop(started, &[&self.pool]);
    }
}

/// Each buffer is in the pool, and only once.
fn assert_home(pool: &Pool) {
    assert_eq!(pool.available(), pool.capacity(), "buffers are lost");
    let all: Vec<_> = std::iter::from_fn(|| pool.alloc()).collect();
    let places: HashSet<_> = all.iter().map(|packet| packet.data().as_ptr()).collect();
    assert_eq!((all.len(), places.len()), (pool.capacity(), pool.capacity()), "a buffer is there twice");
}

/// What a device writes before a frame.
fn headed(header: Header, frame: &[u8]) -> Vec<u8> {
    [header.as_bytes(), frame].concat()
}

fn one_buffer() -> Header {
    Header { num_buffers: 1, ..Header::default() }
}

const HEADER: u32 = size_of::<Header>() as u32;

/// What became of a lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    /// It could be true, so it is believed.
    Believed,
    /// One packet is dropped and counted.
    Dropped,
    /// The queue is of no use until it is started again.
    Gone,
    /// The driver does not see it.
    Unseen,
}

/// Tells one lie of a received buffer, on a fresh ring, and checks what becomes of it.
fn lie_of_a_buffer(stage: &mut Stage, lie: impl FnOnce(&mut DeviceRing, &mut Bus, &[Chain])) -> Outcome {
    let chains = stage.on_rx(DeviceRing::take_all);
    assert_eq!(chains.len(), 16, "as many as fit are posted");
    let frame = numbered(1, 5, 700);
    let before = stage.bench.counted().0;
    stage.with_bus(|bus| {
        for chain in &chains {
            chain.write(bus, &headed(one_buffer(), &frame)).unwrap();
        }
    });
    stage.on_rx(|ring, bus| lie(ring, bus, &chains));
    let received = stage.receive();
    assert!(received.len() <= 1);
    for packet in &received {
        assert!(frame.starts_with(&contents(packet)[..packet.len().min(700)]));
    }
    isolated(stage, &chains, received.len());
    let after = stage.bench.counted().0;
    let becomes = stage.state().0;
    let dropped = after.dropped() - before.dropped();
    match (becomes, received.len(), dropped, after.broken - before.broken) {
        (State::Running, 1, 0, 0) => Outcome::Believed,
        (State::Running, 0, 1, 0) => Outcome::Dropped,
        (State::Running, 0, 0, 0) => Outcome::Unseen,
        (State::Gone, _, 0, 1) => Outcome::Gone,
        other => panic!("{other:?}"),
    }
}

/// The device can write as many of these buffers as it should: those that the application or the pool has are closed to
/// it.
fn isolated(stage: &Stage, chains: &[Chain], closed: usize) {
    let refused = chains.iter().filter(|chain| {
        let wrote = stage.with_bus(|bus| bus.write(None, chain.buffers[0].at, &[0xee; 16]));
        wrote.is_err_and(|fault| fault.reason == FaultReason::NotLeased)
    });
    let refused = refused.count();
    // One that was dropped is closed, too.
    assert!(
        refused >= closed && refused <= closed + 1,
        "{refused} are closed to the device, {closed} were received"
    );
}

#[test]
fn a_used_buffer_is_believed_only_where_it_can_be_true() {
    const ROOM: u32 = 2048 + HEADER;
    for kind in [&SPLIT, &PACKED] {
        let mut stage = Stage::new(kind);
        let ids: [(u32, bool); 7] =
            [(0, true), (15, true), (16, false), (17, false), (255, false), (0x7fff, false), (0xffff, false)];
        for (id, exists) in ids {
            let outcome = lie_of_a_buffer(&mut stage, |ring, bus, chains| {
                let id = if exists { u32::from(chains[id as usize % 16].id) } else { id };
                ring.give_raw(bus, id, HEADER + 700, 1);
            });
            assert_eq!(outcome, if exists { Outcome::Believed } else { Outcome::Gone }, "{kind:?}, id {id}");
            restart(&mut stage, outcome);
        }
        if !is_packed(kind) {
            for id in [0x1_0000, 0x8000_0000, u32::MAX] {
                let outcome =
                    lie_of_a_buffer(&mut stage, |ring, bus, _| ring.give_raw(bus, id, HEADER + 700, 1));
                assert_eq!(outcome, Outcome::Gone, "id {id}");
                restart(&mut stage, outcome);
            }
        }
        for (len, expected) in [
            (0, Outcome::Dropped),
            (1, Outcome::Dropped),
            (HEADER - 1, Outcome::Dropped),
            (HEADER, Outcome::Dropped),
            (HEADER + 13, Outcome::Dropped),
            (HEADER + 14, Outcome::Believed),
            (HEADER + 1514, Outcome::Believed),
            (HEADER + 1515, Outcome::Dropped),
            (ROOM, Outcome::Dropped),
            (1 << 16, Outcome::Gone),
            (u32::MAX, Outcome::Gone),
        ] {
            let outcome = lie_of_a_buffer(&mut stage, |ring, bus, chains| {
                let id = chains[0].id.into();
                ring.give_raw(bus, id, len, 1);
            });
            assert_eq!(outcome, expected, "{kind:?}, {len} bytes");
            restart(&mut stage, outcome);
        }
        let outcome = lie_of_a_buffer(&mut stage, |ring, bus, chains| {
            let len = chains[0].writable() + 1;
            ring.give(bus, &chains[0], len);
        });
        assert_eq!(outcome, Outcome::Gone, "one byte more than the buffer has");
        stage.recovers();
    }
}

/// Starts again, after it complained if it should.
fn restart(stage: &mut Stage, outcome: Outcome) {
    if outcome == Outcome::Gone {
        stage.complains();
        let mut packets = burst([packet(&stage.pool, &numbered(1, 1, 60))]);
        let _ = stage.queues().tx[0].tx_burst(&mut packets);
        assert_eq!(stage.queues().rx[0].rx_burst(&mut Burst::with_capacity(2)), 0);
    }
    drop(stage.started.take());
    stage.bench.taps.be_honest();
    stage.bench.port.stop().unwrap();
    assert_home(&stage.pool);
    stage.start();
}

#[test]
fn a_buffer_is_used_once() {
    for kind in [&SPLIT, &PACKED] {
        for apart in [false, true] {
            let mut stage = Stage::new(kind);
            let chains = stage.on_rx(DeviceRing::take_all);
            let frame = headed(one_buffer(), &numbered(1, 1, 100));
            stage.with_bus(|bus| chains[3].write(bus, &frame)).unwrap();
            stage.on_rx(|ring, bus| ring.give(bus, &chains[3], HEADER + 100));
            let mut received = Vec::new();
            if apart {
                received = stage.receive();
            }
            stage.on_rx(|ring, bus| ring.give(bus, &chains[3], HEADER + 100));
            received.extend(stage.receive());
            // What came before the lie is received; the lie may wait for the next burst.
            received.extend(stage.receive());
            assert_eq!((received.len(), stage.state().0), (1, State::Gone), "{kind:?}, apart: {apart}");
            assert_eq!(identify(received[0].data()), (1, 1));
            stage.complains();
            drop(received);
            stage.recovers();
        }
    }
}

#[test]
fn an_index_that_jumps_is_no_news() {
    // Split rings alone have one.
    for jump in [17, 18, 1000, 0x7fff, 0x8000, 0xffff] {
        let mut stage = Stage::new(&SPLIT);
        let outcome = lie_of_a_buffer(&mut stage, |ring, bus, chains| {
            ring.write_element(bus, 0, chains[0].id.into(), HEADER + 700);
            ring.set_index(bus, jump);
        });
        assert_eq!(outcome, Outcome::Gone, "index {jump}");
        stage.complains();
        stage.recovers();
    }
    // Back again, to where it was: there is nothing new.
    let mut stage = Stage::new(&SPLIT);
    let chains = stage.on_rx(DeviceRing::take_all);
    stage.with_bus(|bus| chains[0].write(bus, &headed(one_buffer(), &numbered(1, 1, 100)))).unwrap();
    stage.on_rx(|ring, bus| ring.give(bus, &chains[0], HEADER + 100));
    assert_eq!(stage.receive().len(), 1);
    stage.on_rx(|ring, bus| ring.set_index(bus, 0));
    assert_eq!((stage.receive().len(), stage.state().0), (0, State::Gone));
    stage.recovers();
}

#[test]
fn flags_of_a_packed_descriptor_can_be_anything() {
    const WRITE: u16 = packed::WRITE;
    for flags in (0..16).map(|bit| 1_u16 << bit).chain([0, 0xffff, 0x8080, 0x8082, 0x0080 | WRITE, 0x7fff]) {
        let mut stage = Stage::new(&PACKED);
        let is_used = flags & 0x8080 == 0x8080;
        let outcome = lie_of_a_buffer(&mut stage, |ring, bus, chains| {
            let word = Handshake::new().with_id(chains[0].id).with_len(HEADER + 700).with_flags(flags);
            ring.mark(bus, word);
        });
        let expected: &[Outcome] =
            if is_used { &[Outcome::Believed, Outcome::Gone, Outcome::Dropped] } else { &[Outcome::Unseen] };
        assert!(expected.contains(&outcome), "flags {flags:#06x}: {outcome:?}");
        stage.recovers();
    }
}

#[test]
fn headers_can_be_anything() {
    for kind in [&SPLIT, &PACKED] {
        let all = Offloads::RX_CHECKSUM | Offloads::RX_LARGE | Offloads::RX_SCATTER | Offloads::RX_VLAN;
        let mut stage = Stage::with(kind, |config| config.offloads = all);
        assert!(stage.bench.port.info().offloads.contains(all));
        let mut random = Random(23);
        for turn in 0..300_u64 {
            if stage.state().0 == State::Gone {
                restart(&mut stage, Outcome::Gone);
            }
            let Some(chain) = stage.on_rx(DeviceRing::take) else { continue };
            let mut header = Header::default();
            random.fill(header.as_mut_bytes());
            header.num_buffers = match turn % 8 {
                0 => 0,
                1 => u16::MAX,
                2 => 17,
                3 => 2,
                _ => 1,
            };
            let frame = numbered(1, turn, 60 + random.below(1000));
            let bytes = headed(header, &frame);
            stage.with_bus(|bus| chain.write(bus, &bytes)).unwrap();
            stage.on_rx(|ring, bus| ring.give(bus, &chain, bytes.len() as u32));
            let received = stage.receive();
            assert!(received.is_empty() || turn % 8 != 0, "a packet of no buffers");
            for packet in received {
                // Of several buffers the later ones have headers of their own in them: no frame of ours.
                if packet.next().is_none() {
                    assert_eq!(identify(packet.data()), (1, turn));
                }
                isolated(&stage, std::slice::from_ref(&chain), 0);
            }
        }
        stage.recovers();
    }
}

#[test]
fn a_packet_in_several_buffers_that_never_ends_is_given_up_at_the_stop() {
    for kind in [&SPLIT, &PACKED] {
        let mut stage = Stage::with(kind, |config| config.offloads = Offloads::RX_SCATTER);
        for part in 0..30 {
            let Some(chain) = stage.on_rx(DeviceRing::take) else { break };
            let header = Header { num_buffers: 16, ..Header::default() };
            let bytes = headed(header, &numbered(1, part, 100));
            stage.with_bus(|bus| chain.write(bus, &bytes)).unwrap();
            stage.on_rx(|ring, bus| ring.give(bus, &chain, bytes.len() as u32));
            if part == 14 {
                break;
            }
            assert_eq!(stage.receive().len(), 0, "a part is no packet");
        }
        stage.recovers();
    }
}

#[test]
fn what_comes_behind_a_lie_about_a_packet_is_not_received() {
    for kind in [&SPLIT, &PACKED] {
        for (lie, len) in [(one_buffer(), HEADER - 1), (Header { num_buffers: 17, ..Header::default() }, 200)]
        {
            let mut stage = Stage::with(kind, |config| config.offloads = Offloads::RX_SCATTER);
            let chains = stage.on_rx(DeviceRing::take_all);
            for (n, chain) in chains[..4].iter().enumerate() {
                let header = if n == 1 { lie } else { one_buffer() };
                let bytes = headed(header, &numbered(1, n as u64, 200));
                stage.with_bus(|bus| chain.write(bus, &bytes)).unwrap();
                let len = if n == 1 { len } else { bytes.len() as u32 };
                stage.on_rx(|ring, bus| ring.give(bus, chain, len));
            }
            let received = stage.receive();
            assert_eq!((received.len(), stage.state().0), (1, State::Gone), "{kind:?}, {len} bytes");
            assert_eq!(identify(received[0].data()), (1, 0));
            // All four are closed to the device.
            for chain in &chains[..4] {
                let wrote = stage.with_bus(|bus| bus.write(None, chain.buffers[0].at, &[0xee; 16]));
                assert!(wrote.is_err());
            }
            let counted = stage.bench.counted().0;
            assert_eq!((counted.packets, counted.errors, counted.broken), (1, 3, 1));
            stage.complains();
            drop(received);
            stage.recovers();
        }
    }
}

#[test]
fn packets_sent_come_home_once_whatever_the_device_says() {
    for kind in [&SPLIT, &PACKED] {
        let frames: Vec<_> = (0..10).map(|n| numbered(1, n, 100)).collect();
        // Out of order is no lie, unless it was agreed on.
        let mut stage = Stage::new(kind);
        stage.send(&frames);
        let chains = stage.on_tx(DeviceRing::take_all);
        let sent: Vec<_> = chains.iter().map(|chain| stage.with_bus(|bus| chain.read(bus))).collect();
        assert!(sent.iter().zip(&frames).all(|(sent, frame)| sent[HEADER as usize..] == frame[..]));
        for n in [9, 0, 4, 5, 1, 8, 7, 2, 3, 6] {
            stage.on_tx(|ring, bus| ring.give(bus, &chains[n], n as u32 * 1_000_000));
        }
        assert_eq!(stage.queues().tx[0].reclaim(), 0);
        assert_eq!(stage.state().1, State::Running);
        assert_eq!(stage.bench.counted().1.packets, 10);
        for chain in &chains {
            let read = stage.with_bus(|bus| bus.read(None, chain.buffers[0].at, &mut [0; 8]));
            assert!(read.is_err(), "what came home is still open to the device");
        }
        stage.recovers();

        for lie in [Lie::Twice, Lie::Id(16), Lie::Id(0xfffe), Lie::Id(9)] {
            let mut stage = Stage::new(kind);
            stage.send(&frames[..5]);
            let chains = stage.on_tx(DeviceRing::take_all);
            stage.on_tx(|ring, bus| {
                ring.give(bus, &chains[0], 0);
                match lie {
                    Lie::Twice => ring.give(bus, &chains[0], 0),
                    Lie::Id(id) => ring.give_raw(bus, id, 0, 1),
                }
            });
            stage.queues().tx[0].reclaim();
            let left = stage.queues().tx[0].reclaim();
            assert_eq!((left, stage.state().1), (4, State::Gone), "{lie:?}");
            let mut more = burst([packet(&stage.pool, &frames[0])]);
            assert_eq!(stage.queues().tx[0].tx_burst(&mut more), 0, "it moves nothing any more");
            drop(more);
            stage.complains();
            let counters = stage.bench.port.counters().1;
            drop(stage.started.take());
            stage.bench.port.stop().unwrap();
            // Each packet once, and the breakdown once, also when the rest was taken home.
            let counted = counters[0].values();
            assert_eq!((counted.packets, counted.unsent, counted.broken), (1, 4, 1));
            assert_eq!(counted.dropped(), 4);
            stage.recovers();
        }
    }
}

#[derive(Debug, Clone, Copy)]
enum Lie {
    Twice,
    Id(u32),
}

#[test]
fn an_order_that_was_agreed_on_is_kept_or_else() {
    for kind in &IN_ORDER {
        let mut stage = Stage::new(kind);
        stage.send(&(0..6).map(|n| numbered(1, n, 100)).collect::<Vec<_>>());
        let chains = stage.on_tx(DeviceRing::take_all);
        stage.on_tx(|ring, bus| ring.give(bus, &chains[0], 0));
        assert_eq!(stage.queues().tx[0].reclaim(), 5);
        // Several in order can be told by the last of them; what goes backwards is a lie.
        if is_packed(kind) {
            stage.on_tx(|ring, bus| ring.give_raw(bus, chains[3].id.into(), 0, 3));
        } else {
            stage.on_tx(|ring, bus| {
                ring.write_element(bus, 1, chains[3].id.into(), 0);
                ring.used = 4;
                ring.set_index(bus, 4);
            });
        }
        let left = stage.queues().tx[0].reclaim();
        assert!(left == 2 && stage.state().1 == State::Running || stage.state().1 == State::Gone, "{left}");
        stage.on_tx(|ring, bus| ring.give(bus, &chains[1], 0));
        stage.queues().tx[0].reclaim();
        assert_eq!(stage.state().1, State::Gone, "a buffer came a second time");
        stage.recovers();
    }
}

#[test]
fn what_the_driver_wrote_is_not_what_it_believes() {
    // Without leases: with them the device can not write most of it.
    for kind in [&SPLIT, &PACKED].map(|kind| Kind { check_leases: false, ..kind.clone() }) {
        let mut stage = Stage::new(&kind);
        let mut random = Random(31);
        let mut scribbled = 0;
        for round in 0..40_u64 {
            let rx = stage.on_rx(DeviceRing::take_all);
            let frames: Vec<_> = (0..4).map(|n| numbered(2, round * 4 + n, 200)).collect();
            stage.send(&frames);
            let tx = stage.on_tx(DeviceRing::take_all);
            let sent: Vec<_> = tx.iter().map(|chain| stage.with_bus(|bus| chain.read(bus))).collect();
            assert!(sent.iter().zip(&frames).all(|(sent, frame)| sent[HEADER as usize..] == frame[..]));
            // All that the device has seen is overwritten, as far as it is let: descriptors and the available ring.
            for ring in [stage.rx.clone(), stage.tx.clone()] {
                scribbled += scribble(&stage, &ring, &mut random);
            }
            for (n, chain) in rx.iter().enumerate() {
                let bytes = headed(one_buffer(), &numbered(3, round * 100 + n as u64, 300));
                stage.with_bus(|bus| chain.write(bus, &bytes)).unwrap();
                stage.on_rx(|ring, bus| ring.give(bus, chain, bytes.len() as u32));
            }
            for chain in &tx {
                stage.on_tx(|ring, bus| ring.give(bus, chain, 0));
            }
            let received = stage.receive();
            assert_eq!((received.len(), stage.queues().tx[0].reclaim()), (rx.len(), 0));
            for (n, packet) in received.iter().enumerate() {
                assert_eq!(identify(packet.data()), (3, round * 100 + n as u64));
            }
        }
        assert_eq!(stage.broken(), 0);
        assert!(scribbled > 0, "nothing could be overwritten");
        stage.recovers();
    }
}

/// Writes nonsense over what the driver has made available, except for the entries that come next; how many words
/// could be written.
fn scribble(stage: &Stage, ring: &DeviceRing, random: &mut Random) -> usize {
    let size = u64::from(ring.setup.size);
    let mut at: Vec<u64> = Vec::new();
    if ring.packed {
        // The address; the other half is where the device answers.
        at.extend((0..size).map(|slot| ring.setup.desc + 16 * slot));
    } else {
        at.extend((0..2 * size).map(|half| ring.setup.desc + 8 * half));
    }
    at.into_iter()
        .filter(|at| stage.with_bus(|bus| bus.store(None, Iova::new(*at), random.next())).is_ok())
        .count()
}

#[test]
fn suppressed_notifications_are_only_a_hint() {
    for kind in [&SPLIT, &PACKED] {
        let mut stage = Stage::new(kind);
        let mut random = Random(41);
        for turn in 0..200_u64 {
            let nonsense = random.next() as u32;
            stage.on_rx(|ring, bus| ring.suppress(bus, nonsense));
            stage.on_tx(|ring, bus| ring.suppress(bus, !nonsense));
            let frame = numbered(1, turn, 90);
            stage.send(std::slice::from_ref(&frame));
            let sent = stage.on_tx(DeviceRing::take).unwrap();
            stage.on_tx(|ring, bus| ring.give(bus, &sent, 0));
            let chain = stage.on_rx(DeviceRing::take).unwrap();
            let bytes = headed(one_buffer(), &frame);
            stage.with_bus(|bus| chain.write(bus, &bytes)).unwrap();
            stage.on_rx(|ring, bus| ring.give(bus, &chain, bytes.len() as u32));
            assert_eq!(identify(stage.receive()[0].data()), (1, turn));
        }
        assert_eq!(stage.queues().tx[0].reclaim(), 0);
        stage.recovers();
    }
}

/// A device that writes whatever comes to its mind, while the driver works.
#[test]
fn a_storm_of_nonsense_loses_no_buffer() {
    for (kind, seed) in [(&SPLIT, 1), (&PACKED, 2), (&IN_ORDER[0], 3), (&IN_ORDER[1], 4)] {
        let mut stage =
            Stage::with(kind, |config| config.offloads = Offloads::RX_SCATTER | Offloads::RX_CHECKSUM);
        let mut random = Random(seed);
        let begin = Instant::now();
        let (mut restarts, mut received, mut held) = (0, 0, Vec::new());
        while begin.elapsed() < Duration::from_millis(700) {
            // Some of what it says is true: the driver gets on.
            for _ in 0..random.below(4) {
                let (rx, tx) = (random.coin(), random.coin());
                if rx && let Some(chain) = stage.on_rx(take_any) {
                    let len = if random.below(8) == 0 { random.next() as u32 } else { HEADER + 100 };
                    let header =
                        Header { num_buffers: 1 + u16::from(random.below(9) == 0), ..Header::default() };
                    let _ = stage.with_bus(|bus| chain.write(bus, &headed(header, &numbered(1, 1, 100))));
                    stage.on_rx(|ring, bus| ring.give(bus, &chain, len));
                }
                if tx && let Some(chain) = stage.on_tx(take_any) {
                    stage.on_tx(|ring, bus| ring.give(bus, &chain, 0));
                }
            }
            if random.below(20) == 0 {
                storm(&stage, &mut random);
            }
            let mut packets = Burst::with_capacity(4);
            stage.pool.alloc_burst(random.below(4), &mut packets);
            for packet in &mut *packets {
                packet.append(60).unwrap().fill(5);
            }
            stage.queues().tx[0].tx_burst(&mut packets);
            drop(packets);
            for packet in stage.receive() {
                received += 1;
                let bytes = contents(&packet);
                held.push((packet, bytes));
            }
            if held.len() > 8 {
                for (packet, before) in held.drain(..) {
                    assert!(contents(&packet) == before, "the device wrote what the application has");
                }
            }
            if stage.state() != (State::Running, State::Running) {
                restarts += 1;
                held.clear();
                drop(stage.started.take());
                stage.bench.taps.be_honest();
                stage.bench.port.stop().unwrap();
                assert_home(&stage.pool);
                stage.start();
            }
        }
        assert!(restarts > 3 && received > 3, "{restarts} restarts, {received} received");
        drop(held);
        stage.recovers();
    }
}

/// The next chain, unless the ring has been made nonsense of.
fn take_any(ring: &mut DeviceRing, bus: &mut Bus) -> Option<Chain> {
    ring.try_take(bus).ok().flatten()
}

/// Writes some words of the rings.
fn storm(stage: &Stage, random: &mut Random) {
    for ring in [&stage.rx, &stage.tx] {
        let areas = [
            (ring.setup.desc, 16 * u64::from(ring.setup.size)),
            (ring.setup.device, 8 * u64::from(ring.setup.size)),
        ];
        let (base, len) = areas[random.below(2)];
        let at = Iova::new(base + ((random.next() % len) & !7));
        let value = match random.below(3) {
            0 => random.next(),
            1 => random.next() & 0x8082_000f_0000_07ff,
            _ => random.next() & 0x0000_0200_0000_001f,
        };
        let _ = stage.with_bus(|bus| bus.store(None, at, value));
    }
}

fn open(kind: &Kind, taps: &Taps, wire: &Wire) -> Result<VirtioNet> {
    let model = VirtioNetModel::with_peers(kind.profile(wire.pairs()), wire.peers());
    kind.open_model(Box::new(Tapped::new(Box::new(model), taps)))
}

/// Opens a port whose registers lie and works with it as far as that goes.
fn try_out(kind: &Kind, lie: impl FnMut(Register, u64) -> u64 + Send + 'static) -> Result<()> {
    let (taps, wire, pool) = (Taps::new(true), Wire::echo(2), pool(256));
    taps.lie_on_read(lie);
    let begin = Instant::now();
    let result = open(kind, &taps, &wire).and_then(|mut port| {
        let info = port.info();
        assert!(info.max_rx_queues > 0 && info.max_rx_depth > 0, "{info:?}");
        assert!(info.max_mtu >= 68, "{info:?}");
        let config = Config {
            rx_queues: info.max_rx_queues.min(2),
            tx_queues: info.max_tx_queues.min(2),
            rx_depth: info.max_rx_depth.min(32),
            tx_depth: info.max_tx_depth.min(32),
            interrupts: info.interrupts,
            offloads: info.offloads,
            ..Config::new(&pool)
        };
        let worked = port.start(&config).map(|mut started| {
            let mut packets = burst([packet(&pool, &numbered(1, 1, 100))]);
            let mut received = Burst::with_capacity(4);
            for _ in 0..20 {
                started.tx[0].tx_burst(&mut packets);
                taps.step();
                started.rx.iter_mut().for_each(|queue| _ = queue.rx_burst(&mut received));
            }
            port.link();
            let _ = port.set_promiscuous(false);
            let _ = port.set_mac(MacAddr([2, 0, 0, 0, 0, 7]));
            while port.next_error().is_some() {}
        });
        let stopped = port.stop();
        worked.and(stopped)
    });
    assert!(begin.elapsed() < SOON, "{:?}: {result:?}", begin.elapsed());
    if let Err(error) = &result {
        assert!(error.to_string().starts_with("soft:virtio-net"), "{error}: on which device?");
        assert!(error.mend_text().is_some(), "{error}: and now?");
    }
    result
}

/// A register that reads as `value`, whatever is in it.
fn fixed(register: Register, value: u64) -> impl FnMut(Register, u64) -> u64 + Send + 'static {
    move |which, honest| if which == register { value } else { honest }
}

#[test]
fn registers_that_make_no_sense_are_refused() {
    use Register::{Common, Device};
    let refused: [(&str, Register, u64); 12] = [
        ("no queue pairs", Device(config::MAX_VIRTQUEUE_PAIRS), 0),
        ("too many queue pairs", Device(config::MAX_VIRTQUEUE_PAIRS), 0xffff),
        ("no MTU", Device(config::MTU), 0),
        ("an MTU under the least", Device(config::MTU), 67),
        ("a short RSS key", Device(config::RSS_MAX_KEY_SIZE), 39),
        ("a short RSS table", Device(config::RSS_MAX_INDIRECTION_TABLE_LENGTH), 127),
        ("no features", Common(common::DEVICE_FEATURE), 0),
        ("no queues", Common(common::NUM_QUEUES), 0),
        ("queues without entries", Common(common::QUEUE_SIZE), 0),
        ("queues that are never enabled", Common(common::QUEUE_ENABLE), 0),
        ("notifications out of the BAR", Common(common::QUEUE_NOTIFY_OFF), 0xffff),
        ("no vector", Common(common::QUEUE_MSIX_VECTOR), NO_VECTOR as u64),
    ];
    for (what, register, value) in refused {
        let error = try_out(&SPLIT, fixed(register, value)).expect_err(what);
        let kinds =
            [ErrorKind::Device, ErrorKind::Unsupported, ErrorKind::Exhausted, ErrorKind::InvalidInput];
        assert!(kinds.contains(&error.kind()), "{what}: {error}");
    }
    // A group's address is no port's own.
    let lie = |which, honest| if which == Device(config::MAC) { honest | 1 } else { honest };
    assert_eq!(try_out(&SPLIT, lie).unwrap_err().kind(), ErrorKind::Device);
}

#[test]
fn registers_may_say_more_than_there_is() {
    use Register::{Common, Device};
    for (what, register, value) in [
        ("the largest MTU", Device(config::MTU), 0xffff),
        ("all features", Common(common::DEVICE_FEATURE), u64::MAX),
        ("more queues", Common(common::NUM_QUEUES), 0xffff),
        ("a longer RSS table", Device(config::RSS_MAX_INDIRECTION_TABLE_LENGTH), 0xffff),
        ("a longer RSS key", Device(config::RSS_MAX_KEY_SIZE), 0xff),
        ("all hash types", Device(config::SUPPORTED_HASH_TYPES), 0xffff_ffff),
        ("deep queues", Common(common::QUEUE_SIZE), 0x8000),
        ("deeper queues than can be", Common(common::QUEUE_SIZE), 0xffff),
        ("an odd size", Common(common::QUEUE_SIZE), 37),
        ("an unknown link state", Device(config::STATUS), 0xffff),
        ("an odd notification offset", Common(common::QUEUE_NOTIFY_OFF), 1),
    ] {
        // The honest model may refuse what the driver then does. It need not work, only end well.
        if let Err(error) = try_out(&PACKED, fixed(register, value)) {
            assert!(!matches!(error.kind(), ErrorKind::Gone), "{what}: {error}");
        }
    }
}

#[test]
fn registers_that_change_all_the_time_end_nothing() {
    std::thread::scope(|scope| {
        for lane in 0..4 {
            scope.spawn(move || {
                let (mut good, mut bad) = (0, 0);
                for turn in 0..12 {
                    let mut random = Random(lane * 1000 + turn);
                    let often = 2 + random.below(60);
                    let kind = if turn % 2 == 0 { &SPLIT } else { &PACKED };
                    let result = try_out(
                        kind,
                        move |_, honest| {
                            if random.below(often) == 0 { random.next() } else { honest }
                        },
                    );
                    *(if result.is_ok() { &mut good } else { &mut bad }) += 1;
                }
                assert!(good + bad == 12 && bad > 0);
            });
        }
    });
}

#[test]
fn a_configuration_that_changes_under_way_changes_no_promise() {
    let kind = &SPLIT;
    let bench = kind.open(&Wire::echo(2));
    let Bench { mut port, wire, taps, .. } = bench;
    let pool = pool(256);
    let (info, mac) = (port.info(), port.mac());
    let mut random = Random(4);
    for turn in 0..30 {
        let bad = random.next();
        taps.lie_on_read(
            move |which, honest| {
                if matches!(which, Register::Device(_)) && turn % 3 != 0 { bad } else { honest }
            },
        );
        let config = Config { rx_queues: 2, tx_queues: 2, ..Config::new(&pool) };
        let config = Config { rx_depth: 16, tx_depth: 16, ..config };
        let started = port.start(&config);
        if let Ok(mut started) = started {
            let mut packets = burst([packet(&pool, &numbered(1, 1, 100))]);
            started.tx[1].tx_burst(&mut packets);
            port.link();
        }
        assert_eq!((port.info(), port.mac()), (info.clone(), mac));
        port.stop().unwrap();
        assert_home(&pool);
    }
    taps.be_honest();
    let mut bench = Bench { port, wire, taps, control: None };
    bench.wire.forget();
    let mut started = bench.start(&Config { rx_depth: 16, ..Config::new(&pool) });
    bench.works(&mut started, &pool);
    bench.stop(started, &[&pool]);
}

/// A capability: its id, and all bytes behind its two-byte header.
type Capability = (u8, Vec<u8>);

fn capabilities(space: &ConfigSpace) -> Vec<Capability> {
    let byte = |at: u16| space.read(at, Width::Bits8) as u8;
    let mut all = Vec::new();
    let mut at = u16::from(byte(0x34));
    while at != 0 {
        let id = byte(at);
        let len = if id == CAP_ID { u16::from(byte(at + 2)) } else { 12 };
        all.push((id, (at + 2..at + len).map(byte).collect()));
        at = u16::from(byte(at + 1));
    }
    all
}

fn with_capabilities(honest: &ConfigSpace, all: &[Capability]) -> ConfigSpace {
    let read = |at, width| honest.read(at, width);
    let (vendor, device) = (read(0, Width::Bits16) as u16, read(2, Width::Bits16) as u16);
    let empty = ConfigSpace::new(vendor, device, (read(8, Width::Bits32) >> 8) as u32);
    all.iter().fold(empty, |space, (id, body)| space.with_capability(*id, body, &[]))
}

#[test]
fn capabilities_that_lead_nowhere_are_refused() {
    let open = |change: &dyn Fn(&mut Vec<Capability>)| -> Result<()> {
        let wire = Wire::echo(1);
        let model = VirtioNetModel::with_peers(SPLIT.profile(1), wire.peers());
        let honest = underpass::model::Model::config_space(&model);
        let mut all = capabilities(&honest);
        change(&mut all);
        let (taps, pool) = (Taps::new(true), pool(128));
        let tapped = Tapped::with_config(Box::new(model), &taps, with_capabilities(&honest, &all));
        let mut port = SPLIT.open_model(Box::new(tapped))?;
        let started = port.start(&Config { rx_depth: 16, tx_depth: 16, ..Config::new(&pool) });
        let mut bench = Bench { port: Box::new(port), wire, taps, control: None };
        let worked = started.map(|mut started| {
            bench.works(&mut started, &pool);
        });
        bench.port.stop()?;
        worked
    };
    open(&|_| ()).unwrap();
    // Offsets behind the two-byte header: cap_len 0, cfg_type 1, bar 2, offset 6, length 10, multiplier 14.
    let of = |kind: u8| move |cap: &&mut Capability| cap.0 == CAP_ID && cap.1[1] == kind;
    let set = |kind: u8, at: usize, value: u32| {
        open(&|all| {
            for (_, body) in all.iter_mut().filter(of(kind)) {
                let bytes = value.to_le_bytes();
                let len = if at < 6 { 1 } else { 4 };
                body[at..at + len].copy_from_slice(&bytes[..len]);
            }
        })
    };
    let check = |what: String, result: Result<()>| {
        let error: Error = result.expect_err(&what);
        assert_eq!(error.kind(), ErrorKind::Device, "{what}: {error}");
        assert!(error.to_string().starts_with("soft:virtio-net"), "{error}: on which device?");
    };
    for kind in [cfg_type::COMMON, cfg_type::NOTIFY] {
        check(format!("no {kind}"), open(&|all| all.retain_mut(|cap| !of(kind)(&cap))));
        for bar in [1, 3, 5, 6, 7, 255] {
            check(format!("{kind} in BAR {bar}"), set(kind, 2, bar));
        }
        for offset in [0xffff_fffc, 0x8000_0000, 0x10_0000] {
            check(format!("{kind} at {offset:#x}"), set(kind, 6, offset));
        }
        check(format!("{kind} of all there is"), set(kind, 10, u32::MAX));
        check(format!("{kind} of no bytes"), set(kind, 10, 0));
        check(format!("{kind} too short"), set(kind, 0, 8));
    }
    check("a multiplier that leads out of the BAR".to_owned(), set(cfg_type::NOTIFY, 14, 0x8000_0000));
    check("the largest".to_owned(), set(cfg_type::NOTIFY, 14, u32::MAX));
    check(
        "no device configuration".to_owned(),
        open(&|all| all.retain_mut(|cap| !of(cfg_type::DEVICE)(&cap))),
    );
    check("a short one".to_owned(), set(cfg_type::DEVICE, 10, 4));
    // All queues at one address is allowed.
    set(cfg_type::NOTIFY, 14, 0).unwrap();
    // Nonsense of a kind that is not needed, or that no driver knows, is passed over; so is a second one of a kind.
    set(cfg_type::ISR, 2, 255).unwrap();
    open(&|all| {
        all.insert(0, (CAP_ID, vec![16, 77, 255, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]));
    })
    .unwrap();
    open(&|all| {
        let common = all.iter_mut().find(of(cfg_type::COMMON)).unwrap().clone();
        let mut broken = common;
        broken.1[2] = 7;
        all.insert(0, broken);
    })
    .unwrap();
}

/// A port with a device that will not be reset.
fn stuck(taps: &Taps) {
    taps.lie_on_read(|which, honest| {
        if which == Register::Common(common::DEVICE_STATUS) {
            honest | u64::from(status::DRIVER)
        } else {
            honest
        }
    });
}

fn a_device_that_does_not_reset_is_not_opened() {
    let taps = Taps::new(true);
    stuck(&taps);
    let error = open(&SPLIT, &taps, &Wire::new(1)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Timeout, "{error}");
    taps.lie_on_read(|_, _| u64::MAX);
    let error = open(&SPLIT, &taps, &Wire::new(1)).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::Gone | ErrorKind::Timeout), "{error}");
}

fn a_device_that_does_not_stop_keeps_its_memory(kind: &Kind) {
    let mut stage = Stage::new(kind);
    stage.send(&[numbered(1, 1, 100), numbered(1, 2, 100)]);
    let (rx, tx) = (stage.on_rx(DeviceRing::take_all), stage.on_tx(DeviceRing::take_all));
    stuck(&stage.bench.taps);
    drop(stage.started.take());
    let begin = Instant::now();
    let error = stage.bench.port.stop().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Timeout, "{error}");
    assert!(begin.elapsed() < SOON);
    // What the device could still write is not given to anybody.
    assert_eq!(stage.pool.available(), stage.pool.capacity() - 18);
    let error = stage.bench.port.start(&stage.config).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::Gone | ErrorKind::Timeout), "{error}");
    let Stage { bench, pool, .. } = stage;
    let Bench { port, taps, .. } = bench;
    for drop_port in [false, true] {
        if !drop_port {
            for chain in &rx {
                taps.with_bus(|bus| chain.write(bus, &[9; 64])).expect("leaked memory stays mapped");
            }
            for chain in &tx {
                taps.with_bus(|bus| chain.read(bus));
            }
        }
    }
    drop(port);
    assert!(pool.available() <= pool.capacity() - 18);
}

fn a_removed_device_is_given_up() {
    let mut stage = Stage::new(&SPLIT);
    stage.send(&[numbered(1, 1, 100)]);
    stage.bench.taps.lie_on_read(|_, _| u64::MAX);
    until("the port notices", || {
        stage.bench.port.link();
        stage.bench.port.next_error();
        stage.state().0 == State::Gone
    });
    let errors = std::iter::from_fn(|| stage.bench.port.next_error()).take(100).count();
    assert!(errors < 100, "the same error over and over");
    let begin = Instant::now();
    drop(stage.started.take());
    let error = stage.bench.port.stop().unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::Timeout | ErrorKind::Gone), "{error}");
    assert!(begin.elapsed() < SOON);
    assert!(
        stage.bench.port.set_promiscuous(false).is_err() || stage.bench.port.start(&stage.config).is_err()
    );
}

/// Dropped while its device does not stop: leaks, and says so in the log.
fn a_port_dropped_on_a_stuck_device_leaks() {
    let mut stage = Stage::new(&PACKED);
    let chains = stage.on_rx(DeviceRing::take_all);
    stuck(&stage.bench.taps);
    let Stage { bench, started, pool, .. } = stage;
    let Bench { port, taps, .. } = bench;
    drop(port);
    drop(started);
    assert_eq!(pool.available(), pool.capacity() - 16);
    drop(taps);
    drop(chains);
}

/// What a control queue's device does with a command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Answer {
    Never,
    Byte(u8),
    /// Used, and no answer written.
    Nothing,
    WrongId,
    Twice,
    TooLong,
}

fn a_control_queue_that_lies(kind: &Kind, answer: Answer) {
    let mut stage = Stage::new(kind);
    let index = control_queue(1).unwrap();
    let mut ring = DeviceRing::new(stage.bench.taps.queue(index), is_packed(kind));
    // The device was honest so far, and used some of the ring.
    let used = Arc::new(AtomicU64::new(0));
    let counter = Arc::clone(&used);
    stage.with_bus(|bus| ring.skip_used(bus));
    stage.bench.taps.play(move |bus| {
        if answer == Answer::Never {
            return;
        }
        while let Ok(Some(chain)) = ring.try_take(bus) {
            counter.fetch_add(1, Ordering::Relaxed);
            match answer {
                Answer::Byte(byte) => {
                    chain.write(bus, &[byte]).unwrap();
                    ring.give(bus, &chain, 1);
                }
                Answer::Nothing => ring.give(bus, &chain, 0),
                Answer::WrongId => ring.give_raw(bus, 0xfff0, 1, chain.entries),
                Answer::Twice => {
                    chain.write(bus, &[0]).unwrap();
                    ring.give(bus, &chain, 1);
                    ring.give(bus, &chain, 1);
                }
                Answer::TooLong => ring.give(bus, &chain, 2),
                Answer::Never => {}
            }
        }
    });
    let begin = Instant::now();
    let first = stage.bench.port.set_all_multicast(true);
    let second = stage.bench.port.set_mac_filter(&[MacAddr([2, 0, 0, 0, 0, 8])]);
    assert!(begin.elapsed() < SOON, "{answer:?}: {:?}", begin.elapsed());
    match answer {
        Answer::Byte(0) => {
            first.unwrap();
            second.unwrap();
        }
        Answer::Never => {
            assert_eq!(first.unwrap_err().kind(), ErrorKind::Timeout);
            assert!(second.is_err());
        }
        Answer::Twice => {
            // Both may have come before it looked.
            assert!(first.is_ok() || first.unwrap_err().kind() == ErrorKind::Device);
            assert!(second.is_err(), "an answer before the question");
        }
        Answer::Nothing | Answer::Byte(_) | Answer::WrongId | Answer::TooLong => {
            assert_eq!(first.unwrap_err().kind(), ErrorKind::Device, "{answer:?}");
            assert!(second.is_err(), "{answer:?}");
        }
    }
    assert!((answer == Answer::Never) == (used.load(Ordering::Relaxed) == 0));
    stage.recovers();
}

#[test]
fn statistics_are_believed_only_where_they_can_be_true() {
    let header = |kind: u8, queue: u8, size: u8| vec![kind, 0, queue, 0, 0, 0, size, 0];
    let right = || [header(0, 0, 56), vec![0xff; 48]].concat();
    let all = vec![0xff; 8];
    for kind in [&SPLIT, &PACKED] {
        let mut stage = Stage::new(kind);
        let ring = DeviceRing::new(stage.bench.taps.queue(control_queue(1).unwrap()), is_packed(kind));
        let ring = Arc::new(Mutex::new(ring));
        stage.with_bus(|bus| ring.lock().unwrap().skip_used(bus));
        for (n, (results, may)) in [
            // No types at all, half of the types, and then nothing of what was asked for.
            (vec![vec![0; 8]], true),
            (vec![all[..4].to_vec()], false),
            (vec![all.clone(), vec![]], false),
            (vec![all.clone(), right()[..55].to_vec()], false),
            (vec![all.clone(), [header(16, 0, 56), vec![0; 48]].concat()], false),
            (vec![all.clone(), [header(0, 2, 56), vec![0; 48]].concat()], false),
            (vec![all.clone(), [header(0, 0, 55), vec![0; 48]].concat()], false),
            (vec![all.clone(), right(), right()], false),
        ]
        .into_iter()
        .enumerate()
        {
            let mut results = results.into_iter();
            let ring = Arc::clone(&ring);
            stage.bench.taps.play(move |bus| {
                let mut ring = ring.lock().unwrap();
                while let Ok(Some(chain)) = ring.try_take(bus) {
                    let answer = [vec![0], results.next().expect("it was asked for too much")].concat();
                    chain.write(bus, &answer).unwrap();
                    ring.give(bus, &chain, answer.len() as u32);
                }
            });
            match stage.bench.port.device_drops() {
                Ok(dropped) => assert!(may && dropped.is_none(), "{kind:?}, case {n}: {dropped:?}"),
                Err(error) => {
                    assert!(!may && error.kind() == ErrorKind::Device, "{kind:?}, case {n}: {error}");
                }
            }
        }
        stage.recovers();
    }
}

/// The driver waits seconds for a device here and there: all of these at the same time.
#[test]
fn a_device_that_does_not_answer_is_given_up_in_time() {
    let begin = Instant::now();
    std::thread::scope(|scope| {
        scope.spawn(a_device_that_does_not_reset_is_not_opened);
        scope.spawn(|| a_device_that_does_not_stop_keeps_its_memory(&SPLIT));
        scope.spawn(|| a_device_that_does_not_stop_keeps_its_memory(&PACKED));
        scope.spawn(a_removed_device_is_given_up);
        scope.spawn(a_port_dropped_on_a_stuck_device_leaks);
        for kind in [&SPLIT, &PACKED] {
            scope.spawn(|| a_control_queue_that_lies(kind, Answer::Never));
            scope.spawn(|| {
                for answer in [
                    Answer::Byte(0),
                    Answer::Byte(1),
                    Answer::Byte(0xff),
                    Answer::Nothing,
                    Answer::WrongId,
                    Answer::Twice,
                    Answer::TooLong,
                ] {
                    a_control_queue_that_lies(kind, answer);
                }
            });
        }
    });
    assert!(begin.elapsed() < Duration::from_secs(20), "{:?}", begin.elapsed());
}

/// The link's word may be anything at any time.
#[test]
fn a_link_that_flickers_disturbs_nothing() {
    let bench = SPLIT.open(&Wire::echo(1));
    let flicker = Arc::new(AtomicBool::new(true));
    let on = Arc::clone(&flicker);
    let mut random = Random(6);
    bench.taps.lie_on_read(move |which, honest| {
        let lies = matches!(which, Register::Device(_) | Register::Common(common::CONFIG_GENERATION));
        if lies && on.load(Ordering::Relaxed) { random.next() } else { honest }
    });
    flicker.store(false, Ordering::Relaxed);
    let mut bench = bench;
    let pool = pool(128);
    let mut started = bench.start(&Config { rx_depth: 16, ..Config::new(&pool) });
    flicker.store(true, Ordering::Relaxed);
    let begin = Instant::now();
    for _ in 0..30 {
        bench.port.link();
    }
    assert!(begin.elapsed() < SOON);
    flicker.store(false, Ordering::Relaxed);
    bench.works(&mut started, &pool);
    bench.stop(started, &[&pool]);
}

/// What the header says of a checksum is believed only where it was agreed on.
#[test]
fn a_checksum_that_was_not_agreed_on_is_unknown() {
    let mut stage = Stage::new(&SPLIT);
    for flags in [header_flag::DATA_VALID, header_flag::NEEDS_CSUM, 0xff] {
        let chain = stage.on_rx(DeviceRing::take).unwrap();
        let bytes = headed(Header { flags, ..one_buffer() }, &numbered(1, 1, 100));
        stage.with_bus(|bus| chain.write(bus, &bytes)).unwrap();
        stage.on_rx(|ring, bus| ring.give(bus, &chain, bytes.len() as u32));
        assert_eq!(stage.receive()[0].checksum(), underpass::Checksum::Unknown);
    }
    stage.recovers();
}
