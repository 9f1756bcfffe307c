//! I/O page tables: four levels of 512 entries, leaves of 4 KiB, 2 MiB and 1 GiB, 48-bit IOVAs.
//!
//! Written by one thread at a time (under [`Table`]'s lock), read by any number without a lock. An entry is one atomic
//! word. Nodes are freed only when the table is dropped, or when a larger page takes an empty node's place and
//! every access that could have seen it is over ([`Table::take_retired`]).
//!
//! # Safety invariant
//! A node pointer in an entry comes from `Box::into_raw`, is reachable from exactly one entry, and stays valid
//! until the accesses that were under way when it was unlinked are over. Readers call [`Table::walk`] only inside
//! an access (see `guard`), or while nobody writes.

use std::ptr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::{Access, Error, ErrorKind, Iova, PageSize, Result};

/// Bits of an IOVA that the tables translate.
pub(super) const ADDRESS_BITS: u32 = 48;

const ENTRIES: u64 = 512;
const LEVEL_BITS: u32 = 9;
const TOP_LEVEL: u32 = 3;

/// An entry: 0 is empty; bits 1:0 are the leaf's access (as [`Access::bits`]); bit 2 marks a leaf, bit 3 a node; from
/// bit 12 on the page's address in this process, or the node's.
const LEAF: u64 = 1 << 2;
const NODE: u64 = 1 << 3;
const ADDRESS: u64 = !0xfff;

/// Pages whose entries [`Table::walk`] looks at together: a 64 KiB granule is two cache lines of them.
const GRANULE: u64 = 64 * 1024;

#[repr(C, align(4096))]
struct Node([AtomicU64; ENTRIES as usize]);

impl Node {
    fn new() -> Box<Self> {
        Box::new(Self([const { AtomicU64::new(0) }; ENTRIES as usize]))
    }

    fn entry(&self, level: u32, iova: u64) -> &AtomicU64 {
        &self.0[(iova >> shift(level)) as usize % ENTRIES as usize]
    }

    fn is_empty(&self) -> bool {
        self.0.iter().all(|e| e.load(Ordering::Relaxed) == 0)
    }
}

const fn shift(level: u32) -> u32 {
    12 + level * LEVEL_BITS
}

const fn leaf_level(size: PageSize) -> u32 {
    (size.shift() - 12) / LEVEL_BITS
}

/// A stretch of IOVAs that are next to each other in this process's memory too.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Run {
    /// The first IOVA.
    pub(super) start: u64,
    /// One past the last.
    pub(super) end: u64,
    /// Where the first one is in this process.
    pub(super) host: u64,
    /// [`Access::bits`].
    pub(super) access: u8,
}

impl Run {
    #[inline]
    pub(super) fn allows(&self, access: Access) -> bool {
        self.access & access.bits() == access.bits()
    }
}

/// The tables of one address space.
#[derive(Debug)]
pub(super) struct Table {
    root: Subtree,
    /// Held by whoever writes entries. Holds nodes that are unlinked but may still be read.
    writer: Mutex<Vec<Subtree>>,
}

/// A node that is owned, with all nodes below it.
#[derive(Debug)]
pub(super) struct Subtree {
    node: Box<Node>,
    level: u32,
}

impl Drop for Subtree {
    fn drop(&mut self) {
        if self.level == 0 {
            return;
        }
        for slot in &self.node.0 {
            let entry = slot.load(Ordering::Relaxed);
            if entry & NODE != 0 {
                // SAFETY: nobody reads a subtree that is dropped (module invariant); the node came from
                // Box::into_raw and this is the one entry that names it.
                let node = unsafe { Box::from_raw(node_ptr(entry)) };
                drop(Self { node, level: self.level - 1 });
            }
        }
    }
}

impl std::fmt::Debug for Node {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Node({} used)", self.0.iter().filter(|e| e.load(Ordering::Relaxed) != 0).count())
    }
}

impl Table {
    pub(super) fn new() -> Self {
        Self { root: Subtree { node: Node::new(), level: TOP_LEVEL }, writer: Mutex::default() }
    }

    fn writer(&self) -> MutexGuard<'_, Vec<Subtree>> {
        self.writer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Maps `len` bytes at `iova` to `host` in pages of `size`. All three are multiples of the page size.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`] if something is mapped in that range already; nothing has changed then.
    pub(super) fn map(&self, iova: Iova, host: u64, len: u64, size: PageSize, access: Access) -> Result<()> {
        debug_assert!((iova.get() | host | len).is_multiple_of(size.bytes()));
        let mut retired = self.writer();
        let range = Range { start: iova.get(), end: iova.get() + len };
        let leaf = Leaf { level: leaf_level(size), first: host | LEAF | u64::from(access.bits()) };
        match fill(&self.root.node, TOP_LEVEL, range, range.start, leaf, &mut retired) {
            Ok(()) => Ok(()),
            Err(taken) => {
                // What this call had written so far is [start, taken).
                clear(&self.root.node, TOP_LEVEL, Range { start: range.start, end: taken });
                Err(Error::new(
                    ErrorKind::Busy,
                    format!("map {len} bytes at {iova}"),
                    format!("something is mapped at {taken:#x} already"),
                ))
            }
        }
    }

    /// Clears every entry in the range and returns how many bytes were mapped there.
    pub(super) fn unmap(&self, iova: Iova, len: u64) -> u64 {
        let _writer = self.writer();
        clear(&self.root.node, TOP_LEVEL, Range { start: iova.get(), end: iova.get() + len })
    }

    /// Nodes that were unlinked since the last call. To be dropped once every access of now is over.
    pub(super) fn take_retired(&self) -> Vec<Subtree> {
        std::mem::take(&mut *self.writer())
    }

    /// The run around `iova` inside its 64 KiB granule, or `None` if nothing is mapped there.
    #[inline]
    pub(super) fn walk(&self, iova: u64) -> Option<Run> {
        if iova >> ADDRESS_BITS != 0 {
            return None;
        }
        let mut node: &Node = &self.root.node;
        let mut level = TOP_LEVEL;
        loop {
            // Acquire: pairs with the Release in `fill`, so that the node behind the entry is seen filled in.
            let entry = node.entry(level, iova).load(Ordering::Acquire);
            if entry & LEAF != 0 {
                return Some(if level == 0 {
                    contiguous(node, iova, entry)
                } else {
                    inside(level, iova, entry)
                });
            }
            if entry & NODE == 0 {
                return None;
            }
            // SAFETY: a NODE entry holds a valid node, and the caller is inside an access (module invariant).
            node = unsafe { &*node_ptr(entry) };
            level -= 1;
        }
    }
}

#[derive(Clone, Copy)]
struct Range {
    start: u64,
    end: u64,
}

/// The leaf for the first page of a mapping; the ones after it follow by adding the page size.
#[derive(Clone, Copy)]
struct Leaf {
    level: u32,
    first: u64,
}

fn node_ptr(entry: u64) -> *mut Node {
    ptr::with_exposed_provenance_mut((entry & ADDRESS) as usize)
}

/// Writes the leaves of `range`, a part of a mapping that starts at `origin`. On a conflict returns its IOVA.
fn fill(
    node: &Node,
    level: u32,
    range: Range,
    origin: u64,
    leaf: Leaf,
    retired: &mut Vec<Subtree>,
) -> Result<(), u64> {
    let span = 1 << shift(level);
    let mut at = range.start;
    while at < range.end {
        let next = ((at & !(span - 1)) + span).min(range.end);
        let slot = node.entry(level, at);
        // Relaxed: only writers write, and this one holds the lock.
        let old = slot.load(Ordering::Relaxed);
        if level == leaf.level {
            if old & LEAF != 0 {
                return Err(at);
            }
            if old & NODE != 0 {
                // SAFETY: a NODE entry holds a valid node, and nobody else unlinks nodes (the lock is held).
                let below = unsafe { &*node_ptr(old) };
                if !is_empty_below(below, level - 1) {
                    return Err(at);
                }
                // SAFETY: it came from Box::into_raw, and the store below takes the one entry that names it.
                let node = unsafe { Box::from_raw(node_ptr(old)) };
                retired.push(Subtree { node, level: level - 1 });
            }
            // Release: pairs with `walk`; what the CPU wrote to the page before mapping it is seen by the device.
            slot.store(leaf.first + (at - origin), Ordering::Release);
        } else {
            if old & LEAF != 0 {
                return Err(at);
            }
            let below = if old & NODE == 0 {
                let new = Box::into_raw(Node::new());
                slot.store(new.expose_provenance() as u64 | NODE, Ordering::Release);
                new
            } else {
                node_ptr(old)
            };
            // SAFETY: it was made just now, or a NODE entry holds it; nobody else unlinks nodes.
            let below = unsafe { &*below };
            fill(below, level - 1, Range { start: at, end: next }, origin, leaf, retired)?;
        }
        at = next;
    }
    Ok(())
}

/// Clears the leaves that start in `range` and returns how many bytes they mapped.
fn clear(node: &Node, level: u32, range: Range) -> u64 {
    let span = 1 << shift(level);
    let (mut at, mut cleared) = (range.start, 0);
    while at < range.end {
        let next = ((at & !(span - 1)) + span).min(range.end);
        let slot = node.entry(level, at);
        let old = slot.load(Ordering::Relaxed);
        if old & LEAF != 0 {
            slot.store(0, Ordering::Release);
            cleared += span;
        } else if old & NODE != 0 {
            // SAFETY: a NODE entry holds a valid node, and nobody else unlinks nodes (the lock is held).
            cleared += clear(unsafe { &*node_ptr(old) }, level - 1, Range { start: at, end: next });
        }
        at = next;
    }
    cleared
}

/// Whether no leaf is left under `node`; nodes under it are kept for the next mapping, or freed with the table.
fn is_empty_below(node: &Node, level: u32) -> bool {
    level == 0 && node.is_empty()
        || level > 0
            && node.0.iter().all(|slot| {
                let entry = slot.load(Ordering::Relaxed);
                // SAFETY: a NODE entry holds a valid node, and nobody else unlinks nodes (the lock is held).
                entry & LEAF == 0
                    && (entry & NODE == 0 || is_empty_below(unsafe { &*node_ptr(entry) }, level - 1))
            })
}

/// The part of a large page that lies in the granule of `iova`.
fn inside(level: u32, iova: u64, entry: u64) -> Run {
    let start = iova & !(GRANULE - 1);
    let offset = start & ((1 << shift(level)) - 1);
    let host = (entry & ADDRESS) + offset;
    Run { start, end: start + GRANULE, host, access: (entry & 3) as u8 }
}

/// The 4 KiB pages around `iova` in its granule that follow each other in this process's memory too.
fn contiguous(node: &Node, iova: u64, entry: u64) -> Run {
    let page = PageSize::Size4K.bytes();
    let granule = iova & !(GRANULE - 1);
    let (mut start, mut host) = (iova & !(page - 1), entry & ADDRESS);
    let mut end = start + page;
    // Comparing whole entries compares address and access in one go.
    let mut expect = entry;
    while end < granule + GRANULE {
        expect += page;
        if node.entry(0, end).load(Ordering::Acquire) != expect {
            break;
        }
        end += page;
    }
    expect = entry;
    while start > granule {
        expect = expect.wrapping_sub(page);
        if node.entry(0, start - page).load(Ordering::Acquire) != expect {
            break;
        }
        start -= page;
        host -= page;
    }
    Run { start, end, host, access: (entry & 3) as u8 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    const SIZES: [PageSize; 3] = [PageSize::Size4K, PageSize::Size2M, PageSize::Size1G];

    #[derive(Debug, Clone)]
    enum Step {
        Map { page: u64, pages: u64, size: usize, host: u64, write: bool },
        Unmap { pick: usize },
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            (0..6_u64, 1..40_u64, 0..3_usize, 1..1000_u64, any::<bool>())
                .prop_map(|(page, pages, size, host, write)| Step::Map { page, pages, size, host, write }),
            any::<usize>().prop_map(|pick| Step::Unmap { pick }),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]

        /// Against a list of mapped ranges, searched one by one.
        #[test]
        fn agrees_with_a_list_of_ranges(steps in prop::collection::vec(step(), 1..40), probes in prop::collection::vec((0..3_usize, 0..8_u64, any::<u32>()), 20)) {
            let table = Table::new();
            // start -> (len, host, access bits)
            let mut list: BTreeMap<u64, (u64, u64, u8)> = BTreeMap::new();
            for step in steps {
                match step {
                    Step::Map { page, pages, size, host, write } => {
                        let size = SIZES[size];
                        let pages = if size == PageSize::Size4K { pages } else { pages % 3 + 1 };
                        let (start, len) = (page * size.bytes(), pages * size.bytes());
                        let host = host << 30;
                        let access = if write { Access::READ_WRITE } else { Access::READ };
                        let free = list.iter().all(|(s, (l, ..))| s + l <= start || start + len <= *s);
                        let mapped = table.map(Iova::new(start), host, len, size, access);
                        prop_assert_eq!(mapped.is_ok(), free);
                        if free {
                            list.insert(start, (len, host, access.bits()));
                        }
                    }
                    Step::Unmap { pick } => {
                        let Some((&start, &(len, ..))) = list.iter().nth(pick % list.len().max(1)) else { continue };
                        prop_assert_eq!(table.unmap(Iova::new(start), len), len);
                        list.remove(&start);
                    }
                }
                for &(size, page, offset) in &probes {
                    let iova = page * SIZES[size].bytes() + u64::from(offset) % SIZES[size].bytes();
                    let expected = list.range(..=iova).next_back().filter(|(s, (l, ..))| iova < *s + l);
                    match (table.walk(iova), expected) {
                        (None, None) => {}
                        (Some(run), Some((start, (_, host, access)))) => {
                            prop_assert!(run.start <= iova && iova < run.end && run.end - run.start <= GRANULE);
                            prop_assert_eq!(run.host + (iova - run.start), host + (iova - start));
                            prop_assert_eq!(run.access, *access);
                        }
                        (run, expected) => prop_assert!(false, "{:#x}: {:?} but {:?}", iova, run, expected),
                    }
                }
            }
        }
    }

    #[test]
    fn runs_join_neighbouring_pages_and_stop_at_gaps() {
        let table = Table::new();
        let page = 4096;
        table.map(Iova::new(0x10_0000), 0x7000_0000, 3 * page, PageSize::Size4K, Access::READ).unwrap();
        // Neighbour in IOVA, not in memory.
        table.map(Iova::new(0x10_3000), 0x9000_0000, page, PageSize::Size4K, Access::READ).unwrap();
        let run = table.walk(0x10_1234).unwrap();
        assert_eq!((run.start, run.end, run.host), (0x10_0000, 0x10_3000, 0x7000_0000));
        assert_eq!(table.walk(0x10_3fff).unwrap().start, 0x10_3000);
        assert!(table.walk(0x10_4000).is_none());
        assert!(table.walk(1 << ADDRESS_BITS).is_none());
        assert!(table.walk(u64::MAX).is_none());
    }

    #[test]
    fn a_large_page_takes_an_empty_nodes_place() {
        let table = Table::new();
        table.map(Iova::new(0), 0x7000_0000, 4096, PageSize::Size4K, Access::READ).unwrap();
        assert!(table.map(Iova::new(0), 1 << 30, 1 << 30, PageSize::Size1G, Access::READ).is_err());
        assert_eq!(table.walk(0).unwrap().host, 0x7000_0000, "a refused map changes nothing");
        assert_eq!(table.unmap(Iova::new(0), 4096), 4096);
        table.map(Iova::new(0), 1 << 30, 1 << 30, PageSize::Size1G, Access::READ).unwrap();
        drop(table.take_retired());
        assert_eq!(table.walk(0x1234_5678).unwrap().host, (1 << 30) + 0x1234_0000);
    }
}
