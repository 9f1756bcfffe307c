//! Both queues against a device that was written from the specification alone, and against devices that lie.
#![allow(clippy::unwrap_used, reason = "tests: a None or Err is the failure")]

mod device;

use std::collections::{HashMap, VecDeque};

use proptest::prelude::*;
use underpass::dma::{DmaBuf, DmaSpace};
use underpass::iommu::soft::{SoftIommu, SoftOptions};
use underpass::iommu::{Attachment, IommuBackend};
use underpass::model::Bus;
use underpass::{Access, ErrorKind};

use self::device::{Device, Memory, Packed, Request, Split, Want};
use super::*;

/// A queue, the device on its other side, and what both should know.
struct Rig<Q, D> {
    queue: Q,
    device: D,
    setup: Setup,
    tokens: u32,
    /// What each token was posted with, and its descriptors.
    posted: HashMap<u32, (Vec<Buffer>, u16)>,
    /// Tokens added and not published; published and not fetched.
    added: VecDeque<u32>,
    published: VecDeque<u32>,
    /// What the device works on.
    fetched: VecDeque<(u32, Request)>,
    /// Completed, with the length that the driver should see.
    completed: VecDeque<(u32, u32)>,
    _attachment: Attachment,
    _space: DmaSpace,
}

fn space(check_leases: bool) -> (DmaSpace, Bus, Attachment) {
    let iommu = SoftIommu::new(SoftOptions { check_leases, ..SoftOptions::default() });
    let device = iommu.device("soft:queue");
    let ioas = iommu.alloc_ioas().unwrap();
    let attachment = ioas.attach(&device, None).unwrap();
    (DmaSpace::new(ioas), device.bus(), attachment)
}

impl<Q: Virtqueue<Token = u32>, D: Device> Rig<Q, D> {
    fn new(setup: Setup, check_leases: bool) -> Self {
        let (mut space, bus, attachment) = space(check_leases);
        let memory = DmaBuf::allocate(Q::memory_len(&setup)).unwrap();
        space.map(memory.region(), Access::READ_WRITE).unwrap();
        let queue = Q::new(memory, &space, &setup).unwrap();
        let event_idx = setup.features.contains(Features::EVENT_IDX);
        let memory = Memory { bus, areas: queue.areas(), size: setup.size, event_idx };
        Self {
            queue,
            device: D::new(memory),
            setup,
            tokens: 0,
            posted: HashMap::new(),
            added: VecDeque::new(),
            published: VecDeque::new(),
            fetched: VecDeque::new(),
            completed: VecDeque::new(),
            _attachment: attachment,
            _space: space,
        }
    }

    fn in_order(&self) -> bool {
        self.setup.features.contains(Features::IN_ORDER)
    }

    /// Posts `readable` buffers that the device reads and `writable` ones that it writes.
    fn add(&mut self, readable: u16, writable: u16) -> bool {
        let token = self.tokens;
        let buffer = |n: u16| Buffer {
            iova: Iova::new(u64::from(token) << 20 | u64::from(n) << 12),
            len: 100 + u32::from(n),
            write: n >= readable,
        };
        let buffers: Vec<_> = (0..readable + writable).map(buffer).collect();
        let indirect = self.setup.features.contains(Features::INDIRECT_DESC) && self.setup.max_chain > 1;
        let needed = if indirect { 1 } else { buffers.len() as u16 };
        let in_use: u16 = self.posted.values().map(|(_, count)| count).sum();
        assert_eq!(self.queue.free(), self.setup.size - in_use);
        let fits = needed <= self.setup.size - in_use;
        assert_eq!(self.queue.add(token, &buffers), if fits { Ok(()) } else { Err(token) });
        if fits {
            self.tokens += 1;
            self.posted.insert(token, (buffers, needed));
            self.added.push_back(token);
        }
        fits
    }

    /// Posts up to `most` buffers in one burst, of which there are `count`.
    fn add_burst(&mut self, most: usize, count: usize, write: bool) {
        let buffer = |token: u32| Buffer { iova: Iova::new(u64::from(token) << 20), len: 1_500, write };
        let (first, free) = (self.tokens, usize::from(self.queue.free()));
        let mut next = (first..).take(count).map(|token| (token, buffer(token)));
        let added = self.queue.add_burst(most, || next.next());
        assert_eq!(added, most.min(count).min(free));
        if count > added {
            assert_eq!(next.next().unwrap().0, first + added as u32, "none was taken and not posted");
        }
        for token in first..first + added as u32 {
            self.posted.insert(token, (vec![buffer(token)], 1));
            self.added.push_back(token);
        }
        self.tokens += added as u32;
    }

    /// Publishes; the device fetches all that it finds, and compares it with what was added.
    fn publish(&mut self) {
        self.queue.publish();
        let published = self.added.len();
        self.published.append(&mut self.added);
        let before = self.fetched.len();
        self.fetch_all();
        let new: Vec<_> = self.fetched.iter().skip(before).map(|(_, request)| request.clone()).collect();
        assert_eq!(new.len(), published);
        let must = self.device.must_be_notified(&new);
        assert_eq!(self.queue.needs_notify(), must, "the device wanted to be notified, or not");
        assert!(!self.queue.needs_notify(), "nothing new");
    }

    fn fetch_all(&mut self) {
        while let Some(request) = self.device.fetch() {
            let token = self.published.pop_front().expect("the device sees what was published, no more");
            let (buffers, descriptors) = &self.posted[&token];
            let expected: Vec<_> = buffers.iter().map(|b| (b.iova.get(), b.len, b.write)).collect();
            assert_eq!((&request.segments, request.count), (&expected, *descriptors));
            self.fetched.push_back((token, request));
        }
        assert!(self.published.is_empty(), "the device sees all that was published");
    }

    fn writable(&self, token: u32) -> u32 {
        self.posted[&token].0.iter().filter(|b| b.write).map(|b| b.len).sum()
    }

    /// The device uses some buffer, or several in order at once.
    fn complete(&mut self, which: usize, len: u32) {
        self.fetch_all();
        if self.fetched.is_empty() {
            return;
        }
        let which = which % self.fetched.len();
        let batch: Vec<_> = if self.in_order() {
            self.fetched.drain(..=which).collect()
        } else {
            self.fetched.remove(which).into_iter().collect()
        };
        let (last, before) = batch.split_last().unwrap();
        for (token, _) in before {
            self.completed.push_back((*token, self.writable(*token)));
        }
        let len = len % (self.writable(last.0) + 1);
        self.completed.push_back((last.0, len));
        // Of what it only reads, whatever it says means nothing.
        let says = if self.writable(last.0) == 0 { 3 * last.0 } else { len };
        let requests: Vec<_> = batch.iter().map(|(_, request)| request.clone()).collect();
        self.device.complete(&requests, says);
    }

    fn take(&mut self, most: usize) -> usize {
        let mut taken = Vec::new();
        let count = self.queue.take_burst(most, |token, len| taken.push((token, len))).unwrap();
        assert_eq!(taken.len(), count);
        let expected: Vec<_> = self.completed.drain(..most.min(self.completed.len())).collect();
        assert_eq!(taken, expected);
        for (token, _) in taken {
            self.posted.remove(&token).unwrap();
        }
        count
    }

    /// The driver would sleep: whatever is used from now on is notified.
    fn enable(&mut self) {
        assert_eq!(self.queue.enable_notifications(), !self.completed.is_empty());
        self.device.must_notify();
        if self.completed.is_empty() && !self.fetched.is_empty() {
            self.complete(0, 0);
            assert!(self.device.must_notify(), "nobody wakes the driver");
        }
    }

    fn disable(&mut self) {
        self.queue.disable_notifications();
        self.device.must_notify();
        self.complete(0, 0);
        assert!(!self.device.must_notify());
    }

    /// A reset of the device: all that it had comes back.
    fn reset(mut self) -> Self {
        let mut back = Vec::new();
        self.queue.reset(|token| back.push(token));
        back.sort_unstable();
        let mut expected: Vec<_> = self.posted.drain().map(|(token, _)| token).collect();
        expected.sort_unstable();
        assert_eq!(back, expected);
        let Memory { size, event_idx, areas, .. } = *self.device.memory();
        let bus = self.device.memory().bus.device().bus();
        let device = D::new(Memory { bus, areas, size, event_idx });
        Self {
            device,
            added: VecDeque::new(),
            published: VecDeque::new(),
            fetched: VecDeque::new(),
            completed: VecDeque::new(),
            ..self
        }
    }
}

#[derive(Debug, Clone)]
enum Step {
    Add(u16, u16),
    AddBurst(usize, usize, bool),
    Publish,
    Complete(usize, u32),
    Take(usize),
    Enable,
    Disable,
    Want(u8, u16),
    Reset,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        8 => (0_u16..4, 0_u16..4).prop_map(|(r, w)| Step::Add(r, w)),
        3 => (0_usize..6, 0_usize..6, any::<bool>()).prop_map(|(most, n, write)| Step::AddBurst(most, n, write)),
        5 => Just(Step::Publish),
        5 => (0_usize..8, any::<u32>()).prop_map(|(which, len)| Step::Complete(which, len)),
        4 => (0_usize..10).prop_map(Step::Take),
        1 => Just(Step::Enable),
        1 => Just(Step::Disable),
        2 => (0_u8..3, 0_u16..12).prop_map(|(kind, n)| Step::Want(kind, n)),
        1 => prop_oneof![9 => Just(Step::Publish), 1 => Just(Step::Reset)],
    ]
}

fn setup(size: u16, max_chain: u16, features: u8) -> Setup {
    let known = [Features::EVENT_IDX, Features::IN_ORDER, Features::INDIRECT_DESC];
    let chosen = known.iter().enumerate().filter(|(n, _)| features & 1 << n != 0);
    let features = chosen.fold(Features::VERSION_1, |all, (_, feature)| all | *feature);
    Setup { size, features, max_chain }
}

fn run<Q: Virtqueue<Token = u32>, D: Device>(setup: Setup, packed: bool, steps: Vec<Step>) {
    let mut rig = Rig::<Q, D>::new(setup, true);
    for step in steps {
        match step {
            Step::Add(readable, writable) => {
                let readable = readable.min(setup.max_chain);
                let writable = writable.min(setup.max_chain - readable).max(u16::from(readable == 0));
                rig.add(readable, writable);
            }
            Step::AddBurst(most, count, write) => rig.add_burst(most, count, write),
            Step::Publish => rig.publish(),
            Step::Complete(which, len) => rig.complete(which, len),
            Step::Take(most) => drop(rig.take(most)),
            Step::Enable => rig.enable(),
            Step::Disable => rig.disable(),
            Step::Want(kind, n) => {
                let event_idx = setup.features.contains(Features::EVENT_IDX);
                let want = match kind {
                    // With the event index a split ring has no other way.
                    _ if event_idx && (kind == 0 || !packed) => Want::After(n),
                    1 => Want::Never,
                    _ => Want::Always,
                };
                rig.device.want(want);
            }
            Step::Reset => rig = rig.reset(),
        }
    }
    rig.publish();
    while !rig.fetched.is_empty() {
        rig.complete(0, 7);
    }
    rig.take(usize::MAX);
    assert!(rig.posted.is_empty());
    assert_eq!(rig.queue.free(), setup.size);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn a_split_queue_agrees_with_a_plain_device(
        order in 0_u32..4, chain in 1_u16..5, features in 0_u8..8, steps in prop::collection::vec(step(), 1..120)
    ) {
        let size = 1 << order;
        run::<SplitQueue<u32>, Split>(setup(size, chain.min(size), features), false, steps);
    }

    #[test]
    fn a_packed_queue_agrees_with_a_plain_device(
        size in 1_u16..9, chain in 1_u16..5, features in 0_u8..8, steps in prop::collection::vec(step(), 1..120)
    ) {
        run::<PackedQueue<u32>, Packed>(setup(size, chain.min(size), features), true, steps);
    }
}

/// More buffers than an index of 16 bits counts, by bursts of all lengths.
fn round_and_round<Q: Virtqueue<Token = u32>, D: Device>(size: u16) {
    for features in 0..8 {
        let mut rig = Rig::<Q, D>::new(setup(size, 1, features), false);
        let mut burst = 0;
        while rig.tokens < 70_000 {
            burst = burst % 13 + 1;
            rig.add_burst(burst, burst, true);
            if rig.setup.features.contains(Features::EVENT_IDX) {
                rig.device.want(Want::After(burst as u16 / 2));
            }
            rig.publish();
            while rig.fetched.len() > usize::from(size) / 3 {
                rig.complete(burst / 2, 1);
            }
            rig.take(burst);
            if burst == 3 {
                rig.enable();
            }
        }
    }
}

#[test]
fn indices_and_wrap_counters_wrap() {
    round_and_round::<SplitQueue<u32>, Split>(16);
    round_and_round::<PackedQueue<u32>, Packed>(15);
}

#[test]
fn a_queue_as_large_as_can_be_is_filled_and_emptied() {
    fn check<Q: Virtqueue<Token = u32>, D: Device>() {
        for features in 0..8 {
            let mut rig = Rig::<Q, D>::new(setup(32_768, 1, features), false);
            for _ in 0..3 {
                let first = rig.tokens;
                let mut next = || {
                    rig.tokens += 1;
                    Some((rig.tokens - 1, Buffer::writable(Iova::new(4_096), 1)))
                };
                assert_eq!(rig.queue.add_burst(usize::MAX, &mut next), 32_768);
                assert_eq!(rig.queue.add_burst(1, &mut next), 0);
                rig.queue.publish();
                let requests: Vec<_> = std::iter::from_fn(|| rig.device.fetch()).collect();
                assert_eq!(requests.len(), 32_768);
                if rig.in_order() {
                    rig.device.complete(&requests, 1);
                } else {
                    for request in &requests {
                        rig.device.complete(std::slice::from_ref(request), 1);
                    }
                }
                let mut next = first;
                let taken = rig.queue.take_burst(usize::MAX, |token, len| {
                    assert_eq!((token, len), (next, 1));
                    next += 1;
                });
                assert_eq!(taken, Ok(32_768));
            }
        }
    }
    check::<SplitQueue<u32>, Split>();
    check::<PackedQueue<u32>, Packed>();
}

/// The queue says the same from now on, takes no more, and works again once it was reset.
fn is_broken<Q: Virtqueue<Token = u32>, D: Device>(mut rig: Rig<Q, D>, broken: Broken) {
    assert_eq!(rig.queue.take_used(), Err(broken));
    assert_eq!(rig.queue.take_burst(8, |_, _| panic!("taken")), Err(broken));
    assert_eq!(rig.queue.add(9, &[Buffer::writable(Iova::new(0), 1)]), Err(9));
    assert_eq!(rig.queue.add_burst(8, || panic!("asked")), 0);
    rig.queue.publish();
    assert_eq!(rig.queue.take_used(), Err(broken));
    let mut rig = rig.reset();
    assert!(rig.add(0, 1));
    rig.publish();
    rig.complete(0, 5);
    assert_eq!(rig.take(2), 1);
}

fn lies<Q: Virtqueue<Token = u32>, D: Device>(in_order: bool) {
    let features = if in_order { 0b10 } else { 0 };
    // Three buffers, of two descriptors each.
    let rig = || {
        let mut rig = Rig::<Q, D>::new(setup(8, 2, features), true);
        for _ in 0..3 {
            rig.add(1, 1);
        }
        rig.publish();
        rig
    };
    for id in [8, 9, u16::MAX] {
        let mut rig = rig();
        rig.device.lie(id, 1, 1);
        is_broken(rig, Broken::ID_OUT_OF_RANGE);
    }
    for id in [6, 7] {
        let mut rig = rig();
        rig.device.lie(id, 1, 1);
        is_broken(rig, Broken::ID_NOT_POSTED);
    }
    for len in [102, u32::MAX] {
        let mut rig = rig();
        rig.device.lie(0, len, 1);
        is_broken(rig, Broken::TOO_LONG);
    }
    // What it wrote to a buffer that it was to read is not looked at.
    let mut rig = Rig::<Q, D>::new(setup(8, 2, features), true);
    rig.add(1, 0);
    rig.publish();
    let (token, request) = rig.fetched.pop_front().unwrap();
    rig.device.complete(&[request], 5_000);
    assert_eq!(rig.queue.take_used(), Ok(Some((token, 0))));
}

#[test]
fn ids_and_lengths_that_are_lies_break_the_queue() {
    for in_order in [false, true] {
        lies::<SplitQueue<u32>, Split>(in_order);
        lies::<PackedQueue<u32>, Packed>(in_order);
    }
}

#[test]
fn a_buffer_that_is_used_twice_breaks_the_queue() {
    fn check<Q: Virtqueue<Token = u32>, D: Device>() {
        let mut rig = Rig::<Q, D>::new(setup(4, 1, 0), true);
        rig.add(0, 1);
        rig.add(0, 1);
        rig.publish();
        let (_, request) = rig.fetched[0].clone();
        rig.complete(0, 3);
        rig.device.complete(&[request], 3);
        rig.take(1);
        is_broken(rig, Broken::ID_NOT_POSTED);
    }
    check::<SplitQueue<u32>, Split>();
    check::<PackedQueue<u32>, Packed>();
}

#[test]
fn an_index_past_what_was_published_breaks_a_split_queue() {
    for ahead in [3, 4, 0x7fff, 0xffff] {
        let mut rig = Rig::<SplitQueue<u32>, Split>::new(setup(4, 1, 0), true);
        rig.add(0, 1);
        rig.add(0, 1);
        rig.publish();
        rig.add(0, 1);
        rig.device.lie(0, 1, ahead);
        is_broken(rig, Broken::INDEX);
    }
}

#[test]
fn a_batch_past_what_was_used_breaks_a_queue_in_order() {
    let mut rig = Rig::<SplitQueue<u32>, Split>::new(setup(4, 1, 0b10), true);
    assert!(rig.add(0, 1) && rig.add(0, 1) && rig.add(0, 1));
    rig.publish();
    rig.device.lie(2, 1, 2);
    is_broken(rig, Broken::ORDER);

    // The third buffer is not published.
    let mut rig = Rig::<PackedQueue<u32>, Packed>::new(setup(4, 1, 0b10), true);
    assert!(rig.add(0, 1) && rig.add(0, 1));
    rig.publish();
    rig.add(0, 1);
    rig.device.lie(2, 1, 1);
    is_broken(rig, Broken::ORDER);
}

#[test]
fn a_used_index_that_goes_back_breaks_a_split_queue() {
    for features in [0, 0b10] {
        let mut rig = Rig::<SplitQueue<u32>, Split>::new(setup(4, 1, features), true);
        assert!(rig.add(0, 1) && rig.add(0, 1) && rig.add(0, 1));
        rig.publish();
        if features == 0 {
            (0..3).for_each(|_| rig.complete(0, 1));
        } else {
            rig.complete(2, 1);
        }
        rig.take(1);
        // It has used three, of which one was taken, and now says that it has used one.
        rig.device.lie(0, 1, 0_u16.wrapping_sub(2));
        // Who asks for no more than is known to be there does not look.
        assert_eq!(rig.queue.take_burst(3, |_, _| panic!("taken")), Err(Broken::BACK));
        is_broken(rig, Broken::BACK);
    }
}

#[test]
fn a_buffer_that_is_not_published_is_not_used() {
    for features in [0, 0b10] {
        let mut rig = Rig::<PackedQueue<u32>, Packed>::new(setup(4, 1, features), true);
        rig.add(0, 1);
        rig.publish();
        rig.add(0, 1);
        rig.device.lie(0, 1, 1);
        rig.device.lie(1, 1, 1);
        assert_eq!(rig.queue.take_burst(8, |token, _| assert_eq!(token, 0)), Ok(1));
        assert_eq!(rig.queue.take_used(), Ok(None));
    }
}

#[test]
fn a_ring_without_posted_buffers_is_not_looked_at() {
    let mut rig = Rig::<PackedQueue<u32>, Packed>::new(setup(4, 1, 0), true);
    rig.device.lie(0, 0, 1);
    assert_eq!(rig.queue.take_used(), Ok(None));
}

/// A device that writes anything anywhere in the ring, at any time: no token comes twice, none is lost.
fn scribbles<Q: Virtqueue<Token = u32>, D: Device>(setup: Setup, writes: &[(u16, u64)], steps: &[u8]) {
    let mut rig = Rig::<Q, D>::new(setup, false);
    let len = Q::memory_len(&setup) as u64;
    let start = rig.queue.areas().desc;
    let (mut next, mut out) = (0, std::collections::BTreeSet::new());
    let mut writes = writes.iter().cycle();
    for step in steps {
        match step % 5 {
            0 if step % 2 == 0 => {
                rig.queue.add_burst(3, || {
                    out.insert(next);
                    next += 1;
                    Some((next - 1, Buffer::writable(Iova::new(0), 64)))
                });
            }
            0 => {
                let chain = usize::from(step / 5 % 3 + 1).min(setup.max_chain.into());
                if rig.queue.add(next, &[Buffer::writable(Iova::new(0), 64)].repeat(chain)).is_ok() {
                    out.insert(next);
                    next += 1;
                }
            }
            1 => {
                rig.queue.publish();
                let _ = rig.queue.needs_notify();
            }
            2 => {
                let _ = rig.queue.take_burst(usize::from(step / 5), |token, len| {
                    assert!(out.remove(&token), "a token that is not out");
                    assert!(len <= 64 * 3, "more than was posted");
                });
            }
            3 if *step == 3 => {
                rig.queue.reset(|token| assert!(out.remove(&token)));
                assert!(out.is_empty());
            }
            3 => drop(rig.queue.enable_notifications()),
            _ => {
                let (at, value) = writes.next().unwrap();
                // Mostly small numbers and single bytes: they come nearer to what is valid.
                let (at, bytes) = (u64::from(*at) % (len - 8), value.to_le_bytes());
                let bytes = &bytes[..if value % 3 == 0 { 8 } else { 1 }];
                rig.device.memory().bus.write(None, start.wrapping_add(at), bytes).unwrap();
            }
        }
        assert!(usize::from(rig.queue.free()) <= usize::from(setup.size));
    }
    rig.queue.reset(|token| assert!(out.remove(&token)));
    assert!(out.is_empty(), "lost");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn a_device_that_scribbles_over_the_ring_gets_no_token_twice_and_loses_none(
        order in 0_u32..4, chain in 1_u16..4, features in 0_u8..8,
        writes in prop::collection::vec((any::<u16>(), prop_oneof![any::<u64>(), 0_u64..8]), 1..40),
        steps in prop::collection::vec(any::<u8>(), 1..200),
    ) {
        let setup = setup(1 << order, chain.min(1 << order), features);
        scribbles::<SplitQueue<u32>, Split>(setup, &writes, &steps);
        scribbles::<PackedQueue<u32>, Packed>(setup, &writes, &steps);
    }
}

#[test]
fn memory_that_does_not_suit_is_refused() {
    fn check<Q: Virtqueue<Token = u32>>() {
        let (mut space, _bus, _attachment) = space(false);
        let good = setup(8, 4, 0b100);
        let buf = || DmaBuf::allocate(Q::memory_len(&good) + 64).unwrap();
        let refused = |space: &DmaSpace, buf, setup: &Setup| match Q::new(buf, space, setup) {
            Err(error) => assert_eq!(error.kind(), ErrorKind::InvalidInput),
            Ok(_) => panic!("taken"),
        };
        refused(&space, buf(), &good);
        let mut mapped = || {
            let buf = buf();
            space.map(buf.region(), Access::READ_WRITE).unwrap();
            buf
        };
        let (mut short, mut odd, fine) = (mapped(), mapped(), mapped());
        let others =
            [Setup { size: 0, ..good }, Setup { max_chain: 9, ..good }, Setup { max_chain: 0, ..good }];
        let bad: Vec<_> = others.iter().map(|setup| (mapped(), setup)).collect();
        short = short.split_to(Q::memory_len(&good) - 1);
        odd = odd.split_off(32);
        refused(&space, short, &good);
        refused(&space, odd, &good);
        for (buf, setup) in bad {
            refused(&space, buf, setup);
        }
        let queue = Q::new(fine, &space, &good).unwrap();
        assert_eq!((queue.free(), queue.size(), queue.position() & 0x7fff), (8, 8, 0));
    }
    check::<SplitQueue<u32>>();
    check::<PackedQueue<u32>>();
    let six = setup(6, 1, 0);
    let (space, _bus, _attachment) = space(false);
    let buf = DmaBuf::allocate(4_096).unwrap();
    assert!(SplitQueue::<u32>::new(buf, &space, &six).is_err(), "a split ring of six entries");
}
