//! The device's side of a virtqueue, played by a test: honest where it is not told otherwise.

use underpass::Iova;
use underpass::model::{Bus, DmaFault};
use underpass_drivers::virtio_net::spec::packed::{self, Handshake};
use underpass_drivers::virtio_net::spec::split::{self, avail, used};

use super::tapped::QueueSetup;

/// A buffer, or several that belong together, as the driver made them available.
#[derive(Debug, Clone)]
pub(crate) struct Chain {
    pub(crate) id: u16,
    /// Entries of the ring.
    pub(crate) entries: u16,
    pub(crate) buffers: Vec<Piece>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Piece {
    pub(crate) at: Iova,
    pub(crate) len: u32,
    pub(crate) write: bool,
}

impl Chain {
    /// Writes `bytes` to its first writable buffers.
    pub(crate) fn write(&self, bus: &mut Bus, bytes: &[u8]) -> Result<(), DmaFault> {
        let mut rest = bytes;
        for piece in self.buffers.iter().filter(|piece| piece.write) {
            let (now, later) = rest.split_at(rest.len().min(piece.len as usize));
            bus.write(None, piece.at, now)?;
            rest = later;
        }
        Ok(())
    }

    /// What its readable buffers hold.
    pub(crate) fn read(&self, bus: &mut Bus) -> Vec<u8> {
        let mut all = Vec::new();
        for piece in self.buffers.iter().filter(|piece| !piece.write) {
            let mut bytes = vec![0; piece.len as usize];
            bus.read(None, piece.at, &mut bytes).unwrap();
            all.extend(bytes);
        }
        all
    }

    pub(crate) fn writable(&self) -> u32 {
        self.buffers.iter().filter(|piece| piece.write).map(|piece| piece.len).sum()
    }
}

/// A ring that can not be followed.
#[derive(Debug)]
pub(crate) struct Nonsense;

impl From<DmaFault> for Nonsense {
    fn from(_: DmaFault) -> Self {
        Self
    }
}

/// A ring, and how far the device is in it.
#[derive(Debug, Clone)]
pub(crate) struct DeviceRing {
    pub(crate) setup: QueueSetup,
    pub(crate) packed: bool,
    /// Split: the next available index. Packed: the next slot to look at.
    pub(crate) next: u16,
    next_wrap: bool,
    /// Split: the used index. Packed: the next slot to mark used.
    pub(crate) used: u16,
    used_wrap: bool,
}

/// Where a descriptor is in a table.
fn slot(table: u64, index: u16) -> Iova {
    Iova::new(table.wrapping_add(16 * u64::from(index)))
}

impl DeviceRing {
    pub(crate) fn new(setup: QueueSetup, packed: bool) -> Self {
        assert!(setup.enabled, "the driver has no such queue");
        Self { setup, packed, next: 0, next_wrap: true, used: 0, used_wrap: true }
    }

    /// One that is not there.
    pub(crate) fn unused() -> Self {
        Self {
            setup: QueueSetup::default(),
            packed: false,
            next: 0,
            next_wrap: true,
            used: 0,
            used_wrap: true,
        }
    }

    /// Goes to where the device has used all that is available, in a ring of buffers that take one entry each.
    pub(crate) fn skip_used(&mut self, bus: &mut Bus) {
        if !self.packed {
            self.next = bus.load(None, Iova::new(self.setup.driver + avail::IDX as u64)).unwrap();
            self.used = self.next;
            return;
        }
        let word = |bus: &mut Bus, ring: &Self| {
            let at = slot(ring.setup.desc, ring.next).wrapping_add(packed::HANDSHAKE as u64);
            Handshake::from_bits(bus.load(None, at).unwrap())
        };
        while word(bus, self).is_used(self.next_wrap) {
            self.next += 1;
            if self.next == self.setup.size {
                (self.next, self.next_wrap) = (0, !self.next_wrap);
            }
        }
        (self.used, self.used_wrap) = (self.next, self.next_wrap);
    }

    /// The next buffer that the driver has made available.
    pub(crate) fn take(&mut self, bus: &mut Bus) -> Option<Chain> {
        self.try_take(bus).expect("the ring is as the driver made it")
    }

    /// Likewise, in a ring that may have been made nonsense of.
    pub(crate) fn try_take(&mut self, bus: &mut Bus) -> Result<Option<Chain>, Nonsense> {
        if self.packed { self.take_packed(bus) } else { self.take_split(bus) }
    }

    /// All that are available.
    pub(crate) fn take_all(&mut self, bus: &mut Bus) -> Vec<Chain> {
        std::iter::from_fn(|| self.take(bus)).collect()
    }

    fn take_split(&mut self, bus: &mut Bus) -> Result<Option<Chain>, Nonsense> {
        let word = |at: usize| Iova::new(self.setup.driver + at as u64);
        if bus.load::<u16>(None, word(avail::IDX))? == self.next {
            return Ok(None);
        }
        let id: u16 = bus.load(None, word(avail::ring(self.next % self.setup.size)))?;
        self.next = self.next.wrapping_add(1);
        let mut chain = Chain { id, entries: 0, buffers: Vec::new() };
        let (mut table, mut at) = (self.setup.desc, id);
        for _ in 0..1000 {
            let place = slot(table, at);
            let words = [bus.load::<u64>(None, place)?, bus.load::<u64>(None, place.wrapping_add(8))?];
            let split::Descriptor { addr, len, flags, next } = split::Descriptor::from_words(words);
            chain.entries += u16::from(table == self.setup.desc);
            if flags & split::INDIRECT != 0 {
                (table, at) = (addr, 0);
                continue;
            }
            chain.buffers.push(Piece { at: Iova::new(addr), len, write: flags & split::WRITE != 0 });
            if flags & split::NEXT == 0 {
                return Ok(Some(chain));
            }
            at = next;
        }
        Err(Nonsense)
    }

    fn take_packed(&mut self, bus: &mut Bus) -> Result<Option<Chain>, Nonsense> {
        let mut chain = Chain { id: 0, entries: 0, buffers: Vec::new() };
        for _ in 0..1000 {
            let at = slot(self.setup.desc, self.next);
            let word = Handshake::from_bits(bus.load(None, at.wrapping_add(packed::HANDSHAKE as u64))?);
            if !word.is_available(self.next_wrap) {
                return if chain.entries == 0 { Ok(None) } else { Err(Nonsense) };
            }
            let addr: u64 = bus.load(None, at)?;
            self.next += 1;
            if self.next == self.setup.size {
                (self.next, self.next_wrap) = (0, !self.next_wrap);
            }
            chain.entries += 1;
            chain.id = word.id();
            let mut push = |addr, word: Handshake| {
                let write = word.flags() & packed::WRITE != 0;
                chain.buffers.push(Piece { at: Iova::new(addr), len: word.len(), write });
            };
            if word.flags() & packed::INDIRECT != 0 {
                for n in 0..u64::from(word.len()).min(16_000) / 16 {
                    let at = Iova::new(addr.wrapping_add(16 * n));
                    push(bus.load(None, at)?, Handshake::from_bits(bus.load(None, at.wrapping_add(8))?));
                }
            } else {
                push(addr, word);
            }
            if word.flags() & packed::NEXT == 0 {
                return Ok(Some(chain));
            }
        }
        Err(Nonsense)
    }

    /// Says that a buffer is used, with `len` bytes written.
    pub(crate) fn give(&mut self, bus: &mut Bus, chain: &Chain, len: u32) {
        self.give_raw(bus, chain.id.into(), len, chain.entries);
    }

    /// Says that the buffer `id` is used, which takes so many entries.
    pub(crate) fn give_raw(&mut self, bus: &mut Bus, id: u32, len: u32, entries: u16) {
        if self.packed {
            let flags = packed::used(self.used_wrap) | packed::WRITE;
            self.mark(bus, Handshake::new().with_id(id as u16).with_len(len).with_flags(flags));
            self.used += entries;
            if self.used >= self.setup.size {
                (self.used, self.used_wrap) = (self.used - self.setup.size, !self.used_wrap);
            }
        } else {
            self.write_element(bus, self.used, id, len);
            self.used = self.used.wrapping_add(1);
            self.set_index(bus, self.used);
        }
    }

    /// Packed: writes the handshake of the next slot.
    pub(crate) fn mark(&self, bus: &mut Bus, word: Handshake) {
        let at = slot(self.setup.desc, self.used).wrapping_add(packed::HANDSHAKE as u64);
        bus.store(None, at, word.into_bits()).unwrap();
    }

    /// Split: writes a used element.
    pub(crate) fn write_element(&self, bus: &mut Bus, index: u16, id: u32, len: u32) {
        let at = Iova::new(self.setup.device + used::ring(index % self.setup.size) as u64);
        bus.store(None, at, id).unwrap();
        bus.store(None, at.wrapping_add(4), len).unwrap();
    }

    /// Split: writes the used index.
    pub(crate) fn set_index(&self, bus: &mut Bus, index: u16) {
        bus.store(None, Iova::new(self.setup.device + used::IDX as u64), index).unwrap();
    }

    /// The words by which the device asks for notifications: an area that only it writes.
    pub(crate) fn suppress(&self, bus: &mut Bus, nonsense: u32) {
        if self.packed {
            bus.store(None, Iova::new(self.setup.device), nonsense).unwrap();
        } else {
            let event = used::avail_event(self.setup.size) as u64;
            bus.store(None, Iova::new(self.setup.device + event), nonsense as u16).unwrap();
            bus.store(None, Iova::new(self.setup.device + used::FLAGS as u64), (nonsense >> 16) as u16)
                .unwrap();
        }
    }
}
