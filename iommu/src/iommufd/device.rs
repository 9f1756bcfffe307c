//! What can be attached through an iommufd.

use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use super::Iommufd;
use super::calls::{self, VfioFd};
use super::refusal::{self, Group};
use crate::{Error, ErrorKind, Pasid, Result};

/// A device that is bound to an iommufd. [`Cdev`] is one; the kernel's mock of a device, in tests, another.
pub trait Device: Send + Sync + fmt::Debug {
    /// Its name, for messages.
    fn name(&self) -> &str;

    /// The number by which the iommufd knows it (`out_devid` of `VFIO_DEVICE_BIND_IOMMUFD`).
    fn id(&self) -> u32;

    /// What it is bound to. Ids of one iommufd mean nothing to another.
    fn iommufd(&self) -> &Iommufd;

    /// Attaches the device, or one PASID of it, to the HWPT or IOAS `page_table`, and returns the id of the page
    /// table that the kernel chose: another one only where `page_table` is an IOAS. What is attached already is replaced.
    ///
    /// # Errors
    /// The kernel's refusal, with its errno: what it means is explained by who calls this.
    fn attach(&self, page_table: u32, pasid: Option<Pasid>) -> Result<u32>;

    /// Undoes [`attach`](Self::attach); no DMA of the device reaches the page table any more.
    fn detach(&self, pasid: Option<Pasid>) -> Result<()>;
}

/// A VFIO device, opened by its character device and bound to an [`Iommufd`]. Closing it, by dropping it, unbinds it.
#[derive(Debug)]
pub struct Cdev {
    // Closed before the iommufd.
    fd: VfioFd,
    iommufd: Iommufd,
    name: String,
    id: u32,
}

impl Cdev {
    pub(super) fn bind(
        iommufd: &Iommufd,
        cdev: OwnedFd,
        name: &str,
        vf_token: Option<[u8; 16]>,
    ) -> Result<Self> {
        let fd = VfioFd::new(cdev).map_err(|error| {
            Error::os("bind the device to an iommufd", "what was opened is no VFIO device", error)
                .of_kind(ErrorKind::InvalidInput)
                .device(name.to_owned())
                .mend("open its file under /dev/vfio/devices")
        })?;
        let id = calls::bind(&fd, &iommufd.0.fd, vf_token.as_ref()).map_err(|error| {
            let group = fd.sysfs().map(|folder| Group::read(&folder)).unwrap_or_default();
            refusal::bind(error, &group, vf_token.is_some()).device(name.to_owned())
        })?;
        Ok(Self { fd, iommufd: iommufd.clone(), name: name.to_owned(), id })
    }

    /// The device's file descriptor, for VFIO's other requests.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Device for Cdev {
    fn name(&self) -> &str {
        &self.name
    }

    fn id(&self) -> u32 {
        self.id
    }

    fn iommufd(&self) -> &Iommufd {
        &self.iommufd
    }

    fn attach(&self, page_table: u32, pasid: Option<Pasid>) -> Result<u32> {
        calls::attach(&self.fd, page_table, pasid)
            .map_err(|error| Error::os("attach the device", "VFIO refuses", error))
    }

    fn detach(&self, pasid: Option<Pasid>) -> Result<()> {
        calls::detach(&self.fd, pasid).map_err(|error| Error::os("detach the device", "VFIO refuses", error))
    }
}
