//! Does a guest agree? The guest tests, and those that look at the project itself.
//!
//! Tests of the first group boot guests. Where KVM is usable they run here; otherwise this program
//! boots the emulated host once, runs itself there, and passes output and exit status through.

mod boot;
mod console;
mod control;
mod disk;
mod machine;
mod memory;
mod net;
mod nixos;
mod power;
mod sandbox;
mod terminal;
mod tidy;
mod units;
mod vhost;
mod vsock;

use std::env;
use std::io::{self, IsTerminal};
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Error, Result};
use libtest_mimic::{Arguments, Failed, Trial};
use tests::cache::Cache;
use tests::emulated_host;
use tests::testbed::{PREPARED, Testbed};
use tests::tool::progress;

/// A test that boots guests: its name, which says what it proves, and what it does.
type GuestTest = (&'static str, fn(&Testbed) -> Result<()>);

/// Names how often each guest test is run, one time after the other, to find what is rare.
const REPEAT: &str = "NIXVMM_TEST_REPEAT";

/// What all guest tests together may take in an emulated host.
const LIMIT: Duration = Duration::from_secs(40 * 60);

fn guest_tests() -> Vec<GuestTest> {
    [
        boot::TESTS,
        machine::TESTS,
        memory::TESTS,
        disk::TESTS,
        console::TESTS,
        control::TESTS,
        net::TESTS,
        terminal::TESTS,
        power::TESTS,
        sandbox::TESTS,
        vhost::TESTS,
        vsock::TESTS,
        nixos::TESTS,
    ]
    .concat()
}

/// The tests that need no guest.
fn host_trials() -> Vec<Trial> {
    [tidy::trials(), units::trials()].into_iter().flatten().collect()
}

fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    let ended = match env::var_os(PREPARED) {
        Some(path) => {
            Testbed::load(Path::new(&path)).and_then(|testbed| run_guest_tests(&arguments, testbed))
        }
        None => run(&arguments),
    };
    ended.unwrap_or_else(|error| {
        eprintln!("error: {error:?}");
        ExitCode::FAILURE
    })
}

/// Runs what was asked for: the tests without a guest here, the others where guests can be booted.
fn run(arguments: &Arguments) -> Result<ExitCode> {
    let guest_tests = guest_tests();
    if arguments.list {
        let unused = |(name, _): &GuestTest| Trial::test(*name, || Ok(()));
        let trials = host_trials().into_iter().chain(guest_tests.iter().map(unused)).collect();
        return Ok(libtest_mimic::run(arguments, trials).exit_code());
    }

    let any_guest = guest_tests.iter().any(|(name, _)| is_wanted(arguments, name));
    let any_host = host_trials().iter().any(|trial| is_wanted(arguments, trial.name()));
    let mut failed = false;
    if any_host || !any_guest {
        failed = libtest_mimic::run(arguments, host_trials()).has_failed();
    }
    let mut ended = ExitCode::SUCCESS;
    if any_guest {
        ended = boot_guests(arguments)?;
    }
    Ok(if failed { ExitCode::from(101) } else { ended })
}

/// Prepares the testbed and runs the guest tests, here or in the emulated host.
fn boot_guests(arguments: &Arguments) -> Result<ExitCode> {
    let cache = Cache::open()?;
    let testbed = Testbed::prepare(&cache)?;
    if !emulated_host::is_needed() {
        return run_guest_tests(arguments, testbed);
    }
    let mut words: Vec<String> = env::args().skip(1).collect();
    if arguments.color.is_none() && !io::stdout().is_terminal() {
        words.push("--color=never".to_owned());
    }
    progress("KVM is not usable here: booting an emulated host for the guest tests");
    testbed.run_again(&cache, &words, false, LIMIT)
}

/// Runs the guest tests on this machine.
fn run_guest_tests(arguments: &Arguments, testbed: Testbed) -> Result<ExitCode> {
    let testbed: &'static Testbed = Box::leak(Box::new(testbed));
    let mut arguments = arguments.clone();
    // Guests of several tests at once would share two processors.
    arguments.test_threads = arguments.test_threads.or(Some(1));
    let times: u32 = env::var(REPEAT).ok().and_then(|times| times.parse().ok()).unwrap_or(1);
    let trial = |(name, test): GuestTest| {
        let run = move || (0..times).try_for_each(|_| test(testbed));
        Trial::test(name, move || run().map_err(|error| failure(name, &error)))
    };
    let trials = guest_tests().into_iter().map(trial).collect();
    Ok(libtest_mimic::run(&arguments, trials).exit_code())
}

/// What went wrong and why, without the backtrace, which shows the harness only. It is told at
/// once, because the others may take minutes yet.
fn failure(name: &str, error: &Error) -> Failed {
    let causes: Vec<String> = error.chain().map(ToString::to_string).collect();
    let text = causes.join("\nbecause ");
    eprintln!("\n{name} failed: {text}");
    Failed::from(text)
}

/// Whether the arguments select the test, as libtest does it.
fn is_wanted(arguments: &Arguments, name: &str) -> bool {
    let matches = |pattern: &String| match arguments.exact {
        true => name == pattern,
        false => name.contains(pattern.as_str()),
    };
    arguments.filter.as_ref().is_none_or(matches) && !arguments.skip.iter().any(matches)
}
