//! The ioctl system call, for the kernel's IOMMU interfaces.
//!
//! # Why this module is unsafe, and what makes it sound
//! An ioctl's number says what the kernel does with its argument, and no type knows it. So the two functions here are
//! unsafe, and each caller proves what they ask: the modules that list an interface's ioctls (`group/calls.rs` for VFIO's
//! containers and groups) give each number its argument, and everybody else calls theirs, which are safe.

use std::ffi::{c_int, c_ulong};
use std::os::fd::{AsRawFd, BorrowedFd};

use rustix::io::Errno;

/// A request's number: `_IO(';', number)` for VFIO and iommufd alike (include/uapi/linux/vfio.h, iommufd.h; Linux 7.3).
pub(crate) const fn request(number: u8) -> c_ulong {
    (b';' as c_ulong) << 8 | number as c_ulong
}

/// Calls ioctl(2) with a pointer to `argument`, and returns what it does.
///
/// # Safety
/// On `fd`, `request` takes a pointer to an `A` and reads and writes no more than that, or as much as the sizes in it say,
/// which lies in `argument` too. Addresses inside of `argument` point to memory with which the kernel may do, now or
/// later, what the request does. All that the kernel may write to `argument` is a valid `A`.
pub(crate) unsafe fn ioctl<A: ?Sized>(
    fd: BorrowedFd<'_>,
    request: c_ulong,
    argument: &mut A,
) -> Result<c_int, Errno> {
    let argument = std::ptr::from_mut(argument).cast::<u8>();
    // SAFETY: the caller's promise; the pointer is good for all of the argument.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), request as _, argument) })
}

/// Calls ioctl(2) with a plain number.
///
/// # Safety
/// On `fd`, `request` takes a number, or nothing, and does not touch this process's memory.
pub(crate) unsafe fn ioctl_value(
    fd: BorrowedFd<'_>,
    request: c_ulong,
    value: c_ulong,
) -> Result<c_int, Errno> {
    // SAFETY: the caller's promise.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), request as _, value) })
}

fn check(returned: c_int) -> Result<c_int, Errno> {
    if returned < 0 {
        let error = std::io::Error::last_os_error();
        return Err(Errno::from_io_error(&error).unwrap_or(Errno::IO));
    }
    Ok(returned)
}
