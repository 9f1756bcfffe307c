//! How a job ends: done, refused by the device, or not taken by the channel.

use std::fmt;

use super::Job;
use crate::{Access, Iova};

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
    /// A buffer's region is not mapped for this channel ([`Channel::map`](super::Channel::map)). Counted as an isolation refusal.
    NotMapped,
    /// A buffer is empty, longer than the device's maximum, or the buffers' lengths do not fit together.
    Size,
    /// An address is not aligned as the operation needs.
    Alignment,
    /// Not in a batch, or too few or too many jobs for one.
    Batch,
    /// The channel is not running ([`Channel::state`](super::Channel::state)).
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
