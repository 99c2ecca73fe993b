//! How does a test speak with a guest? It launches `nixvmm` with the arguments in question, waits
//! for the agent on a console, runs commands there, and sees how the process ends.

use std::ffi::OsStr;
use std::fmt;
use std::io::{Read, Write};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Error, Result, anyhow, ensure};
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process, waitid};

use crate::diagnosis;
use crate::emulated_host;
use crate::terminal::Terminal;
use crate::testbed::Testbed;

/// What a guest may take for one step. A step takes seconds in an emulated host; this is for one
/// that will not come.
pub const PATIENCE: Duration = Duration::from_secs(180);

/// What systemd may take to come up or to go down.
pub const LONG_PATIENCE: Duration = Duration::from_secs(360);

/// What reading the last words of a process may take.
const LAST_WORDS: Duration = Duration::from_millis(500);

/// How often a process is asked whether it has ended.
const POLL: Duration = Duration::from_millis(20);

/// The kernel command line of the tiny guest. Its kernel stays where it is linked, so that an
/// address in a trace names a function, and every boot is the same.
const TINY_COMMAND_LINE: &str = "console=hvc0 loglevel=4 nokaslr";

/// A command line of `nixvmm` under construction.
pub struct Launch {
    command: Command,
    command_line: String,
    patience: Duration,
}

/// Why a guest did not do what was expected, with what it and `nixvmm` said last.
#[derive(Debug)]
pub struct Silence {
    text: String,
    /// Whether its processors ask for nothing any more, in an emulated host: see
    /// [`diagnosis::stands_still`].
    pub stands_still: bool,
}

/// A `nixvmm` that was started. Dropping it kills it.
pub struct Guest {
    process: Child,
    console: Terminal,
    errors: Terminal,
    requests: u32,
    patience: Duration,
}

impl fmt::Display for Silence {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.text)
    }
}

impl Launch {
    /// `nixvmm` without arguments.
    pub fn bare(testbed: &Testbed) -> Self {
        let command = Command::new(&testbed.program);
        Self { command, command_line: String::new(), patience: PATIENCE }
    }

    /// The tiny guest on `kernel`.
    pub fn tiny(testbed: &Testbed, kernel: &Path) -> Self {
        Self::tiny_with(testbed, kernel, TINY_COMMAND_LINE)
    }

    /// The tiny guest on `kernel` with nothing on its kernel command line but `command_line`.
    pub fn tiny_with(testbed: &Testbed, kernel: &Path, command_line: &str) -> Self {
        let mut launch = Self::bare(testbed);
        launch.command.arg("--kernel").arg(kernel).arg("--initrd").arg(&testbed.tiny);
        launch.command_line(command_line)
    }

    /// The NixOS-shaped guest with the store image `store`.
    pub fn nixos(testbed: &Testbed, store: &Path) -> Self {
        Self::nixos_with_share(testbed).arguments(["--root".as_ref(), store.as_os_str()])
    }

    /// The NixOS-shaped guest, whose store is a share that the kernel command line has yet to name.
    pub fn nixos_with_share(testbed: &Testbed) -> Self {
        let mut launch = Self::bare(testbed);
        launch.command.arg("--kernel").arg(&testbed.bzimage);
        launch.command.arg("--initrd").arg(&testbed.nixos.initrd);
        // On a busy machine an emulated systemd takes longer to stop than one is given by default.
        launch.command.args(["--shutdown-timeout", &LONG_PATIENCE.as_secs().to_string()]);
        launch.patience = LONG_PATIENCE;
        launch.command_line(&testbed.nixos.command_line)
    }

    /// Appends to the kernel command line.
    pub fn command_line(mut self, text: &str) -> Self {
        if !self.command_line.is_empty() {
            self.command_line += " ";
        }
        self.command_line += text;
        self
    }

    /// Appends arguments of `nixvmm`.
    pub fn arguments<S: AsRef<OsStr>>(mut self, arguments: impl IntoIterator<Item = S>) -> Self {
        self.command.args(arguments);
        self
    }

    /// Sets a variable of the environment of `nixvmm`.
    pub fn environment(mut self, name: &str, value: impl AsRef<OsStr>) -> Self {
        self.command.env(name, value);
        self
    }

    /// Waits no longer than this for a step of the guest.
    pub fn patience(self, patience: Duration) -> Self {
        Self { patience, ..self }
    }

    /// Lets another user than root run it.
    pub fn user(mut self, id: u32) -> Self {
        self.command.uid(id).gid(id);
        self
    }

    /// The command as it is, for who wants to start it differently.
    pub fn into_command(mut self) -> Command {
        if !self.command_line.is_empty() {
            self.command.arg("--cmdline").arg(&self.command_line);
        }
        self.command
    }

    /// Starts it with its standard streams as the guest's console.
    ///
    /// # Errors
    /// When the program cannot be started.
    pub fn start(self) -> Result<Guest> {
        let patience = self.patience;
        let mut command = self.into_command();
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut process = command.spawn().context("nixvmm cannot be started")?;
        let output = process.stdout.take().context("no standard output")?;
        let errors = process.stderr.take().context("no standard error")?;
        let console = Terminal::new(output, process.stdin.take());
        let errors = Terminal::new(errors, None::<std::io::Sink>);
        Ok(Guest { process, console, errors, requests: 0, patience })
    }

    /// Starts it and waits for the agent on its standard streams.
    ///
    /// # Errors
    /// When the guest does not come up; the error has the end of its console.
    pub fn boot(self) -> Result<Guest> {
        let mut guest = self.start()?;
        guest.wait_for_agent()?;
        Ok(guest)
    }
}

impl Guest {
    /// Takes another stream for the console that the agent is on.
    pub fn use_console(
        &mut self,
        output: impl Read + Send + 'static,
        input: impl Write + Send + 'static,
    ) {
        self.console = Terminal::new(output, Some(input));
    }

    /// The guest's console.
    pub fn console(&mut self) -> &mut Terminal {
        &mut self.console
    }

    /// What `nixvmm` writes to its standard error.
    pub fn errors(&mut self) -> &mut Terminal {
        &mut self.errors
    }

    /// The process id of `nixvmm`.
    pub fn process_id(&self) -> u32 {
        self.process.id()
    }

    /// Waits until the agent is there.
    ///
    /// # Errors
    /// When it does not come.
    pub fn wait_for_agent(&mut self) -> Result<()> {
        self.wait_for("agent: ready\n").map(drop)
    }

    /// Waits for `pattern` on the console and returns what came up to its end.
    ///
    /// # Errors
    /// When it does not come; the error has the end of the console.
    pub fn wait_for(&mut self, pattern: &str) -> Result<String> {
        self.console.wait_for(pattern, self.patience).map_err(|error| self.explain(error))
    }

    /// Runs a shell command of one line and returns its output.
    ///
    /// # Errors
    /// When it fails or does not end.
    pub fn run(&mut self, command: &str) -> Result<String> {
        let (status, output) = self.attempt(command)?;
        ensure!(status == 0, "`{command}` in the guest failed with {status}:\n{output}");
        Ok(output)
    }

    /// Runs a shell command of one line and returns its status and output.
    ///
    /// # Errors
    /// When it does not end.
    pub fn attempt(&mut self, command: &str) -> Result<(i32, String)> {
        let answer = self.exchange(command);
        answer.with_context(|| format!("`{command}` in the guest")).map_err(|e| self.explain(e))
    }

    /// Sends a shell command of one line that is not expected to be answered.
    ///
    /// # Errors
    /// When the console takes no more.
    pub fn tell(&mut self, command: &str) -> Result<()> {
        self.requests += 1;
        self.console.write(&format!("run {} {command}\n", self.requests))
    }

    /// Sends `signal` to `nixvmm`.
    ///
    /// # Errors
    /// When it has already ended.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let id = i32::try_from(self.process.id())?;
        let pid = Pid::from_raw(id).context("a process id is not 0")?;
        kill_process(pid, signal).context("nixvmm cannot be signalled")
    }

    /// Whether `nixvmm` has not ended yet.
    pub fn is_running(&mut self) -> bool {
        matches!(self.process.try_wait(), Ok(None))
    }

    /// Waits until `nixvmm` ends and returns its exit status.
    ///
    /// # Errors
    /// When it does not end or a signal ended it.
    pub fn status(&mut self) -> Result<i32> {
        let status = self.end()?;
        status.code().ok_or_else(|| self.explain(anyhow!("nixvmm ended by {status}")))
    }

    /// Waits until `nixvmm` ends and returns how.
    ///
    /// # Errors
    /// When it does not end.
    pub fn end(&mut self) -> Result<ExitStatus> {
        let deadline = Instant::now() + self.patience;
        loop {
            if let Some(status) = self.process.try_wait()? {
                return Ok(status);
            }
            if Instant::now() > deadline {
                let explained = self.explain(anyhow!("nixvmm did not end"));
                let _ = self.process.kill();
                return Err(explained);
            }
            thread::sleep(POLL);
        }
    }

    /// Powers the tiny guest off and expects that `nixvmm` agrees.
    ///
    /// # Errors
    /// When it ends otherwise or not at all.
    pub fn power_off(mut self) -> Result<()> {
        self.tell("poweroff -f")?;
        self.expect_status(0)
    }

    /// Expects that `nixvmm` ends with `expected`.
    ///
    /// # Errors
    /// When it ends otherwise or not at all.
    pub fn expect_status(&mut self, expected: i32) -> Result<()> {
        let status = self.status()?;
        if status != expected {
            return Err(self.explain(anyhow!("nixvmm ended with {status}, not {expected}")));
        }
        Ok(())
    }

    /// `error` with what the guest and `nixvmm` said last, and what they do if they still run.
    pub fn explain(&self, error: Error) -> Error {
        let ended = self.how_it_ended();
        // What a process says last is read by a thread, which may be behind.
        thread::sleep(ended.as_ref().map_or(Duration::ZERO, |_| LAST_WORDS));
        let (console, errors) = (self.console.tail(), self.errors.tail());
        let stands_still = ended.is_none()
            && emulated_host::is_inside()
            && diagnosis::stands_still(self.process.id());
        let doing = ended.unwrap_or_else(|| diagnosis::of(self.process.id()));
        let text = format!(
            "the guest's console ended:\n{console}\n--- and nixvmm's standard error:\n{errors}\n\
             ---\n{doing}---"
        );
        error.context(Silence { text, stands_still })
    }

    /// The end of the process, which is left for [`Guest::end`] to collect; `None` while it runs.
    fn how_it_ended(&self) -> Option<String> {
        let pid = Pid::from_raw(i32::try_from(self.process.id()).ok()?)?;
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
        let status = waitid(WaitId::Pid(pid), options).ok()??;
        let (code, signal) = (status.exit_status(), status.terminating_signal());
        Some(format!("nixvmm has ended: status {code:?}, signal {signal:?}\n"))
    }

    fn exchange(&mut self, command: &str) -> Result<(i32, String)> {
        self.tell(command)?;
        self.console.wait_for(&format!("\nagent: done {} ", self.requests), self.patience)?;
        let line = self.console.wait_for("\n", self.patience)?;
        let (status, length) = line.trim().split_once(' ').context("half an answer")?;
        let output = self.console.wait_for_bytes(length.parse()?, self.patience)?;
        Ok((status.parse()?, String::from_utf8_lossy(&output).into_owned()))
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
