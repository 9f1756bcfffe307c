//! What is mapped is exactly what was asked for, pinned and charged once, and nothing is left of it afterwards.

use std::collections::BTreeMap;
use std::sync::Arc;

use underpass_iommu::iommufd::{Memlock, Options};
use underpass_iommu::{Access, ErrorKind, Iova, PageSize};

use crate::kernel::{NO_DIRTY_TRACKING, limit_locked_memory, set_locked_memory_limit};
use crate::rig::{anonymous, huge, map, pinned_bytes, small, with_leftovers, with_mock, with_options};

const MIB: u64 = 1 << 20;

#[test]
#[ignore = "needs a real kernel: ci/testbed"]
fn every_page_of_a_region_is_translated_to_its_own() {
    with_mock(|rig| {
        let device = rig.device(0);
        let ioas = rig.ioas();
        let _attachment = ioas.attach(&device, None).unwrap();
        let table = device.page_table(None).unwrap();
        let before = pinned_bytes();
        for region in [small(1), small(2), small(511), small(1025), huge(1), huge(3), anonymous(2)] {
            let mapping = map(&ioas, &region);
            assert!(mapping.iova().is_aligned_to(region.page_size().bytes()));
            assert!(rig.maps(table, &mapping), "{mapping:?}");
            assert_eq!(pinned_bytes() - before, region.len());
            if region.page_size() == PageSize::Size4K {
                assert!(rig.kernel.pins(&region, 1));
            }
            let iova = mapping.iova();
            mapping.unmap().unwrap();
            assert!(!rig.maps_any_at(table, iova, &region), "{region:?} stays mapped at {iova}");
            assert_eq!(pinned_bytes(), before);
            if region.page_size() == PageSize::Size4K {
                assert!(rig.kernel.pins(&region, 0));
            }
        }
    });
}

#[test]
#[ignore = "needs a real kernel: ci/testbed"]
fn what_is_unmapped_leaves_its_neighbours_alone() {
    with_mock(|rig| {
        let device = rig.device(0);
        let ioas = rig.ioas();
        let _attachment = ioas.attach(&device, None).unwrap();
        let table = device.page_table(None).unwrap();
        let regions = [small(3), huge(1), small(512), small(5), huge(2), small(1)];
        let mut mappings: BTreeMap<usize, _> =
            regions.iter().map(|region| map(&ioas, region)).enumerate().collect();
        for gone in [1, 3, 0, 5, 2, 4] {
            let mapping = mappings.remove(&gone).unwrap();
            let iova = mapping.iova();
            drop(mapping);
            assert!(!rig.maps_any_at(table, iova, &regions[gone]));
            for mapping in mappings.values() {
                assert!(rig.maps(table, mapping), "{mapping:?}");
            }
        }
    });
}

#[test]
#[ignore = "needs a real kernel: ci/testbed"]
fn memory_is_there_for_who_is_attached_later_and_for_all_who_are() {
    with_mock(|rig| {
        let (one, other) = (rig.device(0), rig.device(NO_DIRTY_TRACKING));
        let ioas = rig.ioas();
        let attachment = ioas.attach(&one, None).unwrap();
        let early = map(&ioas, &small(700));
        let second = ioas.attach(&other, None).unwrap();
        let late = map(&ioas, &huge(1));
        let tables = [&one, &other].map(|device| device.page_table(None).unwrap());
        for table in tables {
            assert!(rig.maps(table, &early) && rig.maps(table, &late));
        }
        drop(attachment);
        assert_eq!(one.page_table(None), None);
        assert!(rig.maps(other.page_table(None).unwrap(), &early));
        drop(second);
        // Nobody is attached: nothing is to be pinned for a device, and the mappings wait for the next.
        let _again = ioas.attach(&one, None).unwrap();
        let table = one.page_table(None).unwrap();
        assert!(rig.maps(table, &early) && rig.maps(table, &late));
    });
}

#[test]
#[ignore = "needs a real kernel: ci/testbed"]
fn a_region_in_several_spaces_is_pinned_and_charged_once() {
    // The spaces drop it in every order.
    for order in [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]] {
        with_mock(|rig| {
            let devices = [(); 3].map(|()| rig.device(0));
            let spaces = [(); 3].map(|()| rig.ioas());
            let attachments = [0, 1, 2].map(|n| spaces[n].attach(&devices[n], None).unwrap());
            let tables = [0, 1, 2].map(|n| devices[n].page_table(None).unwrap());
            let before = pinned_bytes();
            for region in [small(300), huge(1), anonymous(1)] {
                let is_small = region.page_size() == PageSize::Size4K;
                let mut mappings = [0, 1, 2].map(|n| Some(map(&spaces[n], &region)));
                assert_eq!(pinned_bytes() - before, region.len());
                assert!(!is_small || rig.kernel.pins(&region, 1));
                for gone in order {
                    mappings[gone] = None;
                    for (table, mapping) in tables.iter().zip(&mappings) {
                        assert!(mapping.as_ref().is_none_or(|mapping| rig.maps(*table, mapping)));
                    }
                    let left = mappings.iter().flatten().count();
                    assert_eq!(pinned_bytes() - before, if left == 0 { 0 } else { region.len() });
                    assert!(!is_small || rig.kernel.pins(&region, u32::from(left != 0)));
                    // Whoever has it no more can have it again, of those who still do.
                    if left == 2 {
                        let again = map(&spaces[gone], &region);
                        assert!(rig.maps(tables[gone], &again));
                        assert_eq!(pinned_bytes() - before, region.len());
                    }
                }
            }
            drop(attachments);
        });
    }
}

#[test]
#[ignore = "needs a real kernel: ci/testbed"]
fn one_region_twice_in_a_space_is_charged_once() {
    with_mock(|rig| {
        let device = rig.device(0);
        let ioas = rig.ioas();
        let _attachment = ioas.attach(&device, None).unwrap();
        let table = device.page_table(None).unwrap();
        let before = pinned_bytes();
        let region = small(9);
        let (one, two) = (map(&ioas, &region), ioas.map(&region, Access::READ).unwrap());
        assert_ne!(one.iova(), two.iova());
        assert_eq!(pinned_bytes() - before, region.len());
        drop(one);
        assert!(rig.maps(table, &two));
        assert_eq!(pinned_bytes() - before, region.len());
    });
}

/// By the kernel's own access to the space, as a mediated device has it: the mock's tables do not tell what may be
/// written.
#[test]
#[ignore = "needs a real kernel: ci/testbed"]
fn what_may_only_be_read_is_not_written() {
    with_mock(|rig| {
        let device = rig.device(0);
        let ioas = rig.ioas();
        let _attachment = ioas.attach(&device, None).unwrap();
        let space = rig.ioas_of(device.page_table(None).unwrap());
        let region = small(2);
        let writable = map(&ioas, &region);
        let second_page = |iova: Iova| iova.wrapping_add(4096 + 5);
        rig.kernel.write(space, second_page(writable.iova()), 0x5a).unwrap();
        let readable = ioas.map(&region, Access::READ).unwrap();
        assert_eq!(rig.kernel.read(space, second_page(readable.iova())).unwrap(), 0x5a);
        let refused = rig.kernel.write(space, readable.iova(), 1).unwrap_err();
        assert_eq!(refused.raw_os_error(), Some(libc::EPERM));
        let written = ioas.map(&small(1), Access::WRITE).unwrap();
        rig.kernel.write(space, written.iova(), 1).unwrap();
        let iova = writable.iova();
        drop(writable);
        assert_eq!(rig.kernel.read(space, iova).unwrap_err().raw_os_error(), Some(libc::ENOENT));
    });
}

/// The kernel lets nobody write by a copy what the first mapping was not to be written by.
#[test]
#[ignore = "needs a real kernel: ci/testbed"]
fn what_was_mapped_for_reading_can_be_mapped_for_writing_elsewhere() {
    for reader_goes_first in [false, true] {
        with_mock(|rig| {
            let devices = [(); 2].map(|()| rig.device(0));
            let spaces = [(); 2].map(|()| rig.ioas());
            let _attachments = [0, 1].map(|n| spaces[n].attach(&devices[n], None).unwrap());
            let tables = [0, 1].map(|n| devices[n].page_table(None).unwrap());
            let before = pinned_bytes();
            let region = small(5);
            let reader = spaces[0].map(&region, Access::READ).unwrap();
            let writer = map(&spaces[1], &region);
            assert_eq!(pinned_bytes() - before, region.len());
            let space = rig.ioas_of(tables[1]);
            rig.kernel.write(space, writer.iova(), 7).unwrap();
            let space = rig.ioas_of(tables[0]);
            assert_eq!(rig.kernel.read(space, reader.iova()).unwrap(), 7);
            assert_eq!(
                rig.kernel.write(space, reader.iova(), 7).unwrap_err().raw_os_error(),
                Some(libc::EPERM)
            );
            let (table, stays) = if reader_goes_first {
                drop(reader);
                (tables[1], writer)
            } else {
                drop(writer);
                (tables[0], reader)
            };
            assert!(rig.maps(table, &stays));
            assert_eq!(pinned_bytes() - before, region.len());
            drop(stays);
            assert_eq!(pinned_bytes(), before);
            assert!(rig.kernel.pins(&region, 0));
        });
    }
}

/// The limit of locked memory is the user's, so that a region in many spaces must not use it up.
#[test]
#[ignore = "needs a real kernel: ci/testbed"]
fn what_does_not_fit_the_limit_of_locked_memory_is_told_with_the_number_that_would() {
    for memlock in [Memlock::User, Memlock::Process] {
        with_options(Options { memlock, ..Options::default() }, |rig| {
            let devices = [(); 3].map(|()| rig.device(0));
            let spaces = [(); 3].map(|()| rig.ioas());
            let attachments = [0, 1, 2].map(|n| spaces[n].attach(&devices[n], None).unwrap());
            let (region, another, before) = (small(1024), small(512), pinned_bytes());
            let usual = set_locked_memory_limit(5 * MIB);
            limit_locked_memory(true);
            let mappings = spaces.each_ref().map(|ioas| ioas.map(&region, Access::READ_WRITE));
            let refused = spaces[0].map(&another, Access::READ_WRITE);
            limit_locked_memory(false);
            set_locked_memory_limit(usual);
            let mappings = mappings.map(Result::unwrap);
            let error = refused.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::NoMemory);
            let text = error.to_string();
            assert!(text.contains("memlock") || text.contains("ulimit -l"), "{text}");
            // 4 MiB and 2 MiB, in the units of ulimit(1) or in bytes.
            assert!(text.contains("6144") || text.contains("6 MiB") || text.contains("6291456"), "{text}");
            assert_eq!(pinned_bytes() - before, region.len());
            let tables = devices.each_ref().map(|device| device.page_table(None).unwrap());
            assert!(tables.iter().zip(&mappings).all(|(table, mapping)| rig.maps(*table, mapping)));
            drop((mappings, attachments));
            // Without a device nothing is pinned, but by the device that comes then.
            let usual = set_locked_memory_limit(5 * MIB);
            limit_locked_memory(true);
            let mappings = [&region, &another].map(|region| map(&spaces[1], region));
            assert_eq!(pinned_bytes(), before);
            let refused = spaces[1].attach(&devices[0], None);
            limit_locked_memory(false);
            set_locked_memory_limit(usual);
            let text = refused.unwrap_err().to_string();
            assert!(text.contains("6 MiB"), "{text}");
            assert_eq!((pinned_bytes(), devices[0].page_table(None)), (before, None));
            let _attachment = spaces[1].attach(&devices[0], None).unwrap();
            let table = devices[0].page_table(None).unwrap();
            assert!(mappings.iter().all(|mapping| rig.maps(table, mapping)));
        });
    }
}

/// What the kernel will not unmap, a device may still reach.
#[test]
#[ignore = "needs a real kernel: ci/testbed"]
fn what_can_not_be_unmapped_is_never_used_again() {
    with_leftovers(|rig| {
        let device = rig.device(0);
        let (ioas, space) = rig.ioas_with_id();
        let _attachment = ioas.attach(&device, None).unwrap();
        let mapping = map(&ioas, &small(3));
        let (iova, len) = (mapping.iova(), mapping.region().len());
        let memory = format!("{:x}-", mapping.region().as_ptr().addr());
        let is_there = || std::fs::read_to_string("/proc/self/maps").unwrap().contains(&memory);
        assert!(is_there());
        // Somebody else has unmapped it, so that the kernel refuses to.
        rig.kernel.unmap(space, iova, len).unwrap();
        let error = mapping.unmap().unwrap_err();
        assert!(error.mend_text().is_some(), "{error}");
        assert!(is_there(), "the memory is not given back");
        let next = map(&ioas, &small(3));
        assert!(next.iova() >= iova.wrapping_add(len), "its addresses are not given out");
        assert!(rig.maps(device.page_table(None).unwrap(), &next));
    });
}

/// Its page table may still be used, so that it stays; what is unmapped is taken out of it all the same.
#[test]
#[ignore = "needs a real kernel: ci/testbed"]
fn a_device_that_can_not_be_detached_reaches_nothing_that_was_unmapped() {
    with_leftovers(|rig| {
        let device = rig.device(0);
        let ioas = rig.ioas();
        let attachment = ioas.attach(&device, None).unwrap();
        let table = device.page_table(None).unwrap();
        let mapping = map(&ioas, &small(3));
        device.hold(true);
        drop(attachment);
        assert!(rig.maps(table, &mapping), "it is attached as before");
        let (iova, region) = (mapping.iova(), Arc::clone(mapping.region()));
        mapping.unmap().unwrap();
        assert!(!rig.maps_any_at(table, iova, &region));
        assert!(rig.kernel.pins(&region, 0));
        drop(ioas);
        assert!(!rig.maps_any_at(table, iova, &region), "the page table is there, and empty");
        device.hold(false);
    });
}

/// Whatever memory the kernel takes for it: it then goes through a region in many small steps.
#[test]
#[ignore = "needs a real kernel: ci/testbed"]
fn large_regions_are_mapped_in_small_steps_too() {
    with_mock(|rig| {
        let usual = 65536;
        let devices = [(); 2].map(|()| rig.device(0));
        let spaces = [(); 2].map(|()| rig.ioas());
        let _attachments = [0, 1].map(|n| spaces[n].attach(&devices[n], None).unwrap());
        let tables = [0, 1].map(|n| devices[n].page_table(None).unwrap());
        let before = pinned_bytes();
        for limit in [12, 16, 32, 100, 4096] {
            rig.kernel.set_memory_limit(limit).unwrap();
            for region in [small(1), small(777), huge(2)] {
                let (one, other) = (map(&spaces[0], &region), map(&spaces[1], &region));
                assert!(rig.maps(tables[0], &one) && rig.maps(tables[1], &other));
                drop(one);
                assert!(rig.maps(tables[1], &other));
                assert_eq!(pinned_bytes() - before, region.len());
                drop(other);
                assert_eq!(pinned_bytes(), before);
            }
        }
        rig.kernel.set_memory_limit(usual).unwrap();
    });
}

/// Maps and unmaps in no particular order, looked at as a whole after each step.
#[test]
#[ignore = "needs a real kernel: ci/testbed"]
fn many_maps_and_unmaps_leave_exactly_what_should_be_there() {
    with_mock(|rig| {
        let devices = [(); 2].map(|()| rig.device(0));
        let spaces = [(); 2].map(|()| rig.ioas());
        let _attachments = [0, 1].map(|n| spaces[n].attach(&devices[n], None).unwrap());
        let tables = [0, 1].map(|n| devices[n].page_table(None).unwrap());
        let regions = [1, 2, 3, 17, 64, 512].map(small);
        let before = pinned_bytes();
        let mut mappings = Vec::new();
        // Numerical Recipes' generator: it only has to mix.
        let mut random = 4_u32;
        let mut next = |below: usize| {
            random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (random >> 8) as usize % below
        };
        for _ in 0..400 {
            if mappings.len() < 12 && next(5) < 3 {
                let (space, region) = (next(2), next(regions.len()));
                mappings.push((space, region, map(&spaces[space], &regions[region])));
            } else if !mappings.is_empty() {
                let (space, region, mapping) = mappings.swap_remove(next(mappings.len()));
                let iova = mapping.iova();
                mapping.unmap().unwrap();
                assert!(!rig.maps_any_at(tables[space], iova, &regions[region]));
            }
            assert!(mappings.iter().all(|(space, _, mapping)| rig.maps(tables[*space], mapping)));
            let held = |n: usize| mappings.iter().any(|(_, region, _)| *region == n);
            let expected: u64 =
                regions.iter().enumerate().filter(|(n, _)| held(*n)).map(|(_, region)| region.len()).sum();
            assert_eq!(pinned_bytes() - before, expected);
        }
    });
}

/// Whoever copies a region from another space races with who unmaps it there.
#[test]
#[ignore = "needs a real kernel: ci/testbed"]
fn threads_map_the_same_regions_into_spaces_of_their_own() {
    with_mock(|rig| {
        let regions = [small(1), small(40), huge(1)];
        let before = pinned_bytes();
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let regions = &regions;
                scope.spawn(move || {
                    let device = rig.device(0);
                    let ioas = rig.ioas();
                    let _attachment = ioas.attach(&device, None).unwrap();
                    let table = device.page_table(None).unwrap();
                    for n in 0..150 {
                        let region = &regions[(thread + n) % regions.len()];
                        let access = if n % 4 == 0 { Access::READ } else { Access::READ_WRITE };
                        let mapping = ioas.map(region, access).unwrap();
                        assert!(rig.maps(table, &mapping));
                        let iova = mapping.iova();
                        mapping.unmap().unwrap();
                        assert!(!rig.maps_any_at(table, iova, region));
                    }
                });
            }
        });
        assert_eq!(pinned_bytes(), before);
        assert!(rig.kernel.pins(&regions[1], 0));
    });
}
