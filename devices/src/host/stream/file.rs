//! A file that takes the output.

use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use super::descriptor::Descriptor;
use super::endpoint::{Endpoint, Peer};
use super::{Reader, Shared, Stream};
use crate::event::EventLoop;

impl Stream {
    /// A stream whose output is appended to the file at `path`, made if need be; without input.
    ///
    /// What the file had before stays: the last words of a guest that failed are not overwritten by
    /// its restart. A terminal or a pipe that has a reader does as well as a file.
    pub fn file(event_loop: &mut EventLoop, path: &Path) -> io::Result<Self> {
        let flags = libc::O_NOCTTY | libc::O_NONBLOCK;
        let file = OpenOptions::new().append(true).create(true).custom_flags(flags).open(path)?;
        let peer = Peer { input: None, output: Some(Descriptor::own(file)?) };
        Self::start(Shared::new(Reader::Present)?, event_loop, |shared| {
            Endpoint::new(path.display().to_string(), shared).with_peer(peer)
        })
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn output_is_appended_to_what_was_there() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        for text in ["first\n", "second\n"] {
            let mut event_loop = EventLoop::new().unwrap();
            let stream = Stream::file(&mut event_loop, &path).unwrap();
            assert_eq!(stream.send(text.as_bytes()), text.len());
            event_loop.run_ready().unwrap();
        }
        assert_eq!(std::fs::read_to_string(path).unwrap(), "first\nsecond\n");
    }

    #[test]
    fn output_sent_just_before_the_end_is_written() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        let mut event_loop = EventLoop::new().unwrap();
        let stream = Stream::file(&mut event_loop, &path).unwrap();
        assert_eq!(stream.send(b"last words"), 10);
        drop(event_loop);
        assert_eq!(std::fs::read_to_string(path).unwrap(), "last words");
    }

    #[test]
    fn a_full_disk_stops_neither_guest_nor_machine() {
        let mut event_loop = EventLoop::new().unwrap();
        let stream = Stream::file(&mut event_loop, Path::new("/dev/full")).unwrap();
        for _ in 0..100 {
            assert_eq!(stream.send(&[b'x'; 4096]), 4096);
            event_loop.run_ready().unwrap();
        }
    }
}
