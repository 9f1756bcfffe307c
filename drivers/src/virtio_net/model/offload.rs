//! What a driver left to the device, done in software: checksums, and the cutting of large frames.

use underpass::net::checksum::{self, Sum};
use underpass::net::headers::{Headers, Ip, L4Checksum};

use super::peer::{Frame, Segment, SegmentKind};

/// The offset of the checksum in a UDP header, which must not be zero once it is computed (RFC 768).
const UDP_CHECKSUM: u16 = 6;

const IPV4_LEN: usize = 2;
const IPV4_ID: usize = 4;
const IPV6_LEN: usize = 4;
const IPV6_HEADER: usize = 40;
const UDP_LEN: usize = 4;
const TCP_SEQUENCE: usize = 4;
const TCP_FLAGS: usize = 13;
/// FIN and PSH, which the last segment alone has.
const TCP_LAST: u8 = 0x09;
/// CWR, which the first segment alone has (RFC 3168, section 6.1).
const TCP_FIRST: u8 = 0x80;

/// Finishes frames, in a buffer that is used again.
#[derive(Debug, Default)]
pub(super) struct Finisher {
    bytes: Vec<u8>,
}

impl Finisher {
    pub(super) fn new() -> Self {
        Self::default()
    }

    /// Calls `each` with what a cable can carry instead of `frame`: the frame with its checksum, or its segments, in order.
    ///
    /// The frame was checked: its headers are those that its offload tells of.
    pub(super) fn finish(&mut self, frame: Frame<'_>, mut each: impl FnMut(&[u8])) {
        match (frame.offload.segment, frame.offload.checksum) {
            (Some(segment), _) => self.segment(frame.bytes, segment, each),
            (None, Some((start, offset))) => {
                self.bytes.clear();
                self.bytes.extend_from_slice(frame.bytes);
                complete(&mut self.bytes, start, offset);
                each(&self.bytes);
            }
            (None, None) => each(frame.bytes),
        }
    }

    fn segment(&mut self, frame: &[u8], segment: Segment, mut each: impl FnMut(&[u8])) {
        let mut headers = Headers::parse(frame);
        let Some((header, payload)) = frame.split_at_checked(segment.header_len.into()) else { return };
        if headers.l4_len == 0 || headers.payload_offset() != header.len() || segment.size == 0 {
            return;
        }
        let size = usize::from(segment.size);
        let count = payload.len().div_ceil(size).max(1);
        for n in 0..count {
            let at = n * size;
            let part = &payload[at..(at + size).min(payload.len())];
            self.bytes.clear();
            self.bytes.extend_from_slice(header);
            self.bytes.extend_from_slice(part);
            set_lengths(&mut self.bytes, &headers, n as u16);
            if segment.kind != SegmentKind::Udp {
                set_sequence(&mut self.bytes, &headers, at as u32, n == 0, n + 1 == count);
            }
            // The lengths are others now.
            headers = Headers::parse(&self.bytes);
            checksum::write_ip(&mut self.bytes, &headers);
            checksum::write_l4(&mut self.bytes, &headers, L4Checksum::Full);
            each(&self.bytes);
        }
    }
}

/// Puts a checksum where the pseudo header's sum is.
fn complete(frame: &mut [u8], start: u16, offset: u16) {
    let field = usize::from(start) + usize::from(offset);
    let Some(covered) = frame.get(start.into()..).filter(|_| field + 2 <= frame.len()) else { return };
    let checksum = match Sum::ZERO.plus(covered).checksum() {
        0 if offset == UDP_CHECKSUM => 0xffff,
        checksum => checksum,
    };
    frame[field..field + 2].copy_from_slice(&checksum.to_be_bytes());
}

/// The lengths in the headers of segment `n`, and the IPv4 identification.
fn set_lengths(bytes: &mut [u8], headers: &Headers, n: u16) {
    let (l3, l4) = (headers.l3_offset(), headers.l4_offset());
    let len = bytes.len();
    let mut put = |at: usize, value: usize| bytes[at..at + 2].copy_from_slice(&(value as u16).to_be_bytes());
    if headers.ip == Some(Ip::V4) {
        put(l3 + IPV4_LEN, len - l3);
    } else {
        put(l3 + IPV6_LEN, len - l3 - IPV6_HEADER);
    }
    if headers.protocol == underpass::net::headers::protocol::UDP {
        put(l4 + UDP_LEN, len - l4);
    }
    if headers.ip == Some(Ip::V4) {
        let id = &mut bytes[l3 + IPV4_ID..l3 + IPV4_ID + 2];
        let next = u16::from_be_bytes([id[0], id[1]]).wrapping_add(n);
        id.copy_from_slice(&next.to_be_bytes());
    }
}

/// The sequence number and the flags of the segment that starts with payload byte `at`.
fn set_sequence(bytes: &mut [u8], headers: &Headers, at: u32, first: bool, last: bool) {
    let tcp = &mut bytes[headers.l4_offset()..];
    if let Some(sequence) = tcp[TCP_SEQUENCE..].first_chunk_mut::<4>() {
        *sequence = u32::from_be_bytes(*sequence).wrapping_add(at).to_be_bytes();
    }
    if !first {
        tcp[TCP_FLAGS] &= !TCP_FIRST;
    }
    if !last {
        tcp[TCP_FLAGS] &= !TCP_LAST;
    }
}
