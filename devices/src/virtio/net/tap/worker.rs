//! One queue pair: what wakes it, and in which order it works.

use std::io;
use std::sync::Arc;

use super::receive::Receive;
use super::transmit::Transmit;
use crate::event::{Event, EventSet};
use crate::host::tap::{FrameIo, Tap, TapQueue};
use crate::virtio::net::backend::Link;
use crate::virtio::queue::Queue;
use crate::virtio::worker::{Fault, Worker, WorkerWatch};

const TAP: u32 = 0;
const ATTACHED: u32 = 1;

const RECEIVE: usize = 0;

/// Frames that wait in a tap for a driver that is gone, at the most: more than its queue has.
const STALE_FRAMES_MAX: usize = 4096;

pub(super) struct PairWorker {
    name: String,
    index: usize,
    queues: [Queue; 2],
    tap: Arc<Tap>,
    /// Signalled when the kernel has begun to spread frames over this queue.
    attached: Event,
    link: Link,
    receive: Receive,
    transmit: Transmit,
    io: FrameIo,
}

impl PairWorker {
    pub(super) fn new(
        name: String,
        index: usize,
        queues: [Queue; 2],
        features: u64,
        tap: Arc<Tap>,
        attached: Event,
        link: Link,
    ) -> Self {
        let [receive, transmit] = &queues;
        let (receive, transmit) = (Receive::new(receive, features), Transmit::new(transmit));
        let io = FrameIo::new();
        Self { name, index, queues, tap, attached, link, receive, transmit, io }
    }

    fn tap(&self) -> io::Result<&TapQueue> {
        self.tap.queues().get(self.index).ok_or(io::ErrorKind::NotFound.into())
    }

    /// Watches the tap from now on, which must be attached: a detached one has nothing to wait on.
    ///
    /// What it holds was meant for an earlier driver, with offloads that this one may not know.
    fn watch_tap(&mut self, watch: &mut WorkerWatch<'_, '_, '_>) -> io::Result<()> {
        self.receive.drop_carried();
        for _ in 0..STALE_FRAMES_MAX {
            let Some(queue) = self.tap.queues().get(self.index) else { break };
            if self.io.discard(queue).is_err() {
                break;
            }
        }
        let _ = watch.remove(self.tap()?);
        let interest = EventSet::IN | EventSet::OUT | EventSet::EDGE_TRIGGERED;
        watch.add(self.tap()?, TAP, interest)
    }

    fn receive(&mut self) -> Result<(), Fault> {
        let Some(tap) = self.tap.queues().get(self.index) else { return Ok(()) };
        let [queue, _] = &mut self.queues;
        let is_up = self.link.is_up();
        let outcome = self.receive.run(queue, tap, &mut self.io, is_up);
        queue.notify_driver();
        if let Some(counters) = self.link.counters(self.index) {
            counters.receive.add(self.receive.take_count());
        }
        outcome
    }

    fn transmit(&mut self) -> Result<(), Fault> {
        let Some(tap) = self.tap.queues().get(self.index) else { return Ok(()) };
        let [_, queue] = &mut self.queues;
        let is_up = self.link.is_up();
        let outcome = self.transmit.run(queue, tap, &mut self.io, is_up);
        queue.notify_driver();
        if let Some(counters) = self.link.counters(self.index) {
            counters.transmit.add(self.transmit.take_count());
        }
        outcome
    }

    /// The first queue is never detached: its error is that the interface is gone.
    fn tap_failed(&self, watch: &mut WorkerWatch<'_, '_, '_>) -> Result<(), Fault> {
        if self.index == 0 {
            crate::warn_limited!("{}: the tap has vanished: the guest sees no link", self.name);
            self.link.set_carrier(false);
        }
        let _ = watch.remove(self.tap()?);
        Ok(())
    }
}

impl Worker for PairWorker {
    fn queues(&mut self) -> &mut [Queue] {
        &mut self.queues
    }

    fn watch(&mut self, watch: &mut WorkerWatch<'_, '_, '_>) -> io::Result<()> {
        if self.index == 0 {
            return self.watch_tap(watch);
        }
        self.attached.take();
        watch.add(&self.attached, ATTACHED, EventSet::IN)
    }

    fn doorbell(&mut self, index: usize) -> Result<(), Fault> {
        if index == RECEIVE { self.receive() } else { self.transmit() }
    }

    fn ready(
        &mut self,
        token: u32,
        readiness: EventSet,
        watch: &mut WorkerWatch<'_, '_, '_>,
    ) -> Result<(), Fault> {
        if token == ATTACHED {
            self.attached.take();
            return Ok(self.watch_tap(watch)?);
        }
        if readiness.contains(EventSet::ERROR) {
            return self.tap_failed(watch);
        }
        if self.transmit.is_waiting() && readiness.contains(EventSet::OUT) {
            let [_, queue] = &mut self.queues;
            queue.begin_batch();
            self.transmit()?;
        }
        if readiness.contains(EventSet::IN) {
            let [queue, _] = &mut self.queues;
            queue.begin_batch();
            self.receive()?;
        }
        Ok(())
    }
}
