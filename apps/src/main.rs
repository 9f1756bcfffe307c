//! The `underpass` command: one module an application. Each of them is also meant to be copied from.

#![allow(
    clippy::cast_precision_loss,
    clippy::cast_sign_loss,
    reason = "rates and ratios, shown with a few digits and never negative"
)]

mod copy;
mod crc32c;
mod demo;
mod interrupt;
mod size;

use std::fmt;
use std::io::{self, Write};
use std::process::ExitCode;

use clap::error::{ContextKind, ErrorKind};
use clap::{CommandFactory, Parser, Subcommand};
use tracing_subscriber::filter::{LevelFilter, filter_fn};
use tracing_subscriber::layer::{Layer as _, SubscriberExt as _};
use tracing_subscriber::util::SubscriberInitExt as _;

/// What a command line is refused for after clap took it: exit status 2 instead of 1.
#[derive(Debug)]
struct Usage(String);

impl fmt::Display for Usage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Usage {}

/// Where the warning of missing huge pages comes from.
const SMALL_PAGES: &str = "underpass_iommu::memory::host";

const EXAMPLES: &str = "\
Try:
  underpass demo                                  what it does, on a software device, in a few seconds
  underpass copy --op crc --size 1M --queues 2    one job on two queues, each with its own PASID

`underpass COMMAND --help` lists a command's options.";

/// Drives accelerators from user space: one kernel-owned address space and one PASID for each queue.
#[derive(Debug, Parser)]
#[command(name = "underpass", version, after_help = EXAMPLES, disable_help_subcommand = true)]
struct Cli {
    /// Say more on standard error
    #[arg(short, long, global = true)]
    verbose: bool,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Subcommand)]
enum Command {
    Demo(demo::Args),
    Copy(copy::Args),
}

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return refused(&error),
    };
    let level = if cli.verbose { LevelFilter::DEBUG } else { LevelFilter::WARN };
    // That huge pages are missing is a short note behind the result, unless more is asked for.
    let told = filter_fn(move |what| cli.verbose || what.target() != SMALL_PAGES);
    let lines = tracing_subscriber::fmt::layer()
        .without_time()
        .with_target(false)
        .with_ansi(false)
        .with_writer(io::stderr);
    tracing_subscriber::registry().with(lines.with_filter(told)).with(level).init();

    let result = match cli.command {
        Some(Command::Demo(args)) => demo::run(&args),
        Some(Command::Copy(args)) => copy::run(&args),
        None => print(&Cli::command().render_help().to_string()),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("underpass: {error:#}");
            ExitCode::from(if error.is::<Usage>() { 2 } else { 1 })
        }
    }
}

/// Puts a result on standard output. A reader that has gone away (`| head`) is not an error.
fn print(text: &str) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(anyhow::Error::new(error).context("cannot write the result to standard output"))
        }
        _ => Ok(()),
    }
}

/// Tells people on standard error what is no part of the result.
fn note(text: &str) {
    eprintln!("note: {text}");
}

/// Shows what clap has to say: help and version as they are, an error in one line.
fn refused(error: &clap::Error) -> ExitCode {
    if !error.use_stderr() {
        return match print(&error.render().to_string()) {
            Ok(()) => ExitCode::SUCCESS,
            Err(_) => ExitCode::FAILURE,
        };
    }
    let text = error.render().to_string();
    let what: Vec<&str> = text
        .lines()
        .map(str::trim)
        .take_while(|line| !line.starts_with("Usage:") && !line.starts_with("For more information"))
        .filter(|line| !line.is_empty())
        .collect();
    let what = what.join(" ");
    let what = what.strip_prefix("error: ").unwrap_or(&what);
    let help = match (error.kind(), error.get(ContextKind::InvalidSubcommand)) {
        (ErrorKind::InvalidSubcommand, _) | (_, Some(_)) => "underpass --help",
        _ => match std::env::args().nth(1).as_deref() {
            Some("copy") => "underpass copy --help",
            Some("demo") => "underpass demo --help",
            _ => "underpass --help",
        },
    };
    eprintln!("underpass: {what}; try: {help}");
    ExitCode::from(2)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clap_finds_no_fault_with_the_options() {
        Cli::command().debug_assert();
    }
}
