//! Sending: a ring of packets that the device reads. The driver's part of a packet's way is [`TxRing::burst`] and what
//! it calls: a packet in one piece, with headroom and without offloads, takes the short way.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use underpass::dma::{DmaSpace, View};
use underpass::net::headers::ethertype;
use underpass::net::{Counters, MIN_FRAME, Offloads, State, TxQueue, Values, checksum};
use underpass::pci::PciDevice;
use underpass::{Access, Burst, Iova, Packet, Pool, Transport, TxOffload};
use zerocopy::IntoBytes;

use super::frame::{ADDRESSES, TAG, fits, wire_len};
use super::lease::{GONE, Lease, Ring, Status};
use super::rx::discard;
use super::transport::Notifier;
use super::virtqueue::{Buffer, Virtqueue};
use crate::virtio_net::spec::net::{HashHeader, Header, gso, header_flag};

/// Sent packets whose buffers go back to their pools at a time.
const DONE: usize = 64;

/// The most buffers of one packet, its header's included: 64 KiB in buffers of 2 KiB, and some.
pub(super) const MAX_CHAIN: u16 = 40;

/// Bytes of the headers.
const SHORT: usize = size_of::<Header>();
const LONG: usize = size_of::<HashHeader>();

/// The most that goes before a packet: the longest header, and the addresses with a tag behind them.
pub(super) const MAX_FRONT: usize = LONG + ADDRESSES + TAG;

/// The longest packet that can be cut into segments, from its IP header on.
const MAX_SEGMENTED: usize = u16::MAX as usize;

/// A transmit queue's ring.
pub(super) struct TxRing<Q: Virtqueue<Token = Packet>> {
    queue: Q,
    sender: Sender,
    /// With fewer free entries, packets that were sent are given back first.
    reclaim_at: u16,
    /// Each packet takes one entry (`INDIRECT_DESC`).
    indirect: bool,
    /// Packets that the device has.
    in_flight: usize,
    /// Those that it is done with.
    done: Burst<Packet>,
    notifier: Notifier,
    counters: Arc<Counters>,
    status: Arc<Status>,
    device: Arc<PciDevice>,
    index: u16,
}

/// Makes buffers of packets.
struct Sender {
    space: Arc<DmaSpace>,
    /// Headers of packets that have no room for them.
    headers: Pool,
    header_len: usize,
    /// The longest frame without a VLAN tag.
    max: usize,
    /// The longest such that can take the short way. Where leases are checked, none can.
    max_plain: usize,
    offloads: Offloads,
    max_chain: usize,
}

/// What a transmit ring is made of, besides its queue.
pub(super) struct TxParts {
    pub space: Arc<DmaSpace>,
    pub headers: Pool,
    pub notifier: Notifier,
    pub counters: Arc<Counters>,
    pub status: Arc<Status>,
    pub device: Arc<PciDevice>,
    pub offloads: Offloads,
    pub indirect: bool,
    pub header_len: usize,
    pub max_frame: usize,
    pub max_chain: u16,
    pub index: u16,
}

impl<Q: Virtqueue<Token = Packet>> TxRing<Q> {
    pub(super) fn new(queue: Q, parts: TxParts) -> Self {
        Self {
            reclaim_at: queue.size() / 2,
            in_flight: 0,
            done: Burst::with_capacity(DONE),
            queue,
            sender: Sender {
                max_plain: if parts.space.checks_leases() { 0 } else { parts.max_frame },
                space: parts.space,
                headers: parts.headers,
                header_len: parts.header_len,
                max: parts.max_frame,
                offloads: parts.offloads,
                max_chain: parts.max_chain.into(),
            },
            indirect: parts.indirect,
            notifier: parts.notifier,
            counters: parts.counters,
            status: parts.status,
            device: parts.device,
            index: parts.index,
        }
    }

    #[inline]
    fn burst(&mut self, burst: &mut Burst<Packet>) -> usize {
        self.device.lend(self.index.into());
        if !self.status.is_running() {
            return 0;
        }
        let mut sum = Values::default();
        if usize::from(self.queue.free()) < burst.len().max(self.reclaim_at.into()) {
            self.reclaim_sent(&mut sum);
        }
        let count = self.fitting(burst);
        match self.sender.header_len {
            SHORT => self.post::<SHORT>(burst, count, &mut sum),
            _ => self.post::<LONG>(burst, count, &mut sum),
        }
        let posted = count - (sum.runts + sum.oversize + sum.refused) as usize;
        if posted != 0 {
            self.in_flight += posted;
            self.queue.publish();
            if self.queue.needs_notify() {
                self.notifier.notify(self.queue.position());
            }
        }
        self.counters.add(sum);
        count
    }

    /// Posts the first `count` packets, for which there are entries, each behind a header of `LEN` bytes.
    #[inline]
    fn post<const LEN: usize>(&mut self, burst: &mut Burst<Packet>, count: usize, sum: &mut Values) {
        let (sender, space, max) = (&self.sender, self.sender.space.view(), self.sender.max_plain);
        let mut packets = burst.drain(count);
        loop {
            let mut odd = None;
            self.queue.add_burst(count, || match plain::<LEN>(packets.next()?, max, space) {
                Ok(posted) => Some(posted),
                Err(packet) => {
                    odd = Some(packet);
                    None
                }
            });
            // A packet that takes no entry, as it can not be sent at all, may come when none is free.
            match odd.or_else(|| packets.next()) {
                Some(packet) => sender.send(packet, &mut self.queue, sum),
                None => return,
            }
        }
    }

    fn reclaim(&mut self) -> usize {
        self.device.lend(self.index.into());
        if self.status.is_running() {
            let mut sum = Values::default();
            self.reclaim_sent(&mut sum);
            self.counters.add(sum);
        }
        self.in_flight
    }

    /// How many packets from the front on there are entries for.
    #[inline]
    fn fitting(&self, burst: &[Packet]) -> usize {
        let mut free = usize::from(self.queue.free());
        if self.indirect {
            return burst.len().min(free);
        }
        let fits = |packet: &&Packet| {
            let left = free.checked_sub(self.sender.entries(packet));
            free = left.unwrap_or(free);
            left.is_some()
        };
        burst.iter().take_while(fits).count()
    }

    /// Gives the buffers of all packets that were sent back, and counts these.
    fn reclaim_sent(&mut self, sum: &mut Values) {
        loop {
            let done = &mut self.done;
            // There is room for as many.
            let taken = self.queue.take_burst(DONE, |packet, _| _ = done.push(packet).map_err(discard));
            let mut bytes = 0;
            for packet in done.iter() {
                bytes += packet.data().len() - self.sender.header_len;
                if packet.next().is_some() || self.sender.max_plain == 0 {
                    bytes += self.sender.take_back(packet);
                }
            }
            self.in_flight -= done.len();
            sum.packets += done.len() as u64;
            sum.bytes += bytes as u64;
            done.free();
            match taken {
                Ok(DONE) => {}
                Ok(_) => {
                    if sum.packets == 0 && self.device.is_gone() {
                        self.status.break_down(GONE);
                    }
                    return;
                }
                Err(broken) => {
                    sum.broken += u64::from(self.status.break_down(broken.why));
                    return;
                }
            }
        }
    }
}

/// Makes a buffer of a packet in one piece that has headroom and no offloads, and is not longer than `max`; gives any
/// other back, and one with which something is wrong.
#[allow(
    clippy::inline_always,
    reason = "a call for each packet, with its result in memory, costs a fifth of a burst"
)]
#[inline(always)]
fn plain<const LEN: usize>(
    mut packet: Packet,
    max: usize,
    space: View<'_>,
) -> Result<(Packet, Buffer), Packet> {
    let data = packet.data();
    let len = data.len();
    if !packet.is_plain() || len < MIN_FRAME || !fits(data, len, max) {
        return Err(packet);
    }
    let Some(header) = packet.prepend(LEN) else { return Err(packet) };
    header.copy_from_slice(&[0; LEN]);
    let Some(iova) = space.iova(&packet) else {
        packet.trim_front(LEN);
        return Err(packet);
    };
    Ok((packet, Buffer::readable(iova, (len + LEN) as u32)))
}

impl Sender {
    /// How many entries of a ring without indirect descriptors a packet takes, at most; 0 for one that has too many
    /// buffers.
    #[inline]
    fn entries(&self, packet: &Packet) -> usize {
        let has_room = packet.headroom() >= self.header_len + TAG;
        if packet.next().is_none() && has_room {
            return 1;
        }
        let entries = packet.segments().count() + usize::from(!has_room);
        if entries > self.max_chain { 0 } else { entries }
    }

    /// Posts a packet of any kind, for which there are entries; or drops and counts it.
    #[inline(never)]
    fn send<Q: Virtqueue<Token = Packet>>(&self, mut packet: Packet, queue: &mut Q, sum: &mut Values) {
        let len = wire_len(&packet);
        if len < MIN_FRAME {
            sum.runts += 1;
            return;
        }
        let tag = len - packet.len();
        let is_short_enough = match packet.tx_offload() {
            Some(TxOffload { segment, l2_len, .. }) if segment != 0 => {
                len <= MAX_SEGMENTED + usize::from(l2_len) + tag
            }
            _ if tag != 0 => len <= self.max + tag,
            _ => fits(packet.data(), len, self.max),
        };
        if !is_short_enough {
            sum.oversize += 1;
            return;
        }
        let posted = (self.entries(&packet) != 0)
            .then(|| self.header(&mut packet, len))
            .flatten()
            .and_then(|header| self.with_front(packet, header))
            .and_then(|packet| self.post(packet, queue));
        if posted.is_none() {
            sum.refused += 1;
        }
    }

    /// The header of a packet that is `len` bytes long as it is sent; `None` if it asks for what was not granted, or its
    /// headers are not where it says.
    fn header(&self, packet: &mut Packet, len: usize) -> Option<Header> {
        let granted = |offloads, wanted: bool| !wanted || self.offloads.contains(offloads);
        let tag = packet.vlan().map_or(0, |_| TAG);
        if !granted(Offloads::TX_VLAN, tag != 0) {
            return None;
        }
        let Some(offload) = packet.tx_offload() else { return Some(Header::default()) };
        let (segments, checksum_offset, gso_type) = match (offload.transport, offload.ipv6) {
            (Transport::Tcp, false) => (Offloads::TX_TCP_SEGMENT, 16, gso::TCPV4),
            (Transport::Tcp, true) => (Offloads::TX_TCP_SEGMENT, 16, gso::TCPV6),
            (Transport::Udp, _) => (Offloads::TX_UDP_SEGMENT, 6, gso::UDP_L4),
        };
        let segment = offload.segment != 0;
        // What is cut into segments has its checksums computed for each of them.
        let checksum = !segment && (offload.l4_checksum || offload.ip_checksum);
        if !granted(segments, segment) || !granted(Offloads::TX_CHECKSUM, checksum) {
            return None;
        }
        let l4_start = tag + usize::from(offload.l2_len) + usize::from(offload.l3_len);
        let mut header = Header::default();
        if offload.l4_checksum || segment {
            if l4_start + checksum_offset + 2 > len {
                return None;
            }
            header.flags = header_flag::NEEDS_CSUM;
            header.csum_start = l4_start as u16;
            header.csum_offset = checksum_offset as u16;
        }
        if segment {
            let headers = l4_start + usize::from(offload.l4_len);
            let frame = headers + usize::from(offload.segment);
            let fits = if tag != 0 { frame <= self.max + tag } else { fits(packet.data(), frame, self.max) };
            if headers >= len || !fits {
                return None;
            }
            header.gso_type = gso_type;
            header.hdr_len = headers as u16;
            header.gso_size = offload.segment;
        }
        if offload.ip_checksum && !offload.ipv6 {
            // The device has no such offload.
            let ip = usize::from(offload.l2_len)..usize::from(offload.l2_len) + usize::from(offload.l3_len);
            fill_ipv4_checksum(packet.data_mut().get_mut(ip)?)?;
        }
        Some(header)
    }

    /// Puts the header before the packet, and the VLAN tag into it: into its headroom, or else into a buffer of its own.
    fn with_front(&self, mut packet: Packet, header: Header) -> Option<Packet> {
        let mut front = [0; MAX_FRONT];
        let mut len = self.header_len;
        header.write_to_prefix(&mut front).ok()?;
        if let Some(tci) = packet.vlan() {
            front[len..][..ADDRESSES].copy_from_slice(packet.data().get(..ADDRESSES)?);
            packet.trim_front(ADDRESSES);
            front[len + ADDRESSES..][..2].copy_from_slice(&ethertype::VLAN.to_be_bytes());
            front[len + ADDRESSES + 2..][..2].copy_from_slice(&tci.to_be_bytes());
            len += ADDRESSES + TAG;
        }
        let front = &front[..len];
        if let Some(place) = packet.prepend(len) {
            place.copy_from_slice(front);
            return Some(packet);
        }
        let mut first = self.headers.alloc()?;
        first.append(len)?.copy_from_slice(front);
        first.chain(packet);
        Some(first)
    }

    /// Hands all segments out; `None` if one can not be.
    fn post<Q: Virtqueue<Token = Packet>>(&self, packet: Packet, queue: &mut Q) -> Option<()> {
        let mut buffers = [Buffer::readable(Iova::new(0), 0); MAX_CHAIN as usize];
        let mut count = 0;
        for segment in packet.segments().filter(|segment| !segment.data().is_empty()) {
            let iova = self.space.iova(segment)?;
            *buffers.get_mut(count)? = Buffer::readable(iova, segment.data().len() as u32);
            count += 1;
        }
        for segment in packet.segments() {
            self.space.hand_out(segment, Access::READ);
        }
        queue.add(packet, &buffers[..count]).map_err(|packet| self.take_back(&packet)).ok()
    }

    /// The packet came back from the device. Returns the bytes behind its first segment.
    #[cold]
    fn take_back(&self, packet: &Packet) -> usize {
        packet.segments().for_each(|segment| self.space.take_back(segment, Access::READ));
        packet.len() - packet.data().len()
    }
}

/// Computes the checksum of an IPv4 header (RFC 791, 3.1); `None` if it is none.
fn fill_ipv4_checksum(header: &mut [u8]) -> Option<()> {
    const CHECKSUM: Range<usize> = 10..12;
    if header.len() < 20 {
        return None;
    }
    header[CHECKSUM].fill(0);
    let sum = checksum::of(header);
    header[CHECKSUM].copy_from_slice(&sum.to_be_bytes());
    Some(())
}

impl<Q: Virtqueue<Token = Packet> + Send> Ring for TxRing<Q> {
    fn close(&mut self) {
        let mut sum = Values::default();
        self.reclaim_sent(&mut sum);
        let sender = &self.sender;
        self.queue.reset(|packet| {
            sender.take_back(&packet);
            sum.unsent += 1;
        });
        self.in_flight = 0;
        self.counters.add(sum);
    }
}

impl<Q: Virtqueue<Token = Packet> + Send + 'static> TxQueue for Lease<TxRing<Q>> {
    fn tx_burst(&mut self, burst: &mut Burst<Packet>) -> usize {
        self.ring_mut().map_or(0, |ring| ring.burst(burst))
    }

    fn reclaim(&mut self) -> usize {
        self.ring_mut().map_or(0, TxRing::reclaim)
    }

    fn state(&self) -> State {
        self.ring().map_or(State::Gone, |ring| ring.status.get())
    }

    fn index(&self) -> u16 {
        self.ring().map_or(0, |ring| ring.index)
    }
}

impl<Q: Virtqueue<Token = Packet>> fmt::Debug for TxRing<Q> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TxRing")
            .field("device", &self.device)
            .field("index", &self.index)
            .field("state", &self.status.get())
            .field("in_flight", &self.in_flight)
            .finish_non_exhaustive()
    }
}
