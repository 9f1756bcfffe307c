//! An address space of the kernel's, and what is attached to it.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::hwpt::{PageTable, PageTables};
use super::{Device, Iommufd, Object, calls, insist, refusal, uapi};
use crate::{
    Access, Attachable, AttachableKind, AttachmentOps, Capabilities, Error, ErrorKind, Fault, IoasOps, Iova,
    IovaRange, PageSize, Pasid, Region, Result,
};

/// An IOAS.
#[derive(Debug)]
pub(super) struct KernelIoas {
    object: Arc<Object>,
    tables: PageTables,
    /// As the kernel said after the last attachment.
    usable: Mutex<Vec<IovaRange>>,
}

impl KernelIoas {
    pub(super) fn new(iommufd: &Iommufd) -> Result<Self> {
        let id = calls::ioas_alloc(&iommufd.0.fd).map_err(refusal::alloc_ioas)?;
        let object = Object::new(iommufd, id, "address space");
        let options = iommufd.options();
        if !options.huge_pages {
            let option = uapi::iommufd_option_IOMMU_OPTION_HUGE_PAGES;
            calls::set_option(object.fd(), option, id, 0).map_err(refusal::alloc_ioas)?;
        }
        if !options.required_iovas.is_empty() {
            calls::ioas_allow_iovas(object.fd(), id, &options.required_iovas)
                .map_err(refusal::required_iovas)?;
        }
        let this = Self { object: Arc::new(object), tables: PageTables::default(), usable: Mutex::default() };
        this.ask_for_usable_iovas()?;
        Ok(this)
    }

    fn iommufd(&self) -> &Iommufd {
        &self.object.iommufd
    }

    fn usable(&self) -> MutexGuard<'_, Vec<IovaRange>> {
        // A change is one assignment, so a poisoned lock holds sound ranges.
        self.usable.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn ask_for_usable_iovas(&self) -> Result<()> {
        let ranges = calls::ioas_iova_ranges(self.object.fd(), self.object.id).map_err(|error| {
            Error::os("ask for the addresses that devices can use", "the kernel refuses", error)
        })?;
        *self.usable() = ranges;
        Ok(())
    }

    /// The device's page table in this space: the one that it has, or a new one.
    fn table(&self, device: &dyn Device) -> Result<Arc<PageTable>> {
        match self.tables.get(device.id()) {
            Some(table) => Ok(table),
            None => self.new_table(device, self.iommufd().options().page_faults),
        }
    }

    fn new_table(&self, device: &dyn Device, page_faults: bool) -> Result<Arc<PageTable>> {
        PageTable::new(&self.object, device, page_faults).map(Arc::new)
    }

    /// Attaches the device to `table`, or to another that the kernel takes instead, and returns that.
    fn attach_to(
        &self,
        table: Arc<PageTable>,
        device: &dyn Device,
        pasid: Option<Pasid>,
    ) -> Result<Arc<PageTable>> {
        let refused = match attach(&table, device, pasid) {
            Ok(()) => return Ok(table),
            Err(refused) => refused,
        };
        // A device without PRI, or a virtual function with it, takes no page table that reports requests.
        if table.reports_requests()
            && matches!(refused.errno(), Some(libc::EINVAL | libc::ENODEV | libc::EOPNOTSUPP))
        {
            let table = self.new_table(device, false)?;
            return self.attach_to(table, device, pasid);
        }
        // The devices of one IOMMU group can not tell their requests apart for the IOMMU: the kernel has them attached to
        // one page table.
        if refused.errno() == Some(libc::EINVAL) {
            let others = self.tables.of_others(device.id());
            let shared = others.into_iter().find(|other| attach(other, device, pasid).is_ok());
            if let Some(shared) = shared {
                return Ok(Arc::new(table.shared_with(&shared)));
            }
        }
        Err(if refused.errno().is_some() { table.attach_refused(&refused, pasid) } else { refused })
    }
}

/// Attaches the device to exactly this page table.
fn attach(table: &PageTable, device: &dyn Device, pasid: Option<Pasid>) -> Result<()> {
    let chosen = device.attach(table.id(), pasid)?;
    if chosen == table.id() || table.is_automatic() {
        return Ok(());
    }
    device.detach(pasid)?;
    Err(Error::new(
        ErrorKind::Os,
        "attach the device",
        format!("the kernel attached it to page table {chosen} and not to {}", table.id()),
    )
    .mend("this is a bug of the kernel or of this library: please report it"))
}

impl IoasOps for KernelIoas {
    fn attach(&self, device: &dyn Attachable, pasid: Option<Pasid>) -> Result<Box<dyn AttachmentOps>> {
        let AttachableKind::Iommufd(device) = device.kind() else {
            return Err(refusal::not_bound());
        };
        if !Arc::ptr_eq(&device.iommufd().0, &self.iommufd().0) {
            return Err(refusal::other_iommufd());
        }
        let claim = Claim::new(self.iommufd(), device, pasid)?;
        let table = self.table(&**device)?;
        if let Some(pasid) = pasid {
            table.check(pasid)?;
        }
        let table = self.attach_to(table, &**device, pasid)?;
        self.tables.set(device.id(), &table);
        let attached = KernelAttachment { table, claim };
        // On failure the attachment is dropped, and with it the device detached.
        self.ask_for_usable_iovas()?;
        Ok(Box::new(attached))
    }

    fn usable_iovas(&self) -> Vec<IovaRange> {
        self.usable().clone()
    }

    fn map(&self, iova: Iova, region: &Arc<Region>, access: Access) -> Result<()> {
        let fd = self.object.fd();
        self.iommufd().pinned().map(fd, (self.object.id, iova), region, access)
    }

    fn unmap(&self, iova: Iova, region: &Region) -> Result<()> {
        let place = (self.object.id, iova);
        // What could not be unmapped may be reached and copied from: then neither it nor its id goes.
        let unmapped = self.iommufd().pinned().unmap(self.object.fd(), place, region);
        unmapped.inspect_err(|_| self.object.keep())
    }
}

/// The right to attach a device, or one PASID of it: the kernel would replace what is attached already.
#[derive(Debug)]
struct Claim {
    iommufd: Iommufd,
    device: Arc<dyn Device>,
    pasid: Option<Pasid>,
}

impl Claim {
    fn new(iommufd: &Iommufd, device: &Arc<dyn Device>, pasid: Option<Pasid>) -> Result<Self> {
        if !iommufd.0.attached().insert((device.id(), pasid)) {
            let what = pasid.map_or_else(|| "the device".to_owned(), |pasid| format!("PASID {pasid}"));
            return Err(Error::new(ErrorKind::Busy, format!("attach {what}"), "it is attached already")
                .mend("drop the earlier attachment first"));
        }
        Ok(Self { iommufd: iommufd.clone(), device: Arc::clone(device), pasid })
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.iommufd.0.attached().remove(&(self.device.id(), self.pasid));
    }
}

/// A device, or one PASID of it, attached to a page table. Detaches when dropped.
#[derive(Debug)]
struct KernelAttachment {
    // In this order: the page table is found by the device's id, which another device can have once nobody holds this one.
    table: Arc<PageTable>,
    claim: Claim,
}

impl AttachmentOps for KernelAttachment {
    fn capabilities(&self) -> Capabilities {
        self.table.capabilities()
    }

    fn next_fault(&self) -> Result<Option<Fault>> {
        self.table.next_fault()
    }

    fn track_dirty(&self, on: bool) -> Result<()> {
        self.table.track_dirty(on)
    }

    fn dirty_pages(&self, range: IovaRange, page_size: PageSize, clear: bool) -> Result<Vec<Iova>> {
        self.table.dirty_pages(range, page_size, clear)
    }
}

impl Drop for KernelAttachment {
    fn drop(&mut self) {
        let Claim { device, pasid, .. } = &self.claim;
        if let Err(error) = insist(|| device.detach(*pasid)) {
            // What is mapped there is still taken from the page table by its unmap, or leaked.
            tracing::error!("{}: {error}; it stays attached until it is closed", device.name());
        }
    }
}
