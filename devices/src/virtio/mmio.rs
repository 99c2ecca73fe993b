//! Virtio over memory-mapped registers (virtio 1.3, section 4.2), version 2 only.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use arch::memory::GuestMemory;

use super::config_change::ConfigChange;
use super::device::VirtioDevice;
use super::transport::{Area, Doorbell, Half, Interrupts, Register, Transport};
use crate::bus::Registers;
use crate::event::Event;
use crate::interrupt::Interrupt;

/// Bytes that the registers of one device take, configuration space included.
pub const REGISTERS_SIZE: u64 = 0x1000;

const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const VERSION: u32 = 2;
const VENDOR: u32 = u32::from_le_bytes(*b"NXVM");

const QUEUE_NOTIFY: u64 = 0x050;
const CONFIG: u64 = 0x100;

const REASON_USED_BUFFER: u32 = 1;
const REASON_CONFIG_CHANGE: u32 = 2;

/// What is at an offset.
#[derive(Clone, Copy)]
enum Slot {
    Constant(u32),
    DeviceKind,
    Common(Register),
    Notify,
    InterruptStatus,
    InterruptAcknowledge,
}

/// The registers of section 4.2.2. Offsets that are not here read as zero: `QueueReset` is one of
/// them, since the feature it belongs to is not offered.
const LAYOUT: &[(u64, Slot)] = &[
    (0x000, Slot::Constant(MAGIC)),
    (0x004, Slot::Constant(VERSION)),
    (0x008, Slot::DeviceKind),
    (0x00c, Slot::Constant(VENDOR)),
    (0x010, Slot::Common(Register::DeviceFeatures)),
    (0x014, Slot::Common(Register::DeviceFeaturesSelect)),
    (0x020, Slot::Common(Register::DriverFeatures)),
    (0x024, Slot::Common(Register::DriverFeaturesSelect)),
    (0x030, Slot::Common(Register::QueueSelect)),
    (0x034, Slot::Common(Register::QueueSizeMax)),
    (0x038, Slot::Common(Register::QueueSize)),
    (0x044, Slot::Common(Register::QueueReady)),
    (QUEUE_NOTIFY, Slot::Notify),
    (0x060, Slot::InterruptStatus),
    (0x064, Slot::InterruptAcknowledge),
    (0x070, Slot::Common(Register::Status)),
    (0x080, Slot::Common(Register::QueueArea(Area::Descriptors, Half::Low))),
    (0x084, Slot::Common(Register::QueueArea(Area::Descriptors, Half::High))),
    (0x090, Slot::Common(Register::QueueArea(Area::Driver, Half::Low))),
    (0x094, Slot::Common(Register::QueueArea(Area::Driver, Half::High))),
    (0x0a0, Slot::Common(Register::QueueArea(Area::Device, Half::Low))),
    (0x0a4, Slot::Common(Register::QueueArea(Area::Device, Half::High))),
    // Length and base of a shared memory region: all ones say that there is none.
    (0x0b0, Slot::Constant(u32::MAX)),
    (0x0b4, Slot::Constant(u32::MAX)),
    (0x0b8, Slot::Constant(u32::MAX)),
    (0x0bc, Slot::Constant(u32::MAX)),
    (0x0fc, Slot::Common(Register::ConfigGeneration)),
];

/// A device on the virtio-mmio transport.
pub struct MmioTransport {
    transport: Transport,
    line: Line,
}

impl MmioTransport {
    /// Makes the registers of `device`; `interrupt` raises its line, edge triggered.
    pub fn new(
        device: Box<dyn VirtioDevice>,
        memory: GuestMemory,
        interrupt: Event,
    ) -> io::Result<Self> {
        let transport = Transport::new(device, memory)?;
        Ok(Self { transport, line: Line { event: interrupt, status: Arc::default() } })
    }

    /// Where each queue's notifications arrive, for the hypervisor to signal them by itself.
    pub fn doorbells(&self) -> Vec<Doorbell> {
        let queues = (0..).zip(self.transport.doorbells());
        queues
            .map(|(index, event)| Doorbell {
                event: event.clone(),
                offset: QUEUE_NOTIFY,
                data: Some(index),
            })
            .collect()
    }

    /// The way to announce a change of the device's configuration at run time.
    pub fn config_change(&self) -> ConfigChange {
        self.transport.config_change()
    }

    /// Returns to the state before a driver came, as when the guest restarts.
    pub fn reset(&mut self) {
        self.transport.reset();
        self.line.status.store(0, Ordering::SeqCst);
    }

    fn read_register(&mut self, offset: u64) -> u32 {
        match slot(offset) {
            Some(Slot::Constant(value)) => value,
            Some(Slot::DeviceKind) => self.transport.offer().kind as u32,
            Some(Slot::Common(register)) => self.transport.read(register),
            Some(Slot::InterruptStatus) => self.line.status.load(Ordering::SeqCst),
            Some(Slot::Notify | Slot::InterruptAcknowledge) | None => 0,
        }
    }

    fn write_register(&mut self, offset: u64, value: u32) {
        match slot(offset) {
            Some(Slot::Common(Register::Status)) if value == 0 => self.reset(),
            Some(Slot::Common(register)) => self.transport.write(register, value, &self.line),
            Some(Slot::Notify) => self.transport.notify(value),
            Some(Slot::InterruptAcknowledge) => {
                self.line.status.fetch_and(!value, Ordering::SeqCst);
            }
            Some(Slot::Constant(_) | Slot::DeviceKind | Slot::InterruptStatus) | None => {}
        }
    }
}

impl Registers for MmioTransport {
    /// Registers answer aligned 32-bit accesses only (section 4.2.2.2); others read as zeros.
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if let Some(config_offset) = offset.checked_sub(CONFIG) {
            return self.transport.read_config(config_offset, data);
        }
        match <&mut [u8; 4]>::try_from(&mut *data) {
            Ok(word) => *word = self.read_register(offset).to_le_bytes(),
            Err(_) => data.fill(0),
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let Some(config_offset) = offset.checked_sub(CONFIG) {
            self.transport.write_config(config_offset, data);
        } else if let Ok(word) = <[u8; 4]>::try_from(data) {
            self.write_register(offset, u32::from_le_bytes(word));
        }
    }
}

/// The one interrupt line of a device, with its status register.
struct Line {
    event: Event,
    status: Arc<AtomicU32>,
}

impl Line {
    fn with_reason(&self, reason: u32) -> Interrupt {
        Interrupt::Line { event: self.event.clone(), status: Arc::clone(&self.status), reason }
    }
}

impl Interrupts for Line {
    fn queue(&self, _index: usize) -> Interrupt {
        self.with_reason(REASON_USED_BUFFER)
    }

    fn config(&self) -> Interrupt {
        self.with_reason(REASON_CONFIG_CHANGE)
    }
}

fn slot(offset: u64) -> Option<Slot> {
    let found = LAYOUT.iter().find(|(at, _)| *at == offset);
    found.map(|(_, slot)| *slot)
}

#[cfg(test)]
mod test {
    use super::super::transport::status;
    use super::*;
    use crate::test::LoopThread;
    use crate::test::driver::{self, Driver};
    use crate::test::echo::{Echo, FEATURE_ECHO};
    use crate::test::wire::{MmioWire, Source, Wire};

    fn wire(home: &LoopThread) -> MmioWire {
        MmioWire::new(Box::new(Echo::new(1, home.handle())), driver::memory())
    }

    #[test]
    fn says_what_it_is() {
        let home = LoopThread::new();
        let mut wire = wire(&home);
        assert_eq!([0, 4].map(|offset| wire.word(offset)), [0x7472_6976, 2]);
        assert_eq!(wire.device_kind(), 4);
        let shared_memory = [0xb0, 0xb4, 0xb8, 0xbc].map(|offset| wire.word(offset));
        assert_eq!(shared_memory, [u32::MAX; 4], "there is no shared memory region");
        assert_eq!(wire.word(0xc0), 0, "queues cannot be reset on their own");
    }

    #[test]
    fn only_aligned_words_reach_registers() {
        let home = LoopThread::new();
        let mut wire = wire(&home);
        let registers = wire.registers();
        let mut byte = [0xaa];
        registers.read(0, &mut byte);
        assert_eq!(byte, [0]);
        let mut word = [0xaa; 4];
        registers.read(1, &mut word);
        assert_eq!(word, [0; 4]);
        registers.write(0x70, &[1]);
        registers.read(0x70, &mut word);
        assert_eq!(word, [0; 4]);
    }

    #[test]
    fn a_request_is_answered_with_an_interrupt() {
        let home = LoopThread::new();
        let mut driver = Driver::mmio(Box::new(Echo::new(2, home.handle())));
        assert_eq!(driver.offered_features(), FEATURE_ECHO | 1 << 28 | 1 << 29 | 1 << 32);
        driver.start();
        assert_eq!(driver.request(1, &[b"to", b"gether"], &[3, 9]), b"together");
    }

    #[test]
    fn doorbells_are_what_the_notify_register_signals() {
        let home = LoopThread::new();
        let mut wire = wire(&home);
        let doorbells = wire.transport().doorbells();
        assert_eq!(doorbells.len(), 1);
        assert_eq!((doorbells[0].offset, doorbells[0].data), (0x50, Some(0)));
        wire.notify(0);
        assert!(!doorbells[0].event.take(), "the device does not run");
    }

    #[test]
    fn an_announced_change_of_the_configuration_interrupts_and_is_seen() {
        let home = LoopThread::new();
        let memory = driver::memory();
        let mut wire = MmioWire::new(Box::new(Echo::new(1, home.handle())), memory);
        let change = wire.transport().config_change();
        change.announce();
        assert!(!wire.take_interrupt(Source::Config), "no driver yet");
        let mut driver = Driver::new(Box::new(wire), memory);
        driver.start();
        let generation = driver.wire.read(Register::ConfigGeneration);
        change.announce();
        driver.wire.wait_interrupt(Source::Config);
        assert_ne!(driver.wire.read(Register::ConfigGeneration), generation);
        let mut config = [0; 10];
        driver.wire.read_config(0, &mut config);
        assert_eq!(&config, b"echo\0\0\0\x02\0\0");
    }

    #[test]
    fn the_configuration_is_written_within_its_bounds_only() {
        let home = LoopThread::new();
        let mut wire = wire(&home);
        wire.write_config(4, &[1, 2]);
        wire.write_config(7, &[3, 4]);
        wire.write_config(0xe00, &[5]);
        let mut config = [0; 8];
        wire.read_config(0, &mut config);
        assert_eq!(&config, b"echo\x01\x02\0\0");
    }

    #[test]
    fn a_device_that_cannot_start_needs_a_reset() {
        let home = LoopThread::new();
        let mut driver = Driver::mmio(Box::new(Echo::new(1, home.handle())));
        let offered = driver.offered_features();
        driver.negotiate(offered);
        driver.set_status(15);
        driver.wait_needs_reset();
        assert_eq!(driver.status(), 15 | status::NEEDS_RESET);
        driver.start();
        assert_eq!(driver.request(0, &[b"again"], &[5]), b"again");
    }
}
