//! Split virtqueues (VIRTIO 1.2, 2.7).

use std::sync::atomic::{Ordering, fence};

use underpass::dma::{DmaBuf, DmaSpace, Records};
use underpass::{Access, Result};

use super::shadow::{Posted, Shadow, Used, writable};
use super::{Areas, Broken, Buffer, LINE, Setup, Virtqueue, carve, check_memory};
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
    /// In order: the first descriptor of the oldest buffer; where the batch that the device used at once ends, and what
    /// it wrote to the last of it.
    oldest: u16,
    batch_end: u16,
    batch_len: u32,
    broken: Option<Broken>,
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
            batch_end: 0,
            batch_len: 0,
            broken: None,
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
    /// Descriptors for more than one buffer: a chain, or a table if there are tables.
    fn add_chain(&mut self, buffers: &[Buffer]) -> u16 {
        assert!((1..=usize::from(self.max_chain)).contains(&buffers.len()), "{} buffers", buffers.len());
        let head = self.shadow.take_id();
        let last = buffers.len() - 1;
        if let Some(tables) = &mut self.tables {
            let first = usize::from(head) * usize::from(self.max_chain);
            for (n, buffer) in buffers.iter().enumerate() {
                let next = if n == last { None } else { Some(n as u16 + 1) };
                tables.write(first + n, &descriptor(buffer, next));
            }
            let len = size_of::<Descriptor>() * buffers.len();
            let addr = tables.iova(first).get();
            self.desc.write(head.into(), &Descriptor { addr, len: len as u32, flags: INDIRECT, next: 0 });
            return head;
        }
        let mut at = head;
        for buffer in &buffers[..last] {
            let next = self.shadow.take_id();
            self.desc.write(at.into(), &descriptor(buffer, Some(next)));
            self.next[usize::from(at)] = next;
            at = next;
        }
        self.desc.write(at.into(), &descriptor(&buffers[last], None));
        head
    }

    /// Frees the descriptors of the buffer that starts with `head`.
    #[inline]
    fn free_chain(&mut self, head: u16, descriptors: u16) {
        let mut at = head;
        for _ in 1..descriptors {
            self.shadow.free_id(at);
            at = self.next[usize::from(at)];
        }
        self.shadow.free_id(at);
        self.state.free += descriptors;
    }

    /// Reads how many buffers the device has used, once all that it had used before were taken.
    #[inline]
    fn poll(&mut self) -> Result<(), Broken> {
        let state = &mut self.state;
        if let Some(broken) = state.broken {
            return Err(broken);
        }
        // Acquire: pairs with the device's Release of the used index, after the elements and what it wrote to buffers.
        let used = self.used.word(IDX, 0).load(Ordering::Acquire);
        if used.wrapping_sub(state.taken) > state.published.wrapping_sub(state.taken) {
            return Err(Broken::INDEX);
        }
        state.used = used;
        Ok(())
    }

    #[inline]
    fn try_take(&mut self) -> Result<Option<(T, u32)>, Broken> {
        if self.state.used == self.state.taken {
            self.poll()?;
            if self.state.used == self.state.taken {
                return Ok(None);
            }
        }
        let element = usize::from(self.state.taken & (self.size - 1));
        let UsedElement { id, len } =
            if self.in_order { self.next_in_order(element)? } else { self.elements.read(element) };
        let Used { token, written, descriptors } = self.shadow.take(id, len)?;
        // An id that was posted has 16 bits.
        let head = id as u16;
        self.free_chain(head, descriptors);
        self.state.taken = self.state.taken.wrapping_add(1);
        self.state.oldest = head.wrapping_add(descriptors) & (self.size - 1);
        Ok(Some((token, written)))
    }

    /// What the element of the next buffer would say, had the device written it. One element stands for all buffers up to
    /// the one that it names, and those before that are used as a whole ("In-order use of descriptors", 2.7.9).
    #[inline]
    fn next_in_order(&mut self, element: usize) -> Result<UsedElement, Broken> {
        let state = &mut self.state;
        if state.batch_end == state.taken {
            let UsedElement { id, len } = self.elements.read(element);
            let last = self.shadow.posted(id)?;
            if last.position.wrapping_sub(state.taken) >= state.used.wrapping_sub(state.taken) {
                return Err(Broken::ORDER);
            }
            state.batch_end = last.position.wrapping_add(1);
            state.batch_len = len;
        }
        let id = u32::from(state.oldest);
        let is_last = state.taken.wrapping_add(1) == state.batch_end;
        let len = if is_last { state.batch_len } else { self.shadow.posted(id)?.writable };
        Ok(UsedElement { id, len })
    }

    #[cold]
    fn fail(&mut self, broken: Broken) -> Broken {
        self.state.broken = Some(broken);
        // No room, and nothing used: so the data path needs no check of its own for a broken queue.
        self.state.free = 0;
        self.state.used = self.state.taken;
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

    #[inline]
    fn add(&mut self, token: T, buffers: &[Buffer]) -> Result<(), T> {
        let descriptors = if self.tables.is_some() { 1 } else { buffers.len() };
        if descriptors > usize::from(self.state.free) {
            return Err(token);
        }
        let head = if let [buffer] = buffers {
            let id = self.shadow.take_id();
            self.desc.write(id.into(), &descriptor(buffer, None));
            id
        } else {
            self.add_chain(buffers)
        };
        let descriptors = descriptors as u16;
        let position = self.state.added;
        self.shadow.post(head, token, Posted { writable: writable(buffers), descriptors, position });
        let entry = RING + usize::from(position & (self.size - 1));
        // Relaxed, as the descriptors: publish orders it.
        self.avail.word(entry, 0).store(head, Ordering::Relaxed);
        self.state.added = position.wrapping_add(1);
        self.state.free -= descriptors;
        Ok(())
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
    fn take_used(&mut self) -> Result<Option<(T, u32)>, Broken> {
        self.try_take().map_err(|broken| self.fail(broken))
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
        self.desc.clear();
        self.avail.clear();
        self.used.clear();
        self.elements.clear();
        self.avail_event.clear();
        self.disable_notifications();
    }
}
