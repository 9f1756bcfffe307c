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

/// Buffers are filled and compared in pieces of so many bytes, a multiple of 8: in between, the caller may stop it.
pub(crate) const PIECE: usize = 64 << 10;

/// What a buffer is filled with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Holds {
    /// Bytes that look random.
    Data,
    /// The same after copy-within moved them.
    Moved,
    /// [`PATTERN`], over and over.
    Pattern,
    /// The data with one unit in [`DELTA_EVERY`] changed.
    Modified,
    /// The delta record from the data to the modified data, and zeroes.
    Record,
    /// The data, each block with its protection information behind it.
    Protected(Dif),
}

/// One of a job's buffers.
#[derive(Debug, Clone, Copy)]
struct Buffer {
    before: Holds,
    after: Holds,
    /// Before the job, each byte that it is to write is the complement of what is named.
    wrong: bool,
}

impl Buffer {
    fn read(holds: Holds) -> Self {
        Self { before: holds, after: holds, wrong: false }
    }

    fn written(holds: Holds) -> Self {
        Self { wrong: true, ..Self::read(holds) }
    }
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

    /// A job's buffers in the order that its [`Op`](underpass::accel::Op) names them.
    fn buffers(&self) -> Vec<Buffer> {
        let [from, to] = self.difs().map(Holds::Protected);
        let (read, written) = (Buffer::read, Buffer::written);
        match self.kind {
            OpKind::Nop | OpKind::Drain | OpKind::Probe => vec![],
            OpKind::Copy | OpKind::CopyCrc => vec![read(Holds::Data), written(Holds::Data)],
            OpKind::CopyWithin => vec![Buffer { after: Holds::Moved, ..read(Holds::Data) }],
            OpKind::Fill => vec![written(Holds::Pattern)],
            OpKind::Compare => vec![read(Holds::Data), read(Holds::Data)],
            OpKind::ComparePattern => vec![read(Holds::Pattern)],
            OpKind::CreateDelta => vec![read(Holds::Data), read(Holds::Modified), written(Holds::Record)],
            OpKind::ApplyDelta => {
                vec![read(Holds::Record), Buffer { after: Holds::Modified, ..read(Holds::Data) }]
            }
            OpKind::Dualcast => vec![read(Holds::Data), written(Holds::Data), written(Holds::Data)],
            OpKind::Crc | OpKind::CacheFlush => vec![read(Holds::Data)],
            OpKind::DifCheck => vec![read(from)],
            OpKind::DifInsert => vec![read(Holds::Data), written(from)],
            OpKind::DifStrip => vec![read(from), written(Holds::Data)],
            OpKind::DifUpdate => vec![read(from), written(to)],
        }
    }

    /// Fills one job's buffers; another `seed` gives other data. Every byte that the job is to write has a wrong
    /// value then. Returns what the device is to find out, or `None` as soon as `go_on`, which hears the length of
    /// each piece before it is written, says to stop.
    pub(crate) fn write<'a>(
        &self,
        seed: u64,
        buffers: impl Iterator<Item = &'a mut [u8]>,
        go_on: &mut dyn FnMut(usize) -> bool,
    ) -> Option<Outcome> {
        let mut outcome = Outcome { matched: self.kind != OpKind::CreateDelta, ..Outcome::default() };
        if self.kind == OpKind::CreateDelta {
            outcome.delta_len = self.delta_len() as u32;
        }
        for (index, (buffer, what)) in buffers.zip(self.buffers()).enumerate() {
            let mut words = Words::new(self, what.before, what.wrong, seed);
            let summed = index == 0 && matches!(self.kind, OpKind::Crc | OpKind::CopyCrc);
            for piece in buffer.chunks_mut(PIECE) {
                if !go_on(piece.len()) {
                    return None;
                }
                words.write(piece);
                if summed {
                    outcome.crc = crc32c::update(outcome.crc, piece);
                }
            }
        }
        Some(outcome)
    }

    /// Whether one job's buffers hold what they must after it, every byte of them; `None` as soon as `go_on` says
    /// to stop.
    pub(crate) fn holds<'a>(
        &self,
        seed: u64,
        buffers: impl Iterator<Item = &'a [u8]>,
        go_on: &mut dyn FnMut(usize) -> bool,
    ) -> Option<bool> {
        for (buffer, what) in buffers.zip(self.buffers()) {
            let mut words = Words::new(self, what.after, false, seed);
            for piece in buffer.chunks(PIECE) {
                if !go_on(piece.len()) {
                    return None;
                }
                if !words.equal(piece) {
                    return Some(false);
                }
            }
        }
        Some(true)
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

/// Words of 8 bytes that look random: xorshift64* over the seed.
#[derive(Debug)]
struct Random(u64);

impl Random {
    fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    #[inline]
    fn next(&mut self) -> [u8; 8] {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d).to_le_bytes()
    }
}

/// A buffer's contents from its start on, 8 bytes at a time.
#[derive(Debug)]
struct Words {
    holds: Holds,
    seed: u64,
    random: Random,
    /// Words so far.
    at: usize,
    /// 0xff makes every byte wrong.
    flip: u8,
    /// Words of data in a block.
    block: usize,
    /// Of the block's data so far.
    guard: u16,
    /// The block's number.
    number: u32,
    /// The delta record, at most 11 KiB.
    record: Vec<u8>,
}

impl Words {
    fn new(shape: &Shape, holds: Holds, wrong: bool, seed: u64) -> Self {
        let mut flip = if wrong { 0xff } else { 0 };
        let mut record = Vec::new();
        if holds == Holds::Record {
            record = delta(shape, seed);
            for byte in &mut record {
                *byte ^= flip;
            }
            record.resize(shape.delta_capacity(), 0);
            // The job leaves what is behind the record as it is.
            flip = 0;
        }
        let block = shape.block.bytes() / 8;
        Self { holds, seed, random: Random::new(seed), at: 0, flip, block, guard: 0, number: 0, record }
    }

    #[inline]
    fn next(&mut self) -> [u8; 8] {
        let word = match self.holds {
            Holds::Data => self.random.next(),
            Holds::Moved => {
                if self.at == SHIFT / 8 {
                    self.random = Random::new(self.seed);
                }
                self.random.next()
            }
            Holds::Pattern => PATTERN.to_le_bytes(),
            Holds::Modified => modified(self.at, self.random.next()),
            Holds::Record => self.record.as_chunks().0.get(self.at).copied().unwrap_or_default(),
            Holds::Protected(dif) => self.protected(&dif),
        };
        self.at += 1;
        word.map(|byte| byte ^ self.flip)
    }

    /// A word of a block's data, or behind it guard, application tag and reference tag, big-endian.
    fn protected(&mut self, dif: &Dif) -> [u8; 8] {
        if self.at % (self.block + 1) < self.block {
            let word = self.random.next();
            self.guard = crc16_t10dif(self.guard, &word);
            return word;
        }
        let ([g0, g1], [a0, a1]) = (self.guard.to_be_bytes(), dif.app_tag.to_be_bytes());
        let [r0, r1, r2, r3] = dif.ref_tag.wrapping_add(self.number).to_be_bytes();
        self.guard = 0;
        self.number = self.number.wrapping_add(1);
        [g0, g1, a0, a1, r0, r1, r2, r3]
    }

    /// The next bytes; a number that is no multiple of 8 is the last.
    fn write(&mut self, piece: &mut [u8]) {
        let (words, rest) = piece.as_chunks_mut();
        for word in words {
            *word = self.next();
        }
        if !rest.is_empty() {
            rest.copy_from_slice(&self.next()[..rest.len()]);
        }
    }

    /// Whether these are the next bytes.
    fn equal(&mut self, piece: &[u8]) -> bool {
        let (words, rest) = piece.as_chunks();
        words.iter().all(|word| *word == self.next())
            && (rest.is_empty() || *rest == self.next()[..rest.len()])
    }
}

/// What a word of data is in the modified data.
fn modified(index: usize, mut word: [u8; 8]) -> [u8; 8] {
    if index.is_multiple_of(DELTA_EVERY) {
        word[5] = !word[5];
    }
    word
}

/// The delta record: for each unit of 8 bytes that differs its index, 16 bits, and its new bytes.
fn delta(shape: &Shape, seed: u64) -> Vec<u8> {
    let mut random = Random::new(seed);
    let units = (0..shape.size / 8).map(|index| (index, random.next()));
    let changed = units.filter(|(index, _)| index.is_multiple_of(DELTA_EVERY));
    changed
        .flat_map(|(index, word)| (index as u16).to_le_bytes().into_iter().chain(modified(index, word)))
        .collect()
}

/// CRC-16/T10-DIF (SBC-4, section 4.22.4): polynomial 0x8bb7, start value 0, nothing
/// reversed; continued from the `crc` of what came before.
fn crc16_t10dif(crc: u16, data: &[u8]) -> u16 {
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
    data.iter().fold(crc, |crc, byte| crc << 8 ^ TABLE[(crc >> 8 ^ u16::from(*byte)) as usize])
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
        assert_eq!(crc16_t10dif(0, b"123456789"), 0xd0db);
        assert_eq!(crc16_t10dif(crc16_t10dif(0, b"1234"), b"56789"), 0xd0db);
    }

    /// Whole buffers, each made in one go and apart from [`Words`].
    fn whole(shape: &Shape, seed: u64) -> (Vec<Vec<u8>>, Vec<Vec<u8>>) {
        let data = random(seed, shape.size);
        let wrong = |data: &[u8]| data.iter().map(|byte| !byte).collect::<Vec<u8>>();
        let [from, to] = shape.difs();
        let both = |read: Vec<Vec<u8>>, written: Vec<Vec<u8>>| {
            let before = read.iter().cloned().chain(written.iter().map(|data| wrong(data))).collect();
            (before, read.into_iter().chain(written).collect())
        };
        match shape.kind {
            OpKind::Nop | OpKind::Drain | OpKind::Probe => (vec![], vec![]),
            OpKind::Copy | OpKind::CopyCrc => both(vec![data.clone()], vec![data]),
            OpKind::CopyWithin => {
                let before = random(seed, shape.size + SHIFT);
                let mut after = before.clone();
                after[SHIFT..].copy_from_slice(&before[..shape.size]);
                (vec![before], vec![after])
            }
            OpKind::Fill => both(vec![], vec![pattern(shape.size)]),
            OpKind::Compare => both(vec![data.clone(), data], vec![]),
            OpKind::ComparePattern => both(vec![pattern(shape.size)], vec![]),
            OpKind::CreateDelta => {
                let modified = modify(&data);
                let mut after = record(&data, &modified);
                let mut before = wrong(&after);
                after.resize(shape.lens()[2], 0);
                before.resize(shape.lens()[2], 0);
                (vec![data.clone(), modified.clone(), before], vec![data, modified, after])
            }
            OpKind::ApplyDelta => {
                let modified = modify(&data);
                let mut record = record(&data, &modified);
                record.resize(shape.lens()[0], 0);
                (vec![record.clone(), data], vec![record, modified])
            }
            OpKind::Dualcast => both(vec![data.clone()], vec![data.clone(), data]),
            OpKind::Crc | OpKind::CacheFlush => both(vec![data], vec![]),
            OpKind::DifCheck => both(vec![protect(&data, &from)], vec![]),
            OpKind::DifInsert => both(vec![data.clone()], vec![protect(&data, &from)]),
            OpKind::DifStrip => both(vec![protect(&data, &from)], vec![data]),
            OpKind::DifUpdate => both(vec![protect(&data, &from)], vec![protect(&data, &to)]),
        }
    }

    /// Bytes that look random: xorshift64* over the seed.
    fn random(seed: u64, len: usize) -> Vec<u8> {
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
    fn record(original: &[u8], modified: &[u8]) -> Vec<u8> {
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
            out.extend(crc16_t10dif(0, block).to_be_bytes());
            out.extend(dif.app_tag.to_be_bytes());
            out.extend(ref_tag.to_be_bytes());
        }
        out
    }

    fn write(shape: &Shape, seed: u64) -> (Vec<Vec<u8>>, Outcome) {
        let mut buffers: Vec<Vec<u8>> = shape.lens().into_iter().map(|len| vec![0x77; len]).collect();
        let outcome = shape.write(seed, buffers.iter_mut().map(|buffer| &mut buffer[..]), &mut |_| true);
        (buffers, outcome.expect("nobody stops it"))
    }

    fn holds(shape: &Shape, seed: u64, buffers: &[Vec<u8>]) -> bool {
        let checked = shape.holds(seed, buffers.iter().map(|buffer| &buffer[..]), &mut |_| true);
        checked.expect("nobody stops it")
    }

    #[test]
    fn pieces_make_up_the_whole() {
        for (kind, name) in OpKind::NAMES {
            for (block, size) in [
                (DifBlock::B512, 4096),
                (DifBlock::B512, 3 * PIECE + 512),
                (DifBlock::B520, 520 * 300),
                (DifBlock::B4104, 4104 * 50),
            ] {
                let shape = Shape { kind, size, block };
                if shape.wrong_size().is_some() {
                    continue;
                }
                let (before, after) = whole(&shape, 7);
                let (written, outcome) = write(&shape, 7);
                assert!(written == before, "{name} of {size} bytes");
                assert!(holds(&shape, 7, &after), "{name} of {size} bytes");
                if matches!(kind, OpKind::Crc | OpKind::CopyCrc) {
                    assert_eq!(outcome.crc, crc32c::update(0, &before[0]));
                }
            }
        }
        for size in [1, 7, 13, PIECE - 1, PIECE + 1, 2 * PIECE + 3] {
            for kind in [OpKind::Copy, OpKind::CopyWithin, OpKind::Fill, OpKind::CopyCrc] {
                let shape = shape(kind, size);
                let (before, after) = whole(&shape, 1 << 40);
                assert!(write(&shape, 1 << 40).0 == before && holds(&shape, 1 << 40, &after), "{size} bytes");
            }
        }
    }

    #[test]
    fn every_wrong_byte_is_found() {
        for (kind, size) in [(OpKind::Copy, PIECE + 9), (OpKind::Fill, 13), (OpKind::DifInsert, 1024)] {
            let shape = shape(kind, size);
            let (_, mut after) = whole(&shape, 5);
            for buffer in 0..after.len() {
                let last = after[buffer].len() - 1;
                for at in [0, 7, 8, last / 2, last] {
                    after[buffer][at] ^= 1;
                    assert!(!holds(&shape, 5, &after), "byte {at} of buffer {buffer}");
                    after[buffer][at] ^= 1;
                }
            }
            assert!(holds(&shape, 5, &after));
        }
    }

    #[test]
    fn it_stops_between_two_pieces() {
        let shape = shape(OpKind::Copy, 10 * PIECE);
        let mut buffers = vec![vec![0; 10 * PIECE]; 2];
        let mut left = 3;
        let mut go_on = |bytes: usize| {
            assert!(bytes <= PIECE);
            left -= 1;
            left >= 0
        };
        let written = shape.write(1, buffers.iter_mut().map(|buffer| &mut buffer[..]), &mut go_on);
        assert_eq!(written, None);
        assert!(buffers[0][3 * PIECE - 8..3 * PIECE] != [0; 8]);
        assert!(buffers[0][3 * PIECE..].iter().chain(&buffers[1]).all(|byte| *byte == 0));
        assert_eq!(shape.holds(1, buffers.iter().map(|buffer| &buffer[..]), &mut |_| false), None);
    }

    #[test]
    fn outputs_are_wrong_before() {
        let (before, _) = write(&shape(OpKind::Copy, 100), 1);
        assert!(before[0].iter().zip(&before[1]).all(|(source, output)| source != output));
    }

    #[test]
    fn a_delta_names_the_changed_units() {
        let shape = shape(OpKind::CreateDelta, 8 * 62);
        let (before, outcome) = write(&shape, 9);
        let record: Vec<u8> = before[2][..shape.delta_len()].iter().map(|byte| !byte).collect();
        assert_eq!((shape.delta_len(), outcome.delta_len, outcome.matched), (20, 20, false));
        assert_eq!(record[..2], [0, 0]);
        assert_eq!(record[2..10], before[1][..8]);
        assert_eq!(record[10..12], [61, 0]);
        assert_eq!(record[12..], before[1][61 * 8..]);
    }

    #[test]
    fn protection_information_counts_blocks() {
        let dif = Dif { app_tag: 0x1234, ref_tag: 0xffff_fffc, ..Dif::new(DifBlock::B512) };
        let shape = shape(OpKind::DifCheck, 1024);
        let mut out = [0; 1040];
        Words::new(&shape, Holds::Protected(dif), false, 1).write(&mut out);
        assert_eq!(out[514..520], [0x12, 0x34, 0xff, 0xff, 0xff, 0xfc]);
        assert_eq!(out[1036..], [0xff, 0xff, 0xff, 0xfd]);
    }
}
