//! What can be done to an image's content while the caller waits.
#![expect(
    unsafe_code,
    reason = "discarding on a block device is an ioctl without a safe interface"
)]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use arch::memory::GuestSlice;
use rustix::fs::FallocateFlags;

use super::{Image, Kind};
use crate::host::disk::transfer::Direction;

/// Bytes that are copied at a time where the guest's memory cannot be used as it is.
const BOUNCE_BYTES: usize = 256 << 10;
/// No storage wants more alignment of memory than a page.
const BOUNCE_ALIGNMENT: usize = 4096;

impl Image {
    /// Makes every write so far survive a power cut.
    pub(in crate::host::disk) fn flush(&self) -> io::Result<()> {
        if self.access.read_only { Ok(()) } else { self.file.sync_data() }
    }

    /// Gives storage back. Where that is impossible nothing happens: a discard is advice.
    pub(in crate::host::disk) fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        let outcome = match self.kind {
            Kind::RegularFile => self.deallocate(offset, len),
            Kind::BlockDevice => discard_blocks(&self.file, offset, len),
        };
        outcome.or_else(|error| if is_unsupported(&error) { Ok(()) } else { Err(error) })
    }

    /// Makes a range zeros by the cheapest means that its storage has.
    pub(in crate::host::disk) fn write_zeroes(
        &self,
        offset: u64,
        len: u64,
        unmap: bool,
    ) -> io::Result<()> {
        let zero_range = FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE;
        if unmap {
            match self.deallocate(offset, len) {
                Err(error) if is_unsupported(&error) => {}
                outcome => return outcome,
            }
        }
        match retry(|| Ok(rustix::fs::fallocate(&self.file, zero_range, offset, len)?)) {
            Err(error) if is_unsupported(&error) => self.write_zero_bytes(offset, len),
            outcome => outcome,
        }
    }

    /// Says whether the kernel would refuse these buffers.
    pub(in crate::host::disk) fn must_bounce(&self, slices: &[GuestSlice]) -> bool {
        let mask = usize::try_from(self.blocks.memory_alignment.saturating_sub(1)).unwrap_or(0);
        let unaligned = |slice: &GuestSlice| (slice.as_ptr().addr() | slice.len()) & mask != 0;
        self.access.direct && slices.iter().any(unaligned)
    }

    /// Reads or writes by way of a buffer of our own.
    pub(in crate::host::disk) fn bounce(
        &self,
        direction: Direction,
        mut offset: u64,
        slices: &[GuestSlice],
    ) -> io::Result<()> {
        let mut left: usize = slices.iter().map(|slice| slice.len()).sum();
        let mut buffer = AlignedBuffer::new(left.min(BOUNCE_BYTES));
        let mut cursor = Cursor { slices, offset: 0 };
        while left > 0 {
            let bytes = buffer.bytes(left);
            match direction {
                Direction::Read => {
                    self.file.read_exact_at(bytes, offset)?;
                    cursor.put(bytes);
                }
                Direction::Write => {
                    cursor.take(bytes);
                    self.file.write_all_at(bytes, offset)?;
                }
            }
            offset += bytes.len() as u64;
            left -= bytes.len();
        }
        Ok(())
    }

    fn deallocate(&self, offset: u64, len: u64) -> io::Result<()> {
        let punch_hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        retry(|| Ok(rustix::fs::fallocate(&self.file, punch_hole, offset, len)?))
    }

    pub(super) fn write_zero_bytes(&self, offset: u64, len: u64) -> io::Result<()> {
        let mut buffer = AlignedBuffer::new(BOUNCE_BYTES);
        let mut done = 0;
        while done < len {
            let left = usize::try_from(len - done).unwrap_or(usize::MAX);
            let zeros = buffer.bytes(left);
            self.file.write_all_at(zeros, offset + done)?;
            done += zeros.len() as u64;
        }
        Ok(())
    }
}

/// Zeroed memory of our own, aligned for `O_DIRECT`.
struct AlignedBuffer {
    memory: Vec<u8>,
    start: usize,
}

impl AlignedBuffer {
    fn new(len: usize) -> Self {
        let memory = vec![0; len + BOUNCE_ALIGNMENT];
        let start = memory.as_ptr().align_offset(BOUNCE_ALIGNMENT).min(BOUNCE_ALIGNMENT);
        Self { memory, start }
    }

    /// The first bytes, up to `len`.
    fn bytes(&mut self, len: usize) -> &mut [u8] {
        let len = len.min(self.memory.len() - BOUNCE_ALIGNMENT);
        self.memory.get_mut(self.start..self.start + len).unwrap_or_default()
    }
}

/// A place in a list of slices.
struct Cursor<'a> {
    slices: &'a [GuestSlice],
    /// Bytes of the first slice that are done.
    offset: usize,
}

impl Cursor<'_> {
    fn put(&mut self, mut bytes: &[u8]) {
        while let Some(slice) = self.rest().filter(|_| !bytes.is_empty()) {
            let count = slice.copy_from(bytes);
            bytes = bytes.get(count..).unwrap_or_default();
            self.offset += count;
        }
    }

    fn take(&mut self, mut bytes: &mut [u8]) {
        while let Some(slice) = self.rest().filter(|_| !bytes.is_empty()) {
            let count = slice.copy_to(bytes);
            bytes = bytes.get_mut(count..).unwrap_or_default();
            self.offset += count;
        }
    }

    /// What is left of the first slice that is not done.
    fn rest(&mut self) -> Option<GuestSlice> {
        while let Some((first, others)) = self.slices.split_first() {
            if self.offset < first.len() {
                return first.sub_slice(self.offset, first.len() - self.offset);
            }
            self.slices = others;
            self.offset = 0;
        }
        None
    }
}

fn discard_blocks(file: &File, offset: u64, len: u64) -> io::Result<()> {
    // linux/fs.h: _IO(0x12, 119).
    const BLKDISCARD: libc::Ioctl = 0x1277;
    let range = [offset, len];
    retry(|| {
        // SAFETY: the kernel reads two words and keeps no pointer to them.
        match unsafe { libc::ioctl(file.as_raw_fd(), BLKDISCARD, &raw const range) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    })
}

fn retry(mut call: impl FnMut() -> io::Result<()>) -> io::Result<()> {
    loop {
        match call() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            outcome => return outcome,
        }
    }
}

fn is_unsupported(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOTTY | libc::ENOSYS))
}
