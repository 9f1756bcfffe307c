//! The ioctls of iommufd, and those of VFIO that are about iommufd, as calls that take and return what they are about.
//! Nothing here decides anything.
//!
//! Sources: `include/uapi/linux/iommufd.h` and `include/uapi/linux/vfio.h` of Linux 7.3; the name of each ioctl is
//! that of its structure. Those for nested page tables and virtual IOMMUs are not here: they are a virtual machine's
//! business.
//!
//! # Why this module is unsafe, and what makes it sound
//! [`crate::ioctl`] says what an ioctl's argument has to be, and this module proves it:
//!
//! - [`Argument`] ties each structure to the one request and the one kind of file that take it. [`ioctl`] fills in the
//!   structure's size, so that the kernel, whatever its version, touches no more than the structure.
//! - A structure with a pointer in it that the kernel follows is passed only by a function of this module that makes the
//!   pointer of a slice which it borrows for the call; all others are [`Plain`].
//! - Numbers of ioctls mean something only together with a driver. So the file descriptors are of types that are made
//!   by opening `/dev/iommu`, by asking the kernel whether a file is a VFIO device, or by the kernel itself.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use iommufd_bindings as uapi;
use libc::c_ulong;
use vfio_bindings::bindings::vfio;

use crate::{Access, Iova, IovaRange, Pasid, Region};

/// `/dev/iommu`, open.
#[derive(Debug)]
pub(super) struct IommuFd(File);

impl IommuFd {
    pub(super) const PATH: &str = "/dev/iommu";

    pub(super) fn open() -> io::Result<Self> {
        OpenOptions::new().read(true).write(true).open(Self::PATH).map(Self)
    }
}

impl AsFd for IommuFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// The character device of a VFIO device, open.
#[derive(Debug)]
pub(super) struct VfioFd(OwnedFd);

impl VfioFd {
    /// `fd`, if it is one.
    pub(super) fn new(fd: OwnedFd) -> io::Result<Self> {
        let subsystem = std::fs::read_link(Self::sysfs_of(fd.as_fd())?.join("subsystem"));
        match subsystem {
            Ok(subsystem) if subsystem.ends_with("vfio-dev") => Ok(Self(fd)),
            _ => Err(io::Error::from_raw_os_error(libc::ENODEV)),
        }
    }

    /// Its folder in sysfs.
    pub(super) fn sysfs(&self) -> io::Result<std::path::PathBuf> {
        Self::sysfs_of(self.as_fd())
    }

    fn sysfs_of(fd: BorrowedFd<'_>) -> io::Result<std::path::PathBuf> {
        let stat = rustix::fs::fstat(fd)?;
        if stat.st_mode & libc::S_IFMT != libc::S_IFCHR {
            return Err(io::Error::from_raw_os_error(libc::ENODEV));
        }
        let (major, minor) = (rustix::fs::major(stat.st_rdev), rustix::fs::minor(stat.st_rdev));
        Ok(format!("/sys/dev/char/{major}:{minor}").into())
    }
}

impl AsFd for VfioFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// A structure that is the argument of exactly one ioctl.
///
/// # Safety
/// `REQUEST` of a `File` takes a pointer to this structure, of which [`size`](Self::size) is the first word and gives
/// the number of bytes that the kernel may use. Any bytes are a valid value of it.
unsafe trait Argument: Default {
    type File: AsFd;
    const REQUEST: c_ulong;
    fn size(&mut self) -> &mut u32;
}

/// An argument that tells the kernel of no memory to read or write now.
///
/// # Safety
/// The kernel follows no pointer in it.
unsafe trait Plain: Argument {}

macro_rules! arguments {
    ($($file:ty: $structure:ty = $number:expr, $size:ident $(, $plain:ident)?;)*) => {$(
        // SAFETY: `iommufd.h` and `vfio.h` define this structure for this request, and both begin each with its size;
        // the bindings are generated from them. It is made of integers.
        unsafe impl Argument for $structure {
            type File = $file;
            const REQUEST: c_ulong = crate::ioctl::request($number as u8);
            fn size(&mut self) -> &mut u32 {
                &mut self.$size
            }
        }
        $(
            // SAFETY: it has no pointer, but for an address in `iommu_ioas_map`, whose memory the kernel pins and
            // leaves as it is.
            unsafe impl $plain for $structure {}
        )?
    )*};
}

arguments! {
    IommuFd: uapi::iommu_destroy = uapi::IOMMUFD_CMD_DESTROY, size, Plain;
    IommuFd: uapi::iommu_ioas_alloc = uapi::IOMMUFD_CMD_IOAS_ALLOC, size, Plain;
    IommuFd: uapi::iommu_ioas_map = uapi::IOMMUFD_CMD_IOAS_MAP, size, Plain;
    IommuFd: uapi::iommu_ioas_map_file = uapi::IOMMUFD_CMD_IOAS_MAP_FILE, size, Plain;
    IommuFd: uapi::iommu_ioas_copy = uapi::IOMMUFD_CMD_IOAS_COPY, size, Plain;
    IommuFd: uapi::iommu_ioas_unmap = uapi::IOMMUFD_CMD_IOAS_UNMAP, size, Plain;
    IommuFd: uapi::iommu_option = uapi::IOMMUFD_CMD_OPTION, size, Plain;
    IommuFd: uapi::iommu_fault_alloc = uapi::IOMMUFD_CMD_FAULT_QUEUE_ALLOC, size, Plain;
    IommuFd: uapi::iommu_hwpt_set_dirty_tracking = uapi::IOMMUFD_CMD_HWPT_SET_DIRTY_TRACKING, size, Plain;
    IommuFd: uapi::iommu_hwpt_alloc = uapi::IOMMUFD_CMD_HWPT_ALLOC, size;
    IommuFd: uapi::iommu_ioas_iova_ranges = uapi::IOMMUFD_CMD_IOAS_IOVA_RANGES, size;
    IommuFd: uapi::iommu_ioas_allow_iovas = uapi::IOMMUFD_CMD_IOAS_ALLOW_IOVAS, size;
    IommuFd: uapi::iommu_hw_info = uapi::IOMMUFD_CMD_GET_HW_INFO, size;
    IommuFd: uapi::iommu_hwpt_get_dirty_bitmap = uapi::IOMMUFD_CMD_HWPT_GET_DIRTY_BITMAP, size;
    VfioFd: vfio::vfio_device_bind_iommufd = vfio::VFIO_BASE + 18, argsz;
    VfioFd: vfio::vfio_device_attach_iommufd_pt = vfio::VFIO_BASE + 19, argsz, Plain;
    VfioFd: vfio::vfio_device_detach_iommufd_pt = vfio::VFIO_BASE + 20, argsz, Plain;
}

/// Does the ioctl.
///
/// # Safety
/// Each pointer in `argument` is good for what the kernel does there in this call.
unsafe fn ioctl<A: Argument>(file: &A::File, argument: &mut A) -> io::Result<()> {
    *argument.size() = size_of::<A>() as u32;
    // SAFETY: by the contract of `Argument`, this request of this file takes this structure, which says how large it is,
    // and any bytes are valid in it; the caller vouches for the pointers in it.
    unsafe { crate::ioctl::ioctl(file.as_fd(), A::REQUEST, argument) }?;
    Ok(())
}

/// Does an ioctl that can not go wrong for memory.
fn call<A: Plain>(file: &A::File, argument: &mut A) -> io::Result<()> {
    // SAFETY: by the contract of `Plain`, the kernel follows no pointer in it.
    unsafe { ioctl(file, argument) }
}

/// A slice's address, as the kernel's structures hold it; the kernel reads there.
fn input<T>(slice: &[T]) -> u64 {
    slice.as_ptr().expose_provenance() as u64
}

/// A slice's address, as the kernel's structures hold it; the kernel writes there.
fn output<T>(slice: &mut [T]) -> u64 {
    slice.as_mut_ptr().expose_provenance() as u64
}

pub(super) fn destroy(iommufd: &IommuFd, id: u32) -> io::Result<()> {
    call(iommufd, &mut uapi::iommu_destroy { id, ..Default::default() })
}

/// Makes an address space and returns its id.
pub(super) fn ioas_alloc(iommufd: &IommuFd) -> io::Result<u32> {
    let mut argument = uapi::iommu_ioas_alloc::default();
    call(iommufd, &mut argument)?;
    Ok(argument.out_ioas_id)
}

fn map_flags(access: Access) -> u32 {
    let mut flags = uapi::iommufd_ioas_map_flags_IOMMU_IOAS_MAP_FIXED_IOVA;
    if access.allows(Access::READ) {
        flags |= uapi::iommufd_ioas_map_flags_IOMMU_IOAS_MAP_READABLE;
    }
    if access.allows(Access::WRITE) {
        flags |= uapi::iommufd_ioas_map_flags_IOMMU_IOAS_MAP_WRITEABLE;
    }
    flags
}

/// Maps a region by its addresses in this process.
pub(super) fn ioas_map(
    iommufd: &IommuFd,
    ioas_id: u32,
    iova: Iova,
    region: &Region,
    access: Access,
) -> io::Result<()> {
    let mut argument = uapi::iommu_ioas_map {
        flags: map_flags(access),
        ioas_id,
        user_va: region.as_ptr().as_ptr().expose_provenance() as u64,
        length: region.len(),
        iova: iova.get(),
        ..Default::default()
    };
    call(iommufd, &mut argument)
}

/// Maps the first `len` bytes of a memfd.
pub(super) fn ioas_map_file(
    iommufd: &IommuFd,
    ioas_id: u32,
    iova: Iova,
    (memfd, len): (BorrowedFd<'_>, u64),
    access: Access,
) -> io::Result<()> {
    let mut argument = uapi::iommu_ioas_map_file {
        flags: map_flags(access),
        ioas_id,
        fd: memfd.as_raw_fd(),
        start: 0,
        length: len,
        iova: iova.get(),
        ..Default::default()
    };
    call(iommufd, &mut argument)
}

/// Maps at `to` in an address space the `len` bytes that are mapped at `from` in one.
pub(super) fn ioas_copy(
    iommufd: &IommuFd,
    (dst_ioas_id, to): (u32, Iova),
    (src_ioas_id, from): (u32, Iova),
    len: u64,
    access: Access,
) -> io::Result<()> {
    let mut argument = uapi::iommu_ioas_copy {
        flags: map_flags(access),
        dst_ioas_id,
        src_ioas_id,
        length: len,
        dst_iova: to.get(),
        src_iova: from.get(),
        ..Default::default()
    };
    call(iommufd, &mut argument)
}

/// Unmaps whatever is mapped in these `len` bytes, and returns how many bytes that were.
pub(super) fn ioas_unmap(iommufd: &IommuFd, ioas_id: u32, iova: Iova, len: u64) -> io::Result<u64> {
    let mut argument =
        uapi::iommu_ioas_unmap { ioas_id, iova: iova.get(), length: len, ..Default::default() };
    call(iommufd, &mut argument)?;
    Ok(argument.length)
}

/// The addresses that all devices attached to an address space can use.
pub(super) fn ioas_iova_ranges(iommufd: &IommuFd, ioas_id: u32) -> io::Result<Vec<IovaRange>> {
    let mut ranges = vec![uapi::iommu_iova_range::default(); 16];
    loop {
        let mut argument = uapi::iommu_ioas_iova_ranges {
            ioas_id,
            num_iovas: ranges.len() as u32,
            allowed_iovas: output(&mut ranges),
            ..Default::default()
        };
        // SAFETY: the kernel writes at most `num_iovas` ranges, which the vector has, to `allowed_iovas`.
        let result = unsafe { ioctl(iommufd, &mut argument) };
        let found = argument.num_iovas as usize;
        match result {
            Ok(()) => {
                ranges.truncate(found);
                let range = |range: uapi::iommu_iova_range| IovaRange {
                    first: Iova::new(range.start),
                    last: Iova::new(range.last),
                };
                return Ok(ranges.into_iter().map(range).collect());
            }
            Err(error) if error.raw_os_error() == Some(libc::EMSGSIZE) && found > ranges.len() => {
                ranges.resize(found, uapi::iommu_iova_range::default());
            }
            Err(error) => return Err(error),
        }
    }
}

/// Has the kernel refuse devices that could not use all of these addresses.
pub(super) fn ioas_allow_iovas(iommufd: &IommuFd, ioas_id: u32, ranges: &[IovaRange]) -> io::Result<()> {
    let range =
        |range: &IovaRange| uapi::iommu_iova_range { start: range.first.get(), last: range.last.get() };
    let ranges: Vec<_> = ranges.iter().map(range).collect();
    let mut argument = uapi::iommu_ioas_allow_iovas {
        ioas_id,
        num_iovas: ranges.len() as u32,
        allowed_iovas: input(&ranges),
        ..Default::default()
    };
    // SAFETY: the kernel reads `num_iovas` ranges at `allowed_iovas`, which the vector has.
    unsafe { ioctl(iommufd, &mut argument) }
}

/// Sets one of [`uapi::iommufd_option`]; `object_id` is the IOAS that it is for, or 0.
pub(super) fn set_option(
    iommufd: &IommuFd,
    option_id: uapi::iommufd_option,
    object_id: u32,
    value: u64,
) -> io::Result<()> {
    let op = uapi::iommufd_option_ops_IOMMU_OPTION_OP_SET as u16;
    call(iommufd, &mut uapi::iommu_option { option_id, op, object_id, val64: value, ..Default::default() })
}

/// Makes a page table for a device that holds what the address space maps, now and later; returns its id.
pub(super) fn hwpt_alloc(
    iommufd: &IommuFd,
    ioas_id: u32,
    dev_id: u32,
    flags: uapi::iommufd_hwpt_alloc_flags,
    fault_id: Option<u32>,
) -> io::Result<u32> {
    let mut argument = uapi::iommu_hwpt_alloc {
        flags: flags | fault_id.map_or(0, |_| uapi::iommufd_hwpt_alloc_flags_IOMMU_HWPT_FAULT_ID_VALID),
        dev_id,
        pt_id: ioas_id,
        fault_id: fault_id.unwrap_or(0),
        data_type: uapi::iommu_hwpt_data_type_IOMMU_HWPT_DATA_NONE,
        ..Default::default()
    };
    // SAFETY: without data, `data_uptr` is null and zero bytes long.
    unsafe { ioctl(iommufd, &mut argument) }?;
    Ok(argument.out_hwpt_id)
}

/// What the kernel says of the IOMMU behind a device, as it says it.
pub(super) fn hw_info(iommufd: &IommuFd, dev_id: u32, data: &mut [u8]) -> io::Result<uapi::iommu_hw_info> {
    let mut argument = uapi::iommu_hw_info {
        dev_id,
        data_len: data.len() as u32,
        data_uptr: output(data),
        ..Default::default()
    };
    // SAFETY: the kernel writes `data_len` bytes, which the slice has, at `data_uptr`.
    unsafe { ioctl(iommufd, &mut argument) }?;
    Ok(argument)
}

/// The `iommu_hw_info_type` in what [`hw_info`] returned.
pub(super) fn hw_info_type(info: &uapi::iommu_hw_info) -> u32 {
    // SAFETY: both fields of the union are the same integer under two names.
    unsafe { info.__bindgen_anon_1.out_data_type }
}

pub(super) fn set_dirty_tracking(iommufd: &IommuFd, hwpt_id: u32, on: bool) -> io::Result<()> {
    let enable = uapi::iommufd_hwpt_set_dirty_tracking_flags_IOMMU_HWPT_DIRTY_TRACKING_ENABLE;
    let flags = if on { enable } else { 0 };
    call(iommufd, &mut uapi::iommu_hwpt_set_dirty_tracking { flags, hwpt_id, ..Default::default() })
}

/// The bitmap of the pages of `range`, of `page_size` bytes each, that devices have written: bit n % 64 of word n / 64 is
/// that of the n-th page. `clear` forgets what was written so far.
pub(super) fn dirty_bitmap(
    iommufd: &IommuFd,
    hwpt_id: u32,
    range: IovaRange,
    page_size: u64,
    clear: bool,
) -> io::Result<Vec<u64>> {
    let last_page = (range.last.get() - range.first.get()) / page_size;
    let mut bitmap = vec![0_u64; (last_page / 64 + 1) as usize];
    let keep = uapi::iommufd_hwpt_get_dirty_bitmap_flags_IOMMU_HWPT_GET_DIRTY_BITMAP_NO_CLEAR;
    let mut argument = uapi::iommu_hwpt_get_dirty_bitmap {
        hwpt_id,
        flags: if clear { 0 } else { keep },
        iova: range.first.get(),
        length: range.last.get() - range.first.get() + 1,
        page_size,
        data: output(&mut bitmap),
        ..Default::default()
    };
    // SAFETY: the kernel sets bits at `data`, one a page of the range: the vector has as many, in whole words.
    unsafe { ioctl(iommufd, &mut argument) }?;
    Ok(bitmap)
}

/// The file that a device's page requests are read from, and answered to.
#[derive(Debug)]
pub(super) struct FaultFd(OwnedFd);

/// Makes a queue of page requests; returns its id and its file.
pub(super) fn fault_queue_alloc(iommufd: &IommuFd) -> io::Result<(u32, FaultFd)> {
    let mut argument = uapi::iommu_fault_alloc::default();
    call(iommufd, &mut argument)?;
    // SAFETY: the kernel has just opened this file descriptor for this process, and nobody else knows it.
    let fd = unsafe { OwnedFd::from_raw_fd(argument.out_fault_fd.cast_signed()) };
    Ok((argument.out_fault_id, FaultFd(fd)))
}

impl FaultFd {
    /// Reads whole groups of requests, as many as there are and fit, and returns how many requests that are. It does
    /// not wait. EINVAL: the first group has more requests than fit.
    pub(super) fn read(&self, requests: &mut [uapi::iommu_hwpt_pgfault]) -> io::Result<usize> {
        let (start, len) = (requests.as_mut_ptr(), size_of_val(requests));
        // SAFETY: read writes at most `len` bytes into the slice, whose items are integers: any bytes are valid.
        let read = unsafe { libc::read(self.0.as_raw_fd(), start.cast(), len) };
        let read = usize::try_from(read).map_err(|_| io::Error::last_os_error())?;
        Ok(read / size_of::<uapi::iommu_hwpt_pgfault>())
    }

    /// Answers the group of requests with this cookie.
    pub(super) fn respond(&self, cookie: u32, code: uapi::iommufd_page_response_code) -> io::Result<()> {
        let response = uapi::iommu_hwpt_page_response { cookie, code };
        let start = std::ptr::from_ref(&response).cast();
        // SAFETY: write reads as many bytes as the structure has, and it has no padding.
        let written = unsafe { libc::write(self.0.as_raw_fd(), start, size_of_val(&response)) };
        usize::try_from(written).map(|_| ()).map_err(|_| io::Error::last_os_error())
    }
}

/// Binds a VFIO device to an iommufd, and returns the id that it has there.
pub(super) fn bind(device: &VfioFd, iommufd: &IommuFd, vf_token: Option<&[u8; 16]>) -> io::Result<u32> {
    let mut argument = vfio::vfio_device_bind_iommufd {
        flags: vf_token.map_or(0, |_| vfio::VFIO_DEVICE_BIND_FLAG_TOKEN),
        iommufd: iommufd.as_fd().as_raw_fd(),
        token_uuid_ptr: vf_token.map_or(0, |token| input(token)),
        ..Default::default()
    };
    // SAFETY: the kernel reads the 16 bytes of a token at `token_uuid_ptr` where the flag says that there is one.
    unsafe { ioctl(device, &mut argument) }?;
    Ok(argument.out_devid)
}

/// Attaches a device, or one PASID of it, to a page table or address space, and returns the id of its page table.
/// Where something is attached already, the kernel replaces that.
pub(super) fn attach(device: &VfioFd, page_table: u32, pasid: Option<Pasid>) -> io::Result<u32> {
    let mut argument = vfio::vfio_device_attach_iommufd_pt {
        flags: pasid.map_or(0, |_| vfio::VFIO_DEVICE_ATTACH_PASID),
        pt_id: page_table,
        pasid: pasid.map_or(0, Pasid::get),
        ..Default::default()
    };
    call(device, &mut argument)?;
    Ok(argument.pt_id)
}

pub(super) fn detach(device: &VfioFd, pasid: Option<Pasid>) -> io::Result<()> {
    let mut argument = vfio::vfio_device_detach_iommufd_pt {
        flags: pasid.map_or(0, |_| vfio::VFIO_DEVICE_DETACH_PASID),
        pasid: pasid.map_or(0, Pasid::get),
        ..Default::default()
    };
    call(device, &mut argument)
}
