//! What a run says: one JSON object, or tables for people.

use std::fmt::Write as _;

use comfy_table::{CellAlignment, Table, presets};
use serde::Serialize;
use underpass::net::{DeviceDrops, Port, Values};

use super::lane::Tally;
use super::mode::Mode;

/// A run's result. The keys up to `queues` are relied on by others: more may be added, none renamed.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Report {
    pub(crate) mode: &'static str,
    pub(crate) burst: usize,
    /// From the moment that all workers were ready until no more was received or generated.
    pub(crate) seconds: f64,
    pub(crate) ports: Vec<PortReport>,
    /// Packets sent by all ports together, or with rxonly received.
    pub(crate) packets_per_second: f64,
    pub(crate) queues: Vec<QueueReport>,
    /// Packets that were generated here.
    pub(crate) generated: u64,
    /// Packets that were received to be dropped: all of rxonly and flowgen.
    pub(crate) consumed: u64,
    /// Packets that icmpecho dropped because they are no requests.
    pub(crate) unanswered: u64,
    /// Packets of which it is not known what became of them: 0, or something is wrong.
    pub(crate) unexplained: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) capture: Option<CaptureReport>,
    /// Pages of 2 MiB that the packets' memory did not get.
    #[serde(skip)]
    pub(crate) small_pages: u64,
}

/// One port's part.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct PortReport {
    /// Its address, as the user gave it.
    pub(crate) device: String,
    pub(crate) driver: &'static str,
    pub(crate) rx_packets: u64,
    pub(crate) tx_packets: u64,
    pub(crate) rx_bytes: u64,
    pub(crate) tx_bytes: u64,
    /// Packets that were dropped: all of `drops`, but not `errors`. Those of `drops.device_tx` are also among `tx_packets`,
    /// as the device took them.
    pub(crate) rx_dropped: u64,
    pub(crate) tx_dropped: u64,
    /// What the device did against its rules.
    pub(crate) errors: u64,
    pub(crate) drops: Drops,
}

/// Why packets were dropped.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub(crate) struct Drops {
    pub(crate) rx_runts: u64,
    pub(crate) rx_oversize: u64,
    pub(crate) tx_runts: u64,
    pub(crate) tx_oversize: u64,
    pub(crate) tx_refused: u64,
    pub(crate) tx_unsent: u64,
    /// The queue took none for too long.
    pub(crate) tx_no_room: u64,
    /// Buffers for receiving that the pool did not have: no drops, but perhaps the reason for some in the device.
    pub(crate) no_buffers: u64,
    /// By the device, as it says; `None` where it has no such count.
    pub(crate) device_rx: Option<u64>,
    pub(crate) device_tx: Option<u64>,
}

/// One receive queue and what became of its packets.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct QueueReport {
    pub(crate) port: usize,
    pub(crate) queue: usize,
    pub(crate) core: usize,
    /// `None` where the device has no PASIDs.
    pub(crate) pasid: Option<u32>,
    /// Packets received on it, or with txonly and flowgen those generated for the queue that it sends to.
    pub(crate) packets: u64,
    /// Packets received on it: with flowgen they are not among `packets`.
    pub(crate) received: u64,
}

/// What `--pcap` came to.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct CaptureReport {
    pub(crate) file: String,
    pub(crate) packets: u64,
    /// Packets that the file lacks, because it did not keep up with them or could not be written to its end.
    pub(crate) missed: u64,
    /// Packets that were offered for sending, so that the file has them unless it missed them, and dropped then.
    pub(crate) unsent: u64,
}

/// One lane: which queue of which port it received from, and whose queue it sent to.
#[derive(Debug, Clone, Copy)]
pub(super) struct LaneResult {
    pub(super) port: usize,
    pub(super) target: usize,
    pub(super) queue: usize,
    pub(super) core: usize,
    pub(super) tally: Tally,
}

impl Report {
    /// Puts together what ports and lanes counted.
    pub(super) fn new(
        mode: Mode,
        burst: usize,
        seconds: f64,
        ports: &[Box<dyn Port>],
        lanes: &[LaneResult],
    ) -> Self {
        let sum = |count: fn(&Tally) -> u64| lanes.iter().map(|lane| count(&lane.tally)).sum::<u64>();
        let mut unexplained = sum(|t| t.received + t.generated)
            .abs_diff(sum(|t| t.consumed + t.unanswered + t.no_room + t.sent));
        let mut reports = Vec::with_capacity(ports.len());
        for (index, port) in ports.iter().enumerate() {
            let (rx, tx) = port.counters();
            let [rx, tx] =
                [rx, tx].map(|queues| queues.iter().map(|queue| queue.values()).fold(Values::default(), add));
            let of = |count: fn(&Tally) -> u64, port: fn(&LaneResult) -> usize| -> u64 {
                lanes.iter().filter(|lane| port(lane) == index).map(|lane| count(&lane.tally)).sum()
            };
            unexplained += rx.packets.abs_diff(of(|tally| tally.received, |lane| lane.port));
            unexplained += (tx.packets + tx.dropped()).abs_diff(of(|tally| tally.sent, |lane| lane.target));
            let drops = Drops {
                rx_runts: rx.runts,
                rx_oversize: rx.oversize,
                tx_runts: tx.runts,
                tx_oversize: tx.oversize,
                tx_refused: tx.refused,
                tx_unsent: tx.unsent,
                tx_no_room: of(|tally| tally.no_room, |lane| lane.target),
                no_buffers: rx.no_buffers,
                ..Drops::default()
            };
            reports.push(PortReport {
                device: port.name().to_owned(),
                driver: port.driver(),
                rx_packets: rx.packets,
                tx_packets: tx.packets,
                rx_bytes: rx.bytes,
                tx_bytes: tx.bytes,
                rx_dropped: rx.dropped() - rx.errors,
                tx_dropped: tx.dropped() - tx.errors + drops.tx_no_room,
                errors: rx.errors + tx.errors + rx.broken + tx.broken,
                drops,
            });
        }
        let queues = lanes.iter().map(|lane| QueueReport {
            port: lane.port,
            queue: lane.queue,
            core: lane.core,
            pasid: ports[lane.port].pasid().map(underpass::Pasid::get),
            packets: if mode.generates() { lane.tally.generated } else { lane.tally.received },
            received: lane.tally.received,
        });
        let packets: u64 = match mode {
            Mode::Rxonly => reports.iter().map(|port| port.rx_packets).sum(),
            _ => reports.iter().map(|port| port.tx_packets).sum(),
        };
        Self {
            mode: mode.name(),
            burst,
            seconds,
            packets_per_second: per_second(packets, seconds),
            queues: queues.collect(),
            ports: reports,
            generated: sum(|tally| tally.generated),
            consumed: sum(|tally| tally.consumed),
            unanswered: sum(|tally| tally.unanswered),
            unexplained,
            capture: None,
            small_pages: 0,
        }
    }

    /// Adds what each port's device itself dropped.
    pub(super) fn add_device_drops(&mut self, dropped: &[Option<DeviceDrops>]) {
        for (port, dropped) in self.ports.iter_mut().zip(dropped) {
            (port.drops.device_rx, port.drops.device_tx) =
                (dropped.map(|dropped| dropped.rx), dropped.map(|dropped| dropped.tx));
            let DeviceDrops { rx, tx } = dropped.unwrap_or_default();
            port.rx_dropped += rx;
            port.tx_dropped += tx;
        }
    }

    /// The tables and what they do not show, for people.
    pub(crate) fn text(&self) -> String {
        let mut text = self.ports_table();
        text.push('\n');
        text += &self.queues_table();
        let lines = self.lines();
        if !lines.is_empty() {
            text.push('\n');
        }
        text + &lines
    }

    fn ports_table(&self) -> String {
        let mut table = table(&[
            "port",
            "rx packets",
            "tx packets",
            "rx/s",
            "tx/s",
            "rx Gbit/s",
            "tx Gbit/s",
            "rx dropped",
            "tx dropped",
            "errors",
            "address",
        ]);
        for (index, port) in self.ports.iter().enumerate() {
            table.add_row([
                index.to_string(),
                port.rx_packets.to_string(),
                port.tx_packets.to_string(),
                rate(per_second(port.rx_packets, self.seconds)),
                rate(per_second(port.tx_packets, self.seconds)),
                format!("{:.2}", gigabits(port.rx_bytes, self.seconds)),
                format!("{:.2}", gigabits(port.tx_bytes, self.seconds)),
                port.rx_dropped.to_string(),
                port.tx_dropped.to_string(),
                port.errors.to_string(),
                port.device.clone(),
            ]);
        }
        lines_of(&mut table, 10)
    }

    fn queues_table(&self) -> String {
        let mut table = table(&["port", "queue", "core", "PASID", "packets", "packets/s"]);
        for queue in &self.queues {
            table.add_row([
                queue.port.to_string(),
                queue.queue.to_string(),
                queue.core.to_string(),
                queue.pasid.map_or_else(|| "none".to_owned(), |pasid| pasid.to_string()),
                queue.packets.to_string(),
                rate(per_second(queue.packets, self.seconds)),
            ]);
        }
        lines_of(&mut table, 6)
    }

    /// Drops and their reasons, and what else is to be said: lines, each with its line feed.
    fn lines(&self) -> String {
        let mut lines = String::new();
        for (index, port) in self.ports.iter().enumerate() {
            let drops = &port.drops;
            let (device_rx, device_tx) =
                (drops.device_rx.unwrap_or_default(), drops.device_tx.unwrap_or_default());
            let by_device = if port.rx_packets == 0 {
                "packets dropped by the device, and none received: most likely they are over its MTU; raise it with --mtu, \
                 and for a software port also with the option mtu of its address"
            } else {
                "received packets dropped by the device: over its MTU, or without a buffer or a queue"
            };
            for (count, what) in [
                (device_rx, by_device),
                (
                    device_tx,
                    "packets dropped by the device instead of sent: its link is down, or they do not suit it",
                ),
                (drops.rx_runts, "received packets dropped: shorter than an Ethernet header"),
                (drops.rx_oversize, "received packets dropped: over the MTU; --mtu raises it"),
                (drops.tx_runts, "packets not sent: shorter than an Ethernet header"),
                (drops.tx_oversize, "packets not sent: over the MTU; --mtu raises it"),
                (drops.tx_refused, "packets not sent: refused by the driver"),
                (drops.tx_unsent, "packets not sent: still with the device at the end"),
                (drops.tx_no_room, "packets not sent: the queue took none for too long"),
                (drops.no_buffers, "times no buffer was free to receive into"),
                (port.errors, "errors of the device; -v shows them"),
            ] {
                if count != 0 {
                    let _ = writeln!(lines, "port {index}: {count} {what}");
                }
            }
        }
        if self.unanswered != 0 {
            let _ = writeln!(lines, "{} packets were no requests, and were dropped", self.unanswered);
        }
        if let Some(CaptureReport { file, packets, missed, unsent }) = &self.capture {
            let _ = write!(lines, "{file}: {packets} packets captured");
            if *missed != 0 {
                let _ = write!(lines, ", {missed} not: the file did not keep up with them");
            }
            if *unsent != 0 {
                let _ = write!(lines, "; of all these {unsent} were dropped instead of sent");
            }
            lines.push('\n');
        }
        if self.unexplained != 0 {
            let _ = writeln!(lines, "{} packets are not accounted for", self.unexplained);
        }
        lines
    }
}

fn add(a: Values, b: Values) -> Values {
    Values {
        packets: a.packets + b.packets,
        bytes: a.bytes + b.bytes,
        runts: a.runts + b.runts,
        oversize: a.oversize + b.oversize,
        refused: a.refused + b.refused,
        unsent: a.unsent + b.unsent,
        no_buffers: a.no_buffers + b.no_buffers,
        errors: a.errors + b.errors,
        broken: a.broken + b.broken,
    }
}

/// A rate; nothing in no time is none.
pub(super) fn per_second(count: u64, seconds: f64) -> f64 {
    if count == 0 { 0.0 } else { count as f64 / seconds }
}

fn gigabits(bytes: u64, seconds: f64) -> f64 {
    per_second(bytes, seconds) * 8.0 / 1e9
}

/// A rate for people, in three or four digits: "4.81 M", "12.3 k", "7.0".
pub(super) fn rate(per_second: f64) -> String {
    let (value, unit) = match per_second {
        rate if rate >= 1e6 => (rate / 1e6, " M"),
        rate if rate >= 1e3 => (rate / 1e3, " k"),
        rate => (rate, ""),
    };
    let digits = if value >= 10.0 { 1 } else { 2 };
    format!("{value:.digits$}{unit}")
}

fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header(header);
    table
}

/// The table's lines, its first `numbers` columns aligned to the right.
fn lines_of(table: &mut Table, numbers: usize) -> String {
    for index in 0..numbers {
        if let Some(column) = table.column_mut(index) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table.lines().map(|line| line.trim_end().to_owned() + "\n").collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_short() {
        for (per_second, shown) in [
            (0.0, "0.00"),
            (7.0, "7.00"),
            (999.0, "999.0"),
            (12_345.0, "12.3 k"),
            (4.814e6, "4.81 M"),
            (2e9, "2000.0 M"),
        ] {
            assert_eq!(rate(per_second), shown);
        }
    }
}
