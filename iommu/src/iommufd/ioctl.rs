//! The ioctls of iommufd and of VFIO's devices, as calls that take and return what they are about.
//!
//! Sources: `include/uapi/linux/iommufd.h` and `include/uapi/linux/vfio.h` of Linux 7.3.
//!
//! # Why this module is unsafe, and what makes it sound
//! An ioctl is a system call whose argument the compiler can not check: the kernel reads and writes as many bytes
//! at the pointer as the structure says that it has, and follows the pointers inside it.
//!
//! - [`Argument`] ties each request to the one structure that the kernel expects with it. `call` fills in the
//!   structure's own size, so that the kernel, whatever its version, touches no more than the structure.
//! - A structure with a pointer in it that the kernel follows is passed only by a function of this module that makes
//!   the pointer of a slice which it borrows for the call.
//! - Ioctl numbers mean something only together with a driver, so the file descriptors are of two types that are made
//!   by nothing else than opening `/dev/iommu` and checking that a device is VFIO's.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use libc::{c_int, c_ulong};
use vfio_bindings::bindings::vfio;

use crate::Pasid;

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

/// A VFIO device's character device, open.
#[derive(Debug)]
pub(super) struct VfioFd(OwnedFd);

impl VfioFd {
    /// `fd`, if it is one.
    pub(super) fn new(fd: OwnedFd) -> io::Result<Self> {
        let stat = rustix::fs::fstat(&fd)?;
        let (major, minor) = (rustix::fs::major(stat.st_rdev), rustix::fs::minor(stat.st_rdev));
        let is_device = stat.st_mode & libc::S_IFMT == libc::S_IFCHR;
        let subsystem = std::fs::read_link(format!("/sys/dev/char/{major}:{minor}/subsystem"));
        match subsystem {
            Ok(path) if is_device && path.ends_with("vfio-dev") => Ok(Self(fd)),
            _ => Err(io::Error::from_raw_os_error(libc::ENODEV)),
        }
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
/// `REQUEST` of a file of type `File` takes a pointer to this structure, whose first word is its size; all bit patterns
/// are valid in it, and the kernel follows no pointer in it.
unsafe trait Argument {
    /// The kind of file that knows the request.
    type File: AsFd;
    const REQUEST: c_int;
    fn size(&mut self) -> &mut u32;
}

/// `_IO(';', number)`: iommufd and VFIO put no size into the request.
const fn io(number: u32) -> c_int {
    ((b';' as u32) << 8 | number) as c_int
}

/// Does the ioctl.
fn call<A: Argument>(file: &A::File, argument: &mut A) -> io::Result<()> {
    *argument.size() = size_of::<A>() as u32;
    // SAFETY: by the contract of `Argument`, the request takes this structure and follows no pointer in it; it is
    // borrowed for the call, and says how large it is.
    let result = unsafe { libc::ioctl(file.as_fd().as_raw_fd(), A::REQUEST as c_ulong as _, argument) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// VFIO_DEVICE_BIND_IOMMUFD.
pub(super) fn bind(device: &VfioFd, iommufd: &IommuFd, vf_token: Option<&[u8; 16]>) -> io::Result<u32> {
    let mut argument = vfio::vfio_device_bind_iommufd {
        argsz: size_of::<vfio::vfio_device_bind_iommufd>() as u32,
        flags: if vf_token.is_some() { vfio::VFIO_DEVICE_BIND_FLAG_TOKEN } else { 0 },
        iommufd: iommufd.as_fd().as_raw_fd(),
        token_uuid_ptr: vf_token.map_or(0, |token| token.as_ptr().expose_provenance() as u64),
        ..Default::default()
    };
    let request = io(vfio::VFIO_BASE + 18);
    // SAFETY: the file is a VFIO device, which takes this structure with this request; the pointer in it is null or
    // to 16 bytes, which are borrowed for the call and only read.
    let result = unsafe { libc::ioctl(device.as_fd().as_raw_fd(), request as c_ulong as _, &mut argument) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(argument.out_devid) }
}

// SAFETY: vfio_device_attach_iommufd_pt of vfio.h: four words, no pointer.
unsafe impl Argument for vfio::vfio_device_attach_iommufd_pt {
    type File = VfioFd;
    const REQUEST: c_int = io(vfio::VFIO_BASE + 19);
    fn size(&mut self) -> &mut u32 {
        &mut self.argsz
    }
}

/// VFIO_DEVICE_ATTACH_IOMMUFD_PT.
pub(super) fn attach(device: &VfioFd, page_table: u32, pasid: Option<Pasid>) -> io::Result<u32> {
    let mut argument = vfio::vfio_device_attach_iommufd_pt {
        flags: if pasid.is_some() { vfio::VFIO_DEVICE_ATTACH_PASID } else { 0 },
        pt_id: page_table,
        pasid: pasid.map_or(0, Pasid::get),
        ..Default::default()
    };
    call(device, &mut argument)?;
    Ok(argument.pt_id)
}

// SAFETY: vfio_device_detach_iommufd_pt of vfio.h: three words, no pointer.
unsafe impl Argument for vfio::vfio_device_detach_iommufd_pt {
    type File = VfioFd;
    const REQUEST: c_int = io(vfio::VFIO_BASE + 20);
    fn size(&mut self) -> &mut u32 {
        &mut self.argsz
    }
}

/// VFIO_DEVICE_DETACH_IOMMUFD_PT.
pub(super) fn detach(device: &VfioFd, pasid: Option<Pasid>) -> io::Result<()> {
    let mut argument = vfio::vfio_device_detach_iommufd_pt {
        flags: if pasid.is_some() { vfio::VFIO_DEVICE_DETACH_PASID } else { 0 },
        pasid: pasid.map_or(0, Pasid::get),
        ..Default::default()
    };
    call(device, &mut argument)
}
