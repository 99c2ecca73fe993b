//! Our queue takes no chain that virtio-queue does not take alike, whatever is in the rings.
#![no_main]

use std::sync::OnceLock;

use arbitrary::Arbitrary;
use arch::memory::{Backing, GuestAddress, GuestMemory};
use devices::event::Event;
use devices::interrupt::Interrupt;
use devices::virtio::feature::{FEATURE_EVENT_IDX, FEATURE_INDIRECT_DESC};
use devices::virtio::chain::Chain;
use devices::virtio::queue::{Queue, QueueConfig, QueueSetup};
use libfuzzer_sys::fuzz_target;
use virtio_queue::{Queue as OtherQueue, QueueT};

const TABLE: u64 = 0x1000;
const AVAILABLE: u64 = 0x2000;
const USED: u64 = 0x3000;
const OTHER_USED: u64 = 0x4000;
const TABLES: u64 = 0x5000;
const RAM: u64 = 0x1_0000;
const HIGH: u64 = 0x1_0000_0000;

#[derive(Arbitrary, Debug)]
struct Input {
    size: u8,
    indirect: bool,
    event_index: bool,
    direct: Vec<Descriptor>,
    inner: Vec<Descriptor>,
    steps: Vec<Step>,
}

#[derive(Arbitrary, Debug)]
struct Descriptor {
    address: Place,
    len: Length,
    flags: u8,
    next: u8,
}

#[derive(Arbitrary, Debug)]
enum Place {
    Low(u16),
    High(u8),
    Tables(u8),
    Anywhere(u64),
}

#[derive(Arbitrary, Debug)]
enum Length {
    Bytes(u8),
    Descriptors(u8),
    Any(u32),
}

#[derive(Arbitrary, Debug)]
enum Step {
    MakeAvailable(u8),
    SetIndex(u16),
    SetEvent(u16),
    SetFlags(u16),
    Serve,
}

fuzz_target!(|input: Input| run(&input));

fn run(input: &Input) {
    let memory = memory();
    memory.discard_all().unwrap();
    let size = 1u16 << (input.size % 6);
    fill(memory, TABLE, &input.direct);
    fill(memory, TABLES, &input.inner);
    let (mut queue, interrupt) = ours(memory, size, input);
    let mut other = other(size, input);
    let mut chain = Chain::default();
    let mut index = 0u16;
    for step in &input.steps {
        match step {
            Step::MakeAvailable(head) => {
                let slot = AVAILABLE + 4 + 2 * u64::from(index % size);
                write(memory, slot, u16::from(*head));
                index = index.wrapping_add(1);
                write(memory, AVAILABLE + 2, index);
            }
            Step::SetIndex(to) => {
                index = *to;
                write(memory, AVAILABLE + 2, index);
            }
            Step::SetEvent(event) => write(memory, AVAILABLE + 4 + 2 * u64::from(size), *event),
            Step::SetFlags(flags) => write(memory, AVAILABLE, *flags),
            Step::Serve => {
                queue.begin_batch();
                if !serve(memory, &mut queue, &mut other, &mut chain) {
                    return;
                }
                let wanted = other.needs_notification(memory.backend()).unwrap();
                queue.notify_driver();
                let used: u16 = memory.read(GuestAddress(USED + 2)).unwrap();
                // Without event index the crate always wants to interrupt.
                assert!(!interrupt.take() || wanted || used == 0);
            }
        }
    }
}

/// Serves what is available in both queues; `false` when ours needs a reset.
fn serve(
    memory: GuestMemory,
    queue: &mut Queue,
    other: &mut OtherQueue,
    chain: &mut Chain,
) -> bool {
    loop {
        match queue.pop(chain) {
            Ok(true) => compare(memory, other, chain),
            Ok(false) => return true,
            Err(_) => return false,
        }
        other.add_used(memory.backend(), chain.head(), 1).unwrap();
        queue.complete(chain.head(), 1);
    }
}

fn compare(memory: GuestMemory, other: &mut OtherQueue, chain: &mut Chain) {
    let theirs = other.pop_descriptor_chain(memory.backend()).expect("a chain that ours has");
    assert_eq!(theirs.head_index(), chain.head());
    let descriptors: Vec<_> = theirs.collect();
    let resolved = descriptors.iter().map(|descriptor| {
        let len = usize::try_from(descriptor.len()).unwrap();
        let slice = memory.slice(descriptor.addr(), len);
        slice.map(|slice| (slice.as_ptr(), len)).unwrap_or((std::ptr::null_mut(), len))
    });
    let ours = chain.readable().iter().chain(chain.writable());
    // Empty buffers may be anywhere at the end of a range.
    let ours = ours.map(|slice| (slice.as_ptr(), slice.len()));
    assert!(
        ours.zip(resolved).all(|(ours, theirs)| ours == theirs || ours.1 == 0 && theirs.1 == 0)
    );
    assert_eq!(descriptors.len(), chain.readable().len() + chain.writable().len());
    let status = chain.split_off_status();
    let mut header = [0; 24];
    let (readable, taken) = (chain.readable_len(), chain.take_bytes(&mut header));
    assert_eq!(taken, readable.min(24));
    assert!(status.is_none_or(|status| status.len() == 1));
}

fn ours(memory: GuestMemory, size: u16, input: &Input) -> (Queue, Event) {
    let config = QueueConfig {
        size,
        ready: true,
        descriptor_table: TABLE,
        available_ring: AVAILABLE,
        used_ring: USED,
    };
    let interrupt = Event::new().unwrap();
    let setup = QueueSetup {
        config,
        doorbell: Event::new().unwrap(),
        interrupt: Interrupt::Message(interrupt.clone()),
    };
    let indirect = if input.indirect { FEATURE_INDIRECT_DESC } else { 0 };
    let event_index = if input.event_index { FEATURE_EVENT_IDX } else { 0 };
    (Queue::new(setup, memory, indirect | event_index).unwrap(), interrupt)
}

fn other(size: u16, input: &Input) -> OtherQueue {
    let mut queue = OtherQueue::new(size).unwrap();
    queue.try_set_desc_table_address(GuestAddress(TABLE)).unwrap();
    queue.try_set_avail_ring_address(GuestAddress(AVAILABLE)).unwrap();
    queue.try_set_used_ring_address(GuestAddress(OTHER_USED)).unwrap();
    queue.set_event_idx(input.event_index);
    queue.set_ready(true);
    queue
}

fn fill(memory: GuestMemory, table: u64, descriptors: &[Descriptor]) {
    for (place, descriptor) in (table..table + 0x400).step_by(16).zip(descriptors) {
        let address = match descriptor.address {
            Place::Low(offset) => u64::from(offset),
            Place::High(offset) => HIGH + 0xf80 + u64::from(offset),
            Place::Tables(index) => TABLES + 16 * u64::from(index),
            Place::Anywhere(address) => address,
        };
        let len = match descriptor.len {
            Length::Bytes(len) => u32::from(len),
            Length::Descriptors(count) => 16 * u32::from(count),
            Length::Any(len) => len,
        };
        let value = u128::from(address)
            | u128::from(len) << 64
            | u128::from(descriptor.flags & 7) << 96
            | u128::from(descriptor.next) << 112;
        memory.write_bytes(GuestAddress(place), &value.to_le_bytes()).unwrap();
    }
}

fn write(memory: GuestMemory, address: u64, value: u16) {
    memory.write(GuestAddress(address), &value.to_le_bytes()).unwrap();
}

fn memory() -> GuestMemory {
    static MEMORY: OnceLock<GuestMemory> = OnceLock::new();
    let map = || GuestMemory::map(&[0..RAM, HIGH..HIGH + 0x1000], Backing::default()).unwrap();
    *MEMORY.get_or_init(map)
}
