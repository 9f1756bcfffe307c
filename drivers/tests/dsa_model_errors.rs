//! The DSA model when it is used wrongly: descriptors that it must refuse, memory that it can not reach, batches with
//! bad members, full queues, and whatever comes out of a random generator.

mod raw;

use std::time::Duration;

use proptest::prelude::*;
use raw::{CMD, GENCTRL, INTCAUSE, NOWHERE, RECORD, RECORDS, Raw, Record, Rig, SWERR};
use underpass::pci::Run;
use underpass_drivers::dsa::model::DsaProfile;

const SRC: usize = 0x10_0000;
const DST: usize = 0x20_0000;
const THIRD: usize = 0x30_0000;
const LIST: usize = 0x8000;
/// The end of the memory that is mapped.
const END: usize = 4 << 20;

const NOOP: u8 = 0;
const BATCH: u8 = 1;
const MOVE: u8 = 3;
const CREATE: u8 = 7;
const APPLY: u8 = 8;
const DUALCAST: u8 = 9;
const COPY_CRC: u8 = 0x11;
const INSERT: u8 = 0x13;
const STRIP: u8 = 0x14;

/// A good descriptor of each operation that transfers something, with the offsets of its addresses: those that are
/// read, and those that are written.
fn operations(rig: &Rig) -> Vec<(Raw, &'static [usize], &'static [usize])> {
    let new = |opcode, len| Raw::new(opcode, RECORD).u64(16, rig.at(SRC)).u64(24, rig.at(DST)).u32(32, len);
    vec![
        (new(MOVE, 4096), &[16], &[24]),
        (new(4, 4096), &[], &[24]),
        (new(5, 4096), &[16, 24], &[]),
        (new(6, 4096).u64(24, 0), &[16], &[]),
        (new(CREATE, 4096).u64(40, rig.at(THIRD)).u32(48, 80), &[16, 24], &[40]),
        (new(APPLY, 4096).u32(40, 10), &[16], &[24]),
        (new(DUALCAST, 4096).u64(40, rig.at(THIRD)), &[16], &[24, 40]),
        (new(0x10, 4096).u64(24, 0), &[16], &[]),
        (new(0x10, 4096).u64(24, 0).with_flags(RECORD | 1 << 16).u64(48, rig.at(THIRD)), &[16, 48], &[]),
        (new(COPY_CRC, 4096), &[16], &[24]),
        (new(0x12, 520).u64(24, 0).u8(40, 1 << 5), &[16], &[]),
        (new(INSERT, 512), &[16], &[24]),
        (new(STRIP, 520).u8(40, 1 << 5), &[16], &[24]),
        (new(0x15, 520).u8(40, 1 << 5), &[16], &[24]),
        (new(0x20, 4096).u64(16, 0), &[24], &[]),
    ]
}

/// Makes the operations' memory such that none of them ends early: create delta has something to write.
fn prepare(rig: &mut Rig) {
    rig.memory[SRC..SRC + 8192].fill(0);
    rig.memory[DST..DST + 8192].fill(0);
    rig.memory[DST + 800] = 1;
}

#[test]
fn every_operation_of_the_list_is_good() {
    let mut rig = Rig::new();
    for (raw, ..) in operations(&rig) {
        prepare(&mut rig);
        assert_eq!(rig.run(raw).status, 1, "operation {:#x}", raw.0[7]);
    }
}

#[test]
fn a_fault_on_any_operand_stops_the_operation_and_says_where() {
    let mut rig = Rig::new();
    for (raw, reads, writes) in operations(&rig) {
        let opcode = raw.0[7];
        for &operand in reads.iter().chain(writes) {
            prepare(&mut rig);
            let write = writes.contains(&operand);
            let status = if write { 0x83 } else { 0x03 };
            let record = rig.run(raw.u64(operand, NOWHERE));
            let context = format!("operation {opcode:#x}, operand at {operand}");
            assert_eq!(record.status, status, "{context}");
            assert_eq!(record.completed, 0, "{context}");
            assert_eq!(record.fault, NOWHERE, "{context}");
            let fault = rig.device.next_fault().expect("the IOMMU has recorded it");
            assert_eq!((fault.iova.get(), fault.pasid.unwrap().get()), (NOWHERE, rig.pasid), "{context}");
            while rig.device.next_fault().is_some() {}

            let constant = rig.read_only;
            let record = rig.run(raw.u64(operand, constant));
            if write {
                assert_eq!((record.status, record.fault), (0x83, constant), "{context}, read-only");
            } else if opcode != APPLY {
                assert!(matches!(record.status, 1 | 2), "{context}: reading is allowed");
            }
            while rig.device.next_fault().is_some() {}
        }
    }
}

#[test]
fn bytes_completed_are_those_in_front_of_the_fault() {
    let mut rig = Rig::new();
    let room = 100_000_u32;
    let edge = rig.at(END) - u64::from(room);
    let (len, end) = (300_000_u32, rig.at(END));
    rig.memory[SRC..SRC + len as usize].fill(0x77);
    rig.memory[END - room as usize..].fill(0x77);
    let copy = |opcode, from, to| Raw::new(opcode, RECORD).u64(16, from).u64(24, to).u32(32, len);
    let src = rig.at(SRC);
    let stopped = |write: bool, at| (if write { 0x83 } else { 0x03 }, room, at);
    let outcome = |record: Record| (record.status, record.completed, record.fault);
    let fault = end;
    assert_eq!(outcome(rig.run(copy(MOVE, src, edge))), stopped(true, fault));
    assert_eq!(outcome(rig.run(copy(MOVE, edge, rig.at(DST)))), stopped(false, fault));
    assert_eq!(outcome(rig.run(copy(4, 0x7777_7777_7777_7777, edge))), stopped(true, fault));
    assert_eq!(outcome(rig.run(copy(5, src, edge))), stopped(false, fault));
    assert_eq!(outcome(rig.run(copy(6, edge, 0x7777_7777_7777_7777))), stopped(false, fault));
    assert_eq!(outcome(rig.run(copy(0x20, 0, edge))), stopped(false, fault));
    let record = rig.run(copy(COPY_CRC, src, edge));
    assert_eq!(outcome(record), stopped(true, fault));
    let partial = rig.run(Raw::new(0x10, RECORD).u64(16, src).u32(32, room));
    assert_eq!(record.specific, partial.specific, "the CRC is that of the bytes completed");
    let dualcast = copy(DUALCAST, src, rig.at(DST) + (edge & 0xfff)).u64(40, edge);
    assert_eq!(outcome(rig.run(dualcast)), stopped(true, fault));
    // A difference in front of the fault wins.
    rig.memory[END - 50_000] ^= 1;
    let record = rig.run(copy(5, src, edge));
    assert_eq!((record.status, record.result, record.completed), (1, 1, 50_000));
    // Protected blocks count whole, in bytes of the source.
    let insert = Raw::new(INSERT, RECORD).u64(16, src).u64(24, end - 52_000).u32(32, 512 * 200);
    assert_eq!(outcome(rig.run(insert)), (0x83, 512 * 100, fault));
    let check = Raw::new(0x12, RECORD).u64(16, end - 52_100).u32(32, 520 * 200).u8(40, 0x64).u16(52, 0xffff);
    assert_eq!(outcome(rig.run(check)), (0x03, 520 * 100, fault));
}

#[test]
fn an_overlapping_move_that_faults_can_be_taken_up_again() {
    let mut rig = Rig::new();
    let len = 0x3000_u32;
    let src = END - 0x3800;
    let data: Vec<u8> = (0..0x3000_u32).map(|n| (n / 7) as u8).collect();
    rig.memory[src..src + 0x3000].copy_from_slice(&data);
    let raw = Raw::new(MOVE, RECORD).u64(16, rig.at(src)).u64(24, rig.at(src + 0x1000)).u32(32, len);
    let record = rig.run(raw);
    assert_eq!((record.status, record.result), (0x83, 1), "from the end, which is not mapped");
    assert_eq!(record.completed, 0);
    let rest = rig.run(raw.u32(32, 0x2800));
    assert_eq!(rest.status, 1);
    assert!(rig.memory[src + 0x1000..] == data[..0x2800]);
}

#[test]
fn the_checks_have_their_status_codes() {
    let mut rig = Rig::new();
    let base = rig.base;
    let at = |offset: usize| base + offset as u64;
    let (src, dst, third) = (at(SRC), at(DST), at(THIRD));
    let new = |opcode, len| Raw::new(opcode, RECORD).u64(16, src).u64(24, dst).u32(32, len);
    let mov = new(MOVE, 4096);
    let create = new(CREATE, 4096).u64(40, third).u32(48, 80);
    let cases: Vec<(&str, u8, Raw)> = vec![
        ("an unknown opcode", 0x10, mov.u8(7, 0x0a)),
        ("a reserved opcode", 0x10, mov.u8(7, 0xff)),
        ("reserved bits next to the PASID", 0x12, mov.u32(0, 1 << 20)),
        ("reserved bits next to the handle", 0x12, mov.u16(38, 1)),
        ("reserved bytes of a no-op", 0x12, Raw::new(NOOP, RECORD).u8(63, 1)),
        ("reserved bytes of a move", 0x12, mov.u8(48, 1)),
        ("no bytes", 0x13, mov.u32(32, 0)),
        ("more than the queue allows", 0x13, mov.u32(32, (2 << 20) + 1)),
        ("a batch of one", 0x14, Raw::new(BATCH, RECORD).u64(16, at(LIST)).u32(32, 1)),
        ("a batch over the maximum", 0x14, Raw::new(BATCH, RECORD).u64(16, at(LIST)).u32(32, 33)),
        ("a misaligned list", 0x18, Raw::new(BATCH, RECORD).u64(16, at(LIST) + 32).u32(32, 2)),
        ("a delta record that is too small", 0x15, create.u32(48, 70)),
        ("a delta record of broken entries", 0x15, create.u32(48, 85)),
        ("too much for a delta record", 0x13, create.u32(32, 0x8_0008)),
        ("a misaligned first source", 0x1c, create.u64(16, src + 4)),
        ("a misaligned second source", 0x1c, create.u64(24, dst + 1)),
        ("a misaligned size", 0x1c, create.u32(32, 4092)),
        ("a record over its source", 0x16, create.u64(40, src + 4088)),
        ("half an entry to apply", 0x15, new(APPLY, 4096).u32(40, 15)),
        ("a misaligned destination", 0x1c, new(APPLY, 4096).u64(24, dst + 2).u32(40, 10)),
        ("a record over its destination", 0x16, new(APPLY, 4096).u64(16, dst + 9).u32(40, 10)),
        ("destinations of other places in a page", 0x17, new(DUALCAST, 64).u64(40, third + 1)),
        ("a destination over the source", 0x16, new(DUALCAST, 8192).u64(24, src + 4096).u64(40, third)),
        ("one destination over the other", 0x16, new(DUALCAST, 8192).u64(40, dst + 4096)),
        ("a copy with CRC over itself", 0x16, new(COPY_CRC, 64).u64(24, src + 63)),
        ("a misaligned seed", 0x1c, new(0x10, 64).u64(24, 0).with_flags(RECORD | 1 << 16).u64(48, third + 2)),
        ("a seed address that is not asked for", 0x12, new(0x10, 64).u64(24, 0).u64(48, third)),
        ("part of a block", 0x13, new(INSERT, 513)),
        ("part of a protected block", 0x13, new(STRIP, 512)),
        ("protection over its source", 0x16, new(INSERT, 1024).u64(24, src - 1039)),
        ("source flags on an insertion", 0x12, new(INSERT, 512).u8(40, 1)),
        ("passing through on an insertion", 0x12, new(INSERT, 512).u8(41, 1 << 5)),
        ("destination flags on a check", 0x12, new(0x12, 520).u64(24, 0).u8(41, 1 << 4)),
        ("an interrupt that is not there", 0x19, mov.with_flags(RECORD | 1 << 4).u16(36, 9)),
    ];
    for (what, status, raw) in cases {
        let record = rig.run(raw);
        assert_eq!((record.status, record.completed), (status, 0), "{what}");
        assert_eq!(rig.take_swerr(), None, "{what}");
    }
    let flags: Vec<(&str, u32, Raw)> = vec![
        ("block on fault, which the device has not", 1 << 1, mov),
        ("a reserved flag", 1 << 6, mov),
        ("checking the result of a move", 1 << 7, mov),
        ("a fence on a batch", 1, Raw::new(BATCH, RECORD).u64(16, at(LIST)).u32(32, 2)),
        ("readback addresses", 1 << 16, Raw::new(2, RECORD)),
        ("flags of another operation", 3 << 17, mov),
        ("the highest flag", 1 << 23, Raw::new(NOOP, RECORD)),
    ];
    for (what, wrong, raw) in flags {
        let record = rig.run(raw.with_flags(raw.flags() | wrong));
        assert_eq!((record.status, record.specific), (0x11, [wrong.into(), 0]), "{what}");
    }
    rig.regs.write32(0x200 + 8, 0);
    assert_eq!(rig.run(mov.with_flags(RECORD | 1 << 4).u16(36, 1)).status, 0x19, "another PASID's interrupt");
    let mut rig = Rig::with(DsaProfile { engines: 1, overlapping_copy: false, ..DsaProfile::default() });
    let overlapping = Raw::new(MOVE, RECORD).u64(16, rig.at(SRC)).u64(24, rig.at(SRC + 4095)).u32(32, 4096);
    assert_eq!(rig.run(overlapping).status, 0x16);
}

#[test]
fn without_a_usable_record_errors_go_to_swerr() {
    let mut rig = Rig::new();
    rig.regs.write32(GENCTRL, 1);
    let vectors = rig.device.interrupts(2).unwrap();
    let bad = |flags| Raw::new(0x0a, flags);
    rig.post(0, &bad(0));
    rig.step_all();
    let [first, ..] = rig.swerr();
    assert_eq!(first & 0xf, 0b1101, "valid, descriptor valid, queue valid, no overflow");
    assert_eq!((first >> 8 & 0xff, first >> 16 & 0xff, first >> 32 & 0xff), (0x10, 0, 0x0a));
    assert_eq!(first >> 40 & 0xf_ffff, rig.pasid.into());
    assert_eq!(rig.regs.read32(INTCAUSE), 1);
    assert!(vectors[0].drain() && !vectors[1].drain());
    rig.post(0, &bad(RECORD).u64(8, rig.at(RECORDS) + 8));
    rig.step_all();
    let [second, ..] = rig.swerr();
    assert_eq!(second, first | 2, "the first error stays, and that there were more");
    rig.regs.write32(SWERR, 2);
    assert_eq!(rig.swerr()[0], first);
    rig.regs.write32(SWERR, 1);
    assert_eq!(rig.swerr(), [0; 4]);
    rig.regs.write32(INTCAUSE, 1);
    assert_eq!(rig.regs.read32(INTCAUSE), 0);

    let error_of = |raw: Raw| {
        rig.post(0, &raw);
        rig.step_all();
        let [first, second, address, _] = rig.swerr();
        rig.regs.write32(SWERR, 3);
        (first >> 8 & 0xff, first >> 5 & 1, second >> 32, address)
    };
    assert_eq!(error_of(Raw::new(NOOP, RECORD).u64(8, 0x20 + 8)), (0x1b, 0, 0, 0), "misaligned record");
    assert_eq!(error_of(Raw::new(NOOP, 1 << 3)), (0x11, 0, 1 << 3, 0), "a record without an address");
    let fault = error_of(Raw::new(NOOP, RECORD).u64(8, NOWHERE));
    assert_eq!((fault.0, fault.1), (0x1a, 1), "a record that can not be written");
    assert_eq!(fault.3 & !0x1f, NOWHERE);
    let fault = error_of(Raw::new(MOVE, 0).u64(16, NOWHERE).u64(24, NOWHERE).u32(32, 8));
    assert_eq!(fault, (0x03, 0, 0, NOWHERE));
    assert_eq!(rig.run(Raw::new(NOOP, 1 << 2)).status, 0, "no record on success unless it is requested");
    assert_eq!(rig.run(Raw::new(0x0a, 1 << 2)).status, 0x10, "but on errors");
}

#[test]
fn interrupts_reach_their_vectors() {
    let mut rig = Rig::new();
    let vectors = rig.device.interrupts(9).unwrap();
    let signalled = |n: usize| vectors[n].wait(Some(Duration::ZERO)).unwrap() && vectors[n].drain();
    assert_eq!(rig.run(Raw::new(NOOP, RECORD | 1 << 4).u16(36, 5)).status, 1);
    assert_eq!((0..9).filter(|n| signalled(*n)).collect::<Vec<_>>(), [5]);
    assert_eq!(rig.run(Raw::new(0x0a, RECORD | 1 << 4).u16(36, 8)).status, 0x10);
    assert!(signalled(8), "also on errors");
    rig.regs.write32(CMD, 1 << 31 | 3 << 20);
    assert_eq!(rig.command_ends(), 0);
    assert!(signalled(0));
    assert_eq!(rig.regs.read32(INTCAUSE), 2);
    assert_eq!(rig.command(3, 0), 0);
    assert!(!signalled(0), "only where asked for");
    // The message storage has no entries.
    let raw = rig.with_record(Raw::new(NOOP, RECORD | 1 << 4).u16(36, 5), 0);
    rig.portals.post64(0x2000, &raw.0);
    rig.step_all();
    assert_eq!(rig.record(0).status, 0x19);
    // Unprivileged interrupts are off after a reset.
    assert_eq!(rig.command(5, 0), 0);
    rig.configure();
    rig.regs.write32(raw::GENCFG, 0);
    assert_eq!((rig.command(1, 0), rig.command(6, 0)), (0, 0));
    let record = rig.run(Raw::new(NOOP, RECORD | 1 << 4).u16(36, 5));
    assert_eq!((record.status, record.specific[0]), (0x11, 1 << 4));
}

// Batches

/// Puts `members` into the list, with records from 1 on, and runs a batch of them with record 0.
fn run_batch(rig: &mut Rig, members: &[Raw]) -> Record {
    for (n, member) in members.iter().enumerate() {
        let member = rig.with_record(*member, n + 1);
        rig.memory[LIST + 64 * n..][..64].copy_from_slice(&member.0);
    }
    rig.run(Raw::new(BATCH, RECORD).u64(16, rig.at(LIST)).u32(32, members.len() as u32))
}

fn statuses(rig: &Rig, members: usize) -> Vec<u8> {
    (1..=members).map(|n| rig.record(n).status).collect()
}

#[test]
fn a_batch_counts_what_it_did_and_says_whether_all_was_well() {
    let mut rig = Rig::new();
    let good = Raw::new(MOVE, RECORD).u64(16, rig.at(SRC)).u64(24, rig.at(DST)).u32(32, 64);
    let quiet = Raw::new(NOOP, 1 << 2);
    let bad = good.u64(24, NOWHERE);
    let fenced = good.with_flags(RECORD | 1);
    let done = |status, completed| Record { status, result: 0, completed, fault: 0, specific: [0; 2] };
    assert_eq!(run_batch(&mut rig, &[good; 32]), done(1, 32));
    assert_eq!(statuses(&rig, 32), [1; 32]);
    assert_eq!(run_batch(&mut rig, &[good, quiet, fenced]), done(1, 3));
    assert_eq!(statuses(&rig, 3), [1, 0, 1], "no record where none was requested");
    assert_eq!(run_batch(&mut rig, &[good, bad, good]), done(5, 3));
    assert_eq!(statuses(&rig, 3), [1, 0x83, 1]);
    assert_eq!(run_batch(&mut rig, &[bad, good, fenced, good]), done(5, 2));
    assert_eq!(statuses(&rig, 4), [0x83, 1, 0, 0], "the fence stops behind a failure");
    // A comparison that does not come out as expected is no success either.
    rig.memory[SRC] ^= 0x55;
    let compare = Raw::new(5, RECORD | 1 << 7).u64(16, rig.at(SRC)).u64(24, rig.at(THIRD)).u32(32, 8);
    assert_eq!(run_batch(&mut rig, &[compare, fenced]), done(5, 1));
    // Neither batches nor drains go into a batch.
    for opcode in [1, 2] {
        let nested = Raw::new(opcode, RECORD).u64(16, rig.at(LIST)).u32(32, 2);
        let nested = if opcode == 2 { Raw::new(2, RECORD) } else { nested };
        assert_eq!(run_batch(&mut rig, &[nested, good]), done(5, 2));
        assert_eq!(statuses(&rig, 2), [0x10, 1]);
    }
    // Without records of their own, members tell SWERR where they were.
    for (n, member) in [Raw::new(NOOP, 0), bad.with_flags(0)].iter().enumerate() {
        rig.memory[LIST + 64 * n..][..64].copy_from_slice(&member.0);
    }
    assert_eq!(rig.run(Raw::new(BATCH, RECORD).u64(16, rig.at(LIST)).u32(32, 2)), done(5, 2));
    let [first, second, address, _] = rig.swerr();
    assert_eq!((first >> 4 & 3, first >> 8 & 0xff, second & 0xffff, address), (0b11, 0x03, 1, NOWHERE));
}

#[test]
fn a_batch_with_its_record_addresses_at_the_descriptors_writes_them_only_on_errors() {
    let mut rig = Rig::new();
    for n in 0..2 {
        let member = Raw::new(NOOP, 1 << 2).u64(8, rig.at(LIST + 64 * n));
        rig.memory[LIST + 64 * n..][..64].copy_from_slice(&member.0);
    }
    assert_eq!(rig.run(Raw::new(BATCH, RECORD).u64(16, rig.at(LIST)).u32(32, 2)).status, 1);
    assert_eq!(rig.memory[LIST], 0, "the descriptor is as it was");
    rig.memory[LIST + 64 + 7] = 0x0a;
    assert_eq!(rig.run(Raw::new(BATCH, RECORD).u64(16, rig.at(LIST)).u32(32, 2)).status, 5);
    assert_eq!((rig.memory[LIST], rig.memory[LIST + 64]), (0, 0x10));
}

#[test]
fn a_list_that_can_not_be_read_ends_the_batch_where_it_does() {
    let mut rig = Rig::new();
    let batch = |list| Raw::new(BATCH, RECORD).u64(16, list).u32(32, 10);
    let record = rig.run(batch(NOWHERE));
    assert_eq!((record.status, record.completed, record.fault), (6, 0, NOWHERE));
    let member = Raw::new(NOOP, 0);
    for n in 0..3 {
        rig.memory[END - 64 * 3 + 64 * n..][..64].copy_from_slice(&member.0);
    }
    let record = rig.run(batch(rig.at(END - 64 * 3)));
    assert_eq!((record.status, record.completed, record.fault), (6, 3, rig.at(END)));
}

// Queues

#[test]
fn a_full_dedicated_queue_drops_with_an_error() {
    let mut rig = Rig::new();
    let occupancy = |rig: &Rig| rig.regs.read32(rig.wqcfg(0, 6)) & 0xffff;
    rig.device.set_bus_master(false).unwrap();
    let raws: Vec<Raw> = (0..17).map(|n| rig.with_record(Raw::new(NOOP, RECORD), n)).collect();
    for (n, raw) in raws.iter().enumerate() {
        assert_eq!(occupancy(&rig), n.min(16) as u32);
        // The threshold is none of a dedicated queue's business.
        rig.portals.post64(if n % 2 == 0 { 0 } else { 0x1040 }, &raw.0);
        assert_eq!(rig.swerr()[0] & 1, u64::from(n == 16), "after {n}");
    }
    assert_eq!(rig.take_swerr(), Some(0x61));
    rig.device.set_bus_master(true).unwrap();
    rig.step_all();
    assert_eq!(occupancy(&rig), 0);
    assert_eq!((0..17).map(|n| u32::from(rig.record(n).status)).sum::<u32>(), 16);
    assert_eq!(rig.record(16).status, 0);
    assert!(!rig.portals.enqueue64(0, &raws[0].0).unwrap(), "a deferrable write is never accepted here");
    assert_eq!(rig.take_swerr(), None);
}

#[test]
fn a_shared_queue_answers_retry_when_it_is_full_or_over_its_threshold() {
    let mut rig = Rig::new();
    let raw = rig.with_record(Raw::new(NOOP, RECORD).u32(0, rig.pasid), 0);
    let (unlimited, limited) = (0x4000, 0x5000);
    rig.device.set_bus_master(false).unwrap();
    let accepted = |portal| (0..100).take_while(|_| rig.portals.enqueue64(portal, &raw.0).unwrap()).count();
    assert_eq!(accepted(limited), 8);
    assert_eq!(accepted(unlimited), 8);
    rig.regs.write32(rig.wqcfg(1, 1), 16);
    assert_eq!(accepted(limited), 0);
    assert_eq!(rig.take_swerr(), None);
    rig.device.set_bus_master(true).unwrap();
    rig.step_all();
    assert_eq!(rig.record(0).status, 1);
    rig.post(1, &raw);
    assert_eq!(rig.take_swerr(), Some(0x62), "posted to a shared queue");
    assert_eq!(rig.command(7, 1 << 1), 0);
    assert!(!rig.portals.enqueue64(unlimited, &raw.0).unwrap());
    assert!(!rig.portals.enqueue64(0x4000 * 5, &raw.0).unwrap(), "a queue that was never enabled");
    rig.post(5, &raw);
    assert_eq!(rig.take_swerr(), Some(0x60));
}

#[test]
fn a_shared_queue_takes_pasid_and_privilege_from_the_descriptor() {
    let mut rig = Rig::new();
    let submit = |rig: &mut Rig, context: u32| {
        let raw = rig.with_record(Raw::new(NOOP, RECORD).u32(0, context), 0);
        assert!(rig.portals.enqueue64(0x4000, &raw.0).unwrap());
        rig.step_all();
        rig.record(0).status
    };
    let pasid = rig.pasid;
    assert_eq!(submit(&mut rig, pasid), 1);
    assert_eq!(submit(&mut rig, pasid | 1 << 31), 0x1d, "privilege is off in the PASID capability");
    assert_eq!(submit(&mut rig, pasid + 1), 0);
    assert_eq!(rig.take_swerr(), Some(0x1a), "another PASID does not reach the record");
    assert_eq!(submit(&mut rig, 0), 0);
    assert_eq!(rig.take_swerr(), Some(0x22), "PASID 0 is not the device's own address space");
    let mut dedicated = Rig::new();
    assert_eq!(dedicated.run(Raw::new(NOOP, RECORD).u32(0, 99)), Record { status: 1, ..rig.record(9) });
}

#[test]
fn eight_ascending_stores_make_a_descriptor() {
    let mut rig = Rig::new();
    let raw = rig.with_record(Raw::new(NOOP, RECORD), 0);
    let words: Vec<u64> = raw.0.chunks(8).map(|c| u64::from_le_bytes(c.try_into().unwrap())).collect();
    // Two descriptors at once, in two slots.
    for (at, word) in (0..).step_by(8).zip(&words) {
        rig.portals.write64(0x40 + at, *word);
        rig.portals.write64(0x80 + at, *word);
    }
    rig.step_all();
    assert_eq!((rig.record(0).status, rig.take_swerr()), (1, None));
    rig.portals.write64(0, words[0]);
    rig.portals.write64(16, words[2]);
    assert_eq!(rig.take_swerr(), Some(0x63));
    rig.portals.write32(0, 1);
    assert_eq!(rig.take_swerr(), Some(0x63));
}

#[test]
fn queues_with_higher_priority_get_more_turns() {
    let mut rig = Rig::disabled(DsaProfile { engines: 1, ..DsaProfile::default() });
    rig.configure();
    for (wq, priority) in [(0, 3), (1, 1)] {
        rig.regs.write32(rig.wqcfg(wq, 2), 1 | priority << 4 | rig.pasid << 8 | 1 << 28);
        rig.regs.write32(rig.wqcfg(wq, 0), 64);
    }
    assert_eq!((rig.command(1, 0), rig.command(6, 0), rig.command(6, 1)), (0, 0, 0));
    for wq in [0, 1] {
        for n in 0..60 {
            let raw = Raw::new(MOVE, RECORD).u64(16, rig.at(SRC)).u64(24, rig.at(DST)).u32(32, 64 << 10);
            let raw = rig.with_record(raw, wq * 100 + n);
            rig.post(wq as u64, &raw);
        }
    }
    let done = |rig: &Rig, wq: usize| (0..60).filter(|n| rig.record(wq * 100 + n).status == 1).count();
    while done(&rig, 0) < 30 {
        assert!(rig.device.step());
    }
    let other = done(&rig, 1);
    assert!((8..=12).contains(&other), "30 of the one, {other} of the other");
}

#[test]
fn a_drain_sees_everything_that_threads_submitted_before_it() {
    const EACH: usize = 300;
    let rig = Rig::disabled_and_run_by(DsaProfile::default(), Run::Threads { cores: Vec::new() });
    rig.configure();
    assert_eq!((rig.command(1, 0), rig.command(6, 0), rig.command(6, 1)), (0, 0, 0));
    // Each job fills words of its own, in several pages, so that the engines end them in another order.
    let fill = |n: usize, value: u64| {
        let len = if n.is_multiple_of(7) { 64 } else { 8 };
        Raw::new(4, 0).u32(0, rig.pasid).u64(16, value).u64(24, rig.at(DST + 64 * n)).u32(32, len)
    };
    for round in 1..=20_u64 {
        std::thread::scope(|scope| {
            for thread in 0..3 {
                let (fill, portals) = (&fill, &rig.portals);
                scope.spawn(move || {
                    for n in 0..EACH {
                        while !portals.enqueue64(0x4000, &fill(thread * EACH + n, round).0).unwrap() {
                            std::thread::yield_now();
                        }
                    }
                });
            }
        });
        rig.start(if round % 2 == 0 { 3 } else { 7 }, if round % 2 == 0 { 0 } else { 2 });
        while rig.regs.read32(raw::CMDSTS) >> 31 == 1 {
            std::thread::yield_now();
        }
        for n in 0..3 * EACH {
            let word = &rig.memory[DST + 64 * n..][..8];
            assert_eq!(word, round.to_le_bytes(), "job {n} of round {round}");
        }
        if round % 2 == 1 {
            rig.regs.write32(CMD, 6 << 20 | 1);
            assert_eq!(rig.regs.read32(raw::CMDSTS), 0);
        }
    }
    assert_eq!(rig.take_swerr(), None);
}

// Anything at all

#[derive(Debug, Clone)]
enum Touch {
    Read { offset: u64, wide: bool },
    Write { offset: u64, wide: bool, value: u64 },
    Command { code: u32, operand: u32 },
    Portal { page: u64, raw: Vec<u8>, how: u8 },
    Config { offset: u16, value: u32 },
    Reset,
    Step,
}

fn register() -> impl Strategy<Value = u64> {
    prop_oneof![
        (0_u64..0x100).prop_map(|n| n & !7),
        (0_u64..0x400).prop_map(|n| 0x200 + (n & !7)),
        (0_u64..0x2000).prop_map(|n| n * 8),
    ]
}

/// Bytes that often are nearly a good descriptor.
fn descriptor() -> impl Strategy<Value = Vec<u8>> {
    let field = prop_oneof![Just(0_u64), any::<u64>(), (0_u64..0x1_0000).prop_map(|n| n * 64)];
    let opcode = prop_oneof![0_u8..0x18, Just(0x20), any::<u8>()];
    let size = prop_oneof![0_u32..70, 1_u32..0x20_0000, any::<u32>()];
    (opcode, any::<u32>(), prop::collection::vec(field, 6), size, any::<bool>()).prop_map(
        |(opcode, flags, fields, size, near)| {
            let flags = if near { flags & 0x9d | RECORD } else { flags & 0xff_ffff };
            let mut raw = Raw::new(opcode, flags).u64(8, fields[0]).u64(16, fields[1]).u64(24, fields[2]);
            raw = raw.u32(32, size).u64(40, fields[3]);
            if !near {
                raw = raw.u64(48, fields[4]).u64(56, fields[5]);
            }
            raw.0.to_vec()
        },
    )
}

fn touch() -> impl Strategy<Value = Touch> {
    let value = prop_oneof![any::<u64>(), 0_u64..64, Just(u64::MAX)];
    prop_oneof![
        1 => (register(), any::<bool>()).prop_map(|(offset, wide)| Touch::Read { offset, wide }),
        2 => (register(), any::<bool>(), value).prop_map(|(offset, wide, value)| Touch::Write { offset, wide, value }),
        1 => (0_u32..16, prop_oneof![0_u32..4, any::<u32>()]).prop_map(|(code, operand)| Touch::Command {
            code, operand: operand & 0xf_ffff
        }),
        6 => (0_u64..12, descriptor(), 0_u8..3).prop_map(|(page, raw, how)| Touch::Portal { page, raw, how }),
        1 => (0_u16..0x140, any::<u32>()).prop_map(|(offset, value)| Touch::Config { offset: offset * 4 % 4096, value }),
        1 => Just(Touch::Reset),
        4 => Just(Touch::Step),
    ]
}

/// Descriptors whose small addresses are offsets in the rig's memory.
fn relocate(rig: &Rig, raw: &[u8]) -> [u8; 64] {
    let mut words = [0; 8];
    for (word, bytes) in words.iter_mut().zip(raw.as_chunks().0) {
        *word = u64::from_le_bytes(*bytes);
    }
    for at in [1, 2, 3, 5] {
        if (1..END as u64).contains(&words[at]) {
            words[at] += rig.base;
        }
    }
    let mut bytes = [0; 64];
    for (bytes, word) in bytes.as_chunks_mut().0.iter_mut().zip(words) {
        *bytes = word.to_le_bytes();
    }
    bytes
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

    #[test]
    fn nothing_that_a_driver_does_breaks_the_model(
        start_enabled in any::<bool>(),
        touches in prop::collection::vec(touch(), 1..200),
    ) {
        let profile = DsaProfile { engines: 2, op_config: true, interrupt_handles: start_enabled, ..DsaProfile::default() };
        let mut rig = if start_enabled { Rig::with(profile) } else { Rig::disabled(profile) };
        for touch in touches {
            match touch {
                Touch::Read { offset, wide: true } => { rig.regs.read64(offset); }
                Touch::Read { offset, wide: false } => { rig.regs.read32(offset); }
                Touch::Write { offset, wide: true, value } => rig.regs.write64(offset, value),
                Touch::Write { offset, wide: false, value } => rig.regs.write32(offset, value as u32),
                Touch::Command { code, operand } => rig.start(code, operand),
                Touch::Portal { page, raw, how } => {
                    let bytes = relocate(&rig, &raw);
                    match how {
                        0 => rig.portals.post64(page * 0x1000, &bytes),
                        1 => { rig.portals.enqueue64(page * 0x1000, &bytes).unwrap(); }
                        _ => rig.portals.write64(page * 0x1000, u64::from_le_bytes(bytes[..8].try_into().unwrap())),
                    }
                    // Lists of descriptors to be found by batches.
                    rig.memory[LIST..LIST + 64].copy_from_slice(&bytes);
                }
                Touch::Config { offset, value } => rig.device.config().write32(offset, value),
                Touch::Reset => rig.device.reset().unwrap(),
                Touch::Step => { rig.device.step(); }
            }
            prop_assert!(rig.device.failure().is_none(), "{:?}", rig.device.failure());
        }
        // Whatever was done to it, it comes back.
        rig.device.set_bus_master(true).unwrap();
        rig.device.reset().unwrap();
        let pasid = rig.device.config().extended_capability(0x1b).unwrap();
        rig.device.config().write16(pasid + 6, 1);
        rig.configure();
        prop_assert_eq!((rig.command(1, 0), rig.command(6, 0)), (0, 0));
        prop_assert_eq!(rig.run(Raw::new(NOOP, RECORD)).status, 1);
    }
}
