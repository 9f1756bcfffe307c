//! The driver's side of a virtqueue: [`SplitQueue`] and [`PackedQueue`] behind one trait.
//!
//! A queue owns what was posted (the *tokens*) until the device has used it. All that it decides by lies in memory that
//! the device can not write: the ring is written, and of what the device writes back each word is read once and checked
//! against that. A device that breaks the rules breaks the queue ([`Broken`]), and nothing else.

mod packed;
mod shadow;
mod split;
#[cfg(test)]
mod tests;

use std::fmt;

use underpass::dma::{DmaBuf, DmaSpace};
use underpass::{Error, ErrorKind, Iova, Result};

use crate::virtio_net::spec::{Features, pci};

pub use packed::PackedQueue;
pub use split::SplitQueue;

/// How a queue is set up.
#[derive(Debug, Clone, Copy)]
pub struct Setup {
    /// Entries, as written to the device's `queue_size`.
    pub size: u16,
    /// What was negotiated. The queue looks at `EVENT_IDX`, `IN_ORDER` and `INDIRECT_DESC`.
    pub features: Features,
    /// The most buffers in one [`add`](Virtqueue::add). Where it is more than one and there are indirect descriptors, the
    /// queue has a table of so many descriptors for each entry.
    pub max_chain: u16,
}

impl Setup {
    /// Descriptors in the table of each entry.
    fn table_len(&self) -> u16 {
        let indirect = self.max_chain > 1 && self.features.contains(Features::INDIRECT_DESC);
        if indirect { self.max_chain } else { 0 }
    }

    fn check(&self, packed: bool) -> Result<()> {
        if pci::queue_size_is_valid(self.size, packed) && (1..=self.size).contains(&self.max_chain) {
            return Ok(());
        }
        let why = format!("{} entries, with chains of {}", self.size, self.max_chain);
        let mend = "ask for a power of two up to 32768 (a packed ring: any number), and chains up to that";
        Err(Error::new(ErrorKind::InvalidInput, "set up a virtqueue", why).mend(mend))
    }
}

/// A piece of memory that the device reads, or writes.
#[derive(Debug, Clone, Copy)]
pub struct Buffer {
    /// Where it is for the device.
    pub iova: Iova,
    /// Its bytes.
    pub len: u32,
    /// The device writes it, else it reads it.
    pub write: bool,
}

impl Buffer {
    /// The device reads it.
    #[inline]
    pub const fn readable(iova: Iova, len: u32) -> Self {
        Self { iova, len, write: false }
    }

    /// The device writes it.
    #[inline]
    pub const fn writable(iova: Iova, len: u32) -> Self {
        Self { iova, len, write: true }
    }
}

/// Where a queue is, for the device's registers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Areas {
    /// Descriptor area, `queue_desc`.
    pub desc: Iova,
    /// Driver area, `queue_driver`.
    pub driver: Iova,
    /// Device area, `queue_device`.
    pub device: Iova,
}

/// The device broke the rules. The queue is of no use until it was [reset](Virtqueue::reset).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Broken {
    /// Which rule.
    pub why: &'static str,
}

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.why)
    }
}

impl Broken {
    const ID_OUT_OF_RANGE: Self = Self { why: "the device used a buffer id that the queue does not have" };
    const ID_NOT_POSTED: Self = Self { why: "the device used a buffer that it does not have" };
    const TOO_LONG: Self = Self { why: "the device wrote more than the buffer holds" };
    const INDEX: Self = Self { why: "the device used more buffers than it has" };
    const BACK: Self = Self { why: "the device took back that it had used buffers" };
    const ORDER: Self = Self { why: "the device used buffers out of order, though it agreed to keep it" };
}

/// The driver's side of a virtqueue. Dropping it drops the tokens: only once the device was reset.
///
/// To post is one [`add_burst`](Self::add_burst) or some [`add`](Self::add)s, one [`publish`](Self::publish), and a
/// notification of the device if it [wants one](Self::needs_notify). Later, [`take_burst`](Self::take_burst).
pub trait Virtqueue: Sized {
    /// What the queue keeps while the device has the buffers: their owner.
    type Token;

    /// Bytes of ring memory, to start at a multiple of 64.
    fn memory_len(setup: &Setup) -> usize;

    /// A queue in `memory`, whose region is mapped in `space`. Notifications by the device are disabled.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] if the setup is not one, or the memory is too small, not aligned or not mapped.
    fn new(memory: DmaBuf, space: &DmaSpace, setup: &Setup) -> Result<Self>;

    /// For the device's registers.
    fn areas(&self) -> Areas;

    /// Entries.
    fn size(&self) -> u16;

    /// How many descriptors are free: a chain needs one for each buffer, with indirect descriptors one in all.
    fn free(&self) -> u16;

    /// Posts buffers that belong together: those that the device reads, then those that it writes. The device sees them
    /// from [`publish`](Self::publish) on. Gives the token back if there is no room.
    ///
    /// # Panics
    /// If there are no buffers, or more than the setup's `max_chain`.
    #[inline]
    fn add(&mut self, token: Self::Token, buffers: &[Buffer]) -> Result<(), Self::Token> {
        match buffers {
            [_] if self.free() == 0 => Err(token),
            [buffer] => {
                let mut one = Some((token, *buffer));
                self.add_burst(1, || one.take());
                Ok(())
            }
            _ => self.add_chain(token, buffers),
        }
    }

    /// [`add`](Self::add) of more than one buffer: by a chain, or by a table if there are tables.
    ///
    /// # Panics
    /// If there is one, or more than the setup's `max_chain`.
    fn add_chain(&mut self, token: Self::Token, buffers: &[Buffer]) -> Result<(), Self::Token>;

    /// Posts one buffer after the other, as [`add`](Self::add) does, until there were `most`, there is no room, or `next`
    /// has none. Returns how many. It asks `next` only while there is room.
    fn add_burst(&mut self, most: usize, next: impl FnMut() -> Option<(Self::Token, Buffer)>) -> usize;

    /// Makes all that was added visible to the device.
    fn publish(&mut self);

    /// Whether the device wants to be notified of what was published since this was last asked.
    fn needs_notify(&mut self) -> bool;

    /// Where the next buffer will be, for [`pci::notification`].
    fn position(&self) -> u16;

    /// Calls `each` for up to `most` buffers that the device has used, with the bytes that it wrote: at most those of the
    /// writable buffers. Returns how many.
    ///
    /// # Errors
    /// What the device did wrong, once all that came before was taken; the same from then on.
    fn take_burst(&mut self, most: usize, each: impl FnMut(Self::Token, u32)) -> Result<usize, Broken>;

    /// One buffer, as [`take_burst`](Self::take_burst) has it.
    ///
    /// # Errors
    /// As [`take_burst`](Self::take_burst).
    #[inline]
    fn take_used(&mut self) -> Result<Option<(Self::Token, u32)>, Broken> {
        let mut used = None;
        self.take_burst(1, |token, written| used = Some((token, written)))?;
        Ok(used)
    }

    /// Asks the device for no notifications. They are a hint: one may come all the same.
    fn disable_notifications(&mut self);

    /// Asks the device for a notification once it has used a buffer. True if it has used one already: then there may be no
    /// notification of that one.
    #[must_use = "buffers used before this are not notified"]
    fn enable_notifications(&mut self) -> bool;

    /// Calls `each` for all tokens that the queue has, and makes the queue as new. Only once the device has stopped using
    /// it: after a reset of the device or of the queue.
    fn reset(&mut self, each: impl FnMut(Self::Token));
}

/// `len` bytes off the start of `memory`, and the padding up to the next multiple of 64.
fn carve(memory: &mut DmaBuf, len: usize) -> DmaBuf {
    let mut piece = memory.split_to(len.next_multiple_of(LINE).min(memory.len()));
    drop(piece.split_off(len));
    piece
}

/// Areas start at a line of the CPU's caches.
const LINE: usize = 64;

fn check_memory(memory: &DmaBuf, len: usize) -> Result<()> {
    if memory.len() >= len && (memory.as_ptr() as usize).is_multiple_of(LINE) {
        return Ok(());
    }
    let why = format!("it needs {len} bytes at a multiple of {LINE}, and was given {memory:?}");
    Err(Error::new(ErrorKind::InvalidInput, "set up a virtqueue", why)
        .mend("split it from a buffer at a multiple of 64, with Virtqueue::memory_len bytes"))
}

/// Takes up to `most` buffers: by runs of the common case, and one by one where a run ends. Returns how many, and what
/// the device did wrong after that.
#[inline]
fn take_in_runs<Q, T, E: FnMut(T, u32)>(
    queue: &mut Q,
    most: usize,
    mut each: E,
    run: impl Fn(&mut Q, usize, &mut E) -> usize,
    one: impl Fn(&mut Q) -> Result<Option<(T, u32)>, Broken>,
) -> (usize, Option<Broken>) {
    let mut count = 0;
    loop {
        count += run(queue, most - count, &mut each);
        if count == most {
            return (count, None);
        }
        match one(queue) {
            Ok(Some((token, written))) => each(token, written),
            Ok(None) => return (count, None),
            Err(broken) => return (count, Some(broken)),
        }
        count += 1;
    }
}
