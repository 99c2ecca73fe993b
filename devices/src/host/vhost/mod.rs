//! What takes over a device's rings so that its data does not pass through this process: drivers in
//! the host's kernel, and processes that speak vhost-user.

mod deadline;
pub mod kernel;
pub(crate) mod timer;
pub mod user;
