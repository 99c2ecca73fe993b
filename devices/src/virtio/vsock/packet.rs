//! Packets (virtio 1.3, section 5.10.6).

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// The host's context id.
pub(super) const CID_HOST: u64 = 2;

/// A port that nobody has: `VMADDR_PORT_ANY` of Linux.
pub(super) const PORT_ANY: u32 = u32::MAX;

/// The only socket type that is offered.
pub(super) const TYPE_STREAM: u16 = 1;

/// Flags of a shutdown: the sender of the packet receives no more.
pub(super) const SHUTDOWN_RECEIVE: u32 = 1;
/// The sender of the packet sends no more.
pub(super) const SHUTDOWN_SEND: u32 = 2;

/// What packets are for (`VIRTIO_VSOCK_OP_*`).
pub(super) mod operation {
    pub(in super::super) const REQUEST: u16 = 1;
    pub(in super::super) const RESPONSE: u16 = 2;
    pub(in super::super) const RESET: u16 = 3;
    pub(in super::super) const SHUTDOWN: u16 = 4;
    pub(in super::super) const DATA: u16 = 5;
    pub(in super::super) const CREDIT_UPDATE: u16 = 6;
    pub(in super::super) const CREDIT_REQUEST: u16 = 7;
}

/// The header of a packet; its payload follows, however the descriptors split both.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct Header {
    pub(super) source_cid: U64,
    pub(super) destination_cid: U64,
    pub(super) source_port: U32,
    pub(super) destination_port: U32,
    pub(super) len: U32,
    pub(super) kind: U16,
    pub(super) operation: U16,
    pub(super) flags: U32,
    /// Bytes that the sender has room for in all.
    pub(super) buffer_space: U32,
    /// Bytes that the sender has handed on since the connection began, modulo 2^32.
    pub(super) forwarded: U32,
}

/// Bytes of a header.
pub(super) const HEADER_LEN: usize = size_of::<Header>();

const _: () = assert!(HEADER_LEN == 44);

/// The two ports of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Route {
    pub(super) guest_port: u32,
    pub(super) host_port: u32,
}

impl Route {
    /// The route of a packet from the guest.
    pub(super) fn of(header: &Header) -> Self {
        let (guest_port, host_port) = (header.source_port.get(), header.destination_port.get());
        Self { guest_port, host_port }
    }

    /// A packet to the guest.
    pub(super) fn packet(self, guest_cid: u64, operation: u16) -> Header {
        Header {
            source_cid: CID_HOST.into(),
            destination_cid: guest_cid.into(),
            source_port: self.host_port.into(),
            destination_port: self.guest_port.into(),
            kind: TYPE_STREAM.into(),
            operation: operation.into(),
            ..Header::default()
        }
    }
}
