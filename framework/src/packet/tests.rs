use proptest::prelude::*;
use underpass_iommu::soft::{Bus, DmaFault, SoftIommu, SoftOptions};
use underpass_iommu::{Access, Attachment, FaultReason, IommuBackend};

use super::*;
use crate::dma::DmaSpace;
use crate::{Burst, Pool};

const BUFFER: usize = HEADROOM as usize + 200;

fn pool(count: usize) -> Pool {
    Pool::builder(count).buffer_len(BUFFER as u32).cache(0).build().unwrap()
}

/// One segment as a reference: the whole buffer, and which of its bytes are the segment's.
#[derive(Debug, Clone)]
struct Model {
    buffer: Vec<u8>,
    start: usize,
    end: usize,
}

#[derive(Debug, Clone, Copy)]
enum Step {
    Prepend(usize, u8),
    Append(usize, u8),
    TrimFront(usize),
    Truncate(usize),
    Reset(u32),
    Post(u32),
    Received(u32, u32),
    Write(usize, u8),
    Chain(usize),
    TakeNext,
    /// Goes on with another segment of the chain.
    Move(usize),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let len = || prop_oneof![4 => 0..40_usize, 1 => 0..2 * BUFFER, 1 => Just(usize::MAX)];
    let small = || prop_oneof![8 => 0..400_u32, 1 => Just(u32::MAX)];
    let step = prop_oneof![
        (len(), any::<u8>()).prop_map(|(len, fill)| Step::Prepend(len, fill)),
        (len(), any::<u8>()).prop_map(|(len, fill)| Step::Append(len, fill)),
        len().prop_map(Step::TrimFront),
        len().prop_map(Step::Truncate),
        small().prop_map(Step::Reset),
        small().prop_map(Step::Post),
        (small(), small()).prop_map(|(header, written)| Step::Received(header, written)),
        (len(), any::<u8>()).prop_map(|(at, value)| Step::Write(at, value)),
        (1..4_usize).prop_map(Step::Chain),
        Just(Step::TakeNext),
        (0..4_usize).prop_map(Step::Move),
    ];
    prop::collection::vec(step, 1..60)
}

impl Model {
    fn new() -> Self {
        Self { buffer: vec![0; BUFFER], start: 128, end: 128 }
    }

    fn data(&self) -> &[u8] {
        &self.buffer[self.start..self.end]
    }

    fn len(&self) -> usize {
        self.end - self.start
    }

    /// Does a step here and to the packet, and compares what comes of it.
    fn step(&mut self, packet: &mut Packet, step: Step) {
        match step {
            Step::Prepend(len, fill) => {
                let fits = len <= self.start;
                if fits {
                    self.start -= len;
                    self.buffer[self.start..][..len].fill(fill);
                }
                assert_eq!(
                    packet.prepend(len).map(|bytes| (bytes.len(), bytes.fill(fill)).0),
                    fits.then_some(len)
                );
            }
            Step::Append(len, fill) => {
                let fits = len <= BUFFER - self.end;
                if fits {
                    self.buffer[self.end..][..len].fill(fill);
                    self.end += len;
                }
                assert_eq!(
                    packet.append(len).map(|bytes| (bytes.len(), bytes.fill(fill)).0),
                    fits.then_some(len)
                );
            }
            Step::TrimFront(len) => {
                let fits = len <= self.len();
                self.start += if fits { len } else { 0 };
                assert_eq!(packet.trim_front(len), fits);
            }
            Step::Truncate(len) => {
                let fits = len <= self.len();
                self.end = if fits { self.start + len } else { self.end };
                assert_eq!(packet.truncate(len), fits);
            }
            Step::Reset(headroom) => {
                self.start = BUFFER.min(headroom as usize);
                self.end = self.start;
                packet.reset(headroom);
            }
            Step::Post(headroom) => {
                (self.start, self.end) = (BUFFER.min(headroom as usize), BUFFER);
                packet.post(headroom);
            }
            Step::Received(header, written) => {
                let (skipped, all) = (header as usize, written as usize);
                let fits = skipped <= all && all <= self.len();
                if fits {
                    (self.start, self.end) = (self.start + skipped, self.start + all);
                }
                assert_eq!(packet.received(header, written, 1, 2), fits);
            }
            Step::Write(at, value) => {
                let bytes = &mut self.buffer[self.start..self.end];
                let theirs = packet.data_mut();
                assert_eq!(bytes.get_mut(at).map(|b| *b = value), theirs.get_mut(at).map(|b| *b = value));
            }
            Step::Chain(_) | Step::TakeNext | Step::Move(_) => unreachable!("a matter of several segments"),
        }
    }
}

fn nth(packet: &mut Packet, n: usize) -> &mut Packet {
    if n == 0 { packet } else { nth(packet.next_mut().unwrap(), n - 1) }
}

proptest! {
    #[test]
    fn packets_do_as_vectors_do(steps in steps()) {
        let pool = pool(64);
        let mut packet = pool.alloc().unwrap();
        packet.prepend(128).unwrap().fill(0);
        packet.append(200).unwrap().fill(0);
        packet.reset(HEADROOM);
        let mut models = vec![Model::new()];
        let mut at = 0;
        for step in steps {
            match step {
                Step::Chain(count) => {
                    if models.len() > 40 {
                        continue;
                    }
                    let mut tail: Option<Packet> = None;
                    for n in 0..count {
                        let mut head = pool.alloc().unwrap();
                        head.reset(0);
                        head.append(BUFFER).unwrap().fill(n as u8);
                        if let Some(tail) = tail {
                            head.chain(tail);
                        }
                        tail = Some(head);
                        models.insert(models.len() - n, Model { buffer: vec![n as u8; BUFFER], start: 0, end: BUFFER });
                    }
                    // Wherever in the chain it is done, the end is the same.
                    nth(&mut packet, at).chain(tail.unwrap());
                }
                Step::TakeNext => {
                    let rest = nth(&mut packet, at).take_next();
                    prop_assert_eq!(rest.map_or(0, |rest| rest.segments().count()), models.len() - at - 1);
                    models.truncate(at + 1);
                }
                Step::Move(to) => at = to.min(models.len() - 1),
                Step::Reset(_) => {
                    models.truncate(at + 1);
                    models[at].step(nth(&mut packet, at), step);
                }
                _ => models[at].step(nth(&mut packet, at), step),
            }
            prop_assert_eq!(packet.segments().count(), models.len());
            for (segment, model) in packet.segments().zip(&models) {
                prop_assert_eq!(segment.data(), model.data());
                prop_assert_eq!((segment.headroom(), segment.tailroom()), (model.start, BUFFER - model.end));
            }
            let len: usize = models.iter().map(Model::len).sum();
            prop_assert_eq!((packet.len(), packet.is_empty()), (len, len == 0));
            prop_assert_eq!(pool.outstanding(), models.len());
        }
        drop(packet);
        prop_assert_eq!(pool.outstanding(), 0);
    }

    /// Each field keeps what it was told last, whatever the others were told, until the packet is received anew.
    #[test]
    fn fields_are_apart(
        (hash, vlan, time) in any::<(Option<u32>, Option<u16>, Option<u64>)>(),
        checksum in prop::sample::select(&[Checksum::Unknown, Checksum::Good, Checksum::Bad, Checksum::Partial][..]),
        (l2_len, l3_len, l4_len, segment) in any::<(u8, u16, u8, u16)>(),
        (ipv6, udp, ip_checksum, l4_checksum) in any::<(bool, bool, bool, bool)>(),
        (port, queue) in any::<(u16, u16)>(),
        order in Just([0, 1, 2, 3, 4]).prop_shuffle(),
    ) {
        let pool = pool(1);
        let mut packet = pool.alloc().unwrap();
        let transport = if udp { Transport::Udp } else { Transport::Tcp };
        let offload =
            TxOffload { l2_len, l3_len, l4_len, ipv6, transport, ip_checksum, l4_checksum, segment };
        packet.append(50).unwrap();
        packet.set_vlan(Some(9));
        packet.set_checksum(Checksum::Partial);
        packet.set_tx_offload(Some(TxOffload { segment: 1, ipv6: true, transport: Transport::Udp, ..offload }));
        for field in order {
            match field {
                0 => hash.into_iter().for_each(|hash| packet.set_rss_hash(hash)),
                1 => packet.set_vlan(vlan),
                2 => time.into_iter().for_each(|time| packet.set_timestamp(time)),
                3 => packet.set_checksum(checksum),
                _ => packet.set_tx_offload(Some(offload)),
            }
        }
        prop_assert_eq!((packet.rss_hash(), packet.vlan(), packet.timestamp()), (hash, vlan, time));
        prop_assert_eq!((packet.checksum(), packet.port(), packet.queue()), (checksum, 0, 0));
        let asks = ip_checksum || l4_checksum || segment != 0;
        prop_assert_eq!(packet.tx_offload(), asks.then_some(offload));
        prop_assert_eq!((packet.len(), packet.headroom()), (50, 128));

        prop_assert!(packet.received(10, 50, queue, port));
        prop_assert_eq!((packet.len(), packet.headroom(), packet.port(), packet.queue()), (40, 138, queue, port));
        prop_assert_eq!((packet.rss_hash(), packet.vlan(), packet.timestamp()), (None, None, None));
        prop_assert_eq!((packet.checksum(), packet.tx_offload()), (Checksum::Unknown, None));
    }
}

#[test]
fn a_long_chain_is_freed_without_recursion() {
    let pool = Pool::builder(50_000).buffer_len(HEADROOM + 1).build().unwrap();
    let mut packet = pool.alloc().unwrap();
    while let Some(mut head) = pool.alloc() {
        head.append(1).unwrap();
        head.chain(packet);
        packet = head;
    }
    assert_eq!((packet.len(), packet.segments().count()), (49_999, 50_000));
    // A small stack for as many frames.
    std::thread::Builder::new().stack_size(64 << 10).spawn(move || drop(packet)).unwrap().join().unwrap();
    assert_eq!(pool.outstanding(), 0);
}

fn space(pool: &Pool) -> (DmaSpace, Bus, Attachment) {
    let iommu = SoftIommu::new(SoftOptions { check_leases: true, ..SoftOptions::default() });
    let device = iommu.device("soft:test");
    let ioas = iommu.alloc_ioas().unwrap();
    let attachment = ioas.attach(&device, None).unwrap();
    let mut space = DmaSpace::new(ioas);
    space.map(pool.region(), Access::READ_WRITE).unwrap();
    (space, device.bus(), attachment)
}

#[test]
fn a_device_reaches_posted_room_and_nothing_else() {
    let (pool, elsewhere) = (pool(4), pool(1));
    let (space, mut bus, _attachment) = space(&pool);
    assert!(space.iova(&elsewhere.alloc().unwrap()).is_none(), "its pool is not mapped");
    let mut burst = Burst::with_capacity(4);
    pool.alloc_raw(4, &mut burst);
    let mut packet = burst.pop().unwrap();
    packet.post(HEADROOM - 12);
    assert_eq!(packet.data().len(), 212);
    let at = space.hand_out(&packet, Access::WRITE).unwrap();
    let refused = |result: Result<(), DmaFault>| result.unwrap_err().reason;
    bus.write(None, at, b"twelve bytes").unwrap();
    bus.write(None, at.wrapping_add(12), b"frame").unwrap();
    bus.write(None, at.wrapping_add(211), b"x").unwrap();
    assert_eq!(refused(bus.write(None, at.wrapping_add(212), b"x")), FaultReason::NotLeased);
    assert_eq!(refused(bus.write(None, at.wrapping_add(u64::MAX), b"x")), FaultReason::NotLeased);
    space.take_back(&packet, Access::WRITE);
    assert_eq!(refused(bus.write(None, at, b"x")), FaultReason::NotLeased);
    assert!(!packet.received(12, 213, 3, 1), "more than there was");
    assert!(packet.received(12, 17, 3, 1));
    assert_eq!((packet.data(), packet.headroom(), packet.port(), packet.queue()), (&b"frame"[..], 128, 3, 1));

    // On its way out, with a header in front.
    packet.prepend(12).unwrap().fill(0);
    let at = space.hand_out(&packet, Access::READ).unwrap();
    let mut sent = [1; 17];
    bus.read(None, at, &mut sent).unwrap();
    assert_eq!(&sent, b"\0\0\0\0\0\0\0\0\0\0\0\0frame");
    assert_eq!(refused(bus.write(None, at, b"x")), FaultReason::NotLeased);
    space.take_back(&packet, Access::READ);
}
