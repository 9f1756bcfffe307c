//! A cache of translations: one a bus, so that a lookup shares nothing with other engines.

use super::table::Run;
use crate::{Access, Pasid};

/// Number of entries, a power of two.
const ENTRIES: usize = 128;

/// Each entry caches a run of neighbouring pages inside one 64 KiB granule.
const GRANULE_SHIFT: u32 = 16;

#[derive(Debug)]
pub(super) struct Tlb(Box<[Entry; ENTRIES]>);

/// A line of its own each, so that the index is a shift.
#[derive(Debug, Clone, Copy)]
#[repr(align(64))]
struct Entry {
    /// The device's generation when it was cached, and the PASID: every unmap or detach since makes it void.
    tag: u64,
    start: u64,
    len: u64,
    host: u64,
    access: u8,
}

impl Tlb {
    /// Empty: generation 0 is before a device's first.
    pub(super) fn new() -> Self {
        Self(Box::new([Entry { tag: 0, start: 0, len: 0, host: 0, access: 0 }; ENTRIES]))
    }

    /// Where `iova` is in this process and how many bytes follow it there, if that is cached and allows `access`.
    #[inline]
    pub(super) fn lookup(
        &self,
        generation: u64,
        pasid: Option<Pasid>,
        iova: u64,
        access: Access,
    ) -> Option<(u64, u64)> {
        let entry = &self.0[index(pasid, iova)];
        let offset = iova.wrapping_sub(entry.start);
        let hit = entry.tag == tag(generation, pasid)
            && offset < entry.len
            && entry.access & access.bits() == access.bits();
        hit.then(|| (entry.host + offset, entry.len - offset))
    }

    #[inline]
    pub(super) fn insert(&mut self, generation: u64, pasid: Option<Pasid>, iova: u64, run: Run) {
        let Run { start, end, host, access } = run;
        self.0[index(pasid, iova)] =
            Entry { tag: tag(generation, pasid), start, len: end - start, host, access };
    }
}

/// 0, which is no PASID, stands for the RID.
#[inline]
fn number(pasid: Option<Pasid>) -> u64 {
    pasid.map_or(0, |pasid| u64::from(pasid.get()))
}

/// Generations count unmaps: 44 bits of them last for years.
#[inline]
fn tag(generation: u64, pasid: Option<Pasid>) -> u64 {
    generation << 20 | number(pasid)
}

#[inline]
fn index(pasid: Option<Pasid>, iova: u64) -> usize {
    // Sources and destinations are often a power of two apart, and queues use the same addresses under neighbouring
    // PASIDs: a multiplicative hash (by 2^64 divided by the golden ratio) keeps them from sharing an entry.
    let key = (iova >> GRANULE_SHIFT) ^ (number(pasid) << 44);
    (key.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (u64::BITS - ENTRIES.ilog2())) as usize
}
