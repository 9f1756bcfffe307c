//! The accelerator class: devices that do jobs on memory (copy, fill, compare, checksums).
//!
//! An [`Accelerator`] is opened once and gives [`Channel`]s, one a worker. A channel takes [`Job`]s, which own
//! (or share, read-only) their buffers until they come back in a [`Done`]. Nothing here presupposes a PCI
//! device: the CPU is a channel too.
//!
//! What goes wrong comes back in one of three ways. A job that the channel can not take is [`Rejected`] with
//! the reason, at once, and is the caller's again. A job that the device refused or could not finish is a
//! [`Done`] whose `result` is a [`JobError`]. When the device does not answer, [`Channel::state`] is no longer
//! [`State::Running`], and the outstanding jobs come back from [`Channel::reset`].

mod done;
mod job;

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crossbeam::utils::CachePadded;

pub use done::{Done, JobError, Outcome, Reason, Rejected};
pub use job::{Dif, DifBlock, Job, Op, OpKind, Ops, Source};

use crate::dma::DmaBuf;
use crate::iommu::SvaToken;
use crate::{Access, Burst, Error, Fault, Iova, Pasid, Region, Result};

/// Whether a channel works.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// It takes and completes jobs.
    Running,
    /// A job passed its deadline or the device reported an error: only [`Channel::reset`] brings the
    /// outstanding jobs back.
    Stalled,
    /// The device does not answer even to a reset: jobs and memory that it could still write are leaked.
    Gone,
}

/// What a channel can take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Operations.
    pub ops: Ops,
    /// Bytes in one job, at most.
    pub max_bytes: u64,
    /// Jobs in a batch, at most; 1 means no batches. At least 2 make a batch.
    pub max_batch: usize,
    /// Submissions outstanding at a time, at most: a batch counts as one.
    pub depth: usize,
}

/// How channels are to be set up.
#[derive(Debug, Clone, Default)]
pub struct Config {
    /// How many channels; 0 is taken as 1.
    pub channels: usize,
    /// Submissions outstanding at a time, in each channel; 0 leaves it to the driver.
    pub depth: usize,
    /// The largest batch; 0 is taken as 1: none.
    pub batch: usize,
    /// A job that is not done after this time stalls its channel; `None` is 2 seconds.
    pub deadline: Option<Duration>,
    /// Wait for an interrupt in [`Channel::wait`] instead of polling alone.
    pub interrupts: bool,
    /// Share this process's address space instead of mapping regions: all memory is reachable.
    pub sva: Option<SvaToken>,
}

/// A device of the accelerator class.
pub trait Accelerator: Send + fmt::Debug {
    /// Its address as the user gave it: "soft:dsa", "0000:6a:01.0", "cpu".
    fn name(&self) -> &str;

    /// Its driver: "dsa", "cpu".
    fn driver(&self) -> &'static str;

    /// How many channels it can have.
    fn max_channels(&self) -> usize;

    /// The device's own limits: `depth` is for all channels together.
    fn limits(&self) -> Limits;

    /// Sets the device up for these channels and starts it. Once for a device.
    ///
    /// # Errors
    /// [`InvalidInput`](crate::ErrorKind::InvalidInput) for more channels, a deeper queue or a larger batch than the
    /// device has; [`Busy`](crate::ErrorKind::Busy) if channels were taken before.
    fn channels(&mut self, config: &Config) -> Result<Vec<Box<dyn Channel>>>;

    /// The next error that the device reported on its own account (a lost descriptor, a halt), if any.
    fn next_error(&mut self) -> Option<Error>;

    /// The next access that the IOMMU refused, if it reports them.
    fn next_fault(&mut self) -> Option<Fault>;
}

/// One queue of an accelerator. It belongs to one worker at a time.
pub trait Channel: Send + fmt::Debug {
    /// Lets the device read and write all buffers in `region`. Memory stays mapped until
    /// [`unmap`](Self::unmap) or the channel's end.
    fn map(&mut self, region: &Arc<Region>, access: Access) -> Result<()>;

    /// Takes the region away from the device again.
    ///
    /// # Errors
    /// [`Busy`](crate::ErrorKind::Busy) while jobs are outstanding.
    fn unmap(&mut self, region: &Arc<Region>) -> Result<()>;

    /// Where the device finds the buffer in this channel's address space; `None` if its region is not mapped here, or
    /// the channel uses no such addresses.
    fn iova(&self, _buf: &DmaBuf) -> Option<Iova> {
        None
    }

    /// The PASID that its DMA carries; `None` where the device has none.
    fn pasid(&self) -> Option<Pasid>;

    /// What it can take.
    fn limits(&self) -> Limits;

    /// Whether it works: one relaxed load.
    fn state(&self) -> State;

    /// Hands one job to the device.
    // The job comes back in the error by value: boxing it would allocate on the data path.
    #[allow(clippy::result_large_err, reason = "the job itself comes back, without an allocation")]
    fn submit(&mut self, job: Job) -> Result<(), Rejected>;

    /// Hands the first `limits().max_batch` (or fewer) jobs of `jobs` to the device as one batch. All of them
    /// are taken and leave `jobs`, or none is.
    ///
    /// # Errors
    /// Which job does not fit, as an index into `jobs`, and why.
    fn submit_batch(&mut self, jobs: &mut Burst<Job>) -> Result<usize, (usize, Reason)>;

    /// Moves finished jobs to `done`, as many as fit, and returns how many. Never waits.
    fn poll(&mut self, done: &mut Burst<Done>) -> usize;

    /// Sleeps until the device signals a completion, or for `timeout`. Returns at once when something is
    /// there to poll.
    ///
    /// # Errors
    /// [`Unsupported`](crate::ErrorKind::Unsupported) unless [`Config::interrupts`] was set and the device has them.
    fn wait(&mut self, timeout: Duration) -> Result<()>;

    /// Jobs that are with the device.
    fn outstanding(&self) -> usize;

    /// Stops the queue, moves all outstanding jobs to `done` (finished ones with their result, the others as
    /// [`JobError::Reset`]) and starts it again. Call it until it returns 0 outstanding if `done` is small.
    ///
    /// # Errors
    /// [`Timeout`](crate::ErrorKind::Timeout) if the device does not stop: the state is then [`State::Gone`], and
    /// the outstanding jobs' memory is leaked because the device may still write it.
    fn reset(&mut self, done: &mut Burst<Done>) -> Result<usize>;

    /// Its counters, which others may read while it works.
    fn counters(&self) -> Arc<Counters>;
}

/// Counters of one channel: one writer, any number of readers, in lines of their own.
#[derive(Debug, Default)]
pub struct Counters(CachePadded<CounterWords>);

#[derive(Debug, Default)]
struct CounterWords {
    jobs: AtomicU64,
    bytes: AtomicU64,
    failed: AtomicU64,
    refused: AtomicU64,
    retries: AtomicU64,
}

/// [`Counters`] at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct CounterValues {
    /// Jobs that came back, whatever their result.
    pub jobs: u64,
    /// Bytes that successful jobs moved or looked at.
    pub bytes: u64,
    /// Jobs that came back with an error.
    pub failed: u64,
    /// Jobs refused because their memory is not this channel's.
    pub refused: u64,
    /// Submissions that a shared queue did not accept at once.
    pub retries: u64,
}

impl Counters {
    /// For the channel alone: adds to each counter. Single writer: a load and a store, no locked instruction.
    #[inline]
    pub fn add(&self, delta: CounterValues) {
        let CounterValues { jobs, bytes, failed, refused, retries } = delta;
        for (word, delta) in [
            (&self.0.jobs, jobs),
            (&self.0.bytes, bytes),
            (&self.0.failed, failed),
            (&self.0.refused, refused),
            (&self.0.retries, retries),
        ] {
            if delta != 0 {
                word.store(word.load(Ordering::Relaxed).wrapping_add(delta), Ordering::Relaxed);
            }
        }
    }

    /// The values now.
    pub fn values(&self) -> CounterValues {
        CounterValues {
            jobs: self.0.jobs.load(Ordering::Relaxed),
            bytes: self.0.bytes.load(Ordering::Relaxed),
            failed: self.0.failed.load(Ordering::Relaxed),
            refused: self.0.refused.load(Ordering::Relaxed),
            retries: self.0.retries.load(Ordering::Relaxed),
        }
    }
}
