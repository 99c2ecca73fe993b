//! Interrupts: how a device reaches the guest, always through an eventfd.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::event::Event;

/// A message-signalled interrupt: what is written where (PCI 3.0, 6.8).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message {
    /// Guest-physical address of the write.
    pub address: u64,
    /// The value written.
    pub data: u32,
}

/// The only thing that devices ask of the hypervisor.
pub trait MessageRoutes: Send + Sync {
    /// Sets, in one update, what each event sends to the guest when it is signalled.
    ///
    /// An event without a message is detached: signals stay pending in it and are delivered when it
    /// is attached again. That is how a masked vector behaves.
    fn set(&self, changes: &[(Event, Option<Message>)]) -> io::Result<()>;
}

/// One interrupt of one device.
#[derive(Clone)]
pub enum Interrupt {
    /// The driver asked for none.
    None,
    /// A line, with the status register in which the driver finds the reason.
    Line {
        /// Raises the line, edge triggered.
        event: Event,
        /// The device's interrupt status register.
        status: Arc<AtomicU32>,
        /// The bit of the status register that this interrupt sets.
        reason: u32,
    },
    /// A message; masks are the business of [`MessageRoutes`].
    Message(Event),
}

impl Interrupt {
    /// Interrupts the guest: one eventfd write.
    pub fn trigger(&self) {
        match self {
            Self::None => {}
            Self::Line { event, status, reason } => {
                status.fetch_or(*reason, Ordering::SeqCst);
                event.signal();
            }
            Self::Message(event) => event.signal(),
        }
    }
}
