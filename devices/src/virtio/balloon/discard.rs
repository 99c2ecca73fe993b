//! Adjacent pages go back to the host together.

use arch::memory::{GuestMemory, GuestSlice};

use crate::warn_limited;

/// Memory on its way back to the host: neighbours that follow each other, upwards or downwards, are
/// one system call.
pub(super) struct Discard {
    memory: GuestMemory,
    run: Option<GuestSlice>,
    given_back: usize,
}

impl Discard {
    pub(super) fn new(memory: GuestMemory) -> Self {
        Self { memory, run: None, given_back: 0 }
    }

    /// Adds memory that nobody needs any more.
    pub(super) fn add(&mut self, slice: GuestSlice) {
        let joined = self.run.and_then(|run| run.join(slice));
        if joined.is_none() {
            self.flush();
        }
        self.run = Some(joined.unwrap_or(slice));
    }

    /// Gives the rest back, and returns how many bytes that were in all.
    pub(super) fn finish(mut self) -> usize {
        self.flush();
        self.given_back
    }

    fn flush(&mut self) {
        let Some(run) = self.run.take() else { return };
        match self.memory.discard(run) {
            Ok(bytes) => self.given_back = self.given_back.saturating_add(bytes),
            Err(error) => warn_limited!("balloon: the host takes no memory back: {error}"),
        }
    }
}
