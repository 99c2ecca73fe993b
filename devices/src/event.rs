//! Events and the loops that wait for them.
//!
//! An [`Event`] is an eventfd. An [`EventLoop`] is an epoll loop that owns its [`Handler`]s; other
//! threads add and remove handlers through its [`LoopHandle`] and share nothing else with it.
#![expect(unsafe_code, reason = "an EventFd of vmm-sys-util cannot be borrowed otherwise")]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, ThreadId};

use event_manager::{
    EventManager, EventOps, Events, MutEventSubscriber, RemoteEndpoint, SubscriberId, SubscriberOps,
};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

pub use event_manager::EventSet;

/// A loop looks at this many ready files before it waits again.
const READY_MAX: usize = 32;

/// An eventfd: clones signal and take the same event.
#[derive(Clone, Debug)]
pub struct Event(Arc<EventFd>);

impl Event {
    /// Makes an event that is not signalled.
    pub fn new() -> io::Result<Self> {
        Ok(Self(Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?)))
    }

    /// Signals the event. Signals that nobody took are merged.
    pub fn signal(&self) {
        // The only failure is a counter that is full, which is as signalled as an event can be.
        let _ = self.0.write(1);
    }

    /// Takes the signal, if there is one.
    pub fn take(&self) -> bool {
        self.0.read().is_ok()
    }

    /// Says whether there is a signal to take, by taking it for a moment: for events that nobody
    /// else takes meanwhile.
    pub fn is_signalled(&self) -> bool {
        let is_signalled = self.take();
        if is_signalled {
            self.signal();
        }
        is_signalled
    }

    /// The event as rust-vmm crates take it.
    pub(crate) fn eventfd(&self) -> &EventFd {
        &self.0
    }

    /// Says whether both are the same event.
    pub fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl AsRawFd for Event {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

impl AsFd for Event {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the eventfd is open as long as the event, which the result borrows.
        unsafe { BorrowedFd::borrow_raw(self.0.as_raw_fd()) }
    }
}

/// What an [`EventLoop`] calls when a watched file is ready.
pub trait Handler: Send {
    /// Names the files to watch, once, on the loop's thread.
    fn start(&mut self, watch: &mut Watch<'_, '_>) -> io::Result<()>;
    /// Serves the file that was watched under `token`.
    fn ready(&mut self, token: u32, readiness: EventSet, watch: &mut Watch<'_, '_>);
}

/// The files that one handler watches.
pub struct Watch<'a, 'b>(&'a mut EventOps<'b>);

impl Watch<'_, '_> {
    /// Watches a file; each file once in a loop.
    pub fn add(&mut self, file: &impl AsRawFd, token: u32, interest: EventSet) -> io::Result<()> {
        self.0.add(Events::with_data(file, token, interest)).map_err(io::Error::other)
    }

    /// Changes what a watched file is watched for.
    pub fn modify(
        &mut self,
        file: &impl AsRawFd,
        token: u32,
        interest: EventSet,
    ) -> io::Result<()> {
        self.0.modify(Events::with_data(file, token, interest)).map_err(io::Error::other)
    }

    /// Watches a file no more; it must still be open.
    pub fn remove(&mut self, file: &impl AsRawFd) -> io::Result<()> {
        self.0.remove(Events::empty(file)).map_err(io::Error::other)
    }
}

/// An epoll loop with its handlers; belongs to the thread that made it.
pub struct EventLoop {
    manager: EventManager<Subscriber>,
    stopped: Arc<AtomicBool>,
    thread: ThreadId,
}

impl EventLoop {
    /// Makes a loop for this thread.
    pub fn new() -> io::Result<Self> {
        let manager = EventManager::new_with_capacity(READY_MAX).map_err(io::Error::other)?;
        Ok(Self { manager, stopped: Arc::default(), thread: thread::current().id() })
    }

    /// The face of this loop for every thread, its own included.
    pub fn handle(&self) -> LoopHandle {
        LoopHandle {
            endpoint: self.manager.remote_endpoint(),
            stopped: Arc::clone(&self.stopped),
            thread: self.thread,
        }
    }

    /// Adds a handler from the loop's own thread while the loop does not run.
    pub fn add(&mut self, handler: Box<dyn Handler>) -> io::Result<Registration> {
        let id = add_subscriber(&mut self.manager, handler)?;
        Ok(Registration { handle: self.handle(), id })
    }

    /// Serves events until [`LoopHandle::stop`] is called.
    pub fn run(&mut self) -> io::Result<()> {
        while !self.stopped.swap(false, Ordering::AcqRel) {
            self.manager.run().map_err(io::Error::other)?;
        }
        Ok(())
    }

    /// Serves what is ready now, without waiting.
    pub fn run_ready(&mut self) -> io::Result<()> {
        while self.manager.run_with_timeout(0).map_err(io::Error::other)? > 0 {}
        Ok(())
    }
}

/// Adds and removes handlers of a loop from any thread.
#[derive(Clone)]
pub struct LoopHandle {
    endpoint: RemoteEndpoint<Subscriber>,
    stopped: Arc<AtomicBool>,
    thread: ThreadId,
}

impl LoopHandle {
    /// Moves a handler to the loop's thread and starts it there.
    ///
    /// Called from another thread it waits until the handler watches its files, or has failed to.
    pub fn add(&self, handler: Box<dyn Handler>) -> io::Result<Registration> {
        let id = self
            .endpoint
            .call_blocking(move |operations| add_subscriber(operations, handler).map_err(LoopError))
            .map_err(|LoopError(error)| error)?;
        Ok(Registration { handle: self.clone(), id })
    }

    /// Ends [`EventLoop::run`] after the events at hand.
    pub fn stop(&self) {
        self.stopped.store(true, Ordering::Release);
        // A loop that is gone needs no kick.
        let _ = self.endpoint.kick();
    }
}

/// A handler in a loop. Dropping it removes the handler and drops it on the loop's thread.
///
/// When the drop returns, the handler is gone; only on the loop's own thread it goes with the next
/// round of the loop.
#[must_use]
pub struct Registration {
    handle: LoopHandle,
    id: SubscriberId,
}

impl Drop for Registration {
    fn drop(&mut self) {
        let id = self.id;
        let remove = move |operations: &mut dyn SubscriberOps<Subscriber = Subscriber>| {
            drop(operations.remove_subscriber(id));
        };
        // An error means that the loop is gone, and its handlers with it.
        if thread::current().id() == self.handle.thread {
            let _ = self.handle.endpoint.fire(remove);
        } else {
            let _ = self.handle.endpoint.call_blocking(move |operations| {
                remove(operations);
                Ok::<(), LoopError>(())
            });
        }
    }
}

/// The handler as event-manager knows it, with the outcome of its start.
struct Subscriber {
    handler: Box<dyn Handler>,
    started: io::Result<()>,
}

impl MutEventSubscriber for Subscriber {
    fn init(&mut self, operations: &mut EventOps<'_>) {
        self.started = self.handler.start(&mut Watch(operations));
    }

    fn process(&mut self, events: Events, operations: &mut EventOps<'_>) {
        self.handler.ready(events.data(), events.event_set(), &mut Watch(operations));
    }
}

struct LoopError(io::Error);

impl From<event_manager::Error> for LoopError {
    fn from(error: event_manager::Error) -> Self {
        Self(io::Error::other(error))
    }
}

fn add_subscriber(
    operations: &mut dyn SubscriberOps<Subscriber = Subscriber>,
    handler: Box<dyn Handler>,
) -> io::Result<SubscriberId> {
    let id = operations.add_subscriber(Subscriber { handler, started: Ok(()) });
    let subscriber = operations.subscriber_mut(id).map_err(io::Error::other)?;
    match std::mem::replace(&mut subscriber.started, Ok(())) {
        Ok(()) => Ok(id),
        Err(error) => {
            drop(operations.remove_subscriber(id));
            Err(error)
        }
    }
}

#[cfg(test)]
mod test {
    use std::sync::mpsc::{Sender, channel};

    use super::*;

    struct Counter {
        event: Event,
        seen: Sender<u32>,
    }

    impl Handler for Counter {
        fn start(&mut self, watch: &mut Watch<'_, '_>) -> io::Result<()> {
            watch.add(&self.event, 7, EventSet::IN)
        }
        fn ready(&mut self, token: u32, _: EventSet, _: &mut Watch<'_, '_>) {
            assert!(self.event.take());
            self.seen.send(token).unwrap();
        }
    }

    #[test]
    fn a_handler_added_from_another_thread_is_called_until_its_registration_is_dropped() {
        let (sender, handles) = channel();
        let runner = thread::spawn(move || {
            let mut event_loop = EventLoop::new().unwrap();
            sender.send(event_loop.handle()).unwrap();
            event_loop.run().unwrap();
        });
        let handle = handles.recv().unwrap();
        let event = Event::new().unwrap();
        let (seen, tokens) = channel();
        let registration = handle.add(Box::new(Counter { event: event.clone(), seen })).unwrap();
        event.signal();
        assert_eq!(tokens.recv(), Ok(7));
        drop(registration);
        assert!(tokens.recv().is_err(), "the handler and its sender are gone");
        handle.stop();
        runner.join().unwrap();
    }

    #[test]
    fn a_handler_that_cannot_start_is_refused_and_dropped() {
        let mut event_loop = EventLoop::new().unwrap();
        let event = Event::new().unwrap();
        let (seen, _tokens) = channel();
        let first = Counter { event: event.clone(), seen: seen.clone() };
        let _first = event_loop.add(Box::new(first)).unwrap();
        assert!(event_loop.add(Box::new(Counter { event, seen })).is_err());
    }

    #[test]
    fn a_registration_dropped_on_the_loops_own_thread_goes_with_the_next_round() {
        let mut event_loop = EventLoop::new().unwrap();
        let event = Event::new().unwrap();
        let (seen, tokens) = channel();
        let registration = event_loop.add(Box::new(Counter { event, seen })).unwrap();
        drop(registration);
        event_loop.run_ready().unwrap();
        assert!(tokens.recv().is_err());
    }
}
