//! PCI functions and mediated devices that the kernel hands out, on each kind of IOMMU: QEMU's edu for registers, MSI and
//! DMA at any address, its igb for MSI-X and resets, the kernel's sample mtty for mediated devices.
#![allow(clippy::unwrap_used, reason = "tests: an Err is the failure")]

mod edu;

use std::fs;
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use underpass::dma::{DmaBuf, DmaSpace};
use underpass::iommu::PageSize;
use underpass::pci::{PciDevice, cap};
use underpass::{Access, ErrorKind, Iova, Region};

use edu::{Edu, address, not_here, options, row, variable};

/// Longer than anything takes here.
const LONG: Duration = Duration::from_secs(10);

/// Memory that every row can map, and its buffer.
fn memory() -> DmaBuf {
    let size = if row() == "noiommu" { PageSize::Size2M } else { PageSize::Size4K };
    DmaBuf::new(Region::builder(size.bytes()).page_size(size).build().unwrap()).unwrap()
}

/// The device attached to an address space of its own, with `buf` mapped.
fn mapped(
    device: &PciDevice,
    buf: &DmaBuf,
    access: Access,
) -> (DmaSpace, underpass::iommu::Attachment, Iova) {
    let ioas = device.iommu().alloc_ioas().unwrap();
    let attachment = ioas.attach(device, None).unwrap();
    let mut space = DmaSpace::new(ioas);
    space.map(buf.region(), access).unwrap();
    let iova = space.iova(buf).unwrap();
    (space, attachment, iova)
}

/// Whether an IOMMU is there to refuse anything.
fn is_protected() -> bool {
    let is = row() != "noiommu";
    if !is {
        not_here("without an IOMMU no DMA is refused");
    }
    is
}

#[test]
#[ignore = "needs a real kernel: ci/testbed"]
fn registers_answer_in_every_width_that_the_device_has() {
    let edu = Edu::open("UNDERPASS_EDU");
    assert_eq!(edu.device.name(), variable("UNDERPASS_EDU"));
    assert_eq!(edu.registers.len(), 1 << 20);
    assert_eq!(edu.registers.read32(edu::IDENTITY), 0x0100_00ed);
    edu.registers.write32(edu::LIVENESS, 0x1234_5678);
    assert_eq!(edu.registers.read32(edu::LIVENESS), !0x1234_5678);
    edu.registers.window(0x80, 0x20).unwrap().write64(0, 0x0123_4567_89ab_cdef);
    assert_eq!(edu.registers.read64(0x80), 0x0123_4567_89ab_cdef);
    let absent = edu.device.bar(2).unwrap_err();
    assert_eq!(absent.kind(), ErrorKind::Device);
}

#[test]
#[ignore = "needs a real kernel: ci/testbed"]
fn configuration_space_keeps_what_registers_need() {
    let edu = Edu::open("UNDERPASS_EDU");
    let config = edu.device.config();
    assert_eq!((config.vendor_id(), config.device_id(), config.class()), (0x1234, 0x11e8, 0x00_ff00));
    assert!(config.bus_master() && config.capability(cap::MSI).is_some());
    assert_eq!(config.read32(0x100), u32::MAX, "a conventional device has 256 bytes");
    config.write16(4, 0);
    assert_eq!(config.read16(4) & 6, 2, "bus mastering is off, memory decoding is not");
    assert_eq!(edu.registers.read32(edu::IDENTITY), 0x0100_00ed);
    edu.device.set_bus_master(true).unwrap();

    let igb = PciDevice::open(address("UNDERPASS_IGB"), &options()).unwrap();
    let (config, registers) = (igb.config(), igb.bar(0).unwrap());
    let power = config.capability(cap::POWER_MANAGEMENT).unwrap() + 4;
    config.write16(power, config.read16(power) | 3);
    assert_eq!(config.read16(power) & 3, 0, "it stays awake");
    // A touch of the mapping is SIGBUS where the function sleeps.
    assert_ne!(registers.read32(8), u32::MAX);
    assert!(config.extended_capabilities().count() > 0);
}

#[test]
#[ignore = "needs a real kernel: ci/testbed"]
fn an_interrupt_arrives_until_others_are_asked_for() {
    let edu = Edu::open("UNDERPASS_EDU");
    assert_eq!(edu.device.interrupts(2).unwrap_err().kind(), ErrorKind::Unsupported);
    let signal = || {
        edu.registers.write32(edu::IRQ_RAISE, 4);
        assert_eq!(edu.registers.read32(edu::IRQ_STATUS), 4);
        edu.registers.write32(edu::IRQ_ACKNOWLEDGE, 4);
    };
    let first = edu.device.interrupts(1).unwrap().remove(0);
    for _ in 0..3 {
        signal();
        assert!(first.wait(Some(LONG)).unwrap());
        assert!(first.drain());
    }
    let second = edu.device.interrupts(1).unwrap().remove(0);
    signal();
    assert!(second.wait(Some(LONG)).unwrap());
    assert!(!first.drain(), "the earlier one fell silent");
    // The device's own work signals too: 5! = 120.
    second.drain();
    edu.registers.write32(edu::STATUS, 0x80);
    edu.registers.write32(edu::FACTORIAL, 5);
    assert!(second.wait(Some(LONG)).unwrap());
    assert_eq!(edu.registers.read32(edu::FACTORIAL), 120);
    edu.registers.write32(edu::IRQ_ACKNOWLEDGE, 1);
    assert_eq!(edu.device.interrupts(0).unwrap().len(), 0);
}

/// igb's registers (Intel 82576 datasheet, 8.8): GPIE with its bit for several vectors, EIMS, and EICS, which raises causes.
#[test]
#[ignore = "needs a real kernel: ci/testbed"]
fn message_signalled_interrupts_are_told_apart_and_survive_a_reset() {
    const GPIE: u64 = 0x1514;
    const EICS: u64 = 0x1520;
    const EIMS: u64 = 0x1524;
    let igb = PciDevice::open(address("UNDERPASS_IGB"), &options()).unwrap();
    // A message is a write of the device's.
    igb.set_bus_master(true).unwrap();
    let registers = igb.bar(0).unwrap();
    let vectors = igb.interrupts(4).unwrap();
    let raise = |n: usize| {
        registers.write32(GPIE, 1 << 4);
        registers.write32(EIMS, 0xf);
        registers.write32(EICS, 1 << n);
    };
    for (n, vector) in vectors.iter().enumerate() {
        raise(n);
        assert!(vector.wait(Some(LONG)).unwrap(), "vector {n}");
        assert!(vector.drain() && vectors.iter().all(|other| !other.drain()));
    }
    igb.reset().unwrap();
    assert_eq!(registers.read32(EIMS), 0, "the device forgot");
    assert!(igb.config().bus_master(), "configuration space is as before");
    raise(2);
    assert!(vectors[2].wait(Some(LONG)).unwrap());
    drop(vectors);
    assert_eq!(igb.interrupts(1000).unwrap_err().kind(), ErrorKind::Unsupported);
}

/// e1000's registers (Intel 8254x Software Developer's Manual, 13.4.17 and on): ICR, which reading clears, ICS, which sets
/// causes, and IMS.
#[test]
#[ignore = "needs a real kernel: ci/testbed"]
fn a_line_interrupt_comes_again_until_its_cause_is_gone() {
    const ICR: u64 = 0xc0;
    const ICS: u64 = 0xc8;
    const IMS: u64 = 0xd0;
    const LINK: u32 = 1 << 2;
    let nic = PciDevice::open(address("UNDERPASS_E1000"), &options()).unwrap();
    let config = nic.config();
    assert!(config.capability(cap::MSI).is_none() && config.capability(cap::MSIX).is_none());
    let registers = nic.bar(0).unwrap();
    let line = nic.interrupts(1).unwrap().remove(0);
    registers.write32(IMS, LINK);
    for _ in 0..3 {
        registers.write32(ICS, LINK);
        assert!(line.wait(Some(LONG)).unwrap());
        assert!(line.drain());
        assert!(line.wait(Some(LONG)).unwrap(), "the cause is still there");
        assert_ne!(registers.read32(ICR) & LINK, 0);
        line.drain();
        assert!(!line.wait(Some(Duration::from_millis(50))).unwrap(), "and now it is not");
    }
    assert_eq!(nic.interrupts(2).unwrap_err().kind(), ErrorKind::Unsupported);
    // Its second BAR is of I/O ports: calls, and nothing is mapped.
    assert!(nic.bar(1).unwrap().can_post64().is_err());
}

#[test]
#[ignore = "needs a real kernel: ci/testbed"]
fn what_can_not_be_reset_says_so() {
    let edu = Edu::open("UNDERPASS_EDU");
    let error = edu.device.reset().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
    assert_eq!(edu.registers.read32(edu::IDENTITY), 0x0100_00ed);
}

#[test]
#[ignore = "needs a real kernel: ci/testbed"]
fn dma_reaches_what_is_mapped_and_nothing_without_bus_mastering() {
    let edu = Edu::open("UNDERPASS_EDU");
    let mut buf = memory();
    let (_space, _attachment, iova) = mapped(&edu.device, &buf, Access::READ_WRITE);
    buf[..8].copy_from_slice(b"outbound");
    edu.fetch(iova, 0, 8);
    edu.store(0, iova.wrapping_add(2048), 8);
    assert_eq!(&buf[2048..2056], b"outbound");
    edu.device.set_bus_master(false).unwrap();
    edu.store(0, iova.wrapping_add(1024), 8);
    assert_eq!(&buf[1024..1032], [0; 8]);
}

#[test]
#[ignore = "needs a real kernel: ci/testbed"]
fn dma_to_what_is_not_mapped_or_only_read_is_stopped_and_the_device_goes_on() {
    if !is_protected() {
        return;
    }
    let edu = Edu::open("UNDERPASS_EDU");
    let (mut buf, mut constant) = (memory(), memory());
    buf[..4].copy_from_slice(b"good");
    constant[..4].copy_from_slice(b"keep");
    let (mut space, _attachment, iova) = mapped(&edu.device, &buf, Access::READ_WRITE);
    space.map(constant.region(), Access::READ).unwrap();
    let kept = space.iova(&constant).unwrap();

    edu.fetch(iova, 0, 4);
    edu.store(0, kept, 4);
    assert_eq!(&constant[..4], b"keep");
    // Far from everything; and, below, where memory was. What is refused reads as zeros.
    let nowhere = Iova::new(0x12_3456_7000);
    edu.store(0, nowhere, 4);
    edu.fetch(nowhere, 0, 4);
    edu.store(0, iova.wrapping_add(64), 4);
    assert_eq!(&buf[64..68], [0; 4]);
    space.unmap(constant.region()).unwrap();
    edu.fetch(kept, 0, 4);
    edu.store(0, iova.wrapping_add(128), 4);
    assert_eq!(&buf[128..132], [0; 4]);
    // All of this on the same device, which still works.
    edu.fetch(iova, 0, 4);
    edu.store(0, iova.wrapping_add(256), 4);
    assert_eq!(&buf[256..260], b"good");
}

#[test]
#[ignore = "needs a real kernel: ci/testbed"]
fn two_devices_with_an_address_space_each_do_not_see_each_other() {
    if !is_protected() {
        return;
    }
    let (one, two) = (Edu::open("UNDERPASS_EDU"), Edu::open("UNDERPASS_EDU2"));
    let (mut first, second) = (memory(), memory());
    first[..4].copy_from_slice(b"mine");
    let (_first, _one, here) = mapped(&one.device, &first, Access::READ_WRITE);
    let (_second, _two, there) = mapped(&two.device, &second, Access::READ_WRITE);
    assert_ne!(here, there);
    one.fetch(here, 0, 4);
    one.store(0, there, 4);
    assert_eq!(&second[..4], [0; 4], "the one writes what only the other maps");
    two.fetch(here, 0, 4);
    two.store(0, there, 4);
    assert_eq!(&second[..4], [0; 4], "the other reads what only the one maps");
    // Their own they do.
    one.store(0, here.wrapping_add(8), 4);
    assert_eq!(&first[8..12], b"mine");
}

/// What `open_and_tell` is to open, in a process of its own.
const CHILD: &str = "UNDERPASS_TEST_OPENS";

/// For the tests below: opens a device and prints how that went.
#[test]
#[ignore = "needs a real kernel: ci/testbed"]
fn open_and_tell() {
    if std::env::var_os(CHILD).is_some() {
        let told = match PciDevice::open(address(CHILD), &options()) {
            Ok(_) => "opened".to_owned(),
            Err(error) => format!("{error:?}"),
        };
        std::io::stdout().write_all(format!("\n{told}\n").as_bytes()).unwrap();
    }
}

fn open_elsewhere(address: &str, user: Option<u32>) -> String {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "open_and_tell", "--include-ignored", "--nocapture"]).env(CHILD, address);
    if let Some(user) = user {
        command.uid(user);
    }
    let output = command.output().unwrap();
    String::from_utf8(output.stdout).unwrap()
}

#[test]
#[ignore = "needs a real kernel: ci/testbed"]
fn a_device_is_its_first_users_until_that_one_lets_go() {
    let name = variable("UNDERPASS_EDU");
    let edu = Edu::open("UNDERPASS_EDU");
    let again = PciDevice::open(address("UNDERPASS_EDU"), &options()).unwrap_err();
    assert_eq!(again.kind(), ErrorKind::Busy, "{again}");
    let told = open_elsewhere(&name, None);
    assert!(told.contains("Busy: ") && told.contains(&name), "{told}");
    let registers = edu.registers.clone();
    drop(edu);
    let again = PciDevice::open(address("UNDERPASS_EDU"), &options()).unwrap_err();
    assert!(
        again.to_string().contains("this process has it open"),
        "its registers are still mapped: {again}"
    );
    assert_eq!(registers.read32(edu::IDENTITY), 0x0100_00ed);
    drop(registers);
    let told = open_elsewhere(&name, None);
    assert!(told.contains("\nopened\n"), "{told}");
    drop(Edu::open("UNDERPASS_EDU"));
}

#[test]
#[ignore = "needs a real kernel: ci/testbed"]
fn who_may_not_open_it_learns_what_to_run() {
    let told = open_elsewhere(&variable("UNDERPASS_EDU"), Some(1000));
    assert!(told.contains("Permission: ") && told.contains("; run"), "{told}");
}

#[test]
#[ignore = "needs a real kernel: ci/testbed"]
fn what_is_not_there_or_not_ours_is_an_error() {
    let open = |address: &str| PciDevice::open(address.parse().unwrap(), &options()).unwrap_err();
    let absent = open("0000:00:1e.7");
    assert_eq!((absent.kind(), absent.device_name()), (ErrorKind::NotFound, Some("0000:00:1e.7")));
    // The kernel's own NIC, by its interface's name.
    let link = fs::read_link(format!("/sys/class/net/{}/device", variable("UNDERPASS_PEER0"))).unwrap();
    let theirs = open(link.file_name().unwrap().to_str().unwrap());
    assert_eq!(theirs.kind(), ErrorKind::Busy, "{theirs}");
    assert!(
        theirs.to_string().contains("e1000e") && theirs.to_string().contains("underpass bind"),
        "{theirs}"
    );
    if row() == "noiommu" {
        let protected =
            PciDevice::open(address("UNDERPASS_EDU"), &underpass::vfio::Options::default()).unwrap_err();
        assert_eq!(protected.kind(), ErrorKind::Permission);
        assert!(protected.to_string().contains("--allow-unsafe-noiommu"), "{protected}");
    }
}

/// As an unplug does, up to the moment when the device leaves the bus.
#[test]
#[ignore = "needs a real kernel: ci/testbed"]
fn a_device_that_is_asked_back_works_until_it_is_closed() {
    const VFIO_PCI: &str = "/sys/bus/pci/drivers/vfio-pci";
    let name = variable("UNDERPASS_EDU");
    let edu = Edu::open("UNDERPASS_EDU");
    let mut buf = memory();
    let (space, attachment, iova) = mapped(&edu.device, &buf, Access::READ_WRITE);
    assert!(!edu.device.is_gone() && edu.device.failure().is_none());
    let address = name.clone();
    let unbinding = thread::spawn(move || fs::write(format!("{VFIO_PCI}/unbind"), address));
    let deadline = Instant::now() + LONG;
    while !edu.device.is_gone() {
        assert!(Instant::now() < deadline, "nobody asked for it");
        thread::sleep(Duration::from_millis(1));
    }
    let failure = edu.device.failure().unwrap();
    assert_eq!((failure.kind(), failure.device_name()), (ErrorKind::Gone, Some(&*name)));
    assert_eq!(edu.registers.read32(edu::IDENTITY), 0x0100_00ed, "its registers are still there");
    buf[..4].copy_from_slice(b"last");
    edu.fetch(iova, 0, 4);
    edu.store(0, iova.wrapping_add(8), 4);
    assert_eq!(&buf[8..12], b"last");
    assert!(!unbinding.is_finished(), "the kernel waits");
    drop((space, attachment, edu));
    unbinding.join().unwrap().unwrap();
    let error = PciDevice::open(name.parse().unwrap(), &options()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
    fs::write(format!("{VFIO_PCI}/bind"), &name).unwrap();
    drop(Edu::open("UNDERPASS_EDU"));
}

/// Whoever takes it away holds its lock, so that it can not be had for a reset until it is closed.
#[test]
#[ignore = "needs a real kernel: ci/testbed"]
fn a_device_that_is_asked_back_is_not_reset_and_says_why() {
    const VFIO_PCI: &str = "/sys/bus/pci/drivers/vfio-pci";
    let name = variable("UNDERPASS_IGB");
    let igb = PciDevice::open(address("UNDERPASS_IGB"), &options()).unwrap();
    let unbound = name.clone();
    let unbinding = thread::spawn(move || fs::write(format!("{VFIO_PCI}/unbind"), unbound));
    let deadline = Instant::now() + LONG;
    while !igb.is_gone() {
        assert!(Instant::now() < deadline, "nobody asked for it");
        thread::sleep(Duration::from_millis(1));
    }
    let error = igb.reset().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Gone, "{error}");
    drop(igb);
    unbinding.join().unwrap().unwrap();
    fs::write(format!("{VFIO_PCI}/bind"), &name).unwrap();
}

/// The kernel's sample of a mediated device: a serial port, of which registers are calls into the kernel.
#[test]
#[ignore = "needs a real kernel: ci/testbed"]
fn a_mediated_device_opens_and_answers() {
    const TYPE: &str = "/sys/class/mdev_bus/mtty/mdev_supported_types/mtty-1";
    const UUID: &str = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001";
    /// The UART's scratch register (PC16550D, 8.9).
    const SCRATCH: u64 = 7;
    if fs::metadata(TYPE).is_err() {
        return not_here("the kernel has no CONFIG_SAMPLE_VFIO_MDEV_MTTY");
    }
    fs::write(format!("{TYPE}/create"), UUID).unwrap();
    let device = PciDevice::open_mdev(UUID, &options()).unwrap();
    assert_eq!(device.name(), UUID);
    assert_eq!((device.config().vendor_id(), device.config().device_id()), (0x4348, 0x3253));
    let port = device.bar(0).unwrap();
    port.write8(SCRATCH, 0x5a);
    assert_eq!(port.read8(SCRATCH), 0x5a);
    assert!(port.can_post64().is_err());
    let attached = device.iommu().alloc_ioas().unwrap().attach(&device, None).unwrap();
    drop((attached, port, device));
    fs::write(format!("/sys/bus/mdev/devices/{UUID}/remove"), "1").unwrap();
    let error = PciDevice::open_mdev(UUID, &options()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
}
