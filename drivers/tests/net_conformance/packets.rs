//! Packets: all of them, in order, unchanged and counted, whatever is full or dry.

use std::collections::{BTreeMap, HashSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use underpass::net::{Config, Counters, FRAME_OVERHEAD, MIN_FRAME, Offloads, Values};
use underpass::{Burst, Checksum, ErrorKind};

use crate::rig::frames::{MIN_NUMBERED, identify, numbered};
use crate::rig::{Random, Wire, burst, chain, contents, packet, pool, small_pool, until};
use crate::{Kind, config, echo};

/// A frame of this size, with a VLAN tag where it takes one to be so long.
fn sized(size: usize, mtu: usize) -> Vec<u8> {
    let mut frame = numbered(1, size as u64, size);
    if size > mtu + MIN_FRAME {
        frame[12..14].copy_from_slice(&[0x81, 0]);
    }
    frame
}

pub(super) fn frames_of_every_size_come_back_byte_for_byte(kind: &Kind) {
    let mut bench = echo(kind);
    let pool = pool(256);
    let mut started = bench.start(&config(&pool));
    let most = usize::from(started.mtu) + FRAME_OVERHEAD;
    let step = kind.times(20) as usize;
    let sizes: Vec<_> =
        (bench.wire.least()..=most).filter(|size| *size == most || size % 20 < step).collect();
    for sizes in sizes.chunks(64) {
        let frames: Vec<_> = sizes.iter().map(|size| sized(*size, usize::from(started.mtu))).collect();
        let packets: Vec<_> = frames.iter().map(|frame| packet(&pool, frame)).collect();
        for (sent, back) in frames.iter().zip(bench.echo(&mut started, packets)) {
            assert_eq!(back.len(), sent.len());
            assert!(contents(&back) == *sent, "a frame of {} bytes came back changed", sent.len());
            assert_eq!((back.checksum(), back.rss_hash(), back.vlan()), (Checksum::Unknown, None, None));
        }
    }
    bench.stop(started, &[&pool]);
}

pub(super) fn chains_are_sent_as_one_frame(kind: &Kind) {
    let mut bench = kind.open(&Wire::new(1));
    let pool = pool(512);
    let mut started = bench.start(&config(&pool));
    let tx = &mut *started.tx[0];
    let mut random = Random(3);
    let mut frames = Vec::new();
    for turn in 0..kind.times(150) {
        let least = bench.wire.least();
        let frame = numbered(2, turn, least + random.below(1514 - least));
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
    assert!(bench.sent(frames.len()) == frames);
    // Far more segments than any device takes.
    bench.send(tx, [chain(&pool, &numbered(2, 0, 600), &(1..301).collect::<Vec<_>>())]);
    bench.send(tx, [packet(&pool, &frames[0])]);
    bench.flush(tx);
    assert!(bench.sent(1) == frames[..1]);
    let (_, counted) = bench.counted();
    assert_eq!((counted.packets, counted.refused, counted.dropped()), (frames.len() as u64 + 1, 1, 1));
    bench.stop(started, &[&pool]);
}

pub(super) fn a_frame_may_fill_several_buffers(kind: &Kind) {
    let mut bench = kind.open(&Wire::new(1));
    let pool = small_pool(1024, 200);
    let config = Config { offloads: Offloads::RX_SCATTER, ..config(&pool) };
    if !bench.port.info().offloads.contains(Offloads::RX_SCATTER) {
        assert_eq!(bench.port.start(&config).map(drop).unwrap_err().kind(), ErrorKind::InvalidInput);
        return;
    }
    let mut started = bench.start(&config);
    assert!(started.offloads.contains(Offloads::RX_SCATTER));
    let most = usize::from(started.mtu) + MIN_FRAME;
    let mut random = Random(5);
    let least = bench.wire.least();
    let rounds = kind.times(20);
    for round in 0..rounds {
        let frames: Vec<_> = (0..40)
            .map(|n| numbered(1, n, if n == round { most } else { least + random.below(most - least) }))
            .collect();
        for frame in &frames {
            bench.wire.send(0, frame.clone());
        }
        for (sent, back) in frames.iter().zip(bench.receive(&mut *started.rx[0], frames.len())) {
            assert_eq!(back.len(), sent.len());
            assert!(contents(&back) == *sent);
            assert_eq!(back.segments().count() == 1, sent.len() <= 200, "{} bytes: {back:?}", sent.len());
        }
    }
    let (counted, _) = bench.counted();
    assert_eq!((counted.packets, counted.dropped()), (40 * rounds, 0));
    bench.stop(started, &[&pool]);
}

pub(super) fn a_full_ring_keeps_order_and_loses_nothing(kind: &Kind) {
    let frames = kind.times(3000);
    let mut bench = echo(kind);
    let pool = pool(512);
    let mut started = bench.start(&Config { rx_depth: 32, tx_depth: 16, ..config(&pool) });
    let mut random = Random(17);
    let (mut made, mut back) = (0, 0);
    let shortest = MIN_NUMBERED.max(bench.wire.least());
    let (mut waiting, mut received) = (VecDeque::new(), Burst::with_capacity(64));
    let mut full = 0;
    until("all frames are back", || {
        while made < frames
            && waiting.len() < 64
            && let Some(mut packet) = pool.alloc()
        {
            let frame = numbered(4, made, shortest + random.below(1400));
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
        back == frames
    });
    assert!(full > 0, "the ring was never full");
    bench.wire.block(false);
    bench.flush(&mut *started.tx[0]);
    assert_eq!(bench.drain(&mut started.rx, 0).len(), 0, "more came than was sent");
    let (rx, tx) = bench.counted();
    assert_eq!((rx.packets, tx.packets, rx.bytes), (frames, frames, tx.bytes));
    assert_eq!((rx.dropped(), tx.dropped()), (0, 0));
    bench.stop(started, &[&pool]);
}

pub(super) fn what_does_not_fit_stays_the_callers(kind: &Kind) {
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

pub(super) fn a_full_burst_receives_nothing(kind: &Kind) {
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

pub(super) fn a_dry_pool_delays_packets_and_loses_none(kind: &Kind) {
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
                held.drain(..=random.below(held.len()));
            }
            seen == FRAMES
        });
        drop(held);
        let after = bench.counted().0;
        assert!(after.no_buffers > before.no_buffers, "nobody counted that buffers were short");
        assert_eq!((after.packets - before.packets, after.dropped()), (FRAMES, 0));
        // It works on with all buffers.
        for round in 0..kind.times(20) {
            (0..depth as u64).for_each(|n| bench.wire.send(0, numbered(2, round, 100 + n as usize)));
            bench.receive(&mut *started.rx[0], depth);
        }
        bench.stop(started, &[&pool]);
    }
}

pub(super) fn what_can_not_be_sent_is_dropped_and_counted(kind: &Kind) {
    let mut bench = kind.open(&Wire::new(1));
    let (pool, foreign) = (pool(256), pool(64));
    let mut started = bench.start(&config(&pool));
    let tx = &mut *started.tx[0];
    let most = usize::from(started.mtu) + MIN_FRAME;
    let good = |n: u64| packet(&pool, &numbered(1, n, 80));
    let long = packet(&pool, &vec![1; most + 1]);
    let long_chain = chain(&pool, &vec![2; 4000], &[1400, 2800]);
    let bad_tail = {
        let mut packet = packet(&pool, &numbered(1, 9, 80));
        packet.chain(crate::rig::packet(&foreign, &[7; 50]));
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
    let sent: Vec<_> = bench.sent(3).iter().map(|frame| identify(frame).1).collect();
    assert_eq!(sent, [0, 1, 2]);
    let (_, counted) = bench.counted();
    let expected = Values { packets: 3, bytes: 240, runts: 3, oversize: 2, refused: 2, ..Values::default() };
    assert_eq!(counted, expected);
    assert!(bench.port.next_fault().is_none(), "the device saw one of them");
    assert_eq!((foreign.available(), foreign.capacity()), (64, 64));
    bench.stop(started, &[&pool, &foreign]);
}

pub(super) fn frames_that_no_port_may_pass_on_are_dropped(kind: &Kind) {
    let mut bench = kind.open(&Wire::new(1));
    let pool = pool(256);
    let mut started = bench.start(&config(&pool));
    let most = usize::from(started.mtu) + MIN_FRAME;
    let frames =
        [numbered(1, 0, 100), vec![1; 1], vec![2; 13], vec![3; most + 1], vec![4; 2040], numbered(1, 1, 100)];
    for frame in frames {
        bench.wire.send(0, frame);
    }
    // Where the device itself drops them, the port has nothing to count.
    let arrived: Vec<_> =
        bench.drain(&mut started.rx, 2).iter().map(|packet| identify(packet.data()).1).collect();
    assert_eq!(arrived, [0, 1]);
    let (counted, _) = bench.counted();
    assert_eq!((counted.packets, counted.bytes), (2, 200));
    assert!(counted.runts <= 2 && counted.oversize <= 2 && counted.errors == 0, "{counted:?}");
    bench.stop(started, &[&pool]);
}

pub(super) fn counters_are_exact_and_outlive_a_restart(kind: &Kind) {
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
            for packet in bench.drain(&mut started.rx, queues * queues) {
                let (packets, bytes) = &mut arrived[usize::from(packet.queue())];
                (*packets, *bytes) = (*packets + 1, *bytes + packet.len() as u64);
            }
        }
        let values = |counters: &[Arc<Counters>]| -> Vec<_> {
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

pub(super) fn packets_not_sent_are_counted_when_it_stops(kind: &Kind) {
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

pub(super) fn queues_work_on_threads_of_their_own(kind: &Kind) {
    let frames = kind.times(400);
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
                        while next < frames
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
                        total.load(Ordering::Relaxed) == queues * frames as usize
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
    assert_eq!(all.len(), queues * frames as usize);
    bench.port.stop().unwrap();
    assert_eq!(pool.available(), pool.capacity());
}
