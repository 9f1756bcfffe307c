//! The command registers, what commands answer, and the software error register (the specification, chapters
//! "Administrative Commands" and "Register Descriptions").

use bitfield_struct::bitfield;

/// CMD ("Command Register"). Writing it starts the command; ignored while one is active.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct Cmd {
    /// What the command applies to, see [`Command`].
    #[bits(20)]
    pub operand: u32,
    /// A [`Command`].
    #[bits(5)]
    pub code: u8,
    #[bits(6)]
    __: u8,
    /// Signal vector 0 and set [`IntCause::command`] on completion.
    pub request_interrupt: bool,
}

/// Command codes ("Administrative Commands").
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Command {
    /// Checks the configuration and starts the device. No operand.
    EnableDevice = 1,
    /// Drains and disables all queues, then stops the device.
    DisableDevice = 2,
    /// Waits until every descriptor accepted before it has completed.
    DrainAll = 3,
    /// As drain, but drops what has not begun.
    AbortAll = 4,
    /// Stops, and sets the configuration to its initial values.
    ResetDevice = 5,
    /// Operand: the queue's index.
    EnableWq = 6,
    /// Operand: [`wq_operand`]; several queues of one set of 16. Drains them first.
    DisableWq = 7,
    /// Operand: [`wq_operand`].
    DrainWq = 8,
    /// Operand: [`wq_operand`].
    AbortWq = 9,
    /// Operand: [`wq_operand`]. Aborts, disables, and sets the configuration to its initial values.
    ResetWq = 10,
    /// Operand: a PASID.
    DrainPasid = 11,
    /// Operand: a PASID.
    AbortPasid = 12,
    /// Operand: an index into the MSI-X table (or, with bit 16, the message storage). The handle is the result.
    RequestInterruptHandle = 13,
    /// Operand: a handle, with bit 16 as in the request.
    ReleaseInterruptHandle = 14,
}

impl Command {
    /// All commands, in the order of their codes, which start from 1.
    pub const ALL: [Self; 14] = [
        Self::EnableDevice,
        Self::DisableDevice,
        Self::DrainAll,
        Self::AbortAll,
        Self::ResetDevice,
        Self::EnableWq,
        Self::DisableWq,
        Self::DrainWq,
        Self::AbortWq,
        Self::ResetWq,
        Self::DrainPasid,
        Self::AbortPasid,
        Self::RequestInterruptHandle,
        Self::ReleaseInterruptHandle,
    ];

    /// The command with this code.
    pub fn from_code(code: u8) -> Option<Self> {
        Self::ALL.get(usize::from(code).checked_sub(1)?).copied()
    }
}

/// The operand of the commands that take a set of work queues: bits 15:0 say which of the sixteen queues that
/// start at 16 times bits 19:16. This is the set of one.
pub const fn wq_operand(wq: u32) -> u32 {
    1 << (wq % 16) | (wq / 16) << 16
}

/// CMDSTS ("Command Status Register").
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct CmdSts {
    /// A [`CommandError`], valid once `active` is clear.
    pub error: u8,
    /// What the command returns: an interrupt handle.
    pub result: u16,
    #[bits(7)]
    __: u8,
    /// The command has not completed yet.
    pub active: bool,
}

/// Why a command failed ("Command Status Register", error codes).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CommandError(pub u8);

#[allow(missing_docs, reason = "text() says what each means")]
impl CommandError {
    pub const NONE: Self = Self(0x00);
    pub const BAD_COMMAND: Self = Self(0x01);
    pub const BAD_WQ: Self = Self(0x02);
    pub const HARDWARE: Self = Self(0x03);
    pub const DEVICE_NOT_DISABLED: Self = Self(0x10);
    pub const CONFIG: Self = Self(0x11);
    pub const BUS_MASTER_OFF: Self = Self(0x12);
    pub const DEVICE_PASID: Self = Self(0x13);
    pub const TOTAL_WQ_SIZE: Self = Self(0x14);
    pub const GROUP_MEMBER_TWICE: Self = Self(0x15);
    pub const GROUP_READ_BUFFERS: Self = Self(0x16);
    pub const GROUP_INCOMPLETE: Self = Self(0x17);
    pub const GROUP_OUT_OF_RANGE: Self = Self(0x18);
    pub const DEVICE_NOT_ENABLED: Self = Self(0x20);
    pub const WQ_NOT_DISABLED: Self = Self(0x21);
    pub const WQ_SIZE: Self = Self(0x22);
    pub const WQ_PRIORITY: Self = Self(0x23);
    pub const WQ_MODE: Self = Self(0x24);
    pub const WQ_BLOCK_ON_FAULT: Self = Self(0x25);
    pub const WQ_PASID: Self = Self(0x26);
    pub const WQ_MAX_BATCH: Self = Self(0x27);
    pub const WQ_MAX_TRANSFER: Self = Self(0x28);
    pub const DEVICE_DISABLED: Self = Self(0x31);
    pub const WQ_NOT_ENABLED: Self = Self(0x32);
    pub const BAD_INTERRUPT_INDEX: Self = Self(0x41);
    pub const NO_HANDLE: Self = Self(0x42);

    /// What it means, for messages.
    pub const fn text(self) -> &'static str {
        match self {
            Self::NONE => "no error",
            Self::BAD_COMMAND => "the command code or its operand is invalid",
            Self::BAD_WQ => "there is no such work queue",
            Self::HARDWARE => "the hardware failed",
            Self::DEVICE_NOT_DISABLED => "the device is not disabled",
            Self::CONFIG => "the configuration of the device is invalid",
            Self::BUS_MASTER_OFF => "bus mastering is off",
            Self::DEVICE_PASID => "the PASID capability does not suit the configuration",
            Self::TOTAL_WQ_SIZE => "the work queues' sizes add up to more than the device has",
            Self::GROUP_MEMBER_TWICE => "a work queue or engine is in two groups, or one with a size in none",
            Self::GROUP_READ_BUFFERS => "the groups' read buffers do not fit",
            Self::GROUP_INCOMPLETE => "a group has work queues but no engine, or engines but no work queue",
            Self::GROUP_OUT_OF_RANGE => "a group names a work queue or engine that does not exist",
            Self::DEVICE_NOT_ENABLED => "the device is not enabled",
            Self::WQ_NOT_DISABLED => "the work queue is not disabled",
            Self::WQ_SIZE => "the work queue's size or threshold is invalid",
            Self::WQ_PRIORITY => "the work queue's priority is 0",
            Self::WQ_MODE => "the device does not have this mode of work queue",
            Self::WQ_BLOCK_ON_FAULT => "block on fault is set, but the device does not have it",
            Self::WQ_PASID => "the work queue's PASID setting does not suit its mode or the PASID capability",
            Self::WQ_MAX_BATCH => "the work queue's maximum batch size is over the device's",
            Self::WQ_MAX_TRANSFER => "the work queue's maximum transfer size is over the device's",
            Self::DEVICE_DISABLED => "the device is disabled",
            Self::WQ_NOT_ENABLED => "a work queue of the operand is not enabled",
            Self::BAD_INTERRUPT_INDEX => "there is no interrupt with this index or handle",
            Self::NO_HANDLE => "no interrupt handle is free",
            _ => "an error that the specification does not name",
        }
    }
}

/// SWERR, first word ("Software Error Register"). The error is a `Status` where a descriptor is to
/// blame, else a [`SubmissionError`].
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct SwErr {
    /// The register holds an error; it holds on to the first until acknowledged.
    pub valid: bool,
    /// More errors came since.
    pub overflow: bool,
    /// Operation, PASID, privilege, batch and invalid flags are meaningful.
    pub descriptor_valid: bool,
    /// The work queue's index is meaningful.
    pub wq_valid: bool,
    /// The descriptor came from a batch.
    pub batch: bool,
    /// With a fault: it was a write.
    pub write: bool,
    /// The descriptor was privileged.
    pub privileged: bool,
    __: bool,
    /// What went wrong.
    pub error: u8,
    /// The work queue.
    pub wq: u8,
    __: u8,
    /// The descriptor's opcode.
    pub opcode: u8,
    /// The descriptor's PASID.
    #[bits(20)]
    pub pasid: u32,
    #[bits(4)]
    __: u8,
}

/// SWERR, second word.
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct SwErrBatch {
    /// Which descriptor of the batch.
    pub index: u16,
    __: u16,
    /// Flags that are not allowed, where the error is invalid flags.
    pub invalid_flags: u32,
}

/// Errors in [`SwErr`] of a submission that never became a descriptor. The public documents name no codes for
/// these; the values are outside the range of completion statuses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SubmissionError(pub u8);

#[allow(missing_docs, reason = "text() says what each means")]
impl SubmissionError {
    pub const WQ_DISABLED: Self = Self(0x60);
    pub const WQ_FULL: Self = Self(0x61);
    pub const WRONG_MODE: Self = Self(0x62);
    pub const BAD_WRITE: Self = Self(0x63);

    /// What it means, for messages; `None` where the code is a status of a descriptor.
    pub const fn text(self) -> Option<&'static str> {
        match self {
            Self::WQ_DISABLED => Some("a descriptor was posted to a work queue that is not enabled"),
            Self::WQ_FULL => Some("a descriptor was posted to a full work queue and dropped"),
            Self::WRONG_MODE => Some("a descriptor was posted to a shared work queue"),
            Self::BAD_WRITE => Some("a write to a portal was not a whole descriptor"),
            _ => None,
        }
    }
}
