//! Files that are read and written without waiting, and without a trace for those who share them.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::{FileType, Mode, OFlags};
use rustix::net::{RecvFlags, SendFlags};

/// What a file that polls as writable takes at least without waiting, where we cannot tell it not
/// to.
const CAUTIOUS_WRITE_BYTES: usize = 512;

/// An open file with the way to use it without waiting.
pub(super) struct Descriptor {
    file: OwnedFd,
    kind: Kind,
}

/// How to avoid waiting. O_NONBLOCK is only ever set on file descriptions of our own: the one of a
/// terminal is shared with the shell, which would find it changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// Our own file description in non-blocking mode.
    NonBlocking,
    /// A socket: it takes a flag with each call.
    Socket,
    /// Never lets us wait, like a regular file, and cannot be polled.
    Immediate,
    /// Asked before each call whether it is ready.
    Polled,
}

impl Descriptor {
    /// Takes a file that we opened with O_NONBLOCK.
    pub(super) fn own(file: impl Into<OwnedFd>) -> io::Result<Self> {
        let file = file.into();
        let kind = if is_pollable(&file)? { Kind::NonBlocking } else { Kind::Immediate };
        Ok(Self { file, kind })
    }

    /// Takes an open file in non-blocking mode that can be polled.
    pub(super) fn non_blocking(file: OwnedFd) -> Self {
        Self { file, kind: Kind::NonBlocking }
    }

    /// Takes a socket, in whatever mode it is.
    pub(super) fn socket(file: impl Into<OwnedFd>) -> Self {
        Self { file: file.into(), kind: Kind::Socket }
    }

    /// Makes a descriptor from an inherited one, to be used for `access`, which is left as it is.
    pub(super) fn inherit(file: BorrowedFd<'_>, access: OFlags) -> io::Result<Self> {
        if !is_pollable(file)? {
            return Ok(Self { file: file.try_clone_to_owned()?, kind: Kind::Immediate });
        }
        if FileType::from_raw_mode(rustix::fs::fstat(file)?.st_mode) == FileType::Socket {
            return Ok(Self::socket(file.try_clone_to_owned()?));
        }
        // Opening anew gives a pipe or terminal a second file description with its own flags.
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        let flags = access | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        match rustix::fs::open(path, flags, Mode::empty()) {
            Ok(file) => Ok(Self { file, kind: Kind::NonBlocking }),
            Err(_) => Ok(Self { file: file.try_clone_to_owned()?, kind: Kind::Polled }),
        }
    }

    /// The same open file under another number.
    pub(super) fn try_clone(&self) -> io::Result<Self> {
        Ok(Self { file: self.file.try_clone()?, kind: self.kind })
    }

    /// Whether an event loop can watch the file.
    pub(super) fn is_pollable(&self) -> bool {
        self.kind != Kind::Immediate
    }

    /// Reads what there is; zero bytes are the end.
    pub(super) fn read(&self, target: &mut [u8]) -> io::Result<usize> {
        let count = retry(|| match self.kind {
            Kind::NonBlocking | Kind::Immediate => rustix::io::read(&self.file, &mut *target),
            Kind::Socket => {
                rustix::net::recv(&self.file, &mut *target, RecvFlags::DONTWAIT).map(|(n, _)| n)
            }
            Kind::Polled => {
                self.expect_ready(PollFlags::IN)?;
                rustix::io::read(&self.file, &mut *target)
            }
        })?;
        Ok(count)
    }

    /// Writes as much as goes without waiting.
    pub(super) fn write(&self, source: &[u8]) -> io::Result<usize> {
        let count = retry(|| match self.kind {
            Kind::NonBlocking | Kind::Immediate => rustix::io::write(&self.file, source),
            Kind::Socket => {
                let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
                rustix::net::send(&self.file, source, flags)
            }
            Kind::Polled => {
                self.expect_ready(PollFlags::OUT)?;
                let len = source.len().min(CAUTIOUS_WRITE_BYTES);
                rustix::io::write(&self.file, source.get(..len).unwrap_or(source))
            }
        })?;
        Ok(count)
    }

    /// Waits until the file can be written, at most for `timeout`; says whether it can.
    pub(super) fn wait_writable(&self, timeout: &Timespec) -> bool {
        let mut files = [PollFd::new(&self.file, PollFlags::OUT)];
        !self.is_pollable() || rustix::event::poll(&mut files, Some(timeout)).is_ok_and(|n| n > 0)
    }

    /// Whether the other side is gone for good.
    pub(super) fn is_hung_up(&self) -> bool {
        let mut files = [PollFd::new(&self.file, PollFlags::empty())];
        let polled = retry(|| rustix::event::poll(&mut files, Some(&Timespec::default())));
        polled.is_ok() && files.iter().any(|file| file.revents().contains(PollFlags::HUP))
    }

    fn expect_ready(&self, wish: PollFlags) -> Result<(), rustix::io::Errno> {
        let mut files = [PollFd::new(&self.file, wish)];
        match rustix::event::poll(&mut files, Some(&Timespec::default()))? {
            0 => Err(rustix::io::Errno::AGAIN),
            _ => Ok(()),
        }
    }
}

impl AsRawFd for Descriptor {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

impl AsFd for Descriptor {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Whether epoll takes such a file: pipes, sockets and terminals; files and the like are always
/// ready.
fn is_pollable(file: impl AsFd) -> io::Result<bool> {
    Ok(match FileType::from_raw_mode(rustix::fs::fstat(&file)?.st_mode) {
        FileType::Fifo | FileType::Socket => true,
        FileType::CharacterDevice => rustix::termios::isatty(&file),
        _ => false,
    })
}

fn retry<T>(
    mut call: impl FnMut() -> Result<T, rustix::io::Errno>,
) -> Result<T, rustix::io::Errno> {
    loop {
        match call() {
            Err(rustix::io::Errno::INTR) => {}
            outcome => return outcome,
        }
    }
}
