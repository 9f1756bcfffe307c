//! One queue's share of the work: jobs over buffers of a region of its own, run over and over.

use std::ops::Range;
use std::sync::Arc;

use underpass::accel::{Done, Job, JobError, Op, OpKind, Outcome, Source};
use underpass::dma::DmaBuf;
use underpass::{Region, Result};

use super::expect::{PATTERN, SHIFT, Shape};
use super::queue::Queue;
use crate::interrupt::Stop;

/// Buffers start on multiples of this: a cache line.
const LINE: usize = 64;

/// A queue and the jobs that it does in a circle.
#[derive(Debug)]
pub(crate) struct Lane {
    pub(crate) queue: Queue,
    shape: Shape,
    slots: Vec<Slot>,
    region: Arc<Region>,
    /// Other lanes have other data.
    seed: u64,
    tally: Tally,
}

/// A job with its buffers, in the circle.
#[derive(Debug)]
struct Slot {
    /// `None` while the device has it.
    job: Option<Job>,
    /// What memcpy reads or writes where the job has only one buffer that it may use.
    spare: Option<DmaBuf>,
    expected: Outcome,
}

/// What went wrong so far.
#[derive(Debug, Default)]
struct Tally {
    failed: u64,
    first: Option<JobError>,
}

impl Lane {
    /// Bytes of memory that one job's buffers take.
    pub(crate) fn footprint(shape: &Shape) -> usize {
        strides(shape).iter().sum()
    }

    /// A lane of `slots` jobs, in a new region that only this queue maps; `None` as soon as `go_on`, which hears
    /// of each piece of the buffers that is filled, says to stop.
    pub(crate) fn new(
        mut queue: Queue,
        shape: Shape,
        slots: usize,
        seed: u64,
        go_on: &mut dyn FnMut(usize) -> bool,
    ) -> Result<Option<Self>> {
        let region =
            Region::builder((Self::footprint(&shape) * slots) as u64).name("underpass-copy").build()?;
        queue.map(&region)?;
        let slots = build(&shape, DmaBuf::new(Arc::clone(&region))?, slots, seed, go_on);
        Ok(slots.map(|slots| Self { queue, shape, slots, region, seed, tally: Tally::default() }))
    }

    /// How many jobs are in the circle.
    pub(crate) fn slots(&self) -> u64 {
        self.slots.len() as u64
    }

    /// The memory of all its buffers.
    pub(crate) fn region(&self) -> &Region {
        &self.region
    }

    /// Jobs that failed or found out something wrong.
    pub(crate) fn failed(&self) -> u64 {
        self.tally.failed
    }

    /// The first failure that the device reported.
    pub(crate) fn first_failure(&self) -> Option<&JobError> {
        self.tally.first.as_ref()
    }

    /// Does the jobs with these numbers (modulo the circle) and returns how many it did: fewer only if asked to
    /// stop. Nothing is outstanding afterwards, also on failure.
    pub(crate) fn run(&mut self, numbers: Range<u64>, stop: &Stop) -> Result<u64> {
        let result = self.run_jobs(numbers, stop);
        if result.is_err() {
            let Self { queue, shape, slots, tally, .. } = self;
            let mut unsent = Vec::new();
            // The first error is the one to tell; this one would only repeat it.
            let _ = queue.drain(|done| take_back(shape, slots, tally, done), |job| unsent.push(job));
            for job in unsent {
                let slot = job.tag as usize;
                self.slots[slot].job = Some(job);
            }
        }
        result
    }

    fn run_jobs(&mut self, numbers: Range<u64>, stop: &Stop) -> Result<u64> {
        let Self { queue, shape, slots, tally, .. } = self;
        let mut next = (numbers.start % slots.len() as u64) as usize;
        let mut goal = numbers.end - numbers.start;
        let (mut staged, mut finished) = (0, 0);
        while finished < goal {
            if stop.asked() {
                goal = staged;
            }
            loop {
                while staged < goal && queue.has_room() {
                    let Some(job) = slots[next].job.take() else { break };
                    queue.stage(job);
                    staged += 1;
                    next = if next + 1 == slots.len() { 0 } else { next + 1 };
                }
                // A batch that is not full waits for the jobs that are still with the device.
                let complete = queue.staged() > 0 && (!queue.has_room() || staged == goal);
                if !complete || !queue.submit()? {
                    break;
                }
            }
            finished += queue.poll(|done| take_back(shape, slots, tally, done))? as u64;
        }
        Ok(finished)
    }

    /// What the lane's jobs are compared with: the CPU copies as many bytes between the same buffers, in the
    /// same order.
    pub(crate) fn memcpy(&mut self, numbers: Range<u64>) {
        let count = self.slots.len() as u64;
        let mut next = (numbers.start % count) as usize;
        for _ in numbers {
            self.slots[next].memcpy(&self.shape);
            next = if next + 1 == self.slots.len() { 0 } else { next + 1 };
        }
    }

    /// Does each job of the circle once more, with outputs made wrong before, and compares every byte of every
    /// buffer with what the CPU computed. Returns how many jobs left something else; what they reported is
    /// in [`failed`](Self::failed); `None` if asked to stop before the end.
    pub(crate) fn verify(&mut self, stop: &Stop) -> Result<Option<u64>> {
        let mut go_on = |_| !stop.asked();
        for (index, slot) in self.slots.iter_mut().enumerate() {
            if slot.write(&self.shape, seed_of(self.seed, index), &mut go_on).is_none() {
                return Ok(None);
            }
        }
        let count = self.slots();
        if self.run(0..count, stop)? < count {
            return Ok(None);
        }
        let mut wrong = 0;
        for (index, slot) in self.slots.iter_mut().enumerate() {
            match slot.holds(&self.shape, seed_of(self.seed, index), &mut go_on) {
                None => return Ok(None),
                Some(true) => {}
                Some(false) => wrong += 1,
            }
        }
        Ok(Some(wrong))
    }
}

fn seed_of(lane: u64, slot: usize) -> u64 {
    (lane << 40) + slot as u64 + 1
}

#[inline]
fn take_back(shape: &Shape, slots: &mut [Slot], tally: &mut Tally, done: Done) {
    let slot = &mut slots[done.job.tag as usize];
    match done.result {
        Ok(outcome) if shape.agrees(&outcome, &slot.expected) => {}
        result => {
            tally.failed += 1;
            if let Err(error) = result {
                tally.first.get_or_insert(error);
            }
        }
    }
    slot.job = Some(done.job);
}

/// Bytes from the start of one buffer to the next of its kind: the job's, then the spare one.
fn strides(shape: &Shape) -> Vec<usize> {
    // Dualcast wants its destinations to have equal bits 11:0 (DSA specification, section 8.3.9).
    let align = if shape.kind == OpKind::Dualcast { 4096 } else { LINE };
    let spare = has_spare(shape.kind).then_some(shape.size);
    shape.lens().into_iter().chain(spare).map(|len| len.next_multiple_of(align)).collect()
}

/// Whether memcpy needs a buffer that is not the job's. A no-op has none to copy between; it gets one so that
/// a lane always has memory.
fn has_spare(kind: OpKind) -> bool {
    !matches!(
        kind,
        OpKind::Copy
            | OpKind::Compare
            | OpKind::Dualcast
            | OpKind::CopyCrc
            | OpKind::DifInsert
            | OpKind::DifStrip
            | OpKind::DifUpdate
    )
}

/// Cuts `memory` into the buffers of `count` jobs: first all first ones, then all second ones, and so on. Fills
/// them, unless `go_on` says to stop.
fn build(
    shape: &Shape,
    mut memory: DmaBuf,
    count: usize,
    seed: u64,
    go_on: &mut dyn FnMut(usize) -> bool,
) -> Option<Vec<Slot>> {
    let lens = shape.lens();
    let mut kinds: Vec<_> = strides(shape)
        .into_iter()
        .map(|stride| memory.split_to(stride * count).into_chunks(stride).into_iter())
        .collect();
    let mut slots = Vec::with_capacity(count);
    for index in 0..count {
        let mut take = |kind: usize, len: usize| {
            let mut buf = kinds.get_mut(kind)?.next()?;
            drop(buf.split_off(len));
            Some(buf)
        };
        let bufs: Vec<_> = lens.iter().enumerate().filter_map(|(kind, len)| take(kind, *len)).collect();
        let spare = take(lens.len(), shape.size);
        let Some(op) = op(shape, bufs) else { break };
        let job = Some(Job::new(op).tag(index as u64));
        let mut slot = Slot { job, spare, expected: Outcome::default() };
        slot.expected = slot.write(shape, seed_of(seed, index), go_on)?;
        slots.push(slot);
    }
    Some(slots)
}

/// The operation on these buffers, which [`Shape::lens`] tells; `None` if there are too few.
fn op(shape: &Shape, bufs: Vec<DmaBuf>) -> Option<Op> {
    let mut bufs = bufs.into_iter();
    let mut buf = || bufs.next();
    let [dif, to] = shape.difs();
    Some(match shape.kind {
        OpKind::Nop => Op::Nop,
        OpKind::Copy => Op::Copy { src: buf()?.into(), dst: buf()? },
        OpKind::CopyWithin => Op::CopyWithin { buf: buf()?, from: 0, to: SHIFT, len: shape.size },
        OpKind::Fill => Op::Fill { dst: buf()?, pattern: PATTERN },
        OpKind::Compare => Op::Compare { a: buf()?.into(), b: buf()?.into() },
        OpKind::ComparePattern => Op::ComparePattern { src: buf()?.into(), pattern: PATTERN },
        OpKind::CreateDelta => {
            Op::CreateDelta { original: buf()?.into(), modified: buf()?.into(), delta: buf()? }
        }
        OpKind::ApplyDelta => {
            Op::ApplyDelta { delta: buf()?.into(), delta_len: shape.delta_len(), dst: buf()? }
        }
        OpKind::Dualcast => Op::Dualcast { src: buf()?.into(), dst1: buf()?, dst2: buf()? },
        OpKind::Crc => Op::Crc { src: buf()?.into(), seed: 0 },
        OpKind::CopyCrc => Op::CopyCrc { src: buf()?.into(), dst: buf()?, seed: 0 },
        OpKind::DifCheck => Op::DifCheck { src: buf()?.into(), dif },
        OpKind::DifInsert => Op::DifInsert { src: buf()?.into(), dst: buf()?, dif },
        OpKind::DifStrip => Op::DifStrip { src: buf()?.into(), dst: buf()?, dif },
        OpKind::DifUpdate => Op::DifUpdate { src: buf()?.into(), dst: buf()?, from: dif, to },
        OpKind::CacheFlush => Op::CacheFlush { buf: buf()? },
        OpKind::Drain | OpKind::Probe => return None,
    })
}

impl Slot {
    /// [`Shape::write`] over the job's buffers.
    fn write(&mut self, shape: &Shape, seed: u64, go_on: &mut dyn FnMut(usize) -> bool) -> Option<Outcome> {
        shape.write(seed, buffers(&mut self.job).map(|buf| &mut **buf), go_on)
    }

    /// [`Shape::holds`] over the job's buffers.
    fn holds(&mut self, shape: &Shape, seed: u64, go_on: &mut dyn FnMut(usize) -> bool) -> Option<bool> {
        shape.holds(seed, buffers(&mut self.job).map(|buf| &**buf), go_on)
    }

    /// Copies a job's bytes of data, in a way that leaves what the job reads as it is.
    #[inline]
    fn memcpy(&mut self, shape: &Shape) {
        // Writes nothing to the slot itself: the driver's core would have to fetch it back.
        let (mut bufs, spare) = (buffers(&mut self.job), self.spare.as_mut());
        let (src, dst) = match shape.kind {
            OpKind::Fill | OpKind::CopyWithin => (spare, bufs.next()),
            OpKind::ApplyDelta => (spare, bufs.nth(1)),
            _ if spare.is_some() => (bufs.next(), spare),
            _ => (bufs.next(), bufs.next()),
        };
        if let (Some(src), Some(dst)) = (src, dst) {
            dst[..shape.size].copy_from_slice(&src[..shape.size]);
        }
    }
}

/// The job's buffers, in the order that its operation names them.
fn buffers(job: &mut Option<Job>) -> impl Iterator<Item = &mut DmaBuf> {
    fn own(source: &mut Source) -> Option<&mut DmaBuf> {
        match source {
            Source::Owned(buf) => Some(buf),
            Source::Shared(_) => None,
        }
    }
    let all = match job.as_mut().map(|job| &mut job.op) {
        None | Some(Op::Nop | Op::Drain | Op::Probe { .. }) => [None, None, None],
        Some(
            Op::Copy { src, dst }
            | Op::CopyCrc { src, dst, .. }
            | Op::DifInsert { src, dst, .. }
            | Op::DifStrip { src, dst, .. }
            | Op::DifUpdate { src, dst, .. }
            | Op::ApplyDelta { delta: src, dst, .. },
        ) => [own(src), Some(dst), None],
        Some(Op::Compare { a, b }) => [own(a), own(b), None],
        Some(Op::CreateDelta { original, modified, delta }) => [own(original), own(modified), Some(delta)],
        Some(Op::Dualcast { src, dst1, dst2 }) => [own(src), Some(dst1), Some(dst2)],
        Some(Op::CopyWithin { buf, .. } | Op::Fill { dst: buf, .. } | Op::CacheFlush { buf }) => {
            [Some(buf), None, None]
        }
        Some(Op::ComparePattern { src, .. } | Op::Crc { src, .. } | Op::DifCheck { src, .. }) => {
            [own(src), None, None]
        }
    };
    all.into_iter().flatten()
}
