//! What happens to the machine, for those who want to be told.

use std::collections::VecDeque;
use std::io;
use std::process::ExitStatus;
use std::sync::{Arc, Mutex, PoisonError};

use devices::event::Event;
use serde_json::{Value, json};

/// Happenings that the main loop has not seen yet; more are forgotten, because a guest may be the
/// cause of them.
const UNSEEN_MAX: usize = 256;

/// One thing that has happened.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Happening {
    /// What it is called.
    pub(crate) event: &'static str,
    /// What there is to say about it, or null.
    pub(crate) details: Value,
}

/// Where every thread reports what has happened; clones are the same.
#[derive(Clone)]
pub(crate) struct Happenings {
    unseen: Arc<Mutex<VecDeque<Happening>>>,
    reported: Event,
}

impl Happenings {
    /// Makes an empty place.
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self { unseen: Arc::default(), reported: Event::new()? })
    }

    /// Reports that `event` has happened.
    pub(crate) fn report(&self, event: &'static str, details: Value) {
        let mut unseen = self.unseen.lock().unwrap_or_else(PoisonError::into_inner);
        if unseen.len() < UNSEEN_MAX {
            unseen.push_back(Happening { event, details });
            self.reported.signal();
        }
    }

    /// Reports that a process that served `device` is lost; `status` is how it has ended, where it
    /// was our child and has.
    pub(crate) fn process_lost(&self, device: &str, program: &str, status: Option<ExitStatus>) {
        let status = status.map(|status| status.to_string());
        let details = json!({ "device": device, "process": program, "status": status });
        self.report("process-lost", details);
    }

    /// Takes the next one.
    pub(crate) fn take(&self) -> Option<Happening> {
        self.unseen.lock().unwrap_or_else(PoisonError::into_inner).pop_front()
    }

    /// Signalled when something has happened.
    pub(crate) fn reported(&self) -> &Event {
        &self.reported
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn they_are_taken_in_their_order_and_a_flood_of_them_is_cut() {
        let happenings = Happenings::new().unwrap();
        for number in 0..2 * UNSEEN_MAX {
            happenings.report("balloon", number.into());
        }
        assert!(happenings.reported().take());
        for number in 0..UNSEEN_MAX {
            assert_eq!(happenings.take().unwrap().details, Value::from(number));
        }
        assert!(happenings.take().is_none());
    }
}
