//! From the peer to the receive queue ("Processing of Incoming Packets", 5.1.6.4).

use std::collections::VecDeque;
use std::mem;

use underpass::net::checksum;
use underpass::net::headers::{Headers, Ip};
use zerocopy::IntoBytes;

use super::engine::{BURST, BURST_BYTES, Context};
use super::inbox::{Held, Inbox};
use super::peer::{Frame, Offload, Peer, SegmentKind};
use super::report::Count;
use super::rules::{Hash, Rules};
use super::spec::Features;
use super::spec::net::{HashHeader, Header, gso, header_flag, receive_queue};
use super::virtqueue::{Broken, Chain, Segment, Virtqueue};

/// Where the flags of a TCP header are, and which of them is CWR (RFC 3168, section 6.1).
const TCP_FLAGS: usize = 13;
const TCP_CWR: u8 = 0x80;

/// The receiving half of a queue pair.
///
/// A frame that there is no buffer for waits; nothing is lost because a driver is slow.
pub(super) struct Receiver {
    queue: Option<Virtqueue>,
    segments: Vec<Segment>,
    chains: Vec<Chain>,
    /// The next frame of the inbox.
    waiting: Option<Held>,
    /// Frames of this engine's own peer that there was no room for where they go, the oldest first.
    backlog: VecDeque<Held>,
    /// The queue of flows of which nothing is known, if they are not to be spread.
    usual: Option<u16>,
    spare: Vec<Held>,
}

impl Receiver {
    pub(super) fn new() -> Self {
        Self {
            queue: None,
            segments: Vec::with_capacity(64),
            chains: Vec::with_capacity(64),
            waiting: None,
            backlog: VecDeque::new(),
            usual: None,
            spare: Vec::new(),
        }
    }

    /// The queue is there, or no more; frames that waited for a buffer go with the old one. Returns how many those were.
    pub(super) fn set_queue(&mut self, queue: Option<Virtqueue>, inbox: &Inbox) -> u64 {
        self.queue = queue;
        let waiting = self.waiting.take().map_or(0, |held| {
            inbox.give_back(held);
            1
        });
        waiting + inbox.clear()
    }

    /// Drops the frames of its own peer that it holds, and returns how many those were.
    pub(super) fn clear(&mut self) -> u64 {
        let dropped = self.backlog.len() as u64;
        self.backlog = VecDeque::new();
        dropped
    }

    /// Receives up to a burst of each source. Returns whether there was any work.
    #[inline]
    pub(super) fn step(&mut self, context: &mut Context<'_>, peer: &mut dyn Peer) -> Result<bool, Broken> {
        let (device, pair) = (context.device, context.pair);
        let index = receive_queue(pair);
        let mut worked = false;
        let mine = context.rules.steering.uses(pair);
        let ready = match &mut self.queue {
            Some(queue) if mine => device.has_available(context.bus, queue, index)?,
            // Its frames, if it gets any, are for others.
            _ => !mine,
        };
        if ready {
            self.usual = peer.sorts_flows().then_some(pair);
            worked |= self.empty_inbox(context, mine)?;
            worked |= self.receive(context, peer)?;
        }
        if let Some(queue) = &mut self.queue
            && queue.flush(context.bus)?
        {
            device.interrupt_queue(index);
        }
        Ok(worked)
    }

    /// Delivers what other engines had for this one; if it receives no more (`mine`), drops that.
    fn empty_inbox(&mut self, context: &mut Context<'_>, mine: bool) -> Result<bool, Broken> {
        let (device, pair) = (context.device, context.pair);
        let inbox = &device.inboxes[usize::from(pair)];
        let mut frames = 0;
        while frames < BURST {
            let Some(held) = self.waiting.take().or_else(|| inbox.take()) else { break };
            if mine {
                let delivered = self.deliver(context, held.frame(), held.hash);
                if delivered != Ok(true) {
                    self.waiting = Some(held);
                    delivered?;
                    break;
                }
            } else {
                device.add(pair, Count::RxNoQueue, 1);
            }
            inbox.give_back(held);
            frames += 1;
        }
        Ok(frames > 0)
    }

    /// Takes frames from the backlog and then from the peer.
    fn receive(&mut self, context: &mut Context<'_>, peer: &mut dyn Peer) -> Result<bool, Broken> {
        let (mut frames, mut bytes) = (0, 0);
        while frames < BURST
            && bytes < BURST_BYTES
            && let Some(held) = self.backlog.pop_front()
        {
            let routed = self.route(context, held.frame());
            if routed != Ok(true) {
                self.backlog.push_front(held);
                routed?;
                return Ok(frames > 0);
            }
            frames += 1;
            bytes += held.frame().bytes.len();
            if self.spare.len() < BURST {
                self.spare.push(held);
            }
        }
        while frames < BURST && bytes < BURST_BYTES && context.device.link_is_up() {
            let Some(frame) = peer.receive() else { break };
            frames += 1;
            bytes += frame.bytes.len();
            if takes(context.rules, &frame) {
                let routed = self.route(context, frame);
                if routed != Ok(true) {
                    self.hold(frame);
                    routed?;
                    break;
                }
            } else {
                self.finish(context, frame)?;
                if !self.backlog.is_empty() {
                    break;
                }
            }
        }
        Ok(frames > 0)
    }

    /// Finishes a frame that the driver would not take as it is. A burst of its segments goes where they are to go, the others
    /// wait for the next step.
    #[cold]
    fn finish(&mut self, context: &mut Context<'_>, frame: Frame<'_>) -> Result<(), Broken> {
        let mut finisher = mem::take(context.finisher);
        let mut result = Ok(());
        let mut routed = 0;
        finisher.finish(frame, |bytes| {
            let frame = Frame::finished(bytes);
            if result.is_ok() && self.backlog.is_empty() && routed < BURST {
                match self.route(context, frame) {
                    Ok(true) => {
                        routed += 1;
                        return;
                    }
                    Ok(false) => {}
                    Err(broken) => result = Err(broken),
                }
            }
            self.hold(frame);
        });
        *context.finisher = finisher;
        result
    }

    /// Keeps a frame for the next step.
    fn hold(&mut self, frame: Frame<'_>) {
        let mut held = self.spare.pop().unwrap_or_default();
        held.set(frame, None);
        self.backlog.push_back(held);
    }

    /// Brings a frame to its queue. False: there is no room.
    #[inline]
    fn route(&mut self, context: &mut Context<'_>, frame: Frame<'_>) -> Result<bool, Broken> {
        let (device, pair) = (context.device, context.pair);
        let Some(way) = context.rules.route(frame.bytes, &device.flows, device.receiving(), self.usual)
        else {
            device.add(pair, Count::RxFiltered, 1);
            return Ok(true);
        };
        match way.queue {
            Some(queue) if queue == pair => self.deliver(context, frame, way.hash),
            Some(queue) => Ok(device.inboxes[usize::from(queue)].put(frame, way.hash)),
            None => {
                device.add(pair, Count::RxNoQueue, 1);
                Ok(true)
            }
        }
    }

    /// Writes a frame into the driver's buffers. False: there are too few.
    #[inline]
    fn deliver(
        &mut self,
        context: &mut Context<'_>,
        frame: Frame<'_>,
        hash: Option<Hash>,
    ) -> Result<bool, Broken> {
        let (device, pair, rules) = (context.device, context.pair, context.rules);
        let Some(queue) = &mut self.queue else {
            device.add(pair, Count::RxNoQueue, 1);
            return Ok(true);
        };
        let is_large = frame.offload.segment.is_none() && frame.bytes.len() > rules.max_frame;
        let mark = queue.mark();
        self.segments.clear();
        self.chains.clear();
        let wanted = rules.header_len + frame.bytes.len();
        let (mut room, mut slots) = (0, 0);
        while room < wanted && !is_large {
            let Some(chain) = queue.take(context.bus, &mut self.segments)? else {
                if slots < queue.size() {
                    queue.rewind(mark);
                    return Ok(false);
                }
                // The driver can not add any buffer.
                break;
            };
            if chain.readable != 0 {
                return Err(Broken::Rule("a receive buffer has a part to read"));
            }
            let mergeable = rules.has(Features::MRG_RXBUF);
            if mergeable && (chain.writable as usize) < rules.header_len {
                return Err(Broken::Rule("a receive buffer is shorter than the header"));
            }
            room += chain.writable as usize;
            slots += chain.slots;
            self.chains.push(chain);
            if !mergeable {
                break;
            }
        }
        if room < wanted {
            queue.rewind(mark);
            device.add(pair, Count::RxOversize, 1);
            return Ok(true);
        }
        let header = header(rules, &frame, hash, self.chains.len() as u16);
        let mut header = &header.as_bytes()[..rules.header_len];
        let mut bytes = frame.bytes;
        for segment in &self.segments {
            let (mut iova, mut len) = (segment.iova, segment.len as usize);
            for source in [&mut header, &mut bytes] {
                let part = source.split_off(..len.min(source.len())).unwrap_or_default();
                if !part.is_empty() {
                    context.bus.write(None, iova, part)?;
                    iova = iova.wrapping_add(part.len() as u64);
                    len -= part.len();
                }
            }
        }
        let mut left = wanted;
        for chain in &self.chains {
            let written = left.min(chain.writable as usize);
            queue.put(chain, written as u32);
            left -= written;
        }
        device.add(pair, Count::RxFrames, 1);
        device.add(pair, Count::RxBytes, frame.bytes.len() as u64);
        Ok(true)
    }
}

/// Whether the driver takes the frame as it is.
#[inline]
fn takes(rules: &Rules, frame: &Frame<'_>) -> bool {
    if frame.offload == Offload::default() {
        return true;
    }
    let mut needed = Features::GUEST_CSUM;
    if let Some(segment) = frame.offload.segment {
        needed |= match segment.kind {
            SegmentKind::Tcp4 => Features::GUEST_TSO4,
            SegmentKind::Tcp6 => Features::GUEST_TSO6,
            SegmentKind::Udp if Headers::parse(frame.bytes).ip == Some(Ip::V6) => Features::GUEST_USO6,
            SegmentKind::Udp => Features::GUEST_USO4,
        };
        if is_ecn(frame) {
            needed |= Features::GUEST_ECN;
        }
    }
    rules.offloads.contains(needed)
}

/// Whether it is a TCP segment to be cut that has CWR set, which is what the ECN of the offloads is about.
fn is_ecn(frame: &Frame<'_>) -> bool {
    let Offload { checksum: Some((start, _)), segment: Some(segment) } = frame.offload else { return false };
    let flags = frame.bytes.get(usize::from(start) + TCP_FLAGS);
    segment.kind != SegmentKind::Udp && flags.is_some_and(|flags| flags & TCP_CWR != 0)
}

/// The header in front of the frame.
#[inline]
fn header(rules: &Rules, frame: &Frame<'_>, hash: Option<Hash>, num_buffers: u16) -> HashHeader {
    let mut header = Header { num_buffers, ..Header::default() };
    if let Some((start, offset)) = frame.offload.checksum {
        header.flags = header_flag::NEEDS_CSUM;
        (header.csum_start, header.csum_offset) = (start, offset);
    } else if rules.offloads.contains(Features::GUEST_CSUM) {
        let headers = Headers::parse(frame.bytes);
        if checksum::check_l4(frame.bytes, &headers) == Some(true) {
            header.flags = header_flag::DATA_VALID;
        }
    }
    if let Some(segment) = frame.offload.segment {
        let ecn = if is_ecn(frame) { gso::ECN } else { 0 };
        header.gso_type = ecn
            | match segment.kind {
                SegmentKind::Tcp4 => gso::TCPV4,
                SegmentKind::Tcp6 => gso::TCPV6,
                SegmentKind::Udp => gso::UDP_L4,
            };
        (header.gso_size, header.hdr_len) = (segment.size, segment.header_len);
    }
    let Hash { value, report } = hash.unwrap_or_default();
    HashHeader { header, hash_report: report, ..HashHeader::default() }.with_hash(value)
}
