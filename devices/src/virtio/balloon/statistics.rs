//! What the guest says about its memory (virtio 1.3, section 5.5.6.4).

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use zerocopy::{FromBytes, IntoBytes};

use crate::virtio::chain::Chain;

/// Statistics in the order of their tags.
const NAMES: [&str; 16] = [
    "swapped-in-bytes",
    "swapped-out-bytes",
    "major-faults",
    "minor-faults",
    "free-bytes",
    "total-bytes",
    "available-bytes",
    "cache-bytes",
    "huge-page-allocations",
    "huge-page-failures",
    "out-of-memory-kills",
    "allocation-stalls",
    "background-scanned-pages",
    "direct-scanned-pages",
    "background-reclaimed-pages",
    "direct-reclaimed-pages",
];

/// Records that are looked at: more than there are tags, so that unknown ones may be among them.
const RECORDS_MAX: usize = 64;

/// One record of a buffer; it is packed.
#[derive(FromBytes, IntoBytes)]
#[repr(C, packed)]
struct Record {
    tag: u16,
    value: u64,
}

/// What the guest said at one time. Nobody checks it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Statistics {
    /// When the guest said it.
    pub time: Instant,
    values: [Option<u64>; NAMES.len()],
}

impl Statistics {
    /// Name and value of each statistic that the guest's driver knows.
    pub fn iter(&self) -> impl Iterator<Item = (&'static str, u64)> {
        NAMES.into_iter().zip(self.values).filter_map(|(name, value)| Some((name, value?)))
    }

    /// The value that has `name`.
    pub fn get(&self, name: &str) -> Option<u64> {
        self.iter().find_map(|(other, value)| (other == name).then_some(value))
    }
}

/// Where the worker writes what others read.
#[derive(Default)]
pub(super) struct Board {
    last: Mutex<Option<Statistics>>,
    inflated: AtomicU64,
    reported: AtomicU64,
}

impl Board {
    /// Reads the statistics of a chain; what is unknown or incomplete is left out.
    pub(super) fn take(&self, chain: &mut Chain) {
        let mut values = [None; NAMES.len()];
        for _ in 0..RECORDS_MAX {
            let Some(Record { tag, value }) = chain.take() else { break };
            if let Some(place) = values.get_mut(usize::from(u16::from_le(tag))) {
                *place = Some(u64::from_le(value));
            }
        }
        *self.lock() = Some(Statistics { time: Instant::now(), values });
    }

    pub(super) fn last(&self) -> Option<Statistics> {
        *self.lock()
    }

    pub(super) fn add_inflated(&self, bytes: usize) {
        self.inflated.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    pub(super) fn add_reported(&self, bytes: usize) {
        self.reported.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// Bytes given back so far by inflating and by reports.
    pub(super) fn given_back(&self) -> (u64, u64) {
        (self.inflated.load(Ordering::Relaxed), self.reported.load(Ordering::Relaxed))
    }

    fn lock(&self) -> MutexGuard<'_, Option<Statistics>> {
        self.last.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
