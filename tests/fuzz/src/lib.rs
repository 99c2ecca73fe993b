//! What several targets need: files, a guest, valid kernels to start from.

pub mod boot;
pub mod virtio;
