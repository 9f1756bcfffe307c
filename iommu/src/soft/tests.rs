//! Behaviour of the software IOMMU as a device sees it.
#![allow(clippy::unwrap_used, clippy::unnecessary_wraps, reason = "tests: a None or Err is the failure")]

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::*;
use crate::{FaultReason, Mapping};

const PAGE: u64 = 4096;

/// Sets a flag when dropped, so that a thread that waits for it ends when an assertion fails, too.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

struct Setup {
    iommu: SoftIommu,
    device: Arc<SoftDevice>,
    ioas: Ioas,
    attachment: Attachment,
}

fn setup(options: SoftOptions, pasid: Option<Pasid>) -> Setup {
    let iommu = SoftIommu::new(options);
    let device = iommu.device("soft:test");
    let ioas = iommu.alloc_ioas().unwrap();
    let attachment = ioas.attach(&device, pasid).unwrap();
    Setup { iommu, device, ioas, attachment }
}

fn pasid(number: u32) -> Option<Pasid> {
    Some(Pasid::new(number).unwrap())
}

fn region(pages: u64) -> Arc<Region> {
    Region::builder(pages * PAGE).page_size(PageSize::Size4K).build().unwrap()
}

fn bytes(mapping: &Mapping) -> Vec<u8> {
    let region = mapping.region();
    // SAFETY: the region is mapped and no device is at work while a test looks.
    unsafe { std::slice::from_raw_parts(region.as_ptr().as_ptr(), region.len() as usize) }.to_vec()
}

#[test]
fn each_pasid_and_the_rid_see_their_own_space_only() {
    let s = setup(SoftOptions::default(), pasid(5));
    let other = s.iommu.alloc_ioas().unwrap();
    let _other = other.attach(&s.device, pasid(1025)).unwrap();
    let mapping = s.ioas.map(&region(1), Access::READ_WRITE).unwrap();
    let mut bus = s.device.bus();

    bus.write(pasid(5), mapping.iova(), b"hello").unwrap();
    assert_eq!(&bytes(&mapping)[..5], b"hello");

    for (who, reason) in [
        (pasid(1025), FaultReason::NotMapped),
        (pasid(6), FaultReason::NotAttached),
        (None, FaultReason::NotAttached),
    ] {
        let fault = bus.write(who, mapping.iova(), b"evil!").unwrap_err();
        assert_eq!(fault, DmaFault { iova: mapping.iova(), access: Access::WRITE, reason, done: 0 });
        let record = s.device.faults().pop().unwrap();
        assert_eq!(
            (record.pasid, record.iova, record.access, record.reason),
            (who, mapping.iova(), Access::WRITE, reason)
        );
        assert_eq!(&*record.device, "soft:test");
    }
    assert_eq!(&bytes(&mapping)[..5], b"hello");
}

#[test]
fn the_same_region_in_two_spaces_is_the_same_memory() {
    let s = setup(SoftOptions::default(), pasid(1));
    let other = s.iommu.alloc_ioas().unwrap();
    let _other = other.attach(&s.device, pasid(2)).unwrap();
    let region = region(2);
    let (one, two) =
        (s.ioas.map(&region, Access::READ_WRITE).unwrap(), other.map(&region, Access::READ).unwrap());
    assert_eq!(one.iova(), two.iova(), "both take the region's preferred address");
    let mut bus = s.device.bus();
    bus.store(pasid(1), one.iova().wrapping_add(PAGE), 0x1122_3344_5566_7788_u64).unwrap();
    assert_eq!(bus.load::<u64>(pasid(2), two.iova().wrapping_add(PAGE)).unwrap(), 0x1122_3344_5566_7788);
    assert_eq!(bus.store(pasid(2), two.iova(), 1_u64).unwrap_err().reason, FaultReason::Permission);
    assert_eq!(
        bus.load::<u64>(pasid(1), one.iova().wrapping_add(4)).unwrap_err().reason,
        FaultReason::Misaligned
    );
}

#[test]
fn words_of_each_width_have_a_place_of_their_own_size() {
    let s = setup(SoftOptions::default(), None);
    let mapping = s.ioas.map(&region(2), Access::READ_WRITE).unwrap();
    let mut bus = s.device.bus();
    let at = |offset| mapping.iova().wrapping_add(offset);
    bus.store(None, at(0), u64::MAX).unwrap();
    bus.store(None, at(2), 0x1234_u16).unwrap();
    bus.store(None, at(4), 0x89ab_cdef_u32).unwrap();
    assert_eq!(bus.load::<u64>(None, at(0)).unwrap(), 0x89ab_cdef_1234_ffff);
    assert_eq!(bus.load::<u16>(None, at(6)).unwrap(), 0x89ab);
    assert_eq!(bus.load::<u32>(None, at(0)).unwrap(), 0x1234_ffff);
    for odd in [bus.load::<u16>(None, at(1)).map(drop), bus.load::<u32>(None, at(2)).map(drop)] {
        assert_eq!(odd.unwrap_err().reason, FaultReason::Misaligned);
    }
    assert_eq!(bus.load_all(None, at(3), &mut [0_u16]).unwrap_err().reason, FaultReason::Misaligned);
    assert_eq!(bus.store_all(None, at(6), &[0_u32]).unwrap_err().reason, FaultReason::Misaligned);
}

#[test]
fn many_words_run_over_the_end_of_a_page_and_up_to_the_first_missing_one() {
    let s = setup(SoftOptions::default(), None);
    let mapping = s.ioas.map(&region(2), Access::READ_WRITE).unwrap();
    let mut bus = s.device.bus();
    let at = mapping.iova().wrapping_add(PAGE - 6);
    bus.store_all(None, at, &[1_u16, 2, 3, 4, 5]).unwrap();
    let mut out = [0_u16; 6];
    bus.load_all(None, at, &mut out).unwrap();
    assert_eq!(out, [1, 2, 3, 4, 5, 0]);
    assert_eq!(bytes(&mapping)[PAGE as usize - 6..][..10], [1, 0, 2, 0, 3, 0, 4, 0, 5, 0]);

    let end = mapping.iova().wrapping_add(2 * PAGE - 8);
    let fault = bus.store_all(None, end, &[7_u32; 3]).unwrap_err();
    assert_eq!((fault.done, fault.reason), (8, FaultReason::NotMapped));
    assert_eq!(bus.load_all(None, end, &mut [0_u32; 3]).unwrap_err().done, 8);
}

#[test]
fn an_access_runs_up_to_the_first_missing_page_and_says_how_far() {
    let s = setup(SoftOptions::default(), None);
    let mapping = s.ioas.map(&region(3), Access::READ_WRITE).unwrap();
    let mut bus = s.device.bus();
    let start = mapping.iova().wrapping_add(PAGE);
    let end = mapping.iova().wrapping_add(3 * PAGE);
    let expected = |access| DmaFault { iova: end, access, reason: FaultReason::NotMapped, done: 2 * PAGE };

    assert_eq!(bus.write(None, start, &[7; 9000]).unwrap_err(), expected(Access::WRITE));
    assert_eq!(bus.read(None, start, &mut [0; 9000]).unwrap_err(), expected(Access::READ));
    assert_eq!(bus.fill(None, start, 9000, 0).unwrap_err(), expected(Access::WRITE));
    assert_eq!(bus.probe(None, start, 9000, Access::READ).unwrap_err(), expected(Access::READ));
    assert_eq!(bus.flush(None, start, 9000).unwrap_err(), expected(Access::READ));
    assert_eq!(bus.copy(None, start, mapping.iova(), 9000).unwrap_err(), expected(Access::READ));
    assert_eq!(bus.copy(None, mapping.iova(), start, 9000).unwrap_err().iova, Iova::new(end.get()));
    for far in [1 << 48, u64::MAX - 2, u64::MAX] {
        assert_eq!(bus.read(None, Iova::new(far), &mut [0; 8]).unwrap_err().reason, FaultReason::OutOfRange);
    }
}

#[test]
fn unmapping_takes_cached_translations_away() {
    let s = setup(SoftOptions::default(), pasid(3));
    let mapping = s.ioas.map(&region(16), Access::READ_WRITE).unwrap();
    let iova = mapping.iova();
    let mut bus = s.device.bus();
    bus.write(pasid(3), iova, b"in the IOTLB now").unwrap();
    mapping.unmap().unwrap();
    assert_eq!(bus.write(pasid(3), iova, b"x").unwrap_err().reason, FaultReason::NotMapped);
}

#[test]
fn detaching_takes_everything_away() {
    let s = setup(SoftOptions::default(), pasid(3));
    let mapping = s.ioas.map(&region(1), Access::READ_WRITE).unwrap();
    let mut bus = s.device.bus();
    bus.write(pasid(3), mapping.iova(), b"x").unwrap();
    drop(s.attachment);
    assert_eq!(bus.write(pasid(3), mapping.iova(), b"x").unwrap_err().reason, FaultReason::NotAttached);
    let _again = s.ioas.attach(&s.device, pasid(3)).unwrap();
    bus.write(pasid(3), mapping.iova(), b"x").unwrap();
}

#[test]
fn what_can_not_be_attached_is_refused_with_the_reason() {
    let s = setup(SoftOptions { max_pasids: 4, ..SoftOptions::default() }, pasid(4));
    assert_eq!(s.ioas.attach(&s.device, pasid(5)).unwrap_err().kind(), ErrorKind::Exhausted);
    let twice = s.ioas.attach(&s.device, pasid(4)).unwrap_err();
    assert_eq!(twice.kind(), ErrorKind::Busy);
    assert!(
        twice.to_string().starts_with("soft:test: cannot attach PASID 4: it is attached already;"),
        "{twice}"
    );
    let stranger = SoftIommu::new(SoftOptions::default());
    assert_eq!(
        s.ioas.attach(&stranger.device("soft:other"), None).unwrap_err().kind(),
        ErrorKind::InvalidInput
    );
}

#[test]
fn written_pages_are_asked_for_in_whole_pages_and_not_too_many() {
    let s = setup(SoftOptions::default(), None);
    let kind = |first, last| {
        let range = IovaRange { first: Iova::new(first), last: Iova::new(last) };
        s.attachment.dirty_pages(range, PageSize::Size4K, false).unwrap_err().kind()
    };
    for (first, last) in
        [(0, PAGE), (1, PAGE - 1), (PAGE, PAGE - 1), (0, u64::MAX), (0, (PAGE << 32) + PAGE - 1)]
    {
        assert_eq!(kind(first, last), ErrorKind::InvalidInput, "{first:#x}..={last:#x}");
    }
    // As for all that is right: the software IOMMU tracks none.
    assert_eq!(kind(0, (PAGE << 32) - 1), ErrorKind::Unsupported);
    assert_eq!(kind(u64::MAX - PAGE + 1, u64::MAX), ErrorKind::Unsupported);
}

#[test]
fn usable_addresses_leave_the_reserved_ones_out() {
    let iommu = SoftIommu::new(SoftOptions { address_width: 39, ..SoftOptions::default() });
    let usable = iommu.alloc_ioas().unwrap().usable_iovas();
    let numbers: Vec<_> = usable.iter().map(|range| (range.first.get(), range.last.get())).collect();
    assert_eq!(numbers, [(0, 0xfedf_ffff), (0xfef0_0000, (1 << 39) - 1)]);
}

#[test]
fn only_leased_memory_can_be_accessed_where_leases_are_checked() {
    let s = setup(SoftOptions { check_leases: true, ..SoftOptions::default() }, None);
    let leases = s.ioas.leases().unwrap();
    let mapping = s.ioas.map(&region(4), Access::READ_WRITE).unwrap();
    let mut bus = s.device.bus();
    let iova = mapping.iova();
    assert_eq!(bus.write(None, iova, b"x").unwrap_err().reason, FaultReason::NotLeased);
    leases.grant(iova, 100, Access::WRITE);
    bus.write(None, iova, &[1; 100]).unwrap();
    let over = bus.write(None, iova, &[1; 101]).unwrap_err();
    assert_eq!((over.done, over.reason), (100, FaultReason::NotLeased));
    assert_eq!(bus.read(None, iova, &mut [0]).unwrap_err().reason, FaultReason::NotLeased);
    assert_eq!(bus.store(None, iova.wrapping_add(96), 0_u64).unwrap_err().reason, FaultReason::NotLeased);
    assert_eq!(bus.store_all(None, iova.wrapping_add(96), &[1_u32, 2]).unwrap_err().done, 4);
    assert_eq!(
        bus.store_all(None, iova.wrapping_add(88), &[1_u64, 2]).unwrap_err().done,
        8,
        "no half a word"
    );
    leases.take_back(iova, 100, Access::WRITE);
    assert_eq!(bus.write(None, iova, b"x").unwrap_err().reason, FaultReason::NotLeased);
}

#[test]
fn a_copy_from_the_end_stops_where_a_lease_does_and_moves_nothing_by_halves() {
    let s = setup(SoftOptions { check_leases: true, ..SoftOptions::default() }, None);
    let leases = s.ioas.leases().unwrap();
    let mapping = s.ioas.map(&region(1), Access::READ_WRITE).unwrap();
    let (iova, mut bus) = (mapping.iova(), s.device.bus());
    leases.grant(iova, 100, Access::READ_WRITE);
    bus.write(None, iova, &[7; 100]).unwrap();
    let before = bytes(&mapping);
    let fault = bus.copy(None, iova, iova.wrapping_add(8), 100).unwrap_err();
    assert_eq!((fault.iova, fault.done, fault.reason), (iova.wrapping_add(100), 0, FaultReason::NotLeased));
    assert_eq!(bytes(&mapping), before);
    bus.copy(None, iova, iova.wrapping_add(8), 92).unwrap();
}

#[test]
fn leases_end_with_the_mapping() {
    let s = setup(SoftOptions { check_leases: true, ..SoftOptions::default() }, None);
    let (leases, region) = (s.ioas.leases().unwrap(), region(1));
    let mapping = s.ioas.map(&region, Access::READ_WRITE).unwrap();
    leases.grant(mapping.iova(), 100, Access::WRITE);
    drop(mapping);
    let again = s.ioas.map(&region, Access::READ_WRITE).unwrap();
    let fault = s.device.bus().write(None, again.iova(), b"x").unwrap_err();
    assert_eq!(fault.reason, FaultReason::NotLeased);
}

#[test]
fn addresses_over_the_width_are_out_of_range() {
    let s = setup(SoftOptions { address_width: 39, ..SoftOptions::default() }, None);
    let mut bus = s.device.bus();
    let reason = |bus: &mut Bus, address| bus.load::<u64>(None, Iova::new(address)).unwrap_err().reason;
    assert_eq!(reason(&mut bus, 1 << 39), FaultReason::OutOfRange);
    assert_eq!(reason(&mut bus, (1 << 39) - 8), FaultReason::NotMapped);
}

/// A device writes without pause while the driver maps and unmaps; after each unmap the memory must stay as it is.
#[test]
fn no_dma_lands_after_unmap_returned() {
    let s = setup(SoftOptions::default(), pasid(9));
    let (stop, target) = (AtomicBool::new(false), AtomicU64::new(0));
    let written = AtomicU64::new(0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut bus = s.device.bus();
            let data = vec![0xdd; 40_000];
            while !stop.load(Ordering::Relaxed) {
                let iova = Iova::new(target.load(Ordering::Relaxed));
                if bus.write(pasid(9), iova, &data).is_ok() {
                    written.fetch_add(1, Ordering::Relaxed);
                }
            }
        });
        let _stop = Stop(&stop);
        let end = Instant::now() + Duration::from_millis(400);
        let mut rounds = 0;
        while Instant::now() < end || written.load(Ordering::Relaxed) == 0 {
            let region = region(10);
            let mapping = s.ioas.map(&region, Access::READ_WRITE).unwrap();
            target.store(mapping.iova().get(), Ordering::Relaxed);
            std::thread::sleep(Duration::from_micros(50 + rounds % 7 * 30));
            mapping.unmap().unwrap();
            // SAFETY: unmapped: nobody else reaches these bytes now, which is what is tested.
            let memory =
                unsafe { std::slice::from_raw_parts_mut(region.as_ptr().as_ptr(), region.len() as usize) };
            memory.fill(0x11);
            std::thread::yield_now();
            assert!(memory.iter().all(|b| *b == 0x11), "DMA after unmap");
            rounds += 1;
        }
    });
    while s.device.faults().pop().is_some() {}
}

fn token() -> SvaToken {
    // SAFETY: these tests give the device addresses of their own memory, which outlives each access or is meant
    // to be missing.
    unsafe { SvaToken::new() }
}

#[test]
fn under_sva_addresses_are_pointers_and_missing_pages_are_faults() {
    let iommu = SoftIommu::new(SoftOptions::default());
    let device = iommu.device("soft:sva");
    let attachment = iommu.attach_sva(&device, Pasid::new(7).unwrap(), token()).unwrap();
    assert!(attachment.ioas().is_none());
    let mut bus = device.bus();
    let address = |p: *const u8| Iova::new(p.expose_provenance() as u64);

    let (source, mut target) = (vec![0xab_u8; 100_000], vec![0_u8; 100_000]);
    bus.copy(pasid(7), address(source.as_ptr()), address(target.as_mut_ptr()), 100_000).unwrap();
    assert_eq!(source, target);
    let mut words = [0_u64; 2];
    bus.store(pasid(7), address(words.as_mut_ptr().cast()), u64::MAX - 7).unwrap();
    assert_eq!(words[0], u64::MAX - 7);
    assert_eq!(bus.load::<u64>(pasid(7), address(words.as_ptr().cast())).unwrap(), u64::MAX - 7);
    bus.store(pasid(7), address(words.as_mut_ptr().cast()), 0x1234_u16).unwrap();
    bus.store_all(pasid(7), address(words[1..].as_mut_ptr().cast()), &[0xaaaa_u32, 0xbbbb]).unwrap();
    assert_eq!(words, [0xffff_ffff_ffff_1234, 0xbbbb_0000_aaaa]);
    let mut halves = [0_u32; 4];
    bus.load_all(pasid(7), address(words.as_ptr().cast()), &mut halves).unwrap();
    assert_eq!(halves, [0xffff_1234, 0xffff_ffff, 0xaaaa, 0xbbbb]);
    assert_eq!(bus.load::<u16>(pasid(7), Iova::new(8)).unwrap_err().reason, FaultReason::NotMapped);

    for missing in [0_u64, 8, 4096, 0x7fff_ffff_f000, u64::MAX - 7] {
        let fault = bus.read(pasid(7), Iova::new(missing), &mut [0; 8]).unwrap_err();
        assert_eq!((fault.iova.get(), fault.reason), (missing, FaultReason::NotMapped));
    }
    let read_only = b"in a section of constants";
    let fault = bus.write(pasid(7), address(read_only.as_ptr()), b"no").unwrap_err();
    assert_eq!(fault.reason, FaultReason::Permission);
    let aligned = read_only.as_ptr().expose_provenance().next_multiple_of(8) as u64;
    assert_eq!(bus.store(pasid(7), Iova::new(aligned), 0_u64).unwrap_err().reason, FaultReason::Permission);
}

#[test]
fn under_sva_a_probe_finds_the_missing_page_also_from_an_odd_address() {
    let iommu = SoftIommu::new(SoftOptions::default());
    let device = iommu.device("soft:sva");
    let _attachment = iommu.attach_sva(&device, Pasid::new(7).unwrap(), token()).unwrap();
    // SAFETY: the kernel chooses a free range.
    let pages = unsafe {
        libc::mmap(ptr::null_mut(), 8192, libc::PROT_READ, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0)
    };
    assert_ne!(pages, libc::MAP_FAILED);
    let second = pages.wrapping_byte_add(4096);
    // SAFETY: the page is this test's own, and no reference to it exists.
    unsafe { libc::mprotect(second, 4096, libc::PROT_NONE) };
    let fault = device
        .bus()
        .probe(pasid(7), Iova::new(pages.expose_provenance() as u64 + 4000), 200, Access::READ)
        .unwrap_err();
    assert_eq!((fault.iova.get(), fault.done), (second.expose_provenance() as u64, 96));
    // SAFETY: as above.
    unsafe { libc::munmap(pages, 8192) };
}

/// Another thread maps and unmaps what the device copies from: faults, never a crash.
#[test]
fn under_sva_memory_that_vanishes_is_a_fault() {
    let iommu = SoftIommu::new(SoftOptions::default());
    let device = iommu.device("soft:sva");
    let _attachment = iommu.attach_sva(&device, Pasid::new(7).unwrap(), token()).unwrap();
    let len = 16 * PAGE as usize;
    let map = |at: *mut libc::c_void, flags| {
        // SAFETY: either the kernel chooses a free range, or the range is one that this test mapped and owns.
        let p = unsafe {
            libc::mmap(
                at,
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | flags,
                -1,
                0,
            )
        };
        assert_ne!(p, libc::MAP_FAILED);
        p
    };
    let place = map(ptr::null_mut(), 0).expose_provenance();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                // PROT_NONE instead of munmap keeps other threads' allocations out of the range.
                // SAFETY: the range is this test's own, and no reference to it exists.
                unsafe { libc::mprotect(ptr::with_exposed_provenance_mut(place), len, libc::PROT_NONE) };
                std::thread::yield_now();
                map(ptr::with_exposed_provenance_mut(place), libc::MAP_FIXED);
                std::thread::yield_now();
            }
        });
        let _stop = Stop(&stop);
        let mut bus = device.bus();
        let (mut good, mut bad) = (0, 0);
        let mut out = vec![0_u8; len];
        let end = Instant::now() + Duration::from_secs(10);
        while (good < 20 || bad < 20) && Instant::now() < end {
            match bus.read(pasid(7), Iova::new(place as u64), &mut out) {
                Ok(()) => good += 1,
                Err(fault) => {
                    assert_eq!(fault.iova.get(), place as u64 + fault.done);
                    bad += 1;
                }
            }
        }
        assert!(good > 0 && bad > 0, "{good} good, {bad} bad");
    });
    // SAFETY: as above.
    unsafe { libc::munmap(ptr::with_exposed_provenance_mut(place), len) };
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]

    /// Against `copy_within` of a plain vector, over two neighbouring regions whose memory is not contiguous.
    #[test]
    fn copies_are_memmove(from in 0_usize..300_000, to in 0_usize..300_000, len in 0_usize..200_000, seed in any::<u8>()) {
        let s = setup(SoftOptions::default(), None);
        // Other tests take preferred addresses too: try until two are neighbours.
        let (one, _two) = std::iter::repeat_with(|| {
            let one = s.ioas.map(&region(64), Access::READ_WRITE).unwrap();
            let two = s.ioas.map(&region(64), Access::READ_WRITE).unwrap();
            (one, two)
        })
        .find(|(one, two)| one.iova().wrapping_add(64 * PAGE) == two.iova())
        .unwrap();
        let start = one.iova().get();
        let size = 128 * PAGE as usize;
        let (from, to) = (from.min(size - len), to.min(size - len));
        let mut bus = s.device.bus();
        let mut expected: Vec<u8> = (0..size).map(|i| (i as u8).wrapping_mul(31).wrapping_add((i >> 8) as u8 ^ seed)).collect();
        bus.write(None, Iova::new(start), &expected).unwrap();
        bus.copy(None, Iova::new(start + from as u64), Iova::new(start + to as u64), len as u64).unwrap();
        expected.copy_within(from..from + len, to);
        let mut out = vec![0; size];
        bus.read(None, Iova::new(start), &mut out).unwrap();
        prop_assert!(out == expected);
    }

    #[test]
    fn fills_repeat_the_pattern(at in 0_u64..70_000, len in 0_u64..140_000, pattern in any::<u64>()) {
        let s = setup(SoftOptions::default(), None);
        let mapping = s.ioas.map(&region(52), Access::READ_WRITE).unwrap();
        s.device.bus().fill(None, mapping.iova().wrapping_add(at), len, pattern).unwrap();
        let bytes = bytes(&mapping);
        for (i, byte) in bytes.iter().enumerate() {
            let inside = (at..at + len).contains(&(i as u64));
            let expected = if inside { pattern.to_le_bytes()[(i - at as usize) % 8] } else { 0 };
            prop_assert_eq!(*byte, expected, "at {}", i);
        }
    }
}
