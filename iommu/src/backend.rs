//! What every IOMMU offers: address spaces that devices and PASIDs are attached to.
//!
//! A backend implements three small traits ([`IommuBackend`], [`IoasOps`], [`AttachmentOps`]). What is the same
//! for all of them (picking an IOVA, keeping a region alive while it is mapped, tracking ranges exactly) is
//! here once, in [`Ioas`], [`Mapping`] and [`Attachment`].

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::iova::{IovaAllocator, IovaRange};
use crate::{
    Access, Error, ErrorKind, Fault, Iova, PageSize, PageSizes, Pasid, Region, Result, group, iommufd, soft,
};

/// A kind of IOMMU, able to make address spaces.
pub trait IommuBackend: Send + Sync + fmt::Debug {
    /// A short name for people: "soft", "iommufd", "type1".
    fn name(&self) -> &'static str;

    /// A new, empty address space, attached to nothing.
    fn alloc_ioas(&self) -> Result<Ioas>;

    /// Binds `pasid` of `device` to this process's own address space (shared virtual addressing): the device
    /// then uses this process's pointers as IOVAs, and may touch all that the process may.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] where the backend has no SVA. The kernel's iommufd has none: there such a
    /// PASID comes from a kernel driver.
    fn attach_sva(&self, device: &dyn Attachable, pasid: Pasid, token: SvaToken) -> Result<Attachment>;
}

/// Proof that somebody took responsibility for devices that can touch the whole process.
#[derive(Debug, Clone)]
pub struct SvaToken(());

impl SvaToken {
    /// Opts in to shared virtual addressing.
    ///
    /// # Safety
    /// Whoever makes a token vouches for every driver and device that it, or a clone of it, is given to: under SVA a
    /// wrong address corrupts this process's memory, and no IOMMU stops it. The caller also keeps memory of
    /// outstanding jobs in place until the device has finished with it.
    #[must_use]
    pub const unsafe fn new() -> Self {
        Self(())
    }
}

/// Proof that somebody took responsibility for devices that no IOMMU holds back: what opens [`noiommu`](crate::noiommu).
#[derive(Debug, Clone)]
pub struct UnprotectedDma(());

impl UnprotectedDma {
    /// Opts in to DMA without an IOMMU.
    ///
    /// # Safety
    /// Whoever makes a token vouches for every driver and device that it, or a clone of it, is given to: they reach all of
    /// the machine's memory by physical addresses, and a wrong one corrupts whatever lies there, in this process, another
    /// or the kernel. Nothing stops a device when its memory is unmapped, or this process ends.
    #[must_use]
    pub const unsafe fn new() -> Self {
        Self(())
    }
}

/// What can be put behind an address space. Each backend knows the kinds that it takes and refuses the rest.
pub trait Attachable: Send + Sync {
    /// The device's name, for messages.
    fn name(&self) -> &str;
    /// What it is.
    fn kind(&self) -> AttachableKind<'_>;
}

/// The kinds of [`Attachable`].
#[derive(Debug)]
#[non_exhaustive]
pub enum AttachableKind<'a> {
    /// A device behind the software IOMMU.
    Soft(&'a Arc<soft::SoftDevice>),
    /// A device that is bound to an iommufd: a VFIO cdev, or the kernel's mock in tests.
    Iommufd(&'a Arc<dyn iommufd::Device>),
    /// A device of a VFIO group.
    Group(&'a Arc<group::Group>),
}

/// Who makes the IOMMU, where it says so.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Vendor {
    /// This crate's software IOMMU.
    Software,
    /// Intel's, VT-d.
    IntelVtd,
    /// AMD's, AMD-Vi.
    AmdVi,
    /// Arm's System Memory Management Unit, version 3.
    ArmSmmuV3,
    /// It does not report itself.
    Unknown,
}

/// What an attached device can do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capabilities {
    /// PASIDs that the IOMMU has for the device, numbered from 1 to this; 0 is none. A device may have fewer itself.
    pub max_pasids: u32,
    /// Page sizes that one entry can map.
    pub page_sizes: PageSizes,
    /// Refused accesses are reported, with their addresses. A kernel's IOMMU reports those that the device asks for (PCI PRI);
    /// that of AMD does not tell which devices can, and so this may be true where there is never a report.
    pub fault_reporting: bool,
    /// Written pages can be tracked.
    pub dirty_tracking: bool,
    /// Who makes the IOMMU.
    pub vendor: Vendor,
}

/// What a backend does for an address space. Called under [`Ioas`]'s lock where ranges change, so that an
/// implementation sees maps and unmaps one at a time and never an overlap.
pub trait IoasOps: Send + Sync + fmt::Debug {
    /// Attaches `device`, or one PASID of it. What it returns detaches when dropped.
    fn attach(&self, device: &dyn Attachable, pasid: Option<Pasid>) -> Result<Box<dyn AttachmentOps>>;
    /// Addresses that everything attached so far can use.
    fn usable_iovas(&self) -> Vec<IovaRange>;
    /// Maps the whole region at `iova`, which is aligned to the region's page size and lies in a usable range.
    fn map(&self, iova: Iova, region: &Arc<Region>, access: Access) -> Result<()>;
    /// Where each of the region's pages is for the device, if the backend can not choose that: without an IOMMU, an address
    /// is what the memory has. Such regions are neither mapped nor unmapped, but asked for again when they would be.
    fn pages(&self, _region: &Region) -> Result<Option<Box<[Iova]>>> {
        Ok(None)
    }
    /// Undoes exactly one earlier [`map`](Self::map); returns once no DMA can touch the memory any more.
    fn unmap(&self, iova: Iova, region: &Region) -> Result<()>;
    /// Where memory that is handed to the device has to be registered (`check=leases`), if it has to.
    fn leases(&self) -> Option<Arc<dyn Leases>> {
        None
    }
}

/// The register of memory that is handed to a device, where `check=leases` is on: DMA to anything else faults.
/// It makes a lying device, and a user's use-after-post, visible.
pub trait Leases: Send + Sync + fmt::Debug {
    /// The device may now access `len` bytes at `iova`. Leases may overlap; each is taken back on its own.
    fn grant(&self, iova: Iova, len: u64, access: Access);
    /// Takes back one lease with exactly these values; returns once no DMA under it is in flight.
    fn take_back(&self, iova: Iova, len: u64, access: Access);
}

/// What a backend keeps of an attached device; detaches when dropped.
pub trait AttachmentOps: Send + Sync + fmt::Debug {
    /// What the device can do, now that it is attached.
    fn capabilities(&self) -> Capabilities;

    /// The next access of the device that was refused, where that is reported here.
    fn next_fault(&self) -> Result<Option<Fault>> {
        Ok(None)
    }

    /// Begins to track written pages, all of them clean, or ends it.
    fn track_dirty(&self, _on: bool) -> Result<()> {
        Err(no_dirty_tracking())
    }

    /// The pages of `range` that were written, in ascending order; `clear` makes them clean again. Both ends of the
    /// range are page boundaries.
    fn dirty_pages(&self, _range: IovaRange, _page_size: PageSize, _clear: bool) -> Result<Vec<Iova>> {
        Err(no_dirty_tracking())
    }
}

#[cold]
fn no_dirty_tracking() -> Error {
    Error::new(ErrorKind::Unsupported, "track written pages", "this IOMMU can not, or was not asked to")
        .mend("open the iommufd with dirty tracking, on an IOMMU that has it")
}

/// An I/O address space: page tables owned by the backend, which devices and PASIDs are attached to and
/// regions are mapped into. A handle: clones name the same space.
#[derive(Clone)]
pub struct Ioas(Arc<Shared>);

struct Shared {
    ops: Box<dyn IoasOps>,
    /// Every mapped range. Held across the backend's map and unmap, so that ranges change one at a time.
    iovas: Mutex<IovaAllocator>,
}

impl Shared {
    fn iovas(&self) -> MutexGuard<'_, IovaAllocator> {
        // A panic between two changes of the allocator is impossible (each is one call), so a poisoned lock
        // still holds exact ranges.
        self.iovas.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Ioas {
    /// For backends: an address space over these operations.
    pub fn from_ops(ops: Box<dyn IoasOps>) -> Self {
        let iovas = Mutex::new(IovaAllocator::new(ops.usable_iovas()));
        Self(Arc::new(Shared { ops, iovas }))
    }

    /// Attaches `device`, or one PASID of it, to this space. A PASID that came from [`Pasid::allocate`] is to be kept
    /// until the attachment is dropped: else it could be given to somebody else meanwhile.
    ///
    /// # Errors
    /// The backend's refusal; [`ErrorKind::Busy`] if something is mapped already at an address that the
    /// device can not use (attach first, then map).
    pub fn attach(&self, device: &dyn Attachable, pasid: Option<Pasid>) -> Result<Attachment> {
        let mut iovas = self.0.iovas();
        let ops = self.0.ops.attach(device, pasid).map_err(|e| e.device(device.name().to_owned()))?;
        let attachment = Attachment { ops, pasid, name: device.name().into(), ioas: Some(self.clone()) };
        // On failure the attachment is dropped, and with it the device detached.
        iovas.restrict(self.0.ops.usable_iovas()).map_err(|e| e.device(device.name().to_owned()))?;
        drop(iovas);
        Ok(attachment)
    }

    /// Maps `region` for the attached devices, at its preferred address if that is free and usable here, else
    /// at one that is. The mapping lasts until the returned value is dropped.
    pub fn map(&self, region: &Arc<Region>, access: Access) -> Result<Mapping> {
        if let Some(pages) = self.0.ops.pages(region)? {
            let iova = pages.first().copied().unwrap_or(Iova::new(0));
            let (ioas, region) = (self.clone(), Arc::clone(region));
            return Ok(Mapping { ioas, region, iova, pages: Some(pages), access, mapped: true });
        }
        let mut iovas = self.0.iovas();
        let (len, alignment) = (region.len(), region.page_size().bytes());
        let iova = match region.preferred_iova() {
            Some(iova) if iovas.reserve(iova, len) => iova,
            _ => iovas.allocate(len, alignment)?,
        };
        if let Err(error) = self.0.ops.map(iova, region, access) {
            iovas.free(iova, len);
            return Err(error);
        }
        Ok(Mapping {
            ioas: self.clone(),
            region: Arc::clone(region),
            iova,
            pages: None,
            access,
            mapped: true,
        })
    }

    /// Whether the region's pages are where they were when it was mapped, for a backend that does not hold them there.
    fn check_unmoved(&self, region: &Region, pages: &[Iova]) -> Result<()> {
        if self.0.ops.pages(region)?.as_deref() == Some(pages) {
            return Ok(());
        }
        Err(Error::new(
            ErrorKind::Os,
            format!("unmap {region:?}"),
            "the kernel has moved its pages meanwhile: DMA has gone to memory of others",
        )
        .mend("restart the machine, and do not move huge pages or take memory offline while devices without an IOMMU run"))
    }

    /// Addresses that everything attached so far can use, in ascending order.
    pub fn usable_iovas(&self) -> Vec<IovaRange> {
        self.0.ops.usable_iovas()
    }

    /// Where memory that is handed to the device has to be registered; `None` unless `check=leases` is on.
    pub fn leases(&self) -> Option<Arc<dyn Leases>> {
        self.0.ops.leases()
    }
}

impl fmt::Debug for Ioas {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.ops.fmt(f)
    }
}

/// A region mapped into an address space. Keeps both alive and unmaps when dropped.
#[must_use = "dropping a mapping unmaps it"]
pub struct Mapping {
    ioas: Ioas,
    region: Arc<Region>,
    iova: Iova,
    pages: Option<Box<[Iova]>>,
    access: Access,
    mapped: bool,
}

impl Mapping {
    /// Where the region starts, for the device.
    pub fn iova(&self) -> Iova {
        self.iova
    }

    /// Where each of the region's pages is for the device, in units of its [page size](Region::page_size): without an IOMMU
    /// they need not be neighbours. `None` where they are, from [`iova`](Self::iova) on.
    pub fn pages(&self) -> Option<&[Iova]> {
        self.pages.as_deref()
    }

    /// What is mapped.
    pub fn region(&self) -> &Arc<Region> {
        &self.region
    }

    /// What the device may do.
    pub fn access(&self) -> Access {
        self.access
    }

    /// Unmaps now, and says whether that worked; dropping can only log it.
    pub fn unmap(mut self) -> Result<()> {
        self.unmap_once()
    }

    fn unmap_once(&mut self) -> Result<()> {
        if !std::mem::take(&mut self.mapped) {
            return Ok(());
        }
        if let Some(pages) = &self.pages {
            return self.ioas.check_unmoved(&self.region, pages);
        }
        let mut iovas = self.ioas.0.iovas();
        let result = self.ioas.0.ops.unmap(self.iova, &self.region);
        match &result {
            Ok(()) => iovas.free(self.iova, self.region.len()),
            // The device may still reach the memory: it is never freed, and its addresses are never used again.
            Err(_) => self.region.leak(),
        }
        result
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        match self.unmap_once() {
            Ok(()) => {}
            // Nothing was mapped, and what the device reached meanwhile is no longer this region's.
            Err(error) if self.pages.is_some() => tracing::error!("{error}"),
            Err(error) => tracing::error!("{error}; {} bytes stay mapped and are leaked", self.region.len()),
        }
    }
}

impl fmt::Debug for Mapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Mapping({:?} at {}, {})", self.region, self.iova, self.access)
    }
}

/// A device, or one PASID of it, attached to an address space. Detaches when dropped.
#[must_use = "dropping an attachment detaches the device"]
pub struct Attachment {
    // Declared before `ioas`: detach first, then perhaps free the space.
    ops: Box<dyn AttachmentOps>,
    ioas: Option<Ioas>,
    pasid: Option<Pasid>,
    name: Arc<str>,
}

impl Attachment {
    /// For backends: an attachment to this process's own address space.
    pub fn from_sva(ops: Box<dyn AttachmentOps>, pasid: Pasid, name: &str) -> Self {
        Self { ops, ioas: None, pasid: Some(pasid), name: name.into() }
    }

    /// What the device can do.
    pub fn capabilities(&self) -> Capabilities {
        self.ops.capabilities()
    }

    /// Addresses that the device can use in this space.
    pub fn usable_iovas(&self) -> Vec<IovaRange> {
        self.ioas.as_ref().map_or_else(Vec::new, Ioas::usable_iovas)
    }

    /// The next access of the device in this space that was refused, where the IOMMU reports that
    /// ([`Capabilities::fault_reporting`]); it does not wait. Whoever wants to know polls: nothing here runs by itself.
    ///
    /// With iommufd these are a device's page requests (PCI PRI): all DMA memory is in place from the moment that it is
    /// mapped, so a page that a device asks for is one that it may not have. It is told so. Several PASIDs of a device in
    /// one space share their queue: each attachment hands out the faults of all of them.
    pub fn next_fault(&self) -> Result<Option<Fault>> {
        self.ops.next_fault().map_err(|error| error.device(self.name.to_string()))
    }

    /// Begins to track which pages the devices in this space write, or ends it. All pages are clean at the beginning.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] without [`Capabilities::dirty_tracking`].
    pub fn track_dirty(&self, on: bool) -> Result<()> {
        self.ops.track_dirty(on).map_err(|error| error.device(self.name.to_string()))
    }

    /// The pages of `range` that were written since tracking began or they were last cleared, in ascending order, in units
    /// of `page_size`. An IOMMU tracks whole pages of its own: one write to a page of 2 MiB makes each 4 KiB of it dirty.
    /// `clear` makes them clean again.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] for a range that is not whole pages, or more than 2^32 of them;
    /// [`ErrorKind::Unsupported`] without [`Capabilities::dirty_tracking`].
    pub fn dirty_pages(&self, range: IovaRange, page_size: PageSize, clear: bool) -> Result<Vec<Iova>> {
        /// So that the bits of all pages take half a GiB at most.
        const MOST_PAGES: u64 = 1 << 32;
        let invalid = |why: String, mend: &'static str| {
            let operation = format!("tell the written pages of {range}");
            Err(Error::new(ErrorKind::InvalidInput, operation, why).device(self.name.to_string()).mend(mend))
        };
        let is_whole = range.first.is_aligned_to(page_size.bytes())
            && range.last.wrapping_add(1).is_aligned_to(page_size.bytes())
            && range.first <= range.last;
        if !is_whole {
            let why = format!("these are not whole pages of {page_size}");
            return invalid(why, "ask for what a mapping covers, or for smaller pages");
        }
        if (range.last.get() - range.first.get()) / page_size.bytes() >= MOST_PAGES {
            return invalid(
                format!("these are more than {MOST_PAGES} pages"),
                "ask for what a mapping covers",
            );
        }
        let pages = self.ops.dirty_pages(range, page_size, clear);
        pages.map_err(|error| error.device(self.name.to_string()))
    }

    /// The space; `None` for one attached to the process's own (SVA).
    pub fn ioas(&self) -> Option<&Ioas> {
        self.ioas.as_ref()
    }

    /// The PASID; `None` is the device's own (RID) address space.
    pub fn pasid(&self) -> Option<Pasid> {
        self.pasid
    }

    /// The device's name.
    pub fn name(&self) -> &str {
        &self.name
    }
}

impl fmt::Debug for Attachment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Attachment({}, pasid {:?}, {:?})", self.name, self.pasid, self.ioas)
    }
}
