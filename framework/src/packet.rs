//! Packets: an owned buffer of a [`Pool`](crate::Pool), eight bytes to move.
//!
//! # Why this module is unsafe, and what makes it sound
//! A [`Packet`] is a pointer to its metadata, which lie in memory that no device can write, apart from the bytes, which
//! devices can. The invariant: for each buffer of a pool there is either one `Packet`, or the pool has it; never
//! both, never two. So whoever has a `Packet` by `&mut` is alone with its metadata and its bytes, and a shared reference
//! only reads them. The metadata live as long as the pool, and a pool's memory is never given back before its last
//! packet came home. What the metadata say of the bytes (start and length inside the buffer) is changed only here,
//! checked.

mod offload;

use std::fmt;
use std::ptr::NonNull;

pub use self::offload::{Checksum, Transport, TxOffload};
use crate::dma::DmaMemory;
use crate::dma::sealed::{Span, Spanned};
use crate::pool::{HEADROOM, Shared};

/// One segment of a packet and, behind it, the rest of the chain. Dropping it gives each segment back to its pool.
///
/// What it says of itself (offloads, port, queue, timestamp) is in CPU-only memory: a device reaches the bytes alone.
#[repr(transparent)]
pub struct Packet(NonNull<Meta>);

/// What is known of a buffer and of the packet in it: one cache line.
#[repr(C, align(64))]
pub(crate) struct Meta {
    // Set once, by the pool.
    buffer: NonNull<u8>,
    pub(crate) pool: NonNull<Shared>,
    // The rest is the packet's.
    next: Option<Packet>,
    timestamp: u64,
    content: Content,
    rss_hash: u32,
    capacity: u32,
    region: u16,
    mss: u16,
    l3_len: u16,
    l2_len: u8,
    l4_len: u8,
}

/// What every use of a buffer says anew, in one 16-byte store.
#[derive(Clone, Copy, Default)]
#[repr(C, align(16))]
struct Content {
    /// `start + len` is at most the capacity, always.
    start: u32,
    len: u32,
    flags: u16,
    port: u16,
    queue: u16,
    vlan: u16,
}

const _: () =
    assert!(size_of::<Meta>() == 64 && size_of::<Packet>() == 8 && size_of::<Option<Packet>>() == 8);

// SAFETY: a Packet owns its metadata and bytes (module invariant), and a pool takes buffers back from any thread.
unsafe impl Send for Packet {}
// SAFETY: through a shared reference they are only read.
unsafe impl Sync for Packet {}

/// Bits of `Content::flags`.
mod flag {
    pub(super) const RSS_HASH: u16 = 1 << 0;
    pub(super) const VLAN: u16 = 1 << 1;
    pub(super) const TIMESTAMP: u16 = 1 << 2;
    /// Two bits: [`Checksum`](super::Checksum).
    pub(super) const CHECKSUM_SHIFT: u16 = 3;
    pub(super) const CHECKSUM: u16 = 3 << CHECKSUM_SHIFT;
    pub(super) const TX_IP_CHECKSUM: u16 = 1 << 5;
    pub(super) const TX_L4_CHECKSUM: u16 = 1 << 6;
    pub(super) const TX_SEGMENT: u16 = 1 << 7;
    pub(super) const TX_UDP: u16 = 1 << 8;
    pub(super) const TX_IPV6: u16 = 1 << 9;
    /// `Meta::mss` is that of the segments that were joined.
    pub(super) const JOINED: u16 = 1 << 10;
}

impl Packet {
    #[inline]
    pub(crate) fn meta(&self) -> &Meta {
        // SAFETY: the metadata live as long as the packet, and nobody changes them but by a &mut of it.
        unsafe { self.0.as_ref() }
    }

    #[inline]
    fn meta_mut(&mut self) -> &mut Meta {
        // SAFETY: as in `meta`; and self is borrowed exclusively.
        unsafe { self.0.as_mut() }
    }

    /// Makes it empty: no bytes, `headroom` before them (less if the buffer is shorter), no offloads, no chain behind it.
    #[inline]
    pub fn reset(&mut self, headroom: u32) {
        let meta = self.meta_mut();
        meta.content = Content { start: headroom.min(meta.capacity), ..Content::default() };
        drop(meta.next.take());
    }

    /// For its pool, whose buffers have room for this: [`reset`](Self::reset) to [`HEADROOM`].
    #[inline]
    pub(crate) fn renew(&mut self) {
        self.meta_mut().content = Content { start: HEADROOM, ..Content::default() };
    }

    /// For drivers: makes all of the buffer behind `headroom` (less if it is shorter) the first segment's bytes, to be
    /// handed to a device that writes them; [`received`](Self::received) says later what it wrote.
    #[inline]
    pub fn post(&mut self, headroom: u32) {
        let meta = self.meta_mut();
        meta.content.start = headroom.min(meta.capacity);
        meta.content.len = meta.capacity - meta.content.start;
    }

    /// For drivers: of a segment that was [posted](Self::post) and is back, the device wrote the first `written` bytes. The
    /// first `header` of them are the device's own words, the rest is what `queue` of `port` received. Whatever was
    /// known of offloads is forgotten. False, and nothing changes, if so much was not posted, or `written` less than `header`.
    #[inline]
    #[must_use = "a device that says so lies"]
    pub fn received(&mut self, header: u32, written: u32, port: u16, queue: u16) -> bool {
        let meta = self.meta_mut();
        let Content { start, len: posted, .. } = meta.content;
        let fits = header <= written && written <= posted;
        if fits {
            let (start, len) = (start + header, written - header);
            meta.content = Content { start, len, port, queue, ..Content::default() };
        }
        fits
    }

    /// Bytes in all segments of the chain.
    #[inline]
    pub fn len(&self) -> usize {
        self.segments().map(|segment| segment.meta().content.len as usize).sum()
    }

    /// Whether there are no bytes in any segment.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The first segment's bytes.
    #[inline]
    pub fn data(&self) -> &[u8] {
        let meta = self.meta();
        // SAFETY: start <= capacity (invariant), so that this is inside the buffer or one past its end.
        let first = unsafe { meta.buffer.add(meta.content.start as usize) };
        // SAFETY: start + len <= capacity; a region's bytes are always initialised; nobody has a mutable reference to
        // them (module invariant).
        unsafe { std::slice::from_raw_parts(first.as_ptr(), meta.content.len as usize) }
    }

    /// The first segment's bytes, to be changed.
    #[inline]
    pub fn data_mut(&mut self) -> &mut [u8] {
        let meta = self.meta_mut();
        // SAFETY: as in `data`.
        let first = unsafe { meta.buffer.add(meta.content.start as usize) };
        // SAFETY: as in `data`; and self is borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(first.as_ptr(), meta.content.len as usize) }
    }

    /// Bytes free before the first segment's.
    #[inline]
    pub fn headroom(&self) -> usize {
        self.meta().content.start as usize
    }

    /// Bytes free behind the first segment's.
    #[inline]
    pub fn tailroom(&self) -> usize {
        let meta = self.meta();
        (meta.capacity - meta.content.start - meta.content.len) as usize
    }

    /// Puts `len` bytes before the first segment's, with whatever is there, and returns them; `None` if there is less
    /// headroom.
    #[inline]
    pub fn prepend(&mut self, len: usize) -> Option<&mut [u8]> {
        if len > self.headroom() {
            return None;
        }
        let meta = self.meta_mut();
        meta.content.start -= len as u32;
        meta.content.len += len as u32;
        Some(&mut self.data_mut()[..len])
    }

    /// Puts `len` bytes behind the first segment's, with whatever is there, and returns them; `None` if there is less
    /// tail room.
    #[inline]
    pub fn append(&mut self, len: usize) -> Option<&mut [u8]> {
        if len > self.tailroom() {
            return None;
        }
        let meta = self.meta_mut();
        let before = meta.content.len as usize;
        meta.content.len += len as u32;
        Some(&mut self.data_mut()[before..])
    }

    /// Cuts `len` bytes off the first segment's front; false, and nothing changes, if it has fewer.
    #[inline]
    pub fn trim_front(&mut self, len: usize) -> bool {
        let meta = self.meta_mut();
        let fits = len <= meta.content.len as usize;
        if fits {
            meta.content.start += len as u32;
            meta.content.len -= len as u32;
        }
        fits
    }

    /// Shortens the first segment to `len` bytes; false, and nothing changes, if it has fewer.
    #[inline]
    pub fn truncate(&mut self, len: usize) -> bool {
        let meta = self.meta_mut();
        let fits = len <= meta.content.len as usize;
        if fits {
            meta.content.len = len as u32;
        }
        fits
    }

    /// The segments, this one first; of each, [`data`](Self::data) is its own bytes.
    #[inline]
    pub fn segments(&self) -> impl Iterator<Item = &Packet> {
        std::iter::successors(Some(self), |packet| packet.meta().next.as_ref())
    }

    /// The chain behind the first segment.
    #[inline]
    pub fn next(&self) -> Option<&Packet> {
        self.meta().next.as_ref()
    }

    /// The chain behind the first segment, to be changed.
    #[inline]
    pub fn next_mut(&mut self) -> Option<&mut Packet> {
        self.meta_mut().next.as_mut()
    }

    /// Takes off the chain behind the first segment.
    #[inline]
    pub fn take_next(&mut self) -> Option<Packet> {
        self.meta_mut().next.take()
    }

    /// Appends `tail`, a packet of one or more segments, behind the last segment. That is found by going through all of
    /// them: a long chain is best made from its end.
    pub fn chain(&mut self, tail: Packet) {
        let meta = self.meta_mut();
        let (mut pool, mut end) = (meta.pool, &mut meta.next);
        while let Some(segment) = end {
            let meta = segment.meta_mut();
            (pool, end) = (meta.pool, &mut meta.next);
        }
        // SAFETY: a pool lives as long as one of its packets does.
        unsafe { pool.as_ref() }.chain_begins();
        *end = Some(tail);
    }

    /// The port that received it, as its [configuration](crate::net::Config::port) numbers it.
    #[inline]
    pub fn port(&self) -> u16 {
        self.meta().content.port
    }

    /// The queue that received it.
    #[inline]
    pub fn queue(&self) -> u16 {
        self.meta().content.queue
    }

    /// The receive-side scaling hash that the device computed.
    #[inline]
    pub fn rss_hash(&self) -> Option<u32> {
        let meta = self.meta();
        (meta.content.flags & flag::RSS_HASH != 0).then_some(meta.rss_hash)
    }

    /// For drivers: the hash that the device computed.
    #[inline]
    pub fn set_rss_hash(&mut self, hash: u32) {
        let meta = self.meta_mut();
        meta.rss_hash = hash;
        meta.content.flags |= flag::RSS_HASH;
    }

    /// The VLAN tag control information that the device took out (received), or is to put in (to send).
    #[inline]
    pub fn vlan(&self) -> Option<u16> {
        let meta = self.meta();
        (meta.content.flags & flag::VLAN != 0).then_some(meta.content.vlan)
    }

    /// Sets or removes the tag control information of [`vlan`](Self::vlan).
    #[inline]
    pub fn set_vlan(&mut self, tci: Option<u16>) {
        let meta = self.meta_mut();
        meta.content.vlan = tci.unwrap_or(0);
        meta.content.flags =
            if tci.is_some() { meta.content.flags | flag::VLAN } else { meta.content.flags & !flag::VLAN };
    }

    /// When the device received it, in nanoseconds of the device's clock.
    #[inline]
    pub fn timestamp(&self) -> Option<u64> {
        let meta = self.meta();
        (meta.content.flags & flag::TIMESTAMP != 0).then_some(meta.timestamp)
    }

    /// Says when it was received.
    #[inline]
    pub fn set_timestamp(&mut self, nanoseconds: u64) {
        let meta = self.meta_mut();
        meta.timestamp = nanoseconds;
        meta.content.flags |= flag::TIMESTAMP;
    }

    /// What the device found of its checksums.
    #[inline]
    pub fn checksum(&self) -> Checksum {
        match (self.meta().content.flags & flag::CHECKSUM) >> flag::CHECKSUM_SHIFT {
            1 => Checksum::Good,
            2 => Checksum::Bad,
            3 => Checksum::Partial,
            _ => Checksum::Unknown,
        }
    }

    /// For drivers: what the device found of its checksums.
    #[inline]
    pub fn set_checksum(&mut self, checksum: Checksum) {
        let meta = self.meta_mut();
        meta.content.flags = meta.content.flags & !flag::CHECKSUM | (checksum as u16) << flag::CHECKSUM_SHIFT;
    }

    /// Bytes of payload in each of the segments that were joined to this packet, but for the last, which may have less
    /// ([`RX_LARGE`](crate::net::Offloads::RX_LARGE)): what [`TxOffload::segment`] has to be to send it on. `None` if none
    /// were joined, or an offload was [set](Self::set_tx_offload) since.
    #[inline]
    pub fn segment_size(&self) -> Option<u16> {
        let meta = self.meta();
        (meta.content.flags & flag::JOINED != 0).then_some(meta.mss)
    }

    /// For drivers: it was joined of segments with so many bytes of payload; 0 if it was not joined.
    #[inline]
    pub fn set_segment_size(&mut self, size: u16) {
        let meta = self.meta_mut();
        let joined = if size == 0 { 0 } else { flag::JOINED };
        meta.content.flags = meta.content.flags & !flag::JOINED | joined;
        meta.mss = size;
    }

    /// Whether it is one segment, and asks nothing of the device that sends it: no offload, no VLAN tag.
    #[inline]
    pub fn is_plain(&self) -> bool {
        let meta = self.meta();
        let asks = flag::VLAN | flag::TX_IP_CHECKSUM | flag::TX_L4_CHECKSUM | flag::TX_SEGMENT;
        meta.next.is_none() && meta.content.flags & asks == 0
    }

    /// What it asks of the device that sends it.
    #[inline]
    pub fn tx_offload(&self) -> Option<TxOffload> {
        let meta = self.meta();
        let has = |bit| meta.content.flags & bit != 0;
        if !has(flag::TX_IP_CHECKSUM | flag::TX_L4_CHECKSUM | flag::TX_SEGMENT) {
            return None;
        }
        Some(TxOffload {
            l2_len: meta.l2_len,
            l3_len: meta.l3_len,
            l4_len: meta.l4_len,
            ipv6: has(flag::TX_IPV6),
            transport: if has(flag::TX_UDP) { Transport::Udp } else { Transport::Tcp },
            ip_checksum: has(flag::TX_IP_CHECKSUM),
            l4_checksum: has(flag::TX_L4_CHECKSUM),
            segment: if has(flag::TX_SEGMENT) { meta.mss } else { 0 },
        })
    }

    /// Asks the device that sends it for these offloads, or for none. What a port can do was
    /// [granted](crate::net::Started::offloads) when it started; it drops and counts a packet that asks for more.
    #[inline]
    pub fn set_tx_offload(&mut self, offload: Option<TxOffload>) {
        const ALL: u16 =
            flag::TX_IP_CHECKSUM | flag::TX_L4_CHECKSUM | flag::TX_SEGMENT | flag::TX_UDP | flag::TX_IPV6;
        let meta = self.meta_mut();
        meta.content.flags &= !ALL;
        let Some(offload) = offload else { return };
        (meta.l2_len, meta.l3_len, meta.l4_len) = (offload.l2_len, offload.l3_len, offload.l4_len);
        meta.mss = offload.segment;
        meta.content.flags &= !flag::JOINED;
        for (asked, bit) in [
            (offload.ip_checksum, flag::TX_IP_CHECKSUM),
            (offload.l4_checksum, flag::TX_L4_CHECKSUM),
            (offload.segment != 0, flag::TX_SEGMENT),
            (offload.transport == Transport::Udp, flag::TX_UDP),
            (offload.ipv6, flag::TX_IPV6),
        ] {
            meta.content.flags |= if asked { bit } else { 0 };
        }
    }

    /// Gives the chain behind the first segment back, one segment after the other: it may be too long to recurse.
    #[inline(never)]
    fn free_next(&mut self) {
        let mut next = self.take_next();
        while let Some(mut segment) = next {
            next = segment.take_next();
        }
    }

    /// For pools: the address of its metadata.
    #[inline]
    pub(crate) fn addr(&self) -> usize {
        self.0.addr().get()
    }

    /// For pools: 0 for a packet of one segment of `pool`.
    #[inline]
    pub(crate) fn oddness(&self, pool: NonNull<Shared>) -> usize {
        let meta = self.meta();
        let next = meta.next.as_ref().map_or(0, |next| next.0.addr().get());
        next | (meta.pool.addr().get() ^ pool.addr().get())
    }
}

impl Spanned for Packet {
    /// The first segment's bytes.
    #[inline]
    fn span(&self) -> Span {
        let meta = self.meta();
        Span {
            region: meta.region as usize,
            address: meta.buffer.as_ptr() as u64 + u64::from(meta.content.start),
            len: meta.content.len.into(),
        }
    }
}

impl DmaMemory for Packet {}

impl Drop for Packet {
    #[inline]
    fn drop(&mut self) {
        if self.meta().next.is_some() {
            self.free_next();
        }
        // SAFETY: it has no chain any more, and as it is being dropped, no Packet.
        unsafe { Shared::put_one(self.0) };
    }
}

impl fmt::Debug for Packet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Packet")
            .field("len", &self.len())
            .field("segments", &self.segments().count())
            .field("port", &self.port())
            .field("queue", &self.queue())
            .finish_non_exhaustive()
    }
}

impl Meta {
    /// For a pool: those of an empty buffer.
    pub(crate) fn new(buffer: NonNull<u8>, capacity: u32, region: u16, pool: NonNull<Shared>) -> Self {
        Self {
            buffer,
            pool,
            next: None,
            timestamp: 0,
            content: Content::default(),
            rss_hash: 0,
            capacity,
            region,
            mss: 0,
            l3_len: 0,
            l2_len: 0,
            l4_len: 0,
        }
    }
}

#[cfg(test)]
mod tests;
