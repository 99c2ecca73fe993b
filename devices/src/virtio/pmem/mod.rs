//! Virtio persistent memory (virtio 1.3, section 5.19).
//!
//! A file as a range of the guest's addresses: the guest reads, and where it may writes, the host's
//! page cache itself. The device only makes writes durable. Other devices reach no buffers in the
//! range: it is not RAM.

#[cfg(test)]
mod test;

use std::io;
use std::sync::Arc;

use zerocopy::{Immutable, IntoBytes};

use super::chain::Chain;
use super::device::{Activation, DeviceKind, Offer, VirtioDevice};
use super::queue::Queue;
use super::worker::{self, Fault, Worker};
use crate::event::{LoopHandle, Registration};
use crate::host::file_window::FileWindow;
use crate::warn_limited;

/// Flushes that a driver may have under way: Linux sends one for each of its own at a time.
const QUEUE_SIZE: u16 = 32;

/// `VIRTIO_PMEM_REQ_TYPE_FLUSH` (section 5.19.6.1).
const FLUSH: u32 = 0;

/// The configuration space (section 5.19.4).
#[derive(Clone, Copy, Debug, IntoBytes, Immutable)]
#[repr(C)]
struct Config {
    start: u64,
    size: u64,
}

/// A file that the guest has as memory: the front of the device.
pub struct Pmem {
    name: String,
    window: Arc<FileWindow>,
    config: Config,
    home: LoopHandle,
    worker: Option<Registration>,
}

impl Pmem {
    /// Makes the device for a window that the guest has at `start`; `name` is for the log.
    ///
    /// Flushes wait for the file in the loop of `home`; a read-only window has none to wait for.
    pub fn new(name: String, window: Arc<FileWindow>, start: u64, home: LoopHandle) -> Self {
        let config = Config { start: start.to_le(), size: window.len().to_le() };
        Self { name, window, config, home, worker: None }
    }
}

impl VirtioDevice for Pmem {
    fn offer(&self) -> Offer {
        Offer { kind: DeviceKind::Pmem, features: 0, queue_sizes: vec![QUEUE_SIZE] }
    }

    fn config(&self) -> &[u8] {
        self.config.as_bytes()
    }

    fn activate(&mut self, mut activation: Activation) -> io::Result<()> {
        let queue = activation.take_queue(0).map_err(io::Error::other)?;
        let worker = PmemWorker {
            name: self.name.clone(),
            window: Arc::clone(&self.window),
            chain: Chain::with_capacity(queue.size()),
            queue,
        };
        self.worker = Some(worker::start(&self.name, worker, &self.home, activation.needs_reset)?);
        Ok(())
    }

    fn reset(&mut self) {
        self.worker = None;
    }
}

/// The back of the device.
struct PmemWorker {
    name: String,
    window: Arc<FileWindow>,
    queue: Queue,
    chain: Chain,
}

impl Worker for PmemWorker {
    fn queues(&mut self) -> &mut [Queue] {
        std::slice::from_mut(&mut self.queue)
    }

    fn doorbell(&mut self, _index: usize) -> Result<(), Fault> {
        let outcome = self.serve();
        self.queue.notify_driver();
        outcome
    }
}

impl PmemWorker {
    fn serve(&mut self) -> Result<(), Fault> {
        while self.queue.pop(&mut self.chain)? {
            let request = self.chain.take().map(u32::from_le);
            let failed = match request {
                Some(FLUSH) => self.flush().is_err(),
                _ => true,
            };
            let response = u32::from(failed).to_le_bytes();
            if self.chain.write(&response) < response.len() {
                return Err(Fault::Request("no room for a response"));
            }
            self.queue.complete(self.chain.head(), 4);
        }
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        let outcome = self.window.flush();
        if let Err(error) = &outcome {
            warn_limited!("{}: a flush failed: {error}", self.name);
        }
        outcome
    }
}
