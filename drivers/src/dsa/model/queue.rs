//! Work queues and the portals that fill them: lock-free, because several threads submit at once.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use bitfield_struct::bitfield;
use underpass::model::{Doorbell, Mailbox, Refused, Width};
use zerocopy::IntoBytes;

use super::device::Device;
use super::spec::{Descriptor, PORTAL_PAGE, Portal, SubmissionError, SwErr, SwErrBatch};

/// What an enabled queue's WQCFG says, in one word.
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub(super) struct Settings {
    #[bits(20)]
    pub(super) pasid: u32,
    pub(super) pasid_enable: bool,
    pub(super) privileged: bool,
    pub(super) dedicated: bool,
    #[bits(5)]
    pub(super) max_transfer_shift: u32,
    #[bits(4)]
    pub(super) max_batch_shift: u32,
    #[bits(4)]
    pub(super) priority: u32,
    #[bits(28)]
    __: u32,
}

/// A descriptor in a queue.
#[derive(Debug, Clone, Copy)]
pub(super) struct Entry {
    /// The descriptor; as words, because one that is aligned to 64 bytes would take twice the room.
    words: [u64; 8],
    /// Its interrupt handle is one of the message storage.
    pub(super) ims: bool,
}

impl Entry {
    #[inline]
    pub(super) fn descriptor(&self) -> Descriptor {
        zerocopy::transmute!(self.words)
    }
}

/// A work queue as portals and engines see it.
#[derive(Debug)]
pub(super) struct WorkQueue {
    entries: Mailbox<Entry>,
    /// [`Settings`].
    settings: AtomicU64,
    size: AtomicU32,
    threshold: AtomicU32,
    /// Bit n: opcode n is allowed.
    operations: AtomicU64,
}

/// Why a descriptor was not accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Refusal {
    Closed,
    WrongMode,
    Full,
}

impl WorkQueue {
    pub(super) fn new(capacity: usize) -> Self {
        Self {
            entries: Mailbox::new(capacity),
            settings: AtomicU64::default(),
            size: AtomicU32::default(),
            threshold: AtomicU32::default(),
            operations: AtomicU64::default(),
        }
    }

    /// Starts to accept descriptors. The queue is closed and empty.
    pub(super) fn open(&self, settings: Settings, size: u16, threshold: u16, operations: u64) {
        self.settings.store(settings.into_bits(), Ordering::Relaxed);
        self.size.store(size.into(), Ordering::Relaxed);
        self.threshold.store(threshold.into(), Ordering::Relaxed);
        self.operations.store(operations, Ordering::Relaxed);
        // Whoever finds the queue open sees its settings.
        self.entries.open();
    }

    /// Stops to accept descriptors; those that it holds stay.
    pub(super) fn close(&self) {
        self.entries.close();
    }

    pub(super) fn set_threshold(&self, threshold: u16) {
        self.threshold.store(threshold.into(), Ordering::Relaxed);
    }

    #[inline]
    pub(super) fn settings(&self) -> Settings {
        Settings::from_bits(self.settings.load(Ordering::Relaxed))
    }

    #[inline]
    pub(super) fn operations(&self) -> u64 {
        self.operations.load(Ordering::Relaxed)
    }

    /// The descriptors that were accepted and not yet taken. Whoever sees a descriptor taken sees the engine busy.
    #[inline]
    pub(super) fn entries(&self) -> &Mailbox<Entry> {
        &self.entries
    }

    /// Accepts a descriptor for a queue of this mode while it holds fewer than `limit` says.
    fn accept(&self, dedicated: bool, limit: &AtomicU32, entry: Entry) -> Result<(), Refusal> {
        // Before the settings are read: only those of an open queue are in force.
        if !self.entries.is_open() {
            return Err(Refusal::Closed);
        }
        if self.settings().dedicated() != dedicated {
            return Err(Refusal::WrongMode);
        }
        let limit = limit.load(Ordering::Relaxed) as usize;
        self.entries.accept(limit, entry).map_err(|refused| match refused {
            Refused::Closed => Refusal::Closed,
            Refused::Full => Refusal::Full,
        })
    }
}

/// One page of the portal BAR.
pub(super) struct PortalPage {
    device: Arc<Device>,
    wq: usize,
    portal: Portal,
    /// Descriptors of which eight-byte stores have brought only the first part, one for each 64 bytes of the page.
    partial: Mutex<Box<[Partial]>>,
}

#[derive(Debug, Clone, Copy, Default)]
struct Partial {
    words: [u64; 8],
    filled: usize,
}

impl PortalPage {
    pub(super) fn new(device: Arc<Device>, wq: usize, portal: Portal) -> Self {
        let partial = vec![Partial::default(); (PORTAL_PAGE / 64) as usize].into_boxed_slice();
        Self { device, wq, portal, partial: Mutex::new(partial) }
    }

    /// A posted descriptor: what can not be taken is dropped and reported.
    fn post(&self, words: [u64; 8]) {
        let Some(queue) = self.device.queues.get(self.wq) else { return };
        let entry = Entry { words, ims: self.is_ims() };
        let error = match queue.accept(true, &queue.size, entry) {
            Ok(()) => return,
            Err(Refusal::WrongMode) => SubmissionError::WRONG_MODE,
            Err(Refusal::Closed) => SubmissionError::WQ_DISABLED,
            Err(Refusal::Full) => SubmissionError::WQ_FULL,
        };
        self.report(error, Some(&entry.descriptor()));
    }

    fn is_ims(&self) -> bool {
        matches!(self.portal, Portal::UnlimitedIms | Portal::LimitedIms)
    }

    fn report(&self, error: SubmissionError, descriptor: Option<&Descriptor>) {
        let mut report = SwErr::new().with_error(error.0).with_wq_valid(true).with_wq(self.wq as u8);
        if let Some(descriptor) = descriptor {
            report = report
                .with_descriptor_valid(true)
                .with_opcode(descriptor.opcode())
                .with_pasid(descriptor.context.pasid())
                .with_privileged(descriptor.context.privileged());
        }
        self.device.report(report, SwErrBatch::new(), 0);
    }
}

impl Doorbell for PortalPage {
    fn post64(&self, _offset: u64, data: &[u8; 64]) {
        let mut words = [0; 8];
        words.as_mut_bytes().copy_from_slice(data);
        self.post(words);
    }

    fn enqueue64(&self, _offset: u64, data: &[u8; 64]) -> bool {
        let Some(queue) = self.device.queues.get(self.wq) else { return false };
        let mut words = [0; 8];
        words.as_mut_bytes().copy_from_slice(data);
        let limit = if self.portal.is_limited() { &queue.threshold } else { &queue.size };
        queue.accept(false, limit, Entry { words, ims: self.is_ims() }).is_ok()
    }

    fn write(&self, offset: u64, width: Width, value: u64) {
        let (slot, word) = ((offset / 64) as usize, (offset % 64 / 8) as usize);
        let mut partial = self.partial.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(partial) = partial.get_mut(slot) else { return };
        let whole = width == Width::Bits64 && offset.is_multiple_of(8);
        if !whole || (word != 0 && word != partial.filled) {
            partial.filled = 0;
            return self.report(SubmissionError::BAD_WRITE, None);
        }
        partial.words[word] = value;
        partial.filled = word + 1;
        if partial.filled == 8 {
            partial.filled = 0;
            self.post(partial.words);
        }
    }
}
