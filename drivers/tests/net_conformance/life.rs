//! A port's life: what it says it can do, starting, stopping, breaking down, and being dropped in any order.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use underpass::net::{Config, Link, MacAddr, Offloads, Rss, State};
use underpass::{Burst, ErrorKind, Packet};
use underpass_drivers::virtio_net::spec::Features;

use crate::rig::frames::{identify, numbered};
use crate::rig::{PATIENCE, Wire, burst, contents, packet, pool, small_pool, until};
use crate::{Kind, config, echo};

pub(super) fn a_port_says_what_it_can_do(kind: &Kind) {
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

pub(super) fn it_starts_and_stops_with_other_configurations(kind: &Kind) {
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
            let back = bench.drain(&mut started.rx, 1);
            assert_eq!(back.len(), 1, "{queues} queues, depth {depth}");
            assert_eq!(contents(&back[0]), frame);
            assert_eq!(back[0].port(), config.port);
            assert!(usize::from(back[0].queue()) < queues.max(1));
        }
        bench.stop(started, &[&pool]);
        assert_eq!(bench.port.info(), info, "a start changed what it can do");
    }
}

pub(super) fn what_is_lent_out_keeps_the_port_busy(kind: &Kind) {
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

pub(super) fn impossible_configurations_are_refused(kind: &Kind) {
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

pub(super) fn packets_of_other_pools_are_sent_once_these_are_mapped(kind: &Kind) {
    let mut bench = kind.open(&Wire::new(1));
    let (pool, other) = (pool(256), pool(64));
    assert_eq!(bench.port.unmap(&other).unwrap_err().kind(), ErrorKind::NotFound);
    for (turn, mapped) in [false, true, true, false, true].into_iter().enumerate() {
        match (mapped, turn) {
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
        assert_eq!(bench.sent(mapped.into()).len(), usize::from(mapped));
        bench.stop(started, &[&pool, &other]);
    }
    bench.port.unmap(&other).unwrap();
    assert_eq!(bench.port.unmap(&other).unwrap_err().kind(), ErrorKind::NotFound);
}

pub(super) fn the_link_goes_down_and_up(kind: &Kind) {
    let mut bench = echo(kind);
    let pool = pool(256);
    let mut started = bench.start(&config(&pool));
    bench.works(&mut started, &pool);
    for _ in 0..3 {
        bench.wire.set_link(false);
        if kind.is_without(Features::STATUS) {
            assert!(bench.port.link().up, "a device that does not say is taken to be up");
        } else {
            until("the link goes down", || {
                bench.step();
                bench.port.link() != Link { up: true, ..bench.port.link() }
            });
        }
        // It may keep or lose these; but QEMU 11's packed rings do not survive it (`virtqueue_packed_drop_all` counts wrong).
        let mut packets = burst((0..5).map(|n| packet(&pool, &numbered(1, n, 100))));
        if !kind.is_nic() {
            started.tx[0].tx_burst(&mut packets);
        }
        drop(packets);
        bench.drain(&mut started.rx, 0);
        assert_eq!((started.rx[0].state(), started.tx[0].state()), (State::Running, State::Running));
        bench.wire.set_link(true);
        until("the link goes up", || {
            bench.step();
            bench.port.link().up
        });
        bench.flush(&mut *started.tx[0]);
        bench.drain(&mut started.rx, 0);
        bench.works(&mut started, &pool);
    }
    bench.stop(started, &[&pool]);
}

pub(super) fn waiting_ends_with_a_packet_or_in_time(kind: &Kind) {
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
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let sender = scope.spawn(|| {
                std::thread::sleep(Duration::from_millis(10));
                (0..3).for_each(|n| bench.wire.send(0, numbered(round, n, 100)));
                until("it wakes up", || {
                    bench.taps.step();
                    over.load(Ordering::Relaxed)
                });
            });
            let begin = Instant::now();
            let mut received = Burst::with_capacity(8);
            while received.len() < 3 {
                rx.wait(PATIENCE).unwrap();
                assert!(begin.elapsed() < PATIENCE / 2, "it slept over a packet");
                rx.rx_burst(&mut received);
            }
            over.store(true, Ordering::Relaxed);
            sender.join().unwrap();
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

pub(super) fn a_device_that_needs_a_reset_gets_one(kind: &Kind) {
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

pub(super) fn a_port_can_be_dropped_before_its_queues(kind: &Kind) {
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

pub(super) fn a_pool_can_be_dropped_first(kind: &Kind) {
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

pub(super) fn a_panic_gives_the_queues_back(kind: &Kind) {
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
    bench.drain(&mut started.rx, 0);
    bench.works(&mut started, &pool);
    bench.stop(started, &[&pool]);
}
