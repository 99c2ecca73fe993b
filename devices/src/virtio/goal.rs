//! What the host asks a driver for, and who is told when the driver has done it.

use std::sync::{Mutex, OnceLock, PoisonError};

/// A size that the driver is asked to reach; whoever wants to know is told once for each request,
/// however often the driver comes by.
#[derive(Default)]
pub(super) struct Goal {
    wanted: Mutex<Option<u64>>,
    on_reached: OnceLock<Told>,
}

/// Is told the size that was reached, on any thread.
type Told = Box<dyn Fn(u64) + Send + Sync>;

impl Goal {
    /// Says who is told; the first one is.
    pub(super) fn on_reached(&self, told: impl Fn(u64) + Send + Sync + 'static) {
        // Nobody asks twice.
        let _ = self.on_reached.set(Box::new(told));
    }

    /// Asks for `bytes`; the driver is at `now`, and may have nothing to do.
    pub(super) fn set(&self, bytes: u64, now: u64) {
        *self.wanted.lock().unwrap_or_else(PoisonError::into_inner) = Some(bytes);
        self.look(now);
    }

    /// The driver has come to `bytes`.
    pub(super) fn look(&self, bytes: u64) {
        let mut wanted = self.wanted.lock().unwrap_or_else(PoisonError::into_inner);
        if wanted.take_if(|wanted| *wanted == bytes).is_some()
            && let Some(told) = self.on_reached.get()
        {
            told(bytes);
        }
    }
}

#[cfg(test)]
mod test {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;

    #[test]
    fn each_request_is_told_once_when_it_is_reached() {
        let told = Arc::new(AtomicU64::new(0));
        let goal = Goal::default();
        let sum = Arc::clone(&told);
        goal.on_reached(move |bytes| {
            sum.fetch_add(bytes, Ordering::Relaxed);
        });
        goal.look(0);
        goal.set(5, 0);
        for bytes in [1, 5, 4, 5] {
            goal.look(bytes);
        }
        assert_eq!(told.load(Ordering::Relaxed), 5);
        goal.set(5, 5);
        assert_eq!(told.load(Ordering::Relaxed), 10);
        goal.set(7, 5);
        goal.set(9, 5);
        goal.look(7);
        assert_eq!(told.load(Ordering::Relaxed), 10);
    }
}
