//! What every operation must do, byte by byte and bit by bit, from the published definitions: slow, obvious,
//! and with nothing in common with the code under test.

#![allow(dead_code, reason = "each test binary uses a part of it")]
#![allow(clippy::assigning_clones, clippy::manual_memcpy, reason = "written out, as a reference is")]

use underpass::accel::{Dif, Done, JobError, Op, Outcome};
use underpass::dma::DmaBuf;

/// CRC32C: RFC 3720, section 12.1 and appendix B.4 (the polynomial 0x1edc6f41, bits reversed), continued from
/// an earlier result, 0 to begin.
pub(crate) fn crc32c(seed: u32, data: &[u8]) -> u32 {
    let mut crc = !seed;
    for byte in data {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = if crc & 1 == 1 { crc >> 1 ^ 0x82f6_3b78 } else { crc >> 1 };
        }
    }
    !crc
}

/// CRC-16/T10-DIF: SBC-4, section 4.22.4, polynomial 0x8bb7, most significant bit first.
pub(crate) fn crc16_t10(seed: u16, data: &[u8]) -> u16 {
    let mut crc = seed;
    for byte in data {
        crc ^= u16::from(*byte) << 8;
        for _ in 0..8 {
            crc = if crc & 0x8000 == 0 { crc << 1 } else { crc << 1 ^ 0x8bb7 };
        }
    }
    crc
}

/// Byte `index` of a buffer filled with `pattern`.
pub(crate) fn pattern_byte(pattern: u64, index: usize) -> u8 {
    (pattern >> (8 * (index % 8))) as u8
}

/// The delta record of two buffers, as large as it needs to be.
pub(crate) fn delta_record(original: &[u8], modified: &[u8]) -> Vec<u8> {
    let mut record = Vec::new();
    for unit in 0..original.len() / 8 {
        let bytes = unit * 8..unit * 8 + 8;
        if original[bytes.clone()] != modified[bytes.clone()] {
            record.push(unit as u8);
            record.push((unit >> 8) as u8);
            record.extend_from_slice(&modified[bytes]);
        }
    }
    record
}

/// Guard, application tag and reference tag of block `index`.
fn tags(data: &[u8], dif: &Dif, index: usize) -> (u16, u16, u32) {
    let crc = crc16_t10(if dif.invert_crc_seed { 0xffff } else { 0 }, data);
    let guard = if dif.invert_crc_result { crc ^ 0xffff } else { crc };
    let app_tag = dif.app_tag.wrapping_add(if dif.increment_app_tag { index as u16 } else { 0 });
    let ref_tag = dif.ref_tag.wrapping_add(if dif.fixed_ref_tag { 0 } else { index as u32 });
    (guard, app_tag, ref_tag)
}

/// The blocks of `data` with protection information.
pub(crate) fn dif_insert(data: &[u8], dif: &Dif) -> Vec<u8> {
    let mut out = Vec::new();
    for (index, block) in data.chunks(dif.block.bytes()).enumerate() {
        let (guard, app_tag, ref_tag) = tags(block, dif, index);
        out.extend_from_slice(block);
        out.extend_from_slice(&guard.to_be_bytes());
        out.extend_from_slice(&(app_tag & !dif.app_tag_mask).to_be_bytes());
        out.extend_from_slice(&ref_tag.to_be_bytes());
    }
    out
}

/// The data of blocks with protection information, or what is wrong with the first bad one.
pub(crate) fn dif_strip(protected: &[u8], dif: &Dif) -> Result<Vec<u8>, JobError> {
    let mut out = Vec::new();
    let size = dif.block.bytes();
    for (index, block) in protected.chunks(size + 8).enumerate() {
        let (guard, app_tag, ref_tag) = tags(&block[..size], dif, index);
        let found_guard = u16::from_be_bytes([block[size], block[size + 1]]);
        let found_app_tag = u16::from_be_bytes([block[size + 2], block[size + 3]]);
        let found_ref_tag = u32::from_be_bytes(block[size + 4..].try_into().unwrap());
        let bad_guard = !dif.skip_guard_check && found_guard != guard;
        let bad_app_tag = found_app_tag | dif.app_tag_mask != app_tag | dif.app_tag_mask;
        let bad_ref_tag = !dif.skip_ref_tag_check && found_ref_tag != ref_tag;
        if bad_guard || bad_app_tag || bad_ref_tag {
            return Err(JobError::Dif {
                completed: out.len() as u32 / size as u32 * (size + 8) as u32,
                guard: bad_guard,
                app_tag: bad_app_tag,
                ref_tag: bad_ref_tag,
            });
        }
        out.extend_from_slice(&block[..size]);
    }
    Ok(out)
}

/// The buffers of an operation, in the order of its fields.
pub(crate) fn buffers(op: &Op) -> Vec<&DmaBuf> {
    match op {
        Op::Nop | Op::Drain | Op::Probe { .. } => vec![],
        Op::Copy { src, dst }
        | Op::CopyCrc { src, dst, .. }
        | Op::DifInsert { src, dst, .. }
        | Op::DifStrip { src, dst, .. }
        | Op::DifUpdate { src, dst, .. } => vec![src.buf(), dst],
        Op::CopyWithin { buf, .. } | Op::CacheFlush { buf } => vec![buf],
        Op::Fill { dst, .. } => vec![dst],
        Op::Compare { a, b } => vec![a.buf(), b.buf()],
        Op::ComparePattern { src, .. } | Op::Crc { src, .. } | Op::DifCheck { src, .. } => vec![src.buf()],
        Op::CreateDelta { original, modified, delta } => vec![original.buf(), modified.buf(), delta],
        Op::ApplyDelta { delta, dst, .. } => vec![delta.buf(), dst],
        Op::Dualcast { src, dst1, dst2 } => vec![src.buf(), dst1, dst2],
    }
}

/// How a job must come back.
#[derive(Debug)]
pub(crate) struct Expected {
    result: Result<Outcome, JobError>,
    /// What each buffer begins with afterwards, in the order of [`buffers`]; judged only if the job succeeds.
    contents: Vec<Vec<u8>>,
}

impl Expected {
    /// How `op` must come back, from what its buffers hold now.
    pub(crate) fn of(op: &Op) -> Self {
        let mut contents: Vec<Vec<u8>> = buffers(op).iter().map(|buf| buf.to_vec()).collect();
        let result = perform(op, &mut contents);
        Self { result, contents }
    }

    /// Whether the job must fail.
    pub(crate) fn fails(&self) -> bool {
        self.result.is_err()
    }

    /// Holds `done` against it.
    pub(crate) fn verify(&self, done: &Done) {
        let kind = done.job.op.kind();
        match (&self.result, &done.result) {
            (Ok(expected), Ok(found)) => {
                // A device may stop its comparison early, in front of the difference.
                assert!(found.mismatch_at <= expected.mismatch_at, "{kind:?}: {found:?}, not {expected:?}");
                let found = Outcome { mismatch_at: expected.mismatch_at, ..*found };
                assert_eq!(found, *expected, "{kind:?}");
            }
            (expected, found) => assert_eq!(found, expected, "{kind:?}"),
        }
        let buffers = buffers(&done.job.op);
        assert_eq!(buffers.len(), self.contents.len(), "{kind:?} came back as another operation");
        for (number, (buf, expected)) in buffers.iter().zip(&self.contents).enumerate() {
            if self.result.is_ok() && buf[..expected.len()] != expected[..] {
                let at = (0..expected.len()).find(|at| buf[*at] != expected[*at]);
                panic!("{kind:?}: buffer {number} of {} bytes is wrong from byte {at:?} on", buf.len());
            }
        }
    }
}

/// Does `op` to copies of its buffers.
fn perform(op: &Op, contents: &mut [Vec<u8>]) -> Result<Outcome, JobError> {
    let mut outcome = Outcome { matched: true, ..Outcome::default() };
    let mut compared = |first: Option<usize>| {
        outcome.matched = first.is_none();
        outcome.mismatch_at = first.unwrap_or(0) as u32;
    };
    match op {
        Op::Nop | Op::Drain | Op::Probe { .. } | Op::CacheFlush { .. } => {}
        Op::Copy { .. } => contents[1] = contents[0].clone(),
        Op::Dualcast { .. } => {
            contents[1] = contents[0].clone();
            contents[2] = contents[0].clone();
        }
        Op::CopyWithin { from, to, len, .. } => {
            let before = contents[0].clone();
            for n in 0..*len {
                contents[0][to + n] = before[from + n];
            }
        }
        Op::Fill { pattern, .. } => {
            for (index, byte) in contents[0].iter_mut().enumerate() {
                *byte = pattern_byte(*pattern, index);
            }
        }
        Op::Compare { .. } => {
            compared((0..contents[0].len()).find(|at| contents[0][*at] != contents[1][*at]));
        }
        Op::ComparePattern { pattern, .. } => {
            compared((0..contents[0].len()).find(|at| contents[0][*at] != pattern_byte(*pattern, *at)));
        }
        Op::CreateDelta { .. } => {
            let mut record = delta_record(&contents[0], &contents[1]);
            outcome.matched = record.is_empty();
            let room = contents[2].len() / 10 * 10;
            outcome.delta_overflow = record.len() > room;
            record.truncate(room);
            outcome.delta_len = record.len() as u32;
            contents[2] = record;
        }
        Op::ApplyDelta { delta_len, .. } => {
            let (record, dst) = contents.split_at_mut(1);
            for entry in record[0][..*delta_len].chunks(10) {
                let unit = usize::from(entry[0]) + 256 * usize::from(entry[1]);
                dst[0][unit * 8..unit * 8 + 8].copy_from_slice(&entry[2..]);
            }
        }
        Op::Crc { seed, .. } => outcome.crc = crc32c(*seed, &contents[0]),
        Op::CopyCrc { seed, .. } => {
            outcome.crc = crc32c(*seed, &contents[0]);
            contents[1] = contents[0].clone();
        }
        Op::DifCheck { dif, .. } => drop(dif_strip(&contents[0], dif)?),
        Op::DifInsert { dif, .. } => contents[1] = dif_insert(&contents[0], dif),
        Op::DifStrip { dif, .. } => contents[1] = dif_strip(&contents[0], dif)?,
        Op::DifUpdate { from, to, .. } => contents[1] = dif_insert(&dif_strip(&contents[0], from)?, to),
    }
    Ok(outcome)
}
