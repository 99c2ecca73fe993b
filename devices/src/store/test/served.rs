//! The whole way: rings, vhost-user, server and files.

use std::thread::{self, JoinHandle};

use super::*;
use crate::host::vhost::user::UserVhost;
use crate::store::server::Server;
use crate::test::LoopThread;
use crate::test::driver::Driver;
use crate::test::peer::Place;
use crate::virtio::fs::{FileSystem, FileSystemOptions};
use crate::virtio::vhost::test::Loops;

const HIGH_PRIORITY: u16 = 0;
const REQUESTS: u16 = 1;

fn serve(store: &Arc<Store>, place: &Place, queues: u16) -> JoinHandle<io::Result<()>> {
    let (store, listener) = (Arc::clone(store), place.listen());
    thread::spawn(move || Server::start(&store, b"store", queues, listener)?.wait())
}

fn ask(driver: &mut Driver, opcode: u32, node: u64, body: &[u8], parts: &[usize]) -> Reaction {
    ask_in(driver, REQUESTS, opcode, node, body, parts)
}

fn ask_in(
    driver: &mut Driver,
    queue: u16,
    opcode: u32,
    node: u64,
    body: &[u8],
    parts: &[usize],
) -> Reaction {
    let request = request(opcode, node, body);
    let (header, body) = request.split_at(size_of::<RequestHeader>());
    let reply = driver.request(queue, &[header, body], parts);
    let (header, body) = ReplyHeader::read_from_prefix(&reply).unwrap();
    assert_eq!((header.len as usize, header.unique), (reply.len(), 77));
    if header.error == 0 { Ok(body.to_vec()) } else { Err(-header.error) }
}

#[test]
fn a_driver_reads_files_through_its_rings() {
    let tree = Tree::new();
    let large: Vec<u8> = (0..300_000_u32).map(|at| (at % 251) as u8).collect();
    fs::write(tree.path().join("shown/large"), &large).unwrap();
    let store = tree.shown();
    for over in [Driver::mmio, Driver::pci] {
        let (place, loops) = (Place::new(), Loops::new());
        let server = serve(&store, &place, 1);
        let mut driver = over(loops.device(&place).0);
        driver.start();
        ask(&mut driver, INIT, 0, &init(u32::MAX), &[16, 64]).unwrap();
        assert_eq!(ask(&mut driver, LOOKUP, ROOT_ID, b"hidden\0", &[16, 128]), Err(libc::ENOENT));
        let shown = ask(&mut driver, LOOKUP, ROOT_ID, b"shown\0", &[16, 128]).unwrap();
        let shown = Entry::read_from_bytes(&shown).unwrap().node;
        let file = ask(&mut driver, LOOKUP, shown, b"large\0", &[100, 44]).unwrap();
        let file = Entry::read_from_bytes(&file).unwrap().node;
        for (offset, parts) in [(0, &[16, 4096, 8192][..]), (4000, &[7, 9, 1, 50_000])] {
            let len = parts.iter().sum::<usize>() - 16;
            let bytes = u32::try_from(len).unwrap();
            let read = ReadRequest { offset, bytes, ..ReadRequest::default() };
            let read = ask(&mut driver, READ, file, read.as_bytes(), parts).unwrap();
            let at = usize::try_from(offset).unwrap();
            assert!(read == large[at..at + len]);
        }
        // What is forgotten has no reply.
        let forget = request(FORGET, file, 1_u64.as_bytes());
        assert_eq!(driver.request(HIGH_PRIORITY, &[&forget], &[]), b"");
        let read = ReadRequest { bytes: 1, ..ReadRequest::default() };
        assert_eq!(ask(&mut driver, READ, file, read.as_bytes(), &[16, 1]), Err(libc::ESTALE));
        // A reset ends the session, and what was known to it is forgotten.
        assert!(store.is_in_session());
        driver.reset();
        assert!(!store.is_in_session());
        assert_eq!(store.nodes().len(), 1);
        driver.start();
        let early = ask(&mut driver, LOOKUP, ROOT_ID, b"shown\0", &[16, 128]);
        assert_eq!(early, Err(libc::EIO));
        ask(&mut driver, INIT, 0, &init(u32::MAX), &[16, 64]).unwrap();
        ask(&mut driver, LOOKUP, ROOT_ID, b"shown\0", &[16, 128]).unwrap();
        drop(driver);
        drop(loops);
        server.join().unwrap().unwrap();
    }
}

#[test]
fn every_queue_of_requests_is_served() {
    let tree = Tree::new();
    let store = tree.shown();
    let (place, home, watch) = (Place::new(), LoopThread::new(), LoopThread::new());
    let server = serve(&store, &place, 3);
    let options =
        FileSystemOptions { name: "store".into(), tag: "store".into(), request_queues: 4 };
    let rings = FileSystem::ring_count(options.request_queues);
    let vhost = UserVhost::connect(place.path(), rings, watch.handle()).unwrap();
    let device = FileSystem::new(options, vhost, home.handle(), || ()).unwrap();
    let mut driver = Driver::pci(Box::new(device));
    driver.start();
    assert_eq!(driver.rings.len(), 4, "three for requests, as many as are served");
    ask(&mut driver, INIT, 0, &init(u32::MAX), &[16, 64]).unwrap();
    let found: HashSet<u64> = (REQUESTS..REQUESTS + 3)
        .map(|queue| {
            let reply = ask_in(&mut driver, queue, LOOKUP, ROOT_ID, b"file\0", &[16, 128]);
            Entry::read_from_bytes(&reply.unwrap()).unwrap().node
        })
        .collect();
    assert_eq!(found.len(), 1);
    // What all of them were told of is taken back in one.
    let node = found.into_iter().next().unwrap();
    assert_eq!(
        driver.request(HIGH_PRIORITY, &[&request(FORGET, node, 3_u64.as_bytes())], &[]),
        b""
    );
    let attributes = ask_in(&mut driver, REQUESTS + 2, GETATTR, node, &[0; 16], &[16, 104]);
    assert_eq!(attributes, Err(libc::ESTALE));
    driver.reset();
    drop(driver);
    drop((home, watch));
    server.join().unwrap().unwrap();
}
