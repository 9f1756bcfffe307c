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
mod memory;
mod output;
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
pub(crate) use self::memory::{small_pages, tell_small_pages};
use self::output::Output;
use self::queue::Queue;
use self::report::Report;
use self::turns::{Cores, Extent};
use crate::Usage;
use crate::interrupt::Stop;

/// Runs the command.
pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let stop = Stop::install()?;
    let report = measure(args, &stop, &bar(args))?;
    if args.json {
        crate::print(&format!("{}\n", serde_json::to_string(&report)?))?;
    } else {
        crate::print(&format!("{}{}", report::table(std::slice::from_ref(&report)), report.notes()))?;
    }
    tell_small_pages(report.small_pages);
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
    let shape = Shape { kind: args.op, size: args.size as usize, block: args.dif_block };
    if let Some(why) = shape.wrong_size() {
        return Err(Usage(format!("--size {} does not suit: {why}", args.size)).into());
    }
    // Isolation is between two queues.
    let queues = if args.show_isolation { args.queues.max(2) } else { args.queues };
    let mut opened = device::open(args, &shape, queues)?;
    let isolation = args.show_isolation.then(|| show_isolation(&mut opened)).transpose()?;
    let slots = memory::slots(args, &shape, queues)?;

    let channels = std::mem::take(&mut opened.channels);
    let pasids: Vec<_> = channels.iter().map(|channel| channel.pasid().map(Pasid::get)).collect();
    let mut lanes = Vec::with_capacity(queues);
    let name = bar.message();
    bar.set_message(format!("{name}: filling buffers"));
    let all = (Lane::footprint(&shape) * slots * queues).max(1);
    let mut filled = 0;
    let mut go_on = |bytes: usize| {
        filled += bytes;
        bar.set_position((filled as f64 / all as f64 * 1000.0) as u64);
        !stop.asked()
    };
    for (index, channel) in channels.into_iter().enumerate() {
        let Cores { drivers, memcpy } = &opened.cores;
        let shares_core = queues > drivers.len() || drivers[index % drivers.len()] == *memcpy;
        let queue = Queue::new(channel, opened.device.name(), args.batch, shares_core);
        match Lane::new(queue, shape, slots, index as u64, &mut go_on)? {
            Some(lane) => lanes.push(Mutex::new(lane)),
            None => break,
        }
    }
    bar.set_message(name);
    // Stopped before anything was measured: a report of nothing.
    let ready = lanes.len() == queues;
    let lanes = Arc::new(lanes);
    let small_pages = lanes.iter().map(|lane: &Mutex<Lane>| {
        memory::small_pages(lane.lock().unwrap_or_else(PoisonError::into_inner).region())
    });
    let small_pages = small_pages.sum();
    let extent = args.jobs.map_or(Extent::Time(args.seconds), Extent::Jobs);
    let mut progress = |done| bar.set_position((done * 1000.0) as u64);
    let measured = if ready {
        turns::measure(&lanes, &opened.cores, extent, args.batch, shape.bytes() != 0, stop, &mut progress)
    } else {
        Ok(turns::Measured { jobs: vec![0; queues], ..turns::Measured::default() })
    };
    let measured = measured.map_err(|error| device::cause(&mut *opened.device, error))?;

    let mut failed = 0;
    let mut verified = ready && !args.no_verify;
    for lane in lanes.iter() {
        let mut lane = lane.lock().unwrap_or_else(PoisonError::into_inner);
        if verified {
            match lane.verify(stop).map_err(|error| device::cause(&mut *opened.device, error))? {
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
    report.small_pages = small_pages;
    report.isolation = isolation;
    Ok(report)
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
    let shape = Shape { kind: OpKind::CopyCrc, size: args.size as usize, block: args.dif_block };
    let mut from = file::open_input(input)?;
    let length = from.metadata().map_or(0, |metadata| metadata.len());
    let mut opened = device::open(args, &shape, args.queues)?;
    let mut to = Output::create(output)?;

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
    .map_err(|error| match error.downcast() {
        Ok(error) => device::cause(&mut *opened.device, error).into(),
        Err(error) => {
            device::tell_errors(&mut *opened.device);
            error
        }
    })
    .with_context(|| format!("cannot send {} through {}", input.display(), args.device))?;
    if sent.complete {
        to.finish()?;
    } else {
        crate::note(&format!(
            "stopped after {} bytes; nothing was written to {}",
            sent.bytes,
            output.display()
        ));
    }

    let by_queue = report::queues(pasids, &sent.jobs);
    let mut report = Report::new(args, &opened, &shape, sent.seconds, by_queue);
    report.set_bytes(sent.bytes);
    report.verified = sent.complete && !args.no_verify;
    report.working_set = sent.working_set;
    report.small_pages = sent.small_pages;
    report.file_seconds = Some(sent.file_seconds);
    report.crc32c = sent.complete.then(|| format!("{:08x}", sent.crc));
    Ok(report)
}
