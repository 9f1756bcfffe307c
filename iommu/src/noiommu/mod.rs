//! VFIO without an IOMMU: devices reach all of the machine's memory, by physical addresses.
//!
//! For machines and virtual machines that have none, and only for who makes an [`UnprotectedDma`]. What an IOMMU gives is
//! missing: a wrong address is not stopped, [`Access`] rights are not kept, a device that is detached or whose memory is unmapped
//! still reaches it, and goes on when this process has died.
//!
//! A device's address (an IOVA) is a physical one, from /proc/self/pagemap, which takes `CAP_SYS_ADMIN`. A region's pages are
//! anywhere: [`Mapping::pages`](crate::Mapping::pages) has an address for each, and only memory whose pages are neighbours
//! is handed to a device.
//!
//! Nothing pins the pages, so they must be some that the kernel leaves where they are: huge pages of hugetlbfs, which are not
//! swapped, compacted or balanced between nodes. Pages of 4 KiB are refused, since all of that moves them, mlock(2) or not. So
//! once this backend is open, regions of this process have huge pages, short ones too, unless their page size is named. What
//! still moves huge pages is the administrator: with `move_pages(2)` or migratepages(8), by taking memory offline, or by asking
//! for gigantic pages or CMA memory at run time. Unmapping a region looks whether it was moved meanwhile, and says so.
//!
//! Sources: Linux 7.3, Documentation/driver-api/vfio.rst, Documentation/admin-guide/mm/pagemap.rst.

mod pagemap;

use std::sync::Arc;

use crate::group::{Group, Kind, SpaceId};
use crate::{
    Access, Attachable, Attachment, AttachmentOps, Capabilities, Error, ErrorKind, Ioas, IoasOps,
    IommuBackend, Iova, IovaRange, PageSizes, Pasid, Region, Result, SvaToken, UnprotectedDma, Vendor, group,
    memory,
};

/// The backend.
#[derive(Debug, Clone)]
pub struct Noiommu {
    _responsible: UnprotectedDma,
}

impl Noiommu {
    /// Looks whether the kernel allows it. From now on, regions of this process have pages of 2 MiB at least.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] where the kernel does not (`vfio.enable_unsafe_noiommu_mode=1`);
    /// [`ErrorKind::Permission`] for a process without `CAP_SYS_ADMIN` and `CAP_SYS_RAWIO`.
    pub fn open(token: UnprotectedDma) -> Result<Self> {
        Kind::Noiommu.container()?;
        memory::use_huge_pages_only();
        Ok(Self { _responsible: token })
    }

    /// The group with this number (of `/dev/vfio/noiommu-N`), opened if this process does not have it open yet.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] if none of its devices is bound to VFIO; [`ErrorKind::Busy`] if another process
    /// has it; [`ErrorKind::Permission`] for a process without `CAP_SYS_RAWIO`.
    pub fn group(&self, number: u32) -> Result<Arc<Group>> {
        Group::open(Kind::Noiommu, number)
    }
}

impl IommuBackend for Noiommu {
    fn name(&self) -> &'static str {
        "noiommu"
    }

    fn alloc_ioas(&self) -> Result<Ioas> {
        Ok(Ioas::from_ops(Box::new(Space(SpaceId::new()))))
    }

    fn attach_sva(&self, device: &dyn Attachable, _pasid: Pasid, _token: SvaToken) -> Result<Attachment> {
        Err(no_pasids("attach the device to the process's own address space")
            .of_kind(ErrorKind::Unsupported)
            .device(device.name().to_owned()))
    }
}

#[cold]
fn no_pasids(operation: impl Into<std::borrow::Cow<'static, str>>) -> Error {
    Error::new(ErrorKind::Exhausted, operation, "PASIDs take an IOMMU: max_pasids is 0")
        .mend("attach the device itself, without a PASID")
}

/// The one address space of all devices, physical memory; here, whose groups it is.
#[derive(Debug)]
struct Space(SpaceId);

impl IoasOps for Space {
    fn attach(&self, device: &dyn Attachable, pasid: Option<Pasid>) -> Result<Box<dyn AttachmentOps>> {
        if let Some(pasid) = pasid {
            return Err(no_pasids(format!("attach PASID {pasid}")));
        }
        let group = group::of(device, Kind::Noiommu)?;
        group.adopt(self.0, device.name())?;
        Ok(Box::new(Attached { group: Arc::clone(group), device: device.name().to_owned() }))
    }

    fn usable_iovas(&self) -> Vec<IovaRange> {
        vec![IovaRange { first: Iova::new(0), last: Iova::new(u64::MAX) }]
    }

    fn pages(&self, region: &Region) -> Result<Option<Box<[Iova]>>> {
        pagemap::pages(region).map(Some)
    }

    fn map(&self, iova: Iova, region: &Arc<Region>, _access: Access) -> Result<()> {
        Err(Error::new(
            ErrorKind::Unsupported,
            format!("map {region:?} at {iova}"),
            "without an IOMMU, its addresses are what they are",
        ))
    }

    fn unmap(&self, _iova: Iova, _region: &Region) -> Result<()> {
        Ok(())
    }
}

/// A device that is attached.
#[derive(Debug)]
struct Attached {
    group: Arc<Group>,
    device: String,
}

impl AttachmentOps for Attached {
    fn capabilities(&self) -> Capabilities {
        Capabilities {
            max_pasids: 0,
            page_sizes: PageSizes::ALL,
            fault_reporting: false,
            dirty_tracking: false,
            vendor: Vendor::Unknown,
        }
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        self.group.leave(&self.device);
    }
}
