//! Split virtqueues ("Split Virtqueues", 2.7). The widths of the words are in the [table](super).

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Most entries of a queue, split or packed.
pub const MAX_SIZE: u16 = 1 << 15;

/// Alignment of the descriptor table.
pub const DESC_ALIGN: u64 = 16;
/// Alignment of the available ring.
pub const AVAIL_ALIGN: u64 = 2;
/// Alignment of the used ring.
pub const USED_ALIGN: u64 = 4;

/// `struct virtq_desc` ("The Virtqueue Descriptor Table", 2.7.5).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Descriptor {
    /// Address of the buffer, or of the table of an indirect one.
    pub addr: u64,
    /// Its bytes.
    pub len: u32,
    /// [`NEXT`], [`WRITE`], [`INDIRECT`].
    pub flags: u16,
    /// With [`NEXT`]: the descriptor that continues the chain.
    pub next: u16,
}

const _: () = assert!(size_of::<Descriptor>() == 16);

/// Descriptor flag: `next` continues the chain.
pub const NEXT: u16 = 1;
/// Descriptor flag: the device writes the buffer, and does not read it.
pub const WRITE: u16 = 2;
/// Descriptor flag: the buffer is a table of descriptors, whose indices count from its start.
pub const INDIRECT: u16 = 4;

impl Descriptor {
    /// The two 64-bit words: address, and the rest.
    #[inline]
    pub const fn to_words(self) -> [u64; 2] {
        [self.addr, self.len as u64 | (self.flags as u64) << 32 | (self.next as u64) << 48]
    }

    /// Of its two 64-bit words.
    #[inline]
    pub const fn from_words([addr, rest]: [u64; 2]) -> Self {
        Self { addr, len: rest as u32, flags: (rest >> 32) as u16, next: (rest >> 48) as u16 }
    }
}

/// `struct virtq_used_elem` ("The Virtqueue Used Ring", 2.7.8).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct UsedElement {
    /// The first descriptor of the chain.
    pub id: u32,
    /// Bytes that the device wrote.
    pub len: u32,
}

const _: () = assert!(size_of::<UsedElement>() == 8);

/// Bytes of the descriptor table.
pub const fn desc_len(size: u16) -> usize {
    size_of::<Descriptor>() * size as usize
}

/// The available ring, which the driver writes ("The Virtqueue Available Ring", 2.7.6).
pub mod avail {
    /// Flags: the driver wants no used buffer notifications. A hint, and not used with `EVENT_IDX`.
    pub const NO_INTERRUPT: u16 = 1;

    /// Offset of the flags.
    pub const FLAGS: usize = 0;
    /// Offset of the index: where the driver will put the next entry, modulo the queue size; it runs freely.
    pub const IDX: usize = 2;

    /// Offset of entry `slot`: the first descriptor of a chain.
    pub const fn ring(slot: u16) -> usize {
        4 + 2 * slot as usize
    }

    /// Offset of the word by which the driver asks, with `EVENT_IDX`, for a notification once the used index passes it.
    pub const fn used_event(size: u16) -> usize {
        ring(size)
    }

    /// Bytes of the ring, `used_event` included.
    pub const fn len(size: u16) -> usize {
        used_event(size) + 2
    }
}

/// The used ring, which the device writes ("The Virtqueue Used Ring", 2.7.8).
pub mod used {
    /// Flags: the device wants no available buffer notifications. A hint, and not used with `EVENT_IDX`.
    pub const NO_NOTIFY: u16 = 1;

    /// Offset of the flags.
    pub const FLAGS: usize = 0;
    /// Offset of the index: where the device will put the next element, modulo the queue size; it runs freely.
    pub const IDX: usize = 2;

    /// Offset of element `slot`, a [`UsedElement`](super::UsedElement).
    pub const fn ring(slot: u16) -> usize {
        4 + 8 * slot as usize
    }

    /// Offset of the word by which the device asks, with `EVENT_IDX`, for a notification once the available index passes
    /// it.
    pub const fn avail_event(size: u16) -> usize {
        ring(size)
    }

    /// Bytes of the ring, `avail_event` included.
    pub const fn len(size: u16) -> usize {
        avail_event(size) + 2
    }
}

/// With `EVENT_IDX`: whether an index that went from `old` to `new` has passed `event`, so that a notification is due
/// ("Used Buffer Notification Suppression", 2.7.7). All three wrap at 16 bits.
#[inline]
pub const fn need_event(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}
