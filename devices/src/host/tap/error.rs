//! Why an interface cannot be used, and what helps.

use std::io;
use std::os::fd::RawFd;

/// Why an interface cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// /dev/net/tun cannot be opened.
    #[error("cannot open /dev/net/tun{}", remedy(.0))]
    Device(#[source] io::Error),
    /// There is no interface of this name.
    #[error(
        "there is no interface {0}: make it with `ip tuntap add {0} mode tap user $USER \
         multi_queue vnet_hdr`, then `ip link set {0} up`"
    )]
    Missing(String),
    /// The interface is no tap.
    #[error("{0} is no tap interface; of a macvtap give an open descriptor: type=macvtap,fd=N")]
    NoTap(String),
    /// Another process has it.
    #[error("tap {0} is in use, probably by another guest: give each guest its own")]
    Busy(String),
    /// It belongs to somebody else.
    #[error(
        "tap {0} may not be used by this user: make it with `ip tuntap add {0} mode tap user \
         $USER`, or inherit it from a process that may (fd=N)"
    )]
    Permission(String),
    /// It was made for one queue.
    #[error(
        "queues={count}: tap {name} has one queue: leave queues out, or make it with `ip tuntap \
         add {name} mode tap multi_queue`"
    )]
    OneQueue {
        /// The interface.
        name: String,
        /// How many queues were wanted.
        count: u16,
    },
    /// A descriptor is not open.
    #[error(
        "descriptor {0} is not open: whoever starts nixvmm must open it and leave it open (in a \
         shell: {0}<>/dev/tapN for a macvtap)"
    )]
    NotOpen(RawFd),
    /// A descriptor is something else.
    #[error("descriptor {0} is no tap: it must be attached to an interface (TUNSETIFF)")]
    NoTapDescriptor(RawFd),
    /// A descriptor carries frames without their header.
    #[error(
        "descriptor {descriptor} of tap {name} has no header before its frames: open it with \
         IFF_TAP, IFF_NO_PI and IFF_VNET_HDR"
    )]
    NoHeader {
        /// The descriptor.
        descriptor: RawFd,
        /// Its interface.
        name: String,
    },
    /// Descriptors belong to different interfaces.
    #[error("the descriptors are of different interfaces, {one} and {other}")]
    Mixed {
        /// One of them.
        one: String,
        /// Another.
        other: String,
    },
    /// A descriptor cannot be taken over.
    #[error("cannot take over descriptor {descriptor}")]
    Inherit {
        /// The descriptor.
        descriptor: RawFd,
        /// What the kernel says.
        source: io::Error,
    },
    /// The interface takes no other MTU, from us at least.
    #[error("cannot give {name} an MTU of {mtu}: as root, `ip link set {name} mtu {mtu}`")]
    Mtu {
        /// The interface.
        name: String,
        /// The MTU in bytes.
        mtu: u16,
        /// What the kernel says.
        source: io::Error,
    },
    /// A macvtap takes no other address.
    #[error(
        "cannot give macvtap {name} the card's address: leave mac out, so that the card has the \
         interface's"
    )]
    Address {
        /// The interface.
        name: String,
        /// What the kernel says.
        source: io::Error,
    },
    /// The kernel refuses a setting that it should know.
    #[error("cannot set up tap {name}")]
    SetUp {
        /// The interface.
        name: String,
        /// What the kernel says.
        source: io::Error,
    },
}

fn remedy(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::NotFound => ": is the kernel module loaded? As root: modprobe tun",
        io::ErrorKind::PermissionDenied => {
            ": it must be open to this user, or inherit a tap that is open (fd=N)"
        }
        _ => "",
    }
}
