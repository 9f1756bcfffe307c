//! AMD-Vi. Source: AMD I/O Virtualization Technology (IOMMU) Specification, 48882, revision 3.10, MMIO offset 0030h
//! (Extended Feature Register).

use super::{bit, bits, word64};
use crate::PageSizes;

/// Tables of both kinds, the host's and the guest's, have pages of 4 KiB, 2 MiB and 1 GiB (sections 2.2.3 and 2.2.6).
pub(super) const PAGE_SIZES: PageSizes = PageSizes::ALL;

/// Bits of a PASID that user space has: Linux up to 7.3 attaches only processes, not address spaces, to AMD-Vi's PASIDs.
/// Who asks for one all the same gets the kernel's answer.
pub(super) const USABLE_PASID_WIDTH: u32 = 0;

/// What `struct iommu_hw_info_amd` holds and means something here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Registers {
    efr: u64,
}

impl Registers {
    pub(super) fn new(data: &[u8]) -> Option<Self> {
        // EFR2 follows; a kernel that gives less gives something else.
        word64(data, 8)?;
        Some(Self { efr: word64(data, 0)? })
    }

    /// Bits of a PASID: `PASmax` counts from one, and means nothing without guest translation (`GTSup`).
    pub(super) fn pasid_width(self) -> u32 {
        if bit(self.efr, 4) { bits(self.efr, 36, 32) + 1 } else { 0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Vendor;
    use crate::vendor::Registers as Any;

    fn registers(efr: u64) -> Registers {
        let mut data = efr.to_ne_bytes().to_vec();
        data.extend([0; 8]);
        Registers::new(&data).unwrap()
    }

    /// EFR as the kernel's log shows it ("AMD-Vi: Extended features (0x58f77ef22294ade)") on a Zen machine: PPR, NX,
    /// GT, IA, GA, PC are among them; it has PASIDs of 16 bits.
    #[test]
    fn a_zen_machine() {
        let zen = registers(0x058f_77ef_2229_4ade);
        assert_eq!(zen.pasid_width(), 16);
        let capabilities = Any::Amd(zen).capabilities(16);
        assert_eq!(capabilities.vendor, Vendor::AmdVi);
        assert_eq!(capabilities.max_pasids, 0, "Linux attaches no address space to them");
        assert_eq!(capabilities.page_sizes, PageSizes::ALL);
    }

    #[test]
    fn a_width_without_guest_translation_is_none() {
        assert_eq!(registers(0x0f << 32).pasid_width(), 0);
        assert_eq!(registers(0x0f << 32 | 1 << 4).pasid_width(), 16);
        assert!(Any::Amd(registers(0)).why_no_pasids().0.contains("no PASIDs"));
    }
}
