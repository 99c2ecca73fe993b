use std::collections::HashSet;
use std::fs;
use std::io;
use std::os::fd::BorrowedFd;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{MetadataExt as _, symlink};
use std::path::Path;
use std::sync::Arc;

use rustix::fs::{OFlags, XattrFlags};
use tempfile::TempDir;
use zerocopy::{FromBytes, IntoBytes as _};

use super::closure::Closure;
use super::reply::Reply;
use super::requests::Requests;
use super::tree::{FOREVER, Store};
use super::wire::*;

mod hostile;
mod served;
mod walk;

const LOOKUP: u32 = 1;
const FORGET: u32 = 2;
const GETATTR: u32 = 3;
const READLINK: u32 = 5;
const OPEN: u32 = 14;
const READ: u32 = 15;
const STATFS: u32 = 17;
const GETXATTR: u32 = 22;
const LISTXATTR: u32 = 23;
const INIT: u32 = 26;
const OPENDIR: u32 = 27;
const READDIR: u32 = 28;
const DESTROY: u32 = 38;
const BATCH_FORGET: u32 = 42;
const READDIRPLUS: u32 = 44;
const LSEEK: u32 = 46;

/// Room for a reply in ordinary memory.
struct Bytes(Vec<u8>);

impl Reply for Bytes {
    fn room(&self) -> usize {
        self.0.len()
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        self.0[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn fill(
        &mut self,
        at: usize,
        len: usize,
        file: BorrowedFd<'_>,
        offset: u64,
    ) -> io::Result<usize> {
        Ok(rustix::io::pread(file, &mut self.0[at..at + len], offset)?)
    }
}

/// What is in the largest room before it is filled.
static UNTOUCHED: [u8; ROOM_MAX] = [0xAA; ROOM_MAX];

const ROOM_MAX: usize = 1 << 18;

/// A guest's driver.
struct Client {
    requests: Requests,
    room: usize,
}

type Reaction = Result<Vec<u8>, i32>;

impl Client {
    fn new(store: &Arc<Store>) -> Self {
        let mut client = Self { requests: Requests::new(Arc::clone(store)), room: ROOM_MAX };
        let reply = client.call(INIT, 0, &init(u32::MAX)).unwrap();
        let (reply, _) = InitReply::read_from_prefix(&reply).unwrap();
        assert_eq!((reply.major, reply.pages_max, reply.write_max), (7, 256, 1 << 20));
        client
    }

    fn call(&mut self, opcode: u32, node: u64, body: &[u8]) -> Reaction {
        let request = request(opcode, node, body);
        self.send(&request).expect("a request has a reply")
    }

    /// Sends what may be no request at all.
    fn send(&mut self, request: &[u8]) -> Option<Reaction> {
        let mut reply = Bytes(UNTOUCHED[..self.room].to_vec());
        let len = self.requests.answer(request, &mut reply);
        if len == 0 {
            return None;
        }
        let bytes = &reply.0[..len];
        let (header, body) = ReplyHeader::read_from_prefix(bytes).unwrap();
        assert_eq!(header.len as usize, len);
        let behind = &reply.0[len..];
        assert!(*behind == UNTOUCHED[..behind.len()] || header.error != 0);
        Some(if header.error == 0 { Ok(body.to_vec()) } else { Err(-header.error) })
    }

    fn lookup(&mut self, parent: u64, name: impl AsRef<[u8]>) -> Result<Entry, i32> {
        let reply = self.call(LOOKUP, parent, &[name.as_ref(), b"\0"].concat())?;
        let entry = Entry::read_from_bytes(&reply).unwrap();
        if entry.node == 0 { Err(libc::ENOENT) } else { Ok(entry) }
    }

    /// The node at a path below the root.
    fn find(&mut self, path: &Path) -> Result<Entry, i32> {
        let mut entry = Entry { node: ROOT_ID, ..Entry::default() };
        for name in path {
            entry = self.lookup(entry.node, name.as_bytes())?;
        }
        Ok(entry)
    }

    fn attributes(&mut self, node: u64) -> Result<AttributesReply, i32> {
        let reply = self.call(GETATTR, node, &[0; 16])?;
        Ok(AttributesReply::read_from_bytes(&reply).unwrap())
    }

    fn read(&mut self, node: u64, offset: u64, bytes: u32) -> Reaction {
        let request = ReadRequest { offset, bytes, ..ReadRequest::default() };
        self.call(READ, node, request.as_bytes())
    }

    /// Names and what they are said to be, page by page of `bytes`.
    fn list(&mut self, opcode: u32, node: u64, bytes: u32) -> Vec<(Vec<u8>, Entry, u64)> {
        let mut listed = Vec::new();
        let mut offset = 0;
        loop {
            let request = ReadRequest { offset, bytes, ..ReadRequest::default() };
            let page = self.call(opcode, node, request.as_bytes()).unwrap();
            assert!(page.len() <= bytes as usize);
            if page.is_empty() {
                return listed;
            }
            let mut rest = &page[..];
            while !rest.is_empty() {
                let mut entry = Entry::default();
                if opcode == READDIRPLUS {
                    (entry, rest) = Entry::read_from_prefix(rest).unwrap();
                }
                let (header, behind) = DirectoryEntry::read_from_prefix(rest).unwrap();
                let len = header.name_bytes as usize;
                listed.push((behind[..len].to_vec(), entry, header.inode));
                offset = header.next;
                rest = &behind[len.next_multiple_of(DIRECTORY_ALIGNMENT)..];
            }
        }
    }

    fn names(&mut self, node: u64) -> HashSet<Vec<u8>> {
        let listed = self.list(READDIR, node, 4096);
        let count = listed.len();
        let names: HashSet<_> = listed.into_iter().map(|(name, ..)| name).collect();
        assert_eq!(names.len(), count, "no name comes twice");
        names
    }
}

fn init(features: u32) -> Vec<u8> {
    let request = InitRequest { major: 7, minor: 38, readahead_max: 1 << 17, features };
    [request.as_bytes(), &[0xFF; 4], &[0; 44]].concat()
}

fn request(opcode: u32, node: u64, body: &[u8]) -> Vec<u8> {
    let len = u32::try_from(size_of::<RequestHeader>() + body.len()).unwrap();
    let header = RequestHeader {
        len,
        opcode,
        unique: 77,
        node,
        user: 0,
        group: 0,
        process: 0,
        extensions: 0,
        padding: 0,
    };
    [header.as_bytes(), body].concat()
}

/// A store of two shown paths and a hidden one.
struct Tree {
    folder: TempDir,
}

impl Tree {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let tree = Self { folder };
        for name in ["shown", "hidden"] {
            fs::create_dir_all(tree.path().join(name).join("bin")).unwrap();
            fs::write(tree.path().join(name).join("bin/program"), name).unwrap();
        }
        fs::write(tree.path().join("file"), "a file in the store").unwrap();
        symlink("/etc/passwd", tree.path().join("shown/out")).unwrap();
        symlink("../hidden", tree.path().join("shown/beside")).unwrap();
        symlink("bin", tree.path().join("shown/link")).unwrap();
        tree
    }

    fn path(&self) -> &Path {
        self.folder.path()
    }

    fn list(&self, names: &[&str]) -> Vec<u8> {
        let line = |name: &&str| format!("{}/{name}\n", self.path().display());
        names.iter().map(line).collect::<String>().into_bytes()
    }

    fn whole(&self) -> Arc<Store> {
        Arc::new(Store::open(self.path(), None).unwrap())
    }

    fn shown(&self) -> Arc<Store> {
        let closure = Closure::parse(&self.list(&["shown", "file"]), self.path()).unwrap();
        Arc::new(Store::open(self.path(), Some(closure)).unwrap())
    }
}

#[test]
fn a_file_is_found_read_and_forgotten() {
    let tree = Tree::new();
    let store = tree.shown();
    let mut client = Client::new(&store);
    let program = client.find(Path::new("shown/bin/program")).unwrap();
    assert_eq!((program.name_valid, program.attributes_valid), (FOREVER, FOREVER));
    assert_eq!(client.read(program.node, 0, 4096), Ok(b"shown".to_vec()));
    assert_eq!(client.read(program.node, 3, 1), Ok(b"w".to_vec()));
    assert_eq!(client.read(program.node, 5, 10), Ok(Vec::new()));
    assert_eq!(store.nodes().len(), 4);
    let lookups = 1_u64;
    assert_eq!(client.send(&request(FORGET, program.node, lookups.as_bytes())), None);
    assert_eq!(client.read(program.node, 0, 1), Err(libc::ESTALE));
    // The path to it was looked up once and is given back all at once.
    let forgotten: Vec<u8> = [0_u64]
        .into_iter()
        .chain((2..100).flat_map(|node| [node, 1]))
        .flat_map(u64::to_ne_bytes)
        .collect();
    assert_eq!(client.send(&request(BATCH_FORGET, 0, &forgotten)), None);
    assert_eq!(store.nodes().len(), 1);
}

#[test]
fn only_the_closure_is_seen() {
    let tree = Tree::new();
    let mut client = Client::new(&tree.shown());
    let names = client.names(ROOT_ID);
    assert_eq!(names, [&b"."[..], b"..", b"shown", b"file"].map(<[u8]>::to_vec).into());
    for name in ["hidden", "nothing", ".links"] {
        assert_eq!(client.lookup(ROOT_ID, name).unwrap_err(), libc::ENOENT);
    }
    let listed = client.list(READDIRPLUS, ROOT_ID, 4096);
    let told = listed.iter().filter(|(_, entry, _)| entry.node != 0);
    let told: HashSet<_> = told.map(|(name, ..)| name.clone()).collect();
    assert_eq!(told, [&b"shown"[..], b"file"].map(<[u8]>::to_vec).into());
    let root = client.attributes(ROOT_ID).unwrap();
    assert_eq!((root.attributes.links, root.attributes.bytes), (1, 0));
    let file = client.lookup(ROOT_ID, "file").unwrap();
    assert_eq!(client.read(file.node, 0, 64), Ok(b"a file in the store".to_vec()));
}

#[test]
fn a_closure_is_extended_and_the_guest_looks_again() {
    let tree = Tree::new();
    let store = tree.shown();
    let mut client = Client::new(&store);
    let before = client.attributes(ROOT_ID).unwrap();
    assert!(before.valid < 10);
    store.extend(&tree.list(&["hidden"]), tree.path()).unwrap();
    assert!(client.names(ROOT_ID).contains(&b"hidden"[..]));
    assert!(client.find(Path::new("hidden/bin/program")).is_ok());
    // The list that a guest has kept is an old one after each addition, however soon it comes.
    let mut times = HashSet::new();
    for name in ["more", "still-more", "hidden"] {
        let root = client.attributes(ROOT_ID).unwrap().attributes;
        times.insert((root.modified, root.modified_nanoseconds));
        store.extend(&tree.list(&[name]), tree.path()).unwrap();
    }
    assert_eq!(times.len(), 3);
    assert!(store.extend(b"/elsewhere/x", tree.path()).is_err());
}

#[test]
fn names_that_the_store_lacks_are_found() {
    let tree = Tree::new();
    assert_eq!(tree.whole().missing(), None);
    assert_eq!(tree.shown().missing(), None);
    let list = tree.list(&["shown", "gone", "file", "lost"]);
    let closure = Closure::parse(&list, tree.path()).unwrap();
    let store = Store::open(tree.path(), Some(closure)).unwrap();
    assert_eq!(store.missing(), Some((2, b"gone".to_vec())));
    // A link is there wherever it leads.
    symlink("/nowhere", tree.path().join("gone")).unwrap();
    assert_eq!(store.missing(), Some((1, b"lost".to_vec())));
}

#[test]
fn links_to_a_file_are_one_node() {
    let tree = Tree::new();
    fs::hard_link(tree.path().join("file"), tree.path().join("shown/same")).unwrap();
    let mut client = Client::new(&tree.shown());
    let file = client.lookup(ROOT_ID, "file").unwrap();
    let same = client.find(Path::new("shown/same")).unwrap();
    assert_eq!((file.node, file.attributes.links), (same.node, 2));
}

#[test]
fn holes_and_data_are_told_apart() {
    let tree = Tree::new();
    let sparse = fs::File::create(tree.path().join("shown/sparse")).unwrap();
    sparse.set_len(1 << 30).unwrap();
    rustix::io::pwrite(&sparse, b"data", 1 << 20).unwrap();
    let mut client = Client::new(&tree.shown());
    let node = client.find(Path::new("shown/sparse")).unwrap().node;
    let mut seek = |offset: u64, whence: u32| {
        let request = SeekRequest { offset, whence, ..SeekRequest::default() };
        let reply = client.call(LSEEK, node, request.as_bytes())?;
        Ok(u64::read_from_bytes(&reply).unwrap())
    };
    let ours = |position| rustix::fs::seek(&sparse, position).unwrap();
    assert_eq!(seek(0, SEEK_DATA), Ok(ours(rustix::fs::SeekFrom::Data(0))));
    assert_eq!(seek(1 << 20, SEEK_HOLE), Ok(ours(rustix::fs::SeekFrom::Hole(1 << 20))));
    assert_eq!(seek(1 << 31, SEEK_DATA), Err(libc::ENXIO));
    assert_eq!(seek(u64::MAX, SEEK_DATA), Err(libc::ENXIO));
    assert_eq!(seek(0, 0), Err(libc::EINVAL));
    assert_eq!(client.read(node, (1 << 20) - 2, 8), Ok(b"\0\0data\0\0".to_vec()));
}

#[test]
fn extended_attributes_are_listed_and_read() {
    let tree = Tree::new();
    let path = tree.path().join("file");
    let file = fs::File::open(&path).unwrap();
    let set = rustix::fs::fsetxattr(&file, "user.colour", b"green", XattrFlags::empty());
    let is_kept = set.is_ok();
    let mut client = Client::new(&tree.shown());
    let node = client.lookup(ROOT_ID, "file").unwrap().node;
    let mut get = |node: u64, bytes: u32, name: &[u8]| {
        let size = XattrSize { bytes, padding: 0 };
        client.call(GETXATTR, node, &[size.as_bytes(), name, b"\0"].concat())
    };
    let missing = if is_kept { libc::ENODATA } else { libc::EOPNOTSUPP };
    assert_eq!(get(node, 64, b"user.none"), Err(missing));
    if is_kept {
        assert_eq!(get(node, 64, b"user.colour"), Ok(b"green".to_vec()));
        assert_eq!(get(node, 0, b"user.colour"), Ok([5_u32, 0].as_bytes().to_vec()));
        assert_eq!(get(node, 4, b"user.colour"), Err(libc::ERANGE));
        let size = XattrSize { bytes: 4096, padding: 0 };
        let names = client.call(LISTXATTR, node, size.as_bytes()).unwrap();
        assert!(names.split(|byte| *byte == 0).any(|name| name == b"user.colour"));
    }
    let link = client.find(Path::new("shown/link")).unwrap().node;
    assert_eq!(client.call(LISTXATTR, link, &[0; 8]), Ok(vec![0; 8]));
}

#[test]
fn a_guest_need_not_open_and_may_only_read() {
    let tree = Tree::new();
    let mut client = Client::new(&tree.whole());
    let file = client.lookup(ROOT_ID, "file").unwrap().node;
    assert_eq!(client.call(OPEN, file, &[0; 8]), Err(libc::ENOSYS));
    assert_eq!(client.call(OPENDIR, ROOT_ID, &[0; 8]), Err(libc::ENOSYS));
    // Nobody has anything to write back, and a guest that knows asks no more when it closes a file.
    for sync in [20, 25, 30, 50] {
        assert_eq!(client.call(sync, file, &[0; 24]), Err(libc::ENOSYS), "{sync}");
    }
    // A guest that does not know of files that are not opened.
    client.call(INIT, 0, &init(0)).unwrap();
    let file = client.lookup(ROOT_ID, "file").unwrap().node;
    assert_eq!(client.call(OPEN, file, &[0; 8]).unwrap().len(), 16);
    assert_eq!(client.call(OPENDIR, ROOT_ID, &[0; 8]).unwrap().len(), 16);
    assert_eq!(client.call(OPEN, file, &[1, 0, 0, 0, 0, 0, 0, 0]), Err(libc::EROFS));
    for change in [4, 6, 8, 9, 10, 11, 12, 13, 16, 21, 24, 35, 43, 45, 47, 51] {
        assert_eq!(client.call(change, file, &[0; 128]), Err(libc::EROFS), "{change}");
    }
    for unknown in [0, 7, 19, 31, 32, 33, 34, 37, 39, 40, 48, 49, 52, 53, 4096, u32::MAX] {
        assert_eq!(client.call(unknown, file, &[0; 128]), Err(libc::ENOSYS), "{unknown}");
    }
    for release in [18, 29] {
        assert_eq!(client.call(release, file, &[0; 24]), Ok(Vec::new()), "{release}");
    }
    assert_eq!(client.call(STATFS, ROOT_ID, &[]).unwrap().len(), 80);
    assert_eq!(client.call(DESTROY, 0, &[]), Ok(Vec::new()));
    assert_eq!(client.attributes(ROOT_ID).unwrap_err(), libc::EIO);
}

#[test]
fn a_path_longer_than_the_kernels_is_walked() {
    let tree = Tree::new();
    let folder = |level: usize| format!("{level:0>250}");
    // A path so long cannot be named at once here either.
    let mut at = rustix::fs::open(tree.path().join("shown"), OFlags::PATH, 0.into()).unwrap();
    let names: Vec<_> = (0..40).map(folder).collect();
    for name in &names {
        rustix::fs::mkdirat(&at, name, 0o755.into()).unwrap();
        at = rustix::fs::openat(&at, name, OFlags::PATH, 0.into()).unwrap();
    }
    let mut client = Client::new(&tree.shown());
    let mut node = client.lookup(ROOT_ID, "shown").unwrap().node;
    for name in &names {
        node = client.lookup(node, name).unwrap().node;
    }
    assert_eq!(client.names(node).len(), 2);
    let status = rustix::fs::fstat(&at).unwrap();
    assert_eq!(client.attributes(node).unwrap().attributes.inode, status.st_ino);
}
