//! DMA memory: regions of huge pages that are mapped here, populated, and ready to be mapped for a device.
//!
//! # Why this module is unsafe
//! Memory that a device writes behind the compiler's back can not be a `Box` or a `Vec`: it is mapped by hand,
//! at an address and with pages that suit an IOMMU.
//!
//! The invariant: a [`Map`] owns its range of this process's addresses from the moment that it exists until it
//! is dropped, all of it readable, writable and backed by memory that can not shrink. Nothing in this module
//! makes a reference into that range; a [`Region`] only tells where it is. What is aliased and when is up to
//! whoever claims the region.
//!
//! At most one region over the same memory can be claimed: the one that allocated it. Those made of its file
//! descriptor never can, since they may share their pages with any number of others.

mod host;
mod map;
mod slot;

use std::fmt;
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{MemfdFlags, SealFlags};
use rustix::io::Errno;

use crate::{Error, ErrorKind, Iova, PageSize, Result};

pub(crate) use self::host::Bytes;
use self::host::{FallbackWarning, Step, mend_for, short_of};
use self::map::Map;
pub use self::slot::RegionId;
use self::slot::{PREFERRED, Slot};

/// What a region's memory is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Backing {
    /// A memfd of huge pages, or of 4 KiB pages where there are none: needs no mount and no privileges, and can
    /// be handed to another process.
    #[default]
    Memfd,
    /// Private huge pages of the system's default size, without a file descriptor and without a fallback.
    AnonymousHuge,
}

/// DMA memory: whole pages of one size, populated, aligned to that size, and in no other use.
///
/// It is mapped for devices by [`Ioas::map`](crate::Ioas::map), which keeps it alive. Regions of 2 MiB and more
/// are aligned to 2 MiB even if their pages are smaller.
pub struct Region {
    owned: ManuallyDrop<Owned>,
    page_size: PageSize,
    preferred_iova: Option<Iova>,
    /// Whether nobody can claim it, or no more.
    claimed: AtomicBool,
    leaked: AtomicBool,
}

/// Whether regions have pages of 4 KiB only if those are asked for.
static HUGE_PAGES_ONLY: AtomicBool = AtomicBool::new(false);

/// From now on, a region whose page size is not named has huge pages, however short it is: without an IOMMU, memory that the
/// kernel may move can not be used.
pub(crate) fn use_huge_pages_only() {
    // It orders nothing: whoever builds a region for such a device has heard of the device.
    HUGE_PAGES_ONLY.store(true, Ordering::Relaxed);
}

/// Whether anybody can claim a region.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Claim {
    Once,
    Never,
}

/// What a region gives back when it is dropped, in this order.
struct Owned {
    map: Map,
    fd: Option<OwnedFd>,
    slot: Slot,
}

impl Region {
    /// A builder for a region of at least `len` bytes.
    pub fn builder(len: u64) -> RegionBuilder {
        RegionBuilder {
            len,
            page_size: None,
            numa_node: None,
            backing: Backing::default(),
            name: "underpass".to_owned(),
        }
    }

    /// The region whose memory is `fd`, a memfd from another process: all of it, mapped and populated. Both
    /// processes then share it.
    ///
    /// It can not be [claimed](Self::claim), not even once: whoever else holds the descriptor may write the memory
    /// at any time. What is left is to map it for devices, and to read and write it at [`as_ptr`](Self::as_ptr)
    /// by volatile or atomic accesses, without references, as memory that a device shares.
    ///
    /// The seal that is asked for keeps the memory from being truncated under this process. It does not stop a
    /// process that holds the descriptor from punching holes; where those are huge pages and the pool runs dry
    /// after that, touching a hole is a SIGBUS. Take descriptors from those whom you trust that far.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] unless `fd` is a memfd of whole pages, sealed against shrinking and not
    /// against writing; [`ErrorKind::Unsupported`] for huge pages other than of 2 MiB and 1 GiB;
    /// [`ErrorKind::NoMemory`] if its pages can not be populated.
    pub fn from_fd(fd: OwnedFd) -> Result<Arc<Self>> {
        const OPERATION: &str = "use a file descriptor as DMA memory";
        let invalid = |why: &'static str| Error::new(ErrorKind::InvalidInput, OPERATION, why);
        let os = |errno: Errno| Error::os(OPERATION, "it can not be examined", errno).mend(mend_for(errno));

        let seals = rustix::fs::fcntl_get_seals(&fd).map_err(|_| {
            invalid("it is not a memfd, so that it may shrink while a device uses it")
                .mend("hand over a memfd: memfd_create(2) with MFD_ALLOW_SEALING")
        })?;
        if !seals.contains(SealFlags::SHRINK) {
            return Err(invalid("it is not sealed against shrinking, and may do so while a device uses it")
                .mend("in the process that made it, call fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK)"));
        }
        if seals.intersects(SealFlags::WRITE | SealFlags::FUTURE_WRITE) {
            return Err(invalid("it is sealed against writing").mend("hand over a memfd without that seal"));
        }
        // The block size that stat(2) gives is no use: tmpfs reports huge pages there that it may not have.
        let filesystem = rustix::fs::fstatfs(&fd).map_err(os)?;
        let page_size = if host::is_hugetlbfs(&filesystem) {
            let bytes = filesystem.f_bsize;
            let known =
                PageSize::LARGEST_FIRST.into_iter().find(|size| i64::try_from(size.bytes()) == Ok(bytes));
            known.ok_or_else(|| {
                let why = format!("its pages are of {bytes} bytes");
                Error::new(ErrorKind::Unsupported, OPERATION, why).mend("use pages of 4 KiB, 2 MiB or 1 GiB")
            })?
        } else {
            PageSize::Size4K
        };
        let len = u64::try_from(rustix::fs::fstat(&fd).map_err(os)?.st_size).unwrap_or(0);
        if len == 0 || !len.is_multiple_of(page_size.bytes()) {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                OPERATION,
                format!("its size, {len} bytes, is not one or more whole pages of {page_size}"),
            )
            .mend("set its size with ftruncate(2) before sealing it"));
        }
        let map = map_memfd(&fd, len, page_size)?;
        map.populate(Some(fd.as_fd())).map_err(|errno| short_of(len, page_size, Step::Populate, errno))?;
        Ok(Self::assemble(map, Some(fd), page_size, Claim::Never))
    }

    fn assemble(map: Map, fd: Option<OwnedFd>, page_size: PageSize, claim: Claim) -> Arc<Self> {
        let len = map.len() as u64;
        Arc::new(Self {
            preferred_iova: PREFERRED.take(len, alignment(len, page_size)),
            owned: ManuallyDrop::new(Owned { map, fd, slot: Slot::take() }),
            page_size,
            claimed: AtomicBool::new(claim == Claim::Never),
            leaked: AtomicBool::new(false),
        })
    }

    /// Which region of this process it is: a small number, for tables.
    #[inline]
    pub fn id(&self) -> RegionId {
        self.owned.slot.id()
    }

    /// Its length in bytes, a multiple of [`page_size`](Self::page_size).
    #[inline]
    #[expect(clippy::len_without_is_empty, reason = "no region is empty")]
    pub fn len(&self) -> u64 {
        self.owned.map.len() as u64
    }

    /// The size of its pages.
    #[inline]
    pub fn page_size(&self) -> PageSize {
        self.page_size
    }

    /// Its first byte. [`len`](Self::len) bytes from there on are readable and writable for as long as the
    /// region lives; whether anybody else uses them at the same time is for the caller to know.
    #[inline]
    pub fn as_ptr(&self) -> NonNull<u8> {
        self.owned.map.start()
    }

    /// The memfd, sealed to its size: what another process makes a region of the same memory of, by
    /// [`from_fd`](Self::from_fd).
    ///
    /// Whoever holds the descriptor is a device in the sense of the rules of DMA: it reads and writes only what it
    /// was handed, and only until it gave that back. That goes for this process too, and for write(2) on the
    /// descriptor as for a mapping of it. Hand it to those whom you trust that far.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] for [`Backing::AnonymousHuge`], which has none.
    pub fn fd(&self) -> Result<BorrowedFd<'_>> {
        self.owned.fd.as_ref().map(AsFd::as_fd).ok_or_else(|| {
            Error::new(
                ErrorKind::Unsupported,
                format!("hand out a file descriptor of {self:?}"),
                "anonymous huge pages have none",
            )
            .mend("build the region with Backing::Memfd")
        })
    }

    /// Where it would best be mapped in every address space, so that most have it at the same place: a range of
    /// this process's that no other region gets, aligned as the memory is. `None` once those are used up; nothing
    /// may rely on a region being there.
    #[inline]
    pub fn preferred_iova(&self) -> Option<Iova> {
        self.preferred_iova
    }

    /// Claims the bytes of this region: true for the first who does, and never again; always false for a region
    /// made by [`from_fd`](Self::from_fd), whose bytes others share.
    ///
    /// Who claimed them may make references to them, and is alone in this process with them but for devices.
    pub fn claim(&self) -> bool {
        // Only whether it is the first matters: the region reached this thread by something that synchronizes.
        !self.claimed.swap(true, Ordering::Relaxed)
    }

    /// From now on the memory is never given back, not even when the region is dropped: for memory that a device
    /// which could not be stopped may still write.
    pub fn leak(&self) {
        // Read by drop, which the last Arc's release and acquire order behind this.
        self.leaked.store(true, Ordering::Relaxed);
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        if !*self.leaked.get_mut() {
            // SAFETY: this is the only place that drops it, runs once, and nothing uses `self` after it.
            unsafe { ManuallyDrop::drop(&mut self.owned) }
        }
    }
}

impl fmt::Debug for Region {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Region#{}({} of {} pages)", self.id().index(), Bytes(self.len()), self.page_size)
    }
}

/// Describes a [`Region`] to be.
#[derive(Debug, Clone)]
#[must_use = "nothing is allocated before build()"]
pub struct RegionBuilder {
    len: u64,
    page_size: Option<PageSize>,
    numa_node: Option<u32>,
    backing: Backing,
    name: String,
}

impl RegionBuilder {
    /// Asks for pages of exactly this size; without them [`build`](Self::build) fails.
    ///
    /// By default a region gets the largest that is not above its length and whose rounding wastes no more than
    /// a quarter of it, and smaller ones, with a warning, where no such page is free. In a process that has opened
    /// [`noiommu`](crate::noiommu), the smallest are of 2 MiB.
    pub fn page_size(mut self, page_size: PageSize) -> Self {
        self.page_size = Some(page_size);
        self
    }

    /// Asks for memory near this NUMA node. Where the node has none left, the memory comes from another one:
    /// that is slower, whereas insisting (`MPOL_BIND`) would have the kernel kill processes to make room.
    pub fn numa_node(mut self, node: u32) -> Self {
        self.numa_node = Some(node);
        self
    }

    /// What the memory is; a memfd by default.
    pub fn backing(mut self, backing: Backing) -> Self {
        self.backing = backing;
        self
    }

    /// What the memory is called in `/proc/PID/maps`, `/memfd:NAME`.
    pub fn name(mut self, name: &str) -> Self {
        name.clone_into(&mut self.name);
        self
    }

    /// Allocates, places, populates and seals the memory, which is all zeroes.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] for a length of zero or one that no address space holds, or a bad name;
    /// [`ErrorKind::NotFound`] for a NUMA node without memory; [`ErrorKind::NoMemory`] or
    /// [`ErrorKind::Unsupported`] where pages of the size that was asked for, or any at all, are not to be had.
    pub fn build(self) -> Result<Arc<Region>> {
        static WARNING: FallbackWarning = FallbackWarning::new();
        self.build_with(&WARNING)
    }

    fn build_with(&self, warning: &FallbackWarning) -> Result<Arc<Region>> {
        if self.len == 0 {
            return Err(self.invalid("its length is zero").mend("ask for one byte at least"));
        }
        if let Some(node) = self.numa_node {
            host::check_numa_node(node).map_err(|why| {
                Error::new(ErrorKind::NotFound, self.operation(), why).mend("name one of those, or none")
            })?;
        }
        match (self.backing, self.page_size) {
            (Backing::AnonymousHuge, _) => self.anonymous_huge(),
            (Backing::Memfd, Some(page_size)) => self.memfd(page_size),
            (Backing::Memfd, None) => {
                let huge_only = HUGE_PAGES_ONLY.load(Ordering::Relaxed);
                let smallest = if huge_only { PageSize::Size2M } else { PageSize::Size4K };
                let (region, refusal) =
                    first_to_be_had(huge_pages_for(self.len), smallest, |size| self.memfd(size))?;
                if let Some(error) = refusal {
                    warning.warn(&region, &error);
                }
                Ok(region)
            }
        }
    }

    fn memfd(&self, page_size: PageSize) -> Result<Arc<Region>> {
        let len = self.rounded(page_size)?;
        let huge = match page_size {
            PageSize::Size4K => MemfdFlags::empty(),
            PageSize::Size2M => MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB,
            PageSize::Size1G => MemfdFlags::HUGETLB | MemfdFlags::HUGE_1GB,
        };
        if huge.is_empty() && host::available_memory().is_some_and(|available| available < len) {
            // The kernel would promise the pages and kill processes once it can not keep its word.
            return Err(short_of(len, page_size, Step::Map, Errno::NOMEM));
        }
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING | huge;
        // Kernels from 6.3 on want to be told whether the file may be executed; older ones know no such flag.
        let fd = rustix::fs::memfd_create(self.name.as_str(), flags | MemfdFlags::NOEXEC_SEAL)
            .or_else(|errno| match errno {
                Errno::INVAL => rustix::fs::memfd_create(self.name.as_str(), flags),
                _ => Err(errno),
            })
            .map_err(|errno| match errno {
                Errno::INVAL => self
                    .invalid("its name has a zero byte or more than 249 bytes")
                    .mend("give it a shorter name, without zero bytes"),
                // What the kernel says where it was built, or the CPU made, without these pages.
                Errno::NODEV | Errno::NOENT | Errno::NOSYS | Errno::OPNOTSUPP if !huge.is_empty() => {
                    self.no_such_pages(page_size)
                }
                _ => self.os("no memfd can be made", errno),
            })?;
        rustix::fs::ftruncate(&fd, len)
            .and_then(|()| {
                rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)
            })
            .map_err(|errno| self.os("the memfd can not be sized and sealed", errno))?;
        let map = map_memfd(&fd, len, page_size)?;
        self.place(&map)?;
        map.populate(Some(fd.as_fd())).map_err(|errno| short_of(len, page_size, Step::Populate, errno))?;
        Ok(Region::assemble(map, Some(fd), page_size, Claim::Once))
    }

    fn anonymous_huge(&self) -> Result<Arc<Region>> {
        let page_size = host::default_huge_page().ok_or_else(|| {
            Error::new(
                ErrorKind::Unsupported,
                self.operation(),
                "the default huge pages of this kernel are neither of 2 MiB nor of 1 GiB",
            )
            .mend("build the region with Backing::Memfd")
        })?;
        if self.page_size.is_some_and(|asked| asked != page_size) {
            return Err(Error::new(
                ErrorKind::Unsupported,
                self.operation(),
                format!("anonymous huge pages have the system's default size, {page_size}"),
            )
            .mend("build the region with Backing::Memfd"));
        }
        let len = self.rounded(page_size)?;
        let map = Map::anonymous_huge(len as usize, page_size.bytes() as usize)
            .ok_or_else(|| short_of(len, page_size, Step::Map, Errno::NOMEM))?;
        self.place(&map)?;
        // A child that is forked would otherwise share the pages until one of the two writes, and that one would
        // get a copy the device knows nothing of.
        map.keep_from_children()
            .map_err(|errno| self.os("it can not be kept out of forked processes", errno))?;
        map.populate(None).map_err(|errno| short_of(len, page_size, Step::Populate, errno))?;
        Ok(Region::assemble(map, None, page_size, Claim::Once))
    }

    /// Moves the pages that are to come to the node that was asked for.
    fn place(&self, map: &Map) -> Result<()> {
        let Some(node) = self.numa_node else { return Ok(()) };
        map.prefer_node(node).map_err(|errno| {
            Error::os(self.operation(), format!("it can not be placed near NUMA node {node}"), errno)
                .mend(host::mend_for_placing(errno))
        })
    }

    /// The length in whole pages.
    fn rounded(&self, page_size: PageSize) -> Result<u64> {
        self.len
            .checked_next_multiple_of(page_size.bytes())
            .filter(|&len| isize::try_from(len).is_ok())
            .ok_or_else(|| {
                self.invalid("no address space holds that much")
                    .mend("ask for less than 8 EiB; was the length computed by a subtraction that wrapped?")
            })
    }

    fn operation(&self) -> String {
        format!("allocate {} of DMA memory", Bytes(self.len))
    }

    fn invalid(&self, why: &'static str) -> Error {
        Error::new(ErrorKind::InvalidInput, self.operation(), why)
    }

    fn os(&self, why: &'static str, errno: Errno) -> Error {
        Error::os(self.operation(), why, errno).mend(mend_for(errno))
    }

    fn no_such_pages(&self, page_size: PageSize) -> Error {
        let why = format!("this CPU or kernel has no pages of {page_size}");
        Error::new(ErrorKind::Unsupported, self.operation(), why)
            .mend("ask for smaller pages, or for no size")
    }
}

/// The sizes of huge page to try for a region of `len` bytes, the best first: not above its length, and wasting
/// no more than a quarter of it: a pool of 4096 packets, of 8.5 MiB, gets huge pages.
fn huge_pages_for(len: u64) -> impl Iterator<Item = PageSize> {
    PageSize::LARGEST_FIRST.into_iter().filter(move |size| {
        let rounded = len.checked_next_multiple_of(size.bytes());
        let wastes_little = rounded.is_some_and(|rounded| rounded - len <= len / 4);
        *size != PageSize::Size4K && size.bytes() <= len && wastes_little
    })
}

/// What `attempt` makes of the first of the sizes `wanted` that are to be had, else of the `smallest`; and, if it fell
/// back to smaller pages than the administrator could have provided, why the largest of those was refused.
fn first_to_be_had<T>(
    wanted: impl Iterator<Item = PageSize>,
    smallest: PageSize,
    attempt: impl Fn(PageSize) -> Result<T>,
) -> Result<(T, Option<Error>)> {
    let mut refusal = None;
    for page_size in wanted.filter(|size| *size > smallest) {
        match attempt(page_size) {
            Ok(made) => return Ok((made, refusal)),
            // Pages that this machine can not have at all are nothing to complain about.
            Err(error) if error.kind() == ErrorKind::Unsupported => {}
            Err(error) if error.kind() == ErrorKind::NoMemory => refusal = refusal.or(Some(error)),
            Err(error) => return Err(error),
        }
    }
    Ok((attempt(smallest)?, refusal))
}

/// What the addresses of a region are aligned to. Regions of small pages too get it for 2 MiB if they have as
/// much, so that an IOMMU which finds the pages in a row can use one entry for them.
fn alignment(len: u64, page_size: PageSize) -> u64 {
    let large = len >= PageSize::Size2M.bytes();
    page_size.max(if large { PageSize::Size2M } else { PageSize::Size4K }).bytes()
}

fn map_memfd(fd: &OwnedFd, len: u64, page_size: PageSize) -> Result<Map> {
    let mapped = if page_size == PageSize::Size4K {
        Map::file(fd.as_fd(), len as usize, alignment(len, page_size) as usize)
    } else {
        Map::huge_file(fd.as_fd(), len as usize)
    };
    mapped.map_err(|errno| short_of(len, page_size, Step::Map, errno))
}

#[cfg(test)]
mod tests;
