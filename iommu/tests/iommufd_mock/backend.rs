//! iommufd keeps to what every backend does, with PASIDs and without: the suite of `backend_conformance.rs`, on the mock.
//!
//! A mock device does no DMA. Here it goes by its page table, as a device would, and by the address space, which alone
//! knows what may be written.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;

use underpass_iommu::{Attachable, Ioas, IommuBackend, Iova, Pasid};

use crate::conformance::{self, Subject};
use crate::kernel::{HAS_PASIDS, LAST_PASID};
use crate::rig::{MockDevice, Rig, with_mock};

const PAGE: u64 = 4096;

struct Mocked<'a> {
    rig: &'a Rig,
    device: MockDevice,
    pasids: u32,
}

impl Mocked<'_> {
    /// Where this process has the byte that the device, or one PASID of it, finds at `iova`.
    fn find(&self, pasid: Option<Pasid>, iova: Iova) -> Option<u64> {
        let table = self.device.page_table(pasid)?;
        let offset = iova.get() % PAGE;
        let page = Iova::new(iova.get() - offset);
        let is_there = |address: &u64| self.rig.kernel.maps_address(table, page, *address);
        memory_of_regions().find(is_there).map(|address| address + offset)
    }

    /// The address space whose mappings the device, or one PASID of it, has.
    fn space(&self, pasid: Option<Pasid>) -> u32 {
        self.rig.ioas_of(self.device.page_table(pasid).unwrap())
    }
}

/// The address of each page of a region's.
fn memory_of_regions() -> impl Iterator<Item = u64> {
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    let ranges: Vec<_> = maps.lines().filter(|line| line.contains("/memfd:underpass")).map(range).collect();
    ranges.into_iter().flat_map(|(start, end)| (start..end).step_by(PAGE as usize))
}

/// `START-END ...`, both in hexadecimal digits.
fn range(line: &str) -> (u64, u64) {
    let (start, rest) = line.split_once('-').unwrap();
    let end = rest.split(' ').next().unwrap();
    (u64::from_str_radix(start, 16).unwrap(), u64::from_str_radix(end, 16).unwrap())
}

/// A byte of this process's memory, as the CPU sees it.
fn look(address: u64) -> u8 {
    let mut byte = [0];
    File::open("/proc/self/mem").unwrap().read_exact_at(&mut byte, address).unwrap();
    byte[0]
}

impl Subject for Mocked<'_> {
    fn backend(&self) -> &dyn IommuBackend {
        &self.rig.backend
    }

    fn device(&self) -> &dyn Attachable {
        &self.device
    }

    fn read(&self, _: &Ioas, pasid: Option<Pasid>, iova: Iova) -> Option<u8> {
        let address = self.find(pasid, iova)?;
        let byte = self.rig.kernel.read(self.space(pasid), iova).ok()?;
        assert_eq!(byte, look(address), "page table and address space do not agree");
        Some(byte)
    }

    fn write(&self, pasid: Option<Pasid>, iova: Iova, byte: u8) {
        let Some(address) = self.find(pasid, iova) else { return };
        if self.rig.kernel.write(self.space(pasid), iova, byte).is_ok() {
            assert_eq!(byte, look(address), "page table and address space do not agree");
        }
    }

    fn pasids(&self) -> u32 {
        self.pasids
    }

    /// The mock's addresses end below those that regions prefer, which a space knows once the device was attached.
    fn ioas(&self) -> Ioas {
        let ioas = self.rig.ioas();
        drop(ioas.attach(&self.device, None).unwrap());
        ioas
    }
}

fn on_mocks(test: fn(&dyn Subject)) {
    for (flags, pasids) in [(0, 0), (HAS_PASIDS, LAST_PASID)] {
        with_mock(|rig| test(&Mocked { rig, device: rig.device(flags), pasids }));
    }
}

conformance::tests!(on_mocks, #[ignore = "needs a real kernel: ci/testbed"]);
