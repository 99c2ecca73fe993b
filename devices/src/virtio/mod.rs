//! The guest side of virtio: queues, transports and devices (virtio 1.3).
//!
//! A device is two halves. Its front, a [`device::VirtioDevice`], answers registers on vCPU
//! threads. Its back, a [`worker::Worker`], is made when the driver is ready, owns the queues and
//! what serves them, and dies at reset.

pub mod balloon;
pub mod block;
pub mod chain;
pub mod config_change;
pub mod console;
pub mod counters;
pub mod device;
pub mod feature;
pub mod fs;
mod goal;
pub mod mem;
pub mod mmio;
pub mod net;
pub mod pci;
pub mod pmem;
pub mod queue;
pub mod rng;
pub mod transport;
pub mod vhost;
pub mod vsock;
pub mod worker;
