//! Descriptors and completion records (the specification, chapter "Descriptor Formats").

use bitfield_struct::bitfield;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Operation codes ("Descriptor Types").
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
#[allow(missing_docs, reason = "the names are the specification's")]
pub enum Opcode {
    NoOp = 0x00,
    Batch = 0x01,
    Drain = 0x02,
    MemoryMove = 0x03,
    Fill = 0x04,
    Compare = 0x05,
    ComparePattern = 0x06,
    CreateDelta = 0x07,
    ApplyDelta = 0x08,
    Dualcast = 0x09,
    Crc = 0x10,
    CopyCrc = 0x11,
    DifCheck = 0x12,
    DifInsert = 0x13,
    DifStrip = 0x14,
    DifUpdate = 0x15,
    CacheFlush = 0x20,
}

impl Opcode {
    /// All operations of version 1.
    pub const ALL: [Self; 17] = [
        Self::NoOp,
        Self::Batch,
        Self::Drain,
        Self::MemoryMove,
        Self::Fill,
        Self::Compare,
        Self::ComparePattern,
        Self::CreateDelta,
        Self::ApplyDelta,
        Self::Dualcast,
        Self::Crc,
        Self::CopyCrc,
        Self::DifCheck,
        Self::DifInsert,
        Self::DifStrip,
        Self::DifUpdate,
        Self::CacheFlush,
    ];

    /// The operation with this code.
    pub const fn from_code(code: u8) -> Option<Self> {
        Some(match code {
            0x00 => Self::NoOp,
            0x01 => Self::Batch,
            0x02 => Self::Drain,
            0x03 => Self::MemoryMove,
            0x04 => Self::Fill,
            0x05 => Self::Compare,
            0x06 => Self::ComparePattern,
            0x07 => Self::CreateDelta,
            0x08 => Self::ApplyDelta,
            0x09 => Self::Dualcast,
            0x10 => Self::Crc,
            0x11 => Self::CopyCrc,
            0x12 => Self::DifCheck,
            0x13 => Self::DifInsert,
            0x14 => Self::DifStrip,
            0x15 => Self::DifUpdate,
            0x20 => Self::CacheFlush,
            _ => return None,
        })
    }

    /// Its bit in OPCAP and in a queue's `op_config`, all operations of version 1 being in the first 64.
    pub const fn bit(self) -> u64 {
        1 << self as u8
    }
}

/// Bits of a descriptor's flags ("Flags"). Bits 23:16 depend on the operation.
pub mod flag {
    /// Batches: wait for the descriptors before this one.
    pub const FENCE: u32 = 1 << 0;
    /// Wait until a page fault is resolved.
    pub const BLOCK_ON_FAULT: u32 = 1 << 1;
    /// The completion record address is valid.
    pub const COMPLETION_ADDRESS_VALID: u32 = 1 << 2;
    /// Write a completion record also on success.
    pub const REQUEST_COMPLETION: u32 = 1 << 3;
    /// Signal the interrupt on completion.
    pub const REQUEST_INTERRUPT: u32 = 1 << 4;
    /// Steering tag of the completion record.
    pub const COMPLETION_STEERING: u32 = 1 << 5;
    /// Compare the result with the expected one; a difference is `Status::FALSE_PREDICATE`.
    pub const CHECK_RESULT: u32 = 1 << 7;
    /// Writes go to the cache (a hint); for a cache flush: keep the lines valid.
    pub const CACHE_CONTROL: u32 = 1 << 8;
    /// Traffic class B for the first address.
    pub const ADDRESS1_TC: u32 = 1 << 9;
    /// Traffic class B for the second address.
    pub const ADDRESS2_TC: u32 = 1 << 10;
    /// Traffic class B for the third address.
    pub const ADDRESS3_TC: u32 = 1 << 11;
    /// Traffic class B for the completion record.
    pub const COMPLETION_TC: u32 = 1 << 12;
    /// Write in order.
    pub const STRICT_ORDERING: u32 = 1 << 13;
    /// Read back the destination before completing.
    pub const DESTINATION_READBACK: u32 = 1 << 14;
    /// Steering tag of the destination.
    pub const DESTINATION_STEERING: u32 = 1 << 15;

    /// Drain: the first readback address is valid.
    pub const DRAIN_READBACK1: u32 = 1 << 16;
    /// Drain: the second readback address is valid.
    pub const DRAIN_READBACK2: u32 = 1 << 17;
    /// Drain: no implicit readback of traffic class A.
    pub const DRAIN_SUPPRESS_A: u32 = 1 << 18;
    /// Drain: no implicit readback of traffic class B.
    pub const DRAIN_SUPPRESS_B: u32 = 1 << 19;
    /// Dualcast: steering tag of the second destination.
    pub const DUALCAST_STEERING2: u32 = 1 << 16;
    /// CRC: take the seed from the seed address.
    pub const CRC_READ_SEED: u32 = 1 << 16;
    /// CRC: neither invert nor reflect seed and result.
    pub const CRC_BYPASS_INVERSION: u32 = 1 << 17;
    /// CRC: bit 7 of each byte comes first.
    pub const CRC_BYPASS_REFLECTION: u32 = 1 << 18;
}

/// A descriptor: what one 64-byte write to a portal submits, and what a batch is a list of. In memory it is aligned
/// to 64 bytes. Which names of a field apply depends on the operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C, align(64))]
pub struct Descriptor {
    /// PASID and privilege; a dedicated queue uses its own instead.
    pub context: Context,
    /// [`flag`]s in bits 23:0, opcode in bits 31:24.
    pub operation: u32,
    /// Where the completion record goes, a multiple of 32.
    pub completion: u64,
    /// Source; pattern of a fill; list of a batch (a multiple of 64); record of apply delta; first readback
    /// address of a drain.
    pub source: u64,
    /// Destination; second source of a comparison; pattern of compare pattern; second readback address of a drain.
    pub destination: u64,
    /// Bytes to transfer, or descriptors in a batch.
    pub size: u32,
    /// The interrupt to signal.
    pub interrupt_handle: u16,
    /// Zero.
    pub reserved: u16,
    /// What only the operation has, see the `with_` constructors.
    pub specific: [u64; 3],
}

const _: () = assert!(size_of::<Descriptor>() == 64 && align_of::<Descriptor>() == 64);

/// First word of a [`Descriptor`].
#[bitfield(u32)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Context {
    /// Shared queues: the PASID of every access.
    #[bits(20)]
    pub pasid: u32,
    /// Zero.
    #[bits(11)]
    pub reserved: u16,
    /// Shared queues: accesses are privileged.
    pub privileged: bool,
}

impl Descriptor {
    /// A descriptor with this operation and these [`flag`]s, and nothing else.
    #[inline]
    pub const fn new(opcode: Opcode, flags: u32) -> Self {
        Self {
            context: Context::new(),
            operation: (opcode as u32) << 24 | flags & 0x00ff_ffff,
            completion: 0,
            source: 0,
            destination: 0,
            size: 0,
            interrupt_handle: 0,
            reserved: 0,
            specific: [0; 3],
        }
    }

    /// The operation code.
    #[inline]
    pub const fn opcode(&self) -> u8 {
        (self.operation >> 24) as u8
    }

    /// The [`flag`]s.
    #[inline]
    pub const fn flags(&self) -> u32 {
        self.operation & 0x00ff_ffff
    }

    /// Compare and compare pattern: the result that [`flag::CHECK_RESULT`] expects.
    #[inline]
    #[must_use]
    pub const fn with_expected_result(mut self, result: u8) -> Self {
        self.specific[0] = result as u64;
        self
    }

    /// The other direction of [`with_expected_result`](Self::with_expected_result).
    #[inline]
    pub const fn expected_result(&self) -> u8 {
        self.specific[0] as u8
    }

    /// Create delta: where the record goes, its largest size (a multiple of 10, at least 80), and the results that
    /// [`flag::CHECK_RESULT`] expects, a bit for each `delta_result`.
    #[inline]
    #[must_use]
    pub const fn with_delta(mut self, record: u64, max_size: u32, expected_mask: u8) -> Self {
        self.specific = [record, max_size as u64, expected_mask as u64];
        self
    }

    /// Create delta: where the record goes.
    #[inline]
    pub const fn delta_record(&self) -> u64 {
        self.specific[0]
    }

    /// Create delta: the record's largest size.
    #[inline]
    pub const fn max_delta_size(&self) -> u32 {
        self.specific[1] as u32
    }

    /// Create delta: the results that are expected.
    #[inline]
    pub const fn expected_result_mask(&self) -> u8 {
        self.specific[2] as u8
    }

    /// Apply delta: the record's size, a multiple of 10.
    #[inline]
    #[must_use]
    pub const fn with_delta_size(mut self, size: u32) -> Self {
        self.specific[0] = size as u64;
        self
    }

    /// The other direction of [`with_delta_size`](Self::with_delta_size).
    #[inline]
    pub const fn delta_size(&self) -> u32 {
        self.specific[0] as u32
    }

    /// Dualcast: the second destination.
    #[inline]
    #[must_use]
    pub const fn with_destination2(mut self, address: u64) -> Self {
        self.specific[0] = address;
        self
    }

    /// The other direction of [`with_destination2`](Self::with_destination2).
    #[inline]
    pub const fn destination2(&self) -> u64 {
        self.specific[0]
    }

    /// CRC and copy with CRC: the seed.
    #[inline]
    #[must_use]
    pub const fn with_crc_seed(mut self, seed: u32) -> Self {
        self.specific[0] = seed as u64;
        self
    }

    /// The other direction of [`with_crc_seed`](Self::with_crc_seed).
    #[inline]
    pub const fn crc_seed(&self) -> u32 {
        self.specific[0] as u32
    }

    /// CRC with [`flag::CRC_READ_SEED`]: where the seed is, a multiple of 4.
    #[inline]
    #[must_use]
    pub const fn with_crc_seed_address(mut self, address: u64) -> Self {
        self.specific[1] = address;
        self
    }

    /// The other direction of [`with_crc_seed_address`](Self::with_crc_seed_address).
    #[inline]
    pub const fn crc_seed_address(&self) -> u64 {
        self.specific[1]
    }

    /// DIF operations: how. Check and strip have source tags only, insert has destination tags only.
    #[inline]
    #[must_use]
    pub const fn with_dif(mut self, control: DifControl, source: DifTags, destination: DifTags) -> Self {
        self.specific = [control.into_bits(), source.into_bits(), destination.into_bits()];
        self
    }

    /// DIF operations: block size and flags.
    #[inline]
    pub const fn dif_control(&self) -> DifControl {
        DifControl::from_bits(self.specific[0])
    }

    /// DIF operations: tags of the first source block.
    #[inline]
    pub const fn dif_source_tags(&self) -> DifTags {
        DifTags::from_bits(self.specific[1])
    }

    /// DIF operations: tags of the first destination block.
    #[inline]
    pub const fn dif_destination_tags(&self) -> DifTags {
        DifTags::from_bits(self.specific[2])
    }
}

/// First operation-specific word of the DIF operations ("DIF Check" and the following).
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct DifControl {
    /// Check, strip and update: how the source is checked.
    #[bits(8)]
    pub source: DifSourceFlags,
    /// Insert and update: how the destination is made.
    #[bits(8)]
    pub destination: DifDestinationFlags,
    /// Data bytes in a block: 0 is 512, 1 is 520, 2 is 4096, 3 is 4104.
    #[bits(2)]
    pub block: u8,
    /// Start the guard's CRC with all ones instead of zero.
    pub invert_crc_seed: bool,
    /// Store the guard inverted.
    pub invert_crc_result: bool,
    /// Zero.
    #[bits(4)]
    pub reserved_flags: u8,
    /// Zero.
    #[bits(40)]
    pub reserved: u64,
}

/// Source DIF flags.
#[bitfield(u8)]
#[derive(PartialEq, Eq)]
pub struct DifSourceFlags {
    /// Report a block that `all_f_detect` found as an error.
    pub all_f_error: bool,
    /// A block whose tags and guard are all ones is not checked.
    pub all_f_detect: bool,
    /// A block whose application tag is all ones is not checked.
    pub app_tag_f_detect: bool,
    /// A block whose application and reference tags are all ones is not checked.
    pub app_and_ref_tag_f_detect: bool,
    /// The application tag grows by one a block.
    pub increment_app_tag: bool,
    /// Do not check the guard.
    pub skip_guard_check: bool,
    /// Do not check the reference tag.
    pub skip_ref_tag_check: bool,
    /// The reference tag stays the same instead of growing by one a block.
    pub fixed_ref_tag: bool,
}

/// Destination DIF flags.
#[bitfield(u8)]
#[derive(PartialEq, Eq)]
pub struct DifDestinationFlags {
    /// Zero.
    #[bits(3)]
    pub reserved: u8,
    /// Update: the application tag is the source's.
    pub pass_app_tag: bool,
    /// The application tag grows by one a block.
    pub increment_app_tag: bool,
    /// Update: the guard is the source's.
    pub pass_guard: bool,
    /// Update: the reference tag is the source's.
    pub pass_ref_tag: bool,
    /// The reference tag stays the same instead of growing by one a block.
    pub fixed_ref_tag: bool,
}

/// Tags of a block, in descriptors (of the first block) and in completion records (of the next block).
#[bitfield(u64)]
#[derive(PartialEq, Eq)]
pub struct DifTags {
    /// Reference tag.
    pub ref_tag: u32,
    /// Bits of the application tag that are not compared, or written as zero.
    pub app_tag_mask: u16,
    /// Application tag.
    pub app_tag: u16,
}

/// Bytes of one entry of a delta record: 16 bits of index, in units of 8 bytes, and the 8 bytes ("Create Delta
/// Record").
pub const DELTA_ENTRY: u32 = 10;
/// The least that a descriptor may give as the largest size of a delta record.
pub const DELTA_MIN_SIZE: u32 = 80;
/// The most that create and apply delta cover: 2^16 units of 8 bytes.
pub const DELTA_MAX_TRANSFER: u32 = 8 << 16;
