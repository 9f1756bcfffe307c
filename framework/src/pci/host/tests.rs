//! Devices and drivers on a made-up machine: its sysfs, procfs and devices are a folder, its kernel is [`Machine::write`].

use std::cell::{Cell, RefCell};
use std::fs;
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use super::bind::Binder;
use super::network::InterfaceAddress;
use super::{BindOptions, Change, Host, HostDevice};
use crate::pci::PciAddress;
use crate::{Error, ErrorKind, Result};

const NIC: &str = "0000:00:02.0";
const OTHER: &str = "0000:00:02.1";
const PORT: &str = "0000:00:01.0";

const BUS: &str = "sys/bus/pci";
const DEVICES: &str = "sys/devices/pci0000:00";

/// A machine with VFIO and an IOMMU; gone at the end of the test.
struct Machine {
    root: PathBuf,
    writes: Cell<usize>,
    /// Which write the kernel refuses, counted from 0.
    fails: Cell<Option<usize>>,
    log: RefCell<Vec<String>>,
}

impl Machine {
    fn new() -> Self {
        static NUMBER: AtomicUsize = AtomicUsize::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let root = std::env::temp_dir().join(format!("underpass-host-{}-{number}", std::process::id()));
        fs::create_dir_all(&root).unwrap();
        // The folder for temporary files may itself be reached through a link.
        let root = root.canonicalize().unwrap();
        let this = Self { root, writes: Cell::new(0), fails: Cell::new(None), log: RefCell::default() };
        for driver in ["vfio-pci", "e1000e", "igb", "nvme", "pcieport"] {
            this.folder(&format!("{BUS}/drivers/{driver}"));
        }
        this.folder(&format!("{BUS}/devices"));
        this.file("sys/module/vfio_pci/parameters/disable_denylist", "N\n");
        this.file("sys/module/vfio/parameters/enable_unsafe_noiommu_mode", "N\n");
        this
    }

    fn path(&self, path: &str) -> PathBuf {
        self.root.join(path)
    }

    fn folder(&self, path: &str) {
        fs::create_dir_all(self.path(path)).unwrap();
    }

    fn file(&self, path: &str, text: &str) {
        let path = self.path(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    fn link(&self, path: &str, target: &str) {
        let path = self.path(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        symlink(self.path(target), path).unwrap();
    }

    /// A device without a driver, class `class`, alone in its group.
    fn device(&self, address: &str, ids: (&str, &str), class: &str, group: Option<u32>) {
        let folder = format!("{DEVICES}/{address}");
        for (name, value) in [
            ("vendor", ids.0),
            ("device", ids.1),
            ("class", class),
            ("numa_node", "-1"),
            ("driver_override", "(null)"),
        ] {
            self.file(&format!("{folder}/{name}"), &format!("{value}\n"));
        }
        self.link(&format!("{BUS}/devices/{address}"), &folder);
        if let Some(group) = group {
            self.folder(&format!("sys/kernel/iommu_groups/{group}/devices"));
            self.link(&format!("{folder}/iommu_group"), &format!("sys/kernel/iommu_groups/{group}"));
            self.link(&format!("sys/kernel/iommu_groups/{group}/devices/{address}"), &folder);
        }
    }

    /// A NIC in group 7, bound to e1000e.
    fn nic(&self, address: &str) {
        self.device(address, ("0x8086", "0x10d3"), "0x020000", Some(7));
        self.attach(address, "e1000e");
    }

    fn interface(&self, name: &str, address: &str, number: u32) {
        let folder = format!("{DEVICES}/{address}/virtio0/net/{name}");
        self.file(&format!("{folder}/ifindex"), &format!("{number}\n"));
        self.link(&format!("sys/class/net/{name}"), &folder);
    }

    /// A block device, in a folder of sysfs.
    fn disk(&self, folder: &str, number: &str) {
        let name = Path::new(folder).file_name().unwrap().to_str().unwrap();
        self.file(&format!("{folder}/dev"), &format!("{number}\n"));
        self.folder(&format!("{folder}/holders"));
        self.link(&format!("sys/class/block/{name}"), folder);
        self.file(&format!("dev/{name}"), "");
    }

    fn attach(&self, address: &str, driver: &str) {
        self.link(&format!("{DEVICES}/{address}/driver"), &format!("{BUS}/drivers/{driver}"));
        if driver == "vfio-pci" {
            self.file(&format!("{DEVICES}/{address}/vfio-dev/vfio3/dev"), "511:3\n");
        }
    }

    fn host(&self) -> Host {
        Host::below(&self.root)
    }

    fn read(&self, address: &str) -> HostDevice {
        self.host().device(at(address)).unwrap()
    }

    fn driver(&self, address: &str) -> Option<String> {
        self.read(address).kernel_driver().map(str::to_owned)
    }

    fn meant_for(&self, address: &str) -> String {
        let text = fs::read_to_string(self.path(&format!("{DEVICES}/{address}/driver_override"))).unwrap();
        text.trim().to_owned()
    }

    /// The kernel's side of a write, as `drivers/base/bus.c` does it.
    fn write(&self, attribute: &Path, value: &str) -> io::Result<()> {
        let attribute = attribute.strip_prefix(&self.root).unwrap().to_str().unwrap();
        let number = self.writes.replace(self.writes.get() + 1);
        self.log.borrow_mut().push(format!("{attribute} < {}", value.trim()));
        if self.fails.get() == Some(number) {
            return Err(io::Error::from_raw_os_error(22));
        }
        let none = || io::Error::from_raw_os_error(19);
        match attribute.split('/').collect::<Vec<_>>()[..] {
            [.., "driver_override"] => {
                let shown = if value.trim().is_empty() { "(null)\n" } else { value };
                fs::write(self.path(attribute), shown)?;
            }
            [.., driver, "unbind"] => {
                if self.driver(value).as_deref() != Some(driver) {
                    return Err(none());
                }
                fs::remove_file(self.path(&format!("{DEVICES}/{value}/driver")))?;
                let _ = fs::remove_dir_all(self.path(&format!("{DEVICES}/{value}/vfio-dev")));
            }
            [.., driver, "bind"] => {
                let meant_for = self.meant_for(value);
                if self.driver(value).is_some() || (meant_for != "(null)" && meant_for != driver) {
                    return Err(none());
                }
                self.attach(value, driver);
            }
            [.., "drivers_probe"] => {
                if self.driver(value).is_none() && self.meant_for(value) == "(null)" {
                    self.attach(value, "e1000e");
                }
            }
            _ => panic!("an attribute that is not the task's: {attribute}"),
        }
        Ok(())
    }

    fn bind(&self, addresses: &[&str], options: BindOptions) -> Result<Vec<Change>> {
        self.bind_on(&self.host(), addresses, options)
    }

    fn bind_on(&self, host: &Host, addresses: &[&str], options: BindOptions) -> Result<Vec<Change>> {
        let addresses: Vec<_> = addresses.iter().map(|address| at(address)).collect();
        Binder { host, write: &|attribute, value| self.write(attribute, value) }.bind(&addresses, options)
    }

    fn unbind(&self, addresses: &[&str]) -> Result<Vec<Change>> {
        let addresses: Vec<_> = addresses.iter().map(|address| at(address)).collect();
        let host = self.host();
        let write = |attribute: &Path, value: &str| self.write(attribute, value);
        Binder { host: &host, write: &write }.unbind(&addresses, BindOptions::default())
    }

    /// What binding the NIC is refused with. Nothing may have been written.
    #[track_caller]
    fn refused(&self, address: &str) -> Error {
        let error = self.bind(&[address], BindOptions::default()).unwrap_err();
        assert_eq!(*self.log.borrow(), [""; 0], "refused after something was changed");
        error
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.root);
    }
}

fn at(address: &str) -> PciAddress {
    address.parse().unwrap()
}

const FORCE: BindOptions = BindOptions { force: true, whole_group: false };
const WHOLE_GROUP: BindOptions = BindOptions { force: false, whole_group: true };

#[test]
fn sysfs_is_read() {
    let machine = Machine::new();
    machine.nic(NIC);
    machine.device(PORT, ("0x8086", "0x3420"), "0x060400", Some(7));
    machine.file(&format!("{DEVICES}/{NIC}/numa_node"), "1\n");
    machine.interface("eth0", NIC, 2);
    machine.link("sys/class/net/lo", "sys/devices/virtual/net/lo");
    let devices = machine.host().devices().unwrap();
    let addresses: Vec<_> = devices.iter().map(|device| device.address().to_string()).collect();
    assert_eq!(addresses, [PORT, NIC]);
    let nic = &devices[1];
    assert_eq!((nic.vendor_id(), nic.device_id(), nic.class()), (0x8086, 0x10d3, 0x02_0000));
    assert_eq!((nic.kernel_driver(), nic.iommu_group(), nic.numa_node()), (Some("e1000e"), Some(7), Some(1)));
    assert_eq!(nic.group_members(), [at(PORT), at(NIC)]);
    assert_eq!(nic.interfaces(), ["eth0"]);
    assert_eq!((nic.cdev(), nic.group_file()), (None, None));
    assert!(!nic.is_vfio() && !nic.group_is_noiommu());
    assert_eq!((devices[0].numa_node(), devices[0].is_bridge()), (None, true));
    let error = machine.host().device(at("0000:00:1f.7")).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
}

#[test]
fn a_bound_device_has_its_files() {
    let machine = Machine::new();
    machine.device(NIC, ("0x8086", "0x10d3"), "0x020000", Some(7));
    machine.attach(NIC, "vfio-pci");
    let nic = machine.read(NIC);
    assert_eq!(nic.cdev(), Some(machine.path("dev/vfio/devices/vfio3")));
    assert_eq!(nic.group_file(), Some(machine.path("dev/vfio/7")));
    machine.file("sys/kernel/iommu_groups/7/name", "vfio-noiommu\n");
    fs::remove_file(machine.path(&format!("{DEVICES}/{NIC}/vfio-dev/vfio3/dev"))).unwrap();
    let nic = machine.read(NIC);
    assert_eq!((nic.cdev(), nic.is_vfio()), (None, true), "a kernel without cdevs");
    assert_eq!(nic.group_file(), Some(machine.path("dev/vfio/noiommu-7")));
}

/// A kernel without groups tells it by the character device's name alone.
#[test]
fn a_device_that_no_iommu_holds_is_known_by_either_name() {
    let machine = Machine::new();
    machine.device(NIC, ("0x8086", "0x10d3"), "0x020000", None);
    machine.attach(NIC, "vfio-pci");
    assert!(!machine.read(NIC).is_unprotected());
    let folder = machine.path(&format!("{DEVICES}/{NIC}/vfio-dev"));
    fs::rename(folder.join("vfio3"), folder.join("noiommu-vfio3")).unwrap();
    assert!(machine.read(NIC).is_unprotected());

    machine.device(OTHER, ("0x8086", "0x10d3"), "0x020000", Some(7));
    machine.file("sys/kernel/iommu_groups/7/name", "vfio-noiommu\n");
    assert!(machine.read(OTHER).is_unprotected());
}

#[test]
fn bound_and_back_again() {
    let machine = Machine::new();
    machine.nic(NIC);
    let changes = machine.bind(&[NIC, NIC], BindOptions::default()).unwrap();
    let change = |before: &str, after: &str| {
        [Change { address: at(NIC), before: Some(before.to_owned()), after: Some(after.to_owned()) }]
    };
    assert_eq!(changes, change("e1000e", "vfio-pci"));
    assert_eq!(machine.meant_for(NIC), "vfio-pci");
    let writes = machine.log.borrow().len();
    assert_eq!(machine.bind(&[NIC], BindOptions::default()).unwrap(), change("vfio-pci", "vfio-pci"));
    assert_eq!(machine.log.borrow().len(), writes, "what is bound stays as it is");
    assert_eq!(machine.unbind(&[NIC]).unwrap(), change("vfio-pci", "e1000e"));
    assert_eq!(machine.meant_for(NIC), "(null)");
    assert_eq!(machine.unbind(&[NIC]).unwrap(), change("e1000e", "e1000e"));
}

#[test]
fn a_failure_at_any_step_leaves_all_as_it_was() {
    // Two devices, three writes each.
    for fails in 0..6 {
        let machine = Machine::new();
        machine.nic(NIC);
        machine.nic(OTHER);
        machine.file(&format!("{DEVICES}/{OTHER}/driver_override"), "e1000e\n");
        machine.fails.set(Some(fails));
        let error = machine.bind(&[NIC, OTHER], BindOptions::default()).unwrap_err();
        assert_eq!(error.errno(), Some(22), "{error}");
        for address in [NIC, OTHER] {
            assert_eq!(machine.driver(address).as_deref(), Some("e1000e"), "write {fails}, {address}");
        }
        assert_eq!(machine.meant_for(NIC), "(null)", "write {fails}");
        if fails == 0 {
            assert_eq!(machine.log.borrow().len(), 1, "nothing was done that would have to be undone");
        }
        assert_eq!(machine.meant_for(OTHER), "e1000e", "write {fails}");
    }
    // A device that had no driver has none afterwards.
    let machine = Machine::new();
    machine.device(NIC, ("0x1234", "0x11e8"), "0x00ff00", Some(7));
    machine.fails.set(Some(1));
    machine.bind(&[NIC], BindOptions::default()).unwrap_err();
    assert_eq!((machine.driver(NIC), machine.meant_for(NIC)), (None, "(null)".to_owned()));
}

#[test]
fn a_failure_to_unbind_leaves_the_rest_usable() {
    let (vfio, home) = (Some("vfio-pci"), Some("e1000e"));
    for (fails, first, second) in
        [(0, vfio, vfio), (1, vfio, vfio), (2, home, vfio), (3, home, vfio), (4, None, home), (5, home, None)]
    {
        let machine = Machine::new();
        machine.nic(NIC);
        machine.nic(OTHER);
        machine.bind(&[NIC, OTHER], BindOptions::default()).unwrap();
        machine.writes.set(0);
        machine.fails.set(Some(fails));
        let error = machine.unbind(&[NIC, OTHER]).unwrap_err();
        assert_eq!(error.errno(), Some(22), "{error}");
        let drivers = [NIC, OTHER].map(|address| machine.driver(address));
        assert_eq!(drivers, [first, second].map(|driver| driver.map(str::to_owned)), "write {fails}");
        let meant_for = if second == vfio { "vfio-pci" } else { "(null)" };
        assert_eq!(machine.meant_for(OTHER), meant_for, "write {fails}");
    }
}

#[test]
fn a_group_goes_together_or_not_at_all() {
    let machine = Machine::new();
    machine.nic(NIC);
    machine.nic(OTHER);
    machine.device(PORT, ("0x8086", "0x3420"), "0x060400", Some(7));
    machine.attach(PORT, "pcieport");
    let error = machine.refused(NIC);
    assert_eq!(error.kind(), ErrorKind::Busy);
    assert!(error.to_string().contains("group 7 also has 0000:00:02.1 (e1000e)"), "{error}");
    assert!(!error.to_string().contains(PORT), "a port's driver is in nobody's way: {error}");
    assert!(error.mend_text().unwrap().ends_with("bind --group 0000:00:02.0"), "{error}");

    assert_eq!(machine.bind(&[NIC], WHOLE_GROUP).unwrap().len(), 2);
    let drivers = [PORT, NIC, OTHER].map(|address| machine.driver(address).unwrap());
    assert_eq!(drivers, ["pcieport", "vfio-pci", "vfio-pci"]);
    machine.unbind(&[NIC, OTHER]).unwrap();
    machine.bind(&[OTHER, NIC], BindOptions::default()).expect("named, each of them");
}

#[test]
fn a_group_with_what_can_not_be_bound_is_refused() {
    for (address, class, driver) in [("0000:00:1f.0", "0x060100", "igb"), ("INT33A1:00", "0x080000", "nvme")]
    {
        let machine = Machine::new();
        machine.nic(NIC);
        machine.device(address, ("0x8086", "0x1234"), class, Some(7));
        machine.attach(address, driver);
        let error = machine.bind(&[NIC], WHOLE_GROUP).unwrap_err();
        assert!(error.to_string().contains(address), "{error}");
        assert!(error.mend_text().unwrap().contains("ACS"), "{error}");
        assert_eq!(machine.driver(NIC).as_deref(), Some("e1000e"));
    }
}

#[test]
fn an_interface_in_use_keeps_its_device() {
    #[allow(clippy::unnecessary_wraps, reason = "as the kernel's list is asked for")]
    fn two() -> Result<Vec<InterfaceAddress>> {
        let given = |interface, address: &str| InterfaceAddress {
            interface,
            address: address.parse().unwrap(),
            prefix: 24,
        };
        Ok(vec![given(1, "127.0.0.1"), given(2, "fe80::1"), given(3, "10.0.0.2")])
    }
    let machine = Machine::new();
    machine.nic(NIC);
    machine.interface("eth0", NIC, 2);
    let host = Host { addresses: two, ..machine.host() };
    machine.bind_on(&host, &[NIC], BindOptions::default()).expect("a link-local address is no use");
    machine.unbind(&[NIC]).unwrap();

    machine.interface("eth1", NIC, 3);
    let error = machine.bind_on(&host, &[NIC], BindOptions::default()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Busy);
    assert!(error.to_string().contains("eth1 has the address 10.0.0.2/24;"), "{error}");
    assert!(error.mend_text().unwrap().contains("bind --force"), "{error}");
    machine.bind_on(&host, &[NIC], FORCE).unwrap();
}

#[test]
fn an_interface_that_others_stand_on_keeps_its_device() {
    for (entry, target, says) in [
        ("master", "sys/devices/virtual/net/br0", "eth0 is part of br0"),
        ("upper_eth0.7", "sys/devices/virtual/net/eth0.7", "eth0.7 is on top of eth0"),
    ] {
        let machine = Machine::new();
        machine.nic(NIC);
        machine.interface("eth0", NIC, 2);
        machine.folder(target);
        machine.link(&format!("{DEVICES}/{NIC}/virtio0/net/eth0/{entry}"), target);
        let error = machine.refused(NIC);
        assert!(error.to_string().contains(says), "{error}");
    }
    let zeros = "0".repeat(32);
    let v4 = "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n\
              eth0\t00000000\t0100000A\t0003\t0\t0\t0\t00000000\t0\t0\t0\n";
    let v6 = format!(
        "{zeros} 00 {zeros} 00 fe800000000000000000000000000001 00000400 00000001 00000000 00450003     eth0\n"
    );
    for (table, routes) in [("route", v4), ("ipv6_route", &v6)] {
        let machine = Machine::new();
        machine.nic(NIC);
        machine.interface("eth0", NIC, 2);
        machine.file(&format!("proc/net/{table}"), routes);
        let error = machine.refused(NIC);
        assert!(error.to_string().contains("the default route goes through eth0"), "{error}");
        let other = routes.replace("eth0", "lo").replace("00000000\t0100000A", "0000000A\t00000000");
        machine.file(&format!("proc/net/{table}"), &other);
        machine.bind(&[NIC], BindOptions::default()).expect("another one's route");
    }
}

/// A machine with an NVMe drive of two partitions.
fn with_drive() -> Machine {
    let machine = Machine::new();
    machine.device(NIC, ("0x8086", "0x0a54"), "0x010802", Some(9));
    machine.attach(NIC, "nvme");
    let disk = format!("{DEVICES}/{NIC}/nvme/nvme0/nvme0n1");
    machine.disk(&disk, "259:0");
    machine.disk(&format!("{disk}/nvme0n1p1"), "259:1");
    machine.disk(&format!("{disk}/nvme0n1p2"), "259:2");
    machine.disk("sys/devices/pci0000:00/0000:00:05.0/ata1/sda", "8:0");
    machine.file("proc/self/mountinfo", "21 1 8:0 / / rw - ext4 /dev/sda rw\n");
    machine.file("proc/swaps", "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n");
    machine
}

#[test]
fn a_drive_that_nothing_uses_is_bound() {
    let machine = with_drive();
    machine.bind(&[NIC], BindOptions::default()).unwrap();
}

#[test]
fn a_mounted_partition_keeps_its_drive() {
    for line in [
        r"30 21 259:2 / /mnt/my\040disk rw,relatime shared:7 - ext4 /dev/nvme0n1p2 rw",
        // A btrfs, whose number is no device's.
        r"30 21 0:42 /@home /mnt/my\040disk rw - btrfs /dev/disk/by-label/home rw,subvol=/@home",
    ] {
        let machine = with_drive();
        machine.link("dev/disk/by-label/home", "dev/nvme0n1p2");
        machine.file("proc/self/mountinfo", &format!("21 1 8:0 / / rw - ext4 /dev/sda rw\n{line}\n"));
        let error = machine.refused(NIC);
        assert_eq!(error.kind(), ErrorKind::Busy);
        assert!(
            error.to_string().contains("in use: the disk nvme0n1p2 is mounted at /mnt/my disk;"),
            "{error}"
        );
        machine.bind(&[NIC], FORCE).unwrap();
    }
}

/// The kernel writes a mount point's bytes as they are.
#[test]
fn a_mount_point_that_is_no_text_hides_no_other() {
    let machine = with_drive();
    let lines = b"30 21 259:1 / /mnt/caf\xe9 rw - vfat /dev/nvme0n1p1 rw\n31 21 259:2 / /srv rw - ext4 /dev/nvme0n1p2 rw\n";
    fs::write(machine.path("proc/self/mountinfo"), lines).unwrap();
    let error = machine.refused(NIC);
    assert!(error.to_string().contains("nvme0n1p1 is mounted at /mnt/caf"), "{error}");
    assert!(error.to_string().contains("nvme0n1p2 is mounted at /srv"), "{error}");
}

#[test]
fn what_is_made_of_a_partition_keeps_its_drive() {
    let held = |machine: &Machine| {
        // A volume on an array on the second partition.
        machine.disk("sys/devices/virtual/block/md0", "9:0");
        machine.disk("sys/devices/virtual/block/dm-0", "253:0");
        machine.file("sys/devices/virtual/block/dm-0/dm/name", "vg-root\n");
        machine.link(
            &format!("{DEVICES}/{NIC}/nvme/nvme0/nvme0n1/nvme0n1p2/holders/md0"),
            "sys/devices/virtual/block/md0",
        );
        machine.link("sys/devices/virtual/block/md0/holders/dm-0", "sys/devices/virtual/block/dm-0");
        machine.link("dev/mapper/vg-root", "dev/dm-0");
    };
    let machine = with_drive();
    held(&machine);
    let error = machine.refused(NIC);
    assert!(error.to_string().contains("the disk nvme0n1p2 is part of vg-root"), "{error}");

    machine.file("proc/self/mountinfo", "21 1 253:0 / / rw - xfs /dev/mapper/vg-root rw\n");
    let error = machine.refused(NIC);
    assert!(error.to_string().contains("in use: vg-root on the disk nvme0n1p2 is mounted at /;"), "{error}");

    machine.file("proc/self/mountinfo", "");
    machine.file(
        "proc/swaps",
        "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n/dev/mapper/vg-root partition\t1\t0\t-2\n",
    );
    let error = machine.refused(NIC);
    assert!(error.to_string().contains("vg-root on the disk nvme0n1p2 is swap space"), "{error}");
}

#[test]
fn a_drive_with_several_controllers_is_found_behind_each() {
    let machine = Machine::new();
    machine.device(NIC, ("0x8086", "0x0a54"), "0x010802", Some(9));
    machine.attach(NIC, "nvme");
    let subsystem = "sys/devices/virtual/nvme-subsystem/nvme-subsys0";
    machine.folder(&format!("{DEVICES}/{NIC}/nvme/nvme0"));
    machine.link(&format!("{subsystem}/nvme0"), &format!("{DEVICES}/{NIC}/nvme/nvme0"));
    machine.link("sys/class/nvme-subsystem/nvme-subsys0", subsystem);
    machine.disk(&format!("{subsystem}/nvme0n1"), "259:0");
    machine.file("proc/self/mountinfo", "21 1 259:0 / /data rw - ext4 /dev/nvme0n1 rw\n");
    assert!(machine.refused(NIC).to_string().contains("nvme0n1 is mounted at /data"));
}

#[test]
fn what_vfio_would_not_take_is_refused_with_the_mend() {
    let machine = Machine::new();
    machine.device(NIC, ("0x8086", "0x0b25"), "0x088000", Some(7));
    let error = machine.refused(NIC);
    assert!(error.to_string().contains("denylist"), "{error}");
    assert!(error.mend_text().unwrap().contains("vfio_pci.disable_denylist=1"), "built in: {error}");
    machine.file("sys/module/vfio_pci/initstate", "live\n");
    let error = machine.refused(NIC);
    assert!(error.mend_text().unwrap().ends_with("sudo modprobe vfio-pci disable_denylist=1"), "{error}");
    fs::remove_dir(machine.path("sys/bus/pci/drivers/vfio-pci")).unwrap();
    let error = machine.refused(NIC);
    assert_eq!(error.kind(), ErrorKind::NotFound);
    assert!(
        error.mend_text().unwrap().starts_with("run: sudo modprobe vfio-pci disable_denylist=1"),
        "{error}"
    );

    let machine = Machine::new();
    machine.device(PORT, ("0x8086", "0x3420"), "0x060400", Some(7));
    assert!(machine.refused(PORT).to_string().contains("bridge"));

    machine.device(NIC, ("0x8086", "0x10d3"), "0x020000", None);
    machine.file("proc/cpuinfo", "vendor_id\t: GenuineIntel\n");
    let error = machine.refused(NIC);
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert!(error.to_string().contains("no IOMMU holds it") && error.to_string().contains("intel_iommu=on"));
    machine.file("sys/module/vfio/parameters/enable_unsafe_noiommu_mode", "Y\n");
    machine.bind(&[NIC], BindOptions::default()).expect("somebody wants it so");
}

#[test]
fn the_parent_of_virtual_functions_stays() {
    let machine = Machine::new();
    machine.nic(NIC);
    machine.file(&format!("{DEVICES}/{NIC}/sriov_numvfs"), "4\n");
    assert!(machine.refused(NIC).to_string().contains("4 virtual functions"));
    machine.file(&format!("{DEVICES}/{NIC}/sriov_numvfs"), "0\n");
    machine.bind(&[NIC], BindOptions::default()).unwrap();
}

#[test]
fn a_device_that_a_process_has_open_is_not_taken_away() {
    let open = |machine: &Machine, number: &str, target: &str| {
        machine.file("proc/4711/comm", "forward\n");
        let link = machine.path(&format!("proc/4711/fd/{number}"));
        fs::create_dir_all(link.parent().unwrap()).unwrap();
        symlink(target, link).unwrap();
    };
    for target in ["/dev/vfio/devices/vfio3", "/dev/vfio/7", "anon_inode:[vfio-device]"] {
        let machine = Machine::new();
        machine.nic(NIC);
        machine.nic(OTHER);
        machine.bind(&[NIC, OTHER], BindOptions::default()).unwrap();
        open(&machine, "5", target);
        let info = format!("pos:\t0\nvfio-device-syspath: /{DEVICES}/{NIC}\n");
        machine.file("proc/4711/fdinfo/5", &info);
        let error = machine.unbind(&[OTHER]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Busy);
        assert!(error.to_string().contains("process 4711 (forward)"), "{target}: {error}");
        assert_eq!(machine.driver(OTHER).as_deref(), Some("vfio-pci"));
    }
}
