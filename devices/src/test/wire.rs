//! Registers as a driver finds them, whatever the transport.

use std::time::Duration;

use arch::memory::GuestMemory;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::bus::Registers;
use crate::event::Event;
use crate::virtio::device::VirtioDevice;
use crate::virtio::mmio::MmioTransport;
use crate::virtio::transport::{Area, Half, Register};

/// A test that waits longer than this has failed; nothing is measured by it.
const PATIENCE: Duration = Duration::from_secs(60);

/// What interrupts a driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    Queue(u16),
    Config,
}

/// A transport from the driver's side.
pub(crate) trait Wire: Send {
    /// Sets up what is below virtio, as a guest does once when it finds the device.
    fn probe(&mut self) {}
    fn device_kind(&mut self) -> u32;
    fn read(&mut self, register: Register) -> u32;
    fn write(&mut self, register: Register, value: u32);
    fn notify(&mut self, queue: u16);
    fn read_config(&mut self, offset: u64, data: &mut [u8]);
    fn write_config(&mut self, offset: u64, data: &[u8]);
    /// Takes the source's interrupt, if there is one.
    fn take_interrupt(&mut self, source: Source) -> bool;
    /// Waits for the source's interrupt and takes it.
    fn wait_interrupt(&mut self, source: Source);
    /// Reads and writes of the whole register space, for those who do not keep to the layout.
    fn registers(&mut self) -> &mut dyn Registers;
    /// Bytes of the register space.
    fn registers_len(&self) -> u64;
}

pub(crate) struct MmioWire {
    transport: MmioTransport,
    line: Event,
    /// Reasons that were acknowledged and not yet waited for.
    reasons: u32,
}

impl MmioWire {
    pub(crate) fn new(device: Box<dyn VirtioDevice>, memory: GuestMemory) -> Self {
        let line = Event::new().unwrap();
        let transport = MmioTransport::new(device, memory, line.clone()).unwrap();
        Self { transport, line, reasons: 0 }
    }

    pub(crate) fn transport(&mut self) -> &mut MmioTransport {
        &mut self.transport
    }

    pub(crate) fn word(&mut self, offset: u64) -> u32 {
        let mut word = [0xaa; 4];
        self.transport.read(offset, &mut word);
        u32::from_le_bytes(word)
    }

    pub(crate) fn set_word(&mut self, offset: u64, value: u32) {
        self.transport.write(offset, &value.to_le_bytes());
    }

    fn acknowledge(&mut self) {
        let status = self.word(0x60);
        self.set_word(0x64, status);
        self.reasons |= status;
    }
}

impl Wire for MmioWire {
    fn device_kind(&mut self) -> u32 {
        self.word(0x08)
    }

    fn read(&mut self, register: Register) -> u32 {
        self.word(mmio_offset(register))
    }

    fn write(&mut self, register: Register, value: u32) {
        self.set_word(mmio_offset(register), value);
    }

    fn notify(&mut self, queue: u16) {
        self.set_word(0x50, u32::from(queue));
    }

    fn read_config(&mut self, offset: u64, data: &mut [u8]) {
        self.transport.read(0x100 + offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        self.transport.write(0x100 + offset, data);
    }

    fn take_interrupt(&mut self, source: Source) -> bool {
        self.line.take();
        self.acknowledge();
        let reason = if source == Source::Config { 2 } else { 1 };
        let is_due = self.reasons & reason != 0;
        self.reasons &= !reason;
        is_due
    }

    fn wait_interrupt(&mut self, source: Source) {
        while !self.take_interrupt(source) {
            wait(&self.line);
        }
    }

    fn registers(&mut self) -> &mut dyn Registers {
        &mut self.transport
    }

    fn registers_len(&self) -> u64 {
        crate::virtio::mmio::REGISTERS_SIZE
    }
}

/// Waits until an event is signalled, and does not take the signal.
pub(crate) fn wait(event: &Event) {
    let patience = Timespec::try_from(PATIENCE).unwrap();
    let mut files = [PollFd::new(event, PollFlags::IN)];
    assert_eq!(poll(&mut files, Some(&patience)), Ok(1), "no interrupt");
}

/// The offsets of section 4.2.2, written down a second time: a driver has its own table.
fn mmio_offset(register: Register) -> u64 {
    match register {
        Register::DeviceFeatures => 0x10,
        Register::DeviceFeaturesSelect => 0x14,
        Register::DriverFeatures => 0x20,
        Register::DriverFeaturesSelect => 0x24,
        Register::QueueSelect => 0x30,
        Register::QueueSizeMax => 0x34,
        Register::QueueSize => 0x38,
        Register::QueueReady => 0x44,
        Register::Status => 0x70,
        Register::ConfigGeneration => 0xfc,
        Register::QueueCount => panic!("virtio-mmio does not count queues"),
        Register::QueueArea(area, half) => {
            let area = match area {
                Area::Descriptors => 0x80,
                Area::Driver => 0x90,
                Area::Device => 0xa0,
            };
            area + if half == Half::High { 4 } else { 0 }
        }
    }
}
