//! A limit for log lines that a guest can cause.

use std::time::{Duration, Instant};

/// Lines that may be written at once, and then once more in every [`PERIOD`].
const BURST: u32 = 5;
const PERIOD: Duration = Duration::from_secs(10);

/// Lets a few events through in every period, and counts the others.
#[derive(Debug, Default)]
pub struct RateLimit {
    period_start: Option<Instant>,
    passed: u32,
    suppressed: u64,
}

impl RateLimit {
    /// Says whether an event at `now` may pass; with it how many have not since the last that did.
    pub fn pass(&mut self, now: Instant) -> Option<u64> {
        let is_over = |start: Instant| now.saturating_duration_since(start) >= PERIOD;
        if self.period_start.is_none_or(is_over) {
            self.period_start = Some(now);
            self.passed = 0;
        }
        if self.passed == BURST {
            self.suppressed = self.suppressed.saturating_add(1);
            return None;
        }
        self.passed += 1;
        Some(std::mem::take(&mut self.suppressed))
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn a_burst_passes_and_the_next_period_tells_what_did_not() {
        let start = Instant::now();
        let mut limit = RateLimit::default();
        let passed = (0..100).filter(|_| limit.pass(start).is_some()).count();
        assert_eq!(passed, 5);
        assert_eq!(limit.pass(start + PERIOD), Some(95));
        assert_eq!(limit.pass(start + PERIOD), Some(0));
    }
}
