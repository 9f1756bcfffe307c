//! What DPDK's `ring_perf_autotest` measures, of our rings: the other half of `benches/dpdk`, which runs both in turns.
//!
//! ```sh
//! cargo run --release -p underpass-benches --example dpdk_peer
//! ```
//!
//! Prints a line for each figure: what, how many cores, how many items at once, nanoseconds an item. As in DPDK's test
//! (app/test/test_ring_perf.c), items are 8 bytes, the ring has 4096 slots and all operations are bulk. On one core an item
//! is pushed and popped, 2^26 of them. On two cores one pushes and the other pops 2^22 items at the same time, each trying
//! again after a pause, and the figure is the sum of both sides' times: about twice the time between two items.

#![allow(clippy::print_stdout, reason = "the figures are the output")]

use std::hint::{black_box, spin_loop};
use std::sync::Barrier;
use std::thread;
use std::time::Instant;

use core_affinity::CoreId;
use underpass::{Burst, ring};

const SLOTS: usize = 4096;
const BULK: [usize; 3] = [8, 32, 256];
const ITEMS_ONE_CORE: usize = 1 << 26;
const ITEMS_TWO_CORES: usize = 1 << 22;

fn main() {
    pin(0);
    for (what, cores, n) in chosen() {
        let (mut tx, mut rx) = ring::spsc(SLOTS);
        let (mp_tx, mp_rx) = ring::mpmc(SLOTS);
        let ns = match (what, cores) {
            ("spsc", 1) => one_core(n, |b| tx.push_bulk(b, n), |b| rx.pop_bulk(b, n)),
            ("spsc", _) => two_cores(n, |b| tx.push_slice(b), |b| rx.pop_bulk(b, n)),
            (_, 1) => one_core(n, |b| mp_tx.push_bulk(b, n), |b| mp_rx.pop_bulk(b, n)),
            (_, _) => two_cores(n, |b| mp_tx.push_slice(b), |b| mp_rx.pop_bulk(b, n)),
        };
        println!("{what} {cores} {n} {ns:.4}");
    }
}

/// All figures, or those whose beginnings are the arguments: `"mpmc 2 8"`.
fn chosen() -> impl Iterator<Item = (&'static str, usize, usize)> {
    let wanted: Vec<String> = std::env::args().skip(1).collect();
    let cases = ["spsc", "mpmc"].into_iter().flat_map(|what| [1, 2].map(|cores| (what, cores)));
    let all = cases.flat_map(|(what, cores)| BULK.map(|n| (what, cores, n)));
    all.filter(move |(what, cores, n)| {
        wanted.is_empty() || wanted.iter().any(|w| format!("{what} {cores} {n}").starts_with(w))
    })
}

type Items = Burst<u64>;

#[inline(never)]
fn one_core(
    n: usize,
    mut push: impl FnMut(&mut Items) -> bool,
    mut pop: impl FnMut(&mut Items) -> bool,
) -> f64 {
    // How many at once is known when it runs only, as in DPDK's test.
    let mut burst = Items::with_capacity(BULK[BULK.len() - 1]);
    burst.extend([7; BULK[BULK.len() - 1]][..n].iter().copied());
    time(ITEMS_ONE_CORE, || {
        for _ in 0..ITEMS_ONE_CORE / n {
            let moved = push(&mut burst) && pop(&mut burst);
            assert!(moved, "a ring that is empty has room, and one that is not has items");
        }
    })
}

#[inline(never)]
fn two_cores(
    n: usize,
    mut push: impl FnMut(&[u64]) -> bool,
    mut pop: impl FnMut(&mut Items) -> bool + Send,
) -> f64 {
    let together = Barrier::new(2);
    let source: Vec<u64> = (0..n as u64).collect();
    thread::scope(|scope| {
        let consumer = scope.spawn(|| {
            pin(1);
            let mut burst = Items::with_capacity(n);
            together.wait();
            time(ITEMS_TWO_CORES, || {
                for _ in 0..ITEMS_TWO_CORES / n {
                    while !pop(&mut burst) {
                        spin_loop();
                    }
                    black_box(&burst[..]);
                    burst.clear();
                }
            })
        });
        together.wait();
        let producer = time(ITEMS_TWO_CORES, || {
            for _ in 0..ITEMS_TWO_CORES / n {
                while !push(&source) {
                    spin_loop();
                }
            }
        });
        producer + consumer.join().expect("the consumer panicked")
    })
}

/// Nanoseconds an item.
#[inline(always)]
fn time(items: usize, work: impl FnOnce()) -> f64 {
    let start = Instant::now();
    work();
    start.elapsed().as_secs_f64() * 1e9 / items as f64
}

fn pin(core: usize) {
    assert!(core_affinity::set_for_current(CoreId { id: core }), "core {core} can not be used");
}
