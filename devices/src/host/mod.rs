//! The host side of devices: knows files, never virtio.

pub mod child;
pub mod disk;
pub mod entropy;
pub mod file_window;
pub mod listener;
pub mod program;
pub mod signals;
pub mod stream;
pub mod tap;
pub mod vhost;
pub(crate) mod volatile;
pub mod vsock;
pub mod vsock_listener;
