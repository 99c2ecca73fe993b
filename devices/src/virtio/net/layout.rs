//! What a network card's registers and commands look like (virtio 1.3, sections 5.1.3 to 5.1.6).

use zerocopy::{Immutable, IntoBytes};

/// The device takes frames whose checksum it completes.
pub const FEATURE_CSUM: u64 = 1 << 0;
/// The driver takes frames whose checksum is not complete.
pub const FEATURE_GUEST_CSUM: u64 = 1 << 1;
/// Offloads towards the driver can be switched at run time.
pub const FEATURE_CTRL_GUEST_OFFLOADS: u64 = 1 << 2;
/// The configuration has an MTU.
pub const FEATURE_MTU: u64 = 1 << 3;
/// The configuration has an address.
pub const FEATURE_MAC: u64 = 1 << 5;
/// The driver takes TCP segments over IPv4 that are larger than a frame.
pub const FEATURE_GUEST_TSO4: u64 = 1 << 7;
/// The same over IPv6.
pub const FEATURE_GUEST_TSO6: u64 = 1 << 8;
/// The same with congestion notification.
pub const FEATURE_GUEST_ECN: u64 = 1 << 9;
/// The driver takes UDP datagrams that are larger than a frame.
pub const FEATURE_GUEST_UFO: u64 = 1 << 10;
/// The device takes TCP segments over IPv4 that are larger than a frame.
pub const FEATURE_HOST_TSO4: u64 = 1 << 11;
/// The same over IPv6.
pub const FEATURE_HOST_TSO6: u64 = 1 << 12;
/// The same with congestion notification.
pub const FEATURE_HOST_ECN: u64 = 1 << 13;
/// The device takes UDP datagrams that are larger than a frame.
pub const FEATURE_HOST_UFO: u64 = 1 << 14;
/// A frame to the driver may fill several chains.
pub const FEATURE_MRG_RXBUF: u64 = 1 << 15;
/// The configuration has a status.
pub const FEATURE_STATUS: u64 = 1 << 16;
/// There is a control queue.
pub const FEATURE_CTRL_VQ: u64 = 1 << 17;
/// The control queue takes receive modes.
pub const FEATURE_CTRL_RX: u64 = 1 << 18;
/// The control queue takes more receive modes.
pub const FEATURE_CTRL_RX_EXTRA: u64 = 1 << 20;
/// The device can ask the driver to announce itself.
pub const FEATURE_GUEST_ANNOUNCE: u64 = 1 << 21;
/// There are several queue pairs.
pub const FEATURE_MQ: u64 = 1 << 22;
/// The control queue takes an address.
pub const FEATURE_CTRL_MAC_ADDR: u64 = 1 << 23;
/// The driver takes UDP segments over IPv4 that belong together.
pub const FEATURE_GUEST_USO4: u64 = 1 << 54;
/// The same over IPv6.
pub const FEATURE_GUEST_USO6: u64 = 1 << 55;
/// The device takes UDP segments that belong together.
pub const FEATURE_HOST_USO: u64 = 1 << 56;

/// Offloads towards the driver, which are also the bits of their command.
pub const GUEST_OFFLOADS: u64 = FEATURE_GUEST_CSUM
    | FEATURE_GUEST_TSO4
    | FEATURE_GUEST_TSO6
    | FEATURE_GUEST_ECN
    | FEATURE_GUEST_UFO
    | FEATURE_GUEST_USO4
    | FEATURE_GUEST_USO6;

/// What the front itself brings, whatever moves the frames.
pub(super) const FRONT_FEATURES: u64 = FEATURE_MAC
    | FEATURE_STATUS
    | FEATURE_CTRL_VQ
    | FEATURE_CTRL_RX
    | FEATURE_CTRL_RX_EXTRA
    | FEATURE_GUEST_ANNOUNCE
    | FEATURE_CTRL_MAC_ADDR;

/// Bit of the status: the link is up.
pub(super) const STATUS_LINK_UP: u16 = 1;
/// Bit of the status: the driver shall announce itself.
pub(super) const STATUS_ANNOUNCE: u16 = 2;

/// The configuration space.
#[derive(Clone, Copy, Debug, IntoBytes, Immutable)]
#[repr(C)]
pub(super) struct Config {
    pub(super) mac: [u8; 6],
    pub(super) status: u16,
    pub(super) max_virtqueue_pairs: u16,
    pub(super) mtu: u16,
}

/// What every frame begins with (section 5.1.6): of it we write the number of buffers alone.
pub const HEADER_BYTES: usize = 12;
/// Where in the header the number of buffers is.
pub const NUM_BUFFERS_OFFSET: usize = 10;

/// Classes and commands of the control queue.
pub(super) mod command {
    pub(crate) const RX: u8 = 0;
    /// Commands of `RX` are numbered up to this one, which `CTRL_RX` brings.
    pub(crate) const RX_ALLMULTI: u8 = 1;
    /// The same for `CTRL_RX_EXTRA`.
    pub(crate) const RX_NOBCAST: u8 = 5;
    pub(crate) const MAC: u8 = 1;
    pub(crate) const MAC_TABLE_SET: u8 = 0;
    pub(crate) const MAC_ADDR_SET: u8 = 1;
    pub(crate) const ANNOUNCE: u8 = 3;
    pub(crate) const ANNOUNCE_ACK: u8 = 0;
    pub(crate) const MQ: u8 = 4;
    pub(crate) const MQ_VQ_PAIRS_SET: u8 = 0;
    pub(crate) const GUEST_OFFLOADS: u8 = 5;
    pub(crate) const GUEST_OFFLOADS_SET: u8 = 0;
}
