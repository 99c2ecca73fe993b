//! What one 4 KiB read costs from a driver's ring to the page cache and back.
//!
//! Driver, transport, event loop, device and disk share one thread, and what is measured is its
//! processor time. `floor` is what no device can do without: one read and one signal for each
//! request.
//!
//!     cargo bench --package devices --bench block
#![expect(clippy::unwrap_used, reason = "a bench that fails may panic")]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicU16, Ordering, fence};
use std::thread;
use std::time::Duration;

use arch::memory::{Backing, GuestAddress, GuestMemory};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use devices::bus::Registers;
use devices::event::{Event, EventLoop};
use devices::host::disk::Engine;
use devices::host::disk::image::{Access, Image};
use devices::virtio::block::{Block, BlockOptions};
use devices::virtio::mmio::MmioTransport;
use rustix::time::{ClockId, clock_gettime};

const BLOCK: usize = 4096;
const BLOCKS: u64 = 1024;
const QUEUE_SIZE: u16 = 256;

const DESCRIPTORS: u64 = 0x1000;
const AVAILABLE: u64 = 0x3000;
const USED: u64 = 0x4000;
/// Headers, then status bytes, one for each request.
const HEADERS: u64 = 0x6000;
const STATUSES: u64 = 0x8000;
const DATA: u64 = 0x10_0000;

/// A driver that reads blocks in turn, as many at a time as it is told.
struct Reader {
    // Dropped before the device, which would wait for a loop that nobody runs.
    event_loop: EventLoop,
    transport: MmioTransport,
    line: Event,
    memory: GuestMemory,
    next_available: u16,
    next_used: u16,
    next_block: u64,
}

impl Reader {
    fn new(path: &Path, engine: Engine) -> Self {
        let memory = GuestMemory::map(&[0..4 << 20], Backing::default()).unwrap();
        let line = Event::new().unwrap();
        let image = Image::open(path, Access { read_only: true, direct: false }).unwrap();
        // The device is activated while its loop runs on a thread; then the loop comes here.
        let (sender, receiver) = std::sync::mpsc::channel();
        let thread = thread::spawn(move || {
            let mut event_loop = EventLoop::new().unwrap();
            sender.send(event_loop.handle()).unwrap();
            event_loop.run().unwrap();
            event_loop
        });
        let home = receiver.recv().unwrap();
        let options = BlockOptions { image, serial: String::new(), engine, queues: 1 };
        let device = Block::new(options, home.clone()).unwrap();
        let mut transport = MmioTransport::new(Box::new(device), memory, line.clone()).unwrap();
        for (offset, value) in [
            (0x70, 1),
            (0x70, 3),
            (0x24, 0),
            (0x20, 1 << 29),
            (0x24, 1),
            (0x20, 1),
            (0x70, 11),
            (0x30, 0),
            (0x38, u64::from(QUEUE_SIZE)),
            (0x80, DESCRIPTORS),
            (0x90, AVAILABLE),
            (0xa0, USED),
            (0x44, 1),
            (0x70, 15),
        ] {
            let value = u32::try_from(value).unwrap();
            transport.write(offset, &value.to_le_bytes());
        }
        home.stop();
        let event_loop = thread.join().unwrap();
        Self { transport, event_loop, line, memory, next_available: 0, next_used: 0, next_block: 0 }
    }

    fn read(&mut self, depth: u16) {
        for slot in 0..depth {
            self.place(slot);
        }
        self.word(AVAILABLE + 2).store(self.next_available, Ordering::Release);
        fence(Ordering::SeqCst);
        self.transport.write(0x50, &0u32.to_le_bytes());
        while self.word(USED + 2).load(Ordering::Acquire) != self.next_available {
            self.event_loop.run_ready().unwrap();
        }
        self.next_used = self.next_available;
        // Interrupt when the last request of the next batch is used.
        let event = AVAILABLE + 4 + 2 * u64::from(QUEUE_SIZE);
        let last = self.next_used.wrapping_add(depth).wrapping_sub(1);
        self.word(event).store(last, Ordering::Relaxed);
        assert!(self.line.take());
    }

    /// Makes the request of a slot available: three descriptors.
    fn place(&mut self, slot: u16) {
        let index = u64::from(slot);
        let (header, status) = (HEADERS + 16 * index, STATUSES + index);
        let sector = self.next_block * (BLOCK as u64 / 512);
        self.next_block = (self.next_block + 1) % BLOCKS;
        self.memory.write(GuestAddress(header), &[0, sector]).unwrap();
        let head = slot * 3;
        let buffers =
            [(header, 16, 1), (DATA + index * BLOCK as u64, BLOCK as u64, 3), (status, 1, 2)];
        for (descriptor, (address, len, flags)) in (head..).zip(buffers) {
            let rest = len | flags << 32 | u64::from(descriptor + 1) << 48;
            let at = DESCRIPTORS + 16 * u64::from(descriptor);
            self.memory.write(GuestAddress(at), &[address, rest]).unwrap();
        }
        let entry = AVAILABLE + 4 + 2 * u64::from(self.next_available % QUEUE_SIZE);
        self.memory.write(GuestAddress(entry), &head).unwrap();
        self.next_available = self.next_available.wrapping_add(1);
    }

    fn word(&self, address: u64) -> &'static AtomicU16 {
        self.memory.slice(GuestAddress(address), 2).unwrap().atomic_u16(0).unwrap()
    }
}

fn reads(criterion: &mut Criterion) {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), vec![7; BLOCK * usize::try_from(BLOCKS).unwrap()]).unwrap();
    let mut group = criterion.benchmark_group("block_read_4k_cached");
    for depth in [1, 8, 64] {
        group.throughput(Throughput::Elements(u64::from(depth)));
        group.bench_function(BenchmarkId::new("floor", depth), |bencher| {
            let file = File::open(file.path()).unwrap();
            let event = Event::new().unwrap();
            let mut buffer = vec![0; BLOCK];
            let mut block = 0;
            bencher.iter_custom(processor_time(|| {
                for _ in 0..depth {
                    file.read_exact_at(&mut buffer, block * BLOCK as u64).unwrap();
                    event.signal();
                    block = (block + 1) % BLOCKS;
                }
            }));
        });
        for engine in [Engine::Auto, Engine::Sync, Engine::Uring] {
            let mut reader = Reader::new(file.path(), engine);
            let name = format!("{engine:?}").to_lowercase();
            group.bench_function(BenchmarkId::new(name, depth), |bencher| {
                bencher.iter_custom(processor_time(|| reader.read(depth)));
            });
        }
    }
    group.finish();
}

/// Measures this thread's time on a processor: other programs may have the machine meanwhile.
fn processor_time(mut routine: impl FnMut()) -> impl FnMut(u64) -> Duration {
    let now = || {
        let time = clock_gettime(ClockId::ThreadCPUTime);
        Duration::try_from(time).unwrap()
    };
    move |iterations| {
        let start = now();
        for _ in 0..iterations {
            routine();
        }
        now() - start
    }
}

criterion_group!(benches, reads);
criterion_main!(benches);
