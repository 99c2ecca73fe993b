//! Feature bits that are not of one kind of device (virtio 1.3, section 6).

/// `VIRTIO_F_INDIRECT_DESC`.
pub const FEATURE_INDIRECT_DESC: u64 = 1 << 28;
/// `VIRTIO_F_EVENT_IDX`.
pub const FEATURE_EVENT_IDX: u64 = 1 << 29;
/// `VIRTIO_F_VERSION_1`.
pub const FEATURE_VERSION_1: u64 = 1 << 32;

/// What every device of ours offers; a transport adds it to the device's own bits.
pub const TRANSPORT_FEATURES: u64 = FEATURE_INDIRECT_DESC | FEATURE_EVENT_IDX | FEATURE_VERSION_1;
