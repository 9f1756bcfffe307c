use std::thread;

use proptest::prelude::*;

use super::*;

type Item = [u64; 2];

fn ring(capacity: usize) -> SharedRing<Item> {
    SharedRing::new(DmaBuf::allocate(SharedRing::<Item>::bytes(capacity)).unwrap(), capacity).unwrap()
}

/// A word of the layout, as the other side sees it.
fn word(ring: &SharedRing<Item>, offset: usize) -> &AtomicU64 {
    assert!(offset.is_multiple_of(8) && offset < ring.memory.buf.len());
    // SAFETY: it is inside the buffer.
    let word = unsafe { ring.memory.buf.as_ptr().add(offset) };
    // SAFETY: it is aligned, lives as long as the ring, and is only ever used as an atomic.
    unsafe { AtomicU64::from_ptr(word.cast_mut().cast()) }
}

#[test]
fn what_goes_in_comes_out_in_order_and_is_where_the_layout_says() {
    for shared in [false, true] {
        let ring = ring(3);
        let (mut tx, mut rx) = if shared {
            (ring.mp_producer(), ring.mp_consumer())
        } else {
            (ring.producer(), ring.consumer())
        };
        for lap in 0..100 {
            let items = [[lap, 1], [lap, 2], [lap, 3], [lap, 4]];
            assert!(!tx.push_bulk(&items).unwrap(), "there is room for three");
            assert_eq!(tx.push_burst(&items).unwrap(), 3);
            assert!(!tx.push(&items[3]).unwrap());
            assert_eq!(word(&ring, 128).load(Ordering::Relaxed), 3 * (lap + 1));
            assert_eq!(word(&ring, 384).load(Ordering::Relaxed), 3 * lap);
            let slot = 512 + 16 * (3 * lap as usize % 4);
            assert_eq!([0, 8].map(|n| word(&ring, slot + n).load(Ordering::Relaxed)), items[0]);
            assert_eq!(rx.pop().unwrap(), Some(items[0]));
            let mut burst = Burst::with_capacity(3);
            assert!(!rx.pop_bulk(&mut burst, 3).unwrap());
            assert!(rx.pop_bulk(&mut burst, 1).unwrap());
            assert_eq!(rx.pop_burst(&mut burst).unwrap(), 1);
            assert_eq!(burst[..], items[1..3]);
            assert_eq!(rx.pop().unwrap(), None);
        }
    }
}

#[test]
fn it_needs_memory_that_suits() {
    let bytes = SharedRing::<Item>::bytes(5);
    assert_eq!(bytes, 512 + 8 * 16);
    let mut buf = DmaBuf::allocate(2 * bytes).unwrap();
    let short = buf.split_to(bytes - 1);
    assert_eq!(SharedRing::<Item>::new(short, 5).unwrap_err().kind(), ErrorKind::InvalidInput);
    assert_eq!(SharedRing::<Item>::new(buf, 5).unwrap_err().kind(), ErrorKind::InvalidInput, "not aligned");
}

#[test]
fn two_threads_and_ends_made_apart() {
    const ITEMS: u64 = 50_000;
    for shared in [false, true] {
        let ring = ring(16);
        let other = ring.clone();
        thread::scope(|scope| {
            scope.spawn(move || {
                let mut tx = if shared { other.mp_producer() } else { other.producer() };
                let mut next = 0;
                while next < ITEMS {
                    let items: Vec<Item> = (next..ITEMS.min(next + 5)).map(|n| [n, !n]).collect();
                    let pushed = tx.push_burst(&items).unwrap();
                    next += pushed as u64;
                    if pushed == 0 {
                        thread::yield_now();
                    }
                }
            });
            let mut rx = if shared { ring.mp_consumer() } else { ring.consumer() };
            let mut burst = Burst::with_capacity(7);
            let mut next = 0;
            while next < ITEMS {
                if rx.pop_burst(&mut burst).unwrap() == 0 {
                    thread::yield_now();
                }
                for item in burst.drain_all() {
                    assert_eq!(item, [next, !next]);
                    next += 1;
                }
            }
        });
    }
}

/// A producer whose other side claims to have read more than was written, and a consumer that is told of more than fits.
#[test]
fn positions_that_make_no_sense_are_an_error() {
    for bogus in [5, 1 << 63, u64::MAX - 4] {
        for shared in [false, true] {
            let ring = ring(4);
            let mut tx = if shared { ring.mp_producer() } else { ring.producer() };
            let mut rx = if shared { ring.mp_consumer() } else { ring.consumer() };
            word(&ring, 128).store(bogus, Ordering::Relaxed);
            let error = rx.pop().unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Device);
            assert!(error.to_string().contains("its positions make no sense"), "{error}");
            word(&ring, 384).store(bogus, Ordering::Relaxed);
            assert_eq!(tx.push(&[1, 2]).unwrap_err().kind(), ErrorKind::Device);
        }
    }
}

/// A process that died between reserving and publishing.
#[test]
fn nobody_waits_for_ever_for_who_is_dead() {
    let ring = ring(4);
    word(&ring, 0).store(1, Ordering::Relaxed);
    assert_eq!(ring.mp_producer().push(&[1, 2]).unwrap_err().kind(), ErrorKind::Device);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever is in memory: an error or some items, no panic, nothing outside the slots.
    #[test]
    fn anything_may_be_written(
        writes in prop::collection::vec((0..7_usize, prop_oneof![any::<u64>(), 0..12_u64]), 1..30)
    ) {
        let ring = ring(5);
        let mut tx = [ring.producer(), ring.mp_producer()];
        let mut rx = [ring.consumer(), ring.mp_consumer()];
        let mut burst = Burst::with_capacity(8);
        for (n, (which, value)) in writes.into_iter().enumerate() {
            // Not the producers' and consumers' own reservations together with their tails: waiting for those takes a second.
            let at = [8, 128, 264, 384, 512, 520, 632][which];
            word(&ring, at).store(value, Ordering::Relaxed);
            if which != 1 && which != 3 {
                let _ = tx[1].push_burst(&[[n as u64; 2]; 3]);
                let _ = rx[1].pop_burst(&mut burst);
            }
            let _ = tx[0].push_burst(&[[n as u64; 2]; 3]);
            let _ = rx[0].pop_burst(&mut burst);
            burst.clear();
            for own in [0, 256] {
                let tail = word(&ring, own + 128).load(Ordering::Relaxed);
                word(&ring, own).store(tail, Ordering::Relaxed);
            }
        }
    }
}
