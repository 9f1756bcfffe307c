//! Receiving: a ring of empty buffers, which the device fills. The driver's part of a packet's way is
//! [`RxRing::burst`] and what it calls.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use underpass::dma::DmaSpace;
use underpass::interrupt::Interrupt;
use underpass::net::headers::ethertype;
use underpass::net::{Counters, MIN_FRAME, Offloads, RxQueue, State, Values};
use underpass::pci::PciDevice;
use underpass::pool::HEADROOM;
use underpass::{Access, Burst, Checksum, Error, ErrorKind, Packet, Pool, Result};
use zerocopy::FromBytes;

use super::lease::{Lease, Ring, Status};
use super::transport::Notifier;
use super::virtqueue::{Buffer, Virtqueue};
use crate::virtio_net::spec::net::{HashHeader, hash_report, header_flag};

/// Free entries at which the ring is filled up again: enough that one publication is for many.
const REFILL: u16 = 32;

/// Buffers taken from the pool at a time.
const FRESH: usize = 64;

/// How long a waiting queue goes without looking whether its port wants it back.
const LOOK: Duration = Duration::from_millis(50);

/// How long, where the device needs this thread's time to do anything.
const LEND: Duration = Duration::from_micros(100);

/// Bytes of a frame's addresses, behind which a VLAN tag is.
pub(super) const ADDRESSES: usize = 12;

/// A receive queue's ring.
pub(super) struct RxRing<Q: Virtqueue<Token = Packet>> {
    queue: Q,
    frames: Frames,
    /// Free entries at which it is filled up.
    refill_at: u16,
    /// Free entries for which the pool had nothing when last asked.
    short: u16,
    fresh: Burst<Packet>,
    pool: Pool,
    notifier: Notifier,
    counters: Arc<Counters>,
    status: Arc<Status>,
    device: Arc<PciDevice>,
    interrupt: Option<Interrupt>,
}

/// Makes packets of used buffers.
struct Frames {
    space: Arc<DmaSpace>,
    header_len: u32,
    /// The longest frame.
    max: usize,
    port: u16,
    queue: u16,
    /// With `RX_SCATTER` a packet may fill several buffers (`MRG_RXBUF`).
    offloads: Offloads,
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
        let scatter = parts.offloads.contains(Offloads::RX_SCATTER);
        let frames = Frames {
            space: parts.space,
            header_len: parts.header_len as u32,
            max: parts.max_frame,
            port: parts.port,
            queue: parts.index,
            offloads: parts.offloads,
            parts: Burst::with_capacity(if scatter { queue.size().into() } else { 0 }),
            missing: 0,
        };
        Self {
            refill_at: REFILL.min(queue.size() / 4).max(1),
            short: 0,
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
        self.device.lend(self.frames.queue.into());
        if !self.status.is_running() {
            return 0;
        }
        let (before, mut sum) = (burst.len(), Values::default());
        let frames = &mut self.frames;
        let mut lie = None;
        let taken = self.queue.take_burst(burst.room(), |packet, written| {
            match frames.receive(packet, written, &mut sum) {
                // take_burst gives at most as many buffers as there is room for packets.
                Ok(Some(packet)) => _ = burst.push(packet),
                Ok(None) => {}
                Err(why) => lie = Some(why),
            }
        });
        if let Some(why) = lie.or_else(|| taken.err().map(|broken| broken.why)) {
            sum.errors += 1;
            self.status.break_down(why);
        } else if self.queue.free() >= self.refill_at {
            self.refill();
        }
        let received = burst.len() - before;
        sum.packets = received as u64;
        self.counters.add(sum);
        received
    }

    /// Posts empty buffers on all entries that are free.
    pub(super) fn refill(&mut self) {
        let free = self.queue.free();
        let (mut left, mut posted) = (usize::from(free), false);
        while left != 0 {
            let count = self.pool.alloc_raw(left.min(FRESH), &mut self.fresh);
            if count == 0 {
                break;
            }
            left -= count;
            for mut packet in self.fresh.drain_all() {
                // The header goes before the place of the packet's bytes, which so keeps its alignment.
                packet.post(HEADROOM - self.frames.header_len);
                let Some(iova) = self.frames.space.hand_out(&packet, Access::WRITE) else { continue };
                let buffer = Buffer::writable(iova, packet.data().len() as u32);
                posted |= self.queue.add(packet, &[buffer]).is_ok();
            }
        }
        // Each entry counts once, however often its buffer is asked for.
        let short = left as u16;
        if short > self.short {
            self.counters.add(Values { no_buffers: (short - self.short).into(), ..Values::default() });
        }
        self.short = short;
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
            let is_lent = self.device.lend(self.frames.queue.into());
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

impl Frames {
    /// A packet that is complete with this buffer, into which the device says that it has written so many bytes; at most
    /// as many as the buffer has. What is no packet is counted. An error is a lie after which nothing can be told apart.
    #[inline]
    fn receive(
        &mut self,
        mut packet: Packet,
        written: u32,
        sum: &mut Values,
    ) -> Result<Option<Packet>, &'static str> {
        self.space.take_back(&packet, Access::WRITE);
        if self.missing != 0 {
            return Ok(self.add_part(packet, written, sum));
        }
        // Copied out, once. There was room for it.
        let (header, hash) = match HashHeader::read_from_prefix(packet.data()) {
            Ok((HashHeader { header, .. }, _)) if !self.offloads.contains(Offloads::RSS_HASH) => {
                (header, None)
            }
            Ok((hash, _)) => (hash.header, (hash.hash_report != hash_report::NONE).then(|| hash.hash())),
            Err(_) => return Err("a buffer has no room for a header"),
        };
        if !packet.received(self.header_len, written, self.port, self.queue) {
            sum.errors += 1;
            return Ok(None);
        }
        if self.offloads.contains(Offloads::RX_CHECKSUM) {
            if header.flags & header_flag::NEEDS_CSUM != 0 {
                packet.set_checksum(Checksum::Partial);
            } else if header.flags & header_flag::DATA_VALID != 0 {
                packet.set_checksum(Checksum::Good);
            }
        }
        if let Some(hash) = hash {
            packet.set_rss_hash(hash);
        }
        if self.offloads.contains(Offloads::RX_SCATTER) && header.num_buffers != 1 {
            return self.begin(packet, header.num_buffers.into(), sum);
        }
        let len = packet.data().len();
        Ok(self.finish(packet, len, sum))
    }

    /// The first buffer of several.
    #[cold]
    fn begin(
        &mut self,
        packet: Packet,
        buffers: usize,
        sum: &mut Values,
    ) -> Result<Option<Packet>, &'static str> {
        if buffers == 0 {
            sum.errors += 1;
            return Ok(None);
        }
        if buffers > self.parts.capacity() {
            return Err("a received packet has more buffers than the queue");
        }
        self.missing = buffers - 1;
        let _ = self.parts.push(packet);
        Ok(None)
    }

    /// One more buffer; the packet if it was the last.
    fn add_part(&mut self, mut packet: Packet, written: u32, sum: &mut Values) -> Option<Packet> {
        self.missing -= 1;
        if !packet.received(0, written, self.port, self.queue) {
            sum.errors += 1;
        }
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
        self.finish(packet, len, sum)
    }

    /// A frame of `len` bytes: as the application gets it, unless it is too short or too long.
    #[inline]
    fn finish(&self, mut packet: Packet, len: usize, sum: &mut Values) -> Option<Packet> {
        if len < MIN_FRAME {
            sum.runts += 1;
            return None;
        }
        if len > self.max {
            sum.oversize += 1;
            return None;
        }
        sum.bytes += len as u64;
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

/// Takes a VLAN tag out of the frame, if it has one.
fn strip_vlan(packet: &mut Packet) {
    const TAG: usize = 4;
    let data = packet.data_mut();
    if data.len() < MIN_FRAME + TAG || data[ADDRESSES..][..2] != ethertype::VLAN.to_be_bytes() {
        return;
    }
    let tci = u16::from_be_bytes([data[ADDRESSES + 2], data[ADDRESSES + 3]]);
    data.copy_within(..ADDRESSES, TAG);
    packet.trim_front(TAG);
    packet.set_vlan(Some(tci));
}

impl<Q: Virtqueue<Token = Packet> + Send + 'static> RxQueue for Lease<RxRing<Q>> {
    fn rx_burst(&mut self, burst: &mut Burst<Packet>) -> usize {
        self.ring_mut().map_or(0, |ring| ring.burst(burst))
    }

    fn state(&self) -> State {
        self.ring().map_or(State::Gone, |ring| ring.status.get())
    }

    fn index(&self) -> u16 {
        self.ring().map_or(0, |ring| ring.frames.queue)
    }

    fn wait(&mut self, timeout: Duration) -> Result<()> {
        self.ring_mut().map_or(Ok(()), |ring| ring.sleep(timeout))
    }
}

impl<Q: Virtqueue<Token = Packet>> fmt::Debug for RxRing<Q> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RxRing")
            .field("device", &self.device)
            .field("index", &self.frames.queue)
            .field("state", &self.status.get())
            .field("posted", &(self.queue.size() - self.queue.free()))
            .finish_non_exhaustive()
    }
}
