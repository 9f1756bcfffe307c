//! One queue of the device, fed in batches or one job at a time.

use std::sync::Arc;
use std::thread;

use underpass::accel::{Channel, Done, Job, Reason, Rejected, State};
use underpass::{Access, Burst, Error, ErrorKind, Region, Result};

/// A channel with the jobs that go to it next and those that came back.
#[derive(Debug)]
pub(crate) struct Queue {
    channel: Box<dyn Channel>,
    device: String,
    /// Jobs of the next submission; up to the batch's size.
    staged: Burst<Job>,
    done: Burst<Done>,
    /// Somebody else needs this core too (the device's engine, another worker): polls in vain give it away.
    shares_core: bool,
}

impl Queue {
    /// A queue that submits `batch` jobs at a time (1: no batches).
    pub(crate) fn new(channel: Box<dyn Channel>, device: &str, batch: usize, shares_core: bool) -> Self {
        let done = Burst::with_capacity(batch.max(32));
        Self { channel, device: device.to_owned(), staged: Burst::with_capacity(batch), done, shares_core }
    }

    /// Lets the queue, and no other, use the memory.
    pub(crate) fn map(&mut self, region: &Arc<Region>) -> Result<()> {
        self.channel.map(region, Access::READ_WRITE).map_err(|e| e.device(self.device.clone()))
    }

    /// Whether another job can be staged.
    #[inline]
    pub(crate) fn has_room(&self) -> bool {
        !self.staged.is_full()
    }

    /// Jobs that wait for [`submit`](Self::submit).
    #[inline]
    pub(crate) fn staged(&self) -> usize {
        self.staged.len()
    }

    /// Adds a job to the next submission.
    ///
    /// # Panics
    /// If there is no room.
    #[inline]
    pub(crate) fn stage(&mut self, job: Job) {
        assert!(self.staged.push(job).is_ok(), "staged a job where no room is");
    }

    /// Hands the staged jobs to the device. False if it has no room for them now: poll, then try again.
    pub(crate) fn submit(&mut self) -> Result<bool> {
        let (job, why) = if self.staged.len() > 1 {
            match self.channel.submit_batch(&mut self.staged) {
                Ok(_) => return Ok(true),
                Err((_, Reason::Full)) => return Ok(false),
                Err((index, why)) => (&self.staged[index], why),
            }
        } else {
            let Some(job) = self.staged.pop() else { return Ok(true) };
            let Err(Rejected { job, why }) = self.channel.submit(job) else { return Ok(true) };
            self.stage(job);
            if why == Reason::Full {
                return Ok(false);
            }
            (&self.staged[0], why)
        };
        Err(rejected(job, why, &self.device))
    }

    /// Gives each finished job to `back`; returns how many there were. Finding none, checks that the queue is
    /// running, and lets others have the core where they share it.
    #[inline]
    pub(crate) fn poll(&mut self, mut back: impl FnMut(Done)) -> Result<usize> {
        let count = self.channel.poll(&mut self.done);
        for done in self.done.drain_all() {
            back(done);
        }
        if count == 0 && self.channel.outstanding() != 0 {
            self.wait(back)?;
        }
        Ok(count)
    }

    fn wait(&mut self, mut back: impl FnMut(Done)) -> Result<()> {
        if self.channel.state() == State::Running {
            if self.shares_core {
                thread::yield_now();
            } else {
                std::hint::spin_loop();
            }
            return Ok(());
        }
        // Jobs and their memory come back first, then the failure is told.
        loop {
            let left = self.channel.reset(&mut self.done).map_err(|e| e.device(self.device.clone()))?;
            for done in self.done.drain_all() {
                back(done);
            }
            if left == 0 {
                break;
            }
        }
        Err(Error::new(
            ErrorKind::Timeout,
            "finish the jobs",
            "the device stopped or missed a job's deadline, and its queue was reset",
        )
        .device(self.device.clone())
        .mend("run it again with -v; if it stays so, reset the device"))
    }

    /// Takes everything back: what is staged and what is with the device.
    pub(crate) fn drain(&mut self, mut back: impl FnMut(Done), mut unsent: impl FnMut(Job)) -> Result<()> {
        for job in self.staged.drain_all() {
            unsent(job);
        }
        while self.channel.outstanding() != 0 {
            self.poll(&mut back)?;
        }
        Ok(())
    }
}

/// A job that the channel will never take, as an error.
fn rejected(job: &Job, why: Reason, device: &str) -> Error {
    let kind = match why {
        Reason::Unsupported => ErrorKind::Unsupported,
        Reason::NotRunning => ErrorKind::Device,
        _ => ErrorKind::InvalidInput,
    };
    let mend = match why {
        Reason::Size => "choose another --size",
        Reason::Batch => "choose another --batch",
        _ => "see underpass copy --help",
    };
    Error::new(kind, format!("submit a {} job", job.op.kind().name()), why.to_string())
        .device(device.to_owned())
        .mend(mend)
}
