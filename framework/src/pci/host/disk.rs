//! Which disks are behind a device, and what the kernel does with them.

use std::collections::BTreeSet;
use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;
use rustix::io::Errno;

use super::{Host, HostDevice, names, text};

const CLASS: &str = "/sys/class/block";

/// Where NVMe drives with several controllers have their disks: below no PCI device.
const NVME_SUBSYSTEMS: &str = "/sys/class/nvme-subsystem";

/// What would be cut off with the device, a line each.
pub(super) fn uses(device: &HostDevice) -> Vec<String> {
    let host = &device.host;
    let mounts = Mounts::read(host);
    let disks = disks(device);
    let mut uses = Vec::new();
    for disk in &disks {
        uses_of(host, disk, disk, &mounts, &mut BTreeSet::new(), &mut uses);
    }
    if uses.is_empty() {
        // What the above does not know of (ZFS, another mount namespace) holds its disk all the same.
        let held = disks.iter().filter(|disk| is_held(&host.path("/dev").join(disk)));
        uses.extend(held.map(|disk| format!("the kernel has the disk {disk} in use")));
    }
    uses
}

/// The block devices behind `device`, partitions among them, by name.
fn disks(device: &HostDevice) -> Vec<String> {
    let class = device.host.path(CLASS);
    let shared = shared_nvme(device);
    let is_behind = |name: &String| {
        let link = class.join(name);
        let is_shared =
            || link.canonicalize().is_ok_and(|target| shared.iter().any(|folder| target.starts_with(folder)));
        device.holds(&link) || is_shared()
    };
    let mut names = names(&class).unwrap_or_default();
    names.retain(is_behind);
    names
}

/// The folders of NVMe subsystems that one of the device's controllers belongs to.
fn shared_nvme(device: &HostDevice) -> Vec<PathBuf> {
    let class = device.host.path(NVME_SUBSYSTEMS);
    let subsystems = names(&class).unwrap_or_default();
    let folders = subsystems.iter().filter_map(|name| class.join(name).canonicalize().ok());
    let is_behind = |folder: &PathBuf| {
        let entries = names(folder).unwrap_or_default();
        entries.iter().any(|entry| entry.starts_with("nvme") && device.holds(&folder.join(entry)))
    };
    folders.filter(is_behind).collect()
}

/// Adds what uses `name`, which is `disk` or made of it: mounts, swap, and what holds it, such as dm and md.
fn uses_of(
    host: &Host,
    disk: &str,
    name: &str,
    mounts: &Mounts,
    seen: &mut BTreeSet<String>,
    uses: &mut Vec<String>,
) {
    if !seen.insert(name.to_owned()) {
        return;
    }
    let folder = host.path(CLASS).join(name);
    let shown = if name == disk {
        format!("the disk {disk}")
    } else {
        format!("{} on the disk {disk}", label(host, name))
    };
    let before = uses.len();
    let number = text(&folder.join("dev"));
    for mount in &mounts.mounted {
        if Some(&mount.device) == number.as_ref() || mount.source.as_deref() == Some(name) {
            uses.push(format!("{shown} is mounted at {}", mount.point));
        }
    }
    if mounts.swaps.iter().any(|swap| swap == name) {
        uses.push(format!("{shown} is swap space"));
    }
    if uses.len() == before && mounts.btrfs.iter().any(|member| member == name) {
        uses.push(format!("{shown} is part of a mounted btrfs"));
    }
    for holder in names(&folder.join("holders")).unwrap_or_default() {
        // Two partitions may be in the same one.
        if seen.contains(&holder) {
            continue;
        }
        let before = uses.len();
        uses_of(host, disk, &holder, mounts, seen, uses);
        if uses.len() == before {
            uses.push(format!("the disk {disk} is part of {}", label(host, &holder)));
        }
    }
}

/// What people know a block device as: that of the device mapper, or the kernel's name.
fn label(host: &Host, name: &str) -> String {
    text(&host.path(CLASS).join(name).join("dm/name")).unwrap_or_else(|| name.to_owned())
}

/// Whether something of the kernel's has the block device for itself. Who may not look does not know.
fn is_held(node: &Path) -> bool {
    // Without O_CREAT, O_EXCL means a block device's exclusive use (open(2)).
    let flags = OFlags::EXCL | OFlags::NONBLOCK;
    let opened = OpenOptions::new().read(true).custom_flags(flags.bits().cast_signed()).open(node);
    opened.is_err_and(|error| Errno::from_io_error(&error) == Some(Errno::BUSY))
}

/// What this mount namespace has mounted, and swap space.
#[derive(Debug, Default)]
struct Mounts {
    mounted: Vec<Mount>,
    /// Names of block devices.
    swaps: Vec<String>,
    btrfs: Vec<String>,
}

#[derive(Debug)]
struct Mount {
    /// Major and minor number, as sysfs shows them. Those of btrfs are no device's.
    device: String,
    /// The name of the block device that it was mounted from.
    source: Option<String>,
    point: String,
}

impl Mounts {
    fn read(host: &Host) -> Self {
        let lines = host.text("/proc/self/mountinfo").unwrap_or_default();
        let mounted = lines.lines().filter_map(|line| Mount::parse(host, line)).collect();
        let swaps = host.text("/proc/swaps").unwrap_or_default();
        let swaps = swaps.lines().skip(1).filter_map(|line| {
            let path = line.split_whitespace().next()?;
            block_name(host, &unescaped(path))
        });
        let mut btrfs = Vec::new();
        let folder = host.path("/sys/fs/btrfs");
        for filesystem in names(&folder).unwrap_or_default() {
            btrfs.extend(names(&folder.join(filesystem).join("devices")).unwrap_or_default());
        }
        Self { mounted, swaps: swaps.collect(), btrfs }
    }
}

impl Mount {
    /// Reads a line of mountinfo (`proc_pid_mountinfo(5)`).
    fn parse(host: &Host, line: &str) -> Option<Self> {
        let (mount, source) = line.split_once(" - ")?;
        let mut fields = mount.split(' ');
        let device = fields.nth(2)?.to_owned();
        let point = unescaped(fields.nth(1)?);
        let source = source.split(' ').nth(1)?;
        Some(Self { device, source: block_name(host, &unescaped(source)), point })
    }
}

/// The kernel's name of the block device at `path`: that of `/dev/mapper/root` may be `dm-0`.
fn block_name(host: &Host, path: &str) -> Option<String> {
    if !path.starts_with("/dev/") {
        return None;
    }
    let path = host.path(path);
    let target = path.canonicalize().unwrap_or(path);
    target.file_name()?.to_str().map(str::to_owned)
}

/// The kernel writes blanks and the like as three octal digits behind a backslash.
fn unescaped(text: &str) -> String {
    let mut parts = text.split('\\');
    let mut plain = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let code = part.get(..3).and_then(|digits| u8::from_str_radix(digits, 8).ok());
        if let Some(code) = code.filter(u8::is_ascii) {
            plain.push(char::from(code));
            plain.push_str(&part[3..]);
        } else {
            plain.push('\\');
            plain.push_str(part);
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blanks_in_names_are_read_as_such() {
        assert_eq!(unescaped(r"/mnt/my\040disk\011"), "/mnt/my disk\t");
        assert_eq!(unescaped(r"/a\b\04"), r"/a\b\04");
        assert_eq!(unescaped("/é\\é"), "/é\\é");
    }
}
