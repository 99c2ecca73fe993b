//! The testbed: everything that is needed to boot a guest with the built `nixvmm` on any Debian
//! machine, and to see whether the guest agrees. `tests/it` holds the tests, `cargo demo` the
//! demonstration.

pub mod archive;
pub mod benchmark;
pub mod cache;
pub mod datagram;
pub mod diagnosis;
pub mod emulated_host;
pub mod events;
pub mod guest;
pub mod kernel;
pub mod mended_emulator;
pub mod name_server;
pub mod namespace;
pub mod nixos_guest;
pub mod packages;
pub mod pattern;
pub mod program;
pub mod service_manager;
pub mod ssh_server;
pub mod systemd_host;
pub mod terminal;
pub mod testbed;
pub mod tiny_guest;
pub mod tool;
pub mod vsock;
pub mod wire;
