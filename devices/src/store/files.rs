//! The host's side: files of the tree, opened when they are needed and kept while there is room.
//!
//! Every path is walked by openat2(2) below the tree's root and through no symlink, so that neither
//! a guest nor a change on the host leads out of it. What is found must be the file that the guest
//! was told of.

use std::ffi::CStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{AtFlags, FileType, Mode, OFlags, ResolveFlags, Statx, StatxFlags};
use rustix::io::Errno;

use super::nodes::{Identity, Place};
use super::wire::Attributes;

/// Descriptors that a thread keeps open.
const OPEN_MAX: usize = 48;

/// A longer path is walked in pieces: the kernel takes 4,095 bytes, and a name has at most 255.
const PATH_PIECE_MAX: usize = 4000;

/// What a file is opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    /// To find names in a directory.
    Search,
    /// To read a regular file, or list a directory.
    Read,
}

/// Files that a thread has open, those used last.
pub(super) struct OpenFiles {
    open: Vec<OpenFile>,
    uses: u64,
}

struct OpenFile {
    identity: Identity,
    purpose: Purpose,
    file: Arc<OwnedFd>,
    used: u64,
}

impl OpenFiles {
    pub(super) const fn new() -> Self {
        Self { open: Vec::new(), uses: 0 }
    }

    /// The file at `place`, open.
    pub(super) fn open(
        &mut self,
        root: BorrowedFd<'_>,
        place: &Place,
        purpose: Purpose,
    ) -> Result<Arc<OwnedFd>, Errno> {
        self.open_path(root, &place.path, place.identity, purpose)
    }

    /// The directory that `place` is in, to find it there.
    pub(super) fn open_parent<'a>(
        &mut self,
        root: BorrowedFd<'_>,
        place: &'a Place,
    ) -> Result<(Arc<OwnedFd>, &'a [u8]), Errno> {
        let path = &place.path;
        let (parent, name) = match path.iter().rposition(|byte| *byte == b'/') {
            Some(slash) => (path.get(..slash), path.get(slash + 1..)),
            None => (Some(&[][..]), Some(&path[..])),
        };
        let (Some(parent), Some(name)) = (parent, name) else { return Err(Errno::IO) };
        let folder = self.open_path(root, parent, place.parent, Purpose::Search)?;
        Ok((folder, name))
    }

    fn open_path(
        &mut self,
        root: BorrowedFd<'_>,
        path: &[u8],
        identity: Identity,
        purpose: Purpose,
    ) -> Result<Arc<OwnedFd>, Errno> {
        self.uses += 1;
        let known = |open: &&mut OpenFile| open.purpose == purpose && open.identity == identity;
        if let Some(open) = self.open.iter_mut().find(known) {
            open.used = self.uses;
            return Ok(Arc::clone(&open.file));
        }
        let file = Arc::new(walk(root, path, flags(identity, purpose)?)?);
        check(identity, &status(file.as_fd(), ITSELF)?)?;
        let open = OpenFile { identity, purpose, file: Arc::clone(&file), used: self.uses };
        if self.open.len() < OPEN_MAX {
            self.open.push(open);
        } else if let Some(oldest) = self.open.iter_mut().min_by_key(|open| open.used) {
            *oldest = open;
        }
        Ok(file)
    }
}

/// What the host knows of `name` in `folder`, or of `folder` itself where the name is empty.
pub(super) fn status(folder: BorrowedFd<'_>, name: impl rustix::path::Arg) -> Result<Statx, Errno> {
    let flags = AtFlags::EMPTY_PATH | AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT;
    rustix::fs::statx(folder, name, flags, StatxFlags::BASIC_STATS)
}

/// Refuses another file than the guest was told of.
pub(super) fn check(identity: Identity, status: &Statx) -> Result<(), Errno> {
    if identify(status) == identity { Ok(()) } else { Err(Errno::STALE) }
}

pub(super) fn identify(status: &Statx) -> Identity {
    let device = status.stx_dev_major << DEVICE_MINOR_BITS | status.stx_dev_minor;
    let kind = u32::from(status.stx_mode) & KIND;
    Identity { inode: status.stx_ino, device, kind }
}

/// What the guest is told of a file; `root` is the tree's device.
pub(super) fn attributes(status: &Statx, root: Identity) -> Attributes {
    Attributes {
        inode: shown_inode(identify(status), root),
        bytes: status.stx_size,
        blocks: status.stx_blocks,
        accessed: status.stx_atime.tv_sec.cast_unsigned(),
        modified: status.stx_mtime.tv_sec.cast_unsigned(),
        changed: status.stx_ctime.tv_sec.cast_unsigned(),
        accessed_nanoseconds: status.stx_atime.tv_nsec,
        modified_nanoseconds: status.stx_mtime.tv_nsec,
        changed_nanoseconds: status.stx_ctime.tv_nsec,
        mode: status.stx_mode.into(),
        links: status.stx_nlink,
        user: status.stx_uid,
        group: status.stx_gid,
        device: encode_device(status.stx_rdev_major, status.stx_rdev_minor),
        block_bytes: status.stx_blksize,
        flags: 0,
    }
}

/// The number of a file in the guest, where all of the tree is one device.
pub(super) fn shown_inode(identity: Identity, root: Identity) -> u64 {
    identity.inode ^ u64::from(identity.device ^ root.device) << 32
}

const KIND: u32 = 0o170_000;
const DEVICE_MINOR_BITS: u32 = 20;

/// As the kernel has device numbers on its edges (`new_encode_dev`).
fn encode_device(major: u32, minor: u32) -> u32 {
    minor & 0xFF | major << 8 | (minor & !0xFF) << 12
}

fn flags(identity: Identity, purpose: Purpose) -> Result<OFlags, Errno> {
    let kind = FileType::from_raw_mode(identity.kind);
    match (purpose, kind) {
        (Purpose::Search, FileType::Directory) => Ok(OFlags::PATH | OFlags::DIRECTORY),
        (Purpose::Search, _) => Err(Errno::NOTDIR),
        (Purpose::Read, FileType::Directory) => Ok(OFlags::RDONLY | OFlags::DIRECTORY),
        // What became something else meanwhile shall not block.
        (Purpose::Read, FileType::RegularFile) => {
            Ok(OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY)
        }
        (Purpose::Read, _) => Err(Errno::INVAL),
    }
}

fn walk(root: BorrowedFd<'_>, mut path: &[u8], flags: OFlags) -> Result<OwnedFd, Errno> {
    let mut at: Option<OwnedFd> = None;
    while let Some(piece) = path.get(..PATH_PIECE_MAX) {
        let slash = piece.iter().rposition(|byte| *byte == b'/').ok_or(Errno::NAMETOOLONG)?;
        let (Some(folder), Some(rest)) = (path.get(..slash), path.get(slash + 1..)) else { break };
        at = Some(step(at.as_ref(), root, folder, OFlags::PATH | OFlags::DIRECTORY)?);
        path = rest;
    }
    let path = if path.is_empty() { &b"."[..] } else { path };
    step(at.as_ref(), root, path, flags)
}

fn step(
    at: Option<&OwnedFd>,
    root: BorrowedFd<'_>,
    path: &[u8],
    flags: OFlags,
) -> Result<OwnedFd, Errno> {
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    let from = at.map_or(root, |at| at.as_fd());
    let flags = flags | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    rustix::fs::openat2(from, path, flags, Mode::empty(), resolve)
}

/// The empty name, by which a descriptor itself is meant.
pub(super) const ITSELF: &CStr = c"";
