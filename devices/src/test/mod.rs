//! The guest's side of any device, for tests.
//!
//! A [`driver::Driver`] uses registers and rings as a guest does; [`hostile`] uses them as no guest
//! should. Workers run on the thread of a [`LoopThread`], as they do in a machine.

pub(crate) mod driver;
pub(crate) mod echo;
pub(crate) mod hostile;
mod independent;
pub(crate) mod liar;
pub(crate) mod pci_wire;
pub(crate) mod peer;
pub(crate) mod wire;

use std::io;
use std::sync::mpsc::{Sender, channel};
use std::thread::{self, JoinHandle};

use crate::event::{Event, EventLoop, EventSet, Handler, LoopHandle, Watch};

/// An event loop on a thread of its own, stopped when dropped.
pub(crate) struct LoopThread {
    handle: LoopHandle,
    thread: Option<JoinHandle<()>>,
}

impl LoopThread {
    pub(crate) fn new() -> Self {
        Self::with(|_| ()).0
    }

    /// The same, with what `build` makes in the loop before it runs.
    pub(crate) fn with<T: Send + 'static>(
        build: impl FnOnce(&mut EventLoop) -> T + Send + 'static,
    ) -> (Self, T) {
        let (sender, receiver) = channel();
        let thread = thread::spawn(move || {
            let mut event_loop = EventLoop::new().unwrap();
            let built = build(&mut event_loop);
            sender.send((event_loop.handle(), built)).unwrap();
            event_loop.run().unwrap();
        });
        let (handle, built) = receiver.recv().unwrap();
        (Self { handle, thread: Some(thread) }, built)
    }

    pub(crate) fn handle(&self) -> LoopHandle {
        self.handle.clone()
    }

    /// Returns when everything that was signalled before the call has been served.
    pub(crate) fn settle(&self) {
        // epoll reports files in the order in which they became ready.
        let event = Event::new().unwrap();
        let (served, wait) = channel();
        let last = Last { event: event.clone(), served };
        let _registration = self.handle.add(Box::new(last)).unwrap();
        event.signal();
        wait.recv().unwrap();
    }
}

struct Last {
    event: Event,
    served: Sender<()>,
}

impl Handler for Last {
    fn start(&mut self, watch: &mut Watch<'_, '_>) -> io::Result<()> {
        watch.add(&self.event, 0, EventSet::IN)
    }

    fn ready(&mut self, _: u32, _: EventSet, _: &mut Watch<'_, '_>) {
        self.event.take();
        self.served.send(()).unwrap();
    }
}

impl Drop for LoopThread {
    fn drop(&mut self) {
        self.handle.stop();
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}
