//! Any device against a driver that breaks every rule.
//!
//! Whatever a guest does, a device must not panic, hang or grow: it ignores it or asks for a reset,
//! and works again after one. [`Subject::survives`] tries it all on both transports.

use arch::memory::GuestMemory;

use super::LoopThread;
use super::driver::{self, Descriptor, Driver, HIGH_RAM, INDIRECT, LOW_RAM, NEXT, WRITE};
use super::pci_wire::PciWire;
use super::wire::{MmioWire, Wire};
use crate::event::LoopHandle;
use crate::virtio::device::VirtioDevice;
use crate::virtio::transport::{Area, Half, Register};

/// A device under test.
pub(crate) struct Subject<'a> {
    /// Makes the device; its worker runs on the loop.
    pub(crate) make: &'a dyn Fn(LoopHandle) -> Box<dyn VirtioDevice>,
    /// The queues that the device empties as soon as their doorbell rings.
    pub(crate) served: &'a [u16],
    /// Panics unless a freshly started device works.
    pub(crate) works: &'a dyn Fn(&mut Driver),
}

/// Makes something available that breaks the rules of the rings.
type Attack = fn(&mut Driver, u16);

/// Puts a device on a transport.
type Over = fn(Box<dyn VirtioDevice>, GuestMemory) -> Box<dyn Wire>;

/// What a served queue must answer by asking for a reset.
const BROKEN_RINGS: &[(&str, Attack)] = &[
    ("head outside the table", |driver, queue| {
        let size = driver.rings[usize::from(queue)].size;
        driver.make_available(queue, size);
    }),
    ("next outside the table", |driver, queue| {
        chain(driver, queue, &[Descriptor { flags: NEXT, next: u16::MAX, ..one(driver) }]);
    }),
    ("descriptor that follows itself", |driver, queue| {
        chain(driver, queue, &[Descriptor { flags: NEXT, next: 0, ..one(driver) }]);
    }),
    ("loop of two empty descriptors", |driver, queue| {
        let first = Descriptor { len: 0, flags: NEXT, next: 1, ..one(driver) };
        chain(driver, queue, &[first, Descriptor { next: 0, ..first }]);
    }),
    ("buffer in the hole", |driver, queue| at(driver, queue, LOW_RAM.end, 1)),
    ("buffer across the end of RAM", |driver, queue| at(driver, queue, LOW_RAM.end - 8, 16)),
    ("buffer across the end of all RAM", |driver, queue| at(driver, queue, HIGH_RAM.end - 1, 2)),
    ("buffer across the end of addresses", |driver, queue| at(driver, queue, u64::MAX, 2)),
    ("buffer of 4 GiB", |driver, queue| at(driver, queue, 0, u32::MAX)),
    ("readable after writable", |driver, queue| {
        let first = Descriptor { flags: NEXT | WRITE, next: 1, ..one(driver) };
        chain(driver, queue, &[first, one(driver)]);
    }),
    ("indirect in indirect", |driver, queue| {
        let inner = driver.place(&one(driver).bytes());
        let nested = Descriptor { address: inner, len: 16, flags: INDIRECT, next: 0 };
        indirect(driver, queue, &[nested], 16);
    }),
    ("indirect with a next", |driver, queue| {
        let table = driver.place(&one(driver).bytes());
        let first = Descriptor { address: table, len: 16, flags: INDIRECT | NEXT, next: 1 };
        chain(driver, queue, &[first, one(driver)]);
    }),
    ("indirect table of no length", |driver, queue| {
        indirect(driver, queue, &[one(driver)], 0);
    }),
    ("indirect table of an odd length", |driver, queue| {
        indirect(driver, queue, &[one(driver)], 17);
    }),
    ("indirect table outside RAM", |driver, queue| {
        let table = Descriptor { address: HIGH_RAM.end - 16, len: 32, flags: INDIRECT, next: 0 };
        chain(driver, queue, &[table]);
    }),
    ("indirect table that loops", |driver, queue| {
        indirect(driver, queue, &[Descriptor { flags: NEXT, next: 0, ..one(driver) }], 16);
    }),
    ("indirect table with a next outside", |driver, queue| {
        indirect(driver, queue, &[Descriptor { flags: NEXT, next: 1, ..one(driver) }], 16);
    }),
    ("indirect chain longer than the queue", |driver, queue| {
        let count = driver.rings[usize::from(queue)].size + 1;
        let link = |index| Descriptor { flags: NEXT, next: index + 1, ..one(driver) };
        let mut table: Vec<_> = (0..count).map(link).collect();
        table[usize::from(count) - 1].flags = 0;
        indirect(driver, queue, &table, usize::from(count) * 16);
    }),
    ("index ahead by more than the queue", |driver, queue| {
        let size = driver.rings[usize::from(queue)].size;
        driver.set_available_index(queue, size + 1);
    }),
    ("index that goes back", |driver, queue| driver.set_available_index(queue, u16::MAX)),
];

/// What is odd and may be served or refused, whatever the device makes of it.
const ODD_RINGS: &[(&str, Attack)] = &[
    ("one empty buffer", |driver, queue| at(driver, queue, 0x1000, 0)),
    ("the same head twice", |driver, queue| {
        chain(driver, queue, &[Descriptor { flags: WRITE, ..one(driver) }]);
        driver.make_available(queue, 0);
    }),
    ("a ring full of one head", |driver, queue| {
        driver.write_descriptor(queue, 0, one(driver));
        for _ in 0..driver.rings[usize::from(queue)].size {
            driver.make_available(queue, 0);
        }
    }),
    ("buffers that are the rings", |driver, queue| {
        let rings = driver.rings[usize::from(queue)];
        let first = Descriptor { address: rings.used, len: 64, flags: WRITE | NEXT, next: 1 };
        let second = Descriptor { address: rings.descriptors, len: 256, flags: WRITE, next: 0 };
        chain(driver, queue, &[first, second]);
    }),
    ("a wish for no interrupts that is nonsense", |driver, queue| {
        let rings = driver.rings[usize::from(queue)];
        driver.write_memory(rings.available, &[0xff, 0xff]);
        let event = rings.available + 4 + 2 * u64::from(rings.size);
        driver.write_memory(event, &[0xff, 0x7f]);
        chain(driver, queue, &[Descriptor { flags: WRITE, ..one(driver) }]);
    }),
];

impl Subject<'_> {
    /// Tries everything, on every transport.
    pub(crate) fn survives(&self) {
        let transports: &[Over] = &[mmio, pci];
        for over in transports {
            let home = LoopThread::new();
            let memory = driver::memory();
            let wire = over((self.make)(home.handle()), memory);
            let mut driver = Driver::new(wire, memory);
            self.still_works(&mut driver);
            self.broken_rings(&mut driver, &home);
            self.odd_rings(&mut driver, &home);
            self.random_rings(&mut driver, &home);
            self.impossible_set_ups(&mut driver);
            self.late_changes(&mut driver);
            self.steps_out_of_order(&mut driver);
            self.random_registers(&mut driver);
            self.notify_flood(&mut driver);
            self.reset_in_flight(&mut driver, &home);
        }
    }

    /// The device works after a reset, whatever went before.
    fn still_works(&self, driver: &mut Driver) {
        driver.start();
        (self.works)(driver);
    }

    fn broken_rings(&self, driver: &mut Driver, home: &LoopThread) {
        for queue in self.served {
            for (name, attack) in BROKEN_RINGS {
                driver.start();
                attack(driver, *queue);
                driver.wire.notify(*queue);
                home.settle();
                assert!(driver.needs_reset(), "queue {queue}: {name}");
                driver.wait_needs_reset();
                self.still_works(driver);
            }
        }
    }

    fn odd_rings(&self, driver: &mut Driver, home: &LoopThread) {
        for (_, attack) in ODD_RINGS.iter().chain(BROKEN_RINGS) {
            driver.start();
            for queue in queues(driver) {
                attack(driver, queue);
                driver.wire.notify(queue);
            }
            home.settle();
            self.still_works(driver);
        }
    }

    fn random_rings(&self, driver: &mut Driver, home: &LoopThread) {
        let mut random = Random(0x6e69_7876_6d6d_0001);
        for round in 0..200 {
            driver.start();
            for queue in queues(driver) {
                scatter(driver, queue, &mut random);
                driver.wire.notify(queue);
            }
            if round % 2 == 0 {
                home.settle();
            }
        }
        self.still_works(driver);
    }

    fn impossible_set_ups(&self, driver: &mut Driver) {
        let ends = [LOW_RAM.end, LOW_RAM.end - 16, HIGH_RAM.end, !0xfff, 0x1001, 0x1002];
        for area in [Area::Descriptors, Area::Driver, Area::Device] {
            for end in ends {
                let offered = driver.offered_features();
                driver.negotiate(offered);
                for queue in queues(driver) {
                    let rings = driver.lay_out(queue, driver::QUEUE_SIZE_MAX);
                    driver.configure_queue(queue, rings);
                    let halves = driver::halves(end);
                    driver.wire.write(Register::QueueArea(area, Half::Low), halves[0]);
                    driver.wire.write(Register::QueueArea(area, Half::High), halves[1]);
                    driver.wire.write(Register::QueueReady, 1);
                }
                driver.set_status(15);
                for queue in queues(driver) {
                    driver.wire.notify(queue);
                }
            }
        }
        // No queue enabled at all.
        let offered = driver.offered_features();
        driver.negotiate(offered);
        driver.set_status(15);
        self.still_works(driver);
    }

    /// Nothing of a queue changes after it is enabled, nor after `DRIVER_OK`.
    fn late_changes(&self, driver: &mut Driver) {
        let areas = [Area::Descriptors, Area::Driver, Area::Device];
        let areas = areas.iter().flat_map(|area| [(*area, Half::Low), (*area, Half::High)]);
        let areas = areas.map(|(area, half)| Register::QueueArea(area, half));
        let registers: Vec<_> = areas.chain([Register::QueueSize]).collect();
        for status in [11, 15] {
            let offered = driver.offered_features();
            driver.negotiate(offered);
            for queue in queues(driver) {
                driver.enable_queue(queue);
            }
            driver.set_status(status);
            for queue in queues(driver) {
                driver.wire.write(Register::QueueSelect, u32::from(queue));
                for register in &registers {
                    let before = driver.wire.read(*register);
                    for value in [0, 1, 2, 3, 0xffff, u32::MAX] {
                        driver.wire.write(*register, value);
                        assert_eq!(driver.wire.read(*register), before, "{register:?}");
                    }
                }
            }
        }
        // A live device's queues cannot be taken back, nor its features changed.
        driver.wire.write(Register::QueueReady, 0);
        assert_eq!(driver.wire.read(Register::QueueReady), 1);
        driver.accept_features(0);
        (self.works)(driver);
    }

    fn steps_out_of_order(&self, driver: &mut Driver) {
        for status in 1..=u8::MAX {
            driver.reset();
            driver.set_status(status);
            assert_eq!(driver.status() & 12, 0, "nothing was negotiated");
            driver.set_status(status.reverse_bits());
            assert_eq!(driver.status() & 4, 0, "nothing was negotiated");
        }
        driver.reset();
        driver.set_status(3);
        let offered = driver.offered_features();
        for refused in [0, offered & !(1 << 32), offered | 1 << 63, u64::MAX] {
            driver.accept_features(refused);
            driver.set_status(11);
            assert_eq!(driver.status(), 3, "{refused:#x} is not acceptable");
        }
        driver.set_status(3 | 128);
        driver.accept_features(offered);
        driver.set_status(11);
        assert_eq!(driver.status() & 12, 0, "the driver has given up");
        self.still_works(driver);
    }

    /// Reads and writes of every width everywhere, the device running and not.
    fn random_registers(&self, driver: &mut Driver) {
        let mut random = Random(0x6e69_7876_6d6d_0002);
        let len = driver.wire.registers_len();
        for round in 0..50 {
            if round % 2 == 0 {
                driver.start();
            }
            let registers = driver.wire.registers();
            for _ in 0..500 {
                let offset = random.below(len);
                let width = usize::try_from(1 + random.below(8)).unwrap();
                let value = random.next() & random.next();
                let mut data = value.to_le_bytes();
                match random.below(3) {
                    0 => registers.write(offset & !3, &data[..4]),
                    1 => registers.write(offset, &data[..width]),
                    _ => registers.read(offset, &mut data[..width]),
                }
            }
        }
        self.still_works(driver);
    }

    fn notify_flood(&self, driver: &mut Driver) {
        driver.start();
        let count = queues(driver).end;
        for index in 0..10_000 {
            driver.wire.notify(index % (count + 1));
        }
        driver.wire.notify(u16::MAX);
        (self.works)(driver);
    }

    /// A reset that returns has stopped everything: memory does not change any more.
    fn reset_in_flight(&self, driver: &mut Driver, home: &LoopThread) {
        for _ in 0..50 {
            driver.start();
            for queue in queues(driver) {
                for _ in 0..8 {
                    driver.send(queue, &[&[0; 16], &[1; 512]], &[512, 1]);
                }
            }
            let rings = driver.rings.clone();
            driver.reset();
            let used = |ring: &driver::Rings| driver.read_memory(ring.used, 4 + 8 * 256);
            let before: Vec<_> = rings.iter().map(used).collect();
            home.settle();
            assert_eq!(before, rings.iter().map(used).collect::<Vec<_>>());
        }
        self.still_works(driver);
    }
}

fn mmio(device: Box<dyn VirtioDevice>, memory: GuestMemory) -> Box<dyn Wire> {
    Box::new(MmioWire::new(device, memory))
}

fn pci(device: Box<dyn VirtioDevice>, memory: GuestMemory) -> Box<dyn Wire> {
    Box::new(PciWire::new(device, memory))
}

fn queues(driver: &mut Driver) -> std::ops::Range<u16> {
    let count = (0..).take_while(|queue| driver.queue_size_max(*queue) != 0).count();
    0..u16::try_from(count).unwrap()
}

/// A harmless buffer of one byte.
fn one(_: &Driver) -> Descriptor {
    Descriptor { address: 0x1000, len: 1, flags: 0, next: 0 }
}

/// Makes a chain available whose descriptors are the first of the table.
fn chain(driver: &mut Driver, queue: u16, descriptors: &[Descriptor]) {
    for (index, descriptor) in (0..).zip(descriptors) {
        driver.write_descriptor(queue, index, *descriptor);
    }
    driver.make_available(queue, 0);
}

fn at(driver: &mut Driver, queue: u16, address: u64, len: u32) {
    chain(driver, queue, &[Descriptor { address, len, flags: WRITE, next: 0 }]);
}

/// Makes a chain available that is an indirect table, said to have `len` bytes.
fn indirect(driver: &mut Driver, queue: u16, table: &[Descriptor], len: usize) {
    let bytes: Vec<_> = table.iter().flat_map(|descriptor| descriptor.bytes()).collect();
    let address = driver.place(&bytes);
    let len = u32::try_from(len).unwrap();
    chain(driver, queue, &[Descriptor { address, len, flags: INDIRECT, next: 0 }]);
}

/// Fills a queue with descriptors that are each nearly right, and makes some of them available.
fn scatter(driver: &mut Driver, queue: u16, random: &mut Random) {
    let size = driver.rings[usize::from(queue)].size;
    let table = driver.rings[usize::from(queue)].descriptors;
    let places =
        [0x1000, LOW_RAM.end - 0x100, HIGH_RAM.start, HIGH_RAM.end - 1, table, u64::MAX - 1];
    for index in 0..size {
        let address = places[usize::try_from(random.below(6)).unwrap()] + random.below(2);
        let len =
            [0, 1, 16, 0x100, 0x101, 0x1000, u32::MAX][usize::try_from(random.below(7)).unwrap()];
        let flags = u16::try_from(random.next() & random.next() & 7).unwrap();
        let next = u16::try_from(random.below(u64::from(size) + 1)).unwrap();
        driver.write_descriptor(queue, index, Descriptor { address, len, flags, next });
    }
    for _ in 0..=random.below(u64::from(size)) {
        let head = u16::try_from(random.below(u64::from(size))).unwrap();
        driver.make_available(queue, head);
    }
}

/// A sequence that is the same in every run (xorshift).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }
}

#[cfg(test)]
mod test {
    use super::super::echo::Echo;
    use super::*;

    #[test]
    fn a_device_survives_a_hostile_driver() {
        let subject = Subject {
            make: &|home| Box::new(Echo::new(2, home)),
            served: &[0, 1],
            works: &|driver| {
                assert_eq!(driver.request(0, &[b"hello"], &[2, 8]), b"hello");
                assert_eq!(driver.request(1, &[b"a", b"b"], &[2]), b"ab");
            },
        };
        subject.survives();
    }
}
