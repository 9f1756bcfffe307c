//! Pools: taking buffers and giving them back, by burst size, with a cache and without.
//!
//! `cargo bench -p underpass-benches --bench pool`.
//!
//! `raw` leaves the packets' metadata as they are, `packets` makes them empty; both give them back as one burst, which looks
//! at the metadata of each. `one by one` drops each packet of a burst by itself.

#![allow(missing_docs, reason = "criterion's macros make undocumented functions")]
#![allow(clippy::unwrap_used, reason = "a benchmark that can not be set up has nothing to measure")]

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use underpass::pool::Slot;
use underpass::{Burst, Packet, Pool};

/// Buffers taken before any is given back.
const BURSTS: [usize; 4] = [1, 8, 32, 256];

fn bursts(
    c: &mut Criterion,
    name: &str,
    cache: usize,
    get: impl Fn(&Pool, usize, &mut Burst<Packet>) -> usize,
    put: impl Fn(&mut Burst<Packet>),
) {
    let _slot = Slot::claim();
    let pool = Pool::builder(8_192).cache(cache).build().unwrap();
    let mut group = c.benchmark_group(name);
    for count in BURSTS {
        let mut burst = Burst::with_capacity(count);
        group.throughput(Throughput::Elements(count as u64));
        group.bench_function(BenchmarkId::from_parameter(count), |b| {
            b.iter(|| {
                get(&pool, count, &mut burst);
                put(black_box(&mut burst));
            });
        });
    }
    group.finish();
    assert_eq!((pool.exhausted(), pool.outstanding()), (0, 0));
}

fn one(c: &mut Criterion) {
    let _slot = Slot::claim();
    let pool = Pool::builder(8_192).build().unwrap();
    c.bench_function("cache/one", |b| b.iter(|| pool.alloc()));
}

fn pool(c: &mut Criterion) {
    bursts(c, "cache/raw", 512, Pool::alloc_raw, Burst::free);
    bursts(c, "cache/packets", 512, Pool::alloc_burst, Burst::free);
    bursts(c, "cache/packets, one by one", 512, Pool::alloc_burst, Burst::clear);
    bursts(c, "ring/raw", 0, Pool::alloc_raw, Burst::free);
    bursts(c, "ring/packets", 0, Pool::alloc_burst, Burst::free);
}

criterion_group!(benches, one, pool);
criterion_main!(benches);
