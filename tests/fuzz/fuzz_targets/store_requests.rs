//! Requests to the store server: whatever a guest sends, a reply fits into its room and says how
//! long it is.
#![no_main]

use std::io;
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::sync::{Arc, OnceLock};

use arbitrary::Arbitrary;
use devices::store::closure::Closure;
use devices::store::reply::Reply;
use devices::store::requests::Requests;
use devices::store::tree::Store;
use libfuzzer_sys::fuzz_target;

#[derive(Arbitrary, Debug)]
struct Request {
    opcode: u8,
    node: u8,
    /// Added to the length that the header says.
    excess: i8,
    body: Vec<u8>,
    room: u16,
}

struct Room(Vec<u8>);

impl Reply for Room {
    fn room(&self) -> usize {
        self.0.len()
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        self.0[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn fill(&mut self, at: usize, len: usize, file: BorrowedFd<'_>, offset: u64) -> io::Result<usize> {
        Ok(rustix::io::pread(file, &mut self.0[at..at + len], offset)?)
    }
}

/// A small folder that every machine has, of which one name is shown.
const STORE: &str = "/etc";
const SHOWN: &[u8] = b"/etc/passwd\n/etc/ssl\n";

/// INIT with every feature, so that a session has begun.
const INIT: [u32; 14] = [56, 26, 1, 0, 0, 0, 0, 0, 0, 0, 7, 38, 1 << 17, u32::MAX];

fuzz_target!(|requests: Vec<Request>| {
    static STORE_OPEN: OnceLock<Arc<Store>> = OnceLock::new();
    let store = STORE_OPEN.get_or_init(|| {
        let closure = Closure::parse(SHOWN, Path::new(STORE)).expect("paths in the store");
        Arc::new(Store::open(Path::new(STORE), Some(closure)).expect("a folder"))
    });
    let mut server = Requests::new(Arc::clone(store));
    let init: Vec<u8> = INIT.iter().flat_map(|word| word.to_ne_bytes()).collect();
    assert_eq!(server.answer(&init, &mut Room(vec![0; 80])), 80);
    for Request { opcode, node, excess, body, room } in requests {
        let len = (40 + body.len() as i64 + i64::from(excess)).max(0) as u32;
        let words = [len, opcode.into(), 7, 0, node.into(), 0, 0, 0, 0, 0];
        let header = words.iter().flat_map(|word| word.to_ne_bytes());
        let request: Vec<u8> = header.chain(body).collect();
        let mut reply = Room(vec![0; room.into()]);
        let len = server.answer(&request, &mut reply);
        assert!(len <= reply.0.len());
        if len > 0 {
            assert_eq!(reply.0[..4], (len as u32).to_ne_bytes());
        }
    }
});
