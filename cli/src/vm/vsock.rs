//! Connections through the host's kernel to a guest.
#![expect(unsafe_code, reason = "no safe interface knows vsock addresses")]

use std::io;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::os::unix::net::UnixStream;

/// Connects to a port of the guest with context id `cid`.
///
/// The stream is a vsock's, not a unix socket's: reading, writing and shutting down are the same.
pub(super) fn connect(cid: u32, port: u32) -> io::Result<UnixStream> {
    // SAFETY: no memory is involved.
    let descriptor =
        unsafe { libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0) };
    if descriptor < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a new descriptor is nobody else's.
    let socket = unsafe { OwnedFd::from_raw_fd(descriptor) };
    // SAFETY: all zeroes is an address.
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    address.svm_family = libc::sa_family_t::try_from(libc::AF_VSOCK).unwrap_or_default();
    address.svm_cid = cid;
    address.svm_port = port;
    let len = libc::socklen_t::try_from(size_of_val(&address)).unwrap_or_default();
    // SAFETY: the address is one, and as long as it is said to be.
    match unsafe { libc::connect(socket.as_raw_fd(), (&raw const address).cast(), len) } {
        0 => Ok(socket.into()),
        _ => Err(io::Error::last_os_error()),
    }
}
