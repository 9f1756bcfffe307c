//! Completion records (the specification, chapter "Descriptor Formats", section "Completion Record").

use bitfield_struct::bitfield;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::DifTags;

/// A completion record, 32 bytes on a multiple of 32 ("Completion Record Format").
///
/// The first 64 bits, [`Handshake`], are *the* handshake word: the device stores the rest first, and then this
/// word with Release; the driver reads it with Acquire until its status is not zero. It is never accessed with
/// another width.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C, align(32))]
pub struct CompletionRecord {
    /// Status, result and bytes completed.
    pub handshake: Handshake,
    /// The address that faulted, after a page fault.
    pub fault_address: u64,
    /// What only the operation has, and the invalid flags.
    pub specific: [u64; 2],
}

const _: () = assert!(size_of::<CompletionRecord>() == 32 && align_of::<CompletionRecord>() == 32);

/// Offset of the handshake word in a [`CompletionRecord`].
pub const HANDSHAKE: usize = 0;

/// The handshake word of a [`CompletionRecord`].
#[bitfield(u64)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Handshake {
    /// A [`Status`]; zero until the record is written.
    pub status: u8,
    /// [`compare_result`], [`delta_result`] or [`dif_result`].
    pub result: u8,
    /// More of the fault (from version 2 on; version 1 writes zero).
    pub fault_info: u8,
    __: u8,
    /// Bytes of the source that are done (for a comparison, the offset of the first difference), or descriptors of a
    /// batch that were processed.
    pub completed: u32,
}

impl CompletionRecord {
    /// After [`Status::INVALID_FLAGS`]: the flags that are not allowed.
    #[inline]
    pub const fn invalid_flags(&self) -> u32 {
        self.specific[0] as u32 & 0x00ff_ffff
    }

    /// Create delta: bytes of the record.
    #[inline]
    pub const fn delta_size(&self) -> u32 {
        self.specific[0] as u32
    }

    /// CRC and copy with CRC: the value.
    #[inline]
    pub const fn crc(&self) -> u32 {
        self.specific[0] as u32
    }

    /// DIF check, strip and update: tags of the next source block.
    #[inline]
    pub const fn dif_source_tags(&self) -> DifTags {
        DifTags::from_bits(self.specific[0])
    }

    /// DIF insert and update: tags of the next destination block.
    #[inline]
    pub const fn dif_destination_tags(&self) -> DifTags {
        DifTags::from_bits(self.specific[1])
    }
}

/// Bits of [`Handshake::result`] after [`Status::DIF_ERROR`] ("DIF Status").
pub mod dif_result {
    /// The guard does not match.
    pub const GUARD: u8 = 1 << 0;
    /// The application tag does not match.
    pub const APP_TAG: u8 = 1 << 1;
    /// The reference tag does not match.
    pub const REF_TAG: u8 = 1 << 2;
    /// The block is all ones, and that was to be reported.
    pub const ALL_F: u8 = 1 << 3;
}

/// [`Handshake::result`] of compare and compare pattern.
pub mod compare_result {
    /// No difference.
    pub const EQUAL: u8 = 0;
    /// A difference, bytes completed being its offset.
    pub const DIFFERENT: u8 = 1;
}

/// [`Handshake::result`] of create delta.
pub mod delta_result {
    /// No difference; the record is empty.
    pub const EQUAL: u8 = 0;
    /// The record holds all differences.
    pub const COMPLETE: u8 = 1;
    /// The record is full; it covers the bytes completed.
    pub const OVERFLOW: u8 = 2;
}

/// How an operation ended ("Completion Status Codes"). Bit 7 goes with a fault and says that it was a write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Status(pub u8);

#[allow(missing_docs, reason = "text() says what each means")]
impl Status {
    pub const NONE: Self = Self(0x00);
    pub const SUCCESS: Self = Self(0x01);
    pub const FALSE_PREDICATE: Self = Self(0x02);
    pub const PAGE_FAULT: Self = Self(0x03);
    pub const PAGE_REQUEST_FAILED: Self = Self(0x04);
    pub const BATCH_FAILED: Self = Self(0x05);
    pub const BATCH_PAGE_FAULT: Self = Self(0x06);
    pub const DELTA_ORDER: Self = Self(0x07);
    pub const DELTA_OFFSET: Self = Self(0x08);
    pub const DIF_ERROR: Self = Self(0x09);
    pub const BAD_OPCODE: Self = Self(0x10);
    pub const INVALID_FLAGS: Self = Self(0x11);
    pub const RESERVED_NOT_ZERO: Self = Self(0x12);
    pub const TRANSFER_SIZE: Self = Self(0x13);
    pub const DESCRIPTOR_COUNT: Self = Self(0x14);
    pub const DELTA_SIZE: Self = Self(0x15);
    pub const OVERLAP: Self = Self(0x16);
    pub const DUALCAST_ALIGNMENT: Self = Self(0x17);
    pub const LIST_ALIGNMENT: Self = Self(0x18);
    pub const INTERRUPT_HANDLE: Self = Self(0x19);
    pub const COMPLETION_FAULT: Self = Self(0x1a);
    pub const COMPLETION_ALIGNMENT: Self = Self(0x1b);
    pub const ADDRESS_ALIGNMENT: Self = Self(0x1c);
    pub const PRIVILEGE: Self = Self(0x1d);
    pub const TRAFFIC_CLASS: Self = Self(0x1e);
    pub const READBACK_FAULT: Self = Self(0x1f);
    pub const HARDWARE: Self = Self(0x20);
    pub const READBACK_HARDWARE: Self = Self(0x21);
    pub const TRANSLATION: Self = Self(0x22);

    /// With a fault: it was a write.
    pub const WRITE: u8 = 0x80;

    /// Without the bit that says whether a fault was a write.
    #[inline]
    #[must_use]
    pub const fn code(self) -> Self {
        Self(self.0 & !Self::WRITE)
    }

    /// Whether the fault was on a write.
    #[inline]
    pub const fn is_write(self) -> bool {
        self.0 & Self::WRITE != 0
    }

    /// What it means, for messages.
    pub const fn text(self) -> &'static str {
        match self.code() {
            Self::NONE => "not completed",
            Self::SUCCESS => "success",
            Self::FALSE_PREDICATE => "done, but the result is not the expected one",
            Self::PAGE_FAULT => "page fault",
            Self::PAGE_REQUEST_FAILED => "page fault that the system could not resolve",
            Self::BATCH_FAILED => "a descriptor of the batch did not succeed",
            Self::BATCH_PAGE_FAULT => "page fault on the batch's list of descriptors",
            Self::DELTA_ORDER => "offsets in the delta record are not in increasing order",
            Self::DELTA_OFFSET => "an offset in the delta record is past the destination's end",
            Self::DIF_ERROR => "protection information does not match",
            Self::BAD_OPCODE => "the operation is not supported or not allowed on this queue",
            Self::INVALID_FLAGS => "a flag is not supported or not allowed",
            Self::RESERVED_NOT_ZERO => "a reserved field is not zero",
            Self::TRANSFER_SIZE => "the transfer size is out of range",
            Self::DESCRIPTOR_COUNT => "the number of descriptors in the batch is out of range",
            Self::DELTA_SIZE => "the size of the delta record is out of range",
            Self::OVERLAP => "buffers overlap that must not",
            Self::DUALCAST_ALIGNMENT => "bits 11:0 of the two destinations differ",
            Self::LIST_ALIGNMENT => "the batch's list is not aligned to 64 bytes",
            Self::INTERRUPT_HANDLE => "the interrupt handle is invalid or another PASID's",
            Self::COMPLETION_FAULT => "page fault on the completion record",
            Self::COMPLETION_ALIGNMENT => "the completion record is not aligned to 32 bytes",
            Self::ADDRESS_ALIGNMENT => "an address or size is not aligned as the operation needs",
            Self::PRIVILEGE => "a privileged descriptor where privilege is not enabled",
            Self::TRAFFIC_CLASS => "the traffic class configuration is wrong",
            Self::READBACK_FAULT => "page fault on a readback address",
            Self::HARDWARE => "the hardware failed",
            Self::READBACK_HARDWARE => "the hardware failed to read back the destination",
            Self::TRANSLATION => "an address could not be translated",
            _ => "a status that the specification does not name",
        }
    }
}
