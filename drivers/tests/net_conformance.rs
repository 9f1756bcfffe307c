//! One suite that every network port passes: the software virtio-net with split and packed rings, with and without the
//! features that change how packets travel, and with its device run by the worker, by the test and by threads.
//!
//! A test of the suite takes a [`Kind`] and is run for each. The other end of the cable is the test's: it sees what the
//! port sends, and sends what the port is to receive. What a frame must look like comes from `rig::frames`, which has
//! nothing in common with the code under test.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "rig/net/mod.rs"]
mod rig;

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use proptest::prelude::*;
use proptest::test_runner::{Config as ProptestConfig, TestRunner};
use underpass::net::{Config, FRAME_OVERHEAD, MIN_FRAME, MacAddr, Offloads, Rss, RxQueue, State, Values};
use underpass::{Burst, Checksum, ErrorKind, Packet, Pool, Transport, TxOffload};
use underpass_drivers::virtio_net::model::peer::{Offload, Segment, SegmentKind};
use underpass_drivers::virtio_net::spec::Features;

use rig::frames::{Field, Flow, KEY, MIN_NUMBERED, identify, numbered, toeplitz};
use rig::virtio::{Kind, inline, stepped, threads};
use rig::wire::OnWire;
use rig::{Bench, PATIENCE, Random, Wire, burst, chain, contents, packet, pool, small_pool, until};

macro_rules! suite {
    ($($test:ident),* $(,)?) => {
        macro_rules! kind {
            ($name:ident: $kind:expr) => {
                mod $name {
                    use super::*;
                    const KIND: Kind = $kind;
                    $(#[test] fn $test() { super::$test(&KIND); })*
                }
            };
        }
    };
}

suite![
    a_port_says_what_it_can_do,
    it_starts_and_stops_with_other_configurations,
    what_is_lent_out_keeps_the_port_busy,
    impossible_configurations_are_refused,
    frames_of_every_size_come_back_byte_for_byte,
    chains_are_sent_as_one_frame,
    a_frame_may_fill_several_buffers,
    a_full_ring_keeps_order_and_loses_nothing,
    what_does_not_fit_stays_the_callers,
    a_full_burst_receives_nothing,
    a_dry_pool_delays_packets_and_loses_none,
    what_can_not_be_sent_is_dropped_and_counted,
    frames_that_no_port_may_pass_on_are_dropped,
    packets_of_other_pools_are_sent_once_these_are_mapped,
    counters_are_exact_and_outlive_a_restart,
    packets_not_sent_are_counted_when_it_stops,
    received_checksums_are_judged,
    checksums_are_completed,
    long_payloads_are_segmented,
    joined_segments_are_received,
    offloads_that_were_not_granted_are_refused,
    packets_are_distributed_by_their_hash,
    addresses_are_filtered,
    vlans_are_filtered,
    vlan_tags_are_taken_out_and_put_in,
    the_link_goes_down_and_up,
    waiting_ends_with_a_packet_or_in_time,
    queues_work_on_threads_of_their_own,
    a_device_that_needs_a_reset_gets_one,
    a_port_can_be_dropped_before_its_queues,
    a_pool_can_be_dropped_first,
    a_panic_gives_the_queues_back,
    random_schedules,
];

kind!(split: Kind::new(inline, false, &[Features::RING_PACKED]));
kind!(split_stepped: Kind::new(stepped, true, &[Features::RING_PACKED, Features::IN_ORDER]));
kind!(split_threads: Kind::new(threads, false, &[Features::RING_PACKED, Features::EVENT_IDX]));
kind!(split_unmerged: Kind::new(inline, true, &[
    Features::RING_PACKED,
    Features::MRG_RXBUF,
    Features::INDIRECT_DESC,
]));
kind!(packed: Kind::new(inline, true, &[]));
kind!(packed_stepped: Kind::new(stepped, true, &[Features::IN_ORDER]));
kind!(packed_threads: Kind::new(threads, true, &[Features::EVENT_IDX]));
kind!(packed_unmerged: Kind::new(inline, false, &[
    Features::MRG_RXBUF,
    Features::INDIRECT_DESC,
    Features::IN_ORDER,
]));
// What it is not notified of the device does not see.
kind!(split_notified: Kind { notified: true, ..Kind::new(inline, false, &[Features::RING_PACKED]) });
kind!(packed_notified: Kind { notified: true, ..Kind::new(stepped, false, &[Features::EVENT_IDX]) });
// As little as a device may have.
kind!(bare: Kind::new(inline, true, &[Features(!(Features::VERSION_1.0 | Features::ACCESS_PLATFORM.0))]));

/// A port on a wire that gives back what is sent.
fn echo(kind: &Kind) -> Bench {
    kind.open(&Wire::echo(1))
}

/// One queue each way, of 64 packets.
fn config(pool: &Pool) -> Config {
    Config { rx_depth: 64, tx_depth: 64, ..Config::new(pool) }
}

fn a_port_says_what_it_can_do(kind: &Kind) {
    let mut bench = kind.open(&Wire::new(4));
    let port = &mut *bench.port;
    let info = port.info();
    assert!(!port.name().is_empty() && !port.driver().is_empty());
    assert!(info.max_rx_queues >= 1 && info.max_tx_queues >= 1, "{info:?}");
    assert!(info.max_rx_depth >= 64 && info.max_tx_depth >= 64, "{info:?}");
    assert!(info.max_mtu >= 1500, "{info:?}");
    let rss = info.offloads.contains(Offloads::RSS);
    assert_eq!(rss, info.rss_key_len >= 40 && info.rss_table_len.is_power_of_two(), "{info:?}");
    if info.offloads.contains(Offloads::RX_LARGE) {
        assert!(info.offloads.contains(Offloads::RX_CHECKSUM), "{info:?}");
    }
    assert!(!port.mac().is_multicast() && port.mac() != MacAddr([0; 6]), "{}", port.mac());
    assert!(port.link().up);
    let (rx, tx) = port.counters();
    assert!(rx.is_empty() && tx.is_empty(), "it has counted before its first start");
    assert!(port.next_error().is_none() && port.next_fault().is_none());
    assert_eq!(port.info(), info);
}

fn it_starts_and_stops_with_other_configurations(kind: &Kind) {
    let mut bench = kind.open(&Wire::echo(4));
    let info = bench.port.info();
    let pool = pool(2048);
    let most = info.max_rx_queues.min(info.max_tx_queues);
    for (queues, depth, mtu) in [
        (1, 64, None),
        (most, 0, Some(1400)),
        (1, 17, Some(info.max_mtu.min(1900))),
        (2, 128, Some(576)),
        (0, 0, None),
    ] {
        let queues = queues.min(most);
        let config = Config {
            port: 3 + queues as u16,
            rx_queues: queues,
            tx_queues: queues,
            rx_depth: depth,
            tx_depth: depth,
            mtu,
            ..Config::new(&pool)
        };
        let mut started = bench.start(&config);
        assert_eq!(started.mtu, mtu.unwrap_or(1500).min(info.max_mtu));
        assert_eq!(started.offloads, Offloads::NONE);
        for (n, (rx, tx)) in started.rx.iter().zip(&started.tx).enumerate() {
            assert_eq!((rx.index(), tx.index()), (n as u16, n as u16));
            assert_eq!((rx.state(), tx.state()), (State::Running, State::Running));
        }
        assert!(pool.available() < pool.capacity(), "the device has buffers");
        for n in 0..started.tx.len() {
            let frame = numbered(n as u16, 7, 500);
            bench.send(&mut *started.tx[n], [packet(&pool, &frame)]);
            bench.flush(&mut *started.tx[n]);
            let back = bench.drain(&mut started.rx);
            assert_eq!(back.len(), 1, "{queues} queues, depth {depth}");
            assert_eq!(contents(&back[0]), frame);
            assert_eq!(back[0].port(), config.port);
            assert!(usize::from(back[0].queue()) < queues.max(1));
        }
        bench.stop(started, &[&pool]);
        assert_eq!(bench.port.info(), info, "a start changed what it can do");
    }
}

fn what_is_lent_out_keeps_the_port_busy(kind: &Kind) {
    let mut bench = echo(kind);
    let (pool, other) = (pool(256), pool(16));
    let mut started = bench.start(&config(&pool));
    let busy = |result: underpass::Result<()>| assert_eq!(result.unwrap_err().kind(), ErrorKind::Busy);
    busy(bench.port.start(&config(&pool)).map(drop));
    busy(bench.port.map(&other));
    busy(bench.port.unmap(&pool));
    assert_eq!(started.rx[0].state(), State::Running);
    bench.works(&mut started, &pool);

    busy(bench.port.stop());
    let (rx, tx) = (&mut *started.rx[0], &mut *started.tx[0]);
    assert_eq!((rx.state(), tx.state()), (State::Quiesced, State::Quiesced));
    let mut packets = burst([packet(&pool, &numbered(1, 1, 100))]);
    assert_eq!((tx.tx_burst(&mut packets), packets.len()), (0, 1), "it moves nothing any more");
    assert_eq!(rx.rx_burst(&mut Burst::with_capacity(4)), 0);
    drop(packets);
    started.rx.clear();
    busy(bench.port.stop());
    busy(bench.port.start(&config(&pool)).map(drop));
    bench.stop(started, &[&pool, &other]);

    // All again, by quiesce.
    let mut started = bench.start(&config(&pool));
    bench.works(&mut started, &pool);
    bench.port.quiesce();
    assert_eq!((started.rx[0].state(), started.tx[0].state()), (State::Quiesced, State::Quiesced));
    bench.stop(started, &[&pool]);
    let mut started = bench.start(&config(&pool));
    bench.works(&mut started, &pool);
    bench.stop(started, &[&pool]);
}

fn impossible_configurations_are_refused(kind: &Kind) {
    let mut bench = kind.open(&Wire::echo(2));
    let info = bench.port.info();
    let (pool, tiny, short) = (pool(512), pool(3), small_pool(512, 200));
    let good = Config { rx_queues: 1, ..config(&pool) };
    let table = |table: Vec<u16>| Config {
        rx_queues: 2,
        tx_queues: 2,
        offloads: Offloads::RSS,
        rss: Some(Rss { key: vec![1; info.rss_key_len], table }),
        ..config(&pool)
    };
    let mut cases = vec![
        (ErrorKind::InvalidInput, Config { rx_queues: info.max_rx_queues + 1, ..good.clone() }),
        (ErrorKind::InvalidInput, Config { tx_queues: info.max_tx_queues + 1, ..good.clone() }),
        (ErrorKind::InvalidInput, Config { rx_queues: usize::MAX, ..good.clone() }),
        (ErrorKind::InvalidInput, Config { rx_depth: info.max_rx_depth + 1, ..good.clone() }),
        (ErrorKind::InvalidInput, Config { tx_depth: info.max_tx_depth + 1, ..good.clone() }),
        (ErrorKind::InvalidInput, Config { tx_depth: usize::MAX, ..good.clone() }),
        (ErrorKind::InvalidInput, Config { pools: Vec::new(), ..good.clone() }),
        (ErrorKind::InvalidInput, Config { pools: vec![tiny.clone()], ..good.clone() }),
        (ErrorKind::InvalidInput, Config { pools: vec![short.clone()], ..good.clone() }),
    ];
    if info.max_mtu < u16::MAX {
        cases.push((ErrorKind::InvalidInput, Config { mtu: Some(info.max_mtu + 1), ..good.clone() }));
    }
    for (offload, name) in Offloads::NAMES {
        if !info.offloads.contains(offload) {
            let (required, offloads) = (offload, Offloads::NONE);
            cases.push((ErrorKind::Unsupported, Config { required, offloads, ..good.clone() }));
            // Wanted but not needed, it starts without.
            let started = bench.start(&Config { offloads: offload, ..good.clone() });
            assert!(!started.offloads.contains(offload), "{name} was granted");
            bench.stop(started, &[&pool]);
        }
    }
    if info.offloads.contains(Offloads::RSS) {
        cases.push((ErrorKind::InvalidInput, table(vec![])));
        cases.push((ErrorKind::InvalidInput, table(vec![0, 1, 0])));
        cases.push((ErrorKind::InvalidInput, table(vec![0, 1, 0, 2])));
        cases.push((ErrorKind::InvalidInput, table(vec![0; 2 * info.rss_table_len])));
        let mut short = table(vec![0, 1]);
        short.rss.as_mut().unwrap().key.pop();
        cases.push((ErrorKind::InvalidInput, short));
    }
    for (why, config) in cases {
        let error = bench.port.start(&config).map(drop).unwrap_err();
        assert_eq!(error.kind(), why, "{error}: {config:?}");
        assert!(error.to_string().contains(bench.port.name()), "{error}: on which device?");
        assert!(error.mend_text().is_some(), "{error}: and now?");
        for pool in [&pool, &tiny, &short] {
            assert_eq!(pool.available(), pool.capacity(), "{error}: buffers are lost");
        }
    }
    let mut started = bench.start(&good);
    bench.works(&mut started, &pool);
    bench.stop(started, &[&pool]);
}

fn frames_of_every_size_come_back_byte_for_byte(kind: &Kind) {
    let mut bench = echo(kind);
    let pool = pool(256);
    let mut started = bench.start(&config(&pool));
    let most = usize::from(started.mtu) + FRAME_OVERHEAD;
    let sizes: Vec<_> = (MIN_FRAME..=most).collect();
    for sizes in sizes.chunks(64) {
        let frames: Vec<_> = sizes.iter().map(|size| numbered(1, *size as u64, *size)).collect();
        let packets: Vec<_> = frames.iter().map(|frame| packet(&pool, frame)).collect();
        for (sent, back) in frames.iter().zip(bench.echo(&mut started, packets)) {
            assert_eq!(back.len(), sent.len());
            assert!(contents(&back) == *sent, "a frame of {} bytes came back changed", sent.len());
            assert_eq!((back.checksum(), back.rss_hash(), back.vlan()), (Checksum::Unknown, None, None));
        }
    }
    bench.stop(started, &[&pool]);
}

fn chains_are_sent_as_one_frame(kind: &Kind) {
    let mut bench = kind.open(&Wire::new(1));
    let pool = pool(512);
    let mut started = bench.start(&config(&pool));
    let tx = &mut *started.tx[0];
    let mut random = Random(3);
    let mut frames = Vec::new();
    for turn in 0..150_u64 {
        let frame = numbered(2, turn, MIN_FRAME + random.below(1500));
        let mut cuts: Vec<_> = (0..random.below(8)).map(|_| random.below(frame.len() + 1)).collect();
        cuts.sort_unstable();
        // A segment without bytes may be anywhere in the chain: half of the turns keep them out.
        if random.coin() {
            cuts.dedup();
            cuts.retain(|cut| *cut != 0 && *cut != frame.len());
        }
        bench.send(tx, [chain(&pool, &frame, &cuts)]);
        frames.push(frame);
    }
    bench.flush(tx);
    assert!(bench.wire.sent(0) == frames);
    // Far more segments than any device takes.
    bench.send(tx, [chain(&pool, &numbered(2, 0, 600), &(1..301).collect::<Vec<_>>())]);
    bench.send(tx, [packet(&pool, &frames[0])]);
    bench.flush(tx);
    assert!(bench.wire.sent(0) == frames[..1]);
    let (_, counted) = bench.counted();
    assert_eq!((counted.packets, counted.refused, counted.dropped()), (frames.len() as u64 + 1, 1, 1));
    bench.stop(started, &[&pool]);
}

fn a_frame_may_fill_several_buffers(kind: &Kind) {
    let mut bench = kind.open(&Wire::new(1));
    let pool = small_pool(1024, 200);
    let config = Config { offloads: Offloads::RX_SCATTER, ..config(&pool) };
    if !bench.port.info().offloads.contains(Offloads::RX_SCATTER) {
        assert_eq!(bench.port.start(&config).map(drop).unwrap_err().kind(), ErrorKind::InvalidInput);
        return;
    }
    let mut started = bench.start(&config);
    assert!(started.offloads.contains(Offloads::RX_SCATTER));
    let most = usize::from(started.mtu) + FRAME_OVERHEAD;
    let mut random = Random(5);
    for round in 0..20 {
        let frames: Vec<_> = (0..40)
            .map(|n| numbered(1, n, if n == round { most } else { MIN_FRAME + random.below(most - 13) }))
            .collect();
        frames.iter().for_each(|frame| bench.wire.send(0, frame.clone()));
        for (sent, back) in frames.iter().zip(bench.receive(&mut *started.rx[0], frames.len())) {
            assert_eq!(back.len(), sent.len());
            assert!(contents(&back) == *sent);
            assert_eq!(back.segments().count() == 1, sent.len() <= 200, "{} bytes: {back:?}", sent.len());
        }
    }
    let (counted, _) = bench.counted();
    assert_eq!((counted.packets, counted.dropped()), (800, 0));
    bench.stop(started, &[&pool]);
}

fn a_full_ring_keeps_order_and_loses_nothing(kind: &Kind) {
    const FRAMES: u64 = 3000;
    let mut bench = echo(kind);
    let pool = pool(512);
    let mut started = bench.start(&Config { rx_depth: 32, tx_depth: 16, ..config(&pool) });
    let mut random = Random(17);
    let (mut made, mut back) = (0, 0);
    let (mut waiting, mut received) = (VecDeque::new(), Burst::with_capacity(64));
    let mut full = 0;
    until("all frames are back", || {
        while made < FRAMES
            && waiting.len() < 64
            && let Some(mut packet) = pool.alloc()
        {
            let frame = numbered(4, made, MIN_NUMBERED + random.below(1400));
            packet.append(frame.len()).unwrap().copy_from_slice(&frame);
            waiting.push_back(packet);
            made += 1;
        }
        // Bursts of any size, and at times a wire that is held up.
        bench.wire.block(random.below(4) == 0);
        let mut part = burst(waiting.drain(..random.below(waiting.len() + 1)));
        let before = part.len();
        assert_eq!(started.tx[0].tx_burst(&mut part) + part.len(), before);
        full += u32::from(!part.is_empty());
        while let Some(packet) = part.pop() {
            waiting.push_front(packet);
        }
        bench.step();
        received.clear();
        started.rx[0].rx_burst(&mut received);
        for packet in received.drain_all() {
            assert_eq!(identify(&contents(&packet)), (4, back));
            back += 1;
        }
        back == FRAMES
    });
    assert!(full > 0, "the ring was never full");
    bench.wire.block(false);
    bench.flush(&mut *started.tx[0]);
    assert_eq!(bench.drain(&mut started.rx).len(), 0, "more came than was sent");
    let (rx, tx) = bench.counted();
    assert_eq!((rx.packets, tx.packets, rx.bytes), (FRAMES, FRAMES, tx.bytes));
    assert_eq!((rx.dropped(), tx.dropped()), (0, 0));
    bench.stop(started, &[&pool]);
}

fn what_does_not_fit_stays_the_callers(kind: &Kind) {
    let mut bench = kind.open(&Wire::new(1));
    let pool = pool(512);
    let mut started = bench.start(&Config { tx_depth: 32, ..config(&pool) });
    let tx = &mut *started.tx[0];
    for size in [1, 2, 31, 32, 33, 64, 200] {
        bench.wire.block(true);
        let frames: Vec<_> = (0..size).map(|n| numbered(1, n, 100)).collect();
        let mut packets = burst(frames.iter().map(|frame| packet(&pool, frame)));
        let mut taken = 0;
        // A device that sends nothing takes what its ring holds, and a few that it keeps itself.
        for _ in 0..50 {
            let now = tx.tx_burst(&mut packets);
            taken += now;
            assert_eq!(packets.len(), frames.len() - taken);
            bench.step();
        }
        assert!(taken >= frames.len().min(30), "{taken} of {size} taken");
        assert!(taken <= 100, "{taken} taken by a ring of 32");
        for (left, frame) in packets.iter().zip(&frames[taken..]) {
            assert!(left.data() == frame, "others are left than the last");
        }
        bench.wire.block(false);
        bench.send(tx, packets.drain_all().collect::<Vec<_>>());
        bench.flush(tx);
        assert!(bench.wire.sent(0) == frames);
    }
    assert_eq!(tx.tx_burst(&mut Burst::with_capacity(1)), 0, "nothing to send");
    bench.stop(started, &[&pool]);
}

fn a_full_burst_receives_nothing(kind: &Kind) {
    let mut bench = kind.open(&Wire::new(1));
    let pool = pool(256);
    let mut started = bench.start(&config(&pool));
    let rx = &mut *started.rx[0];
    (0..40).for_each(|n| bench.wire.send(0, numbered(3, n, 100)));
    let mut next = 0;
    for size in [0, 1, 2, 3, 5, 8, 13] {
        let mut burst = Burst::with_capacity(size);
        until("a burst fills", || {
            bench.step();
            rx.rx_burst(&mut burst);
            burst.is_full()
        });
        for _ in 0..5 {
            bench.step();
            assert_eq!(rx.rx_burst(&mut burst), 0);
        }
        for packet in burst.drain_all() {
            assert_eq!(identify(packet.data()), (3, next));
            next += 1;
        }
    }
    // What is received goes behind what is there.
    let mut burst = burst([packet(&pool, &[0; 14])]);
    let mut more = Burst::with_capacity(10);
    more.append(&mut burst, 1);
    until("the rest arrives", || {
        bench.step();
        rx.rx_burst(&mut more);
        more.len() == 9
    });
    assert_eq!(more[0].data(), [0; 14]);
    assert_eq!(identify(more[1].data()), (3, next));
    drop(more);
    bench.stop(started, &[&pool]);
}

fn a_dry_pool_delays_packets_and_loses_none(kind: &Kind) {
    const FRAMES: u64 = 300;
    let mut bench = kind.open(&Wire::new(1));
    for (depth, spare) in [(16, 8), (16, 1), (64, 64)] {
        let pool = pool(depth + spare);
        let mut started = bench.start(&Config { rx_depth: depth, ..config(&pool) });
        let before = bench.counted().0;
        (0..FRAMES).for_each(|n| bench.wire.send(0, numbered(1, n, 64 + n as usize)));
        let (mut held, mut seen) = (VecDeque::new(), 0);
        let mut burst = Burst::with_capacity(32);
        let mut random = Random(9);
        until("all frames arrive", || {
            bench.step();
            let room = burst.room();
            assert!(started.rx[0].rx_burst(&mut burst) <= room);
            for packet in burst.drain_all() {
                assert_eq!(identify(packet.data()), (1, seen));
                seen += 1;
                held.push_back(packet);
            }
            assert!(held.len() <= pool.capacity());
            // Only once the device has no buffer left it gets some again, few at a time.
            if pool.available() == 0 && held.len() == pool.capacity() {
                held.drain(..1 + random.below(held.len()));
            }
            seen == FRAMES
        });
        drop(held);
        let after = bench.counted().0;
        assert!(after.no_buffers > before.no_buffers, "nobody counted that buffers were short");
        assert_eq!((after.packets - before.packets, after.dropped()), (FRAMES, 0));
        // It works on with all buffers.
        for round in 0..20 {
            (0..depth as u64).for_each(|n| bench.wire.send(0, numbered(2, round, 100 + n as usize)));
            bench.receive(&mut *started.rx[0], depth);
        }
        bench.stop(started, &[&pool]);
    }
}

fn what_can_not_be_sent_is_dropped_and_counted(kind: &Kind) {
    let mut bench = kind.open(&Wire::new(1));
    let (pool, foreign) = (pool(256), pool(64));
    let mut started = bench.start(&config(&pool));
    let tx = &mut *started.tx[0];
    let most = usize::from(started.mtu) + FRAME_OVERHEAD;
    let good = |n: u64| packet(&pool, &numbered(1, n, 80));
    let long = packet(&pool, &vec![1; most + 1]);
    let long_chain = chain(&pool, &vec![2; 4000], &[1400, 2800]);
    let bad_tail = {
        let mut packet = packet(&pool, &numbered(1, 9, 80));
        packet.chain(self::packet(&foreign, &[7; 50]));
        packet
    };
    bench.send(
        tx,
        [
            good(0),
            pool.alloc().unwrap(),
            packet(&pool, &[3; MIN_FRAME - 1]),
            chain(&pool, &[4; 13], &[6]),
            good(1),
            long,
            long_chain,
            packet(&foreign, &numbered(1, 8, 80)),
            bad_tail,
            good(2),
        ],
    );
    bench.flush(tx);
    let sent: Vec<_> = bench.wire.sent(0).iter().map(|frame| identify(frame).1).collect();
    assert_eq!(sent, [0, 1, 2]);
    let (_, counted) = bench.counted();
    let expected = Values { packets: 3, bytes: 240, runts: 3, oversize: 2, refused: 2, ..Values::default() };
    assert_eq!(counted, expected);
    assert!(bench.port.next_fault().is_none(), "the device saw one of them");
    assert_eq!((foreign.available(), foreign.capacity()), (64, 64));
    bench.stop(started, &[&pool, &foreign]);
}

fn frames_that_no_port_may_pass_on_are_dropped(kind: &Kind) {
    let mut bench = kind.open(&Wire::new(1));
    let pool = pool(256);
    let mut started = bench.start(&config(&pool));
    let most = usize::from(started.mtu) + FRAME_OVERHEAD;
    let frames =
        [numbered(1, 0, 100), vec![1; 1], vec![2; 13], vec![3; most + 1], vec![4; 2040], numbered(1, 1, 100)];
    for frame in frames {
        bench.wire.send(0, frame);
    }
    // Where the device itself drops them, the port has nothing to count.
    let arrived: Vec<_> =
        bench.drain(&mut started.rx).iter().map(|packet| identify(packet.data()).1).collect();
    assert_eq!(arrived, [0, 1]);
    let (counted, _) = bench.counted();
    assert_eq!((counted.packets, counted.bytes), (2, 200));
    assert!(counted.runts <= 2 && counted.oversize <= 2 && counted.errors == 0, "{counted:?}");
    bench.stop(started, &[&pool]);
}

fn packets_of_other_pools_are_sent_once_these_are_mapped(kind: &Kind) {
    let mut bench = kind.open(&Wire::new(1));
    let (pool, other) = (pool(256), pool(64));
    assert_eq!(bench.port.unmap(&other).unwrap_err().kind(), ErrorKind::NotFound);
    let mut sent = 0;
    for mapped in [false, true, true, false, true] {
        match (mapped, sent) {
            (true, _) => bench.port.map(&other).unwrap(),
            (false, 0) => {}
            (false, _) => bench.port.unmap(&other).unwrap(),
        }
        let mut started = bench.start(&config(&pool));
        let before = bench.counted().1;
        bench.send(&mut *started.tx[0], [packet(&other, &numbered(1, 1, 90))]);
        bench.flush(&mut *started.tx[0]);
        let after = bench.counted().1;
        assert_eq!(after.refused - before.refused, u64::from(!mapped));
        assert_eq!(bench.wire.sent(0).len(), usize::from(mapped));
        bench.stop(started, &[&pool, &other]);
        sent += 1;
    }
    bench.port.unmap(&other).unwrap();
    assert_eq!(bench.port.unmap(&other).unwrap_err().kind(), ErrorKind::NotFound);
}

fn counters_are_exact_and_outlive_a_restart(kind: &Kind) {
    let mut bench = kind.open(&Wire::new(2));
    let info = bench.port.info();
    let queues = info.max_rx_queues.min(info.max_tx_queues).min(2);
    let pool = pool(512);
    let config = Config { rx_queues: queues, tx_queues: queues, ..config(&pool) };
    let mut random = Random(1);
    let mut expected_tx = vec![(0, 0); queues];
    let (mut arrived, mut arrived_bytes) = (vec![(0, 0); queues], 0);
    let mut held = None;
    for _ in 0..3 {
        let mut started = bench.start(&config);
        let (rx, tx) = bench.port.counters();
        assert_eq!((rx.len(), tx.len()), (queues, queues));
        for _ in 0..6 {
            for (queue, expected) in expected_tx.iter_mut().enumerate() {
                let sizes: Vec<_> = (0..random.below(40)).map(|_| 60 + random.below(1000)).collect();
                *expected =
                    (expected.0 + sizes.len() as u64, expected.1 + sizes.iter().sum::<usize>() as u64);
                let packets: Vec<_> =
                    sizes.iter().map(|size| packet(&pool, &numbered(1, 1, *size))).collect();
                bench.send(&mut *started.tx[queue], packets);
                bench.flush(&mut *started.tx[queue]);
                for pair in 0..queues {
                    let frame = numbered(pair as u16, 1, 60 + random.below(1000));
                    arrived_bytes += frame.len() as u64;
                    bench.wire.send(pair, frame);
                }
            }
            for packet in bench.drain(&mut started.rx) {
                let (packets, bytes) = &mut arrived[usize::from(packet.queue())];
                (*packets, *bytes) = (*packets + 1, *bytes + packet.len() as u64);
            }
        }
        let values = |counters: &[Arc<underpass::net::Counters>]| -> Vec<_> {
            counters.iter().map(|counters| counters.values()).collect()
        };
        let only = |(packets, bytes)| Values { packets, bytes, ..Values::default() };
        assert_eq!(values(&tx), expected_tx.iter().copied().map(only).collect::<Vec<_>>());
        assert_eq!(values(&rx), arrived.iter().copied().map(only).collect::<Vec<_>>());
        assert_eq!(arrived.iter().map(|(_, bytes)| bytes).sum::<u64>(), arrived_bytes);
        held.get_or_insert(tx);
        bench.stop(started, &[&pool]);
    }
    let held = held.unwrap();
    assert_eq!(held[0].values().packets, expected_tx[0].0, "those of the first start go on counting");
}

fn packets_not_sent_are_counted_when_it_stops(kind: &Kind) {
    let mut bench = kind.open(&Wire::new(1));
    let pool = pool(256);
    let mut before = Values::default();
    for quiet in [false, true] {
        let mut started = bench.start(&config(&pool));
        bench.wire.block(true);
        bench.send(&mut *started.tx[0], (0..20).map(|n| packet(&pool, &numbered(1, n, 100))));
        for _ in 0..5 {
            bench.step();
            assert!(started.tx[0].reclaim() > 0, "the wire takes nothing");
        }
        if quiet {
            bench.port.quiesce();
        }
        bench.stop(started, &[&pool]);
        let after = bench.counted().1;
        // Some may be with the device, which says that it has sent them.
        assert_eq!(after.packets + after.unsent - before.packets - before.unsent, 20, "{after:?}");
        assert!(after.unsent - before.unsent > 0, "{after:?}");
        before = after;
        bench.wire.block(false);
        let mut started = bench.start(&config(&pool));
        bench.send(&mut *started.tx[0], [packet(&pool, &numbered(1, 77, 100))]);
        bench.flush(&mut *started.tx[0]);
        let sent = bench.wire.sent(0);
        assert!(identify(sent.last().unwrap()).1 == 77 && sent.len() <= 21);
        before.packets += 1;
        bench.stop(started, &[&pool]);
    }
}

/// Flows of each kind that has a transport checksum.
fn flows() -> [Flow; 5] {
    [
        Flow::new(false, false, 1),
        Flow::new(false, true, 2),
        Flow::new(true, false, 3),
        Flow::new(true, true, 4),
        Flow { vlan: Some(0x2005), ..Flow::new(false, true, 5) },
    ]
}

fn received_checksums_are_judged(kind: &Kind) {
    let mut bench = kind.open(&Wire::new(1));
    let pool = pool(256);
    for offloads in [Offloads::NONE, Offloads::RX_CHECKSUM] {
        let mut started = bench.start(&Config { offloads, ..config(&pool) });
        let granted = started.offloads.contains(Offloads::RX_CHECKSUM);
        assert_eq!(
            granted,
            (bench.port.info().offloads & offloads).contains(Offloads::RX_CHECKSUM) && !offloads.is_empty()
        );
        let mut receive = |frame: OnWire| {
            bench.wire.send_unfinished(0, frame);
            let packet = bench.receive(&mut *started.rx[0], 1).remove(0);
            (packet.checksum(), contents(&packet))
        };
        let plain = |bytes: Vec<u8>| OnWire { bytes, offload: Offload::default() };
        for (flow, size) in
            flows().into_iter().flat_map(|flow| [1, 2, 100, 1001].map(|size| (flow.clone(), size)))
        {
            let payload: Vec<u8> = (0..size).map(|n| (n * 7 + size) as u8).collect();
            let with = |field| Flow { field, ..flow.clone() }.frame(&payload);
            let (checksum, bytes) = receive(plain(with(Field::Right)));
            assert!(bytes == with(Field::Right));
            if flow.vlan.is_none() {
                assert_eq!(checksum, if granted { Checksum::Good } else { Checksum::Unknown }, "{flow:?}");
            } else {
                assert!(matches!(checksum, Checksum::Good | Checksum::Unknown));
            }

            let (checksum, bytes) = receive(plain(with(Field::Wrong)));
            assert!(bytes == with(Field::Wrong), "a wrong checksum is passed on as it is");
            assert!(matches!(checksum, Checksum::Bad | Checksum::Unknown), "{checksum:?}: {flow:?}");

            let start = (flow.l2_len() + flow.l3_len()) as u16;
            let offload = Offload { checksum: Some((start, flow.checksum_offset() as u16)), segment: None };
            let (checksum, bytes) = receive(OnWire { bytes: with(Field::Pseudo), offload });
            if granted && checksum == Checksum::Partial {
                assert!(bytes == with(Field::Pseudo));
            } else {
                assert!(
                    checksum != Checksum::Partial && bytes == with(Field::Right),
                    "{checksum:?}: {flow:?}"
                );
            }
        }
        // No transport at all.
        let (checksum, _) = receive(plain(numbered(1, 1, 40)));
        assert_eq!(checksum, Checksum::Unknown);
        bench.stop(started, &[&pool]);
    }
}

fn asks(flow: &Flow, segment: u16) -> TxOffload {
    TxOffload {
        l2_len: flow.l2_len() as u8,
        l3_len: flow.l3_len() as u16,
        l4_len: flow.l4_len() as u8,
        ipv6: flow.v6,
        transport: if flow.tcp { Transport::Tcp } else { Transport::Udp },
        ip_checksum: false,
        l4_checksum: true,
        segment,
    }
}

fn checksums_are_completed(kind: &Kind) {
    let mut bench = kind.open(&Wire::finishing(1));
    let pool = pool(256);
    let mut started = bench.start(&Config { offloads: Offloads::TX_CHECKSUM, ..config(&pool) });
    if !started.offloads.contains(Offloads::TX_CHECKSUM) {
        assert!(!bench.port.info().offloads.contains(Offloads::TX_CHECKSUM));
        return;
    }
    let tx = &mut *started.tx[0];
    let mut expected = Vec::new();
    for flow in flows() {
        for size in [1, 2, 3, 64, 999, 1400] {
            let payload: Vec<u8> = (0..size).map(|n| (n * 31 + size) as u8).collect();
            expected.push(flow.frame(&payload));
            let frame = Flow { field: Field::Pseudo, ..flow.clone() }.frame(&payload);
            let cuts: &[usize] =
                if size == 64 { &[flow.headers_len() - 3, flow.headers_len() + 11] } else { &[] };
            let mut packet = chain(&pool, &frame, cuts);
            packet.set_tx_offload(Some(asks(&flow, 0)));
            bench.send(tx, [packet]);
        }
    }
    bench.flush(tx);
    let sent = bench.wire.sent(0);
    assert_eq!(sent.len(), expected.len());
    for (sent, expected) in sent.iter().zip(&expected) {
        assert_eq!(sent, expected);
    }
    // The IPv4 header's checksum is done, or the packet is refused: never sent without.
    let flow = Flow::new(false, true, 8);
    let right = flow.frame(&[5; 100]);
    let mut wrong = Flow { field: Field::Pseudo, ..flow.clone() }.frame(&[5; 100]);
    wrong[24..26].fill(0);
    let mut packet = packet(&pool, &wrong);
    packet.set_tx_offload(Some(TxOffload { ip_checksum: true, ..asks(&flow, 0) }));
    bench.send(tx, [packet]);
    bench.flush(tx);
    let sent = bench.wire.sent(0);
    let refused = bench.counted().1.refused;
    assert!(
        sent == [&right[..]] && refused == 0 || sent.is_empty() && refused == 1,
        "{refused} refused: {sent:x?}"
    );

    // Lengths that lead outside the packet are the sender's lie.
    let refused = bench.counted().1.refused;
    let lies = [
        TxOffload { l2_len: 255, ..asks(&flow, 0) },
        TxOffload { l3_len: u16::MAX, ..asks(&flow, 0) },
        TxOffload { l2_len: 14, l3_len: 20 + 20 + 100 - 17, ..asks(&flow, 0) },
    ];
    for (n, lie) in (1..).zip(lies) {
        let mut packet = self::packet(&pool, &right);
        packet.set_tx_offload(Some(lie));
        bench.send(tx, [packet]);
        bench.flush(tx);
        assert_eq!((bench.counted().1.refused - refused, bench.wire.sent(0).len()), (n, 0), "{lie:?}");
    }
    bench.stop(started, &[&pool]);
}

fn long_payloads_are_segmented(kind: &Kind) {
    let mut bench = kind.open(&Wire::finishing(1));
    let (pool, large) = (pool(256), small_pool(32, 65_000));
    let wanted = Offloads::TX_CHECKSUM | Offloads::TX_TCP_SEGMENT | Offloads::TX_UDP_SEGMENT;
    bench.port.map(&large).unwrap();
    let mut started = bench.start(&Config { offloads: wanted, ..config(&pool) });
    let granted = started.offloads;
    assert_eq!(granted, bench.port.info().offloads & wanted);
    let tx = &mut *started.tx[0];
    let mut done = 0;
    for flow in flows() {
        let offload = if flow.tcp { Offloads::TX_TCP_SEGMENT } else { Offloads::TX_UDP_SEGMENT };
        if !granted.contains(offload) {
            continue;
        }
        for (len, size) in [(1, 1400), (1400, 1400), (1401, 1400), (2999, 1000), (9000, 536), (60_000, 1440)]
        {
            for flags in if flow.tcp { &[0x10, 0x19, 0x99][..] } else { &[0][..] } {
                let flow = Flow { flags: *flags, ..flow.clone() };
                let payload: Vec<u8> = (0..len).map(|n| (n * 13 + n / 251) as u8).collect();
                let expected = flow.segments(&payload, size);
                let frame = Flow { field: Field::Pseudo, ..flow.clone() }.frame(&payload);
                let cuts: &[usize] =
                    if done % 2 == 0 || len < 100 { &[] } else { &[flow.headers_len(), 100] };
                let mut packet = chain(&large, &frame, cuts);
                packet.set_tx_offload(Some(asks(&flow, size as u16)));
                bench.send(tx, [packet]);
                bench.flush(tx);
                let sent = bench.wire.sent(0);
                assert_eq!(sent.len(), expected.len(), "{len} bytes by {size}: {flow:?}");
                for (n, (sent, expected)) in sent.iter().zip(&expected).enumerate() {
                    assert_eq!(
                        sent[..flow.headers_len()],
                        expected[..flow.headers_len()],
                        "segment {n}: {flow:?}"
                    );
                    assert!(sent == expected, "segment {n} of {len} bytes: {flow:?}");
                }
                done += 1;
            }
        }
    }
    // One that says what can not be.
    if granted.contains(Offloads::TX_TCP_SEGMENT) {
        let flow = Flow::new(false, true, 9);
        let refused = bench.counted().1.refused;
        let frame = Flow { field: Field::Pseudo, ..flow.clone() }.frame(&[1; 3000]);
        for lie in [
            TxOffload { l4_len: 255, l3_len: 3000, ..asks(&flow, 1000) },
            TxOffload { l4_len: 0, ..asks(&flow, 1000) },
            TxOffload { l4_checksum: false, ..asks(&flow, 1000) },
        ] {
            let mut packet = packet(&large, &frame);
            packet.set_tx_offload(Some(lie));
            bench.send(tx, [packet]);
            bench.flush(tx);
            // A device may look for the headers itself.
            let sent = bench.wire.sent(0);
            assert!(sent.is_empty() || sent == flow.segments(&[1; 3000], 1000), "{lie:?}");
        }
        assert!(bench.counted().1.refused > refused);
    }
    assert!(done > 0 || granted.is_empty());
    bench.stop(started, &[&pool, &large]);
}

fn joined_segments_are_received(kind: &Kind) {
    let mut bench = kind.open(&Wire::new(1));
    let pool = pool(512);
    let all = Offloads::RX_CHECKSUM | Offloads::RX_LARGE | Offloads::RX_SCATTER;
    for offloads in [Offloads::NONE, Offloads::RX_CHECKSUM, all] {
        let mut started = bench.start(&Config { offloads, ..config(&pool) });
        for (flow, kind) in [
            (Flow::new(false, true, 1), SegmentKind::Tcp4),
            (Flow::new(true, true, 2), SegmentKind::Tcp6),
            (Flow::new(false, false, 3), SegmentKind::Udp),
            (Flow::new(true, false, 4), SegmentKind::Udp),
        ] {
            let payload: Vec<u8> = (0..20_000).map(|n| (n * 17 + n / 253) as u8).collect();
            let joined = Flow { field: Field::Pseudo, ..flow.clone() }.frame(&payload);
            let start = (flow.l2_len() + flow.l3_len()) as u16;
            let segment = Segment { kind, size: 1400, header_len: flow.headers_len() as u16 };
            let offload =
                Offload { checksum: Some((start, flow.checksum_offset() as u16)), segment: Some(segment) };
            bench.wire.send_unfinished(0, OnWire { bytes: joined.clone(), offload });
            let back = bench.drain(&mut started.rx);
            if back.len() == 1 && flow.tcp {
                assert!(started.offloads.contains(Offloads::RX_LARGE), "not asked for");
                assert_eq!(back[0].checksum(), Checksum::Partial);
                assert!(contents(&back[0]) == joined);
                continue;
            }
            assert!(!flow.tcp || !started.offloads.contains(Offloads::RX_LARGE), "asked for");
            let segments = flow.segments(&payload, 1400);
            if back.len() != 1 {
                assert_eq!(back.len(), segments.len());
                assert!(back.iter().map(contents).eq(segments), "{flow:?}");
            }
        }
        let (counted, _) = bench.counted();
        assert_eq!(counted.dropped(), 0, "{counted:?}");
        bench.stop(started, &[&pool]);
    }
}

fn offloads_that_were_not_granted_are_refused(kind: &Kind) {
    let mut bench = kind.open(&Wire::finishing(1));
    let pool = pool(256);
    let mut started = bench.start(&config(&pool));
    let mut refused = 0;
    for flow in flows() {
        for offload in [
            asks(&flow, 0),
            asks(&flow, 500),
            TxOffload { ip_checksum: true, l4_checksum: false, ..asks(&flow, 0) },
        ] {
            let mut packet = packet(&pool, &flow.frame(&[1; 1000]));
            packet.set_tx_offload(Some(offload));
            bench.send(&mut *started.tx[0], [packet]);
            refused += 1;
        }
    }
    let mut tagged = packet(&pool, &numbered(1, 1, 100));
    tagged.set_vlan(Some(7));
    bench.send(&mut *started.tx[0], [tagged]);
    refused += 1;
    bench.flush(&mut *started.tx[0]);
    let (_, counted) = bench.counted();
    assert_eq!((counted.packets, counted.refused, bench.wire.sent(0).len()), (0, refused, 0));
    bench.stop(started, &[&pool]);
}

fn packets_are_distributed_by_their_hash(kind: &Kind) {
    let mut bench = kind.open(&Wire::new(3));
    let info = bench.port.info();
    if !info.offloads.contains(Offloads::RSS) {
        let rss = Rss { key: KEY.to_vec(), table: vec![0] };
        let pool = pool(64);
        let started = bench.start(&Config { rx_depth: 16, ..config(&pool) });
        assert_eq!(bench.port.set_rss(&rss).unwrap_err().kind(), ErrorKind::Unsupported);
        return bench.stop(started, &[&pool]);
    }
    assert!(info.rss_key_len <= KEY.len(), "a longer key than is used here");
    let queues = info.max_rx_queues.min(info.max_tx_queues);
    let pool = pool(1024);
    let key = &KEY[..info.rss_key_len];
    let mut random = Random(99);
    let mut table = |len: usize| -> Vec<u16> { (0..len).map(|_| random.below(queues) as u16).collect() };
    let rss = Rss { key: key.to_vec(), table: table(info.rss_table_len) };
    let mut started = bench.start(&Config {
        rx_queues: queues,
        tx_queues: queues,
        offloads: Offloads::RSS | Offloads::RSS_HASH,
        rss: Some(rss.clone()),
        ..config(&pool)
    });
    assert!(started.offloads.contains(Offloads::RSS));
    let reports = started.offloads.contains(Offloads::RSS_HASH);
    let check = |bench: &Bench, rx: &mut [Box<dyn RxQueue>], rss: &Rss| {
        let flows: Vec<_> = (0..120).map(|n| Flow::new(n % 2 == 0, n % 3 == 0, 300 * n)).collect();
        let frames: HashMap<_, _> = flows.iter().map(|flow| (flow.frame(&[9; 60]), flow)).collect();
        for (n, frame) in frames.keys().enumerate() {
            bench.wire.send(n % queues, frame.clone());
        }
        let back = bench.drain(rx);
        assert_eq!(back.len(), flows.len());
        for packet in back {
            let hash = toeplitz(&rss.key, &frames[&contents(&packet)].hashed());
            assert_eq!(packet.queue(), rss.table[hash as usize % rss.table.len()]);
            assert_eq!(packet.rss_hash(), reports.then_some(hash));
        }
    };
    // Which queue lends its packets, not what they say, is what counts.
    for (n, queue) in started.rx.iter_mut().enumerate() {
        let flow = (0..).map(|n| Flow::new(false, true, n));
        let mut flow = flow.filter(|flow| {
            let hash = toeplitz(key, &flow.hashed());
            usize::from(rss.table[hash as usize % rss.table.len()]) == n
        });
        bench.wire.send(n, flow.next().unwrap().frame(&[1]));
        assert_eq!(bench.receive(&mut **queue, 1)[0].queue(), n as u16);
    }
    check(&bench, &mut started.rx, &rss);
    for len in [1, 2, 64, info.rss_table_len] {
        let rss = Rss { key: key.iter().rev().copied().collect(), table: table(len) };
        bench.port.set_rss(&rss).unwrap();
        check(&bench, &mut started.rx, &rss);
        for wrong in [
            Rss { table: vec![queues as u16], ..rss.clone() },
            Rss { table: vec![0; 3], ..rss.clone() },
            Rss { table: Vec::new(), ..rss.clone() },
            Rss { table: vec![0; 2 * info.rss_table_len], ..rss.clone() },
            Rss { key: vec![1; info.rss_key_len + 1], ..rss.clone() },
        ] {
            assert_eq!(bench.port.set_rss(&wrong).unwrap_err().kind(), ErrorKind::InvalidInput, "{wrong:?}");
        }
        check(&bench, &mut started.rx, &rss);
    }
    // What has no addresses goes somewhere.
    bench.wire.send(0, numbered(1, 1, 30));
    let other = bench.drain(&mut started.rx);
    assert_eq!((other.len(), other[0].rss_hash()), (1, None));
    drop(other);
    bench.stop(started, &[&pool]);
}

/// Which of these frames arrive, by their payload's first byte.
fn arriving(bench: &Bench, rx: &mut [Box<dyn RxQueue>], frames: &[(u8, Flow)]) -> Vec<u8> {
    for (name, flow) in frames {
        bench.wire.send(0, flow.frame(&[*name; 50]));
    }
    bench.drain(rx).iter().map(|packet| *contents(packet).last().unwrap()).collect()
}

fn addresses_are_filtered(kind: &Kind) {
    let mut bench = echo(kind);
    let pool = pool(256);
    let own = bench.port.mac();
    let other = MacAddr([2, 0x55, 0, 0, 0, 9]);
    let (extra, group, group2) =
        (MacAddr([2, 0x44, 0, 0, 0, 1]), MacAddr([1, 0, 0x5e, 0, 0, 1]), MacAddr([0x33, 0x33, 0, 0, 0, 1]));
    let mut started = bench.start(&Config { promiscuous: false, ..config(&pool) });
    let to = |mac: MacAddr| Flow { to: mac.octets(), ..Flow::udp4(1) };
    let frames = |own: MacAddr| {
        [
            (b'o', to(own)),
            (b'b', to(MacAddr([0xff; 6]))),
            (b'x', to(MacAddr([2, 0x66, 0, 0, 0, 1]))),
            (b'e', to(extra)),
            (b'g', to(group)),
            (b'h', to(group2)),
        ]
    };
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    let rx = &mut started.rx;
    if kind.without.contains(Features::CTRL_RX) {
        // A device that can not filter passes everything on, started so or not, and says so when asked.
        let port = &mut *bench.port;
        for refused in
            [port.set_promiscuous(false), port.set_all_multicast(false), port.set_mac_filter(&[extra])]
        {
            assert_eq!(refused.unwrap_err().kind(), ErrorKind::Unsupported);
        }
        assert_eq!(text(arriving(&bench, rx, &frames(own))), "obxegh");
        assert_eq!(bench.port.set_mac(other).unwrap_err().kind(), ErrorKind::Unsupported);
        assert_eq!(bench.port.mac(), own);
        return bench.stop(started, &[&pool]);
    }
    assert_eq!(text(arriving(&bench, rx, &frames(own))), "ob");
    bench.port.set_all_multicast(true).unwrap();
    assert_eq!(text(arriving(&bench, rx, &frames(own))), "obgh");
    bench.port.set_all_multicast(false).unwrap();
    bench.port.set_mac_filter(&[extra, group]).unwrap();
    assert_eq!(text(arriving(&bench, rx, &frames(own))), "obeg");
    bench.port.set_mac_filter(&[group2]).unwrap();
    assert_eq!(text(arriving(&bench, rx, &frames(own))), "obh");
    bench.port.set_promiscuous(true).unwrap();
    assert_eq!(text(arriving(&bench, rx, &frames(own))), "obxegh");
    bench.port.set_promiscuous(false).unwrap();
    bench.port.set_mac_filter(&[]).unwrap();
    assert_eq!(text(arriving(&bench, rx, &frames(own))), "ob");

    match bench.port.set_mac(other) {
        Ok(()) => {
            assert_eq!(bench.port.mac(), other);
            assert_eq!(text(arriving(&bench, rx, &frames(own))), "b");
            assert_eq!(text(arriving(&bench, rx, &frames(other))), "ob");
            assert!(bench.port.set_mac(group).is_err(), "no port has a group's address");
            assert_eq!(bench.port.mac(), other);
        }
        Err(error) => assert_eq!((error.kind(), bench.port.mac()), (ErrorKind::Unsupported, own)),
    }
    bench.stop(started, &[&pool]);
    // The address that it says it has is the one that it receives, after a restart too.
    let mut started = bench.start(&Config { promiscuous: false, ..config(&pool) });
    let own = bench.port.mac();
    assert_eq!(text(arriving(&bench, &mut started.rx, &frames(own))), "ob");
    bench.stop(started, &[&pool]);
    let mut started = bench.start(&config(&pool));
    assert_eq!(text(arriving(&bench, &mut started.rx, &frames(own))), "obxegh");
    bench.stop(started, &[&pool]);
}

fn vlans_are_filtered(kind: &Kind) {
    let mut bench = kind.open(&Wire::new(1));
    let pool = pool(256);
    let config = Config { promiscuous: false, ..config(&pool) };
    let frames: Vec<_> = [(b'u', None), (b'1', Some(1)), (b'5', Some(0xe005)), (b'9', Some(4094))]
        .map(|(name, vlan)| (name, Flow { vlan, ..Flow::udp4(1) }))
        .to_vec();
    let mut started = Some(bench.start(&config));
    let mut restarts = 0;
    for (id, on, arrives) in [
        (5, false, "u159"),
        (5, true, "u5"),
        (5, true, "u5"),
        (4094, true, "u59"),
        (5, false, "u9"),
        (4094, false, "u159"),
        (1, true, "u1"),
    ] {
        match bench.port.set_vlan_filter(id, on) {
            Err(error) if error.kind() == ErrorKind::Busy => {
                // It can begin and end filtering only while it is stopped.
                restarts += 1;
                bench.stop(started.take().unwrap(), &[&pool]);
                bench.port.set_vlan_filter(id, on).unwrap();
                started = Some(bench.start(&config));
            }
            Err(error) if kind.without.contains(Features::CTRL_VLAN) => {
                assert_eq!(error.kind(), ErrorKind::Unsupported);
            }
            result => result.unwrap(),
        }
        let arrives = if kind.without.contains(Features::CTRL_VLAN) { "u159" } else { arrives };
        let rx = &mut started.as_mut().unwrap().rx;
        assert_eq!(String::from_utf8(arriving(&bench, rx, &frames)).unwrap(), arrives, "{id}: {on}");
    }
    assert!(restarts <= 3);
    assert_eq!(bench.port.set_vlan_filter(4096, true).unwrap_err().kind(), ErrorKind::InvalidInput);
    bench.stop(started.unwrap(), &[&pool]);
}

fn vlan_tags_are_taken_out_and_put_in(kind: &Kind) {
    let mut bench = kind.open(&Wire::new(1));
    let pool = pool(256);
    let wanted = Offloads::RX_VLAN | Offloads::TX_VLAN | Offloads::TX_CHECKSUM;
    let mut started = bench.start(&Config { offloads: wanted, ..config(&pool) });
    let granted = started.offloads;
    let tagged = Flow { vlan: Some(0xe123), ..Flow::udp4(3) };
    let plain = Flow { vlan: None, ..tagged.clone() };
    for (flow, stripped) in [(&tagged, true), (&plain, false)] {
        bench.wire.send(0, flow.frame(&[7; 77]));
        let back = bench.receive(&mut *started.rx[0], 1).remove(0);
        if granted.contains(Offloads::RX_VLAN) {
            assert_eq!(contents(&back), plain.frame(&[7; 77]));
            assert_eq!(back.vlan(), stripped.then_some(0xe123));
        } else {
            assert_eq!((contents(&back), back.vlan()), (flow.frame(&[7; 77]), None));
        }
    }
    // A tag and nothing else is too short a frame to look into.
    bench.wire.send(0, [&[0xff; 12][..], &[0x81, 0]].concat());
    bench.wire.send(0, [&[0xff; 12][..], &[0x81, 0, 0, 5]].concat());
    let back = bench.drain(&mut started.rx);
    assert!(back.iter().all(|packet| packet.vlan().is_none() && packet.len() < 18));
    drop(back);
    if granted.contains(Offloads::TX_VLAN) {
        let tx = &mut *started.tx[0];
        for cuts in [&[][..], &[12], &[5, 13], &[30]] {
            let mut packet = chain(&pool, &plain.frame(&[8; 500]), cuts);
            packet.set_vlan(tagged.vlan);
            bench.send(tx, [packet]);
            bench.flush(tx);
            let sent = bench.wire.sent(0);
            // Addresses in two segments may be refused, not sent wrong.
            assert!(
                sent.is_empty() && cuts.first() == Some(&5) || sent == [tagged.frame(&[8; 500])],
                "{cuts:?}"
            );
        }
    }
    bench.stop(started, &[&pool]);
}

fn the_link_goes_down_and_up(kind: &Kind) {
    let mut bench = echo(kind);
    let pool = pool(256);
    let mut started = bench.start(&config(&pool));
    bench.works(&mut started, &pool);
    for _ in 0..3 {
        bench.wire.set_link(false);
        if kind.without.contains(Features::STATUS) {
            assert!(bench.port.link().up, "a device that does not say is taken to be up");
        } else {
            until("the link goes down", || {
                bench.step();
                bench.port.link() != underpass::net::Link { up: true, ..bench.port.link() }
            });
        }
        // It may keep or lose these.
        let mut packets = burst((0..5).map(|n| packet(&pool, &numbered(1, n, 100))));
        started.tx[0].tx_burst(&mut packets);
        drop(packets);
        bench.drain(&mut started.rx);
        assert_eq!((started.rx[0].state(), started.tx[0].state()), (State::Running, State::Running));
        bench.wire.set_link(true);
        until("the link goes up", || {
            bench.step();
            bench.port.link().up
        });
        bench.flush(&mut *started.tx[0]);
        bench.drain(&mut started.rx);
        bench.works(&mut started, &pool);
    }
    bench.stop(started, &[&pool]);
}

fn waiting_ends_with_a_packet_or_in_time(kind: &Kind) {
    let mut bench = kind.open(&Wire::new(1));
    let pool = pool(256);
    let mut started = bench.start(&config(&pool));
    let error = started.rx[0].wait(Duration::from_secs(60)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported, "interrupts were not asked for");
    bench.stop(started, &[&pool]);
    if !bench.port.info().interrupts {
        return;
    }
    let mut started = bench.start(&Config { interrupts: true, ..config(&pool) });
    let rx = &mut *started.rx[0];
    for round in 0..3 {
        let begin = Instant::now();
        rx.wait(Duration::from_millis(20)).unwrap();
        let waited = begin.elapsed();
        assert!(waited >= Duration::from_millis(15) && waited < PATIENCE, "{waited:?}");
        // Sent while it sleeps; somebody must run the device then.
        let over = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                std::thread::sleep(Duration::from_millis(10));
                (0..3).for_each(|n| bench.wire.send(0, numbered(round, n, 100)));
                until("it wakes up", || {
                    bench.taps.step();
                    over.load(Ordering::Relaxed) != 0
                });
            });
            let begin = Instant::now();
            let mut received = Burst::with_capacity(8);
            while received.len() < 3 {
                rx.wait(PATIENCE).unwrap();
                assert!(begin.elapsed() < PATIENCE / 2, "it slept over a packet");
                rx.rx_burst(&mut received);
            }
            over.store(1, Ordering::Relaxed);
            let numbers: Vec<_> = received.iter().map(|packet| identify(packet.data())).collect();
            assert_eq!(numbers, [(round, 0), (round, 1), (round, 2)]);
        });
        // Something is there already: no sleep.
        bench.wire.send(0, numbered(7, 7, 100));
        until("the device has written it", || {
            bench.taps.step();
            bench.wire.arriving() == 0
        });
        let begin = Instant::now();
        let mut received = Burst::with_capacity(8);
        while received.is_empty() {
            rx.wait(PATIENCE).unwrap();
            assert!(begin.elapsed() < PATIENCE / 2, "it slept over a packet that was there");
            rx.rx_burst(&mut received);
        }
    }
    bench.stop(started, &[&pool]);
}

fn queues_work_on_threads_of_their_own(kind: &Kind) {
    const FRAMES: u64 = 400;
    let mut bench = kind.open(&Wire::echo(3));
    let info = bench.port.info();
    let queues = info.max_rx_queues.min(info.max_tx_queues);
    let pool = pool(1024);
    let started = bench.start(&Config { rx_queues: queues, tx_queues: queues, ..config(&pool) });
    let total = AtomicUsize::new(0);
    let seen: Vec<Vec<(u16, u64)>> = std::thread::scope(|scope| {
        let workers: Vec<_> = started
            .rx
            .into_iter()
            .zip(started.tx)
            .map(|(mut rx, mut tx)| {
                let (taps, pool, total) = (&bench.taps, &pool, &total);
                scope.spawn(move || {
                    let stream = rx.index();
                    let (mut seen, mut next) = (Vec::new(), 0);
                    let (mut to_send, mut received) = (Burst::with_capacity(16), Burst::with_capacity(16));
                    until("all frames are back", || {
                        while next < FRAMES
                            && !to_send.is_full()
                            && let Some(mut packet) = pool.alloc()
                        {
                            let frame = numbered(stream, next, 60 + next as usize % 1000);
                            packet.append(frame.len()).unwrap().copy_from_slice(&frame);
                            to_send.push(packet).unwrap();
                            next += 1;
                        }
                        tx.tx_burst(&mut to_send);
                        taps.lend();
                        let count = rx.rx_burst(&mut received);
                        seen.extend(received.drain_all().map(|packet| {
                            assert_eq!(packet.queue(), rx.index());
                            identify(packet.data())
                        }));
                        total.fetch_add(count, Ordering::Relaxed);
                        total.load(Ordering::Relaxed) == queues * FRAMES as usize
                    });
                    seen
                })
            })
            .collect();
        workers.into_iter().map(|worker| worker.join().unwrap()).collect()
    });
    let mut all = HashSet::new();
    for seen in seen {
        let mut last = BTreeMap::new();
        for (stream, number) in seen {
            assert!(all.insert((stream, number)), "stream {stream}: {number} came twice");
            assert!(last.insert(stream, number).is_none_or(|last| last < number), "stream {stream}: order");
        }
    }
    assert_eq!(all.len(), queues * FRAMES as usize);
    bench.port.stop().unwrap();
    assert_eq!(pool.available(), pool.capacity());
}

fn a_device_that_needs_a_reset_gets_one(kind: &Kind) {
    let mut bench = echo(kind);
    let pool = pool(256);
    for _ in 0..2 {
        let mut started = bench.start(&config(&pool));
        bench.works(&mut started, &pool);
        bench.wire.block(true);
        bench.send(&mut *started.tx[0], (0..5).map(|n| packet(&pool, &numbered(1, n, 100))));
        bench.taps.break_device();
        let mut error = None;
        until("the port notices", || {
            bench.step();
            bench.port.link();
            error = error.take().or_else(|| bench.port.next_error());
            error.is_some() && started.rx[0].state() == State::Gone && started.tx[0].state() == State::Gone
        });
        let error = error.unwrap();
        assert!(matches!(error.kind(), ErrorKind::Device | ErrorKind::Gone), "{error}");
        assert!(error.mend_text().is_some(), "{error}: and now?");
        let mut packets = burst([packet(&pool, &numbered(1, 1, 100))]);
        assert_eq!(started.tx[0].tx_burst(&mut packets), 0);
        assert_eq!(started.rx[0].rx_burst(&mut Burst::with_capacity(4)), 0);
        drop(packets);
        bench.wire.block(false);
        bench.stop(started, &[&pool]);
        assert!(bench.port.next_error().is_none());
    }
    let mut started = bench.start(&config(&pool));
    bench.works(&mut started, &pool);
    bench.stop(started, &[&pool]);
}

fn a_port_can_be_dropped_before_its_queues(kind: &Kind) {
    let pool = pool(256);
    for rx_first in [true, false] {
        let mut bench = echo(kind);
        let mut started = bench.start(&config(&pool));
        bench.works(&mut started, &pool);
        bench.send(&mut *started.tx[0], (0..10).map(|n| packet(&pool, &numbered(1, n, 100))));
        drop(bench);
        assert_ne!(started.rx[0].state(), State::Running);
        assert_ne!(started.tx[0].state(), State::Running);
        assert_eq!(started.rx[0].rx_burst(&mut Burst::with_capacity(4)), 0);
        let mut packets = burst([packet(&pool, &numbered(1, 1, 100))]);
        assert_eq!(started.tx[0].tx_burst(&mut packets), 0);
        started.tx[0].reclaim();
        drop(packets);
        if rx_first {
            started.rx.clear();
            started.tx.clear();
        } else {
            started.tx.clear();
            started.rx.clear();
        }
        assert_eq!(pool.available(), pool.capacity(), "buffers are lost");
    }
}

fn a_pool_can_be_dropped_first(kind: &Kind) {
    let mut bench = echo(kind);
    let (pool, other) = (pool(256), pool(64));
    bench.port.map(&other).unwrap();
    let mut started = bench.start(&config(&pool));
    bench.works(&mut started, &pool);
    let held = bench.echo(&mut started, [packet(&other, &numbered(5, 6, 700))]);
    drop(other);
    drop(pool);
    // The device has its buffers still, and goes on writing them.
    bench.wire.send(0, numbered(5, 7, 800));
    let more = bench.receive(&mut *started.rx[0], 1);
    assert_eq!(identify(&contents(&more[0])), (5, 7));
    drop(started);
    bench.port.stop().unwrap();
    drop(bench);
    assert_eq!(identify(&contents(&held[0])), (5, 6));
    assert_eq!(identify(&contents(&more[0])), (5, 7));
}

fn a_panic_gives_the_queues_back(kind: &Kind) {
    let mut bench = echo(kind);
    let pool = pool(256);
    let mut started = bench.start(&config(&pool));
    bench.works(&mut started, &pool);
    let doomed = pool.clone();
    let end = std::thread::spawn(move || {
        let mut started = started;
        let mut packets = burst((0..8).map(|n| packet(&doomed, &numbered(1, n, 100))));
        started.tx[0].tx_burst(&mut packets);
        let mut received: Burst<Packet> = Burst::with_capacity(8);
        started.rx[0].rx_burst(&mut received);
        panic!("this test's own");
    })
    .join();
    assert!(end.is_err());
    bench.port.stop().unwrap();
    assert_eq!(pool.available(), pool.capacity(), "buffers are lost");
    let mut started = bench.start(&config(&pool));
    bench.wire.block(false);
    bench.drain(&mut started.rx);
    bench.works(&mut started, &pool);
    bench.stop(started, &[&pool]);
}

/// What a random schedule does next.
#[derive(Debug, Clone)]
enum Turn {
    /// Sends frames of this size.
    Send {
        count: usize,
        size: usize,
        segments: usize,
    },
    Receive {
        room: usize,
    },
    Reclaim,
    Step {
        times: usize,
    },
    /// The wire takes nothing more, or does again.
    Block(bool),
    /// Frees the oldest of the packets that were received.
    Release {
        count: usize,
    },
    /// Stops, and starts with these depths.
    Restart {
        rx_depth: usize,
        tx_depth: usize,
    },
}

fn turns() -> impl Strategy<Value = Vec<Turn>> {
    let turn = prop_oneof![
        8 => (1..40_usize, 14..1518_usize, 1..4_usize)
            .prop_map(|(count, size, segments)| Turn::Send { count, size, segments }),
        8 => (0..40_usize).prop_map(|room| Turn::Receive { room }),
        2 => Just(Turn::Reclaim),
        6 => (1..4_usize).prop_map(|times| Turn::Step { times }),
        1 => any::<bool>().prop_map(Turn::Block),
        4 => (0..60_usize).prop_map(|count| Turn::Release { count }),
        1 => (1..40_usize, 4..40_usize).prop_map(|(rx_depth, tx_depth)| Turn::Restart { rx_depth, tx_depth }),
    ];
    prop::collection::vec(turn, 1..80)
}

/// Whatever the order of calls and of the device's steps: what goes out comes back, in order, once.
fn random_schedules(kind: &Kind) {
    let mut runner = TestRunner::new(ProptestConfig {
        cases: 12,
        failure_persistence: None,
        max_shrink_iters: 2000,
        ..ProptestConfig::default()
    });
    runner
        .run(&turns(), |turns| {
            schedule(kind, &turns);
            Ok(())
        })
        .unwrap();
}

fn schedule(kind: &Kind, turns: &[Turn]) {
    let mut bench = echo(kind);
    let pool = pool(160);
    let mut started = bench.start(&Config { rx_depth: 32, tx_depth: 16, ..config(&pool) });
    // Of a stream all frames arrive in order; a restart loses what is on the way, and begins another.
    let (mut stream, mut made, mut seen) = (0, 0_u64, 0_u64);
    let mut sizes = Vec::new();
    let mut held = VecDeque::new();
    for turn in turns {
        match *turn {
            Turn::Send { count, size, segments } => {
                let mut packets = Burst::with_capacity(count);
                while packets.len() < count && pool.available() >= segments {
                    let frame = numbered(stream, made + packets.len() as u64, size);
                    let cuts: Vec<_> = (1..segments).map(|n| n * size / segments).collect();
                    packets.push(chain(&pool, &frame, &cuts)).unwrap();
                }
                let before = packets.len();
                let taken = started.tx[0].tx_burst(&mut packets);
                assert_eq!(taken + packets.len(), before);
                made += taken as u64;
                sizes.extend(std::iter::repeat_n(size, taken));
            }
            Turn::Receive { room } => {
                let mut burst = Burst::with_capacity(room);
                assert!(started.rx[0].rx_burst(&mut burst) <= room);
                for packet in burst.drain_all() {
                    let expected = sizes.get(seen as usize).map(|size| numbered(stream, seen, *size));
                    assert_eq!(Some(contents(&packet)), expected, "frame {seen}");
                    seen += 1;
                    held.push_back(packet);
                }
            }
            Turn::Reclaim => assert!(started.tx[0].reclaim() <= made as usize),
            Turn::Step { times } => (0..times).for_each(|_| bench.step()),
            Turn::Block(blocked) => bench.wire.block(blocked),
            Turn::Release { count } => drop(held.drain(..count.min(held.len()))),
            Turn::Restart { rx_depth, tx_depth } => {
                drop(started);
                bench.port.stop().unwrap();
                held.clear();
                assert_eq!(pool.available(), pool.capacity());
                bench.wire.forget();
                started = bench.start(&Config { rx_depth, tx_depth, ..config(&pool) });
                (made, seen, stream) = (0, 0, stream + 1);
                sizes.clear();
            }
        }
    }
    bench.wire.block(false);
    held.clear();
    let mut burst = Burst::with_capacity(16);
    until("the rest comes back", || {
        bench.step();
        started.tx[0].reclaim();
        started.rx[0].rx_burst(&mut burst);
        for packet in burst.drain_all() {
            assert!(contents(&packet) == numbered(stream, seen, sizes[seen as usize]));
            seen += 1;
        }
        seen == made
    });
    bench.stop(started, &[&pool]);
}
