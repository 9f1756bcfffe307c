//! The Internet checksum (RFC 1071), of bytes, of packets, and as one field changes (RFC 1624).
//!
//! All values are in host order: `U16::new(checksum)` puts one into a header.

use zerocopy::FromBytes;
use zerocopy::byteorder::network_endian::U16;

use super::headers::{Fragment, Headers, Ip, L4Checksum, Udp, protocol};

/// A ones' complement sum of 16-bit words in the making. It is made of parts in any number, of any length.
#[derive(Debug, Clone, Copy, Default)]
pub struct Sum {
    /// Of words in the order of this machine's bytes, which comes out the same but for the order (RFC 1071, section 2.B).
    total: u64,
    /// The next part starts with the second byte of a word.
    odd: bool,
}

impl Sum {
    /// The sum of nothing.
    pub const ZERO: Self = Self { total: 0, odd: false };

    /// Adds a part.
    #[inline]
    #[must_use]
    pub fn plus(self, bytes: &[u8]) -> Self {
        let part = sum(bytes);
        // A byte that is the other half of its word counts 256 times as much or as little.
        let part = if self.odd { u64::from(fold(part).swap_bytes()) } else { part };
        Self { total: add(self.total, part), odd: self.odd ^ (bytes.len() % 2 == 1) }
    }

    /// Adds one word. Only where whole words were added before.
    #[inline]
    #[must_use]
    pub fn plus_u16(self, word: u16) -> Self {
        debug_assert!(!self.odd, "a word would be cut in two");
        Self { total: add(self.total, u64::from(word.to_be())), ..self }
    }

    /// The sum in 16 bits.
    #[inline]
    pub fn value(self) -> u16 {
        u16::from_be(fold(self.total))
    }

    /// The checksum: the sum's complement.
    #[inline]
    pub fn checksum(self) -> u16 {
        !self.value()
    }

    /// Whether what was added is valid, a checksum being part of it.
    #[inline]
    pub fn is_valid(self) -> bool {
        self.checksum() == 0
    }
}

/// The checksum of `bytes`, to be put where they have a zero.
#[inline]
pub fn of(bytes: &[u8]) -> u16 {
    Sum::ZERO.plus(bytes).checksum()
}

/// What `checksum` becomes when a word that it covers changes from `old` to `new` (RFC 1624, equation 3).
#[inline]
pub fn update(checksum: u16, old: u16, new: u16) -> u16 {
    Sum::ZERO.plus_u16(!checksum).plus_u16(!old).plus_u16(new).checksum()
}

/// The sum over the pseudo header (RFC 9293, section 3.1; RFC 8200, section 8.1) of the packet in `frame`, which has
/// `l4_len` bytes of transport header and payload. `None` if it is not IP.
///
/// An IPv6 routing header with segments left is not looked into: the destination is the one in the IPv6 header.
#[inline]
pub fn pseudo_header(frame: &[u8], headers: &Headers, l4_len: u32) -> Option<Sum> {
    let sum = Sum::ZERO.plus(headers.addresses(frame)?).plus(&l4_len.to_be_bytes());
    Some(sum.plus_u16(u16::from(headers.protocol)))
}

/// The offset of the checksum in the header of a transport protocol, if it is one whose checksum is known here.
#[inline]
pub const fn l4_checksum_offset(protocol: u8) -> Option<usize> {
    match protocol {
        protocol::TCP => Some(16),
        protocol::UDP => Some(6),
        protocol::ICMP | protocol::ICMPV6 => Some(2),
        _ => None,
    }
}

/// Writes the checksum of an IPv4 header. Does nothing where there is none.
#[inline]
pub fn write_ip(frame: &mut [u8], headers: &Headers) {
    const OFFSET: usize = 10;
    if headers.ip != Some(Ip::V4) {
        return;
    }
    if let Some(header) = frame.get_mut(headers.l3_offset()..headers.l4_offset()) {
        header[OFFSET..OFFSET + 2].fill(0);
        let checksum = of(header);
        header[OFFSET..OFFSET + 2].copy_from_slice(&checksum.to_be_bytes());
    }
}

/// Writes the checksum of the TCP, UDP or ICMP header. `frame` is the one that `headers` were found in.
///
/// Does nothing where there is none of them, or not the whole packet.
#[inline]
pub fn write_l4(frame: &mut [u8], headers: &Headers, what: L4Checksum) {
    let Some((start, pseudo)) = l4(frame, headers) else { return };
    let Some(offset) = l4_checksum_offset(headers.protocol) else { return };
    let field = start + offset..start + offset + 2;
    let checksum = match what {
        L4Checksum::Offload => pseudo.value(),
        L4Checksum::Full => {
            frame[field.clone()].fill(0);
            match pseudo.plus(&frame[start..headers.end()]).checksum() {
                // 0 would mean that there is no checksum (RFC 768).
                0 if headers.protocol == protocol::UDP => 0xffff,
                checksum => checksum,
            }
        }
    };
    frame[field].copy_from_slice(&checksum.to_be_bytes());
}

/// Whether the IPv4 header's checksum is right; `None` if there is no IPv4 header.
#[inline]
pub fn check_ip(frame: &[u8], headers: &Headers) -> Option<bool> {
    if headers.ip != Some(Ip::V4) {
        return None;
    }
    let header = frame.get(headers.l3_offset()..headers.l4_offset())?;
    Some(Sum::ZERO.plus(header).is_valid())
}

/// Whether the checksum of the TCP, UDP or ICMP header is right; `None` if there is none, or not the whole packet.
///
/// UDP over IPv4 may go without (RFC 768), which is `None` too.
#[inline]
pub fn check_l4(frame: &[u8], headers: &Headers) -> Option<bool> {
    let (start, pseudo) = l4(frame, headers)?;
    if headers.protocol == protocol::UDP {
        let (udp, _) = Udp::ref_from_prefix(&frame[start..]).ok()?;
        if udp.checksum == U16::ZERO {
            // Over IPv6 it must be there (RFC 8200, section 8.1).
            return (headers.ip == Some(Ip::V6)).then_some(false);
        }
    }
    Some(pseudo.plus(&frame[start..headers.end()]).is_valid())
}

/// Where the transport header is that is to be summed up, and the sum to start with.
#[inline]
fn l4(frame: &[u8], headers: &Headers) -> Option<(usize, Sum)> {
    if headers.l4_len == 0
        || headers.truncated
        || headers.fragment != Fragment::Whole
        || headers.end() > frame.len()
    {
        return None;
    }
    let start = headers.l4_offset();
    let len = headers.end() - start;
    let pseudo = match headers.protocol {
        protocol::ICMP => Sum::ZERO,
        _ => pseudo_header(frame, headers, len as u32)?,
    };
    Some((start, pseudo))
}

/// The words of `bytes`, not folded; a last byte that is alone is the first of its word.
#[inline]
fn sum(bytes: &[u8]) -> u64 {
    // Halves of 32 bits in 64 leave room for the carries of 2^32 of them: no carry is handled in the loop, which so
    // becomes one of vector instructions.
    let (words, tail) = bytes.as_chunks::<8>();
    let total: u64 = words
        .iter()
        .map(|word| {
            let word = u64::from_ne_bytes(*word);
            (word & 0xffff_ffff) + (word >> 32)
        })
        .sum();
    let mut last = [0; 8];
    last[..tail.len()].copy_from_slice(tail);
    let last = u64::from_ne_bytes(last);
    total + (last & 0xffff_ffff) + (last >> 32)
}

#[inline]
fn add(a: u64, b: u64) -> u64 {
    let (sum, carry) = a.overflowing_add(b);
    sum + u64::from(carry)
}

/// Brings a sum into 16 bits, carries added.
#[inline]
fn fold(sum: u64) -> u16 {
    let sum = (sum >> 32) + (sum & 0xffff_ffff);
    let sum = (sum >> 32) + (sum & 0xffff_ffff);
    let sum = (sum >> 16) + (sum & 0xffff);
    let sum = (sum >> 16) + (sum & 0xffff);
    ((sum >> 16) + (sum & 0xffff)) as u16
}

#[cfg(test)]
mod tests;
