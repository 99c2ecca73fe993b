//! From a fresh Debian machine with Rust to the login prompt of a NixOS-shaped guest: `cargo demo`.
//!
//! With `--until-login` nobody needs to type: it ends with success once the guest asked for a
//! login, was told to power off, and did.

use std::env;
use std::io::{self, Read, Sink, Write};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};
use tests::cache::Cache;
use tests::emulated_host;
use tests::guest::{LONG_PATIENCE, Launch};
use tests::terminal::Terminal;
use tests::testbed::{PREPARED, Testbed};
use tests::tool::progress;

const HELP: &str = "\
Boots a NixOS-shaped guest in nixvmm, from nothing to its login prompt.

Usage: cargo demo [--until-login]

What it needs it fetches and builds first, into $NIXVMM_CACHE, $XDG_CACHE_HOME/nixvmm or
~/.cache/nixvmm. Where KVM is not usable, the guest boots in an emulated host, which takes longer.

  --until-login   ends once the guest asked for a login and has powered off
  --help          prints this text

Log in as root with the password root. `poweroff` in the guest ends it, Ctrl-A x ends it at once.
Environment: NIXVMM_TESTBED=direct or emulated decides whether KVM here is used.";

/// How long an emulated host for the demonstration may live: a day, since a person sits before it.
const LIMIT: Duration = Duration::from_secs(24 * 60 * 60);

fn main() -> Result<ExitCode> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let until_login = match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [] => false,
        ["--until-login"] => true,
        ["--help" | "-h"] => {
            println!("{HELP}");
            return Ok(ExitCode::SUCCESS);
        }
        _ => bail!("unknown arguments; see cargo demo --help"),
    };

    if let Some(prepared) = env::var_os(PREPARED) {
        return boot(&Testbed::load(Path::new(&prepared))?, until_login);
    }
    let cache = Cache::open()?;
    let testbed = Testbed::prepare(&cache)?;
    if emulated_host::is_needed() {
        progress("KVM is not usable here: booting an emulated host for the guest (be patient)");
        return testbed.run_again(&cache, &arguments, Vec::new(), !until_login, LIMIT);
    }
    boot(&testbed, until_login)
}

fn boot(testbed: &Testbed, until_login: bool) -> Result<ExitCode> {
    let command = Launch::nixos(testbed, &testbed.nixos.erofs).into_command();
    progress(&format!("booting: {}", shown(&command)));
    if until_login { see_login(command) } else { hand_over(command) }
}

/// Gives the terminal to the guest.
fn hand_over(mut command: Command) -> Result<ExitCode> {
    progress(
        "log in as root with the password root; leave with poweroff, or at once with Ctrl-A x",
    );
    Err(command.exec()).context("nixvmm cannot be started")
}

/// Shows the guest's console until it asks for a login, presses its power button, and waits for
/// its end.
fn see_login(mut command: Command) -> Result<ExitCode> {
    let mut process =
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().context("nixvmm")?;
    let output = Shown(process.stdout.take().context("no standard output")?);
    let mut console = Terminal::new(output, None::<Sink>);
    let login = console.wait_for("login: ", LONG_PATIENCE);
    if let Err(error) = login {
        let _ = process.kill();
        return Err(error.context("the guest did not ask for a login"));
    }

    println!();
    progress("the guest asks for a login; pressing its power button");
    press_power_button(&process)?;
    let _ = console.wait_for_end(LONG_PATIENCE);
    let status = process.wait()?;
    ensure!(status.success(), "nixvmm ended with {status} after the guest was told to power off");
    progress("the guest has powered off");
    Ok(ExitCode::SUCCESS)
}

fn press_power_button(process: &Child) -> Result<()> {
    let id = i32::try_from(process.id())?;
    let pid = Pid::from_raw(id).context("a process id is not 0")?;
    kill_process(pid, Signal::TERM).context("nixvmm cannot be signalled")
}

/// The command as one would type it.
fn shown(command: &Command) -> String {
    let word = |word: &std::ffi::OsStr| {
        let text = word.to_string_lossy();
        if text.contains(' ') { format!("\"{text}\"") } else { text.into_owned() }
    };
    let words: Vec<String> = command.get_args().map(word).collect();
    format!("nixvmm {}", words.join(" "))
}

/// Prints what is read.
struct Shown<R>(R);

impl<R: Read> Read for Shown<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let length = self.0.read(buffer)?;
        let mut output = io::stdout().lock();
        output.write_all(buffer.get(..length).unwrap_or_default())?;
        output.flush()?;
        Ok(length)
    }
}
