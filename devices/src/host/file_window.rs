//! A file as memory for a guest to look into.
//!
//! Its pages are those of the host's page cache, so that guests with the same file share them. Only
//! the guest touches the memory, through KVM: when somebody truncates the file, KVM finds no page,
//! the guest ends, and no thread of ours meets the signal that it would get.
#![expect(unsafe_code, reason = "maps a file that the guest shares")]

use std::io;
use std::os::fd::AsFd;
use std::path::Path;
use std::ptr::{self, NonNull};

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, mmap_anonymous};

use super::disk::image::{Access, Image, ImageError};

/// Windows start and end at multiples of this: what a guest's page table maps with one entry, and
/// the least that Linux takes as device memory.
pub const ALIGNMENT: u64 = 2 << 20;

const PAGE_BYTES: u64 = 4096;

/// Why a file cannot be a window.
#[derive(Debug, thiserror::Error)]
pub enum FileWindowError {
    /// It cannot be opened, or not so.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// It is written to and would end within a window.
    #[error(
        "has {0} bytes, and what the guest writes behind its end up to the next {ALIGNMENT} would \
         be lost: round it up with truncate --size=%2M, or give it readonly"
    )]
    Size(u64),
    /// The kernel does not map it.
    #[error("cannot be mapped")]
    Map(#[from] io::Error),
}

/// A mapped file. The mapping is never taken away: the guest may look at any time.
#[derive(Debug)]
pub struct FileWindow {
    image: Image,
    pointer: NonNull<u8>,
    len: u64,
}

// SAFETY: nobody accesses the memory through the pointer.
unsafe impl Send for FileWindow {}
// SAFETY: as above.
unsafe impl Sync for FileWindow {}

impl FileWindow {
    /// Opens, locks and maps the file at `path`; zeros follow it up to the next [`ALIGNMENT`].
    pub fn open(path: &Path, read_only: bool) -> Result<Self, FileWindowError> {
        let image = Image::open(path, Access { read_only, direct: false })?;
        let size = image.size_bytes().map_err(FileWindowError::Map)?;
        if !read_only && !size.is_multiple_of(ALIGNMENT) {
            return Err(FileWindowError::Size(size));
        }
        let len = size.checked_next_multiple_of(ALIGNMENT).ok_or(io::ErrorKind::FileTooLarge);
        let len = len.map_err(|kind| FileWindowError::Map(kind.into()))?;
        let pointer = map(&image, size, len)?;
        Ok(Self { image, pointer, len })
    }

    /// Length in bytes, a multiple of [`ALIGNMENT`].
    #[expect(clippy::len_without_is_empty, reason = "none is empty")]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Where the host has it, a multiple of [`ALIGNMENT`]: for KVM.
    pub fn host_address(&self) -> u64 {
        self.pointer.as_ptr().expose_provenance() as u64
    }

    /// Says whether the guest may only read.
    pub fn is_read_only(&self) -> bool {
        self.image.is_read_only()
    }

    /// Makes durable what the guest has written.
    pub fn flush(&self) -> io::Result<()> {
        if !self.is_read_only() {
            rustix::fs::fdatasync(&self.image)?;
        }
        Ok(())
    }
}

/// Maps `size` bytes of `image` at a multiple of [`ALIGNMENT`], with zeros up to `len` bytes.
fn map(image: &Image, size: u64, len: u64) -> io::Result<NonNull<u8>> {
    let too_large = |_| io::Error::from(io::ErrorKind::FileTooLarge);
    let alignment = usize::try_from(ALIGNMENT).map_err(too_large)?;
    let mapped = size.checked_next_multiple_of(PAGE_BYTES).ok_or(io::ErrorKind::FileTooLarge)?;
    let mapped = usize::try_from(mapped).map_err(too_large)?;
    let len = usize::try_from(len).map_err(too_large)?;
    let reserved = len.checked_add(alignment).ok_or(io::ErrorKind::FileTooLarge)?;
    let protection =
        if image.is_read_only() { ProtFlags::READ } else { ProtFlags::READ | ProtFlags::WRITE };
    // SAFETY: new memory at an address of the kernel's choice. It is all zeros, costs nothing, and
    // its ends beyond the window stay unused.
    let start = unsafe {
        mmap_anonymous(
            ptr::null_mut(),
            reserved,
            ProtFlags::READ,
            MapFlags::PRIVATE | MapFlags::NORESERVE,
        )?
    };
    let start: *mut u8 = start.cast();
    // SAFETY: the padding is less than the alignment, by which the reservation exceeds `len`.
    let target = unsafe { start.add(start.align_offset(alignment)) };
    let flags = MapFlags::SHARED | MapFlags::FIXED;
    // SAFETY: FIXED replaces a part of the reservation, which is not less than `mapped`.
    let pointer = unsafe { mmap(target.cast(), mapped, protection, flags, image.as_fd(), 0)? };
    for advice in [Advice::LinuxDontDump, Advice::LinuxDontFork] {
        // SAFETY: a mapping of ours; these advices do not change its content.
        let _ = unsafe { madvise(pointer, mapped, advice) };
    }
    NonNull::new(pointer.cast()).ok_or_else(|| io::ErrorKind::OutOfMemory.into())
}

#[cfg(test)]
mod test {
    use std::fs;

    use tempfile::NamedTempFile;

    use super::*;

    fn file_of(len: usize) -> NamedTempFile {
        let file = NamedTempFile::new().unwrap();
        fs::write(file.path(), vec![7; len]).unwrap();
        file
    }

    fn byte(window: &FileWindow, offset: usize) -> u8 {
        // SAFETY: the tests look into the window.
        unsafe { window.pointer.as_ptr().add(offset).read_volatile() }
    }

    #[test]
    fn a_file_is_mapped_at_a_huge_page_with_zeros_behind_it() {
        for len in [512, 4096, (2 << 20) - 512, 2 << 20, (2 << 20) + 4096 + 512] {
            let file = file_of(len);
            let window = FileWindow::open(file.path(), true).unwrap();
            assert!(window.host_address().is_multiple_of(ALIGNMENT));
            assert_eq!(window.len(), (len as u64).next_multiple_of(ALIGNMENT));
            assert_eq!((byte(&window, 0), byte(&window, len - 1)), (7, 7));
            let end = usize::try_from(window.len()).unwrap();
            assert!((len..end).step_by(512).all(|offset| byte(&window, offset) == 0), "{len}");
            window.flush().unwrap();
        }
    }

    #[test]
    fn what_is_written_is_in_the_file() {
        let file = file_of(2 << 20);
        let window = FileWindow::open(file.path(), false).unwrap();
        // SAFETY: the window is as long as its file.
        unsafe { window.pointer.as_ptr().add(4097).write_volatile(9) };
        window.flush().unwrap();
        let content = fs::read(file.path()).unwrap();
        assert_eq!((content[4096], content[4097], content[4098]), (7, 9, 7));
    }

    #[test]
    fn a_written_file_has_whole_windows_or_is_refused_with_the_remedy() {
        let file = file_of(4096);
        let error = FileWindow::open(file.path(), false).unwrap_err().to_string();
        assert!(error.contains("4096 bytes") && error.contains("truncate --size=%2M"), "{error}");
    }

    #[test]
    fn a_file_is_written_by_one_and_read_by_many() {
        let file = file_of(2 << 20);
        let readers =
            [true, true].map(|read_only| FileWindow::open(file.path(), read_only).unwrap());
        let error = FileWindow::open(file.path(), false).unwrap_err().to_string();
        assert!(error.contains("in use"), "{error}");
        // A mapping keeps its lock, and windows stay mapped.
        drop(readers);
        assert!(FileWindow::open(file.path(), false).is_err());
    }
}
