//! A guest's console on this terminal.

use std::io::{self, IsTerminal as _, Read, Write};
use std::os::unix::net::UnixStream;

use anyhow::{Context as _, Result};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::stdio::{stdin, stdout};
use rustix::termios::tcgetwinsize;
use serde_json::json;
use vmm::control::{EscapeAction, EscapeKeys};

use super::connection::Connection;
use crate::terminal::RawTerminal;

/// Bytes moved at once.
const COPY_BYTES: usize = 4096;

/// What `Ctrl-A h` shows.
const HELP: &[u8] = b"\r\n\
    Ctrl-A h    this help\r\n\
    Ctrl-A x    leave; the guest goes on\r\n\
    Ctrl-A a    send Ctrl-A to the guest (so does Ctrl-A Ctrl-A)\r\n";

/// What comes next after something has been typed.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Typing {
    GoesOn,
    Ends,
    Leaves,
}

/// Connects standard input and output with the console until the user leaves or the machine ends.
/// Where standard input is no terminal, its end is not the end of the output.
pub(super) fn attach(connection: Connection, serial: bool) -> Result<()> {
    let size = tcgetwinsize(stdout()).ok();
    let (socket, early) = connection.upgrade(
        "AttachConsole",
        &json!({
            "console": serial.then_some("serial"),
            "columns": size.map(|size| size.ws_col),
            "rows": size.map(|size| size.ws_row),
        }),
    )?;
    let terminal = RawTerminal::new().context("cannot make the terminal raw")?;
    let mut keys = io::stdin().is_terminal().then(EscapeKeys::default);
    if terminal.is_some() {
        eprintln!("nixvmm: Ctrl-A x leaves the console, and the guest goes on");
    }
    show(&early)?;
    let mut typing = Typing::GoesOn;
    while typing != Typing::Leaves {
        let mut files =
            [PollFd::new(&socket, PollFlags::IN), PollFd::from_borrowed_fd(stdin(), PollFlags::IN)];
        // Input that has ended would wake us again and again.
        let watched = if typing == Typing::GoesOn { 2 } else { 1 };
        match poll(files.get_mut(..watched).unwrap_or_default(), None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let [from_guest, from_user] = files.map(|file| !file.revents().is_empty());
        if from_guest && !print_some(&socket)? {
            break;
        }
        if from_user {
            typing = type_some(&socket, &mut keys)?;
        }
    }
    Ok(())
}

/// Shows what the guest has written; says whether the machine is still there.
fn print_some(mut socket: &UnixStream) -> Result<bool> {
    let mut bytes = [0; COPY_BYTES];
    let count = socket.read(&mut bytes).unwrap_or(0);
    show(bytes.get(..count).unwrap_or_default())?;
    Ok(count > 0)
}

/// Sends what has been typed, but for the escape keys.
fn type_some(mut socket: &UnixStream, keys: &mut Option<EscapeKeys>) -> Result<Typing> {
    let mut bytes = [0; COPY_BYTES];
    let count = match rustix::io::read(stdin(), &mut bytes) {
        Ok(0) | Err(Errno::IO) => return Ok(Typing::Ends),
        Ok(count) => count,
        Err(Errno::INTR | Errno::AGAIN) => return Ok(Typing::GoesOn),
        Err(error) => return Err(error.into()),
    };
    let typed = bytes.get_mut(..count).unwrap_or_default();
    let (mut kept, mut leaves, mut wants_help) = (typed.len(), false, false);
    if let Some(keys) = keys {
        kept = keys.filter(typed, |action| match action {
            EscapeAction::Quit => leaves = true,
            EscapeAction::Help => wants_help = true,
        });
    }
    if wants_help {
        show(HELP)?;
    }
    let sent = socket.write_all(typed.get(..kept).unwrap_or_default());
    // A machine that has ended says so where its output is read.
    Ok(if leaves || sent.is_err() { Typing::Leaves } else { Typing::GoesOn })
}

fn show(bytes: &[u8]) -> io::Result<()> {
    let mut output = io::stdout().lock();
    output.write_all(bytes)?;
    output.flush()
}
