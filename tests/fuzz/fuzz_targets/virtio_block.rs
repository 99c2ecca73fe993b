//! Whatever a driver does with a disk, it works after a reset and nothing is written to the image
//! that no request wrote.
#![no_main]

use std::sync::OnceLock;

use arbitrary::Arbitrary;
use devices::host::disk::Engine;
use devices::host::disk::image::{Access, Image};
use devices::virtio::block::{Block, BlockOptions};
use fuzz::virtio::{Descriptor, Step, drive};
use libfuzzer_sys::fuzz_target;

const IMAGE_BYTES: u64 = 64 << 10;
/// Where headers and ranges are put for descriptors to find.
const REQUESTS: u32 = 0x400;

/// One thing that a driver of disks does.
#[derive(Arbitrary, Debug)]
enum DiskStep {
    /// Anything that can be done to any device.
    Any(Step),
    /// Puts a header, and the range that may follow it, into memory.
    Header { slot: u8, kind: u8, sector: u16, sectors: u16, flags: u8 },
    /// Sends three descriptors: a header, data and a status.
    Request { queue: u8, head: u8, slot: u8, len: u16, is_write: bool },
}

fuzz_target!(|input: (u8, bool, Vec<DiskStep>)| {
    let (engine, read_only, steps) = input;
    let engine = [Engine::Sync, Engine::Uring, Engine::Auto][usize::from(engine % 3)];
    let steps: Vec<_> = steps.into_iter().flat_map(expand).collect();
    drive(
        |home| {
            let image = Image::open(image_path(), Access { read_only, direct: false }).unwrap();
            let options = BlockOptions { image, serial: "fuzz".to_owned(), engine, queues: 2 };
            Box::new(Block::new(options, home).unwrap())
        },
        &steps,
    );
    let size = std::fs::metadata(image_path()).unwrap().len();
    assert_eq!(size, IMAGE_BYTES, "a disk never grows or shrinks by itself");
});

fn image_path() -> &'static std::path::Path {
    static PATH: OnceLock<std::path::PathBuf> = OnceLock::new();
    PATH.get_or_init(|| {
        let path = std::env::temp_dir().join(format!("fuzz-block-{}", std::process::id()));
        std::fs::write(&path, vec![7; usize::try_from(IMAGE_BYTES).unwrap()]).unwrap();
        path
    })
}

fn expand(step: DiskStep) -> Vec<Step> {
    match step {
        DiskStep::Any(step) => vec![step],
        DiskStep::Header { slot, kind, sector, sectors, flags } => {
            let at = header(slot);
            let kind = u64::from(kind % 16);
            let length = u64::from(sectors) | u64::from(flags) << 32;
            // A range is read from where the header ends: at the next descriptor's address.
            let words = [kind, u64::from(sector), u64::from(sector), length];
            (0..).zip(words).map(|(index, word)| write(at + 8 * index, word)).collect()
        }
        DiskStep::Request { queue, head, slot, len, is_write } => {
            let at = header(slot);
            let (data, flags) = if is_write { (at + 16, 0) } else { (0x8000, 2) };
            let descriptors = vec![
                Descriptor::new(at, 16, 1),
                Descriptor::new(data, len, 1 | flags),
                Descriptor::new(0x300, 1, 2),
            ];
            vec![Step::Send { queue: queue % 2, head, descriptors }, Step::Settle]
        }
    }
}

fn header(slot: u8) -> u32 {
    REQUESTS + 32 * u32::from(slot % 8)
}

fn write(address: u32, word: u64) -> Step {
    Step::Write { address, bytes: word.to_le_bytes() }
}
