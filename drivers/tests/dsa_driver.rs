//! The DSA driver against the model: bring-up, odd registers, resets, the order of drops, interrupts.

#![allow(clippy::unwrap_used, reason = "a test")]

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use underpass::accel::{Accelerator, Channel, Config, Done, Job, JobError, Op, OpKind, Reason, State};
use underpass::dma::DmaBuf;
use underpass::iommu::soft::{SoftIommu, SoftOptions};
use underpass::model::{BarSpec, Engine, Host, Model, Width};
use underpass::pci::{ConfigSpace, PciDevice, Run};
use underpass::{Access, Burst, ErrorKind, Region, Result};
use underpass_drivers::dsa::model::{DsaModel, DsaProfile};
use underpass_drivers::dsa::spec::reg;
use underpass_drivers::dsa::{Dsa, WqMode};

/// Longer than anything takes here, on a busy machine too.
const PATIENCE: Duration = Duration::from_secs(20);

const THREADS: Run = Run::Threads { cores: Vec::new() };

/// What a register reads as, from its offset and its true value.
type Lie = Box<dyn FnMut(u64, u64) -> u64 + Send>;

/// The model, with registers that lie.
struct Lying {
    inner: DsaModel,
    lie: Lie,
}

impl Model for Lying {
    fn config_space(&self) -> ConfigSpace {
        self.inner.config_space()
    }

    fn bars(&self) -> Vec<BarSpec> {
        self.inner.bars()
    }

    fn vectors(&self) -> usize {
        self.inner.vectors()
    }

    fn start(&mut self, host: Arc<dyn Host>) -> Vec<Box<dyn Engine>> {
        self.inner.start(host)
    }

    fn read(&mut self, bar: usize, offset: u64, width: Width) -> u64 {
        let value = self.inner.read(bar, offset, width);
        (self.lie)(offset, value)
    }

    fn write(&mut self, bar: usize, offset: u64, width: Width, value: u64) {
        self.inner.write(bar, offset, width, value);
    }

    fn config_written(&mut self, config: &ConfigSpace) {
        self.inner.config_written(config);
    }

    fn reset(&mut self) {
        self.inner.reset();
    }
}

fn pci(profile: DsaProfile, run: Run, options: SoftOptions, lie: Lie) -> PciDevice {
    let model = Lying { inner: DsaModel::new(profile), lie };
    PciDevice::in_process("soft:dsa", Box::new(model), &SoftIommu::new(options), run).unwrap()
}

fn leases() -> SoftOptions {
    SoftOptions { check_leases: true, ..SoftOptions::default() }
}

fn honest(run: Run) -> Dsa {
    Dsa::open(pci(DsaProfile::default(), run, leases(), Box::new(|_, value| value))).unwrap()
}

fn lying(lie: impl FnMut(u64, u64) -> u64 + Send + 'static) -> Result<Dsa> {
    Dsa::open(pci(DsaProfile::default(), Run::Stepped, leases(), Box::new(lie)))
}

/// A region that the channel maps, as buffers of 4 KiB.
fn memory(channel: &mut dyn Channel) -> (Arc<Region>, Vec<DmaBuf>) {
    let region = Region::builder(256 << 10).build().unwrap();
    channel.map(&region, Access::READ_WRITE).unwrap();
    let mut whole = DmaBuf::new(Arc::clone(&region)).unwrap();
    for (at, byte) in whole.iter_mut().enumerate() {
        *byte = (at / 4096 + at % 251) as u8;
    }
    (region, whole.into_chunks(4096))
}

fn copy(buffers: &mut Vec<DmaBuf>) -> Job {
    Job::copy(buffers.pop().unwrap(), buffers.pop().unwrap())
}

/// Polls, with `step` in between, until `count` jobs are back.
fn collect(channel: &mut dyn Channel, count: usize, step: impl Fn() -> bool) -> Vec<Done> {
    let begun = Instant::now();
    let mut all = Vec::new();
    let mut done = Burst::with_capacity(3);
    while all.len() < count {
        step();
        channel.poll(&mut done);
        all.extend(done.drain_all());
        assert!(begun.elapsed() < PATIENCE, "{} of {count} came back", all.len());
    }
    all
}

fn assert_copied(done: &Done) {
    let Op::Copy { src, dst } = &done.job.op else { panic!("a copy was submitted: {done:?}") };
    done.result.as_ref().unwrap();
    assert!(src.buf()[..] == dst[..], "job {}", done.job.tag);
}

fn bring_up_and_copy(run: Run, mode: WqMode, options: SoftOptions) {
    let has_pasids = options.max_pasids != 0;
    let device = pci(DsaProfile::default(), run, options, Box::new(|_, value| value));
    let mut dsa = Dsa::open(device).unwrap().with_mode(mode);
    let config = Config { channels: 2, depth: 4, batch: 4, ..Config::default() };
    let mut channels = dsa.channels(&config).unwrap();
    let pasids: Vec<_> = channels.iter().map(|channel| channel.pasid()).collect();
    assert_eq!(pasids.iter().all(Option::is_some), has_pasids);
    assert!(!has_pasids || pasids[0] != pasids[1]);
    for channel in &mut channels {
        let channel = &mut **channel;
        let (_region, mut buffers) = memory(channel);
        assert_eq!((channel.limits().depth, channel.limits().max_batch), (4, 4));
        for round in 0..3 {
            channel.submit(copy(&mut buffers).tag(round)).unwrap();
            let mut jobs = Burst::with_capacity(4);
            while jobs.push(copy(&mut buffers)).is_ok() {}
            assert_eq!(channel.submit_batch(&mut jobs), Ok(4));
            assert!(jobs.is_empty());
            assert_eq!(channel.outstanding(), 5);
            let back = collect(channel, 5, || dsa.device().step());
            back.iter().for_each(assert_copied);
            for done in back {
                let Op::Copy { src: underpass::accel::Source::Owned(src), dst } = done.job.op else {
                    continue;
                };
                buffers.extend([src, dst]);
            }
        }
        assert_eq!(channel.counters().values().bytes, 3 * 5 * 4096);
        assert_eq!(channel.counters().values().jobs, 15);
    }
    assert!(dsa.next_error().is_none());
    assert!(dsa.next_fault().is_none());
    assert_eq!(dsa.channels(&config).unwrap_err().kind(), ErrorKind::Busy);
}

#[test]
fn it_is_brought_up_and_copies_however_its_engines_run() {
    bring_up_and_copy(Run::Stepped, WqMode::Dedicated, leases());
    bring_up_and_copy(THREADS, WqMode::Dedicated, leases());
    bring_up_and_copy(Run::Stepped, WqMode::Shared, leases());
    bring_up_and_copy(THREADS, WqMode::Shared, leases());
    bring_up_and_copy(Run::Stepped, WqMode::Dedicated, SoftOptions { max_pasids: 0, ..leases() });
}

#[test]
fn what_the_device_has_not_is_refused() {
    let refused = |config: Config, kind, text: &str| {
        let mut dsa = honest(Run::Stepped);
        let error = dsa.channels(&config).map(|_| ()).unwrap_err();
        assert_eq!(error.kind(), kind, "{error}");
        assert!(error.to_string().contains(text), "{error}");
        assert_eq!(error.device_name(), Some("soft:dsa"));
        dsa.channels(&Config::default()).expect("a refusal takes nothing");
    };
    let config = Config::default;
    refused(Config { channels: 9, ..config() }, ErrorKind::InvalidInput, "9 channels");
    refused(Config { channels: 2, depth: 65, ..config() }, ErrorKind::InvalidInput, "it has 64");
    refused(Config { batch: 1025, ..config() }, ErrorKind::InvalidInput, "it has 1024");

    let open = |profile, mode, options| {
        let device = pci(profile, Run::Stepped, options, Box::new(|_, value| value));
        Dsa::open(device).unwrap().with_mode(mode).channels(&Config { channels: 2, ..Config::default() })
    };
    let few = SoftOptions { max_pasids: 1, ..leases() };
    let error = open(DsaProfile::default(), WqMode::Dedicated, few).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Exhausted, "{error}");
    let none = SoftOptions { max_pasids: 0, ..leases() };
    let error = open(DsaProfile::default(), WqMode::Shared, none).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
    let profile = DsaProfile { shared: false, ..DsaProfile::default() };
    let error = open(profile, WqMode::Shared, leases()).unwrap_err();
    assert!(error.to_string().contains("WQCAP"), "{error}");
    assert_eq!(error.mend_text(), Some("use dedicated work queues"));
}

#[test]
fn registers_that_make_no_sense_are_errors_that_name_them() {
    let refused = |register: &str, offset: u64, value: u64| {
        let error = lying(move |at, truth| if at == offset { value } else { truth }).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Device, "{error}");
        assert!(error.to_string().contains(&format!("{register} is {value:#x}")), "{error}");
    };
    refused("VERSION", reg::VERSION, 0);
    refused("VERSION", reg::VERSION, 0xffff_ffff);
    // No queues, no entries, a stride of a megabyte.
    refused("WQCAP", reg::WQCAP, 128);
    refused("WQCAP", reg::WQCAP, 8 << 16);
    refused("WQCAP", reg::WQCAP, 15 << 24 | 8 << 16 | 128);
    refused("GRPCAP", reg::GRPCAP, 0);
    refused("ENGCAP", reg::ENGCAP, 0);
    refused("ENGCAP", reg::ENGCAP, 0xff);

    // Each of the three tables, past the end or over the registers.
    for field in 0..3 {
        for unit in [0xffff, 0x100, 0] {
            let lie = move |at, truth: u64| match at {
                reg::OFFSETS => truth & !(0xffff << (field * 16)) | unit << (field * 16),
                _ => truth,
            };
            let error = lying(lie).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Device, "{error}");
            assert!(error.to_string().contains("OFFSETS"), "{error}");
        }
    }
    // More queues than have portals.
    let lie = |at, truth: u64| if at == reg::WQCAP { truth | 0xff << 16 } else { truth };
    assert_eq!(lying(lie).unwrap_err().kind(), ErrorKind::Device);
    // All that can be claimed, on top of what is there: what is not refused still works within it.
    for offset in [reg::GENCAP, reg::OPCAP, reg::GRPCAP] {
        let Ok(mut dsa) = lying(move |at, truth| if at == offset { truth | !0 >> 1 } else { truth }) else {
            continue;
        };
        let _ = dsa.channels(&Config { batch: 2, ..Config::default() });
    }
    // No operations: then it does none.
    let dsa = lying(|at, truth| if at == reg::OPCAP { 0 } else { truth }).unwrap();
    assert_eq!((dsa.limits().ops.iter().count(), dsa.limits().max_batch), (0, 1));
    // A configuration that can not be written.
    let error = lying(|at, truth| if at == reg::GENCAP { truth & !(1 << 31) } else { truth }).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert!(error.mend_text().is_some(), "{error}");
    // A command that is refused.
    let error = lying(|at, truth| if at == reg::CMDSTS { 1 } else { truth }).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Device);
    assert!(error.mend_text().is_some(), "{error}");
}

#[test]
fn another_device_is_refused_with_the_ids_of_those_that_are_known() {
    struct Other(DsaModel);
    impl Model for Other {
        fn config_space(&self) -> ConfigSpace {
            ConfigSpace::new(0x8086, 0x0cfe, 0x08_8000)
        }
        fn bars(&self) -> Vec<BarSpec> {
            self.0.bars()
        }
        fn vectors(&self) -> usize {
            0
        }
        fn start(&mut self, _: Arc<dyn Host>) -> Vec<Box<dyn Engine>> {
            Vec::new()
        }
        fn read(&mut self, _: usize, _: u64, _: Width) -> u64 {
            panic!("its registers are unknown: it must not be touched")
        }
        fn write(&mut self, _: usize, _: u64, _: Width, _: u64) {
            panic!("its registers are unknown: it must not be touched")
        }
        fn config_written(&mut self, _: &ConfigSpace) {}
        fn reset(&mut self) {}
    }
    let model = Box::new(Other(DsaModel::default()));
    let device = PciDevice::in_process("soft:iaa", model, &SoftIommu::new(leases()), Run::Stepped).unwrap();
    let error = Dsa::open(device).unwrap_err();
    assert_eq!((error.kind(), error.device_name()), (ErrorKind::Unsupported, Some("soft:iaa")));
    assert!(error.to_string().contains("8086:0cfe"), "{error}");
    assert!(error.mend_text().is_some_and(|mend| mend.contains("8086:0b25")), "{error}");
}

#[test]
fn a_command_that_does_not_end_has_a_deadline() {
    let begun = Instant::now();
    let error = lying(|at, truth| if at == reg::CMDSTS { 1 << 31 } else { truth }).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Timeout);
    assert!(error.to_string().contains("CMDSTS is still 0x80000000"), "{error}");
    assert!(begun.elapsed() < PATIENCE);
}

#[test]
fn a_queue_that_is_not_enabled_is_noticed() {
    // WQCFG's table starts at 0x400; its status word reads as disabled.
    let mut dsa = lying(|at, truth| if at == 0x400 + 24 { 0 } else { truth }).unwrap();
    let error = dsa.channels(&Config::default()).map(|_| ()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Device, "{error}");
    assert!(error.to_string().contains("WQCFG 0"), "{error}");
}

#[test]
fn the_devices_own_errors_are_reported_once_and_stall_their_queue() {
    let lie = Arc::new(Mutex::new((0_u64, 0_u64)));
    let shared = Arc::clone(&lie);
    let mut dsa = lying(move |at, truth| match at {
        // It stays, whatever is written to it.
        reg::SWERR if shared.lock().unwrap().0 != 0 => shared.lock().unwrap().0,
        reg::GENSTS if shared.lock().unwrap().1 != 0 => shared.lock().unwrap().1,
        _ => truth,
    })
    .unwrap();
    let mut channels = dsa.channels(&Config { channels: 2, ..Config::default() }).unwrap();
    assert!(dsa.next_error().is_none());

    // Valid, of queue 1: a page fault on a completion record.
    lie.lock().unwrap().0 = 1 | 1 << 3 | 0x1a << 8 | 1 << 16;
    let error = dsa.next_error().unwrap();
    assert!(error.to_string().contains("SWERR is 0x0000000000011a09"), "{error}");
    assert!(error.to_string().contains("page fault on the completion record, work queue 1"), "{error}");
    assert!(dsa.next_error().is_none(), "once, though it stays");
    assert_eq!((channels[0].state(), channels[1].state()), (State::Running, State::Stalled));
    let rejected = channels[1].submit(Job::new(Op::Nop)).unwrap_err();
    assert_eq!(rejected.why, Reason::NotRunning);
    lie.lock().unwrap().0 = 0;
    assert_eq!(channels[1].reset(&mut Burst::with_capacity(1)).unwrap(), 0);
    assert_eq!(channels[1].state(), State::Running);

    // Halted, a software reset is needed.
    lie.lock().unwrap().1 = 3;
    let error = dsa.next_error().unwrap();
    assert!(error.to_string().contains("GENSTS is 0x00000003"), "{error}");
    assert!(dsa.next_error().is_none());
    assert!(channels.iter().all(|channel| channel.state() == State::Stalled));
}

#[test]
fn a_halted_device_is_reset_as_a_whole_and_every_channel_comes_back() {
    comes_back_from_a_halt(DsaProfile::default(), false);
    comes_back_from_a_halt(DsaProfile::default(), true);
    // CMDCAP is there, and has no commands for handles.
    comes_back_from_a_halt(DsaProfile { command_capabilities: true, ..DsaProfile::default() }, true);
    // The reset takes back the handles that were asked for.
    comes_back_from_a_halt(DsaProfile { interrupt_handles: true, ..DsaProfile::default() }, true);
}

fn comes_back_from_a_halt(profile: DsaProfile, interrupts: bool) {
    let halted = Arc::new(AtomicBool::new(false));
    let shared = Arc::clone(&halted);
    let lie = Box::new(move |at, truth| match at {
        reg::GENSTS if shared.swap(false, Ordering::Relaxed) => 3,
        _ => truth,
    });
    let mut dsa = Dsa::open(pci(profile, Run::Stepped, leases(), lie)).unwrap();
    let config = Config { channels: 2, depth: 4, interrupts, ..Config::default() };
    let mut channels = dsa.channels(&config).unwrap();
    let mut done = Burst::with_capacity(4);
    for channel in &mut channels {
        channel.submit(Job::new(Op::Nop)).unwrap();
    }
    halted.store(true, Ordering::Relaxed);
    assert_eq!(channels[0].reset(&mut done).unwrap(), 0);
    assert_eq!(channels[1].state(), State::Stalled, "its job went with the device's reset");
    assert_eq!(channels[1].reset(&mut done).unwrap(), 0);
    assert_eq!(done.len(), 2);
    for channel in &mut channels {
        let (_region, mut buffers) = memory(&mut **channel);
        channel.submit(copy(&mut buffers)).unwrap();
        collect(&mut **channel, 1, || dsa.device().step()).iter().for_each(assert_copied);
        if interrupts {
            channel.submit(copy(&mut buffers)).unwrap();
            while dsa.device().step() {}
            let begun = Instant::now();
            channel.wait(PATIENCE).unwrap();
            assert!(begun.elapsed() < PATIENCE / 2);
            collect(&mut **channel, 1, || false).iter().for_each(assert_copied);
            // And an ordinary reset does not ask for the handle a second time.
            assert_eq!(channel.reset(&mut done).unwrap(), 0);
            channel.submit(copy(&mut buffers)).unwrap();
            collect(&mut **channel, 1, || dsa.device().step()).iter().for_each(assert_copied);
        }
    }
}

#[test]
fn an_error_register_that_never_clears_is_reported_once() {
    let mut reads = 0;
    let mut broken = lying(move |at, truth| {
        if at != reg::SWERR {
            return truth;
        }
        // Valid, and something else each time.
        reads += 1;
        1 | reads << 40
    })
    .unwrap();
    assert!(broken.next_error().is_some());
    assert!((0..1000).all(|_| broken.next_error().is_none()));
}

#[test]
fn an_error_that_comes_while_another_is_acknowledged_is_not_lost() {
    // What a driver reads of SWERR's first word: an error and, after its acknowledge, already the next.
    let first = 1 | 0x10 << 8;
    let second = 1 | 0x11 << 8;
    let mut reads = [0, first, second, second, 0, 0].into_iter();
    let mut dsa = lying(move |at, truth| match at {
        reg::SWERR => reads.next().unwrap_or(truth),
        _ => truth,
    })
    .unwrap();
    assert!(dsa.next_error().is_none());
    assert!(dsa.next_error().unwrap().to_string().contains("SWERR is 0x0000000000001001"));
    assert!(dsa.next_error().unwrap().to_string().contains("SWERR is 0x0000000000001101"));
    assert!(dsa.next_error().is_none());
}

#[test]
fn a_late_job_stalls_its_channel_and_comes_back_from_a_reset() {
    let mut dsa = honest(Run::Stepped);
    let deadline = Some(Duration::from_millis(20));
    let mut channels = dsa.channels(&Config { depth: 8, batch: 4, deadline, ..Config::default() }).unwrap();
    let channel = &mut *channels[0];
    let (region, mut buffers) = memory(channel);
    for tag in 0..3 {
        channel.submit(copy(&mut buffers).tag(tag)).unwrap();
    }
    let mut jobs = Burst::with_capacity(4);
    while jobs.push(copy(&mut buffers).tag(9)).is_ok() {}
    channel.submit_batch(&mut jobs).unwrap();
    // Nobody steps the engine.
    let begun = Instant::now();
    let mut done = Burst::with_capacity(2);
    while channel.state() == State::Running {
        assert_eq!(channel.poll(&mut done), 0);
        assert!(begun.elapsed() < PATIENCE);
    }
    assert!(begun.elapsed() >= Duration::from_millis(20));
    assert_eq!(channel.submit(Job::new(Op::Nop)).unwrap_err().why, Reason::NotRunning);
    assert_eq!(channel.unmap(&region).unwrap_err().kind(), ErrorKind::Busy);

    let mut back = Vec::new();
    let mut left = Vec::new();
    while left.last() != Some(&0) {
        left.push(channel.reset(&mut done).unwrap());
        back.extend(done.drain_all());
    }
    assert_eq!(left, [5, 3, 1, 0]);
    let tags: Vec<_> = back.iter().map(|done| done.job.tag).collect();
    assert_eq!(tags, [0, 1, 2, 9, 9, 9, 9]);
    for done in &back {
        assert!(matches!(done.result, Ok(_) | Err(JobError::Reset)), "{:?}", done.result);
    }
    assert_eq!((channel.state(), channel.outstanding()), (State::Running, 0));
    channel.submit(copy(&mut buffers)).unwrap();
    collect(channel, 1, || dsa.device().step()).iter().for_each(assert_copied);
    channel.unmap(&region).unwrap();
}

#[test]
fn a_device_that_does_not_stop_keeps_the_memory() {
    let stuck = Arc::new(AtomicBool::new(false));
    let shared = Arc::clone(&stuck);
    let mut dsa = lying(move |at, truth| match at {
        reg::CMDSTS if shared.load(Ordering::Relaxed) => truth | 1 << 31,
        _ => truth,
    })
    .unwrap();
    let mut channels = dsa.channels(&Config { channels: 2, ..Config::default() }).unwrap();
    let mut regions = Vec::new();
    for channel in &mut channels {
        let (region, mut buffers) = memory(&mut **channel);
        channel.submit(copy(&mut buffers)).unwrap();
        regions.push(region);
    }
    stuck.store(true, Ordering::Relaxed);
    let mut done = Burst::with_capacity(1);
    let error = channels[0].reset(&mut done).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Timeout, "{error}");
    assert!(error.to_string().contains("memory stays allocated"), "{error}");
    assert_eq!((channels[0].state(), channels[0].outstanding()), (State::Gone, 0));
    assert_eq!(channels[0].submit(Job::new(Op::Nop)).unwrap_err().why, Reason::NotRunning);
    assert_eq!(channels[0].reset(&mut done).unwrap_err().kind(), ErrorKind::Gone);
    assert_eq!(channels[0].map(&regions[0], Access::READ).unwrap_err().kind(), ErrorKind::Gone);
    // The other one finds out when it is dropped.
    drop(channels);
    drop(dsa);
    for region in &regions {
        assert!(Arc::strong_count(region) > 1, "{region:?} is still mapped");
    }
}

#[test]
fn device_and_channels_can_be_dropped_in_any_order() {
    for run in [Run::Stepped, THREADS] {
        for device_first in [true, false] {
            let mut dsa = Some(honest(run.clone()));
            let config = Config { channels: 3, batch: 2, interrupts: true, ..Config::default() };
            let mut channels = dsa.as_mut().unwrap().channels(&config).unwrap();
            let mut regions = Vec::new();
            for channel in &mut channels {
                let (region, mut buffers) = memory(&mut **channel);
                for _ in 0..5 {
                    channel.submit(copy(&mut buffers)).unwrap();
                }
                let mut jobs = Burst::with_capacity(2);
                while jobs.push(copy(&mut buffers)).is_ok() {}
                channel.submit_batch(&mut jobs).unwrap();
                regions.push(region);
            }
            if device_first {
                drop(dsa.take());
            }
            // The remaining channels still work.
            drop(channels.remove(1));
            for (channel, region) in channels.iter_mut().zip([&regions[0], &regions[2]]) {
                let mut done = Burst::with_capacity(64);
                assert_eq!(channel.reset(&mut done).unwrap(), 0);
                assert_eq!(done.len(), 7);
                drop(done);
                channel.unmap(region).unwrap();
            }
            drop(channels);
            drop(dsa);
            for region in &regions {
                assert_eq!(Arc::strong_count(region), 1, "nothing holds the memory any more");
            }
        }
    }
}

#[test]
fn waiting_for_interrupts_misses_no_completion() {
    let mut dsa = honest(THREADS);
    let config = Config { channels: 2, depth: 4, batch: 4, interrupts: true, ..Config::default() };
    let mut channels = dsa.channels(&config).unwrap();
    let [channel, idle] = &mut channels[..] else { panic!("two channels were asked for") };
    let (_region, mut buffers) = memory(&mut **channel);
    let mut done = Burst::with_capacity(8);
    let mut job = Some(copy(&mut buffers));
    for round in 0..2000 {
        if round % 3 == 0 {
            let mut jobs = Burst::with_capacity(2);
            while jobs.push(Job::new(Op::Nop)).is_ok() {}
            channel.submit_batch(&mut jobs).unwrap();
        } else {
            channel.submit(job.take().unwrap()).unwrap();
        }
        let begun = Instant::now();
        while channel.outstanding() != 0 {
            channel.wait(PATIENCE).unwrap();
            assert!(begun.elapsed() < PATIENCE / 2, "round {round}: no wake-up came");
            channel.poll(&mut done);
        }
        for done in done.drain_all() {
            done.result.unwrap();
            if done.job.op.kind() == OpKind::Copy {
                job = Some(done.job);
            }
        }
    }
    let begun = Instant::now();
    idle.wait(Duration::from_millis(30)).unwrap();
    assert!(begun.elapsed() >= Duration::from_millis(30), "nothing woke the other channel");

    let mut polled = honest(THREADS);
    let mut channels = polled.channels(&Config::default()).unwrap();
    assert_eq!(channels[0].wait(Duration::ZERO).unwrap_err().kind(), ErrorKind::Unsupported);
}

#[test]
fn a_wait_ends_at_the_deadline_of_a_job() {
    let mut dsa = honest(Run::Stepped);
    let deadline = Some(Duration::from_millis(30));
    let mut channels = dsa.channels(&Config { interrupts: true, deadline, ..Config::default() }).unwrap();
    channels[0].submit(Job::new(Op::Nop)).unwrap();
    let begun = Instant::now();
    channels[0].wait(PATIENCE).unwrap();
    assert!(begun.elapsed() < PATIENCE / 2);
    assert_eq!(channels[0].state(), State::Stalled);
}

#[test]
fn a_wait_without_an_end_ends_too() {
    let mut dsa = honest(THREADS);
    let mut channels = dsa.channels(&Config { interrupts: true, ..Config::default() }).unwrap();
    channels[0].submit(Job::new(Op::Nop)).unwrap();
    channels[0].wait(Duration::MAX).unwrap();
    assert_eq!(channels[0].poll(&mut Burst::with_capacity(1)), 1);
    // At the deadline, where the device does nothing.
    let mut dsa = honest(Run::Stepped);
    let deadline = Some(Duration::from_millis(30));
    let mut channels = dsa.channels(&Config { interrupts: true, deadline, ..Config::default() }).unwrap();
    channels[0].submit(Job::new(Op::Nop)).unwrap();
    channels[0].wait(Duration::MAX).unwrap();
    assert_eq!(channels[0].state(), State::Stalled);
}

#[test]
fn a_deadline_does_not_depend_on_how_often_one_polls() {
    let mut dsa = honest(Run::Stepped);
    let deadline = Duration::from_millis(20);
    let mut channels = dsa.channels(&Config { deadline: Some(deadline), ..Config::default() }).unwrap();
    channels[0].submit(Job::new(Op::Nop)).unwrap();
    let begun = Instant::now();
    let mut polls = 0;
    while channels[0].state() == State::Running {
        assert_eq!(channels[0].poll(&mut Burst::with_capacity(1)), 0);
        polls += 1;
        thread::sleep(Duration::from_millis(5));
    }
    assert!(begun.elapsed() >= deadline);
    // Counted in polls, because a busy machine sleeps for longer than it was asked to.
    assert!(polls <= 6, "{polls} polls, 5 ms apart, until the deadline of {deadline:?} was noticed");
}

#[test]
fn what_was_rejected_was_not_lent() {
    // check=leases: a lease that stays behind would let the device write to a buffer that the caller has again.
    let mut dsa = honest(Run::Stepped);
    let mut channels = dsa.channels(&Config { depth: 2, batch: 4, ..Config::default() }).unwrap();
    let channel = &mut *channels[0];
    let (region, mut buffers) = memory(channel);
    let stranger = DmaBuf::allocate(4096).unwrap();
    let mut jobs = Burst::with_capacity(3);
    jobs.push(copy(&mut buffers)).unwrap();
    jobs.push(Job::copy(stranger, buffers.pop().unwrap())).unwrap();
    jobs.push(Job::new(Op::Drain)).unwrap();
    assert_eq!(channel.submit_batch(&mut jobs), Err((1, Reason::NotMapped)));
    assert_eq!(jobs.len(), 3, "all are the caller's still");
    assert_eq!(channel.counters().values().refused, 1);
    assert_eq!(channel.outstanding(), 0);

    let refused = jobs.drain_all().next().unwrap();
    let Op::Copy { src, .. } = refused.op else { panic!("it was a copy") };
    // Mapped, but not lent: the device is refused it.
    let iova = underpass::Iova::new(region.preferred_iova().unwrap().get() + src.buf().offset() as u64);
    channel.submit(Job::new(Op::Probe { iova, len: 16 })).unwrap();
    let back = collect(channel, 1, || dsa.device().step());
    assert!(matches!(back[0].result, Err(JobError::PageFault { .. })), "{:?}", back[0].result);
}
