//! Instructions per request of our queue and of virtio-queue's; fails above a limit.
//!
//! `cargo bench -p devices --bench ring_instructions`, with valgrind and gungraun-runner 0.20.0.

mod rings;

use std::process::{Command, Stdio};

fn main() {
    let is_there = |tool: &str| {
        let mut command = Command::new(tool);
        command.arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok()
    };
    let missing: Vec<_> =
        ["valgrind", "gungraun-runner"].into_iter().filter(|tool| !is_there(tool)).collect();
    if missing.is_empty() {
        gate::run();
    } else {
        println!("SKIPPED: no instructions were counted, for want of {}", missing.join(" and "));
    }
}

mod gate {
    use gungraun::{
        Callgrind, EventKind, LibraryBenchmarkConfig, library_benchmark, library_benchmark_group,
    };

    use super::rings::{self, Other, Ours, REQUESTS, Shape};

    /// Instructions that one request may take, a tenth more than it took when this was written:
    /// virtio-queue took 1746, 1196, 1331 and 1343.
    const REQUEST_MAX: [u64; 4] = [470, 340, 400, 410];

    const ONE_REGION: Shape = Shape { regions: 1, indirect: false, batch: 32 };
    const ONE_BY_ONE: Shape = Shape { batch: 1, ..ONE_REGION };
    const TWO_REGIONS: Shape = Shape { regions: 2, ..ONE_REGION };
    const INDIRECT: Shape = Shape { indirect: true, ..ONE_REGION };

    fn limit(request_max: u64) -> LibraryBenchmarkConfig {
        let most = request_max * u64::from(REQUESTS);
        let mut config = LibraryBenchmarkConfig::default();
        config.tool(Callgrind::default().hard_limits([(EventKind::Ir, most)]));
        config
    }

    /// A queue whose first round, with its page faults and cold paths, is over.
    fn ours(shape: Shape) -> Ours {
        rings::check(shape);
        let mut ours = Ours::new(shape, false);
        ours.serve();
        ours
    }

    fn other(shape: Shape) -> Other {
        let mut other = Other::new(shape, false);
        other.serve();
        other
    }

    #[library_benchmark]
    #[bench::one_by_one(args = (ONE_BY_ONE), setup = ours, config = limit(REQUEST_MAX[0]))]
    #[bench::one_region(args = (ONE_REGION), setup = ours, config = limit(REQUEST_MAX[1]))]
    #[bench::two_regions(args = (TWO_REGIONS), setup = ours, config = limit(REQUEST_MAX[2]))]
    #[bench::indirect(args = (INDIRECT), setup = ours, config = limit(REQUEST_MAX[3]))]
    fn nixvmm(mut ours: Ours) -> Ours {
        ours.serve();
        ours
    }

    #[library_benchmark]
    #[bench::one_by_one(args = (ONE_BY_ONE), setup = other)]
    #[bench::one_region(args = (ONE_REGION), setup = other)]
    #[bench::two_regions(args = (TWO_REGIONS), setup = other)]
    #[bench::indirect(args = (INDIRECT), setup = other)]
    fn virtio_queue(mut other: Other) -> Other {
        other.serve();
        other
    }

    library_benchmark_group!(
        name = ring,
        compare_by_id = true,
        benchmarks = [nixvmm, virtio_queue]
    );
    gungraun::main!(library_benchmark_groups = ring);

    pub(super) fn run() {
        main();
    }
}
