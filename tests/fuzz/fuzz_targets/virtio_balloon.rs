//! Whatever a driver does with a balloon, it works after a reset.
#![no_main]

use std::time::Duration;

use arbitrary::Arbitrary;
use devices::virtio::balloon::{Balloon, BalloonOptions};
use fuzz::virtio::{Descriptor, Step, drive, memory};
use libfuzzer_sys::fuzz_target;

/// One thing that a driver of balloons, or the host, does.
#[derive(Arbitrary, Debug)]
enum BalloonStep {
    /// Anything that can be done to any device.
    Any(Step),
    /// Page numbers in memory, and a request that has them.
    Pages { queue: u8, head: u8, pages: [u32; 2], len: u16 },
    /// Free memory is reported.
    Report { head: u8, address: u32, len: u16 },
}

fuzz_target!(|input: (bool, bool, u64, Vec<BalloonStep>)| {
    let (free_page_reporting, deflate_on_oom, target, steps) = input;
    let steps: Vec<_> = steps.into_iter().flat_map(expand).collect();
    drive(
        |home| {
            let options = BalloonOptions {
                deflate_on_oom,
                free_page_reporting,
                statistics_interval: Some(Duration::from_millis(1)),
            };
            let balloon = Balloon::new(options, home).unwrap();
            let inflator = balloon.inflator(memory());
            let _ = inflator.set_target(target);
            inflator.refresh_statistics();
            Box::new(balloon)
        },
        &steps,
    );
});

fn expand(step: BalloonStep) -> Vec<Step> {
    const NUMBERS: u32 = 0x8000;
    match step {
        BalloonStep::Any(step) => vec![step],
        BalloonStep::Pages { queue, head, pages, len } => {
            // Most pages are some of memory.
            let [first, second] =
                pages.map(|page| u64::from(if page % 7 > 0 { page % 300 } else { page }));
            let bytes = (first | second << 32).to_le_bytes();
            let descriptors = vec![Descriptor::new(NUMBERS, len, 0)];
            vec![
                Step::Write { address: NUMBERS, bytes },
                Step::Send { queue: queue % 3, head, descriptors },
            ]
        }
        BalloonStep::Report { head, address, len } => {
            let descriptors =
                vec![Descriptor::new(address, len, 3), Descriptor::new(address / 2, len, 2)];
            vec![Step::Send { queue: 3, head, descriptors }, Step::Settle]
        }
    }
}
