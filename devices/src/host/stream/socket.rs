//! A unix socket that one client at a time may join and leave.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use super::descriptor::Descriptor;
use super::endpoint::{Arrivals, Endpoint, Peer};
use super::{Reader, Shared, Stream};
use crate::event::EventLoop;

impl Stream {
    /// A stream that listens on a unix socket at `path`.
    ///
    /// One client is connected at a time and further ones wait for their turn. While there is none,
    /// the last output is kept for the next one. A socket that nobody listens on any more is
    /// replaced, and ours is removed when the stream is dropped.
    pub fn socket(event_loop: &mut EventLoop, path: &Path) -> io::Result<Self> {
        remove_stale(path)?;
        let listener = UnixListener::bind(path)?;
        listener.set_nonblocking(true)?;
        Self::start(Shared::new(Reader::Absent)?, event_loop, |shared| {
            let name = path.display().to_string();
            Endpoint::new(name, shared).with_arrivals(Clients { listener, path: path.into() })
        })
    }
}

struct Clients {
    listener: UnixListener,
    path: PathBuf,
}

impl AsRawFd for Clients {
    fn as_raw_fd(&self) -> RawFd {
        self.listener.as_raw_fd()
    }
}

impl Arrivals for Clients {
    fn admit(&mut self) -> io::Result<Option<Peer>> {
        let client = match self.listener.accept() {
            Ok((client, _)) => client,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
            Err(error) => return Err(error),
        };
        // Input and output are watched each on its own.
        let input = Some(Descriptor::socket(client.try_clone()?));
        Ok(Some(Peer { input, output: Some(Descriptor::socket(client)) }))
    }

    fn has_left(&self, input: &Descriptor) -> bool {
        input.is_hung_up()
    }
}

impl Drop for Clients {
    fn drop(&mut self) {
        // Whoever removed it before us did what we want.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Removes a socket of a process that has ended, and nothing else.
pub(in crate::host) fn remove_stale(path: &Path) -> io::Result<()> {
    let is_socket = path.symlink_metadata().is_ok_and(|entry| entry.file_type().is_socket());
    if !is_socket {
        return Ok(());
    }
    match UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            std::fs::remove_file(path)
        }
        // Binding tells what is wrong.
        _ => Ok(()),
    }
}
