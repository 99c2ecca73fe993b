//! Another file in the place of an image's.
#![expect(unsafe_code, reason = "a descriptor that threads use is exchanged under them")]

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd};

use rustix::fs::OFlags;

use super::{Image, blocks_of, kind_of, lock, set_direct};

impl Image {
    /// Serves `file` from now on. What was written to the file so far is safe on its storage, and
    /// it is unlocked; a request that is on its way goes to the one file or to the other.
    ///
    /// An error is one of `file`, which must be of the same kind and have the same blocks, or of
    /// what was not yet written; nothing has changed then.
    pub fn exchange(&self, file: &File) -> io::Result<()> {
        self.check_successor(file)?;
        self.flush()?;
        let (new, old) = (file.as_raw_fd(), self.file.as_raw_fd());
        // SAFETY: both are open; the old number stays ours and open, which is all that the owner of
        // it relies on, and the lock goes with the file behind the new one.
        if unsafe { libc::dup3(new, old, libc::O_CLOEXEC) } < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    fn check_successor(&self, file: &File) -> io::Result<()> {
        let refuse = |text: &str| Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        let mode = rustix::fs::fcntl_getfl(file)?.intersection(OFlags::RWMODE);
        let read_only = self.access.read_only;
        let fits = mode == OFlags::RDWR || mode == OFlags::RDONLY && read_only;
        if mode.contains(OFlags::PATH) || !fits {
            return refuse("the new image is not open for what this disk does");
        }
        if kind_of(file)? != Some(self.kind) {
            return refuse("a file takes the place of a file, a block device of a block device");
        }
        if !lock::try_lock(file.as_fd(), read_only)? {
            return refuse("the new image is in use, probably by another guest");
        }
        set_direct(file, self.access.direct)?;
        let blocks = blocks_of(file, self.kind, self.access.direct)?;
        if blocks != self.blocks {
            return refuse("the new image has other block sizes");
        }
        let size = rustix::fs::seek(file, rustix::fs::SeekFrom::End(0))?;
        if size == 0 || !size.is_multiple_of(u64::from(blocks.logical_bytes)) {
            return refuse("the new image is empty or ends within a block");
        }
        Ok(())
    }
}
