//! Mappings of a device's registers.
//!
//! # Why this module is unsafe, and what makes it sound
//! Mapping is a system call that changes what addresses mean. The invariant: the kernel chooses where a [`Mapping`] lies,
//! it is unmapped once, when it is dropped, and nothing but [`Bar`]s that hold it, and the parts of them,
//! know where it is.
//!
//! # What touching it does
//! Never a signal, as long as nobody switches off what the kernel looks at. `vfio_pci_mmap_huge_fault` and its helpers in
//! `drivers/vfio/pci/vfio_pci_core.c` (Linux 7.3) answer a touch with SIGBUS in two cases: memory decoding is off in the
//! command register that VFIO keeps, or the function sleeps (D3hot, or runtime power management that its user asked for).
//! The user alone does either, and [`Config`](crate::pci::Config) lets neither through. A reset takes all pages away
//! and gives them back at the next touch, which waits for its end. Removing a device does not end until its user has
//! closed it and unmapped all; registers of one that has really left the bus read as all ones.

use std::ffi::c_void;
use std::fmt;
use std::ops::Range;
use std::os::fd::AsFd;
use std::ptr::{self, NonNull};
use std::sync::Arc;

use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags};

use super::Claim;
use super::ioctl::Handle;
use super::region::RegionInfo;
use crate::bar::{Area, Bar};
use crate::pci::Registers;

/// A part of a device's BAR, mapped. The device stays open as long, whoever closes its file.
struct Mapping {
    ptr: NonNull<c_void>,
    len: usize,
    _claim: Arc<Claim>,
}

// SAFETY: the pointer is to device registers, which any thread may access, and unmap.
unsafe impl Send for Mapping {}
// SAFETY: a Mapping only knows where they are, and does nothing until it is dropped.
unsafe impl Sync for Mapping {}

impl Mapping {
    fn new(device: &Handle, claim: Arc<Claim>, offset: u64, len: usize) -> Result<Self, Errno> {
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping where the kernel likes takes nothing away from anybody.
        let ptr = unsafe {
            rustix::mm::mmap(ptr::null_mut(), len, access, MapFlags::SHARED, device.as_fd(), offset)
        }?;
        NonNull::new(ptr).map(|ptr| Self { ptr, len, _claim: claim }).ok_or(Errno::INVAL)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: it is this mapping and all of it, and whoever knew of it held it and is gone.
        if let Err(errno) = unsafe { rustix::mm::munmap(self.ptr.as_ptr(), self.len) } {
            tracing::error!("registers of a device stay mapped: munmap failed ({errno})");
        }
    }
}

impl fmt::Debug for Mapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Mapping({:#x} bytes at {:?})", self.len, self.ptr)
    }
}

/// BAR `index`, which is `region`: `areas` of it, which are whole pages, mapped, everything else by a call to `rest`.
/// What can not be mapped after all is a call, too.
pub(super) fn bar(
    device: &Handle,
    claim: &Arc<Claim>,
    rest: &Arc<dyn Registers>,
    index: usize,
    region: &RegionInfo,
    areas: &[Range<u64>],
) -> Bar {
    let mut mapped = Vec::with_capacity(areas.len());
    for area in areas {
        let bytes = area.end - area.start;
        match Mapping::new(device, Arc::clone(claim), region.offset + area.start, bytes as usize) {
            Ok(mapping) => {
                let ptr = mapping.ptr.cast();
                // SAFETY: these bytes stay mapped, readable and writable as long as `mapping`, which the area holds;
                // nobody else knows of them.
                mapped.push(unsafe { Area::new(area.start, ptr, bytes, Arc::new(mapping)) });
            }
            Err(errno) => {
                tracing::warn!("BAR {index}: {area:#x?} can not be mapped ({errno}): system calls instead");
            }
        }
    }
    Bar::device(mapped, Arc::clone(rest), index, region.size)
}
