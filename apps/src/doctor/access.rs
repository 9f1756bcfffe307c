//! The way to devices: vfio-pci, iommufd, and who may open what.

use std::path::{Path, PathBuf};

use rustix::fs::{Access, access};
use underpass::pci::host::{Host, HostDevice, VFIO_PCI};

use super::Check;
use crate::bind::{self, CONTAINER, IOMMU};
use crate::folder::names;

pub(super) fn vfio(host: &Host) -> Check {
    if host.has_vfio_pci() {
        let is_module = host.path("/sys/module/vfio_pci/initstate").exists();
        return Check::ok(VFIO_PCI, if is_module { "loaded" } else { "part of the kernel" });
    }
    Check::fail(
        VFIO_PCI,
        "not loaded",
        "sudo modprobe vfio-pci (a kernel without that module needs CONFIG_VFIO_PCI)",
    )
}

pub(super) fn denylist(host: &Host) -> Check {
    const NAME: &str = "vfio-pci denylist";
    let devices = host.devices().unwrap_or_default();
    let denied: Vec<_> = devices
        .iter()
        .filter(|device| device.is_denylisted())
        .map(|device| device.address().to_string())
        .collect();
    if denied.is_empty() {
        return Check::ok(NAME, "no device here is on it");
    }
    let denied = denied.join(", ");
    if host.takes_denylisted() {
        return Check::ok(NAME, format!("switched off; it names {denied}"));
    }
    let mend = "if you trust the program: sudo modprobe -r vfio-pci && sudo modprobe vfio-pci disable_denylist=1; where \
                vfio-pci is built in, boot with vfio_pci.disable_denylist=1";
    Check::warn(NAME, format!("it names {denied}"), mend)
}

pub(super) fn address_spaces(host: &Host) -> Check {
    // The kernel's own name for the numbers of VFIO's device files, and for those of groups.
    let numbers = host.text("/proc/devices").unwrap_or_default();
    let has = |name| numbers.lines().any(|line| line.split_whitespace().nth(1) == Some(name));
    let (cdevs, groups) = (has("vfio-dev"), has("vfio"));
    let is_there = host.path(IOMMU).exists();
    let name = "iommufd";
    if is_there && (cdevs || !host.has_vfio_pci()) {
        let found = if cdevs { "/dev/iommu, and VFIO has device files" } else { "/dev/iommu" };
        return Check::ok(name, found);
    }
    let found = if is_there { "/dev/iommu, but VFIO has no device files" } else { "no /dev/iommu" };
    if groups && host.path(CONTAINER).exists() {
        return Check::warn(
            name,
            format!("{found}: type1 is used: one address space a device, no PASIDs"),
            "sudo modprobe iommufd; without that module, a kernel with CONFIG_IOMMUFD and CONFIG_VFIO_DEVICE_CDEV",
        );
    }
    Check::fail(
        name,
        found,
        "sudo modprobe -a iommufd vfio-pci (a kernel without iommufd needs CONFIG_IOMMUFD and CONFIG_VFIO_DEVICE_CDEV)",
    )
}

pub(super) fn unprotected(host: &Host) -> Check {
    const NAME: &str = "noiommu";
    if host.takes_unprotected() {
        return Check::warn(
            NAME,
            "on: devices without an IOMMU can be bound, and reach all memory",
            "echo 0 | sudo tee /sys/module/vfio/parameters/enable_unsafe_noiommu_mode",
        );
    }
    Check::ok(NAME, "off")
}

/// Whether this user may open what there is to open.
pub(super) fn permissions(host: &Host) -> Check {
    const NAME: &str = "permissions";
    let files = files(host);
    if files.is_empty() {
        return Check::warn(
            NAME,
            "nothing to open: neither /dev/iommu nor a device bound to VFIO",
            "first load vfio-pci",
        );
    }
    let (open, closed): (Vec<PathBuf>, Vec<_>) = files.into_iter().partition(|path| may_use(path));
    if closed.is_empty() {
        return Check::ok(NAME, format!("this user may open all of {} files: {}", open.len(), shown(&open)));
    }
    let bound = host.devices().unwrap_or_default().into_iter().find(HostDevice::is_vfio);
    let address = bound.map_or_else(|| "ADDRESS".to_owned(), |device| device.address().to_string());
    Check::warn(NAME, format!("this user may not open {}", shown(&closed)), bind::command(&address))
}

/// `/dev/iommu`, the container of groups, and the files of all bound devices.
fn files(host: &Host) -> Vec<PathBuf> {
    let mut files = vec![host.path(IOMMU)];
    for folder in ["/dev/vfio", "/dev/vfio/devices"] {
        let folder = host.path(folder);
        files.extend(names(&folder).iter().map(|name| folder.join(name)).filter(|path| !path.is_dir()));
    }
    files.retain(|path| path.exists());
    files
}

fn may_use(path: &Path) -> bool {
    access(path, Access::READ_OK | Access::WRITE_OK).is_ok()
}

/// The first few of them.
fn shown(files: &[PathBuf]) -> String {
    const SHOWN: usize = 3;
    let more = if files.len() > SHOWN { ", ..." } else { "" };
    let shown: Vec<_> = files.iter().take(SHOWN).map(|path| path.display().to_string()).collect();
    shown.join(", ") + more
}
