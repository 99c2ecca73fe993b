//! What devices count, for who watches the machine.
//!
//! A worker adds to plain numbers of its own and puts them where others read once a batch, so that
//! a request costs no atomic operation.

use std::sync::atomic::{AtomicU64, Ordering};

/// One number of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reading {
    /// What it says, in snake case, with its unit where it has one: `read_bytes`.
    pub name: &'static str,
    /// The number.
    pub value: u64,
    /// Whether it only ever grows; others are what is so at this moment.
    pub is_total: bool,
}

impl Reading {
    /// How often something has happened, or how much of it.
    pub fn total(name: &'static str, value: u64) -> Self {
        Self { name, value, is_total: true }
    }

    /// What is so at this moment.
    pub fn now(name: &'static str, value: u64) -> Self {
        Self { name, value, is_total: false }
    }
}

/// Reads a device's numbers, from any thread.
pub type Counters = Box<dyn Fn() -> Vec<Reading> + Send>;

/// Totals with a name each.
#[derive(Debug)]
pub struct Totals<const COUNT: usize> {
    names: [&'static str; COUNT],
    values: [AtomicU64; COUNT],
}

impl<const COUNT: usize> Totals<COUNT> {
    /// Makes totals that are zero.
    pub fn new(names: [&'static str; COUNT]) -> Self {
        Self { names, values: [const { AtomicU64::new(0) }; COUNT] }
    }

    /// Adds what a batch came to, and leaves zeros in its place.
    pub fn add(&self, batch: &mut [u64; COUNT]) {
        for (total, count) in self.values.iter().zip(batch) {
            if *count > 0 {
                total.fetch_add(std::mem::take(count), Ordering::Relaxed);
            }
        }
    }

    /// What has been counted by now.
    pub fn read(&self) -> Vec<Reading> {
        let values = self.values.iter().map(|value| value.load(Ordering::Relaxed));
        self.names.iter().zip(values).map(|(name, value)| Reading::total(name, value)).collect()
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn batches_add_up_and_are_taken() {
        let totals = Totals::new(["reads", "writes"]);
        let mut batch = [1, 0];
        totals.add(&mut batch);
        assert_eq!(batch, [0, 0]);
        totals.add(&mut [2, 5]);
        assert_eq!(totals.read(), [Reading::total("reads", 3), Reading::total("writes", 5)]);
    }
}
