//! The options of `underpass forward`.

use std::path::PathBuf;
use std::time::Duration;

use underpass::net::{MIN_FRAME, MacAddr};

use super::mode::{Mode, Topology};
use crate::registry::Trust;
use crate::value::{positive, seconds};

/// Move packets between ports, change, drop, generate or answer them
///
/// Without --port, two software ports with packet generators behind them are joined for a few seconds.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Args {
    /// What is done to packets
    #[arg(long, value_enum, default_value_t = Mode::Io)]
    pub(crate) mode: Mode,
    /// A port: a PCI device bound to vfio-pci, 0000:3b:00.0, or soft:virtio-net[,peer=...,run=inline,...]; once for each
    /// port, which are numbered from 0
    #[arg(long = "port", value_name = "ADDRESS")]
    pub(crate) ports: Vec<String>,
    /// Which port sends what another one receives
    #[arg(long, value_enum, default_value_t = Topology::Paired)]
    pub(crate) topology: Topology,
    /// Cores to run on: 0,2 or 0-3. Queue q of every port runs on the q-th of them, beginning again after the last
    /// [default: one for each queue, as far as there are]
    #[arg(long, value_name = "CORES", value_parser = cores)]
    pub(crate) cores: Option<Cores>,
    /// Queues of each port, each way
    #[arg(long, default_value_t = 1, value_parser = positive::<usize>)]
    pub(crate) queues: usize,
    /// Packets that are moved at a time, at most
    #[arg(long, default_value_t = 32, value_parser = burst)]
    pub(crate) burst: usize,
    /// Packets on each queue; less where the port has less
    #[arg(long, default_value_t = 512, value_parser = positive::<usize>, value_name = "PACKETS")]
    pub(crate) ring: usize,
    /// The largest IP packet of each port, in bytes [default: 1500]
    #[arg(long, value_parser = positive::<u16>, value_name = "BYTES")]
    pub(crate) mtu: Option<u16>,
    /// Bytes of generated packets, from the Ethernet header on, without the checksum at their end
    #[arg(long, default_value_t = 64, value_parser = packet_size, value_name = "BYTES")]
    pub(crate) packet_size: usize,
    /// Flows that flowgen makes in each queue, with a destination address each [default: 1024]
    #[arg(long, value_parser = positive::<u16>)]
    pub(crate) flows: Option<u16>,
    /// The station that packets of a port go to, in the modes mac, txonly and flowgen: 1,02:00:00:00:00:01
    /// [default: 02:01:00:00:00:00 with the port's number in its end]
    #[arg(long, value_name = "PORT,MAC", value_parser = eth_peer)]
    pub(crate) eth_peer: Vec<(usize, MacAddr)>,
    /// Stop after this time [default: 5 without --port, else none]
    #[arg(long, value_parser = seconds)]
    pub(crate) seconds: Option<Duration>,
    /// Stop after so many packets that were received, or generated
    #[arg(long, value_parser = positive::<u64>)]
    pub(crate) packets: Option<u64>,
    /// Stop when no packet has come for so many seconds
    #[arg(long, value_parser = seconds, value_name = "SECONDS")]
    pub(crate) idle: Option<Duration>,
    /// Write a copy of what passes to this file, for tcpdump and Wireshark: packets as they are offered
    /// for sending, even if they are dropped then, or with rxonly as they are received
    #[arg(long, value_name = "FILE")]
    pub(crate) pcap: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) trust: Trust,
    /// Print the result as one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

/// Numbers of cores, in the order given. A type of its own, or clap would take each for an option's occurrence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Cores(pub(crate) Vec<usize>);

/// The largest burst: more than any device takes at a time, and still little memory.
const MAX_BURST: usize = 1024;

/// The largest Ethernet frame that IP can describe.
const MAX_PACKET: usize = MIN_FRAME + u16::MAX as usize;

/// Bytes of the headers of generated packets: Ethernet, IPv4, UDP.
pub(super) const MIN_PACKET: usize = MIN_FRAME + 20 + 8;

fn cores(text: &str) -> Result<Cores, String> {
    let number = |text: &str| text.parse::<usize>().map_err(|_| "cores are numbers: 0,2 or 0-3".to_owned());
    let mut cores = Vec::new();
    for part in text.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last) = (number(first)?, number(last)?);
        if first > last {
            return Err(format!("{part} goes down; write {last}-{first}"));
        }
        // Far above what Linux can have (CONFIG_NR_CPUS).
        if last > 1 << 16 {
            return Err(format!("there is no core {last}"));
        }
        cores.extend(first..=last);
    }
    Ok(Cores(cores))
}

fn burst(text: &str) -> Result<usize, String> {
    match positive(text)? {
        burst if burst > MAX_BURST => Err(format!("the largest is {MAX_BURST}")),
        burst => Ok(burst),
    }
}

fn packet_size(text: &str) -> Result<usize, String> {
    match positive(text)? {
        size if size < MIN_PACKET => Err(format!("the headers alone take {MIN_PACKET} bytes")),
        size if size > MAX_PACKET => Err(format!("the largest is {MAX_PACKET}")),
        size => Ok(size),
    }
}

fn eth_peer(text: &str) -> Result<(usize, MacAddr), String> {
    let parts = text.split_once(',').and_then(|(port, mac)| Some((port.parse().ok()?, mac)));
    let (port, mac) = parts.ok_or("it is the number of a port and an address: 1,02:00:00:00:00:01")?;
    Ok((port, mac.parse().map_err(|error| format!("{error}"))?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cores_are_read_as_people_write_them() {
        for (text, numbers) in [("0", &[0][..]), ("2,0", &[2, 0]), ("0-2,5", &[0, 1, 2, 5]), ("3-3", &[3])] {
            assert_eq!(cores(text), Ok(Cores(numbers.to_vec())), "{text}");
        }
        for text in ["", "0,", "-1", "a", "3-1", "0-99999999999"] {
            assert!(cores(text).is_err(), "{text}");
        }
    }
}
