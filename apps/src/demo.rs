//! `underpass demo`: a few runs of `copy` and one of `forward` on software devices.

use clap::Parser;
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

use crate::copy::{self, report};
use crate::forward;
use crate::interrupt::Stop;
use crate::size;

/// Show jobs on a software DSA, then packets between two software NICs: a few seconds, no privileges
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Print the results as one JSON object: {"demo": [...], "forward": {...}}
    #[arg(long)]
    json: bool,
}

/// The runs, as options of `underpass copy`. The first one also shows the isolation.
const RUNS: [&[&str]; 5] = [
    &["--op", "copy", "--size", "4KiB", "--batch", "32", "--show-isolation"],
    &["--op", "copy", "--size", "64KiB"],
    &["--op", "copy", "--size", "1MiB"],
    &["--op", "fill", "--size", "64KiB"],
    &["--op", "crc", "--size", "64KiB"],
];

/// The run of packets, as options of `underpass forward`.
const PACKETS: &[&str] = &["--mode", "macswap", "--seconds", "2"];

/// What to read from the table of jobs.
const JOBS_EXPLAINED: &str = "\
GiB/s are the device's; ratio is its speed relative to memcpy over the same buffers, on the same core.
";

/// What to read from the tables of packets.
const PACKETS_EXPLAINED: &str = "\
Packets came from a generator to one port's receive queue, and went, their addresses swapped, to the other's transmit
queue: each through the driver, the software device and its IOMMU. The application and the driver do not copy them;
the software device does, as real ones do by DMA.
";

/// What to do then; `command` starts this program.
fn next(command: &str) -> String {
    format!(
        "\
What to try next:
  {command} copy --op dif-insert --size 64k --queues 4     another operation on four queues
  {command} copy --input FILE --output COPY                send a file through the device
  {command} copy --device cpu                              the same program without a device
  {command} copy --show-isolation --json                   the same as JSON
  {command} forward                                        packets alone, and what else can be done to them
"
    )
}

#[derive(Debug, Serialize)]
struct Demo {
    demo: Vec<report::Report>,
    /// `None` if the user asked to stop before.
    forward: Option<forward::report::Report>,
}

/// `copy`'s options, to be parsed on their own.
#[derive(Debug, Parser)]
struct Run {
    #[command(flatten)]
    args: copy::Args,
}

/// `forward`'s options, likewise.
#[derive(Debug, Parser)]
struct PacketRun {
    #[command(flatten)]
    args: forward::Args,
}

/// Runs the command.
pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let stop = Stop::install()?;
    let bar = ProgressBar::new(RUNS.len() as u64 + 1);
    if let Ok(style) = ProgressStyle::with_template("{msg} {wide_bar} {pos}/{len}") {
        bar.set_style(style);
    }
    let mut demo = Vec::with_capacity(RUNS.len());
    for run in RUNS {
        if stop.asked() {
            break;
        }
        let options = ["copy", "--queues", "2", "--seconds", "1"];
        let run = Run::try_parse_from(options.iter().chain(run))?.args;
        bar.set_message(format!("{} {}", run.op.name(), size::show(run.size)));
        demo.push(copy::measure(&run, &stop, &ProgressBar::hidden())?);
        bar.inc(1);
    }
    let mut packets = None;
    if !stop.asked() {
        bar.set_message("packets");
        let run = PacketRun::try_parse_from(["forward"].iter().chain(PACKETS))?.args;
        packets = Some(forward::measure(&run, &stop, false)?);
    }
    bar.finish_and_clear();
    let of_packets = packets.as_ref().map(|(report, _)| report.small_pages);
    let small_pages = demo.iter().map(|report| report.small_pages).chain(of_packets).max().unwrap_or(0);
    let judged = demo.iter().try_for_each(copy::judge);
    let judged = judged.and_then(|()| match &packets {
        Some((report, failure)) => forward::judge(report, failure.as_ref()),
        None => Ok(()),
    });
    let forward = packets.map(|(report, _)| report);
    if args.json {
        crate::print(&format!("{}\n", serde_json::to_string(&Demo { demo, forward })?))?;
    } else {
        let notes: String = demo.iter().map(report::Report::notes).collect();
        let jobs = format!("{}\n{notes}\n{JOBS_EXPLAINED}", report::table(&demo));
        let packets =
            forward.map(|report| format!("{}\n{PACKETS_EXPLAINED}", report.text())).unwrap_or_default();
        crate::print(&format!("{jobs}\n{packets}\n{}", next(&crate::command_name())))?;
    }
    copy::tell_small_pages(small_pages);
    judged
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn its_runs_are_valid_options() {
        for run in RUNS {
            Run::try_parse_from(["copy"].iter().chain(run)).expect("valid options");
        }
        PacketRun::try_parse_from(["forward"].iter().chain(PACKETS)).expect("valid options");
    }
}
