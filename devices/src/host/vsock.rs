//! What stands behind a socket device: unix sockets in place of the host's vsock ports.
//!
//! Programs on the host reach a port of the guest by connecting to the gate's path and saying
//! `CONNECT port`; the guest reaches port N of the host where somebody listens at `PATH_N`.
#![expect(unsafe_code, reason = "the kernel reads and writes guest memory through raw iovecs")]

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, channel};

use arch::memory::GuestSlice;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, Shutdown, SocketAddrUnix, SocketFlags, SocketType,
};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::listener::Listener;
use crate::event::Event;

/// Vectors of one call: a packet has one or two and a read fills a few; whatever they are split
/// into, the rest follows.
const VECTORS_MAX: usize = 64;

/// The token under which `Gate::wait` reports that a program wants to be let in.
pub const ARRIVAL: u64 = u64::MAX;

/// The way between programs of the host and the guest.
///
/// It has an epoll instance of its own, so that whoever passes can be watched from anywhere.
pub struct Gate {
    epoll: Epoll,
    listener: Option<(Listener, PathBuf)>,
    local: Option<LocalPort>,
}

/// A port of the host that is served in this process.
struct LocalPort {
    port: u32,
    visitors: Sender<UnixStream>,
    arrived: Event,
}

/// The guest's connections to a port that is served in this process.
pub struct Visitors {
    visitors: Receiver<UnixStream>,
    arrived: Event,
}

/// Which files are ready, and for what.
pub type Ready = (u64, EventSet);

impl Gate {
    /// A gate that nobody passes, but for visitors of a local port.
    pub fn closed() -> io::Result<Self> {
        Ok(Self { epoll: Epoll::new()?, listener: None, local: None })
    }

    /// A gate at `path`: a socket that nobody listens on any more is replaced.
    pub fn at(path: &Path) -> io::Result<Self> {
        let listener = Listener::bind(path, None)?;
        let mut gate = Self::closed()?;
        // By edges: a program that cannot be let in must not keep the loop awake.
        let event = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, ARRIVAL);
        gate.epoll.ctl(ControlOperation::Add, listener.as_raw_fd(), event)?;
        gate.listener = Some((listener, path.into()));
        Ok(gate)
    }

    /// Serves `port` of the host in this process: whoever holds the result.
    pub fn serve_locally(&mut self, port: u32) -> io::Result<Visitors> {
        let (sender, visitors) = channel();
        let arrived = Event::new()?;
        self.local = Some(LocalPort { port, visitors: sender, arrived: arrived.clone() });
        Ok(Visitors { visitors, arrived })
    }

    /// Lets the next program of the host in; `None` when nobody waits.
    pub fn accept(&self) -> io::Result<Option<Peer>> {
        let Some((listener, _)) = &self.listener else { return Ok(None) };
        let Some(stream) = listener.accept()? else { return Ok(None) };
        stream.set_nonblocking(true)?;
        Ok(Some(Peer(stream.into())))
    }

    /// Connects to whoever serves `port` of the host.
    pub fn connect(&self, port: u32) -> io::Result<Peer> {
        if let Some(local) = self.local.as_ref().filter(|local| local.port == port) {
            let (ours, theirs) = UnixStream::pair()?;
            ours.set_nonblocking(true)?;
            theirs.set_nonblocking(true)?;
            local.visitors.send(theirs).map_err(io::Error::other)?;
            local.arrived.signal();
            return Ok(Peer(ours.into()));
        }
        let (_, path) = self.listener.as_ref().ok_or(io::ErrorKind::ConnectionRefused)?;
        let mut name = OsString::from(path);
        name.push(format!("_{port}"));
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket =
            rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        rustix::net::connect(&socket, &SocketAddrUnix::new(&*name)?)?;
        Ok(Peer(socket))
    }

    /// Watches a peer for every change of what it can do.
    pub fn watch(&self, peer: &Peer, token: u64) -> io::Result<()> {
        let interest =
            EventSet::IN | EventSet::OUT | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
        let event = EpollEvent::new(interest, token);
        self.epoll.ctl(ControlOperation::Add, peer.0.as_raw_fd(), event)
    }

    /// What is ready now, as much as has room in `ready`.
    pub fn ready<'a>(&self, ready: &'a mut [EpollEvent]) -> impl Iterator<Item = Ready> + use<'a> {
        let count = self.epoll.wait(0, ready).unwrap_or(0);
        let ready = ready.get(..count).unwrap_or_default();
        ready.iter().map(|event| (event.data(), event.event_set()))
    }
}

impl AsRawFd for Gate {
    fn as_raw_fd(&self) -> RawFd {
        self.epoll.as_raw_fd()
    }
}

impl Visitors {
    /// Signalled when there is a visitor.
    pub fn arrived(&self) -> &Event {
        &self.arrived
    }

    /// The next visitor, whose stream does not block.
    pub fn next(&self) -> Option<UnixStream> {
        self.visitors.try_recv().ok()
    }
}

/// A program of the host.
#[derive(Debug)]
pub struct Peer(OwnedFd);

impl Peer {
    /// The socket alone.
    pub fn into_descriptor(self) -> OwnedFd {
        self.0
    }

    /// Takes the rest of a line, up to `max` bytes of it, and nothing behind it.
    ///
    /// `line` keeps what has come; the result is whether it is complete.
    pub fn read_line(&self, line: &mut Vec<u8>, max: usize) -> io::Result<bool> {
        let mut bytes = vec![0; max.saturating_sub(line.len())];
        let (seen, _) = rustix::net::recv(&self.0, &mut bytes[..], RecvFlags::PEEK)?;
        let ahead = bytes.get(..seen).unwrap_or_default();
        let end = ahead.iter().position(|byte| *byte == b'\n');
        let count = end.map_or(seen, |end| end + 1);
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let (taken, _) = rustix::net::recv(
            &self.0,
            bytes.get_mut(..count).unwrap_or_default(),
            RecvFlags::empty(),
        )?;
        line.extend_from_slice(bytes.get(..taken).unwrap_or_default());
        Ok(end.is_some())
    }

    /// Reads into guest memory; zero is the end of what the program says.
    pub fn receive(&self, slices: &[GuestSlice]) -> io::Result<usize> {
        let (vectors, count) = vectors(slices);
        // SAFETY: the vectors are guest memory, which stays mapped and holds no Rust object.
        let moved = unsafe { libc::readv(self.0.as_raw_fd(), vectors.as_ptr(), count) };
        usize::try_from(moved).map_err(|_| io::Error::last_os_error())
    }

    /// Writes from guest memory and returns how much was taken.
    pub fn send(&self, slices: &[GuestSlice]) -> io::Result<usize> {
        let (vectors, count) = vectors(slices);
        // SAFETY: as in `receive`.
        let moved = unsafe { libc::writev(self.0.as_raw_fd(), vectors.as_ptr(), count) };
        usize::try_from(moved).map_err(|_| io::Error::last_os_error())
    }

    /// Writes bytes of ours and returns how many were taken.
    pub fn send_bytes(&self, bytes: &[u8]) -> io::Result<usize> {
        Ok(rustix::net::send(&self.0, bytes, SendFlags::NOSIGNAL)?)
    }

    /// Tells the program that it will be sent no more.
    pub fn end_sending(&self) {
        // A program that is gone needs not be told.
        let _ = rustix::net::shutdown(self.0.as_fd(), Shutdown::Write);
    }

    /// Tells the program that nobody reads what it says.
    pub fn end_receiving(&self) {
        let _ = rustix::net::shutdown(self.0.as_fd(), Shutdown::Read);
    }
}

fn vectors(slices: &[GuestSlice]) -> ([libc::iovec; VECTORS_MAX], libc::c_int) {
    let mut vectors = [libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 }; VECTORS_MAX];
    let mut count = 0;
    for (vector, slice) in vectors.iter_mut().zip(slices) {
        *vector = libc::iovec { iov_base: slice.as_ptr().cast(), iov_len: slice.len() };
        count += 1;
    }
    (vectors, count)
}
