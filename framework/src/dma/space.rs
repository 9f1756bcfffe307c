//! Which memory one queue can address, and where.
//!
//! No unsafe code here: what has an address says so by [`DmaMemory`].

use std::fmt;
use std::sync::Arc;

use underpass_iommu::{Access, Error, ErrorKind, Ioas, Iova, Leases, Mapping, Region, Result};

use super::DmaMemory;
use super::pages::Pages;
use super::sealed::Span;

/// What one queue can address: an address space and a table from region to IOVA, so that finding a buffer's
/// IOVA is one load, and a buffer of a region that is not mapped is refused before the device sees it.
///
/// The owner keeps the order that DMA needs: it stops the device before it drops this, which unmaps.
pub struct DmaSpace {
    /// By region id: what to add to a pointer to get its IOVA, or [`NOT_MAPPED`].
    bases: Vec<u64>,
    /// Where regions are that the table does not have.
    elsewhere: Elsewhere,
    leases: Option<Arc<dyn Leases>>,
    mappings: Vec<Mapping>,
    ioas: Option<Ioas>,
}

/// Not a difference of two page-aligned addresses.
const NOT_MAPPED: u64 = u64::MAX;

/// Where regions are that have no base of their own.
#[derive(Debug)]
enum Elsewhere {
    /// By region id: in pages that are not neighbours, as it is without an IOMMU; those that have none are nowhere.
    InPages(Vec<Option<Pages>>),
    /// All of them where this process has them, under SVA: IOVA = VA.
    InProcess,
}

impl Elsewhere {
    /// A call, so that the callers' loops have the registers for what most address spaces need.
    #[cold]
    #[inline(never)]
    fn translate(&self, span: Span) -> Option<Iova> {
        match self {
            Self::InProcess => Some(Iova::new(span.address)),
            Self::InPages(all) => all.get(span.region)?.as_ref()?.translate(span),
        }
    }

    fn is_in_pages(&self, region: usize) -> bool {
        matches!(self, Self::InPages(all) if matches!(all.get(region), Some(Some(_))))
    }
}

impl DmaSpace {
    /// A space in which nothing is mapped yet.
    pub fn new(ioas: Ioas) -> Self {
        let leases = ioas.leases();
        let elsewhere = Elsewhere::InPages(Vec::new());
        Self { bases: Vec::new(), elsewhere, leases, mappings: Vec::new(), ioas: Some(ioas) }
    }

    /// The process's own address space (SVA): every buffer can be addressed, at its own address.
    pub fn shared_virtual() -> Self {
        let elsewhere = Elsewhere::InProcess;
        Self { bases: Vec::new(), elsewhere, leases: None, mappings: Vec::new(), ioas: None }
    }

    /// Maps `region`. Under SVA there is nothing to do.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`] if it is mapped already; the IOMMU's refusal.
    pub fn map(&mut self, region: &Arc<Region>, access: Access) -> Result<()> {
        let Some(ioas) = &self.ioas else { return Ok(()) };
        let id = region.id().index();
        if self.bases.get(id).is_some_and(|base| *base != NOT_MAPPED) || self.elsewhere.is_in_pages(id) {
            return Err(Error::new(ErrorKind::Busy, format!("map {region:?}"), "this queue maps it already")
                .mend("map each region once for each queue"));
        }
        let mapping = ioas.map(region, access)?;
        let pages = mapping.pages().map(|pages| Pages::of(&mapping, pages));
        let base = match &pages {
            Some(pages) => pages.one_base(),
            None => Some(mapping.iova().get().wrapping_sub(region.as_ptr().as_ptr() as u64)),
        };
        match (&mut self.elsewhere, base) {
            (_, Some(base)) => *entry(&mut self.bases, id, || NOT_MAPPED) = base,
            (Elsewhere::InPages(all), None) => *entry(all, id, || None) = pages,
            // A space with an IOAS is not the process's.
            (Elsewhere::InProcess, None) => {}
        }
        self.mappings.push(mapping);
        Ok(())
    }

    /// Unmaps `region`; returns once no DMA can touch it any more.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] if it is not mapped; the IOMMU's refusal.
    pub fn unmap(&mut self, region: &Arc<Region>) -> Result<()> {
        if self.ioas.is_none() {
            return Ok(());
        }
        let at = self.mappings.iter().position(|m| Arc::ptr_eq(m.region(), region)).ok_or_else(|| {
            Error::new(ErrorKind::NotFound, format!("unmap {region:?}"), "this queue does not map it")
                .mend("unmap what was mapped, once")
        })?;
        let id = region.id().index();
        if let Some(base) = self.bases.get_mut(id) {
            *base = NOT_MAPPED;
        }
        if let Elsewhere::InPages(all) = &mut self.elsewhere
            && let Some(pages) = all.get_mut(id)
        {
            *pages = None;
        }
        self.mappings.swap_remove(at).unmap()
    }

    /// The memory's address for the device, or `None` if its region is not mapped here, or it lies in several pages that are
    /// not neighbours for the device, as can be without an IOMMU.
    #[inline]
    pub fn iova(&self, memory: &impl DmaMemory) -> Option<Iova> {
        self.view().iova(memory)
    }

    /// [`iova`](Self::iova) for memory that goes to the device now: registers the lease where those are checked.
    /// Each is matched by one [`take_back`](Self::take_back).
    #[inline]
    pub fn hand_out(&self, memory: &impl DmaMemory, access: Access) -> Option<Iova> {
        self.view().hand_out(memory, access)
    }

    /// Whether leases are checked, so that [`hand_out`](Self::hand_out) and [`take_back`](Self::take_back) do more than
    /// compute an address.
    #[inline]
    pub fn checks_leases(&self) -> bool {
        self.leases.is_some()
    }

    /// The memory came back from the device; it is as long as when it was handed out. Where leases are checked, returns
    /// once no DMA under it is in flight.
    #[inline]
    pub fn take_back(&self, memory: &impl DmaMemory, access: Access) {
        self.view().take_back(memory, access);
    }

    /// The same for a burst: what it looks up stays in registers.
    #[inline]
    pub fn view(&self) -> View<'_> {
        View { bases: &self.bases, elsewhere: &self.elsewhere, leases: self.leases.as_deref() }
    }

    /// The device may still write to what is mapped here and will not stop: keeps all of it mapped and
    /// allocated for the rest of the process.
    pub fn leak(self) {
        tracing::error!("a device did not stop: {} mapped regions are leaked", self.mappings.len());
        #[allow(
            clippy::mem_forget,
            reason = "the memory must outlive the device's last write, which has no time"
        )]
        std::mem::forget(self);
    }
}

/// A [`DmaSpace`] during a burst, with its methods.
#[derive(Debug, Clone, Copy)]
pub struct View<'a> {
    bases: &'a [u64],
    elsewhere: &'a Elsewhere,
    leases: Option<&'a dyn Leases>,
}

impl View<'_> {
    /// [`DmaSpace::iova`].
    #[inline]
    pub fn iova(&self, memory: &impl DmaMemory) -> Option<Iova> {
        self.translate(memory.span())
    }

    #[inline]
    fn translate(&self, span: Span) -> Option<Iova> {
        match self.bases.get(span.region) {
            Some(&base) if base != NOT_MAPPED => Some(Iova::new(span.address.wrapping_add(base))),
            _ => self.elsewhere.translate(span),
        }
    }

    /// [`DmaSpace::hand_out`].
    #[inline]
    pub fn hand_out(&self, memory: &impl DmaMemory, access: Access) -> Option<Iova> {
        let span = memory.span();
        let iova = self.translate(span)?;
        if let Some(leases) = self.leases {
            leases.grant(iova, span.len, access);
        }
        Some(iova)
    }

    /// [`DmaSpace::take_back`].
    #[inline]
    pub fn take_back(&self, memory: &impl DmaMemory, access: Access) {
        if let Some(leases) = self.leases {
            let span = memory.span();
            if let Some(iova) = self.translate(span) {
                leases.take_back(iova, span.len, access);
            }
        }
    }
}

/// Entry `at` of a table, which grows up to it.
fn entry<T>(table: &mut Vec<T>, at: usize, empty: impl Fn() -> T) -> &mut T {
    if table.len() <= at {
        table.resize_with(at + 1, empty);
    }
    &mut table[at]
}

impl fmt::Debug for DmaSpace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DmaSpace")
            .field("ioas", &self.ioas)
            .field("mappings", &self.mappings)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
