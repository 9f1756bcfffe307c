//! `underpass forward` from outside: results, exit statuses, captures of real programs in and out.
//!
//! `data/make` makes the captures.

#![allow(clippy::cast_precision_loss, reason = "counts of packets as parts of rates")]

mod command;

use std::fs;
use std::process::{Command, Output};
use std::time::Duration;

use etherparse::{ArpOperation, Icmpv4Type, Icmpv6Type, NetHeaders, PacketHeaders, TransportHeader};
use pcap_file::pcap::{PcapPacket, PcapReader, PcapWriter};
use serde_json::Value;

use self::command::{Scratch, errors, interrupted, text, underpass};

const PING: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/ping.pcap");
const TCP: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/tcp.pcap");

/// Runs `forward` with `--json`, which must succeed and print one object that adds up.
fn forward(args: &[&str]) -> Value {
    let output = underpass(&[&["forward", "--json"], args].concat());
    assert_eq!(output.status.code(), Some(0), "{args:?}: {}", text(&output.stderr));
    let report: Value = serde_json::from_slice(&output.stdout).expect("one JSON object");
    assert_eq!(report["unexplained"], 0, "{report}");
    report
}

/// The packets of a capture.
fn packets(path: &str) -> Vec<Vec<u8>> {
    let mut reader = PcapReader::new(fs::File::open(path).expect("a capture")).expect("a capture");
    let mut packets = Vec::new();
    while let Some(packet) = reader.next_packet() {
        packets.push(packet.expect("a whole packet").data.to_vec());
    }
    packets
}

fn write_packets(path: &str, packets: &[Vec<u8>]) {
    let mut writer = PcapWriter::new(fs::File::create(path).expect("a file")).expect("a header");
    for (n, packet) in packets.iter().enumerate() {
        let packet = PcapPacket::new(Duration::from_millis(n as u64), packet.len() as u32, packet);
        writer.write_packet(&packet).expect("a packet");
    }
}

fn swapped(packets: &[Vec<u8>]) -> Vec<Vec<u8>> {
    packets.iter().map(|packet| [&packet[6..12], &packet[..6], &packet[12..]].concat()).collect()
}

/// Nothing is on standard error but that huge pages are missing.
fn only_notes(output: &Output) -> bool {
    errors(output).iter().all(|line| line.starts_with("note: 4 KiB pages were used"))
}

#[test]
fn captures_come_through_byte_for_byte() {
    let scratch = Scratch::new("captures");
    let (out, copy) = (scratch.path("out.pcap"), scratch.path("copy.pcap"));
    for input in [PING, TCP] {
        let packets_in = packets(input);
        assert!(packets_in.len() > 15);
        for options in ["", "ring=split,", "run=threads,", "ring=split,run=threads,", "check=leases,"] {
            for (mode, expected) in [("io", packets_in.clone()), ("macswap", swapped(&packets_in))] {
                let port = format!("soft:virtio-net,{options}peer=pcap:{input}:{out}");
                let report = forward(&["--mode", mode, "--port", &port, "--idle", "0.1"]);
                assert!(packets(&out) == expected, "{mode} {port}");
                assert_eq!(report["ports"][0]["rx_packets"], packets_in.len());
                assert_eq!(report["ports"][0]["tx_packets"], packets_in.len());
            }
        }
        // In at one port and out of the other, with a capture on the way.
        let from = format!("soft:virtio-net,peer=pcap:{input}:");
        let to = format!("soft:virtio-net,peer=pcap::{out}");
        let args = ["--mode", "macswap", "--port", &from, "--port", &to, "--idle", "0.1", "--pcap", &copy];
        let report = forward(&args);
        assert!(packets(&out) == swapped(&packets_in));
        assert!(packets(&copy) == swapped(&packets_in));
        assert_eq!(report["capture"]["packets"], packets_in.len());
        assert_eq!(report["capture"]["missed"], 0);
        let bytes: usize = packets_in.iter().map(Vec::len).sum();
        assert_eq!(report["ports"][0]["rx_bytes"], bytes);
        assert_eq!(report["ports"][1]["tx_bytes"], bytes);
    }
}

#[test]
fn generated_captures_come_through_and_what_is_no_frame_is_counted() {
    let scratch = Scratch::new("generated");
    let (input, out) = (scratch.path("in.pcap"), scratch.path("out.pcap"));
    // An EtherType for experiments (IEEE 802), and every length around the limits.
    let frame = |len: usize| {
        let mut frame: Vec<u8> = (0..len).map(|at| (at * 31 + len) as u8).collect();
        let header = [2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 0x88, 0xb5];
        for (to, from) in frame.iter_mut().zip(header) {
            *to = from;
        }
        frame
    };
    let lens: Vec<usize> =
        [0, 1, 13].into_iter().chain(14..80).chain(1500..=1514).chain([1515, 1700, 2000]).collect();
    let frames: Vec<_> = lens.iter().map(|len| frame(*len)).collect();
    write_packets(&input, &frames);
    let fit: Vec<_> = frames.iter().filter(|frame| (14..=1514).contains(&frame.len())).cloned().collect();
    for options in ["mtu=9000,", "mtu=9000,ring=split,"] {
        let port = format!("soft:virtio-net,{options}peer=pcap:{input}:{out}");
        let report = forward(&["--port", &port, "--idle", "0.1"]);
        assert!(packets(&out) == fit, "{options}");
        let port = &report["ports"][0];
        assert_eq!(
            (&port["drops"]["rx_runts"], &port["drops"]["rx_oversize"]),
            (&3.into(), &3.into()),
            "{report}"
        );
        assert_eq!(port["rx_dropped"], 6);
    }
    // With the MTU raised all but runts pass, up to that.
    let frames: Vec<_> = frames.into_iter().chain([frame(9000), frame(9014)]).collect();
    write_packets(&input, &frames);
    let port = format!("soft:virtio-net,mtu=9000,peer=pcap:{input}:{out}");
    forward(&["--port", &port, "--idle", "0.1", "--mtu", "9000"]);
    assert!(packets(&out) == frames[3..]);
}

#[test]
fn what_only_the_device_dropped_is_told_with_its_likely_cause() {
    let port = "soft:virtio-net,peer=generator,size=9000";
    let args = ["--mode", "rxonly", "--port", port, "--seconds", "0.2"];
    let report = forward(&args);
    let port = &report["ports"][0];
    assert_eq!((&port["rx_packets"], &port["drops"]["device_tx"]), (&0.into(), &0.into()), "{report}");
    assert!(port["drops"]["device_rx"].as_u64() > Some(0), "{report}");
    assert_eq!(port["rx_dropped"], port["drops"]["device_rx"]);
    let output = underpass(&[&["forward"], &args[..]].concat());
    let shown = text(&output.stdout);
    assert!(shown.contains("packets dropped by the device") && shown.contains("--mtu"), "{shown}");
    // With room for them nothing is dropped, and nothing is said.
    let args = ["--mode", "rxonly", "--port", "soft:virtio-net,mtu=9000,peer=generator,size=9000"];
    let args = [&args[..], &["--mtu", "9000", "--seconds", "0.2"]].concat();
    let report = forward(&args);
    let port = &report["ports"][0];
    assert!(port["rx_packets"].as_u64() > Some(0), "{report}");
    assert_eq!((&port["rx_dropped"], &port["drops"]["device_rx"]), (&0.into(), &0.into()), "{report}");
    let output = underpass(&[&["forward"], &args[..]].concat());
    assert!(!text(&output.stdout).contains("by the device"), "{}", text(&output.stdout));
}

#[test]
fn a_real_ping_is_answered_correctly() {
    let scratch = Scratch::new("echo");
    let out = scratch.path("out.pcap");
    let port = format!("soft:virtio-net,mac=02:00:00:00:00:0b,peer=pcap:{PING}:{out}");
    let report = forward(&["--mode", "icmpecho", "--port", &port, "--idle", "0.1"]);
    let answers = packets(&out);
    let mut kinds = [0; 4];
    for answer in &answers {
        assert_eq!(answer[..12], [2, 0, 0, 0, 0, 0x0a, 2, 0, 0, 0, 0, 0x0b]);
        let parsed = PacketHeaders::from_ethernet_slice(answer).expect("a packet");
        let payload = parsed.payload.slice();
        let (kind, right) = match (&parsed.net, &parsed.transport) {
            (Some(NetHeaders::Arp(arp)), _) => (0, arp.operation == ArpOperation::REPLY),
            (Some(NetHeaders::Ipv4(ip, _)), Some(TransportHeader::Icmpv4(icmp))) => {
                assert_eq!(ip.header_checksum, ip.calc_header_checksum());
                assert!(matches!(icmp.icmp_type, Icmpv4Type::EchoReply(_)));
                (1, icmp.checksum == icmp.icmp_type.calc_checksum(payload))
            }
            (Some(NetHeaders::Ipv6(ip, _)), Some(TransportHeader::Icmpv6(icmp))) => {
                let sum = icmp.icmp_type.calc_checksum(ip.source, ip.destination, payload).expect("short");
                let kind = if matches!(icmp.icmp_type, Icmpv6Type::EchoReply(_)) { 2 } else { 3 };
                (kind, icmp.checksum == sum)
            }
            other => panic!("{other:?}"),
        };
        assert!(right, "{answer:02x?}");
        kinds[kind] += 1;
    }
    // Requests for an address, pings of two lengths, pings over IPv6, and a neighbour's.
    assert_eq!(kinds, [1, 5, 3, 1]);
    let came = packets(PING).len();
    assert_eq!(report["unanswered"], came - answers.len());
}

#[test]
fn the_kernels_ping_is_answered() {
    let script = r#"
        set -e
        ip tuntap add dev tap0 mode tap
        ip address add 10.99.0.1/24 dev tap0
        ip link set dev tap0 up
        "$0" forward --json --mode icmpecho --port soft:virtio-net,peer=tap:tap0 --seconds 60 >"$1" &
        ping -q -c 1 -w 10 10.99.0.2
        ping -q -c 20 -i 0.01 -s 1400 -W 5 10.99.0.3
        kill -INT $!
        wait $!
    "#;
    for (tool, argument) in [("ip", "-V"), ("ping", "-V"), ("unshare", "-V")] {
        if Command::new(tool).arg(argument).output().is_err() {
            eprintln!("skipped: there is no `{tool}` (Debian: apt install iproute2 iputils-ping util-linux)");
            return;
        }
    }
    let unshare = |arguments: &[&str]| {
        let mut command = Command::new("unshare");
        command.args(["--user", "--map-root-user", "--net"]).args(arguments).output().expect("unshare")
    };
    let tap = unshare(&["ip", "tuntap", "add", "dev", "tap0", "mode", "tap"]);
    if !tap.status.success() {
        eprintln!("skipped: no tap in a network namespace here: {}", text(&tap.stderr).trim());
        return;
    }
    let scratch = Scratch::new("tap");
    let file = scratch.path("report.json");
    let output = unshare(&["sh", "-c", script, env!("CARGO_BIN_EXE_underpass"), &file]);
    assert!(output.status.success(), "{}{}", text(&output.stdout), text(&output.stderr));
    assert!(text(&output.stdout).contains("20 received, 0% packet loss"), "{}", text(&output.stdout));
    let report: Value = serde_json::from_slice(&fs::read(file).expect("a report")).expect("one JSON object");
    // The first ping, 20 others, and a request for each of the two addresses.
    assert!(report["ports"][0]["tx_packets"].as_u64() >= Some(23), "{report}");
    assert_eq!(report["unexplained"], 0);
}

#[test]
fn the_json_object_keeps_its_contract() {
    let port = "soft:virtio-net,queues=2,peer=generator";
    let args = [
        "--port",
        port,
        "--port",
        port,
        "--queues",
        "2",
        "--seconds",
        "0.3",
        "--burst",
        "16",
        "--cores",
        "0",
    ];
    let report = forward(&args);
    assert_eq!((&report["mode"], &report["burst"]), (&"io".into(), &16.into()));
    let seconds = report["seconds"].as_f64().expect("a time");
    assert!((0.3..3.0).contains(&seconds), "{seconds}");
    let ports = report["ports"].as_array().expect("an array");
    assert_eq!(ports.len(), 2);
    let number = |of: &Value, key: &str| of[key].as_u64().unwrap_or_else(|| panic!("{key} in {of}"));
    for of in ports {
        assert_eq!((&of["device"], &of["driver"]), (&port.into(), &"virtio-net".into()));
        assert!(number(of, "rx_packets") > 0 && number(of, "rx_bytes") == 64 * number(of, "rx_packets"));
        for key in ["rx_dropped", "tx_dropped", "errors"] {
            assert_eq!(number(of, key), 0, "{report}");
        }
    }
    assert_eq!(number(&ports[0], "rx_packets"), number(&ports[1], "tx_packets"));
    assert_eq!(number(&ports[1], "rx_bytes"), number(&ports[0], "tx_bytes"));
    let sent: u64 = ports.iter().map(|port| number(port, "tx_packets")).sum();
    let rate = report["packets_per_second"].as_f64().expect("a rate");
    assert!((rate * seconds - sent as f64).abs() < 1.0);
    let queues = report["queues"].as_array().expect("an array");
    let mut named = vec![];
    for queue in queues {
        assert!(queue["pasid"].is_null() && queue["core"] == 0, "{report}");
        assert!(number(queue, "packets") > 0, "the generator's flows reach every queue: {report}");
        named.push((number(queue, "port"), number(queue, "queue")));
    }
    assert_eq!(named, [(0, 0), (0, 1), (1, 0), (1, 1)]);
    assert_eq!(queues.iter().map(|queue| number(queue, "packets")).sum::<u64>(), sent);
}

#[test]
fn a_core_without_work_is_told_of() {
    let output = underpass(&["forward", "--packets", "100", "--cores", "0,1"]);
    let told =
        errors(&output).iter().any(|line| line == "note: core 1 has nothing to do: --queues 2 uses it");
    // There may be one core only.
    assert!(told || output.status.code() == Some(2), "{}", text(&output.stderr));
}

#[test]
fn without_ports_it_joins_two() {
    for mode in ["io", "mac", "macswap", "rxonly", "txonly", "flowgen"] {
        let report = forward(&["--mode", mode, "--seconds", "0.2"]);
        assert_eq!(report["ports"].as_array().map(Vec::len), Some(2), "{mode}");
        let queues = report["queues"].as_array().expect("an array");
        let all: u64 = queues.iter().filter_map(|queue| queue["packets"].as_u64()).sum();
        let rate = report["packets_per_second"].as_f64().expect("a rate");
        let seconds = report["seconds"].as_f64().expect("a time");
        assert!((rate * seconds - all as f64).abs() < 1.0, "{mode}: {report}");
        assert!(report["packets_per_second"].as_f64() > Some(1000.0), "{mode}: {report}");
        for port in 0..2 {
            for key in ["rx_dropped", "tx_dropped", "errors"] {
                assert_eq!(report["ports"][port][key], 0, "{mode}: {report}");
            }
        }
    }
    let output = underpass(&["forward", "--seconds", "0.2"]);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    let shown = text(&output.stdout);
    for words in ["rx packets", "PASID", "What to try next", "soft:virtio-net"] {
        assert!(shown.contains(words), "{words} is missing in {shown}");
    }
    assert!(only_notes(&output), "no rates where there is no terminal: {}", text(&output.stderr));
}

#[test]
fn it_ends_after_as_many_packets_as_asked_for() {
    for (mode, packets) in [("io", 1), ("macswap", 1000), ("rxonly", 33), ("txonly", 65), ("flowgen", 5000)] {
        for queues in ["1", "2"] {
            let report = forward(&["--mode", mode, "--packets", &packets.to_string(), "--queues", queues]);
            let key = if mode == "rxonly" { "rx_packets" } else { "tx_packets" };
            let all: u64 = (0..2).map(|port| report["ports"][port][key].as_u64().expect("a count")).sum();
            assert_eq!(all, packets, "{mode}: {report}");
        }
    }
}

#[test]
fn bad_input_is_one_line_and_the_right_status() {
    let scratch = Scratch::new("bad");
    let (cut, text_file, big) =
        (scratch.path("cut.pcap"), scratch.path("text.pcap"), scratch.path("big.pcap"));
    let whole = fs::read(TCP).expect("a capture");
    fs::write(&cut, &whole[..whole.len() - 7]).expect("a file");
    fs::write(&text_file, "these are no packets, but enough bytes for a header").expect("a file");
    // A packet that is said to be longer than any.
    let mut lie = whole[..40].to_vec();
    lie[32..40].copy_from_slice(&[0xff; 8]);
    fs::write(&big, lie).expect("a file");
    let pcap = |file: &str| format!("--port soft:virtio-net,peer=pcap:{file}:");
    let (cut, text_file, big, missing) =
        (pcap(&cut), pcap(&text_file), pcap(&big), pcap("/nowhere/at/all.pcap"));
    let twice = format!(
        "--port soft:virtio-net,peer=pcap::{0} --port soft:virtio-net,peer=pcap::{0}",
        scratch.path("out")
    );
    let dir = format!("--pcap {} --seconds 1", scratch.path(""));
    for (args, status, says) in [
        // Wrong usage.
        ("--mode sideways", 2, "macswap"),
        ("--topology star", 2, "paired"),
        ("--cores 3-1", 2, "1-3"),
        ("--cores all", 2, "0-3"),
        ("--cores 0,0", 2, "twice"),
        ("--queues 0", 2, "at least 1"),
        ("--burst 0", 2, "at least 1"),
        ("--burst 100000", 2, "1024"),
        ("--packet-size 41", 2, "42"),
        ("--packet-size 70000", 2, "65549"),
        ("--mode txonly --packet-size 1515", 2, "--packet-size 1514"),
        ("--eth-peer 1", 2, "02:00:00:00:00:01"),
        ("--eth-peer 0,zz", 2, "hexadecimal"),
        ("--eth-peer 2,02:00:00:00:00:01", 2, "port 2"),
        ("--seconds 0", 2, "more than 0"),
        ("--packets none", 2, "whole number"),
        ("--port nic", 2, "soft:virtio-net"),
        ("--port soft:dsa", 2, "not a network port"),
        ("--port soft:virtio-net,colour=red", 2, "queues"),
        ("--port soft:virtio-net,peer=nobody", 2, "generator"),
        ("--port 3b:00.0 --port 0000:3B:00.0", 2, "port 0 already"),
        (&text_file, 2, "not a pcap file"),
        (&cut, 2, "not whole"),
        (&big, 2, "packet 1 is"),
        ("--cores 60000", 2, "60000"),
        ("--queues 17", 2, "16"),
        ("--port soft:virtio-net --queues 2", 2, "--queues 1"),
        ("--mtu 10", 2, "68"),
        ("--mtu 9000 --port soft:virtio-net", 2, "1500"),
        ("--packet-size 1515", 2, "--mtu"),
        // What the machine can not do.
        (&missing, 1, "/nowhere/at/all.pcap"),
        (&twice, 1, "another port or program uses it"),
        ("--port fffe:ff:1f.7", 1, "underpass devices"),
        ("--pcap /nowhere/at/all.pcap", 1, "/nowhere/at/all.pcap"),
        (&dir, 1, "directory"),
    ] {
        let args: Vec<_> = ["forward", "--json"].into_iter().chain(args.split_whitespace()).collect();
        let output = underpass(&args);
        let errors = errors(&output);
        assert_eq!(output.status.code(), Some(status), "{args:?}: {errors:?}");
        assert_eq!(errors.len(), 1, "{args:?}: {errors:?}");
        assert!(errors[0].starts_with("underpass: ") && errors[0].contains(says), "{args:?}: {errors:?}");
        assert!(output.stdout.is_empty(), "{args:?} printed {:?}", text(&output.stdout));
    }
}

#[test]
fn a_full_disk_ends_the_run_and_keeps_its_result() {
    let script = r#"
        set -e
        mount -t tmpfs -o size=100k tmpfs "$1"
        status=0
        "$0" forward --json --seconds 60 --pcap "$1/copy.pcap" || status=$?
        cp "$1/copy.pcap" "$2"
        exit $status
    "#;
    let unshare = |arguments: &[&str]| {
        let mut command = Command::new("unshare");
        command.args(["--user", "--map-root-user", "--mount"]).args(arguments).output()
    };
    let scratch = Scratch::new("full");
    let folder = scratch.path("");
    let mounts = unshare(&["mount", "-t", "tmpfs", "tmpfs", &folder]);
    if !mounts.is_ok_and(|output| output.status.success()) {
        eprintln!("skipped: no file system can be mounted in a namespace here");
        return;
    }
    let kept = std::env::temp_dir().join(format!("underpass-cli-{}-kept.pcap", std::process::id()));
    let kept = kept.to_str().expect("UTF-8");
    let arguments = ["sh", "-c", script, env!("CARGO_BIN_EXE_underpass"), &folder, kept];
    let output = unshare(&arguments).expect("unshare");
    let errors = errors(&output);
    assert_eq!(output.status.code(), Some(1), "{errors:?}");
    let report: Value = serde_json::from_slice(&output.stdout).expect("one JSON object");
    assert!(report["seconds"].as_f64() < Some(30.0) && report["unexplained"] == 0, "{report}");
    let found = packets(kept).len();
    assert!(found > 500, "{found}");
    assert_eq!(report["capture"]["packets"], found);
    assert!(report["capture"]["missed"].as_u64() > Some(0), "{report}");
    let says = errors.iter().find(|line| line.contains("copy.pcap")).expect("an error");
    assert!(says.contains("No space left") && says.contains("make room"), "{says}");
    fs::remove_file(kept).expect("the copy");
}

#[test]
fn a_capture_is_not_written_to_what_a_port_reads_or_writes() {
    let scratch = Scratch::new("in-use");
    let (input, out) = (scratch.path("in.pcap"), scratch.path("out.pcap"));
    std::fs::copy(PING, &input).expect("a copy");
    let port = format!("soft:virtio-net,peer=pcap:{input}:{out}");
    for file in [&input, &out] {
        let output = underpass(&["forward", "--port", &port, "--idle", "0.1", "--pcap", file]);
        assert_eq!(output.status.code(), Some(1));
        let errors = errors(&output);
        assert!(errors[0].ends_with("reads or writes it; name another file"), "{errors:?}");
    }
    assert!(std::fs::read(&input).expect("it is there") == std::fs::read(PING).expect("it is there"));
}

#[test]
fn a_capture_goes_to_a_file_and_waits_for_nobody() {
    let scratch = Scratch::new("fifo");
    let fifo = scratch.path("fifo");
    assert!(Command::new("mkfifo").arg(&fifo).status().expect("mkfifo").success());
    for path in [&fifo, "/dev/full"] {
        let output = underpass(&["forward", "--seconds", "1", "--pcap", path]);
        assert_eq!(output.status.code(), Some(2), "{path}");
        assert!(errors(&output)[0].contains("not a regular file"), "{path}: {:?}", errors(&output));
    }
}

#[test]
fn ctrl_c_stops_and_still_tells_what_was_done() {
    let output = interrupted(&["forward", "--json", "--seconds", "3600"], Duration::from_millis(500));
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    let report: Value = serde_json::from_slice(&output.stdout).expect("one JSON object");
    assert!(report["ports"][0]["rx_packets"].as_u64() > Some(0), "{report}");
    assert_eq!(report["unexplained"], 0);
    assert!(only_notes(&output), "{}", text(&output.stderr));
}
