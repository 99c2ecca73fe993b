//! Virtio memory balloon (virtio 1.3, section 5.5).
//!
//! Gives memory back to the host that the guest does not use: what the driver puts into the balloon
//! because it was asked to, and, with nobody asking, what it reports as free. Not offered: hints
//! for migration, and `MUST_TELL_HOST`, since pages may be used again without a word.

mod discard;
mod statistics;
#[cfg(test)]
mod test;

use std::io;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use arch::memory::{GuestAddress, GuestMemory};
use vmm_sys_util::timerfd::TimerFd;
use zerocopy::{Immutable, IntoBytes};

use self::discard::Discard;
use self::statistics::Board;
pub use self::statistics::Statistics;
use super::chain::Chain;
use super::config_change::ConfigChange;
use super::counters::{Counters, Reading};
use super::device::{Activation, DeviceKind, Offer, VirtioDevice};
use super::goal::Goal;
use super::queue::Queue;
use super::worker::{self, Fault, Worker, WorkerWatch};
use crate::event::{Event, EventSet, LoopHandle, Registration};

/// `VIRTIO_BALLOON_F_STATS_VQ` (section 5.5.3).
const FEATURE_STATS_VQ: u64 = 1 << 1;
/// `VIRTIO_BALLOON_F_DEFLATE_ON_OOM`.
const FEATURE_DEFLATE_ON_OOM: u64 = 1 << 2;
/// `VIRTIO_BALLOON_F_PAGE_POISON`.
const FEATURE_PAGE_POISON: u64 = 1 << 4;
/// `VIRTIO_BALLOON_F_PAGE_REPORTING`.
const FEATURE_PAGE_REPORTING: u64 = 1 << 5;

/// Linux reports free pages 32 at a time and wants a queue that takes them all; the other queues
/// have one request at a time.
const QUEUE_SIZE: u16 = 32;

/// Pages of the balloon have this size, whatever the guest's are (section 5.5.6).
const PAGE_BYTES: usize = 4096;

/// Page numbers taken from one request, four times what Linux sends: together with the queue's size
/// it bounds the time that a notification takes. Further pages stay with the host as they are.
const REQUEST_PAGES_MAX: usize = 1024;

/// Free memory taken from one report in bytes, twice what Linux sends (32 times 4 MiB); more stays
/// as it is, for the same reason.
const REPORT_BYTES_MAX: usize = 256 << 20;

const REFRESH: u32 = 0;
const TIMER: u32 = 1;

/// What a balloon does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BalloonOptions {
    /// The driver may take pages out when the guest has no others, whatever the target is.
    pub deflate_on_oom: bool,
    /// The driver reports free pages, which go back to the host at once.
    pub free_page_reporting: bool,
    /// How often the driver is asked for statistics; never by itself where there is none.
    pub statistics_interval: Option<Duration>,
}

/// A balloon: the front of the device.
pub struct Balloon {
    options: BalloonOptions,
    config: Config,
    shared: Arc<Shared>,
    timer: Option<Timer>,
    home: LoopHandle,
    worker: Option<Registration>,
}

/// A timer that the worker of the moment waits for; nobody else takes the lock.
type Timer = Arc<Mutex<TimerFd>>;

/// The configuration space (section 5.5.4).
#[derive(Clone, Copy, Debug, Default, IntoBytes, Immutable)]
#[repr(C)]
struct Config {
    /// Pages that the balloon shall have.
    target_pages: u32,
    /// Pages that it has; written by the driver.
    actual_pages: u32,
    free_page_hint: u32,
    /// What the driver fills free pages with; written by it.
    poison: u32,
}

impl Config {
    const ACTUAL: usize = 4;
    const POISON: usize = 12;
}

/// What the driver, the host and the worker share.
struct Shared {
    target_pages: AtomicU32,
    actual_pages: AtomicU32,
    poison: AtomicU32,
    board: Board,
    refresh: Event,
    config_change: OnceLock<ConfigChange>,
    goal: Goal,
}

impl Balloon {
    /// Makes an empty balloon whose worker runs in the loop of `home`.
    ///
    /// Everything that the sandbox would forbid later is done here.
    pub fn new(options: BalloonOptions, home: LoopHandle) -> io::Result<Self> {
        let timer = options.statistics_interval.map(every).transpose()?;
        let shared = Shared {
            target_pages: AtomicU32::new(0),
            actual_pages: AtomicU32::new(0),
            poison: AtomicU32::new(0),
            board: Board::default(),
            refresh: Event::new()?,
            config_change: OnceLock::new(),
            goal: Goal::default(),
        };
        let config = Config::default();
        Ok(Self { options, config, shared: Arc::new(shared), timer, home, worker: None })
    }

    /// The host's end of the balloon.
    pub fn inflator(&self, memory: GuestMemory) -> Inflator {
        Inflator { memory, shared: Arc::clone(&self.shared) }
    }
}

/// The host's end of a balloon, for any thread.
#[derive(Clone)]
pub struct Inflator {
    memory: GuestMemory,
    shared: Arc<Shared>,
}

impl Inflator {
    /// Asks the driver to make the balloon `bytes` large, rounded down to pages.
    ///
    /// How much of it the driver can spare is the driver's business: see [`Inflator::actual`]. The
    /// target outlives resets. An error is one of size: more than the guest can have.
    pub fn set_target(&self, bytes: u64) -> io::Result<()> {
        let ram: u64 = self.memory.regions().map(|region| region.slice.len() as u64).sum();
        let pages = u32::try_from(bytes / PAGE_BYTES as u64).ok().filter(|_| bytes <= ram);
        let pages = pages.ok_or_else(|| {
            let reason = format!("a balloon of {bytes} bytes, and the guest has {ram}");
            io::Error::new(io::ErrorKind::InvalidInput, reason)
        })?;
        self.shared.target_pages.store(pages, Ordering::Relaxed);
        if let Some(change) = self.shared.config_change.get() {
            change.announce();
        }
        self.shared.goal.set(self.target(), self.actual());
        Ok(())
    }

    /// Has `told` called with the size in bytes whenever the balloon has become as large as it
    /// was asked to be, once for each target, on any thread.
    pub fn on_reached(&self, told: impl Fn(u64) + Send + Sync + 'static) {
        self.shared.goal.on_reached(told);
    }

    /// What the balloon shall have, in bytes.
    pub fn target(&self) -> u64 {
        bytes_of(&self.shared.target_pages)
    }

    /// What the driver says that the balloon has, in bytes.
    pub fn actual(&self) -> u64 {
        bytes_of(&self.shared.actual_pages)
    }

    /// The guest's last statistics; `None` before the first ones.
    pub fn statistics(&self) -> Option<Statistics> {
        self.shared.board.last()
    }

    /// Asks the driver for new statistics, which come when it has them.
    pub fn refresh_statistics(&self) {
        self.shared.refresh.signal();
    }

    /// Bytes that went back to the host so far: put into the balloon, and reported as free.
    pub fn given_back(&self) -> (u64, u64) {
        self.shared.board.given_back()
    }
}

impl VirtioDevice for Balloon {
    fn counters(&self) -> Option<Counters> {
        let shared = Arc::clone(&self.shared);
        Some(Box::new(move || {
            let (inflated, reported) = shared.board.given_back();
            vec![
                Reading::now("target_bytes", bytes_of(&shared.target_pages)),
                Reading::now("actual_bytes", bytes_of(&shared.actual_pages)),
                Reading::total("inflated_bytes", inflated),
                Reading::total("reported_bytes", reported),
            ]
        }))
    }

    fn offer(&self) -> Offer {
        let mut features = FEATURE_STATS_VQ | FEATURE_PAGE_POISON;
        if self.options.deflate_on_oom {
            features |= FEATURE_DEFLATE_ON_OOM;
        }
        if self.options.free_page_reporting {
            features |= FEATURE_PAGE_REPORTING;
        }
        let queues = if self.options.free_page_reporting { 4 } else { 3 };
        Offer { kind: DeviceKind::Balloon, features, queue_sizes: vec![QUEUE_SIZE; queues] }
    }

    fn config(&self) -> &[u8] {
        self.config.as_bytes()
    }

    fn write_config(&mut self, offset: usize, data: &[u8]) {
        let Ok(value) = data.try_into().map(u32::from_le_bytes) else { return };
        match offset {
            Config::ACTUAL => {
                self.config.actual_pages = value.to_le();
                self.shared.actual_pages.store(value, Ordering::Relaxed);
                self.shared.goal.look(bytes_of(&self.shared.actual_pages));
            }
            Config::POISON => {
                self.config.poison = value.to_le();
                self.shared.poison.store(value, Ordering::Relaxed);
            }
            _ => {}
        }
    }

    fn connect(&mut self, change: ConfigChange) {
        // A device is put on one transport, once.
        let _ = self.shared.config_change.set(change);
    }

    fn refresh(&mut self) {
        self.config.target_pages = self.shared.target_pages.load(Ordering::Relaxed).to_le();
    }

    fn activate(&mut self, mut activation: Activation) -> io::Result<()> {
        let roles = roles(activation.features);
        let queues = (0..roles.len()).map(|index| activation.take_queue(index));
        let queues = queues.collect::<Result<_, _>>().map_err(io::Error::other)?;
        let worker = BalloonWorker {
            queues,
            roles,
            chain: Chain::with_capacity(QUEUE_SIZE),
            memory: activation.memory,
            features: activation.features,
            statistics_request: None,
            timer: self.timer.clone(),
            shared: Arc::clone(&self.shared),
        };
        self.worker = Some(worker::start("balloon", worker, &self.home, activation.needs_reset)?);
        Ok(())
    }

    fn reset(&mut self) {
        self.worker = None;
        for offset in [Config::ACTUAL, Config::POISON] {
            self.write_config(offset, &[0; 4]);
        }
    }
}

/// What a queue is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Inflate,
    Deflate,
    Statistics,
    Report,
}

/// The queues by their index. Drivers leave out the queues of features that were not agreed on, and
/// count on.
fn roles(features: u64) -> Vec<Role> {
    let mut roles = vec![Role::Inflate, Role::Deflate];
    for (feature, role) in
        [(FEATURE_STATS_VQ, Role::Statistics), (FEATURE_PAGE_REPORTING, Role::Report)]
    {
        if features & feature != 0 {
            roles.push(role);
        }
    }
    roles
}

/// The back of the device.
struct BalloonWorker {
    queues: Vec<Queue>,
    roles: Vec<Role>,
    chain: Chain,
    memory: GuestMemory,
    features: u64,
    /// The chain that the driver gets back when it is to send new statistics.
    statistics_request: Option<u16>,
    timer: Option<Timer>,
    shared: Arc<Shared>,
}

impl Worker for BalloonWorker {
    fn queues(&mut self) -> &mut [Queue] {
        &mut self.queues
    }

    fn watch(&mut self, watch: &mut WorkerWatch<'_, '_, '_>) -> io::Result<()> {
        watch.add(&self.shared.refresh, REFRESH, EventSet::IN)?;
        self.timer.as_ref().map_or(Ok(()), |timer| watch.add(&*lock(timer), TIMER, EventSet::IN))
    }

    fn doorbell(&mut self, index: usize) -> Result<(), Fault> {
        let outcome = self.serve(index);
        if let Some(queue) = self.queues.get_mut(index) {
            queue.notify_driver();
        }
        outcome
    }

    fn ready(
        &mut self,
        token: u32,
        _: EventSet,
        _: &mut WorkerWatch<'_, '_, '_>,
    ) -> Result<(), Fault> {
        match &self.timer {
            // It is ready, so this does not wait.
            Some(timer) if token == TIMER => drop(lock(timer).wait()),
            _ => drop(self.shared.refresh.take()),
        }
        let index = self.roles.iter().position(|role| *role == Role::Statistics);
        let queue = index.and_then(|index| self.queues.get_mut(index));
        // Without a chain of the driver's, new statistics are on their way already.
        if let (Some(queue), Some(head)) = (queue, self.statistics_request.take()) {
            queue.complete(head, 0);
            queue.notify_driver();
        }
        Ok(())
    }
}

impl BalloonWorker {
    fn serve(&mut self, index: usize) -> Result<(), Fault> {
        let Some(role) = self.roles.get(index).copied() else { return Ok(()) };
        while let Some(queue) = self.queues.get_mut(index)
            && queue.pop(&mut self.chain)?
        {
            let head = self.chain.head();
            let done = match role {
                Role::Inflate => {
                    let bytes = self.inflate();
                    self.shared.board.add_inflated(bytes);
                    Some(head)
                }
                // The driver uses its pages again: the host allocates them when they are touched.
                Role::Deflate => Some(head),
                // The driver sends one at a time; if it sends more, the older is done.
                Role::Statistics => {
                    self.shared.board.take(&mut self.chain);
                    self.statistics_request.replace(head)
                }
                Role::Report => {
                    let bytes = self.take_report();
                    self.shared.board.add_reported(bytes);
                    Some(head)
                }
            };
            if let (Some(queue), Some(head)) = (self.queues.get_mut(index), done) {
                queue.complete(head, 0);
            }
        }
        Ok(())
    }

    /// Gives back the pages whose numbers a request has. One that is no page of RAM is left out:
    /// what the driver cannot have is not in its balloon.
    fn inflate(&mut self) -> usize {
        let mut discard = Discard::new(self.memory);
        for _ in 0..REQUEST_PAGES_MAX {
            let Some(number) = self.chain.take::<u32>() else { break };
            let address = u64::from(u32::from_le(number)) * PAGE_BYTES as u64;
            match self.memory.slice(GuestAddress(address), PAGE_BYTES) {
                Ok(page) => discard.add(page),
                Err(error) => log::debug!("balloon: {error}"),
            }
        }
        discard.finish()
    }

    /// Gives back the free memory that a report has.
    fn take_report(&self) -> usize {
        // Pages that the guest filled with a pattern must keep it (section 5.5.6.7), and ours come
        // back as zeros.
        let poisoned = self.shared.poison.load(Ordering::Relaxed) != 0;
        if poisoned && self.features & FEATURE_PAGE_POISON != 0 {
            return 0;
        }
        let mut discard = Discard::new(self.memory);
        let mut left = REPORT_BYTES_MAX;
        for slice in self.chain.writable() {
            let len = slice.len().min(left);
            left -= len;
            if let Some(part) = slice.sub_slice(0, len) {
                discard.add(part);
            }
        }
        discard.finish()
    }
}

fn every(interval: Duration) -> io::Result<Timer> {
    let mut timer = TimerFd::new()?;
    timer.reset(interval, Some(interval))?;
    Ok(Arc::new(Mutex::new(timer)))
}

fn lock(timer: &Timer) -> MutexGuard<'_, TimerFd> {
    timer.lock().unwrap_or_else(PoisonError::into_inner)
}

fn bytes_of(pages: &AtomicU32) -> u64 {
    u64::from(pages.load(Ordering::Relaxed)) * PAGE_BYTES as u64
}
