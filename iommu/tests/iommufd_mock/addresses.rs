//! Addresses are those that the attached device can use, around what is reserved, and what is required of them is kept.

use underpass_iommu::iommufd::Options;
use underpass_iommu::{Access, ErrorKind, Iova, IovaRange};

use crate::kernel::APERTURE;
use crate::rig::{huge, map, pinned_bytes, small, with_mock, with_options};

const MIB: u64 = 1 << 20;

#[test]
#[ignore = "needs a real kernel: ci/testbed"]
fn a_device_that_lacks_required_addresses_is_refused() {
    let range = |first, last| IovaRange { first: Iova::new(first), last: Iova::new(last) };
    let narrow = range(*APERTURE.start(), *APERTURE.start() + 4 * MIB - 1);
    let required = |required_iovas| Options { required_iovas, ..Options::default() };
    with_options(required(vec![range(0x1000, *APERTURE.end())]), |rig| {
        let device = rig.device(0);
        let error = rig.ioas().attach(&device, None).unwrap_err();
        assert!(error.mend_text().is_some(), "{error}");
        assert_eq!(device.page_table(None), None);
    });
    with_options(required(vec![narrow]), |rig| {
        let device = rig.device(0);
        let (ioas, space) = rig.ioas_with_id();
        let refused = rig.kernel.add_reserved(space, narrow.first.get(), MIB).unwrap_err();
        assert_eq!(refused.raw_os_error(), Some(libc::EADDRINUSE), "what is required stays usable");
        let attachment = ioas.attach(&device, None).unwrap();
        assert!(attachment.usable_iovas().iter().any(|usable| usable.contains(&narrow)));
        let mapping = map(&ioas, &small(10));
        assert!(rig.maps(device.page_table(None).unwrap(), &mapping));
    });
}

#[test]
#[ignore = "needs a real kernel: ci/testbed"]
fn addresses_are_those_of_the_iommu_that_is_attached() {
    with_mock(|rig| {
        let device = rig.device(0);
        let ioas = rig.ioas();
        let attachment = ioas.attach(&device, None).unwrap();
        let whole = IovaRange { first: Iova::new(*APERTURE.start()), last: Iova::new(*APERTURE.end()) };
        assert_eq!(attachment.usable_iovas(), [whole]);
        let mappings: Vec<_> = (1..30).map(|pages| map(&ioas, &small(pages))).collect();
        let huge = map(&ioas, &huge(1));
        for mapping in mappings.iter().chain([&huge]) {
            assert!(whole.contains(&IovaRange::sized(mapping.iova(), mapping.region().len()).unwrap()));
            assert!(rig.maps(device.page_table(None).unwrap(), mapping));
        }
    });
}

#[test]
#[ignore = "needs a real kernel: ci/testbed"]
fn reserved_addresses_are_a_hole_that_nothing_is_mapped_into() {
    with_mock(|rig| {
        let device = rig.device(0);
        let (ioas, space) = rig.ioas_with_id();
        // All of the first 64 MiB but for one page, and then another hole.
        let first = *APERTURE.start();
        rig.kernel.add_reserved(space, first + 4096, 64 * MIB - 4096).unwrap();
        rig.kernel.add_reserved(space, first + 66 * MIB, MIB).unwrap();
        let attachment = ioas.attach(&device, None).unwrap();
        let range = |first, last| IovaRange { first: Iova::new(first), last: Iova::new(last) };
        let usable = [
            range(first, first + 4095),
            range(first + 64 * MIB, first + 66 * MIB - 1),
            range(first + 67 * MIB, *APERTURE.end()),
        ];
        assert_eq!(attachment.usable_iovas(), usable);
        for (region, expected) in [
            (small(2), first + 64 * MIB),
            (small(1), first),
            (huge(1), first + 68 * MIB),
            (small(510), first + 64 * MIB + 8192),
            (small(1), first + 67 * MIB),
        ]
        .iter()
        .map(|(region, expected)| (map(&ioas, region), *expected))
        .collect::<Vec<_>>()
        {
            assert_eq!(region.iova(), Iova::new(expected));
            assert!(rig.maps(device.page_table(None).unwrap(), &region));
        }
    });
}

/// Such as an MSI window that appears with a device of somebody else's.
#[test]
#[ignore = "needs a real kernel: ci/testbed"]
fn addresses_that_are_reserved_meanwhile_are_an_error_or_avoided() {
    with_mock(|rig| {
        let device = rig.device(0);
        let (ioas, space) = rig.ioas_with_id();
        let _attachment = ioas.attach(&device, None).unwrap();
        let before = pinned_bytes();
        let first = *APERTURE.start();
        rig.kernel.add_reserved(space, first, 16 * MIB).unwrap();
        match ioas.map(&small(1), Access::READ_WRITE) {
            Ok(mapping) => assert!(mapping.iova() >= Iova::new(first + 16 * MIB)),
            Err(error) => {
                assert!(error.mend_text().is_some(), "{error}");
                assert_eq!(pinned_bytes(), before);
            }
        }
    });
}

#[test]
#[ignore = "needs a real kernel: ci/testbed"]
fn a_space_that_is_full_says_so_and_goes_on() {
    with_mock(|rig| {
        let device = rig.device(0);
        let (ioas, space) = rig.ioas_with_id();
        let first = *APERTURE.start();
        let room = 4 * MIB;
        rig.kernel.add_reserved(space, first + room, *APERTURE.end() + 1 - first - room).unwrap();
        let _attachment = ioas.attach(&device, None).unwrap();
        let region = small(256);
        let mut mappings: Vec<_> = (0..room / MIB).map(|_| map(&ioas, &region)).collect();
        let error = ioas.map(&small(1), Access::READ).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Exhausted);
        drop(mappings.remove(2));
        let last = map(&ioas, &small(256));
        assert_eq!(last.iova(), Iova::new(first + 2 * MIB));
        assert!(rig.maps(device.page_table(None).unwrap(), &last));
    });
}
