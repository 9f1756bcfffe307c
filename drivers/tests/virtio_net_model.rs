//! The virtio-net model: registers, negotiation, and every way a frame can take, with a driver written from the
//! specification.

mod raw_virtio;

use std::time::Duration;

use raw_virtio::*;
use underpass::pci::Run;
use underpass_drivers::virtio_net::model::peer::PeerSpec;
use underpass_drivers::virtio_net::model::{Count, Features, Profile, VirtioNetModel};

// Registers

#[test]
fn the_registers_and_the_configuration_describe_the_profile() {
    let profile = Profile { max_queue_size: 300, speed: Some(25_000), mtu: 9000, ..pairs(3) };
    let rig = Rig::new(profile);
    let config = rig.device.config();
    assert_eq!((config.vendor_id(), config.device_id(), config.class()), (0x1af4, 0x1041, 0x02_0000));
    assert_eq!(config.read8(8), 1, "revision");
    assert!(rig.multiplier.is_power_of_two() && rig.multiplier >= 4);
    let msix = config.capability(0x11).unwrap();
    assert_eq!(config.read16(msix + 2), 7, "seven queues and the configuration");
    assert_eq!(rig.common.read16(18), 7);
    assert_eq!(rig.status(), 0);
    for (queue, size) in [(0, 256), (6, 256), (7, 0), (0xffff, 0)] {
        rig.common.write16(22, queue);
        assert_eq!(rig.common.read16(24), size, "queue {queue}");
        assert_eq!(rig.common.read16(26), 0xffff, "no vector");
        assert_eq!(rig.common.read16(28), 0);
    }
    let all = rig.offered();
    for feature in [BASE, PACKED, IN_ORDER, EVENT_IDX, INDIRECT, MRG_RXBUF, MQ, RSS, HASH_REPORT, RING_RESET]
    {
        assert_eq!(all & feature, feature);
    }
    rig.common.write32(0, 2);
    assert_eq!(rig.common.read32(4), 0, "nothing over bit 63");
    let mac: Vec<u8> = (0..6).map(|at| rig.config.read8(at)).collect();
    assert_eq!(mac, [2, 0, 0, 0, 0, 1]);
    assert_eq!((rig.config.read16(6), rig.config.read16(8), rig.config.read16(10)), (1, 3, 9000));
    assert_eq!((rig.config.read32(12), rig.config.read8(16)), (25_000, 1));
    assert_eq!((rig.config.read8(17), rig.config.read16(18), rig.config.read32(20)), (40, 128, 0x3f));
    assert!(rig.control.violation().is_none());
}

#[test]
fn only_what_is_offered_and_complete_is_accepted() {
    let mut rig = Rig::new(pairs(1));
    let good =
        [0, PACKED, MRG_RXBUF, CTRL_VQ | MQ | RSS, CSUM | HOST_TSO4 | HOST_ECN, GUEST_CSUM | GUEST_TSO4];
    for features in good {
        assert!(rig.negotiate(BASE | features), "{features:#x}");
    }
    let all = rig.offered();
    assert!(rig.negotiate(all));
    let bad = [
        VERSION_1,
        ACCESS_PLATFORM,
        BASE | 1 << 14,
        BASE | 1 << 10,
        BASE | 1 << 53,
        BASE | 1 << 62,
        BASE | MQ,
        BASE | HOST_TSO4,
        BASE | GUEST_TSO4,
        BASE | CSUM | HOST_ECN,
        BASE | NOTIF_CONFIG_DATA,
        BASE | CTRL_RX_EXTRA,
    ];
    for features in bad {
        assert!(!rig.negotiate(features), "{features:#x}");
        assert_eq!(rig.status() & NEEDS_RESET, 0, "refusing is no error");
    }
    rig.reset();
    rig.set_status(ACKNOWLEDGE | DRIVER);
    rig.accept(BASE);
    rig.common.write32(8, 2);
    rig.common.write32(12, 1);
    rig.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK);
    assert_eq!(rig.status(), ACKNOWLEDGE | DRIVER, "bit 64 is offered by nobody");
    let mut plain = Rig::new(Profile { features: Features::HOST_TSO4 | Features::MAC, ..pairs(1) });
    assert_eq!(plain.offered(), VERSION_1 | MAC, "what is not complete is not offered");
    assert!(plain.negotiate(VERSION_1));
}

// Frames

/// Sends frames of all sizes through the loop over small rings, until these have gone round many times.
fn round_trip(features: u64, size: u16, chained: bool, indirect: bool) {
    let mut rig = Rig::new(pairs(1));
    let (mut queues, _) = rig.start(features, 1, size);
    let (rx, tx) = &mut queues[0];
    let mergeable = features & MRG_RXBUF != 0;
    let lens: &[usize] = match (chained, mergeable) {
        (false, false) => &[1600],
        (false, true) => &[200],
        (true, false) => &[12, 100, 1600],
        (true, true) => &[20, 60, 120],
    };
    let cuts: &[usize] = if chained { &[12, 40] } else { &[] };
    let (mut sent, mut got) = (0, 0);
    while got < 400 {
        while rx.free() >= if indirect { 1 } else { lens.len() as u16 } {
            rig.post(rx, lens, indirect);
        }
        for _ in 0..=sent % 5 {
            if tx.free() < 3 {
                break;
            }
            let len = [60, 14, 1514, 300, 61, 777][sent % 6];
            rig.send(tx, &[], &frame(sent, len), cuts, indirect);
            sent += 1;
        }
        rig.step_all();
        assert!(rig.control.violation().is_none(), "{:?}", rig.control.violation());
        tx.take_used(&rig.memory);
        for received in rig.received(rx) {
            let len = [60, 14, 1514, 300, 61, 777][got % 6];
            assert_eq!(received.bytes, frame(got, len), "frame {got}");
            assert!(received.header[..10].iter().all(|byte| *byte == 0));
            assert!(received.header[12..].iter().all(|byte| *byte == 0), "no hash was asked for");
            got += 1;
        }
    }
    assert_eq!(rig.control.count(Count::TxFrames) as usize, sent);
    assert_eq!(rig.control.count(Count::RxFrames) as usize, got);
}

#[test]
fn frames_pass_through_every_kind_of_ring() {
    for ring in [0, PACKED] {
        for order in [0, IN_ORDER] {
            for events in [0, EVENT_IDX] {
                for receive in [0, MRG_RXBUF, MRG_RXBUF | HASH_REPORT] {
                    for (chained, indirect) in [(false, false), (true, false), (true, true)] {
                        let features = ring | order | events | receive | INDIRECT;
                        round_trip(features, 64, chained, indirect);
                    }
                }
            }
        }
    }
}

#[test]
fn packed_rings_need_no_power_of_two() {
    round_trip(PACKED | MRG_RXBUF, 37, true, false);
    round_trip(PACKED | IN_ORDER | EVENT_IDX, 13, false, false);
}

#[test]
fn a_batch_in_order_is_used_by_one_element() {
    for ring in [0, PACKED] {
        let mut rig = Rig::new(pairs(1));
        let (mut queues, _) = rig.start(IN_ORDER | ring, 1, 16);
        let (_, tx) = &mut queues[0];
        for n in 0..9 {
            rig.send(tx, &[], &frame(n, 60), &[], false);
        }
        rig.step_all();
        let used = tx.take_used(&rig.memory);
        assert_eq!(used.len(), 9);
        assert_eq!(used.iter().flatten().count(), 1, "one element for all of them");
        assert_eq!(used.last(), Some(&Some(0)));
    }
}

#[test]
fn a_frame_waits_for_buffers_and_the_driver_for_the_peer() {
    for ring in [0, PACKED] {
        let mut rig = Rig::new(pairs(1));
        let (mut queues, _) = rig.start(MRG_RXBUF | ring, 1, 1024);
        let (rx, tx) = &mut queues[0];
        for n in 0..700 {
            rig.send(tx, &[], &frame(n, 1000), &[], false);
        }
        rig.step_all();
        // Nothing is posted: the loop is full, and the rest is with the driver.
        let waiting = tx.outstanding() - tx.take_used(&rig.memory).len();
        assert!(waiting > 0 && waiting < 700, "{waiting} of 700");
        rig.post(rx, &[500], false);
        rig.step_all();
        assert!(rig.received(rx).is_empty(), "half a frame is no frame");
        let mut got = 0;
        while got < 700 {
            while rx.free() > 0 {
                rig.post(rx, &[512], false);
            }
            rig.step_all();
            for received in rig.received(rx) {
                assert_eq!(received.bytes, frame(got, 1000));
                got += 1;
            }
            tx.take_used(&rig.memory);
        }
        assert_eq!(tx.outstanding(), 0);
    }
}

#[test]
fn runts_and_over_long_frames_are_counted_and_dropped() {
    let (hands, peers) = Hand::peers(1);
    let mut rig = Rig::with_peers(Profile { mtu: 500, ..pairs(1) }, peers);
    let (mut queues, _) = rig.start(CSUM, 1, 16);
    let (rx, tx) = &mut queues[0];
    for len in [13, 14, 518, 519] {
        rig.send(tx, &[], &frame(1, len), &[], false);
    }
    // The checksum is to go behind the frame.
    rig.send(tx, &[1, 0, 0, 0, 0, 0, 50, 0, 9, 0], &frame(1, 60), &[], false);
    rig.send(tx, &[1, 0, 0, 0, 0, 0, 50, 0, 8, 0], &frame(1, 60), &[], false);
    rig.step_all();
    assert_eq!(tx.take_used(&rig.memory).len(), 6);
    assert_eq!(hands[0].sent().iter().map(Vec::len).collect::<Vec<_>>(), [14, 518, 60]);
    for (count, value) in
        [(Count::TxRunts, 1), (Count::TxOversize, 1), (Count::TxMalformed, 1), (Count::TxFrames, 6)]
    {
        assert_eq!(rig.control.count(count), value, "{count:?}");
    }
    rig.post(rx, &[100], false);
    for len in [60, 200, 519, 88] {
        hands[0].give(&frame(2, len));
    }
    rig.step_all();
    assert_eq!(rig.received(rx).len(), 1);
    assert_eq!(rig.control.count(Count::RxOversize), 0, "nothing is asked of the peer without a buffer");
    rig.post(rx, &[100], false);
    rig.step_all();
    assert_eq!(rig.received(rx)[0].bytes.len(), 88);
    assert_eq!(rig.control.count(Count::RxOversize), 2);
}

// Interrupts and notifications

/// Offset of a queue's driver area.
fn driver_area(rig: &Rig, queue: u16) -> usize {
    rig.common.write16(22, queue);
    (rig.common.read64(40) - rig.memory.base) as usize
}

#[test]
fn interrupts_come_by_the_queues_vector_as_the_driver_asks() {
    for ring in [0, PACKED] {
        for events in [0, EVENT_IDX] {
            let mut rig = Rig::new(pairs(1));
            let interrupts = rig.device.interrupts(3).unwrap();
            assert!(rig.negotiate(BASE | ring | events));
            let mut rx = rig.queue(0, 8);
            let mut tx = rig.queue(1, 8);
            for (queue, vector) in [(0, 1), (1, 2)] {
                rig.common.write16(22, queue);
                rig.common.write16(26, 99);
                assert_eq!(rig.common.read16(26), 0xffff, "there is no such vector");
                rig.common.write16(26, vector);
                assert_eq!(rig.common.read16(26), vector);
            }
            rig.driver_ok();
            let mut pass = |rig: &mut Rig, count: usize| {
                for n in 0..count {
                    rig.post(&mut rx, &[1600], false);
                    rig.send(&mut tx, &[], &frame(n, 60), &[], false);
                }
                rig.step_all();
                assert_eq!(rig.received(&mut rx).len(), count);
                tx.take_used(&rig.memory);
                [0, 1, 2].map(|vector: usize| interrupts[vector].drain())
            };
            // Suppression words of zero: interrupts are on; with EVENT_IDX on a split ring, for the first buffer.
            assert_eq!(pass(&mut rig, 1), [false, true, true]);
            // (of receive and transmit) 1 disables; with EVENT_IDX an event far away does.
            let (areas, size) = ([driver_area(&rig, 0), driver_area(&rig, 1)], 8);
            for area in areas {
                match (ring, events) {
                    (0, 0) => rig.memory.put16(area, 1),
                    (0, _) => rig.memory.put16(area + 4 + 2 * size, 1000),
                    _ => rig.memory.put16(area + 2, 1),
                }
            }
            assert_eq!(pass(&mut rig, 5), [false; 3]);
            if events != 0 {
                // Six are used; ask for the ninth, which is the first of the second round.
                for area in areas {
                    if ring == 0 {
                        rig.memory.put16(area + 4 + 2 * size, 8);
                    } else {
                        rig.memory.put(area, &[0, 0, 2, 0]);
                    }
                }
                assert_eq!(pass(&mut rig, 2), [false; 3]);
                assert_eq!(pass(&mut rig, 1), [false, true, true]);
                assert_eq!(pass(&mut rig, 3), [false; 3], "once");
            }
            assert!(rig.control.violation().is_none());
        }
    }
}

#[test]
fn without_vectors_the_isr_status_tells_and_the_link_changes_the_generation() {
    let mut rig = Rig::new(pairs(1));
    let (mut queues, _) = rig.start(STATUS | CTRL_VQ | GUEST_ANNOUNCE, 1, 8);
    let (rx, tx) = &mut queues[0];
    rig.post(rx, &[1600], false);
    rig.send(tx, &[], &frame(1, 60), &[], false);
    rig.step_all();
    assert_eq!((rig.isr.read8(0), rig.isr.read8(0)), (1, 0), "reading clears");
    let generation = rig.common.read8(21);
    assert_eq!((rig.config.read16(6), rig.common.read8(21)), (1, generation));
    rig.control.set_link(false);
    rig.control.set_link(false);
    assert_eq!(rig.isr.read8(0), 2);
    assert_eq!(rig.config.read16(6), 0);
    assert_eq!(rig.common.read8(21), generation.wrapping_add(1));
    assert!(!rig.control.link_is_up());
    rig.received(rx);
    rig.post(rx, &[1600], false);
    rig.send(tx, &[], &frame(1, 60), &[], false);
    rig.step_all();
    assert_eq!(rig.control.count(Count::TxLinkDown), 1);
    rig.control.set_link(true);
    rig.control.announce();
    assert_eq!(rig.config.read16(6), 3);
    rig.send(tx, &[], &frame(2, 60), &[], false);
    rig.step_all();
    assert_eq!(rig.received(rx)[0].bytes, frame(2, 60));
}

#[test]
fn a_device_that_asks_for_notifications_looks_when_it_is_notified() {
    for ring in [0, PACKED] {
        for events in [0, EVENT_IDX] {
            let mut rig = Rig::new(Profile { notified: true, ..pairs(1) });
            let (mut queues, _) = rig.start(ring | events, 1, 8);
            let (rx, tx) = &mut queues[0];
            rig.step_all();
            for n in 0..20 {
                assert!(rx.is_asked(&rig.memory) && tx.is_asked(&rig.memory));
                rig.post(rx, &[1600], false);
                rig.send(tx, &[], &frame(n, 60), &[], false);
                rig.step_all();
                assert!(rig.received(rx).is_empty());
                rig.notify(1);
                rig.step_all();
                assert_eq!(tx.take_used(&rig.memory).len(), 1);
                assert!(rig.received(rx).is_empty(), "its buffer was not notified");
                rig.notify(0);
                rig.step_all();
                assert_eq!(rig.received(rx)[0].bytes, frame(n, 60));
            }
        }
    }
    // One that polls does not ask.
    let mut rig = Rig::new(pairs(1));
    let (queues, _) = rig.start(EVENT_IDX, 1, 8);
    assert!(!queues[0].0.is_asked(&rig.memory));
    let (mut queues, _) = rig.start(PACKED, 1, 8);
    assert!(!queues[0].0.is_asked(&rig.memory));
    rig.notify(1);
    rig.send(&mut queues[0].1, &[], &frame(0, 60), &[], false);
    rig.step_all();
    assert!(rig.control.violation().is_none());
}

#[test]
fn notifications_carry_the_data_that_were_negotiated() {
    let mut rig = Rig::new(pairs(1));
    rig.start(NOTIFICATION_DATA, 1, 8);
    rig.notify.write32(rig.multiplier, 1 | 5 << 16);
    assert!(rig.control.violation().is_none());
    rig.start(NOTIFICATION_DATA | NOTIF_CONFIG_DATA, 1, 8);
    rig.common.write16(22, 1);
    let data = u32::from(rig.common.read16(56));
    assert_ne!(data, 1, "a value of the device's own");
    rig.notify.write32(rig.multiplier, data | 5 << 16);
    assert!(rig.control.violation().is_none());
    rig.notify.write32(rig.multiplier, 1 | 5 << 16);
    assert!(rig.violation().contains("notification"));
}

// Reset

#[test]
fn a_reset_forgets_what_was_queued_and_the_device_starts_again() {
    for ring in [0, PACKED] {
        let mut rig = Rig::new(pairs(2));
        for round in 0..4 {
            let (mut queues, _) = rig.start(ring | MRG_RXBUF | CTRL_VQ | MQ, 2, 32);
            let (rx, tx) = &mut queues[0];
            let mark = 1000 * round;
            for n in 0..10 {
                rig.post(rx, &[256], false);
                rig.send(tx, &[], &frame(mark + n, 200), &[], false);
            }
            rig.step_all();
            assert_eq!(rig.received(rx).last().unwrap().bytes, frame(mark + 9, 200));
            // Frames without buffers, and one that has half of what it needs.
            for n in 0..3 {
                rig.send(tx, &[], &frame(n, 900), &[], false);
            }
            rig.post(rx, &[256], false);
            rig.step_all();
            rig.send(tx, &[], &frame(5, 900), &[], false);
            if round % 2 == 0 {
                rig.set_status(0);
            } else {
                rig.device.reset().unwrap();
            }
            assert_eq!(rig.status(), 0);
            let before = rig.memory.bytes.to_vec();
            rig.step_all();
            assert_eq!(rig.memory.bytes[..], before[..], "the device writes after its reset");
            // What is on the cable still comes; drain it.
            let (mut queues, _) = rig.start(ring | MRG_RXBUF, 1, 32);
            let rx = &mut queues[0].0;
            for _ in 0..32 {
                rig.post(rx, &[1600], false);
            }
            rig.step_all();
            rig.received(rx);
        }
    }
}

#[test]
fn queues_are_reset_one_by_one() {
    for ring in [0, PACKED] {
        let mut rig = Rig::new(pairs(1));
        let (mut queues, _) = rig.start(ring | RING_RESET, 1, 16);
        let (rx, tx) = &mut queues[0];
        for n in 0..5 {
            rig.post(rx, &[1600], false);
            rig.send(tx, &[], &frame(n, 60), &[], false);
        }
        rig.step_all();
        assert_eq!(rig.received(rx).len(), 5);
        rig.post(rx, &[1600], false);
        rig.common.write16(22, 0);
        rig.common.write16(58, 1);
        assert_eq!((rig.common.read16(58), rig.common.read16(28)), (0, 0));
        assert_eq!(rig.common.read16(24), 1024, "the largest size again");
        rig.send(tx, &[], &frame(7, 60), &[], false);
        rig.step_all();
        assert_eq!(rig.control.count(Count::RxNoQueue), 0, "the frame waits on the cable");
        let mut rx = rig.queue(0, 4);
        rig.send(tx, &[], &frame(8, 60), &[], false);
        rig.post(&mut rx, &[1600], false);
        rig.post(&mut rx, &[1600], false);
        rig.step_all();
        let received: Vec<_> = rig.received(&mut rx).into_iter().map(|frame| frame.bytes).collect();
        assert_eq!(received, [frame(7, 60), frame(8, 60)]);
        assert!(rig.control.violation().is_none());
    }
}

#[test]
fn threads_and_resets_under_load() {
    let model = VirtioNetModel::new(Profile { peer: PeerSpec::Loop, ..pairs(2) }).unwrap();
    let mut rig = Rig::run_by(model, Run::Threads { cores: Vec::new() });
    for round in 0..12 {
        let features = IN_ORDER | if round % 2 == 0 { PACKED } else { 0 };
        let (mut queues, _) = rig.start(features, 1, 64);
        let (rx, tx) = &mut queues[0];
        for n in 0..20 {
            rig.post(rx, &[256], false);
            rig.send(tx, &[], &frame(n, 100), &[], false);
        }
        if round % 4 < 2 {
            std::thread::sleep(Duration::from_micros(50 * round));
        }
        rig.reset();
        let before = rig.memory.bytes.to_vec();
        std::thread::sleep(Duration::from_millis(1));
        assert_eq!(rig.memory.bytes[..], before[..], "the device writes after its reset");
    }
}

#[test]
fn what_the_peer_can_not_pass_on_is_counted_and_the_driver_sees_the_link_go_down() {
    let (reader, writer) = std::io::pipe().unwrap();
    let output = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&writer));
    let peer = PeerSpec::parse(&format!("pcap::{output}"), |_| None).unwrap();
    let mut rig = Rig::new(Profile { peer, ..pairs(1) });
    drop((reader, writer));
    let (mut queues, _) = rig.start(STATUS, 1, 8);
    let (rx, tx) = &mut queues[0];
    rig.post(rx, &[1600], false);
    for n in 0..3 {
        rig.send(tx, &[], &frame(n, 60), &[], false);
    }
    // It is written after a quiet time.
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
    while rig.control.link_is_up() && std::time::Instant::now() < deadline {
        rig.step_all();
    }
    assert_eq!(rig.config.read16(6), 0, "the link is down");
    rig.send(tx, &[], &frame(3, 60), &[], false);
    rig.step_all();
    let counts = [Count::TxFrames, Count::TxUndelivered, Count::TxLinkDown];
    assert_eq!(counts.map(|count| rig.control.count(count)), [4, 3, 1]);
}

#[test]
fn a_frame_that_is_reset_with_its_queue_is_counted() {
    let (hands, peers) = Hand::peers(1);
    let mut rig = Rig::with_peers(pairs(1), peers);
    let (mut queues, _) = rig.start(0, 1, 8);
    let (_, tx) = &mut queues[0];
    hands[0].0.lock().unwrap().refuses = true;
    rig.send(tx, &[], &frame(1, 60), &[], false);
    rig.step_all();
    rig.common.write8(20, 0);
    let counts = [Count::TxFrames, Count::TxReset, Count::RxReset];
    assert_eq!(counts.map(|count| rig.control.count(count)), [1, 1, 0]);
}
