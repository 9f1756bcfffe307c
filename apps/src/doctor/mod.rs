//! `underpass doctor`: what this machine has for driving devices from user space, and how to get what it lacks.

mod access;
mod cpu;
mod memory;
mod protection;

use comfy_table::{Table, presets};
use serde::Serialize;
use underpass::pci::host::{Host, HostDevice};

use crate::devices::driver_for;

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
        (None, Some(device)) => {
            let mend = format!("sudo {} bind {}", crate::command_name(), device.address());
            Check::warn(NAME, found, mend)
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
    use super::*;

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
