//! DSA: what the driver itself costs, what a job costs on the software device, and copies beside memcpy.
//!
//! `cargo bench -p underpass-benches --bench dsa`.
//!
//! The driver's own cost is measured against a device that is only memory: registers are the model's, so that the
//! driver starts as ever, but its portals are plain memory, and the completion records are set between the
//! submissions and the polling, outside the measured time.

#![allow(missing_docs, reason = "criterion's macros make undocumented functions")]
#![allow(clippy::unwrap_used, reason = "a benchmark that can not be set up has nothing to measure")]
#![allow(clippy::cast_precision_loss, reason = "counts of iterations are far below 2^52")]

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use underpass::accel::{Accelerator, Channel, Config, Done, Job, Op};
use underpass::bar::Bar;
use underpass::dma::DmaBuf;
use underpass::iommu::soft::{SoftIommu, SoftOptions};
use underpass::model::{BarKind, BarSpec, Bus, Engine, Host, Model, Width};
use underpass::pci::{ConfigSpace, PciDevice, Run};
use underpass::{Access, Burst, Iova, Pasid, Region};
use underpass_drivers::dsa::Dsa;
use underpass_drivers::dsa::model::{DsaModel, DsaProfile};
use underpass_drivers::dsa::spec::{CompletionRecord, Descriptor, Opcode, Status};
use zerocopy::FromBytes;

const DEPTH: usize = 32;
const BATCH: usize = 32;

/// The DSA model with portals of plain memory.
struct PlainPortals {
    model: DsaModel,
    portals: Bar,
    bus: Arc<Mutex<Option<Bus>>>,
}

impl Model for PlainPortals {
    fn config_space(&self) -> ConfigSpace {
        self.model.config_space()
    }
    fn bars(&self) -> Vec<BarSpec> {
        let mut bars = self.model.bars();
        for bar in &mut bars {
            if matches!(bar.kind, BarKind::Doorbells { .. }) {
                bar.kind = BarKind::Memory(self.portals.clone());
            }
        }
        bars
    }
    fn vectors(&self) -> usize {
        self.model.vectors()
    }
    fn start(&mut self, host: Arc<dyn Host>) -> Vec<Box<dyn Engine>> {
        *self.bus.lock().unwrap() = Some(host.bus());
        self.model.start(host)
    }
    fn read(&mut self, bar: usize, offset: u64, width: Width) -> u64 {
        self.model.read(bar, offset, width)
    }
    fn write(&mut self, bar: usize, offset: u64, width: Width, value: u64) {
        self.model.write(bar, offset, width, value);
    }
    fn config_written(&mut self, config: &ConfigSpace) {
        self.model.config_written(config);
    }
    fn reset(&mut self) {
        self.model.reset();
    }
}

/// Sets the completion records of everything that stands in the portals.
struct Completer {
    portals: Bar,
    bus: Bus,
    pasid: Option<Pasid>,
}

impl Completer {
    fn complete_all(&mut self) -> usize {
        let mut completed = 0;
        for offset in (0..self.portals.len()).step_by(64) {
            if self.portals.read64(offset + 8) == 0 {
                continue;
            }
            let mut bytes = [0; 64];
            for (n, word) in bytes.chunks_exact_mut(8).enumerate() {
                word.copy_from_slice(&self.portals.read64(offset + 8 * n as u64).to_le_bytes());
            }
            self.portals.write64(offset + 8, 0);
            completed += self.complete(Descriptor::read_from_bytes(&bytes).unwrap());
        }
        completed
    }

    fn complete(&mut self, descriptor: Descriptor) -> usize {
        let mut completed = 0;
        if descriptor.operation >> 24 == Opcode::Batch as u32 {
            let (list, count) = (descriptor.source, descriptor.size);
            for n in 0..u64::from(count) {
                let mut member = [0; 64];
                self.bus.read(self.pasid, Iova::new(list + 64 * n), &mut member).unwrap();
                completed += self.complete(Descriptor::read_from_bytes(&member).unwrap());
            }
        } else {
            completed += 1;
        }
        let bytes_completed =
            if descriptor.operation >> 24 == Opcode::Batch as u32 { descriptor.size } else { 0 };
        let word = u64::from(bytes_completed) << 32 | u64::from(Status::SUCCESS.0);
        self.bus.store(self.pasid, Iova::new(descriptor.completion), word).unwrap();
        completed
    }
}

/// The driver's thread on the first core; the software device's engine is on the last.
fn pin() {
    let core = underpass::worker::cores()[0];
    assert!(core_affinity::set_for_current(core_affinity::CoreId { id: core }), "can not pin to core {core}");
}

fn driver_alone(c: &mut Criterion) {
    pin();
    let mut group = c.benchmark_group("driver alone, no-op, submit and poll");
    group.throughput(Throughput::Elements(1));
    for batch in [1, BATCH] {
        let portals = Bar::memory(DsaProfile::default().wqs as u64 * 4 * 4096);
        let bus = Arc::new(Mutex::new(None));
        let model = PlainPortals {
            model: DsaModel::new(DsaProfile::default()),
            portals: portals.clone(),
            bus: Arc::clone(&bus),
        };
        let iommu = SoftIommu::new(SoftOptions::default());
        let device = PciDevice::in_process("plain portals", Box::new(model), &iommu, Run::Stepped).unwrap();
        let mut dsa = Dsa::open(device).unwrap();
        let config = Config { depth: DEPTH, batch, ..Config::default() };
        let mut channel = dsa.channels(&config).unwrap().remove(0);
        let mut completer =
            Completer { portals, bus: bus.lock().unwrap().take().unwrap(), pasid: channel.pasid() };
        let mut jobs = Burst::with_capacity(BATCH);
        let mut done: Burst<Done> = Burst::with_capacity(BATCH);

        let name = if batch == 1 { "single".to_owned() } else { format!("a descriptor, batches of {batch}") };
        group.bench_function(name, |b| {
            b.iter_custom(|iterations| {
                let (mut spent, mut count) = (Duration::ZERO, 0);
                while count < iterations {
                    let start = Instant::now();
                    for _ in 0..DEPTH {
                        if batch == 1 {
                            channel.submit(Job::new(Op::Nop)).unwrap();
                        } else {
                            while jobs.push(Job::new(Op::Nop)).is_ok() {}
                            channel.submit_batch(&mut jobs).unwrap();
                        }
                    }
                    spent += start.elapsed();
                    assert_eq!(completer.complete_all(), DEPTH * batch);
                    let (start, before) = (Instant::now(), count);
                    while channel.outstanding() > 0 {
                        count += channel.poll(&mut done) as u64;
                        done.clear();
                    }
                    spent += start.elapsed();
                    assert_eq!(count - before, (DEPTH * batch) as u64);
                }
                // Criterion wants the time of `iterations`, and whole rounds were done.
                spent.mul_f64(iterations as f64 / count as f64)
            });
        });
    }
    group.finish();
}

fn soft_dsa(config: &Config) -> (Box<dyn Accelerator>, Box<dyn Channel>) {
    let core = *underpass::worker::cores().last().unwrap();
    let mut device = underpass_drivers::builtin().open(&format!("soft:dsa,core={core}")).unwrap();
    let channel = device.channels(config).unwrap().remove(0);
    (device, channel)
}

fn no_op_jobs(c: &mut Criterion) {
    pin();
    let mut group = c.benchmark_group("soft:dsa, no-op");
    group.throughput(Throughput::Elements(1));
    for (depth, batch) in [(1, 1), (8, 1), (32, 1), (1, 32), (8, 32)] {
        let (_device, mut channel) = soft_dsa(&Config { depth, batch, ..Config::default() });
        let mut jobs = Burst::with_capacity(batch);
        let mut done = Burst::with_capacity(depth * batch);
        group.bench_function(format!("depth {depth}, batch {batch}"), |b| {
            b.iter_custom(|iterations| {
                let (mut submitted, mut finished) = (0, 0);
                let start = Instant::now();
                while finished < iterations {
                    while submitted < iterations && submitted - finished < (depth * batch) as u64 {
                        let taken = if batch == 1 {
                            usize::from(channel.submit(Job::new(Op::Nop)).is_ok())
                        } else {
                            while jobs.push(Job::new(Op::Nop)).is_ok() {}
                            channel.submit_batch(&mut jobs).unwrap_or(0)
                        };
                        if taken == 0 {
                            break;
                        }
                        submitted += taken as u64;
                    }
                    finished += channel.poll(&mut done) as u64;
                    done.clear();
                }
                while channel.outstanding() > 0 {
                    channel.poll(&mut done);
                    done.clear();
                }
                start.elapsed()
            });
        });
    }
    group.finish();
}

/// Copies over 64 MiB, by size; each beside memcpy over the same buffers. `underpass copy` measures the ratio in
/// turns; this shows the curve.
fn copies(c: &mut Criterion) {
    const WORKING_SET: usize = 64 << 20;
    pin();
    let mut group = c.benchmark_group("copy");
    group.sample_size(20);
    for (size, batch) in [(4 << 10, 32), (64 << 10, 1), (1 << 20, 1)] {
        let (_device, mut channel) = soft_dsa(&Config { depth: 8, batch, ..Config::default() });
        let region = Region::builder(WORKING_SET as u64).build().unwrap();
        channel.map(&region, Access::READ_WRITE).unwrap();
        let mut sources = DmaBuf::new(region).unwrap();
        let targets = sources.split_off(WORKING_SET / 2);
        let mut pairs: Vec<_> =
            sources.into_chunks(size).into_iter().zip(targets.into_chunks(size)).collect();
        group.throughput(Throughput::Bytes(WORKING_SET as u64 / 2));

        group.bench_function(BenchmarkId::new("memcpy", size), |b| {
            b.iter(|| {
                for (source, target) in &mut pairs {
                    target.copy_from_slice(source);
                }
            });
        });
        let mut idle: Vec<(DmaBuf, DmaBuf)> = pairs;
        idle.reverse();
        let mut jobs = Burst::with_capacity(batch);
        let mut done: Burst<Done> = Burst::with_capacity(8 * batch);
        let mut back = Vec::with_capacity(idle.len());
        group.bench_function(BenchmarkId::new("soft:dsa", size), |b| {
            b.iter(|| {
                while !idle.is_empty() || !jobs.is_empty() || channel.outstanding() > 0 {
                    while !jobs.is_full()
                        && let Some((source, target)) = idle.pop()
                    {
                        jobs.push(Job::copy(source, target)).unwrap();
                    }
                    if batch == 1 {
                        if let Some(job) = jobs.pop()
                            && let Err(rejected) = channel.submit(job)
                        {
                            jobs.push(rejected.job).unwrap();
                        }
                    } else if !jobs.is_empty() {
                        let _full = channel.submit_batch(&mut jobs);
                    }
                    channel.poll(&mut done);
                    for Done { job, result } in done.drain_all() {
                        result.unwrap();
                        if let Op::Copy { src: underpass::accel::Source::Owned(source), dst } = job.op {
                            back.push((source, dst));
                        }
                    }
                }
                back.reverse();
                std::mem::swap(&mut idle, &mut back);
            });
        });
    }
    group.finish();
}

criterion_group!(benches, driver_alone, no_op_jobs, copies);
criterion_main!(benches);

// The record's size is what `Completer` relies on: the handshake word is its first.
const _: () = assert!(size_of::<CompletionRecord>() == 32);
