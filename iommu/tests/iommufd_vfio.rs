//! iommufd with VFIO's devices on real IOMMUs: run by ci/testbed, on QEMU's `edu` devices, which have no PASIDs. What
//! needs PASIDs, page requests or dirty bits is in `iommufd_mock`; what needs DMA, in the suites of devices.
#![allow(clippy::unwrap_used, reason = "tests: an Err is the failure")]

use std::fs;
use std::io::Write;
use std::os::unix::fs::chown;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::Arc;

use underpass_iommu::iommufd::{Cdev, Device, Iommufd, Memlock, Options};
use underpass_iommu::{
    Access, Attachable, AttachableKind, ErrorKind, IommuBackend, Iova, IovaRange, PageSize, Pasid, Region,
    Result, Vendor,
};

const UNSAFE_INTERRUPTS: &str = "/sys/module/iommufd/parameters/allow_unsafe_interrupts";
/// x86's window for message-signalled interrupts.
const INTERRUPTS: IovaRange = IovaRange { first: Iova::new(0xfee0_0000), last: Iova::new(0xfeef_ffff) };

/// Ordinary users' id in the guest.
const USER: u32 = 1000;

fn variable(name: &str) -> String {
    std::env::var(name).unwrap_or_else(|_| panic!("{name} is not set: run this in ci/testbed"))
}

fn row() -> String {
    variable("UNDERPASS_TESTBED")
}

/// Tells the testbed why a test is left out. Past libtest, which keeps what is printed to itself.
fn not_here(reason: &str) {
    std::io::stderr().write_all(format!("testbed: not here: {reason}\n").as_bytes()).unwrap();
}

/// The file of the device whose address this variable has.
fn cdev(name: &str) -> String {
    let mut folder = fs::read_dir(format!("/sys/bus/pci/devices/{}/vfio-dev", variable(name))).unwrap();
    format!("/dev/vfio/devices/{}", folder.next().unwrap().unwrap().file_name().display())
}

struct Edu(Arc<dyn Device>);

impl Edu {
    fn bind(iommufd: &Iommufd, variable: &str) -> Result<Self> {
        Self::cdev(iommufd, variable).map(|cdev| Self(cdev))
    }

    fn cdev(iommufd: &Iommufd, name: &str) -> Result<Arc<Cdev>> {
        let file = fs::File::options().read(true).write(true).open(cdev(name)).unwrap();
        iommufd.bind(file.into(), &variable(name), None)
    }
}

impl Attachable for Edu {
    fn name(&self) -> &str {
        self.0.name()
    }

    fn kind(&self) -> AttachableKind<'_> {
        AttachableKind::Iommufd(&self.0)
    }
}

fn opened() -> (Iommufd, Edu) {
    let iommufd = Iommufd::open().unwrap();
    let edu = Edu::bind(&iommufd, "UNDERPASS_EDU").unwrap();
    (iommufd, edu)
}

fn small(pages: u64) -> Arc<Region> {
    Region::builder(pages * 4096).page_size(PageSize::Size4K).build().unwrap()
}

#[test]
#[ignore = "needs a real kernel: ci/testbed"]
fn capabilities_are_those_of_the_rows_iommu() {
    let (iommufd, edu) = opened();
    let ioas = iommufd.alloc_ioas().unwrap();
    let attachment = ioas.attach(&edu, None).unwrap();
    let capabilities = attachment.capabilities();
    let (vendor, huge) = match &*row() {
        "virtio-iommu" => (Vendor::Unknown, [false, false]),
        "amd" => (Vendor::AmdVi, [true, true]),
        _ => (Vendor::IntelVtd, [true, true]),
    };
    assert_eq!((capabilities.vendor, capabilities.max_pasids), (vendor, 0));
    let has = [PageSize::Size2M, PageSize::Size1G].map(|size| capabilities.page_sizes.contains(size));
    assert_eq!(has, huge, "{:#x}", capabilities.page_sizes.0);
    assert!(capabilities.page_sizes.contains(PageSize::Size4K));
    assert!(!capabilities.fault_reporting && !capabilities.dirty_tracking);
    assert_eq!(attachment.next_fault().unwrap(), None);
    assert_eq!(attachment.track_dirty(true).unwrap_err().kind(), ErrorKind::Unsupported);
}

#[test]
#[ignore = "needs a real kernel: ci/testbed"]
fn usable_addresses_leave_out_interrupts_and_what_is_too_wide() {
    let (iommufd, edu) = opened();
    let ioas = iommufd.alloc_ioas().unwrap();
    let before = ioas.usable_iovas();
    assert_eq!(before.len(), 1, "an empty space has no holes");
    let _attachment = ioas.attach(&edu, None).unwrap();
    let usable = ioas.usable_iovas();
    assert!(usable.iter().all(|range| range.intersection(&INTERRUPTS).is_none()), "{usable:?}");
    let last = usable.last().unwrap().last.get();
    match &*row() {
        "vtd-39bit" | "virtio-iommu" => assert_eq!(last, (1 << 39) - 1),
        _ => assert!(last >= (1 << 47) - 1, "{usable:?}"),
    }
    let mapping = ioas.map(&small(1), Access::READ_WRITE).unwrap();
    assert!(usable.iter().any(|range| range.contains(&IovaRange::sized(mapping.iova(), 4096).unwrap())));
}

/// Each row has its reason.
#[test]
#[ignore = "needs a real kernel: ci/testbed"]
fn a_device_without_pasids_says_why() {
    let (iommufd, edu) = opened();
    let ioas = iommufd.alloc_ioas().unwrap();
    let error = ioas.attach(&edu, Pasid::new(1)).unwrap_err();
    assert_eq!((error.kind(), error.device_name()), (ErrorKind::Exhausted, Some(edu.name())));
    let reason = match &*row() {
        "virtio-iommu" => "virtio-iommu has none",
        "amd" | "vtd-scalable" | "vtd-first-stage" => "the device has no PASID capability",
        _ => "no scalable mode",
    };
    assert!(error.to_string().contains(reason) && error.mend_text().is_some(), "{error}");
    // Nothing is left of it.
    drop(ioas.attach(&edu, None).unwrap());
}

#[test]
#[ignore = "needs a real kernel: ci/testbed"]
fn a_device_is_bound_once() {
    let (iommufd, edu) = opened();
    for iommufd in [iommufd.clone(), Iommufd::open().unwrap()] {
        let error = Edu::cdev(&iommufd, "UNDERPASS_EDU").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Busy, "{error}");
    }
    drop(edu);
    drop(Edu::bind(&iommufd, "UNDERPASS_EDU").unwrap());
}

#[test]
#[ignore = "needs a real kernel: ci/testbed"]
fn only_vfios_files_are_bound() {
    let iommufd = Iommufd::open().unwrap();
    for file in ["/dev/null", "/dev/iommu", "/proc/self/exe"] {
        let error = iommufd.bind(fs::File::open(file).unwrap().into(), file, None).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}");
    }
}

#[test]
#[ignore = "needs a real kernel: ci/testbed"]
fn spaces_of_another_iommufd_are_refused() {
    let (iommufd, edu) = opened();
    let other = Iommufd::open().unwrap().alloc_ioas().unwrap();
    assert_eq!(other.attach(&edu, None).unwrap_err().kind(), ErrorKind::InvalidInput);
    drop(iommufd.alloc_ioas().unwrap().attach(&edu, None).unwrap());
    let shared = [Iommufd::shared().unwrap(), Iommufd::shared().unwrap()];
    let edu2 = Edu::bind(&shared[0], "UNDERPASS_EDU2").unwrap();
    drop(shared[1].alloc_ioas().unwrap().attach(&edu2, None).unwrap());
}

#[test]
#[ignore = "needs a real kernel: ci/testbed"]
fn what_is_in_the_way_of_a_device_is_told() {
    let require = |range| Options { required_iovas: vec![range], ..Options::default() };
    let iommufd = Iommufd::with(require(INTERRUPTS)).unwrap();
    let edu = Edu::bind(&iommufd, "UNDERPASS_EDU").unwrap();
    let ioas = iommufd.alloc_ioas().unwrap();
    let error = ioas.attach(&edu, None).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Busy, "{error}");
    drop((ioas, edu));
    let usual = IovaRange::sized(Iova::new(1 << 30), 1 << 30).unwrap();
    let iommufd = Iommufd::with(require(usual)).unwrap();
    let edu = Edu::bind(&iommufd, "UNDERPASS_EDU").unwrap();
    drop(iommufd.alloc_ioas().unwrap().attach(&edu, None).unwrap());
}

#[test]
#[ignore = "needs a real kernel: ci/testbed"]
fn options_are_taken() {
    let options = Options {
        huge_pages: false,
        memlock: Memlock::Process,
        page_faults: true,
        dirty_tracking: true,
        ..Options::default()
    };
    let iommufd = Iommufd::with(options).unwrap();
    let edu = Edu::bind(&iommufd, "UNDERPASS_EDU").unwrap();
    let ioas = iommufd.alloc_ioas().unwrap();
    // What device or IOMMU can not do is left out, and no error.
    let attachment = ioas.attach(&edu, None).unwrap();
    assert_eq!(attachment.next_fault().unwrap(), None);
    assert_eq!(attachment.track_dirty(true).is_ok(), attachment.capabilities().dirty_tracking);
    let region = Region::builder(4 << 20).page_size(PageSize::Size2M).build().unwrap();
    let mapping = ioas.map(&region, Access::READ_WRITE).unwrap();
    mapping.unmap().unwrap();
}

#[test]
#[ignore = "needs a real kernel: ci/testbed"]
fn interrupts_that_are_not_isolated_are_explained() {
    if !matches!(&*row(), "amd" | "virtio-iommu") {
        return not_here("the IOMMU isolates interrupts");
    }
    fs::write(UNSAFE_INTERRUPTS, "N").unwrap();
    let refused = Edu::cdev(&Iommufd::open().unwrap(), "UNDERPASS_EDU");
    fs::write(UNSAFE_INTERRUPTS, "Y").unwrap();
    let error = refused.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Permission);
    assert!(error.mend_text().unwrap().contains(UNSAFE_INTERRUPTS), "{error}");
}

/// For the IOMMU, the functions of one device are one: they can be attached to one page table only.
#[test]
#[ignore = "needs a real kernel: ci/testbed"]
fn devices_of_one_group_share_an_address_space() {
    let iommufd = Iommufd::open().unwrap();
    let [one, two] = ["UNDERPASS_TWIN0", "UNDERPASS_TWIN1"].map(|twin| Edu::bind(&iommufd, twin).unwrap());
    let (ioas, other) = (iommufd.alloc_ioas().unwrap(), iommufd.alloc_ioas().unwrap());
    let first = ioas.attach(&one, None).unwrap();
    let mapping = ioas.map(&small(3), Access::READ_WRITE).unwrap();
    let second = ioas.attach(&two, None).unwrap();
    assert_eq!(second.capabilities(), first.capabilities());
    // The one whose page table it was goes first.
    drop(first);
    mapping.unmap().unwrap();
    let _mapping = ioas.map(&small(3), Access::READ_WRITE).unwrap();
    let error = other.attach(&one, None).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Busy);
    assert!(error.to_string().contains("IOMMU group") && error.mend_text().is_some(), "{error}");
    drop(second);
    drop(other.attach(&one, None).unwrap());
}

/// Set for the process that the test below starts: the bytes that it is to map.
const BYTES: &str = "UNDERPASS_TEST_BYTES";

/// For the test below: as an ordinary user, with what memory that one may lock, maps a part before the device is attached
/// and a part after, and prints how that went.
#[test]
#[ignore = "needs a real kernel: ci/testbed"]
fn map_and_tell() {
    let Ok(bytes) = std::env::var(BYTES) else { return };
    let pages = bytes.parse::<u64>().unwrap() / 4096;
    let map = || -> Result<()> {
        let (iommufd, edu) = opened();
        let ioas = iommufd.alloc_ioas()?;
        let _before = ioas.map(&small(pages / 2), Access::READ_WRITE)?;
        let _attachment = ioas.attach(&edu, None)?;
        let after = ioas.map(&small(pages / 2), Access::READ)?;
        // What is pinned already is not counted again.
        let other = iommufd.alloc_ioas()?;
        let edu2 = Edu::bind(&iommufd, "UNDERPASS_EDU2")?;
        let _other = other.attach(&edu2, None)?;
        let _copy = other.map(after.region(), Access::READ_WRITE)?;
        Ok(())
    };
    let told = match map() {
        Ok(()) => "mapped".to_owned(),
        Err(error) => format!("{error:?}"),
    };
    writeln!(std::io::stdout(), "\n{told}").unwrap();
}

fn map_as_user(bytes: u64, limit: u64) -> String {
    let limit = format!("ulimit -H -l {0}; ulimit -S -l {0}; exec \"$0\" \"$@\"", limit / 1024);
    let child = Command::new("/bin/sh")
        .args(["-c", &limit])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", "map_and_tell", "--include-ignored", "--nocapture"])
        .env(BYTES, bytes.to_string())
        .uid(USER)
        .gid(USER)
        .output()
        .unwrap();
    String::from_utf8(child.stdout).unwrap() + &String::from_utf8(child.stderr).unwrap()
}

#[test]
#[ignore = "needs a real kernel: ci/testbed"]
fn an_ordinary_user_with_enough_memlock_needs_no_root() {
    let files = ["/dev/iommu".to_owned(), cdev("UNDERPASS_EDU"), cdev("UNDERPASS_EDU2")];
    for file in &files {
        chown(file, Some(USER), None).unwrap();
    }
    let enough = map_as_user(8 << 20, 8 << 20);
    let less = map_as_user(8 << 20, (8 << 20) - 4096);
    let little = map_as_user(8 << 20, 1 << 20);
    for file in &files {
        chown(file, Some(0), None).unwrap();
    }
    assert!(enough.contains("\nmapped\n"), "{enough}");
    assert!(less.contains("NoMemory: ") && less.contains("LimitMEMLOCK=8388608"), "{less}");
    // The part that was mapped before is refused when a device is attached.
    assert!(little.contains("NoMemory: ") && little.contains("LimitMEMLOCK=4194304"), "{little}");
    assert!(little.contains("ulimit -l 4096"), "{little}");
}
