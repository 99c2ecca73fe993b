//! Control of a running guest: a varlink service on a unix socket.
//!
//! What goes over the wire is said here, and that nobody at the other end can disturb the guest:
//! the number of clients and the bytes of each are limited, nothing waits, and a client is served
//! a few calls at a time. Which calls there are, and what they do, is a table of [`Verb`]s that
//! whoever runs the service brings along in an [`Interface`].
//!
//! Everything runs in the main loop. The protocol is <https://varlink.org>: JSON objects that end
//! with a NUL, so that `varlinkctl` and `nixvmm ctl` are clients like any other.

mod client;
mod interface;
mod message;
mod server;
#[cfg(test)]
mod test;

pub use devices::host::stream::escape::{EscapeAction, EscapeKeys};
pub use interface::{Answer, Interface, Occasion, Refusal, Request, Served, Verb};
pub use message::{Call, Inbox, MESSAGE_BYTES_MAX, Malformed};
pub(crate) use server::Server;

/// The text of the interface of a running machine, in varlink's own language.
pub const MACHINE_INTERFACE: &str = include_str!("io.nixvmm.Machine.varlink");

/// The interface of a running machine.
pub const MACHINE_INTERFACE_NAME: &str = "io.nixvmm.Machine";
