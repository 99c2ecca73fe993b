//! Signals of this process as a file that an event loop can watch.
#![expect(unsafe_code, reason = "no safe interface blocks signals or makes a signalfd")]

use std::fs::File;
use std::io::{self, Read as _};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, FromRawFd as _, OwnedFd, RawFd};
use std::ptr;

/// `machinectl poweroff` sends SIGRTMIN+4, as it counts with glibc, whatever this is built with.
const MACHINE_POWEROFF: i32 = 34 + 4;

/// The signals that ask the process to end: by systemd, by the terminal's keys, by its hang-up, by
/// machinectl(1).
pub const END_REQUESTS: [i32; 4] = [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, MACHINE_POWEROFF];

/// The signal that tells that disk images may have a new size.
pub const IMAGES_CHANGED: i32 = libc::SIGUSR1;

/// Blocked signals, to be read one by one.
pub struct Signals(File);

impl Signals {
    /// Blocks `signals` in this thread and in the threads that it makes from now on.
    ///
    /// Those that whoever started this process has it ignore, as nohup(1) does, stay ignored.
    pub fn block(signals: &[i32]) -> io::Result<Self> {
        let mut set = MaybeUninit::uninit();
        // SAFETY: sigemptyset initialises the set, and the other calls are given valid pointers.
        let descriptor = unsafe {
            libc::sigemptyset(set.as_mut_ptr());
            for signal in signals.iter().filter(|signal| !is_ignored(**signal)) {
                libc::sigaddset(set.as_mut_ptr(), *signal);
            }
            let error = libc::pthread_sigmask(libc::SIG_BLOCK, set.as_ptr(), ptr::null_mut());
            if error != 0 {
                return Err(io::Error::from_raw_os_error(error));
            }
            libc::signalfd(-1, set.as_ptr(), libc::SFD_NONBLOCK | libc::SFD_CLOEXEC)
        };
        if descriptor < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor is open and nobody else's.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(descriptor) }.into()))
    }

    /// Takes the number of the next signal, if one is pending.
    pub fn take(&self) -> Option<i32> {
        // The kernel's structure starts with the signal's number.
        let mut information = [0; size_of::<libc::signalfd_siginfo>()];
        (&self.0).read_exact(&mut information).ok()?;
        let number = information.first_chunk().map(|bytes| i32::from_ne_bytes(*bytes))?;
        Some(number)
    }
}

impl AsRawFd for Signals {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

fn is_ignored(signal: i32) -> bool {
    let mut action = MaybeUninit::<libc::sigaction>::uninit();
    // SAFETY: without a new action this only fills the old one, which is read if it has been
    // filled.
    unsafe {
        libc::sigaction(signal, ptr::null(), action.as_mut_ptr()) == 0
            && action.assume_init().sa_sigaction == libc::SIG_IGN
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn a_blocked_signal_is_read_once() {
        let signals = Signals::block(&[libc::SIGUSR2]).unwrap();
        assert_eq!(signals.take(), None);
        // SAFETY: raises a signal that this thread blocks.
        unsafe { libc::raise(libc::SIGUSR2) };
        assert_eq!(signals.take(), Some(libc::SIGUSR2));
        assert_eq!(signals.take(), None);
    }

    #[test]
    #[cfg(target_env = "gnu")]
    fn machinectls_signal_has_the_number_that_glibc_gives_it() {
        assert_eq!(MACHINE_POWEROFF, libc::SIGRTMIN() + 4);
    }

    #[test]
    fn an_ignored_signal_stays_ignored() {
        // SAFETY: ignoring a signal that no other test uses runs no handler.
        unsafe { libc::signal(libc::SIGURG, libc::SIG_IGN) };
        let signals = Signals::block(&[libc::SIGURG]).unwrap();
        // SAFETY: raises a signal that is ignored.
        unsafe { libc::raise(libc::SIGURG) };
        assert_eq!(signals.take(), None);
    }
}
