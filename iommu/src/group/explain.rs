//! What VFIO's refusals of groups and containers mean, and how to mend each.

use std::path::Path;

use rustix::io::Errno;

use super::Kind;
use crate::{Error, ErrorKind};

/// Where the kernel lists the IOMMU's groups (Documentation/ABI/testing/sysfs-kernel-iommu_groups).
const GROUPS: &str = "/sys/kernel/iommu_groups";

pub(super) fn open_container(path: &Path, errno: Errno) -> Error {
    let operation = format!("open {}", path.display());
    match errno {
        Errno::NOENT | Errno::NODEV | Errno::NXIO => {
            Error::os(operation, "the kernel has no VFIO containers, or their module is not loaded", errno)
                .mend("run: modprobe vfio-pci")
        }
        Errno::ACCESS | Errno::PERM => Error::os(operation, "this user may not", errno)
            .mend(format!("run: sudo chmod 0666 {} (it gives no access to any device)", path.display())),
        _ => Error::os(operation, "the kernel refuses", errno).mend("see the kernel's log: dmesg"),
    }
}

pub(super) fn no_extension(kind: Kind) -> Error {
    match kind {
        Kind::Type1 => Error::new(
            ErrorKind::Unsupported,
            "use VFIO's type1 IOMMU interface",
            "the kernel has no such driver, or its module is not loaded",
        )
        .mend("run: modprobe vfio_iommu_type1"),
        Kind::Noiommu => Error::new(
            ErrorKind::Unsupported,
            "use VFIO without an IOMMU",
            "the kernel does not allow it, or was built without CONFIG_VFIO_NOIOMMU",
        )
        .mend(
            "better switch the machine's IOMMU on; else run: \
             echo 1 > /sys/module/vfio/parameters/enable_unsafe_noiommu_mode, and bind the device again",
        ),
    }
}

pub(super) fn open_group(kind: Kind, number: u32, path: &Path, errno: Errno) -> Error {
    let operation = format!("open the IOMMU group {}", path.display());
    match errno {
        Errno::NOENT | Errno::NODEV | Errno::NXIO => {
            let error = Error::os(operation, "none of its devices is bound to vfio-pci", errno);
            match members(number, Path::new(GROUPS)).as_slice() {
                [] => error.mend("run: underpass bind ADDRESS"),
                all => error.mend(format!("run: underpass bind {}", names(all))),
            }
        }
        Errno::BUSY => Error::os(operation, "another process has it, or one of its devices, open", errno)
            .mend(format!("find and stop that: fuser -v {} /dev/vfio/devices/*", path.display())),
        Errno::PERM if kind == Kind::Noiommu => {
            Error::os(operation, "without an IOMMU it takes CAP_SYS_RAWIO", errno).mend("run as root")
        }
        Errno::ACCESS | Errno::PERM => Error::os(operation, "this user may not", errno)
            .mend(format!("run: sudo chown $USER {}", path.display())),
        _ => Error::os(operation, "the kernel refuses", errno).mend("see the kernel's log: dmesg"),
    }
}

pub(super) fn not_viable(number: u32) -> Error {
    viability(number, &members(number, Path::new(GROUPS)))
}

fn viability(number: u32, members: &[Member]) -> Error {
    let elsewhere: Vec<&Member> = members
        .iter()
        .filter(|member| member.driver.as_deref().is_some_and(|driver| !leaves_dma_alone(driver)))
        .collect();
    let error = |why: String| Error::new(ErrorKind::Busy, format!("use the IOMMU group {number}"), why);
    if elsewhere.is_empty() {
        return error("its devices' DMA belongs to another user".into())
            .mend(format!("find and stop that: fuser -v /dev/vfio/{number} /dev/vfio/devices/*"));
    }
    let list: Vec<String> = elsewhere
        .iter()
        .map(|member| format!("{} to {}", member.address, member.driver.as_deref().unwrap_or("none")))
        .collect();
    let why = format!(
        "its devices can not be told apart by the IOMMU, and some are bound to other drivers: {}",
        list.join(", ")
    );
    error(why).mend(format!("run: underpass bind {}", names(elsewhere)))
}

/// Another ioctl on a group failed.
pub(super) fn group_call(number: u32, operation: &'static str, errno: Errno) -> Error {
    let error = |why: &'static str| Error::os(operation, why, errno).device(format!("IOMMU group {number}"));
    match errno {
        Errno::BUSY => not_viable(number),
        Errno::PERM => error("without an IOMMU it takes CAP_SYS_RAWIO").mend("run as root"),
        Errno::NODEV => error("its last device has left VFIO meanwhile").mend("run: underpass bind ADDRESS"),
        _ => error("the kernel refuses").mend("see the kernel's log: dmesg"),
    }
}

pub(super) fn set_iommu(kind: Kind, number: u32, errno: Errno) -> Error {
    let error = |why: &'static str| {
        Error::os("give the group its IOMMU", why, errno).device(format!("IOMMU group {number}"))
    };
    match (kind, errno) {
        (Kind::Type1, Errno::PERM) => {
            error("the IOMMU does not remap interrupts, so that a device could send any to the machine").mend(
                "enable interrupt remapping in the firmware; or, for devices that are trusted, run: \
                 echo 1 > /sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts \
                 (at boot: vfio_iommu_type1.allow_unsafe_interrupts=1)",
            )
        }
        (Kind::Type1, Errno::NODEV) => {
            error("no type1 driver takes the group").mend("run: modprobe vfio_iommu_type1")
        }
        (Kind::Noiommu, Errno::PERM) => error("it takes CAP_SYS_RAWIO").mend("run as root"),
        (Kind::Noiommu, Errno::NODEV) => error("the kernel no longer allows VFIO without an IOMMU")
            .mend("run: echo 1 > /sys/module/vfio/parameters/enable_unsafe_noiommu_mode"),
        _ => error("the kernel refuses").mend("see the kernel's log: dmesg"),
    }
}

/// Opening the device that is `asked` for, its name and perhaps a VF token, failed.
pub(super) fn device(number: u32, asked: &str, errno: Errno) -> Error {
    let (name, token) = asked.split_once(' ').map_or((asked, false), |(name, _)| (name, true));
    let error = |why: &str| Error::os("open the device", why.to_owned(), errno).device(name.to_owned());
    match errno {
        Errno::NODEV => error(&format!("it is not in IOMMU group {number}, or not bound to vfio-pci"))
            .mend(format!("run: underpass bind {name}")),
        Errno::ACCESS if token => error("the VF token is not the one that its PF's user has set")
            .mend("give the UUID that the PF's user has set: vf-token=UUID"),
        Errno::ACCESS => error("its PF is bound to vfio-pci, so that it takes the VF token of the PF's user")
            .mend("give the UUID that the PF's user has set: vf-token=UUID"),
        Errno::INVAL if token => {
            error("the kernel takes no VF token for it, or does not understand this one")
                .mend("leave vf-token away, unless its PF is bound to vfio-pci")
        }
        Errno::BUSY => error("another process has it")
            .mend(format!("find and stop that: fuser -v /dev/vfio/{number} /dev/vfio/devices/*")),
        _ => error("the kernel refuses").mend("see the kernel's log: dmesg"),
    }
}

/// A device of a group.
#[derive(Debug, PartialEq, Eq)]
struct Member {
    address: String,
    driver: Option<String>,
}

/// Whether a driver does no DMA by the kernel's own API, so that its device may be in a group with one of user space's: one of
/// VFIO's (vfio-pci, `mlx5_vfio_pci` and the like), or another with `driver_managed_dma` (PCI drivers of Linux 7.3).
pub fn leaves_dma_alone(driver: &str) -> bool {
    matches!(driver, "pcieport" | "pci-stub") || driver.contains("vfio")
}

/// The group's devices, as far as the kernel says.
fn members(number: u32, groups: &Path) -> Vec<Member> {
    let folder = groups.join(number.to_string()).join("devices");
    let mut members: Vec<Member> = std::fs::read_dir(folder)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| {
            let driver = std::fs::read_link(entry.path().join("driver")).ok();
            let driver = driver.and_then(|path| Some(path.file_name()?.to_string_lossy().into_owned()));
            Member { address: entry.file_name().to_string_lossy().into_owned(), driver }
        })
        .collect();
    members.sort_by(|one, other| one.address.cmp(&other.address));
    members
}

fn names<'a>(members: impl IntoIterator<Item = &'a Member>) -> String {
    members.into_iter().map(|member| member.address.as_str()).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn a_group_that_is_not_viable_names_who_has_its_devices() {
        let root = std::env::temp_dir().join(format!("underpass-groups-{}", std::process::id()));
        let devices = root.join("7/devices");
        for (address, driver) in
            [("0000:00:1c.0", Some("pcieport")), ("0000:03:00.1", Some("igb")), ("0000:03:00.0", None)]
        {
            let device = devices.join(address);
            std::fs::create_dir_all(&device).unwrap();
            if let Some(driver) = driver {
                symlink(Path::new("../../bus/pci/drivers").join(driver), device.join("driver")).unwrap();
            }
        }
        let found = members(7, &root);
        std::fs::remove_dir_all(&root).unwrap();
        assert_eq!(names(&found), "0000:00:1c.0 0000:03:00.0 0000:03:00.1");
        let error = viability(7, &found);
        assert_eq!(error.kind(), ErrorKind::Busy);
        assert!(error.to_string().contains("0000:03:00.1 to igb"), "{error}");
        assert_eq!(error.mend_text(), Some("run: underpass bind 0000:03:00.1"));
        assert!(members(8, &root).is_empty());
    }

    #[test]
    fn a_refused_device_is_named_without_its_token() {
        let error = device(3, "0000:04:10.0 vf_token=bd8d9d2b-5a5f-4f5a-a211-f591514ba1f3", Errno::ACCESS);
        assert_eq!((error.device_name(), error.kind()), (Some("0000:04:10.0"), ErrorKind::Permission));
        assert!(!error.to_string().contains("bd8d9d2b"), "a token is a secret: {error}");
    }

    #[test]
    fn drivers_that_do_no_dma_of_their_own_leave_a_group_viable() {
        for driver in ["vfio-pci", "mlx5_vfio_pci", "pci-stub", "pcieport"] {
            assert!(leaves_dma_alone(driver), "{driver}");
        }
        for driver in ["e1000e", "nvme", "pci_stub2", "pci-pf-stub", "shpchp"] {
            assert!(!leaves_dma_alone(driver), "{driver}");
        }
    }
}
