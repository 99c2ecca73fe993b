//! A unix socket that one client at a time may join and leave.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::path::Path;

use super::descriptor::Descriptor;
use super::endpoint::{Arrivals, Endpoint, Peer};
use super::{Reader, Shared, Stream};
use crate::event::EventLoop;
use crate::host::listener::Listener;

impl Stream {
    /// A stream that listens on a unix socket at `path`.
    ///
    /// One client is connected at a time and further ones wait for their turn. While there is none,
    /// the last output is kept for the next one. A socket that nobody listens on any more is
    /// replaced, and ours is removed when the stream is dropped.
    pub fn socket(event_loop: &mut EventLoop, path: &Path) -> io::Result<Self> {
        let listener = Listener::bind(path, None)?;
        Self::start(Shared::new(Reader::Absent)?, event_loop, |shared| {
            let name = path.display().to_string();
            Endpoint::new(name, shared).with_arrivals(Clients(listener))
        })
    }
}

struct Clients(Listener);

impl AsRawFd for Clients {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

impl Arrivals for Clients {
    fn admit(&mut self) -> io::Result<Option<Peer>> {
        let Some(client) = self.0.accept()? else { return Ok(None) };
        // Input and output are watched each on its own.
        let input = Some(Descriptor::socket(client.try_clone()?));
        Ok(Some(Peer { input, output: Some(Descriptor::socket(client)) }))
    }

    fn has_left(&self, input: &Descriptor) -> bool {
        input.is_hung_up()
    }
}
