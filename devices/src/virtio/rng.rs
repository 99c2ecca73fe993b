//! Virtio entropy device (virtio 1.3, section 5.4).
//!
//! One queue of buffers that the device fills with random bytes of the host's kernel.

use std::io;
use std::sync::Arc;

use super::chain::Chain;
use super::counters::{Counters, Totals};
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
    totals: Arc<Totals<2>>,
    home: LoopHandle,
    worker: Option<Registration>,
}

impl Entropy {
    /// Makes an entropy source whose worker runs in the loop of `home`.
    pub fn new(home: LoopHandle) -> Self {
        let totals = Arc::new(Totals::new(["requests", "bytes"]));
        Self { totals, home, worker: None }
    }
}

impl VirtioDevice for Entropy {
    fn offer(&self) -> Offer {
        Offer { kind: DeviceKind::Entropy, features: 0, queue_sizes: vec![QUEUE_SIZE] }
    }

    fn counters(&self) -> Option<Counters> {
        let totals = Arc::clone(&self.totals);
        Some(Box::new(move || totals.read()))
    }

    fn activate(&mut self, mut activation: Activation) -> io::Result<()> {
        let queue = activation.take_queue(0).map_err(io::Error::other)?;
        let chain = Chain::with_capacity(queue.size());
        let worker = EntropyWorker { queue, chain, totals: Arc::clone(&self.totals) };
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
    totals: Arc<Totals<2>>,
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
        let mut batch = [0, 0];
        while self.queue.pop(&mut self.chain)? {
            let written = fill(&self.chain)?;
            self.queue.complete(self.chain.head(), written);
            let [requests, bytes] = &mut batch;
            *requests += 1;
            *bytes += u64::from(written);
        }
        self.totals.add(&mut batch);
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

#[cfg(test)]
mod test {
    use super::*;
    use crate::test::LoopThread;
    use crate::test::driver::Driver;
    use crate::test::hostile::Subject;

    fn started() -> (LoopThread, Driver) {
        let home = LoopThread::new();
        let mut driver = Driver::mmio(Box::new(Entropy::new(home.handle())));
        driver.start();
        (home, driver)
    }

    #[test]
    fn fills_all_buffers_of_a_request_with_bytes_that_differ_each_time() {
        let (_home, mut driver) = started();
        let first = driver.request(0, &[], &[16, 0, 100]);
        let second = driver.request(0, &[], &[116]);
        assert_eq!((first.len(), second.len()), (116, 116));
        assert_ne!(first, second);
        assert_ne!(first[..16], [0; 16]);
        assert_ne!(first[100..], [0; 16]);
    }

    #[test]
    fn a_large_request_is_filled_up_to_the_limit_and_no_further() {
        let (_home, mut driver) = started();
        let sent = driver.send(0, &[], &[REQUEST_BYTES_MAX - 1, 2, 4096]);
        let len = u32::try_from(REQUEST_BYTES_MAX).unwrap();
        assert_eq!(driver.wait_used(0), (u32::from(sent.head), len));
        assert!(driver.answer(&sent)[REQUEST_BYTES_MAX..].iter().all(|byte| *byte == 0));
    }

    #[test]
    fn a_request_without_room_is_answered_with_nothing() {
        let (_home, mut driver) = started();
        assert_eq!(driver.request(0, &[b"read"], &[]), b"");
        assert_eq!(driver.request(0, &[b"read"], &[4]).len(), 4);
    }

    #[test]
    fn entropy_survives_a_hostile_driver() {
        let subject = Subject {
            make: &|home| Box::new(Entropy::new(home)),
            served: &[0],
            works: &|driver| assert_eq!(driver.request(0, &[], &[8, 8]).len(), 16),
        };
        subject.survives();
    }
}
