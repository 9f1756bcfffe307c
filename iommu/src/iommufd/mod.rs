//! The kernel's I/O address spaces: iommufd.
//!
//! Sources: `Documentation/userspace-api/iommufd.rst` and `include/uapi/linux/iommufd.h` of Linux 7.3.

mod device;
mod ioctl;

use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError, Weak};

pub use device::{Cdev, Device};

use self::ioctl::IommuFd;
use crate::{Attachable, Attachment, Error, ErrorKind, Ioas, IommuBackend, Pasid, Result, SvaToken};

/// How an [`Iommufd`] is opened.
#[derive(Debug, Clone)]
pub struct Options {
    /// Let the IOMMU map contiguous pages by one large entry; on by default. Off, for measuring what that brings,
    /// everything is mapped in pages of 4 KiB.
    pub huge_pages: bool,
    /// Whose locked memory a region counts as.
    pub memlock: Memlock,
    /// Have page requests of devices reported, where the IOMMU can.
    pub page_faults: bool,
    /// Have written pages tracked, where the IOMMU can.
    pub dirty_tracking: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self { huge_pages: true, memlock: Memlock::User, page_faults: false, dirty_tracking: false }
    }
}

/// Whose limit of locked memory (`RLIMIT_MEMLOCK`) counts what is mapped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Memlock {
    /// All that the user has locked, in whatever process: the kernel's default.
    User,
    /// What this process has locked, as VFIO's type1 does. Choosing it needs `CAP_SYS_RESOURCE`.
    Process,
}

/// An open `/dev/iommu`. Clones share it; the last one closes it.
#[derive(Clone)]
pub struct Iommufd(Arc<Shared>);

struct Shared {
    fd: IommuFd,
    options: Options,
}

impl Iommufd {
    /// Opens `/dev/iommu`.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] where the kernel has no iommufd; [`ErrorKind::Permission`] where the file is not this
    /// user's.
    pub fn open() -> Result<Self> {
        Self::with(Options::default())
    }

    /// As [`open`](Self::open), with options.
    pub fn with(options: Options) -> Result<Self> {
        let fd = IommuFd::open().map_err(cannot_open)?;
        Ok(Self(Arc::new(Shared { fd, options })))
    }

    /// The one that this process shares, opened by the first who asks and closed with the last clone.
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

    /// Binds a VFIO device, opened by its file under `/dev/vfio/devices`. `name` is for messages; `vf_token` is the
    /// secret that a virtual function's owner asks for.
    pub fn bind(&self, cdev: OwnedFd, name: &str, vf_token: Option<[u8; 16]>) -> Result<Arc<Cdev>> {
        Cdev::bind(self, cdev, name, vf_token).map(Arc::new)
    }

    /// How it was opened.
    pub fn options(&self) -> &Options {
        &self.0.options
    }

    fn raw(&self) -> &IommuFd {
        &self.0.fd
    }
}

impl AsFd for Iommufd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.fd.as_fd()
    }
}

impl fmt::Debug for Iommufd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(IommuFd::PATH)
    }
}

impl IommuBackend for Iommufd {
    fn name(&self) -> &'static str {
        "iommufd"
    }

    fn alloc_ioas(&self) -> Result<Ioas> {
        Err(Error::new(ErrorKind::Unsupported, "allocate an address space", "this is not written yet"))
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

#[cold]
fn cannot_open(error: std::io::Error) -> Error {
    let errno = error.raw_os_error();
    let error = |why: &'static str, error| Error::os(format!("open {}", IommuFd::PATH), why, error);
    let source = std::io::Error::from_raw_os_error(errno.unwrap_or(libc::EIO));
    match errno {
        Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => error("this kernel has no iommufd", source)
            .mend("run: sudo modprobe iommufd; if there is no such module, use a kernel with CONFIG_IOMMUFD"),
        Some(libc::EACCES | libc::EPERM) => {
            error("it belongs to another user", source).mend("run: sudo chown $USER /dev/iommu")
        }
        _ => error("the kernel refuses", source),
    }
}
