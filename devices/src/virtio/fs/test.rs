use std::os::unix::net::UnixStream;
use std::sync::mpsc::channel;

use super::*;
use crate::test::LoopThread;
use crate::test::driver::Driver;
use crate::test::hostile::Subject;
use crate::test::liar::{Answer, FEATURES, Script, act};
use crate::test::peer::{Peer, Place};
use crate::virtio::counters::Reading;

/// The loops of a device: its own, and the one that watches the time.
struct Loops {
    home: LoopThread,
    watch: LoopThread,
}

impl Loops {
    fn new() -> Self {
        Self { home: LoopThread::new(), watch: LoopThread::new() }
    }
}

fn options(tag: &str) -> FileSystemOptions {
    FileSystemOptions { name: "share".into(), tag: tag.into(), request_queues: 4 }
}

fn device(tag: &str, place: &Place, loops: &Loops, home: LoopHandle) -> Box<FileSystem> {
    let vhost = UserVhost::connect(place.path(), FileSystem::ring_count(4), loops.watch.handle());
    Box::new(FileSystem::new(options(tag), vhost.unwrap(), home, || ()).unwrap())
}

fn is_served(driver: &mut Driver) {
    for queue in [0, 1] {
        assert_eq!(driver.request(queue, &[b"a request"], &[16]), b"a request");
    }
}

#[test]
fn the_guest_reads_a_tag_and_no_more_queues_than_are_served() {
    let (place, loops) = (Place::new(), Loops::new());
    let _peer = Peer::start(&place);
    for over in [Driver::mmio, Driver::pci] {
        let tag = "a tag of thirty-six bytes, which fit";
        assert_eq!(tag.len(), MAX_TAG_BYTES);
        let mut driver = over(device(tag, &place, &loops, loops.home.handle()));
        let mut config = [0; CONFIG_BYTES];
        driver.wire.read_config(0, &mut config);
        assert_eq!(config, config_of(tag, 1));
        driver.start();
        assert_eq!(driver.rings.len(), 2, "one of them for requests, since the process has two");
        is_served(&mut driver);
        driver.reset();
    }
}

fn config_of(tag: &str, queues: u8) -> [u8; CONFIG_BYTES] {
    let mut bytes = tag.as_bytes().to_vec();
    bytes.resize(MAX_TAG_BYTES, 0);
    bytes.extend([queues, 0, 0, 0]);
    bytes.try_into().unwrap()
}

#[test]
fn a_tag_that_is_too_long_stays_within_its_field() {
    assert_eq!(config(&"x".repeat(99), 1), config_of(&"x".repeat(MAX_TAG_BYTES), 1));
    assert_eq!(config("", 255), config_of("", 255));
}

#[test]
fn features_of_the_process_that_are_not_of_rings_are_not_offered() {
    let (place, loops) = (Place::new(), Loops::new());
    let _peer = Peer::start(&place);
    let mut driver = Driver::pci(device("files", &place, &loops, loops.home.handle()));
    assert_eq!(driver.offered_features() & !TRANSPORT_FEATURES, 0);
}

#[test]
fn a_process_that_is_lost_is_reported_and_served_by_again_when_it_is_back() {
    let (place, loops) = (Place::new(), Loops::new());
    let peer = Peer::start(&place);
    let vhost = UserVhost::connect(place.path(), 5, loops.watch.handle()).unwrap();
    let (lost, losses) = channel();
    let on_loss = move || lost.send(()).unwrap();
    let device = FileSystem::new(options("files"), vhost, loops.home.handle(), on_loss).unwrap();
    let counters = device.counters().unwrap();
    let counted = |[connections, losses, set_ups]: [u64; 3]| {
        let names = [("connections", connections), ("losses", losses), ("set_ups", set_ups)];
        assert_eq!(counters(), names.map(|(name, value)| Reading::total(name, value)));
    };
    let mut driver = Driver::pci(Box::new(device));
    counted([1, 0, 0]);
    driver.start();
    is_served(&mut driver);
    counted([1, 0, 1]);
    drop(peer);
    losses.recv().unwrap();
    counted([1, 1, 1]);
    let sent = driver.send(1, &[b"while away"], &[16]);
    let _peer = Peer::start(&place);
    assert_eq!(driver.wait_used(1), (u32::from(sent.head), 10));
    counted([2, 1, 2]);
    driver.reset();
}

#[test]
fn the_end_of_a_child_is_reported_and_requests_get_an_error() {
    let (place, loops) = (Place::new(), Loops::new());
    let peer = Peer::start(&place);
    let socket = UnixStream::connect(place.path()).unwrap();
    let vhost = UserVhost::with_child(socket, 5, loops.watch.handle()).unwrap();
    let (lost, losses) = channel();
    let on_loss = move || lost.send(()).unwrap();
    let device = FileSystem::new(options("files"), vhost, loops.home.handle(), on_loss).unwrap();
    let mut driver = Driver::mmio(Box::new(device));
    driver.start();
    is_served(&mut driver);
    drop(peer);
    losses.recv().unwrap();
    for round in 0..3_u8 {
        for queue in [1, 0] {
            let request = request(0x7700 + u64::from(round));
            let expected = [16, 0, 0, 0, 149, 255, 255, 255, round, 0x77, 0, 0, 0, 0, 0, 0];
            assert_eq!(driver.request(queue, &[&request], &[16, 4096]), expected);
        }
        // A request that wants no answer, and one that is none.
        assert!(driver.request(0, &[&request(1)], &[]).is_empty());
        assert!(driver.request(1, &[b"short"], &[16]).is_empty());
        if round == 1 {
            driver.start();
        }
    }
    assert!(!driver.needs_reset());
    driver.make_available(1, u16::MAX);
    driver.wire.notify(1);
    driver.wait_needs_reset();
    driver.reset();
}

/// The beginning of a request, and as much again.
fn request(unique: u64) -> Vec<u8> {
    [&40_u32.to_le_bytes()[..], &[3, 0, 0, 0], &unique.to_le_bytes(), &[0; 24]].concat()
}

#[test]
fn a_hostile_driver_harms_nobody_but_itself() {
    let (place, loops) = (Place::new(), Loops::new());
    let _peer = Peer::start(&place);
    let subject = Subject {
        make: &|home| device("files", &place, &loops, home),
        // What is done about a broken ring is the process's affair.
        served: &[],
        works: &is_served,
    };
    subject.survives();
}

#[test]
fn a_process_that_has_no_queue_for_requests_is_refused() {
    use Answer::{Number, Silence};
    let loops = Loops::new();
    for count in [0, 1] {
        // Owner, features, protocol features with the number of queues, and that number.
        let none: Script = &[Silence, Number(FEATURES), Number(1), Silence, Number(0)];
        let one: Script = &[Silence, Number(FEATURES), Number(1), Silence, Number(1)];
        let (ours, theirs) = UnixStream::pair().unwrap();
        let script = if count == 0 { none } else { one };
        let peer = std::thread::spawn(move || act(theirs, script));
        let vhost = UserVhost::with_child(ours, 5, loops.watch.handle()).unwrap();
        let device = FileSystem::new(options("files"), vhost, loops.home.handle(), || ());
        let error = device.err().map(|error| error.to_string());
        assert_eq!(error.as_deref(), Some("the process has no queue for requests"));
        peer.join().unwrap();
    }
}

#[test]
fn a_process_that_falls_silent_ends_in_refusals() {
    use Answer::{Number, Silence};
    let loops = Loops::new();
    let (ours, theirs) = UnixStream::pair().unwrap();
    // Protocol features with answers to every request, and then none.
    let script: Script =
        &[Silence, Number(FEATURES), Number(1 << 3), Silence, Number(0), Silence, Silence];
    let peer = std::thread::spawn(move || act(theirs, script));
    let vhost = UserVhost::with_child(ours, 5, loops.watch.handle()).unwrap();
    let device = FileSystem::new(options("files"), vhost, loops.home.handle(), || ()).unwrap();
    let mut driver = Driver::pci(Box::new(device));
    driver.start_with(1 << 32);
    assert_eq!(driver.request(1, &[&request(5)], &[16])[4..8], [149, 255, 255, 255]);
    assert!(!driver.needs_reset());
    driver.reset();
    peer.join().unwrap();
}
