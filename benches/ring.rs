//! Rings by burst size, on one core and on two, beside `crossbeam::ArrayQueue` and `rtrb`.
//!
//! `cargo bench -p underpass-benches --bench ring`. `benches/dpdk` has the comparison with DPDK.
//!
//! On one core, so many items go in and come out again. On two, a thread at each end moves as many as it can; the figure
//! is the time between two items at the consumer.

#![allow(missing_docs, reason = "criterion's macros make undocumented functions")]
#![allow(clippy::unwrap_used, reason = "a benchmark that can not be set up has nothing to measure")]

use std::hint::{black_box, spin_loop};
use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use core_affinity::CoreId;
use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use crossbeam::queue::ArrayQueue;
use rtrb::RingBuffer;
use rtrb::chunks::ChunkError;
use underpass::{Burst, ring};

const SLOTS: usize = 1024;
const BURSTS: [usize; 4] = [1, 8, 32, 256];

/// What is measured: one end, with a burst of its own. Returns whether all moved.
type Move<'a> = &'a mut (dyn FnMut() -> bool + Send);

/// Calls `run` with both ends of each kind of ring, all of which move `n` items of 8 bytes at once.
fn each_kind(n: usize, run: &mut dyn FnMut(&str, Move<'_>, Move<'_>)) {
    let filled = || {
        let mut burst = Burst::with_capacity(n);
        burst.extend(std::iter::repeat_n(7_u64, n));
        burst
    };

    let (mut tx, mut rx) = ring::spsc(SLOTS);
    let (items, mut to) = (filled(), Burst::with_capacity(n));
    if n == 1 {
        run("spsc", &mut || tx.push(7).is_ok(), &mut || rx.pop().map(black_box).is_some());
    } else {
        run("spsc", &mut || tx.push_slice(&items), &mut || {
            to.clear();
            rx.pop_bulk(&mut to, n)
        });
    }

    let (tx, rx) = ring::mpmc(SLOTS);
    let (items, mut to) = (filled(), Burst::with_capacity(n));
    if n == 1 {
        run("mpmc", &mut || tx.push(7).is_ok(), &mut || rx.pop().map(black_box).is_some());
    } else {
        run("mpmc", &mut || tx.push_slice(&items), &mut || {
            to.clear();
            rx.pop_bulk(&mut to, n)
        });
    }

    // These move items one by one, so that a burst may stop in between: the next call goes on there.
    let queue = ArrayQueue::new(SLOTS);
    let (mut pushed, mut popped) = (0, 0);
    run(
        "ArrayQueue",
        &mut || {
            while pushed < n && queue.push(7).is_ok() {
                pushed += 1;
            }
            pushed == n && std::mem::take(&mut pushed) == n
        },
        &mut || {
            while popped < n && queue.pop().map(black_box::<u64>).is_some() {
                popped += 1;
            }
            popped == n && std::mem::take(&mut popped) == n
        },
    );

    let (mut tx, mut rx) = RingBuffer::new(SLOTS);
    let (items, mut to) = (filled(), vec![0; n]);
    if n == 1 {
        run("rtrb", &mut || tx.push(7).is_ok(), &mut || rx.pop().map(black_box::<u64>).is_ok());
    } else {
        run("rtrb", &mut || tx.push_entire_slice(&items).is_ok(), &mut || {
            let popped: Result<(), ChunkError> = rx.pop_entire_slice(&mut to);
            popped.is_ok()
        });
    }
}

fn group<'a>(c: &'a mut Criterion, name: &str, n: usize) -> BenchmarkGroup<'a, WallTime> {
    let mut group = c.benchmark_group(name);
    group.throughput(Throughput::Elements(n as u64));
    group.warm_up_time(Duration::from_millis(500)).measurement_time(Duration::from_secs(2));
    group
}

fn one_core(c: &mut Criterion) {
    for n in BURSTS {
        each_kind(n, &mut |name, push, pop| {
            let mut group = group(c, "ring/one core", n);
            group.bench_function(BenchmarkId::new(name, n), |b| b.iter(|| push() && pop()));
            group.finish();
        });
    }
}

fn two_cores(c: &mut Criterion) {
    let cores = underpass::worker::cores();
    let [first, .., last] = *cores else { return eprintln!("one core: nothing is measured between two") };
    for n in BURSTS {
        each_kind(n, &mut |name, push, pop| {
            let mut group = group(c, "ring/two cores", n);
            group.bench_function(BenchmarkId::new(name, n), |b| {
                b.iter_custom(|bursts| between(first, last, bursts, push, pop));
            });
            group.finish();
        });
    }
}

/// How long it takes until so many bursts are through.
fn between(first: usize, last: usize, bursts: u64, push: Move<'_>, pop: Move<'_>) -> Duration {
    let together = Barrier::new(2);
    let run = |core: usize, work: Move<'_>| {
        core_affinity::set_for_current(CoreId { id: core });
        together.wait();
        let start = Instant::now();
        for _ in 0..bursts {
            while !work() {
                spin_loop();
            }
        }
        start.elapsed()
    };
    thread::scope(|scope| {
        scope.spawn(|| run(first, push));
        scope.spawn(|| run(last, pop)).join().unwrap()
    })
}

criterion_group!(benches, one_core, two_cores);
criterion_main!(benches);
