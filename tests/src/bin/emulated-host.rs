//! Runs a command in the emulated host: `cargo run -p tests --bin emulated-host -- COMMAND…`.

use std::env;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Result, ensure};
use tests::cache::Cache;
use tests::emulated_host::{EmulatedHost, Job};

fn main() -> Result<ExitCode> {
    let command: Vec<String> = env::args().skip(1).collect();
    ensure!(!command.is_empty(), "which command?");
    let host = EmulatedHost::prepare(&Cache::open()?)?;
    let limit = Duration::from_secs(1800);
    host.run(&Job { command, environment: Vec::new(), interactive: true, limit })
}
