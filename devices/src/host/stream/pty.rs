//! A pseudoterminal that programs may open and close.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use rustix::fs::inotify;
use rustix::pty::OpenptFlags;
use rustix::termios::OptionalActions;

use super::descriptor::Descriptor;
use super::endpoint::{Arrivals, Endpoint, Peer};
use super::{Reader, Shared, Stream};
use crate::event::EventLoop;

impl Stream {
    /// A stream to a new pseudoterminal in raw mode, and the path under which others open it.
    ///
    /// `link` becomes a symbolic link to that path until the stream is dropped; one that is there
    /// already is replaced. While nobody has the pseudoterminal open, the last output is kept for
    /// who opens it next.
    pub fn pty(event_loop: &mut EventLoop, link: Option<&Path>) -> io::Result<(Self, PathBuf)> {
        let mut programs = Programs::new()?;
        let path = programs.path.clone();
        if let Some(link) = link {
            replace_link(&path, link)?;
            programs.link = Some(link.into());
        }
        let stream = Self::start(Shared::new(Reader::Absent)?, event_loop, |shared| {
            Endpoint::new(path.display().to_string(), shared).with_arrivals(programs)
        })?;
        Ok((stream, path))
    }
}

/// The programs that open our pseudoterminal.
struct Programs {
    terminal: Descriptor,
    path: PathBuf,
    link: Option<PathBuf>,
    /// Tells that somebody has opened the pseudoterminal, which it does not tell by itself.
    opened: Descriptor,
}

impl Programs {
    fn new() -> io::Result<Self> {
        let flags = OpenptFlags::RDWR
            | OpenptFlags::NOCTTY
            | OpenptFlags::CLOEXEC
            | OpenptFlags::from_bits_retain(rustix::fs::OFlags::NONBLOCK.bits());
        let terminal = rustix::pty::openpt(flags)?;
        rustix::pty::unlockpt(&terminal)?;
        let name = rustix::pty::ptsname(&terminal, Vec::new())?;
        let path = PathBuf::from(OsString::from_vec(name.into_bytes()));
        let opened = inotify::init(inotify::CreateFlags::NONBLOCK | inotify::CreateFlags::CLOEXEC)?;
        inotify::add_watch(&opened, &path, inotify::WatchFlags::OPEN)?;
        // Only a side that was open once reports that it is closed.
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        drop(rustix::pty::ioctl_tiocgptpeer(&terminal, flags)?);
        let terminal = Descriptor::own(terminal)?;
        let opened = Descriptor::non_blocking(opened);
        let programs = Self { terminal, path, link: None, opened };
        programs.set_raw()?;
        Ok(programs)
    }

    /// Passes every byte as it is, until a program wants something else.
    fn set_raw(&self) -> io::Result<()> {
        let mut modes = rustix::termios::tcgetattr(&self.terminal)?;
        modes.make_raw();
        Ok(rustix::termios::tcsetattr(&self.terminal, OptionalActions::Now, &modes)?)
    }
}

impl AsRawFd for Programs {
    fn as_raw_fd(&self) -> RawFd {
        self.opened.as_raw_fd()
    }
}

impl Arrivals for Programs {
    fn admit(&mut self) -> io::Result<Option<Peer>> {
        let mut events = [0; 1024];
        while self.opened.read(&mut events).is_ok_and(|count| count > 0) {}
        if self.terminal.is_hung_up() {
            return Ok(None);
        }
        // Input and output are watched each on its own.
        let (input, output) = (self.terminal.try_clone()?, self.terminal.try_clone()?);
        Ok(Some(Peer { input: Some(input), output: Some(output) }))
    }

    fn has_left(&self, input: &Descriptor) -> bool {
        input.is_hung_up()
    }

    fn dismiss(&mut self) {
        if let Err(error) = self.set_raw() {
            log::warn!("{}: cannot set raw mode: {error}", self.path.display());
        }
    }
}

impl Drop for Programs {
    fn drop(&mut self) {
        if let Some(link) = &self.link {
            // Whoever removed it before us did what we want.
            let _ = std::fs::remove_file(link);
        }
    }
}

fn replace_link(target: &Path, link: &Path) -> io::Result<()> {
    if link.symlink_metadata().is_ok_and(|entry| entry.file_type().is_symlink()) {
        std::fs::remove_file(link)?;
    }
    std::os::unix::fs::symlink(target, link)
}
