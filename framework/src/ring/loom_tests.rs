//! loom runs each of these in every order that the memory model allows, and fails if a slot is ever used by two threads
//! at once, or by one that does not see what the last one did. Items are boxes: to lose or to double one is an error too.
//! Rings are small, so that positions wrap around within few operations.
//!
//! loom decides what to try from the last access to a word alone. So whoever reads what others publish is the thread that is
//! made last: otherwise its load is hidden by a later one, and some orders are never tried.

use loom::model::Builder;
use loom::thread;

use super::*;

type Item = loom::sync::Arc<usize>;

fn item(n: usize) -> Item {
    loom::sync::Arc::new(n)
}

fn burst(items: impl ExactSizeIterator<Item = usize>) -> Burst<Item> {
    let mut burst = Burst::with_capacity(items.len());
    burst.extend(items.map(item));
    burst
}

/// With at most so many switches away from a thread that could go on: without a bound three threads take for ever.
fn model(preemptions: Option<usize>, run: impl Fn() + Sync + Send + 'static) {
    let mut builder = Builder::new();
    builder.preemption_bound = preemptions;
    builder.check(run);
}

#[test]
fn loom_spsc_one_at_a_time() {
    model(None, || {
        let (mut tx, mut rx) = spsc(1);
        let producer = thread::spawn(move || {
            for n in 0..3 {
                let mut next = item(n);
                while let Err(back) = tx.push(next) {
                    next = back;
                    thread::yield_now();
                }
            }
        });
        for n in 0..3 {
            loop {
                match rx.pop() {
                    Some(item) => break assert_eq!(*item, n),
                    None => thread::yield_now(),
                }
            }
        }
        producer.join().unwrap();
    });
}

#[test]
fn loom_spsc_bursts_and_what_is_left_when_it_is_dropped() {
    model(None, || {
        // Not a power of two: three of four slots are used at a time.
        let (mut tx, mut rx) = spsc(3);
        let producer = thread::spawn(move || {
            let mut items = burst(0..5);
            let first = tx.push_burst(&mut items);
            assert_eq!(first, 3);
            let second = tx.push_bulk(&mut items, 2);
            (first + if second { 2 } else { 0 }, tx)
        });
        let mut items = Burst::with_capacity(4);
        rx.pop_burst(&mut items);
        if items.room() >= 2 {
            rx.pop_bulk(&mut items, 2);
        }
        assert!(items.iter().enumerate().all(|(n, item)| **item == n));
        drop(rx);
        let (pushed, _tx) = producer.join().unwrap();
        assert!(items.len() <= pushed);
    });
}

#[test]
fn loom_mpmc_two_producers() {
    model(Some(3), || {
        // Room for all, so that one publishes behind the other.
        let (tx, rx) = mpmc(4);
        let producers = [0, 10].map(|first| {
            let tx = tx.clone();
            thread::spawn(move || assert!(tx.push_bulk(&mut burst(first..first + 2), 2)))
        });
        let consumer = thread::spawn(move || {
            let mut items = Burst::with_capacity(4);
            rx.pop_burst(&mut items);
            (rx, items)
        });
        let (rx, mut items) = consumer.join().unwrap();
        for producer in producers {
            producer.join().unwrap();
        }
        rx.pop_burst(&mut items);
        // What one pushed at once is together.
        let order: Vec<_> = items.iter().map(|item| **item).collect();
        assert!(order == [0, 1, 10, 11] || order == [10, 11, 0, 1], "{order:?}");
    });
}

/// Two producers and a consumer on a ring that is full at first, so that what is pushed goes where others were popped.
fn two_producers_go_round(consumer_first: bool) {
    model(Some(3), move || {
        let (tx, rx) = mpmc(2);
        assert!(tx.push_bulk(&mut burst(0..2), 2));
        let consume = || {
            let rx = rx.clone();
            thread::spawn(move || {
                let mut items = Burst::with_capacity(4);
                rx.pop_burst(&mut items);
                items
            })
        };
        let first = consumer_first.then(consume);
        let producers = [2, 3].map(|n| {
            let tx = tx.clone();
            thread::spawn(move || tx.push(item(n)).is_ok().then_some(n))
        });
        let consumer = first.unwrap_or_else(consume);
        let mut pushed: Vec<_> = producers.into_iter().filter_map(|one| one.join().unwrap()).collect();
        let mut items = consumer.join().unwrap();
        rx.pop_burst(&mut items);
        let mut popped: Vec<_> = items.iter().map(|item| **item).collect();
        popped[2..].sort_unstable();
        pushed.splice(0..0, 0..2);
        assert_eq!(popped, pushed);
    });
}

#[test]
fn loom_mpmc_two_producers_behind_a_consumer() {
    two_producers_go_round(true);
}

#[test]
fn loom_mpmc_two_producers_before_a_consumer() {
    two_producers_go_round(false);
}

#[test]
fn loom_mpmc_two_consumers() {
    model(Some(3), || {
        let (tx, rx) = mpmc::<Item>(2);
        let consumers = [(); 2].map(|()| {
            let rx = rx.clone();
            thread::spawn(move || rx.pop().map(|item| *item))
        });
        assert_eq!(tx.push_burst(&mut burst(0..2)), 2);
        let third = tx.push(item(2)).is_ok();
        let mut popped = consumers.map(|consumer| consumer.join().unwrap()).to_vec();
        while let Some(item) = rx.pop() {
            popped.push(Some(*item));
        }
        popped.retain(Option::is_some);
        popped.sort_unstable();
        assert_eq!(popped, [Some(0), Some(1), Some(2)][..if third { 3 } else { 2 }]);
    });
}

/// One thread at each end of a shared ring, round and round: the limits that a side keeps are used again.
#[test]
fn loom_mpmc_goes_round() {
    model(Some(3), || {
        let (tx, rx) = mpmc::<Item>(2);
        let producer = thread::spawn(move || {
            for n in 0..4 {
                let mut next = item(n);
                while let Err(back) = tx.push(next) {
                    next = back;
                    thread::yield_now();
                }
            }
        });
        let mut items = Burst::with_capacity(4);
        while items.len() < 4 {
            if rx.pop_burst(&mut items) == 0 {
                thread::yield_now();
            }
        }
        assert!(items.iter().enumerate().all(|(n, item)| **item == n));
        producer.join().unwrap();
    });
}
