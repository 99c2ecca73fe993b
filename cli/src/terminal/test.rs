//! Signals and exits end a process, so that this program runs itself again on a pseudoterminal,
//! with the test `child` alone and what it shall do in the environment.

use std::fs::{File, OpenOptions};
use std::io::Read as _;
use std::os::unix::process::ExitStatusExt as _;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, WaitOptions, kill_process, setsid, waitpid};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};

use super::*;

const ACTION: &str = "NIXVMM_TEST_TERMINAL";

#[test]
#[ignore = "only in a child process"]
fn child() {
    let Ok(action) = std::env::var(ACTION) else { return };
    setsid().unwrap();
    rustix::process::ioctl_tiocsctty(stdin()).unwrap();
    let _terminal = RawTerminal::new().unwrap().unwrap();
    // The parent types a letter when it has seen the raw terminal.
    io::stdin().read_exact(&mut [0]).unwrap();
    match action.as_str() {
        "return" => {}
        "exit" => std::process::exit(0),
        "panic" => {
            let _ = std::thread::spawn(|| panic!("on purpose")).join();
            wait_for_ever();
        }
        "wait" => wait_for_ever(),
        other => panic!("{other}"),
    }
}

fn wait_for_ever() {
    let _ = io::stdin().read_exact(&mut [0]);
}

/// A child on a terminal of its own.
struct Raw {
    child: Child,
    keys: File,
    terminal: File,
    before: Termios,
}

impl Raw {
    /// Starts a child and waits until it has made its terminal raw.
    fn start(action: &str) -> Self {
        let keys = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        grantpt(&keys).unwrap();
        unlockpt(&keys).unwrap();
        let name = ptsname(&keys, Vec::new()).unwrap();
        let terminal =
            OpenOptions::new().read(true).write(true).open(name.to_str().unwrap()).unwrap();
        let before = tcgetattr(&terminal).unwrap();
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "terminal::test::child", "--ignored", "--nocapture"])
            .env(ACTION, action)
            .stdin(terminal.try_clone().unwrap())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let raw = Self { child, keys: File::from(keys), terminal, before };
        raw.wait_until(true);
        raw
    }

    fn is_raw(&self) -> bool {
        let modes = tcgetattr(&self.terminal).unwrap();
        assert!(modes.output_modes == self.before.output_modes, "output is processed as before");
        let raw = !modes.local_modes.intersects(LocalModes::ICANON | LocalModes::ISIG);
        assert!(raw || modes.local_modes == self.before.local_modes);
        assert!(raw || modes.input_modes == self.before.input_modes);
        raw
    }

    fn wait_until(&self, raw: bool) {
        while self.is_raw() != raw {
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn press(&mut self) {
        io::Write::write_all(&mut self.keys, b"x").unwrap();
    }

    fn signal(&self, signal: Signal) {
        kill_process(self.id(), signal).unwrap();
    }

    fn id(&self) -> Pid {
        Pid::from_child(&self.child)
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn the_terminal_is_as_before_after_a_return_and_an_exit() {
    for action in ["return", "exit"] {
        let mut raw = Raw::start(action);
        raw.press();
        assert!(raw.child.wait().unwrap().success());
        assert!(!raw.is_raw(), "{action}");
    }
}

#[test]
fn the_terminal_is_as_before_after_a_panic() {
    let mut raw = Raw::start("panic");
    raw.press();
    raw.wait_until(false);
}

#[test]
fn the_terminal_is_as_before_after_a_signal_and_the_signal_is_what_ends_the_process() {
    for signal in [Signal::TERM, Signal::INT, Signal::HUP, Signal::QUIT, Signal::ABORT] {
        let mut raw = Raw::start("wait");
        raw.signal(signal);
        assert_eq!(raw.child.wait().unwrap().signal(), Some(signal.as_raw()));
        assert!(!raw.is_raw(), "{signal:?}");
    }
}

#[test]
fn the_terminal_is_as_before_while_the_process_is_stopped() {
    let raw = Raw::start("wait");
    raw.signal(Signal::TSTP);
    let (_, status) = waitpid(Some(raw.id()), WaitOptions::UNTRACED).unwrap().unwrap();
    assert!(status.stopped());
    assert!(!raw.is_raw());
    raw.signal(Signal::CONT);
    raw.wait_until(true);
}

#[test]
fn standard_input_that_is_no_terminal_is_left_alone() {
    let status = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "terminal::test::no_terminal", "--ignored"])
        .env(ACTION, "")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .status()
        .unwrap();
    assert!(status.success());
}

#[test]
#[ignore = "only in a child process"]
fn no_terminal() {
    if std::env::var_os(ACTION).is_some() {
        assert!(RawTerminal::new().unwrap().is_none());
    }
}
