//! From a process's start to its first packet: the program that is measured, and what measures it.

use std::error::Error;
use std::io::{BufRead as _, BufReader};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use underpass::net::Config;
use underpass::{Burst, Packet, Pool};

/// Packet buffers, and how many of them are on the receive queue at first.
pub(crate) const BUFFERS: usize = 4096;
pub(crate) const RX_DEPTH: usize = 256;

/// No packet takes as long.
pub(crate) const DEADLINE: Duration = Duration::from_secs(5);

/// "Who has 10.0.2.2?", asked of all by 02:00:00:00:00:01 at 10.0.2.15 (RFC 826): QEMU's user network answers, and what only
/// sends back does so too.
#[rustfmt::skip]
pub(crate) const REQUEST: [u8; 60] = [
    0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2, 0, 0, 0, 0, 1, 8, 6,
    0, 1, 8, 0, 6, 4, 0, 1, 2, 0, 0, 0, 0, 1, 10, 0, 2, 15, 0, 0, 0, 0, 0, 0, 10, 0, 2, 2,
    0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
];

/// The steps of a start, each with the time from the program's first line to its end.
pub(crate) struct Steps {
    began: Instant,
    done: Vec<(&'static str, Duration)>,
}

impl Steps {
    pub(crate) fn begin() -> Self {
        Self { began: Instant::now(), done: Vec::new() }
    }

    pub(crate) fn done(&mut self, step: &'static str) {
        self.done.push((step, self.began.elapsed()));
    }

    /// The line that [`Start::of`] reads.
    pub(crate) fn tell(&self) {
        let steps = self.done.iter().map(|(step, time)| format!("{step}={}", time.as_nanos()));
        println!("{}", steps.collect::<Vec<_>>().join(","));
    }
}

/// Sends a packet and waits for one, through the port at `address`, and tells how long it took.
pub(crate) fn program(address: &str) -> Result<(), Box<dyn Error>> {
    let mut steps = Steps::begin();
    let mut port = underpass_drivers::builtin().open_port(address)?;
    steps.done("open");
    let pool = Pool::builder(BUFFERS).build()?;
    steps.done("memory");
    let mut started = port.start(&Config { rx_depth: RX_DEPTH, tx_depth: RX_DEPTH, ..Config::new(&pool) })?;
    steps.done("start");
    let mut burst: Burst<Packet> = Burst::with_capacity(32);
    pool.alloc_burst(1, &mut burst);
    let room = burst[0].append(REQUEST.len()).ok_or("a buffer has no room for a packet")?;
    room.copy_from_slice(&REQUEST);
    started.tx[0].tx_burst(&mut burst);
    let sent = Instant::now();
    while started.rx[0].rx_burst(&mut burst) == 0 {
        if sent.elapsed() > DEADLINE {
            return Err("no packet came".into());
        }
    }
    steps.done("packet");
    steps.tell();
    Ok(())
}

/// One start of a program.
pub(crate) struct Start {
    /// From before the process exists until it has told of its first packet.
    pub(crate) all: Duration,
    /// How long each step took, from the program's first line.
    pub(crate) steps: Vec<(String, Duration)>,
}

impl Start {
    /// Starts this very program anew, with other arguments.
    pub(crate) fn of(arguments: &[&str]) -> Result<Self, Box<dyn Error>> {
        let mut command = Command::new(std::env::current_exe()?);
        command.args(arguments).stdout(Stdio::piped());
        let began = Instant::now();
        let mut child = command.spawn()?;
        let mut line = String::new();
        let stdout = child.stdout.take().ok_or("the program has no output")?;
        BufReader::new(stdout).read_line(&mut line)?;
        let all = began.elapsed();
        let status = child.wait()?;
        if !status.success() {
            return Err(format!("{arguments:?}: {status}").into());
        }
        let mut before = Duration::ZERO;
        let mut steps = Vec::new();
        for step in line.trim_end().split(',') {
            let (name, time) = step.split_once('=').ok_or_else(|| format!("{arguments:?} said {line:?}"))?;
            let time = Duration::from_nanos(time.parse()?);
            steps.push((name.to_owned(), time.saturating_sub(before)));
            before = time;
        }
        Ok(Self { all, steps })
    }

    /// What comes before the program's first line: the process is made, loaded and linked.
    pub(crate) fn before(&self) -> Duration {
        self.all.saturating_sub(self.steps.iter().map(|(_, time)| *time).sum())
    }

    /// The time of a step.
    pub(crate) fn step(&self, name: &str) -> Duration {
        self.steps.iter().filter(|(step, _)| step == name).map(|(_, time)| *time).sum()
    }
}

/// The median, in milliseconds.
pub(crate) fn median(times: impl Iterator<Item = Duration>) -> f64 {
    let mut times: Vec<_> = times.collect();
    times.sort_unstable();
    times.get(times.len() / 2).map_or(f64::NAN, |time| time.as_secs_f64() * 1e3)
}
