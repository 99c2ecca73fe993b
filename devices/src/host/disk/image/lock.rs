//! Locks against a second guest on the same image.
#![expect(unsafe_code, reason = "locks of an open file have no safe interface")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Locks the whole file, for readers together or for one writer; `false` when somebody else has it.
///
/// The lock belongs to the open file and not to the process: it goes when the file is closed, and
/// it keeps out a second opening by the same process too.
///
/// # Errors
///
/// What the kernel says, such as that the file system has no locks.
pub fn try_lock(file: BorrowedFd<'_>, shared: bool) -> io::Result<bool> {
    let kind = if shared { libc::F_RDLCK } else { libc::F_WRLCK };
    let request = libc::flock {
        l_type: i16::try_from(kind).map_err(io::Error::other)?,
        l_whence: i16::try_from(libc::SEEK_SET).map_err(io::Error::other)?,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    // SAFETY: the request outlives the call, which only reads it.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const request) } == 0 {
        return Ok(true);
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::EAGAIN | libc::EACCES) => Ok(false),
        _ => Err(error),
    }
}
