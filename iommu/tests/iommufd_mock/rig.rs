//! What each test starts from: an iommufd of its own, mock devices behind it, and the certainty that nothing is left
//! in the kernel afterwards.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use underpass_iommu::iommufd::{Device, Iommufd, Options};
use underpass_iommu::{
    Access, Attachable, AttachableKind, Backing, Error, ErrorKind, Ioas, IommuBackend, Iova, Mapping,
    PageSize, Pasid, Region, Result,
};

use crate::kernel::{self, Ids, Iommu};

/// Tests count this process's pinned memory and change settings of the whole kernel.
static ALONE: Mutex<()> = Mutex::new(());

/// Ids that the kernel gives to objects; it takes the lowest that is free.
const ALL_IDS: std::ops::Range<u32> = 1..400;

/// What a test runs with.
#[derive(Debug)]
pub(crate) struct Rig {
    pub(crate) backend: Iommufd,
    pub(crate) kernel: Iommu,
    /// A page to find out with what is mapped where.
    probe: Arc<Region>,
}

/// Runs a test, and sees that nothing is left of it: no object of the iommufd, no pinned page.
pub(crate) fn with_mock(test: impl FnOnce(&Rig)) {
    with_options(Options::default(), test);
}

/// As [`with_mock`], with options of the backend.
pub(crate) fn with_options(options: Options, test: impl FnOnce(&Rig)) {
    alone(options, |rig| {
        test(rig);
        rig.check_that_nothing_is_left();
    });
}

/// As [`with_mock`], but objects of the iommufd may be left, until it is closed.
pub(crate) fn with_leftovers(test: impl FnOnce(&Rig)) {
    alone(Options::default(), test);
}

fn alone(options: Options, test: impl FnOnce(&Rig)) {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let pinned = pinned_bytes();
    test(&Rig::new(options));
    assert_eq!(pinned_bytes(), pinned, "bytes stay pinned");
}

impl Rig {
    fn new(options: Options) -> Self {
        let backend = Iommufd::with(options).unwrap();
        let kernel = Iommu::new(&backend);
        Self { backend, kernel, probe: small(1) }
    }

    pub(crate) fn ioas(&self) -> Ioas {
        self.backend.alloc_ioas().unwrap()
    }

    /// A device behind the mock, of the kind that `flags` say.
    pub(crate) fn device(&self, flags: u32) -> MockDevice {
        let mock = Arc::new(Mock::new(&self.kernel, flags));
        MockDevice { device: Arc::clone(&mock) as Arc<dyn Device>, mock }
    }

    /// All IOASes that there are, by their ids.
    pub(crate) fn ioas_ids(&self) -> Vec<u32> {
        ALL_IDS.filter(|&id| self.kernel.is_ioas(id)).collect()
    }

    /// The id of the IOAS that `make` allocates.
    pub(crate) fn ioas_with_id(&self) -> (Ioas, u32) {
        let before = self.ioas_ids();
        let ioas = self.ioas();
        let id = self.ioas_ids().into_iter().find(|id| !before.contains(id)).unwrap();
        (ioas, id)
    }

    /// The IOAS whose mappings the HWPT has. The kernel does not tell; but what is mapped in one shows up in the other.
    pub(crate) fn ioas_of(&self, page_table: u32) -> u32 {
        let has = |ioas: u32| {
            let Ok(iova) = self.kernel.map(ioas, &self.probe) else { return false };
            let found = self.kernel.maps(page_table, iova, self.probe.as_ptr(), PageSize::Size4K.bytes());
            self.kernel.unmap(ioas, iova, self.probe.len()).unwrap();
            found
        };
        self.ioas_ids().into_iter().find(|&ioas| has(ioas)).unwrap()
    }

    /// Whether the HWPT translates each page of the mapping to the region's.
    pub(crate) fn maps(&self, page_table: u32, mapping: &Mapping) -> bool {
        self.maps_at(page_table, mapping.iova(), mapping.region())
    }

    /// Whether the HWPT translates all pages from `iova` on to those of the region.
    pub(crate) fn maps_at(&self, page_table: u32, iova: Iova, region: &Region) -> bool {
        self.kernel.maps(page_table, iova, region.as_ptr(), region.len())
    }

    /// Whether the HWPT translates any page from `iova` on to the one that the region has there.
    pub(crate) fn maps_any_at(&self, page_table: u32, iova: Iova, region: &Region) -> bool {
        let page = PageSize::Size4K.bytes();
        (0..region.len()).step_by(page as usize).any(|offset| {
            // Within the region, and not followed.
            let memory = region.as_ptr().map_addr(|start| start.saturating_add(offset as usize));
            self.kernel.maps(page_table, iova.wrapping_add(offset), memory, page)
        })
    }

    /// Destroying by id finds out whether there is such an object, of whatever type. The backend keeps one space for
    /// itself, where read-only regions are pinned.
    fn check_that_nothing_is_left(&self) {
        let mut spaces = 0;
        for id in ALL_IDS {
            let is_space = self.kernel.is_ioas(id);
            match self.kernel.destroy(id) {
                Ok(()) => {
                    assert!(is_space, "object {id} is left in the iommufd");
                    spaces += 1;
                }
                Err(error) => assert_eq!(
                    error.raw_os_error(),
                    Some(libc::ENOENT),
                    "object {id} is left in the iommufd, and in use: {error}"
                ),
            }
        }
        assert!(spaces <= 1, "{spaces} address spaces are left");
    }
}

/// A region of pages of 4 KiB.
pub(crate) fn small(pages: u64) -> Arc<Region> {
    Region::builder(pages * PageSize::Size4K.bytes()).page_size(PageSize::Size4K).build().unwrap()
}

/// A region of pages of 2 MiB.
pub(crate) fn huge(pages: u64) -> Arc<Region> {
    Region::builder(pages * PageSize::Size2M.bytes()).page_size(PageSize::Size2M).build().unwrap()
}

/// A region of pages of 2 MiB that no file has: the kernel is told its address instead.
pub(crate) fn anonymous(pages: u64) -> Arc<Region> {
    Region::builder(pages * PageSize::Size2M.bytes()).backing(Backing::AnonymousHuge).build().unwrap()
}

pub(crate) fn pasid(number: u32) -> Pasid {
    Pasid::new(number).unwrap()
}

/// Maps the region for reading and writing.
pub(crate) fn map(ioas: &Ioas, region: &Arc<Region>) -> Mapping {
    ioas.map(region, Access::READ_WRITE).unwrap()
}

/// What the kernel has pinned of this process's memory for devices.
pub(crate) fn pinned_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmPin:")).unwrap();
    line.trim().strip_suffix(" kB").unwrap().parse::<u64>().unwrap() * 1024
}

/// A device of the mock as the backend takes it.
#[derive(Debug)]
pub(crate) struct MockDevice {
    device: Arc<dyn Device>,
    mock: Arc<Mock>,
}

impl MockDevice {
    pub(crate) fn ids(&self) -> Ids {
        self.mock.ids
    }

    /// The HWPT that the backend has attached the device to, or one PASID of it; `None` if it has not.
    pub(crate) fn page_table(&self, pasid: Option<Pasid>) -> Option<u32> {
        self.mock.attached().get(&pasid).copied()
    }

    /// From now on the device can not be detached.
    pub(crate) fn hold(&self, hold: bool) {
        *self.mock.held.lock().unwrap() = hold;
    }
}

impl Attachable for MockDevice {
    fn name(&self) -> &str {
        self.device.name()
    }

    fn kind(&self) -> AttachableKind<'_> {
        AttachableKind::Iommufd(&self.device)
    }
}

/// Plays VFIO's part, whose character devices are attached and detached by ioctls of theirs.
///
/// The mock has no state in between: a mock device is born attached, and can only be moved. So it has a place of its
/// own to be while it is not attached: an address space with nothing in it.
#[derive(Debug)]
struct Mock {
    kernel: Iommu,
    name: String,
    ids: Ids,
    parked_in: u32,
    parked_at: u32,
    attached: Mutex<BTreeMap<Option<Pasid>, u32>>,
    held: Mutex<bool>,
}

impl Mock {
    fn new(kernel: &Iommu, flags: u32) -> Self {
        // A device whose PASIDs are used needs to be at a HWPT that allows for it.
        const ALLOC_PASID: u32 = iommufd_bindings::iommufd_hwpt_alloc_flags_IOMMU_HWPT_ALLOC_PASID;
        let hwpt_flags = if flags & kernel::HAS_PASIDS == 0 { 0 } else { ALLOC_PASID };
        let parked_in = kernel.alloc_ioas().unwrap();
        let ids = kernel.make_device(parked_in, flags).unwrap();
        let parked_at = kernel.alloc_page_table(ids, parked_in, hwpt_flags).unwrap();
        assert_eq!(kernel.replace(ids, parked_at).unwrap(), parked_at);
        Self {
            kernel: kernel.clone(),
            name: format!("mock{}", ids.device),
            ids,
            parked_in,
            parked_at,
            attached: Mutex::default(),
            held: Mutex::default(),
        }
    }

    fn attached(&self) -> MutexGuard<'_, BTreeMap<Option<Pasid>, u32>> {
        self.attached.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Device for Mock {
    fn name(&self) -> &str {
        &self.name
    }

    fn id(&self) -> u32 {
        self.ids.device
    }

    fn iommufd(&self) -> &Iommufd {
        self.kernel.iommufd()
    }

    fn attach(&self, page_table: u32, pasid: Option<Pasid>) -> Result<u32> {
        let mut attached = self.attached();
        let result = match pasid {
            None => self.kernel.replace(self.ids, page_table),
            // As VFIO does: it moves what is attached already.
            Some(pasid) if attached.contains_key(&Some(pasid)) => {
                self.kernel.replace_pasid(self.ids, pasid.get(), page_table)
            }
            Some(pasid) => self.kernel.attach_pasid(self.ids, pasid.get(), page_table),
        };
        let chosen = result.map_err(|error| Error::os("attach the mock", "the kernel refuses", error))?;
        attached.insert(pasid, chosen);
        Ok(chosen)
    }

    fn detach(&self, pasid: Option<Pasid>) -> Result<()> {
        if *self.held.lock().unwrap() {
            return Err(Error::new(ErrorKind::Os, "detach the mock", "it is held"));
        }
        let mut attached = self.attached();
        assert!(attached.contains_key(&pasid), "{pasid:?} is detached, but was not attached");
        match pasid {
            None => self.kernel.replace(self.ids, self.parked_at).map(drop),
            Some(pasid) => self.kernel.detach_pasid(self.ids, pasid.get()),
        }
        .map_err(|error| Error::os("detach the mock", "the kernel refuses", error))?;
        attached.remove(&pasid);
        Ok(())
    }
}

impl Drop for Mock {
    fn drop(&mut self) {
        for id in [self.ids.mock, self.parked_at, self.parked_in] {
            match self.kernel.destroy(id) {
                Ok(()) => {}
                // Closing the iommufd does it, too.
                Err(_) if std::thread::panicking() => {}
                Err(error) => panic!("{}: object {id} stays: {error}", self.name),
            }
        }
    }
}

/// The checks of this suite can fail: without a backend, by the kernel's own doing.
#[test]
#[ignore = "needs a real kernel: ci/testbed"]
fn what_is_looked_at_is_what_is_there() {
    with_mock(|rig| {
        let device = rig.device(kernel::HAS_PASIDS);
        let ioas = rig.kernel.alloc_ioas().unwrap();
        let table = rig.kernel.alloc_page_table(device.ids(), ioas, 0).unwrap();
        let (region, other, before) = (small(3), small(3), pinned_bytes());
        let iova = rig.kernel.map(ioas, &region).unwrap();
        assert!(rig.maps_at(table, iova, &region) && rig.maps_any_at(table, iova, &region));
        assert!(!rig.maps_at(table, iova, &other) && !rig.maps_any_at(table, iova, &other));
        assert!(!rig.maps_any_at(table, iova.wrapping_add(4096), &region), "each page has its place");
        assert!(!rig.maps_any_at(device.mock.parked_at, iova, &region));
        assert!(rig.kernel.pins(&region, 1) && !rig.kernel.pins(&region, 0) && rig.kernel.pins(&other, 0));
        assert_eq!(pinned_bytes() - before, region.len());
        assert_eq!(rig.ioas_of(table), ioas);
        assert_eq!(rig.kernel.read(ioas, iova).unwrap(), 0);
        assert_eq!(rig.kernel.write(ioas, iova, 1).unwrap_err().raw_os_error(), Some(libc::EPERM));
        rig.kernel.unmap(ioas, iova, region.len()).unwrap();
        assert!(!rig.maps_any_at(table, iova, &region) && rig.kernel.pins(&region, 0));
        let left = std::panic::catch_unwind(|| rig.check_that_nothing_is_left());
        assert!(left.is_err());
        rig.kernel.destroy(table).unwrap();
        rig.kernel.destroy(ioas).unwrap();
    });
}
