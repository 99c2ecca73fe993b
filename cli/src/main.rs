//! What did the user ask for?

mod args;

use std::process::ExitCode;

use clap::Parser as _;

fn main() -> ExitCode {
    match vmm::run(args::Args::parse().into_config()) {
        Ok(exit) => ExitCode::from(exit.status()),
        Err(error) => {
            eprintln!("nixvmm: error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
