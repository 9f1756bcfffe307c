use proptest::prelude::*;

use super::*;

const PAGE: u64 = 4096;
const READ: u32 = 1;
const WRITE: u32 = 2;
const MMAP: u32 = 4;
const CAPS: u32 = 8;

/// `struct vfio_region_info` by hand, followed by `capabilities`; the first, if there is any, is right behind it.
fn info(flags: u32, size: u64, offset: u64, capabilities: &[u8]) -> Vec<u8> {
    let first = if capabilities.is_empty() { 0 } else { 32 };
    let mut bytes: Vec<u8> = [32 + capabilities.len() as u32, flags, 3, first].map(u32::to_ne_bytes).concat();
    bytes.extend([size, offset].map(u64::to_ne_bytes).concat());
    bytes.extend(capabilities);
    bytes
}

fn header(id: u16, next: u32) -> Vec<u8> {
    [&id.to_ne_bytes()[..], &1_u16.to_ne_bytes(), &next.to_ne_bytes()].concat()
}

fn sparse_of(next: u32, areas: &[(u64, u64)]) -> Vec<u8> {
    let mut bytes = header(1, next);
    bytes.extend([areas.len() as u32, 0].map(u32::to_ne_bytes).concat());
    bytes.extend(areas.iter().flat_map(|area| [area.0, area.1].map(u64::to_ne_bytes).concat()));
    bytes
}

fn parse(bytes: &[u8]) -> RegionInfo {
    RegionInfo::parse(bytes).unwrap()
}

/// What is mapped of it, as (start, end).
fn areas(region: &RegionInfo, msix: Option<Range<u64>>) -> Vec<(u64, u64)> {
    region.areas(PAGE, msix).into_iter().map(|area| (area.start, area.end)).collect()
}

#[test]
fn a_region_without_capabilities_is_mapped_whole_or_not_at_all() {
    let region = parse(&info(READ | WRITE | MMAP, 0x2000, 3 << 40, &[]));
    assert_eq!((region.size, region.offset), (0x2000, 3 << 40));
    assert_eq!(areas(&region, None), [(0, 0x2000)]);
    assert_eq!(areas(&parse(&info(READ | WRITE, 0x2000, 0, &[])), None), []);
    assert_eq!(areas(&parse(&info(READ | WRITE | MMAP, 0x80, 0, &[])), None), [(0, PAGE)], "its whole page");
    assert_eq!(areas(&parse(&info(0, 0, 0, &[])), None), []);
}

#[test]
fn of_a_sparse_region_the_pages_that_make_sense_are_mapped() {
    let said =
        [(0x8000, 0x2000), (0, 0x1000), (0x1800, 0x1000), (0x9000, 0x1000), (0xf000, 0x2000), (0x4000, 0)];
    // Another capability comes first, and one that nobody knows last.
    let mut chain = header(3, 32 + 8);
    chain.extend(sparse_of(32 + 8 + 16 + 16 * said.len() as u32, &said));
    chain.extend(header(77, 0));
    let region = parse(&info(READ | MMAP | CAPS, 0x1_0000, 0, &chain));
    assert!(region.msix_mappable);
    // Not those that are no whole pages, overlap one before, lie outside or are empty.
    assert_eq!(areas(&region, None), [(0, 0x1000), (0x8000, 0xa000)]);
    assert_eq!(
        areas(&parse(&info(READ | MMAP, 0x1_0000, 0, &chain)), None),
        [(0, 0x1_0000)],
        "no flag, no chain"
    );
}

#[test]
fn the_vectors_table_is_mapped_only_where_that_is_said() {
    let table = || Some(0x2800..0x2880);
    let region = parse(&info(READ | MMAP, 0x8000, 0, &[]));
    assert_eq!(areas(&region, table()), [(0, 0x2000), (0x3000, 0x8000)]);
    assert_eq!(areas(&region, Some(0x10..0x9000)), []);
    assert_eq!(areas(&region, Some(0x9000..0xa000)), [(0, 0x8000)]);
    let said = parse(&info(READ | MMAP | CAPS, 0x8000, 0, &header(3, 0)));
    assert_eq!(areas(&said, table()), [(0, 0x8000)]);
}

#[test]
fn a_chain_that_leads_back_or_out_is_refused() {
    let region = |chain: &[u8]| RegionInfo::parse(&info(CAPS, 0x1000, 0, chain));
    assert_eq!(region(&header(3, 32)), None, "to itself");
    assert_eq!(region(&header(3, 4)), None, "into the region's own fields");
    assert_eq!(region(&header(3, 36)), None, "into its own header");
    assert_eq!(region(&header(3, 1000)), None, "out");
    assert_eq!(region(&header(3, u32::MAX)), None);
    let mut many = sparse_of(0, &[(0, PAGE)]);
    many[8..12].copy_from_slice(&u32::MAX.to_ne_bytes());
    assert_eq!(region(&many), None, "more areas than there are bytes");
    assert_eq!(RegionInfo::parse(&info(0, u64::MAX, 1, &[])), None, "it ends behind everything");
    assert_eq!(RegionInfo::parse(&[0; 31]), None);
}

proptest! {
    /// Whatever the kernel, or another process, says: no panic, and what is mapped are whole pages inside, none twice.
    #[test]
    fn areas_are_whole_pages_inside(
        noise in prop::collection::vec(any::<u8>(), 0..96),
        areas in prop::collection::vec((0_u64..24, 0_u64..8, 0_u64..2), 0..6),
        size in prop_oneof![0_u64..0x1_8000, any::<u64>()],
        (flags, noisy) in (any::<u32>(), any::<bool>()),
        msix in prop::option::of((0_u64..0x2_0000, 1_u64..0x8000)),
    ) {
        let areas: Vec<_> = areas.iter().map(|(at, len, odd)| (at * PAGE + odd * 16, len * PAGE)).collect();
        let chain = if noisy { noise } else { sparse_of(0, &areas) };
        let table = msix.map(|(start, len)| start..start + len);
        if let Some(region) = RegionInfo::parse(&info(flags, size, 0, &chain)) {
            let mapped = region.areas(PAGE, table.clone());
            prop_assert!(flags & MMAP != 0 || mapped.is_empty());
            prop_assert!(mapped.windows(2).all(|two| two[0].end <= two[1].start), "{mapped:?}");
            for area in &mapped {
                prop_assert!(area.start < area.end && area.start % PAGE == 0 && area.end % PAGE == 0, "{area:?}");
                prop_assert!(area.end - PAGE < size, "{area:?} of {size:#x}");
                prop_assert!(region.msix_mappable || table.as_ref().is_none_or(|table| table.end <= area.start || area.end <= table.start));
            }
        }
    }
}
