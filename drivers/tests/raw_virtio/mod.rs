//! The virtio-net model from the outside: registers by offset and rings by byte, written from the specification and not
//! from `spec`, so that a slip there does not cancel itself out.

#![allow(dead_code, reason = "each test binary uses a part of it")]
#![allow(clippy::unwrap_used, reason = "a rig that can not be built fails its test")]

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use underpass::bar::Bar;
use underpass::dma::DmaBuf;
use underpass::iommu::soft::{SoftIommu, SoftOptions};
use underpass::iommu::{Attachment, IommuBackend, Mapping};
use underpass::pci::{PciDevice, Run};
use underpass::{Access, Region};
use underpass_drivers::virtio_net::model::peer::{Frame, Offload, Peer, PeerCounters};
use underpass_drivers::virtio_net::model::{Profile, VirtioNetControl, VirtioNetModel};

pub(crate) const VERSION_1: u64 = 1 << 32;
pub(crate) const ACCESS_PLATFORM: u64 = 1 << 33;
pub(crate) const BASE: u64 = VERSION_1 | ACCESS_PLATFORM;
pub(crate) const PACKED: u64 = 1 << 34;
pub(crate) const IN_ORDER: u64 = 1 << 35;
pub(crate) const NOTIFICATION_DATA: u64 = 1 << 38;
pub(crate) const NOTIF_CONFIG_DATA: u64 = 1 << 39;
pub(crate) const RING_RESET: u64 = 1 << 40;
pub(crate) const INDIRECT: u64 = 1 << 28;
pub(crate) const EVENT_IDX: u64 = 1 << 29;
pub(crate) const CSUM: u64 = 1 << 0;
pub(crate) const GUEST_CSUM: u64 = 1 << 1;
pub(crate) const CTRL_GUEST_OFFLOADS: u64 = 1 << 2;
pub(crate) const MAC: u64 = 1 << 5;
pub(crate) const GUEST_TSO4: u64 = 1 << 7;
pub(crate) const HOST_TSO4: u64 = 1 << 11;
pub(crate) const HOST_TSO6: u64 = 1 << 12;
pub(crate) const HOST_ECN: u64 = 1 << 13;
pub(crate) const MRG_RXBUF: u64 = 1 << 15;
pub(crate) const STATUS: u64 = 1 << 16;
pub(crate) const CTRL_VQ: u64 = 1 << 17;
pub(crate) const CTRL_RX: u64 = 1 << 18;
pub(crate) const CTRL_VLAN: u64 = 1 << 19;
pub(crate) const CTRL_RX_EXTRA: u64 = 1 << 20;
pub(crate) const GUEST_ANNOUNCE: u64 = 1 << 21;
pub(crate) const MQ: u64 = 1 << 22;
pub(crate) const CTRL_MAC_ADDR: u64 = 1 << 23;
pub(crate) const HOST_USO: u64 = 1 << 56;
pub(crate) const DEVICE_STATS: u64 = 1 << 50;
pub(crate) const HASH_REPORT: u64 = 1 << 57;
pub(crate) const GUEST_HDRLEN: u64 = 1 << 59;
pub(crate) const RSS: u64 = 1 << 60;

/// Status bits.
pub(crate) const ACKNOWLEDGE: u8 = 1;
pub(crate) const DRIVER: u8 = 2;
pub(crate) const DRIVER_OK: u8 = 4;
pub(crate) const FEATURES_OK: u8 = 8;
pub(crate) const NEEDS_RESET: u8 = 64;

/// Where nothing is mapped.
pub(crate) const NOWHERE: u64 = 0x7abc_0000_0000;

/// All of the memory that the device can reach.
pub(crate) struct Memory {
    pub(crate) bytes: DmaBuf,
    pub(crate) base: u64,
    next: usize,
}

impl Memory {
    /// Zeroed bytes nobody has had; where they start.
    pub(crate) fn take(&mut self, len: usize, align: usize) -> usize {
        let at = self.next.next_multiple_of(align);
        self.next = at + len;
        assert!(self.next <= self.bytes.len(), "the rig's memory is used up");
        at
    }

    pub(crate) fn iova(&self, offset: usize) -> u64 {
        self.base + offset as u64
    }

    pub(crate) fn put(&mut self, at: usize, bytes: &[u8]) {
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
    }

    pub(crate) fn put16(&mut self, at: usize, value: u16) {
        self.put(at, &value.to_le_bytes());
    }

    pub(crate) fn u16(&self, at: usize) -> u16 {
        u16::from_le_bytes(self.bytes[at..at + 2].try_into().unwrap())
    }

    pub(crate) fn u32(&self, at: usize) -> u32 {
        u32::from_le_bytes(self.bytes[at..at + 4].try_into().unwrap())
    }
}

/// One element of a buffer: where, how long, whether the device writes it.
pub(crate) type Element = (u64, u32, bool);

/// A virtqueue from the driver's side. Descriptors are taken in ring order, as in-order queues demand.
pub(crate) struct Queue {
    pub(crate) index: u16,
    pub(crate) size: u16,
    pub(crate) features: u64,
    /// Descriptor, driver and device area: offsets in the memory.
    pub(crate) desc: usize,
    pub(crate) avail: usize,
    pub(crate) used: usize,
    pub(crate) next: u16,
    pub(crate) wrap: bool,
    pub(crate) avail_idx: u16,
    used_at: u16,
    used_wrap: bool,
    /// What is with the device, oldest first: id and slots.
    outstanding: VecDeque<(u16, u16)>,
    free: u16,
    id: u16,
}

impl Queue {
    fn new(memory: &mut Memory, index: u16, size: u16, features: u64) -> Self {
        let (n, packed) = (usize::from(size), features & PACKED != 0);
        let desc = memory.take(16 * n, 16);
        // As badly aligned as it may be.
        let avail = if packed { memory.take(4, 4) } else { memory.take(6 + 2 * n + 2, 4) + 2 };
        let used = if packed { memory.take(4, 4) } else { memory.take(4 + 6 + 8 * n, 8) + 4 };
        Self {
            index,
            size,
            features,
            desc,
            avail,
            used,
            next: 0,
            wrap: true,
            avail_idx: 0,
            used_at: 0,
            used_wrap: true,
            outstanding: VecDeque::new(),
            free: size,
            id: 0,
        }
    }

    pub(crate) fn has(&self, feature: u64) -> bool {
        self.features & feature != 0
    }

    pub(crate) fn free(&self) -> u16 {
        self.free
    }

    fn descriptor(at: u64, len: u32, packed: bool, flags: u16, other: u16) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&at.to_le_bytes());
        bytes[8..12].copy_from_slice(&len.to_le_bytes());
        let (a, b) = if packed { (other, flags) } else { (flags, other) };
        bytes[12..14].copy_from_slice(&a.to_le_bytes());
        bytes[14..].copy_from_slice(&b.to_le_bytes());
        bytes
    }

    /// Writes one descriptor in ring order. Flags: 1 next, 2 write, 4 indirect.
    pub(crate) fn put_descriptor(&mut self, memory: &mut Memory, at: u64, len: u32, flags: u16) {
        let (slot, packed) = (self.next, self.has(PACKED));
        self.next = if slot + 1 == self.size { 0 } else { slot + 1 };
        let bytes = if packed {
            let flags = flags | if self.wrap { 1 << 7 } else { 1 << 15 };
            Self::descriptor(at, len, true, flags, self.id)
        } else {
            Self::descriptor(at, len, false, flags, if flags & 1 != 0 { self.next } else { 0xdead })
        };
        memory.put(self.desc + 16 * usize::from(slot), &bytes);
        self.wrap ^= self.next == 0;
    }

    /// Makes the chain available whose descriptors were just written, `slots` from `head` on.
    pub(crate) fn publish(&mut self, memory: &mut Memory, head: u16, slots: u16) {
        self.free -= slots;
        if self.has(PACKED) {
            self.outstanding.push_back((self.id, slots));
            self.id = self.id.wrapping_add(7);
            return;
        }
        self.outstanding.push_back((head, slots));
        let slot = usize::from(self.avail_idx % self.size);
        memory.put16(self.avail + 4 + 2 * slot, head);
        self.avail_idx = self.avail_idx.wrapping_add(1);
        memory.put16(self.avail + 2, self.avail_idx);
    }

    /// Makes a buffer available.
    pub(crate) fn add(&mut self, memory: &mut Memory, elements: &[Element], indirect: bool) {
        let head = self.next;
        let flags = |n: usize, write: bool, next: bool| {
            u16::from(next && n + 1 < elements.len()) | u16::from(write) << 1
        };
        if indirect {
            let table = memory.take(16 * elements.len(), 16);
            for (n, (at, len, write)) in elements.iter().enumerate() {
                let packed = self.has(PACKED);
                let bytes = Self::descriptor(*at, *len, packed, flags(n, *write, !packed), n as u16 + 1);
                memory.put(table + 16 * n, &bytes);
            }
            let at = memory.iova(table);
            self.put_descriptor(memory, at, 16 * elements.len() as u32, 4);
            self.publish(memory, head, 1);
        } else {
            for (n, (at, len, write)) in elements.iter().enumerate() {
                self.put_descriptor(memory, *at, *len, flags(n, *write, true));
            }
            self.publish(memory, head, elements.len() as u16);
        }
    }

    /// Takes what the device has used: the buffer's number in the order in which they were added counts, so only the
    /// written lengths are returned. A skipped buffer of a batch in order has none.
    pub(crate) fn take_used(&mut self, memory: &Memory) -> Vec<Option<u32>> {
        let mut all = Vec::new();
        loop {
            let (id, len) = if self.has(PACKED) {
                let at = self.desc + 16 * usize::from(self.used_at);
                let flags = memory.u16(at + 14);
                let (avail, used) = (flags & 1 << 7 != 0, flags & 1 << 15 != 0);
                if avail != used || used != self.used_wrap || self.outstanding.is_empty() {
                    return all;
                }
                let written = if flags & 2 != 0 { memory.u32(at + 8) } else { 0 };
                (memory.u16(at + 12), written)
            } else {
                let idx = memory.u16(self.used + 2);
                if idx == self.used_at {
                    return all;
                }
                let at = self.used + 4 + 8 * usize::from(self.used_at % self.size);
                (memory.u32(at) as u16, memory.u32(at + 4))
            };
            loop {
                let (done, slots) = self.outstanding.pop_front().expect("used more than was available");
                self.free += slots;
                if self.has(PACKED) {
                    self.used_at += slots;
                    if self.used_at >= self.size {
                        (self.used_at, self.used_wrap) = (self.used_at - self.size, !self.used_wrap);
                    }
                } else {
                    self.used_at = self.used_at.wrapping_add(1);
                }
                if done == id {
                    all.push(Some(len));
                    break;
                }
                assert!(self.has(IN_ORDER), "buffer {id} was used before {done}");
                all.push(None);
            }
        }
    }

    /// How many are with the device.
    pub(crate) fn outstanding(&self) -> usize {
        self.outstanding.len()
    }

    /// Whether the device asks to be notified of what comes next, as the suppression words say.
    pub(crate) fn is_asked(&self, memory: &Memory) -> bool {
        if self.has(PACKED) {
            return match memory.u16(self.used + 2) {
                0 => true,
                1 => false,
                2 => memory.u16(self.used) == self.next | u16::from(self.wrap) << 15,
                other => panic!("reserved flags {other}"),
            };
        }
        if self.has(EVENT_IDX) {
            assert_eq!(memory.u16(self.used), 0, "flags stay zero with EVENT_IDX");
            return memory.u16(self.used + 4 + 8 * usize::from(self.size)) == self.avail_idx;
        }
        memory.u16(self.used) == 0
    }
}

/// A received frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Received {
    pub(crate) header: Vec<u8>,
    pub(crate) bytes: Vec<u8>,
}

impl Received {
    pub(crate) fn u16(&self, at: usize) -> u16 {
        u16::from_le_bytes(self.header[at..at + 2].try_into().unwrap())
    }

    pub(crate) fn hash(&self) -> (u32, u16) {
        (u32::from_le_bytes(self.header[12..16].try_into().unwrap()), self.u16(16))
    }
}

/// A device with memory.
pub(crate) struct Rig {
    pub(crate) device: PciDevice,
    pub(crate) common: Bar,
    pub(crate) config: Bar,
    pub(crate) isr: Bar,
    pub(crate) notify: Bar,
    pub(crate) control: VirtioNetControl,
    pub(crate) memory: Memory,
    pub(crate) features: u64,
    pub(crate) multiplier: u64,
    /// Receive buffers that were posted, by queue, oldest first.
    posted: Vec<VecDeque<Vec<(usize, usize)>>>,
    // Dropped after the device.
    _mapping: Mapping,
    _attachment: Attachment,
}

impl Rig {
    pub(crate) fn new(profile: Profile) -> Self {
        Self::run_by(VirtioNetModel::new(profile).unwrap(), Run::Stepped)
    }

    pub(crate) fn with_peers(profile: Profile, peers: Vec<Box<dyn Peer>>) -> Self {
        Self::run_by(VirtioNetModel::with_peers(profile, peers), Run::Stepped)
    }

    pub(crate) fn run_by(model: VirtioNetModel, run: Run) -> Self {
        let control = model.control();
        let iommu = SoftIommu::new(SoftOptions::default());
        let device = PciDevice::in_process("soft:virtio-net", Box::new(model), &iommu, run).unwrap();
        device.set_bus_master(true).unwrap();
        let ioas = iommu.alloc_ioas().unwrap();
        let attachment = ioas.attach(&device, None).unwrap();
        let region = Region::builder(4 << 20).build().unwrap();
        let mapping = ioas.map(&region, Access::READ_WRITE).unwrap();
        let memory =
            Memory { bytes: DmaBuf::new(Arc::clone(&region)).unwrap(), base: mapping.iova().get(), next: 0 };
        let config = device.config();
        let mut found = [const { None }; 6];
        let mut multiplier = 0;
        for (id, at) in config.capabilities().filter(|(id, _)| *id == 9) {
            assert_eq!(id, 9);
            let (kind, bar) = (config.read8(at + 3), config.read8(at + 4));
            let window = device
                .bar(bar.into())
                .unwrap()
                .window(config.read32(at + 8).into(), config.read32(at + 12).into())
                .unwrap();
            if kind == 2 {
                multiplier = config.read32(at + 16).into();
            }
            found[usize::from(kind)] = Some(window);
        }
        let mut take = |kind: usize| found[kind].take().unwrap();
        Self {
            common: take(1),
            notify: take(2),
            isr: take(3),
            config: take(4),
            device,
            control,
            memory,
            features: 0,
            multiplier,
            posted: vec![VecDeque::new(); 40],
            _mapping: mapping,
            _attachment: attachment,
        }
    }

    pub(crate) fn status(&self) -> u8 {
        self.common.read8(20)
    }

    pub(crate) fn set_status(&self, status: u8) {
        self.common.write8(20, status);
    }

    pub(crate) fn offered(&self) -> u64 {
        let half = |select| {
            self.common.write32(0, select);
            u64::from(self.common.read32(4))
        };
        half(0) | half(1) << 32
    }

    pub(crate) fn accept(&self, features: u64) {
        for select in [0, 1] {
            self.common.write32(8, select);
            self.common.write32(12, (features >> (32 * select)) as u32);
        }
    }

    /// Resets and negotiates; whether the device takes the features.
    pub(crate) fn negotiate(&mut self, features: u64) -> bool {
        self.reset();
        self.set_status(ACKNOWLEDGE);
        self.set_status(ACKNOWLEDGE | DRIVER);
        self.accept(features);
        self.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK);
        self.features = features;
        self.status() & FEATURES_OK != 0
    }

    pub(crate) fn reset(&mut self) {
        self.set_status(0);
        assert_eq!(self.status(), 0);
        self.posted.iter_mut().for_each(VecDeque::clear);
    }

    pub(crate) fn driver_ok(&self) {
        self.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
    }

    /// Configures a queue without enabling it.
    pub(crate) fn configure(&mut self, index: u16, size: u16) -> Queue {
        let queue = Queue::new(&mut self.memory, index, size, self.features);
        self.posted[usize::from(index)].clear();
        self.common.write16(22, index);
        assert!(self.common.read16(24) >= size, "queue {index} is not that large");
        self.common.write16(24, size);
        self.common.write64(32, self.memory.iova(queue.desc));
        // In halves, too.
        let avail = self.memory.iova(queue.avail);
        self.common.write32(40, avail as u32);
        self.common.write32(44, (avail >> 32) as u32);
        self.common.write64(48, self.memory.iova(queue.used));
        queue
    }

    /// Configures and enables a queue.
    pub(crate) fn queue(&mut self, index: u16, size: u16) -> Queue {
        let queue = self.configure(index, size);
        self.common.write16(28, 1);
        assert_eq!(self.common.read16(28), 1);
        queue
    }

    /// A running device: pairs of queues, and the control queue if it was negotiated.
    pub(crate) fn start(
        &mut self,
        features: u64,
        pairs: u16,
        size: u16,
    ) -> (Vec<(Queue, Queue)>, Option<Queue>) {
        assert!(self.negotiate(features | BASE), "{features:#x} refused");
        let queues: Vec<_> =
            (0..pairs).map(|n| (self.queue(2 * n, size), self.queue(2 * n + 1, size))).collect();
        let many = self.features & (MQ | RSS) != 0;
        let index = if many { 2 * self.config.read16(8) } else { 2 };
        let control = (self.features & CTRL_VQ != 0).then(|| self.queue(index, 64));
        self.driver_ok();
        assert_eq!(self.status(), 0x0f, "{:?}", self.control.violation());
        (queues, control)
    }

    pub(crate) fn step_all(&self) {
        for _ in 0..10_000 {
            if !self.device.step() {
                return;
            }
        }
        panic!("the engines do not come to rest");
    }

    pub(crate) fn notify(&self, queue: u16) {
        self.notify.write16(u64::from(queue) * self.multiplier, queue);
    }

    pub(crate) fn header_len(&self) -> usize {
        if self.features & HASH_REPORT != 0 { 20 } else { 12 }
    }

    /// Posts a receive buffer made of pieces of these lengths.
    pub(crate) fn post(&mut self, queue: &mut Queue, lens: &[usize], indirect: bool) {
        let pieces: Vec<_> = lens.iter().map(|len| (self.memory.take(*len, 1), *len)).collect();
        let elements: Vec<Element> =
            pieces.iter().map(|(at, len)| (self.memory.iova(*at), *len as u32, true)).collect();
        queue.add(&mut self.memory, &elements, indirect);
        self.posted[usize::from(queue.index)].push_back(pieces);
    }

    /// Sends a frame, its header of zeros but for `head`, cut into pieces at `cuts` (of header and frame together).
    pub(crate) fn send(
        &mut self,
        queue: &mut Queue,
        head: &[u8],
        frame: &[u8],
        cuts: &[usize],
        indirect: bool,
    ) {
        let mut bytes = vec![0; self.header_len()];
        bytes[..head.len()].copy_from_slice(head);
        bytes.extend_from_slice(frame);
        let mut elements = Vec::new();
        let mut start = 0;
        for end in cuts.iter().copied().filter(|cut| *cut < bytes.len()).chain([bytes.len()]) {
            let at = self.memory.take(end - start, 1);
            self.memory.put(at, &bytes[start..end]);
            elements.push((self.memory.iova(at), (end - start) as u32, false));
            start = end;
        }
        queue.add(&mut self.memory, &elements, indirect);
    }

    /// The frames that the device has delivered.
    pub(crate) fn received(&mut self, queue: &mut Queue) -> Vec<Received> {
        let header_len = self.header_len();
        let mut frames = Vec::new();
        let mut left = 0;
        for written in queue.take_used(&self.memory) {
            let written = written.expect("a receive buffer was skipped") as usize;
            let pieces = self.posted[usize::from(queue.index)].pop_front().unwrap();
            let capacity: usize = pieces.iter().map(|(_, len)| len).sum();
            assert!(written <= capacity);
            let all: Vec<u8> =
                pieces.iter().flat_map(|(at, len)| self.memory.bytes[*at..at + len].to_vec()).collect();
            let bytes = &all[..written];
            if left == 0 {
                let header = bytes[..header_len].to_vec();
                left = usize::from(u16::from_le_bytes([header[10], header[11]]));
                assert!(left >= 1 && (left == 1 || self.features & MRG_RXBUF != 0), "num_buffers {left}");
                frames.push(Received { header, bytes: bytes[header_len..].to_vec() });
            } else {
                frames.last_mut().unwrap().bytes.extend_from_slice(bytes);
            }
            left -= 1;
            assert!(left == 0 || written == capacity, "all buffers but the last are filled");
        }
        assert_eq!(left, 0, "a frame is seen in part");
        frames
    }

    /// Does a control command and returns the answer.
    pub(crate) fn command(&mut self, queue: &mut Queue, class: u8, command: u8, data: &[u8]) -> u8 {
        let (answer, result) = self.ask(queue, class, command, data, 0);
        assert!(result.is_empty());
        answer
    }

    /// The same with room for a result, which is returned as far as it was written.
    pub(crate) fn ask(
        &mut self,
        queue: &mut Queue,
        class: u8,
        command: u8,
        data: &[u8],
        room: usize,
    ) -> (u8, Vec<u8>) {
        let bytes = [&[class, command], data].concat();
        let at = self.memory.take(bytes.len() + 1 + room, 1);
        self.memory.put(at, &bytes);
        self.memory.put(at + bytes.len(), &vec![0xaa; 1 + room]);
        let (command, answer) = (self.memory.iova(at), self.memory.iova(at + bytes.len()));
        let mut elements = vec![(command, 2, false)];
        if !data.is_empty() {
            elements.push((command + 2, data.len() as u32, false));
        }
        elements.push((answer, 1, true));
        if room != 0 {
            elements.push((answer + 1, room as u32, true));
        }
        queue.add(&mut self.memory, &elements, false);
        self.step_all();
        let [Some(written)] = queue.take_used(&self.memory)[..] else {
            panic!("no answer: {:?}", self.control.violation())
        };
        let (answer, result) = self.memory.bytes[at + bytes.len()..][..=room].split_at(1);
        let (result, untouched) = result.split_at(written as usize - 1);
        assert!(untouched.iter().all(|byte| *byte == 0xaa), "more was written than said");
        (answer[0], result.to_vec())
    }

    /// The rule that the driver is told to have broken; the status says that the device needs a reset.
    pub(crate) fn violation(&self) -> String {
        assert_eq!(self.status() & NEEDS_RESET, NEEDS_RESET, "the device goes on");
        self.control.violation().unwrap().to_string()
    }
}

pub(crate) fn pairs(queue_pairs: u16) -> Profile {
    Profile { queue_pairs, ..Profile::default() }
}

/// Bytes that differ from frame to frame, to a unicast address.
pub(crate) fn frame(n: usize, len: usize) -> Vec<u8> {
    let mut bytes: Vec<u8> = (0..len).map(|at| (at * 7 + n * 13 + at / 251) as u8).collect();
    let head = [2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 0x88, 0xb5];
    let known = len.min(14);
    bytes[..known].copy_from_slice(&head[..known]);
    bytes
}

/// A peer that tests hold the other end of.
#[derive(Clone, Default)]
pub(crate) struct Hand(pub(crate) Arc<Mutex<Held>>);

#[derive(Default)]
pub(crate) struct Held {
    pub(crate) sent: Vec<(Vec<u8>, Offload)>,
    pub(crate) to_receive: VecDeque<(Vec<u8>, Offload)>,
    pub(crate) refuses: bool,
    pub(crate) carries: bool,
}

pub(crate) struct HandPeer(Hand, Vec<u8>);

impl Peer for HandPeer {
    fn transmit(&mut self, frame: Frame<'_>) -> bool {
        let mut held = self.0.0.lock().unwrap();
        assert!(held.carries || frame.offload == Offload::default(), "an unfinished frame");
        if !held.refuses {
            held.sent.push((frame.bytes.to_vec(), frame.offload));
        }
        !held.refuses
    }

    fn receive(&mut self) -> Option<Frame<'_>> {
        let (bytes, offload) = self.0.0.lock().unwrap().to_receive.pop_front()?;
        self.1 = bytes;
        Some(Frame { bytes: &self.1, offload })
    }

    fn carries_offloads(&self) -> bool {
        self.0.0.lock().unwrap().carries
    }

    fn counters(&self) -> Arc<PeerCounters> {
        Arc::default()
    }
}

impl Hand {
    pub(crate) fn peers(count: usize) -> (Vec<Hand>, Vec<Box<dyn Peer>>) {
        let hands: Vec<_> = (0..count).map(|_| Hand::default()).collect();
        let peers = hands.iter().map(|hand| Box::new(HandPeer(hand.clone(), Vec::new())) as Box<dyn Peer>);
        (hands.clone(), peers.collect())
    }

    pub(crate) fn give(&self, frame: &[u8]) {
        self.0.lock().unwrap().to_receive.push_back((frame.to_vec(), Offload::default()));
    }

    pub(crate) fn sent(&self) -> Vec<Vec<u8>> {
        self.0.lock().unwrap().sent.drain(..).map(|(bytes, _)| bytes).collect()
    }
}
