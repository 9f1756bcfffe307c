//! Split virtqueues (VIRTIO 1.2, 2.7).

use std::sync::atomic::{Ordering, fence};

use underpass::dma::{DmaBuf, DmaSpace, Records};
use underpass::{Access, Result};

use super::shadow::{Posted, Shadow, Used, writable};
use super::{Areas, Broken, Buffer, LINE, Setup, Virtqueue, carve, check_memory, take_in_runs};
use crate::virtio_net::spec::Features;
use crate::virtio_net::spec::split::{
    self, Descriptor, INDIRECT, NEXT, UsedElement, WRITE, avail, need_event, used,
};

/// The driver's side of a split virtqueue.
#[derive(Debug)]
pub struct SplitQueue<T> {
    desc: Records<Descriptor>,
    /// The available ring: flags, index, the entries and `used_event`.
    avail: Records<u16, u16>,
    /// The used ring, in three: flags and index, the elements, and `avail_event`.
    used: Records<u16, u16>,
    elements: Records<UsedElement, u32>,
    avail_event: Records<u16, u16>,
    /// For each entry the table of an indirect descriptor.
    tables: Option<Records<Descriptor>>,
    max_chain: u16,
    size: u16,
    event_idx: bool,
    in_order: bool,
    state: State,
    /// The buffers by their first descriptor.
    shadow: Shadow<T>,
    /// For each descriptor of a chain the one that follows.
    next: Box<[u16]>,
    broken: Option<Broken>,
}

/// Indices count buffers and wrap at 16 bits.
#[derive(Debug)]
struct State {
    free: u16,
    /// Buffers added; those published; those published when it was last asked whether to notify.
    added: u16,
    published: u16,
    notified: u16,
    /// Buffers taken back, and those that the device had used when its index was last read.
    taken: u16,
    used: u16,
    /// In order: the first descriptor of the oldest buffer; how many of the batch that the device used at once were not
    /// taken, and what it wrote to the last of it.
    oldest: u16,
    batch: u16,
    batch_len: u32,
}

impl State {
    fn new(size: u16) -> Self {
        Self {
            free: size,
            added: 0,
            published: 0,
            notified: 0,
            taken: 0,
            used: 0,
            oldest: 0,
            batch: 0,
            batch_len: 0,
        }
    }
}

/// Places in [`SplitQueue::avail`] and [`SplitQueue::used`].
const FLAGS: usize = 0;
const IDX: usize = 1;
const RING: usize = 2;

const _: () = assert!(avail::FLAGS == 2 * FLAGS && avail::IDX == 2 * IDX && avail::ring(0) == 2 * RING);
const _: () = assert!(used::FLAGS == 2 * FLAGS && used::IDX == 2 * IDX && used::ring(0) == 2 * RING);

impl<T> SplitQueue<T> {
    /// Reads how many buffers the device has used.
    #[inline]
    fn poll(&mut self) -> Result<(), Broken> {
        let state = &mut self.state;
        // Acquire: pairs with the device's Release of the used index, after the elements and what it wrote to buffers.
        let used = self.used.word(IDX, 0).load(Ordering::Acquire);
        let ready = used.wrapping_sub(state.taken);
        if ready > state.published.wrapping_sub(state.taken) {
            return Err(Broken::INDEX);
        }
        if ready < state.used.wrapping_sub(state.taken) {
            return Err(Broken::BACK);
        }
        state.used = used;
        Ok(())
    }

    /// Buffers that the device has used and that were not taken, as far as known.
    #[inline]
    fn ready(&self) -> u16 {
        self.state.used.wrapping_sub(self.state.taken)
    }

    /// Takes buffers of one descriptor and, in order, with an element each, up to the first with which anything is wrong or
    /// special. Returns how many.
    #[inline]
    fn take_plain(&mut self, most: usize, each: &mut impl FnMut(T, u32)) -> usize {
        let (size, in_order, oldest) =
            (usize::from(self.size), self.in_order, usize::from(self.state.oldest));
        let at = usize::from(self.state.taken & (self.size - 1));
        // Up to the ring's end, and in order up to the last id: so nothing turns round on the way.
        let run = size - at.max(if in_order { oldest } else { 0 });
        let most = most.min(run).min(self.ready().into());
        let (elements, _) = self.elements.words().as_chunks::<2>();
        let taken = self.shadow.lend(|shadow| {
            for (n, [id, len]) in elements[at..].iter().take(most).enumerate() {
                let (id, len) = (id.load(Ordering::Relaxed), len.load(Ordering::Relaxed));
                if in_order && id as usize != oldest + n {
                    return n;
                }
                let Some((token, written)) = shadow.take_plain(id, len) else { return n };
                each(token, written);
            }
            most
        });
        let count = taken as u16;
        self.state.taken = self.state.taken.wrapping_add(count);
        self.state.oldest = self.state.oldest.wrapping_add(count) & (self.size - 1);
        self.state.free += count;
        taken
    }

    /// The same within a batch: the buffers before the last, which the device did not name, were used as a whole.
    #[inline]
    fn take_batch(&mut self, most: usize, each: &mut impl FnMut(T, u32)) -> usize {
        let (mask, oldest) = (self.size - 1, self.state.oldest);
        let most = most.min(self.state.batch.saturating_sub(1).into()) as u16;
        let taken = self.shadow.lend(|shadow| {
            for n in 0..most {
                let Some((token, len)) = shadow.take_whole(oldest.wrapping_add(n) & mask) else { return n };
                each(token, len);
            }
            most
        });
        let state = &mut self.state;
        state.taken = state.taken.wrapping_add(taken);
        state.oldest = oldest.wrapping_add(taken) & mask;
        state.batch -= taken;
        state.free += taken;
        taken.into()
    }

    /// Takes any buffer, if the device has used one.
    fn take_one(&mut self) -> Result<Option<(T, u32)>, Broken> {
        let (mask, ready) = (self.size - 1, self.ready());
        if ready == 0 {
            return Ok(None);
        }
        let Self { shadow, elements, next, state, .. } = self;
        let mut element = elements.read(usize::from(state.taken & mask));
        let Used { token, written, descriptors } = shadow.lend(|shadow| {
            if self.in_order {
                if state.batch == 0 {
                    // One element stands for all buffers up to the one that it names ("In-order use of descriptors").
                    let last = shadow.posted(element.id)?;
                    let before = last.position.wrapping_sub(state.taken);
                    if before >= ready {
                        return Err(Broken::ORDER);
                    }
                    (state.batch, state.batch_len) = (before + 1, element.len);
                }
                let id = u32::from(state.oldest);
                let len = if state.batch == 1 { state.batch_len } else { shadow.posted(id)?.writable };
                element = UsedElement { id, len };
            }
            let used = shadow.take(element.id, element.len)?;
            // An id that was posted has 16 bits.
            let mut at = element.id as u16;
            for _ in 1..used.descriptors {
                shadow.free_id(at);
                at = next[usize::from(at)];
            }
            shadow.free_id(at);
            Ok(used)
        })?;
        state.batch = state.batch.saturating_sub(1);
        state.oldest = state.oldest.wrapping_add(descriptors) & mask;
        state.taken = state.taken.wrapping_add(1);
        state.free += descriptors;
        Ok(Some((token, written)))
    }

    #[cold]
    fn fail(&mut self, broken: Broken) -> Broken {
        self.broken = Some(broken);
        self.state.free = 0;
        broken
    }

    fn set_used_event(&self, index: u16) {
        self.avail.word(RING + usize::from(self.size), 0).store(index, Ordering::Relaxed);
    }
}

#[inline]
fn descriptor(buffer: &Buffer, next: Option<u16>) -> Descriptor {
    let write = if buffer.write { WRITE } else { 0 };
    let chained = if next.is_some() { NEXT } else { 0 };
    Descriptor {
        addr: buffer.iova.get(),
        len: buffer.len,
        flags: write | chained,
        next: next.unwrap_or_default(),
    }
}

impl<T> Virtqueue for SplitQueue<T> {
    type Token = T;

    fn memory_len(setup: &Setup) -> usize {
        let rings = [split::desc_len(setup.size), avail::len(setup.size), used::len(setup.size)];
        let tables = split::desc_len(setup.size) * usize::from(setup.table_len());
        rings.iter().map(|len| len.next_multiple_of(LINE)).sum::<usize>() + tables
    }

    fn new(mut memory: DmaBuf, space: &DmaSpace, setup: &Setup) -> Result<Self> {
        let Setup { size, features, max_chain } = *setup;
        setup.check(false)?;
        check_memory(&memory, Self::memory_len(setup))?;
        let desc = carve(&mut memory, split::desc_len(size));
        let avail = carve(&mut memory, avail::len(size));
        let mut used = carve(&mut memory, used::len(size));
        let avail_event = used.split_off(used::avail_event(size));
        let elements = used.split_off(used::ring(0));
        let tables = if setup.table_len() == 0 {
            None
        } else {
            let tables = carve(&mut memory, split::desc_len(size) * usize::from(max_chain));
            Some(Records::new(tables, space, Access::READ)?)
        };
        let mut queue = Self {
            desc: Records::new(desc, space, Access::READ)?,
            avail: Records::new(avail, space, Access::READ)?,
            used: Records::new(used, space, Access::WRITE)?,
            elements: Records::new(elements, space, Access::WRITE)?,
            avail_event: Records::new(avail_event, space, Access::WRITE)?,
            tables,
            max_chain,
            size,
            event_idx: features.contains(Features::EVENT_IDX),
            in_order: features.contains(Features::IN_ORDER),
            state: State::new(size),
            shadow: Shadow::new(size),
            next: vec![0; size.into()].into(),
            broken: None,
        };
        queue.disable_notifications();
        Ok(queue)
    }

    fn areas(&self) -> Areas {
        Areas { desc: self.desc.iova(0), driver: self.avail.iova(0), device: self.used.iova(0) }
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
        let mask = self.size - 1;
        let Self { shadow, desc, avail, tables, next: links, state, .. } = self;
        let tables = tables.as_mut();
        let descriptors = if tables.is_some() { 1 } else { buffers.len() as u16 };
        if descriptors > state.free {
            return Err(token);
        }
        let head = shadow.lend(|shadow| {
            let head = shadow.take_id();
            if let Some(tables) = tables {
                let first = usize::from(head) * usize::from(self.max_chain);
                for (n, buffer) in buffers.iter().enumerate() {
                    let next = if n + 1 == buffers.len() { None } else { Some(n as u16 + 1) };
                    tables.write(first + n, &descriptor(buffer, next));
                }
                let (addr, len) = (tables.iova(first).get(), size_of::<Descriptor>() * buffers.len());
                desc.write(head.into(), &Descriptor { addr, len: len as u32, flags: INDIRECT, next: 0 });
            } else {
                let mut at = head;
                for (n, buffer) in buffers.iter().enumerate() {
                    let next = if n + 1 == buffers.len() { None } else { Some(shadow.take_id()) };
                    desc.write(at.into(), &descriptor(buffer, next));
                    if let Some(next) = next {
                        links[usize::from(at)] = next;
                        at = next;
                    }
                }
            }
            let posted = Posted { writable: writable(buffers), descriptors, position: state.added };
            shadow.post(head, token, posted);
            head
        });
        // Relaxed, as the descriptors: publish orders it.
        avail.words()[RING + usize::from(state.added & mask)].store(head, Ordering::Relaxed);
        state.added = state.added.wrapping_add(1);
        state.free -= descriptors;
        Ok(())
    }

    #[inline]
    fn add_burst(&mut self, most: usize, mut next: impl FnMut() -> Option<(T, Buffer)>) -> usize {
        let Self { shadow, desc, avail, state, .. } = self;
        let (desc, _) = desc.words().as_chunks::<2>();
        let ring = &avail.words()[RING..];
        let position = state.added;
        let most = most.min(state.free.into()) as u16;
        let added = shadow.lend(|shadow| {
            // As long as each other: one look at an index is for all.
            let (desc, ring) = (&desc[..shadow.size()], &ring[..shadow.size()]);
            for n in 0..most {
                let Some((token, buffer)) = next() else { return n };
                let position = position.wrapping_add(n);
                let id = shadow.take_id();
                let words = descriptor(&buffer, None).to_words();
                // Relaxed, all of it: publish orders it.
                let [addr, rest] = &desc[usize::from(id)];
                addr.store(words[0], Ordering::Relaxed);
                rest.store(words[1], Ordering::Relaxed);
                ring[usize::from(position) & (ring.len() - 1)].store(id, Ordering::Relaxed);
                let writable = if buffer.write { buffer.len } else { 0 };
                shadow.post(id, token, Posted { writable, descriptors: 1, position });
            }
            most
        });
        state.added = position.wrapping_add(added);
        state.free -= added;
        added.into()
    }

    #[inline]
    fn publish(&mut self) {
        if self.state.published != self.state.added {
            self.state.published = self.state.added;
            // Release: pairs with the device's Acquire of the available index, before it reads entries and descriptors.
            self.avail.word(IDX, 0).store(self.state.added, Ordering::Release);
        }
    }

    #[inline]
    fn needs_notify(&mut self) -> bool {
        let new = self.state.published;
        let old = std::mem::replace(&mut self.state.notified, new);
        if new == old {
            return false;
        }
        // Between the index that was published and what the device wants; pairs with the device's fence between
        // saying what it wants and looking at the index again.
        fence(Ordering::SeqCst);
        if self.event_idx {
            need_event(self.avail_event.word(0, 0).load(Ordering::Relaxed), new, old)
        } else {
            self.used.word(FLAGS, 0).load(Ordering::Relaxed) & used::NO_NOTIFY == 0
        }
    }

    #[inline]
    fn position(&self) -> u16 {
        self.state.published
    }

    #[inline]
    fn take_burst(&mut self, most: usize, each: impl FnMut(T, u32)) -> Result<usize, Broken> {
        if let Some(broken) = self.broken {
            return Err(broken);
        }
        if usize::from(self.ready()) < most
            && let Err(broken) = self.poll()
        {
            return Err(self.fail(broken));
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
        if self.event_idx {
            // As far ahead as can be: there is no other way to want none ("Used Buffer Notification Suppression").
            self.set_used_event(self.state.taken.wrapping_sub(1));
        } else {
            self.avail.word(FLAGS, 0).store(avail::NO_INTERRUPT, Ordering::Relaxed);
        }
    }

    fn enable_notifications(&mut self) -> bool {
        if self.event_idx {
            self.set_used_event(self.state.taken);
        } else {
            self.avail.word(FLAGS, 0).store(0, Ordering::Relaxed);
        }
        // Between what is wanted and the index; pairs with the device's fence between publishing its index and
        // looking at what is wanted.
        fence(Ordering::SeqCst);
        self.used.word(IDX, 0).load(Ordering::Relaxed) != self.state.taken
    }

    fn reset(&mut self, each: impl FnMut(T)) {
        self.shadow.reset(each);
        self.state = State::new(self.size);
        self.broken = None;
        self.desc.clear();
        self.avail.clear();
        self.used.clear();
        self.elements.clear();
        self.avail_event.clear();
        self.disable_notifications();
    }
}
