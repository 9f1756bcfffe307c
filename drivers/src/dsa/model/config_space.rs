//! Configuration space: what the function says of itself (PCI Express Base Specification 6.0, chapter 7).

use underpass::model::Width;
use underpass::pci::{ConfigSpace, cap, ext_cap};

use super::VECTORS;
use super::spec;

/// PASID capability, capability register: privileged mode is supported (bit 2), 20 bits of PASID (bits 12:8).
const PASID_CAPABILITY: u16 = 1 << 2 | 20 << 8;
/// PASID capability, control register: enable.
const PASID_ENABLE: u16 = 1 << 0;
/// PASID capability, control register: privileged mode.
const PASID_PRIVILEGED: u16 = 1 << 2;

/// What the configuration space lets the device do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Functions {
    /// Access memory.
    pub(super) bus_master: bool,
    /// Use PASIDs.
    pub(super) pasid: bool,
    /// Make privileged accesses.
    pub(super) privileged: bool,
}

/// The function's configuration space after power-on.
pub(super) fn config_space() -> ConfigSpace {
    // A root complex integrated endpoint, version 2 (7.5.3.2), with function-level reset (7.5.3.3).
    let mut pcie = [0; 58];
    pcie[..2].copy_from_slice(&(2_u16 | 9 << 4).to_le_bytes());
    pcie[2..6].copy_from_slice(&(1_u32 << 15 | 1 << 28).to_le_bytes());

    // Table size less one, then where the table and the pending bits are, both in BAR 0 (7.7.2).
    let mut msix = [0; 10];
    msix[..2].copy_from_slice(&(VECTORS as u16 - 1).to_le_bytes());
    msix[2..6].copy_from_slice(&(spec::MSIX_TABLE as u32).to_le_bytes());
    msix[6..].copy_from_slice(&(spec::MSIX_PBA as u32).to_le_bytes());

    // Page-aligned requests; the enable bit can be written (10.5.1).
    let ats = [1 << 5, 0, 0, 0];
    // Stopped, and responses need a PASID; a capacity of 256 requests (10.5.2).
    let mut pri = [0; 12];
    pri[2..4].copy_from_slice(&(1_u16 << 8 | 1 << 15).to_le_bytes());
    pri[4..8].copy_from_slice(&256_u32.to_le_bytes());
    // 7.8.9.
    let mut pasid = [0; 4];
    pasid[..2].copy_from_slice(&PASID_CAPABILITY.to_le_bytes());
    pasid[2..].copy_from_slice(&PASID_ENABLE.to_le_bytes());

    ConfigSpace::new(spec::VENDOR_ID, spec::DEVICE_IDS[0], spec::CLASS)
        .with_capability(cap::PCIE, &pcie, &[])
        .with_capability(cap::MSIX, &msix, &[0, 0xc0])
        .with_extended(ext_cap::ATS, 1, &ats, &[0, 0, 0x1f, 0x80])
        .with_extended(ext_cap::PASID, 1, &pasid, &[0, 0, (PASID_ENABLE | PASID_PRIVILEGED) as u8, 0])
        .with_extended(ext_cap::PRI, 1, &pri, &[1, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff])
}

/// What `config` lets the device do.
pub(super) fn functions(config: &ConfigSpace) -> Functions {
    let control =
        config.find_extended(ext_cap::PASID).map_or(0, |at| config.read(at + 6, Width::Bits16) as u16);
    Functions {
        bus_master: config.bus_master(),
        pasid: control & PASID_ENABLE != 0,
        privileged: control & PASID_PRIVILEGED != 0,
    }
}
