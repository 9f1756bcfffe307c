//! Packet headers: layouts, a bounded parser and a builder of frames.
//!
//! The layouts are unaligned and big-endian, so that each can be laid over any bytes: `Ipv4::ref_from_prefix(bytes)` of
//! zerocopy checks the length and copies nothing. [`Headers::parse`] finds where which of them is, and never trusts a
//! length that it read.

mod build;
mod layout;
mod mac;
mod parse;

pub use build::{Flow, L4Checksum};
pub use layout::{Arp, Ethernet, IcmpEcho, Ipv4, Ipv6, Ipv6Fragment, Tcp, Udp, Vlan};
pub use mac::{MacAddr, ParseMacError};
pub use parse::{Fragment, Headers, Ip};

/// Kinds of EtherType (IEEE 802 Numbers, IANA).
pub mod ethertype {
    /// IPv4.
    pub const IPV4: u16 = 0x0800;
    /// ARP.
    pub const ARP: u16 = 0x0806;
    /// A VLAN tag (IEEE 802.1Q, customer tag).
    pub const VLAN: u16 = 0x8100;
    /// IPv6.
    pub const IPV6: u16 = 0x86dd;
    /// An outer VLAN tag (IEEE 802.1ad, service tag).
    pub const QINQ: u16 = 0x88a8;
}

/// IP protocol numbers, which are IPv6's next headers too (Assigned Internet Protocol Numbers, IANA).
pub mod protocol {
    /// IPv6 hop-by-hop options.
    pub const HOP_BY_HOP: u8 = 0;
    /// ICMP for IPv4.
    pub const ICMP: u8 = 1;
    /// TCP.
    pub const TCP: u8 = 6;
    /// UDP.
    pub const UDP: u8 = 17;
    /// IPv6 routing header.
    pub const ROUTING: u8 = 43;
    /// IPv6 fragment header.
    pub const FRAGMENT: u8 = 44;
    /// Authentication header.
    pub const AUTHENTICATION: u8 = 51;
    /// ICMP for IPv6.
    pub const ICMPV6: u8 = 58;
    /// IPv6 destination options.
    pub const DESTINATION_OPTIONS: u8 = 60;
    /// IPv6 mobility header.
    pub const MOBILITY: u8 = 135;
}

#[cfg(test)]
mod tests;
