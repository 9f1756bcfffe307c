//! Packed virtqueues (VIRTIO 1.2, 2.8).

use std::sync::atomic::{Ordering, fence};

use underpass::dma::{DmaBuf, DmaSpace, Records};
use underpass::{Access, Result};

use super::shadow::{Posted, Shadow, Used, writable};
use super::{Areas, Broken, Buffer, LINE, Setup, Virtqueue, carve, check_memory};
use crate::virtio_net::spec::Features;
use crate::virtio_net::spec::packed::{
    self, Descriptor, EVENT_LEN, EventFlags, EventSuppress, HANDSHAKE, Handshake, INDIRECT, NEXT, WRITE,
    need_event,
};

/// The driver's side of a packed virtqueue.
#[derive(Debug)]
pub struct PackedQueue<T> {
    ring: Records<Descriptor>,
    driver_event: Records<u32, u32>,
    device_event: Records<u32, u32>,
    /// For each entry the table of an indirect descriptor.
    tables: Option<Records<Descriptor>>,
    max_chain: u16,
    size: u16,
    event_idx: bool,
    in_order: bool,
    state: State,
    /// The buffers by their ids.
    shadow: Shadow<T>,
}

#[derive(Debug)]
struct State {
    free: u16,
    /// Where the next descriptor is made available, and where the next one is used.
    avail: Place,
    used: Place,
    /// The descriptor that hides all that were added since the last publish: its place and word, to be written last.
    held: Option<(u16, Handshake)>,
    /// Buffers added since then, and their descriptors; buffers published that were not taken back.
    added: u16,
    added_descriptors: u16,
    posted: u16,
    /// Descriptors published since it was last asked whether to notify.
    unnotified: u16,
    /// In order: the id of the oldest buffer; how many of the batch that the device used at once were not taken, and what
    /// it wrote to the last of it.
    oldest: u16,
    batch: u16,
    batch_len: u32,
    broken: Option<Broken>,
}

impl State {
    fn new(size: u16) -> Self {
        let start = Place { at: 0, wrap: true };
        Self {
            free: size,
            avail: start,
            used: start,
            held: None,
            added: 0,
            added_descriptors: 0,
            posted: 0,
            unnotified: 0,
            oldest: 0,
            batch: 0,
            batch_len: 0,
            broken: None,
        }
    }
}

/// A place in the ring, and the wrap counter there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Place {
    at: u16,
    wrap: bool,
}

impl Place {
    #[inline]
    fn advance(&mut self, by: u16, size: u16) {
        self.at += by;
        if self.at >= size {
            self.at -= size;
            self.wrap = !self.wrap;
        }
    }

    /// In 16 bits, as notifications and event suppression have it.
    #[inline]
    fn bits(self) -> u16 {
        self.at | u16::from(self.wrap) << 15
    }
}

impl<T> PackedQueue<T> {
    /// Writes the next descriptor. The first one since the last publish stays hidden: the device looks at no other before
    /// it ("Polling of available and used descriptors").
    #[inline]
    fn push(&mut self, addr: u64, len: u32, id: u16, flags: u16) {
        let place = self.state.avail;
        let flags = flags | packed::available(place.wrap);
        let word = Handshake::new().with_len(len).with_id(id).with_flags(flags);
        let at = usize::from(place.at);
        // Relaxed, both: publish orders them.
        self.ring.word(at, 0).store(addr, Ordering::Relaxed);
        if self.state.held.is_some() {
            self.ring.word(at, HANDSHAKE).store(word.into_bits(), Ordering::Relaxed);
        } else {
            self.state.held = Some((place.at, word));
        }
        self.state.avail.advance(1, self.size);
    }

    /// Descriptors for more than one buffer: a chain, or a table if there are tables.
    fn push_chain(&mut self, id: u16, buffers: &[Buffer]) {
        assert!((1..=usize::from(self.max_chain)).contains(&buffers.len()), "{} buffers", buffers.len());
        if let Some(tables) = &mut self.tables {
            let first = usize::from(id) * usize::from(self.max_chain);
            for (n, buffer) in buffers.iter().enumerate() {
                let handshake = Handshake::new().with_len(buffer.len).with_flags(write_flag(buffer));
                tables.write(first + n, &Descriptor { addr: buffer.iova.get(), handshake });
            }
            let (addr, len) = (tables.iova(first).get(), size_of::<Descriptor>() * buffers.len());
            self.push(addr, len as u32, id, INDIRECT);
            return;
        }
        let last = buffers.len() - 1;
        for (n, buffer) in buffers.iter().enumerate() {
            let chained = if n == last { 0 } else { NEXT };
            self.push(buffer.iova.get(), buffer.len, id, write_flag(buffer) | chained);
        }
    }

    /// The word at the place where the device uses a buffer next, if it has.
    #[inline]
    fn used_word(&self) -> Option<Handshake> {
        // Acquire: pairs with the device's Release of this word, after what it wrote to the buffers.
        let word = self.ring.word(self.state.used.at.into(), HANDSHAKE).load(Ordering::Acquire);
        let word = Handshake::from_bits(word);
        // A place without a posted buffer says nothing.
        (self.state.posted != 0 && word.is_used(self.state.used.wrap)).then_some(word)
    }

    #[inline]
    fn try_take(&mut self) -> Result<Option<(T, u32)>, Broken> {
        let next = if self.in_order { self.next_in_order()? } else { self.used_word().map(id_and_len) };
        let Some((id, len)) = next else {
            return self.state.broken.map_or(Ok(None), Err);
        };
        let Used { token, written, descriptors } = self.shadow.take(id.into(), len)?;
        self.shadow.free_id(id);
        let state = &mut self.state;
        state.free += descriptors;
        state.posted -= 1;
        state.used.advance(descriptors, self.size);
        if self.in_order {
            state.batch -= 1;
            state.oldest = following(id, self.size);
        }
        Ok(Some((token, written)))
    }

    /// Id and length of the next used buffer, as if the device had written a descriptor for each. One stands for all
    /// buffers up to the one that it names, and those before that are used as a whole ("In-order use of descriptors").
    #[inline]
    fn next_in_order(&mut self) -> Result<Option<(u16, u32)>, Broken> {
        let state = &self.state;
        if state.batch == 0 {
            let Some((id, len)) = self.used_word().map(id_and_len) else { return Ok(None) };
            self.shadow.posted(id.into())?;
            // Ids of buffers in order follow each other.
            let before = if id >= state.oldest { id - state.oldest } else { id + self.size - state.oldest };
            if before >= state.posted {
                return Err(Broken::ORDER);
            }
            self.state.batch = before + 1;
            self.state.batch_len = len;
        }
        let id = self.state.oldest;
        let is_last = self.state.batch == 1;
        let len = if is_last { self.state.batch_len } else { self.shadow.posted(id.into())?.writable };
        Ok(Some((id, len)))
    }

    #[cold]
    fn fail(&mut self, broken: Broken) -> Broken {
        self.state.broken = Some(broken);
        // No room, and nothing posted: so the data path needs no check of its own for a broken queue.
        (self.state.free, self.state.posted, self.state.batch) = (0, 0, 0);
        self.state.held = None;
        broken
    }

    fn want(&self, event: EventSuppress) {
        self.driver_event.word(0, 0).store(event.into_bits(), Ordering::Relaxed);
    }
}

/// What a used descriptor says. Without [`WRITE`] its length means nothing.
#[inline]
fn id_and_len(word: Handshake) -> (u16, u32) {
    (word.id(), if word.flags() & WRITE == 0 { 0 } else { word.len() })
}

#[inline]
fn write_flag(buffer: &Buffer) -> u16 {
    if buffer.write { WRITE } else { 0 }
}

/// The id after this one.
#[inline]
fn following(id: u16, size: u16) -> u16 {
    if id + 1 == size { 0 } else { id + 1 }
}

impl<T> Virtqueue for PackedQueue<T> {
    type Token = T;

    fn memory_len(setup: &Setup) -> usize {
        let ring = packed::desc_len(setup.size).next_multiple_of(LINE);
        ring + 2 * LINE + packed::desc_len(setup.size) * usize::from(setup.table_len())
    }

    fn new(mut memory: DmaBuf, space: &DmaSpace, setup: &Setup) -> Result<Self> {
        let Setup { size, features, max_chain } = *setup;
        setup.check(true)?;
        check_memory(&memory, Self::memory_len(setup))?;
        let ring = carve(&mut memory, packed::desc_len(size));
        let driver_event = carve(&mut memory, EVENT_LEN);
        let device_event = carve(&mut memory, EVENT_LEN);
        let tables = if setup.table_len() == 0 {
            None
        } else {
            let tables = carve(&mut memory, packed::desc_len(size) * usize::from(max_chain));
            Some(Records::new(tables, space, Access::READ)?)
        };
        let mut queue = Self {
            ring: Records::new(ring, space, Access::READ_WRITE)?,
            driver_event: Records::new(driver_event, space, Access::READ)?,
            device_event: Records::new(device_event, space, Access::WRITE)?,
            tables,
            max_chain,
            size,
            event_idx: features.contains(Features::EVENT_IDX),
            in_order: features.contains(Features::IN_ORDER),
            state: State::new(size),
            shadow: Shadow::new(size),
        };
        queue.disable_notifications();
        Ok(queue)
    }

    fn areas(&self) -> Areas {
        Areas {
            desc: self.ring.iova(0),
            driver: self.driver_event.iova(0),
            device: self.device_event.iova(0),
        }
    }

    fn size(&self) -> u16 {
        self.size
    }

    #[inline]
    fn free(&self) -> u16 {
        self.state.free
    }

    #[inline]
    fn add(&mut self, token: T, buffers: &[Buffer]) -> Result<(), T> {
        let descriptors = if self.tables.is_some() { 1 } else { buffers.len() };
        if descriptors > usize::from(self.state.free) {
            return Err(token);
        }
        let id = self.shadow.take_id();
        if let [buffer] = buffers {
            self.push(buffer.iova.get(), buffer.len, id, write_flag(buffer));
        } else {
            self.push_chain(id, buffers);
        }
        let descriptors = descriptors as u16;
        self.shadow.post(id, token, Posted { writable: writable(buffers), descriptors, position: 0 });
        self.state.free -= descriptors;
        self.state.added += 1;
        self.state.added_descriptors += descriptors;
        Ok(())
    }

    #[inline]
    fn publish(&mut self) {
        if let Some((at, word)) = self.state.held.take() {
            let state = &mut self.state;
            state.posted += std::mem::take(&mut state.added);
            state.unnotified = state.unnotified.wrapping_add(std::mem::take(&mut state.added_descriptors));
            // Release: pairs with the device's Acquire of this word, before it reads the descriptors behind it.
            self.ring.word(at.into(), HANDSHAKE).store(word.into_bits(), Ordering::Release);
        }
    }

    #[inline]
    fn needs_notify(&mut self) -> bool {
        let count = std::mem::take(&mut self.state.unnotified);
        if count == 0 {
            return false;
        }
        // Between the word that was published and what the device wants; pairs with the device's fence between saying what
        // it wants and looking at the ring again.
        fence(Ordering::SeqCst);
        let event = EventSuppress::from_bits(self.device_event.word(0, 0).load(Ordering::Relaxed));
        match event.flags() {
            EventFlags::DISABLE => false,
            EventFlags::DESC if self.event_idx => {
                let Place { at: new, wrap } = self.state.avail;
                // In the round before this one, places lie one ring's length lower.
                let lower = if event.wrap() == wrap { 0 } else { self.size };
                need_event(event.off().wrapping_sub(lower), new, new.wrapping_sub(count))
            }
            _ => true,
        }
    }

    #[inline]
    fn position(&self) -> u16 {
        self.state.avail.bits()
    }

    #[inline]
    fn take_used(&mut self) -> Result<Option<(T, u32)>, Broken> {
        self.try_take().map_err(|broken| self.fail(broken))
    }

    fn disable_notifications(&mut self) {
        self.want(EventSuppress::new().with_flags(EventFlags::DISABLE));
    }

    fn enable_notifications(&mut self) -> bool {
        let Place { at, wrap } = self.state.used;
        self.want(if self.event_idx {
            EventSuppress::new().with_off(at).with_wrap(wrap).with_flags(EventFlags::DESC)
        } else {
            EventSuppress::new().with_flags(EventFlags::ENABLE)
        });
        // Between what is wanted and the ring; pairs with the device's fence between marking a descriptor used and looking
        // at what is wanted.
        fence(Ordering::SeqCst);
        self.state.batch != 0 || self.used_word().is_some()
    }

    fn reset(&mut self, each: impl FnMut(T)) {
        self.shadow.reset(each);
        self.state = State::new(self.size);
        self.ring.clear();
        self.device_event.clear();
        self.disable_notifications();
    }
}
