//! Virtio memory device (virtio 1.3, section 5.15).
//!
//! A range above RAM whose blocks the driver plugs and unplugs to follow the size that the host
//! asks for. The range is mapped and known to everybody from the start, and costs nothing where it
//! is not plugged. What a driver touches without plugging it is its own loss: it goes back to the
//! host with the next plugging or unplugging, and the range is the most that a guest can take.

mod blocks;
#[cfg(test)]
mod test;

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use arch::memory::{GuestMemory, GuestSlice, Region};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use self::blocks::Blocks;
use super::chain::Chain;
use super::config_change::ConfigChange;
use super::counters::{Counters, Reading};
use super::device::{Activation, DeviceKind, Offer, VirtioDevice};
use super::goal::Goal;
use super::queue::Queue;
use super::worker::{self, Fault, Worker};
use crate::event::{LoopHandle, Registration};
use crate::warn_limited;

/// `VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE` (section 5.15.3).
const FEATURE_UNPLUGGED_INACCESSIBLE: u64 = 1 << 1;

/// Linux has one request at a time.
const QUEUE_SIZE: u16 = 8;

/// The least block: what a transparent huge page needs, and what Linux can unplug at the least.
const BLOCK_BYTES_MIN: u64 = 2 << 20;

/// Requests (section 5.15.6.2).
mod request {
    pub(super) const PLUG: u16 = 0;
    pub(super) const UNPLUG: u16 = 1;
    pub(super) const UNPLUG_ALL: u16 = 2;
    pub(super) const STATE: u16 = 3;
}

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
enum Answer {
    Done = 0,
    /// More than the host asked for.
    Refused = 1,
    /// The host cannot now; the driver tries again later.
    Busy = 2,
    /// Against the rules.
    Error = 3,
}

/// A request as the driver writes it.
#[derive(FromBytes, IntoBytes)]
#[repr(C)]
struct Request {
    kind: u16,
    _padding: [u16; 3],
    address: u64,
    count: u16,
    _padding_2: [u16; 3],
}

/// An answer as the driver reads it.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct Response {
    kind: u16,
    padding: [u16; 3],
    state: u16,
}

/// The configuration space (section 5.15.4).
#[derive(Clone, Copy, Debug, IntoBytes, Immutable)]
#[repr(C)]
struct Config {
    block_bytes: u64,
    node: u16,
    padding: [u16; 3],
    address: u64,
    region_bytes: u64,
    usable_bytes: u64,
    plugged_bytes: u64,
    requested_bytes: u64,
}

/// Memory that comes and goes: the front of the device.
pub struct Mem {
    region: Region,
    config: Config,
    shared: Arc<Shared>,
    home: LoopHandle,
    worker: Option<Registration>,
}

/// What the driver, the host and the worker share.
struct Shared {
    requested_bytes: AtomicU64,
    plugged_bytes: AtomicU64,
    /// Locked by workers and, while there is none, by who restarts the guest.
    blocks: Mutex<Blocks>,
    config_change: OnceLock<ConfigChange>,
    /// Bytes that shall be plugged.
    goal: Goal,
}

impl Mem {
    /// Makes the device for `region` of `memory`; its worker runs in the loop of `home`.
    pub fn new(memory: GuestMemory, region: Region, home: LoopHandle) -> Self {
        let region_bytes = region.slice.len() as u64;
        let block_bytes = BLOCK_BYTES_MIN.max(memory.page_bytes() as u64);
        let shared = Shared {
            requested_bytes: AtomicU64::new(0),
            plugged_bytes: AtomicU64::new(0),
            blocks: Mutex::new(Blocks::new(region_bytes / block_bytes)),
            config_change: OnceLock::new(),
            goal: Goal::default(),
        };
        let config = Config {
            block_bytes: block_bytes.to_le(),
            node: 0,
            padding: [0; 3],
            address: region.start.0.to_le(),
            region_bytes: region_bytes.to_le(),
            usable_bytes: region_bytes.to_le(),
            plugged_bytes: 0,
            requested_bytes: 0,
        };
        Self { region, config, shared: Arc::new(shared), home, worker: None }
    }

    /// The host's end of the device.
    pub fn sizer(&self, memory: GuestMemory) -> Sizer {
        let all: u64 = memory.regions().map(|region| region.slice.len() as u64).sum();
        let region_bytes = u64::from_le(self.config.region_bytes);
        Sizer {
            fixed_bytes: all - region_bytes,
            region_bytes,
            block_bytes: u64::from_le(self.config.block_bytes),
            shared: Arc::clone(&self.shared),
        }
    }
}

/// The host's end of the guest's memory, for any thread. Sizes are those of all its memory.
#[derive(Clone)]
pub struct Sizer {
    fixed_bytes: u64,
    region_bytes: u64,
    block_bytes: u64,
    shared: Arc<Shared>,
}

impl Sizer {
    /// Asks the driver to make the guest's memory `bytes` large.
    ///
    /// How soon, and whether it can give up what it uses, is the driver's business: see
    /// [`Sizer::size`]. What was asked for outlives resets and restarts.
    pub fn set_size(&self, bytes: u64) -> io::Result<()> {
        let (min, max) = (self.fixed_bytes, self.fixed_bytes + self.region_bytes);
        let elastic = bytes.checked_sub(min).filter(|elastic| *elastic <= self.region_bytes);
        let elastic = elastic.ok_or_else(|| {
            invalid(format!("memory of {bytes} bytes: this guest has from {min} to {max}"))
        })?;
        if !elastic.is_multiple_of(self.block_bytes) {
            let [less, more] = [elastic / self.block_bytes, elastic.div_ceil(self.block_bytes)]
                .map(|blocks| min + blocks * self.block_bytes);
            return Err(invalid(format!(
                "memory of {bytes} bytes: it comes in blocks of {}, the next sizes are {less} and \
                 {more}",
                self.block_bytes
            )));
        }
        self.shared.requested_bytes.store(elastic, Ordering::Relaxed);
        if let Some(change) = self.shared.config_change.get() {
            change.announce();
        }
        self.shared.goal.set(elastic, self.shared.plugged_bytes.load(Ordering::Relaxed));
        Ok(())
    }

    /// Has `told` called with the size in bytes whenever the guest's memory has become as large as
    /// it was asked to be, once for each request, on any thread.
    pub fn on_reached(&self, told: impl Fn(u64) + Send + Sync + 'static) {
        let fixed_bytes = self.fixed_bytes;
        self.shared.goal.on_reached(move |plugged| told(fixed_bytes + plugged));
    }

    /// What the guest's memory shall have, in bytes.
    pub fn requested(&self) -> u64 {
        self.fixed_bytes + self.shared.requested_bytes.load(Ordering::Relaxed)
    }

    /// What the guest's memory has, in bytes.
    pub fn size(&self) -> u64 {
        self.fixed_bytes + self.shared.plugged_bytes.load(Ordering::Relaxed)
    }

    /// The most that the guest's memory can have, in bytes.
    pub fn max(&self) -> u64 {
        self.fixed_bytes + self.region_bytes
    }

    /// Unplugs everything, as switching off does: the device has been reset and nothing is left in
    /// memory.
    pub fn switch_off(&self) {
        self.shared.blocks().clear();
        self.shared.publish(0);
    }
}

impl Shared {
    fn blocks(&self) -> MutexGuard<'_, Blocks> {
        self.blocks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets the driver read how much is plugged by now.
    fn publish(&self, plugged_bytes: u64) {
        self.plugged_bytes.store(plugged_bytes, Ordering::Relaxed);
        if let Some(change) = self.config_change.get() {
            change.note();
        }
        self.goal.look(plugged_bytes);
    }
}

impl VirtioDevice for Mem {
    fn counters(&self) -> Option<Counters> {
        let shared = Arc::clone(&self.shared);
        let read = |bytes: &AtomicU64| bytes.load(Ordering::Relaxed);
        Some(Box::new(move || {
            vec![
                Reading::now("requested_bytes", read(&shared.requested_bytes)),
                Reading::now("plugged_bytes", read(&shared.plugged_bytes)),
            ]
        }))
    }

    fn offer(&self) -> Offer {
        let features = FEATURE_UNPLUGGED_INACCESSIBLE;
        Offer { kind: DeviceKind::Mem, features, queue_sizes: vec![QUEUE_SIZE] }
    }

    fn config(&self) -> &[u8] {
        self.config.as_bytes()
    }

    fn connect(&mut self, change: ConfigChange) {
        // A device is put on one transport, once.
        let _ = self.shared.config_change.set(change);
    }

    fn refresh(&mut self) {
        let read = |bytes: &AtomicU64| bytes.load(Ordering::Relaxed).to_le();
        self.config.requested_bytes = read(&self.shared.requested_bytes);
        self.config.plugged_bytes = read(&self.shared.plugged_bytes);
    }

    fn activate(&mut self, mut activation: Activation) -> io::Result<()> {
        let queue = activation.take_queue(0).map_err(io::Error::other)?;
        let worker = MemWorker {
            chain: Chain::with_capacity(queue.size()),
            queue,
            memory: activation.memory,
            region: self.region,
            block_bytes: u64::from_le(self.config.block_bytes),
            shared: Arc::clone(&self.shared),
        };
        self.worker = Some(worker::start("mem", worker, &self.home, activation.needs_reset)?);
        Ok(())
    }

    fn reset(&mut self) {
        self.worker = None;
    }
}

/// The back of the device.
struct MemWorker {
    queue: Queue,
    chain: Chain,
    memory: GuestMemory,
    region: Region,
    block_bytes: u64,
    shared: Arc<Shared>,
}

impl Worker for MemWorker {
    fn queues(&mut self) -> &mut [Queue] {
        std::slice::from_mut(&mut self.queue)
    }

    fn doorbell(&mut self, _index: usize) -> Result<(), Fault> {
        let outcome = self.serve();
        self.queue.notify_driver();
        outcome
    }
}

impl MemWorker {
    fn serve(&mut self) -> Result<(), Fault> {
        while self.queue.pop(&mut self.chain)? {
            let (answer, state) = match self.chain.take() {
                Some(request) => self.answer(&request),
                None => (Answer::Error, 0),
            };
            let response =
                Response { kind: (answer as u16).to_le(), padding: [0; 3], state: state.to_le() };
            let written = self.chain.write(response.as_bytes());
            if written < size_of::<Response>() {
                return Err(Fault::Request("no room for a response"));
            }
            self.queue.complete(self.chain.head(), u32::try_from(written).unwrap_or(0));
        }
        Ok(())
    }

    /// The answer to a request, and the state of the blocks where it asks for that.
    fn answer(&self, request: &Request) -> (Answer, u16) {
        let shared = &*self.shared;
        let mut blocks = shared.blocks();
        let kind = u16::from_le(request.kind);
        if kind == request::UNPLUG_ALL {
            return (self.unplug_all(&mut blocks), 0);
        }
        let offset = u64::from_le(request.address).checked_sub(self.region.start.0);
        let offset = offset.filter(|offset| offset.is_multiple_of(self.block_bytes));
        let count = u64::from(u16::from_le(request.count));
        let range = offset.and_then(|offset| blocks.range(offset / self.block_bytes, count));
        let Some(range) = range else { return (Answer::Error, 0) };
        let plugged = blocks.plugged(&range);
        let answer = match kind {
            request::STATE => return (Answer::Done, state(plugged, count)),
            request::PLUG if plugged == 0 => self.plug(&mut blocks, &range),
            request::UNPLUG if plugged == count => self.unplug(&mut blocks, &range),
            _ => Answer::Error,
        };
        shared.publish(blocks.all_plugged() * self.block_bytes);
        (answer, 0)
    }

    fn plug(&self, blocks: &mut Blocks, range: &blocks::Range) -> Answer {
        let after = (blocks.all_plugged() + range.count()) * self.block_bytes;
        if after > self.shared.requested_bytes.load(Ordering::Relaxed) {
            return Answer::Refused;
        }
        let Some(slice) = self.slice(range) else { return Answer::Error };
        if let Err(error) = self.memory.secure(slice) {
            warn_limited!("mem: the host has not enough memory to plug more: {error}");
            let _ = self.memory.discard(slice);
            return Answer::Busy;
        }
        blocks.set(range, true);
        Answer::Done
    }

    fn unplug(&self, blocks: &mut Blocks, range: &blocks::Range) -> Answer {
        let Some(slice) = self.slice(range) else { return Answer::Error };
        if let Err(error) = self.memory.discard(slice) {
            warn_limited!("mem: the host takes no memory back: {error}");
            return Answer::Busy;
        }
        blocks.set(range, false);
        Answer::Done
    }

    fn unplug_all(&self, blocks: &mut Blocks) -> Answer {
        if let Err(error) = self.memory.discard(self.region.slice) {
            warn_limited!("mem: the host takes no memory back: {error}");
            return Answer::Busy;
        }
        blocks.clear();
        self.shared.publish(0);
        Answer::Done
    }

    fn slice(&self, range: &blocks::Range) -> Option<GuestSlice> {
        let [start, len] =
            [range.start(), range.count()].map(|blocks| usize::try_from(blocks * self.block_bytes));
        self.region.slice.sub_slice(start.ok()?, len.ok()?)
    }
}

/// What the driver is told of `count` blocks of which some are plugged.
fn state(plugged: u64, count: u64) -> u16 {
    match plugged {
        plugged if plugged == count => 0,
        0 => 1,
        _ => 2,
    }
}

fn invalid(reason: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, reason)
}
