//! The ioctls of VFIO's containers and groups, each with its argument (include/uapi/linux/vfio.h, Linux 7.3).
//!
//! # Why this module is unsafe, and what makes it sound
//! It gives each ioctl number its argument: see `ioctl`. A descriptor that is none of VFIO's, or another of VFIO's, answers
//! with an error and does nothing, as no other kind of file knows these numbers.

use std::ffi::{CString, c_ulong};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::io::Errno;
use vfio_bindings::bindings::vfio;

use crate::ioctl::{ioctl, ioctl_value, request};
use crate::{Access, Iova, Region};

const fn vfio(number: u8) -> c_ulong {
    request(vfio::VFIO_BASE as u8 + number)
}

const GET_API_VERSION: c_ulong = vfio(0);
const CHECK_EXTENSION: c_ulong = vfio(1);
const SET_IOMMU: c_ulong = vfio(2);
const GROUP_GET_STATUS: c_ulong = vfio(3);
const GROUP_SET_CONTAINER: c_ulong = vfio(4);
const GROUP_GET_DEVICE_FD: c_ulong = vfio(6);
const IOMMU_GET_INFO: c_ulong = vfio(12);
const IOMMU_MAP_DMA: c_ulong = vfio(13);
const IOMMU_UNMAP_DMA: c_ulong = vfio(14);

/// The largest answer to [`iommu_info`] that is believed. A range takes 16 bytes, and IOMMUs have a few.
const MAX_INFO: usize = 1 << 20;

pub(crate) fn api_version(container: BorrowedFd<'_>) -> Result<i32, Errno> {
    // SAFETY: it takes nothing.
    unsafe { ioctl_value(container, GET_API_VERSION, 0) }
}

pub(crate) fn has_extension(container: BorrowedFd<'_>, extension: u32) -> Result<bool, Errno> {
    // SAFETY: it takes a number.
    unsafe { ioctl_value(container, CHECK_EXTENSION, extension.into()) }.map(|answer| answer > 0)
}

pub(crate) fn set_iommu(container: BorrowedFd<'_>, kind: u32) -> Result<(), Errno> {
    // SAFETY: it takes a number.
    unsafe { ioctl_value(container, SET_IOMMU, kind.into()) }.map(drop)
}

/// Whether all of the group's devices are bound to VFIO, or to nothing.
pub(crate) fn group_is_viable(group: BorrowedFd<'_>) -> Result<bool, Errno> {
    let mut status = vfio::vfio_group_status { argsz: size_of::<vfio::vfio_group_status>() as u32, flags: 0 };
    // SAFETY: it takes this struct, with its size in it.
    unsafe { ioctl(group, GROUP_GET_STATUS, &mut status) }?;
    Ok(status.flags & vfio::VFIO_GROUP_FLAGS_VIABLE != 0)
}

pub(crate) fn set_container(group: BorrowedFd<'_>, container: BorrowedFd<'_>) -> Result<(), Errno> {
    let mut fd = container.as_raw_fd();
    // SAFETY: it takes a pointer to a file descriptor, an int.
    unsafe { ioctl(group, GROUP_SET_CONTAINER, &mut fd) }.map(drop)
}

pub(crate) fn device_fd(group: BorrowedFd<'_>, name: &str) -> Result<OwnedFd, Errno> {
    let mut name = CString::new(name).map_err(|_| Errno::INVAL)?.into_bytes_with_nul();
    // SAFETY: it takes a pointer to a string that ends in a zero byte, and reads no further.
    let fd = unsafe { ioctl(group, GROUP_GET_DEVICE_FD, &mut name[..]) }?;
    // SAFETY: it returned a new file descriptor, which nobody else knows of.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// What `VFIO_IOMMU_GET_INFO` says: a `vfio_iommu_type1_info` and the capabilities behind it.
pub(crate) fn iommu_info(container: BorrowedFd<'_>) -> Result<Vec<u8>, Errno> {
    // Asked a second time with the room that the first answer says it takes; it can not change meanwhile by more than what
    // other threads attach, so that a third and fourth time are enough.
    let mut len = size_of::<vfio::vfio_iommu_type1_info>();
    for _ in 0..4 {
        let mut info = vec![0; len];
        info[..4].copy_from_slice(&(len as u32).to_ne_bytes());
        // SAFETY: it takes a buffer whose length is in its first four bytes, and aligns nothing.
        unsafe { ioctl(container, IOMMU_GET_INFO, &mut info[..]) }?;
        let needed = info.first_chunk().map_or(0, |bytes| u32::from_ne_bytes(*bytes)) as usize;
        if needed <= len {
            return Ok(info);
        }
        if needed > MAX_INFO {
            break;
        }
        len = needed;
    }
    Err(Errno::OVERFLOW)
}

/// Maps the region at `iova`. The kernel pins its pages until they are unmapped or the container is closed, so that the
/// device never reaches memory of anybody else's, whatever becomes of the region.
pub(crate) fn map_dma(
    container: BorrowedFd<'_>,
    iova: Iova,
    region: &Region,
    access: Access,
) -> Result<(), Errno> {
    let mut flags = 0;
    if access.allows(Access::READ) {
        flags |= vfio::VFIO_DMA_MAP_FLAG_READ;
    }
    if access.allows(Access::WRITE) {
        flags |= vfio::VFIO_DMA_MAP_FLAG_WRITE;
    }
    let mut map = vfio::vfio_iommu_type1_dma_map {
        argsz: size_of::<vfio::vfio_iommu_type1_dma_map>() as u32,
        flags,
        vaddr: region.as_ptr().as_ptr().expose_provenance() as u64,
        iova: iova.get(),
        size: region.len(),
    };
    // SAFETY: it takes this struct, with its size in it. The memory is a region's, made for devices to use.
    unsafe { ioctl(container, IOMMU_MAP_DMA, &mut map) }.map(drop)
}

/// Unmaps what is mapped in the `len` bytes from `iova` on, and returns how many bytes that were.
pub(crate) fn unmap_dma(container: BorrowedFd<'_>, iova: Iova, len: u64) -> Result<u64, Errno> {
    let mut unmap = vfio::vfio_iommu_type1_dma_unmap {
        argsz: size_of::<vfio::vfio_iommu_type1_dma_unmap>() as u32,
        flags: 0,
        iova: iova.get(),
        size: len,
        data: vfio::__IncompleteArrayField::new(),
    };
    // SAFETY: it takes this struct, with its size in it, and without a flag nothing behind it.
    unsafe { ioctl(container, IOMMU_UNMAP_DMA, &mut unmap) }?;
    Ok(unmap.size)
}
