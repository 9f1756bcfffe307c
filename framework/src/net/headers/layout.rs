//! The layouts of headers, as they are on the wire.

use std::net::{Ipv4Addr, Ipv6Addr};

use zerocopy::byteorder::network_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::MacAddr;

/// Ethernet II (IEEE 802.3, clause 3.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Ethernet {
    /// To whom.
    pub destination: MacAddr,
    /// From whom.
    pub source: MacAddr,
    /// What follows: an [`ethertype`](super::ethertype).
    pub ethertype: U16,
}

/// A VLAN tag, behind an [`Ethernet`] header or another tag (IEEE 802.1Q, clause 9.6).
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Vlan {
    /// Priority (3 bits), drop eligible (1 bit), VLAN id (12 bits).
    pub tci: U16,
    /// What follows.
    pub ethertype: U16,
}

/// ARP for IPv4 over Ethernet (RFC 826).
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Arp {
    /// 1: Ethernet.
    pub hardware: U16,
    /// [`ethertype::IPV4`](super::ethertype::IPV4).
    pub protocol: U16,
    /// 6.
    pub hardware_len: u8,
    /// 4.
    pub protocol_len: u8,
    /// [`REQUEST`](Self::REQUEST) or [`REPLY`](Self::REPLY).
    pub operation: U16,
    /// Who asks or answers.
    pub sender_mac: MacAddr,
    /// Its address.
    pub sender_ip: [u8; 4],
    /// Who is asked for: of no meaning in a request.
    pub target_mac: MacAddr,
    /// The address that is asked for.
    pub target_ip: [u8; 4],
}

impl Arp {
    /// Operation: who has the target's address?
    pub const REQUEST: u16 = 1;
    /// Operation: the sender has it.
    pub const REPLY: u16 = 2;
}

/// IPv4 without its options (RFC 791, section 3.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Ipv4 {
    /// 4 in the upper half; in the lower one the header's length in words of 4 bytes.
    pub version_ihl: u8,
    /// Differentiated services and congestion notification.
    pub tos: u8,
    /// Bytes of header and payload.
    pub total_len: U16,
    /// Common to all fragments of a packet.
    pub id: U16,
    /// [`DONT_FRAGMENT`](Self::DONT_FRAGMENT), [`MORE_FRAGMENTS`](Self::MORE_FRAGMENTS), and in
    /// [`FRAGMENT_OFFSET`](Self::FRAGMENT_OFFSET) the offset in units of 8 bytes.
    pub flags_fragment: U16,
    /// Hops that are left.
    pub ttl: u8,
    /// What follows: a [`protocol`](super::protocol).
    pub protocol: u8,
    /// The header's checksum.
    pub checksum: U16,
    /// From whom.
    pub source: [u8; 4],
    /// To whom.
    pub destination: [u8; 4],
}

impl Ipv4 {
    /// Not to be fragmented.
    pub const DONT_FRAGMENT: u16 = 1 << 14;
    /// Not the last fragment.
    pub const MORE_FRAGMENTS: u16 = 1 << 13;
    /// The bits of the fragment's offset.
    pub const FRAGMENT_OFFSET: u16 = (1 << 13) - 1;

    /// From whom.
    pub fn source_addr(&self) -> Ipv4Addr {
        self.source.into()
    }

    /// To whom.
    pub fn destination_addr(&self) -> Ipv4Addr {
        self.destination.into()
    }
}

/// IPv6 without its extension headers (RFC 8200, section 3).
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Ipv6 {
    /// Version (4 bits, 6), traffic class (8 bits), flow label (20 bits).
    pub version_class_flow: U32,
    /// Bytes behind this header, extension headers included.
    pub payload_len: U16,
    /// What follows: a [`protocol`](super::protocol).
    pub next_header: u8,
    /// Hops that are left.
    pub hop_limit: u8,
    /// From whom.
    pub source: [u8; 16],
    /// To whom.
    pub destination: [u8; 16],
}

impl Ipv6 {
    /// From whom.
    pub fn source_addr(&self) -> Ipv6Addr {
        self.source.into()
    }

    /// To whom.
    pub fn destination_addr(&self) -> Ipv6Addr {
        self.destination.into()
    }
}

/// IPv6's fragment header (RFC 8200, section 4.5).
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Ipv6Fragment {
    /// What follows: a [`protocol`](super::protocol).
    pub next_header: u8,
    /// Zero.
    pub reserved: u8,
    /// The offset in units of 8 bytes (13 bits), two reserved bits, and whether more fragments follow (1 bit).
    pub offset_more: U16,
    /// Common to all fragments of a packet.
    pub id: U32,
}

/// UDP (RFC 768).
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Udp {
    /// From which port.
    pub source: U16,
    /// To which port.
    pub destination: U16,
    /// Bytes of header and payload.
    pub len: U16,
    /// Over pseudo header, header and payload; 0 over IPv4: there is none.
    pub checksum: U16,
}

/// TCP without its options (RFC 9293, section 3.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Tcp {
    /// From which port.
    pub source: U16,
    /// To which port.
    pub destination: U16,
    /// The first payload byte's number.
    pub sequence: U32,
    /// The number of the byte that is expected next.
    pub acknowledgment: U32,
    /// In the upper half the header's length in words of 4 bytes.
    pub data_offset: u8,
    /// CWR, ECE, URG, ACK, PSH, RST, SYN, FIN, from the highest bit down.
    pub flags: u8,
    /// Bytes that may be sent.
    pub window: U16,
    /// Over pseudo header, header and payload.
    pub checksum: U16,
    /// Where urgent data ends.
    pub urgent: U16,
}

impl Tcp {
    /// No more data follows.
    pub const FIN: u8 = 1 << 0;
    /// The connection begins.
    pub const SYN: u8 = 1 << 1;
    /// Data is to be handed on at once.
    pub const PSH: u8 = 1 << 3;
    /// The acknowledgment holds.
    pub const ACK: u8 = 1 << 4;
    /// The congestion window was reduced.
    pub const CWR: u8 = 1 << 7;
}

/// An echo request or reply of ICMP (RFC 792, page 14) or ICMPv6 (RFC 4443, section 4).
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct IcmpEcho {
    /// What it is: the types of ICMP and of ICMPv6 differ.
    pub kind: u8,
    /// 0.
    pub code: u8,
    /// Over header and payload, for ICMPv6 over a pseudo header too.
    pub checksum: U16,
    /// Whose request it is.
    pub id: U16,
    /// Which request it is.
    pub sequence: U16,
}

impl IcmpEcho {
    /// Type: ICMP's reply.
    pub const REPLY: u8 = 0;
    /// Type: ICMP's request.
    pub const REQUEST: u8 = 8;
    /// Type: ICMPv6's request.
    pub const V6_REQUEST: u8 = 128;
    /// Type: ICMPv6's reply.
    pub const V6_REPLY: u8 = 129;
}

const _: () = {
    assert!(size_of::<Ethernet>() == 14);
    assert!(size_of::<Vlan>() == 4);
    assert!(size_of::<Arp>() == 28);
    assert!(size_of::<Ipv4>() == 20);
    assert!(size_of::<Ipv6>() == 40);
    assert!(size_of::<Ipv6Fragment>() == 8);
    assert!(size_of::<Udp>() == 8);
    assert!(size_of::<Tcp>() == 20);
    assert!(size_of::<IcmpEcho>() == 8);
};
