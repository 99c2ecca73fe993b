use std::fs::{self, File};
use std::io::ErrorKind;
use std::os::fd::AsFd;
use std::path::PathBuf;

use arch::memory::{Backing, GuestAddress, GuestMemory};
use proptest::prelude::*;
use rustix::event::{PollFd, PollFlags, poll};
use tempfile::TempDir;

use super::image::Access;
use super::*;

const IMAGE_BYTES: usize = 256 << 10;

/// An image with a disk on it, and guest memory.
struct Bench {
    path: PathBuf,
    disk: Box<dyn Disk>,
    memory: GuestMemory,
    _folder: TempDir,
}

impl Bench {
    /// `None` where this machine lacks what is asked for.
    fn new(engine: Engine, direct: bool) -> Option<Self> {
        // Not in the folder for temporary files, which may be memory and know no direct access.
        let folder = TempDir::new_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let path = folder.path().join("disk.img");
        fs::write(&path, pattern()).unwrap();
        let image = Arc::new(Image::open(&path, Access { read_only: false, direct }).ok()?);
        let disk = engine.open(image).ok()?;
        let memory = GuestMemory::map(&[0..4 << 20], Backing::default()).unwrap();
        Some(Self { path, disk, memory, _folder: folder })
    }

    /// Every kind of disk that this machine has.
    fn all() -> Vec<Self> {
        let engines = [Engine::Sync, Engine::Uring, Engine::Auto];
        let cases = engines.into_iter().flat_map(|engine| [(engine, false), (engine, true)]);
        cases.filter_map(|(engine, direct)| Self::new(engine, direct)).collect()
    }

    fn slice(&self, address: u64, len: usize) -> GuestSlice {
        self.memory.slice(GuestAddress(address), len).unwrap()
    }

    fn bytes(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.slice(address, len).copy_to(&mut bytes);
        bytes
    }

    fn wait(&mut self) -> Completion {
        self.disk.start().unwrap();
        loop {
            if let Some(completion) = self.disk.completed() {
                return completion;
            }
            let event = self.disk.completion_event().expect("a disk that waits has an event");
            poll(&mut [PollFd::new(event, PollFlags::IN)], None).unwrap();
        }
    }

    fn run(&mut self, request: DiskRequest<'_>) -> io::Result<()> {
        self.disk.submit(77, request);
        let (tag, outcome) = self.wait();
        assert_eq!(tag, 77);
        outcome
    }

    fn read(&mut self, offset: u64, into: &[GuestSlice]) -> io::Result<()> {
        self.run(DiskRequest::Read { offset, into })
    }

    fn write(&mut self, offset: u64, from: &[GuestSlice]) -> io::Result<()> {
        self.run(DiskRequest::Write { offset, from, durable: true })
    }
}

fn pattern() -> Vec<u8> {
    (0..IMAGE_BYTES).map(|index| u8::try_from((index / 512 + index) % 251).unwrap()).collect()
}

/// Makes the page cache forget a file.
fn forget(path: &PathBuf) {
    let file = File::open(path).unwrap();
    file.sync_all().unwrap();
    rustix::fs::fadvise(file.as_fd(), 0, None, rustix::fs::Advice::DontNeed).unwrap();
}

#[test]
fn bytes_go_to_and_come_from_scattered_memory() {
    for mut bench in Bench::all() {
        forget(&bench.path);
        // Not one of them is aligned, so direct access has to go through a buffer.
        let slices = [(0x1001, 511), (0x1_0000, 1), (0x2_0000, 0), (0x3_0007, 4096)];
        let slices = slices.map(|(address, len)| bench.slice(address, len));
        bench.read(8192, &slices).unwrap();
        let read =
            [bench.bytes(0x1001, 511), bench.bytes(0x1_0000, 1), bench.bytes(0x3_0007, 4096)];
        assert!(read.concat() == pattern()[8192..8192 + 4608]);
        bench.write(0, &slices).unwrap();
        assert!(fs::read(&bench.path).unwrap()[..4608] == pattern()[8192..8192 + 4608]);
    }
}

#[test]
fn more_vectors_than_one_call_takes_are_moved_all() {
    for mut bench in Bench::all() {
        let slices: Vec<_> = (0..2048).map(|index| bench.slice(index * 1024, 64)).collect();
        bench.read(512, &slices).unwrap();
        let read: Vec<u8> = (0..2048).flat_map(|index| bench.bytes(index * 1024, 64)).collect();
        assert!(read == pattern()[512..512 + 2048 * 64]);
    }
}

#[test]
fn a_file_that_became_shorter_is_an_error_and_not_a_hang() {
    for mut bench in Bench::all() {
        File::options().write(true).open(&bench.path).unwrap().set_len(4096).unwrap();
        let slice = bench.slice(0, 8192);
        let error = bench.read(0, &[slice]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::UnexpectedEof);
    }
}

#[test]
fn as_many_requests_as_there_is_room_for_complete_once_each() {
    for mut bench in Bench::all() {
        forget(&bench.path);
        let mut submitted = 0;
        while bench.disk.has_room() && submitted < 1000 {
            let offset = u64::from(submitted % 512) * 512;
            let into = [bench.slice(u64::from(submitted) * 512, 512)];
            bench.disk.submit(submitted, DiskRequest::Read { offset, into: &into });
            submitted += 1;
        }
        let expected_content = pattern();
        let mut tags: Vec<_> = (0..submitted).map(|_| bench.wait()).collect();
        assert!(bench.disk.completed().is_none() && bench.disk.has_room());
        tags.sort_by_key(|(tag, _)| *tag);
        for (expected, (tag, outcome)) in (0..submitted).zip(tags) {
            outcome.unwrap();
            assert_eq!(tag, expected);
            let start = usize::try_from(tag % 512).unwrap() * 512;
            assert!(bench.bytes(u64::from(tag) * 512, 512) == expected_content[start..start + 512]);
        }
    }
}

#[test]
fn a_drained_disk_has_done_its_work_and_tells_nothing_of_it() {
    for mut bench in Bench::all() {
        let (first, second) = (bench.slice(0, 4096), bench.slice(4096, 4096));
        first.fill(1);
        bench.disk.submit(1, DiskRequest::Write { offset: 0, from: &[first], durable: true });
        bench.disk.submit(2, DiskRequest::Read { offset: 8192, into: &[second] });
        bench.disk.drain();
        assert!(bench.disk.completed().is_none());
        assert!(fs::read(&bench.path).unwrap()[..4096] == [1; 4096]);
        assert!(bench.bytes(4096, 4096) == pattern()[8192..12288]);
        bench.read(0, &[second]).unwrap();
        assert!(bench.bytes(4096, 4096) == [1; 4096]);
    }
}

#[test]
fn ranges_are_discarded_and_zeroed() {
    for mut bench in Bench::all() {
        bench.run(DiskRequest::Discard { offset: 4096, len: 4096 }).unwrap();
        bench.run(DiskRequest::WriteZeroes { offset: 16384, len: 4096, unmap: false }).unwrap();
        bench.run(DiskRequest::Flush).unwrap();
        let mut expected = pattern();
        expected[4096..8192].fill(0);
        expected[16384..20480].fill(0);
        assert!(fs::read(&bench.path).unwrap() == expected);
    }
}

/// What a guest may do, in blocks of 512 bytes: all within the image.
#[derive(Clone, Debug)]
enum Operation {
    Read { block: usize, blocks: usize, pieces: usize },
    Write { block: usize, blocks: usize, pieces: usize, value: u8, durable: bool },
    Zero { block: usize, blocks: usize, unmap: bool },
    Forget,
}

fn operation() -> impl Strategy<Value = Operation> {
    let range = (0..500usize, 1..=12usize);
    prop_oneof![
        3 => (range.clone(), 1..5usize).prop_map(|((block, blocks), pieces)| {
            Operation::Read { block, blocks, pieces }
        }),
        3 => (range.clone(), 1..5usize, any::<u8>(), any::<bool>()).prop_map(
            |((block, blocks), pieces, value, durable)| {
                Operation::Write { block, blocks, pieces, value, durable }
            }
        ),
        1 => (range, any::<bool>()).prop_map(|((block, blocks), unmap)| {
            Operation::Zero { block, blocks, unmap }
        }),
        1 => Just(Operation::Forget),
    ]
}

impl Bench {
    /// Splits `len` bytes of memory into pieces, of which not all are aligned.
    fn pieces(&self, len: usize, pieces: usize) -> Vec<GuestSlice> {
        let whole = self.slice(0x8000, len);
        let step = (len / pieces).max(1);
        let starts: Vec<_> = (0..pieces).map(|index| (index * step).min(len)).collect();
        let ends = starts.iter().skip(1).copied().chain([len]);
        starts
            .iter()
            .zip(ends)
            .map(|(start, end)| whole.sub_slice(*start, end - start).unwrap())
            .collect()
    }

    fn apply(&mut self, operation: &Operation, model: &mut [u8]) {
        match *operation {
            Operation::Read { block, blocks, pieces } => {
                let (start, len) = (block * 512, blocks * 512);
                let slices = self.pieces(len, pieces);
                self.read(start as u64, &slices).unwrap();
                assert!(self.bytes(0x8000, len) == model[start..start + len]);
            }
            Operation::Write { block, blocks, pieces, value, durable } => {
                let (start, len) = (block * 512, blocks * 512);
                let slices = self.pieces(len, pieces);
                slices.iter().for_each(|slice| slice.fill(value));
                let from = &slices;
                self.run(DiskRequest::Write { offset: start as u64, from, durable }).unwrap();
                model[start..start + len].fill(value);
            }
            Operation::Zero { block, blocks, unmap } => {
                let (start, len) = (block * 512, blocks * 512);
                let (offset, bytes) = (start as u64, len as u64);
                self.run(DiskRequest::WriteZeroes { offset, len: bytes, unmap }).unwrap();
                model[start..start + len].fill(0);
            }
            Operation::Forget => forget(&self.path),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, ..ProptestConfig::default() })]

    #[test]
    fn every_disk_does_what_a_vector_of_bytes_would(
        operations in prop::collection::vec(operation(), 1..60)
    ) {
        for mut bench in Bench::all() {
            let mut model = pattern();
            for operation in &operations {
                bench.apply(operation, &mut model);
            }
            prop_assert!(fs::read(&bench.path).unwrap() == model);
        }
    }
}
