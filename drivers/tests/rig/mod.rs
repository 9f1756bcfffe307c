//! Channels with memory, for tests: buffers between guard bytes, jobs of every kind with random contents, and
//! waiting that ends.

#![allow(dead_code, reason = "each test binary uses a part of it")]

mod random;
pub(crate) mod stepped;

use std::sync::Arc;
use std::time::{Duration, Instant};

use underpass::accel::{Accelerator, Channel, Config, Dif, DifBlock, Done, Job, Op, OpKind, Source};
use underpass::dma::DmaBuf;
use underpass::{Access, Burst, Region};

pub(crate) use random::Random;

use crate::reference;

/// Longer than any job of these tests takes, on a busy machine too.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// How the start of a buffer must be aligned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Align {
    /// Not at all: anywhere in a cache line.
    Any,
    /// To this many bytes.
    To(usize),
}

const GUARD: u8 = 0xc5;

/// A region from which buffers are cut, each between guard bytes that nobody may touch.
#[derive(Debug)]
pub(crate) struct Arena {
    region: Arc<Region>,
    rest: DmaBuf,
    guards: Vec<DmaBuf>,
    random: Random,
}

impl Arena {
    pub(crate) fn new(len: usize) -> Self {
        let region = Region::builder(len as u64).build().unwrap();
        let rest = DmaBuf::new(Arc::clone(&region)).unwrap();
        Self { region, rest, guards: Vec::new(), random: Random(len as u64) }
    }

    pub(crate) fn region(&self) -> &Arc<Region> {
        &self.region
    }

    /// A buffer of `len` bytes.
    pub(crate) fn take(&mut self, len: usize, align: Align) -> DmaBuf {
        let here = self.rest.as_ptr() as usize + 64;
        let start = match align {
            Align::Any => here.next_multiple_of(64) + self.random.below(64),
            Align::To(align) => here.next_multiple_of(align),
        };
        let mut guard = self.rest.split_to(start - (here - 64));
        guard.fill(GUARD);
        self.guards.push(guard);
        let buf = self.rest.split_to(len);
        let mut guard = self.rest.split_to(64);
        guard.fill(GUARD);
        self.guards.push(guard);
        buf
    }

    /// A buffer with random contents.
    pub(crate) fn random(&mut self, len: usize) -> DmaBuf {
        let mut buf = self.take(len, Align::Any);
        self.random.fill(&mut buf);
        buf
    }

    /// Nobody wrote beside a buffer.
    pub(crate) fn check_guards(&self) {
        for guard in &self.guards {
            assert!(guard.iter().all(|byte| *byte == GUARD), "bytes beside a buffer were written: {guard:?}");
        }
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.check_guards();
        }
    }
}

/// What a job of this kind does with its buffers, in the order of [`reference::buffers`].
pub(crate) fn roles(kind: OpKind) -> &'static [Access] {
    const R: Access = Access::READ;
    const W: Access = Access::WRITE;
    match kind {
        OpKind::Nop | OpKind::Drain | OpKind::Probe => &[],
        OpKind::Fill => &[W],
        OpKind::CopyWithin => &[Access::READ_WRITE],
        OpKind::ComparePattern | OpKind::Crc | OpKind::DifCheck | OpKind::CacheFlush => &[R],
        OpKind::Compare => &[R, R],
        OpKind::Copy
        | OpKind::ApplyDelta
        | OpKind::CopyCrc
        | OpKind::DifInsert
        | OpKind::DifStrip
        | OpKind::DifUpdate => &[R, W],
        OpKind::CreateDelta => &[R, R, W],
        OpKind::Dualcast => &[R, W, W],
    }
}

pub(crate) fn random_dif(random: &mut Random, block: DifBlock) -> Dif {
    Dif {
        invert_crc_seed: random.coin(),
        invert_crc_result: random.coin(),
        app_tag: random.next() as u16,
        app_tag_mask: if random.coin() { 0 } else { random.next() as u16 },
        increment_app_tag: random.coin(),
        ref_tag: random.next() as u32,
        fixed_ref_tag: random.coin(),
        skip_guard_check: random.below(4) == 0,
        skip_ref_tag_check: random.below(4) == 0,
        ..Dif::new(block)
    }
}

/// How well the data of a generated job agrees with itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Flavour {
    /// Compared buffers are equal, protection information is right, a delta record fits.
    Agreeing,
    /// By chance: compared buffers may differ, protection information may be wrong, a delta may not fit.
    Random,
}

/// A job's operation of this kind and of about `size` bytes, with random contents in buffers that come from
/// `take`, which is told the number of the operand, the length and the alignment.
#[allow(clippy::too_many_lines, reason = "an arm an operation")]
pub(crate) fn make(
    kind: OpKind,
    size: usize,
    flavour: Flavour,
    random: &mut Random,
    take: &mut dyn FnMut(usize, usize, Align) -> DmaBuf,
) -> Op {
    let spoil = flavour == Flavour::Random;
    let units = (size.div_ceil(8) * 8).min(512 << 10);
    let mut take_random = |random: &mut Random, operand, len, align| {
        let mut buf = take(operand, len, align);
        random.fill(&mut buf);
        buf
    };
    let any = Align::Any;
    match kind {
        OpKind::Nop => Op::Nop,
        OpKind::Drain => Op::Drain,
        OpKind::Copy => {
            let src = source(random, |random| take_random(random, 0, size, any));
            Op::Copy { src, dst: take_random(random, 1, size, any) }
        }
        OpKind::CopyWithin => {
            let buf = take_random(random, 0, size, any);
            let len = 1 + random.below(size);
            let (from, to) = (random.below(size - len + 1), random.below(size - len + 1));
            Op::CopyWithin { buf, from, to, len }
        }
        OpKind::Fill => Op::Fill { dst: take_random(random, 0, size, any), pattern: random.next() },
        OpKind::Compare => {
            let a = take_random(random, 0, size, any);
            let mut b = take_random(random, 1, size, any);
            b.copy_from_slice(&a);
            maybe_spoil(random, spoil, &mut b);
            Op::Compare { a: source(random, |_| a), b: source(random, |_| b) }
        }
        OpKind::ComparePattern => {
            let pattern = random.next();
            let mut src = take_random(random, 0, size, any);
            for (index, byte) in src.iter_mut().enumerate() {
                *byte = reference::pattern_byte(pattern, index);
            }
            maybe_spoil(random, spoil, &mut src);
            Op::ComparePattern { src: source(random, |_| src), pattern }
        }
        OpKind::CreateDelta | OpKind::ApplyDelta => {
            let original = take_random(random, 0, units, Align::To(8));
            let mut changed = original.to_vec();
            for _ in 0..=random.below(12) {
                let at = random.below(units);
                changed[at] = random.next() as u8;
            }
            // At least one entry, and the first write is known.
            changed[0] = !original[0];
            let record = reference::delta_record(&original, &changed);
            if kind == OpKind::ApplyDelta {
                drop(original);
                let room = record.len() + random.below(9);
                let mut delta = take_random(random, 0, room, Align::To(8));
                delta[..record.len()].copy_from_slice(&record);
                let delta = source(random, |_| delta);
                let dst = take_random(random, 1, units, Align::To(8));
                return Op::ApplyDelta { delta, delta_len: record.len(), dst };
            }
            let mut modified = take_random(random, 1, units, Align::To(8));
            match random.below(4) {
                0 if spoil => {} // all units differ
                1 if spoil => modified.copy_from_slice(&original),
                _ => modified.copy_from_slice(&changed),
            }
            let room = if spoil { 80 + random.below(60) } else { record.len().max(80) };
            let delta = take_random(random, 2, room, Align::To(8));
            Op::CreateDelta {
                original: source(random, |_| original),
                modified: source(random, |_| modified),
                delta,
            }
        }
        OpKind::Dualcast => {
            let src = source(random, |random| take_random(random, 0, size, any));
            let dst1 = take_random(random, 1, size, Align::To(4096));
            let dst2 = take_random(random, 2, size, Align::To(4096));
            Op::Dualcast { src, dst1, dst2 }
        }
        OpKind::Crc => {
            let src = source(random, |random| take_random(random, 0, size, any));
            Op::Crc { src, seed: if random.coin() { 0 } else { random.next() as u32 } }
        }
        OpKind::CopyCrc => {
            let src = source(random, |random| take_random(random, 0, size, any));
            let dst = take_random(random, 1, size, any);
            Op::CopyCrc { src, dst, seed: random.next() as u32 }
        }
        OpKind::DifInsert => {
            let dif = any_dif(random);
            let blocks = (size / dif.block.bytes()).max(1);
            let src = source(random, |random| take_random(random, 0, blocks * dif.block.bytes(), any));
            let dst = take_random(random, 1, blocks * (dif.block.bytes() + 8), any);
            Op::DifInsert { src, dst, dif }
        }
        OpKind::DifCheck | OpKind::DifStrip | OpKind::DifUpdate => {
            let dif = any_dif(random);
            let blocks = (size / (dif.block.bytes() + 8)).max(1);
            let mut data = vec![0; blocks * dif.block.bytes()];
            random.fill(&mut data);
            let mut src = take_random(random, 0, blocks * (dif.block.bytes() + 8), any);
            src.copy_from_slice(&reference::dif_insert(&data, &dif));
            if flavour == Flavour::Agreeing && dif.app_tag_mask != 0 {
                // Bits under the mask are not compared: any value is right.
                src[dif.block.bytes() + 2] ^= (dif.app_tag_mask >> 8) as u8;
            }
            maybe_spoil(random, spoil, &mut src);
            let src = source(random, |_| src);
            match kind {
                OpKind::DifCheck => Op::DifCheck { src, dif },
                OpKind::DifStrip => Op::DifStrip { src, dst: take_random(random, 1, data.len(), any), dif },
                _ => {
                    let dst = take_random(random, 1, src.buf().len(), any);
                    // One descriptor inverts the same on both sides.
                    let (invert_crc_seed, invert_crc_result) = (dif.invert_crc_seed, dif.invert_crc_result);
                    let to = Dif { invert_crc_seed, invert_crc_result, ..random_dif(random, dif.block) };
                    Op::DifUpdate { src, dst, from: dif, to }
                }
            }
        }
        OpKind::CacheFlush => Op::CacheFlush { buf: take_random(random, 0, size, any) },
        OpKind::Probe => panic!("what a probe reaches depends on the channel: it has tests of its own"),
    }
}

fn any_dif(random: &mut Random) -> Dif {
    let block = DifBlock::ALL[random.below(4)];
    random_dif(random, block)
}

/// Owned or shared, by chance.
fn source(random: &mut Random, make: impl FnOnce(&mut Random) -> DmaBuf) -> Source {
    let shared = random.coin();
    let buf = make(random);
    if shared { Source::from(buf.freeze()) } else { Source::from(buf) }
}

/// Changes one bit, one time in two.
fn maybe_spoil(random: &mut Random, spoil: bool, bytes: &mut [u8]) {
    if spoil && random.coin() {
        bytes[random.below(bytes.len())] ^= 1 << random.below(8);
    }
}

/// An accelerator with its channels.
#[derive(Debug)]
pub(crate) struct Rig {
    // In the order that they are dropped in: channels before the device.
    pub(crate) channels: Vec<Box<dyn Channel>>,
    pub(crate) device: Box<dyn Accelerator>,
    pub(crate) random: Random,
    tags: u64,
}

impl Rig {
    pub(crate) fn new(mut device: Box<dyn Accelerator>, config: &Config) -> Self {
        let channels = device.channels(config).unwrap();
        Self { channels, device, random: Random(7), tags: 0 }
    }

    /// An arena that the first channel maps.
    pub(crate) fn arena(&mut self, len: usize) -> Arena {
        let arena = Arena::new(len);
        self.channels[0].map(arena.region(), Access::READ_WRITE).unwrap();
        arena
    }

    /// A job of this kind in `arena`.
    pub(crate) fn job(&mut self, arena: &mut Arena, kind: OpKind, size: usize, flavour: Flavour) -> Job {
        self.tags += 1;
        Job::new(make(kind, size, flavour, &mut self.random, &mut |_, len, align| arena.take(len, align)))
            .tag(self.tags)
    }

    /// Has the first channel do one job.
    pub(crate) fn run(&mut self, job: Job) -> Done {
        run(&mut *self.channels[0], job)
    }

    /// Has the first channel do a batch; what comes back is in the order of the jobs.
    pub(crate) fn run_batch(&mut self, jobs: Vec<Job>) -> Vec<Done> {
        let tags: Vec<u64> = jobs.iter().map(|job| job.tag).collect();
        let mut burst = burst(jobs);
        assert_eq!(self.channels[0].submit_batch(&mut burst), Ok(tags.len()));
        assert!(burst.is_empty(), "a batch was taken and is still there");
        let mut done = collect(&mut *self.channels[0], tags.len());
        done.sort_by_key(|done| tags.iter().position(|tag| *tag == done.job.tag));
        let back: Vec<u64> = done.iter().map(|done| done.job.tag).collect();
        assert_eq!(back, tags, "each job of a batch comes back once");
        done
    }
}

pub(crate) fn burst<T>(items: Vec<T>) -> Burst<T> {
    let mut burst = Burst::with_capacity(items.len());
    for item in items {
        assert!(burst.push(item).is_ok());
    }
    burst
}

/// Submits one job and waits for it.
pub(crate) fn run(channel: &mut dyn Channel, job: Job) -> Done {
    let tag = job.tag;
    if let Err(rejected) = channel.submit(job) {
        panic!("rejected ({}): {:?}", rejected.why, rejected.job.op);
    }
    let done = collect(channel, 1).remove(0);
    assert_eq!(done.job.tag, tag);
    done
}

/// Polls until `count` jobs are back.
pub(crate) fn collect(channel: &mut dyn Channel, count: usize) -> Vec<Done> {
    let begin = Instant::now();
    let mut all = Vec::new();
    let mut done = Burst::with_capacity(count.max(1));
    while all.len() < count {
        channel.poll(&mut done);
        all.extend(done.drain_all());
        assert!(begin.elapsed() < PATIENCE, "{} of {count} jobs back, {:?}", all.len(), channel.state());
        std::thread::yield_now();
    }
    assert_eq!(all.len(), count);
    all
}
