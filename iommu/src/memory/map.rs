//! Ranges of this process's addresses, mapped by hand.

use std::alloc::Layout;
use std::mem::ManuallyDrop;
use std::os::fd::BorrowedFd;
use std::ptr::{self, NonNull};

use rustix::fs::FallocateFlags;
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags};

/// A readable, writable range of addresses with memory behind it; unmapped when dropped.
pub(super) struct Map {
    start: NonNull<u8>,
    len: usize,
    /// Set where the memory came from `hugepage_rs`, which wants it back with this layout.
    layout: Option<Layout>,
}

// SAFETY: a Map owns its range, which belongs to the process and to no thread; it makes no reference into it.
unsafe impl Send for Map {}
// SAFETY: as above; nothing that a shared Map offers reads or writes the range's bytes, but for `populate`, which
// leaves their values alone.
unsafe impl Sync for Map {}

impl Map {
    /// All `len` bytes of `fd`, a memfd of huge pages: the kernel aligns those to their size by itself.
    pub(super) fn huge_file(fd: BorrowedFd<'_>, len: usize) -> Result<Self, Errno> {
        // SAFETY: a new mapping at an address of the kernel's choice touches nothing that exists.
        let start = unsafe {
            rustix::mm::mmap(
                ptr::null_mut(),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                fd,
                0,
            )
        }?;
        Self::new(start.cast(), len)
    }

    /// All `len` bytes of `fd`, a memfd of small pages, at a multiple of `alignment`, a power of two.
    pub(super) fn file(fd: BorrowedFd<'_>, len: usize, alignment: usize) -> Result<Self, Errno> {
        // Whatever the kernel chooses has an aligned address within its first `alignment` bytes.
        let room = Self::reserve(len.checked_add(alignment).ok_or(Errno::NOMEM)?)?;
        let unaligned = room.start.addr().get();
        let skipped = unaligned.next_multiple_of(alignment) - unaligned;
        let (before, rest) = room.split(skipped);
        let (place, after) = rest.split(len);
        // SAFETY: the range is `place`'s, which is page-aligned, reserved, and referred to by nothing.
        let mapped = unsafe {
            rustix::mm::mmap(
                place.start.as_ptr().cast(),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED | MapFlags::FIXED,
                fd,
                0,
            )
        };
        drop((before, after));
        match mapped {
            Ok(_) => Ok(place),
            Err(errno) => {
                // It may have unmapped the place before it failed, and another thread may be there by now.
                let _given_up = ManuallyDrop::new(place);
                Err(errno)
            }
        }
    }

    /// `len` bytes of private huge pages of the system's default size, which is `page` bytes and divides `len`;
    /// `None` if the pool has not enough. There must be such a size (`Hugepagesize` in /proc/meminfo).
    pub(super) fn anonymous_huge(len: usize, page: usize) -> Option<Self> {
        let layout = Layout::from_size_align(len, page).ok().filter(|layout| layout.size() != 0)?;
        // SAFETY: the layout's size is not zero.
        let start = NonNull::new(unsafe { hugepage_rs::alloc(layout) })?;
        Some(Self { start, len, layout: Some(layout) })
    }

    /// Addresses that nothing else in this process gets, without access or memory.
    fn reserve(len: usize) -> Result<Self, Errno> {
        // SAFETY: a new mapping at an address of the kernel's choice touches nothing that exists.
        let start = unsafe {
            rustix::mm::mmap_anonymous(
                ptr::null_mut(),
                len,
                ProtFlags::empty(),
                MapFlags::PRIVATE | MapFlags::NORESERVE,
            )
        }?;
        Self::new(start.cast(), len)
    }

    fn new(start: *mut u8, len: usize) -> Result<Self, Errno> {
        Ok(Self { start: NonNull::new(start).ok_or(Errno::NOMEM)?, len, layout: None })
    }

    /// The first `at` bytes, whole pages, and what follows them; either may be empty.
    fn split(self, at: usize) -> (Self, Self) {
        assert!(at <= self.len && self.layout.is_none(), "split in the middle");
        // SAFETY: `at` is not above the length, so the pointer stays within the range or one behind it.
        let behind = unsafe { self.start.add(at) };
        // The parts own the range from here on.
        let whole = ManuallyDrop::new(self);
        (
            Self { start: whole.start, len: at, layout: None },
            Self { start: behind, len: whole.len - at, layout: None },
        )
    }

    pub(super) fn start(&self) -> NonNull<u8> {
        self.start
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Has pages that are not there yet come from NUMA node `node` while it has any.
    pub(super) fn prefer_node(&self, node: u32) -> Result<(), Errno> {
        let mut mask = vec![0_u64; node as usize / 64 + 1];
        mask[node as usize / 64] = 1 << (node % 64);
        // The kernel takes one bit less than it is told (mbind(2), "maxnode").
        let bits = mask.len() * 64 + 1;
        // SAFETY: mbind changes where the range's future pages come from, and no memory of the program; it reads
        // `bits` - 1 bits at `mask`, which has them.
        let result = unsafe {
            libc::syscall(
                libc::SYS_mbind,
                self.start.as_ptr(),
                self.len,
                libc::MPOL_PREFERRED,
                mask.as_ptr(),
                bits,
                0,
            )
        };
        match std::io::Error::last_os_error() {
            _ if result == 0 => Ok(()),
            // A kernel without NUMA: there all memory is near.
            error if error.raw_os_error() == Some(libc::ENOSYS) => Ok(()),
            error => Err(Errno::from_io_error(&error).unwrap_or(Errno::INVAL)),
        }
    }

    /// Leaves the range out of processes that are forked from this one.
    pub(super) fn keep_from_children(&self) -> Result<(), Errno> {
        self.advise(Advice::LinuxDontFork)
    }

    /// Has all pages in place, so that running out of memory is an error here and not a SIGBUS later. `fd` is the
    /// memfd behind the range, if there is one.
    ///
    /// Kernels before 5.14 can not do so; there a memfd's pages are allocated in the file instead, which also
    /// reports that they ran out, and private memory is refused (EINVAL).
    pub(super) fn populate(&self, fd: Option<BorrowedFd<'_>>) -> Result<(), Errno> {
        match (self.advise(Advice::LinuxPopulateWrite), fd) {
            (Err(Errno::INVAL), Some(fd)) => {
                rustix::fs::fallocate(fd, FallocateFlags::empty(), 0, self.len as u64)
            }
            (result, _) => result,
        }
    }

    /// `advice` must be one that leaves what the range holds alone.
    fn advise(&self, advice: Advice) -> Result<(), Errno> {
        // SAFETY: the range is ours and mapped; what is advised here changes none of its bytes.
        unsafe { rustix::mm::madvise(self.start.as_ptr().cast(), self.len, advice) }
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        if let Some(layout) = self.layout {
            // SAFETY: `anonymous_huge` got the range from `alloc` with this layout; it is given back once.
            unsafe { hugepage_rs::dealloc(self.start.as_ptr(), layout) };
        } else if self.len != 0 {
            // SAFETY: the range is ours, mapped as it is, and nobody may refer to it after its owner.
            let result = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), self.len) };
            if let Err(errno) = result {
                tracing::error!("{} bytes at {:p} stay mapped: {errno}", self.len, self.start);
            }
        }
    }
}
