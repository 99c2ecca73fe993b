//! Virtio console device (virtio 1.3, section 5.3).
//!
//! One port: a queue for input and one for output. Output that the reader behind the stream does
//! not take stays in the driver's buffers, and input without a buffer stays in the stream, so
//! nothing is lost and nothing grows. Several ports are not offered: a guest needs one console, and
//! vsock connects better. The emergency write works before the driver is ready, for the first
//! messages of a kernel.

use std::io;
use std::sync::Arc;

use zerocopy::{Immutable, IntoBytes};

use super::chain::Chain;
use super::config_change::ConfigChange;
use super::counters::{Counters, Totals};
use super::device::{Activation, DeviceKind, Offer, VirtioDevice};
use super::queue::Queue;
use super::worker::{self, Fault, Worker, WorkerWatch};
use crate::event::{EventSet, LoopHandle, Registration};
use crate::host::stream::{Stream, WindowSize};

/// Linux fills the whole queue with pages of its own: enough for pasted text, no waste.
const INPUT_QUEUE_SIZE: u16 = 16;
/// Linux sends one buffer at a time and waits for it.
const OUTPUT_QUEUE_SIZE: u16 = 64;

/// Bytes of output that one turn moves before other handlers of the loop get theirs; a chain may
/// name the same memory many times and so be longer than all of RAM.
const OUTPUT_TURN_BYTES_MAX: usize = 256 << 10;

/// Bytes moved at once between guest and stream.
const COPY_BYTES: usize = 1024;

/// `VIRTIO_CONSOLE_F_SIZE`: the configuration has the window's size.
const FEATURE_SIZE: u64 = 1 << 0;
/// `VIRTIO_CONSOLE_F_EMERG_WRITE`: the configuration takes characters without a queue.
const FEATURE_EMERG_WRITE: u64 = 1 << 2;

const INPUT_QUEUE: usize = 0;
const OUTPUT_QUEUE: usize = 1;

/// Token of the stream's attention event.
const ATTENTION: u32 = 0;

/// Configuration space (section 5.3.4).
#[derive(Clone, Copy, Debug, Default, Immutable, IntoBytes)]
#[repr(C)]
struct ConsoleConfig {
    columns: u16,
    rows: u16,
    max_ports: u32,
    emergency_write: u32,
}

const EMERGENCY_WRITE_OFFSET: usize = std::mem::offset_of!(ConsoleConfig, emergency_write);

/// A console with one port.
pub struct Console {
    stream: Stream,
    totals: Arc<Totals<2>>,
    home: LoopHandle,
    config: ConsoleConfig,
    config_change: Option<ConfigChange>,
    worker: Option<Registration>,
}

impl Console {
    /// Makes a console in front of `stream`, whose worker runs in the loop of `home`.
    pub fn new(stream: Stream, home: LoopHandle) -> Self {
        let config = ConsoleConfig { max_ports: 1u32.to_le(), ..ConsoleConfig::default() };
        let totals = Arc::new(Totals::new(["input_bytes", "output_bytes"]));
        let mut console = Self { stream, totals, home, config, config_change: None, worker: None };
        console.refresh();
        console
    }
}

impl VirtioDevice for Console {
    fn offer(&self) -> Offer {
        Offer {
            kind: DeviceKind::Console,
            features: FEATURE_SIZE | FEATURE_EMERG_WRITE,
            queue_sizes: vec![INPUT_QUEUE_SIZE, OUTPUT_QUEUE_SIZE],
        }
    }

    fn config(&self) -> &[u8] {
        self.config.as_bytes()
    }

    fn write_config(&mut self, offset: usize, data: &[u8]) {
        // The character is the lowest byte, whatever the width of the write.
        if let (EMERGENCY_WRITE_OFFSET, Some(character)) = (offset, data.get(..1)) {
            // As on any serial line, what a full buffer does not take is lost.
            let _ = self.stream.send(character);
        }
    }

    fn connect(&mut self, change: ConfigChange) {
        self.config_change = Some(change.clone());
        self.stream.on_resize(Box::new(move || change.announce()));
    }

    fn refresh(&mut self) {
        let size = self.stream.window_size();
        self.config.columns = size.columns.to_le();
        self.config.rows = size.rows.to_le();
    }

    fn counters(&self) -> Option<Counters> {
        let totals = Arc::clone(&self.totals);
        Some(Box::new(move || totals.read()))
    }

    fn activate(&mut self, mut activation: Activation) -> io::Result<()> {
        let input = activation.take_queue(INPUT_QUEUE).map_err(io::Error::other)?;
        let output = activation.take_queue(OUTPUT_QUEUE).map_err(io::Error::other)?;
        let worker = ConsoleWorker {
            chain: Chain::with_capacity(input.size()),
            sender: Sender::new(output.size()),
            queues: [input, output],
            stream: self.stream.clone(),
            totals: Arc::clone(&self.totals),
        };
        self.worker = Some(worker::start("console", worker, &self.home, activation.needs_reset)?);
        // Linux reads the size when it changes, and not when it starts.
        if let Some(change) = &self.config_change
            && self.stream.window_size() != WindowSize::default()
        {
            change.announce();
        }
        Ok(())
    }

    fn reset(&mut self) {
        self.worker = None;
    }
}

struct ConsoleWorker {
    queues: [Queue; 2],
    /// Reused for input.
    chain: Chain,
    sender: Sender,
    stream: Stream,
    totals: Arc<Totals<2>>,
}

impl Worker for ConsoleWorker {
    fn queues(&mut self) -> &mut [Queue] {
        &mut self.queues
    }

    fn watch(&mut self, watch: &mut WorkerWatch<'_, '_, '_>) -> io::Result<()> {
        watch.add(self.stream.attention(), ATTENTION, EventSet::IN)
    }

    fn doorbell(&mut self, index: usize) -> Result<(), Fault> {
        match index {
            INPUT_QUEUE => self.receive(),
            _ => self.send(),
        }
    }

    fn ready(
        &mut self,
        _token: u32,
        _readiness: EventSet,
        _watch: &mut WorkerWatch<'_, '_, '_>,
    ) -> Result<(), Fault> {
        self.stream.attention().take();
        self.receive()?;
        self.send()
    }
}

impl ConsoleWorker {
    /// Moves input to the driver's buffers.
    fn receive(&mut self) -> Result<(), Fault> {
        let [queue, _] = &mut self.queues;
        let mut outcome = Ok(());
        let mut count = 0;
        while self.stream.has_input() {
            match queue.pop(&mut self.chain) {
                Ok(true) => {
                    let written = fill(&self.chain, &self.stream);
                    queue.complete(self.chain.head(), written);
                    count += u64::from(written);
                }
                Ok(false) => break,
                Err(error) => {
                    outcome = Err(error.into());
                    break;
                }
            }
        }
        queue.notify_driver();
        self.totals.add(&mut [count, 0]);
        outcome
    }

    /// Moves the driver's output to the stream.
    fn send(&mut self) -> Result<(), Fault> {
        let [_, queue] = &mut self.queues;
        let outcome = self.sender.send(queue, &self.stream);
        self.totals.add(&mut [0, std::mem::take(&mut self.sender.count)]);
        queue.notify_driver();
        outcome
    }
}

/// Output on its way, which may stop in the middle of a chain and of a copy.
struct Sender {
    chain: Chain,
    /// The chain is not completed yet.
    in_chain: bool,
    copy: [u8; COPY_BYTES],
    /// Bytes of the copy that are to be sent.
    start: usize,
    end: usize,
    /// Bytes sent since they were counted.
    count: u64,
}

impl Sender {
    fn new(queue_size: u16) -> Self {
        let chain = Chain::with_capacity(queue_size);
        Self { chain, in_chain: false, copy: [0; COPY_BYTES], start: 0, end: 0, count: 0 }
    }

    fn send(&mut self, queue: &mut Queue, stream: &Stream) -> Result<(), Fault> {
        let mut moved = 0;
        loop {
            let unsent = self.copy.get(self.start..self.end).unwrap_or_default();
            let sent = stream.send(unsent);
            self.start += sent;
            moved += sent;
            self.count += sent as u64;
            if sent < unsent.len() {
                return Ok(());
            }
            if moved >= OUTPUT_TURN_BYTES_MAX {
                queue.doorbell().signal();
                return Ok(());
            }
            if self.in_chain {
                (self.start, self.end) = (0, self.chain.take_bytes(&mut self.copy));
                if self.end > 0 {
                    continue;
                }
                queue.complete(self.chain.head(), 0);
            }
            self.in_chain = queue.pop(&mut self.chain)?;
            if !self.in_chain {
                return Ok(());
            }
        }
    }
}

/// Fills the writable buffers with input and returns the number of bytes written.
fn fill(chain: &Chain, stream: &Stream) -> u32 {
    let mut written: u32 = 0;
    let mut copy = [0; COPY_BYTES];
    for slice in chain.writable() {
        let mut rest = *slice;
        while rest.len() > 0 {
            let room = rest.len().min(COPY_BYTES);
            let Some(bytes) = copy.get_mut(..room) else { return written };
            let count = stream.receive(bytes);
            let Some((part, behind)) = rest.split_at(count).filter(|_| count > 0) else {
                return written;
            };
            part.copy_from(bytes);
            rest = behind;
            // The stream never holds more than a few kilobytes.
            written = written.saturating_add(u32::try_from(count).unwrap_or(u32::MAX));
        }
    }
    written
}

#[cfg(test)]
mod test;
