//! Engines: take descriptors from the work queues of their group, walk batches, and write completion records.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};

use underpass::model::{Bus, DmaFault, Engine, Host};
use underpass::{Access, Iova, Pasid};
use zerocopy::{FromZeros, IntoBytes, transmute};

use super::check::{Refusal, check, has_record};
use super::command;
use super::device::{Device, Snapshot};
use super::execute::{Job, Outcome, Progress, Scratch};
use super::queue::Settings;
use super::spec::{Descriptor, HANDSHAKE, Opcode, Status, SwErr, SwErrBatch, flag};

/// What one step may do, in bytes of data.
const STEP_BUDGET: usize = 256 * 1024;
/// What a descriptor costs of that at least.
const DESCRIPTOR_COST: usize = 2048;
/// Descriptors of a batch that are fetched at once.
const FETCH: usize = 32;

/// The device's engines.
pub(super) fn engines(device: &Arc<Device>, host: &dyn Host) -> Vec<Box<dyn Engine>> {
    let new = |index| Arc::new(Mutex::new(Core::new(Arc::clone(device), index, host.bus())));
    let cores: Box<[_]> = (0..device.profile.engines).map(new).collect();
    let cores = device.cores.get_or_init(|| cores);
    let engine = |core: &Arc<Mutex<Core>>| {
        Box::new(DsaEngine { device: Arc::clone(device), core: Arc::clone(core) }) as Box<dyn Engine>
    };
    cores.iter().map(engine).collect()
}

struct DsaEngine {
    device: Arc<Device>,
    core: Arc<Mutex<Core>>,
}

impl Engine for DsaEngine {
    fn step(&mut self) -> bool {
        let worked = self.core.lock().unwrap_or_else(PoisonError::into_inner).step();
        if self.device.command_active.load(Ordering::Relaxed) {
            command::progress(&self.device, &mut self.device.control());
        }
        worked
    }
}

/// Where a descriptor came from, and what it may do.
#[derive(Debug, Clone, Copy)]
pub(super) struct Origin {
    wq: usize,
    /// The PASID of every access.
    pub(super) pasid: Option<Pasid>,
    pub(super) privileged: bool,
    pub(super) ims: bool,
    pub(super) in_batch: bool,
    pub(super) operations: u64,
    pub(super) settings: Settings,
}

impl Origin {
    pub(super) fn pasid_number(&self) -> Option<u32> {
        self.pasid.map(Pasid::get)
    }
}

/// A batch that is being worked through.
struct Batch {
    descriptor: Descriptor,
    fetched: Box<[Descriptor; FETCH]>,
    /// Of `fetched`: how many are valid, and the next.
    valid: usize,
    next: usize,
    /// Descriptors of the batch that were taken.
    taken: u32,
    failed: bool,
}

/// What an engine is in the middle of.
enum Work {
    Nothing,
    /// A descriptor, on its own or of the batch.
    Job(Job),
    /// Between two descriptors of the batch.
    Batch,
    /// A drain descriptor waits for what the other engines did when it came.
    Drain(Descriptor),
}

/// The inside of an engine. Whoever holds its lock keeps it from doing DMA.
pub(super) struct Core {
    device: Arc<Device>,
    index: usize,
    bus: Bus,
    scratch: Scratch,
    /// The group's queues, and whose turn it is for how many more descriptors.
    queues: Vec<usize>,
    turn: usize,
    credit: u32,
    work: Work,
    in_batch: bool,
    origin: Origin,
    batch: Batch,
    others: Vec<Snapshot>,
}

impl Core {
    fn new(device: Arc<Device>, index: usize, bus: Bus) -> Self {
        let origin = Origin {
            wq: 0,
            pasid: None,
            privileged: false,
            ims: false,
            in_batch: false,
            operations: 0,
            settings: Settings::new(),
        };
        let batch = Batch {
            descriptor: Descriptor::new_zeroed(),
            fetched: Box::new([Descriptor::new_zeroed(); FETCH]),
            valid: 0,
            next: 0,
            taken: 0,
            failed: false,
        };
        Self {
            others: Vec::with_capacity(device.profile.engines),
            queues: Vec::with_capacity(device.profile.wqs),
            device,
            index,
            bus,
            scratch: Scratch::new(),
            turn: 0,
            credit: 0,
            work: Work::Nothing,
            in_batch: false,
            origin,
            batch,
        }
    }

    /// From now on this engine serves these queues, a bit each.
    pub(super) fn serve(&mut self, queues: u32) {
        self.queues.clear();
        self.queues.extend((0..self.device.queues.len()).filter(|wq| queues & 1 << wq != 0));
        (self.turn, self.credit) = (0, 0);
    }

    /// Forgets what it is doing.
    pub(super) fn clear(&mut self) {
        self.work = Work::Nothing;
        self.in_batch = false;
        self.activity().idle();
    }

    fn activity(&self) -> &super::device::Activity {
        &self.device.activity[self.index]
    }

    /// Works until the budget is used up or there is nothing to do. Returns whether there was anything.
    fn step(&mut self) -> bool {
        if matches!(self.work, Work::Nothing)
            && self.queues.iter().all(|wq| self.device.queues[*wq].entries().is_empty())
        {
            // The last step may have used up its budget with its last descriptor.
            self.activity().idle();
            return false;
        }
        let may_work = self.device.functions().bus_master;
        if !may_work && !self.device.any_abort() {
            return false;
        }
        let mut budget = STEP_BUDGET;
        let mut worked = false;
        while budget > 0 {
            if matches!(self.work, Work::Nothing) && !self.take() {
                self.activity().idle();
                break;
            }
            if self.device.is_aborted(self.origin.wq, self.origin.pasid_number()) {
                self.in_batch = false;
                self.finish_top();
                worked = true;
                continue;
            }
            if !may_work {
                break;
            }
            let Some(done) = self.advance(budget) else { break };
            worked = true;
            budget = budget.saturating_sub(done.max(DESCRIPTOR_COST));
        }
        worked
    }

    /// Takes the next descriptor from the queues.
    #[inline]
    fn take(&mut self) -> bool {
        self.activity().work();
        for _ in 0..=self.queues.len() {
            let Some(&wq) = self.queues.get(self.turn) else { return false };
            let queue = &self.device.queues[wq];
            // Asked first: taking from an empty queue costs a fence.
            if self.credit > 0
                && !queue.entries().is_empty()
                && let Some(entry) = queue.entries().take()
            {
                self.credit -= 1;
                self.begin(wq, &entry);
                return true;
            }
            self.turn = (self.turn + 1) % self.queues.len();
            // Weighted round robin: as many descriptors in a row as the queue's priority says.
            self.credit = self.device.queues[self.queues[self.turn]].settings().priority().max(1);
        }
        false
    }

    /// A descriptor was taken from queue `wq`.
    #[inline]
    fn begin(&mut self, wq: usize, entry: &super::queue::Entry) {
        let queue = &self.device.queues[wq];
        let descriptor = entry.descriptor();
        let settings = queue.settings();
        let (pasid, privileged) = if settings.dedicated() {
            (settings.pasid_enable().then(|| settings.pasid()), settings.privileged())
        } else {
            (Some(descriptor.context.pasid()), descriptor.context.privileged())
        };
        self.origin = Origin {
            wq,
            pasid: pasid.and_then(Pasid::new),
            privileged,
            ims: entry.ims,
            in_batch: false,
            operations: queue.operations(),
            settings,
        };
        if pasid == Some(0) {
            // Not the device's own address space, which is what no PASID means.
            self.report(&descriptor, Status::TRANSLATION.0, 0, 0);
            return self.finish_top();
        }
        self.start(&descriptor);
    }

    /// Checks a descriptor and starts it.
    #[inline]
    fn start(&mut self, descriptor: &Descriptor) {
        match check(&self.device, &self.origin, descriptor) {
            Err(Refusal { status, invalid_flags }) => {
                let outcome = Outcome::new(status).with_specific([invalid_flags.into(), 0]);
                self.complete(descriptor, &outcome);
            }
            Ok(Opcode::Batch) => {
                self.batch.descriptor = *descriptor;
                (self.batch.valid, self.batch.next) = (0, 0);
                (self.batch.taken, self.batch.failed) = (0, false);
                self.in_batch = true;
                self.origin.in_batch = true;
                self.work = Work::Batch;
            }
            Ok(Opcode::Drain) => {
                self.others.clear();
                self.others.extend(self.device.activity.iter().map(|engine| engine.snapshot()));
                self.activity().drain();
                self.work = Work::Drain(*descriptor);
            }
            Ok(opcode) => self.work = Work::Job(Job::new(opcode, *descriptor)),
        }
    }

    /// Goes on with what is at hand; returns the bytes of data that were moved, or `None` if it has to wait.
    #[inline]
    fn advance(&mut self, budget: usize) -> Option<usize> {
        match &mut self.work {
            Work::Nothing => Some(0),
            Work::Job(job) => {
                let before = job.done;
                let progress = job.advance(&mut self.bus, self.origin.pasid, &mut self.scratch, budget);
                let moved = (job.done - before) as usize;
                if let Progress::Finished(outcome) = progress {
                    let descriptor = job.descriptor;
                    self.complete(&descriptor, &outcome);
                }
                Some(moved)
            }
            Work::Batch => {
                self.next_of_batch();
                Some(0)
            }
            Work::Drain(descriptor) => {
                let mut others = self.device.activity.iter().zip(&self.others).enumerate();
                if !others.all(|(n, (engine, then))| n == self.index || engine.is_past_or_drains(*then)) {
                    return None;
                }
                let descriptor = *descriptor;
                self.complete(&descriptor, &Outcome::new(Status::SUCCESS));
                Some(0)
            }
        }
    }

    /// Starts the next descriptor of the batch, or ends it.
    fn next_of_batch(&mut self) {
        let batch = &mut self.batch;
        let left = batch.descriptor.size - batch.taken;
        if left == 0 {
            return self.end_batch(None);
        }
        if batch.next == batch.valid {
            let list = batch.descriptor.source.wrapping_add(u64::from(batch.taken) * 64);
            let count = FETCH.min(left as usize);
            let bytes = batch.fetched[..count].as_mut_bytes();
            let read = match self.bus.read(self.origin.pasid, Iova::new(list), bytes) {
                Ok(()) => count,
                // Those that could be read are done first; the fault comes up again after them.
                Err(fault) if fault.done >= 64 => (fault.done / 64) as usize,
                Err(fault) => return self.end_batch(Some(fault)),
            };
            (batch.valid, batch.next) = (read.min(count), 0);
        }
        let descriptor = batch.fetched[batch.next];
        if batch.failed && descriptor.flags() & flag::FENCE != 0 {
            return self.end_batch(None);
        }
        batch.next += 1;
        batch.taken += 1;
        // One engine does a batch in order, so a fence has nothing else to wait for.
        self.start(&descriptor);
    }

    /// The batch is over, because all of it is done, a fence stopped it, or its list can not be read.
    fn end_batch(&mut self, fault: Option<DmaFault>) {
        let outcome = match fault {
            Some(fault) => Outcome::new(Status::BATCH_PAGE_FAULT).fault_at(fault.iova),
            None if self.batch.failed => Outcome::new(Status::BATCH_FAILED),
            None => Outcome::new(Status::SUCCESS),
        };
        let outcome = outcome.with_completed(self.batch.taken);
        self.in_batch = false;
        self.origin.in_batch = false;
        let descriptor = self.batch.descriptor;
        self.complete(&descriptor, &outcome);
    }

    /// Writes the completion record, signals the interrupt and goes on.
    #[inline]
    fn complete(&mut self, descriptor: &Descriptor, outcome: &Outcome) {
        let flags = descriptor.flags();
        let success = outcome.status() == Status::SUCCESS;
        if has_record(descriptor) {
            if flags & flag::REQUEST_COMPLETION != 0 || !success {
                self.write_record(descriptor, outcome);
            }
        } else if !success {
            let address = outcome.0.fault_address;
            self.report(descriptor, outcome.status().0, outcome.invalid_flags(), address);
        }
        if flags & flag::REQUEST_INTERRUPT != 0 && outcome.status() != Status::INTERRUPT_HANDLE {
            self.signal(descriptor);
        }
        if self.in_batch {
            self.batch.failed |= !success;
            self.work = Work::Batch;
        } else {
            self.finish_top();
        }
    }

    /// The descriptor that was taken from a queue is done with.
    #[inline]
    fn finish_top(&mut self) {
        self.work = Work::Nothing;
        self.activity().done();
    }

    /// Signals a completion. Checked again, because a descriptor that was refused asks for it, too.
    fn signal(&self, descriptor: &Descriptor) {
        let handle = descriptor.interrupt_handle;
        if !self.origin.ims && self.device.may_interrupt(handle, self.origin.pasid_number()) {
            self.device.interrupt(handle.into());
        }
    }

    /// Writes the completion record, the handshake word last.
    #[inline]
    fn write_record(&mut self, descriptor: &Descriptor, outcome: &Outcome) {
        let words: [u64; 4] = transmute!(outcome.0);
        const { assert!(HANDSHAKE == 0, "what publish stores last, with Release, is the handshake word") };
        // It pairs with the driver's Acquire read of that word, and publishes what the operation wrote, too.
        let written = self.bus.publish(self.origin.pasid, Iova::new(descriptor.completion), &words);
        if let Err(fault) = written {
            self.report(descriptor, Status::COMPLETION_FAULT.0 | Status::WRITE, 0, fault.iova.get());
        }
    }

    /// Reports what can not be told in a completion record.
    fn report(&self, descriptor: &Descriptor, error: u8, invalid_flags: u32, address: u64) {
        let report = SwErr::new()
            .with_descriptor_valid(true)
            .with_wq_valid(true)
            .with_batch(self.in_batch)
            .with_write(error & Status::WRITE != 0)
            .with_privileged(self.origin.privileged)
            .with_error(error & !Status::WRITE)
            .with_wq(self.origin.wq as u8)
            .with_opcode(descriptor.opcode())
            .with_pasid(self.origin.pasid_number().unwrap_or(0));
        let index = if self.in_batch { self.batch.taken.wrapping_sub(1) as u16 } else { 0 };
        let batch = SwErrBatch::new().with_index(index).with_invalid_flags(invalid_flags);
        self.device.report(report, batch, address);
    }
}

/// The status of a fault on an operand.
pub(super) fn fault_status(fault: &DmaFault) -> Status {
    if fault.access == Access::WRITE {
        Status(Status::PAGE_FAULT.0 | Status::WRITE)
    } else {
        Status::PAGE_FAULT
    }
}
