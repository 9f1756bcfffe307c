//! The software IOMMU: mapping and unmapping, and what a translation costs a device.
//!
//! `cargo bench -p underpass-benches --bench iommu`. The 1 GiB region of 2 MiB pages needs 512 reserved huge
//! pages; without them that part says how to reserve them and is left out.

#![allow(missing_docs, reason = "criterion's macros make undocumented functions")]
#![allow(clippy::unwrap_used, reason = "a benchmark that can not be set up has nothing to measure")]

use std::hint::black_box;
use std::sync::Arc;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use underpass::iommu::soft::{SoftIommu, SoftOptions};
use underpass::iommu::{Ioas, IommuBackend, PageSize};
use underpass::{Access, Region};

fn space() -> (SoftIommu, Ioas) {
    let iommu = SoftIommu::new(SoftOptions::default());
    let ioas = iommu.alloc_ioas().unwrap();
    (iommu, ioas)
}

fn map_and_unmap(c: &mut Criterion) {
    let mut group = c.benchmark_group("map");
    let cases = [
        ("1 GiB of 2 MiB pages", PageSize::Size2M, 1 << 30),
        ("2 MiB page", PageSize::Size2M, 2 << 20),
        ("2 MiB of 4 KiB pages", PageSize::Size4K, 2 << 20),
        ("4 KiB page", PageSize::Size4K, 4096),
    ];
    for (name, size, len) in cases {
        let region = match Region::builder(len).page_size(size).build() {
            Ok(region) => region,
            Err(error) => {
                eprintln!("map/{name}: left out: {error}");
                continue;
            }
        };
        let (iommu, ioas) = space();
        let device = iommu.device("soft:bench");
        let _attachment = ioas.attach(&device, None).unwrap();
        // An engine that could have translations cached, as a device has.
        let _bus = device.bus();
        // Once, so that the tables' nodes are there: what is measured is the steady state.
        drop(ioas.map(&region, Access::READ_WRITE).unwrap());
        group.bench_function(format!("map, {name}"), |b| {
            b.iter_with_large_drop(|| {
                // The mapping before this one is dropped outside the time, in criterion's batch: so each is
                // mapped into a space of its own.
                let ioas = iommu.alloc_ioas().unwrap();
                ioas.map(&region, Access::READ_WRITE).unwrap()
            });
        });
        group.bench_function(format!("map and unmap, {name}"), |b| {
            b.iter(|| drop(black_box(ioas.map(&region, Access::READ_WRITE).unwrap())));
        });
    }
    group.finish();
}

fn translate(c: &mut Criterion) {
    let (iommu, ioas) = space();
    let device = iommu.device("soft:bench");
    let _attachment = ioas.attach(&device, None).unwrap();
    let region: Arc<Region> = Region::builder(64 << 20).build().unwrap();
    let mapping = ioas.map(&region, Access::READ_WRITE).unwrap();
    let iova = mapping.iova();
    let mut bus = device.bus();

    let mut group = c.benchmark_group("translation");
    group.throughput(Throughput::Elements(1));
    group.bench_function("hit", |b| {
        b.iter(|| bus.probe(None, black_box(iova), 64, Access::READ).unwrap());
    });
    // One granule of 64 KiB after another over 64 MiB: eight times what the IOTLB holds.
    let mut at = 0;
    group.bench_function("miss, pages of the region's size", |b| {
        b.iter(|| {
            at = (at + (64 << 10)) % (64 << 20);
            bus.probe(None, black_box(iova.wrapping_add(at)), 64, Access::READ).unwrap();
        });
    });
    group.finish();
}

criterion_group!(benches, map_and_unmap, translate);
criterion_main!(benches);
