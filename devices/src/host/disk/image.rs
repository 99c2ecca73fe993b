//! Disk images: raw files and block devices, opened, checked and locked.
//!
//! An image is served as the bytes it holds. No format is ever guessed: a guest that may write its
//! first sector could otherwise choose what the host takes it for.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, OFlags, SeekFrom, StatxFlags};

mod content;
mod exchange;
pub mod lock;
#[cfg(test)]
mod test;

/// Unit of a disk's size and of its addresses (virtio 1.3, section 5.2.4).
pub const SECTOR_BYTES: u64 = 512;

/// What the page cache reads and writes at least; a partial page costs a read.
pub(super) const PAGE_BYTES: u32 = 4096;

/// How an image is opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Access {
    /// It is only read. Other readers may have it open too.
    pub read_only: bool,
    /// The host's page cache is bypassed (`O_DIRECT`).
    pub direct: bool,
}

/// Why an image cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The file cannot be opened at all.
    #[error("cannot open disk image {path}{remedy}", path = .path.display())]
    Open {
        /// The image.
        path: PathBuf,
        /// What may help, or nothing.
        remedy: &'static str,
        /// What the kernel says.
        source: io::Error,
    },
    /// It is a folder, a pipe, a socket or a character device.
    #[error("disk image {path} is neither a regular file nor a block device", path = .0.display())]
    Kind(PathBuf),
    /// It has no bytes.
    #[error("disk image {} is empty; give it a size with truncate --size=4G", .0.display())]
    Empty(PathBuf),
    /// Its end is within a block.
    #[error(
        "disk image {path} has {size} bytes, which is no multiple of {block}; \
         round it up: truncate --size=%{block} {path}",
        path = .path.display()
    )]
    Size {
        /// The image.
        path: PathBuf,
        /// Its size in bytes.
        size: u64,
        /// The block size in bytes.
        block: u32,
    },
    /// Somebody else has it open in a way that does not go together with ours.
    #[error(
        "disk image {path} is in use, probably by another guest: stop that one, \
         or open the image read-only in all of them (readonly)",
        path = .0.display()
    )]
    Locked(PathBuf),
    /// Its file system knows no `O_DIRECT`.
    #[error("disk image {} cannot bypass the page cache: leave `direct` out", .path.display())]
    Direct {
        /// The image.
        path: PathBuf,
        /// What the kernel says.
        source: io::Error,
    },
    /// A question about the open file failed.
    #[error("cannot examine disk image {path}", path = .path.display())]
    Examine {
        /// The image.
        path: PathBuf,
        /// What the kernel says.
        source: io::Error,
    },
}

/// An open image. It stays locked until it is dropped.
#[derive(Debug)]
pub struct Image {
    file: File,
    kind: Kind,
    access: Access,
    blocks: Blocks,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    RegularFile,
    BlockDevice,
}

/// Sizes that requests should keep to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Blocks {
    /// Smallest unit of a request in bytes, a power of two, at least a sector.
    pub logical_bytes: u32,
    /// Smallest unit that costs no read before a write, a power of two, at least as large.
    pub physical_bytes: u32,
    /// Alignment of memory in bytes; 1 where it does not matter.
    pub memory_alignment: u32,
}

impl Image {
    /// Opens, checks and locks the raw image or block device at `path`.
    pub fn open(path: &Path, access: Access) -> Result<Self, ImageError> {
        let examine = |source| ImageError::Examine { path: path.to_owned(), source };
        let file = open_file(path, access)?;
        let kind = kind_of(&file).map_err(examine)?.ok_or_else(|| ImageError::Kind(path.into()))?;
        match lock::try_lock(file.as_fd(), access.read_only) {
            Ok(true) => {}
            Ok(false) => return Err(ImageError::Locked(path.to_owned())),
            Err(error) => {
                log::warn!("disk image {} cannot be locked: {error}", path.display());
            }
        }
        warn_of_formats(&file, path).map_err(examine)?;
        set_direct(&file, access.direct)
            .map_err(|source| ImageError::Direct { path: path.to_owned(), source })?;
        let blocks = blocks_of(&file, kind, access.direct).map_err(examine)?;
        let image = Self { file, kind, access, blocks };
        image.check_size(path, image.size_bytes().map_err(examine)?)?;
        Ok(image)
    }

    /// Size in bytes, as it is now.
    pub fn size_bytes(&self) -> io::Result<u64> {
        Ok(rustix::fs::seek(&self.file, SeekFrom::End(0))?)
    }

    /// Makes the image larger, up to `size` bytes; the new bytes are zeros.
    pub fn grow(&self, size: u64) -> io::Result<()> {
        let refuse = |text: String| Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        let (now, block) = (self.size_bytes()?, u64::from(self.blocks.logical_bytes));
        match self.kind {
            _ if self.access.read_only => refuse("it is only read".to_owned()),
            Kind::BlockDevice => refuse("a block device is resized where it is made".to_owned()),
            Kind::RegularFile if size < now => {
                refuse(format!("it has {now} bytes, and a disk cannot shrink"))
            }
            Kind::RegularFile if !size.is_multiple_of(block) => {
                refuse(format!("{size} bytes are no multiple of {block}"))
            }
            Kind::RegularFile => Ok(rustix::fs::ftruncate(&self.file, size)?),
        }
    }

    /// Says whether the image may only be read.
    pub fn is_read_only(&self) -> bool {
        self.access.read_only
    }

    /// Says whether the page cache is bypassed.
    pub fn is_direct(&self) -> bool {
        self.access.direct
    }

    /// Sizes that requests should keep to.
    pub fn blocks(&self) -> Blocks {
        self.blocks
    }

    pub(super) fn is_regular_file(&self) -> bool {
        self.kind == Kind::RegularFile
    }

    fn check_size(&self, path: &Path, size: u64) -> Result<(), ImageError> {
        let block = self.blocks.logical_bytes;
        if size == 0 {
            Err(ImageError::Empty(path.to_owned()))
        } else if size.is_multiple_of(u64::from(block)) {
            Ok(())
        } else {
            Err(ImageError::Size { path: path.to_owned(), size, block })
        }
    }
}

impl AsFd for Image {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// A read-only file system that a guest can have as its root.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileSystem {
    /// erofs.
    Erofs,
    /// squashfs.
    Squashfs,
}

impl FileSystem {
    /// Recognises a file system by its magic number; `None` for any other content.
    pub fn recognise(file: &File) -> io::Result<Option<Self>> {
        const EROFS_OFFSET: u64 = 1024;
        const EROFS_MAGIC: [u8; 4] = 0xe0f5_e1e2_u32.to_le_bytes();
        let mut magic = [0; 4];
        if read_some(file, 0, &mut magic)? == magic.len() && &magic == b"hsqs" {
            return Ok(Some(Self::Squashfs));
        }
        let found = read_some(file, EROFS_OFFSET, &mut magic)? == magic.len();
        Ok((found && magic == EROFS_MAGIC).then_some(Self::Erofs))
    }

    /// The name by which Linux mounts it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Erofs => "erofs",
            Self::Squashfs => "squashfs",
        }
    }
}

fn open_file(path: &Path, access: Access) -> Result<File, ImageError> {
    let non_blocking = i32::try_from(OFlags::NONBLOCK.bits()).unwrap_or(0);
    // A pipe in place of an image must be refused and not be waited for.
    let opened = OpenOptions::new()
        .read(true)
        .write(!access.read_only)
        .custom_flags(non_blocking)
        .open(path);
    opened.map_err(|source| {
        use io::ErrorKind::{IsADirectory, NotFound, PermissionDenied, ReadOnlyFilesystem};
        let remedy = match source.kind() {
            IsADirectory => return ImageError::Kind(path.to_owned()),
            PermissionDenied | ReadOnlyFilesystem if !access.read_only => {
                " for writing; `readonly` would only read it"
            }
            NotFound if !access.read_only => "; a new one is made by truncate --size=4G",
            _ => "",
        };
        ImageError::Open { path: path.to_owned(), remedy, source }
    })
}

fn kind_of(file: &File) -> io::Result<Option<Kind>> {
    let file_type = file.metadata()?.file_type();
    Ok(if file_type.is_file() {
        Some(Kind::RegularFile)
    } else if file_type.is_block_device() {
        Some(Kind::BlockDevice)
    } else {
        None
    })
}

/// Leaves non-blocking mode, in which io_uring would refuse to wait, for what I/O needs.
fn set_direct(file: &File, direct: bool) -> io::Result<()> {
    let flags = if direct { OFlags::DIRECT } else { OFlags::empty() };
    Ok(rustix::fs::fcntl_setfl(file, flags)?)
}

fn blocks_of(file: &File, kind: Kind, direct: bool) -> io::Result<Blocks> {
    let sector = 512;
    let (logical, physical) = match kind {
        Kind::RegularFile => (sector, PAGE_BYTES),
        Kind::BlockDevice => {
            (rustix::fs::ioctl_blksszget(file)?, rustix::fs::ioctl_blkpbszget(file)?)
        }
    };
    let (memory, offset) = if direct { direct_alignment(file, logical)? } else { (1, sector) };
    let logical_bytes = logical.max(offset).max(sector);
    Ok(Blocks {
        logical_bytes,
        physical_bytes: physical.max(logical_bytes),
        memory_alignment: memory,
    })
}

/// What `O_DIRECT` demands of memory and of offsets, in bytes.
fn direct_alignment(file: &File, logical: u32) -> io::Result<(u32, u32)> {
    const DIRECT_ALIGNMENT: StatxFlags = StatxFlags::from_bits_retain(0x2000);
    let facts = rustix::fs::statx(file, "", AtFlags::EMPTY_PATH, DIRECT_ALIGNMENT)?;
    let known = facts.stx_mask & DIRECT_ALIGNMENT.bits() != 0 && facts.stx_dio_offset_align != 0;
    // Linux before 6.1 does not tell; a block of the disk has always been enough.
    Ok(if known {
        (facts.stx_dio_mem_align, facts.stx_dio_offset_align)
    } else {
        (logical, logical)
    })
}

fn warn_of_formats(file: &File, path: &Path) -> io::Result<()> {
    let formats: [(&[u8], &str); 4] =
        [(b"QFI\xfb", "qcow2"), (b"KDMV", "vmdk"), (b"vhdxfile", "vhdx"), (b"conectix", "vhd")];
    let mut start = [0; 8];
    let count = read_some(file, 0, &mut start)?;
    let start = start.get(..count).unwrap_or_default();
    if let Some((_, format)) = formats.iter().find(|(magic, _)| start.starts_with(magic)) {
        log::warn!(
            "disk image {} looks like {format} and is served as the raw bytes it holds; \
             if its content is meant: qemu-img convert -O raw",
            path.display()
        );
    }
    Ok(())
}

fn read_some(file: &File, offset: u64, target: &mut [u8]) -> io::Result<usize> {
    let mut done = 0;
    while let Some(rest) = target.get_mut(done..).filter(|rest| !rest.is_empty()) {
        match file.read_at(rest, offset + done as u64) {
            Ok(0) => break,
            Ok(count) => done += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(done)
}
