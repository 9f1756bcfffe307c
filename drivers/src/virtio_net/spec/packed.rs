//! Packed virtqueues ("Packed Virtqueues", 2.8). The widths of the words are in the [table](super).

use bitfield_struct::bitfield;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

pub use super::split::{INDIRECT, MAX_SIZE, NEXT, WRITE, need_event};

/// Alignment of the descriptor ring.
pub const DESC_ALIGN: u64 = 16;
/// Alignment of the event suppression structures.
pub const EVENT_ALIGN: u64 = 4;

/// Descriptor flag: made available, if it equals the driver's wrap counter ("Driver and Device Ring Wrap Counters").
pub const AVAIL: u16 = 1 << 7;
/// Descriptor flag: used, if it equals the device's wrap counter.
pub const USED: u16 = 1 << 15;

/// `struct pvirtq_desc` ("The Virtqueue Descriptor Format"): the address, and the word that hands it over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Descriptor {
    /// Address of the buffer, or of the table of an indirect one. The device does not write it.
    pub addr: u64,
    /// The rest.
    pub handshake: Handshake,
}

const _: () = assert!(size_of::<Descriptor>() == 16);

/// Offset of the [`Handshake`] in a [`Descriptor`].
pub const HANDSHAKE: usize = 8;

/// The second half of a [`Descriptor`], *the* handshake word: always written and read as one, with Release and
/// Acquire, and by the device when it marks the descriptor used.
#[bitfield(u64)]
#[allow(clippy::len_without_is_empty, reason = "a buffer's length, not the word's")]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Handshake {
    /// Available: bytes of the buffer. Used, with [`WRITE`]: bytes that the device wrote.
    pub len: u32,
    /// The buffer's id; of a chain, in its last descriptor.
    pub id: u16,
    /// [`NEXT`], [`WRITE`], [`INDIRECT`], [`AVAIL`], [`USED`].
    pub flags: u16,
}

impl Handshake {
    /// Whether the driver made it available, in the round that has this wrap counter.
    #[inline]
    pub const fn is_available(self, wrap: bool) -> bool {
        self.flags() & (AVAIL | USED) == available(wrap)
    }

    /// Whether the device used it, in the round that has this wrap counter.
    #[inline]
    pub const fn is_used(self, wrap: bool) -> bool {
        self.flags() & (AVAIL | USED) == used(wrap)
    }
}

/// [`AVAIL`] and [`USED`] of an available descriptor.
#[inline]
pub const fn available(wrap: bool) -> u16 {
    if wrap { AVAIL } else { USED }
}

/// [`AVAIL`] and [`USED`] of a used descriptor.
#[inline]
pub const fn used(wrap: bool) -> u16 {
    if wrap { AVAIL | USED } else { 0 }
}

/// Bytes of the descriptor ring.
pub const fn desc_len(size: u16) -> usize {
    size_of::<Descriptor>() * size as usize
}

/// Bytes of an event suppression structure.
pub const EVENT_LEN: usize = 4;

/// `struct pvirtq_event_suppress` ("Event Suppression Structure Format"): one 32-bit word. The driver area holds the
/// driver's, the device area the device's.
#[bitfield(u32)]
#[derive(PartialEq, Eq)]
pub struct EventSuppress {
    /// With [`EventFlags::DESC`]: notify when this descriptor is made available, or used.
    #[bits(15)]
    pub off: u16,
    /// With [`EventFlags::DESC`]: in the round that has this wrap counter.
    pub wrap: bool,
    /// [`EventFlags`].
    #[bits(2)]
    pub flags: u8,
    #[bits(14)]
    __: u16,
}

/// Values of [`EventSuppress::flags`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EventFlags;

impl EventFlags {
    /// Notify always.
    pub const ENABLE: u8 = 0;
    /// Notify never.
    pub const DISABLE: u8 = 1;
    /// Notify at one descriptor. Only with `EVENT_IDX`.
    pub const DESC: u8 = 2;
}
