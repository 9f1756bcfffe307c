//! Frames on their way from one engine to another.

use crossbeam::queue::ArrayQueue;

use super::peer::{Frame, Offload};
use super::rules::Hash;

/// Frames that one engine may have waiting for it.
const DEPTH: usize = 256;

/// A frame's copy, in a buffer that is used again.
#[derive(Debug, Default)]
pub(super) struct Held {
    bytes: Vec<u8>,
    offload: Offload,
    pub(super) hash: Option<Hash>,
}

impl Held {
    #[inline]
    pub(super) fn set(&mut self, frame: Frame<'_>, hash: Option<Hash>) {
        self.bytes.clear();
        self.bytes.extend_from_slice(frame.bytes);
        (self.offload, self.hash) = (frame.offload, hash);
    }

    #[inline]
    pub(super) fn frame(&self) -> Frame<'_> {
        Frame { bytes: &self.bytes, offload: self.offload }
    }
}

/// The frames for one engine's receive queue that other engines got from their peers. As many buffers as there are go
/// round between those who fill them and the one who empties them.
#[derive(Debug)]
pub(super) struct Inbox {
    full: ArrayQueue<Held>,
    free: ArrayQueue<Held>,
}

impl Inbox {
    pub(super) fn new() -> Self {
        let inbox = Self { full: ArrayQueue::new(DEPTH), free: ArrayQueue::new(DEPTH) };
        for _ in 0..DEPTH {
            inbox.give_back(Held::default());
        }
        inbox
    }

    /// False if there is no room.
    #[inline]
    pub(super) fn put(&self, frame: Frame<'_>, hash: Option<Hash>) -> bool {
        let Some(mut held) = self.free.pop() else { return false };
        held.set(frame, hash);
        // There is room for as many as there are.
        self.full.push(held).is_ok()
    }

    #[inline]
    pub(super) fn take(&self) -> Option<Held> {
        // Asked first: taking from an empty queue costs a fence.
        if self.full.is_empty() { None } else { self.full.pop() }
    }

    /// The frame is delivered.
    #[inline]
    pub(super) fn give_back(&self, held: Held) {
        // As in `put`.
        let _ = self.free.push(held);
    }

    /// Drops what waits, and returns how many frames that were.
    pub(super) fn clear(&self) -> u64 {
        let mut dropped = 0;
        while let Some(held) = self.full.pop() {
            self.give_back(held);
            dropped += 1;
        }
        dropped
    }
}
