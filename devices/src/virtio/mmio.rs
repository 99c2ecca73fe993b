//! Virtio over memory-mapped registers (virtio 1.3, section 4.2), version 2 only.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use arch::memory::GuestMemory;

use super::device::VirtioDevice;
use super::transport::{Area, ConfigChange, Doorbell, Half, Interrupts, Register, Transport};
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
