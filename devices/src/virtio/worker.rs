//! The back of a device and the one run loop in which every fault of a guest ends.

use std::io;
use std::os::fd::{AsRawFd, RawFd};

use super::device::NeedsReset;
use super::queue::{Queue, QueueError};
use crate::event::{EventSet, Handler, LoopHandle, Registration, Watch};

/// Tokens from here on are the worker's own; those below are doorbells.
const OWN_TOKENS: u32 = 1 << 16;

/// Why a worker cannot go on; `?` carries it to the run loop, which logs once and asks for a reset.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    /// The driver broke a rule of the rings.
    #[error("queue: {0}")]
    Queue(#[from] QueueError),
    /// The driver sent a request that cannot be answered, not even with an error.
    #[error("malformed request: {0}")]
    Request(&'static str),
    /// What serves the device failed.
    #[error("host: {0}")]
    Host(#[from] io::Error),
}

/// The back of a device: owns its queues and what serves them, on one thread.
pub trait Worker: Send {
    /// All queues; their doorbells are watched already.
    fn queues(&mut self) -> &mut [Queue];

    /// Names further files to watch, with tokens of the worker's own.
    fn watch(&mut self, _watch: &mut WorkerWatch<'_, '_, '_>) -> io::Result<()> {
        Ok(())
    }

    /// Serves the queue at `index`: the driver has made buffers available.
    fn doorbell(&mut self, index: usize) -> Result<(), Fault>;

    /// Serves a file of [`Worker::watch`].
    fn ready(
        &mut self,
        _token: u32,
        _readiness: EventSet,
        _watch: &mut WorkerWatch<'_, '_, '_>,
    ) -> Result<(), Fault> {
        Ok(())
    }
}

/// The files of a worker, apart from the doorbells.
pub struct WorkerWatch<'a, 'b, 'c> {
    watch: &'a mut Watch<'b, 'c>,
    files: &'a mut Vec<RawFd>,
}

impl WorkerWatch<'_, '_, '_> {
    /// Watches a file; each file once.
    pub fn add(&mut self, file: &impl AsRawFd, token: u32, interest: EventSet) -> io::Result<()> {
        self.watch.add(file, token.saturating_add(OWN_TOKENS), interest)?;
        self.files.push(file.as_raw_fd());
        Ok(())
    }

    /// Changes what a watched file is watched for.
    pub fn modify(
        &mut self,
        file: &impl AsRawFd,
        token: u32,
        interest: EventSet,
    ) -> io::Result<()> {
        self.watch.modify(file, token.saturating_add(OWN_TOKENS), interest)
    }

    /// Watches a file no more; it must still be open.
    pub fn remove(&mut self, file: &impl AsRawFd) -> io::Result<()> {
        self.files.retain(|other| *other != file.as_raw_fd());
        self.watch.remove(file)
    }
}

/// Moves a worker to a loop's thread and runs it there until the registration is dropped.
pub fn start(
    name: &str,
    worker: impl Worker + 'static,
    home: &LoopHandle,
    needs_reset: NeedsReset,
) -> io::Result<Registration> {
    let files = Vec::new();
    home.add(Box::new(Running { name: name.to_owned(), worker, files, needs_reset, faulty: false }))
}

struct Running<W> {
    name: String,
    worker: W,
    /// What the worker watches apart from the doorbells.
    files: Vec<RawFd>,
    needs_reset: NeedsReset,
    faulty: bool,
}

impl<W: Worker> Handler for Running<W> {
    fn start(&mut self, watch: &mut Watch<'_, '_>) -> io::Result<()> {
        for (token, queue) in (0..OWN_TOKENS).zip(self.worker.queues()) {
            // Edge triggered: each notification is an edge, and nobody needs to take the signal.
            watch.add(queue.doorbell(), token, EventSet::IN | EventSet::EDGE_TRIGGERED)?;
            // The driver may have made buffers available before the doorbell was watched.
            queue.doorbell().signal();
        }
        self.worker.watch(&mut WorkerWatch { watch, files: &mut self.files })
    }

    fn ready(&mut self, token: u32, readiness: EventSet, watch: &mut Watch<'_, '_>) {
        let outcome = match token.checked_sub(OWN_TOKENS) {
            Some(_) if self.faulty => Ok(()),
            Some(own) => {
                let mut watch = WorkerWatch { watch, files: &mut self.files };
                self.worker.ready(own, readiness, &mut watch)
            }
            None => self.ring(token),
        };
        if let Err(fault) = outcome {
            self.fail(&fault, watch);
        }
    }
}

impl<W: Worker> Running<W> {
    fn ring(&mut self, token: u32) -> Result<(), Fault> {
        let Ok(index) = usize::try_from(token) else { return Ok(()) };
        let Some(queue) = self.worker.queues().get_mut(index) else { return Ok(()) };
        queue.begin_batch();
        if self.faulty { Ok(()) } else { self.worker.doorbell(index) }
    }

    /// Retires the worker: it keeps its place, so that a reset finds it, and serves nothing more.
    fn fail(&mut self, fault: &Fault, watch: &mut Watch<'_, '_>) {
        self.faulty = true;
        crate::warn_limited!("{}: {fault}; the device needs a reset by its driver", self.name);
        for queue in self.worker.queues() {
            let _ = watch.remove(queue.doorbell());
        }
        for file in self.files.drain(..) {
            let _ = watch.remove(&file);
        }
        self.needs_reset.request();
    }
}
