//! The commands that look at and bind real devices, in the testbed's guest: `ci/testbed/run --suite host`.

mod command;

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Resource, Rlimit, Signal, kill_process, setrlimit};
use serde_json::Value;

use self::command::{errors, text, underpass};

/// The guest's user `user`.
const USER: u32 = 1000;

/// The tests share devices: one at a time.
fn alone() -> MutexGuard<'static, ()> {
    static ONE: Mutex<()> = Mutex::new(());
    ONE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn variable(name: &str) -> String {
    std::env::var(name).unwrap_or_else(|_| panic!("{name} is set by the testbed"))
}

fn row() -> String {
    variable("UNDERPASS_TESTBED")
}

fn net0() -> String {
    variable("UNDERPASS_NET0")
}

/// Whether this row has an IOMMU; where not, the test says that it is left out.
fn has_iommu() -> bool {
    let has = row() != "noiommu";
    if !has {
        let _ = writeln!(std::io::stderr(), "testbed: not here: no IOMMU");
    }
    has
}

fn device(address: &str) -> PathBuf {
    Path::new("/sys/bus/pci/devices").join(address)
}

fn driver(address: &str) -> Option<String> {
    let link = fs::read_link(device(address).join("driver")).ok()?;
    Some(link.file_name()?.to_str()?.to_owned())
}

/// The kernel's NIC of the testbed, which is the kernel's again in the end, and its interface's name what it was.
struct Peer {
    name: String,
    address: String,
}

impl Peer {
    fn new() -> Self {
        let name = variable("UNDERPASS_PEER1");
        let device =
            fs::canonicalize(format!("/sys/class/net/{name}/device")).expect("the interface has a device");
        let address = device.file_name().and_then(|name| name.to_str()).expect("its address").to_owned();
        // The net suite leaves it on a bridge.
        run("ip", &["link", "set", &name, "nomaster"]);
        run("ip", &["link", "set", &name, "down"]);
        Self { name, address }
    }

    /// What the kernel calls its interface now.
    fn interface(&self) -> Option<String> {
        let mut names = fs::read_dir(device(&self.address).join("net")).ok()?;
        names.next()?.ok()?.file_name().into_string().ok()
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        underpass(&["unbind", &self.address]);
        if let Some(name) = self.interface() {
            let _ = Command::new("ip").args(["link", "set", &name, "down"]).status();
            let _ = Command::new("ip").args(["addr", "flush", "dev", &name]).status();
            let _ = Command::new("ip").args(["link", "set", &name, "name", &self.name]).status();
        }
    }
}

fn run(program: &str, args: &[&str]) {
    let status = Command::new(program).args(args).status().expect("the program is there");
    assert!(status.success(), "{program} {args:?}");
}

fn write(path: &str, value: &str) {
    fs::write(path, value).unwrap_or_else(|error| panic!("{path}: {error}"));
}

/// Runs the command with `--json`, which must succeed.
#[track_caller]
fn done(args: &[&str]) -> Value {
    let output = underpass(&[args, &["--json"]].concat());
    assert_eq!(output.status.code(), Some(0), "{args:?}: {}", text(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("one JSON object")
}

/// Runs the command, which must fail with one line that says all of `says`.
#[track_caller]
fn refused(args: &[&str], says: &[&str]) {
    check_refused(&underpass(args), args, says);
}

#[track_caller]
fn check_refused(output: &Output, args: &[&str], says: &[&str]) {
    let lines = errors(output);
    assert_eq!(output.status.code(), Some(1), "{args:?}: {lines:?}");
    assert_eq!(lines.len(), 1, "{args:?}: {lines:?}");
    for words in says {
        assert!(lines[0].contains(words), "{args:?}: {words:?} is missing in {lines:?}");
    }
    assert!(output.stdout.is_empty(), "{args:?}: {}", text(&output.stdout));
}

/// Runs the command as the ordinary user.
fn as_user(args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_underpass"));
    command.args(args).uid(USER).gid(USER).output().expect("the command starts")
}

/// Binds again what the testbed had bound, whatever became of it.
struct Bound<'a>(&'a str);

impl Drop for Bound<'_> {
    fn drop(&mut self) {
        underpass(&["bind", "--force", self.0]);
    }
}

/// Gives back to the kernel what it had.
struct Kernels<'a>(&'a str);

impl Drop for Kernels<'_> {
    fn drop(&mut self) {
        underpass(&["unbind", self.0]);
    }
}

#[test]
#[ignore = "needs a real kernel: ci/testbed"]
fn devices_are_listed_as_sysfs_has_them() {
    let _alone = alone();
    let listed = done(&["devices"]);
    let listed = listed["devices"].as_array().expect("a list");
    let find = |address: &str| {
        listed
            .iter()
            .find(|device| device["address"] == address)
            .unwrap_or_else(|| panic!("{address} is missing"))
    };
    let net = find(&net0());
    assert_eq!(
        (&net["vendor"], &net["device"], &net["driver"]),
        (&"1af4".into(), &"1041".into(), &"virtio-net".into())
    );
    assert_eq!(net["kernel_driver"], "vfio-pci");
    let group = fs::read_link(device(&net0()).join("iommu_group")).expect("a group");
    assert_eq!(
        net["iommu_group"].to_string(),
        group.file_name().expect("a number").to_str().expect("digits")
    );
    match net["cdev"].as_str() {
        Some(cdev) => assert!(Path::new(cdev).exists(), "{cdev}"),
        None => assert_eq!(row(), "type1"),
    }
    let peer = Peer::new();
    let nic = find(&peer.address);
    assert_eq!((&nic["device"], &nic["kernel_driver"]), (&"10d3".into(), &"e1000e".into()));
    assert_eq!((&nic["driver"], &nic["cdev"]), (&Value::Null, &Value::Null));
    assert_eq!(nic["interfaces"], Value::from(vec![peer.name.as_str()]));
    assert_eq!(listed[0]["driver"], "virtio-net", "those that a driver here knows come first");
    // A bridge is of no interest.
    assert!(!listed.iter().any(|device| device["address"] == "0000:00:00.0"));
    let all = done(&["devices", "--all"]);
    let count = fs::read_dir("/sys/bus/pci/devices").expect("sysfs").count();
    assert_eq!(all["devices"].as_array().expect("a list").len(), count);
}

#[test]
#[ignore = "needs a real kernel: ci/testbed"]
fn a_nic_goes_to_user_space_and_comes_home() {
    let _alone = alone();
    let home = Peer::new();
    let (peer, address) = (home.name.clone(), home.address.clone());
    let report = done(&["bind", &address]);
    let change = &report["devices"][0];
    assert_eq!((&change["before"], &change["kernel_driver"]), (&"e1000e".into(), &"vfio-pci".into()));
    assert_eq!(driver(&address).as_deref(), Some("vfio-pci"));
    assert!(!Path::new("/sys/class/net").join(&peer).exists());
    let again = underpass(&["bind", &address]);
    assert_eq!(again.status.code(), Some(0));
    assert!(text(&again.stdout).contains("already with vfio-pci"), "{}", text(&again.stdout));

    let report = done(&["unbind", &address]);
    assert_eq!(report["devices"][0]["kernel_driver"], "e1000e");
    assert!(home.interface().is_some(), "its interface is back");
    assert_eq!(fs::read_to_string(device(&address).join("driver_override")).expect("sysfs"), "(null)\n");
    assert_eq!(done(&["unbind", &address])["devices"][0]["before"], "e1000e");
}

#[test]
#[ignore = "needs a real kernel: ci/testbed"]
fn what_another_process_bound_goes_to_the_kernels_own_driver() {
    let _alone = alone();
    if row() == "type1" {
        let _ = writeln!(std::io::stderr(), "testbed: not here: a device that is bound again has a cdev");
        return;
    }
    // The testbed's first program bound them; what their driver would be, nobody wrote down.
    for (name, kernels) in [("NET1", Some("virtio-pci")), ("IGB", Some("igb")), ("EDU", None)] {
        let address = variable(&format!("UNDERPASS_{name}"));
        let _bound = Bound(&address);
        assert_eq!(driver(&address).as_deref(), Some("vfio-pci"), "{name}");
        let report = done(&["unbind", &address]);
        assert_eq!(driver(&address).as_deref(), kernels, "{name}");
        assert_eq!(report["devices"][0]["kernel_driver"].as_str(), kernels, "{name}");
        done(&["bind", &address]);
        assert_eq!(driver(&address).as_deref(), Some("vfio-pci"), "{name}");
    }
}

#[test]
#[ignore = "needs a real kernel: ci/testbed"]
fn an_interface_in_use_is_not_taken_away() {
    let _alone = alone();
    let home = Peer::new();
    let (peer, address) = (home.name.clone(), home.address.clone());
    run("ip", &["addr", "add", "10.9.8.7/24", "dev", &peer]);
    refused(&["bind", &address], &[&format!("{peer} has the address 10.9.8.7/24"), "--force"]);
    run("ip", &["link", "set", &peer, "up"]);
    run("ip", &["route", "add", "default", "via", "10.9.8.1"]);
    refused(&["bind", &address], &[&format!("the default route goes through {peer}")]);
    run("ip", &["addr", "flush", "dev", &peer]);
    run("brctl", &["addbr", "br7"]);
    run("brctl", &["addif", "br7", &peer]);
    refused(&["bind", &address], &[&format!("{peer} is part of br7")]);
    assert_eq!(driver(&address).as_deref(), Some("e1000e"));

    run("ip", &["addr", "add", "10.9.8.7/24", "dev", &peer]);
    done(&["bind", "--force", &address]);
    assert_eq!(driver(&address).as_deref(), Some("vfio-pci"));
    run("brctl", &["delbr", "br7"]);
}

#[test]
#[ignore = "needs a real kernel: ci/testbed"]
fn a_group_is_looked_at_as_a_whole() {
    let _alone = alone();
    if !has_iommu() {
        return;
    }
    // QEMU's chipset: three functions that nothing tells apart. The third gets a driver that keeps it for the kernel.
    let (bridge, first, third) = ("0000:00:1f.0", "0000:00:1f.2", "0000:00:1f.3");
    let uio = "/sys/bus/pci/drivers/uio_pci_generic";
    let _home = (Kernels(first), Kernels(third));
    write(&format!("{}/driver_override", device(third).display()), "uio_pci_generic");
    write(&format!("{uio}/bind"), third);
    refused(&["bind", first], &["group", "0000:00:1f.3 (uio_pci_generic)", "bind --group 0000:00:1f.2"]);
    assert_eq!((driver(first), driver(third).as_deref()), (None, Some("uio_pci_generic")));
    refused(&["bind", bridge], &["it is a bridge"]);

    let report = done(&["bind", "--group", first]);
    assert_eq!(report["devices"].as_array().expect("a list").len(), 2, "{report}");
    assert_eq!([first, third].map(|address| driver(address).expect("bound")), ["vfio-pci", "vfio-pci"]);
    done(&["unbind", "--group", first]);
    assert_eq!([driver(first), driver(third)], [None, None]);
}

#[test]
#[ignore = "needs a real kernel: ci/testbed"]
fn the_doctor_knows_the_machine() {
    let _alone = alone();
    let row = row();
    let output = underpass(&["doctor", "--json"]);
    let report: Value = serde_json::from_slice(&output.stdout).expect("one JSON object");
    let check = |name: &str| {
        let checks = report["checks"].as_array().expect("a list");
        let check = checks.iter().find(|check| check["name"] == name).unwrap_or_else(|| panic!("no {name}"));
        (
            check["status"].as_str().expect("a status").to_owned(),
            check["found"].as_str().expect("text").to_owned(),
        )
    };
    let ok = || "ok".to_owned();
    let (status, found) = check("IOMMU");
    let kind = match row.as_str() {
        "amd" => "AMD-Vi",
        "virtio-iommu" => "virtio-iommu",
        "noiommu" => "none is on",
        _ => "Intel VT-d",
    };
    assert!(found.contains(kind), "{found}");
    assert_eq!(status, if row == "noiommu" { "warn" } else { "ok" });
    assert_eq!(check("noiommu").0, if row == "noiommu" { "warn" } else { "ok" });
    let (status, found) = check("interrupt remapping");
    match row.as_str() {
        "virtio-iommu" => assert!(status == "warn" && found.contains("allowed"), "{status}: {found}"),
        "amd" | "noiommu" => assert_ne!(status, "fail", "{found}"),
        _ => assert_eq!((status.as_str(), found.as_str()), ("ok", "on")),
    }
    let (status, found) = check("PASID");
    let has_pasids = matches!(row.as_str(), "vtd-scalable" | "vtd-first-stage");
    assert_eq!(status, if has_pasids { "ok" } else { "warn" }, "{found}");
    let (status, found) = check("iommufd");
    assert_eq!(status, if row == "type1" { "warn" } else { "ok" }, "{found}");
    for name in ["kernel", "vfio-pci", "devices", "huge pages", "permissions", "memlock"] {
        assert_eq!(check(name).0, ok(), "{name}: {}", check(name).1);
    }
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    let screen = underpass(&["doctor"]);
    assert!(text(&screen.stdout).lines().count() <= 40, "{}", text(&screen.stdout));

    let user = as_user(&["doctor", "--json"]);
    let user = text(&user.stdout);
    assert!(user.contains("bind --owner $USER"), "{user}");
}

#[test]
#[ignore = "needs a real kernel: ci/testbed"]
fn without_interrupt_remapping_the_doctor_fails() {
    let _alone = alone();
    if row() != "virtio-iommu" {
        let _ =
            writeln!(std::io::stderr(), "testbed: not here: only for an IOMMU without interrupt remapping");
        return;
    }
    let parameters = ["iommufd", "vfio_iommu_type1"]
        .map(|name| format!("/sys/module/{name}/parameters/allow_unsafe_interrupts"));
    for parameter in &parameters {
        write(parameter, "N");
    }
    let output = underpass(&["doctor"]);
    for parameter in &parameters {
        write(parameter, "Y");
    }
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(errors(&output), ["underpass: a check failed: interrupt remapping"]);
    assert!(text(&output.stdout).contains("allow_unsafe_interrupts"), "{}", text(&output.stdout));
}

#[test]
#[ignore = "needs a real kernel: ci/testbed"]
fn without_an_iommu_nothing_is_bound_unasked() {
    let _alone = alone();
    if row() != "noiommu" {
        let _ = writeln!(std::io::stderr(), "testbed: not here: this machine has an IOMMU");
        return;
    }
    let parameter = "/sys/module/vfio/parameters/enable_unsafe_noiommu_mode";
    let address = Peer::new().address.clone();
    write(parameter, "N");
    let output = underpass(&["bind", &address]);
    write(parameter, "Y");
    let bound = underpass(&["bind", &net0()]);
    assert!(text(&bound.stdout).trim_end().ends_with("--allow-unsafe-noiommu"), "{}", text(&bound.stdout));
    check_refused(&output, &["bind"], &["no IOMMU holds it", "kernel's command line", "noiommu"]);
    assert_eq!(driver(&address).as_deref(), Some("e1000e"));
}

#[test]
#[ignore = "needs a real kernel: ci/testbed"]
fn bad_input_is_one_line_and_changes_nothing() {
    let _alone = alone();
    let address = Peer::new().address.clone();
    for (args, status, says) in [
        ("bind", 2, "ADDRESS"),
        ("bind 0000:00", 2, "0000:3b:00.0"),
        ("unbind 0000:00:1f", 2, "0000:3b:00.0"),
        ("bind 0000:7f:1f.7", 1, "no device at that address"),
        ("unbind 7f:1f.7", 1, "no device at that address"),
        ("bind --owner nobody-of-that-name 00:08.0", 2, "--owner $(id -u"),
        ("bind 0000:00:00.0", 1, "bridge"),
        ("devices 0000:00:03.0", 2, "unexpected"),
    ] {
        let args: Vec<_> = args.split_whitespace().collect();
        let output = underpass(&args);
        let errors = errors(&output);
        assert_eq!(output.status.code(), Some(status), "{args:?}: {errors:?}");
        assert_eq!(errors.len(), 1, "{args:?}: {errors:?}");
        assert!(errors[0].contains(says), "{args:?}: {errors:?}");
    }
    // One of two is wrong: the other one stays too.
    refused(&["bind", &address, "0000:00:00.0"], &["bridge"]);
    let not_root = as_user(&["bind", &address]);
    check_refused(&not_root, &["bind"], &["only root may", &format!("sudo underpass bind {address}")]);
    let not_root = as_user(&["unbind", &net0()]);
    check_refused(&not_root, &["unbind"], &["only root may", &format!("sudo underpass unbind {}", net0())]);
    assert_eq!(driver(&address).as_deref(), Some("e1000e"));
    assert_eq!(driver(&net0()).as_deref(), Some("vfio-pci"));
    let meant_for = fs::read_to_string(device(&address).join("driver_override")).expect("sysfs");
    assert_eq!(meant_for, "(null)\n");
}

/// Starts `forward` on the first NIC, and waits until it has it open.
fn forwarding() -> Child {
    let mut args =
        vec!["forward".to_owned(), "--mode".to_owned(), "rxonly".to_owned(), "--port".to_owned(), net0()];
    if row() == "noiommu" {
        args.push("--allow-unsafe-noiommu".to_owned());
    }
    let mut command = Command::new(env!("CARGO_BIN_EXE_underpass"));
    let child = command.args(args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("it starts");
    let began = Instant::now();
    let has_it = || {
        let files = fs::read_dir(format!("/proc/{}/fd", child.id())).expect("it runs");
        let targets = files.flatten().filter_map(|file| fs::read_link(file.path()).ok());
        targets.into_iter().any(|target| {
            let target = target.to_string_lossy();
            target.starts_with("/dev/vfio/devices/") || target.contains("vfio-device")
        })
    };
    while !has_it() {
        assert!(began.elapsed() < Duration::from_secs(10), "it did not open the device");
        thread::sleep(Duration::from_millis(20));
    }
    child
}

#[test]
#[ignore = "needs a real kernel: ci/testbed"]
fn a_device_that_a_process_drives_is_left_with_it() {
    let _alone = alone();
    let child = forwarding();
    let process = format!("process {} (underpass) has it open", child.id());
    refused(&["unbind", &net0()], &[&process]);
    let again = underpass(&["bind", &net0()]);
    assert_eq!(again.status.code(), Some(0), "what is bound stays bound: {}", text(&again.stderr));
    let pid = Pid::from_raw(child.id().cast_signed()).expect("a process");
    kill_process(pid, Signal::INT).expect("it still runs");
    let output = child.wait_with_output().expect("its output");
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    assert_eq!(driver(&net0()).as_deref(), Some("vfio-pci"));
}

#[test]
#[ignore = "needs a real kernel: ci/testbed"]
fn an_ordinary_user_drives_what_root_gave() {
    let _alone = alone();
    if !has_iommu() {
        return;
    }
    let port = net0();
    let forward = ["forward", "--json", "--mode", "txonly", "--port", &port, "--seconds", "0.3"];
    let closed = as_user(&forward);
    check_refused(
        &closed,
        &forward,
        &["ermission denied", &format!("sudo underpass bind --owner $USER {port}")],
    );

    let report = done(&["bind", "--owner", "user", &port]);
    let given: Vec<_> =
        report["owner"]["given"].as_array().expect("files").iter().map(Value::as_str).collect();
    assert!(!given.is_empty());
    for file in given.iter().flatten() {
        assert_eq!(fs::metadata(file).expect("it is there").uid(), USER, "{file}");
    }
    let notes = report["owner"]["notes"].to_string();
    assert!(notes.contains("memlock"), "the guest's limit is 8 MiB or less: {notes}");
    // What is already so is said, and done no second time.
    let again = done(&["bind", "--owner", "1000", &port]);
    assert_eq!(again["owner"]["given"], Value::Array(vec![]));

    let limit = |bytes| {
        let limit = Rlimit { current: Some(bytes), maximum: None };
        setrlimit(Resource::Memlock, limit).expect("root may set it");
    };
    limit(64 << 10);
    let too_little = as_user(&forward);
    limit(512 << 20);
    let output = as_user(&forward);
    check_refused(&too_little, &forward, &["locked", "ulimit -l"]);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    let report: Value = serde_json::from_slice(&output.stdout).expect("one JSON object");
    assert!(report["ports"][0]["tx_packets"].as_u64().is_some_and(|packets| packets > 0), "{report}");

    // As it was, for the suites after this one.
    for file in given.iter().flatten() {
        std::os::unix::fs::chown(file, Some(0), None).expect("root may");
    }
}
