//! What VFIO says of a region of a device: how large it is, and what of it can be mapped.
//!
//! `struct vfio_region_info` and its capabilities, `include/uapi/linux/vfio.h` of Linux 7.3. Whoever answers may be a
//! driver for mediated devices or another process: everything is checked.

use std::ops::Range;

use vfio_bindings::bindings::vfio;

/// A region of the device's file.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct RegionInfo {
    /// Bytes; 0 for a region that the device has not.
    pub size: u64,
    /// Where it starts in the device's file.
    pub offset: u64,
    /// It can be mapped: all of it, or what `sparse` says.
    can_map: bool,
    /// The parts that alone can be mapped, as (offset, bytes).
    sparse: Option<Vec<(u64, u64)>>,
    /// It can be mapped where it has the MSI-X table, too.
    msix_mappable: bool,
}

const LEN: usize = size_of::<vfio::vfio_region_info>();

impl RegionInfo {
    /// Reads it; `None` if it makes no sense.
    pub(super) fn parse(bytes: &[u8]) -> Option<Self> {
        let flags = u32_at(bytes, 4)?;
        let has = |flag| flags & flag != 0;
        let mut this = Self {
            size: u64_at(bytes, 16)?,
            offset: u64_at(bytes, 24)?,
            can_map: has(vfio::VFIO_REGION_INFO_FLAG_MMAP),
            ..Self::default()
        };
        this.offset.checked_add(this.size)?;
        let mut next = if has(vfio::VFIO_REGION_INFO_FLAG_CAPS) { u32_at(bytes, 12)? as usize } else { 0 };
        // Capabilities follow one another, so that a chain that leads back is wrong, and ends.
        let mut end = LEN;
        while next != 0 {
            if next < end {
                return None;
            }
            let (id, at) = (u32_at(bytes, next)? & 0xffff, next);
            next = u32_at(bytes, at + 4)? as usize;
            end = at + 8;
            match id {
                vfio::VFIO_REGION_INFO_CAP_SPARSE_MMAP => this.sparse = Some(sparse(bytes, end)?),
                vfio::VFIO_REGION_INFO_CAP_MSIX_MAPPABLE => this.msix_mappable = true,
                _ => {}
            }
        }
        Some(this)
    }

    /// The parts to map, in order: whole pages, none twice. `msix` is where the MSI-X table is in it.
    pub(super) fn areas(&self, page: u64, msix: Option<Range<u64>>) -> Vec<Range<u64>> {
        let Some(end) = self.size.checked_next_multiple_of(page) else { return Vec::new() };
        if !self.can_map {
            return Vec::new();
        }
        let whole = [(0, end)];
        let parts = self.sparse.as_deref().unwrap_or(&whole).iter();
        let mut parts: Vec<Range<u64>> =
            parts.filter_map(|&(offset, len)| Some(offset..offset.checked_add(len)?)).collect();
        parts.retain(|part| {
            part.start < part.end && part.end <= end && part.start % page == 0 && part.end % page == 0
        });
        parts.sort_by_key(|part| part.start);
        // Of two that overlap the second is left to system calls.
        let mut taken = 0;
        parts.retain(|part| {
            let free = part.start >= taken;
            taken = if free { part.end } else { taken };
            free
        });
        match msix {
            Some(table) if !self.msix_mappable => {
                let hole = table.start / page * page..table.end.div_ceil(page).saturating_mul(page);
                parts.iter().flat_map(|part| without(part, &hole)).collect()
            }
            _ => parts,
        }
    }
}

/// The areas of a sparse mmap capability, whose header ends at `at`.
fn sparse(bytes: &[u8], at: usize) -> Option<Vec<(u64, u64)>> {
    let count = u32_at(bytes, at)? as usize;
    let areas = bytes.get(at + 8..)?;
    // Before anything is allocated for them.
    let areas = areas.get(..count.checked_mul(16)?)?;
    areas.chunks_exact(16).map(|area| Some((u64_at(area, 0)?, u64_at(area, 8)?))).collect()
}

/// What is left of `part` outside of `hole`.
fn without(part: &Range<u64>, hole: &Range<u64>) -> impl Iterator<Item = Range<u64>> + use<> {
    let before = part.start..part.end.min(hole.start);
    let after = part.start.max(hole.end)..part.end;
    [before, after].into_iter().filter(|range| range.start < range.end)
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_ne_bytes(*bytes.get(at..)?.first_chunk()?))
}

#[cfg(test)]
mod tests;
