//! Configuration space and where things are in the BARs ("PCI Device Layout", 4.1.3 and 4.1.4).

use underpass::pci::{ConfigSpace, cap};
use zerocopy::IntoBytes;

use super::spec::net::config;
use super::spec::pci::{self, Cap, NotifyCap, cfg_type, common};

/// The BAR of all registers but the notifications.
pub(super) const REGISTERS: usize = 0;
pub(super) const REGISTERS_LEN: u64 = 0x8000;
/// The BAR of the notifications: one page, lock-free.
pub(super) const NOTIFY: usize = 2;
pub(super) const NOTIFY_LEN: u64 = 0x1000;

pub(super) const COMMON: u64 = 0;
pub(super) const ISR: u64 = 0x1000;
pub(super) const DEVICE: u64 = 0x2000;
pub(super) const MSIX_TABLE: u64 = 0x3000;
pub(super) const MSIX_PBA: u64 = 0x4000;

/// Bytes between two queues' notifications.
pub(super) const NOTIFY_MULTIPLIER: u32 = 4;

/// The function's configuration space after power-on, of a device with so many queues and interrupt vectors.
pub(super) fn config_space(queues: usize, vectors: usize) -> ConfigSpace {
    // An endpoint, version 2 (PCI Express Base Specification 6.0, 7.5.3.2), with function-level reset (7.5.3.3).
    let mut pcie = [0; 58];
    pcie[..2].copy_from_slice(&2_u16.to_le_bytes());
    pcie[2..6].copy_from_slice(&(1_u32 << 15 | 1 << 28).to_le_bytes());

    // Table size less one, then where the table and the pending bits are, both in BAR 0 (7.7.2).
    let mut msix = [0; 10];
    msix[..2].copy_from_slice(&(vectors as u16 - 1).to_le_bytes());
    msix[2..6].copy_from_slice(&(MSIX_TABLE as u32 | REGISTERS as u32).to_le_bytes());
    msix[6..].copy_from_slice(&(MSIX_PBA as u32 | REGISTERS as u32).to_le_bytes());

    let structure = |cfg_type, bar: usize, offset: u64, length: u64| Cap {
        cap_vndr: pci::CAP_ID,
        cap_len: size_of::<Cap>() as u8,
        cfg_type,
        bar: bar as u8,
        offset: offset as u32,
        length: length as u32,
        ..Cap::default()
    };
    let notify_len = queues as u64 * u64::from(NOTIFY_MULTIPLIER);
    let notify = NotifyCap {
        cap: Cap {
            cap_len: size_of::<NotifyCap>() as u8,
            ..structure(cfg_type::NOTIFY, NOTIFY, 0, notify_len)
        },
        notify_off_multiplier: NOTIFY_MULTIPLIER,
    };
    // Without id and link, which the list's builder puts in front.
    let body = |bytes: &[u8]| bytes[2..].to_vec();
    let space = ConfigSpace::new(pci::VENDOR_ID, pci::DEVICE_ID, pci::CLASS)
        .with_revision(pci::REVISION)
        .with_capability(cap::PCIE, &pcie, &[])
        .with_capability(cap::MSIX, &msix, &[0, 0xc0])
        .with_capability(pci::CAP_ID, &body(notify.as_bytes()), &[]);
    [
        structure(cfg_type::COMMON, REGISTERS, COMMON, common::LEN),
        structure(cfg_type::ISR, REGISTERS, ISR, 1),
        structure(cfg_type::DEVICE, REGISTERS, DEVICE, config::LEN),
    ]
    .iter()
    .fold(space, |space, cap| space.with_capability(pci::CAP_ID, &body(cap.as_bytes()), &[]))
}
