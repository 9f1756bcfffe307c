//! The data path: one work queue as a [`Channel`]. Submitting and polling take no lock, allocate nothing and do no
//! system call.
//!
//! A queue of depth d has d entries. An entry is one write to the portal, of a single job or of a batch; it has a
//! completion record of its own and, for batches, a list of descriptors with a record each.

mod lifecycle;
mod patience;

use std::collections::VecDeque;
use std::mem;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, Instant};

use underpass::accel::{
    Channel, CounterValues, Counters, Done, Job, JobError, Limits, Op, Outcome, Reason, Rejected, State,
};
use underpass::bar::Bar;
use underpass::dma::{DmaBuf, Records};
use underpass::interrupt::Interrupt;
use underpass::iommu::OwnedPasid;
use underpass::{Access, Burst, Error, ErrorKind, Iova, Pasid, Region, Result};
use zerocopy::transmute_ref;

use self::patience::Patience;
use super::job::{DONE, encode, has_result, is_plain_success, judge, silent_successes, without_status};
use super::{Core, Space, number};
use crate::dsa::spec::{
    CompletionRecord, Context, Descriptor, HANDSHAKE, Handshake, Opcode, PORTAL_PAGE, flag,
};
use crate::shape::{check_shape, operands, transfer_size};

/// What every descriptor of this driver asks for: a completion record, also on success.
const RECORD: u32 = flag::COMPLETION_ADDRESS_VALID | flag::REQUEST_COMPLETION;

/// Which queue of which device it is, and what that can do.
pub(super) struct Place {
    pub core: Arc<Core>,
    pub index: usize,
    /// The states of all queues.
    pub states: Arc<[AtomicU8]>,
    pub portal: Bar,
    pub dedicated: bool,
    pub interrupt: Option<Interrupt>,
    pub interrupt_handle: u16,
    pub engines: usize,
    pub cache_control: bool,
    pub deadline: Duration,
}

/// What is in one entry.
#[derive(Debug)]
struct Entry {
    /// Its jobs, with room for the largest batch; those that are back with the application are no-ops. (To take jobs
    /// out of the vector would move each as an `Option`, whose tag lies in the job's padding: in pieces, at twice the
    /// cost.)
    jobs: Burst<Job>,
    is_batch: bool,
    /// Jobs that are back with the application.
    delivered: usize,
    /// The handshake word, once it had a status: read once, because it may be used over several polls.
    answer: Handshake,
}

/// A work queue.
pub(super) struct WorkQueue {
    // The first field: all that is mapped is unmapped before any of it can be freed.
    space: Space,
    limits: Limits,
    /// Where in the portal the next descriptor goes: consecutive writes to one address could be delayed.
    portal_offset: u64,
    entry_flags: u32,
    write_flags: u32,
    context: Context,
    /// Leases are checked, so that buffers must be registered.
    leased: bool,

    entries: Vec<Entry>,
    free: Vec<u32>,
    /// Entries with the device, in the order of submission.
    order: VecDeque<u32>,
    outstanding: usize,
    /// `max_batch` an entry (none if that is 1).
    lists: Records<Descriptor>,
    /// First one an entry, then `max_batch` an entry (none if that is 1).
    records: Records<CompletionRecord>,
    /// The memory of `lists` and `records`.
    memory: Arc<Region>,

    /// With the oldest submission.
    patience: Patience,
    /// A reset has made the queue quiet, and has not yet started it again.
    resetting: bool,
    counters: Arc<Counters>,
    place: Place,
}

impl WorkQueue {
    fn error(&self, kind: ErrorKind, operation: &'static str, why: &'static str) -> Error {
        Error::new(kind, operation, why).device(self.place.core.device.name().to_owned())
    }

    #[inline]
    fn is_running(&self) -> bool {
        // Relaxed: the state guards no memory.
        self.place.states[self.place.index].load(Ordering::Relaxed) == number(State::Running)
    }

    fn set_state(&self, state: State) {
        self.place.states[self.place.index].store(number(state), Ordering::Relaxed);
    }

    /// The entry that the next submission goes to.
    #[inline]
    fn vacant(&self) -> Result<u32, Reason> {
        if !self.is_running() {
            return Err(Reason::NotRunning);
        }
        self.free.last().copied().ok_or(Reason::Full)
    }

    /// The job's descriptor, if the queue can take the job.
    #[allow(clippy::inline_always, reason = "a returned descriptor is copied twice; measured")]
    #[inline(always)]
    fn admit(&self, op: &Op) -> Result<Descriptor, Reason> {
        check_shape(op, &self.limits)?;
        let descriptor = encode(op, &self.space.dma, self.write_flags);
        if matches!(descriptor, Err(Reason::NotMapped)) {
            self.counters.add(CounterValues { refused: 1, ..CounterValues::default() });
        }
        descriptor
    }

    /// Where in `lists` and the batches' part of `records` member 0 of an entry is.
    #[inline]
    fn first_member(&self, entry: u32) -> usize {
        entry as usize * self.limits.max_batch
    }

    #[inline]
    fn member_record(&self, entry: u32, member: usize) -> usize {
        self.limits.depth + self.first_member(entry) + member
    }

    /// Makes the record ready to be written by the device, and the descriptor point to it.
    #[inline]
    fn ask_for_record(&self, descriptor: &mut Descriptor, flags: u32, record: usize) {
        // Relaxed: the write to the portal orders it (Bar::post64 fences), and the device's store of the same word
        // comes after that.
        self.records.word(record, HANDSHAKE).store(0, Ordering::Relaxed);
        descriptor.completion = self.records.iova(record).get();
        descriptor.operation |= flags;
        descriptor.context = self.context;
    }

    /// The handshake word of a record. Acquire pairs with the device's Release of the same word: what else is in the
    /// record, and what the job wrote to memory, is visible once this has a status.
    #[inline]
    fn handshake(&self, record: usize) -> Handshake {
        Handshake::from_bits(self.records.word(record, HANDSHAKE).load(Ordering::Acquire))
    }

    /// Writes a descriptor to the portal. False: a shared queue says "retry".
    #[inline]
    fn post(&mut self, descriptor: &Descriptor) -> bool {
        let words: &[u8; 64] = transmute_ref!(descriptor);
        let offset = self.portal_offset;
        self.portal_offset = (offset + 64) % PORTAL_PAGE;
        if self.place.dedicated {
            self.place.portal.post64(offset, words);
            return true;
        }
        // An error means that there is no such instruction here, which setting up the channel found out.
        let accepted = self.place.portal.enqueue64(offset, words).unwrap_or(false);
        if !accepted {
            self.counters.add(CounterValues { retries: 1, ..CounterValues::default() });
        }
        accepted
    }

    /// Registers the leases of an operation that was admitted. Needed only where they are checked.
    fn lend(&self, op: &Op) {
        for (buf, access) in operands(op) {
            let lent = self.space.dma.hand_out(buf, access);
            debug_assert!(lent.is_some(), "encode found it mapped");
        }
    }

    /// The opposite of [`lend`](Self::lend).
    fn take_back(&self, op: &Op) {
        operands(op).for_each(|(buf, access)| self.space.dma.take_back(buf, access));
    }

    /// The entry that was vacant is with the device; returns where its jobs go.
    #[inline]
    fn submitted(&mut self, entry: u32, is_batch: bool, count: usize) -> &mut Burst<Job> {
        self.free.pop();
        self.order.push_back(entry);
        self.outstanding += count;
        let entry = &mut self.entries[entry as usize];
        entry.is_batch = is_batch;
        entry.delivered = 0;
        entry.answer = Handshake::new();
        &mut entry.jobs
    }

    /// Moves the jobs of an entry to `done`, for as long as they fit; says whether all did. `answer` without a
    /// status is that of a queue that was stopped.
    #[inline]
    fn deliver(
        &mut self,
        entry: u32,
        answer: Handshake,
        done: &mut Burst<Done>,
        sum: &mut CounterValues,
    ) -> bool {
        let Entry { is_batch, delivered, ref mut jobs, .. } = self.entries[entry as usize];
        let now = jobs.len().min(delivered + done.room());
        let (all, filled) = (now == jobs.len(), done.len());
        let batch = is_batch.then_some(jobs.len());
        // First every job with the outcome that most have, a constant: a Done that is put together from its own is
        // moved in loads that wait for narrower stores, at three times the cost.
        let (mut bytes, mut plain) = (0, !self.leased);
        let moved = jobs[delivered..now].iter_mut().map(|job| {
            bytes += transfer_size(&job.op) as u64;
            plain &= is_plain_success(&job.op, answer, batch);
            Job { op: mem::replace(&mut job.op, Op::Nop), ..*job }
        });
        done.extend(moved.map(|job| Done { job, result: const { Ok(DONE) } }));
        if !plain {
            bytes -= self.settle(entry, delivered, answer, &mut done[filled..], sum);
        }
        sum.bytes += bytes;
        sum.jobs += (now - delivered) as u64;
        self.outstanding -= now - delivered;
        let entry = &mut self.entries[entry as usize];
        entry.delivered = now;
        if all {
            entry.jobs.clear();
        }
        all
    }

    /// Takes leases back and finds out how jobs ended where they did not all just succeed; the first of them is member
    /// `first` of its entry. Returns the bytes of those that failed.
    fn settle(
        &self,
        entry: u32,
        first: usize,
        answer: Handshake,
        done: &mut [Done],
        sum: &mut CounterValues,
    ) -> u64 {
        let Entry { is_batch, ref jobs, .. } = self.entries[entry as usize];
        let batch = is_batch.then_some(jobs.len());
        let mut bytes = 0;
        for (member, done) in (first..).zip(done) {
            let op = &done.job.op;
            if self.leased {
                self.take_back(op);
            }
            if !is_plain_success(op, answer, batch) {
                done.result = self.result(entry, member, answer, op);
                if done.result.is_err() {
                    sum.failed += 1;
                    bytes += transfer_size(op) as u64;
                }
            }
        }
        bytes
    }

    /// How one job of an entry ended, where there is more to it than success.
    fn result(&self, entry: u32, member: usize, answer: Handshake, op: &Op) -> Result<Outcome, JobError> {
        let Entry { is_batch, ref jobs, .. } = self.entries[entry as usize];
        if !is_batch {
            return match answer.status() {
                0 => Err(JobError::Reset),
                _ => judge(op, answer, &self.records, entry as usize),
            };
        }
        let record = self.member_record(entry, member);
        match self.handshake(record) {
            own if own.status() != 0 => judge(op, own, &self.records, record),
            _ if member < silent_successes(answer, jobs.len()) && !has_result(op) => Ok(DONE),
            _ => Err(without_status(answer, member)),
        }
    }

    /// The answer to a whole entry; without a status where there is none yet.
    #[inline]
    fn answer(&mut self, entry: u32) -> Handshake {
        let known = self.entries[entry as usize].answer;
        if known.status() != 0 {
            return known;
        }
        let answer = self.handshake(entry as usize);
        if answer.status() != 0 {
            self.entries[entry as usize].answer = answer;
        }
        answer
    }

    /// Gives back the entry at this place in the order.
    #[inline]
    fn release(&mut self, place: usize) {
        let entry = if place == 0 {
            self.patience = Patience::new();
            self.order.pop_front()
        } else {
            self.order.remove(place)
        };
        self.free.extend(entry);
    }

    /// Whether a poll would find something.
    fn is_ready(&mut self) -> bool {
        let looked_at = self.order.len().min(self.place.engines);
        (0..looked_at).any(|place| {
            let entry = self.order[place];
            self.answer(entry).status() != 0
        })
    }

    /// Stalls the queue if its oldest submission has waited for longer than the deadline.
    #[cold]
    fn look_at_clock(&mut self) {
        if self.patience.look(Instant::now(), self.place.deadline) && self.is_running() {
            self.set_state(State::Stalled);
        }
    }

    fn is_gone(&self) -> bool {
        self.state() == State::Gone
    }
}

impl Channel for WorkQueue {
    fn map(&mut self, region: &Arc<Region>, access: Access) -> Result<()> {
        if self.is_gone() {
            return Err(self.error(ErrorKind::Gone, "map a region", "the queue's device does not answer"));
        }
        self.space.dma.map(region, access).map_err(|e| e.device(self.place.core.device.name().to_owned()))
    }

    fn unmap(&mut self, region: &Arc<Region>) -> Result<()> {
        if self.is_gone() {
            return Err(self.error(ErrorKind::Gone, "unmap a region", "the queue's device does not answer"));
        }
        if self.outstanding != 0 {
            let error = self.error(ErrorKind::Busy, "unmap a region", "jobs are outstanding");
            return Err(error.mend("poll until they are back"));
        }
        self.space.dma.unmap(region).map_err(|e| e.device(self.place.core.device.name().to_owned()))
    }

    fn iova(&self, buf: &DmaBuf) -> Option<Iova> {
        self.space.dma.iova(buf)
    }

    fn pasid(&self) -> Option<Pasid> {
        self.space.pasid.as_ref().map(OwnedPasid::get)
    }

    fn limits(&self) -> Limits {
        self.limits
    }

    fn state(&self) -> State {
        match self.place.states[self.place.index].load(Ordering::Relaxed) {
            state if state == number(State::Running) => State::Running,
            state if state == number(State::Stalled) => State::Stalled,
            _ => State::Gone,
        }
    }

    #[inline]
    fn submit(&mut self, job: Job) -> Result<(), Rejected> {
        let admitted = self.vacant().and_then(|entry| Ok((entry, self.admit(&job.op)?)));
        let (entry, mut descriptor) = match admitted {
            Ok(admitted) => admitted,
            Err(why) => return Err(Rejected { job, why }),
        };
        self.ask_for_record(&mut descriptor, self.entry_flags, entry as usize);
        descriptor.interrupt_handle = self.place.interrupt_handle;
        if self.leased {
            self.lend(&job.op);
        }
        if !self.post(&descriptor) {
            self.take_back(&job.op);
            return Err(Rejected { job, why: Reason::Full });
        }
        let _ = self.submitted(entry, false, 1).push(job);
        Ok(())
    }

    fn submit_batch(&mut self, jobs: &mut Burst<Job>) -> Result<usize, (usize, Reason)> {
        let count = jobs.len().min(self.limits.max_batch);
        if count < 2 {
            return Err((0, Reason::Batch));
        }
        let entry = self.vacant().map_err(|why| (0, why))?;
        let first = self.first_member(entry);
        for (index, job) in jobs[..count].iter().enumerate() {
            if matches!(job.op, Op::Drain) {
                return Err((index, Reason::Batch));
            }
            let mut descriptor = self.admit(&job.op).map_err(|why| (index, why))?;
            let fence = if job.fence { flag::FENCE } else { 0 };
            // The batch's own record tells that all is well. Those of the members are lines that the device would have
            // to fetch from this core one by one: only a result, or an error, is worth it.
            let record = if has_result(&job.op) { RECORD } else { flag::COMPLETION_ADDRESS_VALID };
            self.ask_for_record(&mut descriptor, record | fence, self.member_record(entry, index));
            self.lists.write(first + index, &descriptor);
        }
        let mut batch = Descriptor::new(Opcode::Batch, 0);
        batch.source = self.lists.iova(first).get();
        batch.size = count as u32;
        batch.interrupt_handle = self.place.interrupt_handle;
        self.ask_for_record(&mut batch, self.entry_flags, entry as usize);
        if self.leased {
            jobs[..count].iter().for_each(|job| self.lend(&job.op));
        }
        if !self.post(&batch) {
            jobs[..count].iter().for_each(|job| self.take_back(&job.op));
            return Err((0, Reason::Full));
        }
        self.submitted(entry, true, count).append(jobs, count);
        Ok(count)
    }

    fn poll(&mut self, done: &mut Burst<Done>) -> usize {
        let mut sum = CounterValues::default();
        // Entries looked at that are not finished; they stay, so this is also the place of the next one.
        let mut unfinished = 0;
        // Engines take entries in order, so at most one a engine is unfinished in front of a finished one. (Should a
        // device do more at a time, a finished one waits until one before it is finished too.)
        while unfinished < self.place.engines && !done.is_full() {
            let Some(&entry) = self.order.get(unfinished) else { break };
            let answer = self.answer(entry);
            if answer.status() == 0 {
                unfinished += 1;
            } else if self.deliver(entry, answer, done, &mut sum) {
                self.release(unfinished);
            } else {
                break;
            }
        }
        if unfinished != 0 && self.patience.polled(sum.jobs != 0) {
            self.look_at_clock();
        }
        if sum.jobs != 0 {
            self.counters.add(sum);
        }
        sum.jobs as usize
    }

    fn wait(&mut self, timeout: Duration) -> Result<()> {
        self.sleep(timeout)
    }

    fn outstanding(&self) -> usize {
        self.outstanding
    }

    fn reset(&mut self, done: &mut Burst<Done>) -> Result<usize> {
        self.stop_and_start(done)
    }

    fn counters(&self) -> Arc<Counters> {
        Arc::clone(&self.counters)
    }
}
