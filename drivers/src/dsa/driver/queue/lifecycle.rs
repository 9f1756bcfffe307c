//! The slow side of a work queue: how it comes to be, sleeps, is reset, and ends.

use std::collections::VecDeque;
use std::fmt;
use std::iter;
use std::mem;
use std::sync::Arc;
use std::time::{Duration, Instant};

use underpass::accel::{Channel, CounterValues, Done, Limits, State};
use underpass::dma::{DmaBuf, DmaSpace, Records};
use underpass::iommu::OwnedPasid;
use underpass::{Access, Burst, Error, ErrorKind, Pasid, Region, Result};

use super::patience::Patience;
use super::{Entry, Place, RECORD, WorkQueue};
use crate::dsa::driver::Space;
use crate::dsa::spec::{CompletionRecord, Context, Descriptor, Handshake, flag};
use crate::shape::operands;

impl WorkQueue {
    /// A queue that is not enabled yet.
    pub(in crate::dsa::driver) fn new(place: Place, mut space: Space, limits: Limits) -> Result<Self> {
        let depth = limits.depth;
        let members = if limits.max_batch > 1 { depth * limits.max_batch } else { 0 };
        let lists_len = members * size_of::<Descriptor>();
        let records_len = (depth + members) * size_of::<CompletionRecord>();
        let mut builder = Region::builder((lists_len + records_len) as u64).name("dsa-queue");
        if let Some(node) = place.core.device.numa_node() {
            builder = builder.numa_node(node);
        }
        let memory = builder.build()?;
        space.dma.map(&memory, Access::READ_WRITE)?;
        let mut lists = DmaBuf::new(Arc::clone(&memory))?;
        let records = lists.split_off(lists_len).split_to(records_len);

        let entry = || Entry {
            jobs: Burst::with_capacity(limits.max_batch),
            is_batch: false,
            delivered: 0,
            answer: Handshake::new(),
        };
        let interrupt = if place.interrupt.is_some() { flag::REQUEST_INTERRUPT } else { 0 };
        let pasid = if place.dedicated { None } else { space.pasid.as_ref().map(OwnedPasid::get) };
        Ok(Self {
            limits,
            portal_offset: 0,
            entry_flags: RECORD | interrupt,
            write_flags: if place.cache_control { flag::CACHE_CONTROL } else { 0 },
            context: Context::new().with_pasid(pasid.map_or(0, Pasid::get)),
            leased: space.dma.checks_leases(),
            entries: iter::repeat_with(entry).take(depth).collect(),
            free: (0..depth as u32).rev().collect(),
            order: VecDeque::with_capacity(depth),
            outstanding: 0,
            lists: Records::new(lists, &space.dma, Access::READ)?,
            records: Records::new(records, &space.dma, Access::WRITE)?,
            memory,
            patience: Patience::new(),
            resetting: false,
            counters: Arc::default(),
            space,
            place,
        })
    }

    /// Waits for a completion's interrupt.
    pub(super) fn sleep(&mut self, timeout: Duration) -> Result<()> {
        // None is later than any clock of ours goes: no limit of the caller's.
        let until = Instant::now().checked_add(timeout);
        loop {
            let Some(interrupt) = &self.place.interrupt else {
                let error =
                    self.error(ErrorKind::Unsupported, "wait", "its channels were set up without interrupts");
                return Err(error.mend("set Config::interrupts, or poll"));
            };
            // Emptied before looking: whatever completes after the look signals it again.
            interrupt.drain();
            if self.is_ready() {
                return Ok(());
            }
            let mut left = until.map(|until| until.saturating_duration_since(Instant::now()));
            if self.outstanding != 0 {
                self.look_at_clock();
                if !self.is_running() {
                    return Ok(());
                }
                left = Some(left.map_or(self.place.deadline, |left| left.min(self.place.deadline)));
            }
            if left.is_some_and(|left| left.is_zero()) {
                return Ok(());
            }
            if let Some(interrupt) = &self.place.interrupt {
                interrupt.wait(left)?;
            }
        }
    }

    /// Stops the queue, gives its jobs back, and starts it once they all are.
    pub(super) fn stop_and_start(&mut self, done: &mut Burst<Done>) -> Result<usize> {
        if self.is_gone() {
            return Err(self.error(ErrorKind::Gone, "reset the queue", "its device does not answer"));
        }
        let core = Arc::clone(&self.place.core);
        let named = |error: Error| error.device(core.device.name().to_owned());
        if !self.resetting {
            self.set_state(State::Stalled);
            if let Err(error) = core.quiesce(self.place.index) {
                self.leak();
                return Err(named(error).mend("its memory stays allocated; open the device again"));
            }
            self.resetting = true;
        }
        let mut sum = CounterValues::default();
        while let Some(&entry) = self.order.front() {
            let answer = self.answer(entry);
            if !self.deliver(entry, answer, done, &mut sum) {
                break;
            }
            self.release(0);
        }
        self.counters.add(sum);
        if self.outstanding == 0 {
            self.place.interrupt_handle = core.resume(self.place.index).map_err(named)?;
            self.resetting = false;
            self.set_state(State::Running);
        }
        Ok(self.outstanding)
    }

    /// The device did not stop: nothing that it may still write is ever freed, or mapped elsewhere.
    #[cold]
    fn leak(&mut self) {
        self.set_state(State::Gone);
        self.memory.leak();
        for job in self.entries.iter_mut().flat_map(|entry| entry.jobs.drain_all()) {
            operands(&job.op).for_each(|(buf, _)| buf.region().leak());
        }
        self.order.clear();
        self.outstanding = 0;
        mem::replace(&mut self.space.dma, DmaSpace::shared_virtual()).leak();
        #[allow(clippy::mem_forget, reason = "the device stays attached: its last write has no time")]
        mem::forget((mem::take(&mut self.space.attachments), self.space.pasid.take()));
    }
}

impl Drop for WorkQueue {
    /// Quiesces the queue; then the fields' drops detach, unmap and free. A queue that does not stop is leaked.
    fn drop(&mut self) {
        if self.is_gone() {
            return;
        }
        if let Err(error) = self.place.core.retire(self.place.index) {
            tracing::error!("{}", error.device(self.place.core.device.name().to_owned()));
            self.leak();
            return;
        }
        for job in self.entries.iter().flat_map(|entry| entry.jobs.iter()) {
            self.take_back(&job.op);
        }
    }
}

impl fmt::Debug for WorkQueue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WorkQueue")
            .field("device", &self.place.core)
            .field("index", &self.place.index)
            .field("pasid", &self.pasid())
            .field("state", &self.state())
            .field("outstanding", &self.outstanding)
            .finish_non_exhaustive()
    }
}
