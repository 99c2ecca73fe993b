//! Frames between a tap and guest memory: one system call each, no copy and no allocation.

use std::io;
use std::os::fd::AsRawFd;

use arch::memory::GuestSlice;
use libc::c_int;

use super::TapQueue;

/// What every frame begins with: `struct virtio_net_hdr_v1`.
pub(super) const HEADER_BYTES: c_int = 12;

/// The largest frame with its header: the largest packet of IP, and what Ethernet and a VLAN add.
pub const FRAME_BYTES_MAX: usize = HEADER_BYTES as usize + 18 + 65535;

/// The kernel takes no more vectors in one call (`UIO_MAXIOV`); one is for what does not fit.
pub const SLICES_MAX: usize = 1023;

/// What one thread needs to move frames; it keeps its allocations.
pub struct FrameIo {
    vectors: Vec<libc::iovec>,
    /// Takes the end of a frame that is larger than the memory for it. Pages that are never
    /// written cost nothing.
    spill: Vec<u8>,
}

// SAFETY: between calls the pointers are not used.
unsafe impl Send for FrameIo {}

impl FrameIo {
    /// Makes one.
    #[must_use]
    pub fn new() -> Self {
        Self { vectors: Vec::with_capacity(SLICES_MAX + 1), spill: vec![0; FRAME_BYTES_MAX + 1] }
    }

    /// Sends the frame in `slices`, [`SLICES_MAX`] at the most.
    #[inline]
    pub fn send(&mut self, queue: &TapQueue, slices: &[GuestSlice]) -> io::Result<usize> {
        self.load(slices);
        let (vectors, count) = (self.vectors.as_ptr(), count(&self.vectors)?);
        retry(|| {
            // SAFETY: the vectors are guest memory, which stays mapped and holds no Rust object.
            unsafe { libc::writev(queue.as_raw_fd(), vectors, count) }
        })
    }

    /// Receives a frame into `slices`, [`SLICES_MAX`] at the most, and returns its length.
    ///
    /// Where that is more than the slices have room for, the rest is in [`FrameIo::spilled`].
    #[inline]
    pub fn receive(&mut self, queue: &TapQueue, slices: &[GuestSlice]) -> io::Result<usize> {
        self.load(slices);
        let spill = self.spill.as_mut_ptr().cast();
        self.vectors.push(libc::iovec { iov_base: spill, iov_len: self.spill.len() });
        let (vectors, count) = (self.vectors.as_ptr(), count(&self.vectors)?);
        retry(|| {
            // SAFETY: the vectors are guest memory, which stays mapped and holds no Rust object,
            // and the spill, which is ours.
            unsafe { libc::readv(queue.as_raw_fd(), vectors, count) }
        })
    }

    /// Receives a frame and forgets it.
    pub fn discard(&mut self, queue: &TapQueue) -> io::Result<()> {
        self.receive(queue, &[]).map(drop)
    }

    /// The `len` bytes that the last frame had more than there was room for.
    ///
    /// `None` when it was too large for any driver.
    #[must_use]
    pub fn spilled(&self, len: usize) -> Option<&[u8]> {
        self.spill.get(..len).filter(|_| len < self.spill.len())
    }

    #[inline]
    fn load(&mut self, slices: &[GuestSlice]) {
        self.vectors.clear();
        let slices = slices.iter().take(SLICES_MAX);
        self.vectors.extend(
            slices
                .map(|slice| libc::iovec { iov_base: slice.as_ptr().cast(), iov_len: slice.len() }),
        );
    }
}

impl Default for FrameIo {
    fn default() -> Self {
        Self::new()
    }
}

fn count(vectors: &[libc::iovec]) -> io::Result<c_int> {
    c_int::try_from(vectors.len()).map_err(io::Error::other)
}

/// Makes a call until no signal interrupts it.
#[inline]
fn retry(mut call: impl FnMut() -> isize) -> io::Result<usize> {
    loop {
        if let Ok(count) = usize::try_from(call()) {
            return Ok(count);
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}
