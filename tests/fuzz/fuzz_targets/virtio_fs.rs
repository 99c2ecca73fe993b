//! Whatever a driver does with a file system device, it works after a reset; the store server that
//! has its rings goes on as well.
#![no_main]

use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::thread;

use arbitrary::Arbitrary;
use devices::event::LoopHandle;
use devices::host::vhost::user::UserVhost;
use devices::store::closure::Closure;
use devices::store::tree::Store;
use devices::store::server::Server;
use devices::virtio::fs::{FileSystem, FileSystemOptions};
use fuzz::virtio::{Descriptor, Step, build_home, drive};
use libfuzzer_sys::fuzz_target;

/// A small folder that every machine has, of which one name is shown.
const STORE: &str = "/etc";
const SHOWN: &[u8] = b"/etc/passwd\n/etc/ssl\n";

/// Queues of requests.
const QUEUES: u16 = 2;

/// Where requests are put for descriptors to find, and their replies.
const REQUESTS: u32 = 0x400;
const REPLIES: u32 = 0x8000;

/// One thing that a driver of file systems does.
#[derive(Arbitrary, Debug)]
enum FileStep {
    /// Anything that can be done to any device.
    Any(Step),
    /// Puts the header of a request, and one word behind it, into memory, and sends it.
    Request { queue: u8, head: u8, opcode: u8, node: u8, word: u64, len: u8, room: u16 },
    /// Begins a session.
    Init,
}

fuzz_target!(|steps: Vec<FileStep>| {
    let steps: Vec<_> = steps.into_iter().flat_map(expand).collect();
    let folder = std::env::temp_dir().join(format!("fuzz-fs-{}", std::process::id()));
    let _ = std::fs::remove_file(&folder);
    let listener = UnixListener::bind(&folder).unwrap();
    let socket = UnixStream::connect(&folder).unwrap();
    let server = thread::spawn(|| Server::start(&store(), b"fuzz", QUEUES, listener)?.wait());
    drive(
        |home| {
            let rings = FileSystem::ring_count(QUEUES);
            let vhost = UserVhost::with_child(socket, rings, watch()).unwrap();
            let (name, tag) = ("fuzz".to_owned(), "fuzz".to_owned());
            let options = FileSystemOptions { name, tag, request_queues: QUEUES };
            Box::new(FileSystem::new(options, vhost, home, || ()).unwrap())
        },
        &steps,
    );
    server.join().unwrap().unwrap();
});

fn store() -> Arc<Store> {
    static STORE_OPEN: OnceLock<Arc<Store>> = OnceLock::new();
    let open = || {
        let closure = Closure::parse(SHOWN, Path::new(STORE)).expect("paths in the store");
        Arc::new(Store::open(Path::new(STORE), Some(closure)).expect("a folder"))
    };
    Arc::clone(STORE_OPEN.get_or_init(open))
}

/// The loop that watches the time.
fn watch() -> LoopHandle {
    static WATCH: OnceLock<LoopHandle> = OnceLock::new();
    WATCH.get_or_init(|| build_home(|_| ()).0).clone()
}

fn expand(step: FileStep) -> Vec<Step> {
    match step {
        FileStep::Any(step) => vec![step],
        FileStep::Init => request(1, 0, [56, 26, 0], &[7 | 38 << 32, u64::MAX], 56, 80),
        FileStep::Request { queue, head, opcode, node, word, len, room } => {
            let len = 40 + u32::from(len % 64);
            let header = [len, u32::from(opcode % 64), u32::from(node)];
            request(queue, head, header, &[word, 0, 4096], len, room)
        }
    }
}

/// Writes a request with `words` behind its header, and makes it available.
fn request(
    queue: u8,
    head: u8,
    [len, opcode, node]: [u32; 3],
    words: &[u64],
    sent: u32,
    room: u16,
) -> Vec<Step> {
    let header = [u64::from(len) | u64::from(opcode) << 32, 7, u64::from(node), 0, 0];
    let words = header.iter().chain(words);
    let write = |(index, word): (u32, &u64)| Step::Write {
        address: REQUESTS + 8 * index,
        bytes: word.to_le_bytes(),
    };
    let descriptors = vec![
        Descriptor::new(REQUESTS, u16::try_from(sent).unwrap_or(u16::MAX), 1),
        Descriptor::new(REPLIES, room, 2),
    ];
    let send = Step::Send { queue: queue % 3, head, descriptors };
    (0..).zip(words).map(write).chain([send, Step::Settle]).collect()
}
