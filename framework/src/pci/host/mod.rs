//! What Linux says of its PCI devices, in sysfs, and which driver they are bound to.
//!
//! Attributes are those of `Documentation/ABI/testing/sysfs-bus-pci` and `sysfs-kernel-iommu_groups` of Linux 7.3.
//! Reading them needs no privileges; [`bind`] and [`unbind`] need root.

mod bind;
mod disk;
mod group;
mod network;
mod process;
#[cfg(test)]
mod tests;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::pci::PciAddress;
use crate::{Error, ErrorKind, Result};

pub use bind::{BindOptions, Change, bind, unbind};
pub use group::Member;

/// The kernel's driver that hands PCI devices to user space.
pub const VFIO_PCI: &str = "vfio-pci";

/// Devices that vfio-pci takes only with `disable_denylist=1`: what a guest or a process does to them can bring the host
/// down (`drivers/vfio/pci/vfio_pci.c`, Linux 7.3). Vendor and device.
const DENYLIST: [(u16, u16); 8] = [
    (0x8086, 0x0435),
    (0x8086, 0x0443),
    (0x8086, 0x0b25),
    (0x8086, 0x0cfe),
    (0x8086, 0x19e2),
    (0x8086, 0x19e3),
    (0x8086, 0x37c8),
    (0x8086, 0x37c9),
];

/// Where a machine's sysfs, procfs and devices are found.
#[derive(Debug, Clone)]
pub struct Host {
    root: Arc<Path>,
    addresses: fn() -> Result<Vec<network::InterfaceAddress>>,
}

impl Host {
    /// The machine that this process runs on.
    pub fn this() -> Self {
        Self { root: Path::new("/").into(), addresses: network::addresses }
    }

    /// A machine whose `/sys`, `/proc` and `/dev` are folders below `root`: a made-up one, for tests. Its network interfaces
    /// have no addresses.
    pub fn below(root: &Path) -> Self {
        Self { root: root.into(), addresses: || Ok(Vec::new()) }
    }

    /// A file of it: `path` is absolute.
    pub fn path(&self, path: impl AsRef<Path>) -> PathBuf {
        let path = path.as_ref();
        self.root.join(path.strip_prefix("/").unwrap_or(path))
    }

    /// Its PCI device at `address`.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] if there is none.
    pub fn device(&self, address: PciAddress) -> Result<HostDevice> {
        HostDevice::read(self, address)
    }

    /// All of its PCI devices, in the order of their addresses.
    ///
    /// # Errors
    /// [`ErrorKind::Os`] where sysfs can not be read. A machine without PCI has no devices.
    pub fn devices(&self) -> Result<Vec<HostDevice>> {
        let folder = self.path("/sys/bus/pci/devices");
        let mut addresses: Vec<PciAddress> = names(&folder)
            .map_err(|error| {
                Error::os("list the PCI devices", format!("{} can not be read", folder.display()), error)
            })?
            .iter()
            .filter_map(|name| name.parse().ok())
            .collect();
        addresses.sort();
        let mut devices = Vec::with_capacity(addresses.len());
        for address in addresses {
            match self.device(address) {
                Ok(device) => devices.push(device),
                // Unplugged meanwhile.
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        Ok(devices)
    }

    /// Whether the kernel's vfio-pci is there: built in, or its module loaded.
    pub fn has_vfio_pci(&self) -> bool {
        self.path("/sys/bus/pci/drivers").join(VFIO_PCI).exists()
    }

    /// Whether vfio-pci takes the devices of its denylist.
    pub fn takes_denylisted(&self) -> bool {
        self.is_set("/sys/module/vfio_pci/parameters/disable_denylist")
    }

    /// Whether VFIO also takes devices that no IOMMU holds.
    pub fn takes_unprotected(&self) -> bool {
        self.is_set("/sys/module/vfio/parameters/enable_unsafe_noiommu_mode")
    }

    /// How its IOMMU is switched on.
    pub fn how_to_enable_iommu(&self) -> &'static str {
        let cpu = self.text("/proc/cpuinfo").unwrap_or_default();
        if cpu.contains("GenuineIntel") {
            "switch VT-d on in the firmware and add intel_iommu=on to the kernel's command line"
        } else if cpu.contains("AuthenticAMD") {
            "switch the IOMMU (AMD-Vi) on in the firmware; the kernel's command line must not have amd_iommu=off"
        } else {
            "switch the IOMMU on in the firmware; the kernel's command line must not switch it off"
        }
    }

    /// Whether a module's boolean parameter is set. One that is not there is not.
    pub fn is_set(&self, parameter: &str) -> bool {
        self.text(parameter).is_some_and(|value| value == "Y" || value == "1")
    }

    /// A short file's text without the white space around it; `None` if it can not be read.
    pub fn text(&self, path: impl AsRef<Path>) -> Option<String> {
        text(&self.path(path))
    }
}

/// A PCI device as sysfs showed it when it was read.
#[derive(Debug, Clone)]
pub struct HostDevice {
    host: Host,
    /// Its folder, without symbolic links.
    folder: PathBuf,
    address: PciAddress,
    vendor_id: u16,
    device_id: u16,
    class: u32,
    kernel_driver: Option<String>,
    iommu_group: Option<u32>,
    numa_node: Option<u32>,
    cdev: Option<String>,
    is_vfio: bool,
}

impl HostDevice {
    /// This machine's device at `address`.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] if there is none.
    pub fn find(address: PciAddress) -> Result<Self> {
        Host::this().device(address)
    }

    /// All of this machine's PCI devices, in the order of their addresses.
    ///
    /// # Errors
    /// [`ErrorKind::Os`] where sysfs can not be read.
    pub fn all() -> Result<Vec<Self>> {
        Host::this().devices()
    }

    fn read(host: &Host, address: PciAddress) -> Result<Self> {
        let link = host.path("/sys/bus/pci/devices").join(address.to_string());
        let folder = link.canonicalize().map_err(|_| {
            Error::new(
                ErrorKind::NotFound,
                "find the PCI device",
                "this machine has no device at that address",
            )
            .device(address.to_string())
            .mend("to list the devices, run: underpass devices --all")
        })?;
        let vfio = names(&folder.join("vfio-dev")).unwrap_or_default();
        Ok(Self {
            vendor_id: number(&folder, "vendor", address)?,
            device_id: number(&folder, "device", address)?,
            class: number(&folder, "class", address)?,
            kernel_driver: link_name(&folder.join("driver")),
            iommu_group: link_name(&folder.join("iommu_group")).and_then(|group| group.parse().ok()),
            // -1 where there is only one, or it is not known.
            numa_node: text(&folder.join("numa_node")).and_then(|node| node.parse().ok()),
            // Without CONFIG_VFIO_DEVICE_CDEV the name is there and has no device number.
            cdev: vfio.iter().find(|name| folder.join("vfio-dev").join(name).join("dev").exists()).cloned(),
            is_vfio: !vfio.is_empty(),
            folder,
            address,
            host: host.clone(),
        })
    }

    /// Where it is.
    pub fn address(&self) -> PciAddress {
        self.address
    }

    /// Its vendor.
    pub fn vendor_id(&self) -> u16 {
        self.vendor_id
    }

    /// Which of the vendor's devices it is.
    pub fn device_id(&self) -> u16 {
        self.device_id
    }

    /// What it is for: class, subclass and programming interface, a byte each (PCI Code and ID Assignment Specification
    /// 1.15, section 1).
    pub fn class(&self) -> u32 {
        self.class
    }

    /// Whether it leads to other buses or devices. Such a one is the kernel's.
    pub fn is_bridge(&self) -> bool {
        self.class >> 16 == 0x06
    }

    /// The kernel's driver that it is bound to, if it is bound.
    pub fn kernel_driver(&self) -> Option<&str> {
        self.kernel_driver.as_deref()
    }

    /// Whether it is bound to vfio-pci, or a relative of it for this device.
    pub fn is_vfio(&self) -> bool {
        self.is_vfio || self.kernel_driver() == Some(VFIO_PCI)
    }

    /// Whether vfio-pci takes it only with `disable_denylist=1`.
    pub fn is_denylisted(&self) -> bool {
        DENYLIST.contains(&(self.vendor_id, self.device_id))
    }

    /// The number of its IOMMU group; `None` where no IOMMU holds it.
    pub fn iommu_group(&self) -> Option<u32> {
        self.iommu_group
    }

    /// Whether its group is one that VFIO made up for a device without an IOMMU.
    fn group_is_noiommu(&self) -> bool {
        text(&self.folder.join("iommu_group/name")).is_some_and(|name| name == "vfio-noiommu")
    }

    /// Whether VFIO hands it out though no IOMMU holds it: its group says so or, where the kernel has no groups, the name of
    /// its character device (`vfio_device_set_noiommu_and_name` in `drivers/vfio/vfio_main.c`, Linux 7.3).
    pub fn is_unprotected(&self) -> bool {
        self.group_is_noiommu() || self.cdev.as_ref().is_some_and(|name| name.starts_with("noiommu-"))
    }

    /// The character device that opens it for iommufd: `/dev/vfio/devices/vfio0`. `None` if it is not bound to VFIO, or the
    /// kernel has only groups.
    pub fn cdev(&self) -> Option<PathBuf> {
        self.cdev.as_ref().map(|name| self.host.path("/dev/vfio/devices").join(name))
    }

    /// The file that opens its group: `/dev/vfio/12`, or `/dev/vfio/noiommu-0`. `None` if it is not bound to VFIO.
    pub fn group_file(&self) -> Option<PathBuf> {
        let group = self.iommu_group.filter(|_| self.is_vfio())?;
        let prefix = if self.group_is_noiommu() { "noiommu-" } else { "" };
        Some(self.host.path("/dev/vfio").join(format!("{prefix}{group}")))
    }

    /// The NUMA node that it is at, if that is known.
    pub fn numa_node(&self) -> Option<u32> {
        self.numa_node
    }

    /// The PCI devices of its IOMMU group, itself among them, in the order of their addresses. Empty without a group.
    pub fn group_members(&self) -> Vec<PciAddress> {
        group::members(self).iter().filter_map(Member::address).collect()
    }

    /// The network interfaces that its kernel driver made of it, by name. Those moved to another network namespace are
    /// not seen.
    pub fn interfaces(&self) -> Vec<String> {
        network::interfaces(self)
    }

    /// What [`bind`] refuses to cut off with it: addresses, default routes and masters of its network interfaces, mounts and
    /// swap space on its disks, its virtual functions. A line each; none if it is free. Without root, a disk that something
    /// holds which sysfs does not tell of is not seen.
    ///
    /// # Errors
    /// [`ErrorKind::Os`] where the kernel does not tell the addresses.
    pub fn uses(&self) -> Result<Vec<String>> {
        let mut uses = network::uses(self)?;
        uses.extend(disk::uses(self));
        let functions = text(&self.folder.join("sriov_numvfs")).and_then(|count| count.parse::<u32>().ok());
        uses.extend(
            functions.filter(|count| *count > 0).map(|count| format!("it has {count} virtual functions")),
        );
        Ok(uses)
    }

    /// Its folder in sysfs.
    fn folder(&self) -> &Path {
        &self.folder
    }

    /// Whether what the symbolic link in a class of sysfs leads to belongs to this device.
    fn holds(&self, link: &Path) -> bool {
        link.canonicalize().is_ok_and(|target| target.starts_with(&self.folder))
    }

    fn error(&self, kind: ErrorKind, operation: &'static str, why: impl Into<String>) -> Error {
        Error::new(kind, operation, why.into()).device(self.address.to_string())
    }
}

/// The names in a folder, sorted; none where there is no such folder.
fn names(folder: &Path) -> io::Result<Vec<String>> {
    let entries = match fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut names = Vec::new();
    for entry in entries {
        names.extend(entry?.file_name().into_string().ok());
    }
    names.sort();
    Ok(names)
}

/// Bytes that are no text, as a mount point may have, do not hide the rest.
fn text(file: &Path) -> Option<String> {
    fs::read(file).ok().map(|bytes| String::from_utf8_lossy(&bytes).trim().to_owned())
}

/// The last part of what a symbolic link leads to.
fn link_name(link: &Path) -> Option<String> {
    fs::read_link(link).ok()?.file_name()?.to_str().map(str::to_owned)
}

/// A number that sysfs shows as `0x8086`.
fn number<N: TryFrom<u32>>(folder: &Path, name: &str, address: PciAddress) -> Result<N> {
    let operation = "find the PCI device";
    let shown = fs::read_to_string(folder.join(name)).map_err(|error| {
        Error::os(operation, format!("its attribute {name} can not be read"), error)
            .device(address.to_string())
    })?;
    let digits = shown.trim().strip_prefix("0x");
    let parsed =
        digits.and_then(|digits| u32::from_str_radix(digits, 16).ok()).and_then(|n| N::try_from(n).ok());
    parsed.ok_or_else(|| {
        Error::new(ErrorKind::Os, operation, format!("sysfs shows {name} as {:?}", shown.trim()))
            .device(address.to_string())
    })
}
