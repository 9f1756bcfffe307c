//! `underpass forward` on QEMU's virtio-net, with the guest kernel's own NIC at the other end of the cable: a real client, and
//! what becomes of a port when its process is killed, or its device is taken away.
//!
//! For the guest of `ci/testbed`, which names the devices in `UNDERPASS_NET0` and so on. These tests change the machine that
//! they run on (they move its interfaces and unplug a device), one at a time.

mod command;

use std::env;
use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

use self::command::{Scratch, errors, text};

const PATIENCE: Duration = Duration::from_secs(20);

/// What the testbed says of this row.
fn named(variable: &str) -> String {
    env::var(variable).unwrap_or_else(|_| panic!("{variable} is not set: this test runs in ci/testbed"))
}

/// Whether nothing holds devices back in this row.
fn is_unprotected() -> bool {
    named("UNDERPASS_TESTBED") == "noiommu"
}

fn until(what: &str, mut turn: impl FnMut() -> bool) {
    let began = Instant::now();
    while !turn() {
        assert!(began.elapsed() < PATIENCE, "waited in vain: {what}");
        thread::sleep(Duration::from_millis(5));
    }
}

/// Runs a command of the guest, which must succeed. Returns what it printed.
fn run(command: &str) -> String {
    let output = Command::new("sh").args(["-c", command]).output().expect("a shell");
    assert!(output.status.success(), "{command}: {}", text(&output.stderr));
    text(&output.stdout)
}

/// A command that is stopped at the latest when the test ends.
struct Running(Option<Child>);

impl Running {
    fn start(command: &mut Command) -> Self {
        // Its input never ends: nc would hang up.
        let child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
        Self(Some(child.expect("it starts")))
    }

    /// `underpass forward` with these arguments.
    fn forward(args: &[&str]) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_underpass"));
        command.args(["forward", "--json"]).args(args);
        if is_unprotected() {
            command.arg("--allow-unsafe-noiommu");
        }
        Self::start(&mut command)
    }

    fn id(&self) -> u32 {
        self.0.as_ref().expect("it runs").id()
    }

    fn signal(&self, signal: &str) {
        run(&format!("kill -{signal} {}", self.id()));
    }

    /// Waits for its end.
    fn end(mut self) -> Output {
        let mut child = self.0.take().expect("it runs");
        let began = Instant::now();
        while child.try_wait().expect("a status").is_none() {
            if began.elapsed() > PATIENCE {
                let _ = child.kill();
                let output = child.wait_with_output().expect("its output");
                panic!("it did not end: {}", text(&output.stderr));
            }
            thread::sleep(Duration::from_millis(5));
        }
        child.wait_with_output().expect("its output")
    }

    /// Presses Ctrl-C. Returns its report, which must add up.
    fn interrupt(self) -> Value {
        self.signal("INT");
        report(&self.end())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(mut child) = self.0.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn report(output: &Output) -> Value {
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    let report: Value = serde_json::from_slice(&output.stdout).expect("one JSON object");
    assert_eq!(report["unexplained"], 0, "{report}");
    report
}

/// Frames that the interface has received.
fn received(interface: &str) -> u64 {
    let counter = format!("/sys/class/net/{interface}/statistics/rx_packets");
    fs::read_to_string(counter).expect("a counter").trim().parse().expect("a number")
}

/// The interface up here, with this address, on no bridge of another suite, and receiving everything.
fn up(interface: &str, address: &str) {
    run(&format!(
        "ip link set {interface} nomaster; ip addr flush dev {interface}; ip addr add {address} dev {interface}"
    ));
    run(&format!("ip link set {interface} promisc on up"));
    carrier("", interface);
}

/// Waits until the interface has a link. `inside` is put before the command.
fn carrier(inside: &str, interface: &str) {
    until("the kernel's NIC has a link", || {
        run(&format!("{inside} ip link show dev {interface}")).contains("LOWER_UP")
    });
}

/// The memory that a process could leave behind: free huge pages, and those promised to somebody.
fn huge_pages() -> Vec<String> {
    let lines = fs::read_to_string("/proc/meminfo").expect("meminfo");
    let mut kept: Vec<_> =
        lines.lines().filter(|line| line.starts_with("HugePages_")).map(str::to_owned).collect();
    for entry in fs::read_dir("/sys/kernel/mm/hugepages").expect("huge pages") {
        let folder = entry.expect("an entry").path();
        let free = fs::read_to_string(folder.join("free_hugepages")).expect("a number");
        kept.push(format!("{}: {}", folder.display(), free.trim()));
    }
    kept
}

fn device(address: &str) -> PathBuf {
    Path::new("/sys/bus/pci/devices").join(address)
}

fn kernel_driver(address: &str) -> Option<String> {
    let driver = fs::read_link(device(address).join("driver")).ok()?;
    Some(driver.file_name()?.to_str()?.to_owned())
}

/// Gives vfio-pci a device that was just plugged in.
fn bind(address: &str) {
    let folder = device(address);
    until("the device is there", || folder.exists());
    fs::write(folder.join("driver_override"), "vfio-pci").expect("an override");
    if kernel_driver(address).is_some_and(|driver| driver != "vfio-pci") {
        fs::write(folder.join("driver/unbind"), address).expect("unbound");
    }
    // The kernel lets no driver have a device before it has made all of it known.
    until("vfio-pci has it", || {
        if kernel_driver(address).is_none() {
            fs::write("/sys/bus/pci/drivers_probe", address).expect("probed");
        }
        kernel_driver(address).as_deref() == Some("vfio-pci")
    });
}

/// Tells QEMU's monitor to do a command.
fn qemu(command: &str) {
    let mut line = fs::OpenOptions::new().write(true).open("/dev/ttyS1").expect("the monitor's line");
    line.write_all(format!("{command}\n").as_bytes()).expect("sent");
}

/// A port that sends as fast as it can, once it does.
fn sending(address: &str) -> Running {
    let forward = Running::forward(&["--mode", "txonly", "--port", address]);
    // Its first packets are on their way when its device may do DMA and time has passed.
    until("it sends", || bus_master(address));
    thread::sleep(Duration::from_millis(500));
    forward
}

/// Whether the device may do DMA: bit 2 of its command register.
fn bus_master(address: &str) -> bool {
    fs::read(device(address).join("config")).is_ok_and(|config| config[4] & 4 != 0)
}

/// The end of a run whose device was taken away: one line that says on which device and why, and exit status 1.
fn failed(forward: Running, address: &str) -> String {
    let output = forward.end();
    let lines = errors(&output);
    let lines: Vec<_> = lines.iter().filter(|line| !line.starts_with("note:")).collect();
    assert_eq!(output.status.code(), Some(1), "{lines:#?}");
    assert_eq!(lines.len(), 1, "{lines:#?}");
    assert!(lines[0].starts_with("underpass: ") && lines[0].contains(address), "{lines:#?}");
    lines[0].clone()
}

#[test]
#[ignore = "needs a real kernel: ci/testbed"]
fn the_kernels_ping_is_answered() {
    let (port, peer) = (named("UNDERPASS_NET1"), named("UNDERPASS_PEER1"));
    up(&peer, "10.9.0.1/24");
    let forward = Running::forward(&["--mode", "icmpecho", "--port", &port]);
    run("ping -c 3 -i 0.2 -W 5 10.9.0.2");
    run("ping -c 2 -i 0.2 -W 5 -s 1472 10.9.0.2");
    let report = forward.interrupt();
    let it = &report["ports"][0];
    assert_eq!((&it["device"], &it["driver"]), (&Value::from(port), &Value::from("virtio-net")), "{report}");
    let (rx, tx) = (it["rx_packets"].as_u64(), it["tx_packets"].as_u64());
    assert!(rx >= Some(6) && tx >= Some(6), "one ARP request and five pings: {report}");
    assert_eq!(report["queues"][0]["pasid"], Value::Null, "{report}");
    run(&format!("ip addr flush dev {peer}"));
}

/// A network namespace with one of the kernel's interfaces in it.
struct Namespace {
    holder: Running,
    interface: String,
}

impl Namespace {
    fn with(interface: &str, address: &str) -> Self {
        let holder = Running::start(Command::new("unshare").args(["--net", "sleep", "1000"]));
        let this = Self { holder, interface: interface.to_owned() };
        let id = this.holder.id();
        let own = fs::read_link("/proc/self/ns/net").expect("a namespace");
        until("it has its namespace", || {
            fs::read_link(format!("/proc/{id}/ns/net")).is_ok_and(|its| its != own)
        });
        run(&format!("ip link set {interface} nomaster; ip link set {interface} netns {id}"));
        run(&format!("{} ip addr add {address} dev {interface}", this.inside()));
        run(&format!("{} ip link set {interface} up", this.inside()));
        carrier(&this.inside(), interface);
        this
    }

    fn inside(&self) -> String {
        format!("nsenter -t {} -n", self.holder.id())
    }
}

impl Drop for Namespace {
    /// The interface goes back to where it was.
    fn drop(&mut self) {
        let command = format!("{} ip link set {} netns 1", self.inside(), self.interface);
        let _ = Command::new("sh").args(["-c", &command]).status();
    }
}

#[test]
#[ignore = "needs a real kernel: ci/testbed"]
fn a_tcp_transfer_crosses_two_ports() {
    const BYTES: usize = 10 << 20;
    let scratch = Scratch::new("tcp");
    let (sent, arrived) = (scratch.path("sent"), scratch.path("arrived"));
    let mut state = 1_u64;
    let data: Vec<u8> = (0..BYTES / 8)
        .flat_map(|_| {
            // Xorshift (Marsaglia, 2003): no byte of it tells its place.
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_le_bytes()
        })
        .collect();
    fs::write(&sent, &data).expect("a file");

    let left = Namespace::with(&named("UNDERPASS_PEER0"), "10.8.0.1/24");
    let right = Namespace::with(&named("UNDERPASS_PEER1"), "10.8.0.2/24");
    let ports = [named("UNDERPASS_NET0"), named("UNDERPASS_NET1")];
    let forward = Running::forward(&["--port", &ports[0], "--port", &ports[1]]);
    run(&format!("{} ping -c 1 -W 5 10.8.0.2", left.inside()));

    let server = format!("exec {} nc -l -p 5001 >{arrived}", right.inside());
    let receiver = Running::start(Command::new("sh").args(["-c", &server]));
    until("somebody listens", || run(&format!("{} netstat -ltn", right.inside())).contains(":5001"));
    let began = Instant::now();
    let client = format!("exec {} nc 10.8.0.2 5001 <{sent}", left.inside());
    let sender = Running::start(Command::new("sh").args(["-c", &client]));
    let len = || fs::metadata(&arrived).map_or(0, |file| file.len());
    // As long as it goes on: how fast an emulated processor is depends on what else its machine does.
    while len() < BYTES as u64 {
        let before = len();
        until(&format!("more than {before} bytes arrive"), || len() > before);
    }
    println!("10 MiB of TCP in {:.1} s", began.elapsed().as_secs_f64());
    drop((sender, receiver));
    assert!(fs::read(&arrived).expect("a file") == data, "it changed on the way");
    let report = forward.interrupt();
    let packets = |port: usize| report["ports"][port]["rx_packets"].as_u64().expect("a count");
    assert!(packets(0) as usize >= BYTES / 1500, "it went another way: {report}");
    assert!(packets(1) > 0, "acknowledgements are packets too: {report}");
}

#[test]
#[ignore = "needs a real kernel: ci/testbed"]
fn a_process_that_is_killed_leaves_nothing_behind() {
    let (port, peer) = (named("UNDERPASS_NET1"), named("UNDERPASS_PEER1"));
    if is_unprotected() {
        // Not println, which libtest keeps to itself.
        let _ = writeln!(
            std::io::stderr(),
            "testbed: not here: without an IOMMU nothing stops the DMA of a process that is killed"
        );
        return;
    }
    up(&peer, "10.9.0.1/24");
    let before = huge_pages();
    for _ in 0..2 {
        let forward = Running::forward(&["--mode", "txonly", "--ring", "4096", "--port", &port]);
        let start = received(&peer);
        until("packets arrive", || received(&peer) > start + 100);
        assert_ne!(huge_pages(), before, "it has some");
        forward.signal("KILL");
        assert_eq!(forward.end().status.code(), None);
        until("its memory is free again", || huge_pages() == before);
        assert!(!bus_master(&port), "it may still do DMA");
        assert_eq!(kernel_driver(&port).as_deref(), Some("vfio-pci"));
    }
    // The next one finds the device as it must be.
    let start = received(&peer);
    let report = report(&Running::forward(&["--mode", "txonly", "--packets", "300", "--port", &port]).end());
    assert_eq!(report["ports"][0]["tx_packets"], 300, "{report}");
    until("its packets arrive", || received(&peer) >= start + 300);
    assert_eq!(huge_pages(), before);
}

#[test]
#[ignore = "needs a real kernel: ci/testbed"]
fn a_device_that_is_unplugged_ends_the_run() {
    let plug = named("UNDERPASS_PLUG");
    let before = huge_pages();
    let forward = sending(&plug);
    qemu(r#"{"execute":"device_del","arguments":{"id":"plug"}}"#);
    let line = failed(forward, &plug);
    assert!(line.contains("unplugged"), "{line}");
    until("it is gone", || !device(&plug).exists());
    assert_eq!(huge_pages(), before);

    // The same again, plugged in anew.
    qemu(
        r#"{"execute":"device_add","arguments":{"driver":"virtio-net-pci","id":"plug","netdev":"plug","bus":"socket","disable-legacy":"on","iommu_platform":true,"mac":"52:54:00:00:00:12","romfile":""}}"#,
    );
    bind(&plug);
    let report = report(&Running::forward(&["--mode", "txonly", "--packets", "300", "--port", &plug]).end());
    assert_eq!(report["ports"][0]["tx_packets"], 300, "{report}");
}

#[test]
#[ignore = "needs a real kernel: ci/testbed"]
fn a_device_that_is_removed_ends_the_run() {
    let plug = named("UNDERPASS_PLUG");
    let forward = sending(&plug);
    // The kernel waits until the device is given back.
    let remove = format!("echo 1 >{}/remove", device(&plug).display());
    let removal = Running::start(Command::new("sh").args(["-c", &remove]));
    failed(forward, &plug);
    assert!(removal.end().status.success());
    assert!(!device(&plug).exists());
    run("echo 1 >/sys/bus/pci/rescan");
    bind(&plug);
}

#[test]
#[ignore = "needs a real kernel: ci/testbed"]
fn a_device_that_is_reset_by_somebody_else_ends_the_run() {
    let plug = named("UNDERPASS_PLUG");
    let forward = sending(&plug);
    run(&format!("echo 1 >{}/reset", device(&plug).display()));
    let line = failed(forward, &plug);
    assert!(line.contains("reset"), "{line}");
    let report = report(&Running::forward(&["--mode", "txonly", "--packets", "300", "--port", &plug]).end());
    assert_eq!(report["ports"][0]["tx_packets"], 300, "{report}");
}
