//! Where a region is for a device.

use underpass_iommu::{Iova, Mapping};

use super::sealed::Span;

/// A table from a region's page to what to add to a pointer into it. A region that an IOMMU maps is one piece, and so a
/// single page; without an IOMMU, each of its pages is where it is.
#[derive(Debug)]
pub(super) struct Pages {
    /// The region's first byte in this process.
    start: u64,
    /// log2 of a page's bytes.
    shift: u32,
    bases: Box<[u64]>,
}

impl Pages {
    pub(super) fn of(mapping: &Mapping) -> Self {
        let region = mapping.region();
        let start = region.as_ptr().as_ptr() as u64;
        let (shift, pages) = match mapping.pages() {
            Some(pages) => (region.page_size().shift(), pages),
            // Longer than any region.
            None => (u64::BITS - 1, &[mapping.iova()][..]),
        };
        let base = |(page, iova): (u64, &Iova)| iova.get().wrapping_sub(start + (page << shift));
        Self { start, shift, bases: (0..).zip(pages).map(base).collect() }
    }

    /// The one base that all pages have, if they are neighbours after all.
    pub(super) fn one_base(&self) -> Option<u64> {
        let first = *self.bases.first()?;
        self.bases.iter().all(|base| *base == first).then_some(first)
    }

    /// Where the memory, which lies in the region, is; `None` if it reaches from one page into another that is no neighbour.
    pub(super) fn translate(&self, span: Span) -> Option<Iova> {
        let offset = span.address - self.start;
        let page = |offset: u64| (offset >> self.shift) as usize;
        // No bytes at all are where the first would be.
        let (first, last) = (page(offset), page(offset + span.len.max(1) - 1));
        let bases = self.bases.get(first..=last)?;
        let base = *bases.first()?;
        bases.iter().all(|other| *other == base).then(|| Iova::new(span.address.wrapping_add(base)))
    }
}
