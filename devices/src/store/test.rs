use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::io;
use std::os::fd::BorrowedFd;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock};

use proptest::prelude::*;
use rustix::fs::{OFlags, XattrFlags};
use tempfile::TempDir;
use zerocopy::{FromBytes, IntoBytes as _};

use super::closure::Closure;
use super::reply::Reply;
use super::requests::{REQUEST_MAX, Requests};
use super::tree::{FOREVER, Store};
use super::wire::*;

mod served;

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
    assert!(client.attributes(ROOT_ID).unwrap().attributes.modified > 0);
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
fn a_node_that_nobody_was_told_of_leads_nowhere() {
    let tree = Tree::new();
    let mut client = Client::new(&tree.shown());
    let shown = client.lookup(ROOT_ID, "shown").unwrap().node;
    let hidden = fs::metadata(tree.path().join("hidden")).unwrap().ino();
    for node in [0, shown + 1, 77, hidden, u64::from(u32::MAX), u64::MAX] {
        assert_eq!(client.lookup(node, "bin").unwrap_err(), libc::ESTALE, "{node}");
        assert_eq!(client.attributes(node).unwrap_err(), libc::ESTALE, "{node}");
        assert_eq!(client.read(node, 0, 8), Err(libc::ESTALE), "{node}");
        assert_eq!(client.call(READLINK, node, &[]), Err(libc::ESTALE), "{node}");
        let list = ReadRequest { bytes: 4096, ..ReadRequest::default() };
        for opcode in [READDIR, READDIRPLUS] {
            assert_eq!(client.call(opcode, node, list.as_bytes()), Err(libc::ESTALE), "{node}");
        }
        assert_eq!(client.send(&request(FORGET, node, u64::MAX.as_bytes())), None);
    }
    // What was told of is still there, and the root stays however often it is forgotten.
    assert_eq!(client.send(&request(FORGET, ROOT_ID, u64::MAX.as_bytes())), None);
    assert!(client.lookup(shown, "bin").is_ok());
    assert_eq!(client.lookup(ROOT_ID, "shown").unwrap().node, shown);
}

#[test]
fn nothing_leads_out_of_the_tree() {
    let tree = Tree::new();
    let mut client = Client::new(&tree.shown());
    let shown = client.lookup(ROOT_ID, "shown").unwrap().node;
    for node in [ROOT_ID, shown] {
        for name in ["..", ".", "", "/", "/etc", "bin/program", "../hidden", "shown/../hidden"] {
            assert_eq!(client.lookup(node, name).unwrap_err(), libc::EINVAL, "{name:?}");
        }
        let long = "x".repeat(256);
        assert_eq!(client.lookup(node, long).unwrap_err(), libc::ENAMETOOLONG);
    }
    for link in ["out", "beside", "link"] {
        let link = client.lookup(shown, link).unwrap().node;
        assert!(client.call(READLINK, link, &[]).is_ok());
        assert_eq!(client.lookup(link, "program").unwrap_err(), libc::ENOTDIR);
        assert_eq!(client.read(link, 0, 10), Err(libc::EINVAL));
        let list = ReadRequest { bytes: 4096, ..ReadRequest::default() };
        assert_eq!(client.call(READDIR, link, list.as_bytes()), Err(libc::EINVAL));
    }
}

#[test]
fn a_tree_that_is_changed_under_a_guest_is_stale_and_not_followed() {
    let tree = Tree::new();
    let mut client = Client::new(&tree.shown());
    let bin = client.find(Path::new("shown/bin")).unwrap().node;
    let program = client.lookup(bin, "program").unwrap().node;
    fs::rename(tree.path().join("shown/bin"), tree.path().join("shown/gone")).unwrap();
    symlink("../hidden/bin", tree.path().join("shown/bin")).unwrap();
    // A thread that has nothing open yet.
    let mut other =
        Client { requests: Requests::new(Arc::clone(&client.requests.store)), ..client };
    assert!(other.read(program, 0, 10).is_err());
    assert!(other.lookup(bin, "program").is_err());
    assert!(other.attributes(program).is_err());
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
fn wrong_requests_are_errors_and_nothing_else() {
    let tree = Tree::new();
    let mut client = Client::new(&tree.whole());
    assert_eq!(client.send(&[]), Some(Err(libc::EINVAL)));
    assert_eq!(client.send(&[0xFF; 39]), Some(Err(libc::EINVAL)));
    for len in [0, 39, 41, 1000, u32::MAX] {
        let mut request = request(GETATTR, ROOT_ID, &[]);
        request[..4].copy_from_slice(&len.to_ne_bytes());
        assert_eq!(client.send(&request), Some(Err(libc::EINVAL)), "{len}");
    }
    // A write of which only the first part is looked at.
    let write = request(16, ROOT_ID, &vec![0; REQUEST_MAX * 2]);
    assert_eq!(client.send(&write[..REQUEST_MAX]), Some(Err(libc::EROFS)));
    assert_eq!(client.call(LOOKUP, ROOT_ID, b"no end"), Err(libc::EINVAL));
    assert_eq!(client.call(READ, ROOT_ID, &[0; 39]), Err(libc::EINVAL));
    let file = client.lookup(ROOT_ID, "file").unwrap().node;
    assert_eq!(client.read(file, u64::MAX, 1), Err(libc::EINVAL));
    assert_eq!(client.read(file, 0, u32::MAX), Err(libc::EINVAL), "there is no room for it");
    let bytes = 8;
    let list = ReadRequest { bytes, ..ReadRequest::default() };
    assert_eq!(client.call(READDIR, ROOT_ID, list.as_bytes()), Err(libc::EINVAL));
    let old = InitRequest { major: 7, minor: 8, ..InitRequest::default() };
    assert_eq!(client.call(INIT, 0, old.as_bytes()), Err(libc::EPROTO));
    // Whatever the room is.
    for room in 0..64 {
        client.room = room;
        for opcode in 0..60 {
            let len = client.requests.answer(
                &request(opcode, ROOT_ID, b"file\0file\0file\0file\0file\0file\0"),
                &mut Bytes(vec![0; room]),
            );
            assert!(len <= room);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 1000,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    /// Whatever is sent, a reply fits and says how long it is.
    #[test]
    fn garbage_is_answered(
        requests in prop::collection::vec(
            (0_u32..60, 0_u64..8, prop::collection::vec(any::<u8>(), 0..96), 0_usize..512), 1..12,
        ),
    ) {
        static TREE: LazyLock<(Tree, Arc<Store>)> = LazyLock::new(|| {
            let tree = Tree::new();
            let store = tree.shown();
            (tree, store)
        });
        let mut client = Client::new(&TREE.1);
        for name in ["shown", "file"] {
            client.lookup(ROOT_ID, name).unwrap();
        }
        for (opcode, node, body, room) in requests {
            client.room = room;
            client.send(&request(opcode, node, &body));
        }
    }
}

#[test]
fn thousands_of_entries_are_as_the_host_has_them() {
    let tree = Tree::new();
    grow(&tree.path().join("shown"));
    let mut client = Client::new(&tree.shown());
    let root = tree.path().join("shown");
    let mut compared = 0;
    let mut pending = vec![(root.clone(), client.lookup(ROOT_ID, "shown").unwrap())];
    while let Some((path, entry)) = pending.pop() {
        compared += 1;
        compare(&mut client, &path, &entry);
        if !entry_is(&entry, 0o040_000) {
            continue;
        }
        let host: BTreeMap<Vec<u8>, PathBuf> = fs::read_dir(&path)
            .unwrap()
            .map(|entry| entry.unwrap())
            .map(|entry| (entry.file_name().as_bytes().to_vec(), entry.path()))
            .collect();
        let mut plain = client.names(entry.node);
        assert!(plain.remove(&b"."[..]) && plain.remove(&b".."[..]));
        assert!(plain.iter().eq(plain.iter().filter(|name| host.contains_key(*name))));
        assert_eq!(plain.len(), host.len(), "{}", path.display());
        let listed = client.list(READDIRPLUS, entry.node, 1 << 14);
        assert_eq!(listed.len(), host.len() + 2);
        for (name, entry, inode) in listed {
            if entry.node != 0 {
                assert_eq!(inode, entry.attributes.inode);
                pending.push((host[&name].clone(), entry));
            }
        }
    }
    assert!(compared > 5000, "{compared}");
}

/// A tree with everything that a store has, and more.
fn grow(root: &Path) {
    let huge = root.join("huge");
    fs::create_dir(&huge).unwrap();
    for number in 0..5000 {
        let name = format!("{number}-{}", "x".repeat(number % 200));
        fs::write(huge.join(&name), vec![1; number % 32]).unwrap();
    }
    let mut deep = root.to_owned();
    for level in 0..40 {
        deep.push(format!("level-{level}"));
        fs::create_dir(&deep).unwrap();
        fs::write(deep.join("file"), level.to_string()).unwrap();
        symlink(format!("../level-{level}/file"), deep.join("link")).unwrap();
        fs::hard_link(deep.join("file"), deep.join("hard")).unwrap();
        let mode = fs::Permissions::from_mode([0o444, 0o555, 0o644, 0o755][level % 4]);
        fs::set_permissions(deep.join("file"), mode).unwrap();
        let file = fs::File::open(deep.join("file")).unwrap();
        let time = std::time::UNIX_EPOCH + std::time::Duration::new(level as u64, 5);
        file.set_times(fs::FileTimes::new().set_modified(time)).unwrap();
    }
    fs::write(root.join("large"), vec![7; 3 << 20]).unwrap();
    fs::write(root.join("sp ace\n\u{e9}"), "odd").unwrap();
}

fn compare(client: &mut Client, path: &Path, entry: &Entry) {
    let host = fs::symlink_metadata(path).unwrap();
    let told = client.attributes(entry.node).unwrap().attributes;
    for told in [told, entry.attributes] {
        assert_eq!(
            (told.inode, told.bytes, told.blocks, told.mode, told.links, told.user, told.group),
            (
                host.ino(),
                host.size(),
                host.blocks(),
                host.mode(),
                u32::try_from(host.nlink()).unwrap(),
                host.uid(),
                host.gid()
            )
        );
        assert_eq!(
            (told.modified.cast_signed(), i64::from(told.modified_nanoseconds)),
            (host.mtime(), host.mtime_nsec())
        );
        assert_eq!(u64::from(told.block_bytes), host.blksize());
    }
    if host.is_symlink() {
        let target = client.call(READLINK, entry.node, &[]).unwrap();
        assert_eq!(target, fs::read_link(path).unwrap().as_os_str().as_bytes());
    } else if host.is_file() {
        let expected = fs::read(path).unwrap();
        let mut read = Vec::new();
        while read.len() < expected.len() {
            read.extend(client.read(entry.node, read.len() as u64, 1 << 17).unwrap());
        }
        assert!(read == expected, "{}", path.display());
    }
}

fn entry_is(entry: &Entry, kind: u32) -> bool {
    entry.attributes.mode & 0o170_000 == kind
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
