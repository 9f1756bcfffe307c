//! Arrays of records that the CPU and a device use at the same time.

use std::cell::Cell;
use std::fmt;
use std::marker::PhantomData;
use std::sync::atomic::Ordering;

use underpass_iommu::{Access, Error, ErrorKind, Iova, Result, Word};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::{DmaBuf, DmaSpace};

/// An array of records that the CPU and the device both use: descriptors, completion records; with the indices of a
/// ring around it, a descriptor ring. Never lent as references: every access is an atomic one of a word, `W`, which is 64
/// bits wide unless said otherwise, so that a device that writes at the wrong moment brings wrong values, and nothing
/// worse. The device uses the same width. `Records<u16, u16>` are so many words.
///
/// One thread at a time uses it: `Send`, not `Sync`.
pub struct Records<T, W = u64> {
    buf: DmaBuf,
    iova: Iova,
    _type: PhantomData<(Cell<T>, W)>,
}

impl<T: FromBytes + IntoBytes + Immutable, W: Word> Records<T, W> {
    const WORDS: usize = size_of::<T>() / size_of::<W>();

    /// As many records as fit into `buf`, zeroed, and handed to the device for good.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] if the buffer is not mapped in `space`, or not in one piece (without an IOMMU), or is not
    /// aligned to `T` and `W`.
    pub fn new(mut buf: DmaBuf, space: &DmaSpace, access: Access) -> Result<Self> {
        const { assert!(Self::WORDS > 0 && size_of::<T>().is_multiple_of(size_of::<W>()), "not whole words") };
        let invalid =
            |why, mend| Error::new(ErrorKind::InvalidInput, "make records in DMA memory", why).mend(mend);
        let align = align_of::<T>().max(size_of::<W>());
        if !(buf.as_ptr() as usize).is_multiple_of(align) {
            return Err(invalid(
                "the buffer is not aligned for them",
                "split it at a multiple of their alignment",
            ));
        }
        buf.fill(0);
        let iova = space.hand_out(&buf, access).ok_or_else(|| {
            invalid(
                "the buffer is not mapped, or reaches over huge pages that lie apart for the device",
                "map its region in this space first; without an IOMMU, ask for fewer or smaller queues",
            )
        })?;
        Ok(Self { buf, iova, _type: PhantomData })
    }

    /// How many.
    #[inline]
    #[allow(clippy::len_without_is_empty, reason = "an empty array of records is of no use")]
    pub fn len(&self) -> usize {
        self.buf.len / size_of::<T>()
    }

    /// Where record `index` is for the device.
    ///
    /// # Panics
    /// If there is no such record.
    #[inline]
    pub fn iova(&self, index: usize) -> Iova {
        assert!(index < self.len(), "record {index} of {}", self.len());
        self.iova.wrapping_add((index * size_of::<T>()) as u64)
    }

    /// Copies `value` into record `index`. Publish it with a Release store to a handshake word, or a doorbell.
    ///
    /// # Panics
    /// If there is no such record.
    #[inline]
    pub fn write(&mut self, index: usize, value: &T) {
        let bytes = value.as_bytes().chunks_exact(size_of::<W>());
        for (word, bytes) in self.record(index).iter().zip(bytes) {
            let mut bits = [0; 8];
            bits[..size_of::<W>()].copy_from_slice(bytes);
            // Relaxed: whatever publishes the record orders it.
            W::store(word, W::from_bits(u64::from_le_bytes(bits)), Ordering::Relaxed);
        }
    }

    /// Copies record `index` out, once its handshake was read with Acquire. The device may be writing it all the same:
    /// whatever comes out is to be checked, and read once.
    ///
    /// # Panics
    /// If there is no such record.
    #[inline]
    pub fn read(&self, index: usize) -> T {
        // Zeroed and then overwritten in pieces: T is any bytes (FromBytes), and has no padding (IntoBytes).
        let mut value = T::new_zeroed();
        let bytes = value.as_mut_bytes().chunks_exact_mut(size_of::<W>());
        for (word, bytes) in self.record(index).iter().zip(bytes) {
            let bits = W::load(word, Ordering::Relaxed).to_bits().to_le_bytes();
            bytes.copy_from_slice(&bits[..size_of::<W>()]);
        }
        value
    }

    /// Sets all records to zero.
    pub fn clear(&mut self) {
        for index in 0..self.len() {
            self.write(index, &T::new_zeroed());
        }
    }

    /// The word at byte `offset` of record `index`, for a handshake.
    ///
    /// # Panics
    /// If there is no such record, or `offset` is not a multiple of the word's size inside it.
    #[inline]
    pub fn word(&self, index: usize, offset: usize) -> &W::Atomic {
        assert!(offset.is_multiple_of(size_of::<W>()), "a word at {offset}");
        &self.record(index)[offset / size_of::<W>()]
    }

    /// The words of all records, one after the other: for loops over many records, which find their memory once.
    #[inline]
    pub fn words(&self) -> &[W::Atomic] {
        let first = self.buf.ptr.as_ptr().cast::<W::Atomic>();
        // SAFETY: the records' words are inside the buffer, initialised and aligned (atomics have their words' size and
        // alignment, which `new` checked), and live as long as self. They are only ever reached as atomics: by this, and
        // by the device's side as such or as raw copies.
        unsafe { std::slice::from_raw_parts(first, self.len() * Self::WORDS) }
    }

    #[inline]
    fn record(&self, index: usize) -> &[W::Atomic] {
        assert!(index < self.len(), "record {index} of {}", self.len());
        &self.words()[index * Self::WORDS..][..Self::WORDS]
    }
}

impl<T, W> fmt::Debug for Records<T, W> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Records({:?} at {})", self.buf, self.iova)
    }
}
