//! Where memory is physically, from /proc/self/pagemap (Documentation/admin-guide/mm/pagemap.rst, Linux 7.3).

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use crate::{Error, ErrorKind, Iova, PageSize, Region, Result};

/// What the file counts in: the processor's pages.
const BASE_PAGE: u64 = PageSize::Size4K.bytes();
/// An entry is one little-endian word a base page.
const ENTRY: u64 = 8;
const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
/// The page's frame number; all zeroes for a process without `CAP_SYS_ADMIN`.
const FRAME: u64 = (1 << 55) - 1;

/// Where each of the region's pages is.
///
/// # Errors
/// [`ErrorKind::Unsupported`] for pages of 4 KiB, which the kernel may move; [`ErrorKind::Permission`] if it does
/// not tell this process.
pub(super) fn pages(region: &Region) -> Result<Box<[Iova]>> {
    if region.page_size() == PageSize::Size4K {
        return Err(Error::new(
            ErrorKind::Unsupported,
            operation(region),
            "the kernel moves pages of 4 KiB to other addresses, and without an IOMMU the device would not follow",
        )
        .mend("set huge pages aside: sysctl vm.nr_hugepages=64"));
    }
    let file = File::open("/proc/self/pagemap")
        .map_err(|error| Error::os(operation(region), "/proc/self/pagemap can not be opened", error))?;
    let (start, size) = (region.as_ptr().as_ptr() as u64, region.page_size().bytes());
    let page = |n: u64| {
        // The first and the last base page: what is between is one page of memory.
        let first = entry(&file, start + n * size).map_err(|error| unread(region, error))?;
        let last = entry(&file, start + (n + 1) * size - BASE_PAGE).map_err(|error| unread(region, error))?;
        let address = frame(first).map_err(|why| untold(region, why))?;
        let end = frame(last).map_err(|why| untold(region, why))?;
        if !address.is_multiple_of(size) || end != address + size - BASE_PAGE {
            return Err(untold(region, Untold::NotHuge));
        }
        Ok(Iova::new(address))
    };
    (0..region.len() / size).map(page).collect()
}

fn operation(region: &Region) -> String {
    format!("find the physical addresses of {region:?}")
}

/// The entry of the base page at `address` in this process.
fn entry(pagemap: &File, address: u64) -> io::Result<u64> {
    let mut entry = [0; ENTRY as usize];
    pagemap.read_exact_at(&mut entry, address / BASE_PAGE * ENTRY)?;
    Ok(u64::from_ne_bytes(entry))
}

/// Why an entry has no address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Untold {
    /// There is no memory.
    Absent,
    /// There is, but where is a secret.
    Secret,
    /// The pages are not what the region took them for.
    NotHuge,
}

/// The physical address in an entry.
fn frame(entry: u64) -> Result<u64, Untold> {
    if entry & PRESENT == 0 || entry & SWAPPED != 0 {
        return Err(Untold::Absent);
    }
    match entry & FRAME {
        0 => Err(Untold::Secret),
        // A processor's physical addresses have 52 bits at most.
        frame => frame.checked_mul(BASE_PAGE).ok_or(Untold::Absent),
    }
}

#[cold]
fn unread(region: &Region, error: io::Error) -> Error {
    Error::os(operation(region), "/proc/self/pagemap can not be read", error)
}

#[cold]
fn untold(region: &Region, why: Untold) -> Error {
    match why {
        Untold::Secret => Error::new(
            ErrorKind::Permission,
            operation(region),
            "the kernel tells them to processes with CAP_SYS_ADMIN alone",
        )
        .mend("run as root"),
        Untold::Absent => Error::new(ErrorKind::Os, operation(region), "a page is not in memory"),
        Untold::NotHuge => {
            Error::new(ErrorKind::Os, operation(region), "a huge page is not in one piece of memory")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_is_a_frame_a_secret_or_nothing() {
        // Bits as the document has them: 63 present, 62 swapped, 61 of a file, 56 mapped once, 55 soft-dirty.
        let flags = 1 << 63 | 1 << 61 | 1 << 56 | 1 << 55;
        assert_eq!(frame(flags | 0x12_3456), Ok(0x1_2345_6000));
        assert_eq!(frame(flags | ((1 << 40) - 1)), Ok(0xf_ffff_ffff_f000));
        assert_eq!(frame(flags | ((1 << 55) - 1)), Err(Untold::Absent), "past the end of all addresses");
        assert_eq!(frame(flags), Err(Untold::Secret));
        assert_eq!(frame(0), Err(Untold::Absent));
        assert_eq!(frame(1 << 62 | 0x12_3456), Err(Untold::Absent), "swapped out");
        assert_eq!(frame(0x12_3456), Err(Untold::Absent));
    }

    #[test]
    fn memory_that_may_move_is_refused_with_the_mend() {
        let region = Region::builder(4 << 20).page_size(PageSize::Size4K).build().unwrap();
        let error = pages(&region).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        assert!(error.mend_text().is_some_and(|mend| mend.contains("vm.nr_hugepages")), "{error}");
    }
}
