//! The last words of a process that made a forbidden system call.

use std::cell::Cell;
use std::io;
use std::sync::OnceLock;

use anyhow::{Context as _, Result};
use rustix::stdio::stderr;

use super::ThreadKind;
use super::names;

/// What is done before a forbidden system call ends the process.
#[derive(Clone, Copy, Debug)]
pub struct LastWords {
    /// How a line of standard error begins.
    pub prefix: &'static str,
    /// Puts the terminal back. Must be async-signal-safe.
    pub restore: fn(),
}

static LAST_WORDS: OnceLock<LastWords> = OnceLock::new();

/// Sets what is done before a forbidden system call ends the process. The first call counts.
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

/// Names a forbidden system call on standard error, and ends the process by SIGSYS.
pub(super) fn handle() -> Result<()> {
    // SAFETY: all zeroes is a sigaction without flags and with an empty mask.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = refuse as *const () as libc::sighandler_t;
    // Reset and not blocked: the next forbidden call of any thread meets the default action.
    action.sa_flags = libc::SA_SIGINFO | libc::SA_RESETHAND | libc::SA_NODEFER;
    // SAFETY: `action` is valid, and `refuse` makes async-signal-safe calls only.
    match unsafe { libc::sigaction(libc::SIGSYS, &raw const action, std::ptr::null_mut()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()).context("cannot handle SIGSYS"),
    }
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
    let words = LAST_WORDS.get();
    let mut line = Line::default();
    line.push(words.map_or("", |words| words.prefix));
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
    line.push(") on a thread of kind ");
    line.push(KIND.get().map_or("other", ThreadKind::name));
    line.push(": this is a bug or an attack, the process ends\n");
    let _ = rustix::io::write(stderr(), line.bytes());
    if let Some(words) = words {
        (words.restore)();
    }
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
        Self { bytes: [0; 256], length: 0 }
    }
}

impl Line {
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
