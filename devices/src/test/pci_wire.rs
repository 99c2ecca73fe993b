//! A virtio-pci device as a driver finds it: through configuration space, capabilities and vectors.

use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use arch::memory::GuestMemory;

use super::wire::{Source, Wire, wait};
use crate::bus::Registers;
use crate::event::Event;
use crate::interrupt::{Message, MessageRoutes};
use crate::pci::{PciHost, SharedFunction};
use crate::virtio::device::VirtioDevice;
use crate::virtio::pci::{BAR_SIZE, PciTransport};
use crate::virtio::transport::{Area, Half, Register, status};

pub(crate) const BAR: u64 = 0xc000_8000;
/// The function's place in the ECAM window: slot 1, function 0.
pub(crate) const FUNCTION: u64 = 1 << 15;

/// Message routes that are only noted.
#[derive(Default)]
pub(crate) struct Routes {
    attached: Mutex<Vec<(Event, Message)>>,
    pub(crate) updates: AtomicUsize,
}

impl MessageRoutes for Routes {
    fn set(&self, changes: &[(Event, Option<Message>)]) -> io::Result<()> {
        self.updates.fetch_add(1, Ordering::SeqCst);
        let mut attached = self.attached.lock().unwrap();
        for (event, message) in changes {
            attached.retain(|(other, _)| !other.is_same(event));
            attached.extend(message.map(|message| (event.clone(), message)));
        }
        Ok(())
    }
}

impl Routes {
    /// The event that sends a message with `data`.
    pub(crate) fn event(&self, data: u32) -> Option<Event> {
        let attached = self.attached.lock().unwrap();
        let found = attached.iter().find(|(_, message)| message.data == data);
        found.map(|(event, _)| event.clone())
    }

    pub(crate) fn len(&self) -> usize {
        self.attached.lock().unwrap().len()
    }
}

pub(crate) struct PciWire {
    pub(crate) transport: Arc<Mutex<PciTransport>>,
    pub(crate) host: PciHost,
    pub(crate) routes: Arc<Routes>,
    pub(crate) layout: Layout,
    queue_select: u32,
}

/// Offsets in BAR 0 and in configuration space, as the capabilities say.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Layout {
    pub(crate) common: u64,
    pub(crate) notify: u64,
    pub(crate) notify_multiplier: u64,
    pub(crate) device_config: u64,
    pub(crate) window: u64,
    pub(crate) msix: u64,
    pub(crate) table: u64,
    pub(crate) pending: u64,
    pub(crate) vectors: u32,
}

impl PciWire {
    pub(crate) fn new(device: Box<dyn VirtioDevice>, memory: GuestMemory) -> Self {
        let routes = Arc::new(Routes::default());
        let wired = Arc::clone(&routes) as Arc<dyn MessageRoutes>;
        let transport = PciTransport::new(device, memory, wired, BAR).unwrap();
        let transport = Arc::new(Mutex::new(transport));
        let function = Arc::clone(&transport) as SharedFunction;
        let host = PciHost::new(vec![function]).unwrap();
        let mut wire = Self { transport, host, routes, layout: Layout::default(), queue_select: 0 };
        wire.layout = wire.find_layout();
        wire
    }

    pub(crate) fn config(&mut self, offset: u64, len: usize) -> u32 {
        let mut data = [0; 4];
        self.host.read(FUNCTION + offset, &mut data[..len]);
        u32::from_le_bytes(data)
    }

    pub(crate) fn set_config(&mut self, offset: u64, value: u32, len: usize) {
        self.host.write(FUNCTION + offset, &value.to_le_bytes()[..len]);
    }

    pub(crate) fn bar(&mut self, offset: u64, len: usize) -> u32 {
        let mut data = [0; 4];
        self.transport.lock().unwrap().read(offset, &mut data[..len]);
        u32::from_le_bytes(data)
    }

    pub(crate) fn set_bar(&mut self, offset: u64, value: u32, len: usize) {
        self.transport.lock().unwrap().write(offset, &value.to_le_bytes()[..len]);
    }

    pub(crate) fn set_vector(&mut self, vector: u32, masked: bool) {
        let entry = self.layout.table + 16 * u64::from(vector);
        for (offset, value) in [(0, 0xfee0_0000), (4, 0), (8, vector), (12, u32::from(masked))] {
            self.set_bar(entry + offset, value, 4);
        }
    }

    /// Walks the capability list.
    fn find_layout(&mut self) -> Layout {
        let mut layout = Layout::default();
        assert_ne!(self.config(6, 2) & 16, 0, "there is a capability list");
        let mut at = u64::from(self.config(0x34, 1));
        while at != 0 {
            let [id, kind] = [self.config(at, 1), self.config(at + 3, 1)];
            let offset = u64::from(self.config(at + 8, 4));
            match (id, kind) {
                (9, 1) => layout.common = offset,
                (9, 2) => {
                    layout.notify = offset;
                    layout.notify_multiplier = u64::from(self.config(at + 16, 4));
                }
                (9, 4) => layout.device_config = offset,
                (9, 5) => layout.window = at,
                (0x11, _) => {
                    layout.msix = at;
                    layout.vectors = (self.config(at + 2, 2) & 0x7ff) + 1;
                    layout.table = u64::from(self.config(at + 4, 4) & !7);
                    layout.pending = u64::from(self.config(at + 8, 4) & !7);
                }
                _ => {}
            }
            at = u64::from(self.config(at + 1, 1));
        }
        layout
    }

    fn interrupt(&self, source: Source) -> Option<Event> {
        match source {
            Source::Config => self.routes.event(0),
            Source::Queue(queue) => self.routes.event(self.queue_vector(queue.into())),
        }
    }

    /// Queues beyond the last vector share it.
    fn queue_vector(&self, queue: u32) -> u32 {
        (queue + 1).min(self.layout.vectors - 1)
    }
}

impl Wire for PciWire {
    fn probe(&mut self) {
        self.set_config(4, 6, 2);
        let control = self.layout.msix + 2;
        self.set_config(control, 0xc000, 2);
        for vector in 0..self.layout.vectors {
            self.set_vector(vector, false);
        }
        self.set_config(control, 0x8000, 2);
    }

    fn device_kind(&mut self) -> u32 {
        self.config(2, 2) - 0x1040
    }

    fn read(&mut self, register: Register) -> u32 {
        let (offset, len) = pci_offset(register);
        self.bar(self.layout.common + offset, len)
    }

    /// Gives every source a vector on the way: its own, as long as there are some.
    fn write(&mut self, register: Register, value: u32) {
        let common = self.layout.common;
        match register {
            Register::QueueSelect => self.queue_select = value,
            Register::QueueReady if value == 1 => {
                self.set_bar(common + 0x1a, self.queue_vector(self.queue_select), 2);
            }
            Register::Status if value & u32::from(status::FEATURES_OK) != 0 => {
                self.set_bar(common + 0x10, 0, 2);
            }
            _ => {}
        }
        let (offset, len) = pci_offset(register);
        self.set_bar(common + offset, value, len);
    }

    fn notify(&mut self, queue: u16) {
        let offset = u64::from(queue) * self.layout.notify_multiplier;
        self.set_bar(self.layout.notify + offset, u32::from(queue), 2);
    }

    fn read_config(&mut self, offset: u64, data: &mut [u8]) {
        self.transport.lock().unwrap().read(self.layout.device_config + offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        self.transport.lock().unwrap().write(self.layout.device_config + offset, data);
    }

    fn take_interrupt(&mut self, source: Source) -> bool {
        self.interrupt(source).is_some_and(|event| event.take())
    }

    fn wait_interrupt(&mut self, source: Source) {
        while !self.take_interrupt(source) {
            wait(&self.interrupt(source).expect("the vector is attached"));
        }
    }

    fn registers(&mut self) -> &mut dyn Registers {
        self
    }

    fn registers_len(&self) -> u64 {
        BAR_SIZE + 0x1000
    }
}

/// BAR 0, and behind it the function's configuration space.
impl Registers for PciWire {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        match offset.checked_sub(BAR_SIZE) {
            Some(offset) => self.host.read(FUNCTION + offset, data),
            None => self.transport.lock().unwrap().read(offset, data),
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        match offset.checked_sub(BAR_SIZE) {
            Some(offset) => self.host.write(FUNCTION + offset, data),
            None => self.transport.lock().unwrap().write(offset, data),
        }
    }
}

/// The offsets of section 4.1.4.3, written down a second time: a driver has its own table.
fn pci_offset(register: Register) -> (u64, usize) {
    match register {
        Register::DeviceFeaturesSelect => (0x00, 4),
        Register::DeviceFeatures => (0x04, 4),
        Register::DriverFeaturesSelect => (0x08, 4),
        Register::DriverFeatures => (0x0c, 4),
        Register::QueueCount => (0x12, 2),
        Register::Status => (0x14, 1),
        Register::ConfigGeneration => (0x15, 1),
        Register::QueueSelect => (0x16, 2),
        Register::QueueSize | Register::QueueSizeMax => (0x18, 2),
        Register::QueueReady => (0x1c, 2),
        Register::QueueArea(area, half) => {
            let area = match area {
                Area::Descriptors => 0x20,
                Area::Driver => 0x28,
                Area::Device => 0x30,
            };
            (area + if half == Half::High { 4 } else { 0 }, 4)
        }
    }
}
