//! Requests and replies as they are in memory (linux/fuse.h, protocol 7).

use bitflags::bitflags;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// The protocol that is spoken; its minor number is the newest whose meaning is known here.
pub(super) const MAJOR: u32 = 7;
pub(super) const MINOR: u32 = 38;

/// Virtio-fs came with Linux 5.4; what is older speaks to something else.
pub(super) const MINOR_MIN: u32 = 31;

/// The node that needs no lookup.
pub(super) const ROOT_ID: u64 = 1;

bitflags! {
    /// What a session is agreed on at its start.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub(super) struct Features: u64 {
        const ASYNC_READ = 1 << 0;
        const AUTO_INVAL_DATA = 1 << 12;
        const DO_READDIRPLUS = 1 << 13;
        const READDIRPLUS_AUTO = 1 << 14;
        const ASYNC_DIO = 1 << 15;
        const NO_OPEN_SUPPORT = 1 << 17;
        const PARALLEL_DIROPS = 1 << 18;
        const MAX_PAGES = 1 << 22;
        const CACHE_SYMLINKS = 1 << 23;
        const NO_OPENDIR_SUPPORT = 1 << 24;
        /// The request has the upper half of the features too.
        const INIT_EXT = 1 << 30;
        const NO_EXPORT_SUPPORT = 1 << 38;
    }
}

/// What a request wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Opcode {
    Lookup,
    Forget,
    Getattr,
    Readlink,
    Open,
    Read,
    Statfs,
    Getxattr,
    Listxattr,
    Init,
    Opendir,
    Readdir,
    Readdirplus,
    Destroy,
    BatchForget,
    Lseek,
    /// Nothing is kept that could be let go.
    Release,
    /// A change, of which there are none.
    Change,
    /// Needs no answer.
    Interrupt,
    Unknown,
}

impl From<u32> for Opcode {
    fn from(number: u32) -> Self {
        match number {
            1 => Self::Lookup,
            2 => Self::Forget,
            3 => Self::Getattr,
            5 => Self::Readlink,
            14 => Self::Open,
            15 => Self::Read,
            17 => Self::Statfs,
            22 => Self::Getxattr,
            23 => Self::Listxattr,
            26 => Self::Init,
            27 => Self::Opendir,
            28 => Self::Readdir,
            36 | 41 => Self::Interrupt,
            38 => Self::Destroy,
            42 => Self::BatchForget,
            44 => Self::Readdirplus,
            46 => Self::Lseek,
            // RELEASE, RELEASEDIR. What would be written back (FSYNC, FLUSH, FSYNCDIR, SYNCFS) is
            // unknown: a guest that is told so once never asks again, not even when it closes.
            18 | 29 => Self::Release,
            // SETATTR, SYMLINK, MKNOD, MKDIR, UNLINK, RMDIR, RENAME, LINK, WRITE, SETXATTR,
            // REMOVEXATTR, CREATE, FALLOCATE, RENAME2, COPY_FILE_RANGE, TMPFILE.
            4 | 6 | 8..=13 | 16 | 21 | 24 | 35 | 43 | 45 | 47 | 51 => Self::Change,
            _ => Self::Unknown,
        }
    }
}

/// In front of every request.
#[derive(Clone, Copy, Debug, FromBytes, Immutable, IntoBytes, KnownLayout)]
#[repr(C)]
pub(super) struct RequestHeader {
    pub(super) len: u32,
    pub(super) opcode: u32,
    pub(super) unique: u64,
    pub(super) node: u64,
    pub(super) user: u32,
    pub(super) group: u32,
    pub(super) process: u32,
    pub(super) extensions: u16,
    pub(super) padding: u16,
}

/// In front of every reply.
#[derive(Clone, Copy, Debug, FromBytes, Immutable, IntoBytes, KnownLayout)]
#[repr(C)]
pub(super) struct ReplyHeader {
    pub(super) len: u32,
    /// A negative error number, or 0.
    pub(super) error: i32,
    pub(super) unique: u64,
}

#[derive(Clone, Copy, Debug, Default, FromBytes, Immutable, IntoBytes, KnownLayout)]
#[repr(C)]
pub(super) struct InitRequest {
    pub(super) major: u32,
    pub(super) minor: u32,
    pub(super) readahead_max: u32,
    pub(super) features: u32,
}

#[derive(Clone, Copy, Debug, Default, FromBytes, Immutable, IntoBytes, KnownLayout)]
#[repr(C)]
pub(super) struct InitReply {
    pub(super) major: u32,
    pub(super) minor: u32,
    pub(super) readahead_max: u32,
    pub(super) features: u32,
    pub(super) background_max: u16,
    pub(super) congestion_threshold: u16,
    pub(super) write_max: u32,
    /// Nanoseconds.
    pub(super) time_granularity: u32,
    pub(super) pages_max: u16,
    pub(super) map_alignment: u16,
    pub(super) features_high: u32,
    pub(super) unused: [u32; 7],
}

#[derive(Clone, Copy, Debug, Default, FromBytes, Immutable, IntoBytes, KnownLayout)]
#[repr(C)]
pub(super) struct Attributes {
    pub(super) inode: u64,
    pub(super) bytes: u64,
    /// Of 512 bytes.
    pub(super) blocks: u64,
    pub(super) accessed: u64,
    pub(super) modified: u64,
    pub(super) changed: u64,
    pub(super) accessed_nanoseconds: u32,
    pub(super) modified_nanoseconds: u32,
    pub(super) changed_nanoseconds: u32,
    pub(super) mode: u32,
    pub(super) links: u32,
    pub(super) user: u32,
    pub(super) group: u32,
    pub(super) device: u32,
    pub(super) block_bytes: u32,
    pub(super) flags: u32,
}

#[derive(Clone, Copy, Debug, Default, FromBytes, Immutable, IntoBytes, KnownLayout)]
#[repr(C)]
pub(super) struct Entry {
    /// 0: there is no such name.
    pub(super) node: u64,
    pub(super) generation: u64,
    /// How long the name means this, in seconds.
    pub(super) name_valid: u64,
    pub(super) attributes_valid: u64,
    pub(super) name_valid_nanoseconds: u32,
    pub(super) attributes_valid_nanoseconds: u32,
    pub(super) attributes: Attributes,
}

#[derive(Clone, Copy, Debug, Default, FromBytes, Immutable, IntoBytes, KnownLayout)]
#[repr(C)]
pub(super) struct AttributesReply {
    pub(super) valid: u64,
    pub(super) valid_nanoseconds: u32,
    pub(super) unused: u32,
    pub(super) attributes: Attributes,
}

#[derive(Clone, Copy, Debug, FromBytes, Immutable, IntoBytes, KnownLayout)]
#[repr(C)]
pub(super) struct ForgetOne {
    pub(super) node: u64,
    pub(super) lookups: u64,
}

/// READ, READDIR and READDIRPLUS.
#[derive(Clone, Copy, Debug, Default, FromBytes, Immutable, IntoBytes, KnownLayout)]
#[repr(C)]
pub(super) struct ReadRequest {
    pub(super) handle: u64,
    pub(super) offset: u64,
    pub(super) bytes: u32,
    pub(super) read_flags: u32,
    pub(super) lock_owner: u64,
    pub(super) flags: u32,
    pub(super) padding: u32,
}

#[derive(Clone, Copy, Debug, Default, FromBytes, Immutable, IntoBytes, KnownLayout)]
#[repr(C)]
pub(super) struct OpenReply {
    pub(super) handle: u64,
    pub(super) flags: u32,
    pub(super) padding: u32,
}

/// GETXATTR and LISTXATTR, and what is answered when only the size is asked for.
#[derive(Clone, Copy, Debug, Default, FromBytes, Immutable, IntoBytes, KnownLayout)]
#[repr(C)]
pub(super) struct XattrSize {
    pub(super) bytes: u32,
    pub(super) padding: u32,
}

#[derive(Clone, Copy, Debug, Default, FromBytes, Immutable, IntoBytes, KnownLayout)]
#[repr(C)]
pub(super) struct SeekRequest {
    pub(super) handle: u64,
    pub(super) offset: u64,
    pub(super) whence: u32,
    pub(super) padding: u32,
}

#[derive(Clone, Copy, Debug, Default, FromBytes, Immutable, IntoBytes, KnownLayout)]
#[repr(C)]
pub(super) struct StatfsReply {
    pub(super) blocks: u64,
    pub(super) blocks_free: u64,
    pub(super) blocks_available: u64,
    pub(super) files: u64,
    pub(super) files_free: u64,
    pub(super) block_bytes: u32,
    pub(super) name_max: u32,
    pub(super) fragment_bytes: u32,
    pub(super) padding: u32,
    pub(super) spare: [u32; 6],
}

/// A name in a directory; the name follows, padded to [`DIRECTORY_ALIGNMENT`].
#[derive(Clone, Copy, Debug, FromBytes, Immutable, IntoBytes, KnownLayout)]
#[repr(C)]
pub(super) struct DirectoryEntry {
    pub(super) inode: u64,
    /// Where the next one is found.
    pub(super) next: u64,
    pub(super) name_bytes: u32,
    /// As the upper bits of a mode.
    pub(super) kind: u32,
}

pub(super) const DIRECTORY_ALIGNMENT: usize = 8;

/// The pages of files that were opened before stay good.
pub(super) const OPEN_KEEP_CACHE: u32 = 1 << 1;
/// Directories may be kept as well.
pub(super) const OPEN_CACHE_DIRECTORY: u32 = 1 << 3;

pub(super) const SEEK_DATA: u32 = 3;
pub(super) const SEEK_HOLE: u32 = 4;

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn structures_have_the_protocols_sizes() {
        for (size, expected) in [
            (size_of::<RequestHeader>(), 40),
            (size_of::<ReplyHeader>(), 16),
            (size_of::<InitRequest>(), 16),
            (size_of::<InitReply>(), 64),
            (size_of::<Attributes>(), 88),
            (size_of::<Entry>(), 128),
            (size_of::<AttributesReply>(), 104),
            (size_of::<ForgetOne>(), 16),
            (size_of::<ReadRequest>(), 40),
            (size_of::<OpenReply>(), 16),
            (size_of::<XattrSize>(), 8),
            (size_of::<SeekRequest>(), 24),
            (size_of::<StatfsReply>(), 80),
            (size_of::<DirectoryEntry>(), 24),
        ] {
            assert_eq!(size, expected);
        }
    }
}
