//! Process address space ids: what tells an IOMMU which address space a device's access goes to.

use std::collections::VecDeque;
use std::fmt;
use std::num::NonZeroU32;
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};

use bitvec::vec::BitVec;

use crate::{Error, ErrorKind, Result};

/// A process address space id: 20 bits (PCI Express Base Specification 6.0, section 6.20) and never 0, which
/// kernels and IOMMUs keep for accesses without one.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(transparent)]
pub struct Pasid(NonZeroU32);

impl Pasid {
    /// The highest one.
    pub const MAX: u32 = (1 << 20) - 1;

    /// The PASID with this number, unless that is 0 or above [`Pasid::MAX`].
    #[inline]
    pub const fn new(number: u32) -> Option<Self> {
        match NonZeroU32::new(number) {
            Some(nonzero) if number <= Self::MAX => Some(Self(nonzero)),
            _ => None,
        }
    }

    /// The number, as it is written into a register or descriptor.
    #[inline]
    pub const fn get(self) -> u32 {
        self.0.get()
    }

    /// One that nobody else in this process has, whatever device it is for: a wrong PASID then names no other
    /// queue's memory.
    ///
    /// # Errors
    /// [`ErrorKind::Exhausted`] if all are in use.
    pub fn allocate() -> Result<OwnedPasid> {
        Self::allocate_up_to(Self::MAX)
    }

    /// As [`allocate`](Self::allocate), for a device that has PASIDs up to `max` only
    /// ([`Capabilities::max_pasids`](crate::Capabilities::max_pasids)).
    ///
    /// # Errors
    /// [`ErrorKind::Exhausted`] if all of those are in use, or there are none.
    pub fn allocate_up_to(max: u32) -> Result<OwnedPasid> {
        PROCESS.allocate_up_to(max).map(OwnedPasid)
    }
}

impl fmt::Display for Pasid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Debug for Pasid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Pasid({self})")
    }
}

/// The allocator behind [`Pasid::allocate`].
static PROCESS: LazyLock<PasidAllocator> = LazyLock::new(|| PasidAllocator::new(Pasid::MAX));

/// A [`Pasid`] of this process, free again for others once this is dropped.
#[derive(Debug)]
#[must_use = "dropping it frees the PASID"]
pub struct OwnedPasid(Pasid);

impl OwnedPasid {
    /// The PASID.
    pub fn get(&self) -> Pasid {
        self.0
    }
}

impl Drop for OwnedPasid {
    fn drop(&mut self) {
        PROCESS.free(self.0);
    }
}

/// Hands out the PASID that has been free for the longest, so that a device which still uses a stale one meets no
/// address space rather than somebody else's.
///
/// Those that were never in use come first, from 1 up: a device's table of PASIDs then stays small.
#[derive(Debug)]
pub struct PasidAllocator(Mutex<State>);

struct State {
    /// Bit n: PASID n + 1 is in use.
    used: BitVec,
    /// Those from this one on were never in use.
    untouched: usize,
    /// Those that were in use and are not, the one that has been free for the longest first.
    freed: VecDeque<Pasid>,
}

impl PasidAllocator {
    /// An allocator of the PASIDs 1 to `max`; there are none above [`Pasid::MAX`].
    pub fn new(max: u32) -> Self {
        let used = BitVec::repeat(false, max.min(Pasid::MAX) as usize);
        Self(Mutex::new(State { used, untouched: 1, freed: VecDeque::new() }))
    }

    /// The PASID that has been free for the longest.
    ///
    /// # Errors
    /// [`ErrorKind::Exhausted`], saying how many there are, if all are in use.
    pub fn allocate(&self) -> Result<Pasid> {
        self.allocate_up_to(Pasid::MAX)
    }

    /// Of the PASIDs that are not above `max`, the one that has been free for the longest.
    ///
    /// # Errors
    /// [`ErrorKind::Exhausted`], saying how many there are, if all of those are in use.
    pub fn allocate_up_to(&self, max: u32) -> Result<Pasid> {
        let mut state = self.state();
        let limit = state.used.len().min(max as usize);
        let pasid = state.untouched(limit).or_else(|| state.rested(limit)).ok_or_else(|| exhausted(limit))?;
        state.used.set(pasid.get() as usize - 1, true);
        Ok(pasid)
    }

    /// Gives back a PASID. One that is not in use is a bug of the caller's; it is logged and changes nothing.
    pub fn free(&self, pasid: Pasid) {
        let mut state = self.state();
        let bit = pasid.get() as usize - 1;
        if state.used.get(bit).is_some_and(|used| *used) {
            state.used.set(bit, false);
            state.freed.push_back(pasid);
        } else {
            tracing::error!("PASID {pasid} was freed, but is not in use; ignored");
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing panics halfway through a change, so a poisoned lock holds a sound state.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Takes the lowest that was never in use, if it is not above `limit`.
    fn untouched(&mut self, limit: usize) -> Option<Pasid> {
        let pasid = Pasid::new(u32::try_from(self.untouched).ok()?)?;
        if self.untouched > limit {
            return None;
        }
        self.untouched += 1;
        Some(pasid)
    }

    /// Takes, of those of the first `limit` that were freed, the one that was freed first.
    fn rested(&mut self, limit: usize) -> Option<Pasid> {
        let index = self.freed.iter().position(|pasid| pasid.get() as usize <= limit)?;
        self.freed.remove(index)
    }
}

impl fmt::Debug for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {} in use", self.used.count_ones(), self.used.len())
    }
}

#[cold]
fn exhausted(limit: usize) -> Error {
    let error = |why: String| Error::new(ErrorKind::Exhausted, "allocate a PASID", why);
    if limit == 0 {
        return error("the device and its IOMMU have none".to_owned())
            .mend("use the device without PASIDs, in its own address space");
    }
    error(format!("all {limit} that there are for this device are in use"))
        .mend("close queues that are no longer used, or ask for fewer")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn only_20_bits_and_never_zero() {
        assert_eq!(Pasid::new(0), None);
        assert_eq!(Pasid::new(1).unwrap().get(), 1);
        assert_eq!(Pasid::new(0xf_ffff).unwrap().to_string(), "1048575");
        assert_eq!(Pasid::new(0x10_0000), None);
        assert_eq!(Pasid::new(u32::MAX), None);
    }

    #[test]
    fn goes_round_before_it_reuses_one() {
        let allocator = PasidAllocator::new(4);
        let mut order = Vec::new();
        for _ in 0..6 {
            let pasid = allocator.allocate().unwrap();
            order.push(pasid.get());
            allocator.free(pasid);
        }
        assert_eq!(order, [1, 2, 3, 4, 1, 2]);
    }

    #[test]
    fn exhaustion_says_how_many_there_are() {
        let allocator = PasidAllocator::new(3);
        let all = [(); 3].map(|()| allocator.allocate().unwrap().get());
        assert_eq!(all, [1, 2, 3]);
        let error = allocator.allocate().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Exhausted);
        assert!(error.to_string().contains("all 3"), "{error}");
        allocator.free(Pasid::new(2).unwrap());
        assert_eq!(allocator.allocate().unwrap().get(), 2, "a freed one is all that is left");
        let none = allocator.allocate_up_to(0).unwrap_err();
        assert_eq!(none.kind(), ErrorKind::Exhausted);
        assert!(none.to_string().contains("have none"), "{none}");
    }

    #[test]
    fn a_device_with_few_gets_the_longest_free_of_its_own() {
        let allocator = PasidAllocator::new(100);
        for n in 1..=4 {
            assert_eq!(allocator.allocate_up_to(4).unwrap().get(), n);
        }
        assert_eq!(allocator.allocate_up_to(4).unwrap_err().kind(), ErrorKind::Exhausted);
        for n in 5..=100 {
            assert_eq!(allocator.allocate().unwrap().get(), n);
        }
        for n in [50, 3, 1] {
            allocator.free(Pasid::new(n).unwrap());
        }
        assert_eq!(allocator.allocate_up_to(4).unwrap().get(), 3, "1 was freed later, 50 is not its own");
        assert_eq!(allocator.allocate().unwrap().get(), 50);
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(512) })]

        /// Against a table of who has each, and since when each is free.
        #[test]
        fn the_longest_free_of_those_in_range_is_handed_out(
            max in 1..40_u32,
            steps in prop::collection::vec((prop::option::of(0..50_u32), any::<prop::sample::Index>()), 0..400),
        ) {
            #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
            enum Is { FreeSince(usize), Used }
            let allocator = PasidAllocator::new(max);
            let mut table = vec![Is::FreeSince(0); max as usize];
            for (now, (allocate, index)) in steps.into_iter().enumerate() {
                if let Some(limit) = allocate {
                    let in_range = &table[..limit.min(max) as usize];
                    let longest = in_range.iter().copied().min().filter(|&is| is != Is::Used);
                    match allocator.allocate_up_to(limit) {
                        Ok(pasid) => {
                            prop_assert!(pasid.get() <= limit);
                            let is = &mut table[pasid.get() as usize - 1];
                            prop_assert!(Some(*is) == longest, "{pasid} has an owner, or another was free for longer");
                            *is = Is::Used;
                        }
                        Err(error) => {
                            prop_assert!(longest.is_none(), "{error}");
                            prop_assert!(error.mend_text().is_some());
                        }
                    }
                } else {
                    let bit = index.index(table.len());
                    allocator.free(Pasid::new(bit as u32 + 1).unwrap());
                    if table[bit] == Is::Used {
                        table[bit] = Is::FreeSince(now + 1);
                    }
                }
            }
        }
    }

    #[test]
    fn a_double_free_changes_nothing() {
        let allocator = PasidAllocator::new(2);
        let [one, two] = [(); 2].map(|()| allocator.allocate().unwrap());
        allocator.free(one);
        allocator.free(one);
        allocator.free(Pasid::new(3).unwrap());
        assert_eq!(allocator.allocate().unwrap(), one);
        assert_eq!(allocator.allocate().unwrap_err().kind(), ErrorKind::Exhausted);
        allocator.free(two);
        assert_eq!(allocator.allocate().unwrap(), two);
    }

    #[test]
    fn there_are_none_above_20_bits() {
        let allocator = PasidAllocator::new(u32::MAX);
        let mut last = 0;
        while let Ok(pasid) = allocator.allocate() {
            last = pasid.get();
        }
        assert_eq!(last, 0xf_ffff);
    }

    #[test]
    fn the_process_hands_each_to_one_owner() {
        let owned: Vec<_> = (0..100).map(|_| Pasid::allocate_up_to(4096).unwrap()).collect();
        let mut numbers: Vec<_> = owned.iter().map(|pasid| pasid.get().get()).collect();
        assert!(numbers.iter().all(|&number| number <= 4096));
        numbers.sort_unstable();
        numbers.dedup();
        assert_eq!(numbers.len(), 100);
    }

    #[test]
    fn dropping_an_owned_one_frees_it() {
        // More than there are up to this limit, whatever other tests hold of them for a moment.
        for _ in 0..5000 {
            drop(Pasid::allocate_up_to(4096).unwrap());
        }
    }
}
