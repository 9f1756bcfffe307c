//! Registers in BAR 0 (the specification, chapter "Register Descriptions").

use bitfield_struct::bitfield;

/// Offsets of the registers that have a fixed place ("Memory-Mapped Registers").
pub mod reg {
    /// Version: major in bits 15:8, minor in bits 7:0. 32 bits.
    pub const VERSION: u64 = 0x00;
    /// General capabilities, `GenCap`.
    pub const GENCAP: u64 = 0x10;
    /// Work queue capabilities, `WqCap`.
    pub const WQCAP: u64 = 0x20;
    /// Group capabilities, `GrpCap`.
    pub const GRPCAP: u64 = 0x30;
    /// Engine capabilities, `EngCap`.
    pub const ENGCAP: u64 = 0x38;
    /// Operation capabilities: 256 bits, one an opcode.
    pub const OPCAP: u64 = 0x40;
    /// Places of the tables, `Offsets`; 128 bits, of which the upper 64 hold
    /// `PerfmonOffset`.
    pub const OFFSETS: u64 = 0x60;
    /// General configuration, `GenCfg`. 32 bits.
    pub const GENCFG: u64 = 0x80;
    /// General control, `GenCtrl`. 32 bits.
    pub const GENCTRL: u64 = 0x88;
    /// General status, `GenSts`. 32 bits.
    pub const GENSTS: u64 = 0x90;
    /// Interrupt causes, `IntCause`, cleared by writing ones. 32 bits.
    pub const INTCAUSE: u64 = 0x98;
    /// Command, `Cmd`. 32 bits.
    pub const CMD: u64 = 0xa0;
    /// Command status, `CmdSts`. 32 bits.
    pub const CMDSTS: u64 = 0xa8;
    /// Command capabilities: bit n stands for command code n. 32 bits.
    pub const CMDCAP: u64 = 0xb0;
    /// Software error: four 64-bit words, `SwErr`, `SwErrBatch`, the address,
    /// and a reserved one. Acknowledged by writing ones to `valid` and `overflow`.
    pub const SWERR: u64 = 0xc0;
    /// Event log configuration (from version 2 on).
    pub const EVLCFG: u64 = 0xe0;
    /// Event log status (from version 2 on).
    pub const EVLSTATUS: u64 = 0xf0;
}

/// What the table offsets in [`Offsets`] are multiplied with.
pub const TABLE_UNIT: u64 = 0x100;
/// Bytes of BAR 0 in which the registers, tables, MSI-X table and pending bits lie.
pub const REGISTER_BAR_LEN: u64 = 0x1_0000;
/// Where BAR 0 holds the MSI-X table (as the MSI-X capability of all known parts says).
pub const MSIX_TABLE: u64 = 0x2000;
/// Where BAR 0 holds the MSI-X pending bits.
pub const MSIX_PBA: u64 = 0x3000;

/// GENCAP ("General Capabilities Register").
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct GenCap {
    /// Descriptors may ask to wait for a page fault to be resolved.
    pub block_on_fault: bool,
    /// Memory move takes overlapping buffers.
    pub overlapping_copy: bool,
    /// Cache control works for writes to memory.
    pub cache_control_memory: bool,
    /// Cache control works for cache flushes.
    pub cache_control_flush: bool,
    /// CMDCAP says which commands there are.
    pub command_capabilities: bool,
    #[bits(3)]
    __: u8,
    /// Descriptors may ask for a readback of the destination.
    pub destination_readback: bool,
    /// Drain descriptors may name addresses to read back.
    pub drain_readback: bool,
    #[bits(3)]
    __: u8,
    /// Sizes of event log entry that there are.
    #[bits(2)]
    pub event_log: u8,
    /// Batches may be continued after a fault.
    pub batch_continuation: bool,
    /// log2 of the largest transfer size.
    #[bits(5)]
    pub max_transfer_shift: u32,
    /// log2 of the largest batch.
    #[bits(4)]
    pub max_batch_shift: u32,
    /// Entries of interrupt message storage, in units of 256.
    #[bits(6)]
    pub max_ims: u16,
    /// The tables can be written; without it the device comes configured.
    pub configurable: bool,
    __: u32,
}

/// WQCAP ("Work Queue Capabilities Register").
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct WqCap {
    /// Entries that all work queues share.
    pub total_size: u16,
    /// Work queues.
    pub wqs: u8,
    /// A WQCFG has 32 bytes shifted left by this.
    #[bits(4)]
    pub wqcfg_size: u32,
    #[bits(20)]
    __: u32,
    /// Queues can be shared.
    pub shared: bool,
    /// Queues can be dedicated.
    pub dedicated: bool,
    /// Address translation services can be switched off for one queue.
    pub ats: bool,
    /// Queues have priorities.
    pub priority: bool,
    /// WQCFG tells how full a queue is.
    pub occupancy: bool,
    /// A queue can interrupt when it becomes empty enough.
    pub occupancy_interrupt: bool,
    /// Operations can be switched off for one queue.
    pub op_config: bool,
    /// Page requests can be switched off for one queue.
    pub prs: bool,
    __: u8,
}

impl WqCap {
    /// Bytes from one WQCFG to the next.
    pub const fn wqcfg_stride(self) -> u64 {
        32 << self.wqcfg_size()
    }
}

/// GRPCAP ("Group Capabilities Register").
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct GrpCap {
    /// Groups.
    pub groups: u8,
    /// Read buffers of the device.
    pub read_buffers: u8,
    /// Read buffers can be given to groups.
    pub read_buffer_control: bool,
    /// There is a limit that all groups share.
    pub read_buffer_limit: bool,
    /// The progress of a descriptor can be limited.
    pub progress_limit: bool,
    #[bits(45)]
    __: u64,
}

/// ENGCAP ("Engine Capabilities Register").
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct EngCap {
    /// Engines.
    pub engines: u8,
    #[bits(56)]
    __: u64,
}

/// OFFSETS, lower 64 bits ("Table Offsets Register"): each times [`TABLE_UNIT`] is an offset in BAR 0.
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct Offsets {
    /// Group configuration, [`GRPCFG_STRIDE`] bytes a group.
    pub grpcfg: u16,
    /// Work queue configuration, [`WqCap::wqcfg_stride`] bytes a queue.
    pub wqcfg: u16,
    /// MSI-X permissions, [`MSIXPERM_STRIDE`] bytes a vector.
    pub msix_perm: u16,
    /// Interrupt message storage.
    pub ims: u16,
}

/// OFFSETS, upper 64 bits.
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct PerfmonOffset {
    /// Performance monitoring registers.
    pub perfmon: u16,
    #[bits(48)]
    __: u64,
}

/// GENCFG ("General Configuration Register"). Read-only while the device is enabled.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct GenCfg {
    /// Read buffers that all groups with `use_limit` share.
    pub read_buffer_limit: u8,
    #[bits(4)]
    __: u8,
    /// Descriptors with a user's privilege may ask for interrupts.
    pub user_interrupts: bool,
    /// The event log is on (from version 2 on).
    pub event_log: bool,
    #[bits(18)]
    __: u32,
}

/// GENCTRL ("General Control Register").
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct GenCtrl {
    /// A software error interrupts.
    pub software_error_interrupt: bool,
    /// Halting interrupts.
    pub halt_interrupt: bool,
    /// The event log interrupts (from version 2 on).
    pub event_log_interrupt: bool,
    #[bits(29)]
    __: u32,
}

/// GENSTS ("General Status Register").
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct GenSts {
    /// What the device is doing.
    #[bits(2)]
    pub state: DeviceState,
    /// When halted: the reset that is needed. 0 software, 1 function-level, 2 warm, 3 cold.
    #[bits(2)]
    pub reset_type: u8,
    #[bits(28)]
    __: u32,
}

/// The states in [`GenSts`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceState {
    /// Takes no descriptors; can be configured.
    Disabled = 0,
    /// Works.
    Enabled = 1,
    /// Is being disabled and finishes its descriptors.
    Draining = 2,
    /// Stopped by an error.
    Halted = 3,
}

impl DeviceState {
    const fn from_bits(bits: u8) -> Self {
        match bits & 3 {
            0 => Self::Disabled,
            1 => Self::Enabled,
            2 => Self::Draining,
            _ => Self::Halted,
        }
    }

    const fn into_bits(self) -> u8 {
        self as u8
    }
}

/// INTCAUSE ("Interrupt Cause Register"): why MSI-X vector 0 was signalled.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct IntCause {
    /// SWERR has something.
    pub software_error: bool,
    /// A command has completed.
    pub command: bool,
    /// A queue's occupancy fell to its limit.
    pub occupancy: bool,
    /// A performance counter overflowed.
    pub perfmon: bool,
    /// The device halted.
    pub halt: bool,
    /// The event log has something.
    pub event_log: bool,
    #[bits(25)]
    __: u32,
    /// An interrupt handle was revoked.
    pub handle_revoked: bool,
}
