use std::collections::VecDeque;
use std::fmt::Debug;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use proptest::prelude::*;

use super::*;

/// Both kinds of ends, for tests that all rings pass.
trait Push<T> {
    fn push(&mut self, item: T) -> Result<(), T>;
    fn push_bulk(&mut self, from: &mut Burst<T>, count: usize) -> bool;
    fn push_burst(&mut self, from: &mut Burst<T>) -> usize;
    fn state(&self) -> (usize, usize, bool);
}

trait Pop<T> {
    fn pop(&mut self) -> Option<T>;
    fn pop_bulk(&mut self, to: &mut Burst<T>, count: usize) -> bool;
    fn pop_burst(&mut self, to: &mut Burst<T>) -> usize;
    fn state(&self) -> (usize, usize, bool);
}

macro_rules! ends {
    ($push:ident $pop:ident) => {
        impl<T> Push<T> for $push<T> {
            fn push(&mut self, item: T) -> Result<(), T> {
                $push::push(self, item)
            }
            fn push_bulk(&mut self, from: &mut Burst<T>, count: usize) -> bool {
                $push::push_bulk(self, from, count)
            }
            fn push_burst(&mut self, from: &mut Burst<T>) -> usize {
                $push::push_burst(self, from)
            }
            fn state(&self) -> (usize, usize, bool) {
                (self.len(), self.capacity(), self.is_empty())
            }
        }
        impl<T> Pop<T> for $pop<T> {
            fn pop(&mut self) -> Option<T> {
                $pop::pop(self)
            }
            fn pop_bulk(&mut self, to: &mut Burst<T>, count: usize) -> bool {
                $pop::pop_bulk(self, to, count)
            }
            fn pop_burst(&mut self, to: &mut Burst<T>) -> usize {
                $pop::pop_burst(self, to)
            }
            fn state(&self) -> (usize, usize, bool) {
                (self.len(), self.capacity(), self.is_empty())
            }
        }
    };
}
ends!(Producer Consumer);
ends!(MpProducer MpConsumer);

#[derive(Debug, Clone)]
enum Step {
    Push,
    Pop,
    PushBulk(usize),
    PopBulk(usize),
    PushBurst(usize),
    PopBurst(usize),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        Just(Step::Push),
        Just(Step::Pop),
        (0..12_usize).prop_map(Step::PushBulk),
        (0..12_usize).prop_map(Step::PopBulk),
        (0..12_usize).prop_map(Step::PushBurst),
        (0..12_usize).prop_map(Step::PopBurst),
    ];
    prop::collection::vec(step, 0..200)
}

/// Does the same to a ring and to a queue of the standard library.
fn compare<T: PartialEq + Debug>(
    capacity: usize,
    steps: &[Step],
    tx: &mut impl Push<T>,
    rx: &mut impl Pop<T>,
    make: impl Fn(usize) -> T,
) {
    let mut model = VecDeque::new();
    let mut next = 0;
    // Two more than asked for, so that a part stays behind.
    let filled = |next: usize, count: usize| {
        let mut burst = Burst::with_capacity(count + 2);
        burst.extend((next..next + count + 2).map(&make));
        burst
    };
    for step in steps {
        match *step {
            Step::Push => match tx.push(make(next)) {
                Ok(()) => model.push_back(make(next)),
                Err(item) => {
                    assert_eq!(item, make(next));
                    assert_eq!(model.len(), capacity);
                }
            },
            Step::Pop => assert_eq!(rx.pop(), model.pop_front()),
            Step::PushBulk(count) => {
                let mut burst = filled(next, count);
                let fits = model.len() + count <= capacity;
                assert_eq!(tx.push_bulk(&mut burst, count), fits);
                let moved = if fits { count } else { 0 };
                model.extend((next..next + moved).map(&make));
                assert!(
                    burst.iter().eq((next + moved..next + count + 2).map(&make).collect::<Vec<_>>().iter())
                );
            }
            Step::PopBulk(count) => {
                let mut burst = Burst::with_capacity(count);
                let there = model.len() >= count;
                assert_eq!(rx.pop_bulk(&mut burst, count), there);
                assert!(burst.drain_all().eq(model.drain(..if there { count } else { 0 })));
            }
            Step::PushBurst(count) => {
                let mut burst = filled(next, count);
                let moved = burst.len().min(capacity - model.len());
                assert_eq!(tx.push_burst(&mut burst), moved);
                model.extend((next..next + moved).map(&make));
                assert_eq!(burst.len(), count + 2 - moved);
            }
            Step::PopBurst(count) => {
                let mut burst = Burst::with_capacity(count);
                let moved = count.min(model.len());
                assert_eq!(rx.pop_burst(&mut burst), moved);
                assert!(burst.drain_all().eq(model.drain(..moved)));
            }
        }
        next += 16;
        let state = (model.len(), capacity, model.is_empty());
        assert_eq!((tx.state(), rx.state()), (state, state));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Items of 8 bytes (copied in pieces), of 1 and of 40 (with a rest), some with something to drop.
    #[test]
    fn rings_are_queues(capacity in 0..20_usize, steps in steps()) {
        let (mut tx, mut rx) = spsc(capacity);
        compare(capacity, &steps, &mut tx, &mut rx, |n| n);
        let (mut tx, mut rx) = mpmc(capacity);
        compare(capacity, &steps, &mut tx, &mut rx, |n| n as u8);
        let (mut tx, mut rx) = spsc(capacity);
        compare(capacity, &steps, &mut tx, &mut rx, |n| (n.to_string(), n, [n as u8; 3]));
        let (mut tx, mut rx) = mpmc(capacity);
        compare(capacity, &steps, &mut tx, &mut rx, Box::new);
    }
}

#[test]
fn one_thread_may_have_both_ends() {
    let (mut tx, mut rx) = spsc(7);
    for n in 0..100 {
        assert!(tx.push_slice(&[n, n + 1, n + 2]));
        let mut burst = Burst::with_capacity(3);
        assert!(rx.pop_bulk(&mut burst, 3));
        assert_eq!(burst[..], [n, n + 1, n + 2]);
        tx.push(n).unwrap();
        assert_eq!(rx.pop(), Some(n));
    }
    assert!(!tx.push_slice(&[0; 8]));
    assert!(rx.is_empty());
}

#[test]
fn items_may_be_of_no_size() {
    let (mut tx, mut rx) = spsc(3);
    let mut burst = Burst::with_capacity(0);
    burst.extend([(); 5].into_iter());
    assert_eq!(tx.push_burst(&mut burst), 3);
    assert_eq!(tx.push(()), Err(()));
    assert_eq!(rx.pop(), Some(()));
    assert_eq!((rx.pop_burst(&mut burst), burst.len()), (2, 4));
}

#[test]
#[should_panic(expected = "3 items of 2")]
fn pushing_more_than_there_are_is_a_bug() {
    let mut burst = Burst::with_capacity(4);
    burst.extend([1, 2].into_iter());
    mpmc(4).0.push_bulk(&mut burst, 3);
}

#[test]
#[should_panic(expected = "3 items do not fit, 2 do")]
fn popping_more_than_fits_is_a_bug() {
    spsc::<u8>(4).1.pop_bulk(&mut Burst::with_capacity(2), 3);
}

/// All items come, in order, however both sides' bursts fall on each other.
#[test]
fn spsc_between_two_threads() {
    const ITEMS: usize = 100_000;
    let (mut tx, mut rx) = spsc(60);
    thread::scope(|scope| {
        scope.spawn(move || {
            let mut burst = Burst::with_capacity(13);
            let mut next = 0;
            while next < ITEMS || !burst.is_empty() {
                let count = burst.room().min(ITEMS - next);
                burst.extend((next..next + count).map(Box::new));
                next += count;
                if tx.push_burst(&mut burst) == 0 {
                    thread::yield_now();
                }
            }
        });
        let mut burst = Burst::with_capacity(8);
        let mut next = 0;
        while next < ITEMS {
            if rx.pop_burst(&mut burst) == 0 {
                thread::yield_now();
            }
            for item in burst.drain_all() {
                assert_eq!(*item, next);
                next += 1;
            }
        }
        assert!(rx.pop().is_none());
    });
}

/// More threads than cores, so that some are interrupted between reserving and publishing. What one thread pushed at once
/// comes out at once, and its bursts in its order.
#[test]
fn mpmc_between_four_threads() {
    const BURSTS: usize = 4_000;
    const SIZE: usize = 4;
    // Whole bursts fit, so that those of one thread stay together also where they go round.
    let (tx, rx) = mpmc::<(usize, usize)>(10 * SIZE);
    let popped = AtomicUsize::new(0);
    thread::scope(|scope| {
        for thread in 0..2 {
            let tx = tx.clone();
            scope.spawn(move || {
                let mut burst = Burst::with_capacity(SIZE);
                for n in 0..BURSTS {
                    burst.extend((SIZE * n..SIZE * (n + 1)).map(|item| (thread, item)));
                    while !tx.push_bulk(&mut burst, SIZE) {
                        thread::yield_now();
                    }
                }
            });
        }
        for _ in 0..2 {
            let (rx, popped) = (rx.clone(), &popped);
            scope.spawn(move || {
                let mut burst = Burst::with_capacity(SIZE);
                let mut last = [None; 2];
                while popped.load(Ordering::Relaxed) < 2 * BURSTS {
                    if !rx.pop_bulk(&mut burst, SIZE) {
                        thread::yield_now();
                        continue;
                    }
                    popped.fetch_add(1, Ordering::Relaxed);
                    let (thread, first) = burst[0];
                    assert!(first.is_multiple_of(SIZE) && last[thread] < Some(first));
                    last[thread] = Some(first);
                    assert!(burst.drain_all().eq((first..first + SIZE).map(|item| (thread, item))));
                }
            });
        }
    });
    assert!(tx.is_empty() && rx.is_empty());
}

/// Counts how often it is dropped; the one with a 13 panics when it is.
#[derive(Debug)]
struct Counted<'a>(usize, &'a [AtomicUsize]);

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.1[self.0].fetch_add(1, Ordering::Relaxed);
        assert!(self.0 != 13 || thread::panicking(), "the thirteenth");
    }
}

fn counters(count: usize) -> Vec<AtomicUsize> {
    (0..count).map(|_| AtomicUsize::new(0)).collect()
}

fn counts(counters: &[AtomicUsize]) -> Vec<usize> {
    counters.iter().map(|counter| counter.load(Ordering::Relaxed)).collect()
}

#[test]
fn every_item_is_dropped_once_whichever_end_goes_first() {
    for producer_first in [true, false] {
        let dropped = counters(10);
        let (mut tx, mut rx) = spsc(6);
        let mut burst = Burst::with_capacity(8);
        burst.extend((0..8).map(|n| Counted(n, &dropped)));
        assert_eq!(tx.push_burst(&mut burst), 6);
        drop(rx.pop());
        drop(rx.pop());
        // Round the end of the slots.
        assert_eq!(tx.push_burst(&mut burst), 2);
        let refused = tx.push(Counted(8, &dropped)).unwrap_err();
        assert_eq!(counts(&dropped), [1, 1, 0, 0, 0, 0, 0, 0, 0, 0]);
        if producer_first {
            drop(tx);
            assert_eq!(rx.pop().map(|item| item.0), Some(2), "the other end goes on");
            drop(rx);
        } else {
            drop(rx);
            assert!(tx.push(Counted(9, &dropped)).is_err(), "it stays full");
            drop(tx);
        }
        let after = counts(&dropped);
        assert_eq!((&after[..8], after[8]), (&[1; 8][..], 0));
        drop(refused);
    }
}

/// What is behind an item whose drop panics may be leaked, but is never dropped twice.
#[test]
fn an_item_whose_drop_panics_does_no_more_than_leak() {
    let dropped = counters(20);
    let (tx, rx) = mpmc(20);
    for n in 10..20 {
        tx.push(Counted(n, &dropped)).unwrap();
    }
    drop(tx);
    catch_unwind(AssertUnwindSafe(|| drop(rx))).unwrap_err();
    let counts = counts(&dropped);
    assert_eq!(counts[10..14], [1; 4]);
    assert!(counts[14..].iter().all(|count| *count <= 1));
}

/// An end can be sent to another thread with items that can; a single one is not shared.
#[test]
fn ends_go_to_other_threads() {
    fn send<T: Send>(_: &T) {}
    fn sync<T: Sync>(_: &T) {}
    // A Cell is Send and not Sync.
    let (single, shared) = (spsc::<Cell<u8>>(1), mpmc::<Cell<u8>>(1));
    send(&single);
    send(&shared);
    sync(&shared);
}
