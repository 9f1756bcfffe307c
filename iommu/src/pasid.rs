//! Process address space ids: what tells an IOMMU which address space a device's access goes to.

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

/// Hands out PASIDs, going round: a freed one is handed out again only once the free ones above it were, so
/// that a device which still uses a stale one meets no address space rather than somebody else's.
#[derive(Debug)]
pub struct PasidAllocator(Mutex<State>);

struct State {
    /// Bit n: PASID n + 1 is in use.
    used: BitVec,
    /// The bit to try first: the one behind the last that was handed out.
    next: usize,
}

impl PasidAllocator {
    /// An allocator of the PASIDs 1 to `max`; there are none above [`Pasid::MAX`].
    pub fn new(max: u32) -> Self {
        let used = BitVec::repeat(false, max.min(Pasid::MAX) as usize);
        Self(Mutex::new(State { used, next: 0 }))
    }

    /// The next free PASID.
    ///
    /// # Errors
    /// [`ErrorKind::Exhausted`], saying how many there are, if all are in use.
    pub fn allocate(&self) -> Result<Pasid> {
        self.allocate_up_to(Pasid::MAX)
    }

    /// The next free PASID that is not above `max`.
    ///
    /// # Errors
    /// [`ErrorKind::Exhausted`], saying how many there are, if all of those are in use.
    pub fn allocate_up_to(&self, max: u32) -> Result<Pasid> {
        let mut state = self.state();
        let limit = state.used.len().min(max as usize);
        let next = if state.next < limit { state.next } else { 0 };
        let bit = match state.used[next..limit].first_zero() {
            Some(ahead) => Some(next + ahead),
            None => state.used[..next].first_zero(),
        };
        let found = bit.and_then(|bit| Some((bit, Pasid::new(u32::try_from(bit + 1).ok()?)?)));
        let Some((bit, pasid)) = found else {
            return Err(exhausted(limit));
        };
        state.used.set(bit, true);
        state.next = bit + 1;
        Ok(pasid)
    }

    /// Gives back a PASID. One that is not in use is a bug of the caller's; it is logged and changes nothing.
    pub fn free(&self, pasid: Pasid) {
        let mut state = self.state();
        match state.used.get_mut(pasid.get() as usize - 1) {
            Some(mut used) if *used => *used = false,
            _ => tracing::error!("PASID {pasid} was freed, but is not in use; ignored"),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing panics between the two changes of an allocation, so a poisoned lock holds a sound state.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
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
    }

    #[test]
    fn a_device_with_few_gets_only_those() {
        let allocator = PasidAllocator::new(100);
        for n in 1..=10 {
            assert_eq!(allocator.allocate().unwrap().get(), n);
        }
        assert_eq!(allocator.allocate_up_to(10).unwrap_err().kind(), ErrorKind::Exhausted);
        allocator.free(Pasid::new(4).unwrap());
        allocator.free(Pasid::new(7).unwrap());
        assert_eq!(allocator.allocate_up_to(10).unwrap().get(), 4);
        allocator.free(Pasid::new(4).unwrap());
        assert_eq!(allocator.allocate_up_to(10).unwrap().get(), 7, "4 was freed just now");
        assert_eq!(allocator.allocate().unwrap().get(), 11);
        let none = allocator.allocate_up_to(0).unwrap_err();
        assert_eq!(none.kind(), ErrorKind::Exhausted);
        assert!(none.to_string().contains("have none"), "{none}");
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
        allocator.0.lock().unwrap().next = 0xf_fffe;
        assert_eq!(allocator.allocate().unwrap().get(), 0xf_ffff);
        assert_eq!(allocator.allocate().unwrap().get(), 1);
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
