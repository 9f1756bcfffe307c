//! Finds a frame's headers.

use zerocopy::FromBytes;

use super::{Ethernet, Ipv4, Ipv6, Ipv6Fragment, Tcp, Udp, Vlan, ethertype, protocol};

/// VLAN tags that are looked behind; a frame with more is of the EtherType of the next tag.
const MAX_TAGS: usize = 2;

/// Extension headers that are walked; a packet with more has the next one as its protocol, and no transport header.
const MAX_EXTENSIONS: usize = 8;

/// Which version of IP.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Ip {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

/// Which part of an IP packet the frame carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Fragment {
    /// All of it.
    #[default]
    Whole,
    /// The first fragment, which has the transport header.
    First,
    /// A later fragment, which has none.
    Later,
}

/// Where a frame's headers are.
///
/// A header counts only if it is there as a whole and makes sense; what is behind the first one that does not is not
/// looked at. All lengths are within the frame that was parsed: for that frame, `&frame[h.l4_offset()..h.end()]` never
/// panics.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Headers {
    /// Bytes of the Ethernet header with its VLAN tags; 0 for a frame that has not even that.
    pub l2_len: u16,
    /// Bytes of the IP header with its options or extension headers; 0 if it is not IP.
    pub l3_len: u16,
    /// Bytes of the TCP, UDP or ICMP header, with TCP's options; 0 if there is none of them.
    pub l4_len: u16,
    /// The outermost VLAN tag: priority, drop eligible, VLAN id.
    pub vlan: Option<u16>,
    /// What is behind the VLAN tags.
    pub ethertype: u16,
    /// Which IP header there is.
    pub ip: Option<Ip>,
    /// What is behind the IP header and its extensions; 0 if it is not IP.
    pub protocol: u8,
    /// Which part of an IP packet it is.
    pub fragment: Fragment,
    /// The IP header tells of more bytes than the frame has.
    pub truncated: bool,
    /// Bytes of the frame up to the end of the IP packet: what is behind is padding. All of them if it is not IP.
    pub(super) end: u32,
}

impl Headers {
    /// Looks at a frame that starts with its Ethernet header. Any bytes will do.
    #[inline]
    pub fn parse(frame: &[u8]) -> Self {
        let mut headers = Self { end: frame.len().try_into().unwrap_or(u32::MAX), ..Self::default() };
        let Some(mut rest) = headers.parse_l2(frame) else { return headers };
        match headers.ethertype {
            ethertype::IPV4 => headers.parse_ipv4(&mut rest),
            ethertype::IPV6 => headers.parse_ipv6(&mut rest),
            _ => {}
        }
        if headers.ip.is_some() && headers.fragment != Fragment::Later {
            headers.l4_len = l4_len(headers.protocol, rest);
        }
        headers
    }

    /// Where the IP header starts, or whatever is behind the Ethernet header and its tags.
    #[inline]
    pub fn l3_offset(&self) -> usize {
        self.l2_len as usize
    }

    /// Where the transport header starts, or whatever is behind the IP header.
    #[inline]
    pub fn l4_offset(&self) -> usize {
        self.l2_len as usize + self.l3_len as usize
    }

    /// Where the payload of the innermost header starts.
    #[inline]
    pub fn payload_offset(&self) -> usize {
        self.l4_offset() + self.l4_len as usize
    }

    /// Where the IP packet ends, or the frame if it is not IP.
    #[inline]
    pub fn end(&self) -> usize {
        self.end as usize
    }

    /// Source and destination address of IP, one behind the other: 8 or 32 bytes. `frame` is the one that was parsed.
    #[inline]
    pub fn addresses<'a>(&self, frame: &'a [u8]) -> Option<&'a [u8]> {
        let (offset, len) = match self.ip? {
            Ip::V4 => (12, 8),
            Ip::V6 => (8, 32),
        };
        frame.get(self.l3_offset() + offset..)?.get(..len)
    }

    /// Source and destination port of TCP or UDP, one behind the other. `frame` is the one that was parsed.
    #[inline]
    pub fn ports<'a>(&self, frame: &'a [u8]) -> Option<&'a [u8; 4]> {
        if self.l4_len == 0 || !matches!(self.protocol, protocol::TCP | protocol::UDP) {
            return None;
        }
        frame.get(self.l4_offset()..)?.first_chunk()
    }

    /// Returns what is behind the Ethernet header and its tags.
    #[inline]
    fn parse_l2<'a>(&mut self, frame: &'a [u8]) -> Option<&'a [u8]> {
        let (ethernet, mut rest) = Ethernet::ref_from_prefix(frame).ok()?;
        self.l2_len = size_of::<Ethernet>() as u16;
        self.ethertype = ethernet.ethertype.get();
        for _ in 0..MAX_TAGS {
            if !matches!(self.ethertype, ethertype::VLAN | ethertype::QINQ) {
                break;
            }
            let Ok((tag, behind)) = Vlan::ref_from_prefix(rest) else { break };
            self.vlan.get_or_insert(tag.tci.get());
            self.ethertype = tag.ethertype.get();
            self.l2_len += size_of::<Vlan>() as u16;
            rest = behind;
        }
        Some(rest)
    }

    /// Leaves in `rest` what is behind the header, up to the packet's end.
    #[inline]
    fn parse_ipv4(&mut self, rest: &mut &[u8]) {
        let Ok((ip, _)) = Ipv4::ref_from_prefix(rest) else { return };
        let len = usize::from(ip.version_ihl & 0xf) * 4;
        let total = usize::from(ip.total_len.get());
        if ip.version_ihl >> 4 != 4 || len < size_of::<Ipv4>() || len > total || len > rest.len() {
            return;
        }
        self.ip = Some(Ip::V4);
        self.l3_len = len as u16;
        self.protocol = ip.protocol;
        let fragment = ip.flags_fragment.get();
        self.fragment =
            fragment_of(fragment & Ipv4::FRAGMENT_OFFSET != 0, fragment & Ipv4::MORE_FRAGMENTS != 0);
        *rest = &self.cut(rest, total)[len..];
    }

    /// Leaves in `rest` what is behind the header and its extensions, up to the packet's end.
    #[inline]
    fn parse_ipv6(&mut self, rest: &mut &[u8]) {
        let Ok((ip, _)) = Ipv6::ref_from_prefix(rest) else { return };
        if ip.version_class_flow.get() >> 28 != 6 {
            return;
        }
        self.ip = Some(Ip::V6);
        self.l3_len = size_of::<Ipv6>() as u16;
        self.protocol = ip.next_header;
        *rest = &self.cut(rest, size_of::<Ipv6>() + usize::from(ip.payload_len.get()))[size_of::<Ipv6>()..];
        for _ in 0..MAX_EXTENSIONS {
            let Some((next, len)) = self.extension(rest) else { break };
            self.protocol = next;
            // Eight of at most 2,048 bytes each.
            self.l3_len += len as u16;
            *rest = &rest[len..];
            if self.fragment == Fragment::Later {
                break;
            }
        }
    }

    /// The extension header that `rest` starts with, if it does: what follows it, and its length (RFC 8200, section 4;
    /// RFC 4302, section 2.2; RFC 6275, section 6.1.1).
    #[inline]
    fn extension(&mut self, rest: &[u8]) -> Option<(u8, usize)> {
        let len = match self.protocol {
            protocol::HOP_BY_HOP | protocol::ROUTING | protocol::DESTINATION_OPTIONS | protocol::MOBILITY => {
                (usize::from(*rest.get(1)?) + 1) * 8
            }
            protocol::AUTHENTICATION => (usize::from(*rest.get(1)?) + 2) * 4,
            protocol::FRAGMENT => {
                let (header, _) = Ipv6Fragment::ref_from_prefix(rest).ok()?;
                let offset_more = header.offset_more.get();
                self.fragment = fragment_of(offset_more >> 3 != 0, offset_more & 1 != 0);
                size_of::<Ipv6Fragment>()
            }
            _ => return None,
        };
        (len <= rest.len()).then(|| (rest[0], len))
    }

    /// The IP packet of `total` bytes that `rest` starts with: without padding, or as much as there is of it.
    #[inline]
    fn cut<'a>(&mut self, rest: &'a [u8], total: usize) -> &'a [u8] {
        self.truncated = total > rest.len();
        let packet = &rest[..total.min(rest.len())];
        self.end = (self.l3_offset() + packet.len()) as u32;
        packet
    }
}

fn fragment_of(has_offset: bool, more: bool) -> Fragment {
    match (has_offset, more) {
        (true, _) => Fragment::Later,
        (false, true) => Fragment::First,
        (false, false) => Fragment::Whole,
    }
}

/// The length of the transport header that `rest` starts with; 0 if it is none or not there as a whole.
#[inline]
fn l4_len(protocol: u8, rest: &[u8]) -> u16 {
    let len = match protocol {
        protocol::UDP => size_of::<Udp>(),
        protocol::ICMP | protocol::ICMPV6 => 8,
        protocol::TCP => match Tcp::ref_from_prefix(rest) {
            Ok((tcp, _)) => match usize::from(tcp.data_offset >> 4) * 4 {
                len if len >= size_of::<Tcp>() => len,
                _ => return 0,
            },
            Err(_) => return 0,
        },
        _ => return 0,
    };
    if len <= rest.len() { len as u16 } else { 0 }
}
