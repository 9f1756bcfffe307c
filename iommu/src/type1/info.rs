//! What `VFIO_IOMMU_GET_INFO` says (include/uapi/linux/vfio.h, Linux 7.3: `struct vfio_iommu_type1_info` and its capabilities).
//!
//! It is bytes from elsewhere: nothing in it is believed without a look at where it ends.

use vfio_bindings::bindings::vfio;

use crate::{Iova, IovaRange, PageSize, PageSizes};

/// Where there is no list of usable addresses (kernels before 5.4; groups of mediated devices, which have no IOMMU of their
/// own): what IOMMUs of 39 bits, the narrowest that are usual, have without x86's window for interrupts.
const UNLISTED: [IovaRange; 2] = [
    IovaRange { first: Iova::new(0), last: Iova::new(0xfedf_ffff) },
    IovaRange { first: Iova::new(0xfef0_0000), last: Iova::new((1 << 39) - 1) },
];

/// The most capabilities that are looked at: a chain that goes in circles ends there. Linux 7.3 has three.
const MAX_CAPABILITIES: usize = 64;

/// What a container's IOMMU can do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Info {
    pub(super) page_sizes: PageSizes,
    /// Not empty, in ascending order.
    pub(super) usable: Vec<IovaRange>,
    /// How many more mappings the container takes, where the kernel says so (from 5.10 on).
    pub(super) mappings_left: Option<u32>,
}

impl Info {
    /// What `bytes`, the answer to `VFIO_IOMMU_GET_INFO`, say. What lies outside of them is not there.
    pub(super) fn parse(bytes: &[u8]) -> Self {
        let flags = word(bytes, 4).unwrap_or(0);
        let sizes = if flags & vfio::VFIO_IOMMU_INFO_PGSIZES == 0 { None } else { long(bytes, 8) };
        let mut info = Self {
            page_sizes: PageSizes(sizes.unwrap_or(PageSize::Size4K.bytes())),
            usable: Vec::new(),
            mappings_left: None,
        };
        let mut at = if flags & vfio::VFIO_IOMMU_INFO_CAPS == 0 { 0 } else { word(bytes, 16).unwrap_or(0) };
        for _ in 0..MAX_CAPABILITIES {
            // A capability: its id, its version (16 bits each), and the next one's place in `bytes`, or 0.
            let Some(body) = bytes.get(at as usize..).filter(|_| at != 0) else { break };
            let (Some(id), Some(next)) = (word(body, 0), word(body, 4)) else { break };
            match id & 0xffff {
                vfio::VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE => info.usable = ranges(body),
                vfio::VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL => info.mappings_left = word(body, 8),
                _ => {}
            }
            at = next;
        }
        if info.usable.is_empty() {
            info.usable = UNLISTED.to_vec();
        }
        info
    }
}

/// The ranges of a capability: their number, a reserved word, and first and last address of each.
fn ranges(capability: &[u8]) -> Vec<IovaRange> {
    let count = word(capability, 8).unwrap_or(0) as usize;
    let listed = capability.get(16..).unwrap_or(&[]).chunks_exact(16).take(count);
    let range = |bytes: &[u8]| {
        let (first, last) = (Iova::new(long(bytes, 0)?), Iova::new(long(bytes, 8)?));
        (first <= last).then_some(IovaRange { first, last })
    };
    let mut ranges: Vec<_> = listed.filter_map(range).collect();
    ranges.sort_by_key(|range| range.first);
    ranges
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk().map(|bytes| u32::from_ne_bytes(*bytes))
}

fn long(bytes: &[u8], at: usize) -> Option<u64> {
    bytes.get(at..)?.first_chunk().map(|bytes| u64::from_ne_bytes(*bytes))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// An answer as the kernel lays it out: the fixed part, and capabilities behind it, each padded to 8 bytes.
    fn answer(page_sizes: u64, capabilities: &[(u16, Vec<u8>)]) -> Vec<u8> {
        let mut bytes = vec![0; 24];
        bytes[4] = 0b11;
        bytes[8..16].copy_from_slice(&page_sizes.to_ne_bytes());
        let mut link = 16;
        for (id, body) in capabilities {
            let at = bytes.len() as u32;
            bytes[link..link + 4].copy_from_slice(&at.to_ne_bytes());
            link = bytes.len() + 4;
            bytes.extend(id.to_ne_bytes());
            bytes.extend(1_u16.to_ne_bytes());
            bytes.extend(0_u32.to_ne_bytes());
            bytes.extend(body);
            bytes.resize(bytes.len().next_multiple_of(8), 0);
        }
        let len = bytes.len() as u32;
        bytes[..4].copy_from_slice(&len.to_ne_bytes());
        bytes
    }

    fn range_list(count: u32, addresses: &[u64]) -> (u16, Vec<u8>) {
        let head = [count.to_ne_bytes(), [0; 4]].concat();
        (1, head.into_iter().chain(addresses.iter().flat_map(|address| address.to_ne_bytes())).collect())
    }

    fn range(first: u64, last: u64) -> IovaRange {
        IovaRange { first: Iova::new(first), last: Iova::new(last) }
    }

    #[test]
    fn an_answer_of_linux_is_understood() {
        let migration = (2, vec![0xff; 24]);
        let available = (3, 65_535_u32.to_ne_bytes().to_vec());
        let ranges = range_list(2, &[0, 0xfedf_ffff, 0xfef0_0000, (1 << 39) - 1]);
        let info = Info::parse(&answer(0x4020_1000, &[migration, available, ranges]));
        assert_eq!(info.page_sizes, PageSizes::ALL);
        assert_eq!(info.mappings_left, Some(65_535));
        assert_eq!(info.usable, [range(0, 0xfedf_ffff), range(0xfef0_0000, (1 << 39) - 1)]);
    }

    #[test]
    fn what_is_not_told_is_assumed_with_care() {
        let info = Info::parse(&[0; 24]);
        assert_eq!(info.page_sizes, PageSizes(4096));
        assert_eq!((info.usable, info.mappings_left), (UNLISTED.to_vec(), None));
        assert_eq!(Info::parse(&[]).usable, UNLISTED);
    }

    #[test]
    fn a_list_ends_where_its_bytes_do_and_empty_ranges_are_left_out() {
        let info =
            Info::parse(&answer(4096, &[range_list(u32::MAX, &[0x9000, 0xafff, 7, 6, 0x1000, 0x1fff])]));
        assert_eq!(info.usable, [range(0x1000, 0x1fff), range(0x9000, 0xafff)]);
    }

    #[test]
    fn a_chain_in_a_circle_ends() {
        let mut bytes = answer(4096, &[(3, vec![7, 0, 0, 0])]);
        bytes[28..32].copy_from_slice(&24_u32.to_ne_bytes());
        assert_eq!(Info::parse(&bytes).mappings_left, Some(7));
    }

    proptest! {
        #[test]
        fn any_bytes_give_ranges_in_order(mut bytes in prop::collection::vec(any::<u8>(), 0..256), at in 0..64_u8) {
            // Of bytes alone, next to none point to a capability.
            if let Some(head) = bytes.get_mut(..24) {
                head[4] |= 3;
                head[16..20].copy_from_slice(&[at, 0, 0, 0]);
            }
            let info = Info::parse(&bytes);
            prop_assert!(!info.usable.is_empty());
            prop_assert!(info.usable.iter().all(|range| range.first <= range.last));
            prop_assert!(info.usable.windows(2).all(|pair| pair[0].first <= pair[1].first));
        }

        #[test]
        fn a_cut_answer_says_no_more_than_the_whole(cut in 0_usize..100) {
            let whole = answer(0x1000, &[range_list(2, &[1, 2, 5, 6]), (3, vec![1, 0, 0, 0])]);
            let (all, info) = (Info::parse(&whole), Info::parse(&whole[..cut.min(whole.len())]));
            prop_assert!(info.usable == UNLISTED || info.usable.iter().all(|range| all.usable.contains(range)));
            prop_assert!(info.mappings_left.is_none_or(|left| left == 1));
        }
    }
}
