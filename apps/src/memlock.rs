//! How much memory a user's processes may lock: what devices may do DMA to is locked.

use std::fs;
use std::os::unix::fs::MetadataExt as _;

use rustix::process::{Resource, getrlimit};
use underpass::pci::host::Host;

/// A limit below this stops `copy` with its default working set, and `forward` with a few ports.
pub(crate) const ENOUGH: u64 = 256 << 20;

/// A limit in bytes; `None` is no limit.
pub(crate) type Limit = Option<u64>;

/// This process's own.
pub(crate) fn own() -> Limit {
    getrlimit(Resource::Memlock).current
}

/// That of the user's running processes, the highest if they differ. Without any it is not known.
pub(crate) fn of_user(host: &Host, uid: u32) -> Option<Limit> {
    let processes = fs::read_dir(host.path("/proc")).ok()?;
    let of_user = |entry: &fs::DirEntry| entry.metadata().is_ok_and(|data| data.uid() == uid);
    let limits = processes.flatten().filter(of_user).filter_map(|entry| {
        let limits = fs::read_to_string(entry.path().join("limits")).ok()?;
        let line = limits.lines().find_map(|line| line.strip_prefix("Max locked memory"))?;
        Some(line.split_whitespace().next()?.parse::<u64>().ok())
    });
    limits.max_by_key(|limit| limit.unwrap_or(u64::MAX))
}

/// Whether it is enough for most uses.
pub(crate) fn is_enough(limit: Limit) -> bool {
    limit.is_none_or(|bytes| bytes >= ENOUGH)
}

/// How the limit of `user`, a name or `$USER`, is raised.
pub(crate) fn mend(user: &str) -> String {
    format!(
        "echo \"{user} - memlock unlimited\" | sudo tee /etc/security/limits.d/underpass.conf, and log in again"
    )
}
