//! How long it takes from a process's start to its first packet, on a software device: medians of many starts.
//!
//! ```sh
//! cargo build --release && cargo run --release -p underpass-benches --example startup
//! ```
//!
//! The program that is started opens `soft:virtio-net`, makes a pool of 4096 buffers, starts the port with queues of 256,
//! sends a packet and waits for it to come back. Before its first line, the process is made, loaded and linked. The command
//! beside it is timed from its start to its end.

#![allow(clippy::print_stdout, reason = "the figures are the output")]

mod first_packet;

use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use first_packet::{Start, median};

const STARTS: usize = 31;
const ADDRESS: &str = "soft:virtio-net";
const FORWARD: [&str; 6] =
    ["forward", "--port", "soft:virtio-net,peer=generator", "--packets", "1", "--json"];

fn main() -> Result<(), Box<dyn Error>> {
    if std::env::args().nth(1).as_deref() == Some("program") {
        return first_packet::program(ADDRESS);
    }
    let starts: Vec<_> = (0..STARTS).map(|_| Start::of(&["program"])).collect::<Result<_, _>>()?;
    println!("| from the process's start | ms |\n|---|---|");
    println!("| before its first line | {:.2} |", median(starts.iter().map(Start::before)));
    for (name, _) in &starts[0].steps {
        println!("| {name} | {:.2} |", median(starts.iter().map(|start| start.step(name))));
    }
    println!("| to the first packet | {:.2} |", median(starts.iter().map(|start| start.all)));
    let command = command()?;
    let runs: Vec<_> = (0..STARTS).map(|_| run(&command)).collect::<Result<_, _>>()?;
    println!("| `underpass {}`, to its end | {:.2} |", FORWARD.join(" "), median(runs.into_iter()));
    Ok(())
}

/// The application, beside this example's own folder.
fn command() -> Result<PathBuf, Box<dyn Error>> {
    let example = std::env::current_exe()?;
    let command = example.ancestors().nth(2).ok_or("no folder above the examples")?.join("underpass");
    if command.exists() { Ok(command) } else { Err("no application is built: cargo build --release".into()) }
}

/// How long the application takes to receive a packet and be done.
fn run(command: &Path) -> Result<Duration, Box<dyn Error>> {
    let began = Instant::now();
    let status = Command::new(command).args(FORWARD).stdout(Stdio::null()).stderr(Stdio::null()).status()?;
    if !status.success() {
        return Err(format!("underpass {}: {status}", FORWARD.join(" ")).into());
    }
    Ok(began.elapsed())
}
