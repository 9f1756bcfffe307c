//! From the transmit queue to the peer ("Packet Transmission", 5.1.6.2).

use std::mem::offset_of;
use std::ops::Range;

use underpass::net::MIN_FRAME;
use underpass::net::headers::{Headers, Ip, protocol};
use zerocopy::FromBytes;

use super::engine::{BURST, BURST_BYTES, Context};
use super::peer::{Frame, Offload, Peer, Segment as Cut, SegmentKind};
use super::report::Count;
use super::rules::{Rules, Steering};
use super::spec::Features;
use super::spec::net::{HashHeader, Header, gso, header_flag, transmit_queue};
use super::virtqueue::{Broken, Chain, Segment, Virtqueue};

/// The longest frame that is sent to be segmented: what its IP header can tell of, and the Ethernet header with tags.
const MAX_FRAME: usize = 65535 + 40 + 22;

/// Segments that a frame is cut into at most. A driver that asks for more, such as for segments of one byte, would have the
/// device work on one frame for as long as it otherwise does on thousands.
const MAX_SEGMENTS: usize = 2048;

/// Where the header counts buffers, which one to send does not.
const NUM_BUFFERS: usize = offset_of!(Header, num_buffers);

/// The transmitting half of a queue pair.
pub(super) struct Transmitter {
    queue: Option<Virtqueue>,
    segments: Vec<Segment>,
    /// The frame at hand, behind its header.
    bytes: Box<[u8]>,
    /// A frame in `bytes` that the peer had no room for.
    refused: Option<Refused>,
}

/// What becomes of a frame.
enum Fate {
    /// It is sent as it is.
    Send,
    /// Its header asks for something.
    Ask,
    Drop(Count),
}

/// What a step has done.
#[derive(Default)]
struct Done {
    /// Frames that the driver sent.
    frames: usize,
    /// Frames that left, segments each for itself, and their bytes.
    sent: u64,
    bytes: u64,
}

impl Done {
    fn leaves(&mut self, bytes: usize) {
        self.sent += 1;
        self.bytes += bytes as u64;
    }
}

struct Refused {
    chain: Chain,
    offload: Offload,
    /// Where in `bytes` it is.
    range: Range<usize>,
}

impl Transmitter {
    pub(super) fn new() -> Self {
        Self {
            queue: None,
            segments: Vec::with_capacity(64),
            bytes: vec![0; MAX_FRAME + size_of::<HashHeader>()].into(),
            refused: None,
        }
    }

    /// The queue is there, or no more; a frame that was held back goes with the old one. Returns how many that were.
    pub(super) fn set_queue(&mut self, queue: Option<Virtqueue>) -> u64 {
        self.queue = queue;
        self.refused.take().map_or(0, |_| 1)
    }

    /// Sends up to a burst. Returns whether there was any work.
    #[inline]
    pub(super) fn step(&mut self, context: &mut Context<'_>, peer: &mut dyn Peer) -> Result<bool, Broken> {
        let mut done = Done::default();
        let result = self.send(context, peer, &mut done);
        // Those before a broken one are sent.
        if done.frames > 0 {
            let (device, pair) = (context.device, context.pair);
            device.add(pair, Count::TxFrames, done.frames as u64);
            device.add(pair, Count::TxSent, done.sent);
            device.add(pair, Count::TxBytes, done.bytes);
        }
        result?;
        Ok(done.frames > 0)
    }

    /// Sends up to a burst, and adds to `done` what that was.
    #[inline]
    fn send(
        &mut self,
        context: &mut Context<'_>,
        peer: &mut dyn Peer,
        done: &mut Done,
    ) -> Result<(), Broken> {
        let Some(queue) = &mut self.queue else { return Ok(()) };
        let (device, pair, rules) = (context.device, context.pair, context.rules);
        let index = transmit_queue(pair);
        // A segment counts as a frame: what is bounded is the work.
        let (mut segments, mut bytes) = (0, 0);
        if let Some(refused) = &self.refused {
            let frame = Frame { bytes: &self.bytes[refused.range.clone()], offload: refused.offload };
            if !peer.transmit(frame) {
                return Ok(());
            }
            done.leaves(refused.range.len());
            queue.put(&refused.chain, 0);
            self.refused = None;
            done.frames += 1;
        } else if !device.has_available(context.bus, queue, index)? {
            return Ok(());
        }
        while done.frames + segments < BURST && bytes < BURST_BYTES {
            self.segments.clear();
            let Some(chain) = queue.take(context.bus, &mut self.segments)? else { break };
            if pair >= rules.transmitting {
                return Err(Broken::Rule("a frame was sent on a queue pair that is not in use"));
            }
            bytes += chain.readable as usize;
            let range = rules.header_len..chain.readable as usize;
            let offload = match fetch(context, &self.segments, &chain, &mut self.bytes)? {
                Fate::Send => Ok(Offload::default()),
                Fate::Ask => offload(&self.bytes[..range.end], rules)?,
                Fate::Drop(count) => Err(count),
            };
            let offload = match offload {
                Ok(offload) => offload,
                Err(count) => {
                    device.add(pair, count, 1);
                    queue.put(&chain, 0);
                    done.frames += 1;
                    continue;
                }
            };
            let frame = Frame { bytes: &self.bytes[range.clone()], offload };
            if matches!(rules.steering, Steering::Flows(_)) {
                device.flows.learn(frame.bytes, pair);
            }
            if offload == Offload::default() || peer.carries_offloads() {
                if !peer.transmit(frame) {
                    self.refused = Some(Refused { chain, offload, range });
                    break;
                }
                done.leaves(range.len());
            } else {
                context.finisher.finish(frame, |bytes| {
                    segments += 1;
                    // Such a peer never refuses.
                    peer.transmit(Frame::finished(bytes));
                    done.leaves(bytes.len());
                });
            }
            queue.put(&chain, 0);
            done.frames += 1;
        }
        if queue.flush(context.bus)? {
            device.interrupt_queue(index);
        }
        Ok(())
    }
}

/// Gets a frame into `bytes`, with its header in front.
#[inline]
fn fetch(
    context: &mut Context<'_>,
    segments: &[Segment],
    chain: &Chain,
    bytes: &mut [u8],
) -> Result<Fate, Broken> {
    let rules = context.rules;
    let len = chain.readable as usize;
    if len < rules.header_len {
        return Err(Broken::Rule("a buffer to send is shorter than its header"));
    }
    if len - rules.header_len > MAX_FRAME {
        return Ok(Fate::Drop(Count::TxOversize));
    }
    let mut at = 0;
    for segment in &segments[..chain.reads.into()] {
        let end = at + segment.len as usize;
        context.bus.read(None, segment.iova, &mut bytes[at..end])?;
        at = end;
    }
    let (header, frame) = bytes[..len].split_at(rules.header_len);
    Ok(if !context.device.link_is_up() {
        Fate::Drop(Count::TxLinkDown)
    } else if frame.len() < MIN_FRAME {
        Fate::Drop(Count::TxRunts)
    } else if header[..NUM_BUFFERS + 2] != [0; NUM_BUFFERS + 2] {
        Fate::Ask
    } else if frame.len() > rules.max_frame {
        Fate::Drop(Count::TxOversize)
    } else {
        Fate::Send
    })
}

/// The rules of the header that hold whatever the frame is.
fn check_header(header: &Header, features: Features) -> Result<(), Broken> {
    let rule = |rule| Err(Broken::Rule(rule));
    let needs_checksum = header.flags & header_flag::NEEDS_CSUM != 0;
    if header.num_buffers != 0 {
        return rule("num_buffers is not zero in the header of a frame to send");
    }
    if header.flags & (header_flag::DATA_VALID | header_flag::RSC_INFO) != 0 {
        return rule("the header of a frame to send has flags of received ones");
    }
    if needs_checksum && !features.contains(Features::CSUM) {
        return rule("a checksum is left to the device without CSUM");
    }
    let (kind, ecn) = (header.gso_type & !gso::ECN, header.gso_type & gso::ECN != 0);
    let needed = match kind {
        gso::NONE if ecn => return rule("ECN is told of a frame that is not to be segmented"),
        gso::NONE => return Ok(()),
        gso::TCPV4 => Features::HOST_TSO4,
        gso::TCPV6 => Features::HOST_TSO6,
        gso::UDP_L4 if !ecn => Features::HOST_USO,
        _ => return rule("the kind of segmentation is unknown"),
    };
    if !features.contains(needed) || ecn && !features.contains(Features::HOST_ECN) {
        return rule("segmentation is left to the device without the feature");
    }
    if !needs_checksum || header.gso_size == 0 {
        return rule("segmentation is asked for without a checksum, or without a size");
    }
    Ok(())
}

/// What is asked for the frame behind its header. Where that can not be done, the fault may be the packet's and not the
/// driver's: it is dropped and counted.
#[inline(never)]
fn offload(bytes: &[u8], rules: &Rules) -> Result<Result<Offload, Count>, Broken> {
    let (header, frame) = bytes.split_at(rules.header_len);
    let header = Header::read_from_prefix(header).map(|(header, _)| header).unwrap_or_default();
    check_header(&header, rules.features)?;
    Ok(asked(&header, frame, rules))
}

fn asked(header: &Header, frame: &[u8], rules: &Rules) -> Result<Offload, Count> {
    let mut offload = Offload::default();
    if header.flags & header_flag::NEEDS_CSUM != 0 {
        let field = usize::from(header.csum_start) + usize::from(header.csum_offset);
        if field + 2 > frame.len() {
            return Err(Count::TxMalformed);
        }
        offload.checksum = Some((header.csum_start, header.csum_offset));
    }
    let kind = match header.gso_type & !gso::ECN {
        gso::TCPV4 => SegmentKind::Tcp4,
        gso::TCPV6 => SegmentKind::Tcp6,
        gso::UDP_L4 => SegmentKind::Udp,
        _ if frame.len() > rules.max_frame => return Err(Count::TxOversize),
        _ => return Ok(offload),
    };
    // The headers are looked for, since hdr_len is not to be relied on.
    let headers = Headers::parse(frame);
    let (ip_fits, transport, checksum) = match kind {
        SegmentKind::Tcp4 => (headers.ip == Some(Ip::V4), protocol::TCP, 16),
        SegmentKind::Tcp6 => (headers.ip == Some(Ip::V6), protocol::TCP, 16),
        SegmentKind::Udp => (headers.ip.is_some(), protocol::UDP, 6),
    };
    let header_len = headers.payload_offset();
    let fits = ip_fits
        && headers.protocol == transport
        && headers.l4_len > 0
        && offload.checksum == Some((headers.l4_offset() as u16, checksum))
        && header_len - headers.l2_len as usize + usize::from(header.gso_size) <= u16::MAX.into()
        && frame.len() - header_len <= MAX_SEGMENTS * usize::from(header.gso_size)
        && (!rules.has(Features::GUEST_HDRLEN) || usize::from(header.hdr_len) == header_len);
    if !fits {
        return Err(Count::TxMalformed);
    }
    offload.segment = Some(Cut { kind, size: header.gso_size, header_len: header_len as u16 });
    Ok(offload)
}
