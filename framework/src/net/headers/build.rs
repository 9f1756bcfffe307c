//! Writes frames of a flow.

use std::net::IpAddr;

use zerocopy::byteorder::network_endian::{U16, U32};
use zerocopy::{Immutable, IntoBytes};

use super::{Ethernet, Fragment, Headers, Ip, Ipv4, Ipv6, MacAddr, Tcp, Udp, Vlan, ethertype, protocol};
use crate::Transport;
use crate::net::checksum;

/// The hops that frames start with.
const TTL: u8 = 64;

/// What to put into a transport header's checksum.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum L4Checksum {
    /// The checksum itself.
    Full,
    /// The pseudo header's sum, which a device that computes the checksum starts from.
    Offload,
}

/// What the headers of all packets of a flow have in common.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Flow {
    /// From which station.
    pub source_mac: MacAddr,
    /// To which station.
    pub destination_mac: MacAddr,
    /// A VLAN tag: priority, drop eligible, VLAN id.
    pub vlan: Option<u16>,
    /// From whom.
    pub source: IpAddr,
    /// To whom, of the same version of IP.
    pub destination: IpAddr,
    /// TCP, where each frame is a segment with the ACK flag, or UDP.
    pub transport: Transport,
    /// From which port.
    pub source_port: u16,
    /// To which port.
    pub destination_port: u16,
}

impl Flow {
    /// The bytes of all headers together: the smallest frame.
    pub fn headers_len(&self) -> usize {
        let l3 = if self.source.is_ipv4() { size_of::<Ipv4>() } else { size_of::<Ipv6>() };
        self.l2_len() + l3 + self.l4_len()
    }

    /// Writes the headers of a frame that fills `frame`. What is behind them is the payload, which stays as it is and
    /// is counted in with the checksum.
    ///
    /// Returns where they are, or `None` where nothing was written: `frame` is too short for the headers or too long
    /// for IP, or the addresses are of different versions.
    #[inline]
    pub fn write(&self, frame: &mut [u8], l4_checksum: L4Checksum) -> Option<Headers> {
        let l4_len = frame.len().checked_sub(self.headers_len())? + self.l4_len();
        let l3_len = u16::try_from(frame.len() - self.l2_len()).ok()?;
        let protocol = match self.transport {
            Transport::Udp => protocol::UDP,
            Transport::Tcp => protocol::TCP,
        };
        let mut front = Front { frame, at: 0 };
        match (self.source, self.destination) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                self.write_l2(&mut front, ethertype::IPV4);
                let mut ip = Ipv4 {
                    version_ihl: 0x45,
                    tos: 0,
                    total_len: U16::new(l3_len),
                    id: U16::ZERO,
                    flags_fragment: U16::new(Ipv4::DONT_FRAGMENT),
                    ttl: TTL,
                    protocol,
                    checksum: U16::ZERO,
                    source: source.octets(),
                    destination: destination.octets(),
                };
                ip.checksum = U16::new(checksum::of(ip.as_bytes()));
                front.put(&ip);
            }
            (IpAddr::V6(source), IpAddr::V6(destination)) => {
                self.write_l2(&mut front, ethertype::IPV6);
                front.put(&Ipv6 {
                    version_class_flow: U32::new(6 << 28),
                    payload_len: U16::new(l4_len as u16),
                    next_header: protocol,
                    hop_limit: TTL,
                    source: source.octets(),
                    destination: destination.octets(),
                });
            }
            _ => return None,
        }
        let (source, destination) = (U16::new(self.source_port), U16::new(self.destination_port));
        match self.transport {
            Transport::Udp => {
                front.put(&Udp { source, destination, len: U16::new(l4_len as u16), checksum: U16::ZERO });
            }
            Transport::Tcp => front.put(&Tcp {
                source,
                destination,
                sequence: U32::ZERO,
                acknowledgment: U32::ZERO,
                data_offset: 5 << 4,
                flags: Tcp::ACK,
                window: U16::MAX_VALUE,
                checksum: U16::ZERO,
                urgent: U16::ZERO,
            }),
        }
        let headers = self.headers(protocol, front.frame.len());
        checksum::write_l4(front.frame, &headers, l4_checksum);
        Some(headers)
    }

    fn l2_len(&self) -> usize {
        size_of::<Ethernet>() + if self.vlan.is_some() { size_of::<Vlan>() } else { 0 }
    }

    fn l4_len(&self) -> usize {
        match self.transport {
            Transport::Udp => size_of::<Udp>(),
            Transport::Tcp => size_of::<Tcp>(),
        }
    }

    #[inline]
    fn write_l2(&self, front: &mut Front<'_>, ethertype: u16) {
        let first = if self.vlan.is_some() { ethertype::VLAN } else { ethertype };
        front.put(&Ethernet {
            destination: self.destination_mac,
            source: self.source_mac,
            ethertype: U16::new(first),
        });
        if let Some(tci) = self.vlan {
            front.put(&Vlan { tci: U16::new(tci), ethertype: U16::new(ethertype) });
        }
    }

    fn headers(&self, protocol: u8, end: usize) -> Headers {
        let (ip, ethertype) = match self.source {
            IpAddr::V4(_) => (Ip::V4, ethertype::IPV4),
            IpAddr::V6(_) => (Ip::V6, ethertype::IPV6),
        };
        Headers {
            l2_len: self.l2_len() as u16,
            l3_len: (self.headers_len() - self.l2_len() - self.l4_len()) as u16,
            l4_len: self.l4_len() as u16,
            vlan: self.vlan,
            ethertype,
            ip: Some(ip),
            protocol,
            fragment: Fragment::Whole,
            truncated: false,
            end: end as u32,
        }
    }
}

/// Puts one header behind the other.
struct Front<'a> {
    frame: &'a mut [u8],
    at: usize,
}

impl Front<'_> {
    #[inline]
    fn put(&mut self, header: &(impl IntoBytes + Immutable)) {
        let bytes = header.as_bytes();
        self.frame[self.at..][..bytes.len()].copy_from_slice(bytes);
        self.at += bytes.len();
    }
}
