//! The virtio-net model and drivers that break the rules: each finds that the device needs a reset, and why; the device
//! neither panics nor hangs, and works again after a reset.

mod raw_virtio;

use raw_virtio::*;
use underpass_drivers::virtio_net::model::{Features, Profile};

/// Whatever was wrong: after a reset the device works.
fn works_again(rig: &mut Rig) {
    rig.step_all();
    let (mut queues, _) = rig.start(0, 1, 8);
    let (rx, tx) = &mut queues[0];
    rig.send(tx, &[], &frame(9, 100), &[], false);
    // What was on the cable comes first.
    let mut last = None;
    for _ in 0..5 {
        while rx.free() > 0 {
            rig.post(rx, &[1600], false);
        }
        rig.step_all();
        last = rig.received(rx).pop().or(last);
    }
    assert_eq!(last.map(|last| last.bytes), Some(frame(9, 100)));
}

fn expect(rig: &mut Rig, rule: &str) {
    let violation = rig.violation();
    assert!(violation.contains(rule), "{violation:?} instead of {rule:?}");
    works_again(rig);
}

// Registers

#[test]
fn registers_that_are_used_against_the_rules() {
    type Case = (&'static str, fn(&mut Rig));
    let cases: [Case; 26] = [
        ("read-only", |rig| rig.common.write32(4, 1)),
        ("read-only", |rig| rig.common.write16(18, 1)),
        ("read-only", |rig| rig.common.write8(21, 1)),
        ("read-only", |rig| rig.common.write16(30, 1)),
        ("read-only", |rig| rig.config.write16(6, 0)),
        ("read-only", |rig| rig.isr.write8(0, 0)),
        ("width", |rig| rig.common.write8(22, 1)),
        ("width", |rig| rig.common.write16(0, 1)),
        ("width", |rig| rig.common.write32(20, 1)),
        ("step", |rig| rig.set_status(DRIVER)),
        ("step", |rig| rig.set_status(ACKNOWLEDGE | DRIVER | DRIVER_OK)),
        ("cleared", |rig| {
            rig.set_status(ACKNOWLEDGE | DRIVER);
            rig.set_status(ACKNOWLEDGE);
        }),
        ("step", |rig| {
            // Refused features, and the driver goes on.
            rig.negotiate(0);
            rig.driver_ok();
        }),
        ("after FEATURES_OK", |rig| {
            rig.negotiate(BASE);
            rig.accept(BASE | MAC);
        }),
        ("size", |rig| rig.common.write16(24, 0)),
        ("size", |rig| rig.common.write16(24, 2048)),
        ("power of two", |rig| {
            rig.negotiate(BASE);
            rig.common.write16(24, 100);
            rig.common.write16(28, 1);
        }),
        ("before the features", |rig| {
            rig.reset();
            rig.common.write16(28, 1);
        }),
        ("other than one", |rig| {
            rig.negotiate(BASE);
            rig.common.write16(28, 0);
        }),
        ("does not exist", |rig| {
            rig.negotiate(BASE);
            rig.common.write16(22, 3);
            rig.common.write16(28, 1);
        }),
        ("not negotiated", |rig| {
            rig.negotiate(BASE);
            rig.queue(2, 8);
            rig.driver_ok();
        }),
        ("enabled", |rig| {
            rig.negotiate(BASE);
            rig.queue(0, 8);
            rig.common.write64(32, 0);
        }),
        ("after DRIVER_OK", |rig| {
            rig.negotiate(BASE);
            rig.driver_ok();
            rig.common.write16(28, 1);
        }),
        ("without RING_RESET", |rig| {
            rig.start(0, 1, 8);
            rig.common.write16(58, 1);
        }),
        ("before DRIVER_OK", |rig| {
            rig.negotiate(BASE);
            rig.notify(0);
        }),
        ("notification", |rig| {
            rig.start(0, 1, 8);
            rig.notify.write32(0, 0);
        }),
    ];
    let mut rig = Rig::new(pairs(1));
    for (rule, break_it) in cases {
        rig.reset();
        break_it(&mut rig);
        expect(&mut rig, rule);
    }
}

#[test]
fn rings_that_are_misaligned_or_not_mapped() {
    for (ring, aligns) in [(0, [16, 2, 4]), (PACKED, [16, 4, 4])] {
        let mut rig = Rig::new(pairs(1));
        for (area, align) in aligns.into_iter().enumerate() {
            for (value, rule) in
                [(align / 2, "misaligned"), (NOWHERE, "can not be accessed"), (1 << 63, "can not be")]
            {
                assert!(rig.negotiate(BASE | ring));
                rig.configure(0, 8);
                let register = 32 + 8 * area as u64;
                let before = rig.common.read64(register);
                rig.common.write64(register, if value < 16 { before + value } else { value });
                rig.common.write16(28, 1);
                rig.driver_ok();
                expect(&mut rig, rule);
            }
        }
        // A ring that ends outside of what is mapped.
        assert!(rig.negotiate(BASE | ring));
        rig.configure(0, 1024);
        rig.common.write64(32, rig.memory.iova(rig.memory.bytes.len() - 4096));
        rig.common.write16(28, 1);
        rig.driver_ok();
        expect(&mut rig, "can not be accessed");
    }
}

// Rings

/// Breaks a rule on a transmit queue of 8 with `features`; a buffer of 100 bytes is at the address given.
fn break_ring(features: u64, rule: &str, break_it: impl Fn(&mut Memory, &mut Queue, u64)) {
    let mut rig = Rig::new(pairs(1));
    let (mut queues, _) = rig.start(features, 1, 8);
    let at = rig.memory.take(100, 1);
    let at = rig.memory.iova(at);
    // In the middle of the ring.
    let tx = &mut queues[0].1;
    for n in 0..6 {
        rig.send(tx, &[], &frame(n, 60), &[], false);
    }
    rig.step_all();
    tx.take_used(&rig.memory);
    break_it(&mut rig.memory, tx, at);
    rig.step_all();
    expect(&mut rig, rule);
}

/// One descriptor, made available on its own.
fn one(memory: &mut Memory, queue: &mut Queue, at: u64, len: u32, flags: u16) {
    let head = queue.next;
    queue.put_descriptor(memory, at, len, flags);
    queue.publish(memory, head, 1);
}

#[test]
fn buffers_that_make_no_sense() {
    for ring in [0, PACKED] {
        break_ring(ring, "no bytes", |memory, queue, at| queue.add(memory, &[(at, 0, false)], false));
        break_ring(ring, "no bytes", |memory, queue, at| {
            queue.add(memory, &[(at, 50, false), (at, 0, false)], false);
        });
        break_ring(ring, "behind one to write", |memory, queue, at| {
            queue.add(memory, &[(at, 12, false), (at, 10, true), (at, 10, false)], false);
        });
        break_ring(ring, "address space", |memory, queue, _| {
            queue.add(memory, &[(u64::MAX - 5, 60, false)], false);
        });
        break_ring(ring, "2^32", |memory, queue, at| {
            queue.add(memory, &[(at, u32::MAX, false), (at, 1, false)], false);
        });
        break_ring(ring, "can not be accessed", |memory, queue, _| {
            queue.add(memory, &[(NOWHERE, 60, false)], false);
        });
        break_ring(ring, "shorter than its header", |memory, queue, at| {
            queue.add(memory, &[(at, 11, false)], false);
        });
        break_ring(ring, "shorter than its header", |memory, queue, at| {
            queue.add(memory, &[(at, 50, true)], false);
        });
    }
}

#[test]
fn indirect_tables_that_make_no_sense() {
    for ring in [0, PACKED] {
        let (features, packed) = (ring | INDIRECT, ring != 0);
        break_ring(ring, "without the feature", |memory, queue, at| {
            queue.add(memory, &[(at, 60, false)], true);
        });
        for len in [0, 8, 17, 15] {
            break_ring(features, "whole number", |memory, queue, at| one(memory, queue, at, len, 4));
        }
        break_ring(features, "more descriptors than its queue", |memory, queue, at| {
            queue.add(memory, &[(at, 2, false); 9], true);
        });
        break_ring(features, "can not be accessed", |memory, queue, _| one(memory, queue, NOWHERE, 16, 4));
        break_ring(features, if packed { "indirect" } else { "has a next one" }, |memory, queue, at| {
            one(memory, queue, at, 16, 5);
        });
        if packed {
            // After a direct one.
            break_ring(features, "indirect", |memory, queue, at| {
                let head = queue.next;
                queue.put_descriptor(memory, at, 20, 1);
                queue.put_descriptor(memory, at, 16, 4);
                queue.publish(memory, head, 2);
            });
            continue;
        }
        let table = |memory: &mut Memory, queue: &mut Queue, entries: &[[u8; 16]]| {
            let table = memory.take(16 * entries.len(), 16);
            memory.put(table, &entries.concat());
            let at = memory.iova(table);
            one(memory, queue, at, 16 * entries.len() as u32, 4);
        };
        let entry = |at: u64, flags: u16, next: u16| {
            let mut bytes = [0; 16];
            bytes[..8].copy_from_slice(&at.to_le_bytes());
            bytes[8] = 20;
            bytes[12..14].copy_from_slice(&flags.to_le_bytes());
            bytes[14..].copy_from_slice(&next.to_le_bytes());
            bytes
        };
        break_ring(features, "outside of its indirect table", |memory, queue, at| {
            table(memory, queue, &[entry(at, 1, 2), entry(at, 0, 0)]);
        });
        break_ring(features, "a loop", |memory, queue, at| {
            table(memory, queue, &[entry(at, 1, 1), entry(at, 1, 0)]);
        });
        break_ring(features, "in an indirect table", |memory, queue, at| {
            table(memory, queue, &[entry(at, 4, 0)]);
        });
        break_ring(features | IN_ORDER, "not in order", |memory, queue, at| {
            table(memory, queue, &[entry(at, 1, 2), entry(at, 0, 0), entry(at, 0, 0)]);
        });
    }
}

#[test]
fn split_rings_that_make_no_sense() {
    break_ring(0, "not below the queue size", |memory, queue, _| queue.publish(memory, 8, 1));
    break_ring(0, "not below the queue size", |memory, queue, _| queue.publish(memory, 0xffff, 1));
    let next = |queue: &Queue| queue.desc + 16 * usize::from(queue.next) + 14;
    break_ring(0, "not below the queue size", |memory, queue, at| {
        let (head, next) = (queue.next, next(queue));
        queue.put_descriptor(memory, at, 60, 1);
        memory.put16(next, 8);
        queue.publish(memory, head, 1);
    });
    break_ring(0, "a loop", |memory, queue, at| {
        let (head, next) = (queue.next, next(queue));
        queue.put_descriptor(memory, at, 60, 1);
        memory.put16(next, head);
        queue.publish(memory, head, 1);
    });
    break_ring(0, "more than the queue size", |memory, queue, _| {
        memory.put16(queue.avail + 2, queue.avail_idx + 9);
    });
    break_ring(0, "more than the queue size", |memory, queue, _| {
        memory.put16(queue.avail + 2, queue.avail_idx.wrapping_sub(1));
    });
    break_ring(IN_ORDER, "does not end", |memory, queue, at| {
        queue.next = (queue.next + 1) % queue.size;
        queue.add(memory, &[(at, 60, false)], false);
    });
    break_ring(IN_ORDER, "not the next one", |memory, queue, at| {
        let (head, next) = (queue.next, next(queue));
        queue.put_descriptor(memory, at, 60, 1);
        memory.put16(next, 3);
        queue.publish(memory, head, 1);
    });
}

#[test]
fn an_index_that_goes_back_while_buffers_are_with_the_device() {
    let (hands, peers) = Hand::peers(1);
    let mut rig = Rig::with_peers(pairs(1), peers);
    let (mut queues, _) = rig.start(0, 1, 8);
    let rx = &mut queues[0].0;
    for _ in 0..4 {
        rig.post(rx, &[100], false);
    }
    hands[0].give(&frame(0, 60));
    rig.step_all();
    for _ in 0..3 {
        hands[0].give(&frame(0, 60));
    }
    rig.step_all();
    assert_eq!(rig.received(rx).len(), 4);
    rig.memory.put16(rx.avail + 2, 2);
    rig.step_all();
    assert!(rig.violation().contains("more than the queue size"));
}

#[test]
fn packed_rings_that_make_no_sense() {
    // The second descriptor of a chain is not available.
    break_ring(PACKED, "before all of its descriptors", |memory, queue, at| {
        let head = queue.next;
        queue.put_descriptor(memory, at, 60, 1);
        queue.publish(memory, head, 1);
    });
    // One that goes round the whole ring and on.
    break_ring(PACKED, "before all of its descriptors", |memory, queue, at| {
        for _ in 0..8 {
            queue.put_descriptor(memory, at, 20, 1);
        }
    });
    for (features, flags) in [(PACKED, 3), (PACKED | EVENT_IDX, 3), (PACKED, 2)] {
        break_ring(features, "flags that are reserved", |memory, queue, at| {
            memory.put16(queue.avail + 2, flags);
            queue.add(memory, &[(at, 60, false)], false);
        });
    }
}

// What the buffers hold

#[test]
fn headers_that_ask_for_what_was_not_negotiated() {
    let all = CSUM | HOST_TSO4 | HOST_TSO6 | HOST_USO;
    // flags, gso_type, hdr_len, gso_size, csum_start, csum_offset, num_buffers
    let header = |flags: u8, gso: u8, size: u16, buffers: u16| {
        let mut bytes = vec![flags, gso, 54, 0];
        for value in [size, 34, 16, buffers] {
            bytes.extend(value.to_le_bytes());
        }
        bytes
    };
    let cases = [
        (all, header(0, 0, 0, 1), "num_buffers"),
        (all, header(2, 0, 0, 0), "flags of received ones"),
        (all, header(4, 0, 0, 0), "flags of received ones"),
        (0, header(1, 0, 0, 0), "without CSUM"),
        (CSUM, header(1, 1, 100, 0), "without the feature"),
        (CSUM | HOST_TSO4, header(1, 4, 100, 0), "without the feature"),
        (CSUM | HOST_TSO4, header(1, 5, 100, 0), "without the feature"),
        (all, header(1, 0x81, 100, 0), "without the feature"),
        (all, header(0, 0x80, 0, 0), "ECN"),
        (all, header(1, 0x85, 100, 0), "unknown"),
        (all, header(1, 3, 100, 0), "unknown"),
        (all, header(1, 2, 100, 0), "unknown"),
        (all, header(0, 1, 100, 0), "without a checksum"),
        (all, header(1, 1, 0, 0), "without a size"),
    ];
    let mut rig = Rig::new(pairs(1));
    for (features, header, rule) in cases {
        let (mut queues, _) = rig.start(features, 1, 8);
        rig.send(&mut queues[0].1, &header, &frame(1, 200), &[], false);
        rig.step_all();
        expect(&mut rig, rule);
    }
}

#[test]
fn receive_buffers_that_can_not_hold_anything() {
    for ring in [0, PACKED] {
        for (features, elements, rule) in [
            (MRG_RXBUF, vec![11], "shorter than the header"),
            (MRG_RXBUF | HASH_REPORT, vec![10, 9], "shorter than the header"),
        ] {
            let mut rig = Rig::new(pairs(1));
            let (mut queues, _) = rig.start(ring | features, 1, 8);
            let (rx, tx) = &mut queues[0];
            rig.post(rx, &elements, false);
            rig.send(tx, &[], &frame(1, 200), &[], false);
            rig.step_all();
            expect(&mut rig, rule);
        }
        let mut rig = Rig::new(pairs(1));
        let (mut queues, _) = rig.start(ring, 1, 8);
        let (rx, tx) = &mut queues[0];
        let at = rig.memory.take(2000, 1);
        let at = rig.memory.iova(at);
        rx.add(&mut rig.memory, &[(at, 10, false), (at, 1990, true)], false);
        rig.send(tx, &[], &frame(1, 200), &[], false);
        rig.step_all();
        expect(&mut rig, "a part to read");
        // Memory that went away since.
        let (mut queues, _) = rig.start(ring, 1, 8);
        let (rx, tx) = &mut queues[0];
        rx.add(&mut rig.memory, &[(NOWHERE, 2000, true)], false);
        rig.send(tx, &[], &frame(1, 200), &[], false);
        rig.step_all();
        expect(&mut rig, "can not be accessed");
    }
}

#[test]
fn control_commands_without_a_place_for_the_answer() {
    for elements in [vec![(2, false)], vec![(1, false), (1, true)], vec![(4, true)]] {
        let mut rig = Rig::new(pairs(1));
        let (_, control) = rig.start(CTRL_VQ, 1, 8);
        let mut control = control.unwrap();
        let at = rig.memory.take(16, 1);
        let at = rig.memory.iova(at);
        let elements: Vec<_> = elements.into_iter().map(|(len, write)| (at, len, write)).collect();
        control.add(&mut rig.memory, &elements, false);
        rig.step_all();
        expect(&mut rig, "control command");
    }
}

#[test]
fn a_queue_pair_that_is_not_in_use() {
    let mut rig = Rig::new(pairs(2));
    let (mut queues, _) = rig.start(CTRL_VQ | MQ, 2, 8);
    rig.send(&mut queues[1].1, &[], &frame(1, 100), &[], false);
    rig.step_all();
    expect(&mut rig, "not in use");
}

// The device itself

#[test]
fn a_broken_device_says_so_and_does_nothing_more() {
    let mut rig = Rig::new(Profile { features: Features(0), ..pairs(1) });
    let interrupts = rig.device.interrupts(2).unwrap();
    assert!(rig.negotiate(VERSION_1));
    let mut rx = rig.queue(0, 8);
    let mut tx = rig.queue(1, 8);
    rig.common.write16(16, 1);
    rig.driver_ok();
    rig.post(&mut rx, &[100], false);
    tx.publish(&mut rig.memory, 100, 1);
    rig.send(&mut tx, &[], &frame(1, 60), &[], false);
    rig.step_all();
    assert!(rig.violation().starts_with("queue 1: "));
    assert!(interrupts[1].drain(), "the configuration has changed");
    assert!(rig.received(&mut rx).is_empty() && tx.take_used(&rig.memory).is_empty());
    assert!(!rig.device.step(), "there is nothing that it would do");
    // The driver may acknowledge what it finds, and the bit stays.
    rig.set_status(rig.status());
    assert_eq!(rig.status(), 0x4f);
}

#[test]
fn without_bus_mastering_nothing_is_accessed() {
    let mut rig = Rig::new(pairs(1));
    let (mut queues, _) = rig.start(0, 1, 8);
    let (rx, tx) = &mut queues[0];
    rig.post(rx, &[100], false);
    rig.send(tx, &[], &frame(1, 60), &[], false);
    rig.device.set_bus_master(false).unwrap();
    assert!(!rig.device.step());
    assert!(tx.take_used(&rig.memory).is_empty());
    rig.device.set_bus_master(true).unwrap();
    rig.step_all();
    assert_eq!(rig.received(rx).len(), 1);
}

/// Random bytes in all that the driver shares: whatever it is, the device neither panics nor hangs.
#[test]
fn rings_of_random_bytes() {
    let mut seed = 1_u64;
    let mut random = move || {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        seed >> 33
    };
    let mut rig = Rig::new(pairs(1));
    let mut broken = 0;
    for round in 0..400 {
        let features =
            [0, PACKED][round % 2] | [0, INDIRECT][round / 2 % 2] | [0, EVENT_IDX | MRG_RXBUF][round / 4 % 2];
        let (mut queues, control) = rig.start(features | CTRL_VQ | CTRL_RX, 1, 8);
        let (rx, tx) = &mut queues[0];
        rig.post(rx, &[300], false);
        rig.send(tx, &[], &frame(round, 80), &[], false);
        let mut control = control.unwrap();
        assert_eq!(rig.command(&mut control, 0, 0, &[1]), 0);
        let base = rig.memory.base;
        for _ in 0..=random() % 6 {
            let queue = [&*rx, &*tx, &control][(random() % 3) as usize];
            let (area, len) = [(queue.desc, 128), (queue.avail, 4)][(random() % 2) as usize];
            let at = area + (random() % len) as usize;
            // Often an address that is mapped.
            let value = if random() % 2 == 0 { base + random() % 4096 } else { random() };
            rig.memory.put(at, &value.to_le_bytes()[..=(random() % 8) as usize]);
        }
        rig.step_all();
        broken += usize::from(rig.status() & NEEDS_RESET != 0);
        if round % 50 == 0 {
            rig = Rig::new(pairs(1));
        }
    }
    assert!(broken > 100, "only {broken} were found");
    works_again(&mut rig);
}
