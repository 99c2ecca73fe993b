//! A limit on how long a process may take to answer.
//!
//! The vhost crate waits for answers without one, and takes a time-out of the socket for a reason
//! to go on waiting. So another thread's loop watches a timer, and shuts the socket down when it
//! expires: then the crate sees the end of the conversation.

use std::io;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::timer::Timer;
use crate::event::{EventSet, Handler, LoopHandle, Registration, Watch};

/// A timer that ends a conversation unless it is stopped in time.
pub(super) struct Deadline {
    timer: Arc<Timer>,
    has_passed: Arc<AtomicBool>,
    _watcher: Registration,
}

impl Deadline {
    /// Makes a deadline for `socket`, which the loop of `watch` keeps: another thread's.
    pub(super) fn new(socket: UnixStream, watch: &LoopHandle) -> io::Result<Self> {
        let timer = Arc::new(Timer::new()?);
        let has_passed = Arc::<AtomicBool>::default();
        let watcher =
            Watcher { timer: Arc::clone(&timer), socket, has_passed: Arc::clone(&has_passed) };
        Ok(Self { timer, has_passed, _watcher: watch.add(Box::new(watcher))? })
    }

    /// Does `work`, and shuts the socket down when it takes longer than `limit`.
    pub(super) fn limit<T>(&self, limit: Duration, work: impl FnOnce() -> T) -> io::Result<T> {
        self.timer.set(limit)?;
        let outcome = work();
        self.timer.set(Duration::ZERO)?;
        Ok(outcome)
    }

    /// Says whether a conversation was ended.
    pub(super) fn has_passed(&self) -> bool {
        self.has_passed.load(Ordering::Acquire)
    }
}

struct Watcher {
    timer: Arc<Timer>,
    socket: UnixStream,
    has_passed: Arc<AtomicBool>,
}

impl Handler for Watcher {
    fn start(&mut self, watch: &mut Watch<'_, '_>) -> io::Result<()> {
        watch.add(&*self.timer, 0, EventSet::IN)
    }

    fn ready(&mut self, _: u32, _: EventSet, _: &mut Watch<'_, '_>) {
        // A timer that was stopped meanwhile has nothing to take.
        if self.timer.take() {
            self.has_passed.store(true, Ordering::Release);
            let _ = self.socket.shutdown(Shutdown::Both);
        }
    }
}
