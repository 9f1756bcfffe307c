//! `underpass copy`: has a device copy, fill, compare or checksum memory, and measures it against memcpy.
//!
//! The way of a job: [`lane`] makes it and its buffers, [`queue`] submits it in batches and polls for it, [`turns`]
//! has each queue's lane run on a thread of its own, in turns with memcpy. [`expect`] knows what must come out.

mod expect;
mod file;
mod isolation;
mod lane;
mod queue;
pub(crate) mod report;
mod turns;

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, bail};
use clap::builder::{PossibleValuesParser, TypedValueParser};
use indicatif::{ProgressBar, ProgressStyle};
use underpass::accel::{Accelerator, Channel, Config, DifBlock, OpKind};
use underpass::worker;
use underpass::{Error, ErrorKind};

use self::expect::Shape;
use self::isolation::Isolation;
use self::lane::Lane;
use self::queue::Queue;
use self::report::{QueueReport, Report};
use self::turns::{Cores, Extent};
use crate::interrupt::Stop;
use crate::{Usage, size};

/// Operations that a benchmark can repeat. Drain and probe are not among them: neither works on a buffer.
const OPS: [OpKind; 16] = [
    OpKind::Nop,
    OpKind::Copy,
    OpKind::CopyWithin,
    OpKind::Fill,
    OpKind::Compare,
    OpKind::ComparePattern,
    OpKind::CreateDelta,
    OpKind::ApplyDelta,
    OpKind::Dualcast,
    OpKind::Crc,
    OpKind::CopyCrc,
    OpKind::DifCheck,
    OpKind::DifInsert,
    OpKind::DifStrip,
    OpKind::DifUpdate,
    OpKind::CacheFlush,
];

/// Working set unless one is asked for: beyond the caches of one core.
const WORKING_SET: u64 = 64 << 20;

/// Jobs that one queue goes round in, at most: each is kept with its buffers.
const MAX_SLOTS: u64 = 1 << 22;

/// Have a device copy, fill, compare or checksum memory, and compare it with memcpy
#[derive(Debug, Clone, clap::Args)]
#[allow(clippy::struct_excessive_bools, reason = "each is a switch of the command line")]
pub(crate) struct Args {
    /// The device: soft:dsa[,wqs=N,engines=N,core=N,...] or cpu
    #[arg(long, default_value = "soft:dsa")]
    pub(crate) device: String,
    /// What a job does
    #[arg(long, default_value = "copy", value_parser = op_parser(), hide_possible_values = false)]
    pub(crate) op: OpKind,
    /// Bytes of data in a job: 4096, 4k, 64KiB, 1M
    #[arg(long, default_value = "64KiB", value_parser = size::parse_nonzero)]
    pub(crate) size: u64,
    /// Jobs submitted at a time; 1 is no batches
    #[arg(long, default_value_t = 1, value_parser = positive)]
    pub(crate) batch: usize,
    /// Submissions outstanding at a time in each queue; the driver's choice unless given
    #[arg(long, value_parser = positive)]
    pub(crate) depth: Option<usize>,
    /// Queues, each with a thread, an address space and memory of its own
    #[arg(long, default_value_t = 1, value_parser = positive)]
    pub(crate) queues: usize,
    /// Bytes of all buffers of all queues together, sources and destinations [default: 64 MiB]
    #[arg(long, value_parser = size::parse_nonzero)]
    pub(crate) working_set: Option<u64>,
    /// How long to measure, memcpy's turns included; at least 31 turns are made
    #[arg(long, default_value = "2", value_parser = seconds)]
    pub(crate) seconds: Duration,
    /// Do so many jobs instead
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..), conflicts_with = "seconds")]
    pub(crate) jobs: Option<u64>,
    /// Check all buffers against the CPU's own computation, after the run (the default)
    #[arg(long, overrides_with = "no_verify")]
    verify: bool,
    /// Do not check
    #[arg(long)]
    pub(crate) no_verify: bool,
    /// Cores that the queues' threads run on, in turn: 0,2,4
    #[arg(long, value_delimiter = ',', value_name = "CORE,...")]
    pub(crate) core: Vec<usize>,
    /// Bytes of the blocks that the dif operations protect
    #[arg(long, default_value = "512", value_parser = block_parser())]
    pub(crate) dif_block: DifBlock,
    /// Have queue 1 try to reach queue 0's memory first, and show how that is stopped
    #[arg(long)]
    pub(crate) show_isolation: bool,
    /// Send this file through the device instead, in jobs that copy and compute the CRC32C
    #[arg(long, value_name = "FILE", requires = "output",
          conflicts_with_all = ["op", "seconds", "jobs", "working_set", "show_isolation"])]
    pub(crate) input: Option<PathBuf>,
    /// Where the file that came through goes
    #[arg(long, value_name = "FILE", requires = "input")]
    pub(crate) output: Option<PathBuf>,
    /// Print the result as one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

fn op_parser() -> impl TypedValueParser<Value = OpKind> {
    PossibleValuesParser::new(OPS.map(OpKind::name)).try_map(|name| {
        OPS.into_iter().find(|op| op.name() == name).ok_or_else(|| format!("{name} is not an operation"))
    })
}

fn block_parser() -> impl TypedValueParser<Value = DifBlock> {
    PossibleValuesParser::new(["512", "520", "4096", "4104"]).try_map(|bytes| {
        let block = DifBlock::ALL.into_iter().find(|block| block.bytes().to_string() == bytes);
        block.ok_or_else(|| format!("{bytes} is not a block's size"))
    })
}

fn positive(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) => Err("it must be at least 1".into()),
        Ok(number) => Ok(number),
        Err(error) => Err(error.to_string()),
    }
}

fn seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text.parse().map_err(|_| "it is a number of seconds: 2 or 0.5".to_owned())?;
    match Duration::try_from_secs_f64(seconds) {
        Ok(time) if !time.is_zero() => Ok(time),
        _ => Err("it must be more than 0".into()),
    }
}

/// Runs the command.
pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let stop = Stop::install()?;
    let report = measure(args, &stop, &bar(args))?;
    if args.json {
        crate::print(&format!("{}\n", serde_json::to_string(&report)?))?;
    } else {
        crate::print(&format!("{}{}", report::table(std::slice::from_ref(&report)), report.notes()))?;
    }
    judge(&report)
}

/// Whether a run that came to its end also went well.
pub(crate) fn judge(report: &Report) -> anyhow::Result<()> {
    if report.failed != 0 {
        bail!(
            "{}: {} {} jobs failed or left wrong bytes; run it again with -v, and with --device cpu to compare",
            report.device,
            report.failed,
            report.op
        );
    }
    Ok(())
}

/// Progress in thousandths, on a terminal only.
fn bar(args: &Args) -> ProgressBar {
    let bar = ProgressBar::new(1000);
    let name = if args.input.is_some() { "file" } else { args.op.name() };
    bar.set_message(format!("{name} on {}", args.device));
    if let Ok(style) = ProgressStyle::with_template("{msg} {wide_bar} {percent}%") {
        bar.set_style(style);
    }
    bar
}

/// Does what the arguments say, and reports on it. Failed jobs are counted in the report.
pub(crate) fn measure(args: &Args, stop: &Stop, bar: &ProgressBar) -> anyhow::Result<Report> {
    let result = match (&args.input, &args.output) {
        (Some(input), Some(output)) => send_file(args, input, output, stop, bar),
        _ => repeat(args, stop, bar),
    };
    bar.finish_and_clear();
    result
}

/// The device with its channels set up.
struct Opened {
    device: Box<dyn Accelerator>,
    channels: Vec<Box<dyn Channel>>,
    depth: usize,
    cores: Cores,
}

/// Opens the device for `queues` queues. Jobs of `shape` must be such as it can do.
fn open(args: &Args, shape: &Shape, queues: usize) -> anyhow::Result<Opened> {
    let (address, cores) = place(&args.device, &args.core)?;
    let mut device = underpass_drivers::builtin().open(&address)?;
    let name = args.device.clone();
    let limits = device.limits();
    let refused = |kind, operation: String, why: String| Error::new(kind, operation, why).device(name.clone());
    if queues > device.max_channels() {
        let why = format!("it has {}", device.max_channels());
        let error = refused(ErrorKind::InvalidInput, format!("use {queues} queues"), why);
        return Err(error.mend(format!("use --queues {} or less", device.max_channels())).into());
    }
    if !limits.ops.contains(shape.kind) {
        let known: Vec<_> = limits.ops.iter().filter(|op| OPS.contains(op)).map(OpKind::name).collect();
        let error = refused(
            ErrorKind::Unsupported,
            format!("do {}", shape.kind.name()),
            "the device does not have that operation".to_owned(),
        );
        return Err(error.mend(format!("it has: {}", known.join(", "))).into());
    }
    let longest = shape.lens().into_iter().max().unwrap_or(0) as u64;
    if longest > limits.max_bytes {
        let error = refused(
            ErrorKind::InvalidInput,
            format!("do jobs of {}", size::show(longest)),
            format!("its largest is {}", size::show(limits.max_bytes)),
        );
        return Err(error.mend("choose a smaller --size").into());
    }
    if args.batch > limits.max_batch {
        let error = refused(
            ErrorKind::InvalidInput,
            format!("do batches of {}", args.batch),
            format!("its largest batch is {}", limits.max_batch),
        );
        return Err(error.mend(format!("use --batch {} or less", limits.max_batch)).into());
    }
    let config = Config {
        channels: queues,
        depth: args.depth.unwrap_or(0),
        batch: args.batch,
        ..Config::default()
    };
    let channels = device.channels(&config)?;
    let depth = channels.first().map_or(0, |channel| channel.limits().depth);
    Ok(Opened { device, channels, depth, cores })
}

/// The device's address and who runs on which core: a software device's engine and memcpy on the last one,
/// the drivers on the others. Where the engine is no thread of this machine, memcpy runs where the driver does.
fn place(device: &str, asked: &[usize]) -> anyhow::Result<(String, Cores)> {
    for core in asked {
        worker::check_core(*core)?;
    }
    let all = worker::cores();
    let Some(last) = all.last() else { bail!("cannot find out which cores this process may use") };
    let mut address = device.to_owned();
    let mut engine = None;
    if device.split(',').next() == Some("soft:dsa") {
        let given = device.split(',').find_map(|option| option.strip_prefix("core="));
        engine = Some(given.and_then(|core| core.parse().ok()).unwrap_or(*last));
        if given.is_none() {
            address.push_str(&format!(",core={last}"));
        }
    }
    let mut drivers = asked.to_vec();
    if drivers.is_empty() {
        drivers.extend(all.iter().filter(|core| Some(**core) != engine));
    }
    if drivers.is_empty() {
        drivers.push(*last);
    }
    let memcpy = engine.unwrap_or(drivers[0]);
    Ok((address, Cores { drivers, memcpy }))
}

/// Runs jobs over the same buffers again and again.
fn repeat(args: &Args, stop: &Stop, bar: &ProgressBar) -> anyhow::Result<Report> {
    let bytes = usize::try_from(args.size).unwrap_or(usize::MAX).min(usize::MAX >> 8);
    let shape = Shape { kind: args.op, size: bytes, block: args.dif_block };
    if let Some(why) = shape.wrong_size() {
        return Err(Usage(format!("--size {} does not suit: {why}", args.size)).into());
    }
    // Isolation is between two queues.
    let queues = if args.show_isolation { args.queues.max(2) } else { args.queues };
    let mut opened = open(args, &shape, queues)?;
    let isolation = args.show_isolation.then(|| show_isolation(&mut opened)).transpose()?;
    let slots = slots(args, &shape, queues)?;

    let channels = std::mem::take(&mut opened.channels);
    let pasids: Vec<_> = channels.iter().map(|channel| channel.pasid().map(|pasid| pasid.get())).collect();
    let mut lanes = Vec::with_capacity(queues);
    for (index, channel) in channels.into_iter().enumerate() {
        let Cores { drivers, memcpy } = &opened.cores;
        let shares_core = queues > drivers.len() || drivers[index % drivers.len()] == *memcpy;
        let queue = Queue::new(channel, opened.device.name(), args.batch, shares_core);
        lanes.push(Mutex::new(Lane::new(queue, shape, slots, index as u64)?));
    }
    let lanes = Arc::new(lanes);
    let extent = args.jobs.map_or(Extent::Time(args.seconds), Extent::Jobs);
    let measured =
        turns::measure(&lanes, &opened.cores, extent, args.batch, shape.bytes() != 0, stop, &mut |done| {
            bar.set_position((done * 1000.0) as u64);
        });
    let measured = measured.inspect_err(|_| tell_device_errors(&mut *opened.device))?;

    let mut failed = 0;
    let mut verified = !args.no_verify;
    for lane in lanes.iter() {
        let mut lane = lane.lock().unwrap_or_else(PoisonError::into_inner);
        if !args.no_verify {
            match lane.verify(stop)? {
                Some(wrong) => failed += wrong,
                None => verified = false,
            }
        }
        failed += lane.failed();
        if let Some(error) = lane.first_failure() {
            tracing::warn!("{}: the first job that failed: {error}", args.device);
        }
    }
    if failed != 0 {
        tell_device_errors(&mut *opened.device);
    }

    let jobs: u64 = measured.jobs.iter().sum();
    let seconds = measured.seconds.max(f64::MIN_POSITIVE);
    let gib = |jobs: u64, seconds: f64| jobs as f64 * shape.bytes() as f64 / seconds / (1 << 30) as f64;
    let ratio = measured.ratio_to_memcpy();
    Ok(Report {
        device: args.device.clone(),
        op: args.op.name(),
        bytes_per_job: shape.bytes(),
        batch: args.batch,
        depth: opened.depth,
        jobs,
        bytes: jobs * shape.bytes(),
        seconds: measured.seconds,
        gib_per_second: gib(jobs, seconds),
        jobs_per_second: jobs as f64 / seconds,
        memcpy_gib_per_second: (measured.memcpy_jobs != 0)
            .then(|| gib(measured.memcpy_jobs, measured.memcpy_seconds.max(f64::MIN_POSITIVE))),
        ratio_to_memcpy: ratio,
        verified: verified && failed == 0,
        failed,
        queues: pasids.into_iter().zip(measured.jobs.iter()).map(|(pasid, &jobs)| QueueReport { pasid, jobs }).collect(),
        driver: opened.device.driver(),
        working_set: (Lane::footprint(&shape) * slots * queues) as u64,
        memcpy_to_memcpy: measured.memcpy_to_memcpy(),
        turns: measured.turns.len(),
        crc32c: None,
        isolation,
    })
}

/// How many jobs each queue goes round in, so that their buffers make up the working set.
fn slots(args: &Args, shape: &Shape, queues: usize) -> anyhow::Result<usize> {
    let footprint = Lane::footprint(shape) as u64;
    if shape.kind == OpKind::Nop {
        return Ok(args.batch.max(1024));
    }
    let share = args.working_set.unwrap_or(WORKING_SET) / queues as u64;
    // A batch needs a job for each of its members.
    let least = (args.batch as u64).max(if args.working_set.is_none() { 2 } else { 1 });
    let slots = match share / footprint {
        slots if slots >= least => slots,
        _ if args.working_set.is_none() => least,
        _ => {
            let needed = footprint.saturating_mul(least).saturating_mul(queues as u64);
            return Err(Usage(format!(
                "--working-set {} is too small for {queues} queues with batches of {} jobs of {}; \
                 use --working-set {needed} or more",
                share * queues as u64,
                args.batch,
                size::show(args.size),
            ))
            .into());
        }
    };
    if slots > MAX_SLOTS {
        return Err(Usage(format!(
            "a working set of {slots} jobs a queue is too many (at most {MAX_SLOTS}); use a larger --size or a \
             smaller --working-set"
        ))
        .into());
    }
    Ok(slots as usize)
}

fn show_isolation(opened: &mut Opened) -> anyhow::Result<Isolation> {
    let [owner, intruder, ..] = &mut opened.channels[..] else {
        bail!("the device gave fewer than two queues");
    };
    Ok(isolation::show(&mut *opened.device, &mut **owner, &mut **intruder)?)
}

/// What the device and the IOMMU have to say, as warnings.
fn tell_device_errors(device: &mut dyn Accelerator) {
    const MOST: usize = 8;
    for error in std::iter::from_fn(|| device.next_error()).take(MOST) {
        tracing::warn!("{error}");
    }
    for fault in std::iter::from_fn(|| device.next_fault()).take(MOST) {
        tracing::warn!("{fault}");
    }
}

/// Sends a file through the device.
fn send_file(
    args: &Args,
    input: &Path,
    output: &Path,
    stop: &Stop,
    bar: &ProgressBar,
) -> anyhow::Result<Report> {
    let bytes = usize::try_from(args.size).unwrap_or(usize::MAX).min(usize::MAX >> 8);
    let shape = Shape { kind: OpKind::CopyCrc, size: bytes, block: args.dif_block };
    let mut from = file::open_input(input)?;
    let length = from.metadata().map(|metadata| metadata.len()).unwrap_or(0);
    let mut opened = open(args, &shape, args.queues)?;
    let mut to = file::Output::create(output)?;

    let channels = std::mem::take(&mut opened.channels);
    let pasids: Vec<_> = channels.iter().map(|channel| channel.pasid().map(|pasid| pasid.get())).collect();
    let queues = channels.into_iter().map(|channel| {
        // One thread drives all queues and the files: it has better things to do than to spin.
        Queue::new(channel, opened.device.name(), args.batch, true)
    });
    let queues: Vec<Queue> = queues.collect();
    let sent = file::send(
        &mut from,
        &mut to,
        queues,
        (shape.size, args.batch),
        !args.no_verify,
        stop,
        &mut |done| bar.set_position((done * 1000).checked_div(length).unwrap_or(1000)),
    )
    .inspect_err(|_| tell_device_errors(&mut *opened.device))
    .with_context(|| format!("cannot send {} through {}", input.display(), args.device))?;
    to.finish()?;

    let jobs: u64 = sent.jobs.iter().sum();
    let seconds = sent.seconds.max(f64::MIN_POSITIVE);
    Ok(Report {
        device: args.device.clone(),
        op: shape.kind.name(),
        bytes_per_job: args.size,
        batch: args.batch,
        depth: opened.depth,
        jobs,
        bytes: sent.bytes,
        seconds: sent.seconds,
        gib_per_second: sent.bytes as f64 / seconds / (1 << 30) as f64,
        jobs_per_second: jobs as f64 / seconds,
        memcpy_gib_per_second: None,
        ratio_to_memcpy: None,
        verified: !args.no_verify,
        failed: 0,
        queues: pasids.into_iter().zip(sent.jobs).map(|(pasid, jobs)| QueueReport { pasid, jobs }).collect(),
        driver: opened.device.driver(),
        working_set: sent.working_set,
        memcpy_to_memcpy: None,
        turns: 0,
        crc32c: Some(format!("{:08x}", sent.crc)),
        isolation: None,
    })
}
