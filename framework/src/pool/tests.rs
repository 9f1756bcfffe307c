use std::fmt::Write;
use std::sync::atomic::AtomicBool;
use std::sync::{Barrier, Mutex, Weak, mpsc};
use std::thread;

use proptest::prelude::*;
use tracing::{Event, Metadata, Subscriber, field, span};

use super::*;
use crate::ring;

/// For tests that need a slot, or take all: the tests' threads share them.
static SLOTS: Mutex<()> = Mutex::new(());

fn pool(count: usize, cache: usize) -> Pool {
    Pool::builder(count).buffer_len(HEADROOM + 64).cache(cache).build().unwrap()
}

/// What is said while this thread runs `body`.
fn logged(body: impl FnOnce()) -> String {
    struct Log(Arc<Mutex<String>>);

    impl field::Visit for Log {
        fn record_debug(&mut self, _: &field::Field, value: &dyn fmt::Debug) {
            writeln!(self.0.lock().unwrap(), "{value:?}").unwrap();
        }
    }

    impl Subscriber for Log {
        fn enabled(&self, _: &Metadata<'_>) -> bool {
            true
        }
        fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
            span::Id::from_u64(1)
        }
        fn record(&self, _: &span::Id, _: &span::Record<'_>) {}
        fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}
        fn event(&self, event: &Event<'_>) {
            event.record(&mut Log(Arc::clone(&self.0)));
        }
        fn enter(&self, _: &span::Id) {}
        fn exit(&self, _: &span::Id) {}
    }

    let log = Arc::new(Mutex::new(String::new()));
    tracing::subscriber::with_default(Log(Arc::clone(&log)), body);
    std::mem::take(&mut *log.lock().unwrap())
}

/// What is left of a pool once its last handle is dropped.
fn weak(pool: &Pool) -> Weak<Region> {
    Arc::downgrade(pool.region())
}

#[test]
fn fresh_packets_are_empty_and_apart() {
    let pool = Pool::builder(100).buffer_len(2_000).name("fresh").build().unwrap();
    assert_eq!((pool.buffer_len(), pool.capacity(), pool.name()), (2_000, 100, "fresh"));
    let mut burst = Burst::with_capacity(100);
    assert_eq!(pool.alloc_burst(100, &mut burst), 100);
    let mut places = Vec::new();
    for packet in &mut *burst {
        assert_eq!((packet.len(), packet.headroom(), packet.tailroom()), (0, 128, 2_000 - 128));
        assert!(packet.next().is_none() && packet.rss_hash().is_none() && packet.tx_offload().is_none());
        let buffer = packet.append(1_872).unwrap().as_ptr() as usize - 128;
        assert!(buffer.is_multiple_of(64), "a cache line");
        places.push(buffer);
    }
    places.sort_unstable();
    assert!(places.windows(2).all(|pair| pair[0] + 2_000 <= pair[1]));
    let (start, len) = (pool.region().as_ptr().as_ptr() as usize, pool.region().len() as usize);
    assert!(start <= places[0] && places[99] + 2_000 <= start + len);
}

#[test]
fn a_packet_that_comes_again_is_as_new_unless_it_is_taken_raw() {
    let pool = pool(2, 0);
    let use_up = |mut packet: Packet| {
        packet.append(5).unwrap().fill(7);
        assert!(packet.received(0, 5, 3, 4));
        packet.set_rss_hash(1);
        packet.set_vlan(Some(2));
        packet.chain(pool.alloc().unwrap());
    };
    use_up(pool.alloc().unwrap());
    let again = pool.alloc().unwrap();
    assert_eq!((again.len(), again.headroom(), again.rss_hash(), again.vlan()), (0, 128, None, None));
    assert_eq!((again.port(), again.queue(), again.next().is_some()), (0, 0, false));
    use_up(again);
    let mut raw = Burst::with_capacity(2);
    assert_eq!(pool.alloc_raw(2, &mut raw), 2);
    assert!(raw.iter().any(|packet| packet.data() == [7; 5]), "nobody has touched it");
    assert!(raw.iter().all(|packet| packet.next().is_none()));
}

#[test]
fn what_is_missing_is_counted() {
    for cache in [0, 1, 16, 300] {
        let _slot = Slot::claim();
        let pool = pool(100, cache);
        let mut burst = Burst::with_capacity(128);
        // In the middle of a burst: it brings what there is.
        assert_eq!([pool.alloc_burst(60, &mut burst), pool.alloc_burst(60, &mut burst)], [60, 40]);
        assert_eq!((pool.exhausted(), pool.outstanding(), pool.available()), (20, 100, 0));
        assert!(pool.alloc().is_none());
        assert_eq!((pool.alloc_raw(1, &mut burst), pool.exhausted()), (0, 21), "raw ones are not counted");
        // What there is no room for was not asked for in vain.
        burst.drain(30).for_each(drop);
        assert_eq!((pool.alloc_burst(1_000, &mut burst), pool.exhausted()), (30, 21 + 28));
        burst.free();
        assert_eq!((pool.available(), pool.outstanding(), burst.len()), (100, 0, 0));
    }
}

#[test]
fn a_pool_of_nothing_is_refused() {
    for builder in [Pool::builder(0), Pool::builder(1).buffer_len(HEADROOM), Pool::builder(1).buffer_len(0)] {
        let error = builder.name("nothing").build().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput);
        assert!(error.to_string().contains("make pool nothing"), "{error}");
    }
    assert!(Pool::builder(usize::MAX).build().is_err());
}

#[test]
fn a_thread_has_one_slot_and_no_other_thread_has_it() {
    let _slots = SLOTS.lock();
    let slot = Slot::claim().unwrap();
    assert!(Slot::claim().is_none());
    let index = slot.index;
    thread::spawn(move || assert_ne!(Slot::claim().unwrap().index, index)).join().unwrap();
    drop(slot);
    assert!(Slot::claim().is_some());
}

#[test]
fn more_threads_than_slots_work_without_a_cache() {
    let _slots = SLOTS.lock();
    let (pool, threads) = (pool(64, 4), slot::SLOTS + 3);
    let barrier = Arc::new(Barrier::new(threads));
    let without: usize = thread::scope(|scope| {
        let threads: Vec<_> = (0..threads)
            .map(|_| {
                scope.spawn(|| {
                    let slot = Slot::claim();
                    barrier.wait();
                    drop(pool.alloc());
                    barrier.wait();
                    usize::from(slot.is_none())
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).sum()
    });
    assert!(without >= threads - slot::SLOTS, "{without}");
    assert_eq!(pool.outstanding(), 0);
}

#[test]
fn a_cache_keeps_no_more_than_it_may_and_nothing_once_its_thread_ends() {
    let _slots = SLOTS.lock();
    for (cache, most) in [(0, 0), (1, 1), (7, 7), (64, 64), (200, 100)] {
        let pool = pool(100, cache);
        let from_here = |pool: &Pool| {
            let mut burst = Burst::with_capacity(100);
            pool.alloc_burst(100, &mut burst)
        };
        let (done, told) = mpsc::channel();
        let (end, ended) = mpsc::channel::<()>();
        let worker = thread::spawn({
            let pool = pool.clone();
            move || {
                let _slot = Slot::claim().unwrap();
                let mut burst = Burst::with_capacity(100);
                for count in [1, 2, 3, 33, 50, 100, 1, 8] {
                    assert_eq!(pool.alloc_burst(count, &mut burst), count);
                    burst.drain(count / 2).for_each(drop);
                    burst.free();
                }
                done.send(()).unwrap();
                let _ = ended.recv();
            }
        });
        told.recv().unwrap();
        assert_eq!(pool.available(), 100, "caches count");
        let got = from_here(&pool);
        assert!(got + most >= 100, "a cache of {cache} keeps {}", 100 - got);
        assert!(cache == 0 || got < 100, "it keeps some, so that this test tests something");
        drop(end);
        worker.join().unwrap();
        assert_eq!(from_here(&pool), 100);
    }
}

/// Wherever the cache stood at first.
#[test]
fn turns_that_fit_into_a_cache_come_to_take_what_they_put() {
    let _slot = Slot::claim();
    let pool = pool(1000, 128);
    for out in [64, 96, 128] {
        for before in 0..20 {
            drop((0..8 * before).map_while(|_| pool.alloc()).collect::<Vec<_>>());
            let mut burst = Burst::with_capacity(8);
            let mut last = Vec::new();
            for turn in 0..40 {
                let mut taken = Vec::new();
                while taken.len() < out {
                    assert_eq!(pool.alloc_raw(8, &mut burst), 8);
                    taken.extend(burst.drain_all());
                }
                let mut addresses: Vec<_> = taken.iter().map(|packet| packet.data().as_ptr()).collect();
                addresses.sort_unstable();
                assert!(turn < 39 || addresses == last, "{out} at a time still come from the ring");
                last = addresses;
                let mut taken = taken.into_iter();
                while taken.len() > 0 {
                    burst.extend(taken.by_ref().take(8));
                    burst.free();
                }
            }
        }
    }
}

/// A chain across pools is known to each whose packet has one behind it, also once it is apart.
#[test]
fn a_chain_that_was_part_of_one_comes_home() {
    let pools = [pool(4, 0), pool(4, 0)];
    let [a, b] = &pools;
    let mut head = a.alloc().unwrap();
    head.chain(b.alloc().unwrap());
    head.chain(a.alloc().unwrap());
    let mut burst = Burst::with_capacity(4);
    assert_eq!(b.alloc_burst(2, &mut burst), 2);
    burst.push(head.take_next().unwrap()).unwrap();
    burst.free();
    drop(head);
    assert!(pools.iter().all(|pool| pool.outstanding() == 0));
}

#[test]
fn memory_is_given_back_once_all_is_home_and_not_before() {
    for (free_on_another_thread, with_slot) in [(false, false), (false, true), (true, false), (true, true)] {
        let pool = pool(10, 4);
        let (region, handle) = (weak(&pool), pool.clone());
        let mut burst = Burst::with_capacity(10);
        pool.alloc_burst(10, &mut burst);
        let mut free = move || {
            let _slot = with_slot.then(Slot::claim);
            burst.free();
        };
        if free_on_another_thread {
            thread::spawn(free).join().unwrap();
        } else {
            free();
        }
        drop(pool);
        assert!(region.upgrade().is_some(), "there is a handle");
        assert_eq!(logged(|| drop(handle)), "");
        assert!(region.upgrade().is_none());
    }
}

#[test]
fn packets_outlive_a_pool_and_are_told_of() {
    let _slot = Slot::claim();
    let pool = Pool::builder(10).name("leaky").build().unwrap();
    let region = weak(&pool);
    let mut packets = [pool.alloc().unwrap(), pool.alloc().unwrap(), pool.alloc().unwrap()];
    let log = logged(|| drop(pool));
    assert_eq!(log, "pool leaky: 3 packets are still out: its memory is leaked\n");
    for packet in &mut packets {
        packet.append(100).unwrap().fill(9);
    }
    assert!(packets.iter().all(|packet| packet.data() == [9; 100]));
    drop(packets);
    assert!(region.upgrade().is_some());
}

#[test]
fn packets_come_home_while_the_last_handle_goes() {
    for round in 0..200 {
        let pool = pool(12, 4);
        let region = weak(&pool);
        let go = Arc::new(AtomicBool::new(false));
        let threads: Vec<_> = (0..2)
            .map(|with_slot| {
                let mut burst = Burst::with_capacity(6);
                pool.alloc_burst(6, &mut burst);
                let go = Arc::clone(&go);
                thread::spawn(move || {
                    let _slot = (with_slot == 1).then(Slot::claim);
                    while !go.load(Ordering::Acquire) {
                        std::hint::spin_loop();
                    }
                    burst.drain(5).for_each(drop);
                    burst.free();
                })
            })
            .collect();
        go.store(true, Ordering::Release);
        (0..round).for_each(|_| std::hint::spin_loop());
        let log = logged(|| drop(pool));
        for thread in threads {
            thread.join().unwrap();
        }
        assert_eq!(log.is_empty(), region.upgrade().is_none(), "given back, or told of: {log}");
    }
}

/// Two threads take packets, write numbers into them and pass them on to two others, one without a slot, which check and
/// free them, singly and in bursts. Each packet is with one of them at a time, and all are home in the end.
#[test]
fn packets_are_taken_here_and_freed_there() {
    const EACH: u64 = 20_000;

    fn send(pool: &Pool, tx: &ring::MpProducer<Packet>, mut numbers: std::ops::Range<u64>) {
        let _slot = Slot::claim();
        let mut burst = Burst::with_capacity(32);
        while !numbers.is_empty() {
            let most = (numbers.end - numbers.start).min(1 + numbers.start % 32);
            pool.alloc_burst(most as usize, &mut burst);
            for (packet, number) in burst.iter_mut().zip(&mut numbers) {
                let bytes = packet.append(16).unwrap();
                bytes[..8].copy_from_slice(&number.to_le_bytes());
                bytes[8..].copy_from_slice(&number.to_be_bytes());
            }
            while !burst.is_empty() {
                if tx.push_burst(&mut burst) == 0 {
                    thread::yield_now();
                }
            }
        }
    }

    fn receive(rx: &ring::MpConsumer<Packet>, left: &AtomicU64, sum: &AtomicU64) {
        let mut burst = Burst::with_capacity(24);
        while left.load(Ordering::Relaxed) > 0 {
            if rx.pop_burst(&mut burst) == 0 {
                thread::yield_now();
            }
            for packet in &*burst {
                let (number, again) = packet.data().split_first_chunk().unwrap();
                let number = u64::from_le_bytes(*number);
                assert_eq!(again, number.to_be_bytes(), "somebody else wrote it too");
                sum.fetch_add(number, Ordering::Relaxed);
            }
            left.fetch_sub(burst.len() as u64, Ordering::Relaxed);
            burst.drain(burst.len() / 2).for_each(drop);
            burst.free();
        }
    }

    for cache in [0, 8, 64] {
        let pool = pool(256, cache);
        let (tx, rx) = ring::mpmc(128);
        let (left, sum) = (AtomicU64::new(2 * EACH), AtomicU64::new(0));
        thread::scope(|scope| {
            let threads = [
                scope.spawn(|| send(&pool, &tx, 0..EACH)),
                scope.spawn(|| send(&pool, &tx, EACH..2 * EACH)),
                scope.spawn(|| receive(&rx, &left, &sum)),
                scope.spawn(|| {
                    let _slot = Slot::claim();
                    receive(&rx, &left, &sum);
                }),
            ];
            // ThreadSanitizer does not see that a scope waits.
            for thread in threads {
                thread.join().unwrap();
            }
        });
        assert_eq!(sum.into_inner(), (0..2 * EACH).sum());
        assert_eq!(pool.outstanding(), 0);
    }
}

/// How a burst of packets is given back.
#[derive(Debug, Clone, Copy)]
enum Way {
    Free,
    Clear,
    Reclaim,
}

proptest! {
    /// Packets of several pools with caches of any size, some of them chains across pools, all come home, and none twice.
    #[test]
    fn any_burst_goes_home(
        caches in prop::array::uniform3(0_usize..20),
        slot in any::<bool>(),
        bursts in prop::collection::vec(
            (
                prop::collection::vec(prop::collection::vec(0_usize..3, 1..4), 0..70),
                prop::sample::select(&[Way::Free, Way::Clear, Way::Reclaim][..]),
            ),
            1..6,
        ),
    ) {
        let _slot = slot.then(Slot::claim);
        let pools = caches.map(|cache| pool(60, cache));
        let mut kept = Vec::new();
        for (packets, way) in bursts {
            let mut burst = Burst::with_capacity(70);
            for segments in packets {
                // Made from its end; shorter where a pool is dry.
                let mut packet: Option<Packet> = None;
                for pool in segments {
                    let Some(mut head) = pools[pool].alloc() else { continue };
                    if let Some(rest) = packet {
                        head.chain(rest);
                    }
                    packet = Some(head);
                }
                if let Some(packet) = packet {
                    burst.push(packet).unwrap();
                }
            }
            kept.extend(burst.pop());
            match way {
                Way::Free => burst.free(),
                Way::Clear => burst.clear(),
                Way::Reclaim => Reclaim::new().extend(burst.drain_all()),
            }
            prop_assert!(burst.is_empty());
            let out: usize = kept.iter().map(|packet| packet.segments().count()).sum();
            prop_assert_eq!(pools.iter().map(Pool::outstanding).sum::<usize>(), out);
        }
        Reclaim::new().extend(kept);
        for pool in &pools {
            let mut all = Burst::with_capacity(60);
            prop_assert_eq!(pool.alloc_burst(60, &mut all), 60);
            all.sort_unstable_by_key(|packet| packet.data().as_ptr());
            prop_assert!(all.windows(2).all(|two| two[0].data().as_ptr() != two[1].data().as_ptr()));
            all.free();
        }
    }
}
