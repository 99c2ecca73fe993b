//! Log lines that a guest can cause, as many as a person can read.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// Lines from one place in a window of time; enough to see what goes on.
const LINES: u64 = 10;

/// Length of a window in seconds.
const WINDOW: u64 = 10;

/// The limit of one place that logs: at most ten lines in ten seconds.
///
/// The first line of a later window says how many were left out. Use it by [`warn_limited!`].
///
/// [`warn_limited!`]: crate::warn_limited
#[derive(Debug, Default)]
pub struct LogLimit {
    /// The window in the upper half, the lines in it in the lower.
    state: AtomicU64,
}

impl LogLimit {
    /// A place that has not logged yet.
    #[must_use]
    pub const fn new() -> Self {
        Self { state: AtomicU64::new(0) }
    }

    /// Whether a line may be logged now; if so, how many were left out since the last one.
    pub fn admit(&self) -> Option<u64> {
        static START: OnceLock<Instant> = OnceLock::new();
        self.admit_at(START.get_or_init(Instant::now).elapsed().as_secs())
    }

    fn admit_at(&self, seconds: u64) -> Option<u64> {
        let window = u32::try_from(seconds / WINDOW).unwrap_or(u32::MAX);
        let mut admitted = None;
        // The closure always answers, so that this cannot fail.
        let _ = self.state.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |state| {
            let (lines, left_out) = if state >> 32 == u64::from(window) {
                ((state & u64::from(u32::MAX)) + 1, 0)
            } else {
                (1, (state & u64::from(u32::MAX)).saturating_sub(LINES))
            };
            admitted = (lines <= LINES).then_some(left_out);
            Some(u64::from(window) << 32 | lines.min(u32::MAX.into()))
        });
        admitted
    }
}

/// Logs a warning that a guest can cause as often as it likes; takes what `log::warn!` takes.
#[macro_export]
macro_rules! warn_limited {
    ($($message:tt)*) => {{
        static LIMIT: $crate::log_limit::LogLimit = $crate::log_limit::LogLimit::new();
        match LIMIT.admit() {
            None => {}
            Some(0) => ::log::warn!($($message)*),
            Some(left_out) => {
                let message = format_args!($($message)*);
                ::log::warn!("{message} ({left_out} such lines were left out)");
            }
        }
    }};
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn ten_lines_pass_in_a_window_and_the_next_window_counts_the_others() {
        let limit = LogLimit::new();
        let admitted: Vec<_> = (0..25).map(|_| limit.admit_at(3)).collect();
        assert_eq!(admitted[..10], [Some(0); 10]);
        assert_eq!(admitted[10..], [None; 15]);
        assert_eq!(limit.admit_at(WINDOW), Some(15));
        assert_eq!(limit.admit_at(WINDOW), Some(0));
        assert_eq!(limit.admit_at(WINDOW * 5), Some(0));
    }

    #[test]
    fn a_flood_from_many_threads_passes_ten_lines() {
        let limit = LogLimit::new();
        let passed: usize = std::thread::scope(|scope| {
            let flood = || (0..1000).filter(|_| limit.admit_at(0).is_some()).count();
            let threads: Vec<_> = (0..4).map(|_| scope.spawn(flood)).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).sum()
        });
        assert_eq!(passed, 10);
    }

    #[test]
    fn the_macro_takes_what_a_warning_takes() {
        let captured = 1;
        warn_limited!("a device said {captured} and {}", 2);
    }
}
