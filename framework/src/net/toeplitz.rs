//! The Toeplitz hash, which receive side scaling spreads flows with.
//!
//! Source: Microsoft, "RSS Hashing Functions" and "Verifying the RSS Hash Calculation" (Windows Driver Kit); VIRTIO 1.2,
//! section 5.1.6.4.3, uses the same.

use std::fmt;

/// Bytes of a key.
pub const KEY_LEN: usize = 40;

/// The most that is hashed: two IPv6 addresses and two ports.
pub const MAX_INPUT: usize = 36;

/// The key that Microsoft's test vectors are made with, and most drivers start with.
pub const DEFAULT_KEY: [u8; KEY_LEN] = [
    0x6d, 0x5a, 0x56, 0xda, 0x25, 0x5b, 0x0e, 0xc2, 0x41, 0x67, 0x25, 0x3d, 0x43, 0xa3, 0x8f, 0xb0, 0xd0,
    0xca, 0x2b, 0xcb, 0xae, 0x7b, 0x30, 0xb4, 0x77, 0xcb, 0x2d, 0xa3, 0x80, 0x30, 0xf2, 0x0c, 0x6a, 0x42,
    0xb7, 0x3b, 0xbe, 0xac, 0x01, 0xfa,
];

/// A key, spread out in a table: what each half of each byte of the input adds to the hash. 4.5 KiB.
#[derive(Clone)]
pub struct Toeplitz {
    /// For each byte of the input its upper half's 16 values, then its lower half's.
    table: Box<[[[u32; 16]; 2]; MAX_INPUT]>,
}

impl Toeplitz {
    /// The hash with this key.
    pub fn new(key: &[u8; KEY_LEN]) -> Self {
        let mut table = Box::new([[[0; 16]; 2]; MAX_INPUT]);
        for (byte, halves) in table.iter_mut().enumerate() {
            // The input's bit n adds the 32 bits of the key that start at bit n.
            let window = key[byte..]
                .first_chunk::<5>()
                .map_or(0, |window| window.iter().fold(0, |bits, byte| bits << 8 | u64::from(*byte)));
            for (half, values) in halves.iter_mut().enumerate() {
                for (value, hash) in values.iter_mut().enumerate() {
                    for bit in (0..4).filter(|bit| value & 8 >> bit != 0) {
                        *hash ^= (window >> (8 - 4 * half - bit)) as u32;
                    }
                }
            }
        }
        Self { table }
    }

    /// The hash of source and destination address, one behind the other, then, if the type of hash includes them, of
    /// source and destination port.
    ///
    /// [`Headers::addresses`](super::headers::Headers::addresses) and
    /// [`Headers::ports`](super::headers::Headers::ports) give both. What is behind the 36th byte does not count.
    #[inline]
    pub fn hash(&self, addresses: &[u8], ports: Option<&[u8; 4]>) -> u32 {
        let input = addresses.iter().chain(ports.into_iter().flatten());
        self.table.iter().zip(input).fold(0, |hash, ([upper, lower], byte)| {
            hash ^ upper[usize::from(byte >> 4)] ^ lower[usize::from(byte & 0xf)]
        })
    }
}

impl Default for Toeplitz {
    /// With [`DEFAULT_KEY`].
    fn default() -> Self {
        Self::new(&DEFAULT_KEY)
    }
}

impl fmt::Debug for Toeplitz {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Toeplitz").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
