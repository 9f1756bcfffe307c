//! A split virtqueue from the device's side ("Split Virtqueues", 2.7).

use std::sync::atomic::{Ordering, fence};

use underpass::Iova;
use underpass::model::Bus;

use super::spec::Features;
use super::spec::split::{self, Descriptor, INDIRECT, NEXT, WRITE, avail, used};
use super::virtqueue::{Broken, Chain, Config, Mark, Segment, WINDOW, Walk, single};

/// How far ahead the next head may lie to be read in the same access.
const NEAR: u16 = 4;

#[derive(Debug)]
pub(super) struct Split {
    config: Config,
    /// The available entry to take next, which the driver's index counts up to.
    position: u16,
    /// In order: the descriptor that the next chain starts with.
    descriptor: u16,
    /// The driver's index, as it was read last.
    seen: u16,
    /// Entries of the available ring from `heads_at` on.
    heads: [u16; WINDOW],
    heads_at: u16,
    heads_len: u16,
    /// Descriptors from `window_at` on, two words each; of chains that begin in `heads`.
    window: [u64; 2 * WINDOW],
    window_at: u16,
    window_len: u16,
    table: Vec<Descriptor>,
    /// The used index as the driver sees it.
    used: u16,
    /// Buffers that were put since, and those of them that have an element in `elements`.
    put: u16,
    elements: Vec<u32>,
    /// In order: how many buffers each element stands for.
    counts: Vec<u16>,
    /// In order: the last buffer put had nothing to write, so that the next one's element may stand for it.
    may_skip: bool,
    /// Where `avail_event` was set when it was last written; see `ask`.
    event_at: u16,
    asks: bool,
}

impl Split {
    pub(super) fn new(config: Config) -> Self {
        let room = WINDOW.min(config.size.into());
        Self {
            config,
            position: 0,
            descriptor: 0,
            seen: 0,
            heads: [0; WINDOW],
            heads_at: 0,
            heads_len: 0,
            window: [0; 2 * WINDOW],
            window_at: 0,
            window_len: 0,
            table: Vec::with_capacity(room),
            used: 0,
            put: 0,
            elements: Vec::with_capacity(2 * room),
            counts: Vec::with_capacity(room),
            may_skip: false,
            event_at: 0,
            asks: true,
        }
    }

    pub(super) fn size(&self) -> u16 {
        self.config.size
    }

    #[inline]
    fn slot(&self, index: u16) -> u16 {
        index & (self.config.size - 1)
    }

    #[inline]
    pub(super) fn mark(&self) -> Mark {
        Mark { position: self.position, wrap: false, descriptor: self.descriptor, taken: 0 }
    }

    #[inline]
    pub(super) fn rewind(&mut self, mark: Mark) {
        self.position = mark.position;
        self.descriptor = mark.descriptor;
    }

    #[inline]
    pub(super) fn has_available(&mut self, bus: &mut Bus) -> Result<bool, Broken> {
        if self.position != self.seen {
            return Ok(true);
        }
        // Acquire: pairs with the driver's Release; the entries and descriptors in front of it are there.
        let seen = bus.load::<u16>(None, self.config.avail.wrapping_add(avail::IDX as u64))?;
        if seen == self.seen {
            return Ok(false);
        }
        let before = self.seen.wrapping_sub(self.used);
        let now = seen.wrapping_sub(self.used);
        if now < before {
            return Err(Broken::Rule("the available index went back"));
        }
        if now > self.config.size {
            return Err(Broken::Rule("the available index is more than the queue size ahead"));
        }
        self.seen = seen;
        Ok(true)
    }

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
        if !self.has_available(bus)? {
            return Ok(None);
        }
        let head = self.head(bus)?;
        if self.config.has(Features::IN_ORDER) && head != self.descriptor {
            return Err(Broken::Rule("in order, a chain starts where the one before does not end"));
        }
        let Descriptor { addr, len, flags, .. } = self.read(bus, head)?;
        let chain = if flags & (NEXT | INDIRECT) == 0 {
            self.descriptor = self.slot(head.wrapping_add(1));
            single(segments, head, addr, len, flags & WRITE != 0)?
        } else {
            self.walk(bus, head, segments)?
        };
        self.position = self.position.wrapping_add(1);
        Ok(Some(chain))
    }

    /// The chain that starts with descriptor `head`.
    #[inline(never)]
    fn walk(&mut self, bus: &mut Bus, head: u16, segments: &mut Vec<Segment>) -> Result<Chain, Broken> {
        let mut walk = Walk::new(segments, self.config.size);
        let (mut index, mut slots) = (head, 0);
        loop {
            slots += 1;
            let descriptor = self.read(bus, index)?;
            let next = self.slot(index.wrapping_add(1));
            if descriptor.flags & INDIRECT != 0 {
                self.descriptor = next;
                self.walk_table(bus, descriptor, &mut walk)?;
                break;
            }
            walk.push(descriptor.addr, descriptor.len, descriptor.flags & WRITE != 0)?;
            if descriptor.flags & NEXT == 0 {
                self.descriptor = next;
                break;
            }
            if self.config.has(Features::IN_ORDER) && descriptor.next != next {
                return Err(Broken::Rule("in order, a chain's next descriptor is not the next one"));
            }
            index = descriptor.next;
        }
        Ok(walk.finish(head, slots))
    }

    fn walk_table(&mut self, bus: &mut Bus, at: Descriptor, walk: &mut Walk<'_>) -> Result<(), Broken> {
        if !self.config.has(Features::INDIRECT_DESC) {
            return Err(Broken::Rule("an indirect descriptor without the feature"));
        }
        if at.flags & NEXT != 0 {
            return Err(Broken::Rule("a descriptor is indirect and has a next one"));
        }
        walk.read_table(bus, at.addr, at.len, &mut self.table)?;
        let mut index = 0;
        loop {
            let Some(descriptor) = self.table.get(usize::from(index)) else {
                return Err(Broken::Rule("a descriptor's next one is outside of its indirect table"));
            };
            if descriptor.flags & INDIRECT != 0 {
                return Err(Broken::Rule("an indirect descriptor in an indirect table"));
            }
            walk.push(descriptor.addr, descriptor.len, descriptor.flags & WRITE != 0)?;
            if descriptor.flags & NEXT == 0 {
                return Ok(());
            }
            if self.config.has(Features::IN_ORDER) && descriptor.next != index + 1 {
                return Err(Broken::Rule("in order, an indirect table is not in order"));
            }
            index = descriptor.next;
        }
    }

    /// The entry at `position`, which is available.
    #[inline]
    fn head(&mut self, bus: &mut Bus) -> Result<u16, Broken> {
        let mut at = self.position.wrapping_sub(self.heads_at);
        if at >= self.heads_len {
            self.fill_heads(bus)?;
            at = 0;
        }
        Ok(self.heads[usize::from(at)])
    }

    /// Reads available entries from `position` on.
    #[inline(never)]
    fn fill_heads(&mut self, bus: &mut Bus) -> Result<(), Broken> {
        let slot = self.slot(self.position);
        let run = self.seen.wrapping_sub(self.position).min(self.config.size - slot).min(WINDOW as u16);
        let ring = self.config.avail.wrapping_add(avail::ring(slot) as u64);
        bus.load_all(None, ring, &mut self.heads[..run.into()])?;
        (self.heads_at, self.heads_len) = (self.position, run);
        // What was read before may be older than these entries.
        self.window_len = 0;
        Ok(())
    }

    /// Descriptor `index`, of a chain that begins in `heads`.
    #[inline]
    fn read(&mut self, bus: &mut Bus, index: u16) -> Result<Descriptor, Broken> {
        let mut at = index.wrapping_sub(self.window_at);
        if at >= self.window_len {
            self.fill_window(bus, index)?;
            at = 0;
        }
        let at = 2 * usize::from(at);
        Ok(Descriptor::from_words([self.window[at], self.window[at + 1]]))
    }

    /// Reads descriptors from `index` on: as far as the heads that come next lie close behind each other, as those of
    /// chains do that were laid out in order.
    #[inline(never)]
    fn fill_window(&mut self, bus: &mut Bus, index: u16) -> Result<(), Broken> {
        if index >= self.config.size {
            return Err(Broken::Rule("a descriptor's index is not below the queue size"));
        }
        let next = self.position.wrapping_sub(self.heads_at) + 1;
        let mut last = index;
        for head in &self.heads[usize::from(next.min(self.heads_len))..self.heads_len.into()] {
            if *head <= last || *head - last > NEAR {
                break;
            }
            last = *head;
        }
        // One more than the last head, for a chain of two.
        let len = (last - index + 2).min(self.config.size - index).min(WINDOW as u16);
        let from = self.config.desc.wrapping_add(split::desc_len(index) as u64);
        bus.load_all(None, from, &mut self.window[..2 * usize::from(len)])?;
        (self.window_at, self.window_len) = (index, len);
        Ok(())
    }

    #[inline]
    pub(super) fn put(&mut self, chain: &Chain, written: u32) {
        if self.may_skip {
            // One element for a batch, in the place of its first ("In-order use of descriptors", 2.7.9): those that it
            // skips count as written in full, which says nothing of a buffer without anything to write.
            let last = self.elements.len() - 2;
            self.elements[last] = chain.id.into();
            self.elements[last + 1] = written;
            if let Some(count) = self.counts.last_mut() {
                *count += 1;
            }
        } else {
            self.elements.extend([chain.id.into(), written]);
            if self.config.has(Features::IN_ORDER) {
                self.counts.push(1);
            }
        }
        self.may_skip = self.config.has(Features::IN_ORDER) && chain.writable == 0;
        self.put = self.put.wrapping_add(1);
    }

    #[inline]
    pub(super) fn flush(&mut self, bus: &mut Bus) -> Result<bool, Broken> {
        if self.put == 0 {
            return Ok(false);
        }
        let old = self.used;
        if self.config.has(Features::IN_ORDER) {
            let mut at = old;
            for (element, count) in self.elements.chunks_exact(2).zip(&self.counts) {
                bus.store_all(None, self.element(at), element)?;
                at = at.wrapping_add(*count);
            }
        } else {
            let room = 2 * usize::from(self.config.size - self.slot(old));
            let (first, rest) = self.elements.split_at(room.min(self.elements.len()));
            bus.store_all(None, self.element(old), first)?;
            if !rest.is_empty() {
                bus.store_all(None, self.element(0), rest)?;
            }
        }
        let new = old.wrapping_add(self.put);
        // Release: pairs with the driver's Acquire; it publishes the elements and what was written to the buffers.
        bus.store::<u16>(None, self.config.used.wrapping_add(used::IDX as u64), new)?;
        self.used = new;
        self.put = 0;
        self.elements.clear();
        self.counts.clear();
        self.may_skip = false;
        if self.config.has(Features::EVENT_IDX) && !self.asks && new.wrapping_sub(self.event_at) >= 1 << 14 {
            // Otherwise the driver would come by it once in 2^16 buffers.
            self.ask(bus, false)?;
        }
        self.wants_interrupt(bus, old, new)
    }

    #[inline]
    fn wants_interrupt(&self, bus: &mut Bus, old: u16, new: u16) -> Result<bool, Broken> {
        // Pairs with the driver's fence between asking for an interrupt and looking at the used index.
        fence(Ordering::SeqCst);
        let avail = self.config.avail;
        if self.config.has(Features::EVENT_IDX) {
            let at = avail.wrapping_add(avail::used_event(self.config.size) as u64);
            let event = bus.load::<u16>(None, at)?;
            return Ok(split::need_event(event, new, old));
        }
        let flags = bus.load::<u16>(None, avail.wrapping_add(avail::FLAGS as u64))?;
        Ok(flags & avail::NO_INTERRUPT == 0)
    }

    pub(super) fn ask(&mut self, bus: &mut Bus, asks: bool) -> Result<(), Broken> {
        self.asks = asks;
        if self.config.has(Features::EVENT_IDX) {
            // The entry to be asked about, or one that was made available already.
            let event = if asks { self.position } else { self.position.wrapping_sub(1) };
            self.event_at = self.position;
            let at = self.config.used.wrapping_add(used::avail_event(self.config.size) as u64);
            bus.store::<u16>(None, at, event)?;
        } else {
            let flags = if asks { 0 } else { used::NO_NOTIFY };
            bus.store::<u16>(None, self.config.used.wrapping_add(used::FLAGS as u64), flags)?;
        }
        if asks {
            // Pairs with the driver's fence between publishing buffers and looking whether to notify.
            fence(Ordering::SeqCst);
        }
        Ok(())
    }

    /// Where used element `index` is.
    #[inline]
    fn element(&self, index: u16) -> Iova {
        self.config.used.wrapping_add(used::ring(self.slot(index)) as u64)
    }
}
