//! What every backend keeps to, at the level of its traits: one suite, over a [`Subject`]. The software IOMMU has it in
//! `backend_conformance.rs`, the kernel's, with a real device, in the framework's `iommu_conformance.rs`.

use std::sync::Arc;

use underpass_iommu::{
    Access, Attachable, ErrorKind, Ioas, IommuBackend, Iova, IovaRange, PageSize, Pasid, Region,
};

/// A backend with a device behind it, and the device's own way to memory.
pub(crate) trait Subject {
    fn backend(&self) -> &dyn IommuBackend;

    fn device(&self) -> &dyn Attachable;

    /// Has the device, or one PASID of it, which is attached to `ioas`, read a byte; `None` if that is refused. No
    /// byte of the suite is zero where something is refused.
    fn read(&self, ioas: &Ioas, pasid: Option<Pasid>, iova: Iova) -> Option<u8>;

    /// Has the device write a byte. It is not told whether that is refused.
    fn write(&self, pasid: Option<Pasid>, iova: Iova, byte: u8);

    /// PASIDs that the backend is to report.
    fn pasids(&self) -> u32 {
        0
    }

    /// Device accesses need a lease of what they touch.
    fn checks_leases(&self) -> bool {
        false
    }

    /// There is an IOMMU, which refuses what is not mapped.
    fn is_protected(&self) -> bool {
        true
    }

    /// A test that takes an IOMMU is left out.
    fn leave_out(&self) {}

    /// What to attach first: a PASID where there are any.
    fn first(&self) -> Option<Pasid> {
        (self.pasids() != 0).then(|| pasid(1))
    }

    fn ioas(&self) -> Ioas {
        self.backend().alloc_ioas().unwrap()
    }

    /// Memory full of [`FILL`], of `pages` pages of 4 KiB; where nothing translates, in one of 2 MiB, of zeros.
    fn region(&self, pages: u64) -> Arc<Region> {
        let len = pages * PageSize::Size4K.bytes();
        if !self.is_protected() {
            return Region::builder(len).page_size(PageSize::Size2M).build().unwrap();
        }
        let region = Region::builder(len).page_size(PageSize::Size4K).build().unwrap();
        let bytes = vec![FILL; len as usize];
        assert_eq!(rustix::io::pwrite(region.fd().unwrap(), &bytes, 0).unwrap(), bytes.len());
        region
    }

    /// Whether what the device writes at `iova` arrives at `offset` of the memory.
    fn reaches(&self, pasid: Option<Pasid>, iova: Iova, region: &Region, offset: u64, byte: u8) -> bool {
        assert_ne!(look(region, offset), byte, "nothing would change");
        self.write(pasid, iova, byte);
        look(region, offset) == byte
    }
}

/// Not zero: that is what some devices take for a read that was refused.
const FILL: u8 = 0xa5;

/// A byte of memory, as the CPU sees it.
fn look(region: &Region, offset: u64) -> u8 {
    let mut byte = [0];
    assert_eq!(rustix::io::pread(region.fd().unwrap(), &mut byte, offset).unwrap(), 1);
    byte[0]
}

pub(crate) fn pasid(number: u32) -> Pasid {
    Pasid::new(number).unwrap()
}

/// Lets the device have what is mapped, where that has to be said.
fn lease(ioas: &Ioas, iova: Iova, len: u64) {
    if let Some(leases) = ioas.leases() {
        leases.grant(iova, len, Access::READ_WRITE);
    }
}

/// The suite's tests, each run by `$run`, which hands it subjects.
macro_rules! tests {
    ($run:ident $(, #[$attribute:meta])?) => {
        $crate::conformance::tests! { @each $run [$(#[$attribute])?]
            what_is_attached_is_busy_until_it_is_detached
            capabilities_are_those_of_the_iommu
            a_pasid_above_the_last_is_exhausted
            usable_ranges_are_in_order_and_no_mapping_leaves_them
            maps_and_unmaps_are_exact
            what_may_only_be_read_is_not_written
            a_region_in_two_spaces_is_the_same_memory_and_leaves_each_on_its_own
            one_region_can_be_mapped_twice_in_a_space
            a_mapping_keeps_its_region_and_its_space
            memory_that_was_mapped_before_is_there_for_who_is_attached_later
        }
    };
    (@each $run:ident $attributes:tt $($name:ident)*) => {
        $($crate::conformance::tests! { @one $run $attributes $name })*
    };
    (@one $run:ident [$($attribute:tt)*] $name:ident) => {
        #[test]
        $($attribute)*
        fn $name() {
            $run($crate::conformance::$name);
        }
    };
}
pub(crate) use tests;

/// Where the last word of a region is. The last byte would say as much, but QEMU's virtio-iommu (11.1,
/// `virtio_iommu_translate`) looks up two bytes for each address, and takes the byte before a mapping for a part of it.
fn end(region: &Region) -> u64 {
    region.len() - WORD
}

const WORD: u64 = 8;

pub(crate) fn what_is_attached_is_busy_until_it_is_detached(subject: &dyn Subject) {
    let (one, other) = (subject.ioas(), subject.ioas());
    let first = subject.first();
    let attachment = one.attach(subject.device(), first).unwrap();
    assert_eq!(attachment.pasid(), first);
    assert_eq!(attachment.name(), subject.device().name());
    for ioas in [&one, &other] {
        let error = ioas.attach(subject.device(), first).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Busy);
        assert!(error.to_string().contains(subject.device().name()), "{error}");
    }
    // The device's own address space is another place than that of a PASID.
    let own = first.map(|_| other.attach(subject.device(), None).unwrap());
    drop((own, attachment));
    drop(other.attach(subject.device(), first).unwrap());
}

pub(crate) fn capabilities_are_those_of_the_iommu(subject: &dyn Subject) {
    let ioas = subject.ioas();
    let attachment = ioas.attach(subject.device(), subject.first()).unwrap();
    let capabilities = attachment.capabilities();
    assert_eq!(capabilities.max_pasids, subject.pasids());
    let page = subject.region(1).page_size();
    assert!(capabilities.page_sizes.contains(page), "{page:?} is not in {:?}", capabilities.page_sizes);
    assert_eq!(attachment.usable_iovas(), ioas.usable_iovas());
    assert_eq!(ioas.leases().is_some(), subject.checks_leases());
}

pub(crate) fn a_pasid_above_the_last_is_exhausted(subject: &dyn Subject) {
    let ioas = subject.ioas();
    if let Some(above) = Pasid::new(subject.pasids() + 1) {
        let error = ioas.attach(subject.device(), Some(above)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Exhausted);
    }
    if let Some(last) = Pasid::new(subject.pasids()) {
        drop(ioas.attach(subject.device(), Some(last)).unwrap());
    }
}

pub(crate) fn usable_ranges_are_in_order_and_no_mapping_leaves_them(subject: &dyn Subject) {
    if !subject.is_protected() {
        return subject.leave_out();
    }
    let ioas = subject.ioas();
    let _attachment = ioas.attach(subject.device(), subject.first()).unwrap();
    let usable = ioas.usable_iovas();
    assert!(!usable.is_empty() && usable.iter().all(|range| range.first <= range.last));
    assert!(usable.windows(2).all(|pair| pair[0].last < pair[1].first), "{usable:?}");
    let mappings: Vec<_> =
        (1..40).map(|pages| ioas.map(&subject.region(pages), Access::READ_WRITE).unwrap()).collect();
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
}

/// Beneath the shared part, a backend unmaps what was mapped and nothing else.
pub(crate) fn maps_and_unmaps_are_exact(subject: &dyn Subject) {
    if !subject.is_protected() {
        return subject.leave_out();
    }
    let (first, ioas) = (subject.first(), subject.ioas());
    let _attachment = ioas.attach(subject.device(), first).unwrap();
    let (one, other) = (subject.region(3), subject.region(2));
    let mapping = ioas.map(&one, Access::READ_WRITE).unwrap();
    let neighbour = ioas.map(&other, Access::READ_WRITE).unwrap();
    let (start, last) = (mapping.iova(), mapping.iova().wrapping_add(end(&one)));
    lease(&ioas, start, one.len());
    lease(&ioas, neighbour.iova(), other.len());
    for (iova, offset) in [(start, 0), (last, end(&one))] {
        assert!(subject.reaches(first, iova, &one, offset, 0x5a));
        assert_eq!(subject.read(&ioas, first, iova), Some(0x5a));
    }
    let before = Iova::new(start.get() - WORD);
    let is_neighbour = IovaRange::sized(neighbour.iova(), other.len()).unwrap();
    let is_neighbour = |iova| is_neighbour.contains(&IovaRange { first: iova, last: iova });
    for iova in [before, last.wrapping_add(WORD)] {
        assert!(is_neighbour(iova) || subject.read(&ioas, first, iova).is_none(), "{iova}");
    }
    mapping.unmap().unwrap();
    lease(&ioas, start, one.len());
    for (iova, offset) in [(start, 0), (last, end(&one))] {
        assert!(!subject.reaches(first, iova, &one, offset, 1));
        assert_eq!(subject.read(&ioas, first, iova), None, "{iova}");
    }
    assert!(subject.reaches(first, neighbour.iova(), &other, 0, 7), "its neighbour stays");
    // The addresses are free again, also where memory is mapped and unmapped often.
    for _ in 0..50 {
        assert_eq!(ioas.map(&one, Access::READ).unwrap().iova(), start);
    }
}

pub(crate) fn what_may_only_be_read_is_not_written(subject: &dyn Subject) {
    if !subject.is_protected() {
        return subject.leave_out();
    }
    let (first, ioas) = (subject.first(), subject.ioas());
    let _attachment = ioas.attach(subject.device(), first).unwrap();
    let region = subject.region(1);
    let mapping = ioas.map(&region, Access::READ).unwrap();
    lease(&ioas, mapping.iova(), 4096);
    assert_eq!(mapping.access(), Access::READ);
    assert_eq!(subject.read(&ioas, first, mapping.iova()), Some(FILL));
    assert!(!subject.reaches(first, mapping.iova(), &region, 0, 1));
}

pub(crate) fn a_region_in_two_spaces_is_the_same_memory_and_leaves_each_on_its_own(subject: &dyn Subject) {
    if subject.pasids() < 2 {
        return;
    }
    let (one, two) = (subject.ioas(), subject.ioas());
    let _one = one.attach(subject.device(), Some(pasid(1))).unwrap();
    let _two = two.attach(subject.device(), Some(pasid(2))).unwrap();
    let region = subject.region(1);
    let (here, there) =
        (one.map(&region, Access::READ_WRITE).unwrap(), two.map(&region, Access::READ_WRITE).unwrap());
    lease(&one, here.iova(), region.len());
    lease(&two, there.iova(), region.len());
    assert!(subject.reaches(Some(pasid(1)), here.iova(), &region, 0, 0x42));
    assert_eq!(subject.read(&two, Some(pasid(2)), there.iova()), Some(0x42));
    let gone = here.iova();
    drop(here);
    assert_eq!(subject.read(&one, Some(pasid(1)), gone), None);
    assert_eq!(subject.read(&two, Some(pasid(2)), there.iova()), Some(0x42));
}

pub(crate) fn one_region_can_be_mapped_twice_in_a_space(subject: &dyn Subject) {
    let (first, ioas) = (subject.first(), subject.ioas());
    let _attachment = ioas.attach(subject.device(), first).unwrap();
    let region = subject.region(1);
    let (a, b) = (ioas.map(&region, Access::READ_WRITE).unwrap(), ioas.map(&region, Access::READ).unwrap());
    // Nothing translates where nothing is protected: memory is where it is.
    assert_eq!(a.iova() != b.iova(), subject.is_protected());
    lease(&ioas, b.iova(), region.len());
    drop(a);
    assert_eq!(subject.read(&ioas, first, b.iova()), Some(look(&region, 0)));
}

pub(crate) fn a_mapping_keeps_its_region_and_its_space(subject: &dyn Subject) {
    let (first, ioas) = (subject.first(), subject.ioas());
    let attachment = ioas.attach(subject.device(), first).unwrap();
    let region = subject.region(1);
    let watched = Arc::downgrade(&region);
    let mapping = ioas.map(&region, Access::READ_WRITE).unwrap();
    lease(&ioas, mapping.iova(), region.len());
    drop((region, ioas));
    assert!(watched.upgrade().is_some());
    assert!(subject.reaches(first, mapping.iova(), mapping.region(), 0, 3));
    drop(attachment);
    if subject.is_protected() {
        let reaches = subject.reaches(first, mapping.iova(), mapping.region(), 0, 4);
        assert!(!reaches, "a detached device reaches nothing");
    }
    drop(mapping);
    assert!(watched.upgrade().is_none(), "nobody else keeps it");
}

pub(crate) fn memory_that_was_mapped_before_is_there_for_who_is_attached_later(subject: &dyn Subject) {
    let (first, ioas) = (subject.first(), subject.ioas());
    let region = subject.region(1);
    let mapping = ioas.map(&region, Access::READ_WRITE).unwrap();
    lease(&ioas, mapping.iova(), 4096);
    assert!(!subject.is_protected() || !subject.reaches(first, mapping.iova(), &region, 0, 9));
    let _attachment = ioas.attach(subject.device(), first).unwrap();
    assert!(subject.reaches(first, mapping.iova(), &region, 0, 9));
}
