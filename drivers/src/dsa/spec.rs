//! The layouts and constants of Intel's Data Streaming Accelerator, and nothing else: what the driver and the model
//! agree on.
//!
//! Source: *Intel Data Streaming Accelerator Architecture Specification*, order number 341204, called "the
//! specification" here; sections are given by their titles, since the numbers move between revisions. Values were
//! checked against Linux's `include/uapi/linux/idxd.h` and `drivers/dma/idxd/registers.h`. All of it is
//! little-endian.

mod commands;
mod completion;
mod descriptor;
mod registers;
mod tables;

pub use commands::*;
pub use completion::*;
pub use descriptor::*;
pub use registers::*;
pub use tables::*;

const _: () = assert!(cfg!(target_endian = "little"), "descriptors are written in the CPU's byte order");

/// PCI vendor id.
pub const VENDOR_ID: u16 = 0x8086;
/// PCI device ids: Sapphire Rapids, Granite Rapids-D, Diamond Rapids.
pub const DEVICE_IDS: [u16; 3] = [0x0b25, 0x11fb, 0x1212];
/// PCI class: system peripheral, other.
pub const CLASS: u32 = 0x08_8000;

/// The BAR that holds the registers ("PCI Configuration Registers").
pub const REGISTER_BAR: usize = 0;
/// The BAR that holds the portals.
pub const PORTAL_BAR: usize = 2;

/// Bytes in one portal page. A 64-byte write to any 64-byte aligned address in it submits a descriptor
/// ("Portals").
pub const PORTAL_PAGE: u64 = 0x1000;
/// Portal pages of one work queue, in the order of [`Portal`].
pub const PORTALS_PER_WQ: u64 = 4;
/// Bytes of the portal BAR that belong to one work queue.
pub const PORTAL_STRIDE: u64 = PORTAL_PAGE * PORTALS_PER_WQ;

/// Which of a work queue's portal pages. A limited portal of a shared queue accepts descriptors only while the
/// queue holds fewer than its threshold; for a dedicated queue all four are alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Portal {
    /// The whole queue; interrupt handles are MSI-X vectors.
    UnlimitedMsix = 0,
    /// Up to the threshold; interrupt handles are MSI-X vectors.
    LimitedMsix = 1,
    /// The whole queue; interrupt handles are entries of the interrupt message storage.
    UnlimitedIms = 2,
    /// Up to the threshold; interrupt handles are entries of the interrupt message storage.
    LimitedIms = 3,
}

impl Portal {
    /// Where this page of work queue `wq` starts in the portal BAR.
    pub const fn offset(self, wq: u64) -> u64 {
        wq * PORTAL_STRIDE + self as u64 * PORTAL_PAGE
    }

    /// The page with this number modulo 4.
    pub const fn from_page(page: u64) -> Self {
        match page % PORTALS_PER_WQ {
            0 => Self::UnlimitedMsix,
            1 => Self::LimitedMsix,
            2 => Self::UnlimitedIms,
            _ => Self::LimitedIms,
        }
    }

    /// Whether the threshold applies.
    pub const fn is_limited(self) -> bool {
        matches!(self, Self::LimitedMsix | Self::LimitedIms)
    }
}
