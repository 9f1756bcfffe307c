//! Buffers and records in DMA memory, and which of them one queue can address.
//!
//! # Why this module is unsafe, and what makes it sound
//! A region's bytes are reached through raw pointers, because a device shares them. The invariant: a region is
//! claimed once, by the first [`DmaBuf`] made of it; every byte belongs from then on to exactly one `DmaBuf` (or to
//! the [`Records`] made from one), since splitting is the only way to get another. So a `&mut [u8]` from an
//! exclusively borrowed buffer overlaps no other reference. Memory that the CPU and the device use *at the same
//! time* (records) is never a reference: it is read and written by raw copies and atomics alone. That the
//! device leaves a buffer alone once the driver gave it back is the device's part; `check=leases` proves it for a
//! software device.

mod pages;
mod records;
mod space;

use std::fmt;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::Arc;

use underpass_iommu::{Error, ErrorKind, PageSize, Region, Result};

pub use self::records::Records;
pub use self::space::{DmaSpace, View};

/// Memory of a region that has one owner, and so can be handed to a device: a [`DmaBuf`], or the bytes of a
/// [`Packet`](crate::Packet)'s first segment.
///
/// Only this crate implements it: an address that a device gets comes from whoever owns the memory.
pub trait DmaMemory: sealed::Spanned {}

pub(crate) mod sealed {
    /// Where some memory is.
    #[derive(Debug, Clone, Copy)]
    pub struct Span {
        /// The region's [id](underpass_iommu::Region::id).
        pub region: usize,
        /// The first byte's address in this process.
        pub address: u64,
        /// Bytes.
        pub len: u64,
    }

    pub trait Spanned {
        fn span(&self) -> Span;
    }
}

impl sealed::Spanned for DmaBuf {
    #[inline]
    fn span(&self) -> sealed::Span {
        sealed::Span {
            region: self.region.id().index(),
            address: self.ptr.as_ptr() as u64,
            len: self.len as u64,
        }
    }
}

impl DmaMemory for DmaBuf {}

/// The first offset in a region, from `at` on, from which `len` bytes lie in one page of 2 MiB; `at` where no such page holds as
/// much.
///
/// What a device is to see in one piece is best placed so: without an IOMMU, the next page is somewhere else.
#[inline]
pub const fn in_one_page(at: usize, len: usize) -> usize {
    const PAGE: usize = PageSize::Size2M.bytes() as usize;
    if len > PAGE || at % PAGE + len <= PAGE { at } else { at.next_multiple_of(PAGE) }
}

/// An owned piece of a [`Region`]: memory that can be handed to a device.
pub struct DmaBuf {
    region: Arc<Region>,
    ptr: NonNull<u8>,
    len: usize,
}

// SAFETY: a DmaBuf owns its bytes (module invariant), which are plain memory, and a Region is Send and Sync.
unsafe impl Send for DmaBuf {}
// SAFETY: through a shared reference a DmaBuf only gives out shared slices.
unsafe impl Sync for DmaBuf {}

impl DmaBuf {
    /// The whole of `region` as one buffer, to be split as needed.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`] if a buffer was made of this region before, or if it came by file descriptor: then others
    /// reach its bytes too, and no part of it is anybody's alone.
    pub fn new(region: Arc<Region>) -> Result<Self> {
        if !region.claim() {
            return Err(Error::new(
                ErrorKind::Busy,
                "make a buffer of a region",
                "its memory has an owner already, or came by file descriptor and is shared",
            )
            .mend("split the buffer that exists, or build a region of its own"));
        }
        let (ptr, len) = (region.as_ptr(), region.len() as usize);
        Ok(Self { region, ptr, len })
    }

    /// A buffer of `len` bytes in a region of its own, of the largest pages that suit.
    pub fn allocate(len: usize) -> Result<Self> {
        let mut buf = Self::new(Region::builder(len as u64).build()?)?;
        buf.len = len;
        Ok(buf)
    }

    /// The region that it is a piece of.
    #[inline]
    pub fn region(&self) -> &Arc<Region> {
        &self.region
    }

    /// Length in bytes.
    #[inline]
    #[allow(clippy::len_without_is_empty, reason = "the slice that it derefs to has is_empty")]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Offset of its first byte in the region.
    pub fn offset(&self) -> usize {
        self.ptr.as_ptr() as usize - self.region.as_ptr().as_ptr() as usize
    }

    /// Splits off the bytes from `at` on; `self` keeps those before.
    ///
    /// # Panics
    /// If `at` is past the end.
    #[must_use = "the bytes split off are lost to the region when this is dropped"]
    pub fn split_off(&mut self, at: usize) -> Self {
        assert!(at <= self.len, "split at {at} of a buffer of {} bytes", self.len);
        // SAFETY: at <= len, so the result points into the same region or one past its end.
        let ptr = unsafe { self.ptr.add(at) };
        let len = std::mem::replace(&mut self.len, at) - at;
        Self { region: Arc::clone(&self.region), ptr, len }
    }

    /// Splits off the first `at` bytes; `self` keeps those after.
    ///
    /// # Panics
    /// If `at` is past the end.
    #[must_use = "the bytes split off are lost to the region when this is dropped"]
    pub fn split_to(&mut self, at: usize) -> Self {
        let rest = self.split_off(at);
        std::mem::replace(self, rest)
    }

    /// Joins `next` back on, if it starts where `self` ends; else gives it back.
    #[allow(clippy::result_large_err, reason = "the buffer itself comes back")]
    pub fn join(&mut self, next: Self) -> Result<(), Self> {
        let adjacent = Arc::ptr_eq(&self.region, &next.region)
            && self.ptr.as_ptr() as usize + self.len == next.ptr.as_ptr() as usize;
        if !adjacent {
            return Err(next);
        }
        self.len += next.len;
        Ok(())
    }

    /// Cuts the buffer into pieces of `len` bytes; a shorter rest is dropped.
    ///
    /// # Panics
    /// If `len` is zero.
    pub fn into_chunks(mut self, len: usize) -> Vec<Self> {
        assert_ne!(len, 0, "chunks of no bytes");
        let mut chunks = Vec::with_capacity(self.len / len);
        while self.len >= len {
            chunks.push(self.split_to(len));
        }
        chunks
    }

    /// Freezes it into the read-only form that several jobs can share. `Arc::try_unwrap` gets it back.
    pub fn freeze(self) -> Arc<Self> {
        Arc::new(self)
    }

    /// The address of its first byte in this process.
    #[inline]
    pub fn as_ptr(&self) -> *const u8 {
        self.ptr.as_ptr()
    }
}

impl Deref for DmaBuf {
    type Target = [u8];
    #[inline]
    fn deref(&self) -> &[u8] {
        // SAFETY: ptr and len lie inside the region, which self keeps mapped; nobody else has a mutable
        // reference to these bytes (module invariant), and a region's bytes are always initialised.
        unsafe { std::slice::from_raw_parts(self.ptr.as_ptr(), self.len) }
    }
}

impl DerefMut for DmaBuf {
    #[inline]
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in deref; and self is borrowed exclusively, so no other reference to these bytes exists.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.as_ptr(), self.len) }
    }
}

impl fmt::Debug for DmaBuf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DmaBuf({} bytes at +{:#x} of {:?})", self.len, self.offset(), self.region)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;

    use underpass_iommu::soft::{Bus, SoftIommu, SoftOptions};
    use underpass_iommu::{Access, Attachment, FaultReason, IommuBackend};

    use super::*;

    fn space(options: SoftOptions) -> (DmaSpace, Bus, Attachment) {
        let iommu = SoftIommu::new(options);
        let device = iommu.device("soft:test");
        let ioas = iommu.alloc_ioas().unwrap();
        let attachment = ioas.attach(&device, None).unwrap();
        (DmaSpace::new(ioas), device.bus(), attachment)
    }

    #[test]
    fn pieces_of_a_buffer_are_disjoint_and_join_again() {
        let mut buf = DmaBuf::allocate(10_000).unwrap();
        assert!(DmaBuf::new(Arc::clone(buf.region())).is_err(), "the region has an owner");
        let mut tail = buf.split_off(6_000);
        let head = buf.split_to(1_000);
        assert_eq!((head.len(), buf.len(), tail.len()), (1_000, 5_000, 4_000));
        assert_eq!((head.offset(), buf.offset(), tail.offset()), (0, 1_000, 6_000));
        buf.fill(1);
        tail.fill(2);
        assert!(head.iter().all(|b| *b == 0));
        let mut head = head;
        let tail = head.join(tail).unwrap_err();
        head.join(buf).unwrap();
        head.join(tail).unwrap();
        assert_eq!(head.len(), 10_000);
        assert_eq!(head[5_999..6_001], [1, 2]);
        assert_eq!(head.into_chunks(4_096).iter().map(DmaBuf::offset).collect::<Vec<_>>(), [0, 4_096]);
    }

    #[test]
    fn what_fits_into_a_page_does_not_reach_over_its_end() {
        const PAGE: usize = 2 << 20;
        assert_eq!(in_one_page(0, PAGE), 0);
        assert_eq!(in_one_page(1, PAGE), PAGE);
        assert_eq!(in_one_page(PAGE - 64, 64), PAGE - 64);
        assert_eq!(in_one_page(PAGE - 64, 65), PAGE);
        assert_eq!(in_one_page(3 * PAGE - 1, 2), 3 * PAGE);
        assert_eq!(in_one_page(64, PAGE + 1), 64, "fits into none");
    }

    #[test]
    fn only_buffers_of_mapped_regions_have_an_address() {
        let (mut space, mut bus, _attachment) = space(SoftOptions::default());
        let (mut mine, other) = (DmaBuf::allocate(8_192).unwrap(), DmaBuf::allocate(8_192).unwrap());
        space.map(mine.region(), Access::READ_WRITE).unwrap();
        assert_eq!(space.map(mine.region(), Access::READ).unwrap_err().kind(), ErrorKind::Busy);
        assert!(space.iova(&other).is_none());
        let part = mine.split_off(5_000);
        bus.write(None, space.iova(&part).unwrap(), b"device").unwrap();
        assert_eq!(&part[..6], b"device");
        let (region, iova) = (Arc::clone(part.region()), space.iova(&part).unwrap());
        space.unmap(&region).unwrap();
        assert!(space.iova(&part).is_none());
        assert_eq!(space.unmap(&region).unwrap_err().kind(), ErrorKind::NotFound);
        assert_eq!(bus.write(None, iova, b"x").unwrap_err().reason, FaultReason::NotMapped);
    }

    #[test]
    fn a_buffer_can_be_reached_between_handing_out_and_taking_back_only() {
        let (mut space, mut bus, _attachment) =
            space(SoftOptions { check_leases: true, ..SoftOptions::default() });
        let buf = DmaBuf::allocate(4_096).unwrap();
        space.map(buf.region(), Access::READ_WRITE).unwrap();
        let iova = space.iova(&buf).unwrap();
        assert_eq!(bus.write(None, iova, b"x").unwrap_err().reason, FaultReason::NotLeased);
        assert_eq!(space.hand_out(&buf, Access::WRITE), Some(iova));
        bus.write(None, iova, b"x").unwrap();
        space.take_back(&buf, Access::WRITE);
        assert_eq!(bus.write(None, iova, b"x").unwrap_err().reason, FaultReason::NotLeased);
    }

    #[test]
    fn records_are_seen_by_both_sides() {
        let (mut space, mut bus, _attachment) = space(SoftOptions::default());
        let mut buf = DmaBuf::allocate(4_096).unwrap();
        assert!(
            Records::<[u64; 4]>::new(buf.split_to(64), &space, Access::READ_WRITE).is_err(),
            "not mapped"
        );
        space.map(buf.region(), Access::READ_WRITE).unwrap();
        assert!(Records::<[u64; 4]>::new(buf.split_to(65).split_off(1), &space, Access::READ_WRITE).is_err());
        let buf = buf.split_off(63);
        let mut records = Records::<[u64; 4]>::new(buf, &space, Access::READ_WRITE).unwrap();
        assert_eq!(records.len(), (4_096 - 192) / 32);
        records.write(3, &[1, 2, 3, 4]);
        assert_eq!(bus.load::<u64>(None, records.iova(3).wrapping_add(16)).unwrap(), 3);
        bus.store(None, records.iova(3).wrapping_add(8), 9_u64).unwrap();
        assert_eq!(records.word(3, 8).load(Ordering::Acquire), 9);
        assert_eq!(records.read(3), [1, 9, 3, 4]);
        records.clear();
        assert_eq!(records.read(3), [0; 4]);
    }

    #[test]
    fn records_of_narrow_words_are_aligned_to_them_only() {
        let (mut space, mut bus, _attachment) = space(SoftOptions::default());
        let mut buf = DmaBuf::allocate(4_096).unwrap();
        space.map(buf.region(), Access::READ_WRITE).unwrap();
        let indices = Records::<u16, u16>::new(buf.split_to(4), &space, Access::READ_WRITE).unwrap();
        let mut elements =
            Records::<[u32; 2], u32>::new(buf.split_to(24), &space, Access::READ_WRITE).unwrap();
        assert!(Records::<u64>::new(buf, &space, Access::READ_WRITE).is_err(), "at 4 modulo 8");
        assert_eq!((indices.len(), elements.len()), (2, 3));
        elements.write(2, &[7, 0x1234_5678]);
        assert_eq!(bus.load::<u32>(None, elements.iova(2).wrapping_add(4)).unwrap(), 0x1234_5678);
        bus.store(None, indices.iova(1), 0xabcd_u16).unwrap();
        assert_eq!((indices.read(0), indices.read(1)), (0, 0xabcd));
        bus.store_all(None, elements.iova(0), &[1_u32, 2, 3]).unwrap();
        assert_eq!((elements.read(0), elements.read(1)), ([1, 2], [3, 0]));
    }
}
