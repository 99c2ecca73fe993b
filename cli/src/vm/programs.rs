//! The programs of the host that do the work, all found on PATH.

use std::ffi::OsStr;
use std::io::{self, IsTerminal as _, Write as _};
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Error, Result, anyhow, bail};

/// How often a program that takes long is looked at.
const LOOK: Duration = Duration::from_millis(50);

/// After how long the terminal shows that something takes long.
const PATIENCE: Duration = Duration::from_secs(1);

/// A program of the host.
#[derive(Clone, Copy, Debug)]
pub(super) enum Program {
    Journalctl,
    Nix,
    Ssh,
    Systemctl,
    Sysusers,
}

impl Program {
    /// A call with `arguments`.
    pub(super) fn call<A: AsRef<OsStr>>(self, arguments: impl IntoIterator<Item = A>) -> Call {
        let mut command = Command::new(self.name());
        command.args(arguments);
        Call { program: self, command }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Journalctl => "journalctl",
            Self::Nix => "nix",
            Self::Ssh => "ssh",
            Self::Systemctl => "systemctl",
            Self::Sysusers => "systemd-sysusers",
        }
    }

    fn cannot_start(self, error: &io::Error) -> Error {
        let remedy = match self {
            Self::Nix => "install Nix, or give a runner that is built already with --runner",
            Self::Ssh => "install OpenSSH's client",
            _ => "guests are units of systemd, which has to run here",
        };
        anyhow!("cannot run {}: {error}: {remedy}", self.name())
    }
}

/// A program with its arguments, not yet started.
pub(super) struct Call {
    program: Program,
    command: Command,
}

impl Call {
    /// Adds an argument.
    pub(super) fn and(mut self, argument: impl AsRef<OsStr>) -> Self {
        self.command.arg(argument);
        self
    }

    /// Runs it, and returns what it prints. What it complains about is in the error.
    pub(super) fn output(mut self) -> Result<String> {
        let output = self.command.stdin(Stdio::null()).output();
        let output = output.map_err(|error| self.program.cannot_start(&error))?;
        if output.status.success() {
            let name = self.program.name();
            return String::from_utf8(output.stdout).with_context(|| format!("{name} is odd"));
        }
        let complaint = String::from_utf8_lossy(&output.stderr);
        bail!("{} failed ({}): {}", self.program.name(), output.status, complaint.trim());
    }

    /// Runs it to its end; what it says is for the user. What it prints goes where messages go.
    pub(super) fn run(mut self) -> Result<()> {
        self.command.stdin(Stdio::null()).stdout(io::stderr());
        let status = self.command.status().map_err(|error| self.program.cannot_start(&error))?;
        if !status.success() {
            bail!("{} failed ({status}); what it said is above", self.program.name());
        }
        Ok(())
    }

    /// As [`Self::run`], for a program that says nothing while it takes long: a terminal shows what
    /// is being done and since when.
    pub(super) fn run_and_tell(mut self, what: &str) -> Result<()> {
        self.command.stdin(Stdio::null()).stdout(io::stderr());
        let mut child = self.command.spawn().map_err(|error| self.program.cannot_start(&error))?;
        if io::stderr().is_terminal() {
            show_until_the_end(&mut child, what)?;
        }
        let status = child.wait()?;
        if !status.success() {
            bail!("{} failed ({status})", self.program.name());
        }
        Ok(())
    }

    /// Becomes the program; returns only why that failed.
    pub(super) fn replace(mut self) -> Error {
        let error = self.command.exec();
        self.program.cannot_start(&error)
    }
}

fn show_until_the_end(child: &mut Child, what: &str) -> Result<()> {
    let start = Instant::now();
    let mut shown = 0;
    while child.try_wait()?.is_none() {
        let seconds = start.elapsed().as_secs();
        if start.elapsed() >= PATIENCE && seconds != shown {
            shown = seconds;
            eprint!("\rnixvmm: {what}, {seconds} s ");
        }
        thread::sleep(LOOK);
    }
    if shown != 0 {
        // What was shown makes room for what comes.
        eprint!("\r\x1b[K");
    }
    Ok(io::stderr().flush()?)
}
