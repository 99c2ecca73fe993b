//! The queue under virtio-queue's mock driver, and beside its queue.

use arch::memory::Backing;
use proptest::prelude::*;
use proptest::test_runner::RngSeed;
use virtio_queue::desc::RawDescriptor;
use virtio_queue::desc::split::Descriptor as SplitDescriptor;
use virtio_queue::mock::MockSplitQueue;
use virtio_queue::{Queue as OtherQueue, QueueT};
use vm_memory::{Bytes, GuestMemoryMmap};

use super::*;

/// The mock's own used ring overlaps its available ring.
const USED: u64 = 0x6000;
const BUFFERS: u64 = 0x10_0000;
const RAM: u64 = 0x20_0000;
const HIGH: u64 = 0x1_0000_0000;
const ALL: u64 = FEATURE_EVENT_IDX | FEATURE_INDIRECT_DESC;

/// A queue and the mock driver that feeds it.
struct Setup {
    mock: MockSplitQueue<'static, GuestMemoryMmap>,
    memory: GuestMemory,
    queue: Queue,
    chain: Chain,
    interrupt: Event,
}

impl Setup {
    fn new(size: u16, features: u64) -> Self {
        let memory = GuestMemory::map(&[0..RAM, HIGH..HIGH + 0x1000], Backing::default()).unwrap();
        let mock = MockSplitQueue::create(memory.backend(), GuestAddress(0x1000), size);
        let interrupt = Event::new().unwrap();
        let config = QueueConfig {
            size,
            ready: true,
            descriptor_table: mock.desc_table_addr().0,
            available_ring: mock.avail_addr().0,
            used_ring: USED,
        };
        let setup = QueueSetup {
            config,
            doorbell: Event::new().unwrap(),
            interrupt: Interrupt::Message(interrupt.clone()),
        };
        let queue = Queue::new(setup, memory, features).unwrap();
        Self { mock, memory, queue, chain: Chain::default(), interrupt }
    }

    /// Makes one chain available whose descriptors start at `head`.
    fn offer(&self, head: u16, descriptors: &[SplitDescriptor]) {
        for (index, descriptor) in (head..).zip(descriptors) {
            let last = usize::from(index - head) + 1 == descriptors.len();
            let flags = descriptor.flags() | if last { 0 } else { DESC_NEXT };
            let (address, len) = (descriptor.addr().0, descriptor.len());
            let next = if last { descriptor.next() } else { index + 1 };
            let descriptor = SplitDescriptor::new(address, len, flags, next);
            self.mock.desc_table().store(index, RawDescriptor::from(descriptor)).unwrap();
        }
        self.make_available(head);
    }

    fn make_available(&self, head: u16) {
        let index = u16::from_le(self.mock.avail().idx().load());
        let slot = usize::from(index % self.queue.size());
        self.mock.avail().ring().ref_at(slot).unwrap().store(head.to_le());
        self.mock.avail().idx().store(index.wrapping_add(1).to_le());
    }

    fn pop(&mut self) -> Result<bool, QueueError> {
        self.queue.pop(&mut self.chain)
    }

    fn interrupts_after(&mut self, completed: u16) -> bool {
        for _ in 0..completed {
            self.queue.complete(0, 0);
        }
        self.queue.notify_driver();
        self.interrupt.take()
    }
}

fn read(address: u64, len: u32) -> SplitDescriptor {
    SplitDescriptor::new(address, len, 0, 0)
}

fn write(address: u64, len: u32) -> SplitDescriptor {
    SplitDescriptor::new(address, len, DESC_WRITE, 0)
}

#[test]
fn a_chain_is_what_the_device_reads_and_then_what_it_writes() {
    let mut setup = Setup::new(16, ALL);
    setup.memory.write_bytes(GuestAddress(BUFFERS), b"header").unwrap();
    setup.offer(3, &[read(BUFFERS, 4), read(BUFFERS + 4, 2), write(HIGH, 3), write(HIGH + 8, 1)]);
    assert_eq!(setup.pop(), Ok(true));
    assert_eq!(
        (setup.chain.head(), setup.chain.readable_len(), setup.chain.writable_len()),
        (3, 6, 4)
    );
    assert_eq!(setup.chain.take::<[u8; 3]>(), Some(*b"hea"));
    assert_eq!(setup.chain.take::<[u8; 3]>(), Some(*b"der"));
    assert_eq!(setup.chain.take::<[u8; 1]>(), None);
    let status = setup.chain.split_off_status().unwrap();
    assert_eq!(setup.chain.write(b"abcd"), 3);
    status.fill(b'!');
    assert_eq!(setup.memory.read(GuestAddress(HIGH)), Ok(*b"abc"));
    assert_eq!(setup.memory.read(GuestAddress(HIGH + 8)), Ok(*b"!"));
    assert_eq!(setup.pop(), Ok(false));
}

#[test]
fn a_chain_may_be_as_long_as_the_queue_and_no_longer() {
    let mut setup = Setup::new(8, ALL);
    let buffers: Vec<_> = (0..8).map(|index| read(BUFFERS + index, 1)).collect();
    setup.offer(0, &buffers);
    assert_eq!(setup.pop(), Ok(true));
    assert_eq!(setup.chain.readable().len(), 8);
    let mut setup = Setup::new(8, ALL);
    setup.offer(0, &buffers);
    let back = SplitDescriptor::new(BUFFERS, 1, DESC_NEXT, 0);
    setup.mock.desc_table().store(7, RawDescriptor::from(back)).unwrap();
    assert_eq!(setup.pop(), Err(QueueError::ChainLength));
}

#[test]
fn an_empty_buffer_is_a_part_of_its_chain() {
    let mut setup = Setup::new(8, ALL);
    setup.offer(0, &[read(BUFFERS, 0), write(BUFFERS, 0)]);
    assert_eq!(setup.pop(), Ok(true));
    assert_eq!([setup.chain.readable().len(), setup.chain.writable().len()], [1, 1]);
    assert!(setup.chain.split_off_status().is_none());
}

#[test]
fn an_indirect_table_may_follow_direct_descriptors() {
    let mut setup = Setup::new(8, ALL);
    for (index, flags) in [(0, DESC_NEXT), (1, DESC_WRITE)] {
        let inner = SplitDescriptor::new(BUFFERS + 64, 8, flags, 1);
        setup.memory.backend().write_obj(inner, GuestAddress(BUFFERS + 16 * index)).unwrap();
    }
    let table = SplitDescriptor::new(BUFFERS, 32, DESC_INDIRECT, 0);
    setup.offer(0, &[read(BUFFERS + 128, 4), table]);
    assert_eq!(setup.pop(), Ok(true));
    assert_eq!((setup.chain.readable_len(), setup.chain.writable_len()), (12, 8));
    let mut setup = Setup::new(8, FEATURE_EVENT_IDX);
    setup.offer(0, &[table]);
    assert!(matches!(setup.pop(), Err(QueueError::Indirect(_))), "the feature was not negotiated");
}

#[test]
fn a_head_that_is_in_flight_is_refused_until_it_is_completed() {
    let mut setup = Setup::new(8, ALL);
    setup.offer(5, &[write(BUFFERS, 1)]);
    assert_eq!(setup.pop(), Ok(true));
    setup.make_available(5);
    assert_eq!(setup.pop(), Err(QueueError::InFlight(5)));
    setup.queue.complete(5, 0);
    assert_eq!(setup.pop(), Ok(true));
}

#[test]
fn indices_wrap_round() {
    let mut setup = Setup::new(4, ALL);
    for round in 0..70_000u32 {
        setup.offer(u16::try_from(round % 4).unwrap(), &[write(BUFFERS, 4)]);
        if setup.queue.batch_left == 0 {
            setup.queue.begin_batch();
        }
        assert_eq!(setup.pop(), Ok(true));
        setup.queue.complete(setup.chain.head(), round);
        setup.queue.notify_driver();
    }
    let index: u16 = setup.memory.read(GuestAddress(USED + 2)).unwrap();
    assert_eq!(u32::from(index), 70_000 % 0x1_0000);
    let last: [u32; 2] = setup.memory.read(GuestAddress(USED + 4 + 8 * (69_999 % 4))).unwrap();
    assert_eq!(last, [69_999 % 4, 69_999]);
}

#[test]
fn a_batch_is_as_long_as_the_queue_and_the_doorbell_rings_for_the_rest() {
    let mut setup = Setup::new(2, ALL);
    setup.queue.begin_batch();
    for _ in 0..2 {
        setup.offer(0, &[write(BUFFERS, 1)]);
        assert_eq!(setup.pop(), Ok(true));
        setup.queue.complete(0, 0);
    }
    setup.offer(0, &[write(BUFFERS, 1)]);
    assert!(!setup.queue.doorbell().is_signalled());
    assert_eq!(setup.pop(), Ok(false));
    assert!(setup.queue.doorbell().is_signalled());
    setup.queue.begin_batch();
    assert_eq!(setup.pop(), Ok(true));
}

#[test]
fn the_driver_is_interrupted_when_its_event_index_is_passed() {
    let mut setup = Setup::new(8, ALL);
    assert!(setup.interrupts_after(1), "the first one");
    assert!(!setup.interrupts_after(1), "its index is behind");
    let event = setup.mock.avail_addr().0 + 4 + 2 * 8;
    setup.memory.write(GuestAddress(event), &4u16.to_le_bytes()).unwrap();
    assert!(!setup.interrupts_after(2), "four are used");
    assert!(setup.interrupts_after(3), "the fifth is among them");
    assert!(!setup.interrupts_after(0), "nothing was used");
}

#[test]
fn without_event_index_the_flag_decides() {
    let mut setup = Setup::new(8, 0);
    assert!(setup.interrupts_after(1));
    setup.memory.write(setup.mock.avail_addr(), &AVAIL_NO_INTERRUPT.to_le_bytes()).unwrap();
    assert!(!setup.interrupts_after(1));
}

#[test]
fn the_device_asks_for_a_notification_when_it_finds_nothing() {
    let mut setup = Setup::new(8, ALL);
    for asked in 0..3u16 {
        assert_eq!(setup.pop(), Ok(false));
        let event = USED + 4 + 8 * 8;
        assert_eq!(setup.memory.read(GuestAddress(event)), Ok(asked.to_le_bytes()));
        setup.offer(asked, &[write(BUFFERS, 1)]);
        assert_eq!(setup.pop(), Ok(true));
    }
}

#[test]
fn queues_that_cannot_be_are_refused() {
    let setup = Setup::new(8, ALL);
    let good = QueueConfig {
        size: 8,
        ready: true,
        descriptor_table: 0x1000,
        available_ring: 0x2000,
        used_ring: 0x3000,
    };
    let refused = |config| {
        let (doorbell, interrupt) = (Event::new().unwrap(), Interrupt::None);
        Queue::new(QueueSetup { config, doorbell, interrupt }, setup.memory, ALL).err()
    };
    assert_eq!(refused(good), None);
    assert_eq!(refused(QueueConfig { size: 0, ..good }), Some(QueueError::Size(0)));
    assert_eq!(refused(QueueConfig { size: 3, ..good }), Some(QueueError::Size(3)));
    let unaligned = QueueConfig { descriptor_table: 0x1008, ..good };
    assert_eq!(refused(unaligned), Some(QueueError::Alignment(0x1008)));
    let unaligned = QueueConfig { used_ring: 0x3002, ..good };
    assert_eq!(refused(unaligned), Some(QueueError::Alignment(0x3002)));
    for end in [RAM, RAM - 16, !0xf] {
        let outside = QueueConfig { used_ring: end, ..good };
        assert!(matches!(refused(outside), Some(QueueError::NotRam(_))));
    }
}

/// Where the differential test has the used ring of each queue, and tables of its own.
const OTHER_USED: u64 = 0x8000;
const TABLES: u64 = 0xa000;

/// A descriptor that is right, or nearly.
fn descriptor() -> impl Strategy<Value = (u64, u32, u16, u16)> {
    let address = prop_oneof![
        6 => BUFFERS..BUFFERS + 0x1000,
        2 => TABLES..TABLES + 0x100,
        1 => RAM - 16..RAM + 16,
        1 => any::<u64>(),
    ];
    let len =
        prop_oneof![6 => 0..64u32, 2 => (1..5u32).prop_map(|count| count * 16), 1 => any::<u32>()];
    const USUAL: [u16; 9] = [0, 0, 1, 1, 2, 2, 3, 3, DESC_INDIRECT];
    let flags = prop_oneof![9 => prop::sample::select(&USUAL[..]), 1 => 0..8u16];
    (address, len, flags, prop_oneof![9 => 0..8u16, 1 => any::<u16>()])
}

/// The same cases in every run; variety is the fuzzer's business.
fn config() -> ProptestConfig {
    ProptestConfig { cases: 300, rng_seed: RngSeed::Fixed(2026), ..ProptestConfig::default() }
}

proptest! {
    #![proptest_config(config())]

    /// What we take, virtio-queue takes too, in the same parts, and uses and announces alike.
    #[test]
    fn accepted_chains_are_those_of_virtio_queue(
        direct in prop::collection::vec(descriptor(), 8),
        inner in prop::collection::vec(descriptor(), 16),
        heads in prop::collection::vec(0..9u16, 1..8),
        event in any::<[u8; 2]>(),
    ) {
        let mut setup = Setup::new(8, ALL);
        let memory = setup.memory.backend();
        let mut other: OtherQueue = setup.mock.create_queue().unwrap();
        other.try_set_used_ring_address(GuestAddress(OTHER_USED)).unwrap();
        other.set_event_idx(true);
        for (base, descriptors) in [(setup.mock.desc_table_addr().0, &direct), (TABLES, &inner)] {
            for (place, (address, len, flags, next)) in (base..).step_by(16).zip(descriptors) {
                let descriptor = SplitDescriptor::new(*address, *len, *flags, *next);
                memory.write_obj(descriptor, GuestAddress(place)).unwrap();
            }
        }
        let event_place = setup.mock.avail_addr().0 + 4 + 2 * 8;
        memory.write_slice(&event.map(|byte| byte % 8), GuestAddress(event_place)).unwrap();
        for head in &heads {
            setup.make_available(*head);
        }
        while setup.pop() == Ok(true) {
            let chain = other.pop_descriptor_chain(memory).expect("virtio-queue has the chain");
            prop_assert_eq!(chain.head_index(), setup.chain.head());
            let theirs: Vec<_> = chain.collect();
            let written = theirs.iter().filter(|descriptor| descriptor.is_write_only()).count();
            prop_assert_eq!(written, setup.chain.writable().len());
            let ours: Vec<_> =
                setup.chain.readable().iter().chain(setup.chain.writable()).copied().collect();
            let resolved: Vec<_> = theirs
                .iter()
                .map(|descriptor| {
                    let len = usize::try_from(descriptor.len()).unwrap();
                    setup.memory.slice(descriptor.addr(), len).unwrap()
                })
                .collect();
            prop_assert_eq!(ours, resolved);
            other.add_used(memory, setup.chain.head(), 7).unwrap();
            setup.queue.complete(setup.chain.head(), 7);
            setup.queue.notify_driver();
            prop_assert_eq!(setup.interrupt.take(), other.needs_notification(memory).unwrap());
        }
        let ring = |address| setup.memory.slice(address, 4 + 8 * 8).unwrap();
        let (mut ours, mut theirs) = ([0; 68], [0; 68]);
        ring(GuestAddress(USED)).copy_to(&mut ours);
        ring(GuestAddress(OTHER_USED)).copy_to(&mut theirs);
        prop_assert_eq!(ours, theirs);
    }
}

/// Lets a server use all chains but the last `left`, in the order that `pick` says, for `count`
/// chains that a driver makes available as fast as it can; the heads that are left.
fn serve_and_die(
    setup: &mut Setup,
    count: usize,
    left: usize,
    pick: fn(usize) -> usize,
) -> Vec<u16> {
    let mut free: Vec<u16> = (0..setup.queue.size()).rev().collect();
    let mut taken = Vec::new();
    for made in 0..count {
        while taken.len() > left && (free.is_empty() || made % 3 == 0) {
            let head = taken.remove(pick(taken.len()));
            setup.queue.complete(head, 0);
            free.push(head);
        }
        let Some(head) = free.pop() else { break };
        setup.offer(head, &[SplitDescriptor::new(BUFFERS, 8, 0, 0)]);
        setup.queue.begin_batch();
        assert!(setup.pop().unwrap());
        taken.push(setup.chain.head());
    }
    setup.queue.notify_driver();
    taken.sort_unstable();
    taken
}

fn unanswered(setup: &Setup) -> Result<Vec<u16>, QueueError> {
    let config = QueueConfig {
        size: setup.queue.size(),
        ready: true,
        descriptor_table: setup.mock.desc_table_addr().0,
        available_ring: setup.mock.avail_addr().0,
        used_ring: USED,
    };
    let interrupt = Interrupt::Message(setup.interrupt.clone());
    let doorbell = setup.queue.doorbell().clone();
    Queue::resume(QueueSetup { config, doorbell, interrupt }, setup.memory, ALL)
        .map(|(_, heads)| heads)
}

#[test]
fn who_takes_a_queue_over_finds_what_was_not_used() {
    let in_order = |_| 0;
    let last_first = |len| len - 1;
    for (count, left, pick) in [
        (0, 0, in_order as fn(usize) -> usize),
        (1, 1, in_order),
        (5, 3, in_order),
        (16, 16, in_order),
        (100, 0, in_order),
        (70_000, 5, in_order),
        // Out of order, in less than a round.
        (15, 2, last_first),
        (16, 7, |len| len / 2),
    ] {
        let mut setup = Setup::new(16, ALL);
        let expected = serve_and_die(&mut setup, count, left, pick);
        assert_eq!(unanswered(&setup).unwrap(), expected, "{count} chains, {left} left");
    }
}

#[test]
fn rings_that_cannot_be_are_not_taken_over() {
    let setup = Setup::new(16, ALL);
    setup.mock.avail().idx().store(17_u16.to_le());
    assert_eq!(unanswered(&setup), Err(QueueError::AvailableIndex { index: 17, next: 0 }));
    // Heads outside the table are nobody's.
    for slot in 0..16 {
        setup.mock.avail().ring().ref_at(slot).unwrap().store(u16::MAX);
    }
    setup.mock.avail().idx().store(16_u16.to_le());
    assert_eq!(unanswered(&setup), Ok(vec![]));
}
