//! A driver that uses registers and rings as a guest does.

use arch::memory::{Backing, GuestAddress, GuestMemory};

use super::pci_wire::PciWire;
use super::wire::{MmioWire, Source, Wire};
use crate::virtio::device::VirtioDevice;
use crate::virtio::transport::{Area, Half, Register, status};

pub(crate) const NEXT: u16 = 1;
pub(crate) const WRITE: u16 = 2;
pub(crate) const INDIRECT: u16 = 4;

/// Two ranges of RAM with a hole between them.
pub(crate) const LOW_RAM: std::ops::Range<u64> = 0..0x400_0000;
pub(crate) const HIGH_RAM: std::ops::Range<u64> = 0x1_0000_0000..0x1_0100_0000;

/// Each queue's rings have this much room, from `RINGS` on.
const RING_STRIDE: u64 = 0x1_0000;
const RINGS: u64 = 0x10_0000;
const BUFFERS: u64 = 0x100_0000;
/// Descriptors of a queue, at the most.
pub(crate) const QUEUE_SIZE_MAX: u16 = 256;

/// A descriptor as it is in memory.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Descriptor {
    pub(crate) address: u64,
    pub(crate) len: u32,
    pub(crate) flags: u16,
    pub(crate) next: u16,
}

impl Descriptor {
    pub(crate) fn bytes(self) -> [u8; 16] {
        let value = u128::from(self.address)
            | u128::from(self.len) << 64
            | u128::from(self.flags) << 96
            | u128::from(self.next) << 112;
        value.to_le_bytes()
    }
}

/// The rings of one queue as the driver sees them.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rings {
    pub(crate) size: u16,
    pub(crate) descriptors: u64,
    pub(crate) available: u64,
    pub(crate) used: u64,
    pub(crate) next_available: u16,
    next_used: u16,
    next_descriptor: u16,
}

/// A request that the device has.
#[derive(Clone, Debug)]
pub(crate) struct Sent {
    pub(crate) head: u16,
    writable: Vec<(u64, usize)>,
}

pub(crate) struct Driver {
    pub(crate) wire: Box<dyn Wire>,
    pub(crate) memory: GuestMemory,
    pub(crate) rings: Vec<Rings>,
    next_buffer: u64,
}

/// RAM for a driver and its device, which may be another process; never unmapped, as in a machine.
pub(crate) fn memory() -> GuestMemory {
    GuestMemory::map(&[LOW_RAM, HIGH_RAM], Backing { shared: true, ..Backing::default() }).unwrap()
}

impl Driver {
    /// Drives `device` over virtio-mmio.
    pub(crate) fn mmio(device: Box<dyn VirtioDevice>) -> Self {
        let memory = memory();
        Self::new(Box::new(MmioWire::new(device, memory)), memory)
    }

    /// Drives `device` over virtio-pci.
    pub(crate) fn pci(device: Box<dyn VirtioDevice>) -> Self {
        let memory = memory();
        Self::new(Box::new(PciWire::new(device, memory)), memory)
    }

    pub(crate) fn new(wire: Box<dyn Wire>, memory: GuestMemory) -> Self {
        Self { wire, memory, rings: Vec::new(), next_buffer: BUFFERS }
    }

    /// Takes the device from reset to work, with every feature and every queue it has.
    pub(crate) fn start(&mut self) {
        let offered = self.offered_features();
        self.start_with(offered);
    }

    /// The same with a choice of features.
    pub(crate) fn start_with(&mut self, features: u64) {
        self.negotiate(features);
        let mut queue = 0;
        while self.queue_size_max(queue) != 0 {
            self.enable_queue(queue);
            queue += 1;
        }
        self.set_status(15);
        assert_eq!(self.status(), 15, "the device runs");
    }

    /// Goes as far as agreeing on `features`.
    pub(crate) fn negotiate(&mut self, features: u64) {
        self.wire.probe();
        self.reset();
        self.set_status(status::ACKNOWLEDGE);
        self.set_status(status::ACKNOWLEDGE | status::DRIVER);
        self.accept_features(features);
        self.set_status(11);
        assert_eq!(self.status(), 11, "the device accepts the features");
    }

    pub(crate) fn reset(&mut self) {
        self.set_status(0);
        assert_eq!(self.status(), 0, "the device is reset");
        self.rings.clear();
        self.next_buffer = BUFFERS;
    }

    pub(crate) fn status(&mut self) -> u8 {
        u8::try_from(self.wire.read(Register::Status)).unwrap()
    }

    pub(crate) fn set_status(&mut self, status: u8) {
        self.wire.write(Register::Status, u32::from(status));
    }

    pub(crate) fn needs_reset(&mut self) -> bool {
        self.status() & status::NEEDS_RESET != 0
    }

    /// Waits until the device says that it needs a reset.
    pub(crate) fn wait_needs_reset(&mut self) {
        while !self.needs_reset() {
            self.wire.wait_interrupt(Source::Config);
        }
    }

    pub(crate) fn offered_features(&mut self) -> u64 {
        let mut half = |index| {
            self.wire.write(Register::DeviceFeaturesSelect, index);
            u64::from(self.wire.read(Register::DeviceFeatures))
        };
        half(0) | half(1) << 32
    }

    pub(crate) fn accept_features(&mut self, features: u64) {
        for (index, bits) in (0..).zip(halves(features)) {
            self.wire.write(Register::DriverFeaturesSelect, index);
            self.wire.write(Register::DriverFeatures, bits);
        }
    }

    pub(crate) fn queue_size_max(&mut self, queue: u16) -> u16 {
        self.wire.write(Register::QueueSelect, u32::from(queue));
        u16::try_from(self.wire.read(Register::QueueSizeMax)).unwrap()
    }

    /// Lays out the next queue's rings in memory, tells the device about them and enables it.
    pub(crate) fn enable_queue(&mut self, queue: u16) {
        let size = self.queue_size_max(queue).min(QUEUE_SIZE_MAX);
        let rings = self.lay_out(queue, size);
        self.configure_queue(queue, rings);
        self.wire.write(Register::QueueReady, 1);
        assert_eq!(self.wire.read(Register::QueueReady), 1);
    }

    pub(crate) fn lay_out(&mut self, queue: u16, size: u16) -> Rings {
        let descriptors = RINGS + u64::from(queue) * RING_STRIDE;
        let available = descriptors + u64::from(QUEUE_SIZE_MAX) * 16;
        let rings = Rings {
            size,
            descriptors,
            available,
            used: available + 0x1000,
            next_available: 0,
            next_used: 0,
            next_descriptor: 0,
        };
        let len = usize::try_from(RING_STRIDE).unwrap();
        self.memory.slice(GuestAddress(descriptors), len).unwrap().fill(0);
        self.rings.push(rings);
        rings
    }

    pub(crate) fn configure_queue(&mut self, queue: u16, rings: Rings) {
        self.wire.write(Register::QueueSelect, u32::from(queue));
        self.wire.write(Register::QueueSize, u32::from(rings.size));
        let areas = [
            (Area::Descriptors, rings.descriptors),
            (Area::Driver, rings.available),
            (Area::Device, rings.used),
        ];
        for (area, address) in areas {
            let [low, high] = halves(address);
            self.wire.write(Register::QueueArea(area, Half::Low), low);
            self.wire.write(Register::QueueArea(area, Half::High), high);
        }
    }

    /// Sends a request and waits for its answer: what the device wrote, as long as it says.
    pub(crate) fn request(&mut self, queue: u16, read: &[&[u8]], write: &[usize]) -> Vec<u8> {
        let sent = self.send(queue, read, write);
        let (head, len) = self.wait_used(queue);
        assert_eq!(head, u32::from(sent.head));
        let mut answer = self.answer(&sent);
        answer.truncate(usize::try_from(len).unwrap());
        answer
    }

    /// Makes a request available and notifies the device: `read` is for it, `write` are the sizes
    /// of the buffers that it fills.
    pub(crate) fn send(&mut self, queue: u16, read: &[&[u8]], write: &[usize]) -> Sent {
        let mut parts: Vec<_> = Vec::new();
        let mut writable = Vec::new();
        for bytes in read {
            parts.push((self.place(bytes), bytes.len(), 0));
        }
        for len in write {
            let address = self.room(*len);
            writable.push((address, *len));
            parts.push((address, *len, WRITE));
        }
        let (ring, count) = (usize::from(queue), u16::try_from(parts.len()).unwrap());
        let head = self.rings[ring].next_descriptor;
        let size = self.rings[ring].size;
        for (index, (address, len, flags)) in (0..).zip(parts) {
            let next = (head + index + 1) % size;
            let flags = if index + 1 < count { flags | NEXT } else { flags };
            let len = u32::try_from(len).unwrap();
            let descriptor = Descriptor { address, len, flags, next };
            self.write_descriptor(queue, (head + index) % size, descriptor);
        }
        self.rings[ring].next_descriptor = (head + count) % size;
        self.make_available(queue, head);
        self.wire.notify(queue);
        Sent { head, writable }
    }

    /// All bytes of a request's writable buffers.
    pub(crate) fn answer(&self, sent: &Sent) -> Vec<u8> {
        let read = |(address, len): &(u64, usize)| self.read_memory(*address, *len);
        sent.writable.iter().flat_map(read).collect()
    }

    pub(crate) fn write_descriptor(&self, queue: u16, index: u16, descriptor: Descriptor) {
        let table = self.rings[usize::from(queue)].descriptors;
        self.write_memory(table + u64::from(index) * 16, &descriptor.bytes());
    }

    /// Puts `head` into the available ring.
    pub(crate) fn make_available(&mut self, queue: u16, head: u16) {
        let rings = &mut self.rings[usize::from(queue)];
        let slot = u64::from(rings.next_available % rings.size);
        rings.next_available = rings.next_available.wrapping_add(1);
        let (ring, index) = (rings.available, rings.next_available);
        self.write_memory(ring + 4 + 2 * slot, &head.to_le_bytes());
        self.set_available_index(queue, index);
    }

    pub(crate) fn set_available_index(&self, queue: u16, index: u16) {
        let word = self.word(self.rings[usize::from(queue)].available + 2);
        word.store(index.to_le(), std::sync::atomic::Ordering::SeqCst);
    }

    /// Takes the next used element: head and written bytes.
    pub(crate) fn used(&mut self, queue: u16) -> Option<(u32, u32)> {
        let rings = self.rings[usize::from(queue)];
        let index = self.word(rings.used + 2).load(std::sync::atomic::Ordering::SeqCst);
        if u16::from_le(index) == rings.next_used {
            return None;
        }
        let element = rings.used + 4 + 8 * u64::from(rings.next_used % rings.size);
        let bytes = self.read_memory(element, 8);
        let next_used = rings.next_used.wrapping_add(1);
        self.rings[usize::from(queue)].next_used = next_used;
        // The event index (section 2.7.10): interrupt when one more is used.
        let event = self.word(rings.available + 4 + 2 * u64::from(rings.size));
        event.store(next_used.to_le(), std::sync::atomic::Ordering::SeqCst);
        let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        Some((word(0), word(4)))
    }

    /// Waits for the next used element.
    pub(crate) fn wait_used(&mut self, queue: u16) -> (u32, u32) {
        loop {
            if let Some(used) = self.used(queue) {
                return used;
            }
            self.wire.wait_interrupt(Source::Queue(queue));
        }
    }

    /// Puts `bytes` somewhere in memory.
    pub(crate) fn place(&mut self, bytes: &[u8]) -> u64 {
        let address = self.room(bytes.len());
        self.write_memory(address, bytes);
        address
    }

    /// Finds room for `len` bytes; it comes round again when memory is full.
    pub(crate) fn room(&mut self, len: usize) -> u64 {
        let len = u64::try_from(len).unwrap().next_multiple_of(16);
        if self.next_buffer + len > LOW_RAM.end {
            self.next_buffer = BUFFERS;
        }
        let address = self.next_buffer;
        self.next_buffer += len;
        address
    }

    /// Makes `address` the next room that is found.
    pub(crate) fn next_room(&mut self, address: u64) {
        self.next_buffer = address;
    }

    pub(crate) fn write_memory(&self, address: u64, bytes: &[u8]) {
        self.memory.write_bytes(GuestAddress(address), bytes).unwrap();
    }

    pub(crate) fn read_memory(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.slice(GuestAddress(address), len).unwrap().copy_to(&mut bytes);
        bytes
    }

    fn word(&self, address: u64) -> &'static std::sync::atomic::AtomicU16 {
        self.memory.slice(GuestAddress(address), 2).unwrap().atomic_u16(0).unwrap()
    }
}

pub(crate) fn halves(value: u64) -> [u32; 2] {
    [0, 32].map(|shift| u32::try_from(value >> shift & u64::from(u32::MAX)).unwrap())
}
