//! The split virtqueue, device side (virtio 1.3, section 2.7).
//!
//! What a driver configures is a [`QueueConfig`]; what a worker runs is a [`Queue`], made from it
//! once at `DRIVER_OK`. Ring addresses are resolved then to host memory of a validated length, and
//! every access is bounded by it, so nothing a guest does later can move or stretch them.

use std::sync::atomic::{AtomicU16, Ordering, fence};

use arch::memory::{GuestAddress, GuestMemory, GuestSlice, NotRam};
use zerocopy::{Immutable, IntoBytes};

use super::chain::Chain;
use super::feature::{FEATURE_EVENT_IDX, FEATURE_INDIRECT_DESC};
use crate::event::Event;
use crate::interrupt::Interrupt;

/// Largest size of a split queue in descriptors (virtio 1.3, section 2.7).
pub const QUEUE_SIZE_MAX: u16 = 32768;

const DESC_NEXT: u16 = 1;
const DESC_WRITE: u16 = 2;
const DESC_INDIRECT: u16 = 4;
const AVAIL_NO_INTERRUPT: u16 = 1;

const DESCRIPTOR_SIZE: usize = 16;
const AVAIL_INDEX: usize = 2;
const AVAIL_RING: usize = 4;
const USED_INDEX: usize = 2;
const USED_RING: usize = 4;
const USED_ELEMENT_SIZE: usize = size_of::<UsedElement>();

/// What a driver writes to a transport about one queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueueConfig {
    /// Number of descriptors, a power of two.
    pub size: u16,
    /// The driver enabled the queue; from then on nothing here changes.
    pub ready: bool,
    /// Guest-physical address of the descriptor table.
    pub descriptor_table: u64,
    /// Guest-physical address of the available ring (driver area).
    pub available_ring: u64,
    /// Guest-physical address of the used ring (device area).
    pub used_ring: u64,
}

/// A queue as the driver configured it, with its wires.
#[derive(Clone)]
pub struct QueueSetup {
    /// Size and ring addresses, frozen.
    pub config: QueueConfig,
    /// Signalled when the driver has made buffers available.
    pub doorbell: Event,
    /// Triggered when the device has used buffers.
    pub interrupt: Interrupt,
}

/// A rule of the rings that the driver broke.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum QueueError {
    /// The device needs a queue that the driver did not enable.
    #[error("a queue that the device needs is not enabled")]
    NotEnabled,
    /// The size is zero, too large or not a power of two.
    #[error("queue size {0} is not a power of two up to {QUEUE_SIZE_MAX}")]
    Size(u16),
    /// A ring is not aligned as section 2.7 demands.
    #[error("ring at {0:#x} is not aligned")]
    Alignment(u64),
    /// A ring or a buffer is not in RAM.
    #[error(transparent)]
    NotRam(#[from] NotRam),
    /// The available index is further ahead than the ring is long.
    #[error("available index {index} is more than the queue size ahead of {next}")]
    AvailableIndex {
        /// What the driver wrote.
        index: u16,
        /// The next entry that the device would take.
        next: u16,
    },
    /// A descriptor index is outside its table.
    #[error("descriptor {0} is outside its table")]
    DescriptorIndex(u16),
    /// A head was made available again before the device used it.
    #[error("descriptor {0} is in flight already")]
    InFlight(u16),
    /// A chain is longer than the queue, which a loop also is.
    #[error("a chain is longer than the queue or loops")]
    ChainLength,
    /// A chain has a buffer to read after one to write.
    #[error("a readable descriptor follows a writable one")]
    Order,
    /// An indirect descriptor that the rules do not allow.
    #[error("indirect descriptor: {0}")]
    Indirect(&'static str),
}

/// A live queue, owned by one worker.
pub struct Queue {
    size: u16,
    descriptors: GuestSlice,
    available: Ring,
    used: Ring,
    next_available: u16,
    /// The driver's index as last read: entries before it need no further look at the ring.
    known_available: u16,
    next_used: u16,
    /// Used index at the last decision about an interrupt.
    signalled_used: u16,
    /// Chains that may still be taken before the other queues get their turn.
    batch_left: u16,
    in_flight: Vec<u64>,
    event_index: bool,
    indirect: bool,
    windows: Vec<Window>,
    doorbell: Event,
    interrupt: Interrupt,
}

/// A range of RAM that holds buffers. There are one or two, which are tried in turn: no search is
/// as fast.
#[derive(Clone, Copy)]
struct Window {
    start: u64,
    slice: GuestSlice,
}

/// One of the two index rings: its bytes, its index, and the event field behind its entries.
struct Ring {
    bytes: GuestSlice,
    index: &'static AtomicU16,
    flags: &'static AtomicU16,
    event: &'static AtomicU16,
}

/// A descriptor; in memory it has this order and no padding.
#[derive(Clone, Copy)]
struct Descriptor {
    address: u64,
    len: u32,
    flags: u16,
    next: u16,
}

#[derive(Clone, Copy, IntoBytes, Immutable)]
#[repr(C)]
struct UsedElement {
    head: u32,
    written: u32,
}

impl Queue {
    /// Resolves and checks the rings of a configured queue.
    pub fn new(setup: QueueSetup, memory: GuestMemory, features: u64) -> Result<Self, QueueError> {
        let QueueSetup { config, doorbell, interrupt } = setup;
        let size = config.size;
        if !size.is_power_of_two() || size > QUEUE_SIZE_MAX {
            return Err(QueueError::Size(size));
        }
        let entries = usize::from(size);
        let table = aligned(config.descriptor_table, 16)?;
        Ok(Self {
            size,
            descriptors: memory.slice(table, entries * DESCRIPTOR_SIZE)?,
            available: Ring::resolve(memory, config.available_ring, 2, entries * 2)?,
            used: Ring::resolve(memory, config.used_ring, 4, entries * USED_ELEMENT_SIZE)?,
            next_available: 0,
            known_available: 0,
            next_used: 0,
            signalled_used: 0,
            batch_left: size,
            in_flight: vec![0; entries.div_ceil(64)],
            event_index: features & FEATURE_EVENT_IDX != 0,
            indirect: features & FEATURE_INDIRECT_DESC != 0,
            windows: windows(memory),
            doorbell,
            interrupt,
        })
    }

    /// Takes a queue over from whoever has served it until now and does not touch it any more; with
    /// it come the heads of the chains that were made available and not used.
    ///
    /// Their number is known from the indices. Which they are is told by the entries of one round
    /// of both rings: they were made available once more often than they were used. Only chains
    /// that were used out of order across the beginning of that round could be mistaken.
    pub fn resume(
        setup: QueueSetup,
        memory: GuestMemory,
        features: u64,
    ) -> Result<(Self, Vec<u16>), QueueError> {
        let mut queue = Self::new(setup, memory, features)?;
        let available = u16::from_le(queue.available.index.load(Ordering::Acquire));
        let used = u16::from_le(queue.used.index.load(Ordering::Acquire));
        let waiting = available.wrapping_sub(used);
        if waiting > queue.size {
            return Err(QueueError::AvailableIndex { index: available, next: used });
        }
        (queue.next_available, queue.known_available) = (available, available);
        (queue.next_used, queue.signalled_used) = (used, used);
        // Nobody else takes back what was said about notifications.
        queue.used.flags.store(0, Ordering::Relaxed);
        let mut surplus = vec![0_i32; usize::from(queue.size)];
        let mut count = |head: Option<usize>, change: i32| {
            if let Some(place) = head.and_then(|head| surplus.get_mut(head)) {
                *place = place.saturating_add(change);
            }
        };
        let first = available.wrapping_sub(queue.size);
        for offset in 0..queue.size {
            count(queue.available_head(first.wrapping_add(offset)), 1);
        }
        for offset in 0..queue.size - waiting {
            count(queue.used_head(first.wrapping_add(offset)), -1);
        }
        let heads = (0..queue.size).zip(surplus).filter(|(_, surplus)| *surplus > 0);
        let heads = heads.map(|(head, _)| head).take(usize::from(waiting)).collect();
        Ok((queue, heads))
    }

    /// Fills `chain` with the chain at `head`, of those that [`Queue::resume`] found.
    pub fn take(&mut self, head: u16, chain: &mut Chain) -> Result<(), QueueError> {
        self.mark_in_flight(head)?;
        self.walk(head, chain)
    }

    /// Number of descriptors.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// The event that the driver's notifications signal.
    pub fn doorbell(&self) -> &Event {
        &self.doorbell
    }

    /// Allows one ring's worth of chains until the doorbell rings again.
    pub fn begin_batch(&mut self) {
        self.batch_left = self.size;
    }

    /// Fills `chain` with the next chain; `false` when there is none and the doorbell will ring.
    #[inline]
    pub fn pop(&mut self, chain: &mut Chain) -> Result<bool, QueueError> {
        if self.next_available == self.known_available && !self.look_for_more()? {
            return Ok(false);
        }
        if self.batch_left == 0 {
            self.doorbell.signal();
            return Ok(false);
        }
        let slot = usize::from(self.next_available & (self.size - 1));
        let head: u16 = self.available.bytes.read(AVAIL_RING + 2 * slot).unwrap_or(u16::MAX);
        let head = u16::from_le(head);
        self.mark_in_flight(head)?;
        self.walk(head, chain)?;
        self.next_available = self.next_available.wrapping_add(1);
        self.batch_left -= 1;
        Ok(true)
    }

    /// Gives the chain at `head` back, with `written` bytes written to it.
    #[inline]
    pub fn complete(&mut self, head: u16, written: u32) {
        let slot = usize::from(self.next_used & (self.size - 1));
        let element = UsedElement { head: u32::from(head).to_le(), written: written.to_le() };
        self.used.bytes.write(USED_RING + slot * USED_ELEMENT_SIZE, &element);
        self.next_used = self.next_used.wrapping_add(1);
        if let Some(word) = self.in_flight.get_mut(usize::from(head) / 64) {
            *word &= !(1 << (head % 64));
        }
    }

    /// Publishes what was completed and interrupts the driver if it wants to know; once for a
    /// batch.
    pub fn notify_driver(&mut self) {
        if self.next_used == self.signalled_used {
            return;
        }
        self.used.index.store(self.next_used.to_le(), Ordering::Release);
        // The driver's wish must be read after the index is seen (section 2.7.7.2).
        fence(Ordering::SeqCst);
        let wanted = if self.event_index {
            let event = u16::from_le(self.available.event.load(Ordering::Relaxed));
            let passed = self.next_used.wrapping_sub(event).wrapping_sub(1);
            passed < self.next_used.wrapping_sub(self.signalled_used)
        } else {
            u16::from_le(self.available.flags.load(Ordering::Relaxed)) & AVAIL_NO_INTERRUPT == 0
        };
        self.signalled_used = self.next_used;
        if wanted {
            self.interrupt.trigger();
        }
    }

    /// The head in the entry of the available ring that `index` falls on.
    fn available_head(&self, index: u16) -> Option<usize> {
        let slot = usize::from(index & (self.size - 1));
        self.available.bytes.read(AVAIL_RING + 2 * slot).map(|head| u16::from_le(head).into())
    }

    /// The same for the used ring.
    fn used_head(&self, index: u16) -> Option<usize> {
        let slot = usize::from(index & (self.size - 1));
        let head: Option<u32> = self.used.bytes.read(USED_RING + slot * USED_ELEMENT_SIZE);
        head.and_then(|head| usize::try_from(u32::from_le(head)).ok())
    }

    /// Reads the driver's index; asks for a notification when there is nothing, then looks again.
    fn look_for_more(&mut self) -> Result<bool, QueueError> {
        if self.read_available_index()? {
            return Ok(true);
        }
        if !self.event_index {
            return Ok(false);
        }
        self.used.event.store(self.next_available.to_le(), Ordering::Relaxed);
        // The request must be seen before the index is read again (section 2.7.10).
        fence(Ordering::SeqCst);
        self.read_available_index()
    }

    fn read_available_index(&mut self) -> Result<bool, QueueError> {
        let index = u16::from_le(self.available.index.load(Ordering::Acquire));
        if index.wrapping_sub(self.next_available) > self.size {
            return Err(QueueError::AvailableIndex { index, next: self.next_available });
        }
        self.known_available = index;
        Ok(index != self.next_available)
    }

    #[inline]
    fn mark_in_flight(&mut self, head: u16) -> Result<(), QueueError> {
        let word = self.in_flight.get_mut(usize::from(head) / 64);
        let word = word.filter(|_| head < self.size).ok_or(QueueError::DescriptorIndex(head))?;
        let bit = 1 << (head % 64);
        if *word & bit != 0 {
            return Err(QueueError::InFlight(head));
        }
        *word |= bit;
        Ok(())
    }

    /// Follows a chain from `head`, reading each descriptor once.
    ///
    /// The chain's places bound the walk: every round fills one, except the one round that enters
    /// an indirect table.
    fn walk(&self, head: u16, chain: &mut Chain) -> Result<(), QueueError> {
        if chain.slices.len() != usize::from(self.size) {
            self.make_room(chain);
        }
        (chain.head, chain.len, chain.readable, chain.taken) = (head, 0, 0, 0);
        let mut places = chain.slices.iter_mut();
        let mut table = self.descriptors;
        let mut index = head;
        let mut in_indirect = false;
        let mut readable = 0;
        let mut is_order_final = false;
        loop {
            let Some(Descriptor { address, len, flags, next }) = read_descriptor(table, index)
            else {
                return Err(QueueError::DescriptorIndex(index));
            };
            if flags & DESC_INDIRECT != 0 {
                table = self.enter_indirect(address, len, flags, in_indirect)?;
                in_indirect = true;
                index = 0;
                continue;
            }
            let Some(place) = places.next() else {
                return Err(QueueError::ChainLength);
            };
            let Some(slice) = self.resolve(address, len) else {
                return Err(not_ram(address, len));
            };
            *place = slice;
            if flags & DESC_WRITE != 0 {
                is_order_final = true;
            } else if is_order_final {
                return Err(QueueError::Order);
            } else {
                readable += 1;
            }
            if flags & DESC_NEXT == 0 {
                chain.len = usize::from(self.size) - places.len();
                chain.readable = readable;
                return Ok(());
            }
            index = next;
        }
    }

    #[inline(never)]
    fn enter_indirect(
        &self,
        address: u64,
        len: u32,
        flags: u16,
        in_indirect: bool,
    ) -> Result<GuestSlice, QueueError> {
        if in_indirect {
            return Err(QueueError::Indirect("a table inside a table"));
        }
        if !self.indirect {
            return Err(QueueError::Indirect("the feature was not negotiated"));
        }
        if flags & DESC_NEXT != 0 {
            return Err(QueueError::Indirect("a table with a descriptor after it"));
        }
        if len == 0 || !host_len(len).is_multiple_of(DESCRIPTOR_SIZE) {
            return Err(QueueError::Indirect("length is not a number of descriptors"));
        }
        self.resolve(address, len).ok_or_else(|| not_ram(address, len))
    }

    /// The host's view of a buffer.
    #[inline]
    fn resolve(&self, address: u64, len: u32) -> Option<GuestSlice> {
        self.windows.iter().find_map(|window| {
            let offset = usize::try_from(address.wrapping_sub(window.start)).ok()?;
            window.slice.sub_slice(offset, host_len(len))
        })
    }

    /// Gives a chain as many places as the queue has descriptors.
    #[cold]
    #[inline(never)]
    fn make_room(&self, chain: &mut Chain) {
        chain.slices.clear();
        chain.slices.resize(usize::from(self.size), self.descriptors);
    }
}

impl Ring {
    /// Resolves flags, index, `entries_len` bytes of entries and the event field behind them.
    fn resolve(
        memory: GuestMemory,
        address: u64,
        alignment: u64,
        entries_len: usize,
    ) -> Result<Self, QueueError> {
        let start = aligned(address, alignment)?;
        let event_offset = AVAIL_RING + entries_len;
        let bytes = memory.slice(start, event_offset + 2)?;
        let word = |offset| bytes.atomic_u16(offset).ok_or(QueueError::Alignment(address));
        const _: () = assert!(AVAIL_INDEX == USED_INDEX && AVAIL_RING == USED_RING);
        Ok(Self { bytes, index: word(AVAIL_INDEX)?, flags: word(0)?, event: word(event_offset)? })
    }
}

fn aligned(address: u64, alignment: u64) -> Result<GuestAddress, QueueError> {
    if address.is_multiple_of(alignment) {
        Ok(GuestAddress(address))
    } else {
        Err(QueueError::Alignment(address))
    }
}

fn windows(memory: GuestMemory) -> Vec<Window> {
    let regions = memory.regions();
    regions.map(|region| Window { start: region.start.0, slice: region.slice }).collect()
}

/// Reads a descriptor, both halves once; `None` when it is outside the table.
#[inline]
fn read_descriptor(table: GuestSlice, index: u16) -> Option<Descriptor> {
    let [address, rest]: [u64; 2] = table.read(usize::from(index) * DESCRIPTOR_SIZE)?;
    let [a, b, c, d, e, f, g, h] = rest.to_ne_bytes();
    Some(Descriptor {
        address: u64::from_le(address),
        len: u32::from_le_bytes([a, b, c, d]),
        flags: u16::from_le_bytes([e, f]),
        next: u16::from_le_bytes([g, h]),
    })
}

#[cold]
fn not_ram(address: u64, len: u32) -> QueueError {
    NotRam { address: GuestAddress(address), len: host_len(len) }.into()
}

/// A length in bytes as the host counts them; a host has 64 bits.
#[inline]
fn host_len(len: u32) -> usize {
    usize::try_from(len).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod test;
