//! Letting an ordinary user open a device that is bound to VFIO.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, chown};
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use serde::Serialize;
use underpass::pci::host::{Host, HostDevice};

use crate::{Usage, memlock, size};

/// Which opens the kernel's I/O address spaces.
pub(crate) const IOMMU: &str = "/dev/iommu";

/// Which opens them for groups (type1).
pub(crate) const CONTAINER: &str = "/dev/vfio/vfio";

/// What the group of those who may use them is called in advice.
const GROUP: &str = "vfio";

/// A user of this system.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct User {
    name: String,
    uid: u32,
    /// All groups that it is in.
    groups: Vec<u32>,
}

/// What a user was given.
#[derive(Debug, Default, Serialize)]
pub(crate) struct Granted {
    user: String,
    uid: u32,
    /// Files that now belong to the user.
    given: Vec<PathBuf>,
    /// Files that the user could open before.
    open: Vec<PathBuf>,
    /// What still keeps the user from driving the device, with its mend.
    notes: Vec<String>,
}

impl User {
    /// The user of this name or number.
    pub(crate) fn find(host: &Host, text: &str) -> anyhow::Result<Self> {
        let users = host.text("/etc/passwd").unwrap_or_default();
        let found = users.lines().find_map(|line| {
            let fields: Vec<_> = line.split(':').collect();
            let [name, _, uid, group, ..] = fields[..] else { return None };
            (name == text || uid == text).then_some((name, uid.parse().ok()?, group.parse().ok()?))
        });
        let (name, uid, group): (_, _, Option<u32>) = match (found, text.parse()) {
            (Some((name, uid, group)), _) => (name, uid, Some(group)),
            // One of a directory on the network.
            (None, Ok(uid)) => (text, uid, None),
            (None, Err(_)) => {
                return Err(Usage(format!(
                    "there is no user {text:?} in /etc/passwd; of one in a directory on the network give the number: \
                     --owner $(id -u {text})"
                ))
                .into());
            }
        };
        let mut groups: Vec<u32> = group.into_iter().collect();
        for line in host.text("/etc/group").unwrap_or_default().lines() {
            let fields: Vec<_> = line.split(':').collect();
            if let [_, _, number, members] = fields[..]
                && members.split(',').any(|member| member == name)
            {
                groups.extend(number.parse::<u32>().ok());
            }
        }
        Ok(Self { name: name.to_owned(), uid, groups })
    }

    /// Whether the permissions of `path` let the user read and write it.
    fn may_use(&self, path: &Path) -> anyhow::Result<bool> {
        let data = fs::metadata(path).with_context(|| format!("cannot look at {}", path.display()))?;
        let mode = data.mode();
        let bits = if data.uid() == self.uid {
            mode >> 6
        } else if self.groups.contains(&data.gid()) {
            mode >> 3
        } else {
            mode
        };
        Ok(self.uid == 0 || bits & 0o6 == 0o6)
    }

    /// Refuses what [`grant`](Self::grant) would refuse, before anything is changed.
    pub(crate) fn check(&self, host: &Host) -> anyhow::Result<()> {
        for path in [IOMMU, CONTAINER].map(|path| host.path(path)) {
            if path.exists() && !self.may_use(&path)? && fs::metadata(&path)?.uid() != 0 {
                anyhow::bail!(
                    "cannot give {path} to {user}: it belongs to another user already; for several users, make a group of \
                     them and bind again: sudo groupadd -f {GROUP} && sudo usermod -aG {GROUP} {user} && sudo chgrp \
                     {GROUP} {path} && sudo chmod g+rw {path}",
                    path = path.display(),
                    user = self.name
                );
            }
        }
        Ok(())
    }

    /// Lets the user open the devices and what they are opened with.
    pub(crate) fn grant(&self, host: &Host, devices: &[HostDevice]) -> anyhow::Result<Granted> {
        let mut granted = Granted { user: self.name.clone(), uid: self.uid, ..Granted::default() };
        let mut files = vec![host.path(IOMMU), host.path(CONTAINER)];
        for device in devices {
            files.extend(device.cdev());
            files.extend(device.group_file());
        }
        for path in files.into_iter().filter(|path| path.exists()) {
            if self.may_use(&path)? {
                granted.open.push(path);
            } else {
                chown(&path, Some(self.uid), None)
                    .with_context(|| format!("cannot give {} to {}", path.display(), self.name))?;
                granted.given.push(path);
            }
        }
        if devices.iter().any(HostDevice::is_unprotected) {
            granted.notes.push(
                "a device that no IOMMU holds is opened by root alone (CAP_SYS_RAWIO), whoever owns its file; \
                 run the program with sudo"
                    .to_owned(),
            );
        }
        granted.notes.extend(self.too_little_locked(host));
        Ok(granted)
    }

    /// Says if the user may lock too little memory.
    fn too_little_locked(&self, host: &Host) -> Option<String> {
        let of_user = memlock::of_user(host, self.uid);
        let limit = of_user.unwrap_or_else(memlock::own);
        if memlock::is_enough(limit) {
            return None;
        }
        let whose = if of_user.is_some() {
            "processes may lock"
        } else {
            "sessions, if they are like this one, may lock"
        };
        Some(format!(
            "{}'s {whose} {} of memory, too little for most uses: {}",
            self.name,
            size::show(limit.unwrap_or_default()),
            memlock::mend(&self.name)
        ))
    }
}

impl Granted {
    /// What was done and what is left to do, a line each.
    pub(crate) fn lines(&self) -> Vec<String> {
        let shown = |paths: &[PathBuf]| {
            paths.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", ")
        };
        let mut lines = Vec::new();
        if !self.given.is_empty() {
            lines.push(format!("{} now owns {}", self.user, shown(&self.given)));
        }
        if !self.open.is_empty() {
            lines.push(format!("{} could already open {}", self.user, shown(&self.open)));
        }
        lines.extend(self.notes.iter().cloned());
        lines
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn permissions_are_those_of_owner_group_and_others() {
        let me = rustix::process::geteuid().as_raw();
        let group = rustix::process::getegid().as_raw();
        let file = std::env::temp_dir().join(format!("underpass-owner-{}", std::process::id()));
        fs::write(&file, "").expect("a scratch file");
        let (owner, member, other) = (
            User { name: "owner".into(), uid: me, groups: vec![] },
            User { name: "member".into(), uid: me + 1, groups: vec![group + 1, group] },
            User { name: "other".into(), uid: me + 1, groups: vec![group + 1] },
        );
        for (mode, expected) in [
            (0o600, (true, false, false)),
            (0o660, (true, true, false)),
            (0o666, (true, true, true)),
            (0o646, (true, false, true)),
            (0o640, (true, false, false)),
        ] {
            fs::set_permissions(&file, fs::Permissions::from_mode(mode)).expect("a mode");
            let may = |user: &User| user.may_use(&file).expect("the file is there");
            assert_eq!((may(&owner), may(&member), may(&other)), expected, "{mode:o}");
        }
        fs::remove_file(&file).expect("the file is there");
    }

    #[test]
    fn users_are_found_by_name_and_number() {
        let host = Host::this();
        let root = User::find(&host, "root").expect("root is everywhere");
        assert_eq!((root.uid, root.name.as_str()), (0, "root"));
        assert_eq!(User::find(&host, "0").expect("so is its number"), root);
        assert_eq!(User::find(&host, "3999999999").expect("a number needs no name").uid, 3_999_999_999);
        let error = User::find(&host, "no such user").expect_err("there is none");
        assert!(crate::is_usage(&error), "{error}");
    }
}
