//! Packed virtqueues (VIRTIO 1.2, 2.8).

use std::sync::atomic::{AtomicU64, Ordering, fence};

use underpass::dma::{DmaBuf, DmaSpace, Records};
use underpass::{Access, Result};

use super::shadow::{Posted, Shadow, Used, writable};
use super::{Areas, Broken, Buffer, LINE, Setup, Virtqueue, carve, check_memory, take_in_runs};
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
    broken: Option<Broken>,
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

/// The descriptors, each as its address and its handshake.
type Ring = [[AtomicU64; 2]];

impl State {
    /// Id and length at the place where the device uses a buffer next, if it has.
    #[inline]
    fn next_used(&self, ring: &Ring) -> Option<(u32, u32)> {
        // A place without a posted buffer says nothing.
        if self.posted == 0 { None } else { used(&ring[usize::from(self.used.at)], self.used.wrap) }
    }
}

/// Id and length of the buffer that the device used here, if it has. Whether it says [`WRITE`] again is not looked at: QEMU's
/// devices leave it out, and what the buffer was posted for is known here.
#[inline]
fn used([_, handshake]: &[AtomicU64; 2], wrap: bool) -> Option<(u32, u32)> {
    // Acquire: pairs with the device's Release of this word, after what it wrote to the buffers.
    let word = Handshake::from_bits(handshake.load(Ordering::Acquire));
    word.is_used(wrap).then_some((word.id().into(), word.len()))
}

impl<T> PackedQueue<T> {
    /// Takes buffers of one descriptor and, in order, that the device used one by one, up to the first with which anything
    /// is wrong or special. Returns how many.
    #[inline]
    fn take_plain(&mut self, most: usize, each: &mut impl FnMut(T, u32)) -> usize {
        let (in_order, oldest) = (self.in_order, usize::from(self.state.oldest));
        let (size, Place { at, wrap }) = (usize::from(self.size), self.state.used);
        // Up to the ring's end, and in order up to the last id: so nothing turns round on the way.
        let run = size - usize::from(at).max(if in_order { oldest } else { 0 });
        let most = most.min(run).min(self.state.posted.into());
        let ring = &ring(&self.ring)[at.into()..];
        let taken = self.shadow.lend(|shadow| {
            for (n, descriptor) in ring.iter().take(most).enumerate() {
                let Some((id, len)) = used(descriptor, wrap) else { return n };
                if in_order && id as usize != oldest + n {
                    return n;
                }
                let Some((token, written)) = shadow.take_plain(id, len) else { return n };
                each(token, written);
            }
            most
        });
        let (count, state) = (taken as u16, &mut self.state);
        state.used.advance(count, self.size);
        if in_order {
            state.oldest = if oldest + taken == size { 0 } else { state.oldest + count };
        }
        state.posted -= count;
        state.free += count;
        taken
    }

    /// The same within a batch: the buffers before the last, which the device did not name, were used as a whole.
    #[inline]
    fn take_batch(&mut self, most: usize, each: &mut impl FnMut(T, u32)) -> usize {
        let (size, mut id) = (self.size, self.state.oldest);
        let most = most.min(self.state.batch.saturating_sub(1).into()) as u16;
        let taken = self.shadow.lend(|shadow| {
            for n in 0..most {
                let Some((token, len)) = shadow.take_whole(id) else { return n };
                id = following(id, size);
                each(token, len);
            }
            most
        });
        let state = &mut self.state;
        state.oldest = id;
        state.used.advance(taken, size);
        state.batch -= taken;
        state.posted -= taken;
        state.free += taken;
        taken.into()
    }

    /// Takes any buffer, if the device has used one.
    fn take_one(&mut self) -> Result<Option<(T, u32)>, Broken> {
        let size = self.size;
        let Self { shadow, ring: records, state, .. } = self;
        let ring = ring(records);
        let used = shadow.lend(|shadow| {
            let mut next = None;
            if state.batch == 0 {
                let Some((id, len)) = state.next_used(ring) else { return Ok(None) };
                if self.in_order {
                    // One descriptor stands for all buffers up to the one that it names ("In-order use of
                    // descriptors"), and ids of buffers in order follow each other.
                    shadow.posted(id)?;
                    let (id, oldest) = (id as u16, state.oldest);
                    let before = if id >= oldest { id - oldest } else { id + size - oldest };
                    if before >= state.posted {
                        return Err(Broken::ORDER);
                    }
                    (state.batch, state.batch_len) = (before + 1, len);
                }
                next = Some((id, len));
            }
            if self.in_order {
                let id = u32::from(state.oldest);
                let len = if state.batch == 1 { state.batch_len } else { shadow.posted(id)?.writable };
                state.batch -= 1;
                state.oldest = following(state.oldest, size);
                next = Some((id, len));
            }
            let Some((id, len)) = next else { return Ok(None) };
            let used = shadow.take(id, len)?;
            shadow.free_id(id as u16);
            Ok(Some(used))
        })?;
        let Some(Used { token, written, descriptors }) = used else { return Ok(None) };
        state.used.advance(descriptors, size);
        state.posted -= 1;
        state.free += descriptors;
        Ok(Some((token, written)))
    }

    #[cold]
    fn fail(&mut self, broken: Broken) -> Broken {
        self.broken = Some(broken);
        self.state.free = 0;
        broken
    }

    fn want(&self, event: EventSuppress) {
        self.driver_event.word(0, 0).store(event.into_bits(), Ordering::Relaxed);
    }
}

/// The id after this one.
#[inline]
fn following(id: u16, size: u16) -> u16 {
    if id + 1 == size { 0 } else { id + 1 }
}

/// Writes a descriptor. The first one since the last publish is held back, which hides all: the device looks at no other
/// before it ("Polling of available and used descriptors").
#[inline]
fn push(
    [addr_word, handshake]: &[AtomicU64; 2],
    place: Place,
    held: &mut Option<(u16, Handshake)>,
    addr: u64,
    word: Handshake,
) {
    let word = word.with_flags(word.flags() | packed::available(place.wrap));
    // Relaxed, both: publish orders them.
    addr_word.store(addr, Ordering::Relaxed);
    if held.is_some() {
        handshake.store(word.into_bits(), Ordering::Relaxed);
    } else {
        *held = Some((place.at, word));
    }
}

#[inline]
fn ring(records: &Records<Descriptor>) -> &Ring {
    records.words().as_chunks::<2>().0
}

#[inline]
fn handshake(buffer: &Buffer, id: u16) -> Handshake {
    let flags = if buffer.write { WRITE } else { 0 };
    Handshake::new().with_len(buffer.len).with_id(id).with_flags(flags)
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
            broken: None,
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

    fn add_chain(&mut self, token: T, buffers: &[Buffer]) -> Result<(), T> {
        assert!((2..=usize::from(self.max_chain)).contains(&buffers.len()), "{} buffers", buffers.len());
        let size = self.size;
        let Self { shadow, ring: records, tables, state, .. } = self;
        let (ring, tables) = (ring(records), tables.as_mut());
        let descriptors = if tables.is_some() { 1 } else { buffers.len() as u16 };
        if descriptors > state.free {
            return Err(token);
        }
        shadow.lend(|shadow| {
            let id = shadow.take_id();
            if let Some(tables) = tables {
                let first = usize::from(id) * usize::from(self.max_chain);
                for (n, buffer) in buffers.iter().enumerate() {
                    let (addr, handshake) = (buffer.iova.get(), handshake(buffer, 0));
                    tables.write(first + n, &Descriptor { addr, handshake });
                }
                let len = (size_of::<Descriptor>() * buffers.len()) as u32;
                let word = Handshake::new().with_len(len).with_id(id).with_flags(INDIRECT);
                push(
                    &ring[usize::from(state.avail.at)],
                    state.avail,
                    &mut state.held,
                    tables.iova(first).get(),
                    word,
                );
                state.avail.advance(1, size);
            } else {
                for (n, buffer) in buffers.iter().enumerate() {
                    let chained = if n + 1 == buffers.len() { 0 } else { NEXT };
                    let word = handshake(buffer, id);
                    let word = word.with_flags(word.flags() | chained);
                    push(
                        &ring[usize::from(state.avail.at)],
                        state.avail,
                        &mut state.held,
                        buffer.iova.get(),
                        word,
                    );
                    state.avail.advance(1, size);
                }
            }
            shadow.post(id, token, Posted { writable: writable(buffers), descriptors, position: 0 });
        });
        state.added += 1;
        state.added_descriptors += descriptors;
        state.free -= descriptors;
        Ok(())
    }

    #[inline]
    fn add_burst(&mut self, most: usize, mut next: impl FnMut() -> Option<(T, Buffer)>) -> usize {
        let mut place = self.state.avail;
        let mut held = self.state.held;
        let (size, ring) = (self.size, ring(&self.ring));
        let most = most.min(self.state.free.into()) as u16;
        let added = self.shadow.lend(|shadow| {
            let mut added = 0;
            while added < most {
                let Place { at, wrap } = place;
                for (n, descriptor) in (at..).zip(ring[at.into()..].iter().take((most - added).into())) {
                    let Some((token, buffer)) = next() else { return added };
                    let id = shadow.take_id();
                    let word = handshake(&buffer, id);
                    push(descriptor, Place { at: n, wrap }, &mut held, buffer.iova.get(), word);
                    let writable = if buffer.write { buffer.len } else { 0 };
                    shadow.post(id, token, Posted { writable, descriptors: 1, position: 0 });
                    place.at = n + 1;
                    added += 1;
                }
                place.advance(0, size);
            }
            added
        });
        place.advance(0, size);
        let state = &mut self.state;
        (state.avail, state.held) = (place, held);
        state.added += added;
        state.added_descriptors += added;
        state.free -= added;
        added.into()
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
    fn take_burst(&mut self, most: usize, each: impl FnMut(T, u32)) -> Result<usize, Broken> {
        if let Some(broken) = self.broken {
            return Err(broken);
        }
        let (taken, broken) = take_in_runs(
            self,
            most,
            each,
            |queue, most, each| match queue.state.batch {
                0 => queue.take_plain(most, each),
                _ => queue.take_batch(most, each),
            },
            Self::take_one,
        );
        match broken.map(|broken| self.fail(broken)) {
            Some(broken) if taken == 0 => Err(broken),
            _ => Ok(taken),
        }
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
        self.state.batch != 0 || self.state.next_used(ring(&self.ring)).is_some()
    }

    fn reset(&mut self, each: impl FnMut(T)) {
        self.shadow.reset(each);
        self.state = State::new(self.size);
        self.broken = None;
        self.ring.clear();
        self.device_event.clear();
        self.disable_notifications();
    }
}
