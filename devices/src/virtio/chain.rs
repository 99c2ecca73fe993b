//! One descriptor chain: what a driver made available, validated once.

use arch::memory::GuestSlice;
use zerocopy::{FromBytes, IntoBytes};

/// The buffers of one chain: first those that the device reads, then those that it writes.
///
/// A chain is filled by [`super::queue::Queue::pop`] and reused: it allocates only when it is made.
#[derive(Debug, Default)]
pub struct Chain {
    pub(super) head: u16,
    /// One place for each descriptor of the queue; the chain has the first `len` of them.
    pub(super) slices: Vec<GuestSlice>,
    pub(super) len: usize,
    /// Number of slices that the device reads; the others it writes.
    pub(super) readable: usize,
    /// Readable slices that are taken already.
    pub(super) taken: usize,
}

impl Chain {
    /// Makes an empty chain with room for the longest one of a queue with `queue_size` descriptors.
    pub fn with_capacity(queue_size: u16) -> Self {
        Self { slices: Vec::with_capacity(usize::from(queue_size)), ..Self::default() }
    }

    /// Index of the first descriptor: names the chain when it is completed.
    pub fn head(&self) -> u16 {
        self.head
    }

    /// What is left of the buffers that the device reads.
    #[inline]
    pub fn readable(&self) -> &[GuestSlice] {
        self.slices.get(self.taken..self.readable).unwrap_or_default()
    }

    /// What is left of the buffers that the device writes.
    #[inline]
    pub fn writable(&self) -> &[GuestSlice] {
        self.slices.get(self.readable..self.len).unwrap_or_default()
    }

    /// Bytes left to read.
    pub fn readable_len(&self) -> usize {
        self.readable().iter().map(|slice| slice.len()).sum()
    }

    /// Bytes left to write.
    pub fn writable_len(&self) -> usize {
        self.writable().iter().map(|slice| slice.len()).sum()
    }

    /// Takes a value from the front of the readable bytes, however they are split.
    ///
    /// `None` when there are not enough; what there was is taken then.
    #[inline]
    pub fn take<T: FromBytes + IntoBytes>(&mut self) -> Option<T> {
        // Drivers put a header into a buffer of its own.
        if let Some(first) = self.readable().first().copied()
            && first.len() == size_of::<T>()
        {
            self.taken += 1;
            return first.read(0);
        }
        let mut value = T::new_zeroed();
        let bytes = value.as_mut_bytes();
        (self.take_bytes(bytes) == bytes.len()).then_some(value)
    }

    /// Takes up to `target.len()` readable bytes and returns how many there were.
    pub fn take_bytes(&mut self, target: &mut [u8]) -> usize {
        let mut done = 0;
        while let Some(rest) = target.get_mut(done..).filter(|rest| !rest.is_empty()) {
            let end = self.readable;
            let Some(slice) = self.slices.get_mut(self.taken..end).and_then(<[_]>::first_mut)
            else {
                break;
            };
            let count = slice.copy_to(rest);
            done += count;
            match slice.split_at(count) {
                Some((_, rest)) if rest.len() > 0 => *slice = rest,
                _ => self.taken += 1,
            }
        }
        done
    }

    /// Splits the last writable byte off, where requests have their status.
    pub fn split_off_status(&mut self) -> Option<GuestSlice> {
        let last = self.len.checked_sub(1).filter(|last| *last >= self.readable)?;
        let slice = self.slices.get_mut(last)?;
        let (rest, status) = slice.split_at(slice.len().checked_sub(1)?)?;
        *slice = rest;
        if rest.len() == 0 {
            self.len = last;
        }
        Some(status)
    }

    /// Writes `bytes` to the front of the writable buffers and returns how many fitted.
    pub fn write(&self, bytes: &[u8]) -> usize {
        let mut done = 0;
        for slice in self.writable() {
            done += slice.copy_from(bytes.get(done..).unwrap_or_default());
        }
        done
    }
}
