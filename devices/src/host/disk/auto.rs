//! A disk that answers from the page cache at once and leaves the rest to io_uring.
//!
//! The file is asked not to wait; what it refuses then goes to the ring as if it had never been tried.

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;

use arch::memory::GuestSlice;

use super::image::Image;
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

/// Whether the file can be asked not to wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Inline {
    Possible,
    Impossible,
}

impl AutoDisk {
    /// Puts an image's page cache before its ring.
    pub fn new(image: Arc<Image>, behind: UringDisk) -> Self {
        // There is no cache to answer from.
        let inline = if image.is_direct() { Inline::Impossible } else { Inline::Possible };
        Self {
            image,
            transfer: Transfer::new(),
            completed: VecDeque::new(),
            behind,
            reads: inline,
            writes: inline,
        }
    }

    /// Serves a request at once if that is possible without waiting.
    fn serve_inline(&mut self, request: DiskRequest<'_>) -> bool {
        match request {
            DiskRequest::Read { offset, into } if self.reads == Inline::Possible => {
                self.reads = self.transfer(Direction::Read, offset, into);
            }
            DiskRequest::Write { offset, from, durable: false }
                if self.writes == Inline::Possible =>
            {
                self.writes = self.transfer(Direction::Write, offset, from);
            }
            _ => return false,
        }
        self.transfer.is_done()
    }

    /// Moves what needs no waiting and returns whether that is worth another attempt.
    fn transfer(&mut self, direction: Direction, offset: u64, slices: &[GuestSlice]) -> Inline {
        self.transfer.load(direction, offset, slices);
        while !self.transfer.is_done() {
            let moved = self.transfer.call(self.image.as_fd(), libc::RWF_NOWAIT);
            // Every other error, and the end of the file, shows again where the rest is served.
            match moved.and_then(|count| self.transfer.advance(count)) {
                Ok(()) => {}
                Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {
                    return Inline::Impossible;
                }
                Err(_) => break,
            }
        }
        Inline::Possible
    }
}

impl Disk for AutoDisk {
    fn submit(&mut self, tag: u32, request: DiskRequest<'_>) {
        if self.serve_inline(request) {
            self.completed.push_back((tag, Ok(())));
        } else {
            self.behind.submit(tag, request);
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
