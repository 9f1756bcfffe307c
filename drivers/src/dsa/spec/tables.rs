//! The configuration tables in BAR 0: groups, work queues, interrupt permissions (the specification, chapter
//! "Register Descriptions").

use bitfield_struct::bitfield;

/// Bytes of GRPCFG a group ("Group Configuration Table").
pub const GRPCFG_STRIDE: u64 = 64;
/// In a GRPCFG: four 64-bit words, a bit a work queue.
pub const GRPCFG_WQS: u64 = 0;
/// In a GRPCFG: one 64-bit word, a bit an engine.
pub const GRPCFG_ENGINES: u64 = 32;
/// In a GRPCFG: [`GrpFlags`].
pub const GRPCFG_FLAGS: u64 = 40;

/// GRPFLAGS ("Group Configuration Table").
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct GrpFlags {
    /// Traffic class A; on the known parts it must be 1.
    #[bits(3)]
    pub tc_a: u8,
    /// Traffic class B; on the known parts it must be 1.
    #[bits(3)]
    pub tc_b: u8,
    __: bool,
    /// The group keeps to [`GenCfg::read_buffer_limit`].
    pub use_read_buffer_limit: bool,
    /// Read buffers that are this group's own.
    pub read_buffers_reserved: u8,
    #[bits(4)]
    __: u8,
    /// Read buffers that the group may use at most.
    pub read_buffers_allowed: u8,
    #[bits(4)]
    __: u8,
    /// Limit on a descriptor's progress.
    #[bits(2)]
    pub descriptor_progress_limit: u8,
    #[bits(2)]
    __: u8,
    /// Limit on a batch's progress.
    #[bits(2)]
    pub batch_progress_limit: u8,
    #[bits(26)]
    __: u32,
}

/// Offsets of the 32-bit words in a WQCFG ("Work Queue Configuration Table").
pub mod wqcfg {
    /// `WqSize`.
    pub const SIZE: u64 = 0;
    /// `WqThreshold`. The one word that can be written while the queue is enabled.
    pub const THRESHOLD: u64 = 4;
    /// `WqMode`.
    pub const MODE: u64 = 8;
    /// `WqLimits`.
    pub const LIMITS: u64 = 12;
    /// `WqOccupancyHandle`.
    pub const OCCUPANCY_HANDLE: u64 = 16;
    /// `WqOccupancyLimit`.
    pub const OCCUPANCY_LIMIT: u64 = 20;
    /// `WqStatus`.
    pub const STATUS: u64 = 24;
    /// 256 bits, one an opcode that the queue may do; only where `WqCap::op_config`.
    pub const OP_CONFIG: u64 = 32;
}

/// WQCFG, bytes 0 to 3.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct WqSize {
    /// Entries.
    pub size: u16,
    __: u16,
}

/// WQCFG, bytes 4 to 7.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct WqThreshold {
    /// Shared queues: entries that a limited portal may fill; 1 to the size.
    pub threshold: u16,
    __: u16,
}

/// WQCFG, bytes 8 to 11.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct WqMode {
    /// The queue is dedicated: one client, posted writes, PASID and privilege from here.
    pub dedicated: bool,
    /// Descriptors may ask to block on a fault.
    pub block_on_fault: bool,
    /// Do not use address translation services.
    pub ats_disable: bool,
    /// Do not send page requests.
    pub prs_disable: bool,
    /// 1 to 15, relative to the other queues of the group.
    #[bits(4)]
    pub priority: u8,
    /// Dedicated queues: the PASID of every access.
    #[bits(20)]
    pub pasid: u32,
    /// Dedicated queues: accesses have a PASID. Shared queues: must be set.
    pub pasid_enable: bool,
    /// Dedicated queues: accesses are privileged.
    pub privileged: bool,
    #[bits(2)]
    __: u8,
}

/// WQCFG, bytes 12 to 15.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct WqLimits {
    /// log2 of the largest transfer size.
    #[bits(5)]
    pub max_transfer_shift: u32,
    /// log2 of the largest batch.
    #[bits(4)]
    pub max_batch_shift: u32,
    #[bits(23)]
    __: u32,
}

/// WQCFG, bytes 16 to 19.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct WqOccupancyHandle {
    /// The interrupt to signal.
    pub handle: u16,
    /// The handle is of the message storage.
    pub ims: bool,
    #[bits(15)]
    __: u16,
}

/// WQCFG, bytes 20 to 23.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct WqOccupancyLimit {
    /// Interrupt when the occupancy falls to this.
    pub limit: u16,
    /// Interrupt once; the device clears it.
    pub enable: bool,
    #[bits(15)]
    __: u16,
}

/// WQCFG, bytes 24 to 27. Read-only.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct WqStatus {
    /// Descriptors in the queue.
    pub occupancy: u16,
    /// An occupancy interrupt is pending.
    pub occupancy_interrupt: bool,
    #[bits(12)]
    __: u16,
    /// The queue's mode can be chosen.
    pub mode_support: bool,
    /// What the queue is doing.
    #[bits(2)]
    pub state: WqState,
}

/// The states in [`WqStatus`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WqState {
    /// Takes no descriptors.
    Disabled = 0,
    /// Works.
    Enabled = 1,
    /// Is being disabled and finishes its descriptors.
    Draining = 2,
    /// Not defined.
    Reserved = 3,
}

impl WqState {
    const fn from_bits(bits: u8) -> Self {
        match bits & 3 {
            0 => Self::Disabled,
            1 => Self::Enabled,
            2 => Self::Draining,
            _ => Self::Reserved,
        }
    }

    const fn into_bits(self) -> u8 {
        self as u8
    }
}

/// Bytes of MSIXPERM a vector ("MSI-X Permissions Table").
pub const MSIXPERM_STRIDE: u64 = 8;

/// MSIXPERM: which descriptors may signal a vector.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct MsixPerm {
    #[bits(2)]
    __: u8,
    /// Any descriptor may (from version 2 on).
    pub ignore: bool,
    /// Only descriptors with this PASID; otherwise only those without one.
    pub pasid_enable: bool,
    __: u8,
    /// The PASID.
    #[bits(20)]
    pub pasid: u32,
}
