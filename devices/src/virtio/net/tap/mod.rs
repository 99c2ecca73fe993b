//! Frames between queue pairs and a tap, moved by threads of ours.
//!
//! A pair has a worker of its own on one of the card's threads. Frames go from guest memory to the
//! tap and back in one system call each; nothing is copied, but for the end of a frame that came
//! before the driver had made enough buffers available.

mod receive;
mod transmit;
mod worker;

use std::io;
use std::sync::Arc;

use self::worker::PairWorker;
use super::backend::{Backend, BackendOffer, Link, Session, Settings};
use super::layout::{
    FEATURE_CSUM, FEATURE_CTRL_GUEST_OFFLOADS, FEATURE_GUEST_CSUM, FEATURE_GUEST_ECN,
    FEATURE_GUEST_TSO4, FEATURE_GUEST_TSO6, FEATURE_GUEST_UFO, FEATURE_GUEST_USO4,
    FEATURE_GUEST_USO6, FEATURE_HOST_ECN, FEATURE_HOST_TSO4, FEATURE_HOST_TSO6, FEATURE_HOST_UFO,
    FEATURE_HOST_USO, FEATURE_MRG_RXBUF,
};
use crate::event::{Event, EventSet, Handler, LoopHandle, Registration, Watch};
use crate::host::tap::{Monitor, Offloads, State, Tap};
use crate::virtio::queue::Queue;
use crate::virtio::worker as run_loop;

/// What a tap does, in both directions.
const OFFLOADS: [(Offloads, u64, u64); 6] = [
    (Offloads::CHECKSUM, FEATURE_GUEST_CSUM, FEATURE_CSUM),
    (Offloads::TSO4, FEATURE_GUEST_TSO4, FEATURE_HOST_TSO4),
    (Offloads::TSO6, FEATURE_GUEST_TSO6, FEATURE_HOST_TSO6),
    (Offloads::TSO_ECN, FEATURE_GUEST_ECN, FEATURE_HOST_ECN),
    (Offloads::UFO, FEATURE_GUEST_UFO, FEATURE_HOST_UFO),
    (Offloads::USO, FEATURE_GUEST_USO4 | FEATURE_GUEST_USO6, FEATURE_HOST_USO),
];

/// A tap behind a card.
pub struct TapBackend {
    name: String,
    tap: Arc<Tap>,
    homes: Vec<LoopHandle>,
    link: Option<Link>,
    /// For each queue: signalled when frames have begun to be spread over it.
    attached: Vec<Event>,
    workers: Vec<Registration>,
}

impl TapBackend {
    /// Moves the frames of `tap` on the threads of `homes`, over which queue pairs are spread.
    ///
    /// `name` is what the log calls the card.
    pub fn new(name: &str, tap: Arc<Tap>, homes: Vec<LoopHandle>) -> io::Result<Self> {
        let attached = tap.queues().iter().map(|_| Event::new()).collect::<Result<_, _>>()?;
        Ok(Self { name: name.to_owned(), tap, homes, link: None, attached, workers: Vec::new() })
    }
}

impl Backend for TapBackend {
    fn offer(&self) -> BackendOffer {
        BackendOffer {
            features: offered_features(&self.tap),
            pairs: u16::try_from(self.tap.queues().len()).unwrap_or(u16::MAX),
        }
    }

    fn connect(&mut self, link: Link) {
        self.link = Some(link);
    }

    fn start(&mut self, session: Session) -> io::Result<()> {
        let Some(link) = &self.link else { return Err(io::ErrorKind::NotConnected.into()) };
        let mut settings = self.settings();
        settings.set_pairs(1)?;
        settings.set_guest_offloads(session.features)?;
        let homes = self.homes.iter().cycle();
        for (pair, home) in session.pairs.into_iter().zip(homes) {
            let Some(attached) = self.attached.get(pair.index) else { break };
            let name = format!("{} queue pair {}", self.name, pair.index);
            let queue = |setup| Queue::new(setup, session.memory, session.features);
            let worker = PairWorker::new(
                name.clone(),
                pair.index,
                [
                    queue(pair.receive).map_err(io::Error::other)?,
                    queue(pair.transmit).map_err(io::Error::other)?,
                ],
                session.features,
                Arc::clone(&self.tap),
                attached.clone(),
                link.clone(),
            );
            let needs_reset = session.needs_reset.clone();
            self.workers.push(run_loop::start(&name, worker, home, needs_reset)?);
        }
        Ok(())
    }

    fn stop(&mut self) {
        self.workers.clear();
    }

    fn settings(&self) -> Box<dyn Settings> {
        Box::new(TapSettings { tap: Arc::clone(&self.tap), attached: self.attached.clone() })
    }
}

/// The features that `tap` brings, whoever moves its frames.
pub fn offered_features(tap: &Tap) -> u64 {
    let known = OFFLOADS.iter().filter(|(offload, ..)| tap.offloads().contains(*offload));
    known.fold(FEATURE_MRG_RXBUF | FEATURE_CTRL_GUEST_OFFLOADS, |all, (_, guest, host)| {
        all | guest | host
    })
}

/// What a driver changes of a tap at run time.
pub struct TapSettings {
    tap: Arc<Tap>,
    attached: Vec<Event>,
}

impl TapSettings {
    /// Settings of a tap whose frames somebody else moves.
    pub fn new(tap: Arc<Tap>) -> Self {
        Self { tap, attached: Vec::new() }
    }
}

impl Settings for TapSettings {
    fn set_pairs(&mut self, pairs: u16) -> io::Result<()> {
        self.tap.use_queues(pairs)?;
        for event in self.attached.iter().take(usize::from(pairs)).skip(1) {
            event.signal();
        }
        Ok(())
    }

    fn set_guest_offloads(&mut self, offloads: u64) -> io::Result<()> {
        let agreed = OFFLOADS.iter().filter(|(_, guest, _)| offloads & guest == *guest);
        let agreed = agreed.fold(Offloads::NONE, |all, (offload, ..)| all.with(*offload));
        self.tap.set_offloads(agreed)
    }
}

/// Tells a card whether its tap is up, from the loop of whoever adds it.
pub struct LinkMonitor {
    name: String,
    monitor: Monitor,
    link: Link,
}

impl LinkMonitor {
    /// Watches the interface of `tap` for the card that the log calls `name`.
    ///
    /// An error means that the interface is not visible here, in another network namespace say.
    pub fn new(name: &str, tap: &Tap, link: Link) -> io::Result<Self> {
        let name = format!("{name}: interface {}", tap.name());
        Ok(Self { name, monitor: Monitor::new(tap.name())?, link })
    }
}

impl Handler for LinkMonitor {
    fn start(&mut self, watch: &mut Watch<'_, '_>) -> io::Result<()> {
        watch.add(&self.monitor, 0, EventSet::IN)
    }

    fn ready(&mut self, _: u32, _: EventSet, watch: &mut Watch<'_, '_>) {
        match self.monitor.look() {
            Ok(None) => {}
            Ok(Some(State::Up)) => self.link.set_carrier(true),
            Ok(Some(State::Down)) => {
                log::info!("{} is down: the guest sees no link", self.name);
                self.link.set_carrier(false);
            }
            Ok(Some(State::Gone)) => {
                log::error!("{} has vanished: the guest sees no link", self.name);
                self.link.set_carrier(false);
            }
            Err(error) => {
                log::warn!("{}: its state is not watched any more: {error}", self.name);
                let _ = watch.remove(&self.monitor);
            }
        }
    }
}
