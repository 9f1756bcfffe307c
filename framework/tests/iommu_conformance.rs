//! The kernel's IOMMUs, by iommufd, type1 or none, keep to what every backend does: the suite of the IOMMU crate with QEMU's edu
//! as the device, in ci/testbed.
#![allow(clippy::unwrap_used, reason = "tests: an Err is the failure")]

#[path = "../../iommu/tests/conformance/mod.rs"]
mod conformance;
mod edu;

use std::cell::RefCell;

use conformance::Subject;
use edu::{Edu, not_here, row};
use underpass::dma::DmaBuf;
use underpass::iommu::{Attachable, Ioas, IommuBackend, PageSize};
use underpass::{Access, Iova, Pasid, Region};

struct Real {
    edu: Edu,
    /// What the device read goes here, for the CPU to see: at [`PLACE`], and around it are zeros.
    scratch: RefCell<DmaBuf>,
}

/// Inside of the scratch memory, whose neighbours the suite looks at.
const PLACE: usize = 4096;
/// In the device's buffer: where what it reads goes. Before are all bytes in order, for it to write.
const READ: u64 = 2048;
/// What no byte of the suite is.
const UNTOUCHED: u8 = 0xee;

impl Real {
    fn new() -> Self {
        let size = if row() == "noiommu" { PageSize::Size2M } else { PageSize::Size4K };
        let len = if row() == "noiommu" { size.bytes() } else { 3 * size.bytes() };
        let edu = Edu::open("UNDERPASS_EDU");
        let mut scratch = DmaBuf::new(Region::builder(len).page_size(size).build().unwrap()).unwrap();
        let ioas = edu.device.iommu().alloc_ioas().unwrap();
        let attachment = ioas.attach(&edu.device, None).unwrap();
        let mapping = ioas.map(scratch.region(), Access::READ).unwrap();
        for (byte, value) in scratch[PLACE..].iter_mut().zip(0..=u8::MAX) {
            *byte = value;
        }
        edu.fetch(mapping.iova().wrapping_add(PLACE as u64), 0, 256);
        scratch[PLACE..][..256].fill(0);
        drop((mapping, attachment));
        Self { edu, scratch: RefCell::new(scratch) }
    }
}

impl Subject for Real {
    fn backend(&self) -> &dyn IommuBackend {
        self.edu.device.iommu()
    }

    fn device(&self) -> &dyn Attachable {
        &self.edu.device
    }

    fn read(&self, ioas: &Ioas, pasid: Option<Pasid>, iova: Iova) -> Option<u8> {
        assert_eq!(pasid, None, "the device has no PASIDs");
        let mut scratch = self.scratch.borrow_mut();
        scratch[PLACE] = UNTOUCHED;
        let mapping = ioas.map(scratch.region(), Access::WRITE).unwrap();
        self.edu.fetch(iova, READ, 1);
        self.edu.store(READ, mapping.iova().wrapping_add(PLACE as u64), 1);
        drop(mapping);
        match std::mem::take(&mut scratch[PLACE]) {
            // A read that is refused gives zeros. A device that reaches nothing leaves the place alone.
            UNTOUCHED => None,
            0 if self.is_protected() => None,
            byte => Some(byte),
        }
    }

    fn write(&self, pasid: Option<Pasid>, iova: Iova, byte: u8) {
        assert_eq!(pasid, None, "the device has no PASIDs");
        self.edu.store(byte.into(), iova, 1);
    }

    fn is_protected(&self) -> bool {
        row() != "noiommu"
    }

    fn leave_out(&self) {
        not_here("without an IOMMU no DMA is refused");
    }
}

fn with_edu(test: fn(&dyn Subject)) {
    test(&Real::new());
}

conformance::tests!(with_edu, #[ignore = "needs a real kernel: ci/testbed"]);
