//! What a queue knows of its buffers, in memory that the device can not write.

use super::{Broken, Buffer};

/// The buffers by id, and the free ids.
///
/// Ids go round: the one that was freed first is taken first. So a device that uses buffers in order brings the ids back
/// in order too, and each id follows from the one before, as `IN_ORDER` demands of the descriptors of a split ring.
#[derive(Debug)]
pub(super) struct Shadow<T> {
    slots: Box<[Slot<T>]>,
    /// A ring, as long as the next power of two.
    free_ids: Box<[u16]>,
    turn: Turn,
}

#[derive(Debug)]
struct Slot<T> {
    /// While the device has the buffer.
    token: Option<T>,
    posted: Posted,
}

/// Where the next id is taken from, and where the next free one goes; both run freely.
#[derive(Debug, Clone, Copy)]
struct Turn {
    first: usize,
    end: usize,
}

/// What is known of a buffer besides its token.
#[derive(Debug, Clone, Copy)]
pub(super) struct Posted {
    /// Bytes that the device may write.
    pub(super) writable: u32,
    /// Entries of the ring.
    pub(super) descriptors: u16,
    /// How many buffers were posted before it, as far as 16 bits go.
    pub(super) position: u16,
}

/// How many bytes of the buffers the device may write.
#[inline]
pub(super) fn writable(buffers: &[Buffer]) -> u32 {
    buffers.iter().filter(|b| b.write).fold(0, |sum: u32, b| sum.saturating_add(b.len))
}

/// The bytes that the device says to have written: of a buffer that it only reads it has nothing to say.
#[inline]
fn written(posted: Posted, len: u32) -> u32 {
    if posted.writable == 0 { 0 } else { len }
}

impl<T> Shadow<T> {
    pub(super) fn new(size: u16) -> Self {
        let none = Posted { writable: 0, descriptors: 0, position: 0 };
        let slots = (0..size).map(|_| Slot { token: None, posted: none });
        let mut shadow = Self {
            slots: slots.collect(),
            free_ids: vec![0; usize::from(size).next_power_of_two()].into(),
            turn: Turn { first: 0, end: 0 },
        };
        shadow.reset(drop);
        shadow
    }

    pub(super) fn reset(&mut self, each: impl FnMut(T)) {
        self.slots.iter_mut().filter_map(|slot| slot.token.take()).for_each(each);
        self.turn = Turn { first: 0, end: self.slots.len() };
        for (id, free) in self.free_ids.iter_mut().enumerate() {
            *free = id as u16;
        }
    }

    /// Lends all of it to a burst. The ring's words are atomics, after each of which the compiler reads memory again; what
    /// a burst has for itself stays in registers.
    #[inline]
    pub(super) fn lend<R>(&mut self, burst: impl FnOnce(&mut Lent<'_, T>) -> R) -> R {
        let mut lent = Lent { slots: &mut self.slots, free_ids: &mut self.free_ids, turn: self.turn };
        let result = burst(&mut lent);
        self.turn = lent.turn;
        result
    }
}

/// A [`Shadow`] during a burst.
#[derive(Debug)]
pub(super) struct Lent<'a, T> {
    slots: &'a mut [Slot<T>],
    free_ids: &'a mut [u16],
    turn: Turn,
}

impl<T> Lent<'_, T> {
    /// How many ids there are.
    #[inline]
    pub(super) fn size(&self) -> usize {
        self.slots.len()
    }

    /// Takes a free id. The caller knows that there is one.
    #[inline]
    pub(super) fn take_id(&mut self) -> u16 {
        let id = self.free_ids[self.turn.first & (self.free_ids.len() - 1)];
        self.turn.first = self.turn.first.wrapping_add(1);
        id
    }

    #[inline]
    pub(super) fn free_id(&mut self, id: u16) {
        let mask = self.free_ids.len() - 1;
        self.free_ids[self.turn.end & mask] = id;
        self.turn.end = self.turn.end.wrapping_add(1);
    }

    /// Keeps the token of the buffer with this id.
    #[inline]
    pub(super) fn post(&mut self, id: u16, token: T, posted: Posted) {
        let slot = &mut self.slots[usize::from(id)];
        slot.posted = posted;
        if slot.token.is_none() {
            slot.token = Some(token);
        } else {
            not_free(token);
        }
    }

    /// What is known of the buffer with an id that the device named.
    #[inline]
    pub(super) fn posted(&self, id: u32) -> Result<Posted, Broken> {
        match self.slots.get(id as usize) {
            Some(Slot { token: Some(_), posted }) => Ok(*posted),
            Some(_) => Err(Broken::ID_NOT_POSTED),
            None => Err(Broken::ID_OUT_OF_RANGE),
        }
    }

    /// The common case of [`take`](Self::take): a buffer of one descriptor with which all is well. Of any other `None`, and
    /// it stays.
    #[inline]
    pub(super) fn take_plain(&mut self, id: u32, len: u32) -> Option<(T, u32)> {
        let slot = self.slots.get_mut(id as usize)?;
        let written = written(slot.posted, len);
        if slot.posted.descriptors != 1 || written > slot.posted.writable {
            return None;
        }
        let token = slot.token.take()?;
        self.free_id(id as u16);
        Some((token, written))
    }

    /// The same for a buffer that was used as a whole.
    #[inline]
    pub(super) fn take_whole(&mut self, id: u16) -> Option<(T, u32)> {
        let writable = self.slots.get(usize::from(id))?.posted.writable;
        self.take_plain(id.into(), writable)
    }

    /// Gives up the buffer with an id that the device named, to which it says to have written `len` bytes.
    #[inline]
    pub(super) fn take(&mut self, id: u32, len: u32) -> Result<Used<T>, Broken> {
        let slot = self.slots.get_mut(id as usize).ok_or(Broken::ID_OUT_OF_RANGE)?;
        let Posted { writable, descriptors, .. } = slot.posted;
        let written = written(slot.posted, len);
        if written > writable {
            return Err(Broken::TOO_LONG);
        }
        let token = slot.token.take().ok_or(Broken::ID_NOT_POSTED)?;
        Ok(Used { token, written, descriptors })
    }
}

/// An id that was free has a token. It never has: this is where the compiler may put what it would take to drop it.
#[cold]
fn not_free<T>(token: T) {
    drop(token);
}

/// A buffer that came back.
#[derive(Debug)]
pub(super) struct Used<T> {
    pub(super) token: T,
    pub(super) written: u32,
    pub(super) descriptors: u16,
}
