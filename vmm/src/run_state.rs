//! What the processors are to do, and how a run of the guest came to its end.

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use anyhow::Error;
use devices::event::Event;

/// What the processors are to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Phase {
    /// Run the guest.
    Running,
    /// Leave the guest and wait.
    Paused,
    /// Leave the guest for good.
    Stopping,
}

/// One phase for all processors; each looks at it whenever it leaves the guest.
pub(crate) struct RunState {
    phase: AtomicU8,
    /// How many processors rest while the machine is paused.
    resting: Mutex<u32>,
    changed: Condvar,
    rested: Event,
}

impl RunState {
    /// Starts in `phase`.
    pub(crate) fn new(phase: Phase) -> std::io::Result<Self> {
        Ok(Self {
            phase: AtomicU8::new(phase as u8),
            resting: Mutex::new(0),
            changed: Condvar::new(),
            rested: Event::new()?,
        })
    }

    /// The phase now.
    pub(crate) fn phase(&self) -> Phase {
        match self.phase.load(Ordering::Acquire) {
            0 => Phase::Running,
            1 => Phase::Paused,
            _ => Phase::Stopping,
        }
    }

    /// Changes the phase. Who runs the guest meanwhile has to be kicked out of it to see that.
    pub(crate) fn set(&self, phase: Phase) {
        let _guard = self.resting.lock().unwrap_or_else(PoisonError::into_inner);
        self.phase.store(phase as u8, Ordering::Release);
        self.changed.notify_all();
    }

    /// Waits while the machine is in `phase`.
    pub(crate) fn wait_while(&self, phase: Phase) {
        let guard = self.resting.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.changed.wait_while(guard, |_| self.phase() == phase);
        drop(waited.unwrap_or_else(PoisonError::into_inner));
    }

    /// Waits while the machine is paused, and is counted meanwhile.
    pub(crate) fn rest(&self) {
        let mut guard = self.resting.lock().unwrap_or_else(PoisonError::into_inner);
        *guard = guard.saturating_add(1);
        self.rested.signal();
        let waited = self.changed.wait_while(guard, |_| self.phase() == Phase::Paused);
        let mut guard = waited.unwrap_or_else(PoisonError::into_inner);
        *guard = guard.saturating_sub(1);
    }

    /// How many processors have left the guest because the machine is paused.
    pub(crate) fn resting(&self) -> u32 {
        *self.resting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Signalled whenever one more processor rests.
    pub(crate) fn rested(&self) -> &Event {
        &self.rested
    }
}

/// How a run of the guest ended.
#[derive(Debug)]
pub(crate) enum Ending {
    /// The guest powered off.
    PowerOff,
    /// The guest asked for a reset.
    Reset,
    /// The guest's kernel said that it panicked.
    Panic,
    /// A processor met a triple fault.
    TripleFault,
    /// The guest did not power off in time, or was told twice to end.
    Killed,
    /// The guest's watchdog expired.
    Watchdog,
    /// The machine could not go on.
    Failed(Error),
}

impl Ending {
    /// The name of the event by which control clients learn of it.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::PowerOff => "power-off",
            Self::Reset => "reset",
            Self::Panic => "panic",
            Self::TripleFault => "triple-fault",
            Self::Killed => "killed",
            Self::Watchdog => "watchdog",
            Self::Failed(_) => "failed",
        }
    }
}

/// Where the first ending is kept until the main thread takes it; later ones are its consequences.
#[derive(Clone)]
pub(crate) struct Endings {
    first: Arc<Mutex<Option<Ending>>>,
    reported: Event,
}

impl Endings {
    /// Makes an empty place.
    pub(crate) fn new() -> std::io::Result<Self> {
        Ok(Self { first: Arc::default(), reported: Event::new()? })
    }

    /// Reports an ending from any thread.
    pub(crate) fn report(&self, ending: Ending) {
        self.first.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(ending);
        self.reported.signal();
    }

    /// Takes the first ending since the last call.
    pub(crate) fn take(&self) -> Option<Ending> {
        self.reported.take();
        self.first.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Signalled when there is an ending.
    pub(crate) fn reported(&self) -> &Event {
        &self.reported
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn the_first_ending_is_kept_and_can_be_taken_once() {
        let endings = Endings::new().unwrap();
        endings.report(Ending::Reset);
        endings.report(Ending::TripleFault);
        assert!(matches!(endings.take(), Some(Ending::Reset)));
        assert!(endings.take().is_none());
        assert!(!endings.reported().take());
    }

    #[test]
    fn who_waits_while_paused_sees_the_phase_that_follows() {
        let state = Arc::new(RunState::new(Phase::Paused).unwrap());
        let waiting = Arc::clone(&state);
        let waiter = std::thread::spawn(move || {
            waiting.rest();
            waiting.phase()
        });
        while state.resting() == 0 {
            std::thread::yield_now();
        }
        assert!(state.rested().take());
        state.set(Phase::Stopping);
        assert_eq!(waiter.join().unwrap(), Phase::Stopping);
        assert_eq!(state.resting(), 0);
    }
}
