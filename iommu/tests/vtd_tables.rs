//! What the backend maps is what the device's own table says: VT-d's tables, as the kernel shows them in debugfs, against
//! what `/proc/self/pagemap` says of this process's memory. Runs in those rows of ci/testbed that have VT-d.
//!
//! Sources: `Documentation/ABI/testing/debugfs-intel-iommu` and `Documentation/admin-guide/mm/pagemap.rst` of Linux 7.3;
//! Intel Virtualization Technology for Directed I/O, revision 4.1, section 9.8 (second-stage paging entries) and 9.7
//! (first-stage ones): in both, bit 1 lets a device write, and bits 51 to 12 are the address.
#![allow(clippy::unwrap_used, reason = "tests: an Err is the failure")]

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use underpass_iommu::iommufd::{Device, Iommufd};
use underpass_iommu::{Access, Attachable, AttachableKind, Ioas, IommuBackend, Iova, PageSize, Region};

const PAGE: u64 = 4096;

/// There is one device, and one who uses it.
static ALONE: Mutex<()> = Mutex::new(());

/// A PCI device behind VT-d, bound to vfio-pci by the testbed, and here to an iommufd.
struct Subject {
    backend: Iommufd,
    device: Arc<dyn Device>,
    address: String,
}

impl Attachable for Subject {
    fn name(&self) -> &str {
        &self.address
    }

    fn kind(&self) -> AttachableKind<'_> {
        AttachableKind::Iommufd(&self.device)
    }
}

impl Subject {
    /// QEMU's teaching device.
    fn new() -> Self {
        let address = std::env::var("UNDERPASS_EDU").unwrap();
        let sysfs = PathBuf::from("/sys/bus/pci/devices").join(&address);
        let name = fs::read_dir(sysfs.join("vfio-dev")).unwrap().next().unwrap().unwrap().file_name();
        let cdev = PathBuf::from("/dev/vfio/devices").join(name);
        let cdev = File::options().read(true).write(true).open(cdev).unwrap();
        let backend = Iommufd::open().unwrap();
        let device = backend.bind(cdev.into(), &address, None).unwrap();
        Self { backend, device, address }
    }

    /// The device's own table: what each page of IOVA is translated to, and whether it may be written.
    fn table(&self) -> BTreeMap<u64, (u64, bool)> {
        let path = format!("/sys/kernel/debug/iommu/intel/{}/domain_translation_struct", self.address);
        let text = fs::read_to_string(path).unwrap();
        let hex = |word: &str| u64::from_str_radix(word.trim().strip_prefix("0x").unwrap(), 16).unwrap();
        let mut pages = BTreeMap::new();
        for (number, entries) in text.lines().filter_map(|line| line.split_once('|')) {
            // Levels 5, 4 and 3 are always shown, and below that as far as the walk went; the last is the leaf.
            let entries: Vec<_> = entries.split_whitespace().map(hex).collect();
            let covered = match entries.len() {
                3 => 1 << 30,
                4 => 2 << 20,
                5 => PAGE,
                other => panic!("{other} levels: {entries:x?}"),
            };
            let leaf = entries[entries.len() - 1];
            let physical = leaf & 0x000f_ffff_ffff_f000 & !(covered - 1);
            for offset in (0..covered).step_by(PAGE as usize) {
                pages.insert(hex(number) * PAGE + offset, (physical + offset, leaf & 2 != 0));
            }
        }
        pages
    }
}

fn with_device(test: impl FnOnce(&Subject)) {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    test(&Subject::new());
}

/// The physical address of each page of the region.
fn physical(region: &Region) -> Vec<u64> {
    const PRESENT: u64 = 1 << 63;
    const FRAME: u64 = (1 << 55) - 1;
    let pagemap = File::open("/proc/self/pagemap").unwrap();
    let first = region.as_ptr().addr().get() as u64 / PAGE;
    (first..first + region.len() / PAGE)
        .map(|page| {
            let mut entry = [0; 8];
            pagemap.read_exact_at(&mut entry, page * 8).unwrap();
            let entry = u64::from_ne_bytes(entry);
            assert!(entry & PRESENT != 0 && entry & FRAME != 0, "{entry:#x}: is this root?");
            (entry & FRAME) * PAGE
        })
        .collect()
}

/// What the table has to say of the region at `iova`.
fn expected(iova: Iova, region: &Region, access: Access) -> impl Iterator<Item = (u64, (u64, bool))> {
    let pages = physical(region).into_iter().zip((iova.get()..).step_by(PAGE as usize));
    pages.map(move |(physical, iova)| (iova, (physical, access.allows(Access::WRITE))))
}

fn build(len: u64, page_size: PageSize) -> Arc<Region> {
    Region::builder(len).page_size(page_size).build().unwrap()
}

/// All of the table, so that nothing else is in it either.
#[test]
#[ignore = "needs a real kernel: ci/testbed"]
fn the_table_of_the_device_holds_what_is_mapped_and_nothing_else() {
    with_device(|subject| {
        let ioas: Ioas = subject.backend.alloc_ioas().unwrap();
        let attachment = ioas.attach(subject, None).unwrap();
        assert_eq!(subject.table(), BTreeMap::new(), "an empty space");
        let plan = [
            (build(PAGE, PageSize::Size4K), Access::READ_WRITE),
            (build(700 * PAGE, PageSize::Size4K), Access::READ),
            (build(4 << 20, PageSize::Size2M), Access::READ_WRITE),
            (build(2 << 20, PageSize::Size2M), Access::READ),
            (build(513 * PAGE, PageSize::Size4K), Access::READ_WRITE),
        ];
        let mut mappings = Vec::new();
        let mut all = BTreeMap::new();
        for (region, access) in &plan {
            let mapping = ioas.map(region, *access).unwrap();
            all.extend(expected(mapping.iova(), region, *access));
            mappings.push(mapping);
            assert_eq!(subject.table(), all);
        }
        for gone in [1, 2, 0, 0, 0] {
            let mapping = mappings.remove(gone);
            for (page, _) in expected(mapping.iova(), mapping.region(), mapping.access()) {
                all.remove(&page);
            }
            mapping.unmap().unwrap();
            assert_eq!(subject.table(), all);
        }
        drop(attachment);
    });
}

#[test]
#[ignore = "needs a real kernel: ci/testbed"]
fn what_a_device_is_attached_to_is_what_its_table_holds() {
    with_device(|subject| {
        let spaces = [(); 2].map(|()| subject.backend.alloc_ioas().unwrap());
        let mut attachment = spaces[0].attach(subject, None).unwrap();
        let region = build(2 << 20, PageSize::Size2M);
        let first = spaces[0].map(&region, Access::READ_WRITE).unwrap();
        let own = build(3 * PAGE, PageSize::Size4K);
        let own_first = spaces[0].map(&own, Access::READ_WRITE).unwrap();
        let table = |mappings: &[&underpass_iommu::Mapping]| {
            mappings
                .iter()
                .flat_map(|mapping| expected(mapping.iova(), mapping.region(), mapping.access()))
                .collect::<BTreeMap<_, _>>()
        };
        assert_eq!(subject.table(), table(&[&first, &own_first]));
        // The same region in another space, where the device goes next.
        drop(attachment);
        let second = spaces[1].map(&region, Access::READ).unwrap();
        attachment = spaces[1].attach(subject, None).unwrap();
        assert_eq!(subject.table(), table(&[&second]));
        drop(attachment);
        let left = subject.table();
        let mapped = table(&[&first, &own_first, &second]);
        assert!(mapped.iter().all(|(page, to)| left.get(page) != Some(to)), "a detached device reaches it");
    });
}
