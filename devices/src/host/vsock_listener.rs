//! A port of the host in the kernel's vsock, for messages of a guest.
#![expect(unsafe_code, reason = "no safe interface knows vsock addresses")]

use std::io::{self, ErrorKind};
use std::mem::size_of;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

/// Connections that wait for their turn.
const BACKLOG: libc::c_int = 16;

/// A listening socket.
pub struct VsockListener {
    socket: OwnedFd,
    port: u32,
}

impl VsockListener {
    /// Listens on a port that the kernel chooses.
    pub fn new() -> io::Result<Self> {
        let kind = libc::SOCK_STREAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
        // SAFETY: no memory is involved.
        let descriptor = checked(unsafe { libc::socket(libc::AF_VSOCK, kind, 0) })?;
        // SAFETY: a new descriptor is nobody else's.
        let socket = unsafe { OwnedFd::from_raw_fd(descriptor) };
        let mut address = any_address();
        let mut len = address_len();
        // SAFETY: the address is one, and as long as it is said to be; so it is for the last call,
        // which writes it.
        unsafe {
            checked(libc::bind(descriptor, (&raw const address).cast(), len))?;
            checked(libc::listen(descriptor, BACKLOG))?;
            checked(libc::getsockname(descriptor, (&raw mut address).cast(), &raw mut len))?;
        }
        Ok(Self { socket, port: address.svm_port })
    }

    /// The port.
    pub fn port(&self) -> u32 {
        self.port
    }

    /// The next connection and the context id that it comes from; `None` when nobody waits.
    ///
    /// Not to be asked before poll(2) tells that somebody waits: where nobody does, Linux lets even
    /// a socket that does not block sleep until its next tick, which is up to 10 ms.
    ///
    /// The stream is a vsock's, not a unix socket's: reading and writing are the same.
    pub fn accept(&self) -> io::Result<Option<(UnixStream, u32)>> {
        let mut address = any_address();
        let mut len = address_len();
        let flags = libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
        // SAFETY: the kernel writes an address no longer than it is said to be.
        let accepted = unsafe {
            libc::accept4(self.socket.as_raw_fd(), (&raw mut address).cast(), &raw mut len, flags)
        };
        match checked(accepted) {
            Ok(descriptor) => {
                // SAFETY: a new descriptor is nobody else's.
                let socket = unsafe { OwnedFd::from_raw_fd(descriptor) };
                Ok(Some((socket.into(), address.svm_cid)))
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error),
        }
    }
}

impl AsRawFd for VsockListener {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

fn any_address() -> libc::sockaddr_vm {
    // SAFETY: all zeroes is an address.
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    address.svm_family = libc::sa_family_t::try_from(libc::AF_VSOCK).unwrap_or_default();
    address.svm_cid = libc::VMADDR_CID_ANY;
    address.svm_port = libc::VMADDR_PORT_ANY;
    address
}

fn address_len() -> libc::socklen_t {
    libc::socklen_t::try_from(size_of::<libc::sockaddr_vm>()).unwrap_or_default()
}

fn checked(returned: libc::c_int) -> io::Result<libc::c_int> {
    if returned < 0 { Err(io::Error::last_os_error()) } else { Ok(returned) }
}
