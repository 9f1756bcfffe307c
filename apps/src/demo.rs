//! `underpass demo`: a few runs of `copy` on a software device, one line each.

use clap::Parser;
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

use crate::copy::{self, report};
use crate::interrupt::Stop;
use crate::size;

/// Show jobs on a software DSA with two queues, each with a PASID of its own: a few seconds, no privileges
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Print the results as one JSON object: {"demo": [...]}
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

/// What to read from the table, and what to do then; `command` starts this program.
fn next(command: &str) -> String {
    format!(
        "\
GiB/s are the device's; ratio is its speed relative to memcpy over the same buffers, on the same core.

What to try next:
  {command} copy --op dif-insert --size 64k --queues 4     another operation on four queues
  {command} copy --input FILE --output COPY                send a file through the device
  {command} copy --device cpu                              the same program without a device
  {command} copy --show-isolation --json                   the same as JSON
"
    )
}

#[derive(Debug, Serialize)]
struct Demo {
    demo: Vec<report::Report>,
}

/// `copy`'s options, to be parsed on their own.
#[derive(Debug, Parser)]
struct Run {
    #[command(flatten)]
    args: copy::Args,
}

/// Runs the command.
pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let stop = Stop::install()?;
    let bar = ProgressBar::new(RUNS.len() as u64);
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
    bar.finish_and_clear();
    let small_pages = demo.iter().map(|report| report.small_pages).max().unwrap_or(0);
    let judged = demo.iter().try_for_each(copy::judge);
    if args.json {
        crate::print(&format!("{}\n", serde_json::to_string(&Demo { demo })?))?;
    } else {
        let notes: String = demo.iter().map(report::Report::notes).collect();
        let next = next(&crate::command_name());
        crate::print(&format!("{}\n{notes}\n{next}", report::table(&demo)))?;
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
    }
}
