//! The host side of devices: knows files, never virtio.

pub mod entropy;
pub mod stream;
