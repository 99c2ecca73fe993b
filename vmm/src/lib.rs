//! Who puts it together and runs it?
//!
//! [`run`] builds the machine that a [`config::Config`] describes and runs it to its end.

pub mod config;
mod exit;
mod kvm;
mod run_state;
mod vcpu;

pub use exit::Exit;

/// Runs the machine to its end.
///
/// # Errors
///
/// Why the machine could not be built, or could not go on.
pub fn run(_config: config::Config) -> anyhow::Result<Exit> {
    anyhow::bail!("this build has no machine yet")
}
