//! A small device, and a driver for it, that use everything between the two: configuration space, registers, a
//! submission portal, memory, DMA under a PASID, an interrupt, reset. Run with an engine on a thread and stepped.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use underpass::bar::Bar;
use underpass::dma::{DmaBuf, DmaSpace, Records};
use underpass::iommu::soft::{SoftIommu, SoftOptions};
use underpass::iommu::{Attachable, Attachment, FaultReason, OwnedPasid};
use underpass::model::{BarKind, BarSpec, Bus, Doorbell, Engine, Host, Mailbox, Model, Width};
use underpass::pci::{ConfigSpace, PciDevice, Run, cap, ext_cap};
use underpass::{Access, ErrorKind, Iova, Pasid};

/// Offsets in BAR 0.
mod register {
    pub(super) const IDENTITY: u64 = 0x00;
    pub(super) const SCRATCH: u64 = 0x08;
    pub(super) const DONE: u64 = 0x10;
    pub(super) const PORTALS_AT: u64 = 0x18;
}
const IDENTITY: u64 = 0x1057_0051_0ca7_0001;
const PORTAL: u64 = 4096;
const DEPTH: usize = 4;
/// In place of a record's address: what makes the engine panic.
const POISON: u64 = u64::MAX;

/// A descriptor: PASID, source, destination, length, record, each a 64-bit word.
fn descriptor(pasid: u32, src: Iova, dst: Iova, len: u64, record: u64) -> [u8; 64] {
    let mut bytes = [0; 64];
    for (n, word) in [u64::from(pasid), src.get(), dst.get(), len, record].into_iter().enumerate() {
        bytes[n * 8..][..8].copy_from_slice(&word.to_le_bytes());
    }
    bytes
}

struct Portal(Mailbox<[u8; 64]>);

impl Portal {
    fn open(depth: usize) -> Arc<Self> {
        let portal = Arc::new(Self(Mailbox::new(depth)));
        portal.0.open();
        portal
    }
}

impl Doorbell for Portal {
    fn post64(&self, offset: u64, data: &[u8; 64]) {
        assert_eq!(offset % 64, 0);
        let _ = self.0.accept(DEPTH, *data);
    }
    fn enqueue64(&self, _: u64, data: &[u8; 64]) -> bool {
        self.0.accept(DEPTH, *data).is_ok()
    }
    fn write(&self, offset: u64, width: Width, value: u64) {
        let mut data = [0; 64];
        data[..8].copy_from_slice(&(offset << 32 | width.bytes() << 24 | value).to_le_bytes());
        let _ = self.0.accept(DEPTH, data);
    }
}

#[derive(Default)]
struct Shared {
    done: AtomicU64,
    bus_master: AtomicBool,
    stepping: Mutex<()>,
    model_dropped: AtomicBool,
    engine_dropped_first: AtomicBool,
}

struct Toy {
    scratch: u64,
    portals: [Arc<Portal>; 2],
    memory: Bar,
    shared: Arc<Shared>,
}

impl Toy {
    fn new() -> Self {
        Self {
            scratch: 0,
            portals: std::array::from_fn(|_| Portal::open(DEPTH)),
            memory: Bar::memory(4096),
            shared: Arc::default(),
        }
    }
}

impl Model for Toy {
    fn config_space(&self) -> ConfigSpace {
        ConfigSpace::new(0x1d1d, 0x0001, 0x12_0000)
            .with_capability(cap::MSIX, &[1, 0, 0, 0, 0, 0, 0, 0, 0, 0], &[0, 0xc0])
            .with_extended(ext_cap::PASID, 1, &[0, 20, 0, 0], &[0, 0, 1])
    }
    fn bars(&self) -> Vec<BarSpec> {
        let targets = self.portals.iter().map(|portal| Arc::clone(portal) as Arc<dyn Doorbell>).collect();
        vec![
            BarSpec { index: 0, len: 64, kind: BarKind::Registers },
            BarSpec { index: 2, len: 4 * PORTAL, kind: BarKind::Doorbells { page: PORTAL, targets } },
            BarSpec { index: 4, len: 4096, kind: BarKind::Memory(self.memory.clone()) },
        ]
    }
    fn vectors(&self) -> usize {
        2
    }
    fn start(&mut self, host: Arc<dyn Host>) -> Vec<Box<dyn Engine>> {
        assert_eq!(host.name(), "soft:toy");
        let engine = |portal: &Arc<Portal>| {
            Box::new(ToyEngine {
                portal: Arc::clone(portal),
                bus: host.bus(),
                host: Arc::clone(&host),
                shared: Arc::clone(&self.shared),
            }) as Box<dyn Engine>
        };
        self.portals.iter().map(engine).collect()
    }
    fn read(&mut self, bar: usize, offset: u64, width: Width) -> u64 {
        assert_eq!((bar, offset % width.bytes()), (0, 0));
        match offset {
            register::IDENTITY => IDENTITY,
            register::SCRATCH => self.scratch,
            register::DONE => self.shared.done.load(Ordering::Relaxed),
            register::PORTALS_AT => PORTAL,
            _ => 0,
        }
    }
    fn write(&mut self, _: usize, offset: u64, width: Width, value: u64) {
        if offset == register::SCRATCH {
            let ones = u64::MAX >> (64 - 8 * width.bytes());
            self.scratch = self.scratch & !ones | value & ones;
        }
    }
    fn config_written(&mut self, config: &ConfigSpace) {
        self.shared.bus_master.store(config.bus_master(), Ordering::Relaxed);
    }
    fn reset(&mut self) {
        let _no_step = self.shared.stepping.lock().unwrap_or_else(PoisonError::into_inner);
        for Portal(mailbox) in self.portals.iter().map(|portal| &**portal) {
            mailbox.close();
            mailbox.clear();
            mailbox.open();
        }
        self.scratch = 0;
        self.shared.done.store(0, Ordering::Relaxed);
        self.shared.bus_master.store(false, Ordering::Relaxed);
    }
}

impl Drop for Toy {
    fn drop(&mut self) {
        self.shared.model_dropped.store(true, Ordering::SeqCst);
    }
}

struct ToyEngine {
    portal: Arc<Portal>,
    bus: Bus,
    host: Arc<dyn Host>,
    shared: Arc<Shared>,
}

impl Engine for ToyEngine {
    fn step(&mut self) -> bool {
        let Some(data) = self.portal.0.take() else {
            return false;
        };
        let [pasid, src, dst, len, record] =
            std::array::from_fn(|n| u64::from_le_bytes(data[n * 8..][..8].try_into().unwrap()));
        assert_ne!(record, POISON, "poisoned descriptor");
        let pasid = Pasid::new(pasid as u32);
        let copied = self.shared.bus_master.load(Ordering::Relaxed)
            && self.bus.copy(pasid, Iova::new(src), Iova::new(dst), len).is_ok();
        if record != 0 {
            let _ = self.bus.store(pasid, Iova::new(record), if copied { 1_u64 } else { 2 });
        }
        self.shared.done.fetch_add(1, Ordering::Relaxed);
        self.host.interrupts().trigger(1);
        true
    }
}

impl Drop for ToyEngine {
    fn drop(&mut self) {
        let model_is_there = !self.shared.model_dropped.load(Ordering::SeqCst);
        self.shared.engine_dropped_first.store(model_is_there, Ordering::SeqCst);
    }
}

fn open_with(toy: Toy, run: Run) -> PciDevice {
    let iommu = SoftIommu::new(SoftOptions::default());
    PciDevice::in_process("soft:toy", Box::new(toy), &iommu, run).unwrap()
}

fn open(run: Run) -> PciDevice {
    open_with(Toy::new(), run)
}

fn both() -> [Run; 2] {
    [Run::Stepped, Run::Threads { cores: Vec::new() }]
}

/// Calls `ready` until it is true; on the way, the device's engines are stepped.
fn until(device: &PciDevice, mut ready: impl FnMut() -> bool) {
    let start = Instant::now();
    while !ready() {
        device.step();
        assert!(start.elapsed() < Duration::from_secs(30), "the device never got there");
        std::thread::yield_now();
    }
}

/// A queue of the toy's driver: buffers that the device can reach under a PASID, and a record.
struct Queue {
    portal: Bar,
    pasid: OwnedPasid,
    src: DmaBuf,
    dst: DmaBuf,
    space: DmaSpace,
    record: Records<u64>,
    _attachment: Attachment,
}

impl Queue {
    fn new(device: &PciDevice, n: u64) -> Self {
        let pasid = Pasid::allocate().unwrap();
        let ioas = device.iommu().alloc_ioas().unwrap();
        let attachment = ioas.attach(device, Some(pasid.get())).unwrap();
        let mut space = DmaSpace::new(ioas);
        let mut src = DmaBuf::allocate(3 * 4096).unwrap();
        space.map(src.region(), Access::READ_WRITE).unwrap();
        let mut dst = src.split_off(4096);
        let record = Records::new(dst.split_off(4096), &space, Access::WRITE).unwrap();
        for (n, byte) in src.iter_mut().enumerate() {
            *byte = (n * 7) as u8;
        }
        let page = device.bar(0).unwrap().read64(register::PORTALS_AT);
        let portal = device.bar(2).unwrap().window(n * page, page).unwrap();
        Self { portal, pasid, src, dst, space, record, _attachment: attachment }
    }

    fn copy(&self) -> [u8; 64] {
        let [src, dst] = [&self.src, &self.dst].map(|buf| self.space.iova(buf).unwrap());
        descriptor(self.pasid.get().get(), src, dst, 4096, self.record.iova(0).get())
    }

    fn status(&self) -> u64 {
        self.record.word(0, 0).load(Ordering::Acquire)
    }
}

#[test]
fn a_job_goes_through_registers_portal_dma_and_interrupt() {
    for run in both() {
        let device = open(run);
        device.set_bus_master(true).unwrap();
        let interrupts = device.interrupts(2).unwrap();
        let queue = Queue::new(&device, 1);
        assert_ne!(*queue.src, *queue.dst);
        queue.portal.post64(192, &queue.copy());
        until(&device, || interrupts[1].wait(Some(Duration::ZERO)).unwrap());
        assert_eq!(queue.status(), 1);
        assert_eq!(*queue.src, *queue.dst);
        assert!(interrupts[1].drain() && !interrupts[0].drain());
        assert!(device.next_fault().is_none());
    }
}

#[test]
fn polling_a_register_makes_progress_with_engines_that_have_no_threads() {
    let device = open(Run::Stepped);
    let (queue, registers) = (Queue::new(&device, 0), device.bar(0).unwrap());
    assert_eq!(registers.read64(register::DONE), 0, "opening it gave it nothing to do");
    queue.portal.post64(0, &queue.copy());
    assert_eq!(registers.read32(register::DONE), 0, "the model answers first, then the engines go");
    assert_eq!(registers.read32(register::DONE), 1);
    assert!(!device.step(), "nothing is left");
}

#[test]
fn without_bus_mastering_the_device_does_not_copy() {
    let device = open(Run::Stepped);
    let queue = Queue::new(&device, 0);
    queue.portal.post64(0, &queue.copy());
    assert!(device.step());
    assert_eq!(queue.status(), 2);
    assert_ne!(*queue.src, *queue.dst);
    device.set_bus_master(true).unwrap();
    queue.portal.post64(0, &queue.copy());
    assert!(device.step());
    assert_eq!(queue.status(), 1);
}

#[test]
fn an_address_that_is_not_mapped_is_a_fault_that_names_device_and_pasid() {
    for run in both() {
        let device = open(run);
        device.set_bus_master(true).unwrap();
        let queue = Queue::new(&device, 0);
        let (pasid, nowhere) = (queue.pasid.get(), Iova::new(0x7000_0000_0000));
        let dst = queue.space.iova(&queue.dst).unwrap();
        queue.portal.post64(0, &descriptor(pasid.get(), nowhere, dst, 8, queue.record.iova(0).get()));
        until(&device, || queue.status() == 2);
        let fault = device.next_fault().unwrap();
        assert_eq!((&*fault.device, fault.pasid, fault.iova), ("soft:toy", Some(pasid), nowhere));
        assert_eq!(fault.reason, FaultReason::NotMapped);
    }
}

#[test]
fn registers_are_served_at_every_width_and_windows_keep_their_place() {
    let device = open(Run::Stepped);
    let bar = device.bar(0).unwrap();
    assert_eq!(bar.read64(register::IDENTITY), IDENTITY);
    bar.write64(register::SCRATCH, u64::MAX);
    let window = bar.window(register::SCRATCH, 8).unwrap();
    window.write16(0, 0x1234);
    assert_eq!(window.read64(0), 0xffff_ffff_ffff_1234);
    assert_eq!(window.read8(0), 0x34, "a model's answer is cut to the width of the access");
    let error = bar.window(60, 8).unwrap_err().to_string();
    assert!(error.contains("BAR 0 of soft:toy"), "{error}");
    assert_eq!(bar.enqueue64(0, &[0; 64]).unwrap_err().kind(), ErrorKind::Unsupported);
    assert!(bar.can_post64().is_ok());
}

#[test]
fn a_full_portal_answers_an_enqueue_with_retry() {
    let device = open(Run::Stepped);
    let queue = Queue::new(&device, 1);
    for _ in 0..DEPTH {
        assert!(queue.portal.enqueue64(64, &queue.copy()).unwrap());
    }
    assert!(!queue.portal.enqueue64(64, &queue.copy()).unwrap());
    assert!(device.step());
    assert!(queue.portal.enqueue64(64, &queue.copy()).unwrap());
}

#[test]
fn each_doorbell_page_has_its_own_target_and_what_is_behind_the_last_has_none() {
    let toy = Toy::new();
    let portals = toy.portals.clone();
    let device = open_with(toy, Run::Stepped);
    let bar = device.bar(2).unwrap();
    assert_eq!((bar.len(), bar.read64(0), bar.read8(PORTAL + 3)), (4 * PORTAL, u64::MAX, 0xff));
    bar.write32(PORTAL + 0x24, 0x77);
    assert!(portals[0].0.is_empty());
    let seen = portals[1].0.take().unwrap();
    assert_eq!(u64::from_le_bytes(seen[..8].try_into().unwrap()), 0x24_0400_0077);
    bar.write64(2 * PORTAL, 1);
    bar.post64(3 * PORTAL, &[1; 64]);
    assert!(!bar.enqueue64(3 * PORTAL, &[1; 64]).unwrap());
    assert!(portals.iter().all(|portal| portal.0.is_empty()));
}

#[test]
fn a_memory_bar_is_the_models_own_memory() {
    let toy = Toy::new();
    let memory = toy.memory.clone();
    let device = open_with(toy, Run::Stepped);
    device.bar(4).unwrap().write32(0x104, 7);
    assert_eq!(memory.read64(0x100), 7 << 32);
    let error = device.bar(1).unwrap_err();
    assert!(error.to_string().contains("BAR 1") && error.device_name() == Some("soft:toy"), "{error}");
}

#[test]
fn configuration_space_is_the_models_with_memory_decoding_on() {
    let device = open(Run::Stepped);
    let config = device.config();
    assert_eq!((config.vendor_id(), config.device_id(), config.class()), (0x1d1d, 1, 0x12_0000));
    assert_eq!(config.read16(4), 2);
    let pasid = config.extended_capability(ext_cap::PASID).unwrap();
    config.write16(pasid + 6, 0xffff);
    assert_eq!(config.read16(pasid + 6), 1, "the enable bit, and nothing else");
    assert_eq!(config.capability(cap::MSIX), Some(0x40));
    device.set_bus_master(true).unwrap();
    assert!(config.bus_master());
    device.set_bus_master(false).unwrap();
    assert!(!config.bus_master());
}

#[test]
fn a_reset_drops_work_and_registers_and_keeps_configuration_space() {
    for run in both() {
        let stepped = run == Run::Stepped;
        let device = open(run);
        device.set_bus_master(true).unwrap();
        let (queue, registers) = (Queue::new(&device, 0), device.bar(0).unwrap());
        registers.write64(register::SCRATCH, 5);
        queue.portal.post64(0, &queue.copy());
        device.reset().unwrap();
        assert_eq!(registers.read64(register::SCRATCH), 0);
        if stepped {
            assert_eq!((device.step(), queue.status()), (false, 0));
        }
        assert!(device.config().bus_master());
        queue.record.word(0, 0).store(0, Ordering::Release);
        queue.portal.post64(0, &queue.copy());
        until(&device, || queue.status() == 1);
    }
}

#[test]
fn an_engine_that_panics_is_reported_and_the_rest_goes_on() {
    for run in both() {
        let device = open(run);
        device.set_bus_master(true).unwrap();
        let (bad, good) = (Queue::new(&device, 0), Queue::new(&device, 1));
        assert!(device.failure().is_none());
        bad.portal.post64(0, &descriptor(1, Iova::new(0), Iova::new(0), 0, POISON));
        until(&device, || device.failure().is_some());
        let text = device.failure().unwrap().to_string();
        assert!(text.contains("soft:toy") && text.contains("poisoned descriptor"), "{text}");
        good.portal.post64(0, &good.copy());
        until(&device, || good.status() == 1);
        device.reset().unwrap();
    }
}

#[test]
fn dropping_the_device_ends_its_engines_before_its_model_and_leaves_bars_dead() {
    for run in both() {
        let toy = Toy::new();
        let shared = Arc::clone(&toy.shared);
        let device = open_with(toy, run);
        device.set_bus_master(true).unwrap();
        let queue = Queue::new(&device, 0);
        let registers = device.bar(0).unwrap();
        drop(device);
        assert!(shared.engine_dropped_first.load(Ordering::SeqCst));
        queue.portal.post64(0, &queue.copy());
        assert_eq!(registers.read64(register::IDENTITY), IDENTITY);
        assert_eq!((registers.read64(register::DONE), queue.status()), (0, 0));
        assert!(!shared.model_dropped.load(Ordering::SeqCst));
        drop((registers, queue));
        assert!(shared.model_dropped.load(Ordering::SeqCst));
    }
}

#[test]
fn engines_run_on_the_cores_that_were_named() {
    let cores = underpass::worker::cores();
    let device = open(Run::Threads { cores: vec![cores[0]] });
    assert_eq!(device.engine_cores(), [Some(cores[0]); 2]);
    assert_eq!(open(Run::Threads { cores: Vec::new() }).engine_cores(), [None; 2]);
    assert_eq!(open(Run::Stepped).engine_cores(), []);
    let iommu = SoftIommu::new(SoftOptions::default());
    let run = Run::Threads { cores: vec![cores[0], 4711] };
    let error = PciDevice::in_process("soft:toy", Box::new(Toy::new()), &iommu, run).unwrap_err();
    assert_eq!((error.kind(), error.device_name()), (ErrorKind::NotFound, Some("soft:toy")));
}

#[test]
fn more_vectors_than_there_are_is_an_error() {
    let device = open(Run::Stepped);
    assert_eq!(device.interrupts(2).unwrap().len(), 2);
    let error = device.interrupts(3).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert!(error.to_string().contains("has 2"), "{error}");
}

#[test]
fn a_model_whose_bars_make_no_sense_is_refused() {
    struct Odd(fn() -> BarSpec);
    impl Model for Odd {
        fn config_space(&self) -> ConfigSpace {
            ConfigSpace::new(0, 0, 0)
        }
        fn bars(&self) -> Vec<BarSpec> {
            vec![(self.0)()]
        }
        fn vectors(&self) -> usize {
            0
        }
        fn start(&mut self, _: Arc<dyn Host>) -> Vec<Box<dyn Engine>> {
            Vec::new()
        }
        fn read(&mut self, _: usize, _: u64, _: Width) -> u64 {
            0
        }
        fn write(&mut self, _: usize, _: u64, _: Width, _: u64) {}
        fn config_written(&mut self, _: &ConfigSpace) {}
        fn reset(&mut self) {}
    }
    fn doorbells(page: u64) -> BarSpec {
        let targets = vec![Portal::open(1) as Arc<dyn Doorbell>; 2];
        BarSpec { index: 0, len: 4096, kind: BarKind::Doorbells { page, targets } }
    }
    let iommu = SoftIommu::new(SoftOptions::default());
    let odd: [fn() -> BarSpec; 6] = [
        || BarSpec { index: 6, len: 64, kind: BarKind::Registers },
        || BarSpec { index: 0, len: 100, kind: BarKind::Registers },
        || BarSpec { index: 0, len: 0, kind: BarKind::Registers },
        || BarSpec { index: 0, len: 8192, kind: BarKind::Memory(Bar::memory(4096)) },
        || doorbells(1000),
        || doorbells(4096),
    ];
    for spec in odd {
        let open = PciDevice::in_process("soft:odd", Box::new(Odd(spec)), &iommu, Run::Stepped);
        assert_eq!(open.unwrap_err().device_name(), Some("soft:odd"));
    }
    let even =
        PciDevice::in_process("soft:even", Box::new(Odd(|| doorbells(2048))), &iommu, Run::Stepped).unwrap();
    assert_eq!(Attachable::name(&even), "soft:even");
}
