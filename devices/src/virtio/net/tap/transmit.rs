//! Frames from the driver to the tap.

use crate::host::tap::{FRAME_BYTES_MAX, FrameIo, SLICES_MAX, TapQueue};
use crate::virtio::chain::Chain;
use crate::virtio::net::backend::Count;
use crate::virtio::net::layout::HEADER_BYTES;
use crate::virtio::queue::Queue;
use crate::virtio::worker::Fault;

/// Nothing shorter than an Ethernet header is a frame.
const FRAME_BYTES_MIN: usize = HEADER_BYTES + 14;

/// Frames after which the driver gets its buffers back though more are waiting.
const PUBLISH_FRAMES: usize = 64;

/// The sending half of a queue pair.
pub(super) struct Transmit {
    chain: Chain,
    /// The tap was full when it should have taken the chain.
    is_waiting: bool,
    count: Count,
}

impl Transmit {
    pub(super) fn new(queue: &Queue) -> Self {
        let chain = Chain::with_capacity(queue.size());
        Self { chain, is_waiting: false, count: Count::default() }
    }

    /// Whether there is a frame for which the tap had no room.
    pub(super) fn is_waiting(&self) -> bool {
        self.is_waiting
    }

    pub(super) fn take_count(&mut self) -> Count {
        std::mem::take(&mut self.count)
    }

    /// Sends what the driver has made available, until the tap is full.
    pub(super) fn run(
        &mut self,
        queue: &mut Queue,
        tap: &TapQueue,
        io: &mut FrameIo,
        is_up: bool,
    ) -> Result<(), Fault> {
        let mut unpublished = 0;
        while self.is_waiting || queue.pop(&mut self.chain)? {
            self.is_waiting = !self.send(tap, io, is_up);
            if self.is_waiting {
                break;
            }
            queue.complete(self.chain.head(), 0);
            unpublished += 1;
            if unpublished == PUBLISH_FRAMES {
                unpublished = 0;
                queue.notify_driver();
            }
        }
        Ok(())
    }

    /// Sends the frame of the chain or drops it; `false` when the tap is full.
    ///
    /// Whether its header makes sense is the kernel's to judge, which reads it once.
    fn send(&mut self, tap: &TapQueue, io: &mut FrameIo, is_up: bool) -> bool {
        let slices = self.chain.readable();
        let len = self.chain.readable_len();
        let is_frame =
            (FRAME_BYTES_MIN..=FRAME_BYTES_MAX).contains(&len) && slices.len() <= SLICES_MAX;
        if !is_frame || !is_up {
            self.count.dropped += 1;
            return true;
        }
        match io.send(tap, slices) {
            Ok(_) => {
                self.count.frames += 1;
                self.count.bytes += (len - HEADER_BYTES) as u64;
            }
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return false,
            // The kernel does not like the frame, or the interface is down.
            Err(_) => self.count.dropped += 1,
        }
        true
    }
}
