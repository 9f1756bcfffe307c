//! `underpass doctor`: what this machine has for driving devices from user space, and how to get what it lacks.

mod access;
mod cpu;
mod memory;
mod protection;

use comfy_table::{Table, presets};
use serde::Serialize;
use underpass::pci::host::{Host, HostDevice};

use crate::bind;
use crate::devices::{driver_for, is_free};

/// Check what real devices need: IOMMU, VFIO, permissions, huge pages, cores. Each finding comes with its mend
///
/// A check fails where no real device can be driven before it is mended; a warning says what could be better. Software
/// devices need none of this. The exit status is 1 if a check fails.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Args {
    /// Print the result as one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Status {
    Ok,
    Warn,
    Fail,
}

impl Status {
    fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Warn => "warn",
            Self::Fail => "FAIL",
        }
    }
}

/// What was checked. The keys are relied on by others.
#[derive(Debug, Serialize)]
struct Check {
    name: &'static str,
    status: Status,
    found: String,
    /// `None` where there is nothing to mend.
    mend: Option<String>,
}

impl Check {
    fn ok(name: &'static str, found: impl Into<String>) -> Self {
        Self { name, status: Status::Ok, found: found.into(), mend: None }
    }

    fn warn(name: &'static str, found: impl Into<String>, mend: impl Into<String>) -> Self {
        Self { name, status: Status::Warn, found: found.into(), mend: Some(mend.into()) }
    }

    fn fail(name: &'static str, found: impl Into<String>, mend: impl Into<String>) -> Self {
        Self { name, status: Status::Fail, found: found.into(), mend: Some(mend.into()) }
    }
}

#[derive(Debug, Serialize)]
struct Report {
    checks: Vec<Check>,
}

/// Runs the command.
pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let report = Report { checks: checks(&Host::this()) };
    let text = if args.json { format!("{}\n", serde_json::to_string(&report)?) } else { report.text() };
    crate::print(&text)?;
    let failed: Vec<_> = report.with(Status::Fail).map(|check| check.name).collect();
    match failed.len() {
        0 => Ok(()),
        1 => anyhow::bail!("a check failed: {}", failed[0]),
        count => anyhow::bail!("{count} checks failed: {}", failed.join(", ")),
    }
}

/// All checks, what a device needs first.
fn checks(host: &Host) -> Vec<Check> {
    vec![
        protection::kernel(host),
        protection::iommu(host),
        protection::interrupts(host),
        protection::pasid(host),
        access::vfio(host),
        access::denylist(host),
        access::address_spaces(host),
        access::unprotected(host),
        access::permissions(host),
        devices(host),
        memory::huge_pages(host),
        memory::memlock(),
        cpu::isolated(host),
        cpu::features(host),
    ]
}

/// Whether there is a device to drive, and it is bound.
fn devices(host: &Host) -> Check {
    const NAME: &str = "devices";
    let all = match host.devices() {
        Ok(all) => all,
        Err(error) => {
            return Check::warn(NAME, error.to_string(), "mount sysfs: sudo mount -t sysfs sysfs /sys");
        }
    };
    let ours = all.iter().filter(|device| driver_for(device).is_some());
    let (bound, unbound): (Vec<&HostDevice>, Vec<_>) = ours.partition(|device| device.is_vfio());
    let count = bound.len() + unbound.len();
    let found = format!("{count} that a driver here knows, {} bound to vfio-pci", bound.len());
    match (bound.first(), unbound.first()) {
        (Some(_), _) => Check::ok(NAME, found),
        (None, Some(first)) => {
            let bind = |device: &HostDevice| bind::command(&device.address().to_string());
            match unbound.iter().find(|device| is_free(device)) {
                Some(device) => Check::warn(NAME, found, bind(device)),
                None => Check::warn(
                    NAME,
                    format!("{found}, none of them free"),
                    format!("end its use, which this names: {}", bind(first)),
                ),
            }
        }
        (None, None) => Check::warn(
            NAME,
            "no PCI device that a driver here knows",
            format!("{} demo (software devices)", crate::command_name()),
        ),
    }
}

impl Report {
    fn with(&self, status: Status) -> impl Iterator<Item = &Check> {
        self.checks.iter().filter(move |check| check.status == status)
    }

    fn text(&self) -> String {
        let mut table = Table::new();
        table.load_style(presets::NOTHING);
        for check in &self.checks {
            table.add_row([check.status.name(), check.name, &check.found]);
            if let Some(mend) = &check.mend {
                // Each way to mend it in a line of its own.
                for (at, way) in mend.split("; ").enumerate() {
                    table.add_row(["", "", &format!("{} {way}", if at == 0 { "mend:" } else { "     " })]);
                }
            }
        }
        let lines: String = table.lines().map(|line| line.trim_end().to_owned() + "\n").collect();
        let (warned, failed) = (self.with(Status::Warn).count(), self.with(Status::Fail).count());
        let summary = match (failed, warned) {
            (0, 0) => "All is well.".to_owned(),
            (0, _) => "Real devices can be driven; what is marked warn could be better.".to_owned(),
            (_, _) => "Real devices can not be driven before what is marked FAIL is mended.".to_owned(),
        };
        format!("{lines}\n{summary} Software devices need none of this: {} demo\n", crate::command_name())
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::PathBuf;

    use super::*;

    /// A made-up machine: files below a folder, gone at the end of the test.
    struct Machine(PathBuf);

    impl Machine {
        fn new(name: &str, files: &[(&str, &str)]) -> Self {
            let root = std::env::temp_dir().join(format!("underpass-doctor-{}-{name}", std::process::id()));
            let this = Self(root);
            fs::create_dir_all(&this.0).expect("a scratch folder");
            for (path, text) in files {
                this.write(path, text);
            }
            this
        }

        fn write(&self, path: &str, text: &str) {
            let path = self.0.join(path);
            fs::create_dir_all(path.parent().expect("a folder")).expect("a scratch folder");
            fs::write(path, text).expect("a scratch file");
        }

        fn check(&self, name: &str) -> Check {
            let checks = checks(&Host::below(&self.0));
            checks.into_iter().find(|check| check.name == name).expect("there is such a check")
        }
    }

    impl Drop for Machine {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn an_iommu_counts_once_it_holds_devices() {
        let machine = Machine::new(
            "iommu",
            &[
                ("proc/cmdline", "root=/dev/sda intel_iommu=off quiet\n"),
                ("proc/cpuinfo", "vendor_id\t: GenuineIntel\n"),
                ("proc/sys/kernel/osrelease", "6.15.2\n"),
                ("proc/interrupts", "  0:  2  IO-APIC  2-edge  timer\n"),
            ],
        );
        let check = machine.check("IOMMU");
        assert_eq!(
            (check.status, check.found.as_str()),
            (Status::Fail, "none is on (booted with intel_iommu=off)")
        );
        let mend = check.mend.expect("a mend");
        assert!(mend.contains("intel_iommu=on") && mend.contains("modprobe vfio-pci && echo 1"), "{mend}");
        machine.write("sys/module/vfio/parameters/enable_unsafe_noiommu_mode", "N\n");
        let mend = machine.check("IOMMU").mend.expect("a mend");
        assert!(mend.contains("enable_unsafe") && !mend.contains("modprobe"), "{mend}");

        // Scalable mode is bit 43, PASIDs are bit 40.
        machine.write("sys/class/iommu/dmar0/intel-iommu/ecap", "90000f050df\n");
        machine.write("sys/kernel/iommu_groups/0/type", "DMA\n");
        assert_eq!(machine.check("IOMMU").found, "Intel VT-d: dmar0; 1 groups of devices");
        assert_eq!(machine.check("interrupt remapping").status, Status::Fail);
        assert_eq!(machine.check("PASID").status, Status::Ok);
        machine.write("sys/module/iommufd/parameters/allow_unsafe_interrupts", "Y\n");
        let check = machine.check("interrupt remapping");
        assert_eq!(check.status, Status::Warn);
        for way in check.mend.expect("a mend").split("; ") {
            assert_eq!(way.matches('(').count(), way.matches(')').count(), "each way has a line: {way}");
        }
        machine.write("proc/interrupts", "  0:  2  IR-IO-APIC  2-edge  timer\n");
        assert_eq!(machine.check("interrupt remapping").status, Status::Ok);
        machine.write("sys/class/iommu/dmar0/intel-iommu/ecap", "80000f020df\n");
        assert_eq!(machine.check("PASID").status, Status::Warn);
        machine.write("sys/class/iommu/dmar0/intel-iommu/ecap", "90000f050df\n");
        machine.write("proc/sys/kernel/osrelease", "6.12.48\n");
        assert!(machine.check("PASID").mend.expect("a mend").contains("6.15"));
    }

    #[test]
    fn what_an_iommu_made_up_for_noiommu_holds_does_not_count() {
        let machine = Machine::new(
            "noiommu",
            &[
                ("sys/kernel/iommu_groups/0/name", "vfio-noiommu\n"),
                ("sys/module/vfio/parameters/enable_unsafe_noiommu_mode", "Y\n"),
            ],
        );
        assert_eq!(machine.check("IOMMU").status, Status::Warn);
        assert_eq!(machine.check("noiommu").status, Status::Warn);
    }

    #[test]
    fn a_device_in_use_is_not_the_one_to_bind() {
        let machine = Machine::new("devices", &[]);
        let nic = |address: &str, functions: &str| {
            for (file, text) in [
                ("vendor", "0x1af4\n"),
                ("device", "0x1041\n"),
                ("class", "0x020000\n"),
                ("sriov_numvfs", functions),
            ] {
                machine.write(&format!("sys/bus/pci/devices/{address}/{file}"), text);
            }
        };
        nic("0000:00:03.0", "2\n");
        let check = machine.check("devices");
        assert_eq!(check.status, Status::Warn);
        assert!(check.found.ends_with("none of them free"), "{}", check.found);
        nic("0000:00:04.0", "0\n");
        let mend = machine.check("devices").mend.expect("a mend");
        assert!(mend.ends_with("0000:00:04.0"), "{mend}");
    }

    #[test]
    fn huge_pages_are_counted_on_each_node() {
        let machine = Machine::new("pages", &[]);
        let pages = |folder: &str, total: &str, free: &str| {
            machine.write(&format!("{folder}/hugepages-2048kB/nr_hugepages"), total);
            machine.write(&format!("{folder}/hugepages-2048kB/free_hugepages"), free);
        };
        pages("sys/kernel/mm/hugepages", "64\n", "0\n");
        let check = machine.check("huge pages");
        assert_eq!(check.status, Status::Warn);
        assert!(check.found.starts_with("none is left (2 MiB: 0 free of 64)"), "{}", check.found);
        pages("sys/kernel/mm/hugepages", "64\n", "40\n");
        pages("sys/devices/system/node/node0/hugepages", "32\n", "8\n");
        pages("sys/devices/system/node/node1/hugepages", "32\n", "32\n");
        let check = machine.check("huge pages");
        assert_eq!(
            (check.status, check.found.as_str()),
            (Status::Ok, "2 MiB: 40 free of 64 (node0 8/32, node1 32/32)")
        );
    }

    #[test]
    fn without_device_files_there_are_groups() {
        let machine =
            Machine::new("files", &[("proc/devices", "Character devices:\n511 vfio\n"), ("dev/iommu", "")]);
        machine.write("sys/bus/pci/drivers/vfio-pci/new_id", "");
        assert_eq!(machine.check("iommufd").status, Status::Fail);
        machine.write("dev/vfio/vfio", "");
        assert_eq!(machine.check("iommufd").status, Status::Warn);
        machine.write("proc/devices", "Character devices:\n510 vfio-dev\n511 vfio\n");
        assert_eq!(machine.check("iommufd").status, Status::Ok);
    }

    #[test]
    fn every_check_that_is_not_ok_says_how_to_mend_it() {
        let checks = checks(&Host::this());
        for check in &checks {
            assert!(!check.found.is_empty(), "{check:?}");
            assert_eq!(check.status == Status::Ok, check.mend.is_none(), "{check:?}");
        }
        let mut names: Vec<_> = checks.iter().map(|check| check.name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), checks.len(), "names are keys to others");
    }
}
