//! What IOMMUs of several makers say of themselves, as [`Capabilities`]: the one place that knows their registers.
//!
//! The kernel hands the registers out as they are (`IOMMU_GET_HW_INFO`, `include/uapi/linux/iommufd.h` of Linux 7.3).
//! An IOMMU that says nothing (virtio-iommu), or one that is not known here, gets what every one has: pages of 4 KiB, and the
//! PASIDs that the kernel says there are.

mod amd;
mod smmu;
mod vtd;

use iommufd_bindings as uapi;

use crate::{Capabilities, PageSize, PageSizes, Pasid, Vendor};

/// The registers of an IOMMU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Registers {
    /// Intel VT-d's.
    Vtd(vtd::Registers),
    /// AMD-Vi's.
    Amd(amd::Registers),
    /// Those of an Arm SMMUv3.
    Smmu(smmu::Registers),
    /// None that are known here.
    Unknown,
}

impl Registers {
    /// Enough for the structure of each IOMMU known here.
    pub(crate) const MAX_LEN: usize = 64;

    /// The registers in the data that the kernel gives for `kind`, an `iommu_hw_info_type`.
    pub(crate) fn new(kind: u32, data: &[u8]) -> Self {
        let registers = match kind {
            uapi::iommu_hw_info_type_IOMMU_HW_INFO_TYPE_INTEL_VTD => vtd::Registers::new(data).map(Self::Vtd),
            uapi::iommu_hw_info_type_IOMMU_HW_INFO_TYPE_AMD => amd::Registers::new(data).map(Self::Amd),
            uapi::iommu_hw_info_type_IOMMU_HW_INFO_TYPE_ARM_SMMUV3 => {
                smmu::Registers::new(data).map(Self::Smmu)
            }
            _ => None,
        };
        registers.unwrap_or(Self::Unknown)
    }

    /// What a device behind this IOMMU can do, if kernel and device have PASIDs of `pasid_width` bits.
    pub(crate) fn capabilities(&self, pasid_width: u32) -> Capabilities {
        let (vendor, page_sizes, pasid_limit) = match self {
            Self::Vtd(vtd) => (Vendor::IntelVtd, vtd.page_sizes(), vtd.pasid_width()),
            Self::Amd(_) => (Vendor::AmdVi, amd::PAGE_SIZES, amd::USABLE_PASID_WIDTH),
            Self::Smmu(smmu) => (Vendor::ArmSmmuV3, smmu.page_sizes(), smmu.pasid_width()),
            Self::Unknown => (Vendor::Unknown, PageSizes(PageSize::Size4K.bytes()), Pasid::MAX.ilog2() + 1),
        };
        let width = pasid_width.min(pasid_limit).min(Pasid::MAX.ilog2() + 1);
        Capabilities {
            max_pasids: (1 << width) - 1,
            page_sizes,
            fault_reporting: false,
            dirty_tracking: false,
            vendor,
        }
    }

    /// Why devices behind it have no PASIDs, where the kernel says that there are none; and the mend.
    pub(crate) fn why_no_pasids(&self) -> (&'static str, &'static str) {
        const DEVICE: &str = "the device has no PASID capability, or the kernel did not switch it on";
        const DO_WITHOUT: &str = "use the device without PASIDs, in its own address space";
        match self {
            Self::Vtd(vtd) if !vtd.scalable_mode() => {
                ("this VT-d has no scalable mode, which PASIDs need", DO_WITHOUT)
            }
            Self::Vtd(vtd) if vtd.pasid_width() == 0 => ("this VT-d has no PASIDs", DO_WITHOUT),
            Self::Vtd(_) => (
                "the device has no PASID capability, or scalable mode is switched off",
                "boot with intel_iommu=on,sm_on, or use the device without PASIDs, in its own address space",
            ),
            Self::Amd(amd) if amd.pasid_width() == 0 => ("this AMD-Vi has no PASIDs", DO_WITHOUT),
            Self::Smmu(smmu) if smmu.pasid_width() == 0 => {
                ("this SMMU has no substreams, which PASIDs are", DO_WITHOUT)
            }
            Self::Amd(_) | Self::Smmu(_) => (DEVICE, DO_WITHOUT),
            Self::Unknown => (
                "the device has no PASID capability, or its IOMMU has no PASIDs (virtio-iommu has none)",
                DO_WITHOUT,
            ),
        }
    }
}

/// The 32-bit word at byte `at` of what the kernel wrote.
fn word32(data: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(data.get(at..at + 4)?.try_into().ok()?))
}

/// The 64-bit word at byte `at` of what the kernel wrote.
fn word64(data: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_ne_bytes(data.get(at..at + 8)?.try_into().ok()?))
}

/// Bits `last` to `first` of `register`, as specifications write them: 39:35.
fn bits(register: u64, last: u32, first: u32) -> u32 {
    (register >> first & ((1 << (last - first + 1)) - 1)) as u32
}

/// Whether a bit of `register` is set.
fn bit(register: u64, bit: u32) -> bool {
    register >> bit & 1 == 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_says_nothing_has_4_kib_pages_and_the_kernels_pasids() {
        for kind in [uapi::iommu_hw_info_type_IOMMU_HW_INFO_TYPE_NONE, 0xfeed_beef] {
            let registers = Registers::new(kind, &[0xff; 64]);
            assert_eq!(registers, Registers::Unknown);
            let capabilities = registers.capabilities(0);
            assert_eq!((capabilities.max_pasids, capabilities.page_sizes), (0, PageSizes(4096)));
            assert_eq!(capabilities.vendor, Vendor::Unknown);
            assert_eq!(registers.capabilities(8).max_pasids, 255);
            assert_eq!(registers.capabilities(20).max_pasids, Pasid::MAX);
            assert_eq!(registers.capabilities(255).max_pasids, Pasid::MAX, "a PASID has 20 bits at most");
            let (why, _) = registers.why_no_pasids();
            assert!(why.contains("virtio-iommu"));
        }
    }

    #[test]
    fn data_that_is_too_short_says_nothing() {
        use uapi::{
            iommu_hw_info_type_IOMMU_HW_INFO_TYPE_AMD as AMD,
            iommu_hw_info_type_IOMMU_HW_INFO_TYPE_ARM_SMMUV3 as SMMU,
            iommu_hw_info_type_IOMMU_HW_INFO_TYPE_INTEL_VTD as VTD,
        };
        for (kind, len) in [(VTD, 24), (AMD, 16), (SMMU, 40)] {
            assert_eq!(Registers::new(kind, &vec![0xff; len - 1]), Registers::Unknown);
            assert_ne!(Registers::new(kind, &vec![0xff; len]), Registers::Unknown);
        }
    }

    #[test]
    fn fields_are_cut_out_as_the_specifications_number_them() {
        assert_eq!(bits(0x0000_00f8_0000_0000, 39, 35), 31);
        assert_eq!(bits(0xffff_ff07_ffff_ffff, 39, 35), 0);
        assert_eq!(bits(u64::MAX, 63, 60), 15);
        assert!(bit(1 << 56, 56) && !bit(1 << 56, 57));
    }
}
