//! Disks: what reads and writes an image for a block device.
//!
//! A [`Disk`] takes requests under tags and completes them in any order. Buffers are guest memory
//! and go to the kernel as they are; no byte is copied on the way, save where `O_DIRECT` would
//! refuse them.
//!
//! # What a request costs
//!
//! A batch is what one doorbell, or one round of completions, brings: at most a queue of requests.
//! System calls of the worker, beside the one wait in which it sleeps and the one signal by which
//! it interrupts (both once for a batch):
//!
//! | disk  | cached read         | read that waits      | write        | durable write or flush |
//! |-------|---------------------|----------------------|--------------|------------------------|
//! | sync  | 1 each              | 1 each, in turn      | 1 each       | 1 more each            |
//! | uring | 1 for 64            | 1 for 64, and a wait | as a read    | 1 more for 64          |
//! | auto  | 1 each              | 2 each at the most   | 1 or 2 each  | as uring               |
//!
//! `auto` asks the page cache by `RWF_NOWAIT` and hands to the ring what would wait. A file system
//! that cannot be asked is asked once. A ring takes 30 microseconds to make and 12 KiB.

use std::io;
use std::sync::Arc;

use arch::memory::GuestSlice;

use self::auto::AutoDisk;
use self::blocking::BlockingDisk;
use self::image::Image;
use self::uring::UringDisk;
use crate::event::Event;

pub mod auto;
pub mod blocking;
pub mod image;
#[cfg(test)]
mod test;
mod transfer;
pub mod uring;

/// One request to a disk; what it covers is within the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskRequest<'a> {
    /// Reads from `offset` until `into` is full.
    Read {
        /// Where in the image, in bytes.
        offset: u64,
        /// Where the bytes go.
        into: &'a [GuestSlice],
    },
    /// Writes all of `from` at `offset`.
    Write {
        /// Where in the image, in bytes.
        offset: u64,
        /// Where the bytes come from.
        from: &'a [GuestSlice],
        /// Completes only when the bytes, and all written before them, would survive a power cut.
        durable: bool,
    },
    /// Completes when every completed write would survive a power cut.
    Flush,
    /// The content of `len` bytes at `offset` is of no more use.
    Discard {
        /// Where in the image, in bytes.
        offset: u64,
        /// How many bytes.
        len: u64,
    },
    /// Makes `len` bytes at `offset` zeros.
    WriteZeroes {
        /// Where in the image, in bytes.
        offset: u64,
        /// How many bytes.
        len: u64,
        /// Whether the image may shed the storage behind them.
        unmap: bool,
    },
}

/// The name that a caller gave a request, and its outcome.
pub type Completion = (u32, io::Result<()>);

/// A disk; blocking and io_uring look alike to the caller.
pub trait Disk: Send {
    /// Takes a request. Never fails: a failure is a completion.
    ///
    /// Call it only while [`Disk::has_room`]. The slices may go; the memory behind them is used
    /// until the request is completed.
    fn submit(&mut self, tag: u32, request: DiskRequest<'_>);

    /// Starts everything that was submitted: once for a batch.
    ///
    /// An error means that the disk can serve no more at all.
    fn start(&mut self) -> io::Result<()> {
        Ok(())
    }

    /// Takes the next completion.
    fn completed(&mut self) -> Option<Completion>;

    /// Signalled when requests complete later than [`Disk::start`]; watch it edge triggered, since
    /// nobody takes its signal.
    fn completion_event(&self) -> Option<&Event> {
        None
    }

    /// Says whether one more request may be submitted before another one is completed.
    fn has_room(&self) -> bool {
        true
    }

    /// Waits for everything that was submitted, and forgets its completions.
    ///
    /// After it nothing touches guest memory.
    fn drain(&mut self);
}

/// How an image is read and written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Engine {
    /// What the page cache has is read at once, the rest by io_uring; where the kernel has no
    /// io_uring, `Sync`.
    #[default]
    Auto,
    /// Everything by io_uring.
    Uring,
    /// System calls that wait.
    Sync,
}

impl Engine {
    /// Makes a disk of an open image.
    pub fn open(self, image: Arc<Image>) -> io::Result<Box<dyn Disk>> {
        Ok(match self {
            Self::Auto => match UringDisk::new(Arc::clone(&image)) {
                Ok(behind) => Box::new(AutoDisk::new(image, behind)),
                Err(error) => {
                    log::debug!("no io_uring ({error}): a disk waits for each of its requests");
                    Box::new(BlockingDisk::new(image))
                }
            },
            Self::Uring => Box::new(UringDisk::new(image).map_err(|error| without_uring(&error))?),
            Self::Sync => Box::new(BlockingDisk::new(image)),
        })
    }
}

fn without_uring(error: &io::Error) -> io::Error {
    let text = format!("io_uring cannot be used here ({error}): choose the engine auto or sync");
    io::Error::new(error.kind(), text)
}
