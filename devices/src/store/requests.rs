//! From a request to its reply.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::Arc;

use rustix::fs::{FileType, SeekFrom};
use rustix::io::Errno;
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::closure::{NAME_MAX, is_name};
use super::directory::Listing;
use super::files::{ITSELF, OpenFiles, Purpose, attributes, check, status};
use super::nodes::Place;
use super::reply::{Nowhere, Reply};
use super::tree::{FOREVER, Store};
use super::wire::*;

/// Bytes of a request that are looked at: a name and what is in front of it, or references that are
/// taken back. The data of writes may be behind them.
pub const REQUEST_MAX: usize = 8192;

/// Pages in a request, and so bytes of a file in a reply.
const PAGES_MAX: u16 = 256;
pub(super) const READ_MAX: usize = PAGES_MAX as usize * 4096;

/// Requests that the guest has on their way before it lets its programs wait.
const BACKGROUND_MAX: u16 = 128;

/// How long the root's attributes are good, in seconds: names may be added to it.
const ROOT_VALID: u64 = 1;

/// The kernel's bound on an attribute and on a list of their names.
const XATTR_MAX: usize = 1 << 16;

/// Answers requests, one after the other: each thread has its own.
pub struct Requests {
    pub(super) store: Arc<Store>,
    files: OpenFiles,
    listing: Listing,
    buffer: Vec<u8>,
}

/// Bytes behind the header of a reply, or that there is none.
type Answer = Result<Option<usize>, Errno>;

impl Requests {
    /// Answers for `store`.
    #[must_use]
    pub fn new(store: Arc<Store>) -> Self {
        Self { store, files: OpenFiles::new(), listing: Listing::default(), buffer: Vec::new() }
    }

    /// Answers a request, of which there may be more than [`REQUEST_MAX`] bytes, and returns how
    /// long the reply is: 0 where none is wanted, or none fits.
    pub fn answer(&mut self, request: &[u8], reply: &mut impl Reply) -> usize {
        if reply.room() < size_of::<ReplyHeader>() {
            // Most of all what is forgotten, which is never answered.
            let _ = self.serve(request, &mut Nowhere);
            return 0;
        }
        let (unique, answer) = self.serve(request, reply);
        let (error, len) = match answer {
            Ok(Some(len)) => (0, len),
            Ok(None) => return 0,
            Err(error) => (-error.raw_os_error(), 0),
        };
        let total = size_of::<ReplyHeader>() + len;
        let len = u32::try_from(total).unwrap_or(u32::MAX);
        reply.put(0, ReplyHeader { len, error, unique }.as_bytes());
        total
    }

    fn serve(&mut self, request: &[u8], reply: &mut impl Reply) -> (u64, Answer) {
        let Ok((header, _)) = RequestHeader::read_from_prefix(request) else {
            return (0, Err(Errno::INVAL));
        };
        let len = usize::try_from(header.len).unwrap_or(usize::MAX);
        let is_whole = len <= request.len() || request.len() >= REQUEST_MAX;
        let body = request.get(size_of::<RequestHeader>()..len.min(request.len()));
        match body.filter(|_| is_whole) {
            Some(body) => (header.unique, self.serve_body(&header, body, reply)),
            None => (header.unique, Err(Errno::INVAL)),
        }
    }

    fn serve_body(
        &mut self,
        header: &RequestHeader,
        body: &[u8],
        reply: &mut impl Reply,
    ) -> Answer {
        let node = header.node;
        let opcode = Opcode::from(header.opcode);
        let has_begun = self.store.is_in_session();
        if !has_begun && opcode != Opcode::Init {
            return Err(Errno::IO);
        }
        match opcode {
            Opcode::Init => self.init(body, reply),
            Opcode::Lookup => put(reply, &self.lookup(node, name(body)?)?),
            Opcode::Forget => self.forget(node, body),
            Opcode::BatchForget => self.forget_many(body),
            Opcode::Getattr => put(reply, &self.attributes(node)?),
            Opcode::Readlink => self.read_link(node, reply),
            Opcode::Open => self.open(node, Features::NO_OPEN_SUPPORT, body, reply),
            Opcode::Opendir => self.open(node, Features::NO_OPENDIR_SUPPORT, body, reply),
            Opcode::Read => self.read(node, parse(body)?, reply),
            Opcode::Readdir => self.list(node, parse(body)?, false, reply),
            Opcode::Readdirplus => self.list(node, parse(body)?, true, reply),
            Opcode::Lseek => self.seek(node, parse(body)?, reply),
            Opcode::Getxattr => self.attribute(node, body, reply),
            Opcode::Listxattr => self.attribute_names(node, parse(body)?, reply),
            Opcode::Statfs => self.statfs(reply),
            Opcode::Release => Ok(Some(0)),
            Opcode::Destroy => {
                self.store.end_session();
                Ok(Some(0))
            }
            Opcode::Change => Err(Errno::ROFS),
            Opcode::Interrupt => Ok(None),
            Opcode::Unknown => Err(Errno::NOSYS),
        }
    }

    fn init(&mut self, body: &[u8], reply: &mut impl Reply) -> Answer {
        let request: InitRequest = parse(body)?;
        if request.major < MAJOR || request.major == MAJOR && request.minor < MINOR_MIN {
            return Err(Errno::PROTO);
        }
        let mut offered = u64::from(request.features);
        if offered & Features::INIT_EXT.bits() != 0 {
            let high = body.get(size_of::<InitRequest>()..).unwrap_or_default();
            offered |= u64::from(parse::<u32>(high).unwrap_or(0)) << 32;
        }
        let features = Features::from_bits_truncate(offered);
        self.store.end_session();
        self.store.begin_session(features);
        put(
            reply,
            &InitReply {
                major: MAJOR,
                minor: MINOR,
                readahead_max: request.readahead_max,
                features: u32::try_from(features.bits() & u64::from(u32::MAX)).unwrap_or(0),
                features_high: u32::try_from(features.bits() >> 32).unwrap_or(0),
                background_max: BACKGROUND_MAX,
                congestion_threshold: BACKGROUND_MAX / 4 * 3,
                write_max: u32::try_from(READ_MAX).unwrap_or(u32::MAX),
                time_granularity: 1,
                pages_max: PAGES_MAX,
                ..InitReply::default()
            },
        )
    }

    fn lookup(&mut self, parent: u64, name: &[u8]) -> Result<Entry, Errno> {
        let is_root = parent == ROOT_ID;
        if is_root && self.store.closure().is_some_and(|closure| !closure.contains(name)) {
            return Err(Errno::NOENT);
        }
        let place = self.store.nodes().place(parent)?;
        let folder = self.files.open(self.store.root.as_fd(), &place, Purpose::Search)?;
        match self.store.tell(parent, folder.as_fd(), name) {
            // Store paths do not change, but there may be more of them.
            Err(Errno::NOENT) if !is_root => Ok(Entry { name_valid: FOREVER, ..Entry::default() }),
            told => told,
        }
    }

    fn forget(&self, node: u64, body: &[u8]) -> Answer {
        if let Ok(lookups) = parse::<u64>(body) {
            self.store.nodes().forget(node, lookups);
        }
        Ok(None)
    }

    fn forget_many(&self, body: &[u8]) -> Answer {
        // A count and padding; what was sent counts.
        let mut rest = body.get(size_of::<u64>()..).unwrap_or_default();
        let mut nodes = self.store.nodes();
        while let Ok((one, behind)) = ForgetOne::read_from_prefix(rest) {
            nodes.forget(one.node, one.lookups);
            rest = behind;
        }
        Ok(None)
    }

    fn attributes(&mut self, node: u64) -> Result<AttributesReply, Errno> {
        let place = self.store.nodes().place(node)?;
        let (valid, attributes) = if place.path.is_empty() {
            let status = status(self.store.root.as_fd(), ITSELF)?;
            (ROOT_VALID, self.store.root_attributes(&status))
        } else {
            let (folder, name) = self.files.open_parent(self.store.root.as_fd(), &place)?;
            let status = status(folder.as_fd(), name)?;
            check(place.identity, &status)?;
            (FOREVER, attributes(&status, self.store.identity))
        };
        Ok(AttributesReply { valid, attributes, ..AttributesReply::default() })
    }

    fn read_link(&mut self, node: u64, reply: &mut impl Reply) -> Answer {
        let place = self.store.nodes().place(node)?;
        if FileType::from_raw_mode(place.identity.kind) != FileType::Symlink {
            return Err(Errno::INVAL);
        }
        let (folder, name) = self.files.open_parent(self.store.root.as_fd(), &place)?;
        self.buffer.clear();
        let target = rustix::fs::readlinkat(&*folder, name, std::mem::take(&mut self.buffer))?;
        self.buffer = target.into_bytes();
        put_bytes(reply, &self.buffer)
    }

    /// Files are opened when they are read. A guest that knows that asks only once.
    fn open(
        &mut self,
        node: u64,
        unneeded: Features,
        body: &[u8],
        reply: &mut impl Reply,
    ) -> Answer {
        if self.store.has(unneeded) {
            return Err(Errno::NOSYS);
        }
        let flags: u32 = parse(body)?;
        if flags & libc::O_ACCMODE.cast_unsigned() != libc::O_RDONLY.cast_unsigned() {
            return Err(Errno::ROFS);
        }
        self.open_to_read(node)?;
        let flags = OPEN_KEEP_CACHE | OPEN_CACHE_DIRECTORY;
        put(reply, &OpenReply { flags, ..OpenReply::default() })
    }

    fn read(&mut self, node: u64, request: ReadRequest, reply: &mut impl Reply) -> Answer {
        let len = usize::try_from(request.bytes).unwrap_or(usize::MAX).min(READ_MAX);
        let file = self.open_to_read(node)?;
        let start = size_of::<ReplyHeader>();
        if len > reply.room() - start {
            return Err(Errno::INVAL);
        }
        let filled = reply.fill(start, len, file.as_fd(), request.offset);
        let error = |error: io::Error| Errno::from_io_error(&error).unwrap_or(Errno::IO);
        filled.map(Some).map_err(error)
    }

    fn seek(&mut self, node: u64, request: SeekRequest, reply: &mut impl Reply) -> Answer {
        let file = self.open_to_read(node)?;
        let offset = i64::try_from(request.offset).map_err(|_| Errno::NXIO)?.cast_unsigned();
        let whence = match request.whence {
            SEEK_DATA => SeekFrom::Data(offset),
            SEEK_HOLE => SeekFrom::Hole(offset),
            _ => return Err(Errno::INVAL),
        };
        put(reply, &rustix::fs::seek(&*file, whence)?)
    }

    fn attribute(&mut self, node: u64, body: &[u8], reply: &mut impl Reply) -> Answer {
        let (size, name) = XattrSize::read_from_prefix(body).map_err(|_| Errno::INVAL)?;
        let name = CStr::from_bytes_until_nul(name).map_err(|_| Errno::INVAL)?;
        // Others have none that could be read without following them.
        let file = self.open_to_read(node).map_err(|error| match error {
            Errno::INVAL => Errno::NODATA,
            error => error,
        })?;
        self.buffer.resize(XATTR_MAX, 0);
        let len = rustix::fs::fgetxattr(&*file, name, &mut self.buffer[..])?;
        put_sized(reply, size, self.buffer.get(..len).unwrap_or_default())
    }

    fn attribute_names(&mut self, node: u64, size: XattrSize, reply: &mut impl Reply) -> Answer {
        let file = match self.open_to_read(node) {
            Err(Errno::INVAL) => return put_sized(reply, size, &[]),
            file => file?,
        };
        self.buffer.resize(XATTR_MAX, 0);
        let len = rustix::fs::flistxattr(&*file, &mut self.buffer[..])?;
        put_sized(reply, size, self.buffer.get(..len).unwrap_or_default())
    }

    /// Nothing is free: nothing can be written.
    fn statfs(&self, reply: &mut impl Reply) -> Answer {
        let status = rustix::fs::fstatvfs(&self.store.root)?;
        let block_bytes = u32::try_from(status.f_bsize).unwrap_or(4096);
        let fragment_bytes = u32::try_from(status.f_frsize).unwrap_or(4096);
        put(
            reply,
            &StatfsReply {
                blocks: status.f_blocks,
                files: status.f_files,
                block_bytes,
                fragment_bytes,
                name_max: u32::try_from(NAME_MAX).unwrap_or_default(),
                ..StatfsReply::default()
            },
        )
    }

    fn open_to_read(&mut self, node: u64) -> Result<Arc<OwnedFd>, Errno> {
        let place: Place = self.store.nodes().place(node)?;
        self.files.open(self.store.root.as_fd(), &place, Purpose::Read)
    }

    fn list(
        &mut self,
        node: u64,
        request: ReadRequest,
        with_attributes: bool,
        reply: &mut impl Reply,
    ) -> Answer {
        let Self { store, files, listing, .. } = self;
        let room = reply.room() - size_of::<ReplyHeader>();
        put_bytes(reply, listing.list(store, files, node, request, with_attributes, room)?)
    }
}

fn parse<T: FromBytes>(body: &[u8]) -> Result<T, Errno> {
    T::read_from_prefix(body).map(|(value, _)| value).map_err(|_| Errno::INVAL)
}

/// The one name that a request has.
fn name(body: &[u8]) -> Result<&[u8], Errno> {
    let name = CStr::from_bytes_until_nul(body).map_err(|_| Errno::INVAL)?.to_bytes();
    match name {
        name if name.len() > NAME_MAX => Err(Errno::NAMETOOLONG),
        name if is_name(name) => Ok(name),
        _ => Err(Errno::INVAL),
    }
}

fn put(reply: &mut impl Reply, value: &(impl IntoBytes + Immutable)) -> Answer {
    put_bytes(reply, value.as_bytes())
}

fn put_bytes(reply: &mut impl Reply, bytes: &[u8]) -> Answer {
    let start = size_of::<ReplyHeader>();
    if bytes.len() > reply.room() - start {
        return Err(Errno::INVAL);
    }
    reply.put(start, bytes);
    Ok(Some(bytes.len()))
}

/// The bytes, or only how many they are where the guest has no room for them.
fn put_sized(reply: &mut impl Reply, size: XattrSize, bytes: &[u8]) -> Answer {
    let len = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
    match size.bytes {
        0 => put(reply, &XattrSize { bytes: len, padding: 0 }),
        room if room < len => Err(Errno::RANGE),
        _ => put_bytes(reply, bytes),
    }
}
