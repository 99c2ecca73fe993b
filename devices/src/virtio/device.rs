//! What a virtio device is to its transport.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use arch::memory::GuestMemory;

use super::config_change::ConfigChange;
use super::counters::Counters;
use super::feature::TRANSPORT_FEATURES;
use super::queue::{Queue, QueueError, QueueSetup};
use crate::interrupt::Interrupt;

/// Device ids (virtio 1.3, section 5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum DeviceKind {
    /// Network card.
    Net = 1,
    /// Block device.
    Block = 2,
    /// Console.
    Console = 3,
    /// Entropy source.
    Entropy = 4,
    /// Memory balloon.
    Balloon = 5,
    /// Socket device.
    Vsock = 19,
    /// Memory device.
    Mem = 24,
    /// File system.
    FileSystem = 26,
    /// Persistent memory.
    Pmem = 27,
}

impl DeviceKind {
    /// Its name for people and scripts.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Net => "net",
            Self::Block => "disk",
            Self::Console => "console",
            Self::Entropy => "rng",
            Self::Balloon => "balloon",
            Self::Vsock => "vsock",
            Self::Mem => "memory",
            Self::FileSystem => "fs",
            Self::Pmem => "pmem",
        }
    }
}

/// The facts about a device, the same for its whole life.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Offer {
    /// What the device is.
    pub kind: DeviceKind,
    /// The feature bits of its kind; the transport adds its own.
    pub features: u64,
    /// Largest size of each queue in descriptors, powers of two.
    pub queue_sizes: Vec<u16>,
}

/// The front of a device: registers on vCPU threads.
pub trait VirtioDevice: Send {
    /// The facts about the device.
    fn offer(&self) -> Offer;

    /// Which of [`TRANSPORT_FEATURES`] are offered: all, unless a back that is not ours lacks some.
    fn transport_features(&self) -> u64 {
        TRANSPORT_FEATURES
    }

    /// Whether the queues had better share an interrupt, where each could have its own: what
    /// happens on them comes together, so that a guest is interrupted once instead of twice.
    fn shares_interrupt(&self) -> bool {
        false
    }

    /// The device's configuration space; its bounds are the transport's business.
    fn config(&self) -> &[u8] {
        &[]
    }

    /// Takes a driver's write to the configuration space, within its bounds.
    fn write_config(&mut self, _offset: usize, _data: &[u8]) {}

    /// Takes the way to announce changes of the configuration space at run time, when the device
    /// is put on its transport.
    fn connect(&mut self, _change: ConfigChange) {}

    /// Takes over into the configuration space what has changed on the host.
    ///
    /// Called before the next read of the configuration after [`ConfigChange::announce`].
    fn refresh(&mut self) {}

    /// What the device counts, if it does.
    fn counters(&self) -> Option<Counters> {
        None
    }

    /// Starts the worker: the driver has set `DRIVER_OK`.
    ///
    /// An error makes the transport report `DEVICE_NEEDS_RESET`.
    fn activate(&mut self, activation: Activation) -> io::Result<()>;

    /// Stops the worker; when this returns nothing of the device touches guest memory.
    fn reset(&mut self);
}

/// Everything a worker needs, moved in at `DRIVER_OK`.
pub struct Activation {
    /// The features that device and driver agreed on.
    pub features: u64,
    /// The guest's memory.
    pub memory: GuestMemory,
    /// The queues in their order; those that the driver left disabled are `None`.
    pub queues: Vec<Option<QueueSetup>>,
    /// How the worker reports that it cannot go on.
    pub needs_reset: NeedsReset,
}

impl Activation {
    /// Takes the queue at `index`: its rings resolved and checked.
    pub fn take_queue(&mut self, index: usize) -> Result<Queue, QueueError> {
        let setup = self.queues.get_mut(index).and_then(Option::take);
        let setup = setup.ok_or(QueueError::NotEnabled)?;
        Queue::new(setup, self.memory, self.features)
    }
}

/// The way to `DEVICE_NEEDS_RESET` (virtio 1.3, section 2.1.2).
#[derive(Clone)]
pub struct NeedsReset {
    requested: Arc<AtomicBool>,
    config_interrupt: Interrupt,
}

impl NeedsReset {
    /// Makes the pair: `requested` is what the transport shows in its status.
    pub fn new(requested: Arc<AtomicBool>, config_interrupt: Interrupt) -> Self {
        Self { requested, config_interrupt }
    }

    /// Asks the driver to reset the device.
    pub fn request(&self) {
        self.requested.store(true, Ordering::Release);
        self.config_interrupt.trigger();
    }
}
