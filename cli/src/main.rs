//! What did the user ask for?
//!
//! Standard output has data only; messages go to standard error. Exit statuses are in the manual
//! page (`nixvmm man`).

mod args;
mod ctl;
mod devices;
mod key_values;
mod log;
mod manual;
#[cfg(test)]
mod reference;
mod terminal;
mod unpack;
mod vm;

use std::io::{self, Write as _};
use std::process::ExitCode;

use ::log::LevelFilter;
use anyhow::{Context as _, Result};
use vmm::config::{Config, Console};
use vmm::sandbox::{LastWords, set_last_words};
use vmm::store_server::StoreServer;

use crate::args::{Command, Invocation, Machine};
use crate::terminal::RawTerminal;

/// The status of a wrong command line, clap's too.
const USAGE: u8 = 2;

fn main() -> ExitCode {
    let command = match Invocation::from_arguments() {
        Invocation::Nixvmm(command) => *command,
        Invocation::Microvm(microvm) => {
            log::start(LevelFilter::Info);
            return ended(microvm.run());
        }
    };
    match command {
        Command::Run(machine) => with_machine(machine, run),
        Command::Check(machine) => with_machine(machine, print),
        Command::Ctl(control) => ended(control.run().map(|()| 0)),
        Command::Vm(vm) => {
            log::start(LevelFilter::Info);
            ended(vm.run())
        }
        Command::UnpackKernel { bzimage, vmlinux } => {
            ended(unpack::unpack_kernel(&bzimage, &vmlinux).map(|()| 0))
        }
        Command::StoreServer { store, closure, tag, queues, no_sandbox } => {
            log::start(LevelFilter::Info);
            let sandbox = !no_sandbox;
            let server = StoreServer { store, closure, tag, queues, sandbox };
            ended(server.run().map(|()| 0))
        }
        Command::Completions { shell } => ended(manual::print_completions(shell).map(|()| 0)),
        Command::Man => ended(manual::print_page().map(|()| 0)),
    }
}

/// What `run` or `check` does with a machine that is resolved.
type Action = fn(&Config) -> Result<u8>;

fn with_machine(machine: Machine, act: Action) -> ExitCode {
    log::start(machine.log_level.unwrap_or(LevelFilter::Info));
    match machine.config().and_then(Config::resolve) {
        Ok(config) => ended(act(&config)),
        Err(error) => {
            log::report(&error);
            USAGE.into()
        }
    }
}

fn run(config: &Config) -> Result<u8> {
    let stdio = [&config.console, &config.serial].contains(&&Console::Stdio);
    let _terminal =
        if stdio { RawTerminal::new().context("cannot make the terminal raw")? } else { None };
    set_last_words(LastWords { prefix: log::error_prefix(), restore: terminal::restore });
    vmm::run(config.clone()).map(vmm::Exit::status)
}

fn print(config: &Config) -> Result<u8> {
    let mut text = serde_json::to_string_pretty(config).context("cannot be written as JSON")?;
    text.push('\n');
    io::stdout().lock().write_all(text.as_bytes())?;
    Ok(0)
}

fn ended(result: Result<u8>) -> ExitCode {
    result.map_or_else(
        |error| {
            log::report(&error);
            ExitCode::FAILURE
        },
        ExitCode::from,
    )
}
