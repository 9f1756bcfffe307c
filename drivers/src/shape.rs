//! Whether a job's buffers fit together: what every channel asks before it takes one.

use underpass::Access;
use underpass::accel::{Dif, Limits, Op, Reason};
use underpass::dma::DmaBuf;

use crate::ops::{DELTA_ENTRY, DELTA_UNIT, DIF_TUPLE};

/// Bytes that one delta record can describe: 65536 units, as many as 16 bits number (DSA architecture
/// specification 341204, "Create Delta Record").
pub(crate) const MAX_DELTA_BYTES: usize = 512 << 10;

/// The smallest buffer for a delta record (likewise).
const MIN_DELTA_RECORD: usize = 80;

/// Delta records and what they describe start on multiples of this (status 0x1c of the specification).
const DELTA_ALIGNMENT: usize = 8;

/// The two destinations of a dualcast must agree in the address bits below this.
const DUALCAST_ALIGNMENT: usize = 4096;

/// How many bytes the operation goes through: the specification's transfer size, which is the source's where
/// source and destination differ. Zero for operations without memory.
pub(crate) fn transfer_size(op: &Op) -> usize {
    match op {
        Op::Nop | Op::Drain => 0,
        Op::Probe { len, .. } => *len as usize,
        Op::CopyWithin { len, .. } => *len,
        Op::Fill { dst, .. } | Op::ApplyDelta { dst, .. } => dst.len(),
        Op::CacheFlush { buf } => buf.len(),
        Op::Compare { a: src, .. }
        | Op::CreateDelta { original: src, .. }
        | Op::Copy { src, .. }
        | Op::ComparePattern { src, .. }
        | Op::Dualcast { src, .. }
        | Op::Crc { src, .. }
        | Op::CopyCrc { src, .. }
        | Op::DifCheck { src, .. }
        | Op::DifInsert { src, .. }
        | Op::DifStrip { src, .. }
        | Op::DifUpdate { src, .. } => src.buf().len(),
    }
}

/// How many bytes the operation can say that it completed: of the record where it applies one, else of its transfer.
pub(crate) fn completable(op: &Op) -> usize {
    match op {
        Op::ApplyDelta { delta_len, .. } => *delta_len,
        _ => transfer_size(op),
    }
}

/// Checks that the channel does the operation, and that lengths and alignments of its buffers agree with each
/// other and with the limits. Addresses need no translation for that: regions are aligned to pages on both sides.
///
/// # Errors
/// [`Reason::Unsupported`], [`Reason::Size`] or [`Reason::Alignment`], checked in this order.
pub(crate) fn check_shape(op: &Op, limits: &Limits) -> Result<(), Reason> {
    require(limits.ops.contains(op.kind()), Reason::Unsupported)?;
    if matches!(op, Op::Nop | Op::Drain) {
        return Ok(());
    }
    let size = transfer_size(op);
    require(size != 0 && size as u64 <= limits.max_bytes, Reason::Size)?;
    match op {
        Op::Nop
        | Op::Drain
        | Op::Fill { .. }
        | Op::ComparePattern { .. }
        | Op::Crc { .. }
        | Op::CacheFlush { .. }
        | Op::Probe { .. } => Ok(()),
        Op::Copy { dst, .. } | Op::CopyCrc { dst, .. } => require(dst.len() == size, Reason::Size),
        Op::Compare { b, .. } => require(b.buf().len() == size, Reason::Size),
        Op::CopyWithin { buf, from, to, len } => {
            let inside = |start: usize| start.checked_add(*len).is_some_and(|end| end <= buf.len());
            require(inside(*from) && inside(*to), Reason::Size)
        }
        Op::CreateDelta { original, modified, delta } => {
            let sizes = modified.buf().len() == size && delta_size(size) && delta.len() >= MIN_DELTA_RECORD;
            require(sizes, Reason::Size)?;
            let aligned = [original.buf(), modified.buf(), delta].into_iter().all(delta_aligned);
            require(aligned, Reason::Alignment)
        }
        Op::ApplyDelta { delta, delta_len, dst } => {
            let record = *delta_len != 0
                && delta_len.is_multiple_of(DELTA_ENTRY)
                && *delta_len <= delta.buf().len()
                && *delta_len as u64 <= limits.max_bytes;
            require(record && delta_size(size), Reason::Size)?;
            require(delta_aligned(delta.buf()) && delta_aligned(dst), Reason::Alignment)
        }
        Op::Dualcast { dst1, dst2, .. } => {
            require(dst1.len() == size && dst2.len() == size, Reason::Size)?;
            let difference = dst1.as_ptr() as usize ^ dst2.as_ptr() as usize;
            require(difference.is_multiple_of(DUALCAST_ALIGNMENT), Reason::Alignment)
        }
        Op::DifCheck { dif, .. } => require(size.is_multiple_of(dif.block.bytes() + DIF_TUPLE), Reason::Size),
        Op::DifInsert { dst, dif, .. } => require(
            blocks_fit(size, dif.block.bytes(), dst.len(), dif.block.bytes() + DIF_TUPLE),
            Reason::Size,
        ),
        Op::DifStrip { dst, dif, .. } => require(
            blocks_fit(size, dif.block.bytes() + DIF_TUPLE, dst.len(), dif.block.bytes()),
            Reason::Size,
        ),
        Op::DifUpdate { dst, from, to, .. } => {
            // A descriptor has one pair of inversion flags, for both sides.
            let inversions = |dif: &Dif| (dif.invert_crc_seed, dif.invert_crc_result);
            require(inversions(from) == inversions(to), Reason::Unsupported)?;
            let whole = from.block == to.block && size.is_multiple_of(from.block.bytes() + DIF_TUPLE);
            require(whole && dst.len() == size, Reason::Size)
        }
    }
}

fn require(holds: bool, otherwise: Reason) -> Result<(), Reason> {
    if holds { Ok(()) } else { Err(otherwise) }
}

fn delta_size(size: usize) -> bool {
    size.is_multiple_of(DELTA_UNIT) && size <= MAX_DELTA_BYTES
}

fn delta_aligned(buf: &DmaBuf) -> bool {
    (buf.as_ptr() as usize).is_multiple_of(DELTA_ALIGNMENT)
}

/// Whether `src` bytes are whole blocks of `from` bytes, and as many blocks of `to` bytes are `dst` bytes.
fn blocks_fit(src: usize, from: usize, dst: usize, to: usize) -> bool {
    src.is_multiple_of(from) && dst.is_multiple_of(to) && src / from == dst / to
}

/// The buffers of a job, each with what the channel does to it.
pub(crate) fn operands(op: &Op) -> impl Iterator<Item = (&DmaBuf, Access)> {
    const R: Access = Access::READ;
    const W: Access = Access::WRITE;
    let operands: [Option<(&DmaBuf, Access)>; 3] = match op {
        Op::Nop | Op::Drain | Op::Probe { .. } => [None, None, None],
        Op::CopyWithin { buf, .. } => [Some((buf, Access::READ_WRITE)), None, None],
        Op::CacheFlush { buf } => [Some((buf, R)), None, None],
        Op::Fill { dst, .. } => [Some((dst, W)), None, None],
        Op::ComparePattern { src, .. } | Op::Crc { src, .. } | Op::DifCheck { src, .. } => {
            [Some((src.buf(), R)), None, None]
        }
        Op::Compare { a, b } => [Some((a.buf(), R)), Some((b.buf(), R)), None],
        Op::Copy { src, dst }
        | Op::CopyCrc { src, dst, .. }
        | Op::DifInsert { src, dst, .. }
        | Op::DifStrip { src, dst, .. }
        | Op::DifUpdate { src, dst, .. }
        | Op::ApplyDelta { delta: src, dst, .. } => [Some((src.buf(), R)), Some((dst, W)), None],
        Op::CreateDelta { original, modified, delta } => {
            [Some((original.buf(), R)), Some((modified.buf(), R)), Some((delta, W))]
        }
        Op::Dualcast { src, dst1, dst2 } => [Some((src.buf(), R)), Some((dst1, W)), Some((dst2, W))],
    };
    operands.into_iter().flatten()
}
