//! Directories, a page of names at a time.

use std::mem::MaybeUninit;
use std::os::fd::{AsFd as _, BorrowedFd};

use rustix::fs::{RawDir, SeekFrom};
use rustix::io::Errno;
use zerocopy::IntoBytes as _;

use super::files::{OpenFiles, Purpose, attributes, status};
use super::tree::Store;
use super::wire::{DIRECTORY_ALIGNMENT, DirectoryEntry, Entry, ROOT_ID, ReadRequest};

/// Bytes of names in one reply; more saves a guest nothing.
const PAGE_MAX: usize = 1 << 17;

/// Bytes of names that the host is asked for at once, at least and at most: a name of any length
/// fits, and not many are asked for in vain.
const HOST_MIN: usize = 1024;
const HOST_MAX: usize = 1 << 15;

/// What listing directories needs, kept from one to the next.
#[derive(Default)]
pub(super) struct Listing {
    page: Vec<u8>,
    host: Vec<MaybeUninit<u8>>,
}

impl Listing {
    /// Lists the names of the directory `node` from an offset on, with their attributes if wanted,
    /// as far as there is `room` for them in the reply.
    pub(super) fn list(
        &mut self,
        store: &Store,
        files: &mut OpenFiles,
        node: u64,
        request: ReadRequest,
        with_attributes: bool,
        room: usize,
    ) -> Result<&[u8], Errno> {
        let place = store.nodes().place(node)?;
        let wanted = usize::try_from(request.bytes).unwrap_or(usize::MAX);
        let folder = files.open(store.root.as_fd(), &place, Purpose::Read)?;
        self.page.clear();
        let mut page = Page {
            store,
            parent: node,
            folder: folder.as_fd(),
            bytes: &mut self.page,
            room: room.min(wanted).min(PAGE_MAX),
            with_attributes,
            is_full: false,
        };
        // Where names were chosen, the host is not asked for them.
        let is_chosen = node == ROOT_ID && page.list_closure(request.offset).is_some();
        if !is_chosen {
            rustix::fs::seek(&*folder, SeekFrom::Start(request.offset))?;
            let asked = page.room / if with_attributes { 4 } else { 1 };
            let asked = asked.clamp(HOST_MIN, HOST_MAX);
            self.host.resize(HOST_MAX, MaybeUninit::uninit());
            let host = self.host.get_mut(..asked).unwrap_or_default();
            page.list_host(RawDir::new(folder.as_fd(), host))?;
        }
        // Nothing at all would say that the directory ends here.
        if page.is_full && page.bytes.is_empty() { Err(Errno::INVAL) } else { Ok(&self.page) }
    }
}

/// Names of one reply.
struct Page<'a> {
    store: &'a Store,
    parent: u64,
    folder: BorrowedFd<'a>,
    bytes: &'a mut Vec<u8>,
    room: usize,
    with_attributes: bool,
    is_full: bool,
}

const KIND_DIRECTORY: u32 = 4;
const KIND_UNKNOWN: u32 = 0;

impl Page<'_> {
    /// The root, where not all of it is shown: offsets count the names.
    fn list_closure(&mut self, offset: u64) -> Option<()> {
        let mut at = usize::try_from(offset).unwrap_or(usize::MAX);
        // One name at a time: it may get longer while the host is asked.
        loop {
            let name = self.store.closure()?;
            let name = match at {
                0 => Some(b"."[..].into()),
                1 => Some(b".."[..].into()),
                _ => name.name(at - 2),
            };
            let Some(name) = name else { return Some(()) };
            let next = at.saturating_add(1);
            let is_itself = at < 2;
            let kind = if is_itself { KIND_DIRECTORY } else { KIND_UNKNOWN };
            let inode = self.store.identity.inode;
            if !self.add(&name, inode, next as u64, kind) {
                return Some(());
            }
            at = next;
        }
    }

    fn list_host(&mut self, mut names: RawDir<'_, BorrowedFd<'_>>) -> Result<(), Errno> {
        while let Some(entry) = names.next() {
            let entry = entry?;
            let name = entry.file_name().to_bytes();
            // Above the root there is nothing.
            let is_above_root = self.parent == ROOT_ID && name == b"..";
            let inode = if is_above_root { self.store.identity.inode } else { entry.ino() };
            let kind = entry.file_type().as_raw_mode() >> 12;
            if !self.add(name, inode, entry.next_entry_cookie(), kind) {
                return Ok(());
            }
        }
        Ok(())
    }

    /// Adds a name, and says whether the page has room for more.
    fn add(&mut self, name: &[u8], inode: u64, next: u64, kind: u32) -> bool {
        let attributes = if self.with_attributes { size_of::<Entry>() } else { 0 };
        let bare = size_of::<DirectoryEntry>() + name.len();
        let len = attributes + bare.next_multiple_of(DIRECTORY_ALIGNMENT);
        if len > self.room - self.bytes.len() {
            self.is_full = true;
            return false;
        }
        let end = self.bytes.len() + len;
        let Some((entry, inode, kind)) = self.learn(name, inode, kind) else { return true };
        if self.with_attributes {
            self.bytes.extend_from_slice(entry.as_bytes());
        }
        let name_bytes = u32::try_from(name.len()).unwrap_or_default();
        let header = DirectoryEntry { inode, next, name_bytes, kind };
        self.bytes.extend_from_slice(header.as_bytes());
        self.bytes.extend_from_slice(name);
        self.bytes.resize(end, 0);
        true
    }

    /// What the guest is told of a name, or nothing where there is no such file.
    fn learn(&self, name: &[u8], inode: u64, kind: u32) -> Option<(Entry, u64, u32)> {
        let is_itself = name == b"." || name == b"..";
        if is_itself || kind != KIND_UNKNOWN && !self.with_attributes {
            return Some((Entry::default(), inode, kind));
        }
        let told = if self.with_attributes {
            self.store.tell(self.parent, self.folder, name)
        } else {
            let about = |status| attributes(&status, self.store.identity);
            let untold = |attributes| Entry { attributes, ..Entry::default() };
            status(self.folder, name).map(about).map(untold)
        };
        match told {
            Ok(entry) => Some((entry, entry.attributes.inode, entry.attributes.mode >> 12)),
            Err(Errno::NOENT) => None,
            // The name is there, and a lookup will say what is wrong with it.
            Err(_) => Some((Entry::default(), inode, kind)),
        }
    }
}
