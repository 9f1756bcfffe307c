//! Whole runs over ports whose other ends are here.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use clap::Parser;
use etherparse::PacketBuilder;
use underpass::Pool;

use super::test_port::{TestPort, Wire};
use super::*;

#[derive(Debug, Parser)]
struct Command {
    #[command(flatten)]
    args: Args,
}

fn args(text: &str) -> Args {
    Command::try_parse_from(["forward"].into_iter().chain(text.split_whitespace())).expect("options").args
}

/// Ports with what is needed of them after they are gone.
struct Bench {
    ports: Vec<Box<dyn Port>>,
    wires: Vec<Vec<Arc<Wire>>>,
    pools: Vec<Arc<Mutex<Vec<Pool>>>>,
}

impl Bench {
    fn new(ports: usize, queues: usize) -> Self {
        let mut bench = Self { ports: vec![], wires: vec![], pools: vec![] };
        for n in 0..ports {
            let port = TestPort::new(&format!("test:{n}"), queues);
            bench.wires.push(port.wires());
            bench.pools.push(Arc::clone(&port.pools));
            bench.ports.push(Box::new(port));
        }
        bench
    }

    /// Runs, and checks that all buffers are home afterwards.
    fn run(&mut self, options: &str) -> anyhow::Result<(Report, Option<Error>)> {
        let args = args(options);
        let cores = cores(&args)?;
        let result = forward(&args, std::mem::take(&mut self.ports), &cores, &Stop::never(), false);
        for pool in self.pools.iter().flat_map(|pools| pools.lock().unwrap().drain(..).collect::<Vec<_>>()) {
            assert_eq!(pool.available(), pool.capacity(), "{pool:?}: a buffer was lost");
        }
        result
    }

    fn report(&mut self, options: &str) -> Report {
        let (report, failure) = self.run(options).expect("a run");
        assert!(failure.is_none(), "{failure:?}");
        assert_eq!(report.unexplained, 0, "{report:?}");
        report
    }
}

/// UDP packets of different lengths, each with a number in its payload.
fn frames(count: usize) -> Vec<Vec<u8>> {
    let frame = |n: usize| {
        let mut frame = Vec::new();
        let payload: Vec<u8> = (0..n % 1400).map(|at| (at + n) as u8).collect();
        let builder = PacketBuilder::ethernet2([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2])
            .ipv4([10, 0, 0, 1], [10, 0, 0, 2], 9)
            .udp(n as u16, 7);
        builder.write(&mut frame, &payload).unwrap();
        frame
    };
    (0..count).map(frame).collect()
}

fn with_macs(frames: &[Vec<u8>], destination: [u8; 6], source: [u8; 6]) -> Vec<Vec<u8>> {
    frames.iter().map(|frame| [&destination[..], &source, &frame[12..]].concat()).collect()
}

const MAC_OF_PORTS: [u8; 6] = [2, 0, 0, 0, 0x0a, 0x0b];

#[test]
fn what_comes_in_at_one_port_goes_out_of_the_other() {
    let input = frames(300);
    let swapped = with_macs(&input, [2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]);
    let set = with_macs(&input, [2, 1, 0, 0, 0, 1], MAC_OF_PORTS);
    let given = with_macs(&input, [2, 0, 0, 0, 0, 9], MAC_OF_PORTS);
    for (options, expected) in [
        ("--mode io", &input),
        ("--mode io --burst 1", &input),
        ("--mode macswap --burst 7", &swapped),
        ("--mode mac", &set),
        ("--mode mac --eth-peer 0,02:00:00:00:00:05 --eth-peer 1,02:00:00:00:00:09", &given),
    ] {
        let mut bench = Bench::new(2, 1);
        bench.wires[0][0].put(input.clone());
        let report = bench.report(&format!("{options} --packets 300"));
        assert!(bench.wires[1][0].sent() == *expected, "{options}");
        assert!(bench.wires[0][0].sent().is_empty(), "{options}");
        let bytes: usize = input.iter().map(Vec::len).sum();
        let [from, to] = &report.ports[..] else { panic!("two ports") };
        assert_eq!((from.rx_packets, from.rx_bytes, from.tx_packets), (300, bytes as u64, 0));
        assert_eq!((to.tx_packets, to.tx_bytes, to.rx_packets), (300, bytes as u64, 0));
        assert_eq!((report.queues[0].packets, report.queues[1].packets), (300, 0));
        assert!(report.packets_per_second > 0.0 && report.seconds > 0.0);
    }
}

#[test]
fn no_port_has_the_address_that_another_one_sends_to() {
    for port in [0, 1, 2, 255, 256, 65535] {
        let MacAddr(bytes) = station(port);
        let [.., a, b, c, d] = bytes;
        assert_ne!(MacAddr(bytes), MacAddr::local(u32::from_be_bytes([a, b, c, d])), "{port}");
        assert!(bytes[0] & 3 == 2 && usize::from(c) << 8 | usize::from(d) == port, "{port}");
    }
}

#[test]
fn each_topology_sends_where_it_says() {
    for (topology, ports, targets) in [
        ("paired", 3, [1, 0, 2].as_slice()),
        ("paired", 1, &[0]),
        ("chained", 3, &[1, 2, 0]),
        ("loop", 2, &[0, 1]),
    ] {
        let mut bench = Bench::new(ports, 1);
        let inputs: Vec<_> = (0..ports).map(|port| frames(10 + port)).collect();
        for (wires, input) in bench.wires.iter().zip(&inputs) {
            wires[0].put(input.clone());
        }
        let all: usize = inputs.iter().map(Vec::len).sum();
        bench.report(&format!("--topology {topology} --packets {all}"));
        for (port, target) in targets.iter().enumerate() {
            assert!(bench.wires[*target][0].sent() == inputs[port], "{topology}: {port} to {target}");
        }
    }
}

#[test]
fn queues_keep_to_themselves_on_one_core_and_on_two() {
    for options in ["--cores 0", "--cores 0,1", "--cores 1,0"] {
        if worker::check_core(1).is_err() && options.contains('1') {
            continue;
        }
        let mut bench = Bench::new(2, 3);
        let inputs: Vec<_> = (0..6).map(|n| frames(50 + n)).collect();
        for (wire, input) in bench.wires.iter().flatten().zip(&inputs) {
            wire.put(input.clone());
        }
        let all: usize = inputs.iter().map(Vec::len).sum();
        let report = bench.report(&format!("--queues 3 --packets {all} {options}"));
        for queue in 0..3 {
            assert!(bench.wires[1][queue].sent() == inputs[queue]);
            assert!(bench.wires[0][queue].sent() == inputs[3 + queue]);
        }
        let first = options.split([' ', ',']).nth(1).unwrap();
        for queue in report.queues {
            let own = options.contains(',') && queue.queue == 1;
            assert_eq!(queue.core.to_string() == first, !own, "{options}: queue {}", queue.queue);
            assert_eq!(queue.packets, inputs[queue.port * 3 + queue.queue].len() as u64);
        }
    }
}

#[test]
fn exactly_as_many_packets_as_asked_for() {
    for packets in [1, 31, 32, 33, 1000] {
        let mut bench = Bench::new(2, 2);
        for wire in bench.wires.iter().flatten() {
            wire.put(frames(1001));
        }
        let report = bench.report(&format!("--packets {packets} --queues 2"));
        assert_eq!(report.ports.iter().map(|port| port.rx_packets).sum::<u64>(), packets);
        assert_eq!(
            bench.wires.iter().flatten().map(|wire| wire.sent().len()).sum::<usize>(),
            packets as usize
        );
    }
    for mode in ["txonly", "flowgen"] {
        let mut bench = Bench::new(1, 1);
        let report = bench.report(&format!("--mode {mode} --packets 777 --packet-size 100"));
        assert_eq!(
            (report.generated, report.ports[0].tx_packets, report.ports[0].tx_bytes),
            (777, 777, 77700)
        );
        assert!(bench.wires[0][0].sent().iter().all(|frame| frame.len() == 100));
    }
}

#[test]
fn what_is_received_only_is_dropped_and_counted() {
    let mut bench = Bench::new(2, 1);
    bench.wires[0][0].put(frames(100));
    let report = bench.report("--mode rxonly --packets 100");
    assert_eq!((report.consumed, report.ports[0].rx_packets, report.ports[1].tx_packets), (100, 100, 0));
    assert!(report.packets_per_second > 0.0);
    // flowgen drops what comes, and sends on nothing of it.
    let mut bench = Bench::new(1, 1);
    bench.wires[0][0].put(frames(100));
    let report = bench.report("--mode flowgen --packets 5000 --flows 7");
    assert_eq!((report.consumed, report.generated), (report.ports[0].rx_packets, 5000));
    assert!(report.consumed > 0);
}

#[test]
fn requests_are_answered_where_they_came_from() {
    let mut request = Vec::new();
    let builder =
        PacketBuilder::ethernet2([2, 0, 0, 0, 0, 1], MAC_OF_PORTS).ipv4([10, 0, 0, 1], [10, 0, 0, 2], 9);
    builder.icmpv4_echo_request(7, 1).write(&mut request, b"ping").unwrap();
    let mut bench = Bench::new(2, 1);
    let input: Vec<_> = frames(40).into_iter().chain((0..50).map(|_| request.clone())).collect();
    bench.wires[0][0].put(input);
    let report = bench.report("--mode icmpecho --packets 90");
    assert_eq!((report.unanswered, report.ports[0].tx_packets, report.ports[1].tx_packets), (40, 50, 0));
    assert_eq!(bench.wires[0][0].sent().len(), 50);
    assert!(
        bench.wires[0][0]
            .sent()
            .iter()
            .all(|frame| frame[..12] == [2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0x0a, 0x0b])
    );
}

#[test]
fn a_queue_that_takes_nothing_costs_counted_packets_and_no_hang() {
    let mut bench = Bench::new(2, 1);
    bench.wires[0][0].put(frames(100));
    bench.wires[1][0].blocked.store(true, Ordering::Relaxed);
    let report = bench.report("--packets 100");
    assert_eq!((report.ports[1].tx_dropped, report.ports[1].drops.tx_no_room), (100, 100));
    assert_eq!(report.ports[1].tx_packets, 0);
    assert!(report.text().contains("port 1: 100 packets not sent"), "{}", report.text());
    // A capture has them all the same, and says so.
    let path = std::env::temp_dir().join(format!("underpass-offered-{}.pcap", std::process::id()));
    let mut bench = Bench::new(2, 1);
    bench.wires[0][0].put(frames(100));
    bench.wires[1][0].blocked.store(true, Ordering::Relaxed);
    let report = bench.report(&format!("--packets 100 --pcap {}", path.display()));
    let capture = report.capture.expect("a capture");
    assert_eq!((capture.packets, capture.missed, capture.unsent), (100, 0, 100));
    std::fs::remove_file(path).unwrap();
}

#[test]
fn a_device_that_goes_ends_the_run_with_its_reason() {
    let mut bench = Bench::new(2, 1);
    bench.wires[0][0].put(frames(100));
    let wire = Arc::clone(&bench.wires[1][0]);
    let taker = thread::spawn(move || {
        while wire.sent().len() < 50 {
            thread::yield_now();
        }
        wire.gone.store(true, Ordering::Relaxed);
    });
    let (report, failure) = bench.run("--seconds 20").expect("a report");
    taker.join().unwrap();
    assert!(report.seconds < 10.0);
    // It is the one that sends, not the one whose packets found no way on.
    let failure = failure.expect("a failure").to_string();
    assert!(failure.starts_with("test:1: ") && failure.contains("the test took it away"), "{failure}");
}

#[test]
fn it_ends_when_nothing_comes_or_the_time_is_up() {
    let mut bench = Bench::new(2, 1);
    bench.wires[0][0].put(frames(100));
    let report = bench.report("--idle 0.05 --seconds 30");
    assert_eq!(report.ports[1].tx_packets, 100);
    assert!(report.seconds < 10.0);
    let report = Bench::new(2, 1).report("--seconds 0.05");
    assert!((0.05..5.0).contains(&report.seconds), "{}", report.seconds);
}

#[test]
fn what_can_not_be_is_refused() {
    for (options, says) in [
        ("--queues 3", "it has 2 each way"),
        ("--mode txonly --packet-size 1515", "--packet-size 1514"),
        ("--cores 0,0", "names core 0 twice"),
        ("--cores 60000", "60000"),
    ] {
        let error = Bench::new(2, 2).run(options).map(|_| ()).unwrap_err();
        assert!(format!("{error:#}").contains(says), "{options}: {error:#}");
    }
}
