//! Time per request of our queue and of virtio-queue's, side by side.
//!
//! `cargo bench -p devices --bench ring`

mod rings;

use std::time::Duration;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use rings::{Other, Ours, REQUESTS, Shape};

const SHAPES: [Shape; 5] = [
    Shape { regions: 1, indirect: false, batch: 1 },
    Shape { regions: 1, indirect: false, batch: 32 },
    Shape { regions: 2, indirect: false, batch: 32 },
    Shape { regions: 1, indirect: true, batch: 32 },
    Shape { regions: 2, indirect: true, batch: 32 },
];

fn ring(criterion: &mut Criterion) {
    for shape in SHAPES {
        rings::check(shape);
        let mut group = criterion.benchmark_group(format!("{shape:?}"));
        group.throughput(Throughput::Elements(REQUESTS.into()));
        group.warm_up_time(Duration::from_millis(300)).measurement_time(Duration::from_secs(1));
        for (what, copies) in [("resolved", false), ("copied", true)] {
            let mut ours = Ours::new(shape, copies);
            group
                .bench_function(format!("nixvmm, {what}"), |bencher| bencher.iter(|| ours.serve()));
            let mut other = Other::new(shape, copies);
            group.bench_function(format!("virtio-queue, {what}"), |bencher| {
                bencher.iter(|| other.serve());
            });
        }
        group.finish();
    }
}

criterion_group!(benches, ring);
criterion_main!(benches);
