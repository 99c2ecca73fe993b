//! Signals of this process as a file that an event loop can watch.
#![expect(unsafe_code, reason = "no safe interface blocks signals or makes a signalfd")]

use std::fs::File;
use std::io::{self, Read as _};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, FromRawFd as _, OwnedFd, RawFd};
use std::ptr;

/// The signals that ask the process to end: by systemd, by the terminal's keys, by its hang-up.
pub const END_REQUESTS: [i32; 3] = [libc::SIGTERM, libc::SIGINT, libc::SIGHUP];

/// Blocked signals, to be read one by one.
pub struct Signals(File);

impl Signals {
    /// Blocks `signals` in this thread and in the threads that it makes from now on.
    pub fn block(signals: &[i32]) -> io::Result<Self> {
        let mut set = MaybeUninit::uninit();
        // SAFETY: sigemptyset initialises the set, and the other calls are given valid pointers.
        let descriptor = unsafe {
            libc::sigemptyset(set.as_mut_ptr());
            for signal in signals {
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
}
