//! Virtio entropy device (virtio 1.3, section 5.4).
//!
//! One queue of buffers that the device fills with random bytes of the host's kernel.

use std::io;

use super::chain::Chain;
use super::device::{Activation, DeviceKind, Offer, VirtioDevice};
use super::queue::Queue;
use super::worker::{self, Fault, Worker};
use crate::event::{LoopHandle, Registration};
use crate::host::entropy;

/// A driver has one or two buffers in the queue at a time.
const QUEUE_SIZE: u16 = 8;

/// Bytes written for one request; a larger one is filled in part, as section 5.4.6 allows. With the
/// queue's size it bounds the time that one notification takes from the loop.
const REQUEST_BYTES_MAX: usize = 64 << 10;

/// An entropy source.
pub struct Entropy {
    home: LoopHandle,
    worker: Option<Registration>,
}

impl Entropy {
    /// Makes an entropy source whose worker runs in the loop of `home`.
    pub fn new(home: LoopHandle) -> Self {
        Self { home, worker: None }
    }
}

impl VirtioDevice for Entropy {
    fn offer(&self) -> Offer {
        Offer { kind: DeviceKind::Entropy, features: 0, queue_sizes: vec![QUEUE_SIZE] }
    }

    fn activate(&mut self, mut activation: Activation) -> io::Result<()> {
        let queue = activation.take_queue(0).map_err(io::Error::other)?;
        let worker = EntropyWorker { chain: Chain::with_capacity(queue.size()), queue };
        self.worker = Some(worker::start("rng", worker, &self.home, activation.needs_reset)?);
        Ok(())
    }

    fn reset(&mut self) {
        self.worker = None;
    }
}

struct EntropyWorker {
    queue: Queue,
    chain: Chain,
}

impl Worker for EntropyWorker {
    fn queues(&mut self) -> &mut [Queue] {
        std::slice::from_mut(&mut self.queue)
    }

    fn doorbell(&mut self, _index: usize) -> Result<(), Fault> {
        let outcome = self.serve();
        self.queue.notify_driver();
        outcome
    }
}

impl EntropyWorker {
    fn serve(&mut self) -> Result<(), Fault> {
        while self.queue.pop(&mut self.chain)? {
            let written = fill(&self.chain)?;
            self.queue.complete(self.chain.head(), written);
        }
        Ok(())
    }
}

/// Fills the writable buffers up to the limit and returns the number of bytes written.
fn fill(chain: &Chain) -> io::Result<u32> {
    let mut left = REQUEST_BYTES_MAX;
    for slice in chain.writable() {
        let len = slice.len().min(left);
        if let Some(part) = slice.sub_slice(0, len) {
            entropy::fill(part)?;
        }
        left -= len;
    }
    u32::try_from(REQUEST_BYTES_MAX - left).map_err(io::Error::other)
}
