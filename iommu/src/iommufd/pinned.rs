//! Which regions are mapped where, so that each is pinned once however many address spaces map it.
//!
//! The kernel pins a region's pages with `IOMMU_IOAS_MAP` and lets every `IOMMU_IOAS_COPY` share them. It pins them writable
//! or not, by what the first mapping asks for, and refuses a writable copy of the latter. So a region whose first mapping is
//! only to be read is mapped, writable, in an address space that no device is ever attached to, and copied from there.

use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::calls::{self, IommuFd};
use super::{Iommufd, insist, refusal};
use crate::{Access, Iova, Region, RegionId, Result};

/// A region's place: the id of an address space, and where in it.
type Place = (u32, Iova);

/// Every region that is mapped through one iommufd.
#[derive(Debug, Default)]
pub(super) struct Pinned {
    /// By [`RegionId::index`], as far as regions were ever mapped. The inner lock is held while the kernel works on the
    /// region, so that what is copied from stays.
    regions: Mutex<Vec<Arc<Mutex<Mapped>>>>,
    /// The address space without devices, once one was needed.
    aside: Mutex<Option<u32>>,
    /// Bytes of all regions that are mapped somewhere.
    bytes: AtomicU64,
    /// The kernel knows no `IOMMU_IOAS_MAP_FILE`.
    no_files: AtomicBool,
}

/// Where one region is mapped.
#[derive(Debug, Default)]
struct Mapped {
    places: Vec<Place>,
    /// The one aside, from which the others were copied.
    aside: Option<Place>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Every change follows a system call and is one assignment, push or removal: a poisoned lock holds what is so.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Pinned {
    /// Bytes that count as locked on behalf of this iommufd.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    fn region(&self, id: RegionId) -> Arc<Mutex<Mapped>> {
        let mut regions = lock(&self.regions);
        if regions.len() <= id.index() {
            regions.resize_with(id.index() + 1, Arc::default);
        }
        Arc::clone(&regions[id.index()])
    }

    /// Maps `region` at `to`.
    pub(super) fn map(&self, fd: &IommuFd, to: Place, region: &Region, access: Access) -> Result<()> {
        let entry = self.region(region.id());
        let mut mapped = lock(&entry);
        let refused = |error| refusal::map(error, region, to.1, self.bytes());
        let is_first = mapped.places.is_empty();
        let source = mapped.aside.or_else(|| mapped.places.first().copied());
        match source {
            Some(from) => calls::ioas_copy(fd, to, from, region.len(), access).map_err(refused)?,
            None if access.allows(Access::WRITE) => {
                self.pin(fd, to, region, access).map_err(refused)?;
            }
            None => {
                let from = (self.aside(fd)?, aside_iova(region));
                self.pin(fd, from, region, Access::READ_WRITE).map_err(refused)?;
                if let Err(error) = calls::ioas_copy(fd, to, from, region.len(), access) {
                    unmap_aside(fd, from, region.len());
                    return Err(refused(error));
                }
                mapped.aside = Some(from);
            }
        }
        mapped.places.push(to);
        if is_first {
            self.bytes.fetch_add(region.len(), Ordering::Relaxed);
        }
        Ok(())
    }

    /// Undoes [`map`](Self::map) of `region` at `place`.
    pub(super) fn unmap(&self, fd: &IommuFd, place: Place, region: &Region) -> Result<()> {
        let (entry, len) = (self.region(region.id()), region.len());
        let mut mapped = lock(&entry);
        unmap_exactly(fd, place, len)?;
        mapped.places.retain(|other| *other != place);
        if mapped.places.is_empty() {
            self.bytes.fetch_sub(len, Ordering::Relaxed);
            if let Some(aside) = mapped.aside.take() {
                unmap_aside(fd, aside, len);
            }
        }
        Ok(())
    }

    /// Maps `region` and has its pages pinned: by its file where there is one, since the kernel then takes huge pages whole,
    /// and whatever becomes of this process's address space does not matter.
    fn pin(&self, fd: &IommuFd, to: Place, region: &Region, access: Access) -> std::io::Result<()> {
        let file: Option<BorrowedFd<'_>> = region.fd().ok();
        if let Some(file) = file.filter(|_| !self.no_files.load(Ordering::Relaxed)) {
            match calls::ioas_map_file(fd, to.0, to.1, (file, region.len()), access) {
                Err(error) if error.raw_os_error() == Some(libc::ENOTTY) => {
                    self.no_files.store(true, Ordering::Relaxed);
                }
                result => return result,
            }
        }
        calls::ioas_map(fd, to.0, to.1, region, access)
    }

    /// The address space without devices. It lasts until the iommufd is closed.
    fn aside(&self, fd: &IommuFd) -> Result<u32> {
        let mut aside = lock(&self.aside);
        if let Some(id) = *aside {
            return Ok(id);
        }
        let id = calls::ioas_alloc(fd).map_err(refusal::alloc_ioas)?;
        Ok(*aside.insert(id))
    }
}

/// Where a region is in the space that no device has: at its own address in this process, which no other region has.
fn aside_iova(region: &Region) -> Iova {
    Iova::new(region.as_ptr().addr().get() as u64)
}

fn unmap_exactly(fd: &IommuFd, (ioas, iova): Place, len: u64) -> Result<()> {
    match insist(|| calls::ioas_unmap(fd, ioas, iova, len)) {
        Ok(unmapped) if unmapped == len => Ok(()),
        Ok(unmapped) => Err(refusal::unmap_is_partial(iova, len, unmapped)),
        Err(error) => Err(refusal::unmap(error, iova, len)),
    }
}

/// No device can be there, so nothing but the kernel's own memory is lost if that fails.
fn unmap_aside(fd: &IommuFd, place: Place, len: u64) {
    if let Err(error) = unmap_exactly(fd, place, len) {
        tracing::error!("{error}; {len} bytes stay pinned until {} is closed", IommuFd::PATH);
    }
}

impl Iommufd {
    /// The regions that are mapped through it.
    pub(super) fn pinned(&self) -> &Pinned {
        &self.0.pinned
    }
}
