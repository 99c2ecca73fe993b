//! A device that copies what it reads to what it writes: the smallest one with every part.

use std::io;

use crate::event::{LoopHandle, Registration};
use crate::virtio::chain::Chain;
use crate::virtio::device::{Activation, DeviceKind, Offer, VirtioDevice};
use crate::virtio::queue::Queue;
use crate::virtio::worker::{self, Fault, Worker};

/// Longest request in bytes that is copied; the rest is left out.
pub(crate) const ECHO_BYTES_MAX: usize = 4096;
/// A feature bit of its own.
pub(crate) const FEATURE_ECHO: u64 = 1 << 5;

pub(crate) struct Echo {
    config: [u8; 8],
    queues: usize,
    home: LoopHandle,
    worker: Option<Registration>,
}

impl Echo {
    pub(crate) fn new(queues: usize, home: LoopHandle) -> Self {
        Self { config: *b"echo\0\0\0\0", queues, home, worker: None }
    }
}

impl VirtioDevice for Echo {
    fn offer(&self) -> Offer {
        let queue_sizes = vec![64; self.queues];
        Offer { kind: DeviceKind::Entropy, features: FEATURE_ECHO, queue_sizes }
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn write_config(&mut self, offset: usize, data: &[u8]) {
        self.config[offset..offset + data.len()].copy_from_slice(data);
    }

    fn refresh(&mut self) {
        self.config[7] += 1;
    }

    fn activate(&mut self, mut activation: Activation) -> io::Result<()> {
        let queues = (0..self.queues).map(|index| activation.take_queue(index));
        let queues = queues.collect::<Result<Vec<_>, _>>().map_err(io::Error::other)?;
        let worker = EchoWorker { queues, chain: Chain::with_capacity(64) };
        self.worker = Some(worker::start("echo", worker, &self.home, activation.needs_reset)?);
        Ok(())
    }

    fn reset(&mut self) {
        self.worker = None;
    }
}

struct EchoWorker {
    queues: Vec<Queue>,
    chain: Chain,
}

impl Worker for EchoWorker {
    fn queues(&mut self) -> &mut [Queue] {
        &mut self.queues
    }

    fn doorbell(&mut self, index: usize) -> Result<(), Fault> {
        let queue = &mut self.queues[index];
        while queue.pop(&mut self.chain)? {
            let mut bytes = [0; ECHO_BYTES_MAX];
            let len = self.chain.take_bytes(&mut bytes);
            let written = self.chain.write(&bytes[..len]);
            queue.complete(self.chain.head(), u32::try_from(written).unwrap());
        }
        queue.notify_driver();
        Ok(())
    }
}
