//! VFIO's groups and containers, which the backends [`type1`](crate::type1) and [`noiommu`](crate::noiommu) share.
//!
//! A group is what an IOMMU can tell apart: its devices share one address space, are all VFIO's or none, and are opened by
//! one process at a time. A container holds groups and their page tables. Here each group has a container of its own: a
//! device can be opened only once its group has an IOMMU, and then the group can not change its container any more.
//!
//! Sources: Linux 7.3, include/uapi/linux/vfio.h and Documentation/driver-api/vfio.rst.

pub(crate) mod calls;
mod explain;

use std::collections::BTreeMap;
use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};

use rustix::fs::{Mode, OFlags};
use vfio_bindings::bindings::vfio;

pub use self::explain::leaves_dma_alone;
use crate::{Attachable, AttachableKind, Error, ErrorKind, Result};

/// Where the kernel has groups and containers.
const FOLDER: &str = "/dev/vfio";

/// What translates for a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Kind {
    /// An IOMMU, by VFIO's type1 interface.
    Type1,
    /// Nothing.
    Noiommu,
}

impl Kind {
    /// The number by which VFIO knows it, as extension and for `VFIO_SET_IOMMU`. Of type1 the second version: in it, what was
    /// mapped by one call is unmapped by one.
    const fn number(self) -> u32 {
        match self {
            Self::Type1 => vfio::VFIO_TYPE1v2_IOMMU,
            Self::Noiommu => vfio::VFIO_NOIOMMU_IOMMU,
        }
    }

    fn group(self, number: u32) -> PathBuf {
        Path::new(FOLDER).join(match self {
            Self::Type1 => number.to_string(),
            Self::Noiommu => format!("noiommu-{number}"),
        })
    }

    /// A container, in which this kind is available.
    pub(crate) fn container(self) -> Result<OwnedFd> {
        let path = Path::new(FOLDER).join("vfio");
        let container = open(&path).map_err(|errno| explain::open_container(&path, errno))?;
        let version = calls::api_version(container.as_fd());
        if version != Ok(vfio::VFIO_API_VERSION.cast_signed()) {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!("use {}", path.display()),
                format!("it speaks another version of VFIO's interface ({version:?})"),
            )
            .mend("use a kernel whose VFIO has version 0, as all released ones have"));
        }
        match calls::has_extension(container.as_fd(), self.number()) {
            Ok(true) => Ok(container),
            _ => Err(explain::no_extension(self)),
        }
    }
}

/// A VFIO group, open, in a container of its own. One for each group and process: the kernel lets one process open it, once.
///
/// It is closed when the last `Arc` goes. A device's file descriptor is to be closed before: keep the `Arc` behind it.
pub struct Group {
    name: String,
    // In this order: a container is closed when nothing is in it any more, and both before the entry goes.
    fd: OwnedFd,
    container: OwnedFd,
    attached: Mutex<Attached>,
    entry: Entry,
}

/// What a group's devices are attached to: all to the same.
#[derive(Debug, Default)]
struct Attached {
    space: Option<SpaceId>,
    /// The names of those that are.
    devices: Vec<String>,
}

/// Tells address spaces apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct SpaceId(u64);

impl SpaceId {
    pub(crate) fn new() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Self(NEXT.fetch_add(1, Ordering::Relaxed))
    }
}

/// The groups that this process has open, or is just closing.
static OPEN: Mutex<BTreeMap<(Kind, u32), Weak<Group>>> = Mutex::new(BTreeMap::new());
/// One of them was closed.
static CLOSED: Condvar = Condvar::new();

/// A group's entry in [`OPEN`], dropped behind its files.
struct Entry {
    kind: Kind,
    number: u32,
}

impl Drop for Entry {
    fn drop(&mut self) {
        // A panic leaves whole entries.
        OPEN.lock().unwrap_or_else(PoisonError::into_inner).remove(&(self.kind, self.number));
        CLOSED.notify_all();
    }
}

impl Group {
    /// The group with this number: opened, viable, in a container with its IOMMU; or the one that this process has open.
    pub(crate) fn open(kind: Kind, number: u32) -> Result<Arc<Self>> {
        // Held while the group is opened: of two threads, the second gets what the first has opened.
        let mut open = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
        while let Some(group) = open.get(&(kind, number)) {
            if let Some(group) = group.upgrade() {
                return Ok(group);
            }
            // Another thread is closing it, and until then the kernel takes it for another process's.
            open = CLOSED.wait(open).unwrap_or_else(PoisonError::into_inner);
        }
        let group = Arc::new(Self::open_first(kind, number)?);
        open.insert((kind, number), Arc::downgrade(&group));
        Ok(group)
    }

    fn open_first(kind: Kind, number: u32) -> Result<Self> {
        let path = kind.group(number);
        let container = kind.container()?;
        let fd = open(&path).map_err(|errno| explain::open_group(kind, number, &path, errno))?;
        match calls::group_is_viable(fd.as_fd()) {
            Ok(true) => {}
            Ok(false) => return Err(explain::not_viable(number)),
            Err(errno) => return Err(explain::group_call(number, "ask for the group's status", errno)),
        }
        calls::set_container(fd.as_fd(), container.as_fd())
            .map_err(|errno| explain::group_call(number, "put the group into a container", errno))?;
        calls::set_iommu(container.as_fd(), kind.number())
            .map_err(|errno| explain::set_iommu(kind, number, errno))?;
        let name = path.display().to_string();
        Ok(Self { name, fd, container, attached: Mutex::default(), entry: Entry { kind, number } })
    }

    /// The group's number, as in its name under /dev/vfio.
    pub fn number(&self) -> u32 {
        self.entry.number
    }

    /// Opens one of the group's devices: `"0000:3b:00.0"`, or with a VF token `"0000:3b:00.0 vf_token=UUID"`; for a mediated
    /// device its UUID. The kernel resets it.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] if the group has no such device that is bound to VFIO; [`ErrorKind::Permission`] where
    /// a VF token is missing or wrong; [`ErrorKind::Busy`] if another process has it.
    pub fn device(&self, name: &str) -> Result<OwnedFd> {
        calls::device_fd(self.fd.as_fd(), name).map_err(|errno| explain::device(self.number(), name, errno))
    }

    pub(crate) fn container(&self) -> BorrowedFd<'_> {
        self.container.as_fd()
    }

    /// Notes that `device` is attached to `space`; true for the group's first.
    pub(crate) fn adopt(&self, space: SpaceId, device: &str) -> Result<bool> {
        let mut attached = self.attached();
        let busy = |why: String, mend: &'static str| {
            Err(Error::new(ErrorKind::Busy, "attach the device", why).device(device.to_owned()).mend(mend))
        };
        if attached.devices.iter().any(|other| other == device) {
            return busy("it is attached already".into(), "drop the earlier attachment first");
        }
        if attached.space.is_some_and(|other| other != space) {
            let why = format!(
                "its IOMMU group, {}, is attached to another address space (through {}), and has no more than one",
                self.number(),
                attached.devices.join(", ")
            );
            return busy(why, "attach all devices of a group to one address space");
        }
        attached.space = Some(space);
        attached.devices.push(device.to_owned());
        Ok(attached.devices.len() == 1)
    }

    /// Whether `device` is the only one that is attached.
    pub(crate) fn is_last(&self, device: &str) -> bool {
        self.attached().devices == [device]
    }

    /// Notes that `device` is no longer attached.
    pub(crate) fn leave(&self, device: &str) {
        let mut attached = self.attached();
        attached.devices.retain(|other| other != device);
        if attached.devices.is_empty() {
            attached.space = None;
        }
    }

    fn attached(&self) -> MutexGuard<'_, Attached> {
        self.attached.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Attachable for Arc<Group> {
    fn name(&self) -> &str {
        &self.name
    }

    fn kind(&self) -> AttachableKind<'_> {
        AttachableKind::Group(self)
    }
}

impl fmt::Debug for Group {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Group({})", self.name)
    }
}

/// The group behind `device`, if it is of this kind.
pub(crate) fn of(device: &dyn Attachable, kind: Kind) -> Result<&Arc<Group>> {
    match device.kind() {
        AttachableKind::Group(group) if group.entry.kind == kind => Ok(group),
        _ => Err(Error::new(
            ErrorKind::InvalidInput,
            "attach the device to an address space",
            format!("it is not in a group of VFIO that was opened for {kind:?}"),
        )
        .device(device.name().to_owned())
        .mend("allocate the address space from the device's own IOMMU")),
    }
}

fn open(path: &Path) -> rustix::io::Result<OwnedFd> {
    rustix::fs::open(path, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
}

#[cfg(test)]
mod tests {
    use std::thread;
    use std::time::Duration;

    use super::*;

    #[test]
    fn who_opens_a_group_waits_until_another_thread_has_closed_it() {
        // Nobody holds it any more, but its files are still open.
        let (kind, number) = (Kind::Type1, u32::MAX);
        OPEN.lock().unwrap_or_else(PoisonError::into_inner).insert((kind, number), Weak::new());
        let closing = Entry { kind, number };
        thread::scope(|scope| {
            let opener = scope.spawn(|| Group::open(kind, number).map(drop));
            thread::sleep(Duration::from_millis(50));
            assert!(!opener.is_finished());
            drop(closing);
            // There is no such group; but now it was looked for.
            assert!(opener.join().is_ok_and(|opened| opened.is_err()));
        });
    }
}
