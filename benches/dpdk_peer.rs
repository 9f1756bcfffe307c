//! What DPDK's `ring_perf_autotest` and `mempool_perf_autotest_1core` measure, of our rings and pools: the other half of
//! `benches/dpdk`, which runs both in turns.
//!
//! ```sh
//! cargo run --release -p underpass-benches --example dpdk_peer ["mpmc 2 8"...]
//! ```
//!
//! Prints a line for each figure: what, how many cores, how many at once, nanoseconds an item.
//!
//! Rings, as in DPDK's `test_ring_perf.c`: items of 8 bytes, 4096 slots, all or none of so many at once. On one core, items
//! are pushed and popped, 2^26 of them. On two, one pushes copies from a table and the other pops to one, 2^22 items at the
//! same time, each trying again after a pause; the figure is the sum of both sides' times, so about twice the time between
//! two items.
//!
//! Pools, as in DPDK's `test_mempool_perf.c`: one core with a cache of 512 takes so many buffers, 32 at a time, and gives
//! them back, 32 at a time, 2^22 of them; the buffers' contents and metadata stay as they are.

#![allow(clippy::print_stdout, reason = "the figures are the output")]
#![allow(clippy::cast_precision_loss, reason = "counts are far below 2^52")]

use std::error::Error;
use std::hint::{black_box, spin_loop};
use std::iter;
use std::sync::Barrier;
use std::thread;
use std::time::Instant;

use core_affinity::CoreId;
use underpass::pool::Slot;
use underpass::{Burst, Packet, Pool, ring};

const SLOTS: usize = 4096;
const BULK: [usize; 3] = [8, 32, 256];
const ITEMS_ONE_CORE: usize = 1 << 26;
const ITEMS_TWO_CORES: usize = 1 << 22;

const KEEP: [usize; 3] = [32, 128, 512];
const GET: usize = 32;
const BUFFERS: usize = 33_791;
const BUFFERS_TAKEN: usize = 1 << 22;

fn main() -> Result<(), Box<dyn Error>> {
    pin(0);
    for (what, cores, n) in chosen() {
        let (mut tx, mut rx) = ring::spsc(SLOTS);
        let (mp_tx, mp_rx) = ring::mpmc(SLOTS);
        let nanoseconds = match (what, cores) {
            ("pool", _) => pool(n)?,
            ("spsc", 1) => one_core(n, |b| tx.push_bulk(b, n), |b| rx.pop_bulk(b, n)),
            ("spsc", _) => two_cores(n, |items| tx.push_slice(items), |b| rx.pop_bulk(b, n)),
            (_, 1) => one_core(n, |b| mp_tx.push_bulk(b, n), |b| mp_rx.pop_bulk(b, n)),
            (_, _) => two_cores(n, |items| mp_tx.push_slice(items), |b| mp_rx.pop_bulk(b, n)),
        };
        println!("{what} {cores} {n} {nanoseconds:.4}");
    }
    Ok(())
}

/// All figures, or those that start as an argument does.
fn chosen() -> impl Iterator<Item = (&'static str, usize, usize)> {
    let rings = ["spsc", "mpmc"].into_iter().flat_map(|what| [1, 2].map(|cores| (what, cores)));
    let all = rings.flat_map(|(what, cores)| BULK.map(|n| (what, cores, n)));
    let all = all.chain(KEEP.map(|n| ("pool", 1, n)));
    let wanted: Vec<String> = std::env::args().skip(1).collect();
    all.filter(move |(what, cores, n)| {
        wanted.is_empty() || wanted.iter().any(|start| format!("{what} {cores} {n}").starts_with(start))
    })
}

#[inline(never)]
fn one_core(
    n: usize,
    mut push: impl FnMut(&mut Burst<u64>) -> bool,
    mut pop: impl FnMut(&mut Burst<u64>) -> bool,
) -> f64 {
    let mut burst = Burst::with_capacity(n);
    burst.extend(iter::repeat_n(7, n));
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
    mut pop: impl FnMut(&mut Burst<u64>) -> bool + Send,
) -> f64 {
    let together = Barrier::new(2);
    thread::scope(|scope| {
        let consumer = scope.spawn(|| {
            pin(1);
            let mut burst = Burst::with_capacity(n);
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
        let items = vec![7; n];
        together.wait();
        let producer = time(ITEMS_TWO_CORES, || {
            for _ in 0..ITEMS_TWO_CORES / n {
                while !push(&items) {
                    spin_loop();
                }
            }
        });
        producer + consumer.join().expect("the consumer panicked")
    })
}

fn pool(keep: usize) -> Result<f64, Box<dyn Error>> {
    let _slot = Slot::claim();
    let pool = Pool::builder(BUFFERS).cache(512).build()?;
    let mut bursts: Vec<Burst<Packet>> = (0..keep / GET).map(|_| Burst::with_capacity(GET)).collect();
    let nanoseconds = time(BUFFERS_TAKEN, || {
        for _ in 0..BUFFERS_TAKEN / keep {
            for burst in &mut bursts {
                let taken = pool.alloc_raw(GET, burst);
                assert_eq!(taken, GET, "there are enough");
            }
            for burst in &mut bursts {
                black_box(&mut *burst).free();
            }
        }
    });
    Ok(nanoseconds)
}

/// Nanoseconds for each of so many.
fn time(count: usize, work: impl FnOnce()) -> f64 {
    let start = Instant::now();
    work();
    start.elapsed().as_secs_f64() * 1e9 / count as f64
}

fn pin(core: usize) {
    assert!(core_affinity::set_for_current(CoreId { id: core }), "core {core} can not be used");
}
