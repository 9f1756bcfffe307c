//! Arrays of records that the CPU and a device use at the same time.

use std::cell::Cell;
use std::fmt;
use std::marker::PhantomData;
use std::sync::atomic::{AtomicU64, Ordering};

use underpass_iommu::{Access, Error, ErrorKind, Iova, Result};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::{DmaBuf, DmaSpace};

/// An array of records that the CPU and the device both use: descriptors, completion records; with the indices of a
/// ring around it, a descriptor ring. Never lent as references: every access is an atomic one of a 64-bit word, so that a
/// device that writes at the wrong moment brings wrong values, and nothing worse.
///
/// One thread at a time uses it: `Send`, not `Sync`.
pub struct Records<T> {
    buf: DmaBuf,
    iova: Iova,
    _type: PhantomData<Cell<T>>,
}

impl<T: FromBytes + IntoBytes + Immutable> Records<T> {
    const WORDS: usize = size_of::<T>() / 8;

    /// As many records as fit into `buf`, zeroed, and handed to the device for good.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] if the buffer is not mapped in `space`, or is not aligned to `T` and to 8 bytes.
    pub fn new(mut buf: DmaBuf, space: &DmaSpace, access: Access) -> Result<Self> {
        const { assert!(size_of::<T>() > 0 && size_of::<T>().is_multiple_of(8), "records are whole 64-bit words") };
        let invalid =
            |why, mend| Error::new(ErrorKind::InvalidInput, "make records in DMA memory", why).mend(mend);
        let align = align_of::<T>().max(8);
        if !(buf.as_ptr() as usize).is_multiple_of(align) {
            return Err(invalid(
                "the buffer is not aligned for them",
                "split it at a multiple of their alignment",
            ));
        }
        buf.fill(0);
        let iova = space
            .hand_out(&buf, access)
            .ok_or_else(|| invalid("the buffer is not mapped", "map its region in this space first"))?;
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
        let words = self.words(index);
        let (bytes, _) = value.as_bytes().as_chunks::<8>();
        for (word, bytes) in words.iter().zip(bytes) {
            // Relaxed: whatever publishes the record orders it.
            word.store(u64::from_ne_bytes(*bytes), Ordering::Relaxed);
        }
    }

    /// Copies record `index` out, once its handshake was read with Acquire. The device may be writing it all the same:
    /// whatever comes out is to be checked, and read once.
    ///
    /// # Panics
    /// If there is no such record.
    #[inline]
    pub fn read(&self, index: usize) -> T {
        let mut value = T::new_zeroed();
        for (n, word) in self.words(index).iter().enumerate() {
            let bytes = word.load(Ordering::Relaxed).to_ne_bytes();
            // Zeroed and then overwritten in pieces: T is any bytes (FromBytes), and has no padding (IntoBytes).
            value.as_mut_bytes()[8 * n..8 * n + 8].copy_from_slice(&bytes);
        }
        value
    }

    /// The 64-bit word at byte `offset` of record `index`, for a handshake.
    ///
    /// # Panics
    /// If there is no such record, or `offset` is not a multiple of 8 inside it.
    #[inline]
    pub fn word(&self, index: usize, offset: usize) -> &AtomicU64 {
        assert!(offset.is_multiple_of(8), "a word at {offset}");
        &self.words(index)[offset / 8]
    }

    #[inline]
    fn words(&self, index: usize) -> &[AtomicU64] {
        assert!(index < self.len(), "record {index} of {}", self.len());
        #[allow(clippy::cast_ptr_alignment, reason = "alignment to 8 was checked in new")]
        let first = self.buf.ptr.as_ptr().cast::<AtomicU64>();
        // SAFETY: index is inside the buffer.
        let record = unsafe { first.add(index * Self::WORDS) };
        // SAFETY: the words of a record are inside the buffer, aligned and initialised, and live as long as self. They
        // are only ever reached as atomics: by this, and by the device's side as such or as raw copies.
        unsafe { std::slice::from_raw_parts(record, Self::WORDS) }
    }
}

impl<T> fmt::Debug for Records<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Records({:?} at {})", self.buf, self.iova)
    }
}
