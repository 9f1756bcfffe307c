//! What each operation does to bytes. The CPU channel calls these on whole buffers, a software device on the
//! pieces that its bus moves; so every function can go on where an earlier call stopped.

use crc_fast::{CrcAlgorithm, Digest};
use underpass::accel::Dif;

/// Bytes of one tuple of protection information: guard, application tag, reference tag (SBC-4, section 4.22.2).
pub(crate) const DIF_TUPLE: usize = 8;

/// Bytes of one entry of a delta record: a 16-bit little-endian unit index and the unit's 8 new bytes (DSA
/// architecture specification 341204, "Create Delta Record").
pub(crate) const DELTA_ENTRY: usize = 10;

/// Bytes that one delta entry describes.
pub(crate) const DELTA_UNIT: usize = 8;

/// The CRC32C of `data` (RFC 3720, appendix B.4), continued from `seed`: 0 begins, an earlier result goes on.
pub(crate) fn crc32c(seed: u32, data: &[u8]) -> u32 {
    // A finished CRC32C is the inverted shift register.
    let mut digest = Digest::new_with_init_state(CrcAlgorithm::Crc32Iscsi, u64::from(!seed));
    digest.update(data);
    digest.finalize() as u32
}

/// The repeating pattern as it lies in memory from its byte `phase` on, low byte first.
fn pattern_bytes(pattern: u64, phase: usize) -> [u8; 8] {
    pattern.rotate_right((phase % 8 * 8) as u32).to_le_bytes()
}

/// Fills `dst` with the repeating 8-byte `pattern`, beginning with the pattern's byte `phase % 8`.
pub(crate) fn fill(dst: &mut [u8], pattern: u64, phase: usize) {
    let bytes = pattern_bytes(pattern, phase);
    let (whole, rest) = dst.as_chunks_mut();
    whole.fill(bytes);
    rest.copy_from_slice(&bytes[..rest.len()]);
}

/// Slices are compared in pieces of this size, so that the search for the exact byte is short and the rest is
/// the C library's `memcmp`.
const STRIDE: usize = 512;

/// The offset of the first byte in which `a` and `b` differ, as far as both reach.
pub(crate) fn first_difference(a: &[u8], b: &[u8]) -> Option<usize> {
    let pieces = a.chunks(STRIDE).zip(b.chunks(STRIDE));
    let (index, (a, b)) = pieces.enumerate().find(|(_, (a, b))| a != b)?;
    let within = a.iter().zip(b).position(|(a, b)| a != b)?;
    Some(index * STRIDE + within)
}

/// The offset of the first byte of `data` that is not what [`fill`] would have written.
pub(crate) fn pattern_difference(data: &[u8], pattern: u64, phase: usize) -> Option<usize> {
    let mut expected = [0; STRIDE];
    fill(&mut expected, pattern, phase);
    // A stride holds the pattern a whole number of times: each piece begins in the same phase.
    let (index, piece) =
        data.chunks(STRIDE).enumerate().find(|(_, piece)| **piece != expected[..piece.len()])?;
    let within = piece.iter().zip(&expected).position(|(found, expected)| found != expected)?;
    Some(index * STRIDE + within)
}

/// What [`create_delta`] wrote.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Delta {
    /// Bytes of record, a multiple of [`DELTA_ENTRY`].
    pub written: usize,
    /// There were more differences than fit; what fitted was written.
    pub overflow: bool,
}

/// Writes to `out` an entry for each unit of 8 bytes in which `modified` differs from `original`; both have the
/// same length, a multiple of 8. The first unit gets the index `first_unit`; indices must stay below 65536.
pub(crate) fn create_delta(original: &[u8], modified: &[u8], first_unit: usize, out: &mut [u8]) -> Delta {
    debug_assert_eq!(original.len(), modified.len());
    let (original, _) = original.as_chunks::<DELTA_UNIT>();
    let (modified, _) = modified.as_chunks::<DELTA_UNIT>();
    let (entries, _) = out.as_chunks_mut::<DELTA_ENTRY>();
    let mut entries = entries.iter_mut();
    let mut written = 0;
    for (index, (_, new)) in original.iter().zip(modified).enumerate().filter(|(_, (old, new))| old != new) {
        let Some(entry) = entries.next() else {
            return Delta { written, overflow: true };
        };
        entry[..2].copy_from_slice(&((first_unit + index) as u16).to_le_bytes());
        entry[2..].copy_from_slice(new);
        written += DELTA_ENTRY;
    }
    Delta { written, overflow: false }
}

/// What is wrong with an entry of a delta record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum BadDelta {
    /// The entry at this byte of the record names a unit that is not after the one before it.
    NotIncreasing(usize),
    /// The entry at this byte of the record names a unit past the end of the destination.
    OutOfRange(usize),
}

/// Applies `record`, whole entries in ascending order, to `dst`, up to the first bad entry.
pub(crate) fn apply_delta(record: &[u8], dst: &mut [u8]) -> Result<(), BadDelta> {
    let (units, _) = dst.as_chunks_mut::<DELTA_UNIT>();
    let (entries, _) = record.as_chunks::<DELTA_ENTRY>();
    let mut lowest = 0;
    for (position, [index_low, index_high, new @ ..]) in entries.iter().enumerate() {
        let at = position * DELTA_ENTRY;
        let index = usize::from(u16::from_le_bytes([*index_low, *index_high]));
        if index < lowest {
            return Err(BadDelta::NotIncreasing(at));
        }
        *units.get_mut(index).ok_or(BadDelta::OutOfRange(at))? = *new;
        lowest = index + 1;
    }
    Ok(())
}

/// The guard of one block: CRC-16/T10-DIF, polynomial 0x8bb7 (SBC-4, section 4.22.4).
fn dif_guard(data: &[u8], dif: &Dif) -> u16 {
    let seed = if dif.invert_crc_seed { 0xffff } else { 0 };
    let mut digest = Digest::new_with_init_state(CrcAlgorithm::Crc16T10Dif, seed);
    digest.update(data);
    let crc = digest.finalize() as u16;
    if dif.invert_crc_result { !crc } else { crc }
}

/// The application tag of block `index`, before its mask.
fn dif_app_tag(dif: &Dif, index: u32) -> u16 {
    if dif.increment_app_tag { dif.app_tag.wrapping_add(index as u16) } else { dif.app_tag }
}

/// The reference tag of block `index`.
fn dif_ref_tag(dif: &Dif, index: u32) -> u32 {
    if dif.fixed_ref_tag { dif.ref_tag } else { dif.ref_tag.wrapping_add(index) }
}

/// The protection information of `data`, which is block `index` of its transfer.
pub(crate) fn dif_tuple(data: &[u8], dif: &Dif, index: u32) -> [u8; DIF_TUPLE] {
    let [g0, g1] = dif_guard(data, dif).to_be_bytes();
    let [a0, a1] = (dif_app_tag(dif, index) & !dif.app_tag_mask).to_be_bytes();
    let [r0, r1, r2, r3] = dif_ref_tag(dif, index).to_be_bytes();
    [g0, g1, a0, a1, r0, r1, r2, r3]
}

/// Which parts of a tuple were wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[allow(clippy::struct_field_names, reason = "each names the part that is bad")]
pub(crate) struct DifVerdict {
    /// The guard is not the data's.
    pub guard_bad: bool,
    /// The application tag differs outside its mask.
    pub app_tag_bad: bool,
    /// The reference tag differs.
    pub ref_tag_bad: bool,
}

impl DifVerdict {
    /// Nothing was wrong.
    pub(crate) fn is_good(self) -> bool {
        self == Self::default()
    }
}

/// Checks the protection information of `data`, which is block `index` of its transfer. The escapes of T10 (an
/// application tag of all ones switches checks off) do not apply: a device does them only where the descriptor
/// asks for it, which [`Dif`] does not.
pub(crate) fn dif_check(data: &[u8], tuple: [u8; DIF_TUPLE], dif: &Dif, index: u32) -> DifVerdict {
    let [g0, g1, a0, a1, r0, r1, r2, r3] = tuple;
    let app_tag_difference = u16::from_be_bytes([a0, a1]) ^ dif_app_tag(dif, index);
    DifVerdict {
        guard_bad: !dif.skip_guard_check && u16::from_be_bytes([g0, g1]) != dif_guard(data, dif),
        app_tag_bad: app_tag_difference & !dif.app_tag_mask != 0,
        ref_tag_bad: !dif.skip_ref_tag_check
            && u32::from_be_bytes([r0, r1, r2, r3]) != dif_ref_tag(dif, index),
    }
}

#[cfg(test)]
mod tests {
    use underpass::accel::DifBlock;

    use super::*;

    #[test]
    fn crc32c_gives_the_published_values_and_continues() {
        let count: [u8; 32] = std::array::from_fn(|n| n as u8);
        let mut down = count;
        down.reverse();
        // RFC 3720, appendix B.4, which prints the bytes in the order that they are sent: low byte first.
        assert_eq!(crc32c(0, &[0; 32]).to_le_bytes(), [0xaa, 0x36, 0x91, 0x8a]);
        assert_eq!(crc32c(0, &[0xff; 32]).to_le_bytes(), [0x43, 0xab, 0xa8, 0x62]);
        assert_eq!(crc32c(0, &count).to_le_bytes(), [0x4e, 0x79, 0xdd, 0x46]);
        assert_eq!(crc32c(0, &down).to_le_bytes(), [0x5c, 0xdb, 0x3f, 0x11]);
        assert_eq!(crc32c(0, b"123456789"), 0xe306_9283);
        assert_eq!(crc32c(crc32c(0, b"1234"), b"56789"), 0xe306_9283, "continued over a split");
        assert_eq!(crc32c(0x1234_5678, b""), 0x1234_5678);
    }

    #[test]
    fn fill_and_pattern_difference_agree_in_every_phase() {
        let pattern = 0x8877_6655_4433_2211;
        let mut whole = vec![0; 2000];
        fill(&mut whole, pattern, 0);
        assert_eq!(whole[..10], [0x11, 0x22, 0x33, 0x44, 0x55, 0x66, 0x77, 0x88, 0x11, 0x22]);
        for phase in 0..17 {
            let mut part = vec![0; 1000];
            fill(&mut part, pattern, phase);
            assert_eq!(part, whole[phase..phase + 1000], "phase {phase}");
            assert_eq!(pattern_difference(&part, pattern, phase), None);
            for at in [0, 7, 8, STRIDE - 1, STRIDE, 999] {
                part[at] ^= 0x40;
                assert_eq!(pattern_difference(&part, pattern, phase), Some(at), "phase {phase}");
                part[at] ^= 0x40;
            }
        }
    }

    #[test]
    fn the_first_difference_is_found_at_any_offset() {
        let a = vec![5; 3 * STRIDE + 3];
        assert_eq!(first_difference(&a, &a), None);
        assert_eq!(first_difference(&[], &[]), None);
        for at in [0, 1, STRIDE - 1, STRIDE, 2 * STRIDE + 1, a.len() - 1] {
            let mut b = a.clone();
            b[at] = 6;
            b[a.len() - 1] = 7;
            assert_eq!(first_difference(&a, &b), Some(at));
        }
    }

    #[test]
    fn a_delta_in_pieces_is_the_delta_of_the_whole() {
        let original: Vec<u8> = (0..1024u32).map(|n| (n * 7) as u8).collect();
        let mut modified = original.clone();
        for at in [0, 9, 500, 511, 512, 1023] {
            modified[at] ^= 0xff;
        }
        let mut whole = [0; 200];
        let delta = create_delta(&original, &modified, 0, &mut whole);
        assert_eq!(delta, Delta { written: 60, overflow: false });

        let mut pieces = [0; 200];
        let first = create_delta(&original[..512], &modified[..512], 0, &mut pieces);
        let second = create_delta(&original[512..], &modified[512..], 64, &mut pieces[first.written..]);
        assert_eq!(first.written + second.written, 60);
        assert_eq!(pieces, whole);

        let mut restored = original;
        assert_eq!(apply_delta(&whole[..60], &mut restored), Ok(()));
        assert_eq!(restored, modified);
        let short = create_delta(&vec![0; 1024], &modified, 0, &mut [0; 85]);
        assert_eq!(short, Delta { written: 80, overflow: true });
    }

    #[test]
    fn a_bad_delta_entry_stops_where_it_is() {
        let entry = |unit: u8| [unit, 0, 1, 1, 1, 1, 1, 1, 1, 1];
        let record = |units: &[u8]| units.iter().flat_map(|unit| entry(*unit)).collect::<Vec<u8>>();
        let mut dst = [0; 32];
        assert_eq!(apply_delta(&record(&[0, 4]), &mut dst), Err(BadDelta::OutOfRange(10)));
        assert_eq!(dst[..8], [1; 8], "entries before the bad one are applied");
        assert_eq!(apply_delta(&record(&[0, 2, 2]), &mut dst), Err(BadDelta::NotIncreasing(20)));
        assert_eq!(apply_delta(&record(&[3]), &mut dst), Ok(()));
    }

    #[test]
    fn protection_information_is_laid_out_as_t10_says() {
        let mut dif = Dif::new(DifBlock::B512);
        // CRC-16/T10-DIF's check value; the layout takes any length of data.
        assert_eq!(dif_tuple(b"123456789", &dif, 0), [0xd0, 0xdb, 0, 0, 0, 0, 0, 0]);
        dif.app_tag = 0x1234;
        dif.ref_tag = 0xffff_ffff;
        dif.app_tag_mask = 0x00f0;
        assert_eq!(dif_tuple(b"123456789", &dif, 1), [0xd0, 0xdb, 0x12, 0x04, 0, 0, 0, 0]);
        dif.invert_crc_result = true;
        dif.fixed_ref_tag = true;
        dif.increment_app_tag = true;
        assert_eq!(dif_tuple(b"123456789", &dif, 1), [0x2f, 0x24, 0x12, 0x05, 0xff, 0xff, 0xff, 0xff]);
    }

    #[test]
    fn the_inverted_seed_is_all_ones() {
        // Bit by bit from the polynomial, independent of the crate's folding.
        let crc = |seed: u16, data: &[u8]| {
            data.iter().fold(seed, |crc, byte| {
                (0..8).fold(crc ^ u16::from(*byte) << 8, |crc, _| {
                    if crc & 0x8000 == 0 { crc << 1 } else { crc << 1 ^ 0x8bb7 }
                })
            })
        };
        let mut dif = Dif::new(DifBlock::B4104);
        let data: Vec<u8> = (0..4104u32).map(|n| (n % 251) as u8).collect();
        assert_eq!(dif_tuple(&data, &dif, 0)[..2], crc(0, &data).to_be_bytes());
        dif.invert_crc_seed = true;
        assert_eq!(dif_tuple(&data, &dif, 0)[..2], crc(0xffff, &data).to_be_bytes());
    }

    #[test]
    fn each_part_of_a_tuple_is_judged_alone() {
        let dif = Dif { app_tag: 7, app_tag_mask: 0xff00, ref_tag: 9, ..Dif::new(DifBlock::B512) };
        let data = [0x5a; 512];
        let good = dif_tuple(&data, &dif, 3);
        assert!(dif_check(&data, good, &dif, 3).is_good());
        let with = |at: usize| {
            let mut bad = good;
            bad[at] ^= 1;
            dif_check(&data, bad, &dif, 3)
        };
        assert_eq!(with(1), DifVerdict { guard_bad: true, ..DifVerdict::default() });
        assert_eq!(with(2), DifVerdict::default(), "masked");
        assert_eq!(with(3), DifVerdict { app_tag_bad: true, ..DifVerdict::default() });
        assert_eq!(with(7), DifVerdict { ref_tag_bad: true, ..DifVerdict::default() });
        let lax = Dif { skip_guard_check: true, skip_ref_tag_check: true, ..dif };
        assert!(dif_check(&[0; 512], good, &lax, 40).is_good());
    }
}
