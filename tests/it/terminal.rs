//! What does a person find who starts `nixvmm` in a terminal? Its size, keys that end the machine,
//! and afterwards the terminal as it was.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::process::{Child, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::process::{Pid, Signal, kill_process};
use rustix::pty::OpenptFlags;
use rustix::termios::Winsize;
use tests::guest::{LONG_PATIENCE, Launch, PATIENCE};
use tests::terminal::Terminal;
use tests::testbed::Testbed;

use crate::GuestTest;

pub(crate) const TESTS: &[GuestTest] = &[(
    "terminal::the_guest_follows_its_size_and_ctrl_a_x_ends_the_machine_and_leaves_it_as_it_was",
    size_keys_and_modes,
)];

/// How often a process is asked whether it has ended.
const POLL: Duration = Duration::from_millis(20);

/// What `nixvmm` ends with when it is told to end at once.
const KILLED: i32 = 6;

fn size_keys_and_modes(testbed: &Testbed) -> Result<()> {
    let (user, program) = new_terminal()?;
    let before = format!("{:?}", rustix::termios::tcgetattr(&program)?);
    resize(&user, 100, 40)?;
    let mut command = Launch::tiny(testbed, &testbed.bzimage).into_command();
    command.stdin(Stdio::from(program.try_clone()?)).stdout(Stdio::from(program.try_clone()?));
    let mut process = Process(command.spawn().context("nixvmm cannot be started")?);

    let mut terminal = Terminal::new(user.try_clone()?, Some(user.try_clone()?));
    expect(&mut terminal, "agent: ready", LONG_PATIENCE)?;
    terminal.write("run 1 stty size < /dev/hvc0\n")?;
    expect(&mut terminal, "40 100", PATIENCE)?;
    resize(&user, 120, 50)?;
    // As the kernel does it for the process that the terminal controls.
    kill_process(process.id()?, Signal::WINCH)?;
    terminal.write(
        "run 2 while [ \"$(stty size < /dev/hvc0)\" != '50 120' ]; do sleep 0.1; done; true\n",
    )?;
    expect(&mut terminal, "agent: done 2 0", PATIENCE)?;

    terminal.write("\x01h")?;
    expect(&mut terminal, "Ctrl-A x", PATIENCE)?;
    terminal.write("\x01x")?;
    let status = status(&mut process.0)?;
    ensure!(status.code() == Some(KILLED), "nixvmm ended with {status}");
    let after = format!("{:?}", rustix::termios::tcgetattr(&program)?);
    ensure!(before == after, "the terminal is not as it was: {before} {after}");
    Ok(())
}

/// Waits for what the terminal shows; the error has what it showed.
fn expect(terminal: &mut Terminal, pattern: &str, limit: Duration) -> Result<()> {
    match terminal.wait_for(pattern, limit) {
        Ok(_) => Ok(()),
        Err(error) => Err(error.context(format!("the terminal shows:\n{}", terminal.tail()))),
    }
}

/// A terminal: the end of its user, and that of a program.
fn new_terminal() -> Result<(File, OwnedFd)> {
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let user = rustix::pty::openpt(flags)?;
    rustix::pty::unlockpt(&user)?;
    let program = rustix::pty::ioctl_tiocgptpeer(&user, flags)?;
    Ok((user.into(), program))
}

fn resize(terminal: &File, columns: u16, rows: u16) -> Result<()> {
    let size = Winsize { ws_col: columns, ws_row: rows, ws_xpixel: 0, ws_ypixel: 0 };
    rustix::termios::tcsetwinsize(terminal, size).context("the terminal has no size")
}

/// A `nixvmm` that is killed when dropped.
struct Process(Child);

impl Process {
    fn id(&self) -> Result<Pid> {
        Pid::from_raw(i32::try_from(self.0.id())?).context("a process id is not 0")
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Waits for the end of a process.
fn status(process: &mut Child) -> Result<ExitStatus> {
    let end = Instant::now() + LONG_PATIENCE;
    loop {
        match process.try_wait()? {
            Some(status) => return Ok(status),
            None => ensure!(Instant::now() < end, "nixvmm goes on"),
        }
        thread::sleep(POLL);
    }
}
