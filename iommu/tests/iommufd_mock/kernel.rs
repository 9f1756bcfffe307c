//! The kernel's mock of an IOMMU and of devices behind it: what this suite asks of it, and what it asks of iommufd
//! behind the backend's back, to see what is really there.
//!
//! Source: `drivers/iommu/iommufd/iommufd_test.h` and `selftest.c` of Linux 7.3 (`CONFIG_IOMMUFD_TEST`), whose one
//! ioctl is no part of the stable interface.
//!
//! # Why this module is unsafe, and what makes it sound
//! ioctl(2) reads and writes memory that it is given as a bare number. [`Iommu`] lets the kernel write nothing but
//! the structure that is handed over, the one buffer that [`Iommu::read`] borrows for the call, and memory of regions,
//! to which nobody makes references here: as a device would. The other system calls here get memory that is borrowed for
//! them.

use std::fs::{DirEntry, File};
use std::io::{self, Read, Write};
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;

use iommufd_bindings as uapi;
use underpass_iommu::iommufd::Iommufd;
use underpass_iommu::{Iova, PageSize, Region};

/// The mock's address width: what its page tables translate, both ends included.
pub(crate) const APERTURE: std::ops::RangeInclusive<u64> = 1 << 24..=(1 << 31) - 1;

/// The last PASID of a mock device that has any.
pub(crate) const LAST_PASID: u32 = (1 << 20) - 1;

/// A device that has PASIDs.
pub(crate) const HAS_PASIDS: u32 = 1 << 2;

/// A device behind an IOMMU that does not track written pages.
pub(crate) const NO_DIRTY_TRACKING: u32 = 1 << 0;

/// The id of the mock's ioctl: `_IO(';', 0x80 + 32)`.
const TEST: u32 = uapi::IOMMUFD_CMD_BASE + 32;

/// What the mock can be asked for: its operations whose pointers the kernel at most reads.
#[derive(Debug, Clone, Copy)]
#[repr(u32)]
enum Ask {
    AddReserved = 1,
    CheckMap = 3,
    CheckReferences = 4,
    CreateAccess = 5,
    SetMemoryLimit = 9,
    Replace = 10,
    MakeDevice = 12,
    SetDirty = 13,
    PageRequest = 15,
    AttachPasid = 18,
    ReplacePasid = 19,
    DetachPasid = 20,
    CheckPasid = 21,
}

/// Reads or writes memory by IOVA: the one operation that writes where a pointer says.
const ACCESS: u32 = 8;

/// `struct iommu_test_cmd`. The union in it is 48 bytes long.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct Command {
    size: u32,
    operation: u32,
    id: u32,
    reserved: u32,
    arguments: [u64; 6],
    last: u32,
    padding: u32,
}

/// Two 32-bit members in a row.
const fn pair(first: u32, second: u32) -> u64 {
    first as u64 | (second as u64) << 32
}

/// The 32-bit members at one of the places of 64 bits.
const fn halves(word: u64) -> (u32, u32) {
    (word as u32, (word >> 32) as u32)
}

/// What a mock device is known by.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ids {
    /// The mock: what is asked for attaching, and what is destroyed.
    pub(crate) mock: u32,
    /// The device, as a VFIO device has it.
    pub(crate) device: u32,
}

/// One page of memory as an ioctl takes it: where this process has it.
fn address(memory: NonNull<u8>) -> u64 {
    memory.as_ptr().expose_provenance() as u64
}

/// An iommufd, as the kernel sees it.
#[derive(Debug, Clone)]
pub(crate) struct Iommu(Iommufd);

impl Iommu {
    pub(crate) fn new(iommufd: &Iommufd) -> Self {
        Self(iommufd.clone())
    }

    pub(crate) fn iommufd(&self) -> &Iommufd {
        &self.0
    }

    /// # Safety
    /// Request `number` of an iommufd takes a `T`, and writes no memory but that and what the caller vouches for.
    unsafe fn call<T>(&self, number: u32, argument: &mut T) -> io::Result<()> {
        let request = u64::from(b';') << 8 | u64::from(number);
        // SAFETY: the caller vouches for the request and its structure, which is borrowed for the call.
        let result =
            unsafe { libc::ioctl(self.0.as_fd().as_raw_fd(), request, std::ptr::from_mut(argument)) };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    fn ask(&self, what: Ask, id: u32, arguments: [u64; 6]) -> io::Result<[u64; 6]> {
        let size = size_of::<Command>() as u32;
        let mut command =
            Command { size, operation: what as u32, id, reserved: 0, arguments, last: 0, padding: 0 };
        // SAFETY: the request takes this structure; of its operations, those in `Ask` write no other memory.
        unsafe { self.call(TEST, &mut command) }?;
        Ok(command.arguments)
    }

    /// Makes a device and attaches it to the IOAS `ioas`; it can not be without a page table.
    pub(crate) fn make_device(&self, ioas: u32, flags: u32) -> io::Result<Ids> {
        let [first, second, ..] = self.ask(Ask::MakeDevice, ioas, [0, pair(0, flags), 0, 0, 0, 0])?;
        Ok(Ids { mock: halves(first).0, device: halves(second).0 })
    }

    /// Moves the device's own address space over to another HWPT or IOAS, and returns the id of the HWPT.
    pub(crate) fn replace(&self, device: Ids, page_table: u32) -> io::Result<u32> {
        let answer = self.ask(Ask::Replace, device.mock, [pair(page_table, 0), 0, 0, 0, 0, 0])?;
        Ok(halves(answer[0]).0)
    }

    pub(crate) fn attach_pasid(&self, device: Ids, pasid: u32, page_table: u32) -> io::Result<u32> {
        let answer = self.ask(Ask::AttachPasid, device.mock, [pair(pasid, page_table), 0, 0, 0, 0, 0])?;
        Ok(halves(answer[0]).1)
    }

    pub(crate) fn replace_pasid(&self, device: Ids, pasid: u32, page_table: u32) -> io::Result<u32> {
        let answer = self.ask(Ask::ReplacePasid, device.mock, [pair(pasid, page_table), 0, 0, 0, 0, 0])?;
        Ok(halves(answer[0]).1)
    }

    pub(crate) fn detach_pasid(&self, device: Ids, pasid: u32) -> io::Result<()> {
        self.ask(Ask::DetachPasid, device.mock, [pair(pasid, 0), 0, 0, 0, 0, 0]).map(drop)
    }

    /// Whether the PASID is attached to exactly this HWPT; `None`: to nothing.
    pub(crate) fn pasid_has(&self, device: Ids, pasid: u32, page_table: Option<u32>) -> bool {
        let arguments = [pair(pasid, page_table.unwrap_or(0)), 0, 0, 0, 0, 0];
        self.ask(Ask::CheckPasid, device.mock, arguments).is_ok()
    }

    /// Whether the HWPT translates the `len` bytes at `iova` to the very pages that this process has at `memory`.
    pub(crate) fn maps(&self, page_table: u32, iova: Iova, memory: NonNull<u8>, len: u64) -> bool {
        self.check_map(page_table, iova, address(memory), len)
    }

    /// Whether the HWPT translates the page of 4 KiB at `iova` to the one that this process has at `address`.
    pub(crate) fn maps_address(&self, page_table: u32, iova: Iova, address: u64) -> bool {
        self.check_map(page_table, iova, address, PageSize::Size4K.bytes())
    }

    fn check_map(&self, page_table: u32, iova: Iova, address: u64, len: u64) -> bool {
        match self.ask(Ask::CheckMap, page_table, [iova.get(), len, address, 0, 0, 0]) {
            Ok(_) => true,
            Err(error) => {
                assert_eq!(
                    error.raw_os_error(),
                    Some(libc::EINVAL),
                    "cannot look at HWPT {page_table}: {error}"
                );
                false
            }
        }
    }

    /// Whether each page of the region is pinned this many times. The mock knows it of small pages only.
    pub(crate) fn pins(&self, region: &Region, times: u32) -> bool {
        assert_eq!(region.page_size(), PageSize::Size4K);
        let arguments = [region.len(), address(region.as_ptr()), pair(times, 0), 0, 0, 0];
        self.ask(Ask::CheckReferences, 0, arguments).is_ok()
    }

    /// Takes addresses away from an IOAS, as a device's MSI window does.
    pub(crate) fn add_reserved(&self, ioas: u32, first: u64, len: u64) -> io::Result<()> {
        self.ask(Ask::AddReserved, ioas, [first, len, 0, 0, 0, 0]).map(drop)
    }

    /// How much memory the kernel takes at once for working through the pages of a mapping.
    pub(crate) fn set_memory_limit(&self, bytes: u32) -> io::Result<()> {
        self.ask(Ask::SetMemoryLimit, 0, [pair(bytes, 0), 0, 0, 0, 0, 0]).map(drop)
    }

    /// Has a device write pages, as far as the IOMMU's table tells: those of `page_size` bytes from `iova` on whose
    /// bit is set. Returns how many.
    pub(crate) fn set_dirty(
        &self,
        page_table: u32,
        iova: Iova,
        page_size: u64,
        bits: &[u64],
    ) -> io::Result<u64> {
        let pages = bits.len() as u64 * 64;
        let pointer = bits.as_ptr().expose_provenance() as u64;
        let arguments = [0, iova.get(), pages * page_size, page_size, pointer, 0];
        Ok(self.ask(Ask::SetDirty, page_table, arguments)?[5])
    }

    /// Has the device ask for a page (PRI). `access` has iommufd's bits: 1 to read, 2 to write.
    pub(crate) fn request_page(
        &self,
        device: Ids,
        pasid: Option<u32>,
        iova: Iova,
        access: u32,
    ) -> io::Result<()> {
        const GROUP: u32 = 7;
        let arguments = [pair(device.device, pasid.unwrap_or(0)), pair(GROUP, access), iova.get(), 0, 0, 0];
        self.ask(Ask::PageRequest, 0, arguments).map(drop)
    }

    /// Reads by IOVA what the IOAS maps there.
    pub(crate) fn read(&self, ioas: u32, iova: Iova) -> io::Result<u8> {
        let mut byte = 0;
        self.access(ioas, iova, &mut byte, 0)?;
        Ok(byte)
    }

    /// Writes by IOVA to what the IOAS maps there.
    pub(crate) fn write(&self, ioas: u32, iova: Iova, mut byte: u8) -> io::Result<()> {
        const WRITE: u32 = 1;
        self.access(ioas, iova, &mut byte, WRITE)
    }

    fn access(&self, ioas: u32, iova: Iova, byte: &mut u8, flags: u32) -> io::Result<()> {
        let made = self.ask(Ask::CreateAccess, ioas, [0; 6])?;
        // SAFETY: the operation has just made the descriptor, for its caller to own.
        let access = unsafe { OwnedFd::from_raw_fd(halves(made[0]).0.cast_signed()) };
        let pointer = std::ptr::from_mut(byte).expose_provenance() as u64;
        let mut command = Command {
            size: size_of::<Command>() as u32,
            operation: ACCESS,
            id: access.as_raw_fd().cast_unsigned(),
            reserved: 0,
            arguments: [iova.get(), 1, pointer, pair(flags, 0), 0, 0],
            last: 0,
            padding: 0,
        };
        // SAFETY: the request takes this structure. The operation reads or writes the one byte, which is borrowed
        // for the call, and memory that is mapped in the IOAS: that of regions, shared with devices.
        unsafe { self.call(TEST, &mut command) }
    }

    /// A new IOAS, apart from the backend's.
    pub(crate) fn alloc_ioas(&self) -> io::Result<u32> {
        let mut argument =
            uapi::iommu_ioas_alloc { size: size_of::<uapi::iommu_ioas_alloc>() as u32, ..Default::default() };
        // SAFETY: the request takes this structure, without pointers.
        unsafe { self.call(uapi::IOMMUFD_CMD_IOAS_ALLOC, &mut argument) }?;
        Ok(argument.out_ioas_id)
    }

    /// A new HWPT of the IOAS, apart from the backend's.
    pub(crate) fn alloc_page_table(&self, device: Ids, ioas: u32, flags: u32) -> io::Result<u32> {
        let mut argument = uapi::iommu_hwpt_alloc {
            size: size_of::<uapi::iommu_hwpt_alloc>() as u32,
            flags,
            dev_id: device.device,
            pt_id: ioas,
            ..Default::default()
        };
        // SAFETY: the request takes this structure, whose one pointer is null.
        unsafe { self.call(uapi::IOMMUFD_CMD_HWPT_ALLOC, &mut argument) }?;
        Ok(argument.out_hwpt_id)
    }

    /// Destroys whatever has this id.
    pub(crate) fn destroy(&self, id: u32) -> io::Result<()> {
        let mut argument = uapi::iommu_destroy { size: size_of::<uapi::iommu_destroy>() as u32, id };
        // SAFETY: the request takes this structure, without pointers.
        unsafe { self.call(uapi::IOMMUFD_CMD_DESTROY, &mut argument) }
    }

    /// Whether an IOAS has this id.
    pub(crate) fn is_ioas(&self, id: u32) -> bool {
        let mut argument = uapi::iommu_ioas_iova_ranges {
            size: size_of::<uapi::iommu_ioas_iova_ranges>() as u32,
            ioas_id: id,
            ..Default::default()
        };
        // SAFETY: the request takes this structure, and writes no more ranges than there is room for: none.
        match unsafe { self.call(uapi::IOMMUFD_CMD_IOAS_IOVA_RANGES, &mut argument) } {
            Ok(()) => true,
            Err(error) => error.raw_os_error() == Some(libc::EMSGSIZE),
        }
    }

    /// Maps the region into an IOAS behind the backend's back, where the kernel likes.
    pub(crate) fn map(&self, ioas: u32, region: &Arc<Region>) -> io::Result<Iova> {
        let mut argument = uapi::iommu_ioas_map {
            size: size_of::<uapi::iommu_ioas_map>() as u32,
            flags: uapi::iommufd_ioas_map_flags_IOMMU_IOAS_MAP_READABLE,
            ioas_id: ioas,
            user_va: address(region.as_ptr()),
            length: region.len(),
            ..Default::default()
        };
        // SAFETY: the request takes this structure. It only lets the region, DMA memory, be read by devices.
        unsafe { self.call(uapi::IOMMUFD_CMD_IOAS_MAP, &mut argument) }?;
        Ok(Iova::new(argument.iova))
    }

    /// Undoes [`map`](Self::map).
    pub(crate) fn unmap(&self, ioas: u32, iova: Iova, len: u64) -> io::Result<()> {
        let mut argument = uapi::iommu_ioas_unmap {
            size: size_of::<uapi::iommu_ioas_unmap>() as u32,
            ioas_id: ioas,
            iova: iova.get(),
            length: len,
        };
        // SAFETY: the request takes this structure, without pointers.
        unsafe { self.call(uapi::IOMMUFD_CMD_IOAS_UNMAP, &mut argument) }
    }
}

/// This process's one queue of page requests, which the backend keeps to itself.
#[derive(Debug)]
pub(crate) struct RequestQueue(File);

impl RequestQueue {
    /// The one that is open.
    pub(crate) fn open() -> Self {
        let is_queue = |entry: &DirEntry| {
            std::fs::read_link(entry.path()).is_ok_and(|link| link.ends_with("anon_inode:[iommufd-pgfault]"))
        };
        let queues: Vec<_> =
            std::fs::read_dir("/proc/self/fd").unwrap().map(Result::unwrap).filter(is_queue).collect();
        assert_eq!(queues.len(), 1, "{queues:?}");
        let fd = queues[0].file_name().to_str().unwrap().parse().unwrap();
        // SAFETY: the backend keeps the descriptor open for longer than this statement.
        let fd = unsafe { BorrowedFd::borrow_raw(fd) };
        Self(File::from(fd.try_clone_to_owned().unwrap()))
    }

    /// Takes a request from under the backend's nose, and returns its cookie.
    pub(crate) fn take(&self) -> io::Result<u32> {
        const COOKIE: Range<usize> = 36..40;
        let mut request = [0; size_of::<uapi::iommu_hwpt_pgfault>()];
        let len = (&self.0).read(&mut request)?;
        assert_eq!(len, request.len());
        Ok(u32::from_ne_bytes(request[COOKIE].try_into().unwrap()))
    }

    /// Answers the request with this cookie: that the page is there now.
    pub(crate) fn answer(&self, cookie: u32) -> io::Result<()> {
        const IS_THERE: u32 = uapi::iommufd_page_response_code_IOMMUFD_PAGE_RESP_SUCCESS;
        let mut response = [0; size_of::<uapi::iommu_hwpt_page_response>()];
        response[..4].copy_from_slice(&cookie.to_ne_bytes());
        response[4..].copy_from_slice(&IS_THERE.to_ne_bytes());
        (&self.0).write_all(&response)
    }
}

/// Whether this thread's locked memory is limited (`RLIMIT_MEMLOCK`), as that of a user without privileges is.
/// Source: capset(2), `include/uapi/linux/capability.h`.
pub(crate) fn limit_locked_memory(limited: bool) {
    const VERSION_3: u32 = 0x2008_0522;
    const IPC_LOCK: u32 = 14;
    let header = [VERSION_3, 0];
    // Effective, permitted and inheritable capabilities, first numbers 0 to 31 and then the rest.
    let mut sets = [[0_u32; 3]; 2];
    // SAFETY: it reads the header, two words, and writes the sets, which are as many words as this version has.
    let result = unsafe { libc::syscall(libc::SYS_capget, header.as_ptr(), sets.as_mut_ptr()) };
    assert_eq!(result, 0, "{}", io::Error::last_os_error());
    let effective = &mut sets[0][0];
    *effective = if limited { *effective & !(1 << IPC_LOCK) } else { *effective | 1 << IPC_LOCK };
    // SAFETY: it reads the header and the sets, as above, and changes what this thread may do: no memory of it.
    let result = unsafe { libc::syscall(libc::SYS_capset, header.as_ptr(), sets.as_ptr()) };
    assert_eq!(result, 0, "{}", io::Error::last_os_error());
}

/// Sets this process's limit of locked memory, and returns what it was.
pub(crate) fn set_locked_memory_limit(bytes: u64) -> u64 {
    let mut old = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: it writes the structure that it is given.
    let result = unsafe { libc::getrlimit(libc::RLIMIT_MEMLOCK, &raw mut old) };
    assert_eq!(result, 0, "{}", io::Error::last_os_error());
    let new = libc::rlimit { rlim_cur: bytes, ..old };
    // SAFETY: it reads the structure that it is given.
    let result = unsafe { libc::setrlimit(libc::RLIMIT_MEMLOCK, &raw const new) };
    assert_eq!(result, 0, "{}", io::Error::last_os_error());
    old.rlim_cur
}
