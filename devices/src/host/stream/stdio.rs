//! Standard input and output.

use std::io;
use std::os::fd::BorrowedFd;

use rustix::fs::OFlags;

use super::descriptor::Descriptor;
use super::endpoint::{Endpoint, Peer, QuitRequest};
use super::window::Terminal;
use super::{Reader, Shared, Stream};
use crate::event::EventLoop;

impl Stream {
    /// A stream of the process' standard input and output.
    ///
    /// When the input is a terminal, which the caller puts into raw mode, `Ctrl-A x` calls `quit`.
    /// The modes of both files are left alone. The end of the input is no end of the output.
    pub fn stdio(event_loop: &mut EventLoop, quit: QuitRequest) -> io::Result<Self> {
        Self::inherited(event_loop, rustix::stdio::stdin(), rustix::stdio::stdout(), quit)
    }

    /// The same with any two open files.
    pub(crate) fn inherited(
        event_loop: &mut EventLoop,
        input: BorrowedFd<'_>,
        output: BorrowedFd<'_>,
        quit: QuitRequest,
    ) -> io::Result<Self> {
        let peer = Peer {
            input: Some(Descriptor::inherit(input, OFlags::RDONLY)?),
            output: Some(Descriptor::inherit(output, OFlags::WRONLY)?),
        };
        let terminal = [output, input].into_iter().find(|file| rustix::termios::isatty(file));
        let window = terminal.map(|file| Terminal::new(file.try_clone_to_owned()?)).transpose()?;
        Self::start(Shared::new(Reader::Present)?, event_loop, |shared| {
            let mut endpoint = Endpoint::new("standard input and output", shared).with_peer(peer);
            if rustix::termios::isatty(input) {
                endpoint = endpoint.with_keys(quit);
            }
            match window {
                Some(window) => endpoint.with_window(window),
                None => endpoint,
            }
        })
    }
}
