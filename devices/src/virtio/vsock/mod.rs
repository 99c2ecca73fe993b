//! Virtio socket device (virtio 1.3, section 5.10): stream connections between programs of the
//! guest and, through a [`Gate`], programs of the host.
//!
//! Each direction of a connection has a bounded buffer that its receiver has announced (credit):
//! bytes for the guest wait in the host's socket, bytes for the host in a buffer of ours.

mod connection;
mod muxer;
mod packet;

use std::io;
use std::sync::{Arc, Mutex};

use self::muxer::{COUNTED, VsockWorker};
use super::counters::{Counters, Totals};
use super::device::{Activation, DeviceKind, Offer, VirtioDevice};
use super::vhost::{self, KernelRings, Share};
use super::worker;
use crate::event::{LoopHandle, Registration};
use crate::host::vsock::Gate;

/// `VIRTIO_VSOCK_F_STREAM`.
const FEATURE_STREAM: u64 = 1 << 0;
/// `VIRTIO_VSOCK_F_SEQPACKET`.
const FEATURE_SEQPACKET: u64 = 1 << 1;

/// Linux keeps the receive queue full of packets of 4 KiB: twice what it lets one connection send,
/// and half a MiB that a guest has no other use for.
const QUEUE_SIZE: u16 = 128;

/// The receive, transmit and event queues; nothing ever happens that the last one is for.
const QUEUE_SIZES: [u16; 3] = [QUEUE_SIZE, QUEUE_SIZE, 8];

/// A socket device.
pub struct Vsock {
    // Dropped before the gate, so that the worker holds it no longer.
    worker: Option<Registration>,
    cid: u64,
    /// The configuration space: the guest's context id.
    config: [u8; 8],
    features: u64,
    path: Path,
    home: LoopHandle,
}

/// What carries the connections.
enum Path {
    /// Unix sockets of the host, by a worker of ours.
    Gate(Arc<Gate>, Arc<Totals<{ COUNTED.len() }>>),
    /// The host's kernel.
    Kernel(Arc<Mutex<KernelRings>>),
}

impl Vsock {
    /// Makes the device of a guest whose context id is `cid`; its worker runs in the loop of
    /// `home`.
    pub fn new(cid: u32, gate: Gate, home: LoopHandle) -> Self {
        let totals = Arc::new(Totals::new(COUNTED));
        Self::on(Path::Gate(Arc::new(gate), totals), cid, FEATURE_STREAM, home)
    }

    /// Makes the device of a guest whose connections the host's kernel carries. It knows `features`
    /// and has given the guest `cid`.
    pub fn in_kernel(cid: u32, features: u64, rings: KernelRings, home: LoopHandle) -> Self {
        let features = FEATURE_STREAM | features & FEATURE_SEQPACKET;
        Self::on(Path::Kernel(Arc::new(Mutex::new(rings))), cid, features, home)
    }

    /// The guest's context id.
    pub fn context_id(&self) -> u64 {
        self.cid
    }

    fn on(path: Path, cid: u32, features: u64, home: LoopHandle) -> Self {
        let cid = u64::from(cid);
        Self { worker: None, cid, config: cid.to_le_bytes(), features, path, home }
    }
}

impl VirtioDevice for Vsock {
    fn offer(&self) -> Offer {
        let queue_sizes = QUEUE_SIZES.to_vec();
        Offer { kind: DeviceKind::Vsock, features: self.features, queue_sizes }
    }

    /// An answer comes with the word that the question was taken.
    fn shares_interrupt(&self) -> bool {
        true
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    /// What passes through the host's kernel is counted by nobody.
    fn counters(&self) -> Option<Counters> {
        let Path::Gate(_, totals) = &self.path else { return None };
        let totals = Arc::clone(totals);
        Some(Box::new(move || totals.read()))
    }

    fn activate(&mut self, mut activation: Activation) -> io::Result<()> {
        self.worker = Some(match &self.path {
            Path::Gate(gate, totals) => {
                let receive = activation.take_queue(0).map_err(io::Error::other)?;
                let transmit = activation.take_queue(1).map_err(io::Error::other)?;
                let (gate, totals) = (Arc::clone(gate), Arc::clone(totals));
                let worker = VsockWorker::new(self.cid, [receive, transmit], gate, totals);
                worker::start("vsock", worker, &self.home, activation.needs_reset)?
            }
            Path::Kernel(rings) => {
                let share = Share::new(rings, [0, 1]);
                vhost::start("vsock", vec![share], &mut activation, &self.home)?
            }
        });
        Ok(())
    }

    fn reset(&mut self) {
        self.worker = None;
    }
}

#[cfg(test)]
mod test;
