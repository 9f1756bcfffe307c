//! Frames, built and judged here alone: nothing of what is under test is used.

/// Bytes of a stream's headers: Ethernet, IPv4 and UDP.
const STREAM_HEADERS: usize = 42;

/// From here on a stream's frames say which they are.
pub(crate) const MIN_NUMBERED: usize = STREAM_HEADERS + 12;

/// Frame `number` of a stream, of `len` bytes from 14 up: an UDP datagram where that fits. Every byte follows from the
/// three.
pub(crate) fn numbered(stream: u16, number: u64, len: usize) -> Vec<u8> {
    let filler = (0..).map(|at: u64| {
        let mixed =
            (number ^ u64::from(stream) << 48).wrapping_add(at / 8).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        (mixed ^ mixed >> 29).to_le_bytes()[at as usize % 8]
    });
    if len < MIN_NUMBERED {
        let mut frame = vec![0xff; 6];
        frame.extend([2, 0, 0, 0, (stream >> 8) as u8, stream as u8, 0x88, 0xb5]);
        frame.extend(filler.take(len - 14));
        return frame;
    }
    let mut payload = stream.to_be_bytes().to_vec();
    payload.extend(number.to_be_bytes());
    payload.extend(filler.take(len - STREAM_HEADERS - 10));
    Flow::udp4(stream).frame(&payload)
}

/// Which frame of which stream this is; a panic if one byte of it is wrong.
pub(crate) fn identify(frame: &[u8]) -> (u16, u64) {
    assert!(frame.len() >= MIN_NUMBERED, "{} bytes: not one of those sent", frame.len());
    let stream = u16::from_be_bytes(frame[42..44].try_into().unwrap());
    let number = u64::from_be_bytes(frame[44..52].try_into().unwrap());
    let right = numbered(stream, number, frame.len());
    let wrong = right.iter().zip(frame).position(|(right, found)| right != found);
    assert_eq!(wrong, None, "stream {stream}, frame {number} of {} bytes came back changed", frame.len());
    (stream, number)
}

/// What a transport checksum's field holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Field {
    Right,
    Wrong,
    /// The pseudo header's sum: the rest is left to a device.
    Pseudo,
}

/// Who talks to whom.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Flow {
    pub(crate) to: [u8; 6],
    pub(crate) vlan: Option<u16>,
    pub(crate) v6: bool,
    pub(crate) tcp: bool,
    /// The first 4 bytes are an IPv4 address.
    pub(crate) source: [u8; 16],
    pub(crate) destination: [u8; 16],
    pub(crate) ports: [u16; 2],
    pub(crate) field: Field,
    /// What TCP's flags are.
    pub(crate) flags: u8,
}

impl Flow {
    pub(crate) fn udp4(number: u16) -> Self {
        Self::new(false, false, number)
    }

    pub(crate) fn new(v6: bool, tcp: bool, number: u16) -> Self {
        let [high, low] = number.to_be_bytes();
        let mut source = [0; 16];
        let mut destination = [0; 16];
        if v6 {
            source = [0x20, 1, 0xd, 0xb8, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, high, low];
            destination = [0x20, 1, 0xd, 0xb8, 0, 0, 0, 2, 0, 0, 0, 0, 0, 7, low, high];
        } else {
            source[..4].copy_from_slice(&[10, 1, high, low]);
            destination[..4].copy_from_slice(&[10, 2, low, high]);
        }
        let ports = [1024 | number, 7];
        let (to, field, flags) = ([0xff; 6], Field::Right, 0x10);
        Self { to, vlan: None, v6, tcp, source, destination, ports, field, flags }
    }

    pub(crate) fn l2_len(&self) -> usize {
        if self.vlan.is_some() { 18 } else { 14 }
    }

    pub(crate) fn l3_len(&self) -> usize {
        if self.v6 { 40 } else { 20 }
    }

    pub(crate) fn l4_len(&self) -> usize {
        if self.tcp { 20 } else { 8 }
    }

    /// Where the transport checksum lies in the transport header.
    pub(crate) fn checksum_offset(&self) -> usize {
        if self.tcp { 16 } else { 6 }
    }

    pub(crate) fn headers_len(&self) -> usize {
        self.l2_len() + self.l3_len() + self.l4_len()
    }

    /// Its frame with this payload.
    pub(crate) fn frame(&self, payload: &[u8]) -> Vec<u8> {
        self.segment(payload, 0, 0, self.flags)
    }

    /// The frame with the payload that is `at` bytes into a longer one, as the `nth` of several.
    fn segment(&self, payload: &[u8], at: usize, nth: u16, flags: u8) -> Vec<u8> {
        let mut frame = self.to.to_vec();
        frame.extend([2, 0, 0, 0, 0, 1]);
        if let Some(tag) = self.vlan {
            frame.extend([0x81, 0]);
            frame.extend(tag.to_be_bytes());
        }
        let l4_len = self.l4_len() + payload.len();
        let protocol = if self.tcp { 6 } else { 17 };
        let address = if self.v6 { 16 } else { 4 };
        if self.v6 {
            frame.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
            frame.extend((l4_len as u16).to_be_bytes());
            frame.extend([protocol, 64]);
        } else {
            let id = 0x1234_u16 + nth;
            let total = (20 + l4_len) as u16;
            let mut header =
                vec![0x45, 0, (total >> 8) as u8, total as u8, (id >> 8) as u8, id as u8, 0x40, 0];
            header.extend([64, protocol, 0, 0]);
            header.extend(&self.source[..4]);
            header.extend(&self.destination[..4]);
            let sum = !sum(&header);
            header[10..12].copy_from_slice(&sum.to_be_bytes());
            frame.extend([8, 0]);
            frame.extend(header);
        }
        if self.v6 {
            frame.extend(self.source);
            frame.extend(self.destination);
        }
        let mut transport = [self.ports[0].to_be_bytes(), self.ports[1].to_be_bytes()].concat();
        if self.tcp {
            transport.extend((0x0a0b_0c0d_u32 + at as u32).to_be_bytes());
            transport.extend([1, 2, 3, 4, 0x50, flags, 0x20, 0, 0, 0, 0, 0]);
        } else {
            transport.extend((l4_len as u16).to_be_bytes());
            transport.extend([0, 0]);
        }
        transport.extend(payload);
        let mut pseudo = [&self.source[..address], &self.destination[..address]].concat();
        pseudo.extend((l4_len as u32).to_be_bytes());
        pseudo.extend([0, 0, 0, protocol]);
        let sum = match self.field {
            Field::Pseudo => sum(&pseudo),
            Field::Right | Field::Wrong => {
                let whole = !sum(&[&pseudo[..], &transport[..]].concat());
                let whole = if whole == 0 && !self.tcp { 0xffff } else { whole };
                if self.field == Field::Wrong { whole ^ 0x0101 } else { whole }
            }
        };
        let offset = self.checksum_offset();
        transport[offset..offset + 2].copy_from_slice(&sum.to_be_bytes());
        frame.extend(transport);
        frame
    }

    /// The frames that a payload makes in segments of `size` bytes.
    pub(crate) fn segments(&self, payload: &[u8], size: usize) -> Vec<Vec<u8>> {
        const FIN_PSH: u8 = 0x09;
        const CWR: u8 = 0x80;
        let whole = Self { field: Field::Right, ..self.clone() };
        let last = payload.len().div_ceil(size) - 1;
        let cut = |(nth, part): (usize, &[u8])| {
            let first = if nth == 0 { self.flags } else { self.flags & !CWR };
            let flags = if nth == last { first } else { first & !FIN_PSH };
            whole.segment(part, nth * size, nth as u16, flags)
        };
        payload.chunks(size).enumerate().map(cut).collect()
    }

    /// What is hashed to choose a queue: addresses and ports.
    pub(crate) fn hashed(&self) -> Vec<u8> {
        let address = if self.v6 { 16 } else { 4 };
        let mut input = [&self.source[..address], &self.destination[..address]].concat();
        input.extend(self.ports.iter().flat_map(|port| port.to_be_bytes()));
        input
    }
}

/// The one's complement sum of 16-bit words (RFC 1071).
pub(crate) fn sum(bytes: &[u8]) -> u16 {
    let word = |pair: &[u8]| u64::from(pair[0]) << 8 | u64::from(pair.get(1).copied().unwrap_or(0));
    let mut sum: u64 = bytes.chunks(2).map(word).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// The Toeplitz hash as Microsoft defines it: for each bit that is set, the 32 key bits from there on.
pub(crate) fn toeplitz(key: &[u8], input: &[u8]) -> u32 {
    let bit = |bytes: &[u8], n: usize| bytes[n / 8] >> (7 - n % 8) & 1 == 1;
    (0..input.len() * 8)
        .filter(|n| bit(input, *n))
        .map(|n| (n..n + 32).fold(0, |window, at| window << 1 | u32::from(bit(key, at))))
        .fold(0, |hash, window| hash ^ window)
}

/// The key of Microsoft's examples ("Verifying the RSS Hash Calculation").
pub(crate) const KEY: [u8; 40] = [
    0x6d, 0x5a, 0x56, 0xda, 0x25, 0x5b, 0x0e, 0xc2, 0x41, 0x67, 0x25, 0x3d, 0x43, 0xa3, 0x8f, 0xb0, 0xd0,
    0xca, 0x2b, 0xcb, 0xae, 0x7b, 0x30, 0xb4, 0x77, 0xcb, 0x2d, 0xa3, 0x80, 0x30, 0xf2, 0x0c, 0x6a, 0x42,
    0xb7, 0x3b, 0xbe, 0xac, 0x01, 0xfa,
];
