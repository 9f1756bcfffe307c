//! `underpass copy`: has a device copy, fill, compare or checksum memory, and measures it against memcpy.
//!
//! The way of a job: [`lane`] makes it and its buffers, [`queue`] submits it in batches and polls for it, [`turns`]
//! has each queue's lane run on a thread of its own, in turns with memcpy. [`expect`] knows what must come out.

mod args;
mod device;
mod expect;
mod file;
mod isolation;
mod lane;
mod queue;
pub(crate) mod report;
mod turns;

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context as _, bail};
use indicatif::{ProgressBar, ProgressStyle};
use underpass::Pasid;
use underpass::accel::OpKind;

pub(crate) use self::args::Args;
use self::expect::Shape;
use self::isolation::Isolation;
use self::lane::Lane;
use self::queue::Queue;
use self::report::Report;
use self::turns::{Cores, Extent};
use crate::interrupt::Stop;
use crate::{Usage, size};

/// Working set unless one is asked for: beyond the caches of one core.
const WORKING_SET: u64 = 64 << 20;

/// Jobs that one queue goes round in, at most: each is kept with its buffers.
const MAX_SLOTS: u64 = 1 << 22;

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

/// Runs jobs over the same buffers again and again.
fn repeat(args: &Args, stop: &Stop, bar: &ProgressBar) -> anyhow::Result<Report> {
    let bytes = usize::try_from(args.size).unwrap_or(usize::MAX).min(usize::MAX >> 8);
    let shape = Shape { kind: args.op, size: bytes, block: args.dif_block };
    if let Some(why) = shape.wrong_size() {
        return Err(Usage(format!("--size {} does not suit: {why}", args.size)).into());
    }
    // Isolation is between two queues.
    let queues = if args.show_isolation { args.queues.max(2) } else { args.queues };
    let mut opened = device::open(args, &shape, queues)?;
    let isolation = args.show_isolation.then(|| show_isolation(&mut opened)).transpose()?;
    let slots = slots(args, &shape, queues)?;

    let channels = std::mem::take(&mut opened.channels);
    let pasids: Vec<_> = channels.iter().map(|channel| channel.pasid().map(Pasid::get)).collect();
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
    let measured = measured.inspect_err(|_| device::tell_errors(&mut *opened.device))?;

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
        device::tell_errors(&mut *opened.device);
    }

    let memcpy_bytes = measured.memcpy_jobs * shape.bytes();
    let by_queue = report::queues(pasids, &measured.jobs);
    let mut report = Report::new(args, &opened, &shape, measured.seconds, by_queue);
    report.memcpy_gib_per_second =
        (memcpy_bytes != 0).then(|| report::gib_per_second(memcpy_bytes, measured.memcpy_seconds));
    report.ratio_to_memcpy = measured.ratio_to_memcpy();
    report.memcpy_to_memcpy = measured.memcpy_to_memcpy();
    report.turns = measured.turns.len();
    report.verified = verified && failed == 0;
    report.failed = failed;
    report.working_set = (Lane::footprint(&shape) * slots * queues) as u64;
    report.isolation = isolation;
    Ok(report)
}

/// How many jobs each queue goes round in, so that their buffers make up the working set.
fn slots(args: &Args, shape: &Shape, queues: usize) -> anyhow::Result<usize> {
    let footprint = Lane::footprint(shape) as u64;
    if shape.kind == OpKind::Nop {
        return Ok(args.batch.max(1024));
    }
    let of_queue = args.working_set.unwrap_or(WORKING_SET) / queues as u64;
    // A batch needs a job for each of its members.
    let least = (args.batch as u64).max(if args.working_set.is_none() { 2 } else { 1 });
    let slots = match of_queue / footprint {
        slots if slots >= least => slots,
        _ if args.working_set.is_none() => least,
        _ => {
            let needed = footprint.saturating_mul(least).saturating_mul(queues as u64);
            return Err(Usage(format!(
                "--working-set {} is too small for {queues} queues with batches of {} jobs of {}; \
                 use --working-set {needed} or more",
                of_queue * queues as u64,
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

fn show_isolation(opened: &mut device::Opened) -> anyhow::Result<Isolation> {
    let [owner, intruder, ..] = &mut opened.channels[..] else {
        bail!("the device gave fewer than two queues");
    };
    Ok(isolation::show(&mut *opened.device, &mut **owner, &mut **intruder)?)
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
    let length = from.metadata().map_or(0, |metadata| metadata.len());
    let mut opened = device::open(args, &shape, args.queues)?;
    let mut to = file::Output::create(output)?;

    let channels = std::mem::take(&mut opened.channels);
    let pasids: Vec<_> = channels.iter().map(|channel| channel.pasid().map(Pasid::get)).collect();
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
    .inspect_err(|_| device::tell_errors(&mut *opened.device))
    .with_context(|| format!("cannot send {} through {}", input.display(), args.device))?;
    to.finish()?;

    let by_queue = report::queues(pasids, &sent.jobs);
    let mut report = Report::new(args, &opened, &shape, sent.seconds, by_queue);
    report.set_bytes(sent.bytes);
    report.verified = !args.no_verify;
    report.working_set = sent.working_set;
    report.crc32c = Some(format!("{:08x}", sent.crc));
    Ok(report)
}
