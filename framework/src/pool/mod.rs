//! Pools of packet buffers, all of one size, in huge pages.
//!
//! # Why this module is unsafe, and what makes it sound
//! It hands out [`Packet`]s, which are pointers into memory that it owns. The invariant is the one of `packet`: each buffer
//! is either in the pool's free list or has exactly one `Packet`. The memory, of buffers and metadata alike, goes only
//! when the last handle of the pool is dropped *and* every buffer is home; with one still out it is leaked.

use std::fmt;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crossbeam::queue::ArrayQueue;
use underpass_iommu::{Error, ErrorKind, Region, Result};

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
    name: String,
    free: ArrayQueue<Free>,
    memory: DmaBuf,
    buffer_len: u32,
    exhausted: AtomicU64,
    _meta: Box<[Meta]>,
}

/// A buffer without a packet.
struct Free(NonNull<Meta>);

// SAFETY: whoever has it owns the buffer.
unsafe impl Send for Free {}

impl Shared {
    /// Takes a buffer back.
    ///
    /// # Safety
    /// `meta` is of a pool, and there is no `Packet` of it any more; the caller gives it up.
    #[inline]
    pub(crate) unsafe fn put(meta: NonNull<Meta>) {
        // SAFETY: the metadata live as long as their pool, which is not given back before this buffer is home.
        let pool = unsafe { meta.as_ref() }.pool;
        // SAFETY: likewise.
        let pool = unsafe { pool.as_ref() };
        // There is room for all that the pool has.
        let _ = pool.free.push(Free(meta));
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
        let Self { count, buffer_len, name, numa_node, .. } = self;
        if count == 0 || buffer_len <= HEADROOM {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                format!("make pool {name}"),
                format!("{count} buffers of {buffer_len} bytes hold no packet"),
            )
            .mend(format!("give it at least one buffer of more than {HEADROOM} bytes")));
        }
        let stride = u64::from(buffer_len).next_multiple_of(64);
        let mut region = Region::builder(stride * count as u64);
        if let Some(node) = numa_node {
            region = region.numa_node(node);
        }
        let memory = DmaBuf::new(region.build()?)?;
        let region = u16::try_from(memory.region().id().index()).map_err(|_| {
            Error::new(ErrorKind::NoMemory, format!("make pool {name}"), "there are 65536 regions already")
        })?;
        let first = NonNull::from(&memory[0]);
        let shared = Box::into_raw(Box::new(Shared {
            name,
            free: ArrayQueue::new(count),
            memory,
            buffer_len,
            exhausted: AtomicU64::new(0),
            _meta: Box::new([]),
        }));
        let shared = NonNull::new(shared).expect("a box is not null");
        let mut meta: Box<[Meta]> = (0..count)
            .map(|n| {
                // SAFETY: n < count, so that the buffer is inside the region.
                let buffer = unsafe { first.add(n * stride as usize) };
                Meta::new(buffer, buffer_len, region, shared)
            })
            .collect();
        for meta in &mut meta {
            // SAFETY: made above, nobody else has it.
            let _ = unsafe { shared.as_ref() }.free.push(Free(NonNull::from(meta)));
        }
        // SAFETY: no packet is out yet; nobody else has it.
        unsafe { (*shared.as_ptr())._meta = meta };
        Ok(Pool(Arc::new(Owner(shared))))
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

    /// An empty packet, with [`HEADROOM`] before its bytes; `None`, and counted, if no buffer is free.
    #[inline]
    pub fn alloc(&self) -> Option<Packet> {
        let Some(Free(meta)) = self.shared().free.pop() else {
            self.shared().exhausted.fetch_add(1, Ordering::Relaxed);
            return None;
        };
        // SAFETY: the pool gave it to us.
        let mut packet = unsafe { Packet::from_meta(meta) };
        packet.reset(HEADROOM);
        Some(packet)
    }

    /// Appends up to `count` empty packets to `into`, as many as it has room for and buffers are free, and returns how
    /// many.
    #[inline]
    pub fn alloc_burst(&self, count: usize, into: &mut Burst<Packet>) -> usize {
        let count = count.min(into.room());
        let mut taken = 0;
        while taken < count
            && let Some(packet) = self.alloc()
        {
            let _ = into.push(packet);
            taken += 1;
        }
        taken
    }

    /// The memory of all its buffers.
    #[inline]
    pub fn region(&self) -> &Arc<Region> {
        self.shared().memory.region()
    }

    /// Bytes in each buffer, headroom included.
    pub fn buffer_len(&self) -> usize {
        self.shared().buffer_len as usize
    }

    /// How many buffers it has.
    pub fn capacity(&self) -> usize {
        self.shared().free.capacity()
    }

    /// How many buffers are free. While others use the pool it is a moment's figure.
    pub fn available(&self) -> usize {
        self.shared().free.len()
    }

    /// How many packets were asked for in vain.
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
        // SAFETY: no other handle exists; packets only use it by shared reference.
        let shared = unsafe { self.0.as_ref() };
        let out = shared.free.capacity() - shared.free.len();
        if out == 0 {
            // SAFETY: made by Box::into_raw; no handle and no packet is left.
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
