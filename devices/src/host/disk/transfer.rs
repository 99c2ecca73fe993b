//! A read or write on its way: what of it is left after the kernel did a part.
#![expect(unsafe_code, reason = "the kernel reads and writes guest memory through raw iovecs")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use arch::memory::GuestSlice;

/// The kernel takes no more vectors in one call (`UIO_MAXIOV`).
const VECTORS_MAX: usize = 1024;

/// Which way the bytes go, seen from the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Direction {
    Read,
    Write,
}

/// Guest memory that is to be filled from, or written to, consecutive bytes of a file.
///
/// It keeps its allocation: one that was used once can be loaded again for nothing.
#[derive(Debug)]
pub(super) struct Transfer {
    direction: Direction,
    offset: u64,
    vectors: Vec<libc::iovec>,
    /// Vectors that are done.
    done: usize,
}

// SAFETY: the pointers are guest memory, which is mapped for the process' whole life.
unsafe impl Send for Transfer {}

impl Transfer {
    pub(super) const fn new() -> Self {
        Self { direction: Direction::Read, offset: 0, vectors: Vec::new(), done: 0 }
    }

    pub(super) fn load(&mut self, direction: Direction, offset: u64, slices: &[GuestSlice]) {
        self.direction = direction;
        self.offset = offset;
        self.done = 0;
        self.vectors.clear();
        let filled = slices.iter().filter(|slice| slice.len() > 0);
        self.vectors.extend(
            filled
                .map(|slice| libc::iovec { iov_base: slice.as_ptr().cast(), iov_len: slice.len() }),
        );
    }

    pub(super) fn direction(&self) -> Direction {
        self.direction
    }

    pub(super) fn offset(&self) -> u64 {
        self.offset
    }

    pub(super) fn is_done(&self) -> bool {
        self.left().is_empty()
    }

    /// Says whether what is left begins and ends at multiples of `unit` bytes in the file.
    pub(super) fn is_aligned(&self, unit: u32) -> bool {
        let len: usize = self.vectors.iter().skip(self.done).map(|vector| vector.iov_len).sum();
        let unit = u64::from(unit);
        self.offset.is_multiple_of(unit) && (len as u64).is_multiple_of(unit)
    }

    /// The vectors of one call to the kernel; they stay where they are until the next load.
    pub(super) fn left(&self) -> &[libc::iovec] {
        let left = self.vectors.get(self.done..).unwrap_or_default();
        left.get(..VECTORS_MAX).unwrap_or(left)
    }

    /// Notes that the kernel moved `count` bytes of what is left.
    ///
    /// None at all is an error: the file is shorter, or its storage fuller, than it should be.
    pub(super) fn advance(&mut self, mut count: usize) -> io::Result<()> {
        if count == 0 && !self.is_done() {
            return Err(match self.direction {
                Direction::Read => io::ErrorKind::UnexpectedEof.into(),
                Direction::Write => io::ErrorKind::WriteZero.into(),
            });
        }
        self.offset += count as u64;
        while let Some(vector) = self.vectors.get_mut(self.done) {
            if count < vector.iov_len {
                vector.iov_len -= count;
                vector.iov_base = vector.iov_base.cast::<u8>().wrapping_add(count).cast();
                return Ok(());
            }
            count -= vector.iov_len;
            self.done += 1;
        }
        Ok(())
    }

    /// Makes one call to the kernel and returns how many bytes it moved.
    pub(super) fn call(&self, file: BorrowedFd<'_>, flags: libc::c_int) -> io::Result<usize> {
        let vectors = self.left();
        let (pointer, count) = (vectors.as_ptr(), libc::c_int::try_from(vectors.len()));
        let count = count.map_err(io::Error::other)?;
        let offset = i64::try_from(self.offset).map_err(io::Error::other)?;
        // SAFETY: the vectors are guest memory, which stays mapped and holds no Rust object.
        let moved = unsafe {
            match self.direction {
                Direction::Read => libc::preadv2(file.as_raw_fd(), pointer, count, offset, flags),
                Direction::Write => libc::pwritev2(file.as_raw_fd(), pointer, count, offset, flags),
            }
        };
        usize::try_from(moved).map_err(|_| io::Error::last_os_error())
    }

    /// Moves everything that is left, however many calls it takes.
    pub(super) fn run(&mut self, file: BorrowedFd<'_>) -> io::Result<()> {
        while !self.is_done() {
            match self.call(file, 0) {
                Ok(count) => self.advance(count)?,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}
