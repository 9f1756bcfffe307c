//! Arm SMMUv3. Source: Arm System Memory Management Unit Architecture Specification, SMMU architecture version 3,
//! IHI 0070, sections 6.3.1 to 6.3.6 (`SMMU_IDR0` to `SMMU_IDR5`). Only the fields that `iommufd.h` allows are read.

use super::{bit, bits, word32};
use crate::{PageSize, PageSizes};

/// What `struct iommu_hw_info_arm_smmuv3` holds and means something here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Registers {
    idr1: u64,
    idr5: u64,
}

impl Registers {
    pub(super) fn new(data: &[u8]) -> Option<Self> {
        // Flags and padding, six identification registers, IIDR and AIDR.
        word32(data, 36)?;
        Some(Self { idr1: word32(data, 8 + 4)?.into(), idr5: word32(data, 8 + 5 * 4)?.into() })
    }

    /// Bits of a substream id, which is what a PASID is here: IDR1.SSIDSIZE.
    pub(super) fn pasid_width(self) -> u32 {
        bits(self.idr1, 10, 6)
    }

    /// Pages and blocks of the granule that the kernel takes, which is that of this crate's base page where there is it.
    pub(super) fn page_sizes(self) -> PageSizes {
        let granules = [
            (4, PageSizes::ALL.0),  // GRAN4K: 4 KiB, 2 MiB, 1 GiB
            (5, 1 << 14 | 1 << 25), // GRAN16K: 16 KiB, 32 MiB
            (6, 1 << 16 | 1 << 29), // GRAN64K: 64 KiB, 512 MiB
        ];
        let found = granules.into_iter().find(|&(granule, _)| bit(self.idr5, granule));
        PageSizes(found.map_or(PageSize::Size4K.bytes(), |(_, sizes)| sizes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vendor::Registers as Any;
    use crate::{Pasid, Vendor};

    fn registers(idr: [u32; 6]) -> Registers {
        let words = [0, 0].into_iter().chain(idr).chain([0x0043_b000, 0]);
        Registers::new(&words.flat_map(u32::to_ne_bytes).collect::<Vec<_>>()).unwrap()
    }

    /// IDR1 and IDR5 as QEMU's SMMUv3 has them (queues of 2^19 entries, stream ids of 16 bits, 44-bit addresses, all three
    /// granules); then with the substreams that it lacks.
    #[test]
    fn substreams_and_granules() {
        let emulated = registers([0, 0x0273_0010, 0, 0, 0, 0x0000_0074]);
        assert_eq!(emulated.pasid_width(), 0);
        assert_eq!(emulated.page_sizes(), PageSizes::ALL);
        assert!(Any::Smmu(emulated).why_no_pasids().0.contains("substreams"));
        let with_substreams = registers([0, 20 << 6 | 16, 0, 0, 0, 0x70]);
        let capabilities = Any::Smmu(with_substreams).capabilities(20);
        assert_eq!(capabilities.max_pasids, Pasid::MAX);
        assert_eq!(capabilities.vendor, Vendor::ArmSmmuV3);
        assert_eq!(Any::Smmu(with_substreams).capabilities(16).max_pasids, 0xffff, "the device has fewer");
    }

    #[test]
    fn other_granules_have_other_pages() {
        assert_eq!(registers([0, 0, 0, 0, 0, 1 << 5]).page_sizes(), PageSizes(0x0200_4000));
        assert_eq!(registers([0, 0, 0, 0, 0, 1 << 6]).page_sizes(), PageSizes(0x2001_0000));
    }
}
