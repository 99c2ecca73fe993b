//! Whatever a driver does with a memory device, it works after a reset, and never more is plugged
//! than was asked for.
#![no_main]

use std::sync::OnceLock;

use arbitrary::Arbitrary;
use arch::memory::{Backing, GuestMemory};
use devices::virtio::mem::Mem;
use fuzz::virtio::{Descriptor, Step, drive};
use libfuzzer_sys::fuzz_target;

const BLOCK: u64 = 2 << 20;
const FIXED: u64 = 1 << 20;
const START: u64 = 2 << 40;
const BLOCKS: u64 = 70;

/// One thing that a driver of memory devices does.
#[derive(Arbitrary, Debug)]
enum MemStep {
    /// Anything that can be done to any device.
    Any(Step),
    /// A request that is nearly right.
    Request { kind: u8, block: u8, count: u8, odd: u16, head: u8, len: u8, room: u8 },
}

fuzz_target!(|input: (u8, Vec<MemStep>)| {
    let (blocks, steps) = input;
    let requested = u64::from(blocks) % (BLOCKS + 1);
    let steps: Vec<_> = steps.into_iter().flat_map(expand).collect();
    let memory = elastic_memory();
    let mut sizer = None;
    drive(
        |home| {
            let mem = Mem::new(memory, memory.regions().last().unwrap(), home);
            let host = mem.sizer(memory);
            host.set_size(FIXED + requested * BLOCK).unwrap();
            sizer = Some(host);
            Box::new(mem)
        },
        &steps,
    );
    let sizer = sizer.unwrap();
    assert!(sizer.size() <= sizer.requested(), "more is plugged than was asked for");
});

fn elastic_memory() -> GuestMemory {
    static MEMORY: OnceLock<GuestMemory> = OnceLock::new();
    *MEMORY.get_or_init(|| {
        let elastic = START..START + BLOCKS * BLOCK;
        GuestMemory::map_elastic(&[0..FIXED], Some(&elastic), Backing::default()).unwrap()
    })
}

fn expand(step: MemStep) -> Vec<Step> {
    const REQUEST: u32 = 0x8000;
    match step {
        MemStep::Any(step) => vec![step],
        MemStep::Request { kind, block, count, odd, head, len, room } => {
            let odd = if odd % 8 == 0 { u64::from(odd) } else { 0 };
            let address = START + u64::from(block % 80) * BLOCK + odd;
            let words = [u64::from(kind % 6), address, u64::from(count)];
            let write =
                |(at, word): (u32, u64)| Step::Write { address: at, bytes: word.to_le_bytes() };
            let mut steps: Vec<_> =
                (0..).step_by(8).map(|at| REQUEST + at).zip(words).map(write).collect();
            let len = if len % 8 == 0 { u16::from(len) } else { 24 };
            let room = if room % 8 == 0 { u16::from(room) } else { 10 };
            let descriptors =
                vec![Descriptor::new(REQUEST, len, 1), Descriptor::new(REQUEST + 64, room, 2)];
            steps.extend([Step::Send { queue: 0, head, descriptors }, Step::Settle]);
            steps
        }
    }
}
