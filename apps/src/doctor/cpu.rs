//! Cores for workers, and instructions that drivers use.

use underpass::pci::host::Host;

use super::Check;
use crate::devices::driver_for;

/// Instructions that drivers, checksums or copies use, as `/proc/cpuinfo` names them.
#[cfg(target_arch = "x86_64")]
const WANTED: [&str; 9] =
    ["sse4_2", "pclmulqdq", "avx2", "avx512f", "vpclmulqdq", "movdiri", "movdir64b", "enqcmd", "nonstop_tsc"];
#[cfg(not(target_arch = "x86_64"))]
const WANTED: [&str; 5] = ["crc32", "pmull", "asimd", "atomics", "sve"];

pub(super) fn isolated(host: &Host) -> Check {
    const NAME: &str = "isolated cores";
    let cores = |file| host.text(file).filter(|list| !list.is_empty() && list != "(null)");
    let isolated = cores("/sys/devices/system/cpu/isolated");
    let quiet = cores("/sys/devices/system/cpu/nohz_full");
    match (isolated, quiet) {
        (Some(isolated), Some(quiet)) => Check::ok(NAME, format!("{isolated}; without a timer tick {quiet}")),
        (Some(isolated), None) => Check::warn(
            NAME,
            format!("{isolated}; all with a timer tick"),
            format!("for steady latency, add nohz_full={isolated} to the kernel's command line"),
        ),
        (None, _) => {
            let online = cores("/sys/devices/system/cpu/online").unwrap_or_default();
            let last = online.rsplit(['-', ',']).next().and_then(|core| core.parse::<u32>().ok());
            let all = match last {
                Some(0) | None => return Check::ok(NAME, "none: there is one core"),
                Some(1) => "1".to_owned(),
                Some(last) => format!("1-{last}"),
            };
            let mend = format!(
                "for steady latency, add isolcpus={all} nohz_full={all} to the kernel's command line, and run on \
                 them: --cores {all}"
            );
            Check::warn(NAME, "none: other work can interrupt a worker", mend)
        }
    }
}

pub(super) fn features(host: &Host) -> Check {
    const NAME: &str = "CPU features";
    let info = host.text("/proc/cpuinfo").unwrap_or_default();
    let line = info.lines().find(|line| line.starts_with("flags") || line.starts_with("Features"));
    let flags: Vec<_> =
        line.and_then(|line| line.split_once(':')).map_or("", |(_, flags)| flags).split(' ').collect();
    let (has, lacks): (Vec<&str>, Vec<&str>) = WANTED.iter().partition(|wanted| flags.contains(wanted));
    let list = |names: Vec<&str>| if names.is_empty() { "none".to_owned() } else { names.join(" ") };
    let no_portal = lacks.contains(&"movdir64b");
    let found = format!("has {}; lacks {}", list(has), list(lacks));
    let devices = host.devices().unwrap_or_default();
    let is_dsa = |device| driver_for(device).is_some_and(|driver| driver.name == "dsa");
    match devices.iter().find(|device| is_dsa(device)).filter(|_| no_portal) {
        Some(device) => Check::warn(
            NAME,
            format!("{found}; the DSA {} takes descriptors by movdir64b", device.address()),
            "in a virtual machine, give it the host's processor (QEMU: -cpu host)",
        ),
        None => Check::ok(NAME, found),
    }
}
