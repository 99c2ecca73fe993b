//! The work that both ring benchmarks measure, for our queue and for virtio-queue's.
//!
//! A request is shaped as one of a disk: 16 bytes and 4 KiB to read, one byte to write. Serving it
//! is to pop it, to resolve each buffer to host memory, to use it, and to decide about an
//! interrupt.
#![expect(clippy::unwrap_used, reason = "a benchmark that cannot set up has nothing to say")]

use std::hint::black_box;
use std::io::{Read, Write};

use arch::memory::{Backing, GuestAddress, GuestMemory};
use devices::event::Event;
use devices::interrupt::Interrupt;
use devices::virtio::chain::Chain;
use devices::virtio::feature::{FEATURE_EVENT_IDX, FEATURE_INDIRECT_DESC};
use devices::virtio::queue::{Queue, QueueConfig, QueueSetup};
use virtio_queue::{Queue as OtherQueue, QueueT};
use vm_memory::{Bytes, GuestMemoryMmap};

/// Requests in one round.
pub(crate) const REQUESTS: u16 = 64;

const SIZE: u16 = 256;
const TABLE: u64 = 0x1_0000;
const AVAILABLE: u64 = 0x2_0000;
const USED: u64 = 0x3_0000;
const BUFFERS: u64 = 0x10_0000;
const HIGH: u64 = 0x1_0000_0000;
const INDIRECT_TABLES: u64 = 0x8_0000;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// What differs between two measurements.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    /// RAM is one range, or two with the buffers in the second.
    pub(crate) regions: u8,
    /// Chains are indirect tables.
    pub(crate) indirect: bool,
    /// Requests that are available at once, and completed with one decision about an interrupt.
    pub(crate) batch: u16,
}

/// The driver's side: rings in guest memory, filled once and made available again and again.
struct Driver {
    memory: GuestMemory,
    index: u16,
}

impl Driver {
    fn new(shape: Shape) -> Self {
        let high = HIGH..HIGH + 0x400_0000;
        let ranges =
            if shape.regions == 1 { vec![0..0x400_0000] } else { vec![0..0x400_0000, high] };
        let memory = GuestMemory::map(&ranges, Backing::default()).unwrap();
        let base = if shape.regions == 1 { BUFFERS } else { HIGH + BUFFERS };
        for request in 0..REQUESTS {
            let buffers = base + u64::from(request) * 0x2000;
            let head = if shape.indirect { request } else { 3 * request };
            let (table, first) = if shape.indirect {
                (INDIRECT_TABLES + u64::from(request) * 64, 0)
            } else {
                (TABLE, head)
            };
            let chain = [(buffers, 16, 0), (buffers + 0x1000, 4096, 0), (buffers + 16, 1, WRITE)];
            for (place, (address, len, flags)) in (first..).zip(chain) {
                let flags = if flags == WRITE { WRITE } else { NEXT };
                write_descriptor(memory, table, place, (address, len, flags, place + 1));
            }
            if shape.indirect {
                write_descriptor(memory, TABLE, head, (table, 48, INDIRECT, 0));
            }
            for slot in (request..SIZE).step_by(usize::from(REQUESTS)) {
                let entry = AVAILABLE + 4 + 2 * u64::from(slot);
                memory.write(GuestAddress(entry), &head.to_le_bytes()).unwrap();
            }
        }
        let mut driver = Self { memory, index: 0 };
        driver.wish_for_no_interrupt();
        driver
    }

    fn make_available(&mut self, count: u16) {
        self.index = self.index.wrapping_add(count);
        self.memory.write(GuestAddress(AVAILABLE + 2), &self.index.to_le_bytes()).unwrap();
        self.wish_for_no_interrupt();
    }

    /// The event index is one that is not reached: the decision is measured, not the interrupt.
    fn wish_for_no_interrupt(&mut self) {
        let event = AVAILABLE + 4 + 2 * u64::from(SIZE);
        let never = self.index.wrapping_add(0x4000);
        self.memory.write(GuestAddress(event), &never.to_le_bytes()).unwrap();
    }
}

fn write_descriptor(memory: GuestMemory, table: u64, index: u16, parts: (u64, u32, u16, u16)) {
    let (address, len, flags, next) = parts;
    let value = u128::from(address)
        | u128::from(len) << 64
        | u128::from(flags) << 96
        | u128::from(next) << 112;
    let place = GuestAddress(table + 16 * u64::from(index));
    memory.write_bytes(place, &value.to_le_bytes()).unwrap();
}

/// Our queue.
pub(crate) struct Ours {
    driver: Driver,
    queue: Queue,
    chain: Chain,
    batch: u16,
    /// Takes the header and writes the status, as a device does.
    copies: bool,
}

impl Ours {
    /// Makes a queue and its driver.
    pub(crate) fn new(shape: Shape, copies: bool) -> Self {
        let driver = Driver::new(shape);
        let config = QueueConfig {
            size: SIZE,
            ready: true,
            descriptor_table: TABLE,
            available_ring: AVAILABLE,
            used_ring: USED,
        };
        let doorbell = Event::new().unwrap();
        let setup = QueueSetup { config, doorbell, interrupt: Interrupt::None };
        let features = FEATURE_EVENT_IDX | FEATURE_INDIRECT_DESC;
        let queue = Queue::new(setup, driver.memory, features).unwrap();
        Self { driver, queue, chain: Chain::with_capacity(SIZE), batch: shape.batch, copies }
    }

    /// Serves [`REQUESTS`] requests.
    pub(crate) fn serve(&mut self) {
        self.queue.begin_batch();
        for _ in 0..REQUESTS / self.batch {
            self.driver.make_available(self.batch);
            while self.queue.pop(&mut self.chain).unwrap() {
                if self.copies {
                    black_box(self.chain.take::<[u8; 16]>().unwrap());
                    self.chain.write(&[0]);
                }
                for slice in self.chain.readable().iter().chain(self.chain.writable()) {
                    black_box((slice.as_ptr(), slice.len()));
                }
                self.queue.complete(self.chain.head(), 1);
            }
            self.queue.notify_driver();
        }
    }
}

/// virtio-queue's queue.
pub(crate) struct Other {
    driver: Driver,
    queue: OtherQueue,
    batch: u16,
    /// Through the crate's reader and writer, with the same copies.
    copies: bool,
}

impl Other {
    /// Makes a queue and its driver.
    pub(crate) fn new(shape: Shape, copies: bool) -> Self {
        let driver = Driver::new(shape);
        let mut queue = OtherQueue::new(SIZE).unwrap();
        queue.set_size(SIZE);
        queue.try_set_desc_table_address(GuestAddress(TABLE)).unwrap();
        queue.try_set_avail_ring_address(GuestAddress(AVAILABLE)).unwrap();
        queue.try_set_used_ring_address(GuestAddress(USED)).unwrap();
        queue.set_event_idx(true);
        queue.set_ready(true);
        Self { driver, queue, batch: shape.batch, copies }
    }

    /// Serves [`REQUESTS`] requests.
    pub(crate) fn serve(&mut self) {
        let memory = self.driver.memory.backend();
        for _ in 0..REQUESTS / self.batch {
            self.driver.make_available(self.batch);
            loop {
                while let Some(chain) = self.queue.pop_descriptor_chain(memory) {
                    let head = chain.head_index();
                    if self.copies {
                        copy(memory, chain);
                    } else {
                        resolve(memory, chain);
                    }
                    self.queue.add_used(memory, head, 1).unwrap();
                }
                if !self.queue.enable_notification(memory).unwrap() {
                    break;
                }
            }
            black_box(self.queue.needs_notification(memory).unwrap());
        }
    }
}

type OtherChain = virtio_queue::DescriptorChain<&'static GuestMemoryMmap>;

fn resolve(memory: &GuestMemoryMmap, chain: OtherChain) {
    use vm_memory::GuestMemoryBackend;
    for descriptor in chain {
        let slice = memory.get_slice(descriptor.addr(), descriptor.len() as usize).unwrap();
        black_box((slice.ptr_guard().as_ptr(), slice.len()));
    }
}

fn copy(memory: &'static GuestMemoryMmap, chain: OtherChain) {
    let mut reader = chain.clone().reader(memory).unwrap();
    let mut header = [0; 16];
    reader.read_exact(&mut header).unwrap();
    black_box((header, reader.available_bytes()));
    let mut writer = chain.writer(memory).unwrap();
    writer.write_all(&[0]).unwrap();
    black_box(&mut writer);
}

/// That both serve what the driver made available.
pub(crate) fn check(shape: Shape) {
    let (mut ours, mut other) = (Ours::new(shape, true), Other::new(shape, true));
    ours.serve();
    other.serve();
    for memory in [ours.driver.memory, other.driver.memory] {
        let index: u16 = memory.backend().read_obj(GuestAddress(USED + 2)).unwrap();
        assert_eq!(index, REQUESTS);
    }
}
