//! Memory for devices: huge pages, and how much may be locked.

use std::path::Path;

use underpass::pci::host::Host;

use super::Check;
use crate::folder::names;
use crate::{memlock, size};

/// Pages of one size, on one node or the whole machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Pages {
    bytes: u64,
    total: u64,
    free: u64,
}

pub(super) fn huge_pages(host: &Host) -> Check {
    const NAME: &str = "huge pages";
    const MEND: &str = "echo 64 | sudo tee /sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";
    let all = pages(host, Path::new("/sys/kernel/mm/hugepages"));
    if all.is_empty() {
        return Check::warn(NAME, "the kernel has none", "a kernel with CONFIG_HUGETLBFS");
    }
    let sizes: Vec<_> = all
        .iter()
        .map(|pages| {
            let per_node = by_node(host, pages.bytes);
            format!("{}: {} free of {}{per_node}", size::show(pages.bytes), pages.free, pages.total)
        })
        .collect();
    let found = sizes.join("; ");
    if all.iter().any(|pages| pages.free > 0) {
        return Check::ok(NAME, found);
    }
    let is_used = all.iter().any(|pages| pages.total > 0);
    let why = if is_used { "none is left" } else { "none" };
    Check::warn(NAME, format!("{why} ({found}): memory is in pages of 4 KiB, which is slower"), MEND)
}

pub(super) fn memlock() -> Check {
    const NAME: &str = "memlock";
    let limit = memlock::own();
    let shown = limit.map_or_else(|| "unlimited".to_owned(), size::show);
    // The kernel counts nothing for whoever may lock as much as it likes (CAP_IPC_LOCK).
    if rustix::process::geteuid().is_root() {
        return Check::ok(NAME, format!("{shown}; root may lock any"));
    }
    if memlock::is_enough(limit) {
        return Check::ok(NAME, shown);
    }
    let found = format!("{shown} for all that devices may reach, too little for most uses");
    Check::warn(NAME, found, memlock::mend("$USER"))
}

fn by_node(host: &Host, bytes: u64) -> String {
    let folder = Path::new("/sys/devices/system/node");
    let nodes: Vec<_> = names(&host.path(folder))
        .into_iter()
        .filter(|name| name.strip_prefix("node").is_some_and(|number| number.parse::<u32>().is_ok()))
        .collect();
    if nodes.len() < 2 {
        return String::new();
    }
    let counts = nodes.iter().map(|node| {
        let pages = pages(host, &folder.join(node).join("hugepages"));
        let pages = pages.iter().find(|pages| pages.bytes == bytes);
        format!("{node} {}/{}", pages.map_or(0, |pages| pages.free), pages.map_or(0, |pages| pages.total))
    });
    format!(" ({})", counts.collect::<Vec<_>>().join(", "))
}

/// The pages of each size, the smallest first.
fn pages(host: &Host, folder: &Path) -> Vec<Pages> {
    let of_size = |name: &String| {
        let kib: u64 = name.strip_prefix("hugepages-")?.strip_suffix("kB")?.parse().ok()?;
        let count = |file| host.text(folder.join(name).join(file))?.parse().ok();
        Some(Pages { bytes: kib << 10, total: count("nr_hugepages")?, free: count("free_hugepages")? })
    };
    let mut pages: Vec<_> = names(&host.path(folder)).iter().filter_map(of_size).collect();
    pages.sort_by_key(|pages| pages.bytes);
    pages
}
