//! Finding the way to a VFIO device: its character device, its group, or neither.

use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use underpass_iommu::group::Group;
use underpass_iommu::iommufd::Iommufd;
use underpass_iommu::noiommu::Noiommu;
use underpass_iommu::type1::Type1;
use underpass_iommu::{Error, ErrorKind, IommuBackend, Result};

use super::ioctl::Handle;
use super::{Claim, Device, Options};
use crate::bar::Bar;
use crate::pci::PciAddress;
use crate::pci::host::HostDevice;

/// A device and its BARs.
type Opened = (Arc<Device>, Vec<(usize, Bar)>);

/// Where a device is found.
struct Place {
    name: String,
    cdev: Option<PathBuf>,
    group: Option<u32>,
    /// No IOMMU holds it; its group, if it has one, is one that VFIO made up.
    is_unprotected: bool,
    numa_node: Option<u32>,
}

/// Opens the PCI function at `address`.
pub(crate) fn open(address: PciAddress, options: &Options) -> Result<Opened> {
    let device = HostDevice::find(address)?;
    if !device.is_vfio() {
        return Err(not_bound(&device));
    }
    let place = Place {
        name: address.to_string(),
        cdev: device.cdev(),
        group: device.iommu_group(),
        is_unprotected: device.is_unprotected(),
        numa_node: device.numa_node(),
    };
    place.open(options)
}

/// Opens the mediated device with this UUID.
pub(crate) fn open_mdev(uuid: &str, options: &Options) -> Result<Opened> {
    let operation = "open the mediated device";
    // It becomes part of a path.
    let is_uuid = uuid.len() == 36
        && uuid.bytes().enumerate().all(|(n, byte)| match n {
            8 | 13 | 18 | 23 => byte == b'-',
            _ => byte.is_ascii_hexdigit(),
        });
    if !is_uuid {
        return Err(Error::new(ErrorKind::InvalidInput, operation, format!("{uuid:?} is no UUID"))
            .mend("name it as /sys/bus/mdev/devices does: 83b8f4f2-509f-382f-3c1e-e6bfe0fa1001"));
    }
    let folder = Path::new("/sys/bus/mdev/devices").join(uuid);
    if !folder.exists() {
        return Err(Error::new(ErrorKind::NotFound, operation, "there is none with this UUID")
            .device(uuid.to_owned())
            .mend("make it: echo UUID > /sys/class/mdev_bus/PARENT/mdev_supported_types/TYPE/create"));
    }
    let link = fs::read_link(folder.join("iommu_group")).ok();
    let names = fs::read_dir(folder.join("vfio-dev")).into_iter().flatten().flatten();
    let cdev = names.filter(|entry| entry.path().join("dev").exists()).map(|entry| entry.file_name()).next();
    let place = Place {
        name: uuid.to_owned(),
        cdev: cdev.map(|name| Path::new("/dev/vfio/devices").join(name)),
        group: link.and_then(|link| link.file_name()?.to_str()?.parse().ok()),
        is_unprotected: false,
        numa_node: None,
    };
    place.open(options)
}

impl Place {
    fn open(&self, options: &Options) -> Result<Opened> {
        let claim = Claim::new(&self.name)?;
        let device = self
            .handle(options)
            .and_then(|(handle, iommu)| Device::new(claim, handle, iommu, self.numa_node))
            .map_err(|error| error.device(self.name.clone()))?;
        let device = Arc::new(device);
        let bars = device.map_bars();
        Ok((device, bars))
    }

    fn handle(&self, options: &Options) -> Result<(Handle, Box<dyn IommuBackend>)> {
        if self.is_unprotected {
            let token = options.unprotected.clone().ok_or_else(unprotected)?;
            let noiommu = Noiommu::open(token)?;
            let group = noiommu.group(self.group()?)?;
            return Ok((self.in_group(group, options)?, Box::new(noiommu)));
        }
        if let Some((cdev, iommufd)) = self.by_cdev()? {
            let bound = iommufd.bind(cdev, &self.name, options.vf_token)?;
            return Ok((Handle::cdev(bound), Box::new(iommufd)));
        }
        let type1 = Type1::open().map_err(|error| self.not_permitted(error))?;
        let group = type1.group(self.group()?).map_err(|error| self.not_permitted(error))?;
        Ok((self.in_group(group, options)?, Box::new(type1)))
    }

    /// The character device and the iommufd, where the kernel has both.
    fn by_cdev(&self) -> Result<Option<(OwnedFd, Iommufd)>> {
        let Some(path) = &self.cdev else { return Ok(None) };
        let iommufd = match Iommufd::shared() {
            // It may have groups all the same. Anything else is for its user to mend.
            Err(error) if error.kind() == ErrorKind::NotFound && self.group.is_some() => return Ok(None),
            iommufd => iommufd.map_err(|error| self.not_permitted(error))?,
        };
        match fs::File::options().read(true).write(true).open(path) {
            Ok(file) => Ok(Some((file.into(), iommufd))),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound && self.group.is_some() => Ok(None),
            Err(error) => Err(self.not_permitted(cannot_open(path, error))),
        }
    }

    /// A user who may not open one of the files may not open the others either: a command that gives them all is better than
    /// one that gives this one.
    fn not_permitted(&self, error: Error) -> Error {
        match self.name.parse::<PciAddress>() {
            Ok(_) if error.errno() == Some(libc::EACCES) => error.mend(bind(&self.name)),
            _ => error,
        }
    }

    fn group(&self) -> Result<u32> {
        let error = |why| Error::new(ErrorKind::Unsupported, "open the device", why);
        self.group.ok_or_else(|| {
            if self.is_unprotected {
                return error("no IOMMU holds it, and by its character device alone it can not be driven so")
                    .mend("switch the machine's IOMMU on; or use a kernel with CONFIG_VFIO_GROUP");
            }
            error("no IOMMU holds it").mend(
                "switch the IOMMU on in the firmware and on the kernel's command line (intel_iommu=on), \
                 then run: underpass doctor",
            )
        })
    }

    fn in_group(&self, group: Arc<Group>, options: &Options) -> Result<Handle> {
        let name = match &options.vf_token {
            Some(token) => format!("{} vf_token={}", self.name, uuid_text(token)),
            None => self.name.clone(),
        };
        Handle::group(group, &name)
    }
}

/// A UUID as text: its bytes in order, 8-4-4-4-12 digits (RFC 9562, section 4).
fn uuid_text(bytes: &[u8; 16]) -> String {
    let digits = format!("{:032x}", u128::from_be_bytes(*bytes));
    [&digits[..8], &digits[8..12], &digits[12..16], &digits[16..20], &digits[20..]].join("-")
}

/// What lets this user open the device.
fn bind(device: &str) -> String {
    if rustix::process::geteuid().is_root() {
        return format!("run: underpass bind {device}");
    }
    format!("run: sudo underpass bind --owner $USER {device}")
}

#[cold]
fn not_bound(device: &HostDevice) -> Error {
    let name = device.address().to_string();
    let (kind, why) = match device.kernel_driver() {
        Some(driver) => (ErrorKind::Busy, format!("it belongs to the kernel's driver {driver}")),
        None => (ErrorKind::NotFound, "it is not bound to vfio-pci".to_owned()),
    };
    Error::new(kind, "open the device", why).mend(bind(&name)).device(name)
}

#[cold]
fn unprotected() -> Error {
    Error::new(
        ErrorKind::Permission,
        "open the device",
        "no IOMMU holds it: it can read and write all of the machine's memory",
    )
    .mend("switch the machine's IOMMU on (underpass doctor says how); or, at your own risk: --allow-unsafe-noiommu")
}

#[cold]
fn cannot_open(path: &Path, error: std::io::Error) -> Error {
    let operation = format!("open {}", path.display());
    match error.raw_os_error() {
        Some(libc::EACCES | libc::EPERM) => {
            let owner = fs::metadata(path).map_or_else(
                |_| "it belongs to another user".to_owned(),
                |file| {
                    format!(
                        "it belongs to user {}, and this is user {}",
                        file.uid(),
                        rustix::process::getuid().as_raw()
                    )
                },
            );
            Error::os(operation, owner, error).mend(format!("run: sudo chown $USER {}", path.display()))
        }
        Some(libc::EBUSY) => Error::os(operation, "another process has it", error)
            .mend(format!("find and stop that: fuser -v {}", path.display())),
        _ => Error::os(operation, "the kernel refuses", error).mend("see the kernel's log: dmesg"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_written_as_the_kernel_reads_it() {
        let token: [u8; 16] = std::array::from_fn(|n| n as u8 * 0x11);
        assert_eq!(uuid_text(&token), "00112233-4455-6677-8899-aabbccddeeff");
        assert_eq!(uuid_text(&[0; 16]), "00000000-0000-0000-0000-000000000000");
    }

    #[test]
    fn without_an_iommu_nothing_is_opened_unasked_by_whatever_way() {
        let cdev = Some(PathBuf::from("/dev/vfio/devices/noiommu-vfio0"));
        let place =
            Place { name: "a device".into(), cdev, group: None, is_unprotected: true, numa_node: None };
        assert_eq!(place.handle(&Options::default()).unwrap_err().kind(), ErrorKind::Permission);
    }

    #[test]
    fn what_is_no_uuid_never_becomes_a_path() {
        for text in [
            "",
            "../../../../etc/passwd-and-more-letters-",
            "83b8f4f2-509f-382f-3c1e-e6bfe0fa100",
            "83b8f4f2/509f-382f-3c1e-e6bfe0fa1001",
        ] {
            assert_eq!(
                open_mdev(text, &Options::default()).unwrap_err().kind(),
                ErrorKind::InvalidInput,
                "{text}"
            );
        }
        let absent = open_mdev("83b8f4f2-509f-382f-3c1e-e6bfe0fa1001", &Options::default()).unwrap_err();
        assert_eq!(absent.kind(), ErrorKind::NotFound);
    }
}
