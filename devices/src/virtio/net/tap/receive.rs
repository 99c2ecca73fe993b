//! Frames from the tap to the driver.

use std::collections::VecDeque;
use std::io;

use arch::memory::GuestSlice;

use crate::host::tap::{FRAME_BYTES_MAX, FrameIo, SLICES_MAX, TapQueue};
use crate::virtio::chain::Chain;
use crate::virtio::net::backend::Count;
use crate::virtio::net::layout::{FEATURE_MRG_RXBUF, HEADER_BYTES, NUM_BUFFERS_OFFSET};
use crate::virtio::queue::Queue;
use crate::virtio::worker::Fault;

/// Frames in one turn, after which the other files of the thread have theirs.
const TURN_FRAMES: usize = 256;

/// Frames after which the driver can have them though more are waiting.
const PUBLISH_FRAMES: usize = 32;

/// Slices in hand after which no further chain is taken: with the longest chain there are still
/// fewer than one call to the kernel takes.
const SLICES_ENOUGH: usize = SLICES_MAX - crate::virtio::net::QUEUE_SIZE as usize;

/// Slices of one read where frames are small: with the spill as many as the kernel takes without an
/// allocation (`UIO_FASTIOV`), and a jumbo frame in buffers of Linux.
const SLICES_FEW: usize = 7;

/// Small frames in a row after which the next one is thought to be small.
const SMALL_FRAMES: u32 = 8;

/// The receiving half of a queue pair.
///
/// It keeps chains in hand, as many as the largest frame fills, because the length of a frame is
/// known only when it is there.
pub(super) struct Receive {
    chain: Chain,
    is_mergeable: bool,
    in_hand: VecDeque<InHand>,
    /// The buffers of all chains in hand, behind some that are used already.
    slices: Vec<GuestSlice>,
    /// How many are used already.
    used_slices: usize,
    /// Bytes of all chains in hand.
    room: usize,
    carried: Option<Carried>,
    /// Frames since the last one for which a few slices were not enough.
    small_frames: u32,
    count: Count,
}

/// A chain that waits for a frame.
struct InHand {
    head: u16,
    slices: usize,
    len: usize,
}

/// A frame that was longer than the buffers it was read into.
struct Carried {
    len: usize,
    /// How much of it is in the buffers; the rest is in the spill.
    in_place: usize,
}

impl Receive {
    pub(super) fn new(queue: &Queue, features: u64) -> Self {
        Self {
            chain: Chain::with_capacity(queue.size()),
            is_mergeable: features & FEATURE_MRG_RXBUF != 0,
            in_hand: VecDeque::with_capacity(usize::from(queue.size())),
            slices: Vec::with_capacity(2 * SLICES_MAX),
            used_slices: 0,
            room: 0,
            carried: None,
            small_frames: 0,
            count: Count::default(),
        }
    }

    pub(super) fn take_count(&mut self) -> Count {
        std::mem::take(&mut self.count)
    }

    /// Drops a frame that was put by: its rest is about to be overwritten.
    pub(super) fn drop_carried(&mut self) {
        if self.carried.take().is_some() {
            self.count.dropped += 1;
        }
    }

    /// Receives what the tap has, as long as the driver has buffers for it.
    pub(super) fn run(
        &mut self,
        queue: &mut Queue,
        tap: &TapQueue,
        io: &mut FrameIo,
        is_up: bool,
    ) -> Result<(), Fault> {
        for turn in 1..=TURN_FRAMES {
            if !self.finish_carried(queue, io)? {
                return Ok(());
            }
            self.take_chains(queue, FRAME_BYTES_MAX)?;
            if self.in_hand.is_empty() {
                return Ok(());
            }
            let received = match is_up {
                true => io.receive(tap, self.offered()),
                false => io.discard(tap).map(|()| 0),
            };
            match received {
                Ok(len) if len > HEADER_BYTES => self.deliver(queue, io, len),
                Ok(_) => self.count.dropped += 1,
                Err(error) if is_of_one_frame(&error) => self.count.dropped += 1,
                // Nothing is there now; or never again, because the interface is gone.
                Err(_) => return Ok(()),
            }
            if turn.is_multiple_of(PUBLISH_FRAMES) {
                queue.notify_driver();
            }
        }
        queue.doorbell().signal();
        Ok(())
    }

    /// Takes chains until there is room for `len` bytes or none is left to take.
    fn take_chains(&mut self, queue: &mut Queue, len: usize) -> Result<(), Fault> {
        while self.wants_more(len) && queue.pop(&mut self.chain)? {
            let room = self.chain.writable_len();
            if room < HEADER_BYTES {
                // Not even a header fits.
                queue.complete(self.chain.head(), 0);
                continue;
            }
            self.compact();
            let before = self.slices.len();
            let filled = self.chain.writable().iter().filter(|slice| slice.len() > 0);
            self.slices.extend(filled);
            let slices = self.slices.len() - before;
            self.in_hand.push_back(InHand { head: self.chain.head(), slices, len: room });
            self.room = self.room.saturating_add(room);
        }
        Ok(())
    }

    fn wants_more(&self, len: usize) -> bool {
        if self.is_mergeable {
            self.room < len && self.slices.len() - self.used_slices < SLICES_ENOUGH
        } else {
            self.in_hand.is_empty()
        }
    }

    /// Where the next frame is read to. What a few slices do not hold goes by way of the spill,
    /// which is rare where frames are small; more slices make each read dearer.
    fn offered(&self) -> &[GuestSlice] {
        let slices = self.slices.get(self.used_slices..).unwrap_or_default();
        match self.expects_small() {
            true => slices.get(..SLICES_FEW).unwrap_or(slices),
            false => slices,
        }
    }

    fn expects_small(&self) -> bool {
        self.is_mergeable && self.small_frames >= SMALL_FRAMES
    }

    /// Forgets used slices before the allocation would grow.
    fn compact(&mut self) {
        if self.used_slices >= SLICES_MAX {
            self.slices.drain(..self.used_slices);
            self.used_slices = 0;
        }
    }

    /// Gives the driver the frame of `len` bytes that was received, or puts it by.
    fn deliver(&mut self, queue: &mut Queue, io: &FrameIo, len: usize) {
        let few = self.slices.iter().skip(self.used_slices).take(SLICES_FEW);
        let few = few.map(|slice| slice.len()).sum();
        let offered = if self.expects_small() { few } else { self.room };
        self.small_frames = if len <= few { self.small_frames.saturating_add(1) } else { 0 };
        match len.checked_sub(offered).filter(|rest| *rest > 0) {
            None => self.complete(queue, len),
            Some(rest) if self.is_mergeable && io.spilled(rest).is_some() => {
                self.carried = Some(Carried { len, in_place: offered });
            }
            Some(_) => {
                self.count.dropped += 1;
                self.give_back(queue);
            }
        }
    }

    /// Gives the first chain back unused: one that is too small, kept, would stop all frames.
    fn give_back(&mut self, queue: &mut Queue) {
        let Some(chain) = self.in_hand.pop_front() else { return };
        queue.complete(chain.head, 0);
        self.room -= chain.len;
        self.used_slices += chain.slices;
    }

    /// Finishes a frame that was put by; `false` when it must wait for more buffers.
    fn finish_carried(&mut self, queue: &mut Queue, io: &FrameIo) -> Result<bool, Fault> {
        let Some(Carried { len, in_place }) = self.carried else { return Ok(true) };
        self.take_chains(queue, len)?;
        if self.room >= len {
            let rest = io.spilled(len - in_place).unwrap_or_default();
            self.write(in_place, rest);
            self.complete(queue, len);
        } else if self.has_whole_ring(queue) {
            // The driver has no more buffers than these: it can never take such a frame.
            self.count.dropped += 1;
        } else {
            return Ok(false);
        }
        self.carried = None;
        Ok(true)
    }

    /// Whether no buffer is left that the driver could still make available.
    fn has_whole_ring(&self, queue: &Queue) -> bool {
        let size = usize::from(queue.size());
        self.in_hand.len() >= size || self.slices.len() - self.used_slices >= size
    }

    /// Gives the driver the chains that a frame of `len` bytes fills.
    fn complete(&mut self, queue: &mut Queue, len: usize) {
        let mut left = len;
        let mut buffers: u16 = 0;
        for chain in &self.in_hand {
            buffers += 1;
            left = left.saturating_sub(chain.len);
            if left == 0 {
                break;
            }
        }
        self.write(NUM_BUFFERS_OFFSET, &buffers.to_le_bytes());
        left = len;
        for _ in 0..buffers {
            let Some(chain) = self.in_hand.pop_front() else { break };
            let written = left.min(chain.len);
            queue.complete(chain.head, u32::try_from(written).unwrap_or(u32::MAX));
            left -= written;
            self.room -= chain.len;
            self.used_slices += chain.slices;
        }
        self.count.frames += 1;
        self.count.bytes += (len - HEADER_BYTES) as u64;
    }

    /// Writes `bytes` to the buffers in hand, from their byte `offset` on.
    fn write(&self, mut offset: usize, mut bytes: &[u8]) {
        for slice in self.slices.get(self.used_slices..).unwrap_or_default() {
            if bytes.is_empty() {
                break;
            }
            match slice.split_at(offset) {
                None => offset -= slice.len(),
                Some((_, rest)) => {
                    let count = rest.copy_from(bytes);
                    bytes = bytes.get(count..).unwrap_or_default();
                    offset = 0;
                }
            }
        }
    }
}

/// Whether the kernel has taken a frame off its queue and could not deliver it.
fn is_of_one_frame(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EFAULT | libc::EINVAL))
}
