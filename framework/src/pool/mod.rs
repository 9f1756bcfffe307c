//! Pools of packet buffers, all of one size, in huge pages.
//!
//! Free buffers are in a ring that all threads share. A thread with a [`Slot`] also has a cache of them in each pool, and
//! goes to the ring for many at a time, when its cache is empty or full.
//!
//! # Why this module is unsafe, and what makes it sound
//! It hands out [`Packet`]s, which are pointers into memory that it owns. The invariant is the one of `packet`: each buffer
//! is either in the pool's free list or has exactly one `Packet`. A free buffer has no chain behind it.
//!
//! The memory, of buffers and metadata alike, goes when the last handle of the pool is dropped *and* every buffer is home;
//! with one still out it is leaked. Packets can come home on other threads at that very moment, so it has to be shown
//! that nobody touches the memory any more:
//! - Taking a buffer needs a handle, and all that was done with a handle happens before the drop of the last one.
//! - A thread that gives its slot back finds the pool in a list, from which the last handle's drop removes it first, under
//!   the same lock.
//! - What is left are threads that put buffers back. The last access to the pool that each makes is the Release store (of
//!   a cache's length, or of the ring's tail) by which its buffers count as home. The drop of the last handle reads these by
//!   Acquire loads, in an order in which no buffer counts twice (`FreeList::home`). If it finds all of them, it has
//!   read the last store of each thread, and everything before that has happened.

mod free;
mod reclaim;
mod slot;

use std::fmt;
use std::mem::MaybeUninit;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crossbeam::utils::CachePadded;
use underpass_iommu::{Error, ErrorKind, PageSize, Region, Result};

use self::free::FreeList;
pub use self::reclaim::Reclaim;
pub use self::slot::Slot;
use crate::Burst;
use crate::dma::DmaBuf;
use crate::packet::{Meta, Packet};

/// Bytes free before a packet's in a fresh buffer, for headers to be put in front.
pub const HEADROOM: u32 = 128;

/// A pool of packet buffers. A handle: clones name the same pool.
///
/// The pool must outlive its packets: whoever drops the last handle while packets are out gets an error in the log,
/// with their number, and the memory stays allocated for the rest of the process.
#[derive(Clone)]
pub struct Pool(Arc<Owner>);

/// The last one dropped decides what becomes of the memory.
struct Owner(NonNull<Shared>);

// SAFETY: Shared is Sync.
unsafe impl Send for Owner {}
// SAFETY: Shared is Sync.
unsafe impl Sync for Owner {}

/// What handles and packets share.
pub(crate) struct Shared {
    free: FreeList<Free>,
    /// The address of the first buffer's metadata. The others' follow, within `meta_bytes`, a power of two, which are all
    /// this pool's.
    first_meta: usize,
    meta_bytes: usize,
    /// Whether a packet of this pool ever had a chain behind it.
    chained: AtomicBool,
    exhausted: CachePadded<AtomicU64>,
    name: String,
    buffer_len: u32,
    buffers: DmaBuf,
    /// Of the metadata. No handle to it leaves, so that no device maps it.
    _meta: DmaBuf,
}

/// A buffer without a packet.
#[derive(Clone, Copy)]
#[repr(transparent)]
struct Free(NonNull<Meta>);

// SAFETY: whoever has it owns the buffer.
unsafe impl Send for Free {}

impl Shared {
    /// Takes buffers back.
    ///
    /// # Safety
    /// The buffers are of the pool, without chains, and there is no `Packet` of any of them any more.
    #[inline]
    unsafe fn put(pool: NonNull<Self>, buffers: &[Free]) {
        // SAFETY: a pool lives as long as one of its buffers is not home. It may be gone once they are, when `put` returns.
        let free = &unsafe { pool.as_ref() }.free;
        // SAFETY: the slot is this thread's, and a pool has room for its own buffers.
        unsafe { free.put(slot::current(), buffers) };
    }

    /// One of its packets is about to get a chain behind it.
    #[inline]
    pub(crate) fn chain_begins(&self) {
        // Relaxed: a thread that gets the packet later sees it by whatever hands the packet over. Read first, so that the
        // line stays shared.
        if !self.chained.load(Ordering::Relaxed) {
            self.chained.store(true, Ordering::Relaxed);
        }
    }

    /// Whether all packets are of this pool and of one segment. As long as none of the pool ever had a chain, their
    /// addresses tell, and no metadata are read. False if it takes a closer look.
    #[inline]
    fn has_all(&self, packets: &[Packet]) -> bool {
        let distance = |packet: &Packet| packet.addr().wrapping_sub(self.first_meta);
        // One that is not below a power of two has a bit at or above it.
        let bits = packets.iter().fold(0, |bits, packet| bits | distance(packet));
        bits < self.meta_bytes && !self.chained.load(Ordering::Relaxed)
    }

    /// Takes packets back.
    ///
    /// # Safety
    /// They are of the pool, of one segment each, and given away.
    #[inline]
    unsafe fn put_packets(pool: NonNull<Self>, packets: &[Packet]) {
        // SAFETY: a Packet is a pointer to metadata, as a Free is.
        let buffers = unsafe { std::slice::from_raw_parts(packets.as_ptr().cast::<Free>(), packets.len()) };
        // SAFETY: the caller's promise.
        unsafe { Self::put(pool, buffers) };
    }

    /// Takes one buffer back.
    ///
    /// # Safety
    /// `meta` is of a pool and has no chain, and there is no `Packet` of it any more.
    #[inline]
    pub(crate) unsafe fn put_one(meta: NonNull<Meta>) {
        // SAFETY: the metadata live as long as their pool, which lives while this buffer is not home.
        let pool = unsafe { meta.as_ref() }.pool;
        // SAFETY: the caller's promise.
        unsafe { Self::put(pool, &[Free(meta)]) };
    }
}

/// How a pool is to be made.
#[derive(Debug, Clone)]
pub struct PoolBuilder {
    count: usize,
    buffer_len: u32,
    cache: usize,
    name: String,
    numa_node: Option<u32>,
}

impl PoolBuilder {
    /// Bytes in each buffer, headroom included. 2176 by default: a full Ethernet frame in one segment.
    #[must_use]
    pub fn buffer_len(mut self, bytes: u32) -> Self {
        self.buffer_len = bytes;
        self
    }

    /// Buffers that each worker keeps for itself, at most; 256 by default, 0: none.
    #[must_use]
    pub fn cache(mut self, buffers: usize) -> Self {
        self.cache = buffers;
        self
    }

    /// What it is called in messages.
    #[must_use]
    pub fn name(mut self, name: &str) -> Self {
        name.clone_into(&mut self.name);
        self
    }

    /// Asks for memory near this NUMA node.
    #[must_use]
    pub fn numa_node(mut self, node: Option<u32>) -> Self {
        self.numa_node = node;
        self
    }

    /// Makes the pool.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] for no buffers, or ones without room behind the headroom; what making a
    /// [`Region`] gives.
    pub fn build(self) -> Result<Pool> {
        let Self { count, buffer_len, cache, name, numa_node } = self;
        if count == 0 || buffer_len <= HEADROOM {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                format!("make pool {name}"),
                format!("{count} buffers of {buffer_len} bytes hold no packet"),
            )
            .mend(format!("give it at least one buffer of more than {HEADROOM} bytes")));
        }
        let allocate = |bytes: usize| {
            let mut region = Region::builder(bytes as u64);
            if let Some(node) = numa_node {
                region = region.numa_node(node);
            }
            DmaBuf::new(region.build()?)
        };
        let stride = (buffer_len as usize).next_multiple_of(64);
        // Too many for any memory is what the region says.
        let bytes = place(count - 1, stride).saturating_add(stride);
        let meta_bytes =
            size_of::<Meta>().saturating_mul(count).checked_next_power_of_two().unwrap_or(usize::MAX);
        let (buffers, meta) = (allocate(bytes)?, allocate(meta_bytes)?);
        let region = u16::try_from(buffers.region().id().index()).map_err(|_| {
            Error::new(ErrorKind::NoMemory, format!("make pool {name}"), "there are 65536 regions already")
                .mend("use fewer and larger pools and buffers")
        })?;
        // Of the regions themselves: through a reference to what is in them, they would be good for that alone.
        let first_buffer = buffers.region().as_ptr();
        #[allow(clippy::cast_ptr_alignment, reason = "a region starts at a page")]
        let first_meta = meta.region().as_ptr().cast::<Meta>();
        let shared = Box::new(Shared {
            free: FreeList::new(count, slot::SLOTS, cache.min(count)),
            first_meta: first_meta.addr().get(),
            meta_bytes,
            chained: AtomicBool::new(false),
            exhausted: CachePadded::default(),
            name,
            buffer_len,
            buffers,
            _meta: meta,
        });
        let shared = NonNull::from(Box::leak(shared));
        let pool = Pool(Arc::new(Owner(shared)));
        let buffer = |n| {
            // SAFETY: the region, which the pointer is good for, reaches to the end of the last buffer's place.
            let buffer = unsafe { first_buffer.add(place(n, stride)) };
            // SAFETY: likewise, the region of the metadata has room for `count` of them.
            let meta = unsafe { first_meta.add(n) };
            // SAFETY: memory for one, aligned; the pool owns all of it, so that nobody else uses it.
            unsafe { meta.write(Meta::new(buffer, buffer_len, region, shared)) };
            Free(meta)
        };
        let all: Vec<Free> = (0..count).map(buffer).collect();
        // SAFETY: they are new, so that there is no packet of any.
        unsafe { Shared::put(shared, &all) };
        slot::register(shared);
        Ok(pool)
    }
}

/// Where the buffer with number `n` is in a pool's memory, if each takes `stride` bytes. None reaches over the end of a
/// 2 MiB page that it has room in: without an IOMMU, the next page is somewhere else.
fn place(n: usize, stride: usize) -> usize {
    const PAGE: usize = PageSize::Size2M.bytes() as usize;
    match PAGE / stride {
        0 => n.saturating_mul(stride),
        in_a_page => (n / in_a_page).saturating_mul(PAGE).saturating_add(n % in_a_page * stride),
    }
}

impl Pool {
    /// A builder for a pool of `count` buffers.
    pub fn builder(count: usize) -> PoolBuilder {
        PoolBuilder {
            count,
            buffer_len: 2048 + HEADROOM,
            cache: 256,
            name: "packets".to_owned(),
            numa_node: None,
        }
    }

    #[inline]
    fn shared(&self) -> &Shared {
        // SAFETY: it lives as long as a handle does.
        unsafe { self.0.0.as_ref() }
    }

    /// An empty packet, with [`HEADROOM`] before its bytes; `None`, and counted, if no buffer is to be had.
    #[inline]
    pub fn alloc(&self) -> Option<Packet> {
        let mut one = [MaybeUninit::uninit()];
        if self.take(&mut one) == 0 {
            self.missed(1);
            return None;
        }
        let [packet] = one;
        // SAFETY: it was taken.
        let mut packet: Packet = unsafe { packet.assume_init() };
        packet.renew();
        Some(packet)
    }

    /// Appends up to `count` empty packets to `into`, as many as it has room for and buffers are to be had, and returns how
    /// many. They have [`HEADROOM`] before their bytes. Buffers that are not to be had are counted.
    #[inline]
    pub fn alloc_burst(&self, count: usize, into: &mut Burst<Packet>) -> usize {
        let (before, count) = (into.len(), count.min(into.room()));
        let taken = self.alloc_raw(count, into);
        if taken < count {
            self.missed(count - taken);
        }
        for packet in &mut into[before..] {
            packet.renew();
        }
        taken
    }

    /// [`alloc_burst`](Self::alloc_burst) without touching the packets: they are not empty, but as their last user left
    /// them, apart from chains. For drivers, which [`post`](Packet::post) them; a [`reset`](Packet::reset) makes one empty.
    /// Buffers that are not to be had are not counted, since a driver asks for the same ones again with every burst.
    #[inline]
    pub fn alloc_raw(&self, count: usize, into: &mut Burst<Packet>) -> usize {
        let packets = into.as_vec();
        let room = packets.spare_capacity_mut();
        let count = count.min(room.len());
        let taken = self.take(&mut room[..count]);
        let len = packets.len() + taken;
        // SAFETY: they were taken.
        unsafe { packets.set_len(len) };
        taken
    }

    /// Takes buffers for packets, which the first of `packets` are then.
    #[inline]
    fn take(&self, packets: &mut [MaybeUninit<Packet>]) -> usize {
        let (first, count) = (packets.as_mut_ptr().cast(), packets.len());
        // SAFETY: a Packet is a pointer to metadata as a Free is, and to have taken that is what it takes to be one.
        let buffers = unsafe { std::slice::from_raw_parts_mut(first, count) };
        // SAFETY: the slot is this thread's.
        unsafe { self.shared().free.get(slot::current(), buffers) }
    }

    /// Counts packets that were asked for in vain.
    #[cold]
    fn missed(&self, count: usize) {
        self.shared().exhausted.fetch_add(count as u64, Ordering::Relaxed);
    }

    /// The memory of all its buffers.
    #[inline]
    pub fn region(&self) -> &Arc<Region> {
        self.shared().buffers.region()
    }

    /// Bytes in each buffer, headroom included.
    pub fn buffer_len(&self) -> usize {
        self.shared().buffer_len as usize
    }

    /// How many buffers it has.
    pub fn capacity(&self) -> usize {
        self.shared().free.capacity()
    }

    /// How many buffers are free, those in the caches of other threads too. While others use the pool it is a moment's
    /// figure.
    pub fn available(&self) -> usize {
        self.shared().free.home().min(self.capacity())
    }

    /// How many buffers are in packets, under the same condition.
    pub fn outstanding(&self) -> usize {
        self.capacity() - self.available()
    }

    /// How many packets were asked for in vain, [raw](Self::alloc_raw) ones aside. What lies in the cache of another thread is not to be had: with a cache of
    /// `n` and `k` threads that use the pool, it takes `n * k` buffers more than are ever out at once.
    pub fn exhausted(&self) -> u64 {
        self.shared().exhausted.load(Ordering::Relaxed)
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.shared().name
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        slot::unregister(self.0);
        // SAFETY: it lives at least until it is given back below.
        let shared = unsafe { self.0.as_ref() };
        let out = shared.free.capacity() - shared.free.home();
        if out == 0 {
            // SAFETY: made by Box::leak; no handle and no packet is left, and nobody is in it (see the module).
            drop(unsafe { Box::from_raw(self.0.as_ptr()) });
            return;
        }
        tracing::error!("pool {}: {out} packets are still out: its memory is leaked", shared.name);
    }
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Pool({}: {} of {} free)", self.name(), self.available(), self.capacity())
    }
}

#[cfg(test)]
mod tests;
