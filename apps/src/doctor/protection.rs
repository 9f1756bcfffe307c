//! What keeps a device to its own memory: the kernel, the IOMMU, interrupt remapping, PASIDs.

use underpass::pci::PciAddress;
use underpass::pci::host::Host;

use super::Check;
use crate::folder::names;

/// The first kernel that attaches PASIDs of VFIO devices.
const WITH_PASIDS: (u32, u32) = (6, 15);

/// The first kernel with iommufd and device files of VFIO for it.
const WITH_CDEVS: (u32, u32) = (6, 6);

/// Bits of VT-d's extended capability register (Intel Virtualization Technology for Directed I/O 4.1, 11.4.3).
const ECAP_PASID: u64 = 1 << 40;
const ECAP_SCALABLE_MODE: u64 = 1 << 43;

/// Which kinds of IOMMU the kernel uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Intel,
    Amd,
    Arm,
    Virtio,
    Other,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Intel => "Intel VT-d",
            Self::Amd => "AMD-Vi",
            Self::Arm => "Arm SMMU",
            Self::Virtio => "virtio-iommu",
            Self::Other => "an IOMMU",
        }
    }
}

pub(super) fn kernel(host: &Host) -> Check {
    const NAME: &str = "kernel";
    let release = release(host);
    let found = format!("Linux {release}");
    match version(&release) {
        Some(version) if version < WITH_CDEVS => Check::warn(
            NAME,
            format!(
                "{found}: no iommufd for devices, so type1 is used: one address space a device, no PASIDs"
            ),
            "install Linux 6.15 or later",
        ),
        Some(version) if version < WITH_PASIDS => Check::warn(
            NAME,
            format!("{found}: no PASIDs, so the queues of a device share its address space"),
            "install Linux 6.15 or later",
        ),
        _ => Check::ok(NAME, found),
    }
}

pub(super) fn iommu(host: &Host) -> Check {
    const NAME: &str = "IOMMU";
    let units = units(host);
    let groups = groups(host);
    if units.is_empty() || groups == 0 {
        let options = command_line(host, &["intel_iommu=", "amd_iommu=", "iommu="]);
        let found = if units.is_empty() { "none is on" } else { "it holds no device" };
        let found =
            if options.is_empty() { found.to_owned() } else { format!("{found} (booted with {options})") };
        if host.takes_unprotected() {
            return Check::warn(NAME, format!("{found}; VFIO does without"), mend(host));
        }
        return Check::fail(NAME, found, mend(host));
    }
    let names: Vec<_> = units.iter().map(|(name, _)| name.as_str()).collect();
    Check::ok(NAME, format!("{}: {}; {groups} groups of devices", units[0].1.name(), names.join(", ")))
}

pub(super) fn interrupts(host: &Host) -> Check {
    const NAME: &str = "interrupt remapping";
    const UNSAFE: [&str; 2] = [
        "/sys/module/iommufd/parameters/allow_unsafe_interrupts",
        "/sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts",
    ];
    if !std::env::consts::ARCH.starts_with("x86") {
        return Check::ok(NAME, "not needed on this architecture");
    }
    if groups(host) == 0 {
        return Check::warn(NAME, "no IOMMU that would do it", "first see to the IOMMU, above");
    }
    // The kernel puts "IR-" before the names of interrupts that are remapped.
    if host.text("/proc/interrupts").is_some_and(|interrupts| interrupts.contains(" IR-")) {
        return Check::ok(NAME, "on");
    }
    let off = "off: a device could forge interrupts, so VFIO refuses it";
    // Each way to devices asks its own module.
    let there: Vec<_> = UNSAFE.into_iter().filter(|parameter| host.path(parameter).exists()).collect();
    let files = if there.is_empty() { UNSAFE[0].to_owned() } else { there.join(" ") };
    let mend = format!(
        "switch it on: in the firmware (x2APIC, interrupt remapping), and no intremap=off on the kernel's command line; \
         where the IOMMU has none, as virtio-iommu, and at that risk: echo 1 | sudo tee {files}"
    );
    match there.iter().find(|parameter| host.is_set(parameter)) {
        Some(_) => Check::warn(NAME, "off, and allowed to be: a device could forge interrupts", mend),
        None => Check::fail(NAME, off, mend),
    }
}

pub(super) fn pasid(host: &Host) -> Check {
    const NAME: &str = "PASID";
    const SHARED: &str = "the queues of a device then share its address space";
    let none = |found: &str, mend: &str| Check::warn(NAME, format!("{found}: {SHARED}"), mend);
    let units = units(host);
    let Some((_, kind)) = units.first() else {
        return none("no IOMMU", "first see to the IOMMU, above");
    };
    if version(&release(host)).is_some_and(|version| version < WITH_PASIDS) {
        return none("this kernel attaches none", "install Linux 6.15 or later");
    }
    match kind {
        Kind::Intel => {
            let has_all = |(name, _): &(String, Kind)| {
                let ecap = host.text(format!("/sys/class/iommu/{name}/intel-iommu/ecap"));
                let ecap = ecap.and_then(|ecap| u64::from_str_radix(&ecap, 16).ok()).unwrap_or_default();
                ecap & ECAP_PASID != 0 && ecap & ECAP_SCALABLE_MODE != 0
            };
            let able = units.iter().filter(|unit| has_all(unit)).count();
            let options = command_line(host, &["intel_iommu="]);
            if able == 0 {
                return none(
                    "VT-d without scalable mode",
                    "nothing to mend: a newer processor has it (Sapphire Rapids on)",
                );
            }
            if options.contains("sm_off") {
                return none("scalable mode is switched off", "boot with intel_iommu=on,sm_on");
            }
            let found = format!("{able} of {} VT-d units have scalable mode", units.len());
            if options.contains("sm_on") {
                return Check::ok(NAME, format!("{found}, and it is on"));
            }
            Check::ok(NAME, format!("{found}; if attaching one is refused, boot with intel_iommu=on,sm_on"))
        }
        Kind::Arm => Check::ok(NAME, "as far as the SMMU and the device have them"),
        kind => none(
            &format!("the kernel attaches none with {}", kind.name()),
            "nothing to mend: isolation is between devices",
        ),
    }
}

/// What switches an IOMMU on, or does without.
fn mend(host: &Host) -> String {
    const PARAMETER: &str = "/sys/module/vfio/parameters/enable_unsafe_noiommu_mode";
    let mend = format!("{}; in a virtual machine, give it an IOMMU", host.how_to_enable_iommu());
    if host.takes_unprotected() {
        return mend;
    }
    // Before the module is there, so is no parameter of it.
    let load = if host.path(PARAMETER).exists() { "" } else { "sudo modprobe vfio-pci && " };
    format!("{mend}; or do without, at the risk of all memory: {load}echo 1 | sudo tee {PARAMETER}")
}

/// The IOMMUs that the kernel uses, by their names in sysfs.
fn units(host: &Host) -> Vec<(String, Kind)> {
    let class = host.path("/sys/class/iommu");
    let kind = |name: &String| {
        let folder = class.join(name);
        if folder.join("intel-iommu").exists() {
            Kind::Intel
        } else if folder.join("amd-iommu").exists() {
            Kind::Amd
        } else if name.starts_with("smmu") {
            Kind::Arm
        } else if name.parse::<PciAddress>().is_ok() || name.starts_with("virtio") {
            // The virtio device that it is has the name of what it is on.
            Kind::Virtio
        } else {
            Kind::Other
        }
    };
    let unit = |name: String| {
        let kind = kind(&name);
        (name, kind)
    };
    // The kernel's tests of iommufd have an IOMMU too.
    let is_real = |name: &String| !name.starts_with("iommufd_selftest");
    names(&class).into_iter().filter(is_real).map(unit).collect()
}

/// How many groups devices are in; those without an IOMMU do not count.
fn groups(host: &Host) -> usize {
    let folder = host.path("/sys/kernel/iommu_groups");
    let groups = names(&folder);
    let is_real = |group: &&String| {
        host.text(folder.join(group).join("name")).is_none_or(|name| !name.contains("noiommu"))
    };
    groups.iter().filter(is_real).count()
}

/// The options on the kernel's command line that begin like one of these.
fn command_line(host: &Host, wanted: &[&str]) -> String {
    let line = host.text("/proc/cmdline").unwrap_or_default();
    let given =
        line.split_whitespace().filter(|option| wanted.iter().any(|wanted| option.starts_with(wanted)));
    given.collect::<Vec<_>>().join(" ")
}

fn release(host: &Host) -> String {
    host.text("/proc/sys/kernel/osrelease").unwrap_or_else(|| "of an unknown release".to_owned())
}

fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_are_compared_as_numbers() {
        assert_eq!(version("6.6.0-rc1"), Some((6, 6)));
        assert_eq!(version("6.12.48+deb13-amd64"), Some((6, 12)));
        assert!(version("6.6.1").is_some_and(|version| version < WITH_PASIDS), "6 is less than 15");
        assert!(version("7.3.4-testbed").is_some_and(|version| version >= WITH_PASIDS));
        assert_eq!(version("unknown"), None);
    }
}
