//! A DSA that lies: whatever it answers, writes or leaves out, the driver gives every job back once with a result
//! that can be true, and never panics, reads out of bounds or waits without end.
//!
//! The liar is the real model with its portals tapped: the test itself plays the engines. It takes the
//! descriptors, and writes through the device's own bus what it likes, so that each lie comes at a known moment.
//! All of it runs with `check=leases`: a write to memory that the device was not given is refused.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod reference;
mod rig;

use std::collections::{HashSet, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use underpass::accel::{Accelerator, Channel, Config, Done, Job, JobError, Op, OpKind, Reason, State};
use underpass::dma::DmaBuf;
use underpass::iommu::FaultReason;
use underpass::iommu::soft::{SoftIommu, SoftOptions};
use underpass::model::{BarKind, BarSpec, Bus, DmaFault, Doorbell, Engine, Host, Model, Width};
use underpass::pci::{ConfigSpace, PciDevice, Run};
use underpass::{Access, Burst, ErrorKind, Iova, Pasid, Result};
use underpass_drivers::dsa::model::{DsaModel, DsaProfile};
use underpass_drivers::dsa::spec::{
    CmdSts, CompletionRecord, Descriptor, Handshake, Opcode, PORTAL_BAR, REGISTER_BAR, Status, reg,
};
use underpass_drivers::dsa::{Dsa, WqMode};
use zerocopy::FromBytes;

use reference::{Expected, buffers};
use rig::{Align, Arena, Flavour, Random, Rig, burst};

/// How a liar's registers read: from the offset in BAR 0 and what the honest model says.
type RegisterLie = Box<dyn FnMut(u64, u64) -> u64 + Send>;

/// What a test holds of the liar.
#[derive(Clone, Default)]
struct Strings(Arc<Shared>);

#[derive(Default)]
struct Shared {
    /// Submissions go to the honest model instead of the test.
    honest: AtomicBool,
    /// A shared queue answers "retry" to everything.
    full: AtomicBool,
    submissions: Mutex<VecDeque<Descriptor>>,
    bus: Mutex<Option<Bus>>,
    registers: Mutex<Option<RegisterLie>>,
}

impl Strings {
    fn submissions(&self) -> MutexGuard<'_, VecDeque<Descriptor>> {
        self.0.submissions.lock().unwrap()
    }

    /// The next descriptor that the driver submitted.
    fn take(&self) -> Descriptor {
        self.submissions().pop_front().expect("the driver submitted something")
    }

    fn with_bus<T>(&self, use_it: impl FnOnce(&mut Bus) -> T) -> T {
        use_it(self.0.bus.lock().unwrap().as_mut().expect("the device was started"))
    }

    fn lie_in_registers(&self, lie: impl FnMut(u64, u64) -> u64 + Send + 'static) {
        *self.0.registers.lock().unwrap() = Some(Box::new(lie));
    }

    fn be_honest(&self) {
        *self.0.registers.lock().unwrap() = None;
        self.0.honest.store(true, Ordering::Relaxed);
    }
}

/// The real model, with its portals tapped and its registers bent.
struct Liar {
    model: DsaModel,
    strings: Strings,
}

impl Model for Liar {
    fn config_space(&self) -> ConfigSpace {
        self.model.config_space()
    }

    fn bars(&self) -> Vec<BarSpec> {
        let tap = |target: Arc<dyn Doorbell>| {
            Arc::new(TappedPortal { honest: target, strings: self.strings.clone() }) as Arc<dyn Doorbell>
        };
        let mut bars = self.model.bars();
        for bar in &mut bars {
            if let BarKind::Doorbells { targets, .. } = &mut bar.kind {
                *targets = targets.drain(..).map(tap).collect();
            }
        }
        assert!(bars.iter().any(|bar| bar.index == PORTAL_BAR));
        bars
    }

    fn vectors(&self) -> usize {
        self.model.vectors()
    }

    fn start(&mut self, host: Arc<dyn Host>) -> Vec<Box<dyn Engine>> {
        *self.strings.0.bus.lock().unwrap() = Some(host.bus());
        self.model.start(host)
    }

    fn read(&mut self, bar: usize, offset: u64, width: Width) -> u64 {
        let value = self.model.read(bar, offset, width);
        match &mut *self.strings.0.registers.lock().unwrap() {
            Some(lie) if bar == REGISTER_BAR => lie(offset, value),
            _ => value,
        }
    }

    fn write(&mut self, bar: usize, offset: u64, width: Width, value: u64) {
        self.model.write(bar, offset, width, value);
    }

    fn config_written(&mut self, config: &ConfigSpace) {
        self.model.config_written(config);
    }

    fn reset(&mut self) {
        self.model.reset();
    }
}

struct TappedPortal {
    honest: Arc<dyn Doorbell>,
    strings: Strings,
}

impl Doorbell for TappedPortal {
    fn post64(&self, offset: u64, data: &[u8; 64]) {
        assert!(self.enqueue64(offset, data), "a dedicated queue was overrun");
    }

    fn enqueue64(&self, offset: u64, data: &[u8; 64]) -> bool {
        if self.strings.0.full.load(Ordering::Relaxed) {
            return false;
        }
        if self.strings.0.honest.load(Ordering::Relaxed) {
            self.honest.post64(offset, data);
        } else {
            self.strings.submissions().push_back(Descriptor::read_from_bytes(data).unwrap());
        }
        true
    }

    fn write(&self, offset: u64, width: Width, value: u64) {
        self.honest.write(offset, width, value);
    }
}

/// One channel on a liar.
struct Stage {
    rig: Rig,
    arena: Arena,
    strings: Strings,
    pasid: Option<Pasid>,
}

const DEADLINE: Duration = Duration::from_millis(20);

/// No test may wait longer than this for anything but a device that does not answer commands.
const SOON: Duration = Duration::from_secs(2);

fn open(strings: &Strings, mode: WqMode) -> Result<Dsa> {
    open_profile(DsaProfile { engines: 2, ..DsaProfile::default() }, strings, mode)
}

fn open_profile(profile: DsaProfile, strings: &Strings, mode: WqMode) -> Result<Dsa> {
    let iommu = SoftIommu::new(SoftOptions { check_leases: true, ..SoftOptions::default() });
    let model = DsaModel::new(profile);
    let liar = Box::new(Liar { model, strings: strings.clone() });
    let device = PciDevice::in_process("soft:liar,check=leases", liar, &iommu, Run::Stepped)?;
    Ok(Dsa::open(device)?.with_mode(mode))
}

fn config() -> Config {
    Config { channels: 1, depth: 4, batch: 4, deadline: Some(DEADLINE), ..Config::default() }
}

impl Stage {
    fn new() -> Self {
        let strings = Strings::default();
        let dsa = open(&strings, WqMode::Dedicated).unwrap();
        let mut rig = Rig::new(Box::new(dsa), &config());
        let pasid = rig.channels[0].pasid();
        assert!(pasid.is_some());
        Self { arena: rig.arena(4 << 20), rig, strings, pasid }
    }

    fn submit(&mut self, job: Job) -> Descriptor {
        self.rig.channels[0].submit(job).unwrap();
        self.strings.take()
    }

    fn submit_batch(&mut self, jobs: Vec<Job>) -> (Descriptor, Vec<Descriptor>) {
        let count = jobs.len();
        assert_eq!(self.rig.channels[0].submit_batch(&mut burst(jobs)), Ok(count));
        let batch = self.strings.take();
        assert_eq!((batch.opcode(), batch.size as usize), (Opcode::Batch as u8, count));
        let members = (0..count as u64).map(|member| {
            let mut bytes = [0; 64];
            let at = Iova::new(batch.source + member * 64);
            self.strings.with_bus(|bus| bus.read(self.pasid, at, &mut bytes)).unwrap();
            Descriptor::read_from_bytes(&bytes).unwrap()
        });
        (batch, members.collect())
    }

    /// Writes a completion record as an engine does: the handshake word last.
    fn answer(&self, to: &Descriptor, handshake: Handshake, words: [u64; 3]) {
        answer(&self.strings, self.pasid, to.completion, handshake, words).unwrap();
    }

    fn poll(&mut self) -> Vec<Done> {
        let mut done = Burst::with_capacity(16);
        self.rig.channels[0].poll(&mut done);
        done.drain_all().collect()
    }

    /// Polls until the deadline has stalled the channel; what came back meanwhile.
    fn stall(&mut self) -> Vec<Done> {
        let begin = Instant::now();
        let mut done = Vec::new();
        while self.rig.channels[0].state() == State::Running {
            done.extend(self.poll());
            assert!(begin.elapsed() < SOON, "the deadline of {DEADLINE:?} passed without notice");
        }
        done
    }

    fn reset(&mut self) -> Vec<Done> {
        let begin = Instant::now();
        let mut done = Burst::with_capacity(64);
        assert_eq!(self.rig.channels[0].reset(&mut done).unwrap(), 0);
        assert!(begin.elapsed() < SOON);
        assert_eq!((self.rig.channels[0].state(), self.rig.channels[0].outstanding()), (State::Running, 0));
        done.drain_all().collect()
    }

    /// The channel does an honest job again.
    fn works(&mut self) {
        self.strings.submissions().clear();
        self.strings.be_honest();
        let job = self.rig.job(&mut self.arena, OpKind::Copy, 3000, Flavour::Agreeing);
        let expected = Expected::of(&job.op);
        self.rig.channels[0].submit(job).unwrap();
        let begin = Instant::now();
        loop {
            // Reading registers steps the engines.
            assert!(self.rig.device.next_error().is_none());
            if let [done] = &self.poll()[..] {
                expected.verify(done);
                return;
            }
            assert!(begin.elapsed() < SOON, "the channel does not recover");
        }
    }
}

fn answer(
    strings: &Strings,
    pasid: Option<Pasid>,
    record: u64,
    handshake: Handshake,
    words: [u64; 3],
) -> Result<(), DmaFault> {
    strings.with_bus(|bus| {
        for (index, word) in (1..).zip(words) {
            bus.store(pasid, Iova::new(record + index * 8), word)?;
        }
        bus.store(pasid, Iova::new(record), handshake.into_bits())
    })
}

fn handshake(status: Status, result: u8, completed: u32) -> Handshake {
    Handshake::new().with_status(status.0).with_result(result).with_completed(completed)
}

fn success() -> Handshake {
    handshake(Status::SUCCESS, 0, 0)
}

/// Bytes that the job can complete.
fn size(op: &Op) -> usize {
    match op {
        Op::CopyWithin { len, .. } => *len,
        Op::Probe { len, .. } => *len as usize,
        Op::ApplyDelta { delta_len, .. } => *delta_len,
        _ => buffers(op).first().map_or(0, |buf| buf.len()),
    }
}

/// Whatever the device said, this can be true of the job.
fn assert_possible(done: &Done) {
    let (op, kind) = (&done.job.op, done.job.op.kind());
    match &done.result {
        Ok(outcome) => {
            let compares = matches!(kind, OpKind::Compare | OpKind::ComparePattern);
            assert!(outcome.matched || compares || kind == OpKind::CreateDelta, "{kind:?}: {outcome:?}");
            assert!(outcome.mismatch_at == 0 || compares);
            if compares && !outcome.matched {
                assert!((outcome.mismatch_at as usize) < size(op), "{outcome:?} in {} bytes", size(op));
            }
            if let Op::CreateDelta { delta, .. } = op {
                assert!(
                    outcome.delta_len as usize <= delta.len() && outcome.delta_len % 10 == 0,
                    "{outcome:?}"
                );
                assert_eq!(outcome.matched, outcome.delta_len == 0, "{outcome:?}");
            } else {
                assert_eq!((outcome.delta_len, outcome.delta_overflow), (0, false));
            }
        }
        Err(JobError::PageFault { completed, .. }) => assert!(*completed as usize <= size(op)),
        Err(JobError::Dif { completed, .. }) => {
            assert!(matches!(kind, OpKind::DifCheck | OpKind::DifStrip | OpKind::DifUpdate));
            assert!(*completed as usize <= size(op));
        }
        Err(_) => {}
    }
}

#[test]
fn a_status_is_believed_only_where_it_can_be_true() {
    let mut stage = Stage::new();
    let kinds: Vec<OpKind> = stage.rig.channels[0].limits().ops.iter().collect();
    let (mut lied, mut good) = (0, 0);
    for kind in kinds {
        let mut job = match kind {
            OpKind::Probe => Job::new(Op::Probe { iova: Iova::new(0x5000), len: 1000 }),
            kind => stage.rig.job(&mut stage.arena, kind, 1200, Flavour::Agreeing),
        };
        let size = size(&job.op) as u32;
        for status in 1..=255 {
            for result in [0, 1, 2, 3, 0xff] {
                for completed in [0, size / 2, size, size + 1, u32::MAX] {
                    let words = match stage.rig.random.below(4) {
                        0 => [0; 3],
                        1 => [u64::MAX; 3],
                        2 => [stage.rig.random.next(), stage.rig.random.next(), stage.rig.random.next()],
                        // Sizes of delta records: some that can be.
                        _ => [0x1000, stage.rig.random.below(60) as u64 * 5, 0],
                    };
                    let descriptor = stage.submit(job);
                    stage.answer(&descriptor, handshake(Status(status), result, completed), words);
                    let done = stage.poll().pop().expect("it has a status: it is back");
                    assert_possible(&done);
                    match &done.result {
                        Ok(_) => {
                            assert_eq!(Status(status), Status::SUCCESS, "{kind:?}");
                            assert!(completed <= size, "{kind:?} of {size} bytes completed {completed}");
                            good += 1;
                        }
                        Err(JobError::Lied { .. }) => lied += 1,
                        Err(JobError::Abandoned | JobError::Reset) => panic!("{kind:?}: {:?}", done.result),
                        Err(_) => {}
                    }
                    job = done.job;
                }
            }
        }
    }
    assert!(lied > 0 && good > 0, "{lied} lies, {good} good answers");
    assert_eq!(stage.rig.channels[0].state(), State::Running);
    stage.works();
}

#[test]
fn impossible_answers_are_called_lies() {
    let mut stage = Stage::new();
    let mut lies = |kind, handshake, words| {
        let mut job = stage.rig.job(&mut stage.arena, kind, 4096, Flavour::Agreeing);
        job.tag = 5;
        let descriptor = stage.submit(job);
        stage.answer(&descriptor, handshake, words);
        let done = stage.poll().pop().unwrap();
        assert_eq!(done.job.tag, 5);
        assert!(matches!(done.result, Err(JobError::Lied { .. })), "{kind:?}: {:?}", done.result);
    };
    lies(OpKind::Copy, handshake(Status::SUCCESS, 0, 4097), [0; 3]);
    lies(OpKind::Copy, handshake(Status::PAGE_FAULT, 0, u32::MAX), [0; 3]);
    lies(OpKind::Copy, handshake(Status::FALSE_PREDICATE, 0, 0), [0; 3]);
    lies(OpKind::Copy, handshake(Status::DIF_ERROR, 1, 0), [0; 3]);
    lies(OpKind::Copy, handshake(Status::BATCH_FAILED, 0, 0), [0; 3]);
    lies(OpKind::Copy, handshake(Status(0x7f), 0, 0), [0; 3]);
    // A difference at the end is none.
    lies(OpKind::Compare, handshake(Status::SUCCESS, 1, 4096), [0; 3]);
    lies(OpKind::Compare, handshake(Status::SUCCESS, 2, 0), [0; 3]);
    // Delta records: longer than the buffer, of no whole entries, empty and yet different.
    lies(OpKind::CreateDelta, handshake(Status::SUCCESS, 1, 0), [0, 4_000_000_000, 0]);
    lies(OpKind::CreateDelta, handshake(Status::SUCCESS, 2, 0), [0, 200, 0]);
    lies(OpKind::CreateDelta, handshake(Status::SUCCESS, 1, 0), [0, 15, 0]);
    lies(OpKind::CreateDelta, handshake(Status::SUCCESS, 1, 0), [0, 0, 0]);
    lies(OpKind::CreateDelta, handshake(Status::SUCCESS, 0, 0), [0, 10, 0]);
    lies(OpKind::DifCheck, handshake(Status::DIF_ERROR, 1, 1 << 20), [0; 3]);
    stage.works();
}

#[test]
fn batches_come_back_whole_whatever_is_said_of_them() {
    const COUNT: usize = 3;
    let mut stage = Stage::new();
    let statuses = [1, 2, 3, 5, 6, 0x10, 0x14, 0x18, 0x1f, 0x7f, 0x80, 0x83, 0x85, 0xff].map(Status);
    let source = Arc::new(stage.arena.take(64, Align::Any));
    let cases = statuses.into_iter().flat_map(|status| [(status, false), (status, true)]);
    for (status, has_result) in cases {
        for completed in [0, 1, 2, 3, 4, u32::MAX] {
            for with_status in 0..1 << COUNT {
                // A checksum asks for its record; a no-op only for that of an error.
                let job = |tag| {
                    let job = if has_result { Job::crc(Arc::clone(&source), 0) } else { Job::new(Op::Nop) };
                    job.tag(tag)
                };
                let jobs = (0..COUNT as u64).map(job).collect();
                let (batch, members) = stage.submit_batch(jobs);
                for (member, descriptor) in members.iter().enumerate() {
                    if with_status >> member & 1 == 1 {
                        stage.answer(descriptor, success(), [0; 3]);
                    }
                }
                assert!(stage.poll().is_empty(), "members come back with their batch");
                stage.answer(&batch, handshake(status, 0, completed), [0; 3]);
                // One at a time, and the device changes its mind in between.
                let mut back = Vec::new();
                for turn in 0..COUNT {
                    let mut one = Burst::with_capacity(1);
                    assert_eq!(stage.rig.channels[0].poll(&mut one), 1, "{status:?} {completed} {turn}");
                    back.extend(one.drain_all());
                    let random = stage.rig.random.next();
                    stage.answer(&batch, Handshake::from_bits(random), [random; 3]);
                }
                for (member, done) in back.iter().enumerate() {
                    assert_eq!(done.job.tag, member as u64);
                    let told = with_status >> member & 1 == 1;
                    let implied = !has_result
                        && match status.0 {
                            1 => completed as usize == COUNT,
                            5 | 6 => completed as usize <= COUNT && member < completed as usize,
                            _ => false,
                        };
                    assert_eq!(
                        done.result.is_ok(),
                        told || implied,
                        "{status:?}, {completed}: {:?}",
                        done.result
                    );
                    assert_ne!(done.result, Err(JobError::Reset), "the batch has a status");
                }
                assert!(stage.poll().is_empty());
                assert_eq!(stage.rig.channels[0].outstanding(), 0);
            }
        }
    }
    stage.works();
}

#[test]
fn a_done_batch_without_its_members_is_a_lie() {
    let mut stage = Stage::new();
    let source = Arc::new(stage.arena.take(64, Align::Any));
    let jobs = (0..2).map(|_| Job::crc(Arc::clone(&source), 0)).collect();
    let (batch, members) = stage.submit_batch(jobs);
    stage.answer(&members[1], success(), [0; 3]);
    stage.answer(&batch, handshake(Status::SUCCESS, 0, 2), [0; 3]);
    let done = stage.poll();
    assert!(matches!(done[0].result, Err(JobError::Lied { .. })), "{:?}", done[0].result);
    assert!(done[1].result.is_ok());
}

#[test]
fn a_completion_that_comes_twice_counts_once() {
    let mut stage = Stage::new();
    let descriptor = stage.submit(Job::new(Op::Nop).tag(1));
    stage.answer(&descriptor, success(), [0; 3]);
    stage.answer(&descriptor, success(), [0; 3]);
    assert_eq!(stage.poll().len(), 1);
    stage.answer(&descriptor, success(), [0; 3]);
    assert!(stage.poll().is_empty());
    // The next job uses the same record; the answer to the last one is not taken for its own.
    for tag in 2..12 {
        let next = stage.submit(Job::new(Op::Nop).tag(tag));
        assert!(stage.poll().is_empty(), "completed by an answer to another job");
        stage.answer(&next, success(), [0; 3]);
        let done = stage.poll();
        assert_eq!(done.iter().map(|done| done.job.tag).collect::<Vec<_>>(), [tag]);
        stage.answer(&next, success(), [0; 3]);
    }
    stage.works();
}

#[test]
fn completions_of_jobs_that_do_not_exist_are_ignored() {
    let mut stage = Stage::new();
    // Learn where records are: of all single jobs and of the members of batches.
    let jobs: Vec<Descriptor> = (0..4).map(|tag| stage.submit(Job::new(Op::Nop).tag(tag))).collect();
    let mut records: HashSet<u64> = jobs.iter().map(|job| job.completion).collect();
    assert_eq!(records.len(), 4);
    for job in &jobs {
        stage.answer(job, success(), [0; 3]);
    }
    assert_eq!(stage.poll().len(), 4);
    let (batch, members) = stage.submit_batch((0..4).map(|_| Job::new(Op::Nop)).collect());
    records.extend(members.iter().map(|member| member.completion));
    for member in &members {
        stage.answer(member, success(), [0; 3]);
    }
    stage.answer(&batch, success(), [0; 3]);
    assert_eq!(stage.poll().len(), 4);

    let everywhere = |stage: &Stage, value: u64| {
        for record in &records {
            answer(&stage.strings, stage.pasid, *record, Handshake::from_bits(value), [value; 3]).unwrap();
        }
    };
    for value in [1, 3, u64::MAX, 0x0101_0101_0101_0101] {
        everywhere(&stage, value);
        assert!(stage.poll().is_empty());
        // One job is there; the others are made up.
        let job = stage.submit(Job::new(Op::Nop).tag(7));
        records.iter().filter(|record| **record != job.completion).for_each(|record| {
            answer(&stage.strings, stage.pasid, *record, success(), [0; 3]).unwrap();
        });
        assert!(stage.poll().is_empty());
        stage.answer(&job, success(), [0; 3]);
        assert_eq!(stage.poll().len(), 1);
    }
    stage.works();
}

#[test]
fn a_job_that_never_completes_comes_back_from_a_reset() {
    let mut stage = Stage::new();
    let fill = |stage: &mut Stage, tag| Job::fill(stage.arena.take(4096, Align::Any), 1).tag(tag);
    let silent = fill(&mut stage, 1);
    stage.submit(silent);
    let answered = stage.submit(Job::new(Op::Nop).tag(2));
    stage.answer(&answered, success(), [0; 3]);
    let members = vec![Job::new(Op::Nop).tag(3), fill(&mut stage, 4)];
    let (_, members) = stage.submit_batch(members);
    stage.answer(&members[0], success(), [0; 3]);

    let mut back: Vec<(u64, bool)> = stage.stall().iter().map(|d| (d.job.tag, d.result.is_ok())).collect();
    let rejected = stage.rig.channels[0].submit(Job::new(Op::Nop)).unwrap_err();
    assert_eq!(rejected.why, Reason::NotRunning);
    assert_eq!(
        stage.rig.channels[0].submit_batch(&mut burst(vec![Job::new(Op::Nop), Job::new(Op::Nop)])),
        Err((0, Reason::NotRunning))
    );
    for done in stage.reset() {
        assert!(matches!(done.result, Ok(_) | Err(JobError::Reset)), "{:?}", done.result);
        back.push((done.job.tag, done.result.is_ok()));
    }
    back.sort_unstable();
    assert_eq!(back, [(1, false), (2, true), (3, true), (4, false)]);
    stage.works();
}

#[test]
fn a_late_completion_changes_nothing_any_more() {
    let mut stage = Stage::new();
    let mut dst = stage.arena.take(8192, Align::Any);
    dst.fill(0xaa);
    let late = stage.submit(Job::fill(dst, 1).tag(1));
    assert!(stage.stall().is_empty());

    // After the deadline, before the reset: the answer still counts, or the reset does; once.
    let other = stage.reset();
    assert_eq!(other.len(), 1);
    assert_eq!(other[0].result, Err(JobError::Reset));

    // After the reset: no job appears, and the memory is the caller's alone.
    stage.answer(&late, success(), [0; 3]);
    assert!(stage.poll().is_empty());
    let refused = stage.strings.with_bus(|bus| bus.write(stage.pasid, Iova::new(late.destination), &[1; 64]));
    assert_eq!(refused.unwrap_err().reason, FaultReason::NotLeased);
    let Op::Fill { dst, .. } = &other[0].job.op else { panic!("another job came back") };
    assert!(dst.iter().all(|byte| *byte == 0xaa));
    let fault = stage.rig.device.next_fault().expect("the IOMMU saw it");
    assert_eq!((fault.pasid, fault.reason), (stage.pasid, FaultReason::NotLeased));

    // Between the deadline and the reset.
    let late = stage.submit(Job::new(Op::Nop).tag(2));
    assert!(stage.stall().is_empty());
    stage.answer(&late, success(), [0; 3]);
    let mut back = stage.poll();
    back.extend(stage.reset());
    assert_eq!(back.iter().map(|done| done.job.tag).collect::<Vec<_>>(), [2]);
    stage.works();
}

#[test]
fn memory_that_was_not_handed_out_is_out_of_reach() {
    let mut stage = Stage::new();
    let bystander = stage.arena.random(4096);
    let before = bystander.to_vec();
    let source = stage.arena.random(4096).freeze();
    let shared = source.to_vec();
    let dst = stage.arena.take(4096, Align::Any);
    // The region is mapped in one piece, so an address in it follows from any other.
    let iova = |buf: &DmaBuf, near: &DmaBuf, at: u64| {
        Iova::new(at.wrapping_add(buf.offset() as u64).wrapping_sub(near.offset() as u64))
    };
    let (dst_offset, copy) = (dst.offset(), Job::copy(Arc::clone(&source), dst));
    let job = stage.submit(copy);
    let bystander_at = iova(&bystander, &source, job.source);

    let (pasid, strings) = (stage.pasid, stage.strings.clone());
    let write = |at: Iova, len: usize| strings.with_bus(|bus| bus.write(pasid, at, &vec![0x66; len]));
    let read = |at: Iova| strings.with_bus(|bus| bus.read(pasid, at, &mut [0; 64]));
    assert_eq!(write(bystander_at, 8).unwrap_err().reason, FaultReason::NotLeased);
    assert_eq!(read(bystander_at).unwrap_err().reason, FaultReason::NotLeased, "nor can it be read");
    assert_eq!(write(Iova::new(job.source), 8).unwrap_err().reason, FaultReason::NotLeased, "a source");
    let past_the_end = write(Iova::new(job.destination), 4097).unwrap_err();
    assert_eq!((past_the_end.reason, past_the_end.done), (FaultReason::NotLeased, 4096));
    assert!(write(Iova::new(job.destination - 1), 1).is_err());
    write(Iova::new(job.destination), 4096).expect("what it was given it may write");
    read(Iova::new(job.source)).expect("and read");
    // The lists of batches are the driver's to write.
    let (batch, _) = stage.submit_batch(vec![Job::new(Op::Nop), Job::new(Op::Nop)]);
    assert_eq!(write(Iova::new(batch.source), 8).unwrap_err().reason, FaultReason::NotLeased);
    // Another PASID, or none, gets nowhere.
    for other in [None, Pasid::new(pasid.unwrap().get() ^ 1)] {
        let refused = strings.with_bus(|bus| bus.write(other, Iova::new(job.destination), &[1]));
        assert!(refused.is_err(), "{other:?}");
    }

    stage.answer(&job, success(), [0; 3]);
    let done = stage.poll().pop().unwrap();
    let Op::Copy { dst, .. } = &done.job.op else { panic!("another job came back") };
    assert_eq!(dst.offset(), dst_offset);
    assert!(write(Iova::new(job.destination), 8).is_err(), "it is the caller's again");
    assert!(dst.iter().all(|byte| *byte == 0x66));
    assert!(bystander[..] == before[..] && source[..] == shared[..]);
    assert_eq!(stage.reset().len(), 2);
    stage.works();
}

/// Registers that decide what the driver believes of the device.
const REGISTERS: [u64; 17] = [
    reg::VERSION,
    reg::GENCAP,
    reg::WQCAP,
    reg::GRPCAP,
    reg::ENGCAP,
    reg::OPCAP,
    reg::OPCAP + 8,
    reg::OFFSETS,
    reg::OFFSETS + 8,
    reg::GENCFG,
    reg::GENSTS,
    reg::CMDCAP,
    reg::SWERR,
    reg::SWERR + 8,
    reg::SWERR + 16,
    reg::EVLSTATUS,
    0x400,
];

/// Opens a liar, sets a channel up and uses it; every step may fail, and none may panic or hang.
fn use_device(strings: &Strings) -> Result<()> {
    let mut dsa = Box::new(open(strings, WqMode::Dedicated)?) as Box<dyn Accelerator>;
    let limits = dsa.limits();
    let config = Config { batch: limits.max_batch.min(2), depth: limits.depth.min(2), ..config() };
    let mut channels = dsa.channels(&config)?;
    let mut arena = Arena::new(1 << 16);
    channels[0].map(arena.region(), Access::READ_WRITE)?;
    let mut done = Burst::with_capacity(4);
    let _ = channels[0].submit(Job::fill(arena.take(64, Align::Any), 7));
    for _ in 0..3 {
        let _ = dsa.next_error();
        channels[0].poll(&mut done);
    }
    channels[0].reset(&mut done)?;
    Ok(())
}

#[test]
fn registers_that_lie_from_the_start_are_found_out() {
    let mut random = Random(3);
    for register in REGISTERS {
        for turn in 0..6 {
            let value = match turn {
                0 => u64::MAX,
                1 => 0,
                _ => random.next(),
            };
            let strings = Strings::default();
            strings.lie_in_registers(move |offset, honest| if offset == register { value } else { honest });
            let begin = Instant::now();
            if let Err(error) = use_device(&strings) {
                assert!(error.device_name().is_some(), "{error}: on which device?");
            }
            let took = begin.elapsed();
            assert!(took < SOON, "{took:?} for {value:#x} at {register:#x}");
        }
    }
}

#[test]
fn registers_that_turn_to_noise_do_not_confuse_the_driver() {
    for seed in 0..20 {
        let mut stage = Stage::new();
        let dst = stage.arena.take(4096, Align::Any);
        stage.submit(Job::fill(dst, 1).tag(1));
        let mut random = Random(seed);
        // Every read another value, but a command that ends at last.
        stage.strings.lie_in_registers(move |offset, honest| match offset {
            reg::CMDSTS => {
                random.next() & !CmdSts::new().with_active(random.below(8) == 0).into_bits() as u64
            }
            _ if random.coin() => random.next(),
            _ => honest,
        });
        for _ in 0..20 {
            let _ = stage.rig.device.next_error();
            assert!(stage.poll().is_empty());
        }
        let mut done = Burst::with_capacity(8);
        let begin = Instant::now();
        match stage.rig.channels[0].reset(&mut done) {
            Ok(left) => assert_eq!((left, done.len()), (0, 1)),
            Err(error) => {
                assert!(
                    matches!(error.kind(), ErrorKind::Device | ErrorKind::Timeout | ErrorKind::Gone),
                    "{error}"
                );
            }
        }
        assert!(begin.elapsed() < SOON);
        assert_eq!(stage.rig.channels[0].outstanding(), 0, "back, or leaked with the device");
        stage.strings.be_honest();
    }
}

/// A device that no longer answers: every register reads all ones, as a removed PCI device's do.
fn a_removed_device_is_given_up() {
    let mut stage = Stage::new();
    let mut dst = stage.arena.take(4096, Align::Any);
    dst.fill(0);
    let job = stage.submit(Job::fill(dst, 1).tag(1));
    stage.strings.lie_in_registers(|_, _| u64::MAX);
    let errors = std::iter::from_fn(|| stage.rig.device.next_error()).take(100).count();
    assert!((1..100).contains(&errors), "{errors} errors: the same ones over and over");
    let channel = &mut *stage.rig.channels[0];
    assert_ne!(channel.state(), State::Running, "the device halted, as it says");
    let mut done = Burst::with_capacity(4);
    let error = channel.reset(&mut done).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::Timeout | ErrorKind::Gone), "{error}");
    assert!(error.mend_text().is_some(), "{error}: and now?");
    assert_eq!((channel.state(), channel.outstanding(), done.len()), (State::Gone, 0, 0));
    assert_eq!(channel.submit(Job::new(Op::Nop)).unwrap_err().why, Reason::NotRunning);
    assert_eq!(channel.map(stage.arena.region(), Access::READ).unwrap_err().kind(), ErrorKind::Gone);
    assert_eq!(channel.reset(&mut done).unwrap_err().kind(), ErrorKind::Gone);
    // It may come back from the dead and write: the job's memory is still there, and nobody else's.
    let wrote = stage.strings.with_bus(|bus| bus.write(stage.pasid, Iova::new(job.destination), &[9; 4096]));
    wrote.expect("leaked memory stays mapped");
}

fn a_command_that_never_ends(begin_at: fn(&Strings) -> Result<()>) {
    let strings = Strings::default();
    let error = begin_at(&strings).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Timeout, "{error}");
    assert!(error.to_string().starts_with("soft:liar"), "{error}: on which device?");
}

fn stuck(strings: &Strings) {
    strings.lie_in_registers(|offset, honest| if offset == reg::CMDSTS { honest | 1 << 31 } else { honest });
}

#[test]
fn an_interrupt_handle_is_the_one_of_the_last_reset() {
    let strings = Strings::default();
    let (handle, halted) = (Arc::new(AtomicU64::new(0x77)), Arc::new(AtomicBool::new(false)));
    let (given, halts) = (Arc::clone(&handle), Arc::clone(&halted));
    // The only command with a result is the one that asks for a handle.
    strings.lie_in_registers(move |offset, honest| match offset {
        reg::CMDSTS if honest >> 8 & 0xffff != 0 => honest & 0xff | given.load(Ordering::Relaxed) << 8,
        reg::GENSTS if halts.swap(false, Ordering::Relaxed) => 3,
        _ => honest,
    });
    let profile = DsaProfile { interrupt_handles: true, ..DsaProfile::default() };
    let mut dsa = open_profile(profile, &strings, WqMode::Dedicated).unwrap();
    let mut channels = dsa.channels(&Config { interrupts: true, ..config() }).unwrap();
    let handle_of = |channel: &mut dyn Channel| {
        channel.submit(Job::new(Op::Nop)).unwrap();
        strings.take().interrupt_handle
    };
    let mut done = Burst::with_capacity(4);
    assert_eq!(handle_of(&mut *channels[0]), 0x77);
    handle.store(0x1234, Ordering::Relaxed);
    assert_eq!(channels[0].reset(&mut done).unwrap(), 0);
    assert_eq!(handle_of(&mut *channels[0]), 0x77, "a reset of the queue takes none back");
    halted.store(true, Ordering::Relaxed);
    assert_eq!(channels[0].reset(&mut done).unwrap(), 0);
    assert_eq!(handle_of(&mut *channels[0]), 0x1234);
}

/// The driver waits seconds for a command here and there: all of these at the same time.
#[test]
fn a_device_that_does_not_answer_is_given_up_in_time() {
    let begin = Instant::now();
    std::thread::scope(|scope| {
        scope.spawn(a_removed_device_is_given_up);
        scope.spawn(|| {
            a_command_that_never_ends(|strings| {
                stuck(strings);
                open(strings, WqMode::Dedicated).map(drop)
            });
        });
        scope.spawn(|| {
            a_command_that_never_ends(|strings| {
                let mut dsa = open(strings, WqMode::Dedicated)?;
                stuck(strings);
                dsa.channels(&config()).map(drop)
            });
        });
        scope.spawn(|| {
            a_command_that_never_ends(|strings| {
                let mut rig = Rig::new(Box::new(open(strings, WqMode::Dedicated)?), &config());
                stuck(strings);
                rig.channels[0].reset(&mut Burst::with_capacity(1)).map(drop)
            });
        });
        scope.spawn(|| {
            // Dropped without a reset: leaks, and says so in the log.
            let strings = Strings::default();
            let mut rig = Rig::new(Box::new(open(&strings, WqMode::Dedicated).unwrap()), &config());
            let mut arena = rig.arena(1 << 16);
            rig.channels[0].submit(Job::fill(arena.take(100, Align::Any), 1)).unwrap();
            let (pasid, job) = (rig.channels[0].pasid(), strings.take());
            stuck(&strings);
            rig.channels.clear();
            let wrote = strings.with_bus(|bus| bus.write(pasid, Iova::new(job.destination), &[9; 100]));
            wrote.expect("leaked memory stays mapped");
        });
    });
    assert!(begin.elapsed() < Duration::from_secs(20), "{:?}", begin.elapsed());
}

#[test]
fn a_shared_queue_that_never_accepts_is_full() {
    let strings = Strings::default();
    let mut rig = Rig::new(Box::new(open(&strings, WqMode::Shared).unwrap()), &config());
    let mut arena = rig.arena(1 << 16);
    let channel = &mut *rig.channels[0];
    // What the driver tried the portal with while it was off.
    strings.submissions().clear();
    strings.0.full.store(true, Ordering::Relaxed);
    let Err(rejected) = channel.submit(Job::fill(arena.take(64, Align::Any), 1).tag(1)) else {
        panic!("the device did not accept it");
    };
    assert_eq!((rejected.why, rejected.job.tag), (Reason::Full, 1));
    let mut two = burst(vec![Job::new(Op::Nop), Job::new(Op::Nop)]);
    assert_eq!(channel.submit_batch(&mut two), Err((0, Reason::Full)));
    assert_eq!((two.len(), channel.outstanding(), channel.counters().values().retries), (2, 0, 2));

    strings.0.full.store(false, Ordering::Relaxed);
    channel.submit(rejected.job).unwrap();
    let job = strings.take();
    assert_eq!(Some(job.context.pasid()), channel.pasid().map(Pasid::get), "the descriptor carries it");
    answer(&strings, channel.pasid(), job.completion, success(), [0; 3]).unwrap();
    assert_eq!(channel.poll(&mut Burst::with_capacity(4)), 1);
}

/// A device that writes whatever comes to its mind, while the driver works.
#[test]
fn a_storm_of_nonsense_loses_no_job() {
    let mut stage = Stage::new();
    let source = stage.arena.random(2048).freeze();
    let before = source.to_vec();
    let (strings, pasid, over) = (stage.strings.clone(), stage.pasid, Arc::new(AtomicBool::new(false)));
    let stop = Arc::clone(&over);
    let storm = std::thread::spawn(move || {
        let mut random = Random(11);
        let mut seen: Vec<u64> = Vec::new();
        while !stop.load(Ordering::Relaxed) {
            let next = strings.submissions().pop_front();
            if let Some(descriptor) = next {
                seen.extend([descriptor.completion, descriptor.source, descriptor.destination]);
                if descriptor.opcode() == Opcode::Batch as u8 {
                    // The members' records lie near; so do those of others.
                    seen.extend(
                        (0..8).map(|n| descriptor.completion + n * size_of::<CompletionRecord>() as u64),
                    );
                }
                if seen.len() > 200 {
                    seen.drain(..100);
                }
                // Some answers are true: the driver gets on.
                if random.coin() {
                    let _ = answer(&strings, pasid, descriptor.completion, success(), [0; 3]);
                }
            }
            if let Some(at) = (!seen.is_empty()).then(|| seen[random.below(seen.len())] & !7) {
                let value = if random.coin() { random.next() } else { random.next() & 0xff };
                let _ = strings.with_bus(|bus| bus.store(pasid, Iova::new(at), value));
            }
            std::thread::yield_now();
        }
    });
    let mut outstanding = HashSet::new();
    let mut buffers: Vec<DmaBuf> = (0..32).map(|_| stage.arena.take(2048, Align::Any)).collect();
    let (mut tag, begin) = (0, Instant::now());
    let mut done = Burst::with_capacity(5);
    while begin.elapsed() < Duration::from_millis(1500) {
        let channel = &mut *stage.rig.channels[0];
        let mut next = |buffers: &mut Vec<DmaBuf>| {
            tag += 1;
            let dst = if tag % 3 == 2 { None } else { buffers.pop() };
            let op = match dst {
                Some(dst) if tag % 3 == 0 => Op::Copy { src: Arc::clone(&source).into(), dst },
                Some(dst) => Op::Fill { dst, pattern: tag },
                None => Op::Compare { a: Arc::clone(&source).into(), b: Arc::clone(&source).into() },
            };
            Job::new(op).tag(tag)
        };
        match stage.rig.random.below(8) {
            0..3 => {
                let job = next(&mut buffers);
                let tag = job.tag;
                match channel.submit(job) {
                    Ok(()) => assert!(outstanding.insert(tag)),
                    Err(rejected) => reclaim(rejected.job.op, &mut buffers),
                }
            }
            3 => {
                let mut jobs = burst((0..3).map(|_| next(&mut buffers)).collect());
                let tags: Vec<u64> = jobs.iter().map(|job| job.tag).collect();
                if channel.submit_batch(&mut jobs).is_ok() {
                    outstanding.extend(tags);
                }
                jobs.drain_all().for_each(|job| reclaim(job.op, &mut buffers));
            }
            _ if channel.state() == State::Running => drop(channel.poll(&mut done)),
            _ => drop(channel.reset(&mut done).unwrap()),
        }
        for done in done.drain_all() {
            assert!(outstanding.remove(&done.job.tag), "job {} came back twice", done.job.tag);
            assert_possible(&done);
            reclaim(done.job.op, &mut buffers);
        }
        assert_eq!(channel.outstanding(), outstanding.len());
    }
    over.store(true, Ordering::Relaxed);
    storm.join().unwrap();
    for done in stage.reset() {
        assert!(outstanding.remove(&done.job.tag));
        reclaim(done.job.op, &mut buffers);
    }
    assert!(outstanding.is_empty(), "never came back: {outstanding:?}");
    assert_eq!(buffers.len(), 32, "and every buffer with its job");
    assert!(source[..] == before[..], "a source was written");
    assert!(tag > 100);
    stage.works();
}

fn reclaim(op: Op, buffers: &mut Vec<DmaBuf>) {
    if let Op::Copy { dst, .. } | Op::Fill { dst, .. } = op {
        buffers.push(dst);
    }
}
