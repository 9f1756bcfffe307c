//! The network device ("Network Device", 5.1): queues, configuration, packet headers, receive-side scaling.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Index of the queue that receives for queue pair `pair` ("Network Device / Virtqueues", 5.1.2).
pub const fn receive_queue(pair: u16) -> u16 {
    2 * pair
}

/// Index of the queue that transmits for queue pair `pair`.
pub const fn transmit_queue(pair: u16) -> u16 {
    2 * pair + 1
}

/// Index of the control queue of a device that has up to this many queue pairs (1 without `MQ` and `RSS`); `None` if
/// there can be no such queue.
pub const fn control_queue(max_virtqueue_pairs: u16) -> Option<u16> {
    max_virtqueue_pairs.checked_mul(2)
}

/// Offsets in `struct virtio_net_config` ("Device configuration layout", 5.1.4). Read-only for the driver.
pub mod config {
    /// MAC address, 6 bytes. With `MAC`.
    pub const MAC: u64 = 0;
    /// [`link`](super::link) status, 16 bits. With `STATUS`.
    pub const STATUS: u64 = 6;
    /// Queue pairs, from 1 to 0x8000, 16 bits. With `MQ` or `RSS`.
    pub const MAX_VIRTQUEUE_PAIRS: u64 = 8;
    /// Largest MTU, at least 68, 16 bits. With `MTU`.
    pub const MTU: u64 = 10;
    /// Speed in Mbit/s, 32 bits, or [`SPEED_UNKNOWN`]. With `SPEED_DUPLEX`.
    pub const SPEED: u64 = 12;
    /// 1 full, 0 half, else unknown, 8 bits. With `SPEED_DUPLEX`.
    pub const DUPLEX: u64 = 16;
    /// Longest RSS key, at least 40, 8 bits. With `RSS` or `HASH_REPORT`.
    pub const RSS_MAX_KEY_SIZE: u64 = 17;
    /// Longest RSS table, at least 128, 16 bits. With `RSS`.
    pub const RSS_MAX_INDIRECTION_TABLE_LENGTH: u64 = 18;
    /// [`hash_type`](super::hash_type)s that the device knows, 32 bits. With `RSS` or `HASH_REPORT`.
    pub const SUPPORTED_HASH_TYPES: u64 = 20;
    /// Bytes of the structure as far as 1.2 defines it.
    pub const LEN: u64 = 24;

    /// [`SPEED`] when it is not known; a known one is below 2^31.
    pub const SPEED_UNKNOWN: u32 = 0xffff_ffff;
    /// [`DUPLEX`]: full.
    pub const DUPLEX_FULL: u8 = 1;
    /// [`DUPLEX`]: half.
    pub const DUPLEX_HALF: u8 = 0;
    /// [`DUPLEX`] when it is not known.
    pub const DUPLEX_UNKNOWN: u8 = 0xff;
    /// Least MTU that a device may report.
    pub const MIN_MTU: u16 = 68;
}

/// Bits of [`config::STATUS`].
pub mod link {
    /// The link is up.
    pub const UP: u16 = 1;
    /// The device asks for gratuitous packets.
    pub const ANNOUNCE: u16 = 2;
}

/// `struct virtio_net_hdr`, before each packet, with `VERSION_1` and without `HASH_REPORT` ("Device Operation", 5.1.6).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Header {
    /// [`header_flag`]s.
    pub flags: u8,
    /// A [`gso`] type.
    pub gso_type: u8,
    /// Bytes of all headers before the payload, where the packet is to be segmented.
    pub hdr_len: u16,
    /// Bytes of payload in a segment.
    pub gso_size: u16,
    /// Where to start checksumming.
    pub csum_start: u16,
    /// Where to put the checksum, from `csum_start` on.
    pub csum_offset: u16,
    /// Receive: buffers that the packet fills; 1 without `MRG_RXBUF`. Transmit: 0.
    pub num_buffers: u16,
}

const _: () = assert!(size_of::<Header>() == 12 && align_of::<Header>() == 2);

/// `struct virtio_net_hdr` with `HASH_REPORT`; packets sent have it too.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct HashHeader {
    /// What there is without the feature.
    pub header: Header,
    /// The hash, bits 15:0. See [`hash`](Self::hash).
    pub hash_value_lo: u16,
    /// The hash, bits 31:16.
    pub hash_value_hi: u16,
    /// A [`hash_report`] type.
    pub hash_report: u16,
    /// Zero.
    pub padding_reserved: u16,
}

const _: () = assert!(size_of::<HashHeader>() == 20 && align_of::<HashHeader>() == 2);

impl HashHeader {
    /// The hash.
    #[inline]
    pub const fn hash(&self) -> u32 {
        self.hash_value_lo as u32 | (self.hash_value_hi as u32) << 16
    }

    /// With this hash.
    #[inline]
    #[must_use]
    pub const fn with_hash(mut self, hash: u32) -> Self {
        self.hash_value_lo = hash as u16;
        self.hash_value_hi = (hash >> 16) as u16;
        self
    }
}

/// Bits of [`Header::flags`].
pub mod header_flag {
    /// The checksum from `csum_start` on is to be completed.
    pub const NEEDS_CSUM: u8 = 1;
    /// The checksum was found right.
    pub const DATA_VALID: u8 = 2;
    /// With `RSC_EXT`: `csum_start` counts merged segments, `csum_offset` duplicated acknowledgements.
    pub const RSC_INFO: u8 = 4;
}

/// Values of [`Header::gso_type`].
pub mod gso {
    /// No segmentation.
    pub const NONE: u8 = 0;
    /// TCP over IPv4.
    pub const TCPV4: u8 = 1;
    /// UDP, by IP fragments.
    pub const UDP: u8 = 3;
    /// TCP over IPv6.
    pub const TCPV6: u8 = 4;
    /// UDP, by datagrams.
    pub const UDP_L4: u8 = 5;
    /// Added to a TCP type: the segments have ECN set.
    pub const ECN: u8 = 0x80;
}

/// Hash types that can be asked for ("Supported/enabled hash types", 5.1.6.4.3.1).
pub mod hash_type {
    /// IPv4 addresses.
    pub const IPV4: u32 = 1 << 0;
    /// IPv4 addresses and TCP ports.
    pub const TCPV4: u32 = 1 << 1;
    /// IPv4 addresses and UDP ports.
    pub const UDPV4: u32 = 1 << 2;
    /// IPv6 addresses.
    pub const IPV6: u32 = 1 << 3;
    /// IPv6 addresses and TCP ports.
    pub const TCPV6: u32 = 1 << 4;
    /// IPv6 addresses and UDP ports.
    pub const UDPV6: u32 = 1 << 5;
    /// IPv6 addresses, those of extension headers first.
    pub const IP_EX: u32 = 1 << 6;
    /// As [`IP_EX`], and TCP ports.
    pub const TCP_EX: u32 = 1 << 7;
    /// As [`IP_EX`], and UDP ports.
    pub const UDP_EX: u32 = 1 << 8;
}

/// What a hash was computed of, [`HashHeader::hash_report`] ("Hash reporting for incoming packets", 5.1.6.4.4).
pub mod hash_report {
    /// There is no hash.
    pub const NONE: u16 = 0;
    /// [`IPV4`](super::hash_type::IPV4).
    pub const IPV4: u16 = 1;
    /// [`TCPV4`](super::hash_type::TCPV4).
    pub const TCPV4: u16 = 2;
    /// [`UDPV4`](super::hash_type::UDPV4).
    pub const UDPV4: u16 = 3;
    /// [`IPV6`](super::hash_type::IPV6).
    pub const IPV6: u16 = 4;
    /// [`TCPV6`](super::hash_type::TCPV6).
    pub const TCPV6: u16 = 5;
    /// [`UDPV6`](super::hash_type::UDPV6).
    pub const UDPV6: u16 = 6;
    /// [`IP_EX`](super::hash_type::IP_EX).
    pub const IPV6_EX: u16 = 7;
    /// [`TCP_EX`](super::hash_type::TCP_EX).
    pub const TCPV6_EX: u16 = 8;
    /// [`UDP_EX`](super::hash_type::UDP_EX).
    pub const UDPV6_EX: u16 = 9;
}

/// Bytes of the hash key that every device takes.
pub const HASH_KEY_LEN: usize = 40;
/// Entries of the indirection table that every device takes.
pub const INDIRECTION_TABLE_LEN: usize = 128;
