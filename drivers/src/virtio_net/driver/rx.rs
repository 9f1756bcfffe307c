//! Receiving: a ring of empty buffers, which the device fills. The driver's part of a packet's way is
//! [`RxRing::burst`] and what it calls.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use underpass::dma::DmaSpace;
use underpass::interrupt::Interrupt;
use underpass::net::{Counters, MIN_FRAME, Offloads, RxQueue, State, Values};
use underpass::pci::PciDevice;
use underpass::pool::HEADROOM;
use underpass::{Access, Burst, Checksum, Error, ErrorKind, Packet, Pool, Result};
use zerocopy::FromBytes;

use super::frame::{fits, strip_vlan, wire_len};
use super::lease::{GONE, Lease, Ring, Status};
use super::transport::Notifier;
use super::virtqueue::{Buffer, Virtqueue};
use crate::virtio_net::spec::net::{HashHeader, Header, gso, hash_report, header_flag};

/// Free entries at which the ring is filled up again: enough that one publication is for many.
const REFILL: u16 = 32;

/// Buffers taken from the pool at a time.
const FRESH: usize = 64;

/// Polls that go by before a pool that had too little is asked again.
const RETRY: u8 = 3;

/// How long a waiting queue goes without looking whether its port wants it back.
const LOOK: Duration = Duration::from_millis(50);

/// How long, where the device needs this thread's time to do anything.
const LEND: Duration = Duration::from_micros(100);

/// A receive queue's ring.
pub(super) struct RxRing<Q: Virtqueue<Token = Packet>> {
    queue: Q,
    frames: Frames,
    /// A buffer is a packet: there is nothing to look up in its header.
    is_plain: bool,
    /// Free entries at which it is filled up.
    refill_at: u16,
    /// Free entries for which the pool had nothing when last asked.
    short: u16,
    /// Polls until the pool is asked for those again.
    retry: u8,
    fresh: Burst<Packet>,
    pool: Pool,
    notifier: Notifier,
    counters: Arc<Counters>,
    status: Arc<Status>,
    device: Arc<PciDevice>,
    interrupt: Option<Interrupt>,
}

/// What makes a frame of a used buffer.
#[derive(Clone, Copy)]
struct Rules {
    header_len: u32,
    /// The longest frame without a VLAN tag.
    max: u32,
    port: u16,
    queue: u16,
}

/// Why a buffer is no packet.
#[derive(Clone, Copy)]
enum Wrong {
    Length,
    Runt,
    Oversize,
}

/// Makes packets of used buffers, whatever was negotiated.
struct Frames {
    rules: Rules,
    /// With `RX_SCATTER` a packet may fill several buffers (`MRG_RXBUF`).
    offloads: Offloads,
    space: Arc<DmaSpace>,
    /// The buffers so far of one that does, and how many are missing.
    parts: Burst<Packet>,
    missing: usize,
}

/// What a receive ring is made of, besides its queue.
pub(super) struct RxParts {
    pub space: Arc<DmaSpace>,
    pub pool: Pool,
    pub notifier: Notifier,
    pub counters: Arc<Counters>,
    pub status: Arc<Status>,
    pub device: Arc<PciDevice>,
    pub interrupt: Option<Interrupt>,
    pub offloads: Offloads,
    pub header_len: usize,
    pub max_frame: usize,
    pub port: u16,
    pub index: u16,
}

impl<Q: Virtqueue<Token = Packet>> RxRing<Q> {
    pub(super) fn new(queue: Q, parts: RxParts) -> Self {
        let offloads = parts.offloads;
        let rules = Rules {
            header_len: parts.header_len as u32,
            max: parts.max_frame as u32,
            port: parts.port,
            queue: parts.index,
        };
        let scatter = offloads.contains(Offloads::RX_SCATTER);
        let frames = Frames {
            rules,
            offloads,
            space: parts.space,
            parts: Burst::with_capacity(if scatter { queue.size().into() } else { 0 }),
            missing: 0,
        };
        let needs_header =
            Offloads::RX_CHECKSUM | Offloads::RX_SCATTER | Offloads::RSS_HASH | Offloads::RX_VLAN;
        Self {
            is_plain: (offloads & needs_header).is_empty() && !frames.space.checks_leases(),
            refill_at: REFILL.min(queue.size() / 4).max(1),
            short: 0,
            retry: 0,
            fresh: Burst::with_capacity(FRESH),
            queue,
            frames,
            pool: parts.pool,
            notifier: parts.notifier,
            counters: parts.counters,
            status: parts.status,
            device: parts.device,
            interrupt: parts.interrupt,
        }
    }

    #[inline]
    fn burst(&mut self, burst: &mut Burst<Packet>) -> usize {
        self.device.lend(self.frames.rules.queue.into());
        if !self.status.is_running() {
            return 0;
        }
        let before = burst.len();
        let (bytes, broken) = if self.is_plain { self.take_plain(burst) } else { self.take_any(burst) };
        if let Some(why) = broken {
            let broken = self.status.break_down(why).into();
            self.counters.add(Values { broken, ..Values::default() });
        } else if self.queue.free() >= self.refill_at {
            match self.retry {
                0 => self.refill(),
                _ => self.retry -= 1,
            }
        }
        let received = burst.len() - before;
        if received == 0 && self.device.is_gone() {
            self.status.break_down(GONE);
        }
        self.counters.add(Values { packets: received as u64, bytes, ..Values::default() });
        received
    }

    /// Appends to `burst` what was received. Returns its bytes, and what the device did wrong, if anything.
    #[inline]
    fn take_plain(&mut self, burst: &mut Burst<Packet>) -> (u64, Option<&'static str>) {
        let (rules, counters, mut bytes) = (self.frames.rules, &*self.counters, 0);
        let taken = self.queue.take_burst(burst.room(), |mut packet, written| {
            match rules.frame(&mut packet, written) {
                Ok(len) => {
                    bytes += u64::from(len);
                    // There are at most as many buffers as there is room for packets.
                    let _ = burst.push(packet).map_err(discard);
                }
                Err(wrong) => {
                    wrong.count(counters);
                    discard(packet);
                }
            }
        });
        (bytes, taken.err().map(|broken| broken.why))
    }

    /// Likewise, with all that there may be in a header.
    fn take_any(&mut self, burst: &mut Burst<Packet>) -> (u64, Option<&'static str>) {
        let (frames, counters, mut bytes, mut lie) = (&mut self.frames, &*self.counters, 0, None);
        let taken = self.queue.take_burst(burst.room(), |packet, written| {
            if lie.is_some() {
                return frames.refuse(packet, counters);
            }
            match frames.receive(packet, written, counters) {
                Ok(Some(packet)) => {
                    bytes += wire_len(&packet) as u64;
                    let _ = burst.push(packet);
                }
                Ok(None) => {}
                Err(why) => {
                    Wrong::Length.count(counters);
                    lie = Some(why);
                }
            }
        });
        (bytes, lie.or_else(|| taken.err().map(|broken| broken.why)))
    }

    /// Posts empty buffers on all entries that are free.
    pub(super) fn refill(&mut self) {
        let free = self.queue.free();
        let (mut left, mut posted) = (usize::from(free), false);
        // The pool counts what it is asked for in vain, and is not to count it again each time.
        let mut may_ask = if self.short == 0 { left } else { left.min(self.pool.available()) };
        while may_ask != 0 {
            let count = self.pool.alloc_raw(may_ask.min(FRESH), &mut self.fresh);
            if count == 0 {
                break;
            }
            left -= count;
            may_ask -= count;
            let (space, header_len) = (self.frames.space.view(), self.frames.rules.header_len);
            let mut fresh = self.fresh.drain_all();
            let added = self.queue.add_burst(count, || {
                let mut packet = fresh.next()?;
                // The header goes before the place of the packet's bytes, which so keeps its alignment.
                packet.post(HEADROOM - header_len);
                let Some(iova) = space.hand_out(&packet, Access::WRITE) else {
                    discard(packet);
                    return None;
                };
                let buffer = Buffer::writable(iova, packet.data().len() as u32);
                Some((packet, buffer))
            });
            posted |= added != 0;
        }
        // Each entry counts once, however often its buffer is asked for.
        let short = left as u16;
        if short > self.short {
            self.counters.add(Values { no_buffers: (short - self.short).into(), ..Values::default() });
        }
        self.short = short;
        self.retry = if short == 0 { 0 } else { RETRY };
        if posted {
            self.queue.publish();
            self.notify();
        }
    }

    fn notify(&mut self) {
        if self.queue.needs_notify() {
            self.notifier.notify(self.queue.position());
        }
    }

    fn sleep(&mut self, timeout: Duration) -> Result<()> {
        // None is later than any clock of ours goes: no limit of the caller's.
        let until = Instant::now().checked_add(timeout);
        self.refill();
        loop {
            let Some(interrupt) = &self.interrupt else {
                return Err(Error::new(
                    ErrorKind::Unsupported,
                    "wait",
                    "its queues were started without interrupts",
                )
                .device(self.device.name().to_owned())
                .mend("set Config::interrupts, or poll"));
            };
            // Emptied before looking: whatever is used after the look signals it again.
            interrupt.drain();
            let is_lent = self.device.lend(self.frames.rules.queue.into());
            if self.queue.enable_notifications() || !self.status.is_running() {
                break;
            }
            let left = until.map(|until| until.saturating_duration_since(Instant::now()));
            if left.is_some_and(|left| left.is_zero()) {
                break;
            }
            let slice = if is_lent { LEND } else { LOOK };
            interrupt.wait(Some(left.map_or(slice, |left| left.min(slice))))?;
        }
        self.queue.disable_notifications();
        Ok(())
    }
}

impl Rules {
    /// Makes the packet the frame that the device says to have written. Returns the frame's length.
    #[inline]
    fn frame(self, packet: &mut Packet, written: u32) -> Result<u32, Wrong> {
        if !packet.received(self.header_len, written, self.port, self.queue) {
            return Err(Wrong::Length);
        }
        let len = written - self.header_len;
        self.check(packet, len).map(|()| len)
    }

    /// Whether `packet`, of `len` bytes in all its segments, is a frame.
    #[inline]
    fn check(self, packet: &Packet, len: u32) -> Result<(), Wrong> {
        if len < MIN_FRAME as u32 {
            return Err(Wrong::Runt);
        }
        if fits(packet.data(), len as usize, self.max as usize) { Ok(()) } else { Err(Wrong::Oversize) }
    }
}

impl Wrong {
    #[cold]
    fn count(self, counters: &Counters) {
        let none = Values::default();
        counters.add(match self {
            Self::Length => Values { errors: 1, ..none },
            Self::Runt => Values { runts: 1, ..none },
            Self::Oversize => Values { oversize: 1, ..none },
        });
    }
}

impl Frames {
    /// A packet that is complete with this buffer, into which the device says to have written so many bytes. What is no
    /// packet is counted. An error is a lie after which nothing can be told apart.
    fn receive(
        &mut self,
        mut packet: Packet,
        written: u32,
        counters: &Counters,
    ) -> Result<Option<Packet>, &'static str> {
        let has = |offload| self.offloads.contains(offload);
        let Rules { header_len, port, queue, .. } = self.rules;
        self.space.take_back(&packet, Access::WRITE);
        if self.missing != 0 {
            if !packet.received(0, written, port, queue) {
                Wrong::Length.count(counters);
            }
            return Ok(self.add_part(packet, counters));
        }
        // Copied out, once. There was room for it.
        let (header, hash) = match HashHeader::read_from_prefix(packet.data()) {
            Ok((hash, _)) if has(Offloads::RSS_HASH) => {
                (hash.header, (hash.hash_report != hash_report::NONE).then(|| hash.hash()))
            }
            Ok((HashHeader { header, .. }, _)) => (header, None),
            Err(_) => return Err("a buffer has no room for a header"),
        };
        if !packet.received(header_len, written, port, queue) {
            // Which of the buffers that follow belong to this one is not known then.
            if has(Offloads::RX_SCATTER) {
                return Err("the first buffer of a packet is shorter than its header");
            }
            Wrong::Length.count(counters);
            return Ok(None);
        }
        if has(Offloads::RX_CHECKSUM) {
            if header.flags & header_flag::NEEDS_CSUM != 0 {
                packet.set_checksum(Checksum::Partial);
            } else if header.flags & header_flag::DATA_VALID != 0 {
                packet.set_checksum(Checksum::Good);
            }
        }
        if has(Offloads::RX_LARGE) {
            packet.set_segment_size(segment_size(header));
        }
        if let Some(hash) = hash {
            packet.set_rss_hash(hash);
        }
        match usize::from(header.num_buffers) {
            1 => Ok(self.finish(packet, written - header_len, counters)),
            _ if !has(Offloads::RX_SCATTER) => Ok(self.finish(packet, written - header_len, counters)),
            0 => {
                Wrong::Length.count(counters);
                Ok(None)
            }
            buffers if buffers > self.parts.capacity() => {
                Err("a received packet has more buffers than the queue")
            }
            buffers => {
                self.missing = buffers - 1;
                let _ = self.parts.push(packet);
                Ok(None)
            }
        }
    }

    /// A buffer that came behind a lie: what is in it nobody knows.
    #[cold]
    fn refuse(&self, packet: Packet, counters: &Counters) {
        self.space.take_back(&packet, Access::WRITE);
        Wrong::Length.count(counters);
        drop(packet);
    }

    /// One more buffer of a packet that has several; the packet if it was the last.
    fn add_part(&mut self, packet: Packet, counters: &Counters) -> Option<Packet> {
        self.missing -= 1;
        let _ = self.parts.push(packet);
        if self.missing != 0 {
            return None;
        }
        // From the back: no chain is walked.
        let mut packet = self.parts.pop()?;
        let mut len = packet.data().len();
        while let Some(mut before) = self.parts.pop() {
            len += before.data().len();
            before.chain(packet);
            packet = before;
        }
        self.finish(packet, len as u32, counters)
    }

    /// A frame of `len` bytes: as the application gets it, unless it is too short or too long.
    fn finish(&self, mut packet: Packet, len: u32, counters: &Counters) -> Option<Packet> {
        if let Err(wrong) = self.rules.check(&packet, len) {
            wrong.count(counters);
            return None;
        }
        if self.offloads.contains(Offloads::RX_VLAN) {
            strip_vlan(&mut packet);
        }
        Some(packet)
    }
}

impl<Q: Virtqueue<Token = Packet> + Send> Ring for RxRing<Q> {
    fn close(&mut self) {
        let space = &self.frames.space;
        self.queue.reset(|packet| space.take_back(&packet, Access::WRITE));
        self.frames.parts.clear();
    }
}

/// The payload in each of the segments that were joined to a packet; 0 for one that was not joined.
fn segment_size(header: Header) -> u16 {
    let is_joined = matches!(header.gso_type & !gso::ECN, gso::TCPV4 | gso::TCPV6);
    if is_joined { header.gso_size } else { 0 }
}

/// Drops a packet, out of line: what seldom happens is not to fill the loops of bursts.
#[cold]
pub(super) fn discard(packet: Packet) {
    drop(packet);
}

impl<Q: Virtqueue<Token = Packet> + Send + 'static> RxQueue for Lease<RxRing<Q>> {
    fn rx_burst(&mut self, burst: &mut Burst<Packet>) -> usize {
        self.ring_mut().map_or(0, |ring| ring.burst(burst))
    }

    fn state(&self) -> State {
        self.ring().map_or(State::Gone, |ring| ring.status.get())
    }

    fn index(&self) -> u16 {
        self.ring().map_or(0, |ring| ring.frames.rules.queue)
    }

    fn wait(&mut self, timeout: Duration) -> Result<()> {
        self.ring_mut().map_or(Ok(()), |ring| ring.sleep(timeout))
    }
}

impl<Q: Virtqueue<Token = Packet>> fmt::Debug for RxRing<Q> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RxRing")
            .field("device", &self.device)
            .field("index", &self.frames.rules.queue)
            .field("state", &self.status.get())
            .field("posted", &(self.queue.size() - self.queue.free()))
            .finish_non_exhaustive()
    }
}
