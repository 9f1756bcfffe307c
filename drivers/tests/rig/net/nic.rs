//! A port on a NIC that nobody here wrote, QEMU's virtio-net, cabled to an interface of the guest kernel: there in
//! `ci/testbed` only.
//!
//! ```text
//! the port ── QEMU's cable ── the kernel's NIC ── a bridge ── a tap ── a thread ── the test's `Wire`
//! ```
//!
//! The bridge learns nothing, so it is as good as a cable. What is different from a software device's wire:
//! - Ethernet's shortest frame is 60 bytes: what is shorter arrives padded ([`Wire::least`]).
//! - Nobody holds the device up: while a wire is blocked, frames wait in the kernel.
//! - Frames for a port that is stopped wait in QEMU, and arrive when it is started again.
//! - Checksums are complete and segments are cut on a cable: nothing unfinished travels.

use std::collections::BTreeMap;
use std::env;
use std::fs::{self, File};
use std::io::{Read, Write as _};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use underpass_drivers::virtio_net::model::peer::{Frame, Peer};

use super::tapped::Taps;
use super::wire::Wire;
use super::{Bench, until};

/// The shortest frame of Ethernet, without its checksum.
pub(super) const LEAST: usize = 60;

/// When nothing came for so long, nothing more is on its way. (A frame can be late by up to two seconds: QEMU's e1000e now and
/// then does not signal one, and so long it takes until the kernel's driver looks by itself. Who knows what is to come waits
/// for that.)
pub(super) const SILENCE: Duration = Duration::from_millis(60);

/// How long a test looks whether more comes than it expects.
pub(super) const SURPRISE: Duration = Duration::from_millis(5);

/// A NIC of the testbed.
#[derive(Debug, Clone)]
pub(crate) struct Nic {
    /// The environment variable that has its PCI address.
    address: &'static str,
    /// The one that has the name of the kernel's interface at the other end of its cable.
    peer: &'static str,
    /// QEMU's name of it, with which the cable can be pulled.
    id: &'static str,
}

impl Nic {
    /// Of these environment variables and this name.
    pub(crate) const fn new(address: &'static str, peer: &'static str, id: &'static str) -> Self {
        Self { address, peer, id }
    }

    /// Whether the testbed has it in this row.
    pub(crate) fn is_there(&self) -> bool {
        env::var_os(self.address).is_some()
    }

    /// A port with its driver, on `wire`.
    pub(crate) fn open(&self, wire: &Wire) -> Bench {
        let get = |name| {
            env::var(name).unwrap_or_else(|_| panic!("{name} is not set: this test runs in ci/testbed"))
        };
        let turn = Turn::take();
        let port = underpass_drivers::builtin().open_port(&get(self.address)).unwrap();
        let cable = Cable::new(&get(self.peer), self.id, wire, turn);
        Bench { port, wire: wire.plugged(cable), taps: Taps::new(false), control: None }
    }
}

/// The right to use the NICs: tests of one process take turns.
struct Turn;

static TAKEN: Mutex<bool> = Mutex::new(false);
static GIVEN_BACK: Condvar = Condvar::new();

impl Turn {
    fn take() -> Self {
        let mut taken = TAKEN.lock().unwrap_or_else(PoisonError::into_inner);
        while *taken {
            taken = GIVEN_BACK.wait(taken).unwrap_or_else(PoisonError::into_inner);
        }
        *taken = true;
        Self
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        *TAKEN.lock().unwrap_or_else(PoisonError::into_inner) = false;
        GIVEN_BACK.notify_one();
    }
}

/// A cable from a kernel's interface to a test's wire.
pub(super) struct Cable {
    over: Arc<AtomicBool>,
    id: &'static str,
    thread: Option<JoinHandle<()>>,
    _turn: Turn,
}

impl Cable {
    fn new(interface: &str, id: &'static str, wire: &Wire, turn: Turn) -> Arc<Self> {
        let tap = tap(interface);
        // What an earlier test has sent, while the port is not started yet.
        let (mut file, mut since) = (&*tap, Instant::now());
        while since.elapsed() < SURPRISE {
            if file.read(&mut [0; 1 << 11]).is_ok() {
                since = Instant::now();
            }
        }
        let over = Arc::new(AtomicBool::new(false));
        let (is_over, ends) = (Arc::clone(&over), wire.peers());
        let thread = thread::spawn(move || run(&is_over, &tap, ends));
        Arc::new(Self { over, id, thread: Some(thread), _turn: turn })
    }

    /// Pulls the plug of the port's NIC, or puts it in: by a command to QEMU's monitor.
    pub(super) fn set_link(&self, up: bool) {
        let line =
            format!("{{\"execute\":\"set_link\",\"arguments\":{{\"name\":\"{}\",\"up\":{up}}}}}\n", self.id);
        fs::write("/dev/ttyS1", line).unwrap();
    }
}

impl Drop for Cable {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let end = thread.join();
            assert!(end.is_ok() || thread::panicking());
        }
    }
}

/// Carries frames both ways until it is over.
fn run(over: &AtomicBool, mut tap: &File, mut ends: Vec<Box<dyn Peer>>) {
    let mut buffer = vec![0; 1 << 16];
    // A frame that a wire does not take waits, and those behind it in the tap.
    let mut held = None;
    while !over.load(Ordering::Relaxed) {
        let mut is_idle = true;
        for end in &mut ends {
            while let Some(frame) = end.receive() {
                // One that the kernel does not take is lost, as on any cable.
                let _ = tap.write(frame.bytes);
                is_idle = false;
            }
        }
        while let Some(len) = held.take().or_else(|| tap.read(&mut buffer).ok()) {
            if !ends[0].transmit(Frame::finished(&buffer[..len])) {
                held = Some(len);
                break;
            }
            is_idle = false;
        }
        if is_idle {
            thread::sleep(Duration::from_micros(50));
        }
    }
}

/// The tap on a bridge with `interface`: made when it is first asked for, and there as long as the process is.
fn tap(interface: &str) -> Arc<File> {
    static TAPS: Mutex<BTreeMap<String, Arc<File>>> = Mutex::new(BTreeMap::new());
    let mut taps = TAPS.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(tap) = taps.get(interface) {
        return Arc::clone(tap);
    }
    let name = format!("tap-{interface}");
    let bridge = format!("br-{interface}");
    let tap = Arc::new(underpass::tap::open(&name, 1).unwrap().remove(0));
    let sysfs = |interface: &str, file: &str| format!("/sys/class/net/{interface}/{file}");
    if fs::exists(sysfs(&bridge, "bridge")).unwrap() {
        ip(&["link", "set", &name, "master", &bridge, "up"]);
    } else {
        ip(&["link", "add", "name", &bridge, "type", "bridge"]);
        // It remembers nobody, and sends everything everywhere.
        fs::write(sysfs(&bridge, "bridge/ageing_time"), "0").unwrap();
        for member in [interface, &name] {
            ip(&["link", "set", member, "master", &bridge]);
            ip(&["link", "set", member, "up"]);
        }
        ip(&["link", "set", &bridge, "up"]);
    }
    until("the kernel's NIC has a link", || {
        thread::sleep(Duration::from_millis(5));
        fs::read_to_string(sysfs(interface, "carrier")).is_ok_and(|carrier| carrier.trim() == "1")
    });
    taps.insert(interface.to_owned(), Arc::clone(&tap));
    tap
}

fn ip(arguments: &[&str]) {
    let output = Command::new("ip").args(arguments).output().unwrap();
    assert!(output.status.success(), "ip {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}
