//! Message-signalled interrupts of one function: table, masks, pending bits (PCI 3.0, 6.8.2).
//!
//! A vector that can be delivered is attached to its message, any other is detached: what is
//! signalled then stays in its event, which is the pending bit. Nothing is attached before the
//! function is used, so that a guest which sets up all its vectors first costs one update of
//! routes.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use super::config::ConfigSpace;
use crate::event::Event;
use crate::interrupt::{Message, MessageRoutes};

/// Vectors of a function, at the most; the table's size has room for twice as many.
pub const VECTORS_MAX: usize = 1024;
/// Bytes of one table entry.
pub const ENTRY_SIZE: usize = 16;

const CAPABILITY: u8 = 0x11;
const CONTROL_ENABLE: u8 = 1 << 7;
const CONTROL_FUNCTION_MASK: u8 = 1 << 6;
const VECTOR_MASKED: u32 = 1;

/// The vectors of a function.
pub struct Msix {
    routes: Arc<dyn MessageRoutes>,
    vectors: Vec<Vector>,
    is_enabled: bool,
    is_masked: bool,
    in_use: bool,
    failure_reported: bool,
}

struct Vector {
    event: Event,
    message: Message,
    control: u32,
    attached: Option<Message>,
}

impl Msix {
    /// Makes `count` masked vectors, [`VECTORS_MAX`] at the most.
    pub fn new(count: usize, routes: Arc<dyn MessageRoutes>) -> io::Result<Self> {
        let vectors = (0..count.min(VECTORS_MAX)).map(|_| Vector::new());
        let vectors = vectors.collect::<io::Result<_>>()?;
        let (is_enabled, is_masked, in_use, failure_reported) = (false, false, false, false);
        Ok(Self { routes, vectors, is_enabled, is_masked, in_use, failure_reported })
    }

    /// Number of vectors.
    pub fn len(&self) -> usize {
        self.vectors.len()
    }

    /// The event that triggers a vector.
    pub fn event(&self, vector: usize) -> Option<&Event> {
        self.vectors.get(vector).map(|vector| &vector.event)
    }

    /// Appends the capability, which says where in `bar` the table and the pending bits are;
    /// returns its offset. The upper byte of the message control register is 3 bytes into it.
    pub fn add_capability(
        &self,
        config: &mut ConfigSpace,
        bar: u8,
        table: u64,
        pending: u64,
    ) -> usize {
        let last = u16::try_from(self.vectors.len().saturating_sub(1)).unwrap_or(0).to_le_bytes();
        let place = |at| (u32::try_from(at).unwrap_or(0) | u32::from(bar)).to_le_bytes();
        let body = [&last[..], &place(table), &place(pending)].concat();
        config.add_capability(CAPABILITY, &body, &[0, CONTROL_ENABLE | CONTROL_FUNCTION_MASK])
    }

    /// Takes the upper byte of the message control register.
    pub fn set_control(&mut self, control: u8) {
        self.is_enabled = control & CONTROL_ENABLE != 0;
        self.is_masked = control & CONTROL_FUNCTION_MASK != 0;
        self.update(0..self.vectors.len());
    }

    /// Says whether the function can trigger interrupts; until it does nothing is attached.
    pub fn set_in_use(&mut self, in_use: bool) {
        self.in_use = in_use;
        self.update(0..self.vectors.len());
    }

    /// Forgets what was triggered and not delivered.
    pub fn forget_pending(&self) {
        for vector in self.vectors.iter().filter(|vector| vector.attached.is_none()) {
            vector.event.take();
        }
    }

    /// Returns to the state at power-on: every vector masked and detached.
    pub fn reset(&mut self) {
        (self.is_enabled, self.is_masked, self.in_use) = (false, false, false);
        for vector in &mut self.vectors {
            (vector.message, vector.control) = (Message { address: 0, data: 0 }, VECTOR_MASKED);
        }
        self.update(0..self.vectors.len());
        self.forget_pending();
    }

    /// Reads the table; what is behind it reads as zeros.
    pub fn read_table(&self, offset: usize, data: &mut [u8]) {
        for (at, byte) in (offset..).zip(data) {
            let entry = self.vectors.get(at / ENTRY_SIZE).map_or([0; ENTRY_SIZE], Vector::bytes);
            *byte = entry.get(at % ENTRY_SIZE).copied().unwrap_or(0);
        }
    }

    /// Writes the table; a change of a vector that can be delivered counts at once.
    pub fn write_table(&mut self, offset: usize, data: &[u8]) {
        let first = offset / ENTRY_SIZE;
        let end = offset.saturating_add(data.len()).div_ceil(ENTRY_SIZE).min(self.vectors.len());
        for (index, vector) in self.vectors.iter_mut().enumerate().take(end).skip(first) {
            let mut entry = vector.bytes();
            for (at, byte) in (offset..).zip(data) {
                let target = at.checked_sub(index * ENTRY_SIZE).and_then(|at| entry.get_mut(at));
                if let Some(target) = target {
                    *target = *byte;
                }
            }
            vector.set_bytes(entry);
        }
        self.update(first..end);
    }

    /// Reads the pending bits.
    pub fn read_pending(&self, offset: usize, data: &mut [u8]) {
        for (at, byte) in (offset..).zip(data) {
            let vectors = self.vectors.iter().skip(at.saturating_mul(8)).take(8);
            *byte =
                (0..8).zip(vectors).fold(0, |bits, (bit, vector)| bits | vector.pending() << bit);
        }
    }

    /// Attaches and detaches what has changed, in one update of routes.
    fn update(&mut self, range: Range<usize>) {
        let can_deliver = self.is_enabled && !self.is_masked && self.in_use;
        let mut changes = Vec::new();
        for vector in self.vectors.get_mut(range).unwrap_or_default() {
            let is_masked = vector.control & VECTOR_MASKED != 0;
            let wanted = (can_deliver && !is_masked).then_some(vector.message);
            if vector.attached != wanted {
                vector.attached = wanted;
                changes.push((vector.event.clone(), wanted));
            }
        }
        if changes.is_empty() {
            return;
        }
        if let Err(error) = self.routes.set(&changes) {
            let level = if self.failure_reported { log::Level::Debug } else { log::Level::Warn };
            self.failure_reported = true;
            log::log!(level, "cannot route interrupts: {error}");
        }
    }
}

impl Vector {
    fn new() -> io::Result<Self> {
        let message = Message { address: 0, data: 0 };
        Ok(Self { event: Event::new()?, message, control: VECTOR_MASKED, attached: None })
    }

    /// The entry as a guest sees it: address, data, control.
    fn bytes(&self) -> [u8; ENTRY_SIZE] {
        let value = u128::from(self.message.address)
            | u128::from(self.message.data) << 64
            | u128::from(self.control) << 96;
        value.to_le_bytes()
    }

    fn set_bytes(&mut self, bytes: [u8; ENTRY_SIZE]) {
        let value = u128::from_le_bytes(bytes);
        let word = |shift| u32::try_from(value >> shift & u128::from(u32::MAX)).unwrap_or(0);
        // A message is written to an aligned word.
        let address = u64::from(word(32)) << 32 | u64::from(word(0) & !3);
        self.message = Message { address, data: word(64) };
        self.control = word(96) & VECTOR_MASKED;
    }

    fn pending(&self) -> u8 {
        u8::from(self.attached.is_none() && self.event.is_signalled())
    }
}

#[cfg(test)]
mod test;
