//! A disk that reads and writes while it is asked: preadv and pwritev straight on guest memory.

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;

use arch::memory::GuestSlice;

use super::image::Image;
use super::transfer::{Direction, Transfer};
use super::{Completion, Disk, DiskRequest};

/// One system call for each request; requests wait for each other.
pub struct BlockingDisk {
    image: Arc<Image>,
    transfer: Transfer,
    completed: VecDeque<Completion>,
}

impl BlockingDisk {
    /// Makes a disk from an open image.
    pub fn new(image: Arc<Image>) -> Self {
        Self { image, transfer: Transfer::new(), completed: VecDeque::new() }
    }

    fn run(&mut self, request: DiskRequest<'_>) -> io::Result<()> {
        match request {
            DiskRequest::Read { offset, into } => self.transfer(Direction::Read, offset, into),
            DiskRequest::Write { offset, from, durable } => {
                self.transfer(Direction::Write, offset, from)?;
                if durable { self.image.flush() } else { Ok(()) }
            }
            DiskRequest::Flush => self.image.flush(),
            DiskRequest::Discard { offset, len } => self.image.discard(offset, len),
            DiskRequest::WriteZeroes { offset, len, unmap } => {
                self.image.write_zeroes(offset, len, unmap)
            }
        }
    }

    fn transfer(
        &mut self,
        direction: Direction,
        offset: u64,
        slices: &[GuestSlice],
    ) -> io::Result<()> {
        if self.image.must_bounce(slices) {
            return self.image.bounce(direction, offset, slices);
        }
        self.transfer.load(direction, offset, slices);
        self.transfer.run(self.image.as_fd())
    }
}

impl Disk for BlockingDisk {
    fn submit(&mut self, tag: u32, request: DiskRequest<'_>) {
        let outcome = self.run(request);
        self.completed.push_back((tag, outcome));
    }

    fn completed(&mut self) -> Option<Completion> {
        self.completed.pop_front()
    }

    fn drain(&mut self) {
        self.completed.clear();
    }
}
