//! Hardware page tables: the one that a device has in an address space, with what it can do there.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::fault::RequestQueue;
use super::{Device, Object, calls, refusal, uapi};
use crate::vendor::Registers;
use crate::{Capabilities, Error, ErrorKind, Fault, Iova, IovaRange, PageSize, Pasid, Result};

const PASID: u32 = uapi::iommufd_hwpt_alloc_flags_IOMMU_HWPT_ALLOC_PASID;
const DIRTY: u32 = uapi::iommufd_hwpt_alloc_flags_IOMMU_HWPT_ALLOC_DIRTY_TRACKING;

/// What the kernel says of the IOMMU behind a device.
#[derive(Debug, Clone, Copy)]
pub(super) struct Hardware {
    pub(super) registers: Registers,
    /// Bits of a PASID, as far as device, IOMMU and kernel all have them; 0 is no PASIDs.
    pub(super) pasid_width: u32,
    dirty_tracking: bool,
    /// The device does DMA by itself. A mediated device has the kernel do it, and no page tables.
    is_physical: bool,
}

impl Hardware {
    fn of(ioas: &Object, device: &dyn Device) -> Result<Self> {
        let mut data = [0; Registers::MAX_LEN];
        match calls::hw_info(ioas.fd(), device.id(), &mut data) {
            Ok(info) => {
                let capability = uapi::iommufd_hw_capabilities_IOMMU_HW_CAP_DIRTY_TRACKING;
                // As much as the kernel has, which may be more than was asked for.
                let data = &data[..data.len().min(info.data_len as usize)];
                Ok(Self {
                    registers: Registers::new(calls::hw_info_type(&info), data),
                    pasid_width: info.out_max_pasid_log2.into(),
                    dirty_tracking: info.out_capabilities & u64::from(capability) != 0,
                    is_physical: true,
                })
            }
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) && is_mediated(ioas, device) => {
                Ok(Self {
                    registers: Registers::Unknown,
                    pasid_width: 0,
                    dirty_tracking: false,
                    is_physical: false,
                })
            }
            Err(error) => Err(refusal::hardware(error)),
        }
    }
}

/// Whether the iommufd knows the device's id, but not as that of one behind an IOMMU: it makes no page table for it
/// either.
fn is_mediated(ioas: &Object, device: &dyn Device) -> bool {
    match calls::hwpt_alloc(ioas.fd(), ioas.id, device.id(), 0, None) {
        Ok(id) => {
            drop(Object::new(&ioas.iommufd, id, "page table"));
            false
        }
        Err(error) => error.raw_os_error() == Some(libc::ENOENT),
    }
}

/// What a device, and each PASID of it, is attached to in an address space.
#[derive(Debug)]
pub(super) struct PageTable {
    // In this order: the page table uses the queue, and both the address space. Devices of one IOMMU group share the first
    // two.
    hwpt: Option<Arc<Object>>,
    requests: Option<Arc<RequestQueue>>,
    ioas: Arc<Object>,
    flags: u32,
    hardware: Hardware,
}

impl PageTable {
    /// Makes the one of `device` in `ioas`, with as many as it can have of: tracking of written pages, PASIDs, and
    /// reports of page requests if `page_faults`.
    pub(super) fn new(ioas: &Arc<Object>, device: &dyn Device, page_faults: bool) -> Result<Self> {
        let hardware = Hardware::of(ioas, device)?;
        let mut this = Self { hwpt: None, requests: None, ioas: Arc::clone(ioas), flags: 0, hardware };
        if !hardware.is_physical {
            return Ok(this);
        }
        let options = ioas.iommufd.options();
        let mut requests = if page_faults { RequestQueue::new(ioas, device)? } else { None };
        let dirty = if options.dirty_tracking && hardware.dirty_tracking { DIRTY } else { 0 };
        // Where the kernel has PASIDs for the device, the RID's page table needs the flag too, or no PASID is attached
        // beside it.
        let pasid = if hardware.pasid_width != 0 { PASID } else { 0 };
        let flags: &[u32] = if dirty == 0 || pasid == 0 {
            &[dirty | pasid, 0]
        } else {
            // Not every IOMMU has both in one format of page tables.
            &[dirty | pasid, dirty, pasid, 0]
        };
        for (flags, with_requests) in flags.iter().flat_map(|&flags| [(flags, true), (flags, false)]) {
            let queue = requests.as_ref().map(RequestQueue::id);
            if with_requests && queue.is_none() {
                continue;
            }
            let queue = queue.filter(|_| with_requests);
            match calls::hwpt_alloc(ioas.fd(), ioas.id, device.id(), flags, queue) {
                Ok(id) => {
                    this.hwpt = Some(Arc::new(Object::new(&ioas.iommufd, id, "page table")));
                    this.requests = requests.take().filter(|_| with_requests).map(Arc::new);
                    this.flags = flags;
                    return Ok(this);
                }
                Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {}
                Err(error) => return Err(refusal::page_table(error, ioas.iommufd.pinned().bytes())),
            }
        }
        // An IOMMU whose page tables come into being with the attachment (virtio-iommu).
        Ok(this)
    }

    /// That of `other`, for this one's device: what a device can do it does not share.
    pub(super) fn shared_with(&self, other: &Self) -> Self {
        Self {
            hwpt: other.hwpt.clone(),
            requests: other.requests.clone(),
            ioas: Arc::clone(&other.ioas),
            flags: other.flags,
            hardware: self.hardware,
        }
    }

    /// What to attach to: the page table, or the address space where the kernel makes page tables by itself.
    pub(super) fn id(&self) -> u32 {
        self.hwpt.as_ref().map_or(self.ioas.id, |hwpt| hwpt.id)
    }

    /// Whether the kernel decides what page table it will be.
    pub(super) fn is_automatic(&self) -> bool {
        self.hwpt.is_none()
    }

    pub(super) fn reports_requests(&self) -> bool {
        self.requests.is_some()
    }

    pub(super) fn capabilities(&self) -> Capabilities {
        let width = if self.flags & PASID == 0 { 0 } else { self.hardware.pasid_width };
        Capabilities {
            fault_reporting: self.reports_requests(),
            dirty_tracking: self.flags & DIRTY != 0,
            ..self.hardware.registers.capabilities(width)
        }
    }

    /// Says whether `pasid` can be attached at all; the kernel would attach one that the device does not have.
    pub(super) fn check(&self, pasid: Pasid) -> Result<()> {
        let hardware = &self.hardware;
        if !hardware.is_physical {
            return Err(refusal::pasid_of_mediated(pasid));
        }
        if hardware.pasid_width == 0 {
            return Err(refusal::no_pasids(pasid, &hardware.registers, refusal::kernel_release().as_deref()));
        }
        let above = 1_u64 << hardware.pasid_width;
        if u64::from(pasid.get()) >= above {
            return Err(refusal::pasid_too_large(pasid, above - 1));
        }
        if self.flags & PASID == 0 {
            return Err(refusal::page_table_without_pasids(pasid, self.flags & DIRTY != 0));
        }
        Ok(())
    }

    /// What the kernel's refusal to attach means.
    pub(super) fn attach_refused(&self, error: &Error, pasid: Option<Pasid>) -> Error {
        refusal::attach(error.errno(), pasid, &self.hardware.registers, self.ioas.iommufd.pinned().bytes())
    }

    pub(super) fn next_fault(&self) -> Result<Option<Fault>> {
        self.requests.as_ref().map_or(Ok(None), |requests| requests.next())
    }

    pub(super) fn track_dirty(&self, on: bool) -> Result<()> {
        let hwpt = self.tracker()?;
        calls::set_dirty_tracking(hwpt.fd(), hwpt.id, on).map_err(|error| {
            let operation = if on { "begin to track written pages" } else { "stop tracking written pages" };
            Error::os(operation, "the kernel refuses", error)
        })
    }

    pub(super) fn dirty_pages(&self, range: IovaRange, size: PageSize, clear: bool) -> Result<Vec<Iova>> {
        let hwpt = self.tracker()?;
        let bitmap =
            calls::dirty_bitmap(hwpt.fd(), hwpt.id, range, size.bytes(), clear).map_err(|error| {
                Error::os(format!("tell the written pages of {range}"), "the kernel refuses", error)
            })?;
        Ok(pages_in(&bitmap, range, size))
    }

    fn tracker(&self) -> Result<&Object> {
        self.hwpt.as_deref().filter(|_| self.flags & DIRTY != 0).ok_or_else(|| {
            let why = if self.ioas.iommufd.options().dirty_tracking {
                "the IOMMU can not"
            } else {
                "the iommufd was not opened with Options::dirty_tracking"
            };
            Error::new(ErrorKind::Unsupported, "track written pages", why)
                .mend("open the iommufd with dirty tracking, on an IOMMU that has it")
        })
    }
}

/// The pages whose bits are set: bit n is that of the n-th page of `range`.
fn pages_in(bitmap: &[u64], range: IovaRange, size: PageSize) -> Vec<Iova> {
    let pages = (range.last.get() - range.first.get()) / size.bytes();
    (0..=pages)
        .filter(|page| bitmap.get((page / 64) as usize).is_some_and(|word| word >> (page % 64) & 1 == 1))
        .map(|page| Iova::new(range.first.get() + page * size.bytes()))
        .collect()
}

/// The page tables of one address space, a device each, for as long as somebody is attached to them.
#[derive(Debug, Default)]
pub(super) struct PageTables(Mutex<Vec<(u32, std::sync::Weak<PageTable>)>>);

impl PageTables {
    fn lock(&self) -> MutexGuard<'_, Vec<(u32, std::sync::Weak<PageTable>)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// That of the device with this id.
    pub(super) fn get(&self, device: u32) -> Option<Arc<PageTable>> {
        self.lock().iter().find(|(id, _)| *id == device).and_then(|(_, table)| table.upgrade())
    }

    /// Those of all others.
    pub(super) fn of_others(&self, device: u32) -> Vec<Arc<PageTable>> {
        self.lock().iter().filter(|(id, _)| *id != device).filter_map(|(_, table)| table.upgrade()).collect()
    }

    /// From now on the device has this one.
    pub(super) fn set(&self, device: u32, table: &Arc<PageTable>) {
        let mut tables = self.lock();
        tables.retain(|(id, table)| *id != device && table.strong_count() != 0);
        tables.push((device, Arc::downgrade(table)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_set_bit_is_a_page() {
        let range = IovaRange::sized(Iova::new(0x10_0000), 130 * 4096).unwrap();
        let bitmap = [1 | 1 << 63, 0, 0b10 | u64::MAX << 2];
        let pages = pages_in(&bitmap, range, PageSize::Size4K);
        assert_eq!(
            pages,
            [0, 63, 129].map(|page: u64| Iova::new(0x10_0000 + page * 4096)),
            "130 pages, no more"
        );
        let huge = IovaRange::sized(Iova::new(1 << 30), 4 << 20).unwrap();
        assert_eq!(pages_in(&[0b10], huge, PageSize::Size2M), [Iova::new((1 << 30) + (2 << 20))]);
        assert_eq!(pages_in(&[0], huge, PageSize::Size2M), []);
    }
}
