//! Rings in DMA memory, whose other end another process or a device may have.
//!
//! Items are plain data of whole 64-bit words. They are copied, never lent: the other side may write anything at any time.
//! Positions that make no sense are an [`Error`], and an item that was overwritten in between comes out wrong: both are for
//! the caller to judge, and nothing worse can happen.
//!
//! # Layout
//! All positions are 64-bit words in this machine's byte order; each counts the items that went by since the ring was made,
//! and item *n* is in slot *n* modulo their number, which is a power of two.
//!
//! | byte | word |
//! |---|---|
//! | 0 | producers: how far slots are reserved, where there are several of them |
//! | 8 | producers: the consumers' position at 384, when it was last read, plus the capacity; where there are several |
//! | 128 | producers: how far items are written |
//! | 256 | consumers: how far items are reserved, where there are several of them |
//! | 264 | consumers: the producers' position at 128, when it was last read; where there are several |
//! | 384 | consumers: how far items are read |
//! | 512 | the slots |
//!
//! A producer writes items and then moves 128, by a Release store; a consumer reads that by an Acquire load, then the items,
//! and moves 384 likewise. The words at 0, 8, 256 and 264 are one side's own.

use std::fmt;
use std::marker::PhantomData;
use std::mem::offset_of;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use underpass_iommu::{Error, ErrorKind, Region, Result};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::index::{Amount, Mode, Multi, Refused, Run, Side, Single, View};
use crate::Burst;
use crate::dma::sealed::{Span, Spanned};
use crate::dma::{DmaBuf, DmaMemory};

#[repr(C)]
struct Header {
    producers: Side<AtomicU64>,
    consumers: Side<AtomicU64>,
}

const SLOTS: usize = size_of::<Header>();
const _: () = assert!(SLOTS == 512 && offset_of!(Header, consumers) == 256);

/// How often to yield to another thread, or process, that reserved slots before this one: for a second or so.
const PATIENCE: u32 = 1 << 20;

/// What an item may be: plain data.
pub trait Plain: FromBytes + IntoBytes + Immutable {}
impl<T: FromBytes + IntoBytes + Immutable> Plain for T {}

/// A ring in DMA memory. Clones are the same one. Its address for a device is that of its memory.
pub struct SharedRing<T> {
    memory: Arc<Memory>,
    _type: PhantomData<T>,
}

struct Memory {
    buf: DmaBuf,
    capacity: u64,
    slots: u64,
}

impl<T: Plain> SharedRing<T> {
    const WORDS: usize = size_of::<T>() / 8;

    /// How many bytes a ring for `capacity` items takes.
    ///
    /// # Panics
    /// If they are more than there are addresses for.
    pub fn bytes(capacity: usize) -> usize {
        const { assert!(Self::WORDS > 0 && size_of::<T>().is_multiple_of(8), "items are whole 64-bit words") };
        let slots = capacity.checked_next_power_of_two().and_then(|slots| slots.checked_mul(size_of::<T>()));
        slots.and_then(|slots| slots.checked_add(SLOTS)).expect("a ring that fits into memory")
    }

    /// An empty ring with room for `capacity` items at the start of `buf`, which it keeps. Whoever has the other end is
    /// told where that is, and the capacity.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] if the buffer is too short, or does not start at a multiple of 128.
    pub fn new(mut buf: DmaBuf, capacity: usize) -> Result<Self> {
        let bytes = Self::bytes(capacity);
        if buf.len() < bytes || !(buf.as_ptr() as usize).is_multiple_of(align_of::<Header>()) {
            let why =
                format!("{} bytes at +{:#x} are to hold {bytes}, aligned to 128", buf.len(), buf.offset());
            return Err(Error::new(ErrorKind::InvalidInput, "make a ring in DMA memory", why)
                .mend("split off as many bytes as `SharedRing::bytes` says, at a multiple of 128"));
        }
        buf[..bytes].fill(0);
        let slots = capacity.next_power_of_two() as u64;
        let memory = Arc::new(Memory { buf, capacity: capacity as u64, slots });
        Ok(Self { memory, _type: PhantomData })
    }

    /// The end that items go in at, if this is the only one.
    pub fn producer(&self) -> SharedProducer<T> {
        SharedProducer {
            ring: self.clone(),
            mode: Sharing::Single(Single::new(&self.memory.header().producers)),
        }
    }

    /// The end that items come out of, if this is the only one.
    pub fn consumer(&self) -> SharedConsumer<T> {
        SharedConsumer {
            ring: self.clone(),
            mode: Sharing::Single(Single::new(&self.memory.header().consumers)),
        }
    }

    /// An end that items go in at, where all producers are such.
    pub fn mp_producer(&self) -> SharedProducer<T> {
        SharedProducer { ring: self.clone(), mode: Sharing::Multi(Multi) }
    }

    /// An end that items come out of, where all consumers are such.
    pub fn mp_consumer(&self) -> SharedConsumer<T> {
        SharedConsumer { ring: self.clone(), mode: Sharing::Multi(Multi) }
    }

    /// The region that it is in: by its file descriptor, another process gets to the ring.
    pub fn region(&self) -> &Arc<Region> {
        self.memory.buf.region()
    }

    /// Where in the region it starts.
    pub fn offset(&self) -> usize {
        self.memory.buf.offset()
    }
}

/// The end of a [`SharedRing`] that items go in at.
pub struct SharedProducer<T> {
    ring: SharedRing<T>,
    mode: Sharing,
}

/// The end of a [`SharedRing`] that items come out of.
pub struct SharedConsumer<T> {
    ring: SharedRing<T>,
    mode: Sharing,
}

enum Sharing {
    Single(Single),
    Multi(Multi),
}

impl<T: Plain> SharedProducer<T> {
    /// Copies an item into the ring, or does nothing and returns false if it is full.
    ///
    /// # Errors
    /// [`ErrorKind::Device`] if the other side wrote positions that make no sense, or a producer that shares this side died
    /// while it was at it. The same goes for all operations.
    pub fn push(&mut self, item: &T) -> Result<bool> {
        self.push_bulk(std::slice::from_ref(item))
    }

    /// Copies all `items` into the ring, or none and returns false if there is no room for as many.
    pub fn push_bulk(&mut self, items: &[T]) -> Result<bool> {
        Ok(self.write(items, Amount::exactly(items.len()))? == items.len())
    }

    /// Copies as many of `items` into the ring as fit, the first ones; returns how many.
    pub fn push_burst(&mut self, items: &[T]) -> Result<usize> {
        self.write(items, Amount::up_to(items.len()))
    }

    fn write(&mut self, items: &[T], amount: Amount) -> Result<usize> {
        let memory = &self.ring.memory;
        let ring = memory.view(&memory.header().producers, &memory.header().consumers, memory.capacity);
        self.mode.transfer(&ring, amount, |run| {
            for (at, item) in (run.at..).zip(&items[..run.count as usize]) {
                let (bytes, _) = item.as_bytes().as_chunks::<8>();
                for (word, bytes) in self.ring.slot(at).iter().zip(bytes) {
                    // Relaxed: publishing orders it.
                    word.store(u64::from_ne_bytes(*bytes), Ordering::Relaxed);
                }
            }
        })
    }
}

impl<T: Plain> SharedConsumer<T> {
    /// Takes the oldest item out.
    ///
    /// # Errors
    /// [`ErrorKind::Device`], as for [`SharedProducer::push`]; the same goes for all operations.
    pub fn pop(&mut self) -> Result<Option<T>> {
        let mut item = None;
        self.read(Amount::exactly(1), |popped| item = Some(popped))?;
        Ok(item)
    }

    /// Appends the `count` oldest items to `to`, or none and returns false if there are fewer.
    ///
    /// # Panics
    /// If `to` has no room for as many.
    pub fn pop_bulk(&mut self, to: &mut Burst<T>, count: usize) -> Result<bool> {
        assert!(count <= to.room(), "{count} items do not fit, {} do", to.room());
        Ok(self.read(Amount::exactly(count), |item| to.as_vec().push(item))? == count)
    }

    /// Appends the oldest items to `to`, as many as there are and it has room for; returns how many.
    pub fn pop_burst(&mut self, to: &mut Burst<T>) -> Result<usize> {
        self.read(Amount::up_to(to.room()), |item| to.as_vec().push(item))
    }

    fn read(&mut self, amount: Amount, mut take: impl FnMut(T)) -> Result<usize> {
        let memory = &self.ring.memory;
        let ring = memory.view(&memory.header().consumers, &memory.header().producers, 0);
        self.mode.transfer(&ring, amount, |run| {
            for at in (run.at..).take(run.count as usize) {
                let mut item = T::new_zeroed();
                let (bytes, _) = item.as_mut_bytes().as_chunks_mut::<8>();
                for (word, bytes) in self.ring.slot(at).iter().zip(bytes) {
                    // Relaxed: the producers' position, read before, orders it.
                    *bytes = word.load(Ordering::Relaxed).to_ne_bytes();
                }
                take(item);
            }
        })
    }
}

impl Sharing {
    /// Reserves a run, has it copied, publishes it.
    fn transfer(
        &mut self,
        ring: &View<'_, AtomicU64>,
        amount: Amount,
        copy: impl FnOnce(Run),
    ) -> Result<usize> {
        let reserved = match self {
            Self::Single(mode) => mode.reserve(ring, amount),
            Self::Multi(mode) => mode.reserve(ring, amount),
        };
        let run = match reserved {
            Ok(run) => run,
            Err(Refused::TooFew) => return Ok(0),
            Err(Refused::Corrupt) => return Err(corrupt("its positions make no sense")),
        };
        copy(run);
        let published = match self {
            Self::Single(mode) => mode.publish(ring, run),
            Self::Multi(mode) => mode.publish(ring, run),
        };
        published.map_err(|_| corrupt("someone on this side reserved slots and never came back"))?;
        Ok(run.count as usize)
    }
}

#[cold]
fn corrupt(why: &'static str) -> Error {
    Error::new(ErrorKind::Device, "use a ring in shared memory", why)
        .mend("make the ring anew, once its other side is in order")
}

impl Memory {
    fn header(&self) -> &Header {
        #[allow(clippy::cast_ptr_alignment, reason = "`new` checked it")]
        let header = self.buf.as_ptr().cast::<Header>();
        // SAFETY: `new` checked that a header fits and is aligned; it is atomics and padding, and lives as long as self. Its
        // bytes are only ever reached as atomics: here by this reference, on the other side as such or by a device.
        unsafe { &*header }
    }

    fn view<'a>(
        &'a self,
        ours: &'a Side<AtomicU64>,
        theirs: &'a Side<AtomicU64>,
        lead: u64,
    ) -> View<'a, AtomicU64> {
        View { ours, theirs, lead, capacity: self.capacity, patience: Some(PATIENCE) }
    }
}

impl<T: Plain> SharedRing<T> {
    /// The words of the slot for item `at`.
    fn slot(&self, at: u64) -> &[AtomicU64] {
        let first = (at & (self.memory.slots - 1)) as usize * Self::WORDS;
        #[allow(clippy::cast_ptr_alignment, reason = "the buffer and the slots in it are aligned to 128")]
        let words = self.memory.buf.as_ptr().cast::<AtomicU64>();
        // SAFETY: the slot's index is below their number, and `new` checked that the buffer has as many.
        let words = unsafe { words.add(SLOTS / 8 + first) };
        // SAFETY: as above; the words are initialised, live as long as self, and are only ever reached as atomics.
        unsafe { std::slice::from_raw_parts(words, Self::WORDS) }
    }
}

impl<T> Spanned for SharedRing<T> {
    fn span(&self) -> Span {
        self.memory.buf.span()
    }
}

impl<T> DmaMemory for SharedRing<T> {}

impl<T> Clone for SharedRing<T> {
    fn clone(&self) -> Self {
        Self { memory: Arc::clone(&self.memory), _type: PhantomData }
    }
}

impl<T> fmt::Debug for SharedRing<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SharedRing(of {} in {:?})", self.memory.capacity, self.memory.buf)
    }
}

impl<T> fmt::Debug for SharedProducer<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("SharedProducer").field(&self.ring).finish()
    }
}

impl<T> fmt::Debug for SharedConsumer<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("SharedConsumer").field(&self.ring).finish()
    }
}

#[cfg(test)]
#[path = "shared_tests.rs"]
mod tests;
