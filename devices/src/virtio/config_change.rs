//! How a device announces that its configuration space has changed (virtio 1.3, section 2.5).

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::interrupt::Interrupt;

/// Tells the driver that a device's configuration has changed; works from any thread without a lock
/// that a virtual processor holds while it waits.
#[derive(Clone)]
pub struct ConfigChange {
    pending: Arc<AtomicBool>,
    interrupt: Arc<Mutex<Interrupt>>,
}

impl ConfigChange {
    /// One that no driver hears of yet.
    pub(super) fn unconnected() -> Self {
        Self { pending: Arc::default(), interrupt: Arc::new(Mutex::new(Interrupt::None)) }
    }

    /// Sets what the driver hears changes by.
    pub(super) fn set_interrupt(&self, interrupt: Interrupt) {
        *self.interrupt.lock().unwrap_or_else(PoisonError::into_inner) = interrupt;
    }

    /// Whether something has changed since the last call.
    pub(super) fn take(&self) -> bool {
        self.pending.swap(false, Ordering::AcqRel)
    }

    /// Makes the device look again ([`super::device::VirtioDevice::refresh`]) before its
    /// configuration is next read, and interrupts the driver so that it reads.
    pub fn announce(&self) {
        self.note();
        let interrupt = self.interrupt.lock().unwrap_or_else(PoisonError::into_inner).clone();
        interrupt.trigger();
    }

    /// The same without an interrupt: for changes that the driver makes and knows of.
    pub fn note(&self) {
        self.pending.store(true, Ordering::Release);
    }
}
