//! The ioctls of VFIO devices (`include/uapi/linux/vfio.h` of Linux 7.3), each with its argument.
//!
//! # Why this module is unsafe, and what makes it sound
//! The compiler can not check what the kernel does with an ioctl's argument. The invariant: a [`Handle`] is a VFIO
//! device, since it is made of nothing else, so that a request means what `vfio.h` says; each is passed a buffer whose
//! length is in its first word (`argsz`), and the kernel touches no byte behind that. None of these buffers has a pointer
//! in it.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use underpass_iommu::group::Group;
use underpass_iommu::iommufd::{Cdev, Device};
use underpass_iommu::{AttachableKind, Result};
use vfio_bindings::bindings::vfio;

/// A VFIO device, open: the one thing that these ioctls are asked of.
pub(super) enum Handle {
    /// By its character device, bound to an iommufd.
    Cdev { cdev: Arc<Cdev>, attachable: Arc<dyn Device> },
    /// By its group.
    Group { fd: OwnedFd, group: Arc<Group> },
}

impl Handle {
    pub(super) fn cdev(cdev: Arc<Cdev>) -> Self {
        Self::Cdev { attachable: Arc::clone(&cdev) as Arc<dyn Device>, cdev }
    }

    /// The group's device of this name: "0000:3b:00.0", perhaps followed by a VF token.
    pub(super) fn group(group: Arc<Group>, name: &str) -> Result<Self> {
        Ok(Self::Group { fd: group.device(name)?, group })
    }

    pub(super) fn attachable(&self) -> AttachableKind<'_> {
        match self {
            Self::Cdev { attachable, .. } => AttachableKind::Iommufd(attachable),
            Self::Group { group, .. } => AttachableKind::Group(group),
        }
    }
}

impl AsFd for Handle {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Cdev { cdev, .. } => cdev.fd(),
            Self::Group { fd, .. } => fd.as_fd(),
        }
    }
}

impl fmt::Debug for Handle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Handle({:?})", self.attachable())
    }
}

/// What `VFIO_DEVICE_GET_INFO` says.
#[derive(Debug, Clone, Copy)]
pub(super) struct Info {
    pub is_pci: bool,
    pub can_reset: bool,
}

/// The kinds of interrupts of a PCI device (`VFIO_PCI_*_IRQ_INDEX`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum Irq {
    Intx = vfio::VFIO_PCI_INTX_IRQ_INDEX,
    Msi = vfio::VFIO_PCI_MSI_IRQ_INDEX,
    Msix = vfio::VFIO_PCI_MSIX_IRQ_INDEX,
    /// The device had an error that it does not recover from by itself.
    Error = vfio::VFIO_PCI_ERR_IRQ_INDEX,
    /// The kernel asks for the device back.
    Request = vfio::VFIO_PCI_REQ_IRQ_INDEX,
}

pub(super) fn device_info(device: &Handle) -> io::Result<Info> {
    let mut info = [0; size_of::<vfio::vfio_device_info>() / 4];
    ask(device, 7, &mut info)?;
    let flags = info[1];
    Ok(Info {
        is_pci: flags & vfio::VFIO_DEVICE_FLAGS_PCI != 0,
        can_reset: flags & vfio::VFIO_DEVICE_FLAGS_RESET != 0,
    })
}

/// What `VFIO_DEVICE_GET_REGION_INFO` says of region `index`: a `vfio_region_info` and its capabilities.
pub(super) fn region_info(device: &Handle, index: u32) -> io::Result<Vec<u8>> {
    // More capabilities than fit here are not believed.
    const MOST: usize = 1 << 16;
    let mut len = size_of::<vfio::vfio_region_info>();
    // The kernel says how much room it needs; what a device has changes at most once while it is asked.
    for _ in 0..3 {
        let mut info = vec![0; len.div_ceil(4)];
        info[2] = index;
        ask(device, 8, &mut info)?;
        let needed = info[0] as usize;
        if needed <= info.len() * 4 {
            return Ok(info.iter().flat_map(|word| word.to_ne_bytes()).collect());
        }
        if needed > MOST {
            break;
        }
        len = needed;
    }
    Err(io::Error::from_raw_os_error(rustix::io::Errno::OVERFLOW.raw_os_error()))
}

/// How many interrupts of this kind the device has.
pub(super) fn irq_count(device: &Handle, irq: Irq) -> io::Result<u32> {
    let mut info = [0; size_of::<vfio::vfio_irq_info>() / 4];
    info[2] = irq as u32;
    match ask(device, 9, &mut info) {
        Ok(_) => Ok(info[3]),
        // A device need not know of kinds that it has not.
        Err(error) if error.raw_os_error() == Some(rustix::io::Errno::INVAL.raw_os_error()) => Ok(0),
        Err(error) => Err(error),
    }
}

/// Has the kernel signal `fds[n]` at interrupt `n`. Ok with a number is a refusal: so many could be had.
pub(super) fn set_irqs(device: &Handle, irq: Irq, fds: &[BorrowedFd<'_>]) -> io::Result<u32> {
    let action = vfio::VFIO_IRQ_SET_DATA_EVENTFD | vfio::VFIO_IRQ_SET_ACTION_TRIGGER;
    let mut set = irq_set(action, irq, fds.len() as u32);
    set.extend(fds.iter().map(|fd| fd.as_raw_fd().cast_unsigned()));
    ask(device, 10, &mut set)
}

/// Switches all interrupts of this kind off.
pub(super) fn disable_irqs(device: &Handle, irq: Irq) -> io::Result<()> {
    let action = vfio::VFIO_IRQ_SET_DATA_NONE | vfio::VFIO_IRQ_SET_ACTION_TRIGGER;
    ask(device, 10, &mut irq_set(action, irq, 0)).map(drop)
}

/// Lets the device raise its line interrupt again; the kernel has masked it at the last one.
pub(super) fn unmask_intx(device: &Handle) -> io::Result<()> {
    let action = vfio::VFIO_IRQ_SET_DATA_NONE | vfio::VFIO_IRQ_SET_ACTION_UNMASK;
    ask(device, 10, &mut irq_set(action, Irq::Intx, 1)).map(drop)
}

/// `struct vfio_irq_set` without its data: argsz, flags, index, start, count.
fn irq_set(flags: u32, irq: Irq, count: u32) -> Vec<u32> {
    vec![0, flags, irq as u32, 0, count]
}

/// `VFIO_DEVICE_RESET`.
pub(super) fn reset(device: &Handle) -> io::Result<()> {
    // The request takes no argument, so the kernel leaves this one alone.
    ask(device, 11, &mut [0]).map(drop)
}

/// Does the device's request `number` with `argument`, whose first word becomes its length, and returns what the call
/// returned.
fn ask(device: &Handle, number: u32, argument: &mut [u32]) -> io::Result<u32> {
    argument[0] = size_of_val(argument) as u32;
    // `_IO(';', 100 + number)`: VFIO's requests have no size in them.
    let request = u32::from(vfio::VFIO_TYPE) << 8 | (vfio::VFIO_BASE + number);
    let fd = device.as_fd().as_raw_fd();
    // SAFETY: the file is a VFIO device (Handle), which takes with this request a buffer that says how long it is (just
    // above) or none. The buffer is borrowed for the call, and all bit patterns are valid in it.
    let result = unsafe { libc::ioctl(fd, request as libc::Ioctl, argument.as_mut_ptr()) };
    u32::try_from(result).map_err(|_| io::Error::last_os_error())
}
