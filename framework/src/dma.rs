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

use std::cell::Cell;
use std::fmt;
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use underpass_iommu::{Access, Error, ErrorKind, Ioas, Iova, Leases, Mapping, Region, Result};
use zerocopy::{FromBytes, Immutable, IntoBytes};

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

/// What one queue can address: an address space and a table from region to IOVA, so that finding a buffer's
/// IOVA is one load, and a buffer of a region that is not mapped is refused before the device sees it.
///
/// The owner keeps the order that DMA needs: it stops the device before it drops this, which unmaps.
pub struct DmaSpace {
    /// By region id: what to add to a pointer to get its IOVA, or [`NOT_MAPPED`].
    bases: Vec<u64>,
    /// For every region, as under SVA: IOVA = VA.
    identity: bool,
    leases: Option<Arc<dyn Leases>>,
    mappings: Vec<Mapping>,
    ioas: Option<Ioas>,
}

/// Not a difference of two page-aligned addresses.
const NOT_MAPPED: u64 = u64::MAX;

impl DmaSpace {
    /// A space in which nothing is mapped yet.
    pub fn new(ioas: Ioas) -> Self {
        let leases = ioas.leases();
        Self { bases: Vec::new(), identity: false, leases, mappings: Vec::new(), ioas: Some(ioas) }
    }

    /// The process's own address space (SVA): every buffer can be addressed, at its own address.
    pub fn shared_virtual() -> Self {
        Self { bases: Vec::new(), identity: true, leases: None, mappings: Vec::new(), ioas: None }
    }

    /// Maps `region`. Under SVA there is nothing to do.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`] if it is mapped already; the IOMMU's refusal.
    pub fn map(&mut self, region: &Arc<Region>, access: Access) -> Result<()> {
        let Some(ioas) = &self.ioas else { return Ok(()) };
        let id = region.id().index();
        if self.bases.get(id).is_some_and(|base| *base != NOT_MAPPED) {
            return Err(Error::new(ErrorKind::Busy, format!("map {region:?}"), "this queue maps it already")
                .mend("map each region once for each queue"));
        }
        let mapping = ioas.map(region, access)?;
        if self.bases.len() <= id {
            self.bases.resize(id + 1, NOT_MAPPED);
        }
        self.bases[id] = mapping.iova().get().wrapping_sub(region.as_ptr().as_ptr() as u64);
        self.mappings.push(mapping);
        Ok(())
    }

    /// Unmaps `region`; returns once no DMA can touch it any more.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] if it is not mapped; the IOMMU's refusal.
    pub fn unmap(&mut self, region: &Arc<Region>) -> Result<()> {
        if self.identity {
            return Ok(());
        }
        let at = self.mappings.iter().position(|m| Arc::ptr_eq(m.region(), region)).ok_or_else(|| {
            Error::new(ErrorKind::NotFound, format!("unmap {region:?}"), "this queue does not map it")
                .mend("unmap what was mapped, once")
        })?;
        self.bases[region.id().index()] = NOT_MAPPED;
        self.mappings.swap_remove(at).unmap()
    }

    /// The buffer's address for the device, or `None` if its region is not mapped here.
    #[inline]
    pub fn iova(&self, buf: &DmaBuf) -> Option<Iova> {
        let va = buf.ptr.as_ptr() as u64;
        match self.bases.get(buf.region.id().index()) {
            Some(&base) if base != NOT_MAPPED => Some(Iova::new(va.wrapping_add(base))),
            _ if self.identity => Some(Iova::new(va)),
            _ => None,
        }
    }

    /// [`iova`](Self::iova) for a buffer that goes to the device now: registers the lease where those are checked.
    /// Each is matched by one [`take_back`](Self::take_back).
    #[inline]
    pub fn hand_out(&self, buf: &DmaBuf, access: Access) -> Option<Iova> {
        let iova = self.iova(buf)?;
        if let Some(leases) = &self.leases {
            leases.grant(iova, buf.len as u64, access);
        }
        Some(iova)
    }

    /// Whether leases are checked, so that [`hand_out`](Self::hand_out) and [`take_back`](Self::take_back) do more than
    /// compute an address.
    #[inline]
    pub fn checks_leases(&self) -> bool {
        self.leases.is_some()
    }

    /// The buffer came back from the device. Where leases are checked, returns once no DMA under it is in flight.
    #[inline]
    pub fn take_back(&self, buf: &DmaBuf, access: Access) {
        if let Some(leases) = &self.leases
            && let Some(iova) = self.iova(buf)
        {
            leases.take_back(iova, buf.len as u64, access);
        }
    }

    /// The device may still write to what is mapped here and will not stop: keeps all of it mapped and
    /// allocated for the rest of the process.
    pub fn leak(self) {
        tracing::error!("a device did not stop: {} mapped regions are leaked", self.mappings.len());
        #[allow(
            clippy::mem_forget,
            reason = "the memory must outlive the device's last write, which has no time"
        )]
        std::mem::forget(self);
    }
}

impl fmt::Debug for DmaSpace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DmaSpace")
            .field("ioas", &self.ioas)
            .field("mappings", &self.mappings)
            .finish_non_exhaustive()
    }
}

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

#[cfg(test)]
mod tests {
    use underpass_iommu::soft::{Bus, SoftIommu, SoftOptions};
    use underpass_iommu::{Attachment, FaultReason, IommuBackend};

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
        assert_eq!(bus.load_u64(None, records.iova(3).wrapping_add(16)).unwrap(), 3);
        bus.store_u64(None, records.iova(3).wrapping_add(8), 9).unwrap();
        assert_eq!(records.word(3, 8).load(Ordering::Acquire), 9);
        assert_eq!(records.read(3), [1, 9, 3, 4]);
    }
}
