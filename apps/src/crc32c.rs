//! CRC32C (RFC 3720, appendix B.4) on the CPU: what a device's answer is checked against, and how the CRCs of
//! a file's pieces become the file's.

/// The polynomial 0x1edc6f41, its bits reversed.
const POLYNOMIAL: u32 = 0x82f6_3b78;

/// `TABLES[n][byte]`: the CRC of a byte with `n` zero bytes behind it.
const TABLES: [[u32; 256]; 8] = tables();

const fn tables() -> [[u32; 256]; 8] {
    let mut tables = [[0; 256]; 8];
    let mut byte = 0;
    while byte < 256 {
        let mut crc = byte as u32;
        let mut bit = 0;
        while bit < 8 {
            crc = times_x(crc);
            bit += 1;
        }
        tables[0][byte] = crc;
        byte += 1;
    }
    let mut n = 1;
    while n < 8 {
        let mut byte = 0;
        while byte < 256 {
            let before: u32 = tables[n - 1][byte];
            tables[n][byte] = before >> 8 ^ tables[0][(before & 0xff) as usize];
            byte += 1;
        }
        n += 1;
    }
    tables
}

/// One bit further: the remainder times x. Bit 31 is the coefficient of x^0.
const fn times_x(crc: u32) -> u32 {
    if crc & 1 == 0 { crc >> 1 } else { crc >> 1 ^ POLYNOMIAL }
}

/// The CRC32C of `data`, continued from the `crc` of what came before it (0: nothing did).
pub(crate) fn update(crc: u32, data: &[u8]) -> u32 {
    let mut crc = !crc;
    let (words, rest) = data.as_chunks::<8>();
    for word in words {
        let word = u64::from_le_bytes(*word) ^ u64::from(crc);
        crc = (0..8).fold(0, |crc, n| crc ^ TABLES[7 - n][(word >> (8 * n) & 0xff) as usize]);
    }
    for byte in rest {
        crc = crc >> 8 ^ TABLES[0][((crc ^ u32::from(*byte)) & 0xff) as usize];
    }
    !crc
}

/// The CRC of two pieces from the CRC of each; `second_len` is the second one's length in bytes.
pub(crate) fn combine(first: u32, second: u32, second_len: u64) -> u32 {
    // The first CRC moved up by second_len bytes: times x^(8 * second_len), by squaring.
    let (mut shift, mut power, mut left) = (1 << 31, 1 << (31 - 8), second_len);
    while left != 0 {
        if left & 1 != 0 {
            shift = multiply(shift, power);
        }
        power = multiply(power, power);
        left >>= 1;
    }
    multiply(shift, first) ^ second
}

/// The product of two remainders.
fn multiply(a: u32, mut b: u32) -> u32 {
    let mut product = 0;
    for bit in (0..32).rev() {
        if a >> bit & 1 != 0 {
            product ^= b;
        }
        b = times_x(b);
    }
    product
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn published_vectors() {
        // RFC 3720, appendix B.4, and the check value of the CRC catalogue.
        assert_eq!(update(0, &[0; 32]), 0x8a91_36aa);
        assert_eq!(update(0, &[0xff; 32]), 0x62a8_ab43);
        assert_eq!(update(0, &std::array::from_fn::<u8, 32, _>(|n| n as u8)), 0x46dd_794e);
        assert_eq!(update(0, b"123456789"), 0xe306_9283);
        assert_eq!(update(0, b""), 0);
    }

    #[test]
    fn pieces_combine_to_the_whole() {
        let data: Vec<u8> = (0..10_007_u32).map(|n| (n * n / 7) as u8).collect();
        let whole = update(0, &data);
        for cut in [0, 1, 7, 8, 4096, 10_006, 10_007] {
            let (a, b) = data.split_at(cut);
            assert_eq!(update(update(0, a), b), whole, "continued at {cut}");
            assert_eq!(combine(update(0, a), update(0, b), b.len() as u64), whole, "combined at {cut}");
        }
    }
}
