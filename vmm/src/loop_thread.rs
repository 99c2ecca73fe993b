//! A thread that runs one event loop: the home of a device's worker.

use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;

use anyhow::{Context as _, Result};
use devices::event::{EventLoop, LoopHandle};

use crate::thread;

/// A running loop. Dropping it ends the loop and waits for the thread.
pub(crate) struct LoopThread {
    handle: LoopHandle,
    thread: Option<JoinHandle<()>>,
}

impl LoopThread {
    /// Makes the thread; `prepare` runs on it before its loop does: it confines the thread.
    pub(crate) fn spawn(
        name: &str,
        prepare: impl FnOnce() -> Result<()> + Send + 'static,
    ) -> Result<Self> {
        let (started, handles) = channel();
        let thread = thread::spawn(name, move || run(prepare, &started))?;
        let handle = handles.recv().with_context(|| format!("the thread {name} ended"))??;
        Ok(Self { handle, thread: Some(thread) })
    }

    /// The face of the loop.
    pub(crate) fn handle(&self) -> LoopHandle {
        self.handle.clone()
    }
}

impl Drop for LoopThread {
    fn drop(&mut self) {
        self.handle.stop();
        if let Some(thread) = self.thread.take() {
            // A thread that panicked has said so.
            let _ = thread.join();
        }
    }
}

fn run(prepare: impl FnOnce() -> Result<()>, started: &Sender<Result<LoopHandle>>) {
    let event_loop = EventLoop::new().context("cannot make an event loop");
    let prepared = event_loop.and_then(|event_loop| prepare().map(|()| event_loop));
    match prepared {
        Ok(mut event_loop) => {
            let _ = started.send(Ok(event_loop.handle()));
            if let Err(error) = event_loop.run() {
                log::error!("an event loop failed: {error}");
            }
        }
        Err(error) => {
            let _ = started.send(Err(error));
        }
    }
}

#[cfg(test)]
mod test {
    use anyhow::bail;

    use super::*;

    #[test]
    fn a_thread_that_cannot_be_prepared_is_an_error() {
        let error = LoopThread::spawn("broken", || bail!("no such luck")).err().unwrap();
        assert_eq!(error.to_string(), "no such luck");
    }

    #[test]
    fn dropping_it_ends_the_thread() {
        drop(LoopThread::spawn("short", || Ok(())).unwrap());
    }
}
