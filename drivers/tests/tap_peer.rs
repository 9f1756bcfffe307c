//! The tap peer against the kernel's network stack: its own `ping`, answered by this test.
//!
//! Runs in a network namespace of its own, which an ordinary user may have on most systems; where one may not, or where
//! there is no `ping`, the test says so and does nothing.

#![allow(clippy::unwrap_used, reason = "a test")]

use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use underpass::ErrorKind;
use underpass::net::MacAddr;
use underpass_drivers::virtio_net::model::peer::{Frame, Peer, PeerSpec};

/// Set for the copy of this program that runs in the namespace.
const INSIDE: &str = "UNDERPASS_TEST_IN_NAMESPACE";
const OURS: [u8; 6] = [0x02, 0, 0, 0, 0, 0x01];
const OUR_ADDRESS: [u8; 4] = [10, 99, 0, 2];

/// Runs the named test again in a namespace, unless this is there already. True inside.
fn in_namespace(test: &str) -> bool {
    if std::env::var_os(INSIDE).is_some() {
        return true;
    }
    for (tool, argument) in [("ip", "-V"), ("ping", "-V"), ("unshare", "-V")] {
        if Command::new(tool).arg(argument).output().is_err() {
            eprintln!("skipped: there is no `{tool}` (Debian: apt install iproute2 iputils-ping util-linux)");
            return false;
        }
    }
    let unshare = |command: &mut Command| -> Output {
        // The user's own namespace makes it root in there.
        let mut whole = Command::new("unshare");
        whole
            .args(["--user", "--map-root-user", "--net"])
            .arg(command.get_program())
            .args(command.get_args());
        whole.env(INSIDE, "1").output().unwrap()
    };
    let tap = unshare(Command::new("ip").args(["tuntap", "add", "dev", "tap0", "mode", "tap"]));
    if !tap.status.success() {
        eprintln!(
            "skipped: no tap in a network namespace here: {}",
            String::from_utf8_lossy(&tap.stderr).trim()
        );
        return false;
    }
    let itself = std::env::current_exe().unwrap();
    let run = unshare(Command::new(itself).args(["--exact", test, "--nocapture"]));
    let said = [run.stdout, run.stderr].concat();
    assert!(run.status.success(), "inside the namespace:\n{}", String::from_utf8_lossy(&said));
    false
}

fn run(command: &str) {
    let words: Vec<_> = command.split(' ').collect();
    let output = Command::new(words[0]).args(&words[1..]).output().unwrap();
    assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
}

fn open(name: &str, pairs: usize) -> Vec<Box<dyn Peer>> {
    PeerSpec::Tap { name: name.to_owned() }.open(pairs, MacAddr(OURS)).unwrap()
}

/// The ones' complement of the sum, word by word.
fn checksum(bytes: &[u8]) -> [u8; 2] {
    let mut sum: u32 = bytes
        .chunks(2)
        .map(|word| u32::from(word[0]) << 8 | word.get(1).map_or(0, |low| u32::from(*low)))
        .sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    (!(sum as u16)).to_be_bytes()
}

/// The answer to an ARP request or an ICMP echo request for our address.
fn answer(frame: &[u8]) -> Option<Vec<u8>> {
    let mut answer = frame.to_vec();
    let (sender, ethertype) = (frame.get(6..12)?, frame.get(12..14)?);
    answer[..6].copy_from_slice(sender);
    answer[6..12].copy_from_slice(&OURS);
    match ethertype {
        [0x08, 0x06] if frame.get(38..42)? == OUR_ADDRESS => {
            answer[21] = 2; // reply
            answer.copy_within(22..32, 32);
            answer[22..28].copy_from_slice(&OURS);
            answer[28..32].copy_from_slice(&OUR_ADDRESS);
        }
        [0x08, 0x00] if frame.get(30..34)? == OUR_ADDRESS && frame[23] == 1 && frame.get(34)? == &8 => {
            answer.copy_within(26..30, 30);
            answer[26..30].copy_from_slice(&OUR_ADDRESS);
            answer[34] = 0; // reply
            answer[36..38].fill(0);
            let sum = checksum(&answer[34..]);
            answer[36..38].copy_from_slice(&sum);
        }
        _ => return None,
    }
    Some(answer)
}

/// Answers on all queues until the process has ended.
fn answer_until(peers: &mut [Box<dyn Peer>], child: &mut Child) -> bool {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        for peer in &mut *peers {
            while let Some(reply) = peer.receive().map(|frame| answer(frame.bytes)) {
                if let Some(reply) = reply {
                    assert!(peer.transmit(Frame::finished(&reply)));
                }
            }
        }
        if let Some(status) = child.try_wait().unwrap() {
            return status.success();
        }
        assert!(Instant::now() < deadline, "ping hangs");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_ping_is_answered_over_a_tap() {
    if !in_namespace("a_ping_is_answered_over_a_tap") {
        return;
    }
    // One that was made before, and, with several queues, one that is made by opening it.
    run("ip tuntap add dev tap0 mode tap");
    for (name, pairs) in [("tap0", 1), ("tap1", 4)] {
        let mut peers = open(name, pairs);
        // It is down: frames are lost, and counted.
        assert!(peers[0].transmit(Frame::finished(&[0xff; 60])));
        assert_eq!(peers[0].counters().failed.get(), 1);

        run(&format!("ip addr add 10.99.0.1/24 dev {name}"));
        run(&format!("ip link set {name} up"));
        let mut ping = Command::new("ping");
        // Large ones too: what a frame of the MTU carries.
        ping.args(["-c", "20", "-i", "0.01", "-W", "2", "-s", "1472", "-M", "do", "10.99.0.2"]);
        let mut ping = ping.stdout(Stdio::null()).spawn().unwrap();
        assert!(answer_until(&mut peers, &mut ping), "ping got its answers");
        let received: u64 = peers.iter().map(|peer| peer.counters().rx_frames.get()).sum();
        assert!(received >= 21, "20 echo requests and one ARP request, not {received}");

        let error = PeerSpec::Tap { name: name.to_owned() }.open(1, MacAddr(OURS)).err().unwrap();
        let expected = if pairs == 1 { ErrorKind::Busy } else { ErrorKind::Os };
        assert_eq!(error.kind(), expected, "{error}");
        run(&format!("ip addr flush dev {name}"));
    }
    let error = PeerSpec::Tap { name: "lo".to_owned() }.open(1, MacAddr(OURS)).err().unwrap();
    assert!(error.to_string().contains("is no tap"), "{error}");
}
