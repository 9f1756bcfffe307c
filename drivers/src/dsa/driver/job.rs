//! A job as a descriptor, and a completion record as its outcome.

use std::sync::atomic::Ordering;

use underpass::accel::{Dif, DifBlock, JobError, Op, OpKind, Ops, Outcome, Reason};
use underpass::dma::{DmaBuf, DmaSpace, Records};
use underpass::{Access, Iova};

use crate::dsa::spec::{
    CompletionRecord, DELTA_ENTRY, DELTA_MIN_SIZE, Descriptor, DifControl, DifDestinationFlags,
    DifSourceFlags, DifTags, GenCap, Handshake, Opcode, Status, compare_result, delta_result, dif_result,
};
use crate::shape::{completable, transfer_size};

/// The operations of a device with these capabilities.
pub(super) fn supported(operations: [u64; 4], general: GenCap) -> Ops {
    let has = |kind| match kind {
        OpKind::CopyWithin => general.overlapping_copy(),
        _ => true,
    };
    OpKind::NAMES
        .into_iter()
        .map(|(kind, _)| kind)
        .filter(|kind| operations[0] & opcode(*kind).bit() != 0 && has(*kind))
        .fold(Ops::NONE, Ops::with)
}

const fn opcode(kind: OpKind) -> Opcode {
    match kind {
        OpKind::Nop => Opcode::NoOp,
        OpKind::Drain => Opcode::Drain,
        OpKind::Copy | OpKind::CopyWithin => Opcode::MemoryMove,
        OpKind::Fill => Opcode::Fill,
        OpKind::Compare => Opcode::Compare,
        OpKind::ComparePattern => Opcode::ComparePattern,
        OpKind::CreateDelta => Opcode::CreateDelta,
        OpKind::ApplyDelta => Opcode::ApplyDelta,
        OpKind::Dualcast => Opcode::Dualcast,
        // The CRC operation reads and writes nothing; its result is dropped for a probe.
        OpKind::Crc | OpKind::Probe => Opcode::Crc,
        OpKind::CopyCrc => Opcode::CopyCrc,
        OpKind::DifCheck => Opcode::DifCheck,
        OpKind::DifInsert => Opcode::DifInsert,
        OpKind::DifStrip => Opcode::DifStrip,
        OpKind::DifUpdate => Opcode::DifUpdate,
        OpKind::CacheFlush => Opcode::CacheFlush,
    }
}

/// The descriptor of an operation whose shape was checked, without what its place in the queue adds (flags
/// and address of completion, interrupt, PASID). `write_flags` go with operations that write to memory.
///
/// # Errors
/// [`Reason::NotMapped`]; [`Reason::Unsupported`] for a DIF update that inverts differently on its two sides, which
/// one descriptor can not say.
#[allow(clippy::inline_always, reason = "a returned descriptor is copied twice; measured")]
#[inline(always)]
pub(super) fn encode(op: &Op, space: &DmaSpace, write_flags: u32) -> Result<Descriptor, Reason> {
    let at = |buf: &DmaBuf| space.iova(buf).map(Iova::get).ok_or(Reason::NotMapped);
    let reads = |kind| Descriptor::new(opcode(kind), 0);
    let writes = |kind| Descriptor::new(opcode(kind), write_flags);
    let mut descriptor = match op {
        Op::Nop => return Ok(reads(OpKind::Nop)),
        Op::Drain => return Ok(reads(OpKind::Drain)),
        Op::Copy { src, dst } => {
            Descriptor { source: at(src.buf())?, destination: at(dst)?, ..writes(OpKind::Copy) }
        }
        Op::CopyWithin { buf, from, to, .. } => {
            let base = at(buf)?;
            let (source, destination) = (base + *from as u64, base + *to as u64);
            Descriptor { source, destination, ..writes(OpKind::CopyWithin) }
        }
        Op::Fill { dst, pattern } => {
            Descriptor { source: *pattern, destination: at(dst)?, ..writes(OpKind::Fill) }
        }
        Op::Compare { a, b } => {
            Descriptor { source: at(a.buf())?, destination: at(b.buf())?, ..reads(OpKind::Compare) }
        }
        Op::ComparePattern { src, pattern } => {
            Descriptor { source: at(src.buf())?, destination: *pattern, ..reads(OpKind::ComparePattern) }
        }
        Op::CreateDelta { original, modified, delta } => Descriptor {
            source: at(original.buf())?,
            destination: at(modified.buf())?,
            ..writes(OpKind::CreateDelta).with_delta(at(delta)?, max_delta(op, delta), 0)
        },
        Op::ApplyDelta { delta, delta_len, dst } => Descriptor {
            source: at(delta.buf())?,
            destination: at(dst)?,
            ..writes(OpKind::ApplyDelta).with_delta_size(*delta_len as u32)
        },
        Op::Dualcast { src, dst1, dst2 } => Descriptor {
            source: at(src.buf())?,
            destination: at(dst1)?,
            ..writes(OpKind::Dualcast).with_destination2(at(dst2)?)
        },
        // The seed needs no inversion: the device inverts it and its result unless told not to, so that the
        // seed is a finished CRC32C, as Op::Crc has it.
        Op::Crc { src, seed } => {
            Descriptor { source: at(src.buf())?, ..reads(OpKind::Crc).with_crc_seed(*seed) }
        }
        Op::CopyCrc { src, dst, seed } => Descriptor {
            source: at(src.buf())?,
            destination: at(dst)?,
            ..writes(OpKind::CopyCrc).with_crc_seed(*seed)
        },
        Op::DifCheck { src, dif } => Descriptor {
            source: at(src.buf())?,
            ..reads(OpKind::DifCheck).with_dif(
                control(dif).with_source(source_flags(dif)),
                tags(dif),
                DifTags::new(),
            )
        },
        Op::DifInsert { src, dst, dif } => Descriptor {
            source: at(src.buf())?,
            destination: at(dst)?,
            ..writes(OpKind::DifInsert).with_dif(
                control(dif).with_destination(destination_flags(dif)),
                DifTags::new(),
                tags(dif),
            )
        },
        Op::DifStrip { src, dst, dif } => Descriptor {
            source: at(src.buf())?,
            destination: at(dst)?,
            ..writes(OpKind::DifStrip).with_dif(
                control(dif).with_source(source_flags(dif)),
                tags(dif),
                DifTags::new(),
            )
        },
        Op::DifUpdate { src, dst, from, to } => {
            let inversions = |dif: &Dif| (dif.invert_crc_seed, dif.invert_crc_result);
            if inversions(from) != inversions(to) {
                return Err(Reason::Unsupported);
            }
            let control =
                control(from).with_source(source_flags(from)).with_destination(destination_flags(to));
            Descriptor {
                source: at(src.buf())?,
                destination: at(dst)?,
                ..writes(OpKind::DifUpdate).with_dif(control, tags(from), tags(to))
            }
        }
        Op::CacheFlush { buf } => Descriptor { destination: at(buf)?, ..reads(OpKind::CacheFlush) },
        Op::Probe { iova, .. } => Descriptor { source: iova.get(), ..reads(OpKind::Probe) },
    };
    // The shape was checked: it is at most the device's maximum, which is below 2^32.
    descriptor.size = transfer_size(op) as u32;
    Ok(descriptor)
}

/// The largest record that a delta of this operation may have: whole entries, and no more than one a unit.
fn max_delta(op: &Op, delta: &DmaBuf) -> u32 {
    let entry = DELTA_ENTRY as usize;
    let all_different = transfer_size(op) / 8 * entry;
    let most = delta.len().min(all_different.max(DELTA_MIN_SIZE as usize));
    (most / entry * entry) as u32
}

fn control(dif: &Dif) -> DifControl {
    let block = match dif.block {
        DifBlock::B512 => 0,
        DifBlock::B520 => 1,
        DifBlock::B4096 => 2,
        DifBlock::B4104 => 3,
    };
    DifControl::new()
        .with_block(block)
        .with_invert_crc_seed(dif.invert_crc_seed)
        .with_invert_crc_result(dif.invert_crc_result)
}

fn source_flags(dif: &Dif) -> DifSourceFlags {
    DifSourceFlags::new()
        .with_increment_app_tag(dif.increment_app_tag)
        .with_skip_guard_check(dif.skip_guard_check)
        .with_skip_ref_tag_check(dif.skip_ref_tag_check)
        .with_fixed_ref_tag(dif.fixed_ref_tag)
}

fn destination_flags(dif: &Dif) -> DifDestinationFlags {
    DifDestinationFlags::new()
        .with_increment_app_tag(dif.increment_app_tag)
        .with_fixed_ref_tag(dif.fixed_ref_tag)
}

fn tags(dif: &Dif) -> DifTags {
    DifTags::new().with_ref_tag(dif.ref_tag).with_app_tag(dif.app_tag).with_app_tag_mask(dif.app_tag_mask)
}

const fn lied<T>(why: &'static str) -> Result<T, JobError> {
    Err(JobError::Lied { why })
}

/// The outcome of a job that only does something.
pub(super) const DONE: Outcome =
    Outcome { matched: true, delta_overflow: false, crc: 0, delta_len: 0, mismatch_at: 0 };

/// Whether the answer to `op`, or to the `batch` of so many members that it is in, is that it was done, and that is all
/// there is to say: most are. Its outcome is [`DONE`].
#[inline]
pub(super) fn is_plain_success(op: &Op, answer: Handshake, batch: Option<usize>) -> bool {
    let completed = answer.completed() as usize;
    answer.status() == Status::SUCCESS.0
        && !has_result(op)
        && batch.map_or_else(|| completed <= completable(op), |members| completed == members)
}

/// Whether a success tells more than that all of the transfer size is done, so that its record is needed.
pub(super) const fn has_result(op: &Op) -> bool {
    matches!(
        op,
        Op::Compare { .. }
            | Op::ComparePattern { .. }
            | Op::CreateDelta { .. }
            | Op::Crc { .. }
            | Op::CopyCrc { .. }
    )
}

/// What the device answered to `op`: `handshake`, the first word of record `index`, was read with Acquire and has a
/// status. Nothing in the record is believed that can not be true.
pub(super) fn judge(
    op: &Op,
    handshake: Handshake,
    records: &Records<CompletionRecord>,
    index: usize,
) -> Result<Outcome, JobError> {
    // Relaxed: the Acquire of the handshake word ordered it. Each word is read once at most.
    let word = |offset| records.word(index, offset).load(Ordering::Relaxed);
    let status = Status(handshake.status());
    let (size, completed) = (transfer_size(op), handshake.completed());
    if completed as usize > completable(op) {
        return lied("it completed more bytes than the job has");
    }
    match status.code() {
        Status::SUCCESS if !status.is_write() => succeeded(op, handshake, size, word),
        Status::PAGE_FAULT => Err(JobError::PageFault {
            iova: Iova::new(word(FAULT_ADDRESS)),
            access: if status.is_write() { Access::WRITE } else { Access::READ },
            completed,
        }),
        Status::DIF_ERROR if is_dif(op) => {
            let wrong = |bit| handshake.result() & bit != 0;
            Err(JobError::Dif {
                completed,
                guard: wrong(dif_result::GUARD),
                app_tag: wrong(dif_result::APP_TAG),
                ref_tag: wrong(dif_result::REF_TAG),
            })
        }
        code => Err(failed(code)),
    }
}

const FAULT_ADDRESS: usize = 8;
const SPECIFIC: usize = 16;

const fn is_dif(op: &Op) -> bool {
    matches!(op, Op::DifCheck { .. } | Op::DifStrip { .. } | Op::DifUpdate { .. })
}

/// The error that a status other than success, a page fault or a DIF error is for one job.
#[cold]
fn failed(code: Status) -> JobError {
    match code {
        Status::PAGE_REQUEST_FAILED | Status::DELTA_ORDER | Status::DELTA_OFFSET => {}
        Status(code) if (Status::BAD_OPCODE.0..=Status::TRANSLATION.0).contains(&code) => {}
        Status::FALSE_PREDICATE => {
            return JobError::Lied { why: "it checked a result that it was not told to check" };
        }
        _ => return JobError::Lied { why: "its status is none that this operation has" },
    }
    JobError::Refused { status: code.0, why: code.text() }
}

fn succeeded(
    op: &Op,
    handshake: Handshake,
    size: usize,
    word: impl Fn(usize) -> u64,
) -> Result<Outcome, JobError> {
    match op {
        Op::Compare { .. } | Op::ComparePattern { .. } => match handshake.result() {
            compare_result::EQUAL => Ok(DONE),
            compare_result::DIFFERENT if (handshake.completed() as usize) < size => {
                Ok(Outcome { matched: false, mismatch_at: handshake.completed(), ..DONE })
            }
            _ => lied("its result of a comparison is neither equal nor a difference inside the buffer"),
        },
        Op::CreateDelta { delta, .. } => {
            let delta_len = word(SPECIFIC) as u32;
            let delta_overflow = match handshake.result() {
                delta_result::EQUAL if delta_len == 0 => return Ok(DONE),
                delta_result::COMPLETE => false,
                delta_result::OVERFLOW => true,
                _ => return lied("its result of a delta is none of the three that there are"),
            };
            if delta_len == 0 || !delta_len.is_multiple_of(DELTA_ENTRY) || delta_len > max_delta(op, delta) {
                return lied("the size of its delta record can not be");
            }
            Ok(Outcome { matched: false, delta_overflow, delta_len, ..DONE })
        }
        Op::Crc { .. } | Op::CopyCrc { .. } => Ok(Outcome { crc: word(SPECIFIC) as u32, ..DONE }),
        _ => Ok(DONE),
    }
}

/// How many of a batch's `members` are done for sure, given its answer: one of these that did not ask for a record on
/// success, and has none, succeeded.
#[inline]
pub(super) fn silent_successes(batch: Handshake, members: usize) -> usize {
    let completed = batch.completed() as usize;
    match Status(batch.status()) {
        Status::SUCCESS if completed == members => members,
        Status::BATCH_FAILED | Status::BATCH_PAGE_FAULT if completed <= members => completed,
        _ => 0,
    }
}

/// What became of a job of a batch that has no status of its own, where the batch's status is `batch` and the
/// job is number `index` in it.
#[cold]
pub(super) fn without_status(batch: Handshake, index: usize) -> JobError {
    if batch.status() == Status::NONE.0 {
        // The queue was stopped before the batch was done.
        return JobError::Reset;
    }
    let status = Status(batch.status()).code();
    match status {
        Status::BATCH_FAILED if index >= batch.completed() as usize => JobError::Abandoned,
        Status::BATCH_FAILED | Status::SUCCESS => {
            JobError::Lied { why: "the batch is done, but this job of it has no status" }
        }
        Status::BATCH_PAGE_FAULT => JobError::Refused { status: status.0, why: status.text() },
        code => failed(code),
    }
}
