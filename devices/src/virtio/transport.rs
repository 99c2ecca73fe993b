//! The handshake between a driver and a device, the same on every transport (virtio 1.3, 3.1).
//!
//! A transport proper is a table that says at which offset which [`Register`] is; what a register
//! means is said here, once. What the driver configures freezes step by step: features at
//! `FEATURES_OK`, a queue when it is enabled, everything at `DRIVER_OK`.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use arch::memory::GuestMemory;

use super::config_change::ConfigChange;
use super::device::{Activation, NeedsReset, Offer, VirtioDevice};
use super::feature::FEATURE_VERSION_1;
use super::queue::{QueueConfig, QueueSetup};
use crate::event::Event;
use crate::interrupt::Interrupt;

/// Device status bits (virtio 1.3, section 2.1).
pub mod status {
    /// The guest has noticed the device.
    pub const ACKNOWLEDGE: u8 = 1;
    /// The guest knows how to drive the device.
    pub const DRIVER: u8 = 2;
    /// The driver is ready.
    pub const DRIVER_OK: u8 = 4;
    /// Driver and device agreed on the features.
    pub const FEATURES_OK: u8 = 8;
    /// The device cannot go on without a reset.
    pub const NEEDS_RESET: u8 = 64;
    /// The driver has given up.
    pub const FAILED: u8 = 128;
}

/// What every transport has, whatever its offset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Register {
    /// 32 bits of the offered features (read).
    DeviceFeatures,
    /// Which 32 bits [`Register::DeviceFeatures`] shows.
    DeviceFeaturesSelect,
    /// 32 bits of the accepted features.
    DriverFeatures,
    /// Which 32 bits [`Register::DriverFeatures`] takes.
    DriverFeaturesSelect,
    /// Number of queues (read).
    QueueCount,
    /// Which queue the queue registers are about.
    QueueSelect,
    /// Largest size of the selected queue in descriptors, zero where there is none (read).
    QueueSizeMax,
    /// Size of the selected queue in descriptors.
    QueueSize,
    /// One when the selected queue is enabled.
    QueueReady,
    /// Half of the guest-physical address of a part of the selected queue.
    QueueArea(Area, Half),
    /// The device status, see [`status`]; a write of zero resets the device.
    Status,
    /// Changes whenever the configuration space did (read).
    ConfigGeneration,
}

/// One of the three parts of a queue (virtio 1.3, section 2.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Area {
    /// The descriptor table.
    Descriptors,
    /// What the driver writes: the available ring.
    Driver,
    /// What the device writes: the used ring.
    Device,
}

/// The half of a 64-bit value that a 32-bit register holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Half {
    /// Bits 0 to 31.
    Low,
    /// Bits 32 to 63.
    High,
}

/// How a transport interrupts the guest, as the driver has set it up.
pub trait Interrupts {
    /// The interrupt for used buffers of the queue at `index`.
    fn queue(&self, index: usize) -> Interrupt;
    /// The interrupt for changes of the configuration and for [`NeedsReset`].
    fn config(&self) -> Interrupt;
}

/// Where a driver's notification of one queue is written, and what it signals.
#[derive(Clone, Debug)]
pub struct Doorbell {
    /// Signalled by the notification; the queue's worker waits for it.
    pub event: Event,
    /// Offset of the write in the transport's registers in bytes.
    pub offset: u64,
    /// The 32-bit value that names the queue, where its address does not.
    pub data: Option<u32>,
}

/// One device and the state of its handshake.
pub struct Transport {
    device: Box<dyn VirtioDevice>,
    offer: Offer,
    memory: GuestMemory,
    doorbells: Vec<Event>,
    config_change: ConfigChange,
    config_generation: u8,
    needs_reset: Arc<AtomicBool>,
    status: u8,
    device_features_select: u32,
    driver_features_select: u32,
    driver_features: u64,
    queue_select: usize,
    queues: Vec<QueueConfig>,
    failure_reported: bool,
}

impl Transport {
    /// Makes the transport of a device that no driver has touched.
    pub fn new(mut device: Box<dyn VirtioDevice>, memory: GuestMemory) -> io::Result<Self> {
        let offer = device.offer();
        let doorbells = offer.queue_sizes.iter().map(|_| Event::new()).collect::<Result<_, _>>()?;
        let config_change = ConfigChange::unconnected();
        device.connect(config_change.clone());
        Ok(Self {
            queues: fresh_queues(&offer),
            device,
            offer,
            memory,
            doorbells,
            config_change,
            config_generation: 0,
            needs_reset: Arc::default(),
            status: 0,
            device_features_select: 0,
            driver_features_select: 0,
            driver_features: 0,
            queue_select: 0,
            failure_reported: false,
        })
    }

    /// The facts about the device.
    pub fn offer(&self) -> &Offer {
        &self.offer
    }

    /// The event of each queue's notifications.
    pub fn doorbells(&self) -> &[Event] {
        &self.doorbells
    }

    /// The way to announce a change of the configuration at run time.
    pub fn config_change(&self) -> ConfigChange {
        self.config_change.clone()
    }

    /// Reads a register.
    pub fn read(&mut self, register: Register) -> u32 {
        let queue = self.queues.get(self.queue_select);
        match register {
            Register::DeviceFeatures => half(self.offered_features(), self.device_features_select),
            Register::DeviceFeaturesSelect => self.device_features_select,
            Register::DriverFeatures => half(self.driver_features, self.driver_features_select),
            Register::DriverFeaturesSelect => self.driver_features_select,
            Register::QueueCount => u32::try_from(self.queues.len()).unwrap_or(u32::MAX),
            Register::QueueSelect => u32::try_from(self.queue_select).unwrap_or(u32::MAX),
            Register::QueueSizeMax => u32::from(self.queue_size_max()),
            Register::QueueSize => queue.map_or(0, |queue| u32::from(queue.size)),
            Register::QueueReady => queue.map_or(0, |queue| u32::from(queue.ready)),
            Register::QueueArea(area, part) => {
                queue.map_or(0, |queue| half(*address(&mut queue.clone(), area), part.index()))
            }
            Register::Status => u32::from(self.status()),
            Register::ConfigGeneration => {
                self.refresh();
                u32::from(self.config_generation)
            }
        }
    }

    /// Writes a register; what the rules do not allow is ignored.
    ///
    /// `interrupts` is asked when the write makes the device active.
    pub fn write(&mut self, register: Register, value: u32, interrupts: &dyn Interrupts) {
        match register {
            Register::DeviceFeaturesSelect => self.device_features_select = value,
            Register::DriverFeaturesSelect => self.driver_features_select = value,
            Register::DriverFeatures => self.write_driver_features(value),
            Register::QueueSelect => {
                self.queue_select = usize::try_from(value).unwrap_or(usize::MAX);
            }
            Register::QueueSize | Register::QueueReady | Register::QueueArea(..) => {
                self.write_queue(register, value);
            }
            Register::Status => self.write_status(value, interrupts),
            Register::DeviceFeatures
            | Register::QueueCount
            | Register::QueueSizeMax
            | Register::ConfigGeneration => {}
        }
    }

    /// Reads the configuration space; what is behind its end reads as zeros.
    pub fn read_config(&mut self, offset: u64, data: &mut [u8]) {
        self.refresh();
        data.fill(0);
        let rest = usize::try_from(offset).ok().and_then(|start| self.device.config().get(start..));
        for (byte, source) in data.iter_mut().zip(rest.unwrap_or_default()) {
            *byte = *source;
        }
    }

    /// Bytes of the configuration space.
    pub fn config_len(&self) -> usize {
        self.device.config().len()
    }

    /// Writes the configuration space; a write that is not wholly within it is ignored.
    pub fn write_config(&mut self, offset: u64, data: &[u8]) {
        let Ok(start) = usize::try_from(offset) else { return };
        let end = start.saturating_add(data.len());
        if self.device.config().get(start..end).is_some() {
            self.device.write_config(start, data);
        }
    }

    /// Notifies the queue at `index`, where KVM does not do that by itself.
    pub fn notify(&self, index: u32) {
        let doorbell = usize::try_from(index).ok().and_then(|index| self.doorbells.get(index));
        if let Some(doorbell) = doorbell.filter(|_| self.is_active()) {
            doorbell.signal();
        }
    }

    /// The device runs: the driver has set `DRIVER_OK`.
    pub fn is_active(&self) -> bool {
        self.status & status::DRIVER_OK != 0
    }

    /// The queue that the driver has selected, as long as it may configure it.
    pub fn configurable_queue(&self) -> Option<usize> {
        let queue = self.queues.get(self.queue_select)?;
        (self.accepts_configuration() && !queue.ready).then_some(self.queue_select)
    }

    /// Index of the selected queue, which need not exist.
    pub fn selected_queue(&self) -> usize {
        self.queue_select
    }

    /// Stops the device and forgets everything that the driver has set up.
    pub fn reset(&mut self) {
        if self.is_active() {
            self.device.reset();
        }
        self.config_change.set_interrupt(Interrupt::None);
        // Doorbells stay signalled: a vhost-user process that was woken by one and finds nothing to
        // take ends its thread (vhost-user-backend), and who comes next looks in vain once.
        // A worker that is on its way out keeps the old flag.
        self.needs_reset = Arc::default();
        self.status = 0;
        self.device_features_select = 0;
        self.driver_features_select = 0;
        self.driver_features = 0;
        self.queue_select = 0;
        self.queues = fresh_queues(&self.offer);
    }

    fn offered_features(&self) -> u64 {
        self.offer.features | self.device.transport_features() | FEATURE_VERSION_1
    }

    fn queue_size_max(&self) -> u16 {
        self.offer.queue_sizes.get(self.queue_select).copied().unwrap_or(0)
    }

    fn status(&self) -> u8 {
        let needs_reset = self.needs_reset.load(Ordering::Acquire);
        self.status | if needs_reset { status::NEEDS_RESET } else { 0 }
    }

    /// Between `FEATURES_OK` and `DRIVER_OK` a driver sets up its queues.
    fn accepts_configuration(&self) -> bool {
        let steps = status::FEATURES_OK | status::DRIVER_OK | status::FAILED;
        self.status & steps == status::FEATURES_OK
    }

    fn write_driver_features(&mut self, value: u32) {
        if self.status & status::DRIVER == 0 || self.status & status::FEATURES_OK != 0 {
            return;
        }
        if self.driver_features_select < 2 {
            set_half(&mut self.driver_features, self.driver_features_select, value);
        }
    }

    fn write_queue(&mut self, register: Register, value: u32) {
        let size_max = self.queue_size_max();
        let accepts_configuration = self.accepts_configuration();
        let Some(queue) = self.queues.get_mut(self.queue_select) else { return };
        if !accepts_configuration || (queue.ready && register != Register::QueueReady) {
            return;
        }
        match register {
            Register::QueueSize => match u16::try_from(value) {
                Ok(size) if size.is_power_of_two() && size <= size_max => queue.size = size,
                _ => {}
            },
            Register::QueueReady => queue.ready = value == 1,
            Register::QueueArea(area, part) => {
                set_half(address(queue, area), part.index(), value);
            }
            _ => {}
        }
    }

    /// Takes the steps of the handshake that `value` asks for, in their order (section 3.1.1).
    fn write_status(&mut self, value: u32, interrupts: &dyn Interrupts) {
        if value == 0 {
            return self.reset();
        }
        let Ok(wanted) = u8::try_from(value) else { return };
        self.status |= wanted & status::FAILED;
        let mut taken = 0;
        for step in [status::ACKNOWLEDGE, status::DRIVER, status::FEATURES_OK, status::DRIVER_OK] {
            let is_blocked = self.status() & (status::FAILED | status::NEEDS_RESET) != 0;
            if self.status & step == 0 && wanted & step != 0 && !is_blocked {
                self.take_step(step, interrupts);
            }
            taken |= step;
            if self.status & taken != taken {
                return;
            }
        }
    }

    fn take_step(&mut self, step: u8, interrupts: &dyn Interrupts) {
        match step {
            status::FEATURES_OK => {
                let is_modern = self.driver_features & FEATURE_VERSION_1 != 0;
                if is_modern && self.driver_features & !self.offered_features() == 0 {
                    self.status |= status::FEATURES_OK;
                }
            }
            status::DRIVER_OK => {
                self.status |= status::DRIVER_OK;
                self.activate(interrupts);
            }
            _ => self.status |= step,
        }
    }

    fn activate(&mut self, interrupts: &dyn Interrupts) {
        self.config_change.set_interrupt(interrupts.config());
        let needs_reset = NeedsReset::new(Arc::clone(&self.needs_reset), interrupts.config());
        let wires = self.queues.iter().zip(&self.doorbells).enumerate();
        let queues = wires.map(|(index, (config, doorbell))| {
            config.ready.then(|| QueueSetup {
                config: *config,
                doorbell: doorbell.clone(),
                interrupt: interrupts.queue(index),
            })
        });
        let activation = Activation {
            features: self.driver_features,
            memory: self.memory,
            queues: queues.collect(),
            needs_reset: needs_reset.clone(),
        };
        if let Err(error) = self.device.activate(activation) {
            self.report(&error);
            needs_reset.request();
        }
    }

    /// Warns once in the life of a device: a guest can fail as often as it likes.
    fn report(&mut self, error: &io::Error) {
        let level = if self.failure_reported { log::Level::Debug } else { log::Level::Warn };
        self.failure_reported = true;
        let kind = self.offer.kind;
        log::log!(level, "{kind:?}: cannot start: {error}; the device needs a reset by its driver");
    }

    fn refresh(&mut self) {
        if self.config_change.take() {
            self.device.refresh();
            self.config_generation = self.config_generation.wrapping_add(1);
        }
    }
}

impl Half {
    const fn index(self) -> u32 {
        match self {
            Self::Low => 0,
            Self::High => 1,
        }
    }
}

/// Queues as they are after a reset: of the largest size and not enabled.
fn fresh_queues(offer: &Offer) -> Vec<QueueConfig> {
    let sizes = offer.queue_sizes.iter();
    sizes.map(|size| QueueConfig { size: *size, ..QueueConfig::default() }).collect()
}

fn address(queue: &mut QueueConfig, area: Area) -> &mut u64 {
    match area {
        Area::Descriptors => &mut queue.descriptor_table,
        Area::Driver => &mut queue.available_ring,
        Area::Device => &mut queue.used_ring,
    }
}

/// The 32 bits of `value` at `index`; zero where there are none.
fn half(value: u64, index: u32) -> u32 {
    let [a, b, c, d, e, f, g, h] = value.to_le_bytes();
    match index {
        0 => u32::from_le_bytes([a, b, c, d]),
        1 => u32::from_le_bytes([e, f, g, h]),
        _ => 0,
    }
}

fn set_half(value: &mut u64, index: u32, bits: u32) {
    let (low, high) = (u64::from(half(*value, 0)), u64::from(half(*value, 1)));
    *value = match index {
        0 => high << 32 | u64::from(bits),
        _ => u64::from(bits) << 32 | low,
    };
}
