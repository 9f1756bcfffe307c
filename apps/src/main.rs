//! The `underpass` command: one module an application. Each of them is also meant to be copied from.

#![allow(
    clippy::cast_precision_loss,
    clippy::cast_sign_loss,
    reason = "rates and ratios, shown with a few digits and never negative"
)]

mod bind;
mod copy;
mod crc32c;
mod demo;
mod devices;
mod doctor;
mod folder;
mod forward;
mod interrupt;
mod memlock;
mod pci_names;
mod registry;
mod size;
mod value;

use std::fmt;
use std::io::{self, Write};
use std::path::Path;
use std::process::ExitCode;

use clap::error::ErrorKind;
use clap::{CommandFactory, FromArgMatches as _, Parser, Subcommand};
use tracing_subscriber::filter::{LevelFilter, filter_fn};
use tracing_subscriber::layer::{Layer as _, SubscriberExt as _};
use tracing_subscriber::util::SubscriberInitExt as _;
use underpass::worker;

/// What a command line is refused for after clap took it.
#[derive(Debug)]
struct Usage(String);

impl fmt::Display for Usage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Usage {}

/// Whether the user asked for what makes no sense: exit status 2 instead of 1.
fn is_usage(error: &anyhow::Error) -> bool {
    let is_invalid = |error: &underpass::Error| error.kind() == underpass::ErrorKind::InvalidInput;
    error.is::<Usage>() || error.downcast_ref().is_some_and(is_invalid)
}

/// Whether a worker can run on `core`, which the user named.
fn check_core(core: usize) -> anyhow::Result<()> {
    worker::check_core(core).map_err(|error| Usage(error.to_string()).into())
}

/// Where the warning of missing huge pages comes from.
const SMALL_PAGES: &str = "underpass_iommu::memory::host";

/// What the first screen ends with.
fn examples() -> String {
    let command = command_name();
    format!(
        "\
Try:
  {command} demo                                  what it does, on software devices, in a few seconds
  {command} copy --op crc --size 1M --queues 2    one job on two queues, each with its own PASID
  {command} forward --mode macswap --seconds 2    packets between two software NICs
  {command} doctor                                what real devices need, and how to get it

`{command} COMMAND --help` lists a command's options.
{STATUS}"
    )
}

/// Ends each help text.
const STATUS: &str = "Exit status: 0 done, 1 it failed, 2 wrong usage.";

/// How the user can start this program again: as it was started, or by cargo where cargo built it.
fn command_name() -> String {
    typed(&std::env::args().next().unwrap_or_default())
}

/// How `sudo` starts this program: it does not look for it where cargo puts it, nor does root have to have cargo.
fn command_for_sudo() -> String {
    let program = std::env::args().next().unwrap_or_default();
    for_sudo(&program, std::env::current_exe().ok().as_deref())
}

fn for_sudo(program: &str, file: Option<&Path>) -> String {
    let is_found = |file: &Path| SUDO_PATH.iter().any(|folder| file.parent() == Some(Path::new(folder)));
    match file {
        Some(file) if !program.contains('/') && !is_found(file) => file.display().to_string(),
        _ if program.is_empty() => "underpass".to_owned(),
        _ => program.to_owned(),
    }
}

/// Where sudo looks for programs, whatever the user's own path is (`secure_path`, as systems set it).
const SUDO_PATH: [&str; 6] = ["/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"];

fn typed(program: &str) -> String {
    let mut folders = Path::new(program).components().rev().skip(1);
    match (folders.next(), folders.next()) {
        (Some(profile), Some(target)) if target.as_os_str() == "target" => {
            if profile.as_os_str() == "release" { "cargo run --release --" } else { "cargo run --" }
                .to_owned()
        }
        _ if program.is_empty() => "underpass".to_owned(),
        _ => program.to_owned(),
    }
}

/// Drives NICs and accelerators from user space, in I/O address spaces that the kernel owns.
#[derive(Debug, Parser)]
#[command(name = "underpass", version, disable_help_subcommand = true)]
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
    Forward(forward::Args),
    Doctor(doctor::Args),
    Devices(devices::Args),
    Bind(bind::BindArgs),
    Unbind(bind::UnbindArgs),
}

fn main() -> ExitCode {
    let command = Cli::command().after_help(examples()).mut_subcommands(|known| match known.get_name() {
        "forward" => known.after_help(STATUS).after_long_help(format!("{}\n{STATUS}", forward::long_help())),
        _ => known.after_help(STATUS),
    });
    let parsed = command.clone().try_get_matches().and_then(|matches| Cli::from_arg_matches(&matches));
    let cli = match parsed {
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
        Some(Command::Forward(args)) => forward::run(&args),
        Some(Command::Doctor(args)) => doctor::run(&args),
        Some(Command::Devices(args)) => devices::run(&args),
        Some(Command::Bind(args)) => bind::bind(&args),
        Some(Command::Unbind(args)) => bind::unbind(&args),
        None => print(&{ command }.render_help().to_string()),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("underpass: {error:#}");
            ExitCode::from(if is_usage(&error) { 2 } else { 1 })
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
    let given = std::env::args().nth(1).filter(|_| error.kind() != ErrorKind::InvalidSubcommand);
    let command = given.filter(|given| Cli::command().find_subcommand(given).is_some());
    let help = command.map_or_else(|| "--help".to_owned(), |command| format!("{command} --help"));
    eprintln!("underpass: {}; try: {} {help}", in_one_line(&error.render().to_string()), command_name());
    ExitCode::from(2)
}

/// clap's paragraphs, without the usage at their end, as one line. Lists that stand indented belong to what is
/// before them.
fn in_one_line(text: &str) -> String {
    let lines = text
        .lines()
        .take_while(|line| !line.starts_with("Usage:") && !line.starts_with("For more information"))
        .filter(|line| !line.trim().is_empty());
    let mut joined = String::new();
    for line in lines {
        let part = line.trim();
        if !joined.is_empty() {
            let is_new = part.starts_with("tip:") || part.starts_with('[');
            joined.push_str(if is_new { "; " } else { " " });
        }
        joined.push_str(part);
    }
    joined.strip_prefix("error: ").map(str::to_owned).unwrap_or(joined)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn claps_paragraphs_become_one_line() {
        let error = Cli::try_parse_from(["underpass", "dmo"]).expect_err("there is no such command");
        let line = in_one_line(&error.render().to_string());
        assert_eq!(line, "unrecognized subcommand 'dmo'; tip: a similar subcommand exists: 'demo'");
        let error =
            Cli::try_parse_from(["underpass", "copy", "--op", "move"]).expect_err("no such operation");
        let line = in_one_line(&error.render().to_string());
        assert!(line.contains("'--op <OP>'; [possible values: nop, copy,"), "{line}");
    }

    #[test]
    fn it_can_be_started_again_as_it_was() {
        for (program, command) in [
            ("underpass", "underpass"),
            ("./underpass", "./underpass"),
            ("target/release/underpass", "cargo run --release --"),
            ("/home/user/underpass/target/debug/underpass", "cargo run --"),
            ("", "underpass"),
        ] {
            assert_eq!(typed(program), command, "{program}");
        }
    }

    #[test]
    fn sudo_finds_it_too() {
        for (program, file, command) in [
            ("underpass", "/usr/local/bin/underpass", "underpass"),
            ("underpass", "/home/user/.cargo/bin/underpass", "/home/user/.cargo/bin/underpass"),
            ("target/release/underpass", "/src/target/release/underpass", "target/release/underpass"),
        ] {
            assert_eq!(for_sudo(program, Some(Path::new(file))), command, "{file}");
        }
    }

    #[test]
    fn clap_finds_no_fault_with_the_options() {
        Cli::command().debug_assert();
    }
}
