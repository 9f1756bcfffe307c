use std::sync::Mutex;

use underpass_iommu::{Attachable, AttachmentOps, IoasOps, IovaRange, PageSize, Pasid};

use super::*;
use crate::dma::{DmaBuf, Records};
use crate::{Burst, Pool};

/// A backend as without an IOMMU: what is at an offset in a region is at `place(offset)`.
#[derive(Debug)]
struct Physical {
    place: fn(u64) -> u64,
    leases: Option<Arc<dyn Leases>>,
}

impl IoasOps for Physical {
    fn attach(&self, _: &dyn Attachable, _: Option<Pasid>) -> Result<Box<dyn AttachmentOps>> {
        unreachable!("nothing is attached in these tests")
    }

    fn usable_iovas(&self) -> Vec<IovaRange> {
        vec![IovaRange { first: Iova::new(0), last: Iova::new(u64::MAX) }]
    }

    fn pages(&self, region: &Region) -> Result<Option<Box<[Iova]>>> {
        let pages = (0..region.len()).step_by(region.page_size().bytes() as usize);
        Ok(Some(pages.map(|offset| Iova::new((self.place)(offset))).collect()))
    }

    fn map(&self, _: Iova, _: &Arc<Region>, _: Access) -> Result<()> {
        unreachable!("pages are where they are")
    }

    fn unmap(&self, _: Iova, _: &Region) -> Result<()> {
        unreachable!("pages are where they are")
    }

    fn leases(&self) -> Option<Arc<dyn Leases>> {
        self.leases.clone()
    }
}

fn space(place: fn(u64) -> u64) -> DmaSpace {
    DmaSpace::new(Ioas::from_ops(Box::new(Physical { place, leases: None })))
}

fn region(pages: u64) -> Arc<Region> {
    Region::builder(pages * 4096).page_size(PageSize::Size4K).build().unwrap()
}

/// The first two pages are neighbours, the third is below them, the fourth far above.
fn apart(offset: u64) -> u64 {
    [0x8000_0000, 0x8000_1000, 0x10_0000, 0x7f_ffff_f000][offset as usize / 4096] + offset % 4096
}

#[test]
fn each_page_has_its_own_address() {
    let mut space = space(apart);
    let buf = DmaBuf::new(region(4)).unwrap();
    space.map(buf.region(), Access::READ_WRITE).unwrap();
    let pieces = buf.into_chunks(1024);
    for (n, piece) in (0..).zip(&pieces) {
        let expected = apart(n * 1024);
        assert_eq!(space.iova(piece), Some(Iova::new(expected)), "piece {n}");
        assert_eq!(space.hand_out(piece, Access::READ), Some(Iova::new(expected)));
    }
}

#[test]
fn what_lies_in_pages_that_are_apart_is_refused() {
    let mut space = space(apart);
    let mut buf = DmaBuf::new(region(4)).unwrap();
    let region = Arc::clone(buf.region());
    space.map(&region, Access::READ_WRITE).unwrap();
    assert_eq!(space.hand_out(&buf, Access::WRITE), None, "all four");
    let mut rest = buf.split_off(0x1ffe);
    assert_eq!(space.iova(&buf), Some(Iova::new(0x8000_0000)), "neighbours");
    let mut last = rest.split_off(0x1004);
    assert_eq!(space.iova(&rest), None, "from the second page to the fourth");
    let third = rest.split_off(2).split_to(0x1000);
    assert_eq!(space.iova(&third), Some(Iova::new(0x10_0000)), "to the page's last byte");
    assert_eq!(space.iova(&rest), Some(Iova::new(0x8000_1ffe)), "the two bytes before it");
    let empty = last.split_off(last.len());
    assert_eq!(space.iova(&last), Some(Iova::new(0x7f_ffff_f002)));
    assert_eq!(space.iova(&empty), None, "no bytes, behind the last page");
    space.take_back(&third, Access::WRITE);
}

#[test]
fn pages_that_are_neighbours_are_one_piece() {
    let mut space = space(|offset| 0x4000_0000 + offset);
    let buf = DmaBuf::new(region(4)).unwrap();
    space.map(buf.region(), Access::READ_WRITE).unwrap();
    assert_eq!(space.iova(&buf), Some(Iova::new(0x4000_0000)));
}

#[test]
fn a_region_in_pages_is_mapped_once_and_gone_when_unmapped() {
    for place in [apart as fn(u64) -> u64, |offset| 0x1000 + offset] {
        let mut space = space(place);
        let buf = DmaBuf::new(region(3)).unwrap().into_chunks(64).swap_remove(0);
        let region = Arc::clone(buf.region());
        assert_eq!(space.unmap(&region).unwrap_err().kind(), ErrorKind::NotFound);
        space.map(&region, Access::READ_WRITE).unwrap();
        assert_eq!(space.map(&region, Access::READ).unwrap_err().kind(), ErrorKind::Busy);
        assert!(space.iova(&buf).is_some());
        space.unmap(&region).unwrap();
        assert_eq!(space.iova(&buf), None);
        space.map(&region, Access::READ_WRITE).unwrap();
        assert!(space.iova(&buf).is_some());
    }
}

#[test]
fn a_region_that_was_moved_says_so_when_it_is_unmapped() {
    fn moving(offset: u64) -> u64 {
        use std::sync::atomic::{AtomicU64, Ordering};
        static MOVES: AtomicU64 = AtomicU64::new(1);
        MOVES.fetch_add(1, Ordering::Relaxed) << 30 | offset
    }
    let mut space = space(moving);
    let region = region(2);
    space.map(&region, Access::READ_WRITE).unwrap();
    let error = space.unmap(&region).unwrap_err();
    assert!(error.to_string().contains("moved"), "{error}");
}

#[test]
fn records_are_in_one_piece_or_refused() {
    let mut space = space(apart);
    let mut buf = DmaBuf::new(region(4)).unwrap();
    space.map(buf.region(), Access::READ_WRITE).unwrap();
    let tail = buf.split_off(0x2000);
    let records = Records::<[u64; 2]>::new(buf, &space, Access::READ_WRITE).unwrap();
    assert_eq!(records.iova(0x1ff), Iova::new(0x8000_1ff0));
    let error = Records::<[u64; 2]>::new(tail, &space, Access::READ_WRITE).unwrap_err();
    assert!(error.to_string().contains("apart"), "{error}");
}

/// Huge pages of 2 MiB, each below the one before it.
fn downwards(offset: u64) -> u64 {
    const HUGE: u64 = 2 << 20;
    (1 << 40) - offset / HUGE * HUGE + offset % HUGE
}

#[test]
fn no_buffer_of_a_pool_reaches_over_huge_pages() {
    for (buffer_len, count) in [(2176, 3000), (64 << 10, 100), ((1 << 20) + 64, 5)] {
        let pool = Pool::builder(count).buffer_len(buffer_len).cache(0).build().unwrap();
        let mut space = space(downwards);
        space.map(pool.region(), Access::READ_WRITE).unwrap();
        assert!(pool.region().len() > 4 << 20, "several huge pages");
        let mut burst = Burst::with_capacity(count);
        assert_eq!(pool.alloc_burst(count, &mut burst), count);
        let mut addresses: Vec<u64> = burst
            .iter_mut()
            .map(|packet| {
                packet.post(0);
                space.hand_out(packet, Access::WRITE).unwrap().get()
            })
            .collect();
        addresses.sort_unstable();
        assert!(addresses.windows(2).all(|pair| pair[1] - pair[0] >= buffer_len.into()), "{buffer_len}");
    }
}

#[test]
fn what_leases_are_checked_for_is_lent_and_taken_back_wherever_it_is() {
    #[derive(Debug, Default)]
    struct Lent(Mutex<Vec<(Iova, u64, Access)>>);

    impl Leases for Lent {
        fn grant(&self, iova: Iova, len: u64, access: Access) {
            self.0.lock().unwrap().push((iova, len, access));
        }

        fn take_back(&self, iova: Iova, len: u64, access: Access) {
            let mut lent = self.0.lock().unwrap();
            let at = lent.iter().position(|lease| *lease == (iova, len, access)).expect("was lent");
            lent.swap_remove(at);
        }
    }

    for place in [apart as fn(u64) -> u64, |offset| 0x4000_0000 + offset] {
        let lent = Arc::new(Lent::default());
        let mut space =
            DmaSpace::new(Ioas::from_ops(Box::new(Physical { place, leases: Some(Arc::clone(&lent) as _) })));
        assert!(space.checks_leases());
        let mut buf = DmaBuf::new(region(4)).unwrap();
        let region = Arc::clone(buf.region());
        let tail = buf.split_off(0x2010);
        assert_eq!(space.hand_out(&tail, Access::READ), None, "not mapped yet");
        space.map(&region, Access::READ_WRITE).unwrap();
        let piece = buf.split_off(0x2000);
        let expected = (Iova::new(place(0x2000)), 0x10, Access::WRITE);
        assert_eq!(space.iova(&piece), Some(expected.0));
        assert!(lent.0.lock().unwrap().is_empty(), "an address alone is no lease");
        assert_eq!(space.hand_out(&piece, Access::WRITE), Some(expected.0));
        assert_eq!(space.view().hand_out(&piece, Access::WRITE), Some(expected.0));
        assert_eq!(*lent.0.lock().unwrap(), [expected, expected]);
        space.take_back(&piece, Access::WRITE);
        space.take_back(&piece, Access::WRITE);
        assert!(lent.0.lock().unwrap().is_empty());
    }
}

#[test]
fn under_sva_memory_is_where_the_process_has_it() {
    let mut space = DmaSpace::shared_virtual();
    let buf = DmaBuf::new(region(1)).unwrap();
    let here = Some(Iova::new(buf.as_ptr() as u64));
    assert_eq!((space.iova(&buf), space.hand_out(&buf, Access::READ)), (here, here));
    space.map(buf.region(), Access::READ).unwrap();
    space.take_back(&buf, Access::READ);
    space.unmap(buf.region()).unwrap();
    assert_eq!(space.iova(&buf), here, "whether or not it was mapped");
}
