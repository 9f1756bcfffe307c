//! The software IOMMU, in each of its ways, keeps to what every backend does.
#![allow(clippy::unwrap_used, reason = "tests: an Err is the failure")]

mod conformance;

use std::sync::Arc;

use conformance::Subject;
use underpass_iommu::soft::{SoftDevice, SoftIommu, SoftOptions};
use underpass_iommu::{Attachable, Ioas, IommuBackend, Iova, PageSize, PageSizes, Pasid};

struct Soft {
    iommu: SoftIommu,
    device: Arc<SoftDevice>,
    options: SoftOptions,
}

impl Subject for Soft {
    fn backend(&self) -> &dyn IommuBackend {
        &self.iommu
    }

    fn device(&self) -> &dyn Attachable {
        &self.device
    }

    fn read(&self, _: &Ioas, pasid: Option<Pasid>, iova: Iova) -> Option<u8> {
        let mut byte = [0];
        self.device.bus().read(pasid, iova, &mut byte).is_ok().then_some(byte[0])
    }

    fn write(&self, pasid: Option<Pasid>, iova: Iova, byte: u8) {
        // The suite looks at the memory.
        let _ = self.device.bus().write(pasid, iova, &[byte]);
    }

    fn pasids(&self) -> u32 {
        self.options.max_pasids
    }

    fn checks_leases(&self) -> bool {
        self.options.check_leases
    }
}

fn ways() -> [(&'static str, SoftOptions); 6] {
    let small = PageSizes(PageSize::Size4K.bytes());
    let plain = SoftOptions::default;
    [
        ("as it comes", plain()),
        ("39 bits wide", SoftOptions { address_width: 39, ..plain() }),
        ("without PASIDs", SoftOptions { max_pasids: 0, ..plain() }),
        ("with three PASIDs", SoftOptions { max_pasids: 3, ..plain() }),
        ("pages of 4 KiB", SoftOptions { page_sizes: small, ..plain() }),
        ("check=leases", SoftOptions { check_leases: true, ..plain() }),
    ]
}

#[allow(clippy::print_stdout, reason = "tells which way a failure is of")]
fn each_way(test: fn(&dyn Subject)) {
    for (name, options) in ways() {
        println!("{name}");
        let iommu = SoftIommu::new(options.clone());
        let device = iommu.device("soft:conformance");
        test(&Soft { iommu, device, options });
    }
}

conformance::tests!(each_way);
