//! Records of DMA that an IOMMU refused.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crossbeam::queue::ArrayQueue;

use crate::{Access, Iova, Pasid};

/// Why an access was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum FaultReason {
    /// The device, or this PASID of it, is attached to no address space.
    NotAttached,
    /// Nothing is mapped at the address.
    NotMapped,
    /// It is mapped, but not for this access.
    Permission,
    /// The address is wider than the IOMMU's, or the access runs past the end of the space.
    OutOfRange,
    /// It is mapped, but the driver has not handed this memory to the device (`check=leases`).
    NotLeased,
    /// A handshake word does not lie on its own alignment or crosses a page.
    Misaligned,
    /// The device asked for a page that it may not have (PCI PRI): what it may have is in place already.
    PageRequest,
}

impl fmt::Display for FaultReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NotAttached => "no address space is attached",
            Self::NotMapped => "nothing is mapped there",
            Self::Permission => "the mapping does not allow it",
            Self::OutOfRange => "the address is out of the IOMMU's range",
            Self::NotLeased => "the driver has not handed that memory to the device",
            Self::Misaligned => "the word is misaligned",
            Self::PageRequest => "the device asked for a page that it may not have",
        })
    }
}

/// One refused access.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// The device that tried.
    pub device: Arc<str>,
    /// The PASID that it used; `None` is the device's own (RID) address space.
    pub pasid: Option<Pasid>,
    /// The first address that could not be accessed.
    pub iova: Iova,
    /// What it tried.
    pub access: Access,
    /// Why it was refused.
    pub reason: FaultReason,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {} of {} ", self.device, self.access, self.iova)?;
        match self.pasid {
            Some(pasid) => write!(f, "under PASID {pasid} ")?,
            None => write!(f, "without a PASID ")?,
        }
        write!(f, "refused: {}", self.reason)
    }
}

/// A bounded queue of fault records. A full queue drops the newest and counts it, as an IOMMU's does: a device
/// that faults without end must not fill the memory.
#[derive(Debug)]
pub struct FaultQueue {
    records: ArrayQueue<Fault>,
    dropped: AtomicU64,
}

impl FaultQueue {
    /// A queue that holds up to `capacity` records.
    ///
    /// # Panics
    /// If `capacity` is zero.
    pub fn new(capacity: usize) -> Self {
        Self { records: ArrayQueue::new(capacity), dropped: AtomicU64::new(0) }
    }

    /// Adds a record, or counts it as dropped.
    pub fn push(&self, fault: Fault) {
        if self.records.push(fault).is_err() {
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Takes the oldest record.
    pub fn pop(&self) -> Option<Fault> {
        self.records.pop()
    }

    /// How many records did not fit so far.
    pub fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_queue_counts_what_it_drops() {
        let queue = FaultQueue::new(2);
        for n in 0..5 {
            queue.push(Fault {
                device: "soft:test".into(),
                pasid: None,
                iova: Iova::new(n * 0x1000),
                access: Access::READ,
                reason: FaultReason::NotMapped,
            });
        }
        assert_eq!(queue.dropped(), 3);
        assert_eq!(
            queue.pop().unwrap().iova,
            Iova::new(0),
            "the oldest record is the one that tells the cause"
        );
        assert_eq!(queue.pop().unwrap().iova, Iova::new(0x1000));
        assert!(queue.pop().is_none());
    }
}
