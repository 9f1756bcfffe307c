//! What an accelerator is asked to do: operations and the buffers that they own.

use std::sync::Arc;

use crate::Iova;
use crate::dma::DmaBuf;

/// What a job reads: a buffer of its own, or one that is frozen for as long as anybody shares it.
#[derive(Debug)]
pub enum Source {
    /// A buffer that the job alone owns.
    Owned(DmaBuf),
    /// A read-only buffer that several jobs (and the caller) share.
    Shared(Arc<DmaBuf>),
}

impl Source {
    /// The buffer.
    #[inline]
    pub fn buf(&self) -> &DmaBuf {
        match self {
            Self::Owned(buf) => buf,
            Self::Shared(buf) => buf,
        }
    }
}

impl From<DmaBuf> for Source {
    fn from(buf: DmaBuf) -> Self {
        Self::Owned(buf)
    }
}

impl From<Arc<DmaBuf>> for Source {
    fn from(buf: Arc<DmaBuf>) -> Self {
        Self::Shared(buf)
    }
}

/// The data block that one tuple of protection information guards (T10 DIF: SBC-4, section 4.22).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DifBlock {
    /// 512 bytes.
    B512,
    /// 520 bytes.
    B520,
    /// 4096 bytes.
    B4096,
    /// 4104 bytes.
    B4104,
}

impl DifBlock {
    /// All sizes.
    pub const ALL: [Self; 4] = [Self::B512, Self::B520, Self::B4096, Self::B4104];

    /// Bytes of data in a block, without its 8 bytes of protection information.
    pub const fn bytes(self) -> usize {
        match self {
            Self::B512 => 512,
            Self::B520 => 520,
            Self::B4096 => 4096,
            Self::B4104 => 4104,
        }
    }
}

/// How protection information is made or checked: 8 bytes a block, guard (CRC-16 T10-DIF of the data),
/// application tag and reference tag, each big-endian.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(clippy::struct_excessive_bools, reason = "each is one independent bit of the descriptor")]
pub struct Dif {
    /// Size of the data blocks.
    pub block: DifBlock,
    /// Start value of the guard's CRC is all ones instead of zero.
    pub invert_crc_seed: bool,
    /// The guard is stored inverted.
    pub invert_crc_result: bool,
    /// The application tag of the first block.
    pub app_tag: u16,
    /// Bits set here are not compared; on insertion they are written as zero.
    pub app_tag_mask: u16,
    /// The application tag grows by one a block.
    pub increment_app_tag: bool,
    /// The reference tag of the first block.
    pub ref_tag: u32,
    /// The reference tag stays the same instead of growing by one a block (protection type 3).
    pub fixed_ref_tag: bool,
    /// On a check: do not look at the guard.
    pub skip_guard_check: bool,
    /// On a check: do not look at the reference tag.
    pub skip_ref_tag_check: bool,
}

impl Dif {
    /// Protection information of type 1 over blocks of this size, all tags starting from zero.
    pub const fn new(block: DifBlock) -> Self {
        Self {
            block,
            invert_crc_seed: false,
            invert_crc_result: false,
            app_tag: 0,
            app_tag_mask: 0,
            increment_app_tag: false,
            ref_tag: 0,
            fixed_ref_tag: false,
            skip_guard_check: false,
            skip_ref_tag_check: false,
        }
    }
}

/// What is to be done. Sizes come from the buffers, which must agree; a mismatch is rejected.
#[derive(Debug)]
pub enum Op {
    /// Nothing; completes.
    Nop,
    /// Completes when every job submitted to this channel before it has completed. Not inside a batch.
    Drain,
    /// Copies `src` to `dst`, which have the same length.
    Copy {
        /// Read.
        src: Source,
        /// Written.
        dst: DmaBuf,
    },
    /// Copies `len` bytes from offset `from` to offset `to` of one buffer; the two may overlap.
    CopyWithin {
        /// Read and written.
        buf: DmaBuf,
        /// Offset of the first byte read.
        from: usize,
        /// Offset of the first byte written.
        to: usize,
        /// Bytes.
        len: usize,
    },
    /// Fills `dst` with `pattern`, its low byte first, cut off at the end.
    Fill {
        /// Written.
        dst: DmaBuf,
        /// Eight bytes, repeated.
        pattern: u64,
    },
    /// Compares two buffers of the same length; [`Outcome::matched`](super::Outcome::matched) tells.
    Compare {
        /// Read.
        a: Source,
        /// Read.
        b: Source,
    },
    /// Compares a buffer with a pattern as [`Op::Fill`] would write it; [`Outcome::matched`](super::Outcome::matched) tells.
    ComparePattern {
        /// Read.
        src: Source,
        /// Eight bytes, repeated.
        pattern: u64,
    },
    /// Writes a record of where `modified` differs from `original` to `delta`, in units of 8 bytes: entries of
    /// 10 bytes, a 16-bit little-endian index of the unit and its 8 new bytes. Both sources have the same
    /// length, a multiple of 8 and at most 512 KiB. [`Outcome::matched`](super::Outcome::matched) is true when they are equal,
    /// [`Outcome::delta_len`](super::Outcome::delta_len) is the record's size; a record that does not fit is [`Outcome::delta_overflow`](super::Outcome::delta_overflow).
    CreateDelta {
        /// Read.
        original: Source,
        /// Read.
        modified: Source,
        /// Written; at least 80 bytes.
        delta: DmaBuf,
    },
    /// Applies the first `delta_len` bytes of a record made by [`Op::CreateDelta`] to `dst`.
    ApplyDelta {
        /// Read.
        delta: Source,
        /// Bytes of the record, a multiple of 10.
        delta_len: usize,
        /// Written in place; a multiple of 8 bytes and at most 512 KiB.
        dst: DmaBuf,
    },
    /// Copies `src` to two buffers of its length, whose start addresses have equal bits 11:0.
    Dualcast {
        /// Read.
        src: Source,
        /// Written.
        dst1: DmaBuf,
        /// Written.
        dst2: DmaBuf,
    },
    /// The CRC32C (RFC 3720, appendix B.4) of `src`, continued from `seed` (0 to begin; an earlier
    /// [`Outcome::crc`](super::Outcome::crc) to go on).
    Crc {
        /// Read.
        src: Source,
        /// The CRC so far.
        seed: u32,
    },
    /// [`Op::Copy`] and [`Op::Crc`] in one pass.
    CopyCrc {
        /// Read.
        src: Source,
        /// Written.
        dst: DmaBuf,
        /// The CRC so far.
        seed: u32,
    },
    /// Checks blocks with protection information; a wrong one is [`JobError::Dif`](super::JobError::Dif).
    DifCheck {
        /// Read: whole blocks of data and 8 bytes each.
        src: Source,
        /// How.
        dif: Dif,
    },
    /// Copies blocks and adds protection information to each.
    DifInsert {
        /// Read: whole blocks of data.
        src: Source,
        /// Written: the same with 8 bytes more for each block.
        dst: DmaBuf,
        /// How.
        dif: Dif,
    },
    /// Checks blocks with protection information and copies them without it.
    DifStrip {
        /// Read: whole blocks of data and 8 bytes each.
        src: Source,
        /// Written: the same with 8 bytes less for each block.
        dst: DmaBuf,
        /// How the source is checked.
        dif: Dif,
    },
    /// Checks blocks with protection information and copies them with another.
    DifUpdate {
        /// Read: whole blocks of data and 8 bytes each.
        src: Source,
        /// Written: the same length.
        dst: DmaBuf,
        /// How the source is checked.
        from: Dif,
        /// How the destination is made. Its block size and its two inversions of the CRC are the source's: one
        /// descriptor has room for no others.
        to: Dif,
    },
    /// Writes the buffer's lines back from the CPU's caches and drops them.
    CacheFlush {
        /// Its lines are flushed; its contents stay.
        buf: DmaBuf,
    },
    /// Reads `len` bytes at an address that need not be the caller's, and looks at nothing of them: shows
    /// whether the device can reach it. The one operation that takes a bare address; reading corrupts nothing.
    Probe {
        /// The address.
        iova: Iova,
        /// Bytes, at least 1.
        len: u32,
    },
}

/// The operations by name, as bits of [`Ops`] and for the command line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs, reason = "each is documented at the Op of the same name")]
pub enum OpKind {
    Nop,
    Drain,
    Copy,
    CopyWithin,
    Fill,
    Compare,
    ComparePattern,
    CreateDelta,
    ApplyDelta,
    Dualcast,
    Crc,
    CopyCrc,
    DifCheck,
    DifInsert,
    DifStrip,
    DifUpdate,
    CacheFlush,
    Probe,
}

impl OpKind {
    /// All operations with their names on the command line.
    pub const NAMES: [(Self, &'static str); 18] = [
        (Self::Nop, "nop"),
        (Self::Drain, "drain"),
        (Self::Copy, "copy"),
        (Self::CopyWithin, "copy-within"),
        (Self::Fill, "fill"),
        (Self::Compare, "compare"),
        (Self::ComparePattern, "compare-pattern"),
        (Self::CreateDelta, "create-delta"),
        (Self::ApplyDelta, "apply-delta"),
        (Self::Dualcast, "dualcast"),
        (Self::Crc, "crc"),
        (Self::CopyCrc, "copy-crc"),
        (Self::DifCheck, "dif-check"),
        (Self::DifInsert, "dif-insert"),
        (Self::DifStrip, "dif-strip"),
        (Self::DifUpdate, "dif-update"),
        (Self::CacheFlush, "cache-flush"),
        (Self::Probe, "probe"),
    ];

    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        Self::NAMES[self as usize].1
    }
}

const _: () = {
    let mut n = 0;
    while n < OpKind::NAMES.len() {
        assert!(OpKind::NAMES[n].0 as usize == n, "the names stand in the order of the operations");
        n += 1;
    }
};

impl Op {
    /// Which operation it is.
    pub fn kind(&self) -> OpKind {
        match self {
            Self::Nop => OpKind::Nop,
            Self::Drain => OpKind::Drain,
            Self::Copy { .. } => OpKind::Copy,
            Self::CopyWithin { .. } => OpKind::CopyWithin,
            Self::Fill { .. } => OpKind::Fill,
            Self::Compare { .. } => OpKind::Compare,
            Self::ComparePattern { .. } => OpKind::ComparePattern,
            Self::CreateDelta { .. } => OpKind::CreateDelta,
            Self::ApplyDelta { .. } => OpKind::ApplyDelta,
            Self::Dualcast { .. } => OpKind::Dualcast,
            Self::Crc { .. } => OpKind::Crc,
            Self::CopyCrc { .. } => OpKind::CopyCrc,
            Self::DifCheck { .. } => OpKind::DifCheck,
            Self::DifInsert { .. } => OpKind::DifInsert,
            Self::DifStrip { .. } => OpKind::DifStrip,
            Self::DifUpdate { .. } => OpKind::DifUpdate,
            Self::CacheFlush { .. } => OpKind::CacheFlush,
            Self::Probe { .. } => OpKind::Probe,
        }
    }
}

/// A set of operations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Ops(u32);

impl Ops {
    /// None of them.
    pub const NONE: Self = Self(0);

    /// The set with `kind` added.
    #[must_use]
    pub const fn with(self, kind: OpKind) -> Self {
        Self(self.0 | 1 << kind as u32)
    }

    /// Whether `kind` is one of them.
    pub const fn contains(self, kind: OpKind) -> bool {
        self.0 & 1 << kind as u32 != 0
    }

    /// The operations, in the order of [`OpKind::NAMES`].
    pub fn iter(self) -> impl Iterator<Item = OpKind> {
        OpKind::NAMES.into_iter().map(|(kind, _)| kind).filter(move |kind| self.contains(*kind))
    }
}

/// One piece of work, with a number of the caller's that comes back with it.
#[derive(Debug)]
pub struct Job {
    /// What to do.
    pub op: Op,
    /// The caller's own; the channel does not look at it.
    pub tag: u64,
    /// Start only after every earlier job *of the same batch* has completed; and if one of those failed, do
    /// not start at all ([`JobError::Abandoned`](super::JobError::Abandoned)).
    pub fence: bool,
}

impl Job {
    /// A job with the tag 0 and no fence.
    pub const fn new(op: Op) -> Self {
        Self { op, tag: 0, fence: false }
    }

    /// The same job with this tag.
    #[must_use]
    pub fn tag(mut self, tag: u64) -> Self {
        self.tag = tag;
        self
    }

    /// Copies `src` to `dst`.
    pub fn copy(src: impl Into<Source>, dst: DmaBuf) -> Self {
        Self::new(Op::Copy { src: src.into(), dst })
    }

    /// Fills `dst` with `pattern`.
    pub fn fill(dst: DmaBuf, pattern: u64) -> Self {
        Self::new(Op::Fill { dst, pattern })
    }

    /// Computes the CRC32C of `src`.
    pub fn crc(src: impl Into<Source>, seed: u32) -> Self {
        Self::new(Op::Crc { src: src.into(), seed })
    }
}
