//! What does a guest read of the host's store?
//!
//! A read-only virtio-fs device, served by a process of its own over vhost-user. It is built for
//! trees that never change: the guest may keep whatever it was told. `wire` is the protocol of
//! requests and replies, [`closure`] says which store paths there are, `nodes` is what the guest
//! knows, `files` is the host's side of it, [`tree`] has both, [`requests`] answers, and [`server`]
//! is the device.

pub mod closure;
mod directory;
mod files;
mod nodes;
pub mod reply;
pub mod requests;
pub mod server;
#[cfg(test)]
mod test;
pub mod tree;
mod wire;
