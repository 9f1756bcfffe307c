//! The allocator against a map of pages that is searched by brute force.

use proptest::prelude::*;

use super::*;

const PAGE: u64 = 4096;
const PAGES: u64 = 64;
/// Where the pages lie: at the start of the space, in its middle, and up to its very last byte.
const BASES: [u64; 3] = [0, 1 << 40, 0_u64.wrapping_sub(PAGES * PAGE)];

#[derive(Debug, Clone)]
enum Step {
    Allocate { pages: u64, alignment: u64 },
    Reserve { page: u64, pages: u64 },
    Free(prop::sample::Index),
    Restrict(Vec<(u64, u64)>),
}

fn ranges_of_pages() -> impl Strategy<Value = Vec<(u64, u64)>> {
    prop::collection::vec((0..PAGES, 1..=PAGES), 0..5)
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (1..=9_u64, 0..5_u32).prop_map(|(pages, log)| Step::Allocate { pages, alignment: 1 << log }),
        2 => (0..PAGES, 1..=9_u64).prop_map(|(page, pages)| Step::Reserve { page, pages }),
        4 => any::<prop::sample::Index>().prop_map(Step::Free),
        1 => prop::collection::vec((0..4_u64, 40..=PAGES), 1..3).prop_map(Step::Restrict),
        1 => ranges_of_pages().prop_map(Step::Restrict),
    ]
}

/// The reference: what each page is, one by one.
struct Pages {
    base: u64,
    usable: [bool; PAGES as usize],
    used: [bool; PAGES as usize],
    live: Vec<(u64, u64)>,
}

impl Pages {
    fn marked(base: u64, ranges: &[(u64, u64)]) -> [bool; PAGES as usize] {
        std::array::from_fn(|page| {
            let page = page as u64;
            let forbidden = base == 0 && page == 0;
            !forbidden && ranges.iter().any(|&(first, count)| (first..first + count).contains(&page))
        })
    }

    fn fits(&self, page: u64, pages: u64) -> bool {
        page + pages <= PAGES
            && (page..page + pages).all(|p| self.usable[p as usize] && !self.used[p as usize])
    }

    fn set(&mut self, page: u64, pages: u64, used: bool) {
        (page..page + pages).for_each(|p| self.used[p as usize] = used);
    }

    fn iova(&self, page: u64) -> Iova {
        Iova::new(self.base + page * PAGE)
    }
}

fn ranges(base: u64, of_pages: &[(u64, u64)]) -> Vec<IovaRange> {
    let range = |&(page, pages): &(u64, u64)| {
        let pages = pages.min(PAGES - page);
        let first = base + page * PAGE;
        IovaRange { first: Iova::new(first), last: Iova::new(first + (pages * PAGE - 1)) }
    };
    of_pages.iter().map(range).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(512) })]

    #[test]
    fn does_what_a_map_of_pages_says(
        base in prop::sample::select(&BASES[..]),
        usable in ranges_of_pages(),
        steps in prop::collection::vec(step(), 1..80),
    ) {
        let mut allocator = IovaAllocator::new(ranges(base, &usable));
        let mut pages = Pages {
            base,
            usable: Pages::marked(base, &usable),
            used: [false; PAGES as usize],
            live: Vec::new(),
        };
        for step in steps {
            match step {
                Step::Allocate { pages: count, alignment } => {
                    let expected = (0..PAGES).step_by(alignment as usize).find(|&page| pages.fits(page, count));
                    let got = allocator.allocate(count * PAGE, alignment * PAGE);
                    match (expected, got) {
                        (Some(page), Ok(iova)) => {
                            prop_assert_eq!(iova, pages.iova(page));
                            pages.set(page, count, true);
                            pages.live.push((page, count));
                        }
                        (None, Err(error)) => {
                            prop_assert_eq!(error.kind(), ErrorKind::Exhausted);
                            prop_assert!(error.mend_text().is_some());
                        }
                        (expected, got) => prop_assert!(false, "expected page {expected:?}, got {got:?}"),
                    }
                }
                Step::Reserve { page, pages: count } => {
                    let expected = pages.fits(page, count);
                    prop_assert_eq!(allocator.reserve(pages.iova(page), count * PAGE), expected);
                    if expected {
                        pages.set(page, count, true);
                        pages.live.push((page, count));
                    }
                }
                Step::Free(index) => if !pages.live.is_empty() {
                    let (page, count) = pages.live.swap_remove(index.index(pages.live.len()));
                    allocator.free(pages.iova(page), count * PAGE);
                    pages.set(page, count, false);
                },
                Step::Restrict(to) => {
                    let marked = Pages::marked(base, &to);
                    let outside = (0..PAGES as usize).any(|page| pages.used[page] && !marked[page]);
                    let result = allocator.restrict(ranges(base, &to));
                    prop_assert_eq!(result.as_ref().err().map(Error::kind), outside.then_some(ErrorKind::Busy));
                    if !outside {
                        pages.usable.iter_mut().zip(marked).for_each(|(usable, marked)| *usable &= marked);
                    }
                }
            }
        }
        // Once all is freed, exactly the usable pages are to be had, and each once.
        for (page, count) in std::mem::take(&mut pages.live) {
            allocator.free(pages.iova(page), count * PAGE);
        }
        for page in 0..PAGES {
            prop_assert_eq!(allocator.reserve(pages.iova(page), PAGE), pages.usable[page as usize]);
        }
    }
}

fn range(first: u64, last: u64) -> IovaRange {
    IovaRange { first: Iova::new(first), last: Iova::new(last) }
}

#[test]
fn a_whole_64_bit_space_but_for_its_first_page() {
    let mut allocator = IovaAllocator::new(vec![range(0, u64::MAX)]);
    assert!(!allocator.reserve(Iova::new(0), 4096));
    assert!(!allocator.reserve(Iova::new(4095), 1));
    assert!(!allocator.reserve(Iova::new(u64::MAX), 2), "past the end");
    assert!(!allocator.reserve(Iova::new(4096), 0));
    assert_eq!(allocator.allocate(1 << 63, 1 << 63).unwrap(), Iova::new(1 << 63));
    assert_eq!(allocator.allocate(1, 1 << 63).unwrap_err().kind(), ErrorKind::Exhausted);
    let error = allocator.allocate(u64::MAX, 1).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Exhausted);
    assert!(error.to_string().contains("7.9 EiB are, in 1 ranges of at most 7.9 EiB"), "{error}");
    allocator.free(Iova::new(1 << 63), 1 << 63);
    assert_eq!(allocator.allocate(u64::MAX - 4095, 4096).unwrap(), Iova::new(4096));
}

#[test]
fn nonsense_is_refused() {
    let mut allocator = IovaAllocator::new(vec![range(0, 0xf_ffff)]);
    for (len, alignment) in [(0, 4096), (4096, 0), (4096, 3)] {
        let error = allocator.allocate(len, alignment).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput);
        assert!(error.mend_text().is_some(), "{error}");
    }
    let mut empty = IovaAllocator::new(vec![range(0x5000, 0x4fff)]);
    assert_eq!(empty.allocate(1, 1).unwrap_err().kind(), ErrorKind::Exhausted);
}

#[test]
fn only_what_was_handed_out_can_be_freed() {
    let mut allocator = IovaAllocator::new(vec![range(0x1000, 0x4fff)]);
    let iova = allocator.allocate(0x2000, 0x1000).unwrap();
    for (wrong, len) in
        [(iova.get(), 0x1000), (iova.get() + 0x1000, 0x1000), (0x4000, 0x1000), (0x9000, 0x1000)]
    {
        allocator.free(Iova::new(wrong), len);
    }
    assert!(!allocator.reserve(iova, 0x1000), "still allocated");
    allocator.free(iova, 0x2000);
    allocator.free(iova, 0x2000);
    assert!(allocator.reserve(Iova::new(0x1000), 0x4000), "all of it, once");
    assert!(!allocator.reserve(Iova::new(0x1000), 0x1000));
}

#[test]
fn neighbours_are_freed_one_by_one_and_used_as_one() {
    let mut allocator = IovaAllocator::new(vec![range(0x3000, 0x3fff), range(0x1000, 0x2fff)]);
    let three = [(); 3].map(|()| allocator.allocate(0x1000, 0x1000).unwrap());
    assert!(allocator.allocate(0x1000, 0x1000).is_err());
    for index in [0, 2, 1] {
        allocator.free(three[index], 0x1000);
    }
    assert_eq!(allocator.allocate(0x3000, 0x1000).unwrap(), Iova::new(0x1000));
}

#[test]
fn a_restriction_names_what_stands_in_its_way() {
    let mut allocator = IovaAllocator::new(vec![range(0x1000, 0xffff)]);
    assert!(allocator.reserve(Iova::new(0x8000), 0x2000));
    let error = allocator.restrict(vec![range(0x1000, 0x8fff)]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Busy);
    assert!(error.to_string().contains("0x8000..=0x9fff"), "{error}");
    assert!(error.mend_text().is_some());
    assert!(allocator.reserve(Iova::new(0xa000), 0x1000), "a refused restriction changes nothing");
}
