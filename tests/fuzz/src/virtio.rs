//! A driver of virtio devices that does whatever the input says.

use std::io;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Mutex, OnceLock};
use std::thread;

use arbitrary::Arbitrary;
use arch::memory::{Backing, GuestAddress, GuestMemory};
use devices::bus::Registers;
use devices::event::{Event, EventLoop, EventSet, Handler, LoopHandle, Watch};
use devices::virtio::device::VirtioDevice;
use devices::virtio::mmio::{MmioTransport, REGISTERS_SIZE};

/// RAM in bytes: what a short address in the input reaches, mostly.
const RAM: u64 = 1 << 20;
/// Where the rings of each queue are when the driver behaves: far apart enough for the largest.
const RINGS: u64 = 0x1_0000;
const RINGS_SIZE: u64 = 0x4000;
const AVAILABLE: u64 = 0x1000;
const USED: u64 = 0x2000;
/// Queues that a driver sets up, at the most.
const QUEUES: u8 = 5;
/// Queues are as large as a driver of ours wants them.
const QUEUE_SIZE: u16 = 16;

/// One thing that a driver does.
#[derive(Arbitrary, Debug)]
pub enum Step {
    /// Resets the device and starts it as it should be, with some of the features.
    Start { refused_features: u64 },
    /// Makes a chain available and notifies the device.
    Send { queue: u8, head: u8, descriptors: Vec<Descriptor> },
    /// Writes to the rings, or anywhere.
    Write { address: u32, bytes: [u8; 8] },
    /// Writes a register.
    WriteRegister { offset: u16, width: u8, value: u64 },
    /// Reads a register.
    ReadRegister { offset: u16, width: u8 },
    /// Writes the notification register.
    Notify { queue: u8 },
    /// Waits until the device has done what it has to do.
    Settle,
    /// Resets the device.
    Reset,
}

/// A descriptor, nearly right more often than not.
#[derive(Arbitrary, Debug)]
pub struct Descriptor {
    address: u32,
    len: u16,
    is_huge: bool,
    flags: u8,
    next: u8,
    follows: bool,
}

impl Descriptor {
    /// A descriptor that the next one follows, if its flags say so.
    pub fn new(address: u32, len: u16, flags: u8) -> Self {
        Self { address, len, is_huge: false, flags, next: 0, follows: true }
    }
}

/// Drives the device that `make` makes, and checks that it works after a reset.
pub fn drive(make: impl FnOnce(LoopHandle) -> Box<dyn VirtioDevice>, steps: &[Step]) {
    drive_with(make, |driver| steps.iter().for_each(|step| driver.take(step)));
}

/// The same with a driver of the caller's.
pub fn drive_with(
    make: impl FnOnce(LoopHandle) -> Box<dyn VirtioDevice>,
    work: impl FnOnce(&mut Driver),
) {
    let memory = memory();
    let device = make(home().clone());
    let transport = MmioTransport::new(device, memory, Event::new().unwrap()).unwrap();
    let mut driver = Driver { transport, memory };
    work(&mut driver);
    driver.start(0);
    settle();
    let status = driver.read_word(0x70);
    assert_eq!(status, 15, "the device works after a reset");
}

/// The loop in which workers run, on a thread of its own.
pub fn home() -> &'static LoopHandle {
    static HOME: OnceLock<LoopHandle> = OnceLock::new();
    HOME.get_or_init(|| build_home(|_| ()).0)
}

/// The same, with what `build` makes in the loop before it runs.
pub fn build_home<T: Send + 'static>(
    build: impl FnOnce(&mut EventLoop) -> T + Send + 'static,
) -> (LoopHandle, T) {
    let (sender, receiver) = channel();
    thread::spawn(move || {
        let mut event_loop = EventLoop::new().unwrap();
        let built = build(&mut event_loop);
        sender.send((event_loop.handle(), built)).unwrap();
        event_loop.run().unwrap();
    });
    receiver.recv().unwrap()
}

/// A driver that does what it is told.
pub struct Driver {
    transport: MmioTransport,
    memory: GuestMemory,
}

impl Driver {
    /// Does one thing.
    pub fn take(&mut self, step: &Step) {
        match step {
            Step::Start { refused_features } => self.start(*refused_features),
            Step::Send { queue, head, descriptors } => {
                self.send(queue % QUEUES, head % 20, descriptors);
            }
            Step::Write { address, bytes } => self.write(u64::from(*address) % RAM, bytes),
            Step::WriteRegister { offset, width, value } => {
                let (offset, width) = place(*offset, *width);
                self.transport.write(offset, &value.to_le_bytes()[..width]);
            }
            Step::ReadRegister { offset, width } => {
                let (offset, width) = place(*offset, *width);
                self.transport.read(offset, &mut [0; 8][..width]);
            }
            Step::Notify { queue } => self.write_word(0x50, u32::from(*queue)),
            Step::Settle => settle(),
            Step::Reset => self.write_word(0x70, 0),
        }
    }

    /// The handshake of section 3.1, with all queues that there are.
    fn start(&mut self, refused_features: u64) {
        self.write_word(0x70, 0);
        self.write_word(0x70, 1);
        self.write_word(0x70, 3);
        for half in 0..2 {
            self.write_word(0x14, half);
            let offered = self.read_word(0x10);
            let refused = u32::try_from(refused_features >> (32 * half) & 0xffff_ffff).unwrap();
            // Without VIRTIO_F_VERSION_1 nothing would go on.
            let accepted = offered & !refused | if half == 1 { offered & 1 } else { 0 };
            self.write_word(0x24, half);
            self.write_word(0x20, accepted);
        }
        self.write_word(0x70, 11);
        for queue in 0..QUEUES {
            self.enable_queue(queue);
        }
        self.write_word(0x70, 15);
    }

    fn enable_queue(&mut self, queue: u8) {
        self.write_word(0x30, u32::from(queue));
        let size = self.read_word(0x34).min(u32::from(QUEUE_SIZE));
        let rings = rings(queue);
        self.memory.slice(GuestAddress(rings), 0x3000).unwrap().fill(0);
        self.write_word(0x38, size);
        for (register, address) in [(0x80, rings), (0x90, rings + AVAILABLE), (0xa0, rings + USED)]
        {
            self.write_word(register, u32::try_from(address).unwrap());
            self.write_word(register + 4, 0);
        }
        self.write_word(0x44, 1);
    }

    fn send(&mut self, queue: u8, head: u8, descriptors: &[Descriptor]) {
        let rings = rings(queue);
        for (index, descriptor) in (0..QUEUE_SIZE).zip(descriptors) {
            let index = (u16::from(head) + index) % QUEUE_SIZE;
            let next = if descriptor.follows { index + 1 } else { u16::from(descriptor.next) };
            let len = u32::from(descriptor.len) * if descriptor.is_huge { 0x1_0001 } else { 1 };
            let value = u128::from(descriptor.address % 0x11_0000)
                | u128::from(len) << 64
                | u128::from(descriptor.flags & 7) << 96
                | u128::from(next) << 112;
            self.write(rings + 16 * u64::from(index), &value.to_le_bytes());
        }
        let index: u16 = self.memory.read(GuestAddress(rings + AVAILABLE + 2)).unwrap();
        let slot = u64::from(index % QUEUE_SIZE);
        self.write(rings + AVAILABLE + 4 + 2 * slot, &u16::from(head).to_le_bytes());
        self.write(rings + AVAILABLE + 2, &index.wrapping_add(1).to_le_bytes());
        self.write_word(0x50, u32::from(queue));
    }

    fn write(&self, address: u64, bytes: &[u8]) {
        // What is not wholly RAM is not written.
        let _ = self.memory.write_bytes(GuestAddress(address), bytes);
    }

    fn read_word(&mut self, offset: u64) -> u32 {
        let mut word = [0; 4];
        self.transport.read(offset, &mut word);
        u32::from_le_bytes(word)
    }

    fn write_word(&mut self, offset: u64, value: u32) {
        self.transport.write(offset, &value.to_le_bytes());
    }
}

/// The same guest memory for all runs.
pub fn memory() -> GuestMemory {
    static MEMORY: OnceLock<GuestMemory> = OnceLock::new();
    *MEMORY.get_or_init(|| GuestMemory::map(&[0..RAM], backing()).unwrap())
}

/// Memory that processes which serve rings can have as well.
fn backing() -> Backing {
    Backing { shared: true, ..Backing::default() }
}

fn rings(queue: u8) -> u64 {
    RINGS + u64::from(queue) * RINGS_SIZE
}

fn place(offset: u16, width: u8) -> (u64, usize) {
    (u64::from(offset) % REGISTERS_SIZE, 1 + usize::from(width % 8))
}

/// Returns when everything that was signalled before the call has been served.
fn settle() {
    static LAST: OnceLock<Mutex<(Event, std::sync::mpsc::Receiver<()>)>> = OnceLock::new();
    let last = LAST.get_or_init(|| {
        let (event, (served, wait)) = (Event::new().unwrap(), channel());
        let last = Last { event: event.clone(), served };
        std::mem::forget(home().add(Box::new(last)).unwrap());
        Mutex::new((event, wait))
    });
    let last = last.lock().unwrap();
    last.0.signal();
    last.1.recv().unwrap();
}

/// Tells that events that were signalled before its own have been served.
struct Last {
    event: Event,
    served: Sender<()>,
}

impl Handler for Last {
    fn start(&mut self, watch: &mut Watch<'_, '_>) -> io::Result<()> {
        watch.add(&self.event, 0, EventSet::IN)
    }

    fn ready(&mut self, _: u32, _: EventSet, _: &mut Watch<'_, '_>) {
        self.event.take();
        self.served.send(()).unwrap();
    }
}
