//! What this machine has: huge page pools, free memory, NUMA nodes; and how to get more of it.

use std::fmt;
use std::fs;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::{Error, PageSize};

/// A number of bytes, shown in the largest unit that it is a multiple of.
pub(super) struct Bytes(pub(super) u64);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (shift, unit) = match self.0.trailing_zeros() {
            _ if self.0 == 0 => (0, "bytes"),
            30.. => (30, "GiB"),
            20.. => (20, "MiB"),
            10.. => (10, "KiB"),
            _ => (0, "bytes"),
        };
        write!(f, "{} {unit}", self.0 >> shift)
    }
}

/// The kernel's pool of huge pages of one size (Documentation/admin-guide/mm/hugetlbpage.rst).
pub(super) struct Pool {
    page_size: PageSize,
    folder: PathBuf,
}

impl Pool {
    pub(super) fn of(page_size: PageSize) -> Self {
        let folder = format!("/sys/kernel/mm/hugepages/hugepages-{}kB", page_size.bytes() / 1024);
        Self { page_size, folder: folder.into() }
    }

    fn read(&self, file: &str) -> Option<u64> {
        fs::read_to_string(self.folder.join(file)).ok()?.trim().parse().ok()
    }

    /// How many pages are reserved by the administrator.
    fn total(&self) -> u64 {
        self.read("nr_hugepages").unwrap_or(0)
    }

    /// How many of those nobody uses or was promised.
    pub(super) fn free(&self) -> u64 {
        let promised = self.read("resv_hugepages").unwrap_or(0);
        self.read("free_hugepages").unwrap_or(0).saturating_sub(promised)
    }

    /// Why `needed` pages could not be had, and what to do about it.
    pub(super) fn shortage(&self, needed: u64) -> (String, String) {
        let free = self.free();
        let why = format!("{needed} huge pages of {} are needed, {free} are free", self.page_size);
        let enough = self.total() + needed.saturating_sub(free);
        let file = self.folder.join("nr_hugepages");
        (why, format!("run: echo {enough} | sudo tee {}", file.display()))
    }
}

/// Which sizes of huge page a region has done without so far, so that each is complained about once.
pub(super) struct FallbackWarnings([AtomicBool; 3]);

impl FallbackWarnings {
    pub(super) const fn new() -> Self {
        Self([const { AtomicBool::new(false) }; 3])
    }

    /// Warns, the first time for this size, that `error` made a region fall back to smaller pages.
    pub(super) fn warn(&self, page_size: PageSize, error: &Error) {
        if !self.0[page_size as usize].swap(true, Ordering::Relaxed) {
            tracing::warn!("smaller pages are used, which costs address translations: {error}");
        }
    }
}

/// The value of a line of /proc/meminfo, in bytes.
fn meminfo(key: &str) -> Option<u64> {
    parse_meminfo(&fs::read_to_string("/proc/meminfo").ok()?, key)
}

fn parse_meminfo(text: &str, key: &str) -> Option<u64> {
    let value = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))?;
    value.trim().strip_suffix("kB")?.trim_end().parse::<u64>().ok()?.checked_mul(1024)
}

/// How much memory could be had without swapping, as the kernel estimates it. It knows nothing of the limits of a
/// control group.
pub(super) fn available_memory() -> Option<u64> {
    meminfo("MemAvailable")
}

/// The size of huge page that anonymous mappings get, if there is one and it is one of ours.
pub(super) fn default_huge_page() -> Option<PageSize> {
    let bytes = meminfo("Hugepagesize")?;
    [PageSize::Size2M, PageSize::Size1G].into_iter().find(|size| size.bytes() == bytes)
}

/// Says why memory can not come from NUMA node `node`, if it can not.
pub(super) fn check_numa_node(node: u32) -> Result<(), String> {
    // A kernel without NUMA has no such file; all memory is on node 0 then.
    let nodes = fs::read_to_string("/sys/devices/system/node/has_memory").unwrap_or_else(|_| "0".to_owned());
    let nodes = nodes.trim();
    if in_list(nodes, node) {
        return Ok(());
    }
    Err(format!("there is no NUMA node {node} with memory; those with memory are {nodes}"))
}

/// Whether `number` is in a list as the kernel writes them: `0-3,8`.
fn in_list(list: &str, number: u32) -> bool {
    list.split(',').any(|part| {
        let (from, to) = part.split_once('-').unwrap_or((part, part));
        matches!((from.parse(), to.parse()), (Ok(from), Ok(to)) if (from..=to).contains(&number))
    })
}

/// Whether a file system has files of huge pages; its block size is then theirs.
pub(super) fn is_hugetlbfs(filesystem: &rustix::fs::StatFs) -> bool {
    filesystem.f_type == libc::HUGETLBFS_MAGIC
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_exact_and_short() {
        for (bytes, text) in [
            (0, "0 bytes"),
            (1, "1 bytes"),
            (1023, "1023 bytes"),
            (4096, "4 KiB"),
            ((64 << 20) + 4096, "65540 KiB"),
            (64 << 20, "64 MiB"),
            (3 << 30, "3 GiB"),
            (1 << 40, "1024 GiB"),
        ] {
            assert_eq!(Bytes(bytes).to_string(), text);
        }
    }

    #[test]
    fn meminfo_is_read_in_bytes() {
        let text = "MemTotal:       24600 kB\nHugePages_Total:       3\nHugepagesize:       2048 kB\n";
        assert_eq!(parse_meminfo(text, "MemTotal"), Some(24600 * 1024));
        assert_eq!(parse_meminfo(text, "Hugepagesize"), Some(2 << 20));
        assert_eq!(parse_meminfo(text, "HugePages_Total"), None, "a count is not a size");
        assert_eq!(parse_meminfo(text, "Huge"), None);
        assert_eq!(parse_meminfo("MemTotal: 99999999999999999999 kB", "MemTotal"), None);
    }

    #[test]
    fn the_kernels_lists_of_numbers() {
        for (list, number, expected) in [
            ("0", 0, true),
            ("0", 1, false),
            ("0-3,8", 3, true),
            ("0-3,8", 8, true),
            ("0-3,8", 5, false),
            ("", 0, false),
            ("x-3", 2, false),
        ] {
            assert_eq!(in_list(list, number), expected, "{number} in {list}");
        }
    }

    #[test]
    fn a_shortage_says_what_to_run() {
        let pool = Pool { page_size: PageSize::Size2M, folder: "/nowhere/hugepages-2048kB".into() };
        let (why, mend) = pool.shortage(32);
        assert_eq!(why, "32 huge pages of 2 MiB are needed, 0 are free");
        assert_eq!(mend, "run: echo 32 | sudo tee /nowhere/hugepages-2048kB/nr_hugepages");
    }
}
