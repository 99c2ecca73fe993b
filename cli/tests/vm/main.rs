//! `nixvmm vm` as a user sees it: the built program and a state folder.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod changes;
mod host;
mod running;
mod snapshots;
