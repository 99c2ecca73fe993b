//! Virtio over PCI (virtio 1.3, section 4.1): modern only, with MSI-X and without interrupt lines.
//!
//! Everything is in BAR 0, each structure in a place of its own; notifications have a page so that
//! the hypervisor signals doorbells by itself.

use std::io;
use std::sync::Arc;

use arch::memory::GuestMemory;

use super::config_change::ConfigChange;
use super::device::{DeviceKind, VirtioDevice};
use super::transport::{Area, Doorbell, Half, Interrupts, Register, Transport};
use crate::bus::Registers;
use crate::interrupt::{Interrupt, MessageRoutes};
use crate::pci::PciFunction;
use crate::pci::config::{BarKind, ConfigSpace, Identity};
use crate::pci::msix::{self, Msix};

/// Size of BAR 0 in bytes, to which its address is aligned.
pub const BAR_SIZE: u64 = 0x8000;
/// Queues of a device, at the most: each notifies at a place of its own in one page.
pub const QUEUES_MAX: usize = 1024;

const COMMON: u64 = 0x0000;
const COMMON_SIZE: u64 = 0x38;
const INTERRUPT_STATUS: u64 = 0x0100;
const DEVICE_CONFIG: u64 = 0x0200;
const NOTIFY: u64 = 0x1000;
const TABLE: u64 = 0x2000;
const PENDING: u64 = 0x6000;
/// Bytes between the places where two queues are notified.
const NOTIFY_MULTIPLIER: u64 = 4;
const NO_VECTOR: u16 = 0xffff;

const VENDOR: u16 = 0x1af4;
const DEVICE_BASE: u16 = 0x1040;
const VENDOR_CAPABILITY: u8 = 0x09;
/// Where in its capability the access window has its data, and in the body its bar, offset and
/// length.
const WINDOW_DATA: usize = 16;

const _: () = assert!(NOTIFY + QUEUES_MAX as u64 * NOTIFY_MULTIPLIER <= TABLE);
const _: () = assert!(TABLE + (msix::VECTORS_MAX * msix::ENTRY_SIZE) as u64 <= PENDING);
const _: () = assert!(PENDING + msix::VECTORS_MAX as u64 / 8 <= BAR_SIZE);

/// A field of the common configuration.
#[derive(Clone, Copy)]
enum Field {
    Common(Register),
    ConfigVector,
    QueueVector,
    QueueNotifyOffset,
}

/// Offset, size in bytes and meaning of what is in the common configuration (section 4.1.4.3).
const LAYOUT: &[(u64, u64, Field)] = &[
    (0x00, 4, Field::Common(Register::DeviceFeaturesSelect)),
    (0x04, 4, Field::Common(Register::DeviceFeatures)),
    (0x08, 4, Field::Common(Register::DriverFeaturesSelect)),
    (0x0c, 4, Field::Common(Register::DriverFeatures)),
    (0x10, 2, Field::ConfigVector),
    (0x12, 2, Field::Common(Register::QueueCount)),
    (0x14, 1, Field::Common(Register::Status)),
    (0x15, 1, Field::Common(Register::ConfigGeneration)),
    (0x16, 2, Field::Common(Register::QueueSelect)),
    (0x18, 2, Field::Common(Register::QueueSize)),
    (0x1a, 2, Field::QueueVector),
    (0x1c, 2, Field::Common(Register::QueueReady)),
    (0x1e, 2, Field::QueueNotifyOffset),
    (0x20, 4, Field::Common(Register::QueueArea(Area::Descriptors, Half::Low))),
    (0x24, 4, Field::Common(Register::QueueArea(Area::Descriptors, Half::High))),
    (0x28, 4, Field::Common(Register::QueueArea(Area::Driver, Half::Low))),
    (0x2c, 4, Field::Common(Register::QueueArea(Area::Driver, Half::High))),
    (0x30, 4, Field::Common(Register::QueueArea(Area::Device, Half::Low))),
    (0x34, 4, Field::Common(Register::QueueArea(Area::Device, Half::High))),
];

/// A device on the virtio-pci transport: its BAR is [`Registers`], its configuration space a
/// [`PciFunction`].
pub struct PciTransport {
    transport: Transport,
    vectors: Vectors,
    config: ConfigSpace,
    /// Where the capabilities are whose fields have effects.
    msix_capability: usize,
    window_capability: usize,
}

impl PciTransport {
    /// Makes the function of `device`, with BAR 0 at `bar`, below 4 GiB and aligned to
    /// [`BAR_SIZE`].
    pub fn new(
        device: Box<dyn VirtioDevice>,
        memory: GuestMemory,
        routes: Arc<dyn MessageRoutes>,
        bar: u64,
    ) -> io::Result<Self> {
        let shares_interrupt = device.shares_interrupt();
        let transport = Transport::new(device, memory)?;
        let queue_count = transport.doorbells().len();
        if queue_count > QUEUES_MAX {
            return Err(io::Error::other(format!("a PCI device with {queue_count} queues")));
        }
        // A driver that finds too few vectors for one each gives the queues one together.
        let queue_vectors = if shares_interrupt { 1 } else { queue_count };
        let vectors = Vectors {
            msix: Msix::new(1 + queue_vectors, routes)?,
            config: NO_VECTOR,
            queues: vec![NO_VECTOR; queue_count],
        };
        let mut config = ConfigSpace::new(identity(transport.offer().kind));
        config.add_bar(0, BarKind::Memory32, bar, BAR_SIZE);
        let window_capability = add_virtio_capabilities(&mut config, transport.config_len());
        let msix_capability = vectors.msix.add_capability(&mut config, 0, TABLE, PENDING);
        Ok(Self { transport, vectors, config, msix_capability, window_capability })
    }

    /// Where each queue's notifications arrive in BAR 0, for the hypervisor to signal them by
    /// itself.
    pub fn doorbells(&self) -> Vec<Doorbell> {
        let offsets = (NOTIFY..).step_by(4);
        let queues = offsets.zip(self.transport.doorbells());
        queues
            .map(|(offset, event)| Doorbell { event: event.clone(), offset, data: None })
            .collect()
    }

    /// The way to announce a change of the device's configuration at run time.
    pub fn config_change(&self) -> ConfigChange {
        self.transport.config_change()
    }

    /// Returns to the state at power-on, as when the guest restarts.
    pub fn reset(&mut self) {
        self.reset_device();
        self.config.reset();
        self.vectors.msix.reset();
    }

    /// What a driver asks for by a status of zero: the function's own registers stay as they are.
    fn reset_device(&mut self) {
        self.transport.reset();
        self.vectors.msix.set_in_use(false);
        self.vectors.msix.forget_pending();
        self.vectors.config = NO_VECTOR;
        self.vectors.queues.fill(NO_VECTOR);
    }

    fn read_bar(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        match offset {
            INTERRUPT_STATUS..DEVICE_CONFIG | NOTIFY..TABLE => {}
            COMMON..INTERRUPT_STATUS => self.read_common(offset, data),
            DEVICE_CONFIG..NOTIFY => self.transport.read_config(offset - DEVICE_CONFIG, data),
            TABLE..PENDING => self.vectors.msix.read_table(index(offset - TABLE), data),
            _ => self.vectors.msix.read_pending(index(offset - PENDING), data),
        }
    }

    fn write_bar(&mut self, offset: u64, data: &[u8]) {
        match offset {
            COMMON..INTERRUPT_STATUS => self.write_common(offset, data),
            DEVICE_CONFIG..NOTIFY => self.transport.write_config(offset - DEVICE_CONFIG, data),
            NOTIFY..TABLE => {
                let queue = (offset - NOTIFY) / NOTIFY_MULTIPLIER;
                self.transport.notify(u32::try_from(queue).unwrap_or(u32::MAX));
            }
            TABLE..PENDING => self.vectors.msix.write_table(index(offset - TABLE), data),
            _ => {}
        }
    }

    /// Reads every field that the access touches, in whole or in part.
    fn read_common(&mut self, offset: u64, data: &mut [u8]) {
        let end = offset + data.len() as u64;
        for (start, size, field) in LAYOUT {
            if *start < end && offset < start + size {
                let value = self.read_field(*field).to_le_bytes();
                let bytes = (*start..start + size).zip(value);
                for (at, byte) in bytes.filter(|(at, _)| *at >= offset) {
                    if let Some(target) = data.get_mut(index(at - offset)) {
                        *target = byte;
                    }
                }
            }
        }
    }

    /// Writes every field that the access covers in whole; there is no way to write part of one.
    fn write_common(&mut self, offset: u64, data: &[u8]) {
        for (start, size, field) in LAYOUT {
            let Some(at) = start.checked_sub(offset).map(index) else { continue };
            if let Some(bytes) = data.get(at..at + index(*size)) {
                let value = bytes.iter().rev().fold(0, |value, byte| value << 8 | u32::from(*byte));
                self.write_field(*field, value);
            }
        }
    }

    fn read_field(&mut self, field: Field) -> u32 {
        let queue = self.transport.selected_queue();
        match field {
            Field::Common(register) => self.transport.read(register),
            Field::ConfigVector => u32::from(self.vectors.config),
            Field::QueueVector => {
                u32::from(self.vectors.queues.get(queue).copied().unwrap_or(NO_VECTOR))
            }
            Field::QueueNotifyOffset if queue < self.vectors.queues.len() => {
                u32::try_from(queue).unwrap_or(0)
            }
            Field::QueueNotifyOffset => 0,
        }
    }

    fn write_field(&mut self, field: Field, value: u32) {
        match field {
            Field::Common(Register::Status) => self.write_status(value),
            Field::Common(register) => self.transport.write(register, value, &self.vectors),
            Field::ConfigVector if !self.transport.is_active() => {
                self.vectors.config = self.vectors.existing(value);
            }
            Field::QueueVector => {
                let vector = self.vectors.existing(value);
                let queue = self.transport.configurable_queue();
                let queue = queue.and_then(|queue| self.vectors.queues.get_mut(queue));
                if let Some(queue) = queue {
                    *queue = vector;
                }
            }
            Field::ConfigVector | Field::QueueNotifyOffset => {}
        }
    }

    fn write_status(&mut self, value: u32) {
        if value == 0 {
            return self.reset_device();
        }
        let was_active = self.transport.is_active();
        self.transport.write(Register::Status, value, &self.vectors);
        if self.transport.is_active() && !was_active {
            // Whatever was triggered since is pending and delivered now.
            self.vectors.msix.set_in_use(true);
        }
    }

    /// The access that the window's registers describe, if it is one that a driver may make.
    fn window(&self) -> Option<(u64, usize)> {
        let start = self.window_capability;
        let (bar, offset) = (self.config.byte(start + 4), self.config.word(start + 8));
        let len = usize::try_from(self.config.word(start + 12)).ok()?;
        let offset = u64::from(offset);
        let is_valid = bar == 0
            && matches!(len, 1 | 2 | 4)
            && offset.is_multiple_of(len as u64)
            && offset < BAR_SIZE;
        is_valid.then_some((offset, len))
    }
}

impl Registers for PciTransport {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if self.config.is_memory_enabled() {
            self.read_bar(offset, data);
        } else {
            data.fill(0xff);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if self.config.is_memory_enabled() {
            self.write_bar(offset, data);
        }
    }
}

impl PciFunction for PciTransport {
    fn read_config(&mut self, offset: usize, data: &mut [u8]) {
        let window = self.window().filter(|_| offset == self.window_capability + WINDOW_DATA);
        self.config.read(offset, data);
        if let Some((target, len)) = window
            && let Some(part) = data.get_mut(..len)
        {
            self.read_bar(target, part);
        }
    }

    fn write_config(&mut self, offset: usize, data: &[u8]) {
        self.config.write(offset, data);
        let control = self.msix_capability + 3;
        if (offset..offset + data.len()).contains(&control) {
            self.vectors.msix.set_control(self.config.byte(control));
        }
        if offset == self.window_capability + WINDOW_DATA
            && let Some((target, len)) = self.window()
            && let Some(part) = data.get(..len)
        {
            self.write_bar(target, part);
        }
    }
}

/// The function's vectors and what the driver uses them for.
struct Vectors {
    msix: Msix,
    config: u16,
    queues: Vec<u16>,
}

impl Vectors {
    /// A vector that exists; any other is none, as the driver sees when it reads it back.
    fn existing(&self, value: u32) -> u16 {
        let vector = u16::try_from(value).unwrap_or(NO_VECTOR);
        if usize::from(vector) < self.msix.len() { vector } else { NO_VECTOR }
    }

    fn interrupt(&self, vector: u16) -> Interrupt {
        let event = self.msix.event(usize::from(vector));
        event.map_or(Interrupt::None, |event| Interrupt::Message(event.clone()))
    }
}

impl Interrupts for Vectors {
    fn queue(&self, index: usize) -> Interrupt {
        self.interrupt(self.queues.get(index).copied().unwrap_or(NO_VECTOR))
    }

    fn config(&self) -> Interrupt {
        self.interrupt(self.config)
    }
}

fn identity(kind: DeviceKind) -> Identity {
    let class = match kind {
        DeviceKind::Net => 0x02_0000,
        DeviceKind::Block | DeviceKind::FileSystem => 0x01_8000,
        DeviceKind::Console | DeviceKind::Vsock => 0x07_8000,
        DeviceKind::Mem | DeviceKind::Pmem => 0x05_8000,
        DeviceKind::Entropy | DeviceKind::Balloon => 0x00_ff00,
    };
    let device = DEVICE_BASE + kind as u16;
    let (subsystem_vendor, subsystem) = (VENDOR, device);
    Identity { vendor: VENDOR, device, revision: 1, class, subsystem_vendor, subsystem }
}

/// Says where each structure is (section 4.1.4). Returns where the access window's capability is.
fn add_virtio_capabilities(config: &mut ConfigSpace, device_config_len: usize) -> usize {
    add_capability(config, 1, COMMON, COMMON_SIZE, &[]);
    add_capability(config, 2, NOTIFY, TABLE - NOTIFY, &word(NOTIFY_MULTIPLIER));
    add_capability(config, 3, INTERRUPT_STATUS, 1, &[]);
    if device_config_len > 0 {
        add_capability(config, 4, DEVICE_CONFIG, device_config_len as u64, &[]);
    }
    add_capability(config, 5, 0, 0, &[0; 4])
}

fn add_capability(config: &mut ConfigSpace, kind: u8, at: u64, len: u64, more: &[u8]) -> usize {
    /// A structure's length, kind and BAR, then its offset and its length.
    const BODY: usize = 14;
    let capability_len = u8::try_from(2 + BODY + more.len()).unwrap_or(0);
    let mut body = vec![capability_len, kind, 0, 0, 0, 0];
    body.extend(word(at));
    body.extend(word(len));
    body.extend(more);
    // Only the access window is writable: its BAR, offset and length.
    let window: [u8; BODY] = [0, 0, 0xff, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff];
    let writable: &[u8] = if kind == 5 { &window } else { &[] };
    config.add_capability(VENDOR_CAPABILITY, &body, writable)
}

fn word(value: u64) -> [u8; 4] {
    u32::try_from(value).unwrap_or(0).to_le_bytes()
}

fn index(offset: u64) -> usize {
    usize::try_from(offset).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod test;
