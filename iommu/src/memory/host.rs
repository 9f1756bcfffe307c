//! What this machine has: huge page pools, free memory, NUMA nodes; and how to get more of it.

use std::fmt;
use std::fs;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::io::Errno;

use crate::{Error, ErrorKind, PageSize};

use super::Region;

/// A number of bytes for people: in the largest unit that it has one of, cut to one decimal where it is no multiple
/// of that.
pub(crate) struct Bytes(pub(crate) u64);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [&str; 7] = ["bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
        let unit = self.0.max(1).ilog2() / 10;
        let (whole, rest) = (self.0 >> (10 * unit), self.0 & ((1 << (10 * unit)) - 1));
        write!(f, "{whole}")?;
        if rest != 0 {
            write!(f, ".{}", (u128::from(rest) * 10) >> (10 * unit))?;
        }
        write!(f, " {}", UNITS[unit as usize])
    }
}

/// At which step memory could not be had.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    /// Mapping it, when the kernel sets huge pages aside for it.
    Map,
    /// Populating it: huge pages were set aside, so that there are enough.
    Populate,
}

/// The error for `len` bytes of memory that could not be had: `errno` is what the step said.
#[cold]
pub(super) fn short_of(len: u64, page_size: PageSize, step: Step, errno: Errno) -> Error {
    let operation = format!("allocate {} of DMA memory", Bytes(len));
    // EFAULT: MADV_POPULATE_WRITE met what would have been a SIGBUS, the file's pages ran out.
    if !matches!(errno, Errno::NOMEM | Errno::NOSPC | Errno::FAULT) {
        return Error::os(operation, "it can not be mapped and populated", errno).mend(mend_for(errno));
    }
    let (why, mend) = if page_size == PageSize::Size4K {
        shortage_of_memory(len, available_memory())
    } else {
        Pool::of(page_size).shortage(len / page_size.bytes(), step)
    };
    Error::new(ErrorKind::NoMemory, operation, why).mend(mend)
}

/// Why `len` bytes in small pages could not be had while `available` were, and what to do about it.
fn shortage_of_memory(len: u64, available: Option<u64>) -> (String, String) {
    let why = match available {
        Some(available) => format!("{} of memory are available", Bytes(available)),
        None => "there is not enough memory".to_owned(),
    };
    let mend = if available.is_some_and(|available| available >= len) {
        "raise the limit that it met: the control group's memory.max, ulimit -v, vm.max_map_count, or that of \
         vm.overcommit_memory=2"
    } else {
        "stop what else uses memory, or ask for less"
    };
    (why, mend.to_owned())
}

/// What helps against a system call on a region's memory that failed with `errno`.
pub(super) fn mend_for(errno: Errno) -> &'static str {
    match errno {
        Errno::MFILE => "raise the limit of open files, of which each region is one: run: ulimit -n 65536",
        Errno::NFILE => "raise the system's limit of open files: run: sudo sysctl fs.file-max=1000000",
        Errno::AGAIN => "raise how much memory the process may lock: run: ulimit -l unlimited",
        Errno::FBIG => "raise how large its files may be: run: ulimit -f unlimited; or ask for less",
        Errno::NOMEM | Errno::NOSPC => "stop what else uses memory, or ask for less",
        Errno::ACCESS | Errno::PERM => {
            "use a descriptor that is open for reading and writing, and allow memfd_create(2), mmap(2) and \
             madvise(2) where the process is confined (seccomp, SELinux)"
        }
        Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP => "use Linux 5.14 or newer",
        _ => "look for the reason in the kernel's log: run: sudo dmesg",
    }
}

/// What helps against mbind(2) failing with `errno`.
pub(super) fn mend_for_placing(errno: Errno) -> &'static str {
    match errno {
        Errno::PERM => "let the container use mbind(2) (CAP_SYS_NICE), or ask for no node",
        _ => "name a node of Mems_allowed_list in /proc/self/status, or none",
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
    fn free(&self) -> u64 {
        let promised = self.read("resv_hugepages").unwrap_or(0);
        self.read("free_hugepages").unwrap_or(0).saturating_sub(promised)
    }

    /// Why `needed` pages could not be had at `step`, and what to do about it.
    fn shortage(&self, needed: u64, step: Step) -> (String, String) {
        let (size, free) = (self.page_size, self.free());
        // Once they are set aside for this very memory, they no longer count as free.
        if step == Step::Populate || free >= needed {
            // As the files of a control group name it (Documentation/admin-guide/cgroup-v2.rst, HugeTLB).
            let name = if size == PageSize::Size1G { "1GB" } else { "2MB" };
            return (
                format!("{needed} huge pages of {size} are free, but this process may not have as many"),
                format!(
                    "raise the limit that it met: the control group's (/proc/self/cgroup) hugetlb.{name}.max or \
                     hugetlb.{name}.rsvd.max (limit_in_bytes in version 1), its cpuset.mems, or ulimit -v"
                ),
            );
        }
        let enough = self.total() + (needed - free);
        (
            format!("{needed} huge pages of {size} are needed, {free} are free"),
            format!("run: echo {enough} | sudo tee {}", self.folder.join("nr_hugepages").display()),
        )
    }
}

/// Whether a region did without the pages that it wanted so far: complained about once.
pub(super) struct FallbackWarning(AtomicBool);

impl FallbackWarning {
    pub(super) const fn new() -> Self {
        Self(AtomicBool::new(false))
    }

    /// Warns, the first time, that `region` has smaller pages than it wanted because of `error`.
    pub(super) fn warn(&self, region: &Region, error: &Error) {
        if !self.0.swap(true, Ordering::Relaxed) {
            tracing::warn!(
                "{region:?} has smaller pages than it wanted, which costs address translations: {error}"
            );
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
    fn bytes_are_for_people() {
        for (bytes, text) in [
            (0, "0 bytes"),
            (1, "1 bytes"),
            (1023, "1023 bytes"),
            (4096, "4 KiB"),
            (5000, "4.8 KiB"),
            ((64 << 20) + 4096, "64.0 MiB"),
            (64 << 20, "64 MiB"),
            (3 << 30, "3 GiB"),
            (24_058_420 << 10, "22.9 GiB"),
            (1 << 40, "1 TiB"),
            (u64::MAX, "15.9 EiB"),
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
        let (why, mend) = pool.shortage(32, Step::Map);
        assert_eq!(why, "32 huge pages of 2 MiB are needed, 0 are free");
        assert_eq!(mend, "run: echo 32 | sudo tee /nowhere/hugepages-2048kB/nr_hugepages");
    }

    #[test]
    fn a_limit_is_not_mended_by_more_pages() {
        let folder = std::env::temp_dir().join(format!("underpass-pool-{}", std::process::id()));
        fs::create_dir(&folder).unwrap();
        for (file, pages) in
            [("nr_hugepages", "500\n"), ("free_hugepages", "480\n"), ("resv_hugepages", "80\n")]
        {
            fs::write(folder.join(file), pages).unwrap();
        }
        let pool = Pool { page_size: PageSize::Size1G, folder: folder.clone() };
        let enough = pool.shortage(400, Step::Map);
        let too_few = pool.shortage(401, Step::Map);
        let set_aside = pool.shortage(401, Step::Populate);
        fs::remove_dir_all(&folder).unwrap();
        for (_, mend) in [enough, set_aside] {
            assert!(mend.contains("hugetlb.1GB.max") && !mend.contains("nr_hugepages"), "{mend}");
        }
        assert_eq!(too_few.0, "401 huge pages of 1 GiB are needed, 400 are free");
        assert!(too_few.1.starts_with("run: echo 501 | "), "{}", too_few.1);
    }

    #[test]
    fn a_shortage_of_memory_is_told_from_a_limit() {
        let (why, mend) = shortage_of_memory(32 << 30, Some(24_058_420 << 10));
        assert_eq!(
            (&*why, &*mend),
            ("22.9 GiB of memory are available", "stop what else uses memory, or ask for less")
        );
        let (_, mend) = shortage_of_memory(4096, Some(24_058_420 << 10));
        assert!(mend.contains("memory.max") && mend.contains("vm.max_map_count"), "{mend}");
    }

    #[test]
    fn failed_system_calls_have_mends() {
        let error = short_of(4096, PageSize::Size4K, Step::Map, Errno::ACCESS);
        assert_eq!(error.kind(), ErrorKind::Permission);
        assert!(error.mend_text().unwrap().contains("open for reading and writing"), "{error}");
        assert!(mend_for(Errno::MFILE).contains("ulimit -n"));
        assert!(mend_for_placing(Errno::PERM).contains("CAP_SYS_NICE"));
        assert!(mend_for_placing(Errno::INVAL).contains("Mems_allowed_list"));
    }
}
