//! One suite that every accelerator channel passes: the CPU and the software DSA in all its modes.
//!
//! A test of the suite takes a [`Subject`] and is run for each. What a job must do comes from
//! `reference`, which has nothing in common with the code under test.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod reference;
mod rig;

use std::sync::Arc;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use proptest::test_runner::{Config as ProptestConfig, TestRunner};
use underpass::accel::{
    Accelerator, Channel, Config, CounterValues, Dif, DifBlock, Done, Job, JobError, Op, OpKind, Reason,
    Source, State,
};
use underpass::dma::DmaBuf;
use underpass::iommu::SvaToken;
use underpass::{Access, Burst, ErrorKind, Iova, Region};
use underpass_drivers::dsa::model::DsaProfile;

use reference::Expected;
use rig::stepped::Stepped;
use rig::{Align, Arena, Flavour, PATIENCE, Random, Rig, burst, collect, make, roles, run};

/// An accelerator under test.
struct Subject {
    open: fn() -> Box<dyn Accelerator>,
    /// Channels share the process's address space: nothing is ever not mapped.
    sva: bool,
    /// Channels address memory by its pointers.
    pointers: bool,
}

impl Subject {
    fn open(address: &str) -> Box<dyn Accelerator> {
        underpass_drivers::builtin().open(address).unwrap()
    }

    fn config(&self) -> Config {
        // SAFETY: these drivers give the device no address but those of buffers that live until their job is
        // back; the software device stops before memory is unmapped (the tests wait for it).
        let sva = self.sva.then(|| unsafe { SvaToken::new() });
        Config { channels: 1, depth: 16, batch: 8, sva, ..Config::default() }
    }

    fn rig(&self) -> Rig {
        Rig::new((self.open)(), &self.config())
    }

    /// Where the channel sees the first byte of `buf`.
    fn iova(&self, buf: &DmaBuf) -> Iova {
        if self.pointers {
            return Iova::new(buf.as_ptr() as u64);
        }
        buf.region().preferred_iova().unwrap().wrapping_add(buf.offset() as u64)
    }
}

/// The page that an address is on: some devices report no more of it.
fn page(iova: Iova) -> u64 {
    iova.get() & !0xfff
}

macro_rules! suite {
    ($($test:ident),* $(,)?) => {
        macro_rules! subject {
            ($name:ident: $subject:expr) => {
                mod $name {
                    use super::*;
                    const SUBJECT: Subject = $subject;
                    $(#[test] fn $test() { super::$test(&SUBJECT); })*
                }
            };
        }
    };
}

suite![
    every_operation_at_every_size,
    published_vectors,
    overlapping_copies,
    shapes_that_do_not_fit_are_rejected,
    the_largest_size_is_done_and_one_byte_more_is_not,
    a_full_queue_gives_the_job_back,
    a_failing_member_of_a_batch_fails_alone,
    a_fence_stops_behind_a_failure,
    batches_of_the_wrong_size_are_rejected,
    a_batch_with_a_bad_member_is_left_alone,
    memory_that_is_not_mapped_is_refused,
    mappings_without_the_access_fault,
    unmapping_waits_for_nobody,
    channels_are_isolated,
    a_probe_runs_up_to_the_end_of_what_is_mapped,
    reset_gives_every_job_back_once,
    one_source_serves_many_jobs,
    channels_can_be_dropped_with_jobs_outstanding,
    counters_count,
    impossible_set_ups_are_refused,
    waiting_ends,
    random_sequences,
];

subject!(cpu: Subject { open: || Subject::open("cpu"), sva: false, pointers: true });
subject!(cpu_sva: Subject { open: || Subject::open("cpu"), sva: true, pointers: true });
subject!(dsa: Subject { open: || Subject::open("soft:dsa"), sva: false, pointers: false });
subject!(dsa_engines: Subject { open: || Subject::open("soft:dsa,engines=3"), sva: false, pointers: false });
subject!(dsa_leases: Subject { open: || Subject::open("soft:dsa,check=leases"), sva: false, pointers: false });
subject!(dsa_shared: Subject { open: || Subject::open("soft:dsa,mode=shared"), sva: false, pointers: false });
subject!(dsa_no_pasid: Subject { open: || Subject::open("soft:dsa,pasids=0"), sva: false, pointers: false });
subject!(dsa_stepped: Subject { open: small_stepped_dsa, sva: false, pointers: false });
subject!(dsa_sva: Subject { open: || Subject::open("soft:dsa"), sva: true, pointers: true });

/// A device whose maxima a test can reach.
fn small_stepped_dsa() -> Box<dyn Accelerator> {
    let profile = DsaProfile {
        wqs: 2,
        engines: 2,
        max_transfer_shift: 21,
        max_batch_shift: 4,
        ..DsaProfile::default()
    };
    Box::new(Stepped::open(profile))
}

/// The kinds that the channel does, without the probe, which needs an address.
fn kinds(channel: &dyn Channel) -> Vec<OpKind> {
    channel.limits().ops.iter().filter(|kind| *kind != OpKind::Probe).collect()
}

fn every_operation_at_every_size(subject: &Subject) {
    const SIZES: [usize; 17] =
        [1, 2, 7, 8, 9, 63, 64, 65, 511, 4095, 4096, 4097, 9000, 65535, 65536, 65537, 1 << 20];
    let mut rig = subject.rig();
    for kind in kinds(&*rig.channels[0]) {
        let mut arena = rig.arena(8 << 20);
        for size in SIZES {
            // Large ones once, small ones in several flavours.
            for flavour in [Flavour::Agreeing, Flavour::Random, Flavour::Random] {
                if size > 100_000 && flavour == Flavour::Random {
                    continue;
                }
                let job = rig.job(&mut arena, kind, size, flavour);
                let expected = Expected::of(&job.op);
                expected.verify(&rig.run(job));
            }
        }
        rig.channels[0].unmap(arena.region()).unwrap();
    }
    let mismatches = rig.channels[0].counters().values().failed;
    assert_ne!(mismatches, 0, "the random flavours never had wrong protection information");
}

fn published_vectors(subject: &Subject) {
    let mut rig = subject.rig();
    let mut arena = rig.arena(1 << 20);
    let mut with = |bytes: &[u8]| {
        let mut buf = arena.take(bytes.len(), Align::Any);
        buf.copy_from_slice(bytes);
        buf
    };
    let count: Vec<u8> = (0..32).collect();
    let down: Vec<u8> = (0..32).rev().collect();
    // RFC 3720, appendix B.4, whose last is an iSCSI Read (10) command PDU; its bytes are the CRC's, low first.
    let read_command = [
        0x01, 0xc0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x14, 0, 0, 0, 0, 0, 0x04, 0, 0, 0, 0, 0x14, 0,
        0, 0, 0x18, 0x28, 0, 0, 0, 0, 0, 0, 0, 0x02, 0, 0, 0, 0, 0, 0, 0,
    ];
    let vectors: [(&[u8], u32); 6] = [
        (&[0; 32], u32::from_le_bytes([0xaa, 0x36, 0x91, 0x8a])),
        (&[0xff; 32], u32::from_le_bytes([0x43, 0xab, 0xa8, 0x62])),
        (&count, u32::from_le_bytes([0x4e, 0x79, 0xdd, 0x46])),
        (&down, u32::from_le_bytes([0x5c, 0xdb, 0x3f, 0x11])),
        (&read_command, u32::from_le_bytes([0x56, 0x3a, 0x96, 0xd9])),
        (b"123456789", 0xe306_9283),
    ];
    for (bytes, crc) in vectors {
        assert_eq!(reference::crc32c(0, bytes), crc, "the reference itself");
        assert_eq!(rig.run(Job::crc(with(bytes), 0)).result.unwrap().crc, crc);
        let (head, tail) = bytes.split_at(5);
        let seed = rig.run(Job::crc(with(head), 0)).result.unwrap().crc;
        assert_eq!(rig.run(Job::crc(with(tail), seed)).result.unwrap().crc, crc, "continued");
    }

    // CRC-16/T10-DIF: the check value, and the five codewords of "Simplified End-to-End Data
    // Protection" (INCITS T10, 22 October 2003, section 4.5.6).
    let mut front = [0; 32];
    front[..2].fill(0xff);
    let from_ff: Vec<u8> = (0xe0..=0xff).rev().collect();
    let vectors: [(&[u8], u16); 6] = [
        (b"123456789", 0xd0db),
        (&[0; 32], 0x0000),
        (&[0xff; 32], 0xa293),
        (&count, 0x0224),
        (&front, 0x21b8),
        (&from_ff, 0xa0b7),
    ];
    for (bytes, guard) in vectors {
        assert_eq!(reference::crc16_t10(0, bytes), guard, "the reference itself");
        // The register stays zero over leading zeros, so a block that ends with the vector has its guard.
        let mut block = [0; 512];
        block[512 - bytes.len()..].copy_from_slice(bytes);
        let (src, dst) = (with(&block).into(), with(&[0; 520]));
        let dif = Dif { app_tag: 0xabcd, ref_tag: 0x0102_0304, ..Dif::new(DifBlock::B512) };
        let done = rig.run(Job::new(Op::DifInsert { src, dst, dif }));
        assert!(done.result.is_ok());
        let Op::DifInsert { dst, .. } = done.job.op else { panic!("another operation came back") };
        assert_eq!(dst[..512], block);
        assert_eq!(dst[512..514], guard.to_be_bytes());
        assert_eq!(dst[514..], [0xab, 0xcd, 1, 2, 3, 4]);
    }
}

fn overlapping_copies(subject: &Subject) {
    let mut rig = subject.rig();
    let mut arena = rig.arena(2 << 20);
    for (from, to, len) in [
        (0, 1, 4096),
        (1, 0, 4096),
        (0, 4095, 70_000),
        (4095, 0, 70_000),
        (64, 65, 1),
        (0, 0, 1000),
        (100, 8192, 8092),
        (0, 65_536, 65_536),
        (65_537, 0, 65_537),
    ] {
        let buf = arena.random(140_000);
        let job = Job::new(Op::CopyWithin { buf, from, to, len });
        Expected::of(&job.op).verify(&rig.run(job));
    }
}

/// Submits a job that must be refused, and checks that it came back as it was.
fn rejected(channel: &mut dyn Channel, op: Op) -> Reason {
    let buffers = |op: &Op| -> Vec<(*const u8, usize)> {
        reference::buffers(op).iter().map(|buf| (buf.as_ptr(), buf.len())).collect()
    };
    let (kind, before, outstanding) = (op.kind(), buffers(&op), channel.outstanding());
    let Err(rejected) = channel.submit(Job::new(op).tag(99)) else { panic!("{kind:?} was taken") };
    assert_eq!(rejected.job.tag, 99);
    assert_eq!(rejected.job.op.kind(), kind);
    assert_eq!(buffers(&rejected.job.op), before, "other buffers came back");
    assert_eq!(channel.outstanding(), outstanding);
    rejected.why
}

fn shapes_that_do_not_fit_are_rejected(subject: &Subject) {
    let mut rig = subject.rig();
    let mut arena = rig.arena(4 << 20);
    let mut buf = |len| arena.take(len, Align::To(4096));
    let b512 = Dif::new(DifBlock::B512);
    let mut cases: Vec<(Reason, Op)> = vec![
        (Reason::Size, Op::Copy { src: buf(0).into(), dst: buf(0) }),
        (Reason::Size, Op::Copy { src: buf(64).into(), dst: buf(63) }),
        (Reason::Size, Op::Copy { src: buf(64).into(), dst: buf(65) }),
        (Reason::Size, Op::CopyWithin { buf: buf(64), from: 0, to: 1, len: 64 }),
        (Reason::Size, Op::CopyWithin { buf: buf(64), from: 1, to: 0, len: 64 }),
        (Reason::Size, Op::CopyWithin { buf: buf(64), from: 0, to: 32, len: 0 }),
        (Reason::Size, Op::CopyWithin { buf: buf(64), from: usize::MAX, to: 0, len: 2 }),
        (Reason::Size, Op::Fill { dst: buf(0), pattern: 0 }),
        (Reason::Size, Op::Compare { a: buf(0).into(), b: buf(0).into() }),
        (Reason::Size, Op::Compare { a: buf(8).into(), b: buf(9).into() }),
        (Reason::Size, Op::ComparePattern { src: buf(0).into(), pattern: 0 }),
        (Reason::Size, Op::Crc { src: buf(0).into(), seed: 0 }),
        (Reason::Size, Op::CopyCrc { src: buf(8).into(), dst: buf(4096), seed: 0 }),
        (Reason::Size, Op::Dualcast { src: buf(8).into(), dst1: buf(8), dst2: buf(7) }),
        (Reason::Size, Op::Dualcast { src: buf(8).into(), dst1: buf(9), dst2: buf(8) }),
        (
            Reason::Size,
            Op::CreateDelta { original: buf(12).into(), modified: buf(12).into(), delta: buf(80) },
        ),
        (Reason::Size, Op::CreateDelta { original: buf(16).into(), modified: buf(8).into(), delta: buf(80) }),
        (
            Reason::Size,
            Op::CreateDelta { original: buf(16).into(), modified: buf(16).into(), delta: buf(79) },
        ),
        (Reason::Size, Op::ApplyDelta { delta: buf(80).into(), delta_len: 0, dst: buf(64) }),
        (Reason::Size, Op::ApplyDelta { delta: buf(80).into(), delta_len: 15, dst: buf(64) }),
        (Reason::Size, Op::ApplyDelta { delta: buf(80).into(), delta_len: 90, dst: buf(64) }),
        (Reason::Size, Op::ApplyDelta { delta: buf(80).into(), delta_len: 10, dst: buf(65) }),
        (Reason::Size, Op::ApplyDelta { delta: buf(80).into(), delta_len: 10, dst: buf((512 << 10) + 8) }),
        (Reason::Size, Op::DifCheck { src: buf(519).into(), dif: b512 }),
        (Reason::Size, Op::DifInsert { src: buf(512).into(), dst: buf(512), dif: b512 }),
        (Reason::Size, Op::DifInsert { src: buf(1024).into(), dst: buf(520), dif: b512 }),
        (Reason::Size, Op::DifStrip { src: buf(520).into(), dst: buf(520), dif: b512 }),
        (Reason::Size, Op::DifUpdate { src: buf(520).into(), dst: buf(512), from: b512, to: b512 }),
        (
            Reason::Size,
            Op::DifUpdate { src: buf(520).into(), dst: buf(520), from: b512, to: Dif::new(DifBlock::B520) },
        ),
        (
            Reason::Unsupported,
            Op::DifUpdate {
                src: buf(520).into(),
                dst: buf(520),
                from: b512,
                to: Dif { invert_crc_result: true, ..b512 },
            },
        ),
        (Reason::Size, Op::CacheFlush { buf: buf(0) }),
        (Reason::Size, Op::Probe { iova: Iova::new(0x1000), len: 0 }),
    ];
    let mut odd = |len| {
        let mut buf = buf(len + 4);
        let _ = buf.split_to(4);
        buf
    };
    cases.extend([
        (Reason::Alignment, Op::Dualcast { src: odd(8).into(), dst1: odd(8), dst2: further_on(&mut odd) }),
        (
            Reason::Alignment,
            Op::CreateDelta { original: odd(8).into(), modified: odd(8).into(), delta: odd(80) },
        ),
        (Reason::Alignment, Op::ApplyDelta { delta: odd(80).into(), delta_len: 10, dst: odd(64) }),
    ]);
    let channel = &mut *rig.channels[0];
    for (why, op) in cases {
        let kind = op.kind();
        let why = if channel.limits().ops.contains(kind) { why } else { Reason::Unsupported };
        assert_eq!(rejected(channel, op), why, "{kind:?}");
    }
    assert_eq!(
        channel.counters().values(),
        CounterValues::default(),
        "not one of them is an isolation matter"
    );
}

/// 8 bytes that do not start in their page where those of `odd` do.
fn further_on(odd: &mut dyn FnMut(usize) -> DmaBuf) -> DmaBuf {
    odd(12).split_off(4)
}

fn the_largest_size_is_done_and_one_byte_more_is_not(subject: &Subject) {
    let mut rig = subject.rig();
    let max = rig.channels[0].limits().max_bytes;
    if rig.channels[0].limits().ops.contains(OpKind::Probe)
        && let Ok(over) = u32::try_from(max + 1)
    {
        let op = Op::Probe { iova: Iova::new(0x1000), len: over };
        assert_eq!(rejected(&mut *rig.channels[0], op), Reason::Size);
    }
    // Buffers of gigabytes are too much for a test; a software device with a lower maximum stands in.
    if max > 8 << 20 {
        return;
    }
    let max = max as usize;
    let mut arena = rig.arena(2 * max + (1 << 20));
    let (src, dst) = (arena.random(max), arena.take(max, Align::Any));
    let done = rig.run(Job::copy(src, dst));
    let Op::Copy { src, dst } = &done.job.op else { panic!("another operation came back") };
    assert!(done.result.is_ok() && src.buf()[..] == dst[..], "a copy of the largest size");
    drop((arena, done));
    let mut arena = rig.arena(2 * max + (1 << 20));
    let op = Op::Copy { src: arena.take(max + 1, Align::Any).into(), dst: arena.take(max + 1, Align::Any) };
    assert_eq!(rejected(&mut *rig.channels[0], op), Reason::Size);
}

fn a_full_queue_gives_the_job_back(subject: &Subject) {
    let mut rig = Rig::new((subject.open)(), &Config { depth: 4, batch: 2, ..subject.config() });
    let mut arena = rig.arena(1 << 20);
    let channel = &mut *rig.channels[0];
    assert_eq!(channel.limits().depth, 4);
    for round in 0..10 {
        for tag in 0..4 {
            channel.submit(Job::new(Op::Nop).tag(tag)).unwrap();
        }
        assert_eq!(rejected(channel, Op::Fill { dst: arena.take(64, Align::Any), pattern: 1 }), Reason::Full);
        let mut two = burst(vec![Job::new(Op::Nop).tag(50), Job::new(Op::Nop).tag(51)]);
        assert_eq!(channel.submit_batch(&mut two), Err((0, Reason::Full)));
        assert_eq!(two.iter().map(|job| job.tag).collect::<Vec<_>>(), [50, 51]);
        assert_eq!((channel.state(), channel.outstanding()), (State::Running, 4), "round {round}");
        let mut tags: Vec<u64> = collect(channel, 4).iter().map(|done| done.job.tag).collect();
        tags.sort_unstable();
        assert_eq!(tags, [0, 1, 2, 3]);
        assert_eq!(channel.poll(&mut Burst::with_capacity(4)), 0, "no more comes back than went in");
    }
}

/// A job that fails on every device, in memory that it may use: its protection information is wrong.
fn failing(arena: &mut Arena) -> (Op, JobError) {
    let dif = Dif { skip_ref_tag_check: true, ..Dif::new(DifBlock::B512) };
    let mut src = arena.take(520, Align::Any);
    src.fill(0);
    src[0] = 1;
    let error = JobError::Dif { completed: 0, guard: true, app_tag: false, ref_tag: false };
    (Op::DifCheck { src: src.into(), dif }, error)
}

fn a_failing_member_of_a_batch_fails_alone(subject: &Subject) {
    let mut rig = subject.rig();
    let mut arena = rig.arena(4 << 20);
    let max = rig.channels[0].limits().max_batch;
    let kinds = kinds(&*rig.channels[0]);
    for size in [2, 3, max] {
        for bad in 0..size {
            let mut jobs = Vec::new();
            let mut expected = Vec::new();
            for position in 0..size {
                let mut job = Job::new(Op::Nop);
                if position == bad {
                    job.op = failing(&mut arena).0;
                } else {
                    while matches!(job.op, Op::Nop | Op::Drain) {
                        let kind = kinds[rig.random.below(kinds.len())];
                        job = rig.job(&mut arena, kind, 700, Flavour::Agreeing);
                    }
                }
                expected.push(Expected::of(&job.op));
                jobs.push(job.tag(1000 + position as u64));
            }
            for (position, (expected, done)) in expected.iter().zip(rig.run_batch(jobs)).enumerate() {
                assert_eq!(done.result.is_err(), position == bad, "member {position}, bad {bad}");
                expected.verify(&done);
            }
        }
    }
}

fn a_fence_stops_behind_a_failure(subject: &Subject) {
    const SIZE: usize = 5;
    let mut rig = subject.rig();
    let mut arena = rig.arena(2 << 20);
    for bad in 0..=SIZE {
        for fence in 0..SIZE {
            let (mut jobs, mut wanted) = (Vec::new(), Vec::new());
            for position in 0..SIZE {
                let stopped = bad < fence && fence <= position;
                let mut dst = arena.take(100, Align::Any);
                dst.fill(0xee);
                let (op, result) = if position == bad {
                    let (op, error) = failing(&mut arena);
                    (op, Err(error))
                } else {
                    (Op::Fill { dst, pattern: 0 }, Ok(()))
                };
                let job = Job { op, tag: position as u64, fence: position == fence };
                wanted.push(if stopped { Err(JobError::Abandoned) } else { result });
                jobs.push(job);
            }
            for (wanted, done) in wanted.iter().zip(rig.run_batch(jobs)) {
                assert_eq!(done.result.map(|_| ()), *wanted, "{}: bad {bad}, fence {fence}", done.job.tag);
                if let Op::Fill { dst, .. } = &done.job.op {
                    let byte = if wanted.is_ok() { 0 } else { 0xee };
                    assert!(dst.iter().all(|found| *found == byte), "an abandoned job is not started");
                }
            }
        }
    }
}

fn batches_of_the_wrong_size_are_rejected(subject: &Subject) {
    let mut rig = subject.rig();
    let channel = &mut *rig.channels[0];
    let nops = |count: usize| burst((0..count).map(|tag| Job::new(Op::Nop).tag(tag as u64)).collect());
    for few in [0, 1] {
        let mut jobs = nops(few);
        assert_eq!(channel.submit_batch(&mut jobs), Err((0, Reason::Batch)), "a batch of {few}");
        assert_eq!(jobs.len(), few);
    }
    let max = channel.limits().max_batch;
    assert_eq!(max, subject.config().batch);
    let mut jobs = nops(max + 1);
    assert_eq!(channel.submit_batch(&mut jobs), Ok(max), "as many as fit");
    assert_eq!(jobs.iter().map(|job| job.tag).collect::<Vec<_>>(), [max as u64], "and the last one stays");
    assert_eq!(channel.outstanding(), max);
    collect(channel, max);

    let mut rig = Rig::new((subject.open)(), &Config { batch: 0, ..subject.config() });
    assert_eq!(rig.channels[0].limits().max_batch, 1);
    assert_eq!(rig.channels[0].submit_batch(&mut nops(2)), Err((0, Reason::Batch)), "no batches were set up");
}

fn a_batch_with_a_bad_member_is_left_alone(subject: &Subject) {
    let mut rig = subject.rig();
    let mut arena = rig.arena(1 << 20);
    for bad in 0..4 {
        for (op, why) in [
            (Op::Drain, Reason::Batch),
            (Op::Fill { dst: arena.take(0, Align::Any), pattern: 0 }, Reason::Size),
        ] {
            let mut jobs: Vec<Job> = (0..4).map(|tag| Job::new(Op::Nop).tag(tag)).collect();
            jobs[bad].op = op;
            let mut jobs = burst(jobs);
            assert_eq!(rig.channels[0].submit_batch(&mut jobs), Err((bad, why)));
            assert_eq!(jobs.iter().map(|job| job.tag).collect::<Vec<_>>(), [0, 1, 2, 3]);
            assert_eq!(rig.channels[0].outstanding(), 0);
        }
    }
}

/// A job of this kind whose operand `special` is from another arena than the rest.
fn job_with(
    rig: &mut Rig,
    kind: OpKind,
    special: usize,
    arena: &mut Arena,
    other: &mut Arena,
) -> (Op, (*const u8, Iova)) {
    let mut address = (std::ptr::null(), Iova::new(0));
    let op = make(kind, 600, Flavour::Agreeing, &mut rig.random, &mut |operand, len, align| {
        if operand != special {
            return arena.take(len, align);
        }
        let buf = other.take(len, align);
        address = (buf.as_ptr(), Iova::new(buf.offset() as u64));
        buf
    });
    (op, address)
}

fn memory_that_is_not_mapped_is_refused(subject: &Subject) {
    let mut rig = subject.rig();
    let mut arena = rig.arena(1 << 20);
    let mut other = Arena::new(1 << 20);
    let mut refused = 0;
    for kind in kinds(&*rig.channels[0]) {
        for operand in 0..roles(kind).len() {
            let (op, _) = job_with(&mut rig, kind, operand, &mut arena, &mut other);
            if subject.sva {
                let expected = Expected::of(&op);
                expected.verify(&rig.run(Job::new(op)));
                continue;
            }
            assert_eq!(rejected(&mut *rig.channels[0], op), Reason::NotMapped, "{kind:?}, operand {operand}");
            refused += 1;
            assert_eq!(rig.channels[0].counters().values().refused, refused);

            let (op, _) = job_with(&mut rig, kind, operand, &mut arena, &mut other);
            if matches!(op, Op::Drain) {
                continue;
            }
            let mut jobs = burst(vec![Job::new(Op::Nop), Job::new(op), Job::new(Op::Nop)]);
            assert_eq!(rig.channels[0].submit_batch(&mut jobs), Err((1, Reason::NotMapped)), "{kind:?}");
            assert_eq!(jobs.len(), 3);
            refused += 1;
            assert_eq!(rig.channels[0].counters().values().refused, refused);
        }
    }
    assert!(rig.device.next_fault().is_none(), "the device never saw those jobs");
}

fn mappings_without_the_access_fault(subject: &Subject) {
    if subject.sva {
        return; // There is no mapping whose access could be less than the process's.
    }
    for allowed in [Access::READ, Access::WRITE] {
        let mut rig = subject.rig();
        let mut arena = rig.arena(1 << 20);
        let mut other = Arena::new(1 << 20);
        rig.channels[0].map(other.region(), allowed).unwrap();
        for kind in kinds(&*rig.channels[0]) {
            for (operand, role) in roles(kind).iter().enumerate() {
                let (op, (_, offset)) = job_with(&mut rig, kind, operand, &mut arena, &mut other);
                let base = {
                    let probe = other.take(1, Align::Any);
                    Iova::new(subject.iova(&probe).get() - probe.offset() as u64)
                };
                let start = base.wrapping_add(offset.get());
                let expected = Expected::of(&op);
                let done = rig.run(Job::new(op));
                if allowed.allows(*role) {
                    expected.verify(&done);
                    continue;
                }
                let Err(JobError::PageFault { iova, access, completed }) = done.result else {
                    panic!("{kind:?} with operand {operand} in {allowed} memory: {:?}", done.result);
                };
                let wanted = if allowed == Access::READ { Access::WRITE } else { Access::READ };
                assert_eq!((access, completed), (wanted, 0), "{kind:?}, operand {operand}");
                let end = start.wrapping_add(1200);
                assert!(
                    (page(start)..=page(end)).contains(&page(iova)),
                    "{kind:?}, operand {operand} at {start}: fault at {iova}"
                );
                if let Some(fault) = rig.device.next_fault() {
                    assert_eq!((page(fault.iova), fault.access), (page(iova), wanted));
                    assert_eq!(fault.pasid, rig.channels[0].pasid());
                }
            }
        }
        assert_eq!(rig.channels[0].state(), State::Running, "a fault is the job's, not the channel's");
    }
}

fn unmapping_waits_for_nobody(subject: &Subject) {
    let mut rig = subject.rig();
    let mut arena = rig.arena(1 << 20);
    let channel = &mut *rig.channels[0];
    let region = Arc::clone(arena.region());
    channel.submit(Job::fill(arena.take(4096, Align::Any), 1)).unwrap();
    assert_eq!(channel.unmap(&region).unwrap_err().kind(), ErrorKind::Busy, "a job is outstanding");
    collect(channel, 1);
    channel.unmap(&region).unwrap();
    if subject.sva {
        return;
    }
    let op = Op::Fill { dst: arena.take(64, Align::Any), pattern: 0 };
    assert_eq!(rejected(channel, op), Reason::NotMapped);
    assert_eq!(channel.unmap(&region).unwrap_err().kind(), ErrorKind::NotFound);
    channel.map(&region, Access::READ_WRITE).unwrap();
    assert_eq!(channel.map(&region, Access::READ_WRITE).unwrap_err().kind(), ErrorKind::Busy);
    run(channel, Job::fill(arena.take(64, Align::Any), 1)).result.unwrap();
}

fn channels_are_isolated(subject: &Subject) {
    if subject.sva {
        return;
    }
    let mut rig = Rig::new((subject.open)(), &Config { channels: 2, ..subject.config() });
    let [first, second] = &mut rig.channels[..] else { panic!("two channels were asked for") };
    if let (Some(a), Some(b)) = (first.pasid(), second.pasid()) {
        assert_ne!(a, b, "a PASID a channel");
    }
    let (mut a, mut b) = (Arena::new(1 << 16), Arena::new(1 << 16));
    first.map(a.region(), Access::READ_WRITE).unwrap();
    second.map(b.region(), Access::READ_WRITE).unwrap();
    let (mine, theirs) = (b.random(4096), a.random(4096));
    let their_iova = subject.iova(&theirs);

    let op = Op::Copy { src: theirs.into(), dst: mine };
    assert_eq!(rejected(&mut **second, op), Reason::NotMapped);
    assert_eq!((first.counters().values().refused, second.counters().values().refused), (0, 1));

    if !second.limits().ops.contains(OpKind::Probe) {
        return;
    }
    // Past the driver's check, with the bare address: the IOMMU refuses it.
    let probe = || Job::new(Op::Probe { iova: their_iova, len: 64 });
    let done = run(&mut **second, probe());
    if second.pasid().is_none() {
        done.result.expect("without PASIDs the channels of a device share its address space");
        return;
    }
    let Err(JobError::PageFault { iova, access, completed }) = done.result else {
        panic!("the second queue reached the first one's memory: {:?}", done.result)
    };
    assert_eq!((page(iova), access, completed), (page(their_iova), Access::READ, 0));
    let fault = rig.device.next_fault().expect("the IOMMU reports it");
    assert_eq!((page(fault.iova), fault.access), (page(their_iova), Access::READ));
    assert_eq!(fault.pasid, second.pasid(), "and names the queue that tried");
    assert!(rig.device.next_fault().is_none(), "once");
    assert_eq!(second.counters().values().failed, 1);

    // A lease is granted for jobs with buffers; a bare address has none, so check=leases refuses this one too.
    let own = run(&mut **first, probe());
    if rig.device.name().contains("check=leases") {
        assert!(matches!(own.result, Err(JobError::PageFault { .. })));
    } else {
        own.result.expect("the first queue reaches its own memory at this address");
    }
}

fn a_probe_runs_up_to_the_end_of_what_is_mapped(subject: &Subject) {
    let mut rig = subject.rig();
    let probes = rig.channels[0].limits().ops.contains(OpKind::Probe);
    if subject.sva || !probes || rig.device.name().contains("check=leases") {
        return;
    }
    let mut arena = rig.arena(1 << 16);
    let first = arena.take(1, Align::Any);
    let base = Iova::new(subject.iova(&first).get() - first.offset() as u64);
    let end = base.wrapping_add(arena.region().len());
    let done = rig.run(Job::new(Op::Probe { iova: Iova::new(end.get() - 5000), len: 9000 }));
    let Err(JobError::PageFault { iova, access, completed }) = done.result else {
        panic!("it ran past the end: {:?}", done.result)
    };
    assert_eq!((page(iova), access), (end.get(), Access::READ));
    assert!(completed <= 5000, "{completed} bytes before a fault at byte 5000");
}

fn reset_gives_every_job_back_once(subject: &Subject) {
    let mut rig = subject.rig();
    let mut arena = rig.arena(24 << 20);
    let depth = rig.channels[0].limits().depth as u64;
    for round in 0..3 {
        let channel = &mut *rig.channels[0];
        // Large ones, so that the device is in the middle of them; and one batch.
        for tag in 0..depth - 1 {
            let (src, dst) = (arena.random(128 << 10), arena.take(128 << 10, Align::Any));
            channel.submit(Job::copy(src, dst).tag(tag)).unwrap();
        }
        let mut two = burst(vec![Job::new(Op::Nop).tag(100), Job::fill(arena.random(9999), 7).tag(101)]);
        assert_eq!(channel.submit_batch(&mut two), Ok(2));
        let mut all: Vec<Done> = Vec::new();
        // On the last round the caller has room for a few at a time.
        let mut done = Burst::with_capacity(if round == 2 { 3 } else { 64 });
        let begin = Instant::now();
        loop {
            let left = channel.reset(&mut done).unwrap();
            all.extend(done.drain_all());
            if left == 0 {
                break;
            }
            assert!(begin.elapsed() < PATIENCE, "{left} left");
        }
        assert_eq!((channel.state(), channel.outstanding()), (State::Running, 0));
        let mut tags: Vec<u64> = all.iter().map(|done| done.job.tag).collect();
        tags.sort_unstable();
        let wanted: Vec<u64> = (0..depth - 1).chain([100, 101]).collect();
        assert_eq!(tags, wanted, "every job once");
        for done in &all {
            match (&done.result, &done.job.op) {
                (Ok(_), Op::Copy { src, dst }) => assert!(src.buf()[..] == dst[..], "done, and not done"),
                (Ok(_) | Err(JobError::Reset), _) => {}
                (result, op) => panic!("{result:?} for {op:?}"),
            }
        }
        let job = rig.job(&mut arena, OpKind::Copy, 5000, Flavour::Agreeing);
        Expected::of(&job.op).verify(&rig.run(job));
    }
}

fn one_source_serves_many_jobs(subject: &Subject) {
    let mut rig = subject.rig();
    let mut arena = rig.arena(4 << 20);
    let source = arena.random(30_000).freeze();
    let crc = reference::crc32c(0, &source);
    let channel = &mut *rig.channels[0];
    for tag in 0..15 {
        let src = Source::from(Arc::clone(&source));
        let op = match tag % 3 {
            0 => Op::Copy { src, dst: arena.take(30_000, Align::Any) },
            1 => Op::Crc { src, seed: 0 },
            _ => Op::Compare { a: src, b: Arc::clone(&source).into() },
        };
        channel.submit(Job::new(op).tag(tag)).unwrap();
    }
    assert_eq!(source[0], Arc::clone(&source)[0], "the caller may read it meanwhile");
    for done in collect(channel, 15) {
        let outcome = done.result.unwrap();
        assert!(outcome.matched);
        match done.job.op {
            Op::Copy { dst, .. } => assert!(dst[..] == source[..]),
            Op::Crc { .. } => assert_eq!(outcome.crc, crc),
            _ => {}
        }
    }
    Arc::try_unwrap(source).expect("nobody shares it any more");
}

fn channels_can_be_dropped_with_jobs_outstanding(subject: &Subject) {
    let begin = Instant::now();
    for device_first in [false, true] {
        let mut rig = Rig::new((subject.open)(), &Config { channels: 2, ..subject.config() });
        let mut arena = rig.arena(8 << 20);
        for _ in 0..10 {
            let (src, dst) = (arena.random(300 << 10), arena.take(300 << 10, Align::Any));
            rig.channels[0].submit(Job::copy(src, dst)).unwrap();
        }
        let Rig { mut channels, device, .. } = rig;
        if device_first {
            drop(device);
            drop(channels);
            continue;
        }
        drop(channels.remove(0));
        let other = &mut *channels[0];
        assert!(run(other, Job::new(Op::Nop)).result.is_ok(), "the other channel goes on");
    }
    assert!(begin.elapsed() < PATIENCE);
}

fn counters_count(subject: &Subject) {
    let mut rig = subject.rig();
    let mut arena = rig.arena(1 << 20);
    let counters = rig.channels[0].counters();
    let fill = |arena: &mut Arena, len| Job::fill(arena.take(len, Align::Any), 3);
    rig.run(fill(&mut arena, 1000)).result.unwrap();
    rig.run(Job::new(Op::Nop)).result.unwrap();
    let jobs = vec![fill(&mut arena, 24), Job::new(failing(&mut arena).0).tag(1)];
    rig.run_batch(jobs);
    let values = counters.values();
    let wanted = CounterValues { jobs: 4, bytes: 1024, failed: 1, refused: 0, retries: values.retries };
    assert_eq!(values, wanted);
}

fn impossible_set_ups_are_refused(subject: &Subject) {
    let mut device = (subject.open)();
    let (most, limits) = (device.max_channels(), device.limits());
    for config in [
        Config { channels: most + 1, depth: 1, ..subject.config() },
        Config { depth: limits.depth + 1, ..subject.config() },
        Config { batch: limits.max_batch + 1, ..subject.config() },
    ] {
        let error = device.channels(&config).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}");
        assert!(error.mend_text().is_some(), "{error}: does not say how to mend it");
    }
    let channels = device.channels(&subject.config()).expect("a refused set-up leaves the device as it was");
    assert_eq!(device.channels(&subject.config()).unwrap_err().kind(), ErrorKind::Busy);
    drop(channels);
}

fn waiting_ends(subject: &Subject) {
    let mut rig = subject.rig();
    let error = rig.channels[0].wait(Duration::ZERO).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported, "interrupts were not set up");

    let mut rig = Rig::new((subject.open)(), &Config { interrupts: true, ..subject.config() });
    let mut arena = rig.arena(4 << 20);
    let channel = &mut *rig.channels[0];
    let begin = Instant::now();
    let mut done = Burst::with_capacity(1);
    for _ in 0..20 {
        let (src, dst) = (arena.random(50_000), arena.take(50_000, Align::Any));
        channel.submit(Job::copy(src, dst)).unwrap();
        channel.wait(PATIENCE).unwrap();
        // Woken for a completion: it is there.
        assert_eq!(channel.poll(&mut done), 1);
        done.clear();
    }
    assert!(begin.elapsed() < PATIENCE, "an interrupt was missed");
    channel.wait(Duration::from_millis(1)).unwrap();
}

/// One step of a random sequence.
#[derive(Debug, Clone)]
enum Step {
    Submit { kind: usize, size: usize },
    Batch { kinds: Vec<usize>, size: usize, fence: usize },
    Poll { room: usize },
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let size = prop_oneof![1..200_usize, 1000..9000_usize];
    let step = prop_oneof![
        4 => (any::<usize>(), size.clone()).prop_map(|(kind, size)| Step::Submit { kind, size }),
        2 => (prop::collection::vec(any::<usize>(), 2..8), size, 0..12_usize)
            .prop_map(|(kinds, size, fence)| Step::Batch { kinds, size, fence }),
        3 => (1..12_usize).prop_map(|room| Step::Poll { room }),
    ];
    prop::collection::vec(step, 1..24)
}

fn random_sequences(subject: &Subject) {
    let config = ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() };
    let rig = std::cell::RefCell::new(subject.rig());
    let test = |(seed, steps): (u64, Vec<Step>)| {
        let rig = &mut *rig.borrow_mut();
        rig.random = Random(seed);
        let mut arena = rig.arena(8 << 20);
        let region = Arc::clone(arena.region());
        random_sequence(rig, &mut arena, steps);
        rig.channels[0].unmap(&region).unwrap();
        Ok(())
    };
    TestRunner::new(config).run(&(any::<u64>(), steps()), test).unwrap();
}

fn random_sequence(rig: &mut Rig, arena: &mut Arena, steps: Vec<Step>) {
    let kinds = kinds(&*rig.channels[0]);
    let in_batches: Vec<OpKind> = kinds.iter().copied().filter(|kind| *kind != OpKind::Drain).collect();
    // By tag: what each job must come back with, and whether a failure in front of a fence abandoned it.
    let mut waiting = std::collections::HashMap::new();
    let judge = |done: Done, waiting: &mut std::collections::HashMap<u64, (Expected, bool)>| {
        let (expected, abandoned) = waiting.remove(&done.job.tag).expect("a job that was not outstanding");
        if abandoned {
            assert_eq!(done.result, Err(JobError::Abandoned));
        } else {
            expected.verify(&done);
        }
    };
    for step in steps {
        match step {
            Step::Submit { kind, size } => {
                let job = rig.job(arena, kinds[kind % kinds.len()], size, Flavour::Random);
                let (tag, expected) = (job.tag, Expected::of(&job.op));
                match rig.channels[0].submit(job) {
                    Ok(()) => drop(waiting.insert(tag, (expected, false))),
                    Err(rejected) => assert_eq!(rejected.why, Reason::Full),
                }
            }
            Step::Batch { kinds, size, fence } => {
                let (mut jobs, mut expectations) = (Vec::new(), Vec::new());
                let (mut failed, mut stopped) = (false, false);
                for (position, kind) in kinds.into_iter().enumerate() {
                    let kind = in_batches[kind % in_batches.len()];
                    let mut job = rig.job(arena, kind, size, Flavour::Random);
                    job.fence = position == fence;
                    let expected = Expected::of(&job.op);
                    stopped |= job.fence && failed;
                    failed |= expected.fails();
                    expectations.push((job.tag, (expected, stopped)));
                    jobs.push(job);
                }
                let mut jobs = burst(jobs);
                match rig.channels[0].submit_batch(&mut jobs) {
                    Ok(count) => {
                        assert_eq!(count, expectations.len());
                        waiting.extend(expectations);
                    }
                    Err(refusal) => assert_eq!(refusal, (0, Reason::Full)),
                }
            }
            Step::Poll { room } => {
                let mut done = Burst::with_capacity(room);
                rig.channels[0].poll(&mut done);
                done.drain_all().for_each(|done| judge(done, &mut waiting));
            }
        }
        assert_eq!(rig.channels[0].outstanding(), waiting.len());
    }
    let rest = waiting.len();
    for done in collect(&mut *rig.channels[0], rest) {
        judge(done, &mut waiting);
    }
}

#[test]
fn regions_of_dropped_channels_are_free_again() {
    // A channel holds its mapped regions, and only as long as it lives.
    let mut rig = Rig::new(Subject::open("cpu"), &Config::default());
    let region: Arc<Region> = Region::builder(4096).build().unwrap();
    rig.channels[0].map(&region, Access::READ).unwrap();
    assert_eq!(Arc::strong_count(&region), 2);
    drop(rig);
    assert_eq!(Arc::strong_count(&region), 1);
}
