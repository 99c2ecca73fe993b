//! Kernels: which format a file has, and what every format says about itself.

mod bzimage;
mod elf;
pub mod unpack;

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use arch::memory::{GuestAddress, GuestMemory, GuestSlice};
use arch::target::layout::{HIGH_MEMORY, HOLE};
use linux_loader::bootparam::setup_header;

use crate::EntryProtocol;

/// Both formats say what they are in their first page; later parts are read where it tells.
const HEAD_LEN: usize = 4096;

/// A kernel in guest memory.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Kernel {
    pub(crate) protocol: Protocol,
    /// Address of the first instruction.
    pub(crate) instruction: u64,
    /// End of what the kernel overwrites before it reads its memory map.
    pub(crate) end: u64,
    /// Where the initrd must end, at the latest.
    pub(crate) initrd_end_max: u64,
    /// Bytes that the kernel takes as its command line, without the NUL.
    pub(crate) command_line_max: usize,
    /// What the Linux boot protocol returns to the kernel in the zero page.
    pub(crate) header: setup_header,
}

/// How a loaded kernel is entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Protocol {
    Linux64,
    Pvh,
}

/// A kernel file that cannot be loaded or entered.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file cannot be read, or became shorter meanwhile.
    #[error("cannot be read: {0}")]
    Io(#[from] io::Error),
    /// It is a directory, a pipe, a device…
    #[error("is not a regular file")]
    NotAFile,
    /// Neither magic number is there.
    #[error("is neither a bzImage nor an ELF file: give an x86_64 Linux kernel")]
    UnknownFormat,
    /// It is for another kind of processor.
    #[error("is a kernel for another processor ({0}): give one for x86_64")]
    WrongProcessor(&'static str),
    /// The file says that it is longer than it is.
    #[error("is truncated: {part} ends at byte {end}, the file at byte {file_len}")]
    Truncated {
        /// What is not there wholly.
        part: &'static str,
        /// Where it should end.
        end: u64,
        /// Where the file ends.
        file_len: u64,
    },
    /// A field has a value that no kernel has.
    #[error("is not a valid kernel: {0}")]
    Invalid(&'static str),
    /// The boot protocol is too old or lacks the 64-bit entry.
    #[error(
        "cannot be entered in 64-bit mode ({0}): build it with CONFIG_X86_64, version 3.8 or newer"
    )]
    No64BitEntry(&'static str),
    /// PVH was asked for, and the file has no PVH entry.
    #[error("has no PVH entry: use the Linux boot protocol, or a vmlinux built with CONFIG_PVH")]
    NoPvhEntry,
    /// PVH was asked for, and bzImages have no such entry.
    #[error(
        "is a bzImage, which cannot be entered by PVH: turn it into an ELF file with \
         `nixvmm unpack-kernel`, or use the Linux boot protocol"
    )]
    BzImageByPvh,
    /// The Linux boot protocol does not know where such an ELF starts.
    #[error("is an ELF file without an entry point among its loaded segments")]
    NoEntry,
    /// The kernel wants memory that the guest does not have.
    #[error(
        "needs memory from {start:#x} to {end:#x}, which the guest does not have: {}",
        remedy(*.end)
    )]
    NoRoom {
        /// First address.
        start: u64,
        /// Address after the last.
        end: u64,
    },
}

fn remedy(end: u64) -> String {
    if end <= HOLE.start {
        format!("give it at least {} MiB", end.div_ceil(1 << 20))
    } else {
        "no guest has RAM there".into()
    }
}

/// Recognises the kernel's format and reads it into memory.
pub(crate) fn load(
    memory: GuestMemory,
    file: &File,
    protocol: EntryProtocol,
) -> Result<Kernel, Error> {
    let image = Image::open(file)?;
    if image.head.starts_with(elf::MAGIC) {
        elf::load(memory, &image, protocol)
    } else if bzimage::is_bzimage(&image.head) {
        bzimage::load(memory, &image, protocol)
    } else if image.head.get(0x38..0x3C) == Some(b"ARM\x64".as_slice()) {
        Err(Error::WrongProcessor("arm64"))
    } else {
        Err(Error::UnknownFormat)
    }
}

/// A kernel file: its length, and its beginning already read.
struct Image<'a> {
    file: &'a File,
    len: u64,
    head: Vec<u8>,
}

impl<'a> Image<'a> {
    fn open(file: &'a File) -> Result<Self, Error> {
        let metadata = file.metadata()?;
        if !metadata.is_file() {
            return Err(Error::NotAFile);
        }
        let len = metadata.len();
        let mut head = vec![0; HEAD_LEN.min(usize::try_from(len).unwrap_or(HEAD_LEN))];
        file.read_exact_at(&mut head, 0)?;
        Ok(Self { file, len, head })
    }

    /// The bytes from `offset`, for headers and tables; segments go straight to guest memory.
    fn bytes(&self, offset: u64, len: usize, part: &'static str) -> Result<Vec<u8>, Error> {
        self.require(offset, len as u64, part)?;
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        if let Some(bytes) = self.head.get(start..start.saturating_add(len)) {
            return Ok(bytes.to_vec());
        }
        let mut bytes = vec![0; len];
        self.file.read_exact_at(&mut bytes, offset)?;
        Ok(bytes)
    }

    /// Checks that the file has `len` bytes from `offset`.
    fn require(&self, offset: u64, len: u64, part: &'static str) -> Result<(), Error> {
        let end = offset.saturating_add(len);
        if end > self.len {
            return Err(Error::Truncated { part, end, file_len: self.len });
        }
        Ok(())
    }

    /// Reads `len` bytes from `offset` to the start of `target`, which is at least as long.
    fn read_to(&self, target: GuestSlice, offset: u64, len: u64) -> Result<(), Error> {
        let part = usize::try_from(len).ok().and_then(|len| target.sub_slice(0, len));
        let part = part.ok_or(Error::Invalid("more bytes in the file than in memory"))?;
        Ok(part.read_file(self.file, offset)?)
    }
}

/// RAM for a kernel: above the first MiB, and below 4 GiB where the first page tables reach.
fn room(memory: GuestMemory, start: u64, len: u64) -> Result<GuestSlice, Error> {
    let end = start.saturating_add(len);
    let no_room = Error::NoRoom { start, end };
    if start < HIGH_MEMORY {
        return Err(Error::Invalid("it is to be loaded into the first MiB"));
    }
    if end > HOLE.start {
        return Err(no_room);
    }
    let len = usize::try_from(len).map_err(|_| Error::Invalid("it is too large"))?;
    memory.slice(GuestAddress(start), len).map_err(|_| no_room)
}
