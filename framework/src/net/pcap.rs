//! What stands in a capture file around its packets (draft-ietf-opsawg-pcap, "PCAP Capture File Format"), for those who
//! write one: numbers in this machine's byte order, as readers tell from the magic number, and times in nanoseconds.

use std::time::Duration;

use zerocopy::{FromBytes, Immutable, IntoBytes};

/// What a file of Ethernet frames begins with (section 4).
#[derive(Debug, Clone, Copy, IntoBytes, Immutable)]
#[repr(C)]
pub struct FileHeader {
    magic: u32,
    major: u16,
    minor: u16,
    reserved: [u32; 2],
    snap_len: u32,
    link_type: u32,
}

/// What stands before each packet's bytes (section 5).
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
pub struct RecordHeader {
    /// When it was captured, since 1970: seconds.
    pub seconds: u32,
    /// And nanoseconds.
    pub nanoseconds: u32,
    /// Bytes of it that follow.
    pub captured_len: u32,
    /// Bytes that it had.
    pub original_len: u32,
}

const _: () = assert!(size_of::<FileHeader>() == 24 && size_of::<RecordHeader>() == 16);

impl FileHeader {
    /// That of a file whose packets have up to `snap_len` bytes each.
    pub const fn new(snap_len: u32) -> Self {
        // The last is LINKTYPE_ETHERNET.
        Self { magic: 0xa1b2_3c4d, major: 2, minor: 4, reserved: [0; 2], snap_len, link_type: 1 }
    }
}

impl RecordHeader {
    /// That of a whole packet of `len` bytes, captured so long after 1970.
    #[inline]
    pub const fn new(time: Duration, len: usize) -> Self {
        Self {
            seconds: time.as_secs() as u32,
            nanoseconds: time.subsec_nanos(),
            captured_len: len as u32,
            original_len: len as u32,
        }
    }
}
