//! The CPU as an accelerator: an application runs unchanged where there is no device.
//!
//! A channel does each job inside `submit`, on the caller's thread. Doing it in `poll` would make a call that
//! promises never to wait last as long as the largest job, and `reset` would have to give back jobs undone; so a
//! job here is finished as soon as it is taken, and only waits to be polled.
//!
//! The rules of a device hold all the same. A buffer of a region that the channel does not map is refused, and
//! one whose mapping does not allow the access is a page fault, at the buffer's own address: the CPU's IOVA
//! is the pointer. What needs the bare address of memory that a job does not own ([`OpKind::Probe`]) or
//! instructions that safe code does not have ([`OpKind::CacheFlush`]) is not offered.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use underpass::accel::{
    Accelerator, Channel, Config, CounterValues, Counters, Dif, Done, Job, JobError, Limits, Op, OpKind, Ops,
    Outcome, Reason, Rejected, State,
};
use underpass::{Access, Burst, Error, ErrorKind, Fault, Iova, Pasid, Region, Result};

use crate::ops::{self, BadDelta, DIF_TUPLE, DifVerdict};
use crate::shape::{check_shape, operands, transfer_size};

/// No machine has more threads to give channels to; a larger number is a slip of the keyboard.
const MAX_CHANNELS: usize = 1024;

/// Submissions that one channel can hold.
const MAX_DEPTH: usize = 4096;

/// Submissions that a channel holds when the application does not say.
const DEFAULT_DEPTH: usize = 128;

const MAX_BATCH: usize = 1024;

/// 2 GiB, as on the first DSA parts: what runs here runs there.
const MAX_BYTES: u64 = 1 << 31;

/// The CPU, opened as `cpu`.
#[derive(Debug, Default)]
pub struct Cpu {
    taken: bool,
}

impl Cpu {
    /// The CPU, with no channels yet.
    pub fn new() -> Self {
        Self::default()
    }
}

impl Accelerator for Cpu {
    fn name(&self) -> &'static str {
        "cpu"
    }

    fn driver(&self) -> &'static str {
        "cpu"
    }

    fn max_channels(&self) -> usize {
        MAX_CHANNELS
    }

    fn limits(&self) -> Limits {
        let ops = OpKind::NAMES.into_iter().map(|(kind, _)| kind);
        let ops = ops.filter(|kind| !matches!(kind, OpKind::CacheFlush | OpKind::Probe));
        Limits {
            ops: ops.fold(Ops::NONE, Ops::with),
            max_bytes: MAX_BYTES,
            max_batch: MAX_BATCH,
            depth: MAX_CHANNELS * MAX_DEPTH,
        }
    }

    fn channels(&mut self, config: &Config) -> Result<Vec<Box<dyn Channel>>> {
        let cannot = |kind, why: String, mend: String| {
            Err(Error::new(kind, "set up channels", why).mend(mend).device("cpu"))
        };
        for (what, asked, most) in [
            ("channels", config.channels, MAX_CHANNELS),
            ("submissions outstanding in a channel", config.depth, MAX_DEPTH),
            ("jobs in a batch", config.batch, MAX_BATCH),
        ] {
            if asked > most {
                let why = format!("{asked} {what} are more than it has, {most}");
                return cannot(ErrorKind::InvalidInput, why, format!("ask for {most} or fewer"));
            }
        }
        if std::mem::replace(&mut self.taken, true) {
            let why = "its channels were taken before".into();
            return cannot(ErrorKind::Busy, why, "open it again, or take all channels at once".into());
        }
        let limits = Limits {
            max_batch: config.batch.max(1),
            depth: if config.depth == 0 { DEFAULT_DEPTH } else { config.depth },
            ..self.limits()
        };
        let channel = || Box::new(CpuChannel::new(limits, config)) as Box<dyn Channel>;
        Ok(std::iter::repeat_with(channel).take(config.channels.max(1)).collect())
    }

    fn next_error(&mut self) -> Option<Error> {
        None
    }

    fn next_fault(&mut self) -> Option<Fault> {
        None
    }
}

/// What a channel may touch.
#[derive(Debug)]
enum Reach {
    /// Mapped regions, by the index of their ids. Holding a region keeps its id from being given to another.
    Regions(Vec<Option<(Arc<Region>, Access)>>),
    /// The whole process (SVA).
    Process,
}

impl Reach {
    /// What the channel may do to `region`; `None` where it is not mapped.
    #[inline]
    fn access(&self, region: &Region) -> Option<Access> {
        match self {
            Self::Regions(regions) => Some(regions.get(region.id().index())?.as_ref()?.1),
            Self::Process => Some(Access::READ_WRITE),
        }
    }
}

/// A finished job that waits to be polled.
#[derive(Debug)]
struct Finished {
    done: Done,
    /// It is the last of its submission, whose place becomes free with it.
    last: bool,
}

#[derive(Debug)]
struct CpuChannel {
    limits: Limits,
    interrupts: bool,
    reach: Reach,
    /// In the order of submission. Has room for `depth` of the largest batches from the start.
    finished: VecDeque<Finished>,
    submissions: usize,
    counters: Arc<Counters>,
}

impl CpuChannel {
    fn new(limits: Limits, config: &Config) -> Self {
        Self {
            limits,
            interrupts: config.interrupts,
            reach: if config.sva.is_some() { Reach::Process } else { Reach::Regions(Vec::new()) },
            finished: VecDeque::with_capacity(limits.depth * limits.max_batch),
            submissions: 0,
            counters: Arc::default(),
        }
    }

    /// Whether the job can be taken.
    fn admit(&self, op: &Op) -> Result<(), Reason> {
        check_shape(op, &self.limits)?;
        if operands(op).all(|(buf, _)| self.reach.access(buf.region()).is_some()) {
            return Ok(());
        }
        self.counters.add(CounterValues { refused: 1, ..CounterValues::default() });
        Err(Reason::NotMapped)
    }

    /// Does one job that was admitted.
    fn perform(&self, op: &mut Op) -> Result<Outcome, JobError> {
        for (buf, access) in operands(op) {
            let mapped = self.reach.access(buf.region());
            let refused = [Access::READ, Access::WRITE]
                .into_iter()
                .find(|one| access.allows(*one) && !mapped.is_some_and(|mapped| mapped.allows(*one)));
            if let Some(access) = refused {
                let iova = Iova::new(buf.as_ptr() as u64);
                return Err(JobError::PageFault { iova, access, completed: 0 });
            }
        }
        perform(op)
    }

    fn finish(&mut self, job: Job, result: Result<Outcome, JobError>, last: bool) {
        self.finished.push_back(Finished { done: Done { job, result }, last });
    }

    /// Moves finished jobs to `done`, as many as fit.
    fn hand_back(&mut self, done: &mut Burst<Done>) -> usize {
        let count = done.room().min(self.finished.len());
        let mut sum = CounterValues { jobs: count as u64, ..CounterValues::default() };
        for finished in self.finished.drain(..count) {
            self.submissions -= usize::from(finished.last);
            match finished.done.result {
                Ok(_) => sum.bytes += transfer_size(&finished.done.job.op) as u64,
                Err(_) => sum.failed += 1,
            }
            // There is room: count is at most that.
            let _ = done.push(finished.done);
        }
        self.counters.add(sum);
        count
    }
}

impl Channel for CpuChannel {
    fn map(&mut self, region: &Arc<Region>, access: Access) -> Result<()> {
        let Reach::Regions(regions) = &mut self.reach else {
            return Ok(());
        };
        let index = region.id().index();
        if regions.len() <= index {
            regions.resize(index + 1, None);
        }
        if regions[index].is_some() {
            return Err(Error::new(
                ErrorKind::Busy,
                format!("map {region:?}"),
                "this channel maps it already",
            )
            .device("cpu"));
        }
        regions[index] = Some((Arc::clone(region), access));
        Ok(())
    }

    fn unmap(&mut self, region: &Arc<Region>) -> Result<()> {
        let cannot = |kind, why| Error::new(kind, format!("unmap {region:?}"), why).device("cpu");
        if self.outstanding() != 0 {
            return Err(cannot(ErrorKind::Busy, "jobs are outstanding").mend("poll until they are back"));
        }
        let Reach::Regions(regions) = &mut self.reach else {
            return Ok(());
        };
        match regions.get_mut(region.id().index()).and_then(Option::take) {
            Some(_) => Ok(()),
            None => Err(cannot(ErrorKind::NotFound, "this channel does not map it")),
        }
    }

    fn pasid(&self) -> Option<Pasid> {
        None
    }

    fn limits(&self) -> Limits {
        self.limits
    }

    fn state(&self) -> State {
        State::Running
    }

    fn submit(&mut self, mut job: Job) -> Result<(), Rejected> {
        if self.submissions == self.limits.depth {
            return Err(Rejected { job, why: Reason::Full });
        }
        if let Err(why) = self.admit(&job.op) {
            return Err(Rejected { job, why });
        }
        let result = self.perform(&mut job.op);
        self.finish(job, result, true);
        self.submissions += 1;
        Ok(())
    }

    fn submit_batch(&mut self, jobs: &mut Burst<Job>) -> Result<usize, (usize, Reason)> {
        let count = jobs.len().min(self.limits.max_batch);
        if count < 2 {
            return Err((0, Reason::Batch));
        }
        if self.submissions == self.limits.depth {
            return Err((0, Reason::Full));
        }
        for (index, job) in jobs[..count].iter().enumerate() {
            if matches!(job.op, Op::Drain) {
                return Err((index, Reason::Batch));
            }
            self.admit(&job.op).map_err(|why| (index, why))?;
        }
        let mut failed = false;
        // A fence that stops its job stops the rest of the batch, as on a device.
        let mut stopped = false;
        for (index, mut job) in jobs.drain(count).enumerate() {
            stopped |= job.fence && failed;
            let result = if stopped { Err(JobError::Abandoned) } else { self.perform(&mut job.op) };
            failed |= result.is_err();
            self.finish(job, result, index + 1 == count);
        }
        self.submissions += 1;
        Ok(count)
    }

    fn poll(&mut self, done: &mut Burst<Done>) -> usize {
        self.hand_back(done)
    }

    fn wait(&mut self, _timeout: Duration) -> Result<()> {
        // Whatever was submitted is there to be polled; nothing else can come while the caller sleeps.
        if self.interrupts {
            return Ok(());
        }
        Err(Error::new(
            ErrorKind::Unsupported,
            "wait for a completion",
            "the channel was set up without interrupts",
        )
        .mend("set interrupts in its configuration")
        .device("cpu"))
    }

    fn outstanding(&self) -> usize {
        self.finished.len()
    }

    fn reset(&mut self, done: &mut Burst<Done>) -> Result<usize> {
        self.hand_back(done);
        Ok(self.finished.len())
    }

    fn counters(&self) -> Arc<Counters> {
        Arc::clone(&self.counters)
    }
}

/// The operation itself. Its shape was checked, so slices of different buffers have the lengths they need.
fn perform(op: &mut Op) -> Result<Outcome, JobError> {
    let mut outcome = Outcome { matched: true, ..Outcome::default() };
    match op {
        Op::Nop | Op::Drain => {}
        Op::Copy { src, dst } => dst.copy_from_slice(src.buf()),
        Op::CopyWithin { buf, from, to, len } => buf.copy_within(*from..*from + *len, *to),
        Op::Fill { dst, pattern } => ops::fill(dst, *pattern, 0),
        Op::Compare { a, b } => mismatch(&mut outcome, ops::first_difference(a.buf(), b.buf())),
        Op::ComparePattern { src, pattern } => {
            mismatch(&mut outcome, ops::pattern_difference(src.buf(), *pattern, 0));
        }
        Op::CreateDelta { original, modified, delta } => {
            let made = ops::create_delta(original.buf(), modified.buf(), 0, delta);
            outcome.matched = made.written == 0;
            outcome.delta_len = made.written as u32;
            outcome.delta_overflow = made.overflow;
        }
        Op::ApplyDelta { delta, delta_len, dst } => {
            ops::apply_delta(&delta.buf()[..*delta_len], dst).map_err(refuse_delta)?;
        }
        Op::Dualcast { src, dst1, dst2 } => {
            dst1.copy_from_slice(src.buf());
            dst2.copy_from_slice(src.buf());
        }
        Op::Crc { src, seed } => outcome.crc = ops::crc32c(*seed, src.buf()),
        Op::CopyCrc { src, dst, seed } => {
            dst.copy_from_slice(src.buf());
            outcome.crc = ops::crc32c(*seed, src.buf());
        }
        Op::DifCheck { src, dif } => dif_blocks(src.buf(), dif, |_, _| {})?,
        Op::DifInsert { src, dst, dif } => {
            let block = dif.block.bytes();
            let blocks = src.buf().chunks_exact(block).zip(dst.chunks_exact_mut(block + DIF_TUPLE));
            for (index, (data, out)) in blocks.enumerate() {
                out[..block].copy_from_slice(data);
                out[block..].copy_from_slice(&ops::dif_tuple(data, dif, index as u32));
            }
        }
        Op::DifStrip { src, dst, dif } => {
            let block = dif.block.bytes();
            dif_blocks(src.buf(), dif, |index, data| {
                dst[index * block..][..block].copy_from_slice(data);
            })?;
        }
        Op::DifUpdate { src, dst, from, to } => {
            let block = from.block.bytes();
            dif_blocks(src.buf(), from, |index, data| {
                let out = &mut dst[index * (block + DIF_TUPLE)..][..block + DIF_TUPLE];
                out[..block].copy_from_slice(data);
                out[block..].copy_from_slice(&ops::dif_tuple(data, to, index as u32));
            })?;
        }
        // Not in the limits: check_shape refuses them.
        Op::CacheFlush { .. } | Op::Probe { .. } => {
            return Err(JobError::Refused { status: 0x10, why: "the CPU channel does not do this" });
        }
    }
    Ok(outcome)
}

fn mismatch(outcome: &mut Outcome, at: Option<usize>) {
    outcome.matched = at.is_none();
    outcome.mismatch_at = at.unwrap_or(0) as u32;
}

/// The statuses are DSA's, so that an application sees the same from both.
fn refuse_delta(bad: BadDelta) -> JobError {
    match bad {
        BadDelta::NotIncreasing(_) => JobError::Refused {
            status: 0x07,
            why: "the units of the delta record are not in ascending order",
        },
        BadDelta::OutOfRange(_) => JobError::Refused {
            status: 0x08,
            why: "the delta record names a unit past the destination's end",
        },
    }
}

/// Checks each block of `src`, data with protection information, and gives its index and data to `good`, up to
/// the first bad one.
fn dif_blocks(src: &[u8], dif: &Dif, mut good: impl FnMut(usize, &[u8])) -> Result<(), JobError> {
    let size = dif.block.bytes() + DIF_TUPLE;
    for (index, block) in src.chunks_exact(size).enumerate() {
        let Some((data, tuple)) = block.split_last_chunk() else {
            break;
        };
        let verdict = ops::dif_check(data, *tuple, dif, index as u32);
        if !verdict.is_good() {
            let DifVerdict { guard_bad: guard, app_tag_bad: app_tag, ref_tag_bad: ref_tag } = verdict;
            return Err(JobError::Dif { completed: (index * size) as u32, guard, app_tag, ref_tag });
        }
        good(index, data);
    }
    Ok(())
}
