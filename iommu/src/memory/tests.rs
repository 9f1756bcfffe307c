use std::fmt::Write;
use std::fs;
use std::os::fd::AsRawFd;
use std::sync::Mutex;

use rustix::fs::MemfdFlags;
use tracing::span;

use super::*;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

fn store(region: &Region, offset: u64, byte: u8) {
    assert!(offset < region.len());
    // SAFETY: the offset is within the region.
    let place = unsafe { region.as_ptr().add(offset as usize) };
    // SAFETY: the region lives, and only this test's thread uses it.
    unsafe { place.write_volatile(byte) };
}

fn load(region: &Region, offset: u64) -> u8 {
    assert!(offset < region.len());
    // SAFETY: the offset is within the region.
    let place = unsafe { region.as_ptr().add(offset as usize) };
    // SAFETY: the region lives, and only this test's thread uses it.
    unsafe { place.read_volatile() }
}

fn is_mapped(name: &str) -> bool {
    fs::read_to_string("/proc/self/maps").unwrap().contains(&format!("/memfd:{name} "))
}

fn refusal(result: Result<Arc<Region>>, kind: ErrorKind, mend: &str) {
    let error = result.unwrap_err();
    assert_eq!(error.kind(), kind, "{error}");
    assert!(error.mend_text().is_some_and(|text| text.contains(mend)), "{error}");
}

#[test]
fn the_sizes_of_page_to_try() {
    use PageSize::{Size1G, Size2M};
    let table: &[(u64, &[PageSize])] = &[
        (1, &[]),
        (2 * MIB - 1, &[]),
        (2 * MIB, &[Size2M]),
        (2 * MIB + 1, &[]),
        (3 * MIB, &[]),
        // 8 MiB is 8/5 MiB more than 32/5 MiB: a quarter of it.
        (32 * MIB / 5, &[]),
        (32 * MIB / 5 + 1, &[Size2M]),
        (7 * MIB, &[Size2M]),
        (9 * MIB, &[Size2M]),
        (GIB - 1, &[Size2M]),
        (GIB, &[Size1G, Size2M]),
        (GIB + 1, &[Size2M]),
        (3 * GIB + 1, &[Size2M]),
        (4 * GIB, &[Size1G, Size2M]),
        (4 * GIB + 1, &[Size1G, Size2M]),
        (u64::MAX, &[]),
    ];
    for (len, expected) in table {
        assert_eq!(huge_pages_for(*len).collect::<Vec<_>>(), *expected, "{len} bytes");
    }
}

#[test]
fn what_a_region_is_aligned_to() {
    assert_eq!(alignment(4096, PageSize::Size4K), 4096);
    assert_eq!(alignment(2 * MIB - 4096, PageSize::Size4K), 4096);
    assert_eq!(alignment(2 * MIB, PageSize::Size4K), 2 * MIB);
    assert_eq!(alignment(2 * MIB, PageSize::Size2M), 2 * MIB);
    assert_eq!(alignment(GIB, PageSize::Size2M), 2 * MIB);
    assert_eq!(alignment(GIB, PageSize::Size1G), GIB);
}

#[test]
fn a_small_region_is_whole_zeroed_pages() {
    let region = Region::builder(5000).build().unwrap();
    assert_eq!((region.len(), region.page_size()), (8192, PageSize::Size4K));
    assert!((0..8192).all(|offset| load(&region, offset) == 0));
    store(&region, 0, 1);
    store(&region, 8191, 2);
    assert_eq!((load(&region, 0), load(&region, 8191)), (1, 2));
    assert_eq!(format!("{region:?}"), format!("Region#{}(8 KiB of 4 KiB pages)", region.id().index()));
    assert!(region.claim());
    assert!(!region.claim());
    assert!(!region.claim());
}

#[test]
fn small_pages_too_are_congruent_to_2_mib_and_all_there() {
    for len in [2 * MIB, 5 * MIB + 4096] {
        let region = Region::builder(len).page_size(PageSize::Size4K).build().unwrap();
        assert_eq!((region.len(), region.page_size()), (len, PageSize::Size4K));
        assert_eq!(region.as_ptr().addr().get() as u64 % (2 * MIB), 0);
        assert!(region.preferred_iova().unwrap().is_aligned_to(2 * MIB));
        let stat = rustix::fs::fstat(region.fd().unwrap()).unwrap();
        assert_eq!(u64::try_from(stat.st_blocks).unwrap() * 512, len, "populated");
        store(&region, len - 1, 9);
        assert_eq!(load(&region, len - 1), 9);
    }
}

#[test]
fn lengths_that_make_no_sense() {
    for len in [0, u64::MAX, 1 << 63, (1 << 63) - 1] {
        for size in [None, Some(PageSize::Size4K), Some(PageSize::Size1G)] {
            let mut builder = Region::builder(len);
            builder.page_size = size;
            let mend = if len == 0 { "one byte" } else { "less than 8 EiB" };
            refusal(builder.build(), ErrorKind::InvalidInput, mend);
        }
    }
    // Lengths that some machine may have one day, but not now.
    for len in [1 << 46, 1 << 62] {
        let asked = Region::builder(len).page_size(PageSize::Size4K).build();
        refusal(asked, ErrorKind::NoMemory, "ask for less");
    }
}

#[test]
fn names() {
    for name in ["a\0b", &"x".repeat(250)] {
        refusal(Region::builder(1).name(name).build(), ErrorKind::InvalidInput, "shorter name");
    }
    let _region = Region::builder(1).name("a-name-to-find").build().unwrap();
    assert!(is_mapped("a-name-to-find"));
}

#[test]
fn the_memory_is_given_back_when_dropped_and_kept_when_leaked() {
    let dropped = Region::builder(3 * MIB).name("dropped-region").build().unwrap();
    let leaked = Region::builder(3 * MIB).name("leaked-region").build().unwrap();
    leaked.leak();
    let (id, start) = (leaked.id(), leaked.as_ptr());
    store(&leaked, 7, 77);
    drop((dropped, leaked));
    assert!(!is_mapped("dropped-region"));
    assert!(is_mapped("leaked-region"));
    // SAFETY: a leaked region stays mapped, 3 MiB of it.
    let place = unsafe { start.add(7) };
    // SAFETY: as above, and nobody else knows of the place.
    assert_eq!(unsafe { place.read_volatile() }, 77);
    let others: Vec<_> = (0..100).map(|_| Region::builder(1).build().unwrap()).collect();
    assert!(others.iter().all(|other| other.id() != id), "the number of a leaked region is in use for ever");
}

#[test]
fn numbers_are_small_and_used_again() {
    let two = [(); 2].map(|()| Region::builder(1).build().unwrap());
    assert_ne!(two[0].id(), two[1].id());
    for _ in 0..2000 {
        // Other tests in this process have some hundreds at most.
        assert!(Region::builder(1).build().unwrap().id().index() < 1000);
    }
}

#[test]
fn no_two_regions_prefer_the_same_addresses() {
    let lens = [1, 2 * MIB, 4096, 2 * MIB + 4096, 12345, 4 * MIB];
    let mut ranges: Vec<_> = lens
        .iter()
        .cycle()
        .take(30)
        // Dropped at once: not even then are the addresses used again.
        .map(|&len| Region::builder(len).page_size(PageSize::Size4K).build().unwrap())
        .map(|region| (region.preferred_iova().unwrap().get(), region.len()))
        .collect();
    ranges.sort_unstable();
    assert!(ranges.windows(2).all(|pair| pair[0].0 + pair[0].1 <= pair[1].0), "{ranges:x?}");
    assert!(ranges.iter().all(|&(start, len)| start >= 1 << 32 && start + len <= 1 << 38));
}

#[test]
fn a_region_keeps_its_size() {
    let region = Region::builder(16 * 4096).build().unwrap();
    let fd = region.fd().unwrap();
    assert_eq!(rustix::fs::ftruncate(fd, 4096), Err(Errno::PERM));
    assert_eq!(rustix::fs::ftruncate(fd, 17 * 4096), Err(Errno::PERM));
    assert_eq!(rustix::fs::fcntl_add_seals(fd, SealFlags::WRITE), Err(Errno::PERM), "no further seals");
}

#[test]
fn a_second_mapping_of_the_descriptor_is_the_same_memory() {
    for len in [4096, 3 * MIB] {
        let first = Region::builder(len).page_size(PageSize::Size4K).build().unwrap();
        let second = Region::from_fd(first.fd().unwrap().try_clone_to_owned().unwrap()).unwrap();
        assert_eq!((second.len(), second.page_size()), (first.len(), first.page_size()));
        assert_ne!(second.as_ptr(), first.as_ptr());
        assert_ne!(second.id(), first.id());
        assert_eq!(second.as_ptr().addr().get() as u64 % alignment(len, PageSize::Size4K), 0);
        store(&first, len - 1, 5);
        assert_eq!(load(&second, len - 1), 5);
        drop(first);
        store(&second, 0, 6);
        assert_eq!((load(&second, 0), load(&second, len - 1)), (6, 5), "outlives the first");
    }
}

#[test]
fn only_the_region_that_allocated_the_memory_can_be_claimed() {
    let region = Region::builder(4096).build().unwrap();
    let clone = || region.fd().unwrap().try_clone_to_owned().unwrap();
    let before = Region::from_fd(clone()).unwrap();
    assert!(!before.claim());
    assert!(region.claim());
    let after = Region::from_fd(clone()).unwrap();
    assert!(![&before, &after, &region].iter().any(|region| region.claim()));
}

#[test]
fn a_descriptor_for_reading_only_is_refused() {
    let region = Region::builder(4096).build().unwrap();
    let path = format!("/proc/self/fd/{}", region.fd().unwrap().as_raw_fd());
    let read_only = fs::File::open(path).unwrap();
    refusal(Region::from_fd(read_only.into()), ErrorKind::Permission, "open for reading and writing");
}

#[test]
fn a_descriptor_of_memory_that_could_vanish_is_refused() {
    let memfd = |len, seals| {
        let fd = rustix::fs::memfd_create("test", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
        rustix::fs::ftruncate(&fd, len).unwrap();
        rustix::fs::fcntl_add_seals(&fd, seals).unwrap();
        Region::from_fd(fd)
    };
    let shrink = SealFlags::SHRINK;
    refusal(memfd(4096, SealFlags::empty()), ErrorKind::InvalidInput, "F_SEAL_SHRINK");
    refusal(memfd(4096, SealFlags::GROW), ErrorKind::InvalidInput, "F_SEAL_SHRINK");
    refusal(memfd(4096, shrink | SealFlags::WRITE), ErrorKind::InvalidInput, "without that seal");
    refusal(memfd(4096, shrink | SealFlags::FUTURE_WRITE), ErrorKind::InvalidInput, "without that seal");
    refusal(memfd(0, shrink), ErrorKind::InvalidInput, "ftruncate");
    refusal(memfd(5000, shrink), ErrorKind::InvalidInput, "ftruncate");
    assert_eq!(memfd(8192, shrink).unwrap().len(), 8192);

    let path = std::env::temp_dir().join(format!("underpass-plain-file-{}", std::process::id()));
    fs::write(&path, [0; 4096]).unwrap();
    let file = fs::File::options().read(true).write(true).open(&path).unwrap();
    fs::remove_file(&path).unwrap();
    refusal(Region::from_fd(file.into()), ErrorKind::InvalidInput, "SEAL");
    let device = fs::File::open("/dev/zero").unwrap();
    refusal(Region::from_fd(device.into()), ErrorKind::InvalidInput, "memfd_create");
}

#[test]
fn a_node_that_does_not_exist_is_refused() {
    for node in [999, u32::MAX] {
        refusal(Region::builder(1).numa_node(node).build(), ErrorKind::NotFound, "name one of those");
    }
    if host::check_numa_node(0).is_ok() {
        let region = Region::builder(3 * MIB).page_size(PageSize::Size4K).numa_node(0).build().unwrap();
        store(&region, 0, 1);
    }
}

/// What is warned of on this thread.
struct Warnings(Arc<Mutex<Vec<String>>>);

impl tracing::Subscriber for Warnings {
    fn enabled(&self, metadata: &tracing::Metadata<'_>) -> bool {
        *metadata.level() == tracing::Level::WARN
    }
    fn event(&self, event: &tracing::Event<'_>) {
        struct Message(String);
        impl tracing::field::Visit for Message {
            fn record_debug(&mut self, _: &tracing::field::Field, value: &dyn fmt::Debug) {
                self.0.write_fmt(format_args!("{value:?}")).unwrap();
            }
        }
        let mut message = Message(String::new());
        event.record(&mut message);
        self.0.lock().unwrap().push(message.0);
    }
    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }
    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}
    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}
    fn enter(&self, _: &span::Id) {}
    fn exit(&self, _: &span::Id) {}
}

type Refused<'a> = &'a [(PageSize, ErrorKind)];

/// The size that is got for 8 GiB where those in `refused` are refused for that reason; and the warning.
fn attempts(refused: Refused<'_>) -> Result<(PageSize, Option<String>)> {
    let attempt = |size| match refused.iter().find(|(other, _)| *other == size) {
        Some((_, kind)) => Err(Error::new(*kind, "try", format!("no {size}"))),
        None => Ok(size),
    };
    let (size, refusal) = first_to_be_had(huge_pages_for(8 * GIB), PageSize::Size4K, attempt)?;
    Ok((size, refusal.map(|error| error.to_string())))
}

#[test]
fn of_the_pages_that_were_refused_the_largest_is_warned_of() {
    use ErrorKind::{NoMemory, Permission, Unsupported};
    use PageSize::{Size1G, Size2M, Size4K};
    let table: &[(Refused<'_>, PageSize, Option<&str>)] = &[
        (&[], Size1G, None),
        (&[(Size1G, NoMemory)], Size2M, Some("cannot try: no 1 GiB")),
        (&[(Size1G, NoMemory), (Size2M, NoMemory)], Size4K, Some("cannot try: no 1 GiB")),
        (&[(Size1G, Unsupported), (Size2M, NoMemory)], Size4K, Some("cannot try: no 2 MiB")),
        (&[(Size1G, NoMemory), (Size2M, Unsupported)], Size4K, Some("cannot try: no 1 GiB")),
        (&[(Size1G, Unsupported)], Size2M, None),
        (&[(Size1G, Unsupported), (Size2M, Unsupported)], Size4K, None),
    ];
    for (refused, size, warning) in table {
        let (got, why) = attempts(refused).unwrap();
        assert_eq!((got, why.as_deref()), (*size, *warning), "{refused:?}");
    }
    let error = attempts(&[(Size1G, NoMemory), (Size2M, NoMemory), (Size4K, NoMemory)]).unwrap_err();
    assert!(error.to_string().contains("no 4 KiB"), "{error}");
    let error = attempts(&[(Size1G, NoMemory), (Size2M, Permission)]).unwrap_err();
    assert_eq!(error.kind(), Permission, "what smaller pages do not mend is not hidden by them");
}

#[test]
fn doing_without_huge_pages_is_warned_of_once() {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let warning = FallbackWarning::new();
    // More than any pool that this test will meet, less than its memory.
    let len = 64 * MIB;
    tracing::subscriber::with_default(Warnings(Arc::clone(&seen)), || {
        for _ in 0..3 {
            let region = Region::builder(len).build_with(&warning).unwrap();
            assert_eq!(region.len(), len);
            store(&region, len - 1, 1);
            let fell_back = region.page_size() == PageSize::Size4K;
            assert_eq!(seen.lock().unwrap().len(), usize::from(fell_back), "{seen:?}");
        }
    });
    if let Some(warning) = seen.lock().unwrap().first() {
        assert!(warning.contains("(64 MiB of 4 KiB pages) has smaller pages than it wanted"), "{warning}");
        assert!(warning.contains("32 huge pages of 2 MiB are needed"), "{warning}");
        assert!(warning.contains("run: echo "), "{warning}");
        assert!(warning.contains("hugepages-2048kB/nr_hugepages"), "{warning}");
    }
}

/// One warning in a process, for whichever size it is.
#[test]
fn the_size_of_the_pages_makes_no_second_warning() {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let warning = FallbackWarning::new();
    let region = Region::builder(1).build().unwrap();
    tracing::subscriber::with_default(Warnings(Arc::clone(&seen)), || {
        for size in [PageSize::Size1G, PageSize::Size2M, PageSize::Size1G] {
            warning.warn(&region, &short_of(8 * GIB, size, Step::Map, Errno::NOMEM));
        }
    });
    let seen = seen.lock().unwrap();
    assert_eq!(seen.len(), 1, "{seen:?}");
    assert!(seen[0].contains("8 huge pages of 1 GiB"), "{seen:?}");
}

/// Passes with a pool of huge pages and without: there it checks the error.
#[test]
fn huge_pages_that_are_asked_for_are_had_or_refused() {
    for page_size in [PageSize::Size2M, PageSize::Size1G] {
        let len = page_size.bytes();
        let region = match Region::builder(len - 4096).page_size(page_size).numa_node(0).build() {
            Ok(region) => region,
            Err(error) if error.kind() == ErrorKind::Unsupported => continue,
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::NoMemory, "{error}");
                let mend = error.mend_text().unwrap();
                assert!(mend.starts_with("run: echo ") && mend.ends_with("kB/nr_hugepages"), "{mend}");
                continue;
            }
        };
        assert_eq!((region.len(), region.page_size()), (len, page_size));
        assert_eq!(region.as_ptr().addr().get() as u64 % len, 0);
        assert!(region.preferred_iova().unwrap().is_aligned_to(len));
        assert_eq!(rustix::fs::ftruncate(region.fd().unwrap(), 0), Err(Errno::PERM));
        store(&region, len - 1, 8);
        let again = Region::from_fd(region.fd().unwrap().try_clone_to_owned().unwrap()).unwrap();
        assert_eq!((again.len(), again.page_size()), (len, page_size));
        assert_eq!(load(&again, len - 1), 8);
    }
}

/// As above.
#[test]
fn anonymous_huge_pages_are_had_or_refused() {
    let builder = Region::builder(5000).backing(Backing::AnonymousHuge);
    refusal(builder.clone().page_size(PageSize::Size4K).build(), ErrorKind::Unsupported, "Backing::Memfd");
    match builder.build() {
        Ok(region) => {
            assert_eq!(region.len(), region.page_size().bytes());
            assert!(region.preferred_iova().unwrap().is_aligned_to(region.len()));
            store(&region, region.len() - 1, 3);
            assert_eq!(load(&region, region.len() - 1), 3);
            let error = region.fd().unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Unsupported);
            assert!(error.mend_text().unwrap().contains("Backing::Memfd"));
        }
        Err(error) if error.kind() == ErrorKind::Unsupported => {}
        Err(error) => {
            assert_eq!(error.kind(), ErrorKind::NoMemory, "{error}");
            assert!(error.mend_text().unwrap().contains("/nr_hugepages"), "{error}");
        }
    }
    let absurd = Region::builder(u64::MAX).backing(Backing::AnonymousHuge).build().unwrap_err();
    assert!(matches!(absurd.kind(), ErrorKind::InvalidInput | ErrorKind::Unsupported), "{absurd}");
}
