//! Sockets of AF_VSOCK, which the standard library does not know. A connection is taken for a unix
//! socket: reading, writing and half closes are the same for every kind.
#![expect(unsafe_code, reason = "no safe interface knows vsock addresses")]

use std::io;
use std::mem::size_of;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;

/// The host, as guests call it.
pub const HOST: u32 = libc::VMADDR_CID_HOST;

/// Connections that wait to be accepted.
const BACKLOG: libc::c_int = 128;

/// A port that is listened on.
pub struct Listener(OwnedFd);

impl Listener {
    /// Listens on `port`, for whoever connects to it.
    ///
    /// # Errors
    /// When the kernel has no vsock or somebody has the port.
    pub fn bind(port: u32) -> io::Result<Self> {
        let socket = socket()?;
        let address = address(libc::VMADDR_CID_ANY, port);
        // SAFETY: the address is one, and as long as it is said to be.
        check(unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), ADDRESS_LEN) })?;
        // SAFETY: the socket is open.
        check(unsafe { libc::listen(socket.as_raw_fd(), BACKLOG) })?;
        Ok(Self(socket))
    }

    /// Waits for a connection.
    ///
    /// # Errors
    /// When the kernel cannot make one.
    pub fn accept(&self) -> io::Result<UnixStream> {
        // SAFETY: nothing is to be written about the other end.
        let accepted =
            unsafe { libc::accept(self.0.as_raw_fd(), std::ptr::null_mut(), std::ptr::null_mut()) };
        // SAFETY: a new descriptor is nobody else's.
        let connection = unsafe { OwnedFd::from_raw_fd(check(accepted)?) };
        Ok(UnixStream::from(connection))
    }
}

/// Connects to a port of the machine that has the context id `cid`.
///
/// # Errors
/// When nobody listens there.
pub fn connect(cid: u32, port: u32) -> io::Result<UnixStream> {
    let socket = socket()?;
    let address = address(cid, port);
    // SAFETY: the address is one, and as long as it is said to be.
    check(unsafe { libc::connect(socket.as_raw_fd(), (&raw const address).cast(), ADDRESS_LEN) })?;
    Ok(UnixStream::from(socket))
}

/// Bytes of an address, as a constant that the compiler compares with the type.
const ADDRESS_LEN: libc::socklen_t = 16;
const _: () = assert!(size_of::<libc::sockaddr_vm>() == 16);

fn address(cid: u32, port: u32) -> libc::sockaddr_vm {
    // SAFETY: all zeroes is an address.
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    address.svm_family = libc::sa_family_t::try_from(libc::AF_VSOCK).unwrap_or_default();
    address.svm_cid = cid;
    address.svm_port = port;
    address
}

fn socket() -> io::Result<OwnedFd> {
    let kind = libc::SOCK_STREAM | libc::SOCK_CLOEXEC;
    // SAFETY: a new descriptor is nobody else's.
    unsafe { Ok(OwnedFd::from_raw_fd(check(libc::socket(libc::AF_VSOCK, kind, 0))?)) }
}

fn check(returned: libc::c_int) -> io::Result<libc::c_int> {
    if returned < 0 { Err(io::Error::last_os_error()) } else { Ok(returned) }
}
