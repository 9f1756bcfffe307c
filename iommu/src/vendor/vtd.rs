//! Intel VT-d. Source: Intel Virtualization Technology for Directed I/O, Architecture Specification, revision 4.1,
//! sections 11.4.2 (Capability Register) and 11.4.3 (Extended Capability Register).

use super::{bit, bits, word64};
use crate::{PageSize, PageSizes};

/// What `struct iommu_hw_info_vtd` holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Registers {
    cap: u64,
    ecap: u64,
}

impl Registers {
    pub(super) fn new(data: &[u8]) -> Option<Self> {
        // Two 32-bit words of flags and padding come first.
        Some(Self { cap: word64(data, 8)?, ecap: word64(data, 16)? })
    }

    /// SMTS: tables that PASIDs have entries in.
    pub(super) fn scalable_mode(self) -> bool {
        bit(self.ecap, 43)
    }

    /// FSTS: page tables in the CPU's format.
    fn first_stage(self) -> bool {
        bit(self.ecap, 47)
    }

    /// SSTS: page tables in VT-d's own format, beside the others in scalable mode.
    fn second_stage(self) -> bool {
        bit(self.ecap, 46)
    }

    /// Bits of a PASID: PSS counts from one, and means nothing unless PASID is set.
    pub(super) fn pasid_width(self) -> u32 {
        if self.scalable_mode() && bit(self.ecap, 40) { bits(self.ecap, 39, 35) + 1 } else { 0 }
    }

    /// Sizes that are there whichever stage the kernel takes: the first where it has it, the second for tracking
    /// written pages and where scalable mode is off.
    pub(super) fn page_sizes(self) -> PageSizes {
        // First-stage tables always have 2 MiB; FS1GP is for 1 GiB.
        let first = PageSize::Size4K.bytes()
            | PageSize::Size2M.bytes()
            | if bit(self.cap, 56) { PageSize::Size1G.bytes() } else { 0 };
        // SSLPS: bit 34 is 2 MiB, bit 35 is 1 GiB.
        let second = PageSize::Size4K.bytes()
            | if bit(self.cap, 34) { PageSize::Size2M.bytes() } else { 0 }
            | if bit(self.cap, 35) { PageSize::Size1G.bytes() } else { 0 };
        PageSizes(match (self.scalable_mode() && self.first_stage(), self.second_stage()) {
            (false, _) => second,
            (true, false) => first,
            (true, true) => first & second,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn registers(cap: u64, ecap: u64) -> Registers {
        let mut data = vec![0; 8];
        data.extend(cap.to_ne_bytes());
        data.extend(ecap.to_ne_bytes());
        Registers::new(&data).unwrap()
    }

    fn has(registers: Registers) -> [bool; 3] {
        [PageSize::Size4K, PageSize::Size2M, PageSize::Size1G]
            .map(|size| registers.page_sizes().contains(size))
    }

    /// CAP and ECAP as the kernel's log shows them ("DMAR: dmar0: ... cap ... ecap ...") on a client of 2013, which
    /// has no PASIDs at all: SSLPS is 0 in its graphics unit and 2 MiB and 1 GiB in the other.
    #[test]
    fn legacy_hardware() {
        let graphics = registers(0x00c0_0000_2066_0462, 0x0000_0000_00f0_101a);
        assert_eq!((graphics.scalable_mode(), graphics.pasid_width()), (false, 0));
        assert_eq!(has(graphics), [true, false, false]);
        let other = registers(0x00d2_008c_2066_0462, 0x0000_0000_00f0_10da);
        assert_eq!(has(other), [true, true, true]);
    }

    #[test]
    fn scalable_mode_brings_pasids() {
        // ECAP with SMTS (43), PASID (40), PSS = 19 (39:35), SSTS (46): 20 bits, second stage only.
        let ecap = 1 << 46 | 1 << 43 | 1 << 40 | 0x13 << 35;
        let second = registers(1 << 34, ecap);
        assert_eq!(second.pasid_width(), 20);
        assert_eq!(has(second), [true, true, false]);
        // A width without the capability, and the capability without scalable mode, are none.
        assert_eq!(registers(0, 1 << 43 | 0x13 << 35).pasid_width(), 0);
        assert_eq!(registers(0, 1 << 40 | 0x13 << 35).pasid_width(), 0);
    }

    #[test]
    fn a_page_size_is_there_if_both_stages_have_it() {
        const BOTH: u64 = 1 << 47 | 1 << 46 | 1 << 43;
        const FIRST_ONLY: u64 = 1 << 47 | 1 << 43;
        const FS1GP: u64 = 1 << 56;
        const SSLPS_2M: u64 = 1 << 34;
        const SSLPS_1G: u64 = 1 << 35;
        for (cap, ecap, expected) in [
            (FS1GP | SSLPS_2M | SSLPS_1G, BOTH, [true, true, true]),
            (SSLPS_2M | SSLPS_1G, BOTH, [true, true, false]),
            (FS1GP | SSLPS_2M, BOTH, [true, true, false]),
            (FS1GP, BOTH, [true, false, false]),
            (FS1GP, FIRST_ONLY, [true, true, true]),
            (0, FIRST_ONLY, [true, true, false]),
            // The first stage is not used without scalable mode.
            (FS1GP, 1 << 47, [true, false, false]),
        ] {
            assert_eq!(has(registers(cap, ecap)), expected, "{cap:#x} {ecap:#x}");
        }
    }
}
