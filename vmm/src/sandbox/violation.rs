//! The last words of a process that made a forbidden system call or touched memory that is not
//! there.

use std::cell::Cell;
use std::io;
use std::sync::OnceLock;

use anyhow::{Context as _, Result};
use rustix::stdio::stderr;

use super::ThreadKind;
use super::names;

/// What is done before a forbidden system call or a wrong access ends the process.
#[derive(Clone, Copy, Debug)]
pub struct LastWords {
    /// How a line of standard error begins.
    pub prefix: &'static str,
    /// Puts the terminal back. Must be async-signal-safe.
    pub restore: fn(),
}

static LAST_WORDS: OnceLock<LastWords> = OnceLock::new();

/// Sets what is done before such an end. The first call counts.
pub fn set_last_words(words: LastWords) {
    let _ = LAST_WORDS.set(words);
}

thread_local! {
    /// No destructor and no lazy start, so that a signal handler may read it.
    static KIND: Cell<Option<ThreadKind>> = const { Cell::new(None) };
}

/// Tells the handler what the calling thread is.
pub(super) fn name_thread(kind: ThreadKind) {
    KIND.set(Some(kind));
}

/// Names a forbidden system call or a wrong access on standard error, and ends the process by
/// SIGSYS, or by the signal of the access.
pub(super) fn handle() -> Result<()> {
    // Not blocked: the next forbidden call of any thread meets the default action.
    handle_signal(libc::SIGSYS, refuse as *const (), libc::SA_NODEFER)?;
    // The runtime's own handlers need a system call that no thread may make.
    for signal in [libc::SIGSEGV, libc::SIGBUS] {
        handle_signal(signal, report_access as *const (), libc::SA_ONSTACK)?;
    }
    Ok(())
}

/// The action is reset when the signal comes, so that the second one kills.
fn handle_signal(signal: libc::c_int, handler: *const (), flags: libc::c_int) -> Result<()> {
    // SAFETY: all zeroes is a sigaction without flags and with an empty mask.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = handler as libc::sighandler_t;
    action.sa_flags = libc::SA_SIGINFO | libc::SA_RESETHAND | flags;
    // SAFETY: `action` is valid, and both handlers make async-signal-safe calls only.
    match unsafe { libc::sigaction(signal, &raw const action, std::ptr::null_mut()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()).context("cannot handle signals of the sandbox"),
    }
}

/// Returns to the access, which is made again and ends the process.
extern "C" fn report_access(
    signal: libc::c_int,
    info: *const libc::siginfo_t,
    _: *const libc::ucontext_t,
) {
    // SAFETY: the kernel gives a siginfo_t, which for these signals has an address.
    let address = unsafe { (*info).si_addr() };
    let mut line = Line::default();
    line.push(if signal == libc::SIGBUS { "no memory is behind 0x" } else { "no access to 0x" });
    line.push_number(address.addr() as u64, 16);
    line.finish(": this is a bug, the process ends\n");
}

/// The part of siginfo_t that SIGSYS fills (sigaction(2)); libc has no names for it.
#[repr(C)]
struct Refusal {
    signal: libc::c_int,
    error: libc::c_int,
    code: libc::c_int,
    address: *const libc::c_void,
    number: libc::c_int,
    architecture: libc::c_uint,
}

extern "C" fn refuse(
    _: libc::c_int,
    info: *const libc::siginfo_t,
    context: *const libc::ucontext_t,
) {
    // SAFETY: the kernel gives a siginfo_t, which for SIGSYS begins with these fields.
    let number = unsafe { (*info.cast::<Refusal>()).number };
    let mut line = Line::default();
    line.push("the sandbox refuses system call ");
    line.push_number(number.unsigned_abs().into(), 10);
    line.push(" (");
    line.push(names::name(number.into()).unwrap_or("unknown"));
    // SAFETY: the kernel gives the context in which the signal arrived.
    if let Some(argument) = second_argument(unsafe { &*context })
        && matches!(number.into(), libc::SYS_ioctl | libc::SYS_fcntl)
    {
        line.push(" 0x");
        line.push_number(argument & u64::from(u32::MAX), 16);
    }
    line.push(")");
    line.finish(": this is a bug or an attack, the process ends\n");
    // SAFETY: no kind of thread may make this call, and it changes nothing. The second refusal
    // kills.
    unsafe {
        libc::syscall(libc::SYS_getppid);
        libc::_exit(128 + libc::SIGSYS);
    }
}

/// The request of an ioctl or the command of an fcntl.
#[cfg(target_arch = "x86_64")]
fn second_argument(context: &libc::ucontext_t) -> Option<u64> {
    let register = usize::try_from(libc::REG_RSI).ok()?;
    context.uc_mcontext.gregs.get(register).map(|value| value.cast_unsigned())
}

/// A line that needs no memory but its own.
struct Line {
    bytes: [u8; 256],
    length: usize,
}

impl Default for Line {
    fn default() -> Self {
        let mut line = Self { bytes: [0; 256], length: 0 };
        line.push(LAST_WORDS.get().map_or("", |words| words.prefix));
        line
    }
}

impl Line {
    /// Names the thread, writes the line to standard error and puts the terminal back.
    fn finish(mut self, end: &str) {
        self.push(" on a thread of kind ");
        self.push(KIND.get().map_or("other", ThreadKind::name));
        self.push(end);
        let _ = rustix::io::write(stderr(), self.bytes());
        if let Some(words) = LAST_WORDS.get() {
            (words.restore)();
        }
    }

    fn push(&mut self, text: &str) {
        for byte in text.bytes() {
            if let Some(place) = self.bytes.get_mut(self.length) {
                *place = byte;
                self.length += 1;
            }
        }
    }

    fn push_number(&mut self, number: u64, base: u64) {
        if number >= base {
            self.push_number(number / base, base);
        }
        let digits = "0123456789abcdef";
        let digit = usize::try_from(number % base).unwrap_or_default();
        self.push(digits.get(digit..=digit).unwrap_or_default());
    }

    fn bytes(&self) -> &[u8] {
        self.bytes.get(..self.length).unwrap_or_default()
    }
}
