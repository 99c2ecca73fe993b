//! Frames that never pass through this process: vhost-net in the host's kernel moves them between
//! guest memory and a tap, or a vhost-user process does with them what it likes.
//!
//! What went through is not counted here, because nobody here sees it.

use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, OnceLock};

use super::backend::{Backend, BackendOffer, Link, Pair, Session, Settings};
use super::layout::{
    FEATURE_CSUM, FEATURE_HOST_ECN, FEATURE_HOST_TSO4, FEATURE_HOST_TSO6, FEATURE_HOST_UFO,
    FEATURE_HOST_USO, FEATURE_MRG_RXBUF, GUEST_OFFLOADS,
};
use super::tap::{TapSettings, offered_features};
use crate::event::{LoopHandle, Registration};
use crate::host::tap::Tap;
use crate::host::vhost::kernel::KernelVhost;
use crate::host::vhost::user::UserVhost;
use crate::virtio::device::Activation;
use crate::virtio::feature::TRANSPORT_FEATURES;
use crate::virtio::vhost::{self, BackEnd, KernelRings, Share, UserRings};

/// What is about frames, and thus the affair of whoever moves them.
const FRAME_FEATURES: u64 = GUEST_OFFLOADS
    | FEATURE_CSUM
    | FEATURE_HOST_TSO4
    | FEATURE_HOST_TSO6
    | FEATURE_HOST_ECN
    | FEATURE_HOST_UFO
    | FEATURE_HOST_USO
    | FEATURE_MRG_RXBUF;

/// Makes what carries out a driver's wishes.
type MakeSettings = Box<dyn Fn() -> Box<dyn Settings> + Send>;

/// vhost behind a card.
pub struct VhostBackend<B> {
    name: String,
    offer: BackendOffer,
    transport_features: u64,
    /// Each back end with the queue pairs that it serves.
    back_ends: Vec<(Arc<Mutex<B>>, Range<usize>)>,
    make_settings: MakeSettings,
    link: Arc<OnceLock<Link>>,
    home: LoopHandle,
    worker: Option<Registration>,
}

impl VhostBackend<KernelRings> {
    /// vhost-net moves the frames between guest memory and `tap`, with one of `devices` for each
    /// queue of it; they are set up on the thread of `home`.
    ///
    /// `name` is what the log calls the card.
    pub fn kernel(name: &str, tap: &Arc<Tap>, devices: Vec<KernelVhost>, home: LoopHandle) -> Self {
        let known = devices.iter().fold(u64::MAX, |known, device| known & device.features());
        // Offloads pass between driver and tap; how frames are laid out is for vhost-net to know.
        let features = offered_features(tap) & (known | !FEATURE_MRG_RXBUF);
        let pairs = u16::try_from(devices.len()).unwrap_or(u16::MAX);
        let back_ends = devices.into_iter().enumerate().map(|(index, device)| {
            let rings = KernelRings::net(device, Arc::clone(tap), index);
            (Arc::new(Mutex::new(rings)), index..index + 1)
        });
        let settings = Arc::clone(tap);
        Self {
            name: name.to_owned(),
            offer: BackendOffer { features, pairs },
            transport_features: known & TRANSPORT_FEATURES,
            back_ends: back_ends.collect(),
            make_settings: Box::new(move || Box::new(TapSettings::new(Arc::clone(&settings)))),
            link: Arc::default(),
            home,
            worker: None,
        }
    }
}

impl VhostBackend<UserRings> {
    /// The process behind `vhost` moves the frames of up to `pairs` queue pairs; it is spoken to on
    /// the thread of `home`. `on_loss` is called there when it is lost.
    ///
    /// `name` is what the log calls the card.
    pub fn user(
        name: &str,
        vhost: UserVhost,
        pairs: u16,
        home: LoopHandle,
        mut on_loss: impl FnMut() + Send + 'static,
    ) -> Self {
        let transport_features = vhost.features();
        let served = u16::try_from(vhost.ring_count() / 2).unwrap_or(u16::MAX);
        let pairs = if vhost.has_many_queues() { pairs.min(served).max(1) } else { 1 };
        let link = Arc::<OnceLock<Link>>::default();
        let card = Arc::clone(&link);
        let rings = UserRings::new(vhost, move |is_present| {
            if let Some(link) = card.get() {
                link.set_carrier(is_present);
            }
            if !is_present {
                on_loss();
            }
        });
        Self {
            name: name.to_owned(),
            offer: BackendOffer { features: transport_features & FRAME_FEATURES, pairs },
            transport_features,
            back_ends: vec![(Arc::new(Mutex::new(rings)), 0..usize::from(pairs))],
            make_settings: Box::new(|| Box::new(Unchanging)),
            link,
            home,
            worker: None,
        }
    }
}

impl<B: BackEnd> Backend for VhostBackend<B> {
    fn offer(&self) -> BackendOffer {
        self.offer
    }

    fn transport_features(&self) -> u64 {
        self.transport_features
    }

    fn connect(&mut self, link: Link) {
        // A card is connected once.
        let _ = self.link.set(link);
    }

    fn start(&mut self, session: Session) -> io::Result<()> {
        let mut settings = self.settings();
        settings.set_pairs(1)?;
        settings.set_guest_offloads(session.features)?;
        let mut activation = Activation {
            features: session.features,
            memory: session.memory,
            queues: vec![None; 2 * usize::from(self.offer.pairs)],
            needs_reset: session.needs_reset,
        };
        for Pair { index, receive, transmit } in session.pairs {
            let place = activation.queues.chunks_exact_mut(2).nth(index);
            if let Some([first, second]) = place {
                (*first, *second) = (Some(receive), Some(transmit));
            }
        }
        let shares = self.back_ends.iter();
        let shares = shares.map(|(back_end, pairs)| Share::new(back_end, rings(pairs))).collect();
        self.worker = Some(vhost::start(&self.name, shares, &mut activation, &self.home)?);
        Ok(())
    }

    fn stop(&mut self) {
        self.worker = None;
    }

    fn settings(&self) -> Box<dyn Settings> {
        (self.make_settings)()
    }
}

/// The queues of queue pairs, as the device counts them.
fn rings(pairs: &Range<usize>) -> Range<usize> {
    2 * pairs.start..2 * pairs.end
}

/// A process uses every queue that the driver has enabled, and its offloads cannot be changed.
struct Unchanging;

impl Settings for Unchanging {
    fn set_pairs(&mut self, _: u16) -> io::Result<()> {
        Ok(())
    }

    fn set_guest_offloads(&mut self, _: u64) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod test {
    use std::sync::mpsc::channel;

    use super::*;
    use crate::test::LoopThread;
    use crate::test::driver::Driver;
    use crate::test::peer::{Peer, Place};
    use crate::virtio::net::{Net, NetOptions};

    const STATUS_OFFSET: u64 = 6;

    fn link_status(driver: &mut Driver) -> u8 {
        let mut status = [0; 2];
        driver.wire.read_config(STATUS_OFFSET, &mut status);
        status[0]
    }

    #[test]
    fn a_card_whose_process_is_away_has_no_link_until_it_is_back() {
        let (place, home, watch) = (Place::new(), LoopThread::new(), LoopThread::new());
        let peer = Peer::start(&place);
        let vhost = UserVhost::connect(place.path(), 8, watch.handle()).unwrap();
        let (lost, losses) = channel();
        let backend =
            VhostBackend::user("net0", vhost, 4, home.handle(), move || lost.send(()).unwrap());
        assert_eq!(backend.offer().pairs, 1, "the process has two rings");
        let mac = [2, 0, 0, 0, 0, 1];
        let options =
            NetOptions { name: "net0".into(), mac, mtu: None, backend: Box::new(backend) };
        let mut driver = Driver::pci(Box::new(Net::new(options, home.handle())));
        assert_eq!(driver.offered_features() & FEATURE_MRG_RXBUF, 0, "the process lacks it");
        driver.start();
        let sent = driver.send(1, &[&[0; 12], b"frame"], &[]);
        assert_eq!(driver.wait_used(1), (u32::from(sent.head), 0));
        assert_eq!(link_status(&mut driver), 1);
        drop(peer);
        losses.recv().unwrap();
        assert_eq!(link_status(&mut driver), 0);
        let sent = driver.send(1, &[&[0; 12], b"frame"], &[]);
        let _peer = Peer::start(&place);
        assert_eq!(driver.wait_used(1), (u32::from(sent.head), 0));
        home.settle();
        assert_eq!(link_status(&mut driver), 1);
        driver.reset();
    }
}
