//! What every backend keeps to, at the level of its traits: one suite over [`BACKENDS`]. A new backend is one more
//! entry there.
#![allow(clippy::unwrap_used, reason = "tests: an Err is the failure")]

use std::sync::Arc;

use underpass_iommu::soft::{SoftIommu, SoftOptions};
use underpass_iommu::{
    Access, Attachable, ErrorKind, Ioas, IommuBackend, Iova, IovaRange, PageSize, PageSizes, Pasid, Region,
};

/// A backend with a device behind it, and the device's own way to memory.
struct Subject {
    backend: Box<dyn IommuBackend>,
    device: Box<dyn Attachable>,
    /// Has the device read a byte; `None` if that is refused.
    read: Box<dyn Fn(Option<Pasid>, Iova) -> Option<u8>>,
    /// Has the device write a byte; false if that is refused.
    write: Box<dyn Fn(Option<Pasid>, Iova, u8) -> bool>,
    /// PASIDs that the backend is to report.
    pasids: u32,
    /// Device accesses need a lease of what they touch.
    checks_leases: bool,
}

type Make = fn() -> Subject;

/// How each backend is made, in each of its ways.
const BACKENDS: [(&str, Make); 6] = [
    ("soft", || soft(SoftOptions::default())),
    ("soft, 39 bits wide", || soft(SoftOptions { address_width: 39, ..SoftOptions::default() })),
    ("soft, without PASIDs", || soft(SoftOptions { max_pasids: 0, ..SoftOptions::default() })),
    ("soft, with three PASIDs", || soft(SoftOptions { max_pasids: 3, ..SoftOptions::default() })),
    ("soft, pages of 4 KiB", || {
        soft(SoftOptions { page_sizes: PageSizes(PageSize::Size4K.bytes()), ..SoftOptions::default() })
    }),
    ("soft, check=leases", || soft(SoftOptions { check_leases: true, ..SoftOptions::default() })),
];

fn soft(options: SoftOptions) -> Subject {
    let (pasids, checks_leases) = (options.max_pasids, options.check_leases);
    let iommu = SoftIommu::new(options);
    let device = iommu.device("soft:conformance");
    let (reader, writer) = (Arc::clone(&device), Arc::clone(&device));
    Subject {
        backend: Box::new(iommu),
        device: Box::new(device),
        read: Box::new(move |pasid, iova| {
            let mut byte = [0];
            reader.bus().read(pasid, iova, &mut byte).is_ok().then_some(byte[0])
        }),
        write: Box::new(move |pasid, iova, byte| writer.bus().write(pasid, iova, &[byte]).is_ok()),
        pasids,
        checks_leases,
    }
}

impl Subject {
    /// What to attach first: a PASID where there are any.
    fn first(&self) -> Option<Pasid> {
        (self.pasids != 0).then(|| pasid(1))
    }

    fn ioas(&self) -> Ioas {
        self.backend.alloc_ioas().unwrap()
    }
}

fn for_each(test: impl Fn(&Subject)) {
    for (name, make) in BACKENDS {
        show(name);
        test(&make());
    }
}

/// Shown by the test harness only if an assertion fails.
#[allow(clippy::print_stdout, reason = "tells which backend a failure is of")]
fn show(name: &str) {
    println!("{name}");
}

fn pasid(number: u32) -> Pasid {
    Pasid::new(number).unwrap()
}

fn region(pages: u64) -> Arc<Region> {
    Region::builder(pages * PageSize::Size4K.bytes()).page_size(PageSize::Size4K).build().unwrap()
}

fn end(region: &Region) -> u64 {
    region.len() - 1
}

/// Lets the device have what is mapped, where that has to be said.
fn lease(ioas: &Ioas, iova: Iova, len: u64) {
    if let Some(leases) = ioas.leases() {
        leases.grant(iova, len, Access::READ_WRITE);
    }
}

#[test]
fn what_is_attached_is_busy_until_it_is_detached() {
    for_each(|subject| {
        let (one, other) = (subject.ioas(), subject.ioas());
        let first = subject.first();
        let attachment = one.attach(&*subject.device, first).unwrap();
        assert_eq!(attachment.pasid(), first);
        assert_eq!(attachment.name(), subject.device.name());
        for ioas in [&one, &other] {
            let error = ioas.attach(&*subject.device, first).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Busy);
            assert!(error.to_string().contains(subject.device.name()), "{error}");
        }
        // The device's own address space is another place than that of a PASID.
        let own = first.map(|_| other.attach(&*subject.device, None).unwrap());
        drop((own, attachment));
        drop(other.attach(&*subject.device, first).unwrap());
    });
}

#[test]
fn capabilities_are_those_of_the_iommu() {
    for_each(|subject| {
        let ioas = subject.ioas();
        let attachment = ioas.attach(&*subject.device, subject.first()).unwrap();
        let capabilities = attachment.capabilities();
        assert_eq!(capabilities.max_pasids, subject.pasids);
        assert!(capabilities.page_sizes.contains(PageSize::Size4K), "memory always has pages of 4 KiB");
        assert_eq!(attachment.usable_iovas(), ioas.usable_iovas());
        assert_eq!(ioas.leases().is_some(), subject.checks_leases);
    });
}

#[test]
fn a_pasid_above_the_last_is_exhausted() {
    for_each(|subject| {
        let ioas = subject.ioas();
        if let Some(above) = Pasid::new(subject.pasids + 1) {
            let error = ioas.attach(&*subject.device, Some(above)).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Exhausted);
        }
        if let Some(last) = Pasid::new(subject.pasids) {
            drop(ioas.attach(&*subject.device, Some(last)).unwrap());
        }
    });
}

#[test]
fn usable_ranges_are_in_order_and_no_mapping_leaves_them() {
    for_each(|subject| {
        let ioas = subject.ioas();
        let _attachment = ioas.attach(&*subject.device, subject.first()).unwrap();
        let usable = ioas.usable_iovas();
        assert!(!usable.is_empty() && usable.iter().all(|range| range.first <= range.last));
        assert!(usable.windows(2).all(|pair| pair[0].last < pair[1].first), "{usable:?}");
        let mappings: Vec<_> =
            (1..40).map(|pages| ioas.map(&region(pages), Access::READ_WRITE).unwrap()).collect();
        let mut taken: Vec<_> = mappings
            .iter()
            .map(|mapping| IovaRange::sized(mapping.iova(), mapping.region().len()).unwrap())
            .collect();
        for range in &taken {
            assert!(range.first.get() % PageSize::Size4K.bytes() == 0 && range.first.get() != 0);
            assert!(usable.iter().any(|whole| whole.contains(range)), "{range} is not in {usable:?}");
        }
        taken.sort_by_key(|range| range.first);
        assert!(taken.windows(2).all(|pair| pair[0].last < pair[1].first), "{taken:?} overlap");
    });
}

/// Beneath the shared part, a backend unmaps what was mapped and nothing else.
#[test]
fn maps_and_unmaps_are_exact() {
    for_each(|subject| {
        let (first, ioas) = (subject.first(), subject.ioas());
        let _attachment = ioas.attach(&*subject.device, first).unwrap();
        let (one, other) = (region(3), region(2));
        let mapping = ioas.map(&one, Access::READ_WRITE).unwrap();
        let neighbour = ioas.map(&other, Access::READ_WRITE).unwrap();
        let (start, last) = (mapping.iova(), mapping.iova().wrapping_add(end(&one)));
        lease(&ioas, start, one.len());
        lease(&ioas, neighbour.iova(), other.len());
        for iova in [start, last] {
            assert!((subject.write)(first, iova, 0x5a));
            assert_eq!((subject.read)(first, iova), Some(0x5a));
        }
        let before = Iova::new(start.get() - 1);
        let is_neighbour = IovaRange::sized(neighbour.iova(), other.len()).unwrap();
        let is_neighbour = |iova| is_neighbour.contains(&IovaRange { first: iova, last: iova });
        for iova in [before, last.wrapping_add(1)] {
            assert!(is_neighbour(iova) || (subject.read)(first, iova).is_none(), "{iova}");
        }
        mapping.unmap().unwrap();
        lease(&ioas, start, one.len());
        for iova in [start, last] {
            assert!(!(subject.write)(first, iova, 1) && (subject.read)(first, iova).is_none());
        }
        assert!((subject.write)(first, neighbour.iova(), 7), "its neighbour stays");
        // The addresses are free again, also where memory is mapped and unmapped often.
        for _ in 0..50 {
            assert_eq!(ioas.map(&one, Access::READ).unwrap().iova(), start);
        }
    });
}

#[test]
fn what_may_only_be_read_is_not_written() {
    for_each(|subject| {
        let (first, ioas) = (subject.first(), subject.ioas());
        let _attachment = ioas.attach(&*subject.device, first).unwrap();
        let mapping = ioas.map(&region(1), Access::READ).unwrap();
        lease(&ioas, mapping.iova(), 4096);
        assert_eq!(mapping.access(), Access::READ);
        assert_eq!((subject.read)(first, mapping.iova()), Some(0));
        assert!(!(subject.write)(first, mapping.iova(), 1));
    });
}

#[test]
fn a_region_in_two_spaces_is_the_same_memory_and_leaves_each_on_its_own() {
    for_each(|subject| {
        if subject.pasids < 2 {
            return;
        }
        let (one, two) = (subject.ioas(), subject.ioas());
        let _one = one.attach(&*subject.device, Some(pasid(1))).unwrap();
        let _two = two.attach(&*subject.device, Some(pasid(2))).unwrap();
        let region = region(1);
        let (here, there) =
            (one.map(&region, Access::READ_WRITE).unwrap(), two.map(&region, Access::READ_WRITE).unwrap());
        lease(&one, here.iova(), region.len());
        lease(&two, there.iova(), region.len());
        assert!((subject.write)(Some(pasid(1)), here.iova(), 0x42));
        assert_eq!((subject.read)(Some(pasid(2)), there.iova()), Some(0x42));
        let gone = here.iova();
        drop(here);
        assert_eq!((subject.read)(Some(pasid(1)), gone), None);
        assert_eq!((subject.read)(Some(pasid(2)), there.iova()), Some(0x42));
    });
}

#[test]
fn one_region_can_be_mapped_twice_in_a_space() {
    for_each(|subject| {
        let (first, ioas) = (subject.first(), subject.ioas());
        let _attachment = ioas.attach(&*subject.device, first).unwrap();
        let region = region(1);
        let (a, b) =
            (ioas.map(&region, Access::READ_WRITE).unwrap(), ioas.map(&region, Access::READ).unwrap());
        assert_ne!(a.iova(), b.iova());
        lease(&ioas, b.iova(), region.len());
        drop(a);
        assert_eq!((subject.read)(first, b.iova()), Some(0));
    });
}

#[test]
fn a_mapping_keeps_its_region_and_its_space() {
    for_each(|subject| {
        let (first, ioas) = (subject.first(), subject.ioas());
        let attachment = ioas.attach(&*subject.device, first).unwrap();
        let region = region(1);
        let watched = Arc::downgrade(&region);
        let mapping = ioas.map(&region, Access::READ_WRITE).unwrap();
        lease(&ioas, mapping.iova(), region.len());
        drop((region, ioas));
        assert!(watched.upgrade().is_some());
        assert!((subject.write)(first, mapping.iova(), 3));
        drop(attachment);
        assert!(!(subject.write)(first, mapping.iova(), 3), "a detached device reaches nothing");
        drop(mapping);
        assert!(watched.upgrade().is_none(), "nobody else keeps it");
    });
}

#[test]
fn memory_that_was_mapped_before_is_there_for_who_is_attached_later() {
    for_each(|subject| {
        let (first, ioas) = (subject.first(), subject.ioas());
        let mapping = ioas.map(&region(1), Access::READ_WRITE).unwrap();
        lease(&ioas, mapping.iova(), 4096);
        assert!(!(subject.write)(first, mapping.iova(), 9));
        let _attachment = ioas.attach(&*subject.device, first).unwrap();
        assert!((subject.write)(first, mapping.iova(), 9));
    });
}
