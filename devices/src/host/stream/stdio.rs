//! Standard input and output.

use std::io;
use std::os::fd::BorrowedFd;

use rustix::fs::OFlags;

use super::descriptor::Descriptor;
use super::endpoint::{Endpoint, Peer, QuitRequest};
use super::{Reader, Shared, Stream};
use crate::event::EventLoop;

impl Stream {
    /// A stream of the process' standard input and output.
    ///
    /// When the input is a terminal, which the caller puts into raw mode, `Ctrl-A x` calls `quit`. The
    /// modes of both files are left alone. The end of the input is no end of the output.
    pub fn stdio(event_loop: &mut EventLoop, quit: QuitRequest) -> io::Result<Self> {
        Self::inherited(event_loop, rustix::stdio::stdin(), rustix::stdio::stdout(), quit)
    }

    fn inherited(
        event_loop: &mut EventLoop,
        input: BorrowedFd<'_>,
        output: BorrowedFd<'_>,
        quit: QuitRequest,
    ) -> io::Result<Self> {
        let is_terminal = rustix::termios::isatty(input);
        let peer = Peer {
            input: Some(Descriptor::inherit(input, OFlags::RDONLY)?),
            output: Some(Descriptor::inherit(output, OFlags::WRONLY)?),
        };
        Self::start(Shared::new(Reader::Present)?, event_loop, |shared| {
            let endpoint = Endpoint::new("standard input and output", shared).with_peer(peer);
            if is_terminal { endpoint.with_keys(quit) } else { endpoint }
        })
    }
}
