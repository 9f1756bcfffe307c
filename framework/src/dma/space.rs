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
/// What is not so simple is not in that table, and costs a call: leases, regions in scattered pages, SVA.
///
/// The owner keeps the order that DMA needs: it stops the device before it drops this, which unmaps.
pub struct DmaSpace {
    /// By region id: what to add to a pointer to get its IOVA, or [`NO_BASE`]. Empty where leases are checked.
    bases: Vec<u64>,
    /// By region id: where regions are that are mapped and have no base.
    others: Vec<Option<Pages>>,
    leases: Option<Arc<dyn Leases>>,
    mappings: Vec<Mapping>,
    /// None under SVA, where IOVA = VA.
    ioas: Option<Ioas>,
}

/// Not a difference of two page-aligned addresses.
const NO_BASE: u64 = u64::MAX;

impl DmaSpace {
    /// A space in which nothing is mapped yet.
    pub fn new(ioas: Ioas) -> Self {
        let leases = ioas.leases();
        Self { bases: Vec::new(), others: Vec::new(), leases, mappings: Vec::new(), ioas: Some(ioas) }
    }

    /// The process's own address space (SVA): every buffer can be addressed, at its own address.
    pub fn shared_virtual() -> Self {
        Self { bases: Vec::new(), others: Vec::new(), leases: None, mappings: Vec::new(), ioas: None }
    }

    /// Maps `region`. Under SVA there is nothing to do.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`] if it is mapped already; the IOMMU's refusal.
    pub fn map(&mut self, region: &Arc<Region>, access: Access) -> Result<()> {
        let Some(ioas) = &self.ioas else { return Ok(()) };
        if self.position(region).is_some() {
            return Err(Error::new(ErrorKind::Busy, format!("map {region:?}"), "this queue maps it already")
                .mend("map each region once for each queue"));
        }
        let mapping = ioas.map(region, access)?;
        let (id, pages) = (region.id().index(), Pages::of(&mapping));
        match pages.one_base() {
            Some(base) if self.leases.is_none() => *entry(&mut self.bases, id, || NO_BASE) = base,
            _ => *entry(&mut self.others, id, || None) = Some(pages),
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
        let at = self.position(region).ok_or_else(|| {
            Error::new(ErrorKind::NotFound, format!("unmap {region:?}"), "this queue does not map it")
                .mend("unmap what was mapped, once")
        })?;
        let id = region.id().index();
        if let Some(base) = self.bases.get_mut(id) {
            *base = NO_BASE;
        }
        if let Some(pages) = self.others.get_mut(id) {
            *pages = None;
        }
        self.mappings.swap_remove(at).unmap()
    }

    /// Where in `mappings` a region is.
    fn position(&self, region: &Arc<Region>) -> Option<usize> {
        self.mappings.iter().position(|mapping| Arc::ptr_eq(mapping.region(), region))
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
        if let Some(leases) = &self.leases
            && let Some(iova) = self.iova(memory)
        {
            leases.take_back(iova, memory.span().len, access);
        }
    }

    /// [`iova`](Self::iova) and [`hand_out`](Self::hand_out) of a burst: what they look up stays in registers.
    #[inline]
    pub fn view(&self) -> View<'_> {
        View { bases: &self.bases, space: self }
    }

    /// Where memory is whose region has no base; a call, so that the callers' loops have the registers for those that have.
    #[cold]
    #[inline(never)]
    fn translate(&self, span: Span) -> Option<Iova> {
        match self.ioas {
            Some(_) => self.others.get(span.region)?.as_ref()?.translate(span),
            None => Some(Iova::new(span.address)),
        }
    }

    /// The same for memory that goes to the device now.
    #[cold]
    #[inline(never)]
    fn lend(&self, span: Span, access: Access) -> Option<Iova> {
        let iova = self.translate(span)?;
        if let Some(leases) = &self.leases {
            leases.grant(iova, span.len, access);
        }
        Some(iova)
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

/// A [`DmaSpace`] during a burst.
#[derive(Debug, Clone, Copy)]
pub struct View<'a> {
    bases: &'a [u64],
    space: &'a DmaSpace,
}

impl View<'_> {
    // No `or_else`, and no span that is shared: both leave instructions to the packets that have a base.

    /// [`DmaSpace::iova`].
    #[inline]
    pub fn iova(&self, memory: &impl DmaMemory) -> Option<Iova> {
        Some(match self.by_base(memory.span()) {
            Some(iova) => iova,
            None => self.space.translate(memory.span())?,
        })
    }

    /// [`DmaSpace::hand_out`].
    #[inline]
    pub fn hand_out(&self, memory: &impl DmaMemory, access: Access) -> Option<Iova> {
        Some(match self.by_base(memory.span()) {
            Some(iova) => iova,
            None => self.space.lend(memory.span(), access)?,
        })
    }

    /// Where memory is whose region has a base, as all have in most address spaces.
    #[inline]
    fn by_base(&self, span: Span) -> Option<Iova> {
        let base = *self.bases.get(span.region)?;
        (base != NO_BASE).then(|| Iova::new(span.address.wrapping_add(base)))
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
