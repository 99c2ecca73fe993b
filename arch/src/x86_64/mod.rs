//! The x86_64 machine.

pub mod cpuid;
pub mod irqchip;
pub mod layout;
pub mod msr;
pub mod start;
