//! The DSA model at its registers: what they hold, what commands do, and each operation once.

mod raw;

use raw::{CMD, CMDSTS, GENCFG, GENCTRL, GENSTS, GRPCFG, RECORD, Raw, Record, Rig};
use underpass_drivers::dsa::model::DsaProfile;

const SRC: usize = 0x10_0000;
const DST: usize = 0x20_0000;
const THIRD: usize = 0x30_0000;

fn one_engine() -> DsaProfile {
    DsaProfile { engines: 1, ..DsaProfile::default() }
}

fn success(completed: u32) -> Record {
    Record { status: 1, result: 0, completed, fault: 0, specific: [0; 2] }
}

/// Bytes that differ from each other and from zero.
fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|n| (n * 7 + n / 251 + 1) as u8).collect()
}

fn mov(rig: &Rig, src: usize, dst: usize, len: u32) -> Raw {
    Raw::new(3, RECORD).u64(16, rig.at(src)).u64(24, rig.at(dst)).u32(32, len)
}

// Registers

#[test]
fn the_registers_describe_the_profile() {
    let rig = Rig::disabled(DsaProfile::default());
    assert_eq!(rig.regs.read32(0), 0x100);
    let gencap = rig.regs.read64(0x10);
    assert_eq!((gencap >> 16 & 0x1f, gencap >> 21 & 0xf, gencap >> 31 & 1), (31, 10, 1));
    let wqcap = rig.regs.read64(0x20);
    assert_eq!((wqcap & 0xffff, wqcap >> 16 & 0xff, wqcap >> 48 & 3), (128, 8, 3));
    assert_eq!(rig.regs.read64(0x30) & 0xffff, 96 << 8 | 4);
    assert_eq!(rig.regs.read64(0x38), 4);
    assert_eq!(rig.regs.read64(0x40), 0x0000_0001_003f_03ff);
    assert_eq!(rig.regs.read64(0x60), 0x0002 << 32 | 0x0004 << 16 | 0x0003);
    assert_eq!(rig.regs.read16(0x62), 4, "narrower reads give parts of the register");
    assert_eq!(rig.regs.read32(GENSTS), 0);
    let config = rig.device.config();
    assert_eq!((config.vendor_id(), config.device_id(), config.class()), (0x8086, 0x0b25, 0x08_8000));
    for id in [0x10, 0x11] {
        assert!(config.capability(id).is_some(), "capability {id:#x}");
    }
    for id in [0x0f, 0x13, 0x1b] {
        assert!(config.extended_capability(id).is_some(), "extended capability {id:#x}");
    }
    let msix = config.capability(0x11).unwrap();
    assert_eq!(
        (config.read16(msix + 2), config.read32(msix + 4), config.read32(msix + 8)),
        (8, 0x2000, 0x3000)
    );
    let pasid = config.extended_capability(0x1b).unwrap();
    assert_eq!(config.read16(pasid + 4) >> 8 & 0x1f, 20);
}

#[test]
fn read_only_registers_stay_and_configuration_is_locked_while_enabled() {
    let rig = Rig::disabled(DsaProfile::default());
    for offset in [0, 0x10, 0x20, 0x30, 0x38, 0x40, 0x60, 0x68, GENSTS, CMDSTS, 0xb0] {
        let before = rig.regs.read64(offset);
        rig.regs.write64(offset, !before);
        assert_eq!(rig.regs.read64(offset), before, "register {offset:#x}");
    }
    rig.regs.write16(GENCFG, 0xffff);
    assert_eq!(rig.regs.read32(GENCFG), 0, "registers are written 32 bits at a time");
    rig.regs.write32(GENCTRL, u32::MAX);
    assert_eq!(rig.regs.read32(GENCTRL), 3);
    rig.regs.write32(rig.wqcfg(2, 2), u32::MAX);
    assert_eq!(rig.regs.read32(rig.wqcfg(2, 2)), 0x3fff_ffff);
    rig.regs.write32(rig.wqcfg(2, 2), 0);
    rig.configure();
    assert_eq!(rig.command(1, 0), 0);
    assert_eq!(rig.regs.read32(GENSTS), 1);
    rig.regs.write64(GRPCFG, 0);
    assert_eq!(rig.regs.read64(GRPCFG), 0b11);
    rig.regs.write32(GENCFG, 0);
    assert_eq!(rig.regs.read32(GENCFG), 1 << 12);
    rig.regs.write32(rig.wqcfg(0, 0), 3);
    assert_eq!(rig.regs.read32(rig.wqcfg(0, 0)), 16, "sizes are fixed while the device is enabled");
    rig.regs.write32(rig.wqcfg(0, 3), 20);
    assert_eq!(rig.regs.read32(rig.wqcfg(0, 3)), 20, "the rest while the queue is");
    assert_eq!(rig.command(6, 0), 0);
    rig.regs.write32(rig.wqcfg(0, 3), 19);
    assert_eq!(rig.regs.read32(rig.wqcfg(0, 3)), 20);
    rig.regs.write32(rig.wqcfg(0, 1), 5);
    assert_eq!(rig.regs.read32(rig.wqcfg(0, 1)), 5, "the threshold always");
    rig.regs.write32(rig.wqcfg(0, 1), 17);
    assert_eq!(rig.regs.read32(rig.wqcfg(0, 1)), 5, "but not over the size");
    assert_eq!(rig.regs.read32(rig.wqcfg(0, 6)) >> 30, 1);
}

#[test]
fn op_config_has_its_place_and_takes_operations_away() {
    let mut rig = Rig::with(DsaProfile { op_config: true, ..one_engine() });
    assert_eq!(rig.command(7, 1), 0);
    rig.regs.write64(rig.wqcfg(0, 8), !(1 << 4));
    assert_eq!(rig.regs.read64(rig.wqcfg(0, 8)), 0x0000_0001_003f_03ef, "never more than OPCAP");
    assert_eq!(rig.command(6, 0), 0);
    let fill = Raw::new(4, RECORD).u64(24, rig.at(DST)).u32(32, 8);
    assert_eq!(rig.run(fill).status, 0x10);
    assert_eq!(rig.run(mov(&rig, SRC, DST, 8)).status, 1);
}

// Commands

#[test]
fn every_error_of_the_enabling_commands() {
    let with = |change: &dyn Fn(&Rig)| {
        let rig = Rig::disabled(DsaProfile::default());
        rig.configure();
        change(&rig);
        rig
    };
    let device_error = |change: &dyn Fn(&Rig)| with(change).command(1, 0);
    assert_eq!(device_error(&|_| {}), 0);
    assert_eq!(device_error(&|rig| assert_eq!(rig.command(1, 0), 0)), 0x10);
    assert_eq!(device_error(&|rig| rig.regs.write32(GENCFG, 97)), 0x11);
    assert_eq!(device_error(&|rig| rig.device.set_bus_master(false).unwrap()), 0x12);
    assert_eq!(device_error(&|rig| rig.regs.write32(rig.wqcfg(0, 0), 113)), 0x14);
    assert_eq!(device_error(&|rig| rig.regs.write32(rig.wqcfg(0, 0), 112)), 0);
    assert_eq!(device_error(&|rig| rig.regs.write64(GRPCFG + 64, 1)), 0x15);
    assert_eq!(device_error(&|rig| rig.regs.write64(GRPCFG + 64 + 32, 1)), 0x15);
    assert_eq!(device_error(&|rig| rig.regs.write32(rig.wqcfg(2, 0), 1)), 0x15);
    assert_eq!(device_error(&|rig| rig.regs.write64(GRPCFG + 40, 97 << 8)), 0x16);
    assert_eq!(device_error(&|rig| rig.regs.write64(GRPCFG + 40, 9 << 8 | 8 << 20)), 0x16);
    assert_eq!(device_error(&|rig| rig.regs.write64(GRPCFG + 32, 0)), 0x17);
    assert_eq!(device_error(&|rig| rig.regs.write64(GRPCFG, 1 << 8 | 3)), 0x18);
    assert_eq!(device_error(&|rig| rig.regs.write64(GRPCFG + 8, 1)), 0x18);
    assert_eq!(device_error(&|rig| rig.regs.write64(GRPCFG + 32, 1 << 4)), 0x18);

    let wq_error = |wq: u32, change: &dyn Fn(&Rig)| {
        let rig = with(change);
        assert_eq!(rig.command(1, 0), 0);
        rig.command(6, wq)
    };
    let set = |wq, word, value| move |rig: &Rig| rig.regs.write32(rig.wqcfg(wq, word), value);
    let mode = |flags: u32| flags | 7 << 8;
    assert_eq!(with(&|_| {}).command(6, 0), 0x20);
    assert_eq!(wq_error(8, &|_| {}), 0x02);
    assert_eq!(wq_error(2, &|_| {}), 0x22, "no size");
    assert_eq!(wq_error(1, &set(1, 1, 0)), 0x22, "no threshold");
    assert_eq!(wq_error(1, &set(1, 1, 17)), 0x22, "threshold over the size");
    assert_eq!(wq_error(0, &set(0, 1, 0)), 0, "a dedicated queue has none");
    assert_eq!(wq_error(0, &set(0, 2, mode(1 | 1 << 28))), 0x23);
    assert_eq!(wq_error(0, &set(0, 2, mode(1 | 1 << 4 | 1 << 1))), 0x25);
    assert_eq!(wq_error(1, &set(1, 2, mode(1 << 4))), 0x26, "a shared queue needs PASIDs");
    assert_eq!(wq_error(0, &set(0, 2, mode(1 | 1 << 4 | 1 << 29))), 0x26, "privilege is off");
    assert_eq!(wq_error(0, &set(0, 2, 1 | 1 << 4)), 0, "a dedicated one does not");
    assert_eq!(wq_error(0, &set(0, 3, 0x15 | 11 << 5)), 0x27);
    let small = Rig::disabled(DsaProfile { max_transfer_shift: 20, ..DsaProfile::default() });
    small.configure();
    assert_eq!((small.command(1, 0), small.command(6, 0)), (0, 0x28));
    let rig = Rig::new();
    assert_eq!(rig.command(6, 0), 0x21);
    let dedicated = Rig::disabled(DsaProfile { shared: false, ..DsaProfile::default() });
    dedicated.configure();
    assert_eq!((dedicated.command(1, 0), dedicated.command(6, 1)), (0, 0x24));
}

#[test]
fn every_error_of_the_other_commands() {
    let rig = Rig::disabled(DsaProfile::default());
    for command in [2, 3, 4, 7, 8, 9, 10, 11, 12] {
        assert_eq!(rig.command(command, 1), 0x31, "command {command} on a disabled device");
    }
    assert_eq!(rig.command(5, 0), 0, "reset always works");
    for command in [0, 13, 14, 15, 31] {
        assert_eq!(rig.command(command, 1), 0x01, "command {command}");
    }
    rig.configure();
    assert_eq!((rig.command(1, 0), rig.command(6, 0)), (0, 0));
    for command in 7..=10 {
        assert_eq!(rig.command(command, 1 << 1), 0x32, "command {command} on a disabled queue");
        assert_eq!(rig.command(command, 1 << 8), 0x02, "command {command} on no queue");
        assert_eq!(rig.command(command, 1 | 1 << 16), 0x02, "command {command} on queue 16");
        assert_eq!(rig.command(command, 0), 0x02, "command {command} on none");
    }
}

#[test]
fn the_default_profile_is_a_known_part_but_for_what_the_model_says() {
    const GENCAP: u64 = 0x10;
    const CMDCAP: u64 = 0xb0;
    let rig = Rig::disabled(DsaProfile::default());
    // Block on fault, cache control for flushes, message storage, and a reserved bit.
    let differs = 1 | 1 << 3 | 0x3f << 25 | 1 << 38;
    let (part, model) = (0x40_915f_0107, rig.regs.read64(GENCAP));
    assert_eq!(part & !differs, model & !differs);
    assert_eq!(model & differs, 1 << 3);
    assert_eq!(rig.regs.read32(CMDCAP), 0);

    let commands = |profile| {
        let rig = Rig::disabled(profile);
        assert_eq!(rig.regs.read64(GENCAP) & 1 << 4, 1 << 4);
        rig.regs.read32(CMDCAP)
    };
    // Commands 1 to 12, and the two of interrupt handles.
    assert_eq!(commands(DsaProfile { command_capabilities: true, ..DsaProfile::default() }), 0x1ffe);
    assert_eq!(commands(DsaProfile { interrupt_handles: true, ..DsaProfile::default() }), 0x7ffe);
}

#[test]
fn interrupt_handles_are_given_out_once() {
    let mut rig = Rig::with(DsaProfile { interrupt_handles: true, ..one_engine() });
    let with_interrupt = |handle| Raw::new(0, RECORD | 1 << 4).u16(36, handle);
    assert_eq!(rig.run(with_interrupt(2)).status, 0x19, "not requested yet");
    assert_eq!(rig.command(13, 9), 0x41);
    assert_eq!(rig.command(13, 1 | 1 << 16), 0x41, "no message storage");
    assert_eq!(rig.command(13, 2), 0);
    let handle = rig.regs.read32(CMDSTS) >> 8 & 0xffff;
    assert_eq!(rig.run(with_interrupt(handle as u16)).status, 1);
    assert_eq!(rig.command(13, 2), 0x42);
    assert_eq!(rig.command(14, handle), 0);
    assert_eq!(rig.command(14, handle), 0x41);
    assert_eq!(rig.run(with_interrupt(2)).status, 0x19);
}

#[test]
fn a_drain_waits_an_abort_drops_and_neither_closes_the_queue() {
    let mut rig = Rig::new();
    rig.memory[SRC..SRC + 4096].fill(0x5a);
    for (command, operand, done) in [(3, 0, 1), (8, 1, 1), (11, 7, 1), (4, 0, 0), (9, 1, 0), (12, 7, 0)] {
        for n in 0..3 {
            let raw = rig.with_record(mov(&rig, SRC, DST, 4096), n);
            rig.post(0, &raw);
        }
        rig.start(command, operand);
        assert_eq!(rig.command_ends(), 0);
        for n in 0..3 {
            assert_eq!(rig.record(n).status, done, "record {n} after command {command}");
        }
        assert_eq!(rig.run(Raw::new(0, RECORD)), success(0), "the queue works on");
    }
    // Another PASID's descriptors are left alone.
    let raw = rig.with_record(Raw::new(0, RECORD), 0);
    rig.post(0, &raw);
    assert_eq!(rig.command(12, 8), 0);
    assert_eq!(rig.record(0).status, 1);
}

#[test]
fn a_command_stays_active_until_the_engines_are_done_and_no_other_starts() {
    let mut rig = Rig::new();
    let raw = rig.with_record(mov(&rig, SRC, DST, 1 << 20), 0);
    rig.post(0, &raw);
    rig.start(7, 1);
    rig.start(5, 0);
    assert_eq!(rig.regs.read32(CMD) >> 20 & 0x1f, 7, "the second command was ignored");
    assert_eq!(rig.regs.read32(CMDSTS) >> 31, 1);
    assert_eq!(rig.regs.read32(rig.wqcfg(0, 6)) >> 30, 2, "draining");
    rig.post(0, &raw);
    assert_eq!(rig.command_ends(), 0);
    assert_eq!(rig.record(0).status, 1, "disabling drains");
    assert_eq!(rig.regs.read32(rig.wqcfg(0, 6)) >> 30, 0);
    assert_eq!(rig.take_swerr(), Some(0x60), "what came meanwhile was dropped");
    assert_eq!(rig.command(6, 0), 0, "and can be enabled again");
    assert_eq!(rig.run(Raw::new(0, RECORD)), success(0));
}

#[test]
fn resets_drop_the_work_and_the_configuration() {
    let mut rig = Rig::new();
    let raw = rig.with_record(mov(&rig, SRC, DST, 1 << 20), 0);
    rig.post(0, &raw);
    assert_eq!(rig.command(10, 1), 0);
    assert_eq!(rig.record(0).status, 0);
    assert_eq!(rig.regs.read32(rig.wqcfg(0, 2)), 0, "the queue's configuration is gone");
    assert_eq!(rig.regs.read32(rig.wqcfg(1, 6)) >> 30, 1, "the other queue is not touched");
    assert_eq!(rig.command(5, 0), 0);
    assert_eq!((rig.regs.read32(GENSTS), rig.regs.read64(GRPCFG)), (0, 0));
    for function_level in [false, true] {
        rig.configure();
        assert_eq!((rig.command(1, 0), rig.command(6, 0)), (0, 0));
        rig.post(0, &raw);
        rig.device.step();
        if function_level {
            rig.device.reset().unwrap();
        } else {
            assert_eq!(rig.command(5, 0), 0);
        }
        assert_eq!(rig.regs.read32(GENSTS), 0);
        rig.step_all();
        assert_eq!(rig.record(0).status, 0);
    }
    rig.configure();
    assert_eq!((rig.command(1, 0), rig.command(6, 0)), (0, 0));
    assert_eq!(rig.run(mov(&rig, SRC, DST, 8)), success(8));
}

#[test]
fn commands_work_with_bus_mastering_off_as_far_as_they_move_no_data() {
    let mut rig = Rig::new();
    let raw = rig.with_record(mov(&rig, SRC, DST, 8), 0);
    rig.device.set_bus_master(false).unwrap();
    rig.post(0, &raw);
    rig.step_all();
    assert_eq!(rig.record(0).status, 0);
    rig.device.set_bus_master(true).unwrap();
    rig.step_all();
    assert_eq!(rig.record(0).status, 1);
    rig.post(0, &raw);
    rig.device.set_bus_master(false).unwrap();
    assert_eq!(rig.command(5, 0), 0);
}

// Operations

#[test]
fn moves_also_where_the_buffers_overlap() {
    let mut rig = Rig::new();
    for len in [1, 63, 4096, 300_001] {
        for (src, dst) in [(SRC + 3, DST + 5), (SRC, SRC + 100), (SRC + 100, SRC), (SRC, SRC + 200_000)] {
            let before = pattern(len);
            rig.memory[src..src + len].copy_from_slice(&before);
            let raw = mov(&rig, src, dst, len as u32);
            assert_eq!(rig.run(raw), success(len as u32));
            assert!(rig.memory[dst..dst + len] == before, "{len} bytes from {src:#x} to {dst:#x}");
        }
    }
}

#[test]
fn fills_and_compares() {
    let mut rig = Rig::new();
    let (len, word) = (300_003_usize, 0x8877_6655_4433_2211_u64);
    let expected: Vec<u8> = word.to_le_bytes().iter().copied().cycle().take(len).collect();
    let fill = Raw::new(4, RECORD).u64(16, word).u64(24, rig.at(DST + 1)).u32(32, len as u32);
    assert_eq!(rig.run(fill), success(len as u32));
    assert!(rig.memory[DST + 1..DST + 1 + len] == expected);
    assert_eq!(rig.memory[DST + 1 + len], 0);

    let same = Raw::new(6, RECORD).u64(16, rig.at(DST + 1)).u64(24, word).u32(32, len as u32);
    assert_eq!(rig.run(same), success(len as u32));
    rig.memory[SRC..SRC + len].copy_from_slice(&expected);
    let compare = Raw::new(5, RECORD).u64(16, rig.at(SRC)).u64(24, rig.at(DST + 1)).u32(32, len as u32);
    assert_eq!(rig.run(compare), success(len as u32));

    rig.memory[DST + 1 + 200_001] ^= 1;
    let different = Record { result: 1, ..success(200_001) };
    assert_eq!(rig.run(same), different);
    assert_eq!(rig.run(compare), different);
    let check_result = compare.flags() | 1 << 7;
    assert_eq!(rig.run(compare.with_flags(check_result)), Record { status: 2, ..different });
    assert_eq!(rig.run(compare.with_flags(check_result).u8(40, 1)), different);
}

#[test]
fn makes_and_applies_delta_records() {
    let mut rig = Rig::new();
    let len = 0x2_0000;
    let original = pattern(len);
    let mut modified = original.clone();
    for unit in [0_usize, 5, 8191, 8192, 16383] {
        modified[unit * 8 + 3] ^= 0xff;
    }
    rig.memory[SRC..SRC + len].copy_from_slice(&original);
    rig.memory[DST..DST + len].copy_from_slice(&modified);
    let create = Raw::new(7, RECORD)
        .u64(16, rig.at(SRC))
        .u64(24, rig.at(DST))
        .u32(32, len as u32)
        .u64(40, rig.at(THIRD))
        .u32(48, 80);
    let made = rig.run(create);
    assert_eq!(made, Record { result: 1, specific: [50, 0], ..success(len as u32) });
    assert_eq!(rig.memory[THIRD + 20..THIRD + 22], 8191_u16.to_le_bytes());
    assert_eq!(rig.memory[THIRD + 22..THIRD + 30], modified[8191 * 8..8192 * 8]);
    // Expected results as a mask: bit 1 stands for a record that is complete.
    let checked = create.with_flags(create.flags() | 1 << 7);
    assert_eq!(rig.run(checked.u8(56, 0b101)).status, 2);
    assert_eq!(rig.run(checked.u8(56, 0b010)).status, 1);
    let equal = create.u64(24, rig.at(SRC));
    assert_eq!(rig.run(equal), success(len as u32));

    let apply =
        Raw::new(8, RECORD).u64(16, rig.at(THIRD)).u64(24, rig.at(SRC)).u32(32, len as u32).u32(40, 50);
    assert_eq!(rig.run(apply).status, 1);
    assert!(rig.memory[SRC..SRC + len] == modified);
    let beyond = apply.u32(32, 16383 * 8);
    assert_eq!(rig.run(beyond), Record { status: 8, ..success(40) });
    rig.memory[THIRD + 10] = 0;
    assert_eq!(rig.run(apply), Record { status: 7, ..success(10) });

    rig.memory[SRC..SRC + len].fill(0);
    let overflown = rig.run(create);
    assert_eq!(overflown, Record { result: 2, specific: [80, 0], ..success(64) });
}

#[test]
fn casts_to_two_places() {
    let mut rig = Rig::new();
    let data = pattern(100_000);
    rig.memory[SRC..SRC + data.len()].copy_from_slice(&data);
    let raw = Raw::new(9, RECORD)
        .u64(16, rig.at(SRC))
        .u64(24, rig.at(DST + 0x123))
        .u32(32, data.len() as u32)
        .u64(40, rig.at(THIRD + 0x123));
    assert_eq!(rig.run(raw), success(data.len() as u32));
    assert!(rig.memory[DST + 0x123..][..data.len()] == data);
    assert!(rig.memory[THIRD + 0x123..][..data.len()] == data);
}

#[test]
fn computes_crcs_in_all_their_forms() {
    // Bit by bit, most significant first: x^32 + ... = 0x1edc6f41.
    let shift = |mut crc: u32, byte: u8| {
        crc ^= u32::from(byte) << 24;
        for _ in 0..8 {
            crc = if crc >> 31 == 1 { crc << 1 ^ 0x1edc_6f41 } else { crc << 1 };
        }
        crc
    };
    let mut rig = Rig::new();
    rig.memory[SRC..SRC + 9].copy_from_slice(b"123456789");
    let crc = Raw::new(0x10, RECORD).u64(16, rig.at(SRC)).u32(32, 9);
    assert_eq!(
        rig.run(crc),
        Record { specific: [0xe306_9283, 0], ..success(9) },
        "the published check value"
    );
    let data = pattern(150_001);
    rig.memory[SRC..SRC + data.len()].copy_from_slice(&data);
    rig.memory[THIRD..THIRD + 4].copy_from_slice(&0xdead_beef_u32.to_le_bytes());
    for (inversion, reflection) in [(false, false), (false, true), (true, false), (true, true)] {
        let (seed, bypass) = (0xdead_beef_u32, u32::from(inversion) << 17 | u32::from(reflection) << 18);
        let start = if inversion { seed } else { (!seed).reverse_bits() };
        let last = data
            .iter()
            .fold(start, |crc, byte| shift(crc, if reflection { *byte } else { byte.reverse_bits() }));
        let value = if inversion { last } else { !last.reverse_bits() };
        let expected = Record { specific: [value.into(), 0], ..success(data.len() as u32) };
        let raw = Raw::new(0x10, RECORD | bypass).u64(16, rig.at(SRC)).u32(32, data.len() as u32);
        assert_eq!(rig.run(raw.u32(40, seed)), expected);
        let from_memory = raw.with_flags(raw.flags() | 1 << 16).u64(48, rig.at(THIRD));
        assert_eq!(rig.run(from_memory), expected);
        let copy = raw.u32(40, seed).u8(7, 0x11).u64(24, rig.at(DST));
        rig.memory[DST..DST + data.len()].fill(0);
        assert_eq!(rig.run(copy), expected);
        assert!(rig.memory[DST..DST + data.len()] == data);
    }
}

#[test]
fn protects_checks_and_strips_blocks() {
    let mut rig = Rig::new();
    for (code, block) in [(0_u8, 512_usize), (1, 520), (2, 4096), (3, 4104)] {
        let blocks = 40;
        let data = pattern(block * blocks);
        rig.memory[SRC..SRC + data.len()].copy_from_slice(&data);
        let (plain, protected) = ((block * blocks) as u32, ((block + 8) * blocks) as u32);
        // Destination flags: the application tag grows; control: block size.
        let insert = Raw::new(0x13, RECORD)
            .u64(16, rig.at(SRC))
            .u64(24, rig.at(DST))
            .u32(32, plain)
            .u8(41, 1 << 4)
            .u8(42, code)
            .u32(56, 100)
            .u16(62, 0x1000);
        let next = (0x1000_u64 + 40) << 48 | 0x8c;
        assert_eq!(rig.run(insert), Record { specific: [0, next], ..success(plain) });
        let tuple = &rig.memory[DST + (block + 8) * 3 + block..][..8];
        assert_eq!(tuple[2..], [0x10, 0x03, 0, 0, 0, 103], "tags of the fourth block, big-endian");

        let check = Raw::new(0x12, RECORD)
            .u64(16, rig.at(DST))
            .u32(32, protected)
            .u8(40, 1 << 4)
            .u8(42, code)
            .u32(48, 100)
            .u16(54, 0x1000);
        assert_eq!(rig.run(check), Record { specific: [next, 0], ..success(protected) });
        let strip = check.u8(7, 0x14).u64(24, rig.at(THIRD));
        assert_eq!(rig.run(strip).status, 1);
        assert!(rig.memory[THIRD..THIRD + data.len()] == data);
        // An update keeps the old application tags and numbers the blocks from 7.
        let update = check.u8(7, 0x15).u64(24, rig.at(THIRD)).u8(41, 1 << 3).u32(56, 7);
        assert_eq!(rig.run(update).status, 1);
        let tuple = &rig.memory[THIRD + (block + 8) * 3 + block..][..8];
        assert_eq!(tuple[2..], [0x10, 0x03, 0, 0, 0, 10]);

        let bad = DST + (block + 8) * 20;
        for (at, result) in [(0, 0b001), (block + 2, 0b010), (block + 5, 0b100)] {
            rig.memory[bad + at] ^= 1;
            let record = rig.run(check);
            assert_eq!(
                (record.status, record.result, record.completed),
                (9, result, ((block + 8) * 20) as u32),
                "block size {block}, byte {at}"
            );
            rig.memory[bad + at] ^= 1;
        }
        // All ones: by default just wrong, on request an escape, or an error of its own.
        rig.memory[bad + block..bad + block + 8].fill(0xff);
        assert_eq!(rig.run(check).status, 9);
        for escape in [1 << 1, 1 << 2, 1 << 3] {
            assert_eq!(rig.run(check.u8(40, 1 << 4 | escape)).status, 1);
        }
        assert_eq!(rig.run(check.u8(40, 1 << 4 | 3)).result, 0b1000);
    }
}

#[test]
fn flushes_lines_and_drains_a_queue() {
    let mut rig = Rig::new();
    let flush = Raw::new(0x20, RECORD).u64(24, rig.at(DST + 9)).u32(32, 300_000);
    assert_eq!(rig.run(flush), success(300_000));
    assert_eq!(rig.run(Raw::new(2, RECORD)), success(0));
    let mut rig = Rig::with(DsaProfile::default());
    let big = rig.with_record(mov(&rig, SRC, DST, 1 << 20), 0);
    let drains = [1, 2].map(|n| rig.with_record(Raw::new(2, RECORD), n));
    rig.post(0, &big);
    for drain in &drains {
        rig.post(0, drain);
    }
    let mut waited = false;
    while rig.device.step() {
        let (moved, drained) = (rig.record(0).status, rig.record(1).status);
        assert!(moved == 1 || drained == 0, "the drain completed before what came before it");
        waited |= moved == 0;
    }
    assert!(waited, "the move took several steps");
    assert_eq!([0, 1, 2].map(|n| rig.record(n).status), [1; 3], "two drains do not wait for each other");
}
