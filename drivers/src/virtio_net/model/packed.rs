//! A packed virtqueue from the device's side ("Packed Virtqueues", 2.8).

use std::sync::atomic::{Ordering, fence};

use underpass::Iova;
use underpass::model::Bus;

use super::spec::Features;
use super::spec::packed::{
    self, EventFlags, EventSuppress, HANDSHAKE, Handshake, INDIRECT, NEXT, WRITE, need_event,
};
use super::spec::split::Descriptor;
use super::virtqueue::{Broken, Chain, Config, Mark, Segment, WINDOW, Walk, single};

/// A slot of the ring, in the round that has this wrap counter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Place {
    slot: u16,
    wrap: bool,
}

impl Place {
    const FIRST: Self = Self { slot: 0, wrap: true };

    /// The place so many slots on, at most the ring's `size`.
    #[inline]
    fn plus(self, slots: u16, size: u16) -> Self {
        let slot = self.slot + slots;
        if slot < size { Self { slot, ..self } } else { Self { slot: slot - size, wrap: !self.wrap } }
    }
}

#[derive(Debug)]
pub(super) struct Packed {
    config: Config,
    /// The descriptor to take next.
    position: Place,
    /// Slots that were taken and not put.
    taken: u16,
    /// Available descriptors from `window_at` on, all of one round: address and handshake.
    window: [(u64, Handshake); WINDOW],
    window_at: Place,
    window_len: u16,
    addresses: [u64; 2 * WINDOW],
    table: Vec<Descriptor>,
    /// Where the next used descriptor goes.
    used: Place,
    /// Used descriptors that the driver does not see yet: which slot, and what goes there.
    elements: Vec<(u16, Handshake)>,
    /// Slots that `elements` take.
    put: u16,
    /// In order: the last buffer put had nothing to write, so that the next one's element may stand for it.
    may_skip: bool,
}

impl Packed {
    pub(super) fn new(config: Config) -> Self {
        let room = WINDOW.min(config.size.into());
        Self {
            config,
            position: Place::FIRST,
            taken: 0,
            window: [(0, Handshake::new()); WINDOW],
            window_at: Place::FIRST,
            window_len: 0,
            addresses: [0; 2 * WINDOW],
            table: Vec::with_capacity(room),
            used: Place::FIRST,
            elements: Vec::with_capacity(room),
            put: 0,
            may_skip: false,
        }
    }

    pub(super) fn size(&self) -> u16 {
        self.config.size
    }

    #[inline]
    pub(super) fn mark(&self) -> Mark {
        let Place { slot: position, wrap } = self.position;
        Mark { position, wrap, descriptor: 0, taken: self.taken }
    }

    #[inline]
    pub(super) fn rewind(&mut self, mark: Mark) {
        self.position = Place { slot: mark.position, wrap: mark.wrap };
        self.taken = mark.taken;
    }

    #[inline]
    pub(super) fn has_available(&mut self, bus: &mut Bus) -> Result<bool, Broken> {
        Ok(self.current(bus)?.is_some())
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
        let Some((addr, handshake)) = self.current(bus)? else { return Ok(None) };
        let flags = handshake.flags();
        let chain = if flags & (NEXT | INDIRECT) == 0 {
            self.position = self.position.plus(1, self.config.size);
            single(segments, handshake.id(), addr, handshake.len(), flags & WRITE != 0)?
        } else {
            self.walk(bus, segments)?
        };
        self.taken += chain.slots;
        if usize::from(self.taken) + usize::from(self.put) > usize::from(self.config.size) {
            return Err(Broken::Rule("more descriptors are available than the queue has"));
        }
        Ok(Some(chain))
    }

    /// The chain that starts at `position`.
    #[inline(never)]
    fn walk(&mut self, bus: &mut Bus, segments: &mut Vec<Segment>) -> Result<Chain, Broken> {
        let mut walk = Walk::new(segments, self.config.size);
        let mut slots = 0;
        loop {
            let Some((addr, handshake)) = self.current(bus)? else {
                return Err(Broken::Rule("a chain was made available before all of its descriptors"));
            };
            self.position = self.position.plus(1, self.config.size);
            slots += 1;
            let flags = handshake.flags();
            if flags & INDIRECT != 0 {
                if slots > 1 || flags & NEXT != 0 {
                    return Err(Broken::Rule("a packed chain has an indirect descriptor"));
                }
                self.walk_table(bus, addr, handshake.len(), &mut walk)?;
                return Ok(walk.finish(handshake.id(), slots));
            }
            walk.push(addr, handshake.len(), flags & WRITE != 0)?;
            if flags & NEXT == 0 {
                return Ok(walk.finish(handshake.id(), slots));
            }
        }
    }

    fn walk_table(&mut self, bus: &mut Bus, addr: u64, len: u32, walk: &mut Walk<'_>) -> Result<(), Broken> {
        if !self.config.has(Features::INDIRECT_DESC) {
            return Err(Broken::Rule("an indirect descriptor without the feature"));
        }
        walk.read_table(bus, addr, len, &mut self.table)?;
        for entry in &self.table {
            // In a packed ring's table all flags but WRITE are reserved ("Indirect Flag: Scatter-Gather Support"). The
            // layouts are alike, but for id and flags, which are the other way round.
            walk.push(entry.addr, entry.len, entry.next & WRITE != 0)?;
        }
        Ok(())
    }

    /// The descriptor at `position`, if it is available.
    #[inline]
    fn current(&mut self, bus: &mut Bus) -> Result<Option<(u64, Handshake)>, Broken> {
        let at = self.position.slot.wrapping_sub(self.window_at.slot);
        if at < self.window_len && self.position.wrap == self.window_at.wrap {
            return Ok(Some(self.window[usize::from(at)]));
        }
        self.fill_window(bus)?;
        Ok((self.window_len > 0).then_some(self.window[0]))
    }

    /// Reads the descriptors that are available from `position` on, up to the end of the ring.
    #[inline(never)]
    fn fill_window(&mut self, bus: &mut Bus) -> Result<(), Broken> {
        let room = (self.config.size - self.position.slot).min(WINDOW as u16);
        let first = self.descriptor(self.position.slot);
        (self.window_at, self.window_len) = (self.position, 0);
        let mut len = 0;
        while len < room {
            let at = first.wrapping_add(packed::desc_len(len) as u64 + HANDSHAKE as u64);
            // Acquire: pairs with the driver's Release of this word, or of that of the first descriptor of the batch; the
            // address is there, and the buffer.
            let handshake = Handshake::from_bits(bus.load::<u64>(None, at)?);
            if !handshake.is_available(self.position.wrap) {
                break;
            }
            self.window[usize::from(len)].1 = handshake;
            len += 1;
        }
        if len == 0 {
            return Ok(());
        }
        let words = &mut self.addresses[..2 * usize::from(len)];
        bus.load_all(None, first, words)?;
        for (place, words) in self.window.iter_mut().zip(words.chunks_exact(2)) {
            place.0 = words[0];
        }
        self.window_len = len;
        Ok(())
    }

    #[inline]
    pub(super) fn put(&mut self, chain: &Chain, written: u32) {
        let flags = packed::used(self.used.wrap) | if written > 0 { WRITE } else { 0 };
        let handshake = Handshake::new().with_len(written).with_id(chain.id).with_flags(flags);
        match self.elements.last_mut() {
            // One used descriptor for a batch, in the place of its first ("In-order use of descriptors", 2.8.9), with
            // that place's wrap counter.
            Some((_, last)) if self.may_skip => {
                let flags = last.flags() & (packed::AVAIL | packed::USED) | flags & WRITE;
                *last = handshake.with_flags(flags);
            }
            _ => self.elements.push((self.used.slot, handshake)),
        }
        self.may_skip = self.config.has(Features::IN_ORDER) && chain.writable == 0;
        self.taken -= chain.slots;
        self.put += chain.slots;
        self.used = self.used.plus(chain.slots, self.config.size);
    }

    #[inline]
    pub(super) fn flush(&mut self, bus: &mut Bus) -> Result<bool, Broken> {
        let Some(((first, handshake), rest)) = self.elements.split_first() else { return Ok(false) };
        // Release: pairs with the driver's Acquire. The first one last, so that the driver sees all of them or none: a
        // packet in several buffers must not be seen in part ("Multi-buffer requests").
        for (slot, handshake) in rest {
            bus.store::<u64>(None, self.handshake(*slot), handshake.into_bits())?;
        }
        bus.store::<u64>(None, self.handshake(*first), handshake.into_bits())?;
        let put = std::mem::take(&mut self.put);
        self.elements.clear();
        self.may_skip = false;
        self.wants_interrupt(bus, put)
    }

    /// After `put` slots up to `used` were used.
    #[inline]
    fn wants_interrupt(&self, bus: &mut Bus, put: u16) -> Result<bool, Broken> {
        // Pairs with the driver's fence between asking for an interrupt and looking at the next used descriptor.
        fence(Ordering::SeqCst);
        let event = EventSuppress::from_bits(bus.load::<u32>(None, self.config.avail)?);
        match event.flags() {
            EventFlags::ENABLE => Ok(true),
            EventFlags::DISABLE => Ok(false),
            EventFlags::DESC if self.config.has(Features::EVENT_IDX) => {
                // As indices that run on: one of the round before is negative.
                let Place { slot: new, wrap } = self.used;
                let round = if event.wrap() == wrap { 0 } else { self.config.size };
                Ok(need_event(event.off().wrapping_sub(round), new, new.wrapping_sub(put)))
            }
            _ => Err(Broken::Rule("the driver's event suppression has flags that are reserved")),
        }
    }

    pub(super) fn ask(&mut self, bus: &mut Bus, asks: bool) -> Result<(), Broken> {
        let event = match (asks, self.config.has(Features::EVENT_IDX)) {
            (false, _) => EventSuppress::new().with_flags(EventFlags::DISABLE),
            (true, false) => EventSuppress::new().with_flags(EventFlags::ENABLE),
            (true, true) => EventSuppress::new()
                .with_off(self.position.slot)
                .with_wrap(self.position.wrap)
                .with_flags(EventFlags::DESC),
        };
        bus.store::<u32>(None, self.config.used, event.into_bits())?;
        if asks {
            // Pairs with the driver's fence between publishing buffers and looking whether to notify.
            fence(Ordering::SeqCst);
        }
        Ok(())
    }

    /// Where the descriptor in `slot` is.
    #[inline]
    fn descriptor(&self, slot: u16) -> Iova {
        self.config.desc.wrapping_add(packed::desc_len(slot) as u64)
    }

    /// Where its handshake is.
    #[inline]
    fn handshake(&self, slot: u16) -> Iova {
        self.descriptor(slot).wrapping_add(HANDSHAKE as u64)
    }
}
