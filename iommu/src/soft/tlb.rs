//! A cache of translations: one a bus, so that a lookup shares nothing with other engines.

use super::table::Run;
use crate::{Access, Pasid};

/// Number of entries, a power of two.
const ENTRIES: usize = 128;

/// Each entry caches a run of neighbouring pages inside one 64 KiB granule.
const GRANULE_SHIFT: u32 = 16;

#[derive(Debug)]
pub(super) struct Tlb(Box<[Entry; ENTRIES]>);

#[derive(Debug, Clone, Copy)]
struct Entry {
    /// The device's generation when it was cached: every unmap or detach since makes it void.
    generation: u64,
    run: Run,
    pasid: u32,
}

impl Tlb {
    /// Empty: generation 0 is before a device's first.
    pub(super) fn new() -> Self {
        let run = Run { start: 0, end: 0, host: 0, access: 0 };
        Self(Box::new([Entry { generation: 0, run, pasid: 0 }; ENTRIES]))
    }

    /// The run that holds `iova`, if it is cached and allows `access`.
    #[inline]
    pub(super) fn lookup(
        &self,
        generation: u64,
        pasid: Option<Pasid>,
        iova: u64,
        access: Access,
    ) -> Option<Run> {
        let pasid = number(pasid);
        let entry = &self.0[index(pasid, iova)];
        let run = entry.run;
        let hit = entry.generation == generation
            && entry.pasid == pasid
            && iova.wrapping_sub(run.start) < run.end - run.start
            && run.allows(access);
        hit.then_some(run)
    }

    #[inline]
    pub(super) fn insert(&mut self, generation: u64, pasid: Option<Pasid>, iova: u64, run: Run) {
        let pasid = number(pasid);
        self.0[index(pasid, iova)] = Entry { generation, run, pasid };
    }
}

/// 0, which is no PASID, stands for the RID.
#[inline]
fn number(pasid: Option<Pasid>) -> u32 {
    pasid.map_or(0, Pasid::get)
}

#[inline]
fn index(pasid: u32, iova: u64) -> usize {
    // Sources and destinations are often a power of two apart, and queues use the same addresses under neighbouring
    // PASIDs: a multiplicative hash (by 2^64 divided by the golden ratio) keeps them from sharing an entry.
    let key = (iova >> GRANULE_SHIFT) ^ (u64::from(pasid) << 44);
    (key.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (u64::BITS - ENTRIES.ilog2())) as usize
}
