//! The size of the terminal that a process was started in.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use super::WindowSize;
use super::endpoint::Window;
use crate::host::signals::Signals;

/// A terminal whose changes of size arrive as SIGWINCH.
pub(super) struct Terminal {
    file: OwnedFd,
    signals: Signals,
}

impl Terminal {
    /// Follows the size of the terminal `file`.
    ///
    /// SIGWINCH is blocked in this thread and in those that it starts later.
    pub(super) fn new(file: OwnedFd) -> io::Result<Self> {
        Ok(Self { file, signals: Signals::block(&[libc::SIGWINCH])? })
    }
}

impl AsRawFd for Terminal {
    fn as_raw_fd(&self) -> RawFd {
        self.signals.as_raw_fd()
    }
}

impl Window for Terminal {
    fn size(&mut self) -> WindowSize {
        while self.signals.take().is_some() {}
        let size = rustix::termios::tcgetwinsize(&self.file);
        size.map_or(WindowSize::default(), |size| WindowSize {
            columns: size.ws_col,
            rows: size.ws_row,
        })
    }
}

#[cfg(test)]
#[expect(unsafe_code, reason = "raises a signal")]
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
