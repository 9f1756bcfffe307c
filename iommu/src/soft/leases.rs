//! The register of memory that is handed to a device, for `check=leases`.
//!
//! A debugging aid: it takes a lock and searches a list on every access, so it costs microseconds.

use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::{Access, Iova};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Lease {
    start: u64,
    end: u64,
    access: Access,
}

impl Lease {
    fn new(iova: Iova, len: u64, access: Access) -> Self {
        Self { start: iova.get(), end: iova.get().saturating_add(len), access }
    }
}

#[derive(Debug, Default)]
pub(super) struct LeaseList(Mutex<Vec<Lease>>);

impl LeaseList {
    fn list(&self) -> MutexGuard<'_, Vec<Lease>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn grant(&self, iova: Iova, len: u64, access: Access) {
        self.list().push(Lease::new(iova, len, access));
    }

    /// Whether there was such a lease.
    pub(super) fn take_back(&self, iova: Iova, len: u64, access: Access) -> bool {
        let lease = Lease::new(iova, len, access);
        let mut list = self.list();
        // The newest are at the end, and most are short-lived.
        let found = list.iter().rposition(|l| *l == lease);
        if let Some(at) = found {
            list.swap_remove(at);
        }
        found.is_some()
    }

    /// Takes back all leases in the range: what it held is unmapped.
    pub(super) fn clear(&self, iova: Iova, len: u64) {
        let all = Lease::new(iova, len, Access::READ_WRITE);
        self.list().retain(|lease| lease.end <= all.start || all.end <= lease.start);
    }

    /// How many of the `len` bytes from `iova` on are leased for `access`.
    pub(super) fn covered(&self, iova: u64, len: u64, access: Access) -> u64 {
        let list = self.list();
        let (mut at, end) = (iova, iova + len);
        // Each round goes to the end of some lease, so there are at most as many rounds as leases.
        while at < end {
            let reach =
                list.iter().filter(|l| l.start <= at && at < l.end && l.access.allows(access)).map(|l| l.end);
            match reach.max() {
                Some(reach) => at = reach,
                None => break,
            }
        }
        at.min(end) - iova
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn covers_across_neighbours_and_stops_at_gaps_and_rights() {
        let leases = LeaseList::default();
        leases.grant(Iova::new(0x1000), 0x100, Access::READ_WRITE);
        leases.grant(Iova::new(0x1100), 0x100, Access::READ);
        leases.grant(Iova::new(0x1300), 0x100, Access::READ);
        assert_eq!(leases.covered(0x1080, 0x400, Access::READ), 0x180);
        assert_eq!(leases.covered(0x1080, 0x400, Access::WRITE), 0x80);
        assert_eq!(leases.covered(0xfff, 2, Access::READ), 0);
        assert!(!leases.take_back(Iova::new(0x1000), 0x100, Access::READ), "another lease's rights");
        leases.clear(Iova::new(0x1300), 0x1000);
        assert_eq!(leases.covered(0x1300, 1, Access::READ), 0);
        assert!(leases.take_back(Iova::new(0x1000), 0x100, Access::READ_WRITE));
        assert_eq!(leases.covered(0x1080, 1, Access::READ), 0);
    }

    #[test]
    fn the_same_lease_twice_is_taken_back_twice() {
        let leases = LeaseList::default();
        leases.grant(Iova::new(0), 8, Access::READ);
        leases.grant(Iova::new(0), 8, Access::READ);
        assert!(leases.take_back(Iova::new(0), 8, Access::READ));
        assert_eq!(leases.covered(0, 8, Access::READ), 8);
        assert!(leases.take_back(Iova::new(0), 8, Access::READ));
        assert_eq!(leases.covered(0, 8, Access::READ), 0);
    }
}
