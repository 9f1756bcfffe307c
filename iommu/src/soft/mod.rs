//! An IOMMU in software, and the way to memory of the devices behind it.
//!
//! It is a real one in what it enforces: each device has a table of address spaces by PASID and one for its own
//! (RID) requests, page tables mix 4 KiB, 2 MiB and 1 GiB pages with read and write rights, translations are cached in
//! an IOTLB that every unmap invalidates, and what is refused is recorded. An unmap or detach returns only when no
//! DMA that is in flight can still touch the memory. The device's side takes no lock.
//!
//! ```
//! use underpass_iommu::{Access, FaultReason, IommuBackend, Region, soft::SoftIommu};
//! # fn main() -> underpass_iommu::Result<()> {
//! let iommu = SoftIommu::new(Default::default());
//! let device = iommu.device("soft:example");
//! let ioas = iommu.alloc_ioas()?;
//! let _attachment = ioas.attach(&device, None)?;
//! let region = Region::builder(4096).build()?;
//! let mapping = ioas.map(&region, Access::READ)?;
//!
//! let mut bus = device.bus();
//! let mut word = [0; 4];
//! assert!(bus.read(None, mapping.iova(), &mut word).is_ok());
//! assert_eq!(bus.write(None, mapping.iova(), &word).unwrap_err().reason, FaultReason::Permission);
//! # Ok(())
//! # }
//! ```
//!
//! # Why `unsafe` is here
//! Detaching gives a context back that a device may have been reading without a lock: see `device`. The other modules
//! state their own invariants: `table` (nodes), `bus` (the copies), `sva` (this process's own addresses), `guard` (a
//! system call).

mod bus;
mod device;
mod guard;
mod leases;
mod sva;
mod table;
#[cfg(all(test, not(loom)))]
mod tests;
mod tlb;

use std::fmt;
use std::ptr;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

pub use bus::{Bus, DmaFault};
pub use device::SoftDevice;

use crate::{
    Access, Attachable, AttachableKind, Attachment, AttachmentOps, Capabilities, Error, ErrorKind, Ioas,
    IoasOps, IommuBackend, Iova, IovaRange, Leases, PageSize, PageSizes, Pasid, Region, Result, SvaToken,
    Vendor,
};
use leases::LeaseList;
use table::Table;

/// How a software IOMMU is made.
#[derive(Debug, Clone)]
pub struct SoftOptions {
    /// Let devices access only memory that their driver has handed to them (`check=leases`). Slow; for tests.
    pub check_leases: bool,
    /// PASIDs are numbered from 1 to this; at most 2^20 - 1. With 0, devices have none.
    pub max_pasids: u32,
    /// Width of an IOVA in bits, at most 48.
    pub address_width: u32,
    /// Sizes of pages that one entry maps; 4 KiB is always among them.
    pub page_sizes: PageSizes,
    /// Addresses that can not be used: by default x86's window for message-signalled interrupts.
    pub reserved: Vec<IovaRange>,
    /// Fault records that a device's queue holds.
    pub fault_records: usize,
}

impl Default for SoftOptions {
    fn default() -> Self {
        Self {
            check_leases: false,
            max_pasids: (1 << 20) - 1,
            address_width: table::ADDRESS_BITS,
            page_sizes: PageSizes::ALL,
            reserved: vec![IovaRange { first: Iova::new(0xfee0_0000), last: Iova::new(0xfeef_ffff) }],
            fault_records: 256,
        }
    }
}

/// An IOMMU in software. A handle: clones name the same IOMMU.
#[derive(Debug, Clone)]
pub struct SoftIommu {
    options: Arc<SoftOptions>,
}

impl SoftIommu {
    /// An IOMMU with no devices behind it yet.
    pub fn new(mut options: SoftOptions) -> Self {
        options.address_width = options.address_width.clamp(PageSize::Size1G.shift(), table::ADDRESS_BITS);
        options.max_pasids = options.max_pasids.min((1 << 20) - 1);
        options.fault_records = options.fault_records.max(1);
        Self { options: Arc::new(options) }
    }

    /// How it was made.
    pub fn options(&self) -> &SoftOptions {
        &self.options
    }

    /// Puts a new device behind this IOMMU, attached to nothing.
    pub fn device(&self, name: &str) -> Arc<SoftDevice> {
        SoftDevice::new(name, self.clone())
    }

    fn soft_device<'a>(&self, device: &'a dyn Attachable) -> Result<&'a Arc<SoftDevice>> {
        match device.kind() {
            AttachableKind::Soft(soft) if Arc::ptr_eq(&soft.iommu.options, &self.options) => Ok(soft),
            AttachableKind::Soft(_) => Err(Error::new(
                ErrorKind::InvalidInput,
                "attach the device to an address space",
                "the device is behind another software IOMMU",
            )
            .mend("allocate the address space from the IOMMU that the device was made with")),
            _ => Err(Error::new(
                ErrorKind::InvalidInput,
                "attach the device to an address space",
                "it is no software device, and the address space is of the software IOMMU",
            )
            .mend("allocate the address space from the device's own IOMMU")),
        }
    }
}

impl IommuBackend for SoftIommu {
    fn name(&self) -> &'static str {
        "soft"
    }

    fn alloc_ioas(&self) -> Result<Ioas> {
        let leases = self.options.check_leases.then(LeaseList::default);
        let domain = Domain { table: Table::new(), leases, devices: Mutex::default() };
        Ok(Ioas::from_ops(Box::new(SoftIoas { iommu: self.clone(), domain: Arc::new(domain) })))
    }

    fn attach_sva(&self, device: &dyn Attachable, pasid: Pasid, _token: SvaToken) -> Result<Attachment> {
        sva::available()?;
        let soft = self.soft_device(device)?;
        let ops = SoftAttachment::new(soft, Some(pasid), Context::Process)?;
        Ok(Attachment::from_sva(Box::new(ops), pasid, device.name()))
    }
}

/// One address space: tables, and the devices that may have its translations cached.
#[derive(Debug)]
struct Domain {
    table: Table,
    leases: Option<LeaseList>,
    /// One entry an attachment.
    devices: Mutex<Vec<Arc<SoftDevice>>>,
}

impl Domain {
    fn devices(&self) -> MutexGuard<'_, Vec<Arc<SoftDevice>>> {
        self.devices.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns once no access can use what was taken out of the tables or leases before this call.
    fn invalidate(&self) {
        let waiting: Vec<_> = self.devices().iter().map(|device| device.invalidate()).collect();
        guard::wait_for(&waiting);
    }
}

struct SoftIoas {
    iommu: SoftIommu,
    domain: Arc<Domain>,
}

impl fmt::Debug for SoftIoas {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "soft IOAS {:p}", Arc::as_ptr(&self.domain))
    }
}

impl IoasOps for SoftIoas {
    fn attach(&self, device: &dyn Attachable, pasid: Option<Pasid>) -> Result<Box<dyn AttachmentOps>> {
        let soft = self.iommu.soft_device(device)?;
        Ok(Box::new(SoftAttachment::new(soft, pasid, Context::Domain(Arc::clone(&self.domain)))?))
    }

    fn usable_iovas(&self) -> Vec<IovaRange> {
        let options = self.iommu.options();
        let mut reserved = options.reserved.clone();
        reserved.sort_by_key(|range| range.first);
        let last = (1 << options.address_width) - 1;
        let (mut usable, mut at) = (Vec::new(), 0);
        for hole in reserved {
            if hole.first.get() > last {
                break;
            }
            if hole.first.get() > at {
                usable.push(IovaRange { first: Iova::new(at), last: Iova::new(hole.first.get() - 1) });
            }
            at = at.max(hole.last.get().saturating_add(1));
        }
        if at <= last {
            usable.push(IovaRange { first: Iova::new(at), last: Iova::new(last) });
        }
        usable
    }

    fn map(&self, iova: Iova, region: &Arc<Region>, access: Access) -> Result<()> {
        let sizes = self.iommu.options().page_sizes;
        // Pages of the IOMMU are never larger than those of the memory: a real one maps physical pages.
        let size = PageSize::LARGEST_FIRST
            .into_iter()
            .find(|size| *size <= region.page_size() && sizes.contains(*size))
            .unwrap_or(PageSize::Size4K);
        let host = region.as_ptr().as_ptr().expose_provenance() as u64;
        let result = self.domain.table.map(iova, host, region.len(), size, access);
        let retired = self.domain.table.take_retired();
        // Devices may have seen what is gone again: nodes in whose place a large page came, and the leaves that a map
        // wrote before it found its range taken.
        if result.is_err() || !retired.is_empty() {
            self.domain.invalidate();
            drop(retired);
        }
        result
    }

    fn unmap(&self, iova: Iova, region: &Region) -> Result<()> {
        let len = region.len();
        let unmapped = self.domain.table.unmap(iova, len);
        if let Some(leases) = &self.domain.leases {
            leases.clear(iova, len);
        }
        self.domain.invalidate();
        if unmapped == len {
            return Ok(());
        }
        Err(Error::new(
            ErrorKind::InvalidInput,
            format!("unmap {len} bytes at {iova}"),
            format!("only {unmapped} of them were mapped"),
        )
        .mend("unmap exactly what was mapped"))
    }

    fn leases(&self) -> Option<Arc<dyn Leases>> {
        self.domain.leases.as_ref()?;
        Some(Arc::clone(&self.domain) as Arc<dyn Leases>)
    }
}

impl Leases for Domain {
    fn grant(&self, iova: Iova, len: u64, access: Access) {
        if let Some(leases) = &self.leases {
            leases.grant(iova, len, access);
        }
    }

    fn take_back(&self, iova: Iova, len: u64, access: Access) {
        let Some(leases) = &self.leases else { return };
        if !leases.take_back(iova, len, access) {
            tracing::error!(
                "{len} bytes at {iova} come back from a device ({access}) that did not have them"
            );
        }
        self.invalidate();
    }
}

/// What one PASID of a device is attached to.
#[derive(Debug, Clone)]
enum Context {
    /// An address space of its own.
    Domain(Arc<Domain>),
    /// This process's (SVA).
    Process,
}

/// One PASID of a device (or its RID) attached to something. Detaches when dropped.
#[derive(Debug)]
struct SoftAttachment {
    device: Arc<SoftDevice>,
    pasid: Option<Pasid>,
    context: Context,
}

impl SoftAttachment {
    fn new(device: &Arc<SoftDevice>, pasid: Option<Pasid>, context: Context) -> Result<Self> {
        let max = device.iommu.options.max_pasids;
        if let Some(pasid) = pasid
            && pasid.get() > max
        {
            return Err(Error::new(
                ErrorKind::Exhausted,
                format!("attach PASID {pasid}"),
                format!("the IOMMU has {max} PASIDs, numbered from 1"),
            )
            .mend("use fewer queues"));
        }
        let _lock = device.attach_lock();
        let cell = device.cell_or_new(pasid);
        if !cell.0.load(Ordering::Relaxed).is_null() {
            let what = pasid.map_or_else(|| "the device".to_owned(), |pasid| format!("PASID {pasid}"));
            return Err(Error::new(ErrorKind::Busy, format!("attach {what}"), "it is attached already")
                .mend("drop the earlier attachment first"));
        }
        if let Context::Domain(domain) = &context {
            domain.devices().push(Arc::clone(device));
        }
        let published = Arc::into_raw(Arc::new(context.clone())).cast_mut();
        // Release: pairs with the Acquire in `SoftDevice::context`.
        cell.0.store(published, Ordering::Release);
        Ok(Self { device: Arc::clone(device), pasid, context })
    }
}

impl AttachmentOps for SoftAttachment {
    fn capabilities(&self) -> Capabilities {
        let options = &self.device.iommu.options;
        Capabilities {
            max_pasids: options.max_pasids,
            page_sizes: PageSizes(options.page_sizes.0 | PageSize::Size4K.bytes()),
            fault_reporting: true,
            dirty_tracking: false,
            vendor: Vendor::Software,
        }
    }
}

impl Drop for SoftAttachment {
    fn drop(&mut self) {
        let _lock = self.device.attach_lock();
        let cell = self.device.cell_or_new(self.pasid);
        let context = cell.0.swap(ptr::null_mut(), Ordering::AcqRel);
        guard::wait_for(&[self.device.invalidate()]);
        // SAFETY: it came from Arc::into_raw in `new`, was taken out of its cell, and every access that could
        // have seen it is over.
        drop(unsafe { Arc::from_raw(context) });
        if let Context::Domain(domain) = &self.context {
            let mut devices = domain.devices();
            if let Some(at) = devices.iter().position(|device| Arc::ptr_eq(device, &self.device)) {
                devices.swap_remove(at);
            }
        }
    }
}
