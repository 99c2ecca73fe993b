//! The size of the terminal that a process was started in.
#![expect(unsafe_code, reason = "signalfd has no safe face")]

use std::io;
use std::os::fd::{FromRawFd, OwnedFd};

use super::WindowSize;
use super::descriptor::Descriptor;
use super::endpoint::Window;

/// A terminal whose changes of size arrive as SIGWINCH.
pub(super) struct Terminal {
    file: OwnedFd,
    signal: Descriptor,
}

impl Terminal {
    /// Follows the size of the terminal `file`.
    ///
    /// SIGWINCH is blocked in this thread and in those that it starts later.
    pub(super) fn new(file: OwnedFd) -> io::Result<Self> {
        let signals =
            vmm_sys_util::signal::create_sigset(&[libc::SIGWINCH]).map_err(io::Error::from)?;
        // A signal that is blocked already is as good.
        let _ = vmm_sys_util::signal::block_signal(libc::SIGWINCH);
        // SAFETY: the set is initialised and the call makes a new file.
        let signal =
            unsafe { libc::signalfd(-1, &signals, libc::SFD_NONBLOCK | libc::SFD_CLOEXEC) };
        if signal < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the file was just opened and nobody else knows it.
        let signal = Descriptor::non_blocking(unsafe { OwnedFd::from_raw_fd(signal) });
        Ok(Self { file, signal })
    }
}

impl Window for Terminal {
    fn announcer(&self) -> &Descriptor {
        &self.signal
    }

    fn size(&mut self) -> WindowSize {
        let mut signals = [0; size_of::<libc::signalfd_siginfo>()];
        while self.signal.read(&mut signals).is_ok_and(|count| count > 0) {}
        let size = rustix::termios::tcgetwinsize(&self.file);
        size.map_or(WindowSize::default(), |size| WindowSize {
            columns: size.ws_col,
            rows: size.ws_row,
        })
    }
}

#[cfg(test)]
mod test {
    use std::os::fd::AsFd;
    use std::sync::mpsc::channel;

    use rustix::pty::OpenptFlags;
    use rustix::termios::Winsize;

    use super::super::{Stream, WindowSize};
    use crate::event::EventLoop;

    #[test]
    fn a_new_size_of_the_terminal_is_announced_once() {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY;
        let user = rustix::pty::openpt(flags).unwrap();
        rustix::pty::unlockpt(&user).unwrap();
        let program = rustix::pty::ioctl_tiocgptpeer(&user, flags).unwrap();
        let resize = |columns, rows| {
            let size = Winsize { ws_col: columns, ws_row: rows, ws_xpixel: 0, ws_ypixel: 0 };
            rustix::termios::tcsetwinsize(&user, size).unwrap();
            // To this thread alone: others run other tests.
            // SAFETY: a process ignores the signal unless it asked for it.
            assert_eq!(unsafe { libc::raise(libc::SIGWINCH) }, 0);
        };
        resize(80, 25);
        let mut event_loop = EventLoop::new().unwrap();
        let (input, output) = (program.as_fd(), program.as_fd());
        let stream = Stream::inherited(&mut event_loop, input, output, Box::new(|| ())).unwrap();
        assert_eq!(stream.window_size(), WindowSize { columns: 80, rows: 25 });
        let (sender, announced) = channel();
        stream.on_resize(Box::new(move || sender.send(()).unwrap()));
        for _ in 0..2 {
            resize(132, 43);
            event_loop.run_ready().unwrap();
            assert_eq!(stream.window_size(), WindowSize { columns: 132, rows: 43 });
        }
        assert_eq!(announced.try_iter().count(), 1);
    }
}
