//! Which processes have a device open through VFIO.

use std::fs;
use std::path::Path;

use super::{Host, HostDevice, names, text};

/// The processes that have `device` open, a line each. Those of other users are seen by root alone.
pub(super) fn users(host: &Host, device: &HostDevice) -> Vec<String> {
    // As they are called in any machine's own view.
    let cdev = device.cdev.as_ref().map(|name| format!("/dev/vfio/devices/{name}"));
    let group =
        device.group_file().and_then(|file| Some(format!("/dev/vfio/{}", file.file_name()?.to_str()?)));
    let files: Vec<_> = cdev.into_iter().chain(group).collect();
    let processes = host.path("/proc");
    let is_process = |name: &String| name.bytes().all(|byte| byte.is_ascii_digit());
    let mut users = Vec::new();
    for process in names(&processes).unwrap_or_default().into_iter().filter(is_process) {
        let folder = processes.join(&process);
        if has_open(&folder, device, &files) {
            let name = text(&folder.join("comm")).unwrap_or_default();
            users.push(format!("process {process} ({name}) has it open"));
        }
    }
    users
}

fn has_open(process: &Path, device: &HostDevice, files: &[String]) -> bool {
    let opened = names(&process.join("fd")).unwrap_or_default();
    opened.iter().any(|number| {
        let Ok(target) = fs::read_link(process.join("fd").join(number)) else { return false };
        let target = target.to_string_lossy();
        files.iter().any(|file| *file == target)
            // A file that a group gave has no path; the kernel says since 6.17 whose it is.
            || target.contains("vfio-device") && is_of(device, &process.join("fdinfo").join(number))
    })
}

fn is_of(device: &HostDevice, info: &Path) -> bool {
    let info = text(info).unwrap_or_default();
    let folder = info.lines().find_map(|line| line.strip_prefix("vfio-device-syspath:"));
    folder.is_some_and(|folder| device.host.path(folder.trim()) == device.folder)
}
