//! Giving many packets back at once.

use std::mem::MaybeUninit;

use super::Shared;
use crate::Burst;
use crate::packet::Packet;

impl Burst<Packet> {
    /// Gives all packets back to their pools, as [`clear`](Self::clear) does, but many at a time: those in a row that are
    /// of one pool, and of one segment each, in one operation.
    #[inline]
    pub fn free(&mut self) {
        let packets = self.as_vec();
        let (first, len) = (packets.as_ptr(), packets.len());
        // SAFETY: from here on, the packets are not the vector's.
        unsafe { packets.set_len(0) };
        // SAFETY: they are in its memory still.
        let packets = unsafe { std::slice::from_raw_parts(first, len) };
        // SAFETY: they are nobody else's.
        unsafe { release(packets) };
    }
}

/// Gathers packets that are done with, and gives them back to their pools many at a time. For whoever gets them one by
/// one: a driver that takes sent packets off its ring. Dropping it gives back what is left.
pub struct Reclaim {
    packets: [MaybeUninit<Packet>; Self::BATCH],
    len: usize,
}

impl Reclaim {
    const BATCH: usize = 32;

    /// An empty one.
    #[inline]
    pub const fn new() -> Self {
        Self { packets: [const { MaybeUninit::uninit() }; Self::BATCH], len: 0 }
    }

    /// Takes a packet.
    #[inline]
    pub fn push(&mut self, packet: Packet) {
        if self.len == Self::BATCH {
            self.flush();
        }
        self.packets[self.len].write(packet);
        self.len += 1;
    }

    /// Gives back what has been gathered.
    #[inline]
    pub fn flush(&mut self) {
        let len = std::mem::take(&mut self.len);
        let packets = &raw const self.packets[..len];
        // SAFETY: the first `len` are initialised.
        let packets = unsafe { &*(packets as *const [Packet]) };
        // SAFETY: since `len` is 0, they are nobody else's.
        unsafe { release(packets) };
    }
}

impl Extend<Packet> for Reclaim {
    #[inline]
    fn extend<I: IntoIterator<Item = Packet>>(&mut self, packets: I) {
        packets.into_iter().for_each(|packet| self.push(packet));
    }
}

impl Drop for Reclaim {
    #[inline]
    fn drop(&mut self) {
        self.flush();
    }
}

impl Default for Reclaim {
    fn default() -> Self {
        Self::new()
    }
}

impl std::fmt::Debug for Reclaim {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Reclaim({} packets)", self.len)
    }
}

/// Gives packets back to their pools.
///
/// # Safety
/// The packets are the caller's to give away: nobody uses or drops them after this.
#[inline]
unsafe fn release(packets: &[Packet]) {
    let Some(first) = packets.first() else { return };
    let pool = first.meta().pool;
    // SAFETY: a pool lives as long as one of its packets does.
    if unsafe { pool.as_ref() }.has_all(packets) {
        // SAFETY: they are all of this pool and of one segment, and given away.
        unsafe { Shared::put_packets(pool, packets) };
    } else {
        // SAFETY: the caller's promise.
        unsafe { release_runs(packets) };
    }
}

/// [`release`] of packets that are not all alike: each is looked at.
///
/// # Safety
/// As for [`release`].
#[inline(never)]
unsafe fn release_runs(mut packets: &[Packet]) {
    while let Some(first) = packets.first() {
        let pool = first.meta().pool;
        let run = packets.iter().take_while(|packet| packet.oddness(pool) == 0).count();
        if run == 0 {
            // A chain.
            // SAFETY: it is given away, and not looked at again.
            drop(unsafe { std::ptr::read(first) });
            packets = &packets[1..];
            continue;
        }
        let (now, later) = packets.split_at(run);
        // SAFETY: they are all of this pool and without chains, and given away.
        unsafe { Shared::put_packets(pool, now) };
        packets = later;
    }
}
