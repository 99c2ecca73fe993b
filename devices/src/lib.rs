//! What is on the buses?
//!
//! `virtio` is the guest's side of virtio devices, `host` is what stands behind them on this
//! machine, and the files beside them are the wires: buses, events, interrupts. This crate knows no
//! KVM: its whole view of the hypervisor is eventfds and [`interrupt::MessageRoutes`].

pub mod bus;
pub mod event;
pub mod host;
pub mod interrupt;
pub mod log_limit;
pub mod panic;
pub mod pci;
pub mod power;
pub mod serial;
pub mod store;
#[cfg(test)]
mod test;
pub mod virtio;
pub mod watchdog;
