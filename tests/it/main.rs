//! Does a guest agree? The guest tests, and those that look at the project itself.
//!
//! Tests of the first group boot guests. Where KVM is usable they run here; otherwise this program
//! boots emulated hosts, runs itself in each with a part of the tests, and passes output and exit
//! status through.

mod boot;
mod bulk;
mod console;
mod control;
mod disk;
mod interface;
mod machine;
mod memory;
mod net;
mod nix;
mod nixos;
mod power;
mod runner;
mod sandbox;
mod share;
mod store;
mod systemd;
mod terminal;
mod tidy;
mod units;
mod vhost;
mod vsock;

use std::io::{self, IsTerminal};
use std::num::NonZero;
use std::path::Path;
use std::process::ExitCode;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;
use std::thread::ScopedJoinHandle;
use std::time::{Duration, Instant};
use std::{env, thread};

use anyhow::{Context, Error, Result, anyhow};
use libtest_mimic::{Arguments, Failed, Trial};
use tests::cache::Cache;
use tests::emulated_host;
use tests::guest::Silence;
use tests::testbed::{PREPARED, Testbed};
use tests::tool::progress;

/// A test that boots guests: its name, which says what it proves, and what it does.
type GuestTest = (&'static str, fn(&Testbed) -> Result<()>);

/// A test that needs no guest.
type HostTest = (&'static str, fn() -> Result<()>);

/// Names how often each guest test is run, one time after the other, to find what is rare.
const REPEAT: &str = "NIXVMM_TEST_REPEAT";

/// Tells this program in an emulated host which part of the tests is its own: `1/2` is the second
/// of two.
const PART: &str = "NIXVMM_TEST_PART";

/// Emulated hosts side by side, which have one processor each: more would only share this machine.
const HOSTS_MAX: usize = 2;

/// Tests of an emulated host that are tried once more because a guest's processors stand still.
const LOST_MAX: usize = 2;

/// So many tests are named with the time they took.
const LONGEST: usize = 12;

/// What all guest tests of an emulated host may take together.
const LIMIT: Duration = Duration::from_secs(75 * 60);

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
        share::TESTS,
        store::TESTS,
        systemd::TESTS,
        vhost::TESTS,
        vsock::TESTS,
        nixos::TESTS,
    ]
    .concat()
}

/// The tests that need no guest.
fn host_trials() -> Vec<Trial> {
    [tidy::trials(), units::trials(), nix::trials(), runner::trials()]
        .into_iter()
        .flatten()
        .collect()
}

fn host_trial(&(name, test): &HostTest) -> Trial {
    Trial::test(name, move || test().map_err(|error| Failed::from(format!("{error:#}"))))
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

    let wanted_guests = guest_tests.iter().filter(|(name, _)| is_wanted(arguments, name)).count();
    let any_host = host_trials().iter().any(|trial| is_wanted(arguments, trial.name()));
    let mut failed = false;
    if any_host || wanted_guests == 0 {
        nix::say_what_is_ignored();
        failed = libtest_mimic::run(arguments, host_trials()).has_failed();
    }
    let mut ended = ExitCode::SUCCESS;
    if wanted_guests > 0 {
        ended = boot_guests(arguments, wanted_guests)?;
    }
    Ok(if failed { ExitCode::from(101) } else { ended })
}

/// Prepares the testbed and runs the guest tests, `count` of them, here or in emulated hosts.
fn boot_guests(arguments: &Arguments, count: usize) -> Result<ExitCode> {
    let cache = Cache::open()?;
    let testbed = Testbed::prepare(&cache)?;
    if !emulated_host::is_needed() {
        return run_guest_tests(arguments, testbed);
    }
    let mut words: Vec<String> = env::args().skip(1).collect();
    if arguments.color.is_none() && !io::stdout().is_terminal() {
        words.push("--color=never".to_owned());
    }
    let processors = thread::available_parallelism().map_or(1, NonZero::get);
    let hosts = count.min(processors).min(HOSTS_MAX);
    progress(&format!("KVM is not usable here: booting emulated hosts for guest tests: {hosts}"));
    let tests = u32::try_from(count).unwrap_or(u32::MAX);
    let limit = LIMIT.saturating_add(bulk::longer().saturating_mul(tests));
    let part = |index: usize| {
        let environment = vec![(PART, format!("{index}/{hosts}"))];
        testbed.run_again(&cache, &words, environment, false, limit)
    };
    thread::scope(|scope| {
        let parts: Vec<_> = (0..hosts).map(|index| scope.spawn(move || part(index))).collect();
        let ends: Vec<_> = parts.into_iter().map(ScopedJoinHandle::join).collect();
        let mut worst = ExitCode::SUCCESS;
        for end in ends {
            let end = end.map_err(|_| anyhow!("the thread of an emulated host panicked"))??;
            if end != ExitCode::SUCCESS {
                worst = end;
            }
        }
        Ok(worst)
    })
}

/// Runs the guest tests on this machine.
fn run_guest_tests(arguments: &Arguments, testbed: Testbed) -> Result<ExitCode> {
    let testbed: &'static Testbed = Box::leak(Box::new(testbed));
    let mut arguments = arguments.clone();
    // Guests of several tests at once would share two processors.
    arguments.test_threads = arguments.test_threads.or(Some(1));
    let times: u32 = env::var(REPEAT).ok().and_then(|times| times.parse().ok()).unwrap_or(1);
    let (durations, ended) = mpsc::channel();
    let trial = |(name, test): GuestTest| {
        let durations = durations.clone();
        Trial::test(name, move || {
            let start = Instant::now();
            let outcome = (0..times).try_for_each(|_| attempt(name, test, testbed));
            let _ = durations.send((start.elapsed(), name));
            outcome.map_err(|error| failure(name, &error))
        })
    };
    let own = own_part(&arguments)?;
    let trials = own.into_iter().map(trial).collect();
    let conclusion = libtest_mimic::run(&arguments, trials);
    say_what_took_long(ended.try_iter().collect());
    Ok(conclusion.exit_code())
}

/// Names the tests that took longest, since continuous integration waits for all of them.
fn say_what_took_long(mut durations: Vec<(Duration, &str)>) {
    durations.sort_unstable();
    let longest = durations.iter().rev().take(LONGEST);
    let words = longest.map(|(duration, name)| format!("{name} {} s", duration.as_secs()));
    progress(&format!("longest: {}", words.collect::<Vec<_>>().join(", ")));
}

/// Runs a guest test, and once more where the processors of a guest stand still in an emulated
/// host: in few tests of this host, and never silently, since the fault may be ours.
fn attempt(name: &str, test: fn(&Testbed) -> Result<()>, testbed: &Testbed) -> Result<()> {
    static LOST: AtomicUsize = AtomicUsize::new(0);
    let outcome = test(testbed);
    let Err(error) = &outcome else { return outcome };
    let is_lost = error.downcast_ref::<Silence>().is_some_and(|silence| silence.stands_still);
    if !is_lost || LOST.fetch_add(1, Ordering::Relaxed) >= LOST_MAX {
        return outcome;
    }
    eprintln!("\n{name}: the processors of a guest stand still, it is tried once more: {error:#}");
    test(testbed)
}

/// The wanted tests that are this process's: all, or every so many-th where [`PART`] says so.
fn own_part(arguments: &Arguments) -> Result<Vec<GuestTest>> {
    let wanted = guest_tests().into_iter().filter(|(name, _)| is_wanted(arguments, name));
    let Ok(part) = env::var(PART) else { return Ok(wanted.collect()) };
    let numbers = part.split_once('/').and_then(|(index, parts)| {
        Some((index.parse::<usize>().ok()?, parts.parse::<NonZero<usize>>().ok()?))
    });
    let (index, parts) = numbers.with_context(|| format!("{PART}={part} is no part"))?;
    Ok(wanted.skip(index).step_by(parts.get()).collect())
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
