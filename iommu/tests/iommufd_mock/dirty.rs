//! Which pages a device wrote: what the mock sets is what is told, and cleared.

use underpass_iommu::iommufd::Options;
use underpass_iommu::{Attachment, ErrorKind, Iova, IovaRange, Mapping, PageSize};

use crate::kernel::{HAS_PASIDS, NO_DIRTY_TRACKING};
use crate::rig::{Rig, huge, map, pasid, small, with_mock, with_options};

const PAGE: u64 = 4096;

/// With one entry a page, so that a written page has no neighbours in its entry.
fn small_entries() -> Options {
    Options { dirty_tracking: true, huge_pages: false, ..Options::default() }
}

fn all_of(mapping: &Mapping) -> IovaRange {
    IovaRange::sized(mapping.iova(), mapping.region().len()).unwrap()
}

/// Has the device write these pages of the mapping, counted from its first.
fn write(rig: &Rig, table: u32, mapping: &Mapping, pages: &[u64]) {
    let mut bits = vec![0; (mapping.region().len() / PAGE).div_ceil(64) as usize];
    for page in pages {
        bits[(page / 64) as usize] |= 1 << (page % 64);
    }
    let written = rig.kernel.set_dirty(table, mapping.iova(), PAGE, &bits).unwrap();
    assert_eq!(written, pages.len() as u64);
}

/// Those that are told, counted in the same way.
fn told(attachment: &Attachment, mapping: &Mapping, clear: bool) -> Vec<u64> {
    let pages = attachment.dirty_pages(all_of(mapping), PageSize::Size4K, clear).unwrap();
    pages.iter().map(|iova| (iova.get() - mapping.iova().get()) / PAGE).collect()
}

#[test]
#[ignore = "needs a real kernel: ci/testbed"]
fn written_pages_are_told_until_they_are_cleared() {
    with_options(small_entries(), |rig| {
        let device = rig.device(0);
        let ioas = rig.ioas();
        let attachment = ioas.attach(&device, None).unwrap();
        assert!(attachment.capabilities().dirty_tracking);
        let table = device.page_table(None).unwrap();
        let (one, other) = (map(&ioas, &small(200)), map(&ioas, &small(65)));
        attachment.track_dirty(true).unwrap();
        assert_eq!(told(&attachment, &one, false), []);
        let pages = [0, 1, 63, 64, 130, 199];
        write(rig, table, &one, &pages);
        write(rig, table, &other, &[64]);
        for clear in [false, true] {
            assert_eq!(told(&attachment, &one, clear), pages);
        }
        assert_eq!(told(&attachment, &one, true), []);
        assert_eq!(told(&attachment, &other, true), [64], "each range is cleared on its own");
        // Parts of a mapping, from anywhere.
        write(rig, table, &one, &pages);
        let part = IovaRange::sized(one.iova().wrapping_add(63 * PAGE), 2 * PAGE).unwrap();
        let pages = attachment.dirty_pages(part, PageSize::Size4K, true).unwrap();
        assert_eq!(pages, [part.first, part.first.wrapping_add(PAGE)]);
        assert_eq!(told(&attachment, &one, false), [0, 1, 130, 199]);
    });
}

#[test]
#[ignore = "needs a real kernel: ci/testbed"]
fn tracking_begins_with_clean_pages_and_ends() {
    with_options(small_entries(), |rig| {
        let device = rig.device(0);
        let ioas = rig.ioas();
        let attachment = ioas.attach(&device, None).unwrap();
        let table = device.page_table(None).unwrap();
        let mapping = map(&ioas, &small(3));
        attachment.track_dirty(true).unwrap();
        write(rig, table, &mapping, &[1]);
        attachment.track_dirty(false).unwrap();
        assert!(rig.kernel.set_dirty(table, mapping.iova(), PAGE, &[1]).is_err(), "the mock says so");
        attachment.track_dirty(true).unwrap();
        assert_eq!(told(&attachment, &mapping, false), []);
        write(rig, table, &mapping, &[2]);
        let (iova, late) = (mapping.iova(), map(&ioas, &small(3)));
        drop(mapping);
        // What is mapped meanwhile is tracked, and clean: also where something written was before.
        assert_eq!(told(&attachment, &late, false), []);
        let next = map(&ioas, &small(3));
        assert_eq!(next.iova(), iova);
        assert_eq!(told(&attachment, &next, false), []);
        write(rig, table, &next, &[0]);
        assert_eq!(told(&attachment, &next, false), [0]);
        attachment.track_dirty(false).unwrap();
    });
}

#[test]
#[ignore = "needs a real kernel: ci/testbed"]
fn what_one_device_writes_is_not_told_of_another() {
    with_options(small_entries(), |rig| {
        let devices = [(); 2].map(|()| rig.device(HAS_PASIDS));
        let ioas = rig.ioas();
        let own = [0, 1].map(|n| ioas.attach(&devices[n], None).unwrap());
        let under = ioas.attach(&devices[0], Some(pasid(5))).unwrap();
        let mapping = map(&ioas, &small(4));
        for attachment in &own {
            assert!(attachment.capabilities().dirty_tracking && attachment.capabilities().max_pasids != 0);
            attachment.track_dirty(true).unwrap();
        }
        write(rig, devices[0].page_table(None).unwrap(), &mapping, &[3]);
        assert_eq!(told(&own[1], &mapping, false), []);
        assert_eq!(told(&own[0], &mapping, false), [3]);
        assert_eq!(told(&under, &mapping, false), [3], "a PASID in the same space has the same table");
    });
}

/// An IOMMU tracks whole entries: more may be told than was written, but no less.
#[test]
#[ignore = "needs a real kernel: ci/testbed"]
fn a_write_to_a_huge_page_is_told_in_either_size() {
    with_options(Options { dirty_tracking: true, ..Options::default() }, |rig| {
        let device = rig.device(0);
        let ioas = rig.ioas();
        let attachment = ioas.attach(&device, None).unwrap();
        let mapping = map(&ioas, &huge(3));
        attachment.track_dirty(true).unwrap();
        write(rig, device.page_table(None).unwrap(), &mapping, &[512 + 100]);
        let second = mapping.iova().wrapping_add(PageSize::Size2M.bytes());
        let small = told(&attachment, &mapping, false);
        assert!((512..1024).all(|page| small.contains(&page)), "{small:?}");
        // Huge pages that lie side by side may be one entry.
        let pages = attachment.dirty_pages(all_of(&mapping), PageSize::Size2M, true).unwrap();
        assert!(pages.contains(&second) && pages.len() * 512 == small.len(), "{pages:?} {small:?}");
        assert_eq!(told(&attachment, &mapping, false), []);
    });
}

#[test]
#[ignore = "needs a real kernel: ci/testbed"]
fn who_can_not_track_says_so() {
    let range = IovaRange::sized(Iova::new(1 << 24), PAGE).unwrap();
    let is_refused = |attachment: &Attachment| {
        assert!(!attachment.capabilities().dirty_tracking);
        for error in [
            attachment.track_dirty(true).unwrap_err(),
            attachment.dirty_pages(range, PageSize::Size4K, true).unwrap_err(),
        ] {
            assert_eq!(error.kind(), ErrorKind::Unsupported);
            assert!(error.mend_text().is_some(), "{error}");
        }
    };
    with_options(small_entries(), |rig| {
        is_refused(&rig.ioas().attach(&rig.device(NO_DIRTY_TRACKING), None).unwrap());
    });
    with_mock(|rig| is_refused(&rig.ioas().attach(&rig.device(0), None).unwrap()));
}

#[test]
#[ignore = "needs a real kernel: ci/testbed"]
fn what_is_not_mapped_is_not_told_as_written() {
    with_options(small_entries(), |rig| {
        let device = rig.device(0);
        let ioas = rig.ioas();
        let attachment = ioas.attach(&device, None).unwrap();
        attachment.track_dirty(true).unwrap();
        let mapping = map(&ioas, &small(2));
        write(rig, device.page_table(None).unwrap(), &mapping, &[0, 1]);
        let range = all_of(&mapping);
        drop(mapping);
        let pages = attachment.dirty_pages(range, PageSize::Size4K, false);
        assert!(pages.is_err() || pages.unwrap().is_empty());
    });
}
