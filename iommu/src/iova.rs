//! Ranges of I/O virtual addresses, and the allocator that hands them out.

use std::fmt;

use crate::memory::Bytes;
use crate::{Error, ErrorKind, Iova, Result};

/// Addresses below this are never handed out: 0 is what a forgotten address field holds, and a device that
/// follows one must fault.
const FIRST: u64 = 4096;

/// A range of I/O virtual addresses, both ends included, as iommufd and VFIO report what a device can use.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct IovaRange {
    /// The first address in it.
    pub first: Iova,
    /// The last address in it; a range whose `last` is below `first` is empty.
    pub last: Iova,
}

impl IovaRange {
    /// The `len` bytes from `first` on; `None` for no bytes at all, or for more than the space has.
    pub const fn sized(first: Iova, len: u64) -> Option<Self> {
        if len == 0 {
            return None;
        }
        match first.checked_add(len - 1) {
            Some(last) => Some(Self { first, last }),
            None => None,
        }
    }

    /// Whether all of `other` lies in this range.
    pub fn contains(&self, other: &Self) -> bool {
        self.first <= other.first && other.last <= self.last
    }

    /// The addresses in both; `None` where there are none.
    #[must_use]
    pub fn intersection(&self, other: &Self) -> Option<Self> {
        let both = Self { first: self.first.max(other.first), last: self.last.min(other.last) };
        (both.first <= both.last).then_some(both)
    }
}

impl fmt::Display for IovaRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}..={}", self.first, self.last)
    }
}

impl fmt::Debug for IovaRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "IovaRange({self})")
    }
}

/// Hands out the addresses of one address space: inside the usable ranges, around their holes, and never the
/// first 4 KiB of the space.
///
/// Takes the lowest addresses that fit. Control plane only: an allocation walks the free ranges.
#[derive(Debug)]
pub struct IovaAllocator {
    free: Ranges,
    allocated: Ranges,
}

impl IovaAllocator {
    /// An allocator for the addresses of `usable`, which may overlap, touch and come in any order.
    pub fn new(usable: Vec<IovaRange>) -> Self {
        Self { free: Ranges::usable(usable), allocated: Ranges::default() }
    }

    /// The lowest free range of `len` bytes whose first address is a multiple of `alignment`, a power of two.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] for a length of zero or another alignment; [`ErrorKind::Exhausted`] where no
    /// free range is large enough.
    pub fn allocate(&mut self, len: u64, alignment: u64) -> Result<Iova> {
        let invalid = |why: String| Error::new(ErrorKind::InvalidInput, "allocate an IOVA range", why);
        if len == 0 {
            return Err(invalid("its length is zero".to_owned()).mend("ask for one byte at least"));
        }
        if !alignment.is_power_of_two() {
            return Err(invalid(format!("the alignment {alignment} is not a power of two"))
                .mend("ask for a power of two, such as the size of the pages to be mapped"));
        }
        let fits = |hole: IovaRange| {
            let first = hole.first.get().checked_next_multiple_of(alignment)?;
            IovaRange::sized(Iova::new(first), len).filter(|range| hole.contains(range))
        };
        let range = self.free.iter().find_map(fits).ok_or_else(|| self.exhausted(len, alignment))?;
        self.take(range);
        Ok(range.first)
    }

    /// Takes exactly the `len` bytes at `iova`, if all of them are usable and free.
    pub fn reserve(&mut self, iova: Iova, len: u64) -> bool {
        IovaRange::sized(iova, len).is_some_and(|range| self.take(range))
    }

    /// Gives back what [`allocate`](Self::allocate) or [`reserve`](Self::reserve) handed out, whole. Anything
    /// else is a bug of the caller's; it is logged and changes nothing, so that no address is handed out twice.
    pub fn free(&mut self, iova: Iova, len: u64) {
        match IovaRange::sized(iova, len) {
            Some(range) if self.allocated.remove(range) => self.free.merge(range),
            _ => tracing::error!("{len} bytes of IOVA at {iova} were freed, but are not allocated; ignored"),
        }
    }

    /// From now on only addresses that are usable already and in `usable` are handed out.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`], naming the range, if something is allocated outside of `usable`; nothing changes then.
    pub fn restrict(&mut self, usable: Vec<IovaRange>) -> Result<()> {
        let usable = Ranges::usable(usable);
        if let Some(range) = self.allocated.iter().find(|range| !usable.holds(range)) {
            return Err(Error::new(
                ErrorKind::Busy,
                "restrict an address space to what one more device can use",
                format!("{range} is mapped already, and that device can not use it"),
            )
            .mend("attach all devices before mapping memory, or unmap it first"));
        }
        self.free = self.free.intersection(&usable);
        Ok(())
    }

    /// Moves `range` to the allocated ones, if all of it is free.
    fn take(&mut self, range: IovaRange) -> bool {
        let is_free = self.free.cut(range);
        if is_free {
            // Inserted as it is, not merged with its neighbours: it is freed on its own.
            self.allocated.add(range);
        }
        is_free
    }

    #[cold]
    fn exhausted(&self, len: u64, alignment: u64) -> Error {
        let sizes = || self.free.iter().map(|range| range.last.get() - range.first.get() + 1);
        Error::new(
            ErrorKind::Exhausted,
            "allocate an IOVA range",
            format!(
                "no {} in a row, aligned to {}, are free: {} are, in {} ranges of at most {}",
                Bytes(len),
                Bytes(alignment),
                Bytes(sizes().sum()),
                self.free.0.len(),
                Bytes(sizes().max().unwrap_or(0)),
            ),
        )
        .mend("unmap regions that are no longer used, map smaller ones, or spread them over more address spaces")
    }
}

/// Ranges that do not overlap, in ascending order. None holds the very first page of the space, so that the size of each fits
/// a `u64`.
///
/// A list, since the kernel lets a process have some 2^16 mappings, and they mostly come one behind the other: then nothing
/// moves in it.
#[derive(Debug, Default)]
struct Ranges(Vec<IovaRange>);

impl Ranges {
    /// What can be handed out of `ranges`, merged.
    fn usable(mut ranges: Vec<IovaRange>) -> Self {
        let space = IovaRange { first: Iova::new(FIRST), last: Iova::new(u64::MAX) };
        ranges.sort_by_key(|range| range.first);
        let mut merged: Vec<IovaRange> = Vec::with_capacity(ranges.len());
        for range in ranges.into_iter().filter_map(|range| range.intersection(&space)) {
            match merged.last_mut() {
                // Behind the end of the space (`None`) nothing is left to start, so all that follows lies within.
                Some(before) if before.last.checked_add(1).is_none_or(|next| range.first <= next) => {
                    before.last = before.last.max(range.last);
                }
                _ => merged.push(range),
            }
        }
        Self(merged)
    }

    /// All of them, in ascending order.
    fn iter(&self) -> impl Iterator<Item = IovaRange> {
        self.0.iter().copied()
    }

    /// The index of the first one that does not end before `iova`.
    fn find(&self, iova: Iova) -> usize {
        self.0.partition_point(|range| range.last < iova)
    }

    /// Whether one of them holds all of `range`.
    fn holds(&self, range: &IovaRange) -> bool {
        self.0.get(self.find(range.first)).is_some_and(|holder| holder.contains(range))
    }

    /// Adds `range`, which overlaps none.
    fn add(&mut self, range: IovaRange) {
        self.0.insert(self.find(range.first), range);
    }

    /// Takes exactly `range` out, if it is one of them.
    fn remove(&mut self, range: IovaRange) -> bool {
        let at = self.find(range.first);
        let is_there = self.0.get(at) == Some(&range);
        if is_there {
            self.0.remove(at);
        }
        is_there
    }

    /// Takes `range` out of the one that holds it, if there is one; what is left of that on either side stays.
    fn cut(&mut self, range: IovaRange) -> bool {
        let at = self.find(range.first);
        let Some(holder) = self.0.get_mut(at).filter(|holder| holder.contains(&range)) else { return false };
        let before = (holder.first < range.first)
            .then(|| IovaRange { first: holder.first, last: Iova::new(range.first.get() - 1) });
        let after = (range.last < holder.last)
            .then(|| IovaRange { first: Iova::new(range.last.get() + 1), last: holder.last });
        match (before, after) {
            (None, None) => drop(self.0.remove(at)),
            (Some(left), None) | (None, Some(left)) => *holder = left,
            (Some(before), Some(after)) => {
                *holder = after;
                self.0.insert(at, before);
            }
        }
        true
    }

    /// Adds `range`, which overlaps none, and merges it with those that it touches.
    fn merge(&mut self, range: IovaRange) {
        let at = self.find(range.first);
        let touch = |before: IovaRange, after: IovaRange| before.last.checked_add(1) == Some(after.first);
        let before = at.checked_sub(1).filter(|&before| touch(self.0[before], range));
        let touches_after = self.0.get(at).is_some_and(|&after| touch(range, after));
        match (before, touches_after) {
            (Some(before), true) => self.0[before].last = self.0.remove(at).last,
            (Some(before), false) => self.0[before].last = range.last,
            (None, true) => self.0[at].first = range.first,
            (None, false) => self.0.insert(at, range),
        }
    }

    /// The addresses in both.
    fn intersection(&self, other: &Self) -> Self {
        let pairs =
            self.iter().flat_map(|ours| other.iter().filter_map(move |theirs| ours.intersection(&theirs)));
        Self(pairs.collect())
    }
}

#[cfg(test)]
mod tests;
