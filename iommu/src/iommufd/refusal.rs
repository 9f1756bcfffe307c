//! What the kernel's refusals mean, and how to mend them.
//!
//! One errno of iommufd or VFIO has many causes; what else it takes to tell them apart is read here, from /proc and /sys,
//! once something has failed. The meanings are those of `drivers/iommu/iommufd`, `drivers/iommu/iommu.c` and `drivers/vfio`
//! of Linux 7.3.

use std::fs;
use std::io;
use std::path::Path;

use super::calls::IommuFd;
use crate::group::leaves_dma_alone;
use crate::memlock::{Limit, out_of_memory};
use crate::vendor::Registers;
use crate::{Error, ErrorKind, Iova, Pasid, Region};

const ATTACH: &str = "attach the device";
const WITHOUT_PASIDS: &str = "use the device without PASIDs, in its own address space";

#[cold]
pub(super) fn open(error: io::Error) -> Error {
    let (why, mend) = match error.raw_os_error() {
        Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => (
            "this kernel has no iommufd, or it is not loaded",
            "run: sudo modprobe iommufd; where there is no such module, use a kernel with CONFIG_IOMMUFD",
        ),
        Some(libc::EACCES | libc::EPERM) => ("this user may not", "run: sudo chown $USER /dev/iommu"),
        Some(libc::EMFILE | libc::ENFILE) => ("too many files are open", "raise the limit: ulimit -n"),
        _ => ("the kernel refuses", "look for what it says: sudo dmesg"),
    };
    Error::os(format!("open {}", IommuFd::PATH), why, error).mend(mend)
}

#[cold]
pub(super) fn memlock_mode(error: io::Error) -> Error {
    let why = match error.raw_os_error() {
        Some(libc::EPERM) => "that takes CAP_SYS_RESOURCE",
        _ => "the kernel refuses",
    };
    Error::os("have locked memory counted by process", why, error)
        .mend("run as root, or have it counted by user (Memlock::User)")
}

#[cold]
pub(super) fn alloc_ioas(error: io::Error) -> Error {
    Error::os("make an address space", "the kernel refuses", error).mend("stop what else uses memory")
}

#[cold]
pub(super) fn required_iovas(error: io::Error) -> Error {
    Error::os("require addresses of an address space", "ranges are empty or overlap", error)
        .of_kind(ErrorKind::InvalidInput)
        .mend("require ranges of more than one byte that do not overlap")
}

#[cold]
pub(super) fn hardware(error: io::Error) -> Error {
    let (why, mend) = match error.raw_os_error() {
        Some(libc::EOPNOTSUPP) => (
            "no IOMMU is in front of it",
            "switch the IOMMU on, in the firmware and on the kernel's command line (intel_iommu=on)",
        ),
        Some(libc::ENOTTY) => ("this kernel does not tell what its IOMMU is", "use Linux 6.6 or later"),
        _ => ("the kernel does not tell what its IOMMU is", "look for what it says: sudo dmesg"),
    };
    Error::os(ATTACH, why, error).mend(mend)
}

#[cold]
pub(super) fn not_bound() -> Error {
    Error::new(ErrorKind::InvalidInput, ATTACH, "it is not bound to an iommufd")
        .mend("allocate the address space from the IOMMU that the device is behind")
}

#[cold]
pub(super) fn other_iommufd() -> Error {
    let why = "it is bound to another iommufd than the one that the address space is of";
    Error::new(ErrorKind::InvalidInput, ATTACH, why)
        .mend("allocate the address space from the Iommufd that the device was bound by; Iommufd::shared is one for all")
}

#[cold]
pub(super) fn map(error: io::Error, region: &Region, iova: Iova, pinned: u64) -> Error {
    let operation = format!("map {region:?} at {iova}");
    match error.raw_os_error() {
        Some(libc::ENOMEM) => out_of_memory(operation, &Limit::read(), pinned + region.len(), error),
        Some(libc::EEXIST | libc::EINVAL | libc::EADDRINUSE) => Error::os(
            operation,
            "the kernel has something else at these addresses, or keeps them free",
            error,
        )
        .mend("attach all devices before mapping memory"),
        _ => Error::os(operation, "the kernel refuses", error).mend("look for what it says: sudo dmesg"),
    }
}

#[cold]
pub(super) fn unmap(error: io::Error, iova: Iova, len: u64) -> Error {
    let why = "the kernel refuses, and the device may still reach them";
    Error::os(format!("unmap {len} bytes at {iova}"), why, error).mend("end the process, which unmaps them")
}

#[cold]
pub(super) fn unmap_is_partial(iova: Iova, len: u64, unmapped: u64) -> Error {
    Error::new(
        ErrorKind::Os,
        format!("unmap {len} bytes at {iova}"),
        format!("the kernel unmapped {unmapped}, and the device may still reach others"),
    )
    .mend("end the process, which unmaps them, and please report this: it is a bug of the kernel's or of this library's")
}

/// Why a device gets no page table of an address space that maps `pinned` bytes at most.
#[cold]
pub(super) fn page_table(error: io::Error, pinned: u64) -> Error {
    match error.raw_os_error() {
        // What the space maps is pinned for its first page table.
        Some(libc::ENOMEM) => out_of_memory(ATTACH.to_owned(), &Limit::read(), pinned, error),
        Some(libc::EADDRINUSE) => mapped_before(error),
        _ => Error::os(ATTACH, "the kernel makes no page table for it", error)
            .mend("look for what it says: sudo dmesg"),
    }
}

fn mapped_before(error: io::Error) -> Error {
    Error::os(ATTACH, "something is mapped already, or required, at addresses that it can not use", error)
        .of_kind(ErrorKind::Busy)
        .mend("attach all devices before mapping memory, or unmap it first")
}

/// Why the kernel does not attach the device, or `pasid` of it.
#[cold]
pub(super) fn attach(errno: Option<i32>, pasid: Option<Pasid>, registers: &Registers, pinned: u64) -> Error {
    let error = || io::Error::from_raw_os_error(errno.unwrap_or(libc::EIO));
    let operation = pasid.map_or_else(|| ATTACH.to_owned(), |pasid| format!("attach PASID {pasid}"));
    let refused = |kind, why: &'static str, mend: &'static str| {
        Error::os(operation.clone(), why, error()).of_kind(kind).mend(mend)
    };
    match (errno, pasid) {
        (Some(libc::ENOMEM), _) => out_of_memory(operation, &Limit::read(), pinned, error()),
        (Some(libc::EADDRINUSE), _) => mapped_before(error()),
        (Some(libc::EOPNOTSUPP), Some(_)) if matches!(registers, Registers::Amd(_)) => refused(
            ErrorKind::Unsupported,
            "Linux attaches no address space to a PASID of AMD-Vi, only a process's (seen in 7.3)",
            WITHOUT_PASIDS,
        ),
        (Some(libc::EOPNOTSUPP), Some(_)) => refused(
            ErrorKind::Unsupported,
            "the kernel's driver of this IOMMU attaches no address space to a PASID",
            WITHOUT_PASIDS,
        ),
        (Some(libc::EINVAL), Some(_)) => refused(
            ErrorKind::Unsupported,
            "the kernel takes no PASID here: another device of its IOMMU group has it, or the device's own address space \
             is on a page table without PASIDs",
            WITHOUT_PASIDS,
        ),
        (Some(libc::EINVAL), None) => refused(
            ErrorKind::Busy,
            "the page table does not suit it, most likely because another device of its IOMMU group is attached to another \
             address space",
            "attach all devices of an IOMMU group to one address space",
        ),
        (Some(libc::EBUSY), _) => {
            refused(ErrorKind::Busy, "the kernel is resetting it, or has it in use", "try again in a second")
        }
        (Some(libc::ENODEV), _) => {
            refused(ErrorKind::Gone, "it is gone", "check that it is still there: lspci")
        }
        _ => Error::os(operation.clone(), "the kernel refuses", error())
            .mend("look for what it says: sudo dmesg"),
    }
}

/// Why there are no PASIDs. `release` is the kernel's, as uname(1) -r tells it.
#[cold]
pub(super) fn no_pasids(pasid: Pasid, registers: &Registers, release: Option<&str>) -> Error {
    let operation = format!("attach PASID {pasid}");
    if let Some(release) = release.filter(|release| is_before(release, (6, 15))) {
        let why = format!("Linux {release} lets user space have none");
        return Error::new(ErrorKind::Exhausted, operation, why)
            .mend("use Linux 6.15 or later, or use the device without PASIDs, in its own address space");
    }
    let (why, mend) = registers.why_no_pasids();
    Error::new(ErrorKind::Exhausted, operation, why).mend(mend)
}

/// The release of the running kernel.
pub(super) fn kernel_release() -> Option<String> {
    Some(fs::read_to_string("/proc/sys/kernel/osrelease").ok()?.trim().to_owned())
}

fn is_before(release: &str, version: (u32, u32)) -> bool {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map_while(|number| number.parse().ok());
    matches!((numbers.next(), numbers.next()), (Some(major), Some(minor)) if (major, minor) < version)
}

#[cold]
pub(super) fn pasid_too_large(pasid: Pasid, last: u64) -> Error {
    let why = format!("the device and its IOMMU have {last} PASIDs, numbered from 1");
    Error::new(ErrorKind::Exhausted, format!("attach PASID {pasid}"), why)
        .mend("allocate it by Pasid::allocate_up_to with what the capabilities say; use fewer queues")
}

#[cold]
pub(super) fn pasid_of_mediated(pasid: Pasid) -> Error {
    let why = "the device is a mediated one: its memory is accessed by the kernel, without an IOMMU";
    Error::new(ErrorKind::Exhausted, format!("attach PASID {pasid}"), why)
        .mend("attach the device itself, without a PASID")
}

#[cold]
pub(super) fn page_table_without_pasids(pasid: Pasid, tracks_dirty: bool) -> Error {
    let (why, mend) = if tracks_dirty {
        (
            "this IOMMU has no page table with both PASIDs and tracking of written pages",
            "open the iommufd without dirty tracking",
        )
    } else {
        (
            "the kernel's driver of this IOMMU makes no page table for PASIDs",
            "use the device without PASIDs, in its own address space",
        )
    };
    Error::new(ErrorKind::Unsupported, format!("attach PASID {pasid}"), why).mend(mend)
}

/// What sysfs says of a VFIO device's IOMMU group.
#[derive(Debug, Default)]
pub(super) struct Group {
    number: Option<u32>,
    devices: usize,
    /// Those of them that a kernel driver does DMA with, and the drivers: "0000:00:1f.3 (e1000e)".
    in_use: Vec<String>,
}

impl Group {
    /// The group of the VFIO device with this folder in sysfs.
    pub(super) fn read(vfio_device: &Path) -> Self {
        let folder = vfio_device.join("device/iommu_group");
        let name = |path: &Path| Some(path.file_name()?.to_str()?.to_owned());
        let number = fs::canonicalize(&folder).ok().and_then(|path| name(&path)?.parse().ok());
        let devices: Vec<_> = fs::read_dir(folder.join("devices")).into_iter().flatten().flatten().collect();
        let used = |device: &fs::DirEntry| {
            let driver = name(&fs::read_link(device.path().join("driver")).ok()?)?;
            (!leaves_dma_alone(&driver)).then(|| format!("{} ({driver})", device.file_name().display()))
        };
        let mut in_use: Vec<_> = devices.iter().filter_map(used).collect();
        in_use.sort();
        Self { number, devices: devices.len(), in_use }
    }
}

/// Why VFIO does not bind a device of `group`, with or without a VF token.
#[cold]
pub(super) fn bind(error: io::Error, group: &Group, with_token: bool) -> Error {
    let number = group
        .number
        .map_or_else(|| "its IOMMU group".to_owned(), |number| format!("its IOMMU group {number}"));
    let find = "find who has it: sudo fuser -v /dev/vfio/* /dev/vfio/devices/*";
    let (kind, why, mend) = match error.raw_os_error() {
        Some(libc::EPERM) if !group.in_use.is_empty() => (
            ErrorKind::Permission,
            format!("{number} is not viable: kernel drivers have {}", group.in_use.join(", ")),
            "bind all devices of the group to vfio-pci: underpass bind",
        ),
        Some(libc::EPERM) => (
            ErrorKind::Permission,
            format!(
                "the IOMMU does not isolate its interrupts (no interrupt remapping){}",
                if group.devices > 1 {
                    format!(", or another process has a device of {number}")
                } else {
                    String::new()
                }
            ),
            "switch interrupt remapping on in the firmware; where there is none and the device is trusted, run: \
             echo Y | sudo tee /sys/module/iommufd/parameters/allow_unsafe_interrupts",
        ),
        Some(libc::EBUSY) => (ErrorKind::Busy, format!("another process has {number} open"), find),
        Some(libc::EINVAL) if with_token => (
            ErrorKind::InvalidInput,
            "it needs no VF token, or another process has it open".to_owned(),
            "leave the token out, unless its physical function is bound to vfio-pci",
        ),
        Some(libc::EINVAL) => (
            ErrorKind::Busy,
            "another process has it open (or its IOMMU does not keep DMA coherent with the CPU's caches)"
                .to_owned(),
            find,
        ),
        Some(libc::EACCES) => (
            ErrorKind::Permission,
            if with_token {
                "its VF token is another one"
            } else {
                "it is a function of SR-IOV and needs its VF token"
            }
            .to_owned(),
            "give the token that was set for its physical function: vf-token=UUID",
        ),
        Some(libc::ENODEV | libc::EIO) => (
            ErrorKind::Gone,
            "it is gone, or does not wake up".to_owned(),
            "check that it is still there: lspci",
        ),
        Some(libc::ENOTTY) => {
            (ErrorKind::Unsupported, "this kernel's VFIO has no iommufd".to_owned(), "use Linux 6.6 or later")
        }
        _ => (ErrorKind::Os, "VFIO refuses".to_owned(), "look for what the kernel says: sudo dmesg"),
    };
    Error::os("bind the device to an iommufd", why, error).of_kind(kind).mend(mend)
}

#[cfg(test)]
mod tests;
