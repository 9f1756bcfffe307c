//! What the device tells its owner: what the driver did wrong, and what became of the frames.

use std::fmt;
use std::sync::atomic::AtomicU64;

use underpass::model::DmaFault;

/// Why the device asks for a reset: what the driver did wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Violation {
    /// The queue that it happened on, if it was one.
    pub queue: Option<u16>,
    /// The rule, as a sentence about what was found.
    pub rule: &'static str,
    /// The access that was refused, if it was one.
    pub fault: Option<DmaFault>,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(queue) = self.queue {
            write!(f, "queue {queue}: ")?;
        }
        f.write_str(self.rule)?;
        if let Some(fault) = &self.fault {
            write!(f, " ({} at {:#x}: {:?})", fault.access, fault.iova.get(), fault.reason)?;
        }
        Ok(())
    }
}

/// How often driver and device have signalled each other on a queue.
#[derive(Debug, Default)]
pub(super) struct Signals {
    pub(super) notifications: AtomicU64,
    pub(super) interrupts: AtomicU64,
}

/// What a device counts over all its queues.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(usize)]
pub enum Count {
    /// Frames that the driver sent, dropped ones included.
    TxFrames,
    /// Frames that left on the cable: segments count one by one, dropped ones do not.
    TxSent,
    /// Bytes of those.
    TxBytes,
    /// Dropped: sent, and shorter than an Ethernet header.
    TxRunts,
    /// Dropped: sent, and longer than the MTU allows without segmentation.
    TxOversize,
    /// Dropped: sent, and the checksum or segmentation that was asked for does not fit the frame's headers.
    TxMalformed,
    /// Dropped: sent while the link was down.
    TxLinkDown,
    /// Dropped: sent, and the peer could not pass it on: its cable ends nowhere, its tap is down, its disk is full.
    TxUndelivered,
    /// Dropped: taken to be sent, and its queue was reset before there was room for it.
    TxReset,
    /// Frames that the driver received.
    RxFrames,
    /// Bytes of those.
    RxBytes,
    /// Dropped: received, and not for this driver, as its filters say.
    RxFiltered,
    /// Dropped: received, and longer than the MTU or than any number of the driver's buffers.
    RxOversize,
    /// Dropped: received, and there is no queue for it.
    RxNoQueue,
    /// Dropped: received, and reset with the queue that it waited for.
    RxReset,
}

impl Count {
    /// All of them, with their names.
    pub const ALL: [(Self, &'static str); 15] = [
        (Self::TxFrames, "tx_frames"),
        (Self::TxSent, "tx_sent"),
        (Self::TxBytes, "tx_bytes"),
        (Self::TxRunts, "tx_runts"),
        (Self::TxOversize, "tx_oversize"),
        (Self::TxMalformed, "tx_malformed"),
        (Self::TxLinkDown, "tx_link_down"),
        (Self::TxUndelivered, "tx_undelivered"),
        (Self::TxReset, "tx_reset"),
        (Self::RxFrames, "rx_frames"),
        (Self::RxBytes, "rx_bytes"),
        (Self::RxFiltered, "rx_filtered"),
        (Self::RxOversize, "rx_oversize"),
        (Self::RxNoQueue, "rx_no_queue"),
        (Self::RxReset, "rx_reset"),
    ];
}
