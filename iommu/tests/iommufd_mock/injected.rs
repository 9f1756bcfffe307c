//! Failures at every place where the kernel can fail: each is an error of the backend's or does not matter, nothing
//! is lost by it, and what failed works when it is tried again.
//!
//! Source: `Documentation/fault-injection/fault-injection.rst` of Linux 7.3, "/proc/self/task/tid/fail-nth".

use std::cell::Cell;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use underpass_iommu::iommufd::{Iommufd, Options};
use underpass_iommu::{
    Access, Attachment, Ioas, IommuBackend, Iova, IovaRange, Mapping, PageSize, Pasid, Region, Result,
};

use crate::kernel::HAS_PASIDS;
use crate::rig::{MockDevice, Rig, anonymous, huge, map, pasid, pinned_bytes, small, with_options};

/// Has the `nth` of what can fail in this thread's system calls fail, while `operation` runs. Returns its result, and
/// whether it came that far.
fn fail_nth<T>(nth: u32, operation: impl FnOnce() -> T) -> (T, bool) {
    let file = File::options().read(true).write(true).open("/proc/thread-self/fail-nth").unwrap();
    file.write_at(nth.to_string().as_bytes(), 0).unwrap();
    let result = operation();
    let mut left = [0; 16];
    let read = file.read_at(&mut left, 0);
    file.write_at(b"0", 0).unwrap();
    // Reading is a system call too: if that failed, the operation had not.
    let struck = read.is_ok_and(|len| left[..len].trim_ascii() == b"0");
    (result, struck)
}

/// Lets allocations fail that usually wait for memory, without a word in the kernel's log for each.
fn let_allocations_fail() {
    let set = |file: &str, value: &str| {
        let path = format!("/sys/kernel/debug/{file}");
        std::fs::write(&path, value).unwrap_or_else(|error| panic!("{path}: {error}"));
    };
    set("failslab/ignore-gfp-wait", "N");
    set("fail_page_alloc/ignore-gfp-wait", "N");
    set("fail_page_alloc/ignore-gfp-highmem", "N");
    set("fail_page_alloc/min-order", "0");
    for name in ["failslab", "fail_page_alloc", "fail_iommufd"] {
        set(&format!("{name}/verbose"), "0");
    }
}

/// Lets `operation` fail at each place in turn, every time from a new start that `prepare` makes. Where it does fail,
/// `undone` looks whether that changed anything, and then it has to succeed; `done` looks at what it did.
fn at_every_place<P, T>(
    options: &Options,
    prepare: impl Fn(&Rig) -> P,
    operation: impl Fn(&Rig, &P) -> Result<T>,
    undone: impl Fn(&Rig, &P),
    done: impl Fn(&Rig, &P, &T),
) {
    let_allocations_fail();
    let (mut errors, mut nth) = (0, 1);
    loop {
        let mut again = true;
        with_options(options.clone(), |rig| {
            let prepared = prepare(rig);
            let (result, struck) = fail_nth(nth, || operation(rig, &prepared));
            let result = result.or_else(|error| {
                assert!(struck, "it fails by itself: {error}");
                errors += 1;
                undone(rig, &prepared);
                operation(rig, &prepared)
            });
            done(rig, &prepared, &result.unwrap());
            again = struck;
        });
        if !again {
            break;
        }
        nth += 1;
    }
    report(nth - 1, errors);
    assert!(nth > 1, "nothing in it can fail: is the kernel built with CONFIG_FAULT_INJECTION?");
}

/// Shown by the test harness with `--nocapture`.
#[allow(clippy::print_stdout, reason = "tells how much was tried")]
fn report(places: u32, errors: u32) {
    println!("{places} failures, {errors} of them errors");
}

/// A device that is attached, and another space with another one.
#[derive(Debug)]
struct Two {
    devices: [MockDevice; 2],
    spaces: [Ioas; 2],
    pinned: u64,
}

impl Two {
    fn new(rig: &Rig) -> Self {
        Self {
            devices: [(); 2].map(|()| rig.device(HAS_PASIDS)),
            spaces: [(); 2].map(|()| rig.ioas()),
            pinned: pinned_bytes(),
        }
    }

    fn attach(&self, n: usize, pasid: Option<Pasid>) -> Result<Attachment> {
        self.spaces[n].attach(&self.devices[n], pasid)
    }

    fn table(&self, n: usize) -> u32 {
        self.devices[n].page_table(None).unwrap()
    }
}

fn everything() -> Options {
    Options { page_faults: true, dirty_tracking: true, ..Options::default() }
}

#[test]
#[ignore = "needs a real kernel: ci/testbed"]
fn opening() {
    for options in [Options::default(), everything()] {
        at_every_place(
            &Options::default(),
            |_| (),
            |_, ()| Iommufd::with(options.clone()),
            |_, ()| (),
            |_, (), backend| drop(backend.alloc_ioas().unwrap()),
        );
    }
}

#[test]
#[ignore = "needs a real kernel: ci/testbed"]
fn allocating_a_space() {
    at_every_place(
        &Options::default(),
        |_| (),
        |rig, ()| rig.backend.alloc_ioas(),
        |_, ()| (),
        |_, (), ioas| assert!(!ioas.usable_iovas().is_empty()),
    );
}

#[test]
#[ignore = "needs a real kernel: ci/testbed"]
fn attaching_a_device() {
    for options in [Options::default(), everything()] {
        at_every_place(
            &options,
            Two::new,
            |_, two| two.attach(0, None),
            |_, two| assert_eq!(two.devices[0].page_table(None), None),
            |rig, two, attachment| {
                assert!(attachment.capabilities().max_pasids != 0);
                let mapping = map(&two.spaces[0], &small(3));
                assert!(rig.maps(two.table(0), &mapping));
            },
        );
    }
}

/// All that is mapped already is put into the new page table.
#[test]
#[ignore = "needs a real kernel: ci/testbed"]
fn attaching_a_device_to_a_full_space() {
    at_every_place(
        &Options::default(),
        |rig| {
            let two = Two::new(rig);
            // The first attachment says which addresses can be used.
            drop(two.attach(0, None).unwrap());
            let mappings = [small(200), huge(1), small(1)].map(|region| map(&two.spaces[0], &region));
            // What is mapped in another space too is pinned for that.
            let other = two.attach(1, None).unwrap();
            let copy = map(&two.spaces[1], mappings[0].region());
            let pinned = pinned_bytes();
            (two, mappings, other, copy, pinned)
        },
        |_, (two, ..)| two.attach(0, None),
        |rig, (two, _, _, copy, pinned)| {
            assert_eq!(two.devices[0].page_table(None), None);
            assert_eq!(pinned_bytes(), *pinned);
            assert!(rig.maps(two.table(1), copy));
        },
        |rig, (two, mappings, _, copy, _), _| {
            assert!(mappings.iter().all(|mapping| rig.maps(two.table(0), mapping)));
            assert!(rig.maps(two.table(1), copy));
        },
    );
}

#[test]
#[ignore = "needs a real kernel: ci/testbed"]
fn attaching_a_pasid() {
    let number = pasid(3);
    for attach_device_first in [false, true] {
        at_every_place(
            &everything(),
            |rig| {
                let two = Two::new(rig);
                let own = attach_device_first.then(|| two.attach(0, None).unwrap());
                (two, own)
            },
            |_, (two, _)| two.attach(0, Some(number)),
            |rig, (two, _)| {
                assert_eq!(two.devices[0].page_table(Some(number)), None);
                assert!(rig.kernel.pasid_has(two.devices[0].ids(), number.get(), None));
            },
            |rig, (two, _), _| {
                let table = two.devices[0].page_table(Some(number)).unwrap();
                assert!(rig.kernel.pasid_has(two.devices[0].ids(), number.get(), Some(table)));
                let mapping = map(&two.spaces[0], &small(3));
                assert!(rig.maps(table, &mapping));
            },
        );
    }
}

#[test]
#[ignore = "needs a real kernel: ci/testbed"]
fn mapping() {
    for make in [|| small(1), || small(600), || huge(2), || anonymous(1)] as [fn() -> Arc<Region>; 4] {
        at_every_place(
            &Options::default(),
            |rig| {
                let two = Two::new(rig);
                let attachment = two.attach(0, None).unwrap();
                (two, attachment, make())
            },
            |_, (two, _, region)| two.spaces[0].map(region, Access::READ_WRITE),
            |_, (two, ..)| assert_eq!(pinned_bytes(), two.pinned),
            |rig, (two, _, region), mapping| {
                assert!(rig.maps(two.table(0), mapping));
                assert_eq!(pinned_bytes() - two.pinned, region.len());
            },
        );
    }
}

/// What may only be read is pinned aside and copied.
#[test]
#[ignore = "needs a real kernel: ci/testbed"]
fn mapping_for_reading() {
    at_every_place(
        &Options::default(),
        |rig| {
            let two = Two::new(rig);
            let attachment = two.attach(0, None).unwrap();
            (two, attachment, small(600))
        },
        |_, (two, _, region)| two.spaces[0].map(region, Access::READ),
        |_, (two, ..)| assert_eq!(pinned_bytes(), two.pinned),
        |rig, (two, _, region), mapping| {
            assert!(rig.maps(two.table(0), mapping));
            assert_eq!(pinned_bytes() - two.pinned, region.len());
            drop(map(&two.spaces[0], region));
            assert!(rig.maps(two.table(0), mapping));
        },
    );
}

/// A region that another space has already is copied from there.
#[test]
#[ignore = "needs a real kernel: ci/testbed"]
fn mapping_into_a_second_space() {
    for make in [|| small(600), || huge(2)] as [fn() -> Arc<Region>; 2] {
        at_every_place(
            &Options::default(),
            |rig| {
                // Many small steps are many places.
                rig.kernel.set_memory_limit(4096).unwrap();
                let two = Two::new(rig);
                let attachments = [0, 1].map(|n| two.attach(n, None).unwrap());
                let first = map(&two.spaces[0], &make());
                (two, attachments, first)
            },
            |_, (two, _, first)| two.spaces[1].map(first.region(), Access::READ_WRITE),
            |rig, (two, _, first)| {
                assert_eq!(pinned_bytes() - two.pinned, first.region().len());
                assert!(rig.maps(two.table(0), first));
            },
            |rig, (two, _, first), second| {
                assert!(rig.maps(two.table(0), first) && rig.maps(two.table(1), second));
                assert_eq!(pinned_bytes() - two.pinned, first.region().len());
                rig.kernel.set_memory_limit(65536).unwrap();
            },
        );
    }
}

/// The kernel keeps what it needs for unmapping, so that it never fails for want of memory; what else is injected, the
/// backend overcomes.
#[test]
#[ignore = "needs a real kernel: ci/testbed"]
fn unmapping() {
    for copied in [false, true] {
        at_every_place(
            &Options::default(),
            |rig| {
                let two = Two::new(rig);
                let attachments = [0, 1].map(|n| two.attach(n, None).unwrap());
                let mapping = map(&two.spaces[0], &small(600));
                let copy = copied.then(|| map(&two.spaces[1], mapping.region()));
                let place = (mapping.iova(), Arc::clone(mapping.region()));
                (two, attachments, Cell::new(Some(mapping)), copy, place)
            },
            |_, (_, _, mapping, ..)| mapping.take().map_or(Ok(()), Mapping::unmap),
            |_, _| panic!("it failed"),
            |rig, (two, _, _, copy, (iova, region)), ()| {
                assert!(!rig.maps_any_at(two.table(0), *iova, region));
                assert_eq!(pinned_bytes() - two.pinned, if copied { region.len() } else { 0 });
                assert!(copy.as_ref().is_none_or(|copy| rig.maps(two.table(1), copy)));
                assert_eq!(map(&two.spaces[0], &small(600)).iova(), *iova, "the addresses are free again");
            },
        );
    }
}

#[test]
#[ignore = "needs a real kernel: ci/testbed"]
fn detaching() {
    for pasid in [None, Some(pasid(4))] {
        at_every_place(
            &everything(),
            |rig| {
                let two = Two::new(rig);
                let attachment = Cell::new(Some(two.attach(0, pasid).unwrap()));
                let mapping = map(&two.spaces[0], &small(20));
                (two, attachment, mapping)
            },
            |_, (_, attachment, _)| {
                drop(attachment.take());
                Ok(())
            },
            |_, _| panic!("it cannot fail"),
            |rig, (two, _, mapping), ()| {
                assert_eq!(two.devices[0].page_table(pasid), None);
                let _again = two.attach(0, pasid).unwrap();
                assert!(rig.maps(two.devices[0].page_table(pasid).unwrap(), mapping));
            },
        );
    }
}

#[test]
#[ignore = "needs a real kernel: ci/testbed"]
fn telling_requests() {
    at_every_place(
        &everything(),
        |rig| {
            let two = Two::new(rig);
            let attachment = two.attach(0, None).unwrap();
            for page in 1..=3 {
                rig.kernel.request_page(two.devices[0].ids(), None, Iova::new(page * 4096), 1).unwrap();
            }
            (two, attachment)
        },
        |_, (_, attachment)| attachment.next_fault(),
        |_, _| (),
        |_, (_, attachment), first| {
            let others = std::iter::from_fn(|| attachment.next_fault().unwrap());
            let told: Vec<_> = first.iter().cloned().chain(others).map(|fault| fault.iova.get()).collect();
            assert_eq!(told, [4096, 8192, 12288], "none is lost, and none told twice");
        },
    );
}

#[test]
#[ignore = "needs a real kernel: ci/testbed"]
fn telling_written_pages() {
    let options = Options { huge_pages: false, ..everything() };
    at_every_place(
        &options,
        |rig| {
            let two = Two::new(rig);
            let attachment = two.attach(0, None).unwrap();
            let mapping = map(&two.spaces[0], &small(3));
            (two, attachment, mapping)
        },
        |_, (_, attachment, _)| attachment.track_dirty(true),
        |_, _| (),
        |rig, (two, attachment, mapping), ()| {
            rig.kernel.set_dirty(two.table(0), mapping.iova(), 4096, &[0b101]).unwrap();
            let range = IovaRange::sized(mapping.iova(), 3 * 4096).unwrap();
            let told = attachment.dirty_pages(range, PageSize::Size4K, true).unwrap();
            assert_eq!(told, [range.first, range.first.wrapping_add(8192)]);
        },
    );
    at_every_place(
        &options,
        |rig| {
            let two = Two::new(rig);
            let attachment = two.attach(0, None).unwrap();
            attachment.track_dirty(true).unwrap();
            let mapping = map(&two.spaces[0], &small(3));
            rig.kernel.set_dirty(two.table(0), mapping.iova(), 4096, &[0b110]).unwrap();
            (two, attachment, mapping)
        },
        |_, (_, attachment, mapping)| {
            let range = IovaRange::sized(mapping.iova(), 3 * 4096).unwrap();
            attachment.dirty_pages(range, PageSize::Size4K, false)
        },
        |_, _| (),
        |_, (_, _, mapping), told| {
            assert_eq!(*told, [1, 2].map(|page| mapping.iova().wrapping_add(page * 4096)));
        },
    );
}
