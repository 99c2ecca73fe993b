//! Rings whose back end is gone for good, for drivers that would otherwise wait for ever.

use arch::memory::GuestMemory;

use super::Ring;
use crate::event::{Event, EventSet, Watch};
use crate::virtio::chain::Chain;
use crate::virtio::queue::{Queue, QueueError};

/// Answers a request by an error and returns the number of bytes written.
pub type Refusal = fn(&mut Chain) -> u32;

/// Serves rings by refusing every request.
pub(super) struct Refusing {
    queues: Vec<Queue>,
    chain: Chain,
    refuse: Refusal,
}

impl Refusing {
    /// Refuses what the back end took and did not answer. It touches the rings no more.
    pub(super) fn begin(
        rings: &[Ring],
        memory: GuestMemory,
        features: u64,
        refuse: Refusal,
    ) -> Result<Self, QueueError> {
        let mut refusing = Self { queues: Vec::new(), chain: Chain::default(), refuse };
        for ring in rings {
            let (mut queue, unanswered) = Queue::resume(ring.setup.clone(), memory, features)?;
            for head in unanswered {
                queue.take(head, &mut refusing.chain)?;
                queue.complete(head, refuse(&mut refusing.chain));
            }
            queue.notify_driver();
            // Who was lost may have answered without saying so.
            ring.setup.interrupt.trigger();
            refusing.queues.push(queue);
        }
        Ok(refusing)
    }

    /// Watches the doorbells, with tokens from `first` on.
    pub(super) fn watch(&self, first: u32, watch: &mut Watch<'_, '_>) -> std::io::Result<()> {
        for (token, doorbell) in (first..).zip(self.doorbells()) {
            watch.add(doorbell, token, EventSet::IN | EventSet::EDGE_TRIGGERED)?;
            doorbell.signal();
        }
        Ok(())
    }

    /// Refuses what the driver has made available in the queue at `index`.
    pub(super) fn serve(&mut self, index: usize) -> Result<(), QueueError> {
        let Some(queue) = self.queues.get_mut(index) else { return Ok(()) };
        queue.begin_batch();
        while queue.pop(&mut self.chain)? {
            let written = (self.refuse)(&mut self.chain);
            queue.complete(self.chain.head(), written);
        }
        queue.notify_driver();
        Ok(())
    }

    fn doorbells(&self) -> impl Iterator<Item = &Event> {
        self.queues.iter().map(Queue::doorbell)
    }
}
