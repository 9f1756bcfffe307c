//! How much memory a run takes, and of which pages it is.

use std::fs;

use anyhow::bail;
use underpass::Region;
use underpass::accel::OpKind;
use underpass::iommu::PageSize;

use super::args::Args;
use super::expect::Shape;
use super::lane::Lane;
use crate::{Usage, size};

/// Working set unless one is asked for: beyond the caches of one core.
const WORKING_SET: u64 = 64 << 20;

/// Jobs that one queue goes round in, at most: each is kept with its buffers.
const MAX_SLOTS: u64 = 1 << 22;

/// The kernel's pool of 2 MiB pages (Documentation/admin-guide/mm/hugetlbpage.rst).
const POOL: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";

/// How many jobs each queue goes round in, so that their buffers make up the working set.
pub(super) fn slots(args: &Args, shape: &Shape, queues: usize) -> anyhow::Result<usize> {
    if shape.kind == OpKind::Nop {
        return Ok(args.batch.max(1024));
    }
    let footprint = Lane::footprint(shape) as u64;
    let of_queue = args.working_set.unwrap_or(WORKING_SET) / queues as u64;
    // A batch needs a job for each of its members.
    let least = args.batch as u64;
    let slots = of_queue / footprint;
    if slots > MAX_SLOTS {
        return Err(Usage(format!(
            "a working set of {slots} jobs a queue is too many (at most {MAX_SLOTS}); use a larger --size or a \
             smaller --working-set"
        ))
        .into());
    }
    if slots >= least {
        return Ok(slots as usize);
    }
    let needed = footprint.saturating_mul(least).saturating_mul(queues as u64);
    let what = format!("{queues} queue(s) with {} job(s) of {} at a time", args.batch, size::show(args.size));
    if let Some(given) = args.working_set {
        return Err(Usage(format!(
            "--working-set {given} is too small for {what}; use --working-set {needed} or more, or a lower --size"
        ))
        .into());
    }
    if let Some(available) = available()
        && available < needed
    {
        bail!(
            "the buffers of {what} take {}, and {} MiB of memory are available; use a lower --size, --queues or \
             --batch",
            size::show(needed),
            available >> 20,
        );
    }
    crate::note(&format!("the buffers of {what} take {}", size::show(needed)));
    Ok(least as usize)
}

/// Memory that can be had without swapping, and what is free in the pool of huge pages.
fn available() -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let value = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = value.trim().strip_suffix("kB")?.trim_end().parse().ok()?;
    Some(kib * 1024 + pool("free_hugepages").unwrap_or(0) * PageSize::Size2M.bytes())
}

fn pool(file: &str) -> Option<u64> {
    fs::read_to_string(format!("{POOL}/{file}")).ok()?.trim().parse().ok()
}

/// How many pages of 2 MiB the region would have liked to have but did not get.
pub(crate) fn small_pages(region: &Region) -> u64 {
    if region.page_size() != PageSize::Size4K {
        return 0;
    }
    let (len, page) = (region.len(), PageSize::Size2M.bytes());
    let rounded = len.next_multiple_of(page);
    if len >= page && rounded - len <= len / 8 { rounded / page } else { 0 }
}

/// Tells how to get those pages, if any are missing and this kernel has them.
pub(crate) fn tell_small_pages(missing: u64) {
    if missing == 0 {
        return;
    }
    if let (Some(total), Some(free)) = (pool("nr_hugepages"), pool("free_hugepages")) {
        let enough = total + missing.saturating_sub(free);
        crate::note(&format!(
            "4 KiB pages were used; reserve huge pages: echo {enough} | sudo tee {POOL}/nr_hugepages"
        ));
    }
}
