//! Where a reply goes.

use std::io;
use std::os::fd::BorrowedFd;

use vm_memory::VolatileSlice;

use super::wire::ReplyHeader;
use crate::host::volatile;

/// Room for a reply, of a given length.
pub trait Reply {
    /// Bytes that fit.
    fn room(&self) -> usize;

    /// Writes at a position; what does not fit is left out.
    fn put(&mut self, at: usize, bytes: &[u8]);

    /// Fills at most `len` bytes from position `at` with what `file` has at `offset`, and returns
    /// how many those were: fewer only at the end of the file.
    ///
    /// # Errors
    ///
    /// The file cannot be read.
    fn fill(
        &mut self,
        at: usize,
        len: usize,
        file: BorrowedFd<'_>,
        offset: u64,
    ) -> io::Result<usize>;
}

/// The buffers of a request in guest memory.
pub(super) struct GuestReply<'a, 'm> {
    slices: &'a [VolatileSlice<'m>],
    room: usize,
}

impl<'a, 'm> GuestReply<'a, 'm> {
    pub(super) fn new(slices: &'a [VolatileSlice<'m>]) -> Self {
        let room = slices.iter().fold(0_usize, |sum, slice| sum.saturating_add(slice.len()));
        Self { slices, room }
    }

    /// The parts of the buffers from `at` on, `len` bytes at most.
    fn parts(&self, mut at: usize, mut len: usize) -> impl Iterator<Item = VolatileSlice<'m>> {
        self.slices.iter().filter_map(move |slice| {
            let skipped = at.min(slice.len());
            let taken = len.min(slice.len() - skipped);
            at -= skipped;
            len -= taken;
            slice.subslice(skipped, taken).ok().filter(|_| taken > 0)
        })
    }
}

impl Reply for GuestReply<'_, '_> {
    fn room(&self) -> usize {
        self.room
    }

    fn put(&mut self, at: usize, mut bytes: &[u8]) {
        for part in self.parts(at, bytes.len()) {
            let Some((now, rest)) = bytes.split_at_checked(part.len()) else { return };
            part.copy_from(now);
            bytes = rest;
        }
    }

    fn fill(
        &mut self,
        at: usize,
        len: usize,
        file: BorrowedFd<'_>,
        offset: u64,
    ) -> io::Result<usize> {
        let parts: Vec<_> = self.parts(at, len).collect();
        volatile::read_at(file, offset, &parts)
    }
}

/// Room for the header of a reply that nobody reads.
pub(super) struct Nowhere;

impl Reply for Nowhere {
    fn room(&self) -> usize {
        size_of::<ReplyHeader>()
    }

    fn put(&mut self, _at: usize, _bytes: &[u8]) {}

    fn fill(&mut self, _: usize, _: usize, _: BorrowedFd<'_>, _: u64) -> io::Result<usize> {
        Ok(0)
    }
}
