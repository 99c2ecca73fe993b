//! Virtio network device (virtio 1.3, section 5.1).
//!
//! The front has the registers and the control queue; what moves frames is behind a [`Backend`].
//! Not offered: receive-side scaling and hash reports, which a tap does by itself, VLAN filters,
//! and whatever a driver without `VIRTIO_F_VERSION_1` would need. Frames are not filtered by
//! address: what stands at the other end of a card's link sends what is for it, and a driver
//! checks again.

pub mod backend;
mod control;
pub mod layout;
pub mod tap;
#[cfg(test)]
mod test;
pub mod vhost;

use std::io;

use zerocopy::IntoBytes;

use self::backend::{Backend, Count, Link, Pair, Session};
use self::control::ControlWorker;
use self::layout::{Config, FEATURE_CTRL_VQ, FEATURE_MQ, FEATURE_MTU, FRONT_FEATURES};
use super::config_change::ConfigChange;
use super::counters::{Counters, Reading};
use super::device::{Activation, DeviceKind, Offer, VirtioDevice};
use super::worker;
use crate::event::{LoopHandle, Registration};

/// Descriptors of a queue: a burst of full frames, or four of the largest segments, in 4 KiB of
/// ring.
pub const QUEUE_SIZE: u16 = 256;

/// What a network card is made of.
pub struct NetOptions {
    /// What the log calls it.
    pub name: String,
    /// The address that the driver finds.
    pub mac: [u8; 6],
    /// The largest packet in bytes that the driver shall send, if there is a limit to tell.
    pub mtu: Option<u16>,
    /// What moves the frames.
    pub backend: Box<dyn Backend>,
}

/// A network card: the front of the device.
pub struct Net {
    name: String,
    mac: [u8; 6],
    features: u64,
    pairs: u16,
    config: Config,
    link: Link,
    backend: Box<dyn Backend>,
    home: LoopHandle,
    control: Option<Registration>,
}

/// What is asked of a card from outside the guest, from any thread.
#[derive(Clone)]
pub struct NetHandle {
    name: String,
    link: Link,
}

impl Net {
    /// Makes a card whose control queue is served in the loop of `home`.
    pub fn new(options: NetOptions, home: LoopHandle) -> Self {
        let NetOptions { name, mac, mtu, mut backend } = options;
        let offer = backend.offer();
        let pairs = offer.pairs.max(1);
        let link = Link::new(mac, pairs);
        backend.connect(link.clone());
        let features = FRONT_FEATURES
            | offer.features
            | if pairs > 1 { FEATURE_MQ } else { 0 }
            | if mtu.is_some() { FEATURE_MTU } else { 0 };
        let config =
            Config { mac, status: 0, max_virtqueue_pairs: pairs, mtu: mtu.unwrap_or_default() };
        let mut net =
            Self { name, mac, features, pairs, config, link, backend, home, control: None };
        net.refresh();
        net
    }

    /// The card as it is seen from outside the guest.
    pub fn handle(&self) -> NetHandle {
        NetHandle { name: self.name.clone(), link: self.link.clone() }
    }

    /// Where the control queue is: behind the pairs that the driver knows of (section 5.1.2).
    fn control_index(&self, features: u64) -> usize {
        let pairs = if features & FEATURE_MQ != 0 { self.pairs } else { 1 };
        2 * usize::from(pairs)
    }
}

impl NetHandle {
    /// What the log calls the card.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What the card's driver and its host share.
    pub fn link(&self) -> Link {
        self.link.clone()
    }

    /// Whether frames pass.
    pub fn is_up(&self) -> bool {
        self.link.is_up()
    }

    /// Whether the plug is in; frames pass where the host's end can carry them as well.
    pub fn is_plugged(&self) -> bool {
        self.link.is_plugged()
    }

    /// Pulls the plug or puts it in again: no frame passes meanwhile, and the guest sees it.
    pub fn set_plugged(&self, is_plugged: bool) {
        self.link.set_plugged(is_plugged);
    }

    /// Asks the guest to announce itself to its neighbours, as after a move to another host.
    pub fn announce(&self) {
        self.link.announce();
    }

    /// What the guest has sent, and what it has received.
    pub fn counts(&self) -> (Count, Count) {
        self.link.totals()
    }
}

impl VirtioDevice for Net {
    fn counters(&self) -> Option<Counters> {
        let link = self.link.clone();
        Some(Box::new(move || {
            let (sent, received) = link.totals();
            vec![
                Reading::total("sent_frames", sent.frames),
                Reading::total("sent_bytes", sent.bytes),
                Reading::total("sent_dropped_frames", sent.dropped),
                Reading::total("received_frames", received.frames),
                Reading::total("received_bytes", received.bytes),
                Reading::total("received_dropped_frames", received.dropped),
                Reading::now("link_up", link.is_up().into()),
            ]
        }))
    }

    fn offer(&self) -> Offer {
        let queues = 2 * usize::from(self.pairs) + 1;
        Offer {
            kind: DeviceKind::Net,
            features: self.features,
            queue_sizes: vec![QUEUE_SIZE; queues],
        }
    }

    fn transport_features(&self) -> u64 {
        self.backend.transport_features()
    }

    /// What comes and the word that something was sent are one pair's, and the same processor's.
    /// Pairs are apart, since each is to have a processor.
    fn shares_interrupt(&self) -> bool {
        self.pairs == 1
    }

    fn config(&self) -> &[u8] {
        self.config.as_bytes()
    }

    fn connect(&mut self, change: ConfigChange) {
        self.link.connect(change);
    }

    fn refresh(&mut self) {
        self.config.mac = self.link.mac();
        let bit = |is_set, bit| if is_set { bit } else { 0 };
        self.config.status = bit(self.link.is_up(), layout::STATUS_LINK_UP)
            | bit(self.link.is_announcing(), layout::STATUS_ANNOUNCE);
    }

    fn activate(&mut self, mut activation: Activation) -> io::Result<()> {
        let features = activation.features;
        let index = self.control_index(features);
        let control = if features & FEATURE_CTRL_VQ != 0
            && activation.queues.get(index).is_some_and(Option::is_some)
        {
            Some(activation.take_queue(index).map_err(io::Error::other)?)
        } else {
            None
        };
        let mut pairs = Vec::new();
        for (number, queues) in activation.queues.chunks_exact_mut(2).take(index / 2).enumerate() {
            if let [Some(receive), Some(transmit)] = queues {
                let (receive, transmit) = (receive.clone(), transmit.clone());
                pairs.push(Pair { index: number, receive, transmit });
            }
        }
        if pairs.first().is_none_or(|pair| pair.index != 0) {
            return Err(io::Error::other("the driver left the first queue pair disabled"));
        }
        let known = u16::try_from(index / 2).unwrap_or(1);
        let needs_reset = activation.needs_reset.clone();
        self.backend.start(Session {
            features,
            memory: activation.memory,
            pairs,
            needs_reset: activation.needs_reset,
        })?;
        if let Some(queue) = control {
            let (settings, link) = (self.backend.settings(), self.link.clone());
            let worker = ControlWorker::new(&self.name, queue, features, known, settings, link);
            self.control = Some(worker::start(&self.name, worker, &self.home, needs_reset)?);
        }
        Ok(())
    }

    fn reset(&mut self) {
        self.control = None;
        self.backend.stop();
        self.link.forget_driver(self.mac);
        self.refresh();
    }
}
