//! Virtio block device (virtio 1.3, section 5.2).
//!
//! Serves one raw image over a queue for each virtual processor, all on one thread. Not offered:
//! zoned storage, secure erase and lifetime, which files do not have, and legacy geometry.
//!
//! Writes are honest: without a flush command, or with the write-back cache switched off by the
//! driver, a write is completed only when it would survive a power cut.

mod request;
#[cfg(test)]
mod test;

use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use arch::memory::GuestSlice;
use zerocopy::IntoBytes;

use super::chain::Chain;
use super::config_change::ConfigChange;
use super::counters::{Counters, Totals};
use super::device::{Activation, DeviceKind, Offer, VirtioDevice};
use super::queue::{Queue, QueueError};
use super::worker::{self, Fault, Worker, WorkerWatch};
use crate::event::{EventSet, LoopHandle, Registration};
use crate::host::disk::blocking::BlockingDisk;
use crate::host::disk::image::{Image, SECTOR_BYTES};
use crate::host::disk::{Disk, DiskRequest, Engine};
use crate::warn_limited;
use request::{Command, Config, ID_BYTES, Rules, Status};

/// Descriptors of a queue: what Linux asks of its own SATA disks, eight times over, in 4 KiB of
/// ring.
const QUEUE_SIZE: u16 = 256;
/// Queues of a device; further virtual processors share them.
const QUEUES_MAX: u16 = 64;

const COMPLETION: u32 = 0;

/// What a block device is made of.
#[derive(Debug)]
pub struct BlockOptions {
    /// The open image.
    pub image: Image,
    /// What the guest reads by GET_ID; cut after 20 bytes.
    pub serial: String,
    /// How the image is read and written.
    pub engine: Engine,
    /// Number of queues, 1 to 64: one for each virtual processor.
    pub queues: u16,
}

/// A disk: the front of the device.
pub struct Block {
    image: Arc<Image>,
    serial: [u8; ID_BYTES],
    queues: u16,
    config: Config,
    parked: Parked,
    /// What the driver agreed to, once it has.
    features: Option<u64>,
    shared: Arc<Shared>,
    home: LoopHandle,
    worker: Option<Registration>,
}

/// Where the disk is while no worker has it: a ring cannot be made again under the sandbox. A
/// worker leaves a disk that needs no ring in its place. Nobody waits for the lock: a front starts
/// a worker when the last one is gone.
type Parked = Arc<Mutex<Box<dyn Disk>>>;

/// What is counted, in the order of [`Counted`].
const COUNTED: [&str; 7] =
    ["reads", "read_bytes", "writes", "written_bytes", "flushes", "discards", "errors"];

/// Places among what is counted.
#[derive(Clone, Copy)]
enum Counted {
    Reads,
    ReadBytes,
    Writes,
    WrittenBytes,
    Flushes,
    Discards,
    Errors,
}

/// What the driver or the host may change while the worker runs, and what is counted meanwhile.
struct Shared {
    totals: Totals<{ COUNTED.len() }>,
    capacity_sectors: AtomicU64,
    write_back: AtomicBool,
    config_change: OnceLock<ConfigChange>,
}

impl Block {
    /// Makes a disk that is served on the thread of `home`.
    ///
    /// Everything that the sandbox would forbid later is done here.
    pub fn new(options: BlockOptions, home: LoopHandle) -> io::Result<Self> {
        let BlockOptions { image, serial, engine, queues } = options;
        let queues = queues.clamp(1, QUEUES_MAX);
        let capacity_sectors = image.size_bytes()? / SECTOR_BYTES;
        let image = Arc::new(image);
        let shared = Shared {
            totals: Totals::new(COUNTED),
            capacity_sectors: AtomicU64::new(capacity_sectors),
            write_back: AtomicBool::new(true),
            config_change: OnceLock::new(),
        };
        Ok(Self {
            config: Config::new(capacity_sectors, image.blocks(), queues),
            parked: Arc::new(Mutex::new(engine.open(Arc::clone(&image))?)),
            image,
            serial: identification(&serial),
            queues,
            features: None,
            shared: Arc::new(shared),
            home,
            worker: None,
        })
    }

    /// The part of the disk that notices a new size of its image.
    pub fn resizer(&self) -> Resizer {
        let (image, shared) = (Arc::clone(&self.image), Arc::clone(&self.shared));
        Resizer { name: self.name(), image, shared }
    }

    /// What the log calls this disk.
    fn name(&self) -> String {
        let serial = String::from_utf8_lossy(&self.serial);
        format!("disk {}", serial.trim_end_matches('\0'))
    }

    fn set_write_back(&mut self, on: bool) {
        self.config.writeback = u8::from(on);
        self.shared.write_back.store(on, Ordering::Relaxed);
    }
}

/// Gives a running disk the size that its image has by now, or another image, from any thread.
pub struct Resizer {
    name: String,
    image: Arc<Image>,
    shared: Arc<Shared>,
}

impl Resizer {
    /// What the log calls the disk.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Makes the image larger, up to `size` bytes. The driver is not told.
    pub fn grow(&self, size: u64) -> io::Result<()> {
        self.image.grow(size)
    }

    /// The size in bytes that the driver has been told.
    pub fn size_bytes(&self) -> u64 {
        self.shared.capacity_sectors.load(Ordering::Relaxed).saturating_mul(SECTOR_BYTES)
    }

    /// Says whether the image may only be read.
    pub fn is_read_only(&self) -> bool {
        self.image.is_read_only()
    }

    /// Puts `file` in the place of the image's, and returns its size in bytes. The driver is told.
    pub fn exchange(&self, file: &File) -> io::Result<u64> {
        self.image.exchange(file)?;
        self.resize()
    }

    /// Looks at the image and returns the new size in bytes, cut to whole blocks.
    ///
    /// The driver is told.
    pub fn resize(&self) -> io::Result<u64> {
        let block = u64::from(self.image.blocks().logical_bytes);
        let size = self.image.size_bytes()?;
        let size = size - size % block;
        self.shared.capacity_sectors.store(size / SECTOR_BYTES, Ordering::Relaxed);
        if let Some(change) = self.shared.config_change.get() {
            change.announce();
        }
        Ok(size)
    }
}

impl VirtioDevice for Block {
    fn offer(&self) -> Offer {
        let access = if self.image.is_read_only() {
            request::FEATURE_RO
        } else {
            request::FEATURE_FLUSH
                | request::FEATURE_CONFIG_WCE
                | request::FEATURE_DISCARD
                | request::FEATURE_WRITE_ZEROES
        };
        let features = request::FEATURE_SIZE_MAX
            | request::FEATURE_SEG_MAX
            | request::FEATURE_BLK_SIZE
            | request::FEATURE_TOPOLOGY
            | request::FEATURE_MQ
            | access;
        let queue_sizes = vec![QUEUE_SIZE; usize::from(self.queues)];
        Offer { kind: DeviceKind::Block, features, queue_sizes }
    }

    fn config(&self) -> &[u8] {
        self.config.as_bytes()
    }

    fn connect(&mut self, change: ConfigChange) {
        // A device is put on one transport, once.
        let _ = self.shared.config_change.set(change);
    }

    fn refresh(&mut self) {
        self.config.capacity_sectors = self.shared.capacity_sectors.load(Ordering::Relaxed);
    }

    fn write_config(&mut self, offset: usize, data: &[u8]) {
        let may_switch =
            self.features.is_none_or(|agreed| agreed & request::FEATURE_CONFIG_WCE != 0);
        if let (true, Config::WRITEBACK, [value @ (0 | 1)]) = (may_switch, offset, data) {
            self.set_write_back(*value == 1);
        }
    }

    fn counters(&self) -> Option<Counters> {
        let shared = Arc::clone(&self.shared);
        Some(Box::new(move || shared.totals.read()))
    }

    fn activate(&mut self, mut activation: Activation) -> io::Result<()> {
        self.features = Some(activation.features);
        // Without a flush command nothing may be left in a cache; without a switch there is one
        // (sections 5.2.5.2 and 5.2.6.2).
        if activation.features & request::FEATURE_FLUSH == 0 {
            self.set_write_back(false);
        } else if activation.features & request::FEATURE_CONFIG_WCE == 0 {
            self.set_write_back(true);
        }
        let mut queues = Vec::new();
        for index in 0..activation.queues.len() {
            match activation.take_queue(index) {
                Ok(queue) => queues.push(queue),
                // A driver uses as many queues as it likes; the first it must have.
                Err(QueueError::NotEnabled) if index > 0 => {}
                Err(error) => return Err(io::Error::other(error)),
            }
        }
        let worker = BlockWorker::new(self, queues, activation.features);
        self.worker =
            Some(worker::start(&self.name(), worker, &self.home, activation.needs_reset)?);
        Ok(())
    }

    fn reset(&mut self) {
        self.worker = None;
        self.features = None;
        self.set_write_back(true);
    }
}

/// The back of the device: its queues and what serves them.
struct BlockWorker {
    queues: Vec<Queue>,
    disk: Box<dyn Disk>,
    parked: Parked,
    /// For each queue the requests that the disk has, by the head of their chain.
    in_flight: Vec<Vec<Option<InFlight>>>,
    chain: Chain,
    name: String,
    features: u64,
    is_read_only: bool,
    serial: [u8; ID_BYTES],
    shared: Arc<Shared>,
    /// Queues wait for room in the disk.
    is_stalled: bool,
    /// What this batch adds to the totals.
    batch: [u64; COUNTED.len()],
}

/// What is needed to answer a request.
#[derive(Clone, Copy)]
struct InFlight {
    status: GuestSlice,
    /// Bytes that the device writes before the status if all goes well.
    data_len: u32,
}

impl Worker for BlockWorker {
    fn queues(&mut self) -> &mut [Queue] {
        &mut self.queues
    }

    fn watch(&mut self, watch: &mut WorkerWatch<'_, '_, '_>) -> io::Result<()> {
        match self.disk.completion_event() {
            // Edge triggered, so that nobody needs to take the signal.
            Some(event) => watch.add(event, COMPLETION, EventSet::IN | EventSet::EDGE_TRIGGERED),
            None => Ok(()),
        }
    }

    fn doorbell(&mut self, index: usize) -> Result<(), Fault> {
        self.take_requests(index)?;
        self.go_on()
    }

    fn ready(&mut self, _: u32, _: EventSet, _: &mut WorkerWatch<'_, '_, '_>) -> Result<(), Fault> {
        self.go_on()
    }
}

impl BlockWorker {
    fn new(front: &Block, queues: Vec<Queue>, features: u64) -> Self {
        let slots = |queue: &Queue| vec![None; usize::from(queue.size())];
        let mut disk: Box<dyn Disk> = Box::new(BlockingDisk::new(Arc::clone(&front.image)));
        exchange(&front.parked, &mut disk);
        Self {
            disk,
            parked: Arc::clone(&front.parked),
            in_flight: queues.iter().map(slots).collect(),
            queues,
            chain: Chain::with_capacity(QUEUE_SIZE),
            name: front.name(),
            features,
            is_read_only: front.image.is_read_only(),
            serial: front.serial,
            shared: Arc::clone(&front.shared),
            is_stalled: false,
            batch: [0; COUNTED.len()],
        }
    }

    /// Starts what was taken and answers what is done, until the disk is full or nothing waits for
    /// it.
    fn go_on(&mut self) -> Result<(), Fault> {
        loop {
            self.disk.start()?;
            self.finish_completed();
            if !self.is_stalled || !self.disk.has_room() {
                return Ok(());
            }
            self.is_stalled = false;
            for index in 0..self.queues.len() {
                self.take_requests(index)?;
            }
        }
    }

    /// Takes what the driver made available in one queue, as far as the disk has room.
    fn take_requests(&mut self, index: usize) -> Result<(), Fault> {
        while let Some(queue) = self.queues.get_mut(index) {
            if !self.disk.has_room() {
                self.is_stalled = true;
                break;
            }
            if !queue.pop(&mut self.chain)? {
                break;
            }
            self.take_request(index)?;
        }
        Ok(())
    }

    fn take_request(&mut self, index: usize) -> Result<(), Fault> {
        let head = self.chain.head();
        let status = self.chain.split_off_status().ok_or(Fault::Request("no room for a status"))?;
        let rules = Rules {
            features: self.features,
            is_read_only: self.is_read_only,
            capacity_sectors: self.shared.capacity_sectors.load(Ordering::Relaxed),
        };
        let command = rules.parse(&mut self.chain);
        let data_len = u32::try_from(self.chain.writable_len()).unwrap_or(0);
        let requests = self.in_flight.get_mut(index);
        let slot = requests.and_then(|slots| slots.get_mut(usize::from(head)));
        *slot.ok_or(Fault::Request("unknown chain"))? = Some(InFlight { status, data_len });
        match command {
            Ok(command) => self.carry_out(index, head, command),
            Err(status) => self.finish(index, head, status),
        }
        Ok(())
    }

    fn count(&mut self, counted: Counted, value: usize) {
        if let Some(count) = self.batch.get_mut(counted as usize) {
            *count = count.wrapping_add(value as u64);
        }
    }

    fn count_command(&mut self, command: &Command) {
        match command {
            Command::Read { .. } => {
                self.count(Counted::Reads, 1);
                self.count(Counted::ReadBytes, self.chain.writable_len());
            }
            Command::Write { .. } => {
                self.count(Counted::Writes, 1);
                self.count(Counted::WrittenBytes, self.chain.readable_len());
            }
            Command::Flush => self.count(Counted::Flushes, 1),
            Command::Discard { .. } | Command::WriteZeroes { .. } => {
                self.count(Counted::Discards, 1);
            }
            Command::Identify => {}
        }
    }

    fn carry_out(&mut self, index: usize, head: u16, command: Command) {
        self.count_command(&command);
        let request = match command {
            Command::Read { offset } => DiskRequest::Read { offset, into: self.chain.writable() },
            Command::Write { offset } => {
                let durable = !self.shared.write_back.load(Ordering::Relaxed);
                DiskRequest::Write { offset, from: self.chain.readable(), durable }
            }
            Command::Flush => DiskRequest::Flush,
            Command::Discard { offset, len } => DiskRequest::Discard { offset, len },
            Command::WriteZeroes { offset, len, unmap } => {
                DiskRequest::WriteZeroes { offset, len, unmap }
            }
            Command::Identify => {
                self.chain.write(&self.serial);
                return self.finish(index, head, Status::Ok);
            }
        };
        self.disk.submit(tag(index, head), request);
    }

    fn finish_completed(&mut self) {
        while let Some((tag, outcome)) = self.disk.completed() {
            let (index, head) = from_tag(tag);
            match outcome {
                Ok(()) => self.finish(index, head, Status::Ok),
                Err(error) => {
                    warn_limited!("{}: a request failed: {error}", self.name);
                    self.count(Counted::Errors, 1);
                    self.finish(index, head, Status::IoError);
                }
            }
        }
        for queue in &mut self.queues {
            queue.notify_driver();
        }
        self.shared.totals.add(&mut self.batch);
    }

    /// Answers a request: the one place where a status is written.
    fn finish(&mut self, index: usize, head: u16, status: Status) {
        let requests = self.in_flight.get_mut(index);
        let slot = requests.and_then(|slots| slots.get_mut(usize::from(head)));
        let Some(request) = slot.and_then(Option::take) else { return };
        request.status.write(0, &(status as u8));
        // Bytes count from the front of the buffers, where a failed request may have written none.
        let written = match (status, request.data_len) {
            (Status::Ok, len) => len.saturating_add(1),
            (_, 0) => 1,
            _ => 0,
        };
        if let Some(queue) = self.queues.get_mut(index) {
            queue.complete(head, written);
        }
    }
}

impl Drop for BlockWorker {
    fn drop(&mut self) {
        self.disk.drain();
        exchange(&self.parked, &mut self.disk);
    }
}

fn exchange(parked: &Parked, disk: &mut Box<dyn Disk>) {
    std::mem::swap(&mut *parked.lock().unwrap_or_else(PoisonError::into_inner), disk);
}

fn tag(index: usize, head: u16) -> u32 {
    u32::try_from(index).unwrap_or(u32::MAX) << 16 | u32::from(head)
}

fn from_tag(tag: u32) -> (usize, u16) {
    let [a, b, c, d] = tag.to_be_bytes();
    (usize::from(u16::from_be_bytes([a, b])), u16::from_be_bytes([c, d]))
}

fn identification(serial: &str) -> [u8; ID_BYTES] {
    let mut id = [0; ID_BYTES];
    for (target, byte) in id.iter_mut().zip(serial.bytes()) {
        *target = byte;
    }
    id
}
