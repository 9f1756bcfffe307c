//! The kernel's I/O address spaces: iommufd.
//!
//! An [`Iommufd`] is an open `/dev/iommu`. It makes address spaces ([`Ioas`]); devices that are bound to it
//! ([`Iommufd::bind`]), or single PASIDs of theirs, are attached to those.
//!
//! ```no_run
//! use underpass_iommu::iommufd::Iommufd;
//! use underpass_iommu::{Access, IommuBackend, Region};
//! # fn example(device: &dyn underpass_iommu::Attachable) -> underpass_iommu::Result<()> {
//! let iommufd = Iommufd::shared()?;
//! let ioas = iommufd.alloc_ioas()?;
//! let attachment = ioas.attach(device, None)?;
//! println!("{:?}", attachment.capabilities());
//! let region = Region::builder(2 << 20).build()?;
//! let mapping = ioas.map(&region, Access::READ_WRITE)?;
//! # Ok(())
//! # }
//! ```
//!
//! What the kernel leaves to its caller is here, once:
//! - *One page table (HWPT) a device and address space*, made with the PASID flag where there are PASIDs, and shared by the
//!   device's RID and its PASIDs in that space. An IOMMU that lets none be made (virtio-iommu) gets the address space itself.
//! - *PASIDs are gated.* The kernel attaches one, with success, to a device that has none; and VFIO replaces what is attached
//!   without a word. Here both are errors, and each refusal says its reason.
//!   A space with nothing but PASIDs has no hole at x86's window for interrupts (0xfee00000), and needs none: with a PASID, VT-d
//!   translates these addresses like all others (its specification, revision 3.4, section 3.14).
//! - *Memory is pinned once.* A region that several spaces map is mapped in one and copied to the others, so that it
//!   counts once as locked memory.
//! - *Unmaps are exact.* The kernel says how many bytes it has unmapped; any other number than was mapped is an error.
//! - *Page requests are answered when asked for*, by [`Attachment::next_fault`]; no thread runs here.
//!
//! Sources: `Documentation/userspace-api/iommufd.rst` and `include/uapi/linux/iommufd.h` of Linux 7.3. Kernels from 6.6 on
//! have VFIO's character devices, which this needs; PASIDs need 6.15; regions are mapped by their memfd from 6.13 on and
//! by their address before.

mod calls;
mod device;
mod fault;
mod hwpt;
mod ioas;

mod pinned;
mod refusal;

use std::collections::HashSet;
use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use iommufd_bindings as uapi;

pub use device::{Cdev, Device};

use self::calls::IommuFd;
use self::ioas::KernelIoas;
use self::pinned::Pinned;
use crate::{
    Attachable, Attachment, Error, ErrorKind, Ioas, IommuBackend, IovaRange, Pasid, Result, SvaToken,
};

/// How an [`Iommufd`] is opened.
#[derive(Debug, Clone)]
pub struct Options {
    /// Let the IOMMU map contiguous pages by one large entry; on by default. Off, for measuring what that brings,
    /// everything is mapped in pages of 4 KiB.
    pub huge_pages: bool,
    /// Whose locked memory a region counts as.
    pub memlock: Memlock,
    /// Have page requests of devices reported, where IOMMU and device can.
    pub page_faults: bool,
    /// Have written pages tracked, where the IOMMU can. On some IOMMUs a page table has either this or PASIDs; it then
    /// has this.
    pub dirty_tracking: bool,
    /// Addresses that every address space must offer: a device that can not use them all is refused.
    pub required_iovas: Vec<IovaRange>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            huge_pages: true,
            memlock: Memlock::User,
            page_faults: false,
            dirty_tracking: false,
            required_iovas: Vec::new(),
        }
    }
}

/// Whose limit of locked memory (`RLIMIT_MEMLOCK`) counts what is mapped. A process with `CAP_IPC_LOCK` has none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Memlock {
    /// All that the user has locked, in whatever process: the kernel's default.
    User,
    /// What this process has locked, as with VFIO's type1. Choosing it needs `CAP_SYS_RESOURCE`.
    Process,
}

/// An open `/dev/iommu`. Clones share it; the last one, address space or device closes it.
#[derive(Clone)]
pub struct Iommufd(Arc<Shared>);

struct Shared {
    fd: IommuFd,
    options: Options,
    pinned: Pinned,
    /// What is attached, by device id and PASID.
    attached: Mutex<HashSet<(u32, Option<Pasid>)>>,
}

impl Iommufd {
    /// Opens `/dev/iommu`.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] where the kernel has no iommufd; [`ErrorKind::Permission`] where this user may not open it.
    pub fn open() -> Result<Self> {
        Self::with(Options::default())
    }

    /// As [`open`](Self::open), with options.
    ///
    /// # Errors
    /// As [`open`](Self::open); [`ErrorKind::Permission`] for [`Memlock::Process`] without `CAP_SYS_RESOURCE`.
    pub fn with(options: Options) -> Result<Self> {
        let fd = IommuFd::open().map_err(refusal::open)?;
        if options.memlock == Memlock::Process {
            // Before anything is made with it: later the kernel refuses.
            let mode = uapi::iommufd_option_IOMMU_OPTION_RLIMIT_MODE;
            calls::set_option(&fd, mode, 0, 1).map_err(refusal::memlock_mode)?;
        }
        let (pinned, attached) = (Pinned::default(), Mutex::default());
        Ok(Self(Arc::new(Shared { fd, options, pinned, attached })))
    }

    /// The one that this process shares, with default options: opened by the first who asks, and closed with the last
    /// clone. Devices of one `Iommufd` can share address spaces, and memory is pinned once for all of its spaces.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn shared() -> Result<Self> {
        static SHARED: Mutex<Weak<Shared>> = Mutex::new(Weak::new());
        let mut shared = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(open) = shared.upgrade() {
            return Ok(Self(open));
        }
        let new = Self::open()?;
        *shared = Arc::downgrade(&new.0);
        Ok(new)
    }

    /// Binds a VFIO device, opened by its file under `/dev/vfio/devices`: from here on it is this process's. The kernel
    /// resets it. `name` is for messages; `vf_token` is the secret that the owner of a virtual function's physical one has
    /// set.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`] if another process has the device, or one of its IOMMU group; [`ErrorKind::Permission`] where
    /// the group is not viable, the IOMMU does not isolate interrupts, or the token is wrong. Each says which.
    pub fn bind(&self, cdev: OwnedFd, name: &str, vf_token: Option<[u8; 16]>) -> Result<Arc<Cdev>> {
        Cdev::bind(self, cdev, name, vf_token).map(Arc::new)
    }

    /// How it was opened.
    pub fn options(&self) -> &Options {
        &self.0.options
    }
}

impl Shared {
    fn attached(&self) -> MutexGuard<'_, HashSet<(u32, Option<Pasid>)>> {
        // Each change is one call, so a poisoned lock holds a sound set.
        self.attached.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl AsFd for Iommufd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.fd.as_fd()
    }
}

impl fmt::Debug for Iommufd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (fd {:?})", IommuFd::PATH, self.as_fd())
    }
}

impl IommuBackend for Iommufd {
    fn name(&self) -> &'static str {
        "iommufd"
    }

    fn alloc_ioas(&self) -> Result<Ioas> {
        Ok(Ioas::from_ops(Box::new(KernelIoas::new(self)?)))
    }

    fn attach_sva(&self, device: &dyn Attachable, pasid: Pasid, _token: SvaToken) -> Result<Attachment> {
        Err(Error::new(
            ErrorKind::Unsupported,
            format!("attach PASID {pasid} to this process's address space"),
            "iommufd has no shared virtual addressing",
        )
        .device(device.name().to_owned())
        .mend("attach it to an address space of its own, or use the device by its kernel driver"))
    }
}

/// Undoes something, and tries again if that fails: what is not undone stays, so that an error would help nobody as much.
fn insist<T, E>(undo: impl Fn() -> Result<T, E>) -> Result<T, E> {
    undo().or_else(|_| undo())
}

/// Something that the kernel has made in an iommufd; destroyed when dropped.
struct Object {
    iommufd: Iommufd,
    id: u32,
    what: &'static str,
    kept: AtomicBool,
}

impl Object {
    fn new(iommufd: &Iommufd, id: u32, what: &'static str) -> Self {
        Self { iommufd: iommufd.clone(), id, what, kept: AtomicBool::new(false) }
    }

    /// From now on it stays until the iommufd is closed.
    fn keep(&self) {
        // Read by drop, which the last reference's release and acquire order behind this.
        self.kept.store(true, Ordering::Relaxed);
    }

    fn fd(&self) -> &IommuFd {
        &self.iommufd.0.fd
    }
}

impl Drop for Object {
    fn drop(&mut self) {
        if *self.kept.get_mut() {
            return;
        }
        if let Err(error) = insist(|| calls::destroy(self.fd(), self.id)) {
            tracing::error!("{} {} stays until {} is closed: {error}", self.what, self.id, IommuFd::PATH);
        }
    }
}

impl fmt::Debug for Object {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.what, self.id)
    }
}
