//! The terminal on standard input: raw while a guest has it, as it was whenever we leave.
#![expect(unsafe_code, reason = "signal handlers, so that no way to end leaves the terminal raw")]

use std::io::{self, IsTerminal as _};
use std::sync::OnceLock;

use libc::c_int;
use rustix::process::{Pid, getpgrp};
use rustix::stdio::stdin;
use rustix::termios::{
    InputModes, LocalModes, OptionalActions, SpecialCodeIndex, Termios, tcgetattr, tcgetpgrp,
    tcsetattr,
};

/// Signals that end the process unless somebody else takes them: it leaves in order first.
const ENDING: [c_int; 5] =
    [libc::SIGHUP, libc::SIGINT, libc::SIGQUIT, libc::SIGABRT, libc::SIGTERM];

/// How the terminal was, and how the guest needs it.
struct Modes {
    before: Termios,
    raw: Termios,
    /// The process group, which a shell sets before the program starts.
    group: Pid,
}

static MODES: OnceLock<Modes> = OnceLock::new();

/// The raw terminal; dropped, the terminal is as it was before.
#[derive(Debug)]
pub(crate) struct RawTerminal(());

impl RawTerminal {
    /// Passes every key on standard input to the guest, interrupts too. `None` where standard input
    /// is no terminal.
    ///
    /// Output keeps its processing, so that log lines end where they should.
    pub(crate) fn new() -> io::Result<Option<Self>> {
        if !io::stdin().is_terminal() {
            return Ok(None);
        }
        let before = tcgetattr(stdin())?;
        let raw = raw(before.clone());
        let modes = MODES.get_or_init(|| Modes { before, raw, group: getpgrp() });
        restore_at_every_end()?;
        tcsetattr(stdin(), OptionalActions::Now, &modes.raw)?;
        Ok(Some(Self(())))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        restore();
    }
}

fn raw(mut modes: Termios) -> Termios {
    modes.input_modes -= InputModes::IGNBRK
        | InputModes::BRKINT
        | InputModes::PARMRK
        | InputModes::ISTRIP
        | InputModes::INLCR
        | InputModes::IGNCR
        | InputModes::ICRNL
        | InputModes::IXON;
    modes.local_modes -= LocalModes::ECHO
        | LocalModes::ECHONL
        | LocalModes::ICANON
        | LocalModes::ISIG
        | LocalModes::IEXTEN;
    modes.special_codes[SpecialCodeIndex::VMIN] = 1;
    modes.special_codes[SpecialCodeIndex::VTIME] = 0;
    modes
}

/// Covers exit(), panics and signals. Threads of the machine block these signals, so that handlers
/// run on the main thread, whose system call filter knows what they do.
fn restore_at_every_end() -> io::Result<()> {
    // SAFETY: the function is safe to call at any time and lives as long as the process.
    if unsafe { libc::atexit(restore_at_exit) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        restore();
        report(panic);
    }));
    for signal in ENDING {
        handle(signal, end, libc::SA_RESETHAND)?;
    }
    handle(libc::SIGTSTP, stop, libc::SA_RESTART)?;
    handle(libc::SIGCONT, go_on, libc::SA_RESTART)
}

fn handle(signal: c_int, handler: extern "C" fn(c_int), flags: c_int) -> io::Result<()> {
    // SAFETY: all zeroes is a sigaction without flags and with an empty mask.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = handler as *const () as libc::sighandler_t;
    action.sa_flags = flags;
    // SAFETY: `action` is valid, and each handler here makes async-signal-safe calls only.
    match unsafe { libc::sigaction(signal, &raw const action, std::ptr::null_mut()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Puts the terminal back. Async-signal-safe: one atomic load and one system call.
pub(crate) fn restore() {
    if let Some(modes) = MODES.get() {
        // The terminal may be gone, and then there is nothing to restore.
        let _ = tcsetattr(stdin(), OptionalActions::Now, &modes.before);
    }
}

extern "C" fn restore_at_exit() {
    restore();
}

/// The default action is back (SA_RESETHAND) and follows as soon as this handler returns.
extern "C" fn end(signal: c_int) {
    restore();
    raise(signal);
}

/// Ctrl-Z goes to the guest; this stop was asked for from outside.
extern "C" fn stop(_signal: c_int) {
    restore();
    raise(libc::SIGSTOP);
}

/// In the background the terminal is another's; the shell sends this signal again when it is ours.
extern "C" fn go_on(_signal: c_int) {
    if let Some(modes) = MODES.get()
        && tcgetpgrp(stdin()).is_ok_and(|group| group == modes.group)
    {
        let _ = tcsetattr(stdin(), OptionalActions::Now, &modes.raw);
    }
}

fn raise(signal: c_int) {
    // SAFETY: raise(3) is async-signal-safe and takes any number.
    unsafe { libc::raise(signal) };
}

#[cfg(test)]
mod test;
