//! What machine does the guest see?
//!
//! Guest memory, the address map and the processors' first state. This crate knows no device and no
//! file format; every other crate stands on it.

pub mod entry;
pub mod memory;
pub mod platform;
pub mod range_map;

#[cfg(target_arch = "x86_64")]
pub mod x86_64;
#[cfg(target_arch = "x86_64")]
pub use x86_64 as target;

#[cfg(not(target_arch = "x86_64"))]
compile_error!("nixvmm runs on x86_64 so far; arch/src/aarch64 is where the next target goes");
