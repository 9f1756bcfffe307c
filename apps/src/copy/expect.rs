//! What each operation reads and writes, computed by the CPU: the buffers' contents before a job, what they must
//! be after it, and what the device must have found out. Nothing here comes from the drivers, so that a mistake
//! in them can not hide.

use underpass::accel::{Dif, DifBlock, OpKind, Outcome};

use crate::crc32c;

/// The eight bytes that fill and compare-pattern use.
pub(crate) const PATTERN: u64 = 0x8877_6655_4433_2211;

/// How far copy-within moves its bytes.
pub(crate) const SHIFT: usize = 64;

/// The most that one delta record can describe: 16-bit indices of 8-byte units.
pub(crate) const MAX_DELTA_BYTES: usize = 512 * 1024;

/// In a buffer that is compared with another, one unit of 8 bytes in so many differs.
const DELTA_EVERY: usize = 61;

/// An operation on so many bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Shape {
    pub(crate) kind: OpKind,
    /// Bytes of data in a job; of protected data, without its protection information.
    pub(crate) size: usize,
    pub(crate) block: DifBlock,
}

/// A job's buffers in the order that its [`Op`](underpass::accel::Op) names them.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Contents {
    pub(crate) before: Vec<Vec<u8>>,
    pub(crate) after: Vec<Vec<u8>>,
    pub(crate) outcome: Outcome,
}

impl Shape {
    /// The length of each of a job's buffers.
    pub(crate) fn lens(&self) -> Vec<usize> {
        let Self { kind, size, .. } = *self;
        match kind {
            OpKind::CopyWithin => vec![size + SHIFT],
            OpKind::Fill | OpKind::ComparePattern | OpKind::Crc | OpKind::CacheFlush => vec![size],
            OpKind::Copy | OpKind::Compare | OpKind::CopyCrc => vec![size; 2],
            OpKind::Dualcast => vec![size; 3],
            OpKind::CreateDelta => vec![size, size, self.delta_capacity()],
            OpKind::ApplyDelta => vec![self.delta_capacity(), size],
            OpKind::DifCheck => vec![self.protected()],
            OpKind::DifInsert => vec![size, self.protected()],
            OpKind::DifStrip => vec![self.protected(), size],
            OpKind::DifUpdate => vec![self.protected(); 2],
            OpKind::Nop | OpKind::Drain | OpKind::Probe => Vec::new(),
        }
    }

    /// Why a job can not have this size, if it can not.
    pub(crate) fn wrong_size(&self) -> Option<String> {
        let (name, block) = (self.kind.name(), self.block.bytes());
        match self.kind {
            OpKind::CreateDelta | OpKind::ApplyDelta
                if !self.size.is_multiple_of(8) || self.size > MAX_DELTA_BYTES =>
            {
                Some(format!("{name} takes a multiple of 8 bytes, at most 512 KiB"))
            }
            OpKind::DifCheck | OpKind::DifInsert | OpKind::DifStrip | OpKind::DifUpdate
                if !self.size.is_multiple_of(block) =>
            {
                Some(format!("{name} takes whole blocks of {block} bytes (--dif-block)"))
            }
            _ => None,
        }
    }

    /// Bytes of data that a job moves or looks at.
    pub(crate) fn bytes(&self) -> u64 {
        if self.kind == OpKind::Nop { 0 } else { self.size as u64 }
    }

    /// The protection information that is checked, and on an update what it is replaced by.
    pub(crate) fn difs(&self) -> [Dif; 2] {
        let dif = Dif::new(self.block);
        [Dif { app_tag: 0x5a01, ref_tag: 7, ..dif }, Dif { app_tag: 0xa5fe, ref_tag: 1000, ..dif }]
    }

    /// Bytes of the delta record: that of this shape's buffers, rounded up to whole groups of 80.
    fn delta_capacity(&self) -> usize {
        ((self.size / 8).div_ceil(DELTA_EVERY) * 10).next_multiple_of(80)
    }

    /// Length of the delta record.
    pub(crate) fn delta_len(&self) -> usize {
        (self.size / 8).div_ceil(DELTA_EVERY) * 10
    }

    fn protected(&self) -> usize {
        self.size / self.block.bytes() * (self.block.bytes() + 8)
    }

    /// The contents for one job; another `seed` gives other data. Every byte that the job is to write has a
    /// wrong value before.
    pub(crate) fn contents(&self, seed: u64) -> Contents {
        let data = random(seed, self.size);
        let [from, to] = self.difs();
        let mut outcome = Outcome { matched: true, ..Outcome::default() };
        // The buffers that are only read, then those that are written.
        let (read, written) = match self.kind {
            OpKind::Nop | OpKind::Drain | OpKind::Probe => (vec![], vec![]),
            OpKind::Copy => (vec![data.clone()], vec![data]),
            OpKind::CopyWithin => {
                let before = random(seed, self.size + SHIFT);
                let mut after = before.clone();
                after[SHIFT..].copy_from_slice(&before[..self.size]);
                return Contents { before: vec![before], after: vec![after], outcome };
            }
            OpKind::Fill => (vec![], vec![pattern(self.size)]),
            OpKind::Compare => (vec![data.clone(), data], vec![]),
            OpKind::ComparePattern => (vec![pattern(self.size)], vec![]),
            OpKind::CreateDelta => {
                let modified = modify(&data);
                let record = delta(&data, &modified);
                outcome.matched = false;
                outcome.delta_len = record.len() as u32;
                let mut before: Vec<u8> = record.iter().map(|byte| !byte).collect();
                let mut after = record;
                before.resize(self.delta_capacity(), 0);
                after.resize(self.delta_capacity(), 0);
                let read = [data, modified];
                return Contents {
                    before: read.iter().cloned().chain([before]).collect(),
                    after: read.into_iter().chain([after]).collect(),
                    outcome,
                };
            }
            OpKind::ApplyDelta => {
                let modified = modify(&data);
                let mut record = delta(&data, &modified);
                record.resize(self.delta_capacity(), 0);
                return Contents {
                    before: vec![record.clone(), data],
                    after: vec![record, modified],
                    outcome,
                };
            }
            OpKind::Dualcast => (vec![data.clone()], vec![data.clone(), data]),
            OpKind::Crc => {
                outcome.crc = crc32c::update(0, &data);
                (vec![data], vec![])
            }
            OpKind::CopyCrc => {
                outcome.crc = crc32c::update(0, &data);
                (vec![data.clone()], vec![data])
            }
            OpKind::DifCheck => (vec![protect(&data, &from)], vec![]),
            OpKind::DifInsert => {
                let protected = protect(&data, &from);
                (vec![data], vec![protected])
            }
            OpKind::DifStrip => (vec![protect(&data, &from)], vec![data]),
            OpKind::DifUpdate => (vec![protect(&data, &from)], vec![protect(&data, &to)]),
            OpKind::CacheFlush => (vec![data], vec![]),
        };
        let wrong = |buffer: &Vec<u8>| buffer.iter().map(|byte| !byte).collect();
        Contents {
            before: read.iter().cloned().chain(written.iter().map(wrong)).collect(),
            after: read.into_iter().chain(written).collect(),
            outcome,
        }
    }

    /// Whether the device found out what it should have.
    #[inline]
    pub(crate) fn agrees(&self, found: &Outcome, expected: &Outcome) -> bool {
        match self.kind {
            OpKind::Compare | OpKind::ComparePattern => found.matched == expected.matched,
            OpKind::Crc | OpKind::CopyCrc => found.crc == expected.crc,
            OpKind::CreateDelta => {
                !found.matched && !found.delta_overflow && found.delta_len == expected.delta_len
            }
            _ => true,
        }
    }
}

/// Bytes that look random: xorshift64* over the seed.
pub(crate) fn random(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = vec![0; len];
    for chunk in bytes.chunks_mut(8) {
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        let word = state.wrapping_mul(0x2545_f491_4f6c_dd1d).to_le_bytes();
        chunk.copy_from_slice(&word[..chunk.len()]);
    }
    bytes
}

fn pattern(len: usize) -> Vec<u8> {
    PATTERN.to_le_bytes().into_iter().cycle().take(len).collect()
}

/// A copy in which one unit in [`DELTA_EVERY`] is different.
fn modify(original: &[u8]) -> Vec<u8> {
    let mut modified = original.to_vec();
    for unit in modified.chunks_exact_mut(8).step_by(DELTA_EVERY) {
        unit[5] = !unit[5];
    }
    modified
}

/// The delta record: for each unit of 8 bytes that differs its index, 16 bits, and its new bytes.
fn delta(original: &[u8], modified: &[u8]) -> Vec<u8> {
    let units = original.chunks_exact(8).zip(modified.chunks_exact(8)).enumerate();
    let changed = units.filter(|(_, (old, new))| old != new);
    changed
        .flat_map(|(index, (_, new))| (index as u16).to_le_bytes().into_iter().chain(new.iter().copied()))
        .collect()
}

/// Each block with its protection information behind it: guard, application tag, reference tag, big-endian.
fn protect(data: &[u8], dif: &Dif) -> Vec<u8> {
    let blocks = data.chunks_exact(dif.block.bytes()).zip(dif.ref_tag..);
    let mut out = Vec::with_capacity(data.len() / dif.block.bytes() * (dif.block.bytes() + 8));
    for (block, ref_tag) in blocks {
        out.extend_from_slice(block);
        out.extend(crc16_t10dif(block).to_be_bytes());
        out.extend(dif.app_tag.to_be_bytes());
        out.extend(ref_tag.to_be_bytes());
    }
    out
}

/// CRC-16/T10-DIF (SBC-4, section 4.22.4): polynomial 0x8bb7, start value 0, nothing reversed.
fn crc16_t10dif(data: &[u8]) -> u16 {
    const TABLE: [u16; 256] = {
        let mut table = [0; 256];
        let mut byte = 0;
        while byte < 256 {
            let mut crc = (byte as u16) << 8;
            let mut bit = 0;
            while bit < 8 {
                crc = if crc & 0x8000 == 0 { crc << 1 } else { crc << 1 ^ 0x8bb7 };
                bit += 1;
            }
            table[byte] = crc;
            byte += 1;
        }
        table
    };
    data.iter().fold(0, |crc, byte| crc << 8 ^ TABLE[(crc >> 8 ^ u16::from(*byte)) as usize])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape(kind: OpKind, size: usize) -> Shape {
        Shape { kind, size, block: DifBlock::B512 }
    }

    #[test]
    fn t10_dif_check_value() {
        // The CRC catalogue's check value of CRC-16/T10-DIF.
        assert_eq!(crc16_t10dif(b"123456789"), 0xd0db);
    }

    #[test]
    fn buffers_have_the_lengths_that_are_allocated_and_outputs_are_wrong_before() {
        for (kind, name) in OpKind::NAMES {
            let shape = shape(kind, 4096);
            let contents = shape.contents(3);
            let lens = |buffers: &[Vec<u8>]| buffers.iter().map(Vec::len).collect::<Vec<_>>();
            assert_eq!(lens(&contents.before), shape.lens(), "{name}");
            assert_eq!(lens(&contents.after), shape.lens(), "{name}");
        }
        let copy = shape(OpKind::Copy, 100).contents(1);
        assert!(copy.before[1].iter().zip(&copy.after[1]).all(|(before, after)| before != after));
    }

    #[test]
    fn a_delta_names_the_changed_units() {
        let shape = shape(OpKind::CreateDelta, 8 * 62);
        let contents = shape.contents(9);
        let record = &contents.after[2][..shape.delta_len()];
        assert_eq!(shape.delta_len(), 20);
        assert_eq!(record[..2], [0, 0]);
        assert_eq!(record[2..10], contents.before[1][..8]);
        assert_eq!(record[10..12], [61, 0]);
        assert_eq!(record[12..], contents.before[1][61 * 8..]);
    }

    #[test]
    fn protection_information_counts_blocks() {
        let dif = Dif { app_tag: 0x1234, ref_tag: 0xffff_fffc, ..Dif::new(DifBlock::B512) };
        let out = protect(&[0; 1024], &dif);
        assert_eq!(out.len(), 1040);
        assert_eq!(out[512..520], [0, 0, 0x12, 0x34, 0xff, 0xff, 0xff, 0xfc]);
        assert_eq!(out[1036..], [0xff, 0xff, 0xff, 0xfd]);
    }
}
