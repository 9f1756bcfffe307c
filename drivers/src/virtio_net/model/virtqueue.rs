//! Virtqueues from the device's side. Buffers are taken in the order in which the driver made them available, and
//! used in the same order, so that one position tells all.
//!
//! What the driver wrote is read once, then checked, then used; a rule that it breaks is a [`Broken`], never a panic.

use underpass::model::{Bus, DmaFault};
use underpass::{Access, Iova};
use zerocopy::{FromZeros, IntoBytes};

use super::packed::Packed;
use super::spec::split::Descriptor;
use super::spec::{Features, packed, pci, split};
use super::split::Split;

/// What is looked at in one go: entries of an available ring, or descriptors.
pub(super) const WINDOW: usize = 64;

/// Why a queue can not go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Broken {
    /// The driver broke this rule.
    Rule(&'static str),
    /// An address that it gave can not be accessed.
    Dma(DmaFault),
}

impl From<DmaFault> for Broken {
    fn from(fault: DmaFault) -> Self {
        Self::Dma(fault)
    }
}

/// Where a queue is and how it works.
#[derive(Debug, Clone, Copy)]
pub(super) struct Config {
    pub(super) size: u16,
    /// Descriptor area.
    pub(super) desc: Iova,
    /// Driver area: the available ring, or the driver's event suppression.
    pub(super) avail: Iova,
    /// Device area: the used ring, or the device's event suppression.
    pub(super) used: Iova,
    pub(super) features: Features,
}

impl Config {
    pub(super) fn has(&self, feature: Features) -> bool {
        self.features.contains(feature)
    }

    /// What can be told before the memory is looked at.
    pub(super) fn check(&self) -> Result<(), &'static str> {
        let packed = self.has(Features::RING_PACKED);
        if !pci::queue_size_is_valid(self.size, packed) {
            return Err("a queue's size is zero, or no power of two on a split ring");
        }
        let aligned = |iova: Iova, align| iova.is_aligned_to(align);
        let (avail_align, used_align) = if packed {
            (packed::EVENT_ALIGN, packed::EVENT_ALIGN)
        } else {
            (split::AVAIL_ALIGN, split::USED_ALIGN)
        };
        if !aligned(self.desc, split::DESC_ALIGN)
            || !aligned(self.avail, avail_align)
            || !aligned(self.used, used_align)
        {
            return Err("a ring's address is misaligned");
        }
        Ok(())
    }
}

/// A piece of a buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Segment {
    pub(super) iova: Iova,
    pub(super) len: u32,
}

/// A buffer that was taken; its segments were appended to a list.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Chain {
    /// What the driver knows it by.
    pub(super) id: u16,
    /// Descriptors of the queue that it takes.
    pub(super) slots: u16,
    /// Segments that the device reads, and then those that it writes.
    pub(super) reads: u16,
    pub(super) writes: u16,
    /// Bytes that the device reads.
    pub(super) readable: u32,
    /// Bytes that the device writes.
    pub(super) writable: u32,
}

/// A queue's place in its ring, to come [back](Virtqueue::rewind) to.
#[derive(Debug, Clone, Copy)]
pub(super) struct Mark {
    pub(super) position: u16,
    pub(super) wrap: bool,
    /// Split rings in order: the next chain's first descriptor.
    pub(super) descriptor: u16,
    /// Packed rings: slots that were taken and not put.
    pub(super) taken: u16,
}

/// A queue that the driver has enabled.
#[derive(Debug)]
#[allow(clippy::large_enum_variant, reason = "there is one a queue, and it stays where it is")]
pub(super) enum Virtqueue {
    Split(Split),
    Packed(Packed),
}

impl Virtqueue {
    /// A fresh queue. `config` was [checked](Config::check). `asks`: the driver is to notify of available buffers.
    pub(super) fn new(config: Config, bus: &mut Bus, asks: bool) -> Result<Self, Broken> {
        let packed = config.has(Features::RING_PACKED);
        let (desc_len, avail_len, used_len) = if packed {
            (packed::desc_len(config.size), packed::EVENT_LEN, packed::EVENT_LEN)
        } else {
            (split::desc_len(config.size), split::avail::len(config.size), split::used::len(config.size))
        };
        let desc_access = if packed { Access::READ_WRITE } else { Access::READ };
        bus.probe(None, config.desc, desc_len as u64, desc_access)?;
        bus.probe(None, config.avail, avail_len as u64, Access::READ)?;
        bus.probe(None, config.used, used_len as u64, Access::WRITE)?;
        let mut queue =
            if packed { Self::Packed(Packed::new(config)) } else { Self::Split(Split::new(config)) };
        queue.ask(bus, asks)?;
        Ok(queue)
    }

    /// Whether there is a buffer to take.
    #[inline]
    pub(super) fn has_available(&mut self, bus: &mut Bus) -> Result<bool, Broken> {
        match self {
            Self::Split(queue) => queue.has_available(bus),
            Self::Packed(queue) => queue.has_available(bus),
        }
    }

    /// Takes the next buffer, if there is one, and appends its pieces to `segments`.
    #[allow(
        clippy::inline_always,
        reason = "a chain that is returned through memory stalls its first reader"
    )]
    #[inline(always)]
    pub(super) fn take(
        &mut self,
        bus: &mut Bus,
        segments: &mut Vec<Segment>,
    ) -> Result<Option<Chain>, Broken> {
        match self {
            Self::Split(queue) => queue.take(bus, segments),
            Self::Packed(queue) => queue.take(bus, segments),
        }
    }

    /// Where it is.
    #[inline]
    pub(super) fn mark(&self) -> Mark {
        match self {
            Self::Split(queue) => queue.mark(),
            Self::Packed(queue) => queue.mark(),
        }
    }

    /// Gives back the buffers that were taken since; none of them was used.
    #[inline]
    pub(super) fn rewind(&mut self, mark: Mark) {
        match self {
            Self::Split(queue) => queue.rewind(mark),
            Self::Packed(queue) => queue.rewind(mark),
        }
    }

    /// The buffer is done, `written` bytes of it written: the driver sees it with the next [`flush`](Self::flush).
    #[inline]
    pub(super) fn put(&mut self, chain: &Chain, written: u32) {
        match self {
            Self::Split(queue) => queue.put(chain, written),
            Self::Packed(queue) => queue.put(chain, written),
        }
    }

    /// Shows the driver what was put. True: it wants to be interrupted.
    #[inline]
    pub(super) fn flush(&mut self, bus: &mut Bus) -> Result<bool, Broken> {
        match self {
            Self::Split(queue) => queue.flush(bus),
            Self::Packed(queue) => queue.flush(bus),
        }
    }

    /// Tells the driver whether to notify of available buffers. After asking for it, look once more.
    pub(super) fn ask(&mut self, bus: &mut Bus, asks: bool) -> Result<(), Broken> {
        match self {
            Self::Split(queue) => queue.ask(bus, asks),
            Self::Packed(queue) => queue.ask(bus, asks),
        }
    }

    /// Descriptors that it has.
    pub(super) fn size(&self) -> u16 {
        match self {
            Self::Split(queue) => queue.size(),
            Self::Packed(queue) => queue.size(),
        }
    }
}

/// A chain of one descriptor, which is what most are.
#[allow(clippy::inline_always, reason = "as of `take`")]
#[inline(always)]
pub(super) fn single(
    segments: &mut Vec<Segment>,
    id: u16,
    addr: u64,
    len: u32,
    write: bool,
) -> Result<Chain, Broken> {
    check(addr, len)?;
    segments.push(Segment { iova: Iova::new(addr), len });
    Ok(if write {
        Chain { id, slots: 1, reads: 0, writes: 1, readable: 0, writable: len }
    } else {
        Chain { id, slots: 1, reads: 1, writes: 0, readable: len, writable: 0 }
    })
}

#[inline]
fn check(addr: u64, len: u32) -> Result<(), Broken> {
    if len == 0 {
        return Err(Broken::Rule("a descriptor's buffer has no bytes"));
    }
    if addr.checked_add(len.into()).is_none() {
        return Err(Broken::Rule("a buffer runs over the end of the address space"));
    }
    Ok(())
}

/// A chain in the making.
pub(super) struct Walk<'a> {
    segments: &'a mut Vec<Segment>,
    limit: u16,
    chain: Chain,
}

impl<'a> Walk<'a> {
    /// Of at most `limit` descriptors.
    pub(super) fn new(segments: &'a mut Vec<Segment>, limit: u16) -> Self {
        Self { segments, limit, chain: Chain::default() }
    }

    /// The next descriptor's buffer.
    pub(super) fn push(&mut self, addr: u64, len: u32, write: bool) -> Result<(), Broken> {
        let chain = &mut self.chain;
        check(addr, len)?;
        if chain.reads + chain.writes == self.limit {
            return Err(Broken::Rule(
                "a chain has more descriptors than its queue: it is too long, or a loop",
            ));
        }
        if chain.readable.checked_add(chain.writable).and_then(|sum| sum.checked_add(len)).is_none() {
            return Err(Broken::Rule("a chain has 2^32 bytes or more"));
        }
        if write {
            chain.writes += 1;
            chain.writable += len;
        } else if chain.writes > 0 {
            return Err(Broken::Rule("a chain has a buffer to read behind one to write"));
        } else {
            chain.reads += 1;
            chain.readable += len;
        }
        self.segments.push(Segment { iova: Iova::new(addr), len });
        Ok(())
    }

    pub(super) fn finish(self, id: u16, slots: u16) -> Chain {
        Chain { id, slots, ..self.chain }
    }

    /// Reads an indirect table of `len` bytes into `table`.
    pub(super) fn read_table(
        &self,
        bus: &mut Bus,
        addr: u64,
        len: u32,
        table: &mut Vec<Descriptor>,
    ) -> Result<(), Broken> {
        let entries = len as usize / size_of::<Descriptor>();
        if entries == 0 || !(len as usize).is_multiple_of(size_of::<Descriptor>()) {
            return Err(Broken::Rule("an indirect table is no whole number of descriptors"));
        }
        if usize::from(self.chain.reads + self.chain.writes) + entries > self.limit.into() {
            return Err(Broken::Rule("an indirect table has more descriptors than its queue"));
        }
        table.resize(entries, Descriptor::new_zeroed());
        Ok(bus.read(None, Iova::new(addr), table.as_mut_bytes())?)
    }
}
