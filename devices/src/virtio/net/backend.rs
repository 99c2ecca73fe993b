//! The seam between a card and what moves its frames.

use std::fmt;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use arch::memory::GuestMemory;

use crate::virtio::config_change::ConfigChange;
use crate::virtio::device::NeedsReset;
use crate::virtio::feature::TRANSPORT_FEATURES;
use crate::virtio::queue::QueueSetup;

/// What moves the frames of a card between its queue pairs and the host.
///
/// The control queue is the card's own: it reaches the backend by [`Backend::settings`].
pub trait Backend: Send {
    /// What the backend can do, the same for its whole life.
    fn offer(&self) -> BackendOffer;

    /// Which of the transport's features the backend can do.
    fn transport_features(&self) -> u64 {
        TRANSPORT_FEATURES
    }

    /// Takes the way to report the state of the link, once, before everything else.
    fn connect(&mut self, _link: Link) {}

    /// Takes over the queue pairs: the driver has set `DRIVER_OK`.
    ///
    /// Of several pairs the first alone is in use until [`Settings::set_pairs`] says otherwise. The
    /// offloads towards the driver are those of the session's features.
    fn start(&mut self, session: Session) -> io::Result<()>;

    /// Gives the queue pairs up; when this returns, nothing touches guest memory.
    fn stop(&mut self);

    /// What carries out the commands of the control queue, on that queue's thread.
    fn settings(&self) -> Box<dyn Settings>;
}

/// What a backend can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BackendOffer {
    /// Of the feature bits those that are about frames: offloads and mergeable buffers.
    pub features: u64,
    /// Queue pairs, at least one.
    pub pairs: u16,
}

/// What a driver changes at run time.
pub trait Settings: Send {
    /// Uses the first `pairs` queue pairs, at least one and at most those offered.
    fn set_pairs(&mut self, pairs: u16) -> io::Result<()>;

    /// Gives the driver frames with these offloads and no others; all of them were agreed on.
    fn set_guest_offloads(&mut self, offloads: u64) -> io::Result<()>;
}

/// Everything that a backend needs from `DRIVER_OK` to a reset.
pub struct Session {
    /// The features that device and driver agreed on.
    pub features: u64,
    /// The guest's memory.
    pub memory: GuestMemory,
    /// The pairs of which the driver has enabled both queues, in their order; there is at least
    /// the first.
    pub pairs: Vec<Pair>,
    /// How the backend reports that it cannot go on.
    pub needs_reset: NeedsReset,
}

/// One queue pair.
pub struct Pair {
    /// Its number, from zero.
    pub index: usize,
    /// The driver's buffers for frames that arrive.
    pub receive: QueueSetup,
    /// The frames that the driver sends.
    pub transmit: QueueSetup,
}

/// The state of a card that its driver and its host share; clones are the same.
#[derive(Clone)]
pub struct Link(Arc<State>);

struct State {
    /// The host's end can carry frames.
    has_carrier: AtomicBool,
    /// Nobody has pulled the plug.
    is_plugged: AtomicBool,
    is_announcing: AtomicBool,
    /// In the lower 48 bits.
    mac: AtomicU64,
    config_change: OnceLock<ConfigChange>,
    counters: Vec<PairCounters>,
}

/// What went through one queue pair, and what did not.
#[derive(Debug, Default)]
pub struct PairCounters {
    /// Frames that the driver sent.
    pub transmit: DirectionCounters,
    /// Frames that the driver received.
    pub receive: DirectionCounters,
}

/// Counters of one direction; they only grow.
#[derive(Debug, Default)]
pub struct DirectionCounters {
    frames: AtomicU64,
    bytes: AtomicU64,
    dropped: AtomicU64,
}

/// What [`DirectionCounters`] say at one moment, or what is added to them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Count {
    /// Frames that were moved; one that is segmented later is one.
    pub frames: u64,
    /// Their bytes, without virtio's header.
    pub bytes: u64,
    /// Frames that were lost: malformed, too large, or nobody there to take them.
    pub dropped: u64,
}

impl fmt::Display for Count {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { frames, bytes, dropped } = self;
        write!(formatter, "{frames} frames, {bytes} bytes, {dropped} dropped")
    }
}

impl DirectionCounters {
    /// Adds what one batch moved.
    pub fn add(&self, count: Count) {
        self.frames.fetch_add(count.frames, Ordering::Relaxed);
        self.bytes.fetch_add(count.bytes, Ordering::Relaxed);
        self.dropped.fetch_add(count.dropped, Ordering::Relaxed);
    }

    /// What has been counted by now.
    pub fn count(&self) -> Count {
        Count {
            frames: self.frames.load(Ordering::Relaxed),
            bytes: self.bytes.load(Ordering::Relaxed),
            dropped: self.dropped.load(Ordering::Relaxed),
        }
    }
}

impl Link {
    pub(super) fn new(mac: [u8; 6], pairs: u16) -> Self {
        let state = State {
            has_carrier: AtomicBool::new(true),
            is_plugged: AtomicBool::new(true),
            is_announcing: AtomicBool::new(false),
            mac: AtomicU64::new(mac_bits(mac)),
            config_change: OnceLock::new(),
            counters: (0..pairs).map(|_| PairCounters::default()).collect(),
        };
        Self(Arc::new(state))
    }

    /// Whether frames shall pass: the host's end is up and the plug is in.
    pub fn is_up(&self) -> bool {
        self.0.has_carrier.load(Ordering::Relaxed) && self.is_plugged()
    }

    /// Whether the plug is in, whatever the host's end does.
    pub fn is_plugged(&self) -> bool {
        self.0.is_plugged.load(Ordering::Relaxed)
    }

    /// Says whether the host's end can carry frames; the driver is told when the link changes.
    pub fn set_carrier(&self, has_carrier: bool) {
        self.change(&self.0.has_carrier, has_carrier);
    }

    /// Pulls the plug or puts it in again; the driver is told when the link changes.
    pub fn set_plugged(&self, is_plugged: bool) {
        self.change(&self.0.is_plugged, is_plugged);
    }

    /// Asks the driver to announce itself to its neighbours, as after a move to another host.
    pub fn announce(&self) {
        self.0.is_announcing.store(true, Ordering::Relaxed);
        self.tell_driver();
    }

    /// The counters of the queue pair at `index`.
    pub fn counters(&self, index: usize) -> Option<&PairCounters> {
        self.0.counters.get(index)
    }

    /// What went through all queue pairs: sent by the driver, and received by it.
    pub fn totals(&self) -> (Count, Count) {
        let sum = |total: Count, count: Count| Count {
            frames: total.frames.wrapping_add(count.frames),
            bytes: total.bytes.wrapping_add(count.bytes),
            dropped: total.dropped.wrapping_add(count.dropped),
        };
        let transmitted = self.0.counters.iter().map(|pair| pair.transmit.count());
        let received = self.0.counters.iter().map(|pair| pair.receive.count());
        (transmitted.fold(Count::default(), sum), received.fold(Count::default(), sum))
    }

    pub(super) fn connect(&self, change: ConfigChange) {
        // A device is put on one transport, once.
        let _ = self.0.config_change.set(change);
    }

    pub(super) fn is_announcing(&self) -> bool {
        self.0.is_announcing.load(Ordering::Relaxed)
    }

    pub(super) fn end_announcement(&self) {
        self.0.is_announcing.store(false, Ordering::Relaxed);
        self.tell_driver();
    }

    pub(super) fn mac(&self) -> [u8; 6] {
        let [_, _, mac @ ..] = self.0.mac.load(Ordering::Relaxed).to_be_bytes();
        mac
    }

    pub(super) fn set_mac(&self, mac: [u8; 6]) {
        self.0.mac.store(mac_bits(mac), Ordering::Relaxed);
        self.tell_driver();
    }

    /// Takes back what the driver has changed; it is gone and needs not be told.
    pub(super) fn forget_driver(&self, mac: [u8; 6]) {
        self.0.mac.store(mac_bits(mac), Ordering::Relaxed);
        self.0.is_announcing.store(false, Ordering::Relaxed);
    }

    fn change(&self, flag: &AtomicBool, value: bool) {
        let before = self.is_up();
        flag.store(value, Ordering::Relaxed);
        if self.is_up() != before {
            self.tell_driver();
        }
    }

    fn tell_driver(&self) {
        if let Some(change) = self.0.config_change.get() {
            change.announce();
        }
    }
}

fn mac_bits(mac: [u8; 6]) -> u64 {
    let [a, b, c, d, e, f] = mac;
    u64::from_be_bytes([0, 0, a, b, c, d, e, f])
}
