//! Who puts it together and runs it?
//!
//! [`run`] builds the machine that a [`config::Config`] describes and runs it to its end.

mod address_plan;
pub mod config;
pub mod control;
mod exit;
mod happenings;
pub mod host;
mod kvm;
mod loop_thread;
mod machine;
mod machined;
mod notify;
mod object;
mod run_state;
pub mod sandbox;
pub mod sealed_list;
pub mod store_server;
mod thread;
mod timing;
mod vcpu;

pub use exit::Exit;

/// Runs the machine to its end.
///
/// # Errors
///
/// Why the machine could not be built, or could not go on.
pub fn run(config: config::Config) -> anyhow::Result<Exit> {
    machine::Machine::build(config)?.run()
}
