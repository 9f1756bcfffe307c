//! Room for a frame that has to be kept.

use super::{Frame, Offload};

/// Bytes that a slot has from the start. For a larger frame it grows, once.
const USUAL: usize = 2048;

/// A buffer for one frame, used again and again.
pub(super) struct Slot {
    bytes: Vec<u8>,
    offload: Offload,
}

impl Slot {
    pub(super) fn new() -> Self {
        Self { bytes: Vec::with_capacity(USUAL), offload: Offload::default() }
    }

    /// Copies a frame in, over the one before.
    #[inline]
    pub(super) fn put(&mut self, frame: Frame<'_>) {
        self.bytes.clear();
        self.bytes.extend_from_slice(frame.bytes);
        self.offload = frame.offload;
    }

    /// The frame that was put in last.
    #[inline]
    pub(super) fn frame(&self) -> Frame<'_> {
        Frame { bytes: &self.bytes, offload: self.offload }
    }
}
