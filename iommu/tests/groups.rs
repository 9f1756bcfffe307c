//! VFIO's groups on a real kernel, with and without an IOMMU: run by ci/testbed, on QEMU's `edu` devices (its
//! docs/specs/edu.rst), whose DMA engine reads and writes any address that it is told.
#![allow(clippy::unwrap_used, reason = "tests: an Err is the failure")]

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use underpass_iommu::group::Group;
use underpass_iommu::noiommu::Noiommu;
use underpass_iommu::type1::Type1;
use underpass_iommu::{
    Access, Attachable, AttachableKind, ErrorKind, IommuBackend, Iova, IovaRange, PageSize, Pasid, Region,
    UnprotectedDma,
};

const NO_INTERRUPT_CHECK: &str = "/sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts";
const ENTRY_LIMIT: &str = "/sys/module/vfio_iommu_type1/parameters/dma_entry_limit";

/// The row of the testbed.
fn row() -> String {
    std::env::var("UNDERPASS_TESTBED").expect("ci/testbed names its row")
}

/// Whether a test that needs an IOMMU can run; says so if not.
fn has_iommu() -> bool {
    let has = row() != "noiommu";
    if !has {
        skip("no IOMMU");
    }
    has
}

fn skip(why: &str) {
    // Past the test harness, which captures what is printed.
    std::io::stderr().write_all(format!("testbed: not here: {why}\n").as_bytes()).unwrap();
}

fn address(variable: &str) -> String {
    std::env::var(variable).expect("ci/testbed names the devices")
}

fn group_number(address: &str) -> u32 {
    let group = fs::read_link(format!("/sys/bus/pci/devices/{address}/iommu_group")).unwrap();
    group.file_name().unwrap().to_str().unwrap().parse().unwrap()
}

/// An edu device in its group. Closed before the group is.
struct Edu {
    file: File,
    group: Arc<Group>,
    address: String,
}

impl Attachable for Edu {
    fn name(&self) -> &str {
        &self.address
    }

    fn kind(&self) -> AttachableKind<'_> {
        AttachableKind::Group(&self.group)
    }
}

/// Where vfio-pci has a region in its file: `VFIO_DEVICE_GET_REGION_INFO` would say the same (`VFIO_PCI_INDEX_TO_OFFSET`).
const fn region_start(index: u64) -> u64 {
    index << 40
}

impl Edu {
    const BUFFER: u64 = 0x4_0000;

    fn open(group: Arc<Group>, address: String) -> Self {
        let file = File::from(group.device(&address).unwrap());
        // Memory decoding and bus mastering.
        file.write_all_at(&6_u16.to_le_bytes(), region_start(7) + 4).unwrap();
        Self { file, group, address }
    }

    fn type1(variable: &str) -> Self {
        let address = address(variable);
        Self::open(Type1::open().unwrap().group(group_number(&address)).unwrap(), address)
    }

    fn write(&self, register: u64, value: u64) {
        self.file.write_all_at(&value.to_le_bytes(), region_start(0) + register).unwrap();
    }

    fn read(&self, register: u64) -> u64 {
        let mut value = [0; 8];
        self.file.read_exact_at(&mut value, region_start(0) + register).unwrap();
        u64::from_le_bytes(value)
    }

    fn dma(&self, from: u64, to: u64, command: u64) {
        self.write(0x80, from);
        self.write(0x88, to);
        self.write(0x90, 8);
        self.write(0x98, command | 1);
        let begin = Instant::now();
        while self.read(0x98) & 1 != 0 {
            assert!(begin.elapsed() < Duration::from_secs(5), "the device does not come to an end");
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// Has the device copy eight bytes, through its buffer. What it may not read is zeroes to it.
    fn copy(&self, from: Iova, to: Iova) {
        self.dma(from.get(), Self::BUFFER, 0);
        self.dma(Self::BUFFER, to.get(), 2);
    }
}

const VALUE: u64 = 0x0123_4567_89ab_cdef;

fn region(pages: u64, size: PageSize) -> Arc<Region> {
    Region::builder(pages * size.bytes()).page_size(size).build().unwrap()
}

/// Eight bytes of a region, which a device may be using.
fn word(region: &Region, at: u64) -> &AtomicU64 {
    assert!(at + 8 <= region.len() && at.is_multiple_of(8));
    // SAFETY: inside the region (checked above).
    let word = unsafe { region.as_ptr().add(at as usize) };
    // SAFETY: aligned and inside the region, which outlives the reference; the tests reach it by this alone.
    unsafe { AtomicU64::from_ptr(word.as_ptr().cast()) }
}

fn set(region: &Region, at: u64, value: u64) {
    word(region, at).store(value, Ordering::SeqCst);
}

fn get(region: &Region, at: u64) -> u64 {
    word(region, at).load(Ordering::SeqCst)
}

#[test]
#[ignore = "needs a real kernel: ci/testbed"]
fn what_is_mapped_is_reached_as_long_as_it_is_mapped_and_attached() {
    if !has_iommu() {
        return;
    }
    let edu = Edu::type1("UNDERPASS_EDU");
    let ioas = Type1::open().unwrap().alloc_ioas().unwrap();
    let (source, target) = (region(1, PageSize::Size2M), region(3, PageSize::Size4K));
    set(&source, 0x1000, VALUE);
    // Mapped before anything is attached: there for who comes.
    let source_at = ioas.map(&source, Access::READ).unwrap();
    let attachment = ioas.attach(&edu, None).unwrap();
    assert_eq!(attachment.name(), edu.address);
    let target_at = ioas.map(&target, Access::READ_WRITE).unwrap();
    let from = source_at.iova().wrapping_add(0x1000);

    edu.copy(from, target_at.iova().wrapping_add(0x2ff8));
    assert_eq!(get(&target, 0x2ff8), VALUE);
    edu.copy(target_at.iova(), from);
    assert_eq!(get(&source, 0x1000), VALUE, "may only be read");

    let at = target_at.iova();
    target_at.unmap().unwrap();
    edu.copy(from, at);
    assert_eq!(get(&target, 0), 0, "unmapped");

    let target_at = ioas.map(&target, Access::READ_WRITE).unwrap();
    drop(attachment);
    edu.copy(from, target_at.iova());
    assert_eq!(get(&target, 0), 0, "detached");

    let _attachment = ioas.attach(&edu, None).unwrap();
    edu.copy(from, target_at.iova());
    assert_eq!(get(&target, 0), VALUE, "attached again");
}

#[test]
#[ignore = "needs a real kernel: ci/testbed"]
fn a_group_is_opened_once_and_has_one_address_space() {
    if !has_iommu() {
        return;
    }
    let (type1, edu) = (Type1::open().unwrap(), Edu::type1("UNDERPASS_EDU"));
    assert!(Arc::ptr_eq(&edu.group, &type1.group(edu.group.number()).unwrap()));
    let (one, two) = (type1.alloc_ioas().unwrap(), type1.alloc_ioas().unwrap());
    let attachment = one.attach(&edu, None).unwrap();
    // As another device of the same group, which the testbed has not.
    let same_group = one.attach(&edu.group, None).unwrap();
    for ioas in [&one, &two] {
        let error = ioas.attach(&edu, None).unwrap_err();
        assert_eq!((error.kind(), error.device_name()), (ErrorKind::Busy, Some(&*edu.address)));
    }
    drop(same_group);
    let error = two.attach(&edu.group, None).unwrap_err();
    assert!(error.to_string().contains(&edu.address), "names who has it: {error}");
    drop(attachment);
    drop(two.attach(&edu, None).unwrap());

    let number = edu.group.number();
    let opened = edu.group.device("0000:ff:1f.7").unwrap_err();
    assert_eq!(opened.kind(), ErrorKind::NotFound, "{opened}");
    let token = "12345678-1234-1234-1234-123456789abc";
    let refused = edu.group.device(&format!("{} vf_token={token}", edu.address)).unwrap_err();
    assert!(
        refused.mend_text().is_some_and(|mend| mend.contains("vf-token"))
            && !refused.to_string().contains(token)
    );

    drop(edu);
    let other = File::options().read(true).write(true).open(format!("/dev/vfio/{number}")).unwrap();
    let busy = type1.group(number).unwrap_err();
    assert_eq!(busy.kind(), ErrorKind::Busy, "{busy}");
    assert!(busy.mend_text().is_some_and(|mend| mend.contains("fuser")), "{busy}");
    drop(other);
    drop(type1.group(number).unwrap());
    let none = type1.group(12_345).unwrap_err();
    assert_eq!(none.kind(), ErrorKind::NotFound, "{none}");
}

#[test]
#[ignore = "needs a real kernel: ci/testbed"]
fn two_groups_in_one_address_space_have_the_same_memory() {
    if !has_iommu() {
        return;
    }
    let (one, two) = (Edu::type1("UNDERPASS_EDU"), Edu::type1("UNDERPASS_EDU2"));
    let ioas = Type1::open().unwrap().alloc_ioas().unwrap();
    let memory = region(1, PageSize::Size4K);
    let first = ioas.attach(&one, None).unwrap();
    let mapping = ioas.map(&memory, Access::READ_WRITE).unwrap();
    let _second = ioas.attach(&two, None).unwrap();
    let at = |offset| mapping.iova().wrapping_add(offset);
    set(&memory, 0, VALUE);
    one.copy(at(0), at(8));
    two.copy(at(8), at(16));
    assert_eq!((get(&memory, 8), get(&memory, 16)), (VALUE, VALUE));
    drop(first);
    one.copy(at(0), at(24));
    two.copy(at(0), at(32));
    assert_eq!((get(&memory, 24), get(&memory, 32)), (0, VALUE), "the other one stays attached");
}

#[test]
#[ignore = "needs a real kernel: ci/testbed"]
fn what_the_iommu_can_do_is_what_it_says() {
    if !has_iommu() {
        return;
    }
    let edu = Edu::type1("UNDERPASS_EDU");
    let ioas = Type1::open().unwrap().alloc_ioas().unwrap();
    let error = ioas.attach(&edu, Pasid::new(1)).unwrap_err();
    assert!(error.mend_text().is_some_and(|mend| mend.contains("iommufd")), "{error}");
    let attachment = ioas.attach(&edu, None).unwrap();
    let capabilities = attachment.capabilities();
    assert_eq!(capabilities.max_pasids, 0);
    assert!(capabilities.page_sizes.contains(PageSize::Size4K));
    let usable = attachment.usable_iovas();
    let interrupts = IovaRange { first: Iova::new(0xfee0_0000), last: Iova::new(0xfeef_ffff) };
    assert!(usable.iter().all(|range| range.intersection(&interrupts).is_none()), "{usable:?}");
    let width = if row() == "vtd-39bit" { 39 } else { 48 };
    let last = usable.last().unwrap().last.get();
    assert!(
        last.ilog2() + 1 == width || row() == "virtio-iommu" || row() == "amd" || row().contains("stage"),
        "{usable:?}"
    );
}

#[test]
#[ignore = "needs a real kernel: ci/testbed"]
fn more_mappings_than_the_kernel_takes_are_refused_with_the_mend() {
    if !has_iommu() {
        return;
    }
    let limit = fs::read(ENTRY_LIMIT).unwrap();
    fs::write(ENTRY_LIMIT, "3").unwrap();
    let edu = Edu::type1("UNDERPASS_EDU2");
    fs::write(ENTRY_LIMIT, limit).unwrap();
    let ioas = Type1::open().unwrap().alloc_ioas().unwrap();
    let _attachment = ioas.attach(&edu, None).unwrap();
    let region = region(1, PageSize::Size4K);
    let mut mappings: Vec<_> = (0..3).map(|_| ioas.map(&region, Access::READ).unwrap()).collect();
    let error = ioas.map(&region, Access::READ).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Exhausted, "{error}");
    assert!(
        error.to_string().contains("0 are left") && error.to_string().contains("dma_entry_limit"),
        "{error}"
    );
    mappings.pop().unwrap().unmap().unwrap();
    mappings.push(ioas.map(&region, Access::READ).unwrap());
}

#[test]
#[ignore = "needs a real kernel: ci/testbed"]
fn an_iommu_that_does_not_remap_interrupts_is_explained() {
    if row() != "virtio-iommu" && row() != "amd" {
        return skip("the IOMMU remaps interrupts, or there is none");
    }
    let type1 = Type1::open().unwrap();
    fs::write(NO_INTERRUPT_CHECK, "0").unwrap();
    let refused = type1.group(group_number(&address("UNDERPASS_EDU")));
    fs::write(NO_INTERRUPT_CHECK, "1").unwrap();
    let error = refused.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Permission);
    assert!(error.mend_text().is_some_and(|mend| mend.contains("allow_unsafe_interrupts")), "{error}");
    drop(Edu::type1("UNDERPASS_EDU"));
}

/// Runs the test `as_an_ordinary_user` in a process of one, who may lock 1 MiB.
fn run_as_user(step: &str) {
    let test = std::env::current_exe().unwrap();
    let test = format!("{STEP}='{step}' {} --ignored --exact as_an_ordinary_user", test.display());
    let command = format!("ulimit -l 1024; {test}");
    let output = Command::new("su").args(["-s", "/bin/sh", "user", "-c", &command]).output().unwrap();
    assert!(output.status.success(), "{step}: {}", String::from_utf8_lossy(&output.stdout));
}

const STEP: &str = "UNDERPASS_GROUPS_STEP";

#[test]
#[ignore = "needs a real kernel: ci/testbed"]
fn an_ordinary_user_needs_the_group_and_enough_memlock() {
    if !has_iommu() {
        return;
    }
    let path = format!("/dev/vfio/{}", group_number(&address("UNDERPASS_EDU")));
    run_as_user("may not");
    std::os::unix::fs::chown(&path, Some(1000), None).unwrap();
    run_as_user("may");
    std::os::unix::fs::chown(&path, Some(0), None).unwrap();
}

/// What the test above has done in another process.
#[test]
#[ignore = "needs a real kernel: ci/testbed"]
fn as_an_ordinary_user() {
    let Ok(step) = std::env::var(STEP) else { return };
    let number = group_number(&address("UNDERPASS_EDU"));
    if step == "may not" {
        let error = Type1::open().unwrap().group(number).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Permission);
        let mend = format!("run: sudo chown $USER /dev/vfio/{number}");
        assert_eq!(error.mend_text(), Some(&*mend), "{error}");
        return;
    }
    let edu = Edu::type1("UNDERPASS_EDU");
    let ioas = Type1::open().unwrap().alloc_ioas().unwrap();
    let _attachment = ioas.attach(&edu, None).unwrap();
    let (small, large) = (region(128, PageSize::Size4K), region(200, PageSize::Size4K));
    let _mapping = ioas.map(&small, Access::READ_WRITE).unwrap();
    let error = ioas.map(&large, Access::READ_WRITE).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NoMemory, "{error}");
    assert!(error.mend_text().is_some_and(|mend| mend.contains("run `ulimit -l 1312`")), "{error}");
    drop(ioas.map(&small, Access::READ_WRITE).unwrap());
}

fn unprotected() -> underpass_iommu::Result<Noiommu> {
    // SAFETY: the devices are edu devices of a virtual machine, told to reach this file's own regions alone.
    Noiommu::open(unsafe { UnprotectedDma::new() })
}

#[test]
#[ignore = "needs a real kernel: ci/testbed"]
fn without_an_iommu_pages_are_where_the_kernel_says() {
    if row() != "noiommu" {
        let error = unprotected().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        assert!(error.mend_text().is_some_and(|mend| mend.contains("enable_unsafe_noiommu_mode")), "{error}");
        return;
    }
    let (noiommu, address) = (unprotected().unwrap(), address("UNDERPASS_EDU"));
    let edu = Edu::open(noiommu.group(group_number(&address)).unwrap(), address);
    let ioas = noiommu.alloc_ioas().unwrap();
    assert_eq!(ioas.attach(&edu, Pasid::new(1)).unwrap_err().kind(), ErrorKind::Exhausted);
    let _attachment = ioas.attach(&edu, None).unwrap();
    assert_eq!(noiommu.alloc_ioas().unwrap().attach(&edu, None).unwrap_err().kind(), ErrorKind::Busy);

    // Short ones have huge pages now.
    let memory = Region::builder(4096).build().unwrap();
    assert_eq!(memory.page_size(), PageSize::Size2M);
    let memory = region(5, PageSize::Size2M);
    let mapping = ioas.map(&memory, Access::READ_WRITE).unwrap();
    let pages = mapping.pages().unwrap();
    assert_eq!(pages.len(), 5);
    let size = PageSize::Size2M.bytes();
    let at = |offset: u64| pages[(offset / size) as usize].wrapping_add(offset % size);
    set(&memory, size - 8, VALUE);
    edu.copy(at(size - 8), at(4 * size + 8));
    edu.copy(at(4 * size + 8), at(3 * size));
    assert_eq!((get(&memory, 4 * size + 8), get(&memory, 3 * size)), (VALUE, VALUE));
    mapping.unmap().unwrap();

    let error = ioas.map(&region(1, PageSize::Size4K), Access::READ).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
}
