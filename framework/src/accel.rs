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

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crossbeam::utils::CachePadded;

use crate::dma::DmaBuf;
use crate::iommu::{Access, Fault, Iova, Pasid, Region, Result, SvaToken};
use crate::{Burst, Error};

/// What a job reads: a buffer of its own, or one that is frozen for as long as anybody shares it.
#[derive(Debug)]
pub enum Source {
    /// A buffer that the job alone owns.
    Owned(DmaBuf),
    /// A read-only buffer that several jobs (and the caller) share.
    Shared(Arc<DmaBuf>),
}

impl Source {
    /// The buffer.
    #[inline]
    pub fn buf(&self) -> &DmaBuf {
        match self {
            Self::Owned(buf) => buf,
            Self::Shared(buf) => buf,
        }
    }
}

impl From<DmaBuf> for Source {
    fn from(buf: DmaBuf) -> Self {
        Self::Owned(buf)
    }
}

impl From<Arc<DmaBuf>> for Source {
    fn from(buf: Arc<DmaBuf>) -> Self {
        Self::Shared(buf)
    }
}

/// The data block that one tuple of protection information guards (T10 DIF: SBC-4, section 4.22).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DifBlock {
    /// 512 bytes.
    B512,
    /// 520 bytes.
    B520,
    /// 4096 bytes.
    B4096,
    /// 4104 bytes.
    B4104,
}

impl DifBlock {
    /// All sizes.
    pub const ALL: [Self; 4] = [Self::B512, Self::B520, Self::B4096, Self::B4104];

    /// Bytes of data in a block, without its 8 bytes of protection information.
    pub const fn bytes(self) -> usize {
        match self {
            Self::B512 => 512,
            Self::B520 => 520,
            Self::B4096 => 4096,
            Self::B4104 => 4104,
        }
    }
}

/// How protection information is made or checked: 8 bytes a block, guard (CRC-16 T10-DIF of the data),
/// application tag and reference tag, each big-endian.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(clippy::struct_excessive_bools, reason = "each is one independent bit of the descriptor")]
pub struct Dif {
    /// Size of the data blocks.
    pub block: DifBlock,
    /// Start value of the guard's CRC is all ones instead of zero.
    pub invert_crc_seed: bool,
    /// The guard is stored inverted.
    pub invert_crc_result: bool,
    /// The application tag of the first block.
    pub app_tag: u16,
    /// Bits set here are not compared; on insertion they are written as zero.
    pub app_tag_mask: u16,
    /// The application tag grows by one a block.
    pub increment_app_tag: bool,
    /// The reference tag of the first block.
    pub ref_tag: u32,
    /// The reference tag stays the same instead of growing by one a block (protection type 3).
    pub fixed_ref_tag: bool,
    /// On a check: do not look at the guard.
    pub skip_guard_check: bool,
    /// On a check: do not look at the reference tag.
    pub skip_ref_tag_check: bool,
}

impl Dif {
    /// Protection information of type 1 over blocks of this size, all tags starting from zero.
    pub const fn new(block: DifBlock) -> Self {
        Self {
            block,
            invert_crc_seed: false,
            invert_crc_result: false,
            app_tag: 0,
            app_tag_mask: 0,
            increment_app_tag: false,
            ref_tag: 0,
            fixed_ref_tag: false,
            skip_guard_check: false,
            skip_ref_tag_check: false,
        }
    }
}

/// What is to be done. Sizes come from the buffers, which must agree; a mismatch is rejected.
#[derive(Debug)]
pub enum Op {
    /// Nothing; completes.
    Nop,
    /// Completes when every job submitted to this channel before it has completed. Not inside a batch.
    Drain,
    /// Copies `src` to `dst`, which have the same length.
    Copy {
        /// Read.
        src: Source,
        /// Written.
        dst: DmaBuf,
    },
    /// Copies `len` bytes from offset `from` to offset `to` of one buffer; the two may overlap.
    CopyWithin {
        /// Read and written.
        buf: DmaBuf,
        /// Offset of the first byte read.
        from: usize,
        /// Offset of the first byte written.
        to: usize,
        /// Bytes.
        len: usize,
    },
    /// Fills `dst` with `pattern`, its low byte first, cut off at the end.
    Fill {
        /// Written.
        dst: DmaBuf,
        /// Eight bytes, repeated.
        pattern: u64,
    },
    /// Compares two buffers of the same length; [`Outcome::matched`] tells.
    Compare {
        /// Read.
        a: Source,
        /// Read.
        b: Source,
    },
    /// Compares a buffer with a pattern as [`Op::Fill`] would write it; [`Outcome::matched`] tells.
    ComparePattern {
        /// Read.
        src: Source,
        /// Eight bytes, repeated.
        pattern: u64,
    },
    /// Writes a record of where `modified` differs from `original` to `delta`, in units of 8 bytes: entries of
    /// 10 bytes, a 16-bit little-endian index of the unit and its 8 new bytes. Both sources have the same
    /// length, a multiple of 8 and at most 512 KiB. [`Outcome::matched`] is true when they are equal,
    /// [`Outcome::delta_len`] is the record's size; a record that does not fit is [`Outcome::delta_overflow`].
    CreateDelta {
        /// Read.
        original: Source,
        /// Read.
        modified: Source,
        /// Written; at least 80 bytes.
        delta: DmaBuf,
    },
    /// Applies the first `delta_len` bytes of a record made by [`Op::CreateDelta`] to `dst`.
    ApplyDelta {
        /// Read.
        delta: Source,
        /// Bytes of the record, a multiple of 10.
        delta_len: usize,
        /// Written in place; a multiple of 8 bytes and at most 512 KiB.
        dst: DmaBuf,
    },
    /// Copies `src` to two buffers of its length, whose start addresses have equal bits 11:0.
    Dualcast {
        /// Read.
        src: Source,
        /// Written.
        dst1: DmaBuf,
        /// Written.
        dst2: DmaBuf,
    },
    /// The CRC32C (RFC 3720, appendix B.4) of `src`, continued from `seed` (0 to begin; an earlier
    /// [`Outcome::crc`] to go on).
    Crc {
        /// Read.
        src: Source,
        /// The CRC so far.
        seed: u32,
    },
    /// [`Op::Copy`] and [`Op::Crc`] in one pass.
    CopyCrc {
        /// Read.
        src: Source,
        /// Written.
        dst: DmaBuf,
        /// The CRC so far.
        seed: u32,
    },
    /// Checks blocks with protection information; a wrong one is [`JobError::Dif`].
    DifCheck {
        /// Read: whole blocks of data and 8 bytes each.
        src: Source,
        /// How.
        dif: Dif,
    },
    /// Copies blocks and adds protection information to each.
    DifInsert {
        /// Read: whole blocks of data.
        src: Source,
        /// Written: the same with 8 bytes more for each block.
        dst: DmaBuf,
        /// How.
        dif: Dif,
    },
    /// Checks blocks with protection information and copies them without it.
    DifStrip {
        /// Read: whole blocks of data and 8 bytes each.
        src: Source,
        /// Written: the same with 8 bytes less for each block.
        dst: DmaBuf,
        /// How the source is checked.
        dif: Dif,
    },
    /// Checks blocks with protection information and copies them with another.
    DifUpdate {
        /// Read: whole blocks of data and 8 bytes each.
        src: Source,
        /// Written: the same length.
        dst: DmaBuf,
        /// How the source is checked.
        from: Dif,
        /// How the destination is made; its block size is the source's.
        to: Dif,
    },
    /// Writes the buffer's lines back from the CPU's caches and drops them.
    CacheFlush {
        /// Its lines are flushed; its contents stay.
        buf: DmaBuf,
    },
    /// Reads `len` bytes at an address that need not be the caller's, and looks at nothing of them: shows
    /// whether the device can reach it. The one operation that takes a bare address; reading corrupts nothing.
    Probe {
        /// The address.
        iova: Iova,
        /// Bytes, at least 1.
        len: u32,
    },
}

/// The operations by name, as bits of [`Ops`] and for the command line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs, reason = "each is documented at the Op of the same name")]
pub enum OpKind {
    Nop,
    Drain,
    Copy,
    CopyWithin,
    Fill,
    Compare,
    ComparePattern,
    CreateDelta,
    ApplyDelta,
    Dualcast,
    Crc,
    CopyCrc,
    DifCheck,
    DifInsert,
    DifStrip,
    DifUpdate,
    CacheFlush,
    Probe,
}

impl OpKind {
    /// All operations with their names on the command line.
    pub const NAMES: [(Self, &'static str); 18] = [
        (Self::Nop, "nop"),
        (Self::Drain, "drain"),
        (Self::Copy, "copy"),
        (Self::CopyWithin, "copy-within"),
        (Self::Fill, "fill"),
        (Self::Compare, "compare"),
        (Self::ComparePattern, "compare-pattern"),
        (Self::CreateDelta, "create-delta"),
        (Self::ApplyDelta, "apply-delta"),
        (Self::Dualcast, "dualcast"),
        (Self::Crc, "crc"),
        (Self::CopyCrc, "copy-crc"),
        (Self::DifCheck, "dif-check"),
        (Self::DifInsert, "dif-insert"),
        (Self::DifStrip, "dif-strip"),
        (Self::DifUpdate, "dif-update"),
        (Self::CacheFlush, "cache-flush"),
        (Self::Probe, "probe"),
    ];

    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        Self::NAMES[self as usize].1
    }
}

impl Op {
    /// Which operation it is.
    pub fn kind(&self) -> OpKind {
        match self {
            Self::Nop => OpKind::Nop,
            Self::Drain => OpKind::Drain,
            Self::Copy { .. } => OpKind::Copy,
            Self::CopyWithin { .. } => OpKind::CopyWithin,
            Self::Fill { .. } => OpKind::Fill,
            Self::Compare { .. } => OpKind::Compare,
            Self::ComparePattern { .. } => OpKind::ComparePattern,
            Self::CreateDelta { .. } => OpKind::CreateDelta,
            Self::ApplyDelta { .. } => OpKind::ApplyDelta,
            Self::Dualcast { .. } => OpKind::Dualcast,
            Self::Crc { .. } => OpKind::Crc,
            Self::CopyCrc { .. } => OpKind::CopyCrc,
            Self::DifCheck { .. } => OpKind::DifCheck,
            Self::DifInsert { .. } => OpKind::DifInsert,
            Self::DifStrip { .. } => OpKind::DifStrip,
            Self::DifUpdate { .. } => OpKind::DifUpdate,
            Self::CacheFlush { .. } => OpKind::CacheFlush,
            Self::Probe { .. } => OpKind::Probe,
        }
    }
}

/// A set of operations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Ops(u32);

impl Ops {
    /// None of them.
    pub const NONE: Self = Self(0);

    /// The set with `kind` added.
    #[must_use]
    pub const fn with(self, kind: OpKind) -> Self {
        Self(self.0 | 1 << kind as u32)
    }

    /// Whether `kind` is one of them.
    pub const fn contains(self, kind: OpKind) -> bool {
        self.0 & 1 << kind as u32 != 0
    }

    /// The operations, in the order of [`OpKind::NAMES`].
    pub fn iter(self) -> impl Iterator<Item = OpKind> {
        OpKind::NAMES.into_iter().map(|(kind, _)| kind).filter(move |kind| self.contains(*kind))
    }
}

/// One piece of work, with a number of the caller's that comes back with it.
#[derive(Debug)]
pub struct Job {
    /// What to do.
    pub op: Op,
    /// The caller's own; the channel does not look at it.
    pub tag: u64,
    /// Start only after every earlier job *of the same batch* has completed; and if one of those failed, do
    /// not start at all ([`JobError::Abandoned`]).
    pub fence: bool,
}

impl Job {
    /// A job with the tag 0 and no fence.
    pub const fn new(op: Op) -> Self {
        Self { op, tag: 0, fence: false }
    }

    /// The same job with this tag.
    #[must_use]
    pub fn tag(mut self, tag: u64) -> Self {
        self.tag = tag;
        self
    }

    /// Copies `src` to `dst`.
    pub fn copy(src: impl Into<Source>, dst: DmaBuf) -> Self {
        Self::new(Op::Copy { src: src.into(), dst })
    }

    /// Fills `dst` with `pattern`.
    pub fn fill(dst: DmaBuf, pattern: u64) -> Self {
        Self::new(Op::Fill { dst, pattern })
    }

    /// Computes the CRC32C of `src`.
    pub fn crc(src: impl Into<Source>, seed: u32) -> Self {
        Self::new(Op::Crc { src: src.into(), seed })
    }
}

/// What a finished job found out. Fields that its operation does not have are zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Outcome {
    /// The comparison held: the buffers (or buffer and pattern) are equal. True for other operations.
    pub matched: bool,
    /// The delta record did not fit; [`Outcome::delta_len`] is what was written.
    pub delta_overflow: bool,
    /// The CRC32C.
    pub crc: u32,
    /// Size of the delta record, in bytes.
    pub delta_len: u32,
    /// Where a comparison failed: an offset at or before the first difference, in bytes.
    pub mismatch_at: u32,
}

/// Why a job did not finish. Its buffers have come back all the same.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum JobError {
    /// The device was refused an access, at this address, after completing so many bytes.
    PageFault {
        /// The address (rounded down to its page by some devices).
        iova: Iova,
        /// What it tried.
        access: Access,
        /// Bytes that were done.
        completed: u32,
    },
    /// Protection information was wrong, after so many good bytes of the source.
    Dif {
        /// Bytes of the source before the bad block.
        completed: u32,
        /// The guard did not match.
        guard: bool,
        /// The application tag did not match.
        app_tag: bool,
        /// The reference tag did not match.
        ref_tag: bool,
    },
    /// An earlier job of the batch failed and this one was fenced behind it; it was not started.
    Abandoned,
    /// The device refused the job: the status word, and what the specification says of it.
    Refused {
        /// The status.
        status: u8,
        /// What it means.
        why: &'static str,
    },
    /// What the device answered makes no sense.
    Lied {
        /// What is wrong with it.
        why: &'static str,
    },
    /// The channel was reset before the job finished; what of it was done is not known.
    Reset,
}

impl fmt::Display for JobError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PageFault { iova, access, completed } => {
                write!(f, "the IOMMU refused a {access} at {iova}, after {completed} bytes")
            }
            Self::Dif { completed, guard, app_tag, ref_tag } => write!(
                f,
                "protection information is wrong after {completed} bytes (guard {guard}, application tag \
                 {app_tag}, reference tag {ref_tag})"
            ),
            Self::Abandoned => f.write_str("not started: an earlier job of the batch failed"),
            Self::Refused { status, why } => write!(f, "the device refused it: status {status:#04x}, {why}"),
            Self::Lied { why } => write!(f, "the device's answer makes no sense: {why}"),
            Self::Reset => f.write_str("the channel was reset before it finished"),
        }
    }
}

impl std::error::Error for JobError {}

/// A job that came back, with its buffers.
// The job comes first, so that it is copied in the same 16-byte pieces wherever it goes: loads that straddle two recent
// stores wait for both, which doubled the cost of a poll.
#[derive(Debug)]
#[repr(C)]
pub struct Done {
    /// The job as it was submitted.
    pub job: Job,
    /// How it ended.
    pub result: Result<Outcome, JobError>,
}

/// Why a channel did not take a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Reason {
    /// As many jobs are outstanding as fit: poll, then try again.
    Full,
    /// The channel does not do this operation.
    Unsupported,
    /// A buffer's region is not mapped for this channel ([`Channel::map`]). Counted as an isolation refusal.
    NotMapped,
    /// A buffer is empty, longer than the device's maximum, or the buffers' lengths do not fit together.
    Size,
    /// An address is not aligned as the operation needs.
    Alignment,
    /// Not in a batch, or too few or too many jobs for one.
    Batch,
    /// The channel is not running ([`Channel::state`]).
    NotRunning,
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Full => "the queue is full; poll for completions first",
            Self::Unsupported => "the device does not do this operation",
            Self::NotMapped => "a buffer's memory is not mapped for this queue; map its region first",
            Self::Size => "a size is zero, over the device's maximum, or does not fit the other buffer's",
            Self::Alignment => "an address is not aligned as the operation needs",
            Self::Batch => "it can not be in a batch of this size",
            Self::NotRunning => "the queue is not running; reset it",
        })
    }
}

/// A job that was not taken, and why. It is the caller's again, unchanged.
#[derive(Debug)]
pub struct Rejected {
    /// The job.
    pub job: Job,
    /// Why.
    pub why: Reason,
}

impl fmt::Display for Rejected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the job ({}) was not taken: {}", self.job.op.kind().name(), self.why)
    }
}

impl std::error::Error for Rejected {}

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
