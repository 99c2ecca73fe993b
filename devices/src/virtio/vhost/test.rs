use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, Sender, channel};

use super::*;
use crate::host::vhost::user::UserVhost;
use crate::test::LoopThread;
use crate::test::driver::Driver;
use crate::test::hostile::Subject;
use crate::test::liar::{Answer, FEATURES, Script, act};
use crate::test::peer::{Peer, Place, QUEUES};
use crate::virtio::device::{DeviceKind, Offer, VirtioDevice};

/// A device whose queues are a peer's.
pub(crate) struct Remote {
    rings: Arc<Mutex<UserRings>>,
    features: u64,
    home: LoopHandle,
    worker: Option<Registration>,
}

impl Remote {
    fn new(vhost: UserVhost, home: LoopHandle, presence: Sender<bool>) -> Self {
        let features = vhost.features();
        let rings = UserRings::new(vhost, move |is_present| {
            let _ = presence.send(is_present);
        });
        Self { rings: Arc::new(Mutex::new(rings)), features, home, worker: None }
    }
}

impl VirtioDevice for Remote {
    fn offer(&self) -> Offer {
        Offer { kind: DeviceKind::Entropy, features: self.features, queue_sizes: vec![64; QUEUES] }
    }

    fn transport_features(&self) -> u64 {
        self.features
    }

    fn activate(&mut self, mut activation: Activation) -> io::Result<()> {
        let shares = vec![Share::new(&self.rings, 0..QUEUES)];
        self.worker = Some(start("remote", shares, &mut activation, &self.home)?);
        Ok(())
    }

    fn reset(&mut self) {
        self.worker = None;
    }
}

/// The loops of a device: its own, and the one that watches the time.
pub(crate) struct Loops {
    home: LoopThread,
    watch: LoopThread,
}

impl Loops {
    pub(crate) fn new() -> Self {
        Self { home: LoopThread::new(), watch: LoopThread::new() }
    }

    fn connect(&self, place: &Place) -> io::Result<UserVhost> {
        UserVhost::connect(place.path(), QUEUES as u64, self.watch.handle())
    }

    pub(crate) fn device(&self, place: &Place) -> (Box<Remote>, Receiver<bool>) {
        let (sender, presence) = channel();
        let vhost = self.connect(place).unwrap();
        (Box::new(Remote::new(vhost, self.home.handle(), sender)), presence)
    }
}

fn echoes(driver: &mut Driver) {
    assert_eq!(driver.request(0, &[b"hello, ", b"peer"], &[3, 16]), b"hello, peer");
    assert_eq!(driver.request(1, &[b"a"], &[4]), b"a");
}

#[test]
fn a_peer_serves_queues_on_both_transports_and_again_after_resets() {
    let (place, loops) = (Place::new(), Loops::new());
    let _peer = Peer::start(&place);
    for over in [Driver::mmio, Driver::pci] {
        let mut driver = over(loops.device(&place).0);
        for _ in 0..3 {
            driver.start();
            for _ in 0..100 {
                echoes(&mut driver);
            }
        }
        driver.reset();
    }
}

#[test]
fn a_driver_need_not_take_every_feature_nor_enable_every_queue() {
    let (place, loops) = (Place::new(), Loops::new());
    let _peer = Peer::start(&place);
    let mut driver = Driver::mmio(loops.device(&place).0);
    driver.negotiate(1 << 32);
    driver.enable_queue(0);
    driver.set_status(15);
    for _ in 0..10 {
        assert_eq!(driver.request(0, &[b"one"], &[8]), b"one");
    }
}

#[test]
fn a_peer_that_dies_is_waited_for_and_goes_on_where_the_rings_are() {
    let (place, loops) = (Place::new(), Loops::new());
    let mut peer = Peer::start(&place);
    let (device, presence) = loops.device(&place);
    let mut driver = Driver::pci(device);
    driver.start();
    assert_eq!(presence.recv(), Ok(true));
    for _ in 0..3 {
        echoes(&mut driver);
        drop(peer);
        assert_eq!(presence.recv(), Ok(false));
        // A request that nobody serves yet.
        let sent = driver.send(0, &[b"while you were away"], &[32]);
        peer = Peer::start(&place);
        assert_eq!(presence.recv(), Ok(true));
        assert_eq!(driver.wait_used(0), (u32::from(sent.head), 19));
        assert_eq!(&driver.answer(&sent)[..19], b"while you were away");
    }
    assert!(!driver.needs_reset());
}

#[test]
fn a_reset_while_a_peer_is_away_forgets_the_old_rings() {
    let (place, loops) = (Place::new(), Loops::new());
    let peer = Peer::start(&place);
    let (device, presence) = loops.device(&place);
    let mut driver = Driver::mmio(device);
    driver.start();
    echoes(&mut driver);
    assert_eq!(presence.recv(), Ok(true));
    drop(peer);
    assert_eq!(presence.recv(), Ok(false));
    driver.start();
    assert_eq!(presence.recv(), Ok(false));
    let _peer = Peer::start(&place);
    assert_eq!(presence.recv(), Ok(true));
    echoes(&mut driver);
}

#[test]
fn a_childs_end_is_final_and_the_driver_is_told() {
    let (place, loops) = (Place::new(), Loops::new());
    let peer = Peer::start(&place);
    let socket = UnixStream::connect(place.path()).unwrap();
    let vhost = UserVhost::with_child(socket, QUEUES as u64, loops.watch.handle()).unwrap();
    let (sender, presence) = channel();
    let mut driver = Driver::pci(Box::new(Remote::new(vhost, loops.home.handle(), sender)));
    driver.start();
    echoes(&mut driver);
    assert_eq!(presence.recv(), Ok(true));
    drop(peer);
    assert_eq!(presence.recv(), Ok(false));
    driver.wait_needs_reset();
    driver.reset();
}

#[test]
fn a_peer_that_survives_serves_a_hostile_driver_and_then_an_honest_one() {
    let (place, loops) = (Place::new(), Loops::new());
    let _peer = Peer::start(&place);
    let subject = Subject {
        make: &|home| {
            let vhost = loops.connect(&place).unwrap();
            Box::new(Remote::new(vhost, home, channel().0))
        },
        // What is done about a broken ring is the peer's affair.
        served: &[],
        works: &echoes,
    };
    subject.survives();
}

#[test]
fn configuration_comes_from_a_peer_that_has_it() {
    let (place, loops) = (Place::new(), Loops::new());
    let _peer = Peer::start(&place);
    let mut vhost = loops.connect(&place).unwrap();
    assert_eq!(vhost.config(4).unwrap(), Some(vec![0, 1, 2, 3]));
    assert_eq!(vhost.ring_count(), 2);
}

#[test]
fn a_peer_that_lies_or_is_silent_is_refused_in_time() {
    use Answer::{Endless, Number, Other, Silence, Torn};
    let scripts: &[(Script, &str)] = &[
        (&[], "did not answer"),
        (&[Silence, Silence], "did not answer"),
        (&[Silence, Torn], ""),
        (&[Silence, Other], ""),
        (&[Silence, Endless], ""),
        (&[Silence, Number(0)], "virtio 1"),
        (&[Silence, Number(FEATURES), Other], ""),
        (&[Silence, Number(FEATURES), Number(u64::MAX), Silence, Number(u64::MAX)], ""),
    ];
    let loops = Loops::new();
    for (script, expected) in scripts {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let peer = std::thread::spawn(|| act(theirs, script));
        let vhost = UserVhost::with_child(ours, 2, loops.watch.handle());
        let error = vhost.err().map(|error| error.to_string()).unwrap();
        assert!(error.contains(expected), "{error}");
        peer.join().unwrap();
    }
}

#[test]
fn a_peer_that_falls_silent_does_not_keep_a_driver_waiting_for_ever() {
    use Answer::{Number, Silence};
    let loops = Loops::new();
    let (ours, theirs) = UnixStream::pair().unwrap();
    // Protocol features with answers to every request, and then none.
    let script: Script =
        &[Silence, Number(FEATURES), Number(1 << 3), Silence, Number(0), Silence, Silence];
    let peer = std::thread::spawn(move || act(theirs, script));
    let vhost = UserVhost::with_child(ours, 2, loops.watch.handle()).unwrap();
    let mut driver = Driver::pci(Box::new(Remote::new(vhost, loops.home.handle(), channel().0)));
    driver.start_with(1 << 32);
    driver.wait_needs_reset();
    driver.reset();
    peer.join().unwrap();
}

#[test]
fn a_place_where_nobody_listens_is_named_by_its_error() {
    let (place, loops) = (Place::new(), Loops::new());
    let error = loops.connect(&place).err().unwrap();
    assert_eq!(error.kind(), io::ErrorKind::NotFound);
    drop(place.listen());
    let error = loops.connect(&place).err().unwrap();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
}
