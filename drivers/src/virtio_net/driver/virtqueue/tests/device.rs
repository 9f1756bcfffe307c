//! The device's side of both kinds of virtqueue, as plainly as the specification has it, over the bytes of the ring.

use underpass::Iova;
use underpass::model::Bus;

use super::super::Areas;

/// A buffer that the driver made available.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Request {
    /// Address, length and whether the device writes it.
    pub(super) segments: Vec<(u64, u32, bool)>,
    /// Descriptors in the ring.
    pub(super) count: u16,
    id: u16,
}

pub(super) struct Memory {
    pub(super) bus: Bus,
    pub(super) areas: Areas,
    pub(super) size: u16,
    pub(super) event_idx: bool,
}

impl Memory {
    fn read<const N: usize>(&mut self, at: Iova, offset: u64) -> [u8; N] {
        let mut bytes = [0; N];
        self.bus.read(None, at.wrapping_add(offset), &mut bytes).unwrap();
        bytes
    }

    fn read_u16(&mut self, at: Iova, offset: u64) -> u16 {
        u16::from_le_bytes(self.read(at, offset))
    }

    fn write(&mut self, at: Iova, offset: u64, bytes: &[u8]) {
        self.bus.write(None, at.wrapping_add(offset), bytes).unwrap();
    }

    fn descriptor(&mut self, table: Iova, n: u16) -> (u64, u32, u16, u16) {
        let bytes = self.read::<16>(table, 16 * u64::from(n));
        let half = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let addr = u64::from_le_bytes(bytes[..8].try_into().unwrap());
        (addr, u32::from_le_bytes(bytes[8..12].try_into().unwrap()), half(12), half(14))
    }
}

/// How the device wants to be notified.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Want {
    Always,
    Never,
    /// Once the buffer that is so many descriptors (packed) or buffers (split) after the next one is made available. Only
    /// with event index.
    After(u16),
}

pub(super) trait Device {
    fn new(memory: Memory) -> Self;
    fn memory(&mut self) -> &mut Memory;
    /// The next buffer, if there is one.
    fn fetch(&mut self) -> Option<Request>;
    /// Marks buffers as used, by one entry that names the last.
    fn complete(&mut self, requests: &[Request], len: u32);
    fn want(&mut self, want: Want);
    /// Whether the driver, which made this available since it was asked last, had to notify.
    fn must_be_notified(&mut self, published: &[Request]) -> bool;
    /// Whether the driver wants to be notified of what was completed since this was asked last.
    fn must_notify(&mut self) -> bool;
    /// Writes an entry of the used ring as it is told to, and goes on by so many buffers.
    fn lie(&mut self, id: u16, len: u32, count: u16);
}

pub(super) struct Split {
    memory: Memory,
    next: u16,
    used: u16,
    asked: u16,
    want: Want,
    event: u16,
    /// The available index as of the last notification.
    seen: u16,
}

impl Device for Split {
    fn new(memory: Memory) -> Self {
        let want = if memory.event_idx { Want::After(0) } else { Want::Always };
        Self { memory, next: 0, used: 0, asked: 0, want, event: 0, seen: 0 }
    }

    fn memory(&mut self) -> &mut Memory {
        &mut self.memory
    }

    fn fetch(&mut self) -> Option<Request> {
        let Areas { desc, driver, .. } = self.memory.areas;
        if self.memory.read_u16(driver, 2) == self.next {
            return None;
        }
        let slot = self.next % self.memory.size;
        let id = self.memory.read_u16(driver, 4 + 2 * u64::from(slot));
        self.next = self.next.wrapping_add(1);
        let (mut segments, mut count) = (Vec::new(), 0);
        let (mut table, mut at) = (desc, id);
        loop {
            let (addr, len, flags, next) = self.memory.descriptor(table, at);
            if table == desc {
                count += 1;
            }
            if flags & 4 != 0 {
                assert_eq!((flags, len % 16, table), (4, 0, desc), "an indirect descriptor stands alone");
                (table, at) = (Iova::new(addr), 0);
                continue;
            }
            segments.push((addr, len, flags & 2 != 0));
            assert!(segments.len() <= usize::from(self.memory.size), "a loop");
            if flags & 1 == 0 {
                return Some(Request { segments, count, id });
            }
            at = next;
        }
    }

    fn complete(&mut self, requests: &[Request], len: u32) {
        self.lie(requests.last().unwrap().id, len, requests.len() as u16);
    }

    fn want(&mut self, want: Want) {
        let Memory { areas: Areas { device, .. }, size, .. } = self.memory;
        self.want = want;
        let event_at = 4 + 8 * u64::from(size);
        match want {
            Want::After(n) => {
                self.event = self.next.wrapping_add(n);
                self.memory.write(device, event_at, &self.event.to_le_bytes());
            }
            Want::Never => self.memory.write(device, 0, &[1, 0]),
            Want::Always => self.memory.write(device, 0, &[0, 0]),
        }
    }

    fn must_be_notified(&mut self, published: &[Request]) -> bool {
        let first = self.seen;
        self.seen = first.wrapping_add(published.len() as u16);
        match self.want {
            Want::Always => !published.is_empty(),
            Want::Never => false,
            Want::After(_) => (0..published.len() as u16).any(|n| first.wrapping_add(n) == self.event),
        }
    }

    fn must_notify(&mut self) -> bool {
        let (driver, size) = (self.memory.areas.driver, self.memory.size);
        let old = std::mem::replace(&mut self.asked, self.used);
        if self.memory.event_idx {
            let event = self.memory.read_u16(driver, 4 + 2 * u64::from(size));
            (0..self.used.wrapping_sub(old)).any(|n| old.wrapping_add(n) == event)
        } else {
            old != self.used && self.memory.read_u16(driver, 0) == 0
        }
    }

    fn lie(&mut self, id: u16, len: u32, count: u16) {
        let device = self.memory.areas.device;
        let at = 4 + 8 * u64::from(self.used % self.memory.size);
        self.memory.write(device, at, &u32::from(id).to_le_bytes());
        self.memory.write(device, at + 4, &len.to_le_bytes());
        self.used = self.used.wrapping_add(count);
        self.memory.write(device, 2, &self.used.to_le_bytes());
    }
}

/// A place in the packed ring as a number that goes up for ever.
type Step = u64;

pub(super) struct Packed {
    memory: Memory,
    next: Step,
    used: Step,
    asked: Step,
    want: Want,
    event: Step,
    seen: Step,
}

impl Packed {
    fn place(&self, step: Step) -> (u16, bool) {
        let size = Step::from(self.memory.size);
        ((step % size) as u16, (step / size).is_multiple_of(2))
    }
}

impl Device for Packed {
    fn new(memory: Memory) -> Self {
        Self { memory, next: 0, used: 0, asked: 0, want: Want::Always, event: 0, seen: 0 }
    }

    fn memory(&mut self) -> &mut Memory {
        &mut self.memory
    }

    fn fetch(&mut self) -> Option<Request> {
        let desc = self.memory.areas.desc;
        let (mut segments, mut count) = (Vec::new(), 0);
        loop {
            let (at, wrap) = self.place(self.next);
            let (addr, len, id, flags) = self.memory.descriptor(desc, at);
            let (avail, used) = (flags & 0x80 != 0, flags & 0x8000 != 0);
            if avail != wrap || used == wrap {
                assert_eq!(count, 0, "the rest of a chain is not available");
                return None;
            }
            self.next += 1;
            count += 1;
            if flags & 4 != 0 {
                assert_eq!((count, flags & 1, len % 16), (1, 0, 0), "an indirect descriptor stands alone");
                for n in 0..len / 16 {
                    let (addr, len, _, flags) = self.memory.descriptor(Iova::new(addr), n as u16);
                    assert_eq!(flags & !2, 0, "flags in a table");
                    segments.push((addr, len, flags & 2 != 0));
                }
            } else {
                segments.push((addr, len, flags & 2 != 0));
            }
            if flags & 1 == 0 {
                return Some(Request { segments, count, id });
            }
        }
    }

    fn complete(&mut self, requests: &[Request], len: u32) {
        let count = requests.iter().map(|r| r.count).sum();
        self.lie(requests.last().unwrap().id, len, count);
    }

    fn want(&mut self, want: Want) {
        self.want = want;
        let (off, flags): (u16, u16) = match want {
            Want::Always => (0, 0),
            Want::Never => (0, 1),
            Want::After(n) => {
                // Offsets reach one round ahead.
                self.event = self.next + Step::from(n % self.memory.size);
                let (at, wrap) = self.place(self.event);
                (at | u16::from(wrap) << 15, 2)
            }
        };
        let device = self.memory.areas.device;
        self.memory.write(device, 0, &[off.to_le_bytes(), flags.to_le_bytes()].concat());
    }

    fn must_be_notified(&mut self, published: &[Request]) -> bool {
        let first = self.seen;
        self.seen += published.iter().map(|r| Step::from(r.count)).sum::<Step>();
        match self.want {
            Want::Always => !published.is_empty(),
            Want::Never => false,
            Want::After(_) => (first..self.seen).any(|step| self.place(step) == self.place(self.event)),
        }
    }

    fn must_notify(&mut self) -> bool {
        let old = std::mem::replace(&mut self.asked, self.used);
        let driver = self.memory.areas.driver;
        let (off, flags) = (self.memory.read_u16(driver, 0), self.memory.read_u16(driver, 2));
        match flags {
            0 => old != self.used,
            1 => false,
            _ => (old..self.used).any(|step| {
                let (at, wrap) = self.place(step);
                at | u16::from(wrap) << 15 == off
            }),
        }
    }

    fn lie(&mut self, id: u16, len: u32, count: u16) {
        let desc = self.memory.areas.desc;
        let (at, wrap) = self.place(self.used);
        // Devices differ in whether they say again that they wrote (QEMU's do not): one time they do, one they do not.
        let write: u16 = if self.used.is_multiple_of(2) { 2 } else { 0 };
        let flags = if wrap { 0x8080 } else { 0 } | write;
        let word = [&len.to_le_bytes()[..], &id.to_le_bytes(), &flags.to_le_bytes()].concat();
        self.memory.write(desc, 16 * u64::from(at) + 8, &word);
        self.used += Step::from(count);
    }
}
