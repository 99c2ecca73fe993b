//! The host side of devices: knows files, never virtio.
