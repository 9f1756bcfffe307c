//! The line of rates that a terminal shows each second.

use std::fmt::Write as _;
use std::io::{self, IsTerminal as _};
use std::sync::Arc;
use std::time::{Duration, Instant};

use underpass::net::{Counters, Port, Values};

use super::report::{per_second, rate};

/// How often.
const EVERY: Duration = Duration::from_secs(1);

/// Prints rates to standard error while a run goes on, if that is a terminal.
#[derive(Debug)]
pub(super) struct Rates {
    shown: bool,
    begin: Instant,
    last: Instant,
    /// Received and sent by each port, until `last`.
    counts: Vec<[u64; 2]>,
}

impl Rates {
    /// Begins now. Nothing is shown unless `wanted`.
    pub(super) fn new(ports: usize, wanted: bool) -> Self {
        let now = Instant::now();
        Self {
            shown: wanted && io::stderr().is_terminal(),
            begin: now,
            last: now,
            counts: vec![[0; 2]; ports],
        }
    }

    /// Prints a line if it is time to. `no_room` says how many packets the application dropped.
    pub(super) fn tell(&mut self, ports: &[Box<dyn Port>], no_room: impl FnOnce() -> u64) {
        let now = Instant::now();
        if self.shown && now - self.last >= EVERY {
            let seconds = (now - self.begin).as_secs();
            eprintln!("{seconds:5} s  {}", self.line(ports, no_room(), (now - self.last).as_secs_f64()));
            self.last = now;
        }
    }

    /// The rates of the last `seconds`.
    fn line(&mut self, ports: &[Box<dyn Port>], no_room: u64, seconds: f64) -> String {
        let mut line = String::new();
        let mut dropped = no_room;
        for (index, (port, before)) in ports.iter().zip(&mut self.counts).enumerate() {
            let (rx, tx) = port.counters();
            let values = |queues: Vec<Arc<Counters>>| -> Vec<_> {
                queues.iter().map(|queue| queue.values()).collect()
            };
            let sum = |queues: &[Values], count: fn(&Values) -> u64| queues.iter().map(count).sum::<u64>();
            let (rx, tx) = (values(rx), values(tx));
            dropped += sum(&rx, Values::dropped) + sum(&tx, Values::dropped);
            let counts = [sum(&rx, |values| values.packets), sum(&tx, |values| values.packets)];
            let [rx, tx] =
                [0, 1].map(|way| rate(per_second(counts[way].saturating_sub(before[way]), seconds)));
            let _ = write!(line, "port {index}: rx {rx}/s, tx {tx}/s;  ");
            *before = counts;
        }
        let _ = write!(line, "dropped {dropped}");
        line
    }
}
