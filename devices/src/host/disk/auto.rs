//! A disk that answers from the page cache at once and leaves the rest to io_uring.
//!
//! The file is asked not to wait; what it refuses then goes to the ring as if it had never been
//! tried. Some file systems, ext4 among them, cannot be asked so for writes. A ring would give each
//! of these to a thread of the kernel, at more than twice the time on processors, where they take
//! turns as well; whole pages are therefore written at once.

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;

use super::image::{Image, PAGE_BYTES};
use super::transfer::{Direction, Transfer};
use super::uring::UringDisk;
use super::{Completion, Disk, DiskRequest};
use crate::event::Event;

/// Inline where that does not wait, else io_uring.
pub struct AutoDisk {
    image: Arc<Image>,
    transfer: Transfer,
    completed: VecDeque<Completion>,
    /// What serves requests that must wait.
    behind: UringDisk,
    reads: Inline,
    writes: Inline,
}

/// How far a file system lets the page cache be used by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Inline {
    /// It can be asked not to wait.
    Asked,
    /// It cannot be asked, and seldom waits.
    Unasked,
    /// Everything goes to the ring.
    Never,
}

impl AutoDisk {
    /// Puts an image's page cache before its ring.
    pub fn new(image: Arc<Image>, behind: UringDisk) -> Self {
        // There is no cache to answer from.
        let inline = if image.is_direct() { Inline::Never } else { Inline::Asked };
        Self {
            image,
            transfer: Transfer::new(),
            completed: VecDeque::new(),
            behind,
            reads: inline,
            writes: inline,
        }
    }

    /// Serves a request at once if it need not wait.
    fn serve_inline(&mut self, request: DiskRequest<'_>) -> Option<io::Result<()>> {
        match request {
            DiskRequest::Read { offset, into } if self.reads == Inline::Asked => {
                self.transfer.load(Direction::Read, offset, into);
                self.ask().unwrap_or_else(|()| {
                    self.reads = Inline::Never;
                    None
                })
            }
            DiskRequest::Write { offset, from, durable: false } if self.writes != Inline::Never => {
                self.transfer.load(Direction::Write, offset, from);
                self.write_inline()
            }
            _ => None,
        }
    }

    fn write_inline(&mut self) -> Option<io::Result<()>> {
        if self.writes == Inline::Asked {
            match self.ask() {
                Ok(outcome) => return outcome,
                Err(()) => self.writes = Inline::Unasked,
            }
        }
        // Only a part of a page has to be read first.
        self.transfer.is_aligned(PAGE_BYTES).then(|| self.transfer.run(self.image.as_fd()))
    }

    /// Moves what needs no waiting; an error means that the file system cannot be asked.
    fn ask(&mut self) -> Result<Option<io::Result<()>>, ()> {
        while !self.transfer.is_done() {
            let moved = self.transfer.call(self.image.as_fd(), libc::RWF_NOWAIT);
            // Every other error, and the end of the file, shows again where the rest is served.
            match moved.and_then(|count| self.transfer.advance(count)) {
                Ok(()) => {}
                Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => return Err(()),
                Err(_) => return Ok(None),
            }
        }
        Ok(Some(Ok(())))
    }
}

impl Disk for AutoDisk {
    fn submit(&mut self, tag: u32, request: DiskRequest<'_>) {
        match self.serve_inline(request) {
            Some(outcome) => self.completed.push_back((tag, outcome)),
            None => self.behind.submit(tag, request),
        }
    }

    fn start(&mut self) -> io::Result<()> {
        self.behind.start()
    }

    fn completed(&mut self) -> Option<Completion> {
        self.completed.pop_front().or_else(|| self.behind.completed())
    }

    fn completion_event(&self) -> Option<&Event> {
        self.behind.completion_event()
    }

    fn has_room(&self) -> bool {
        self.behind.has_room()
    }

    fn drain(&mut self) {
        self.completed.clear();
        self.behind.drain();
    }
}
