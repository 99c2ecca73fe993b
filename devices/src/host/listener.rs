//! Unix sockets that listen: made here, or inherited from a service manager.
#![expect(unsafe_code, reason = "inherited descriptors come as numbers")]

use std::env;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd as _, OwnedFd, RawFd};
use std::os::unix::fs::FileTypeExt as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::Mode;
use rustix::io::{Errno, FdFlags};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, sockopt};

/// Clients that wait to be let in; the kernel refuses further ones.
const BACKLOG: i32 = 128;

/// The first descriptor that a service manager passes (sd_listen_fds(3)).
const FIRST_INHERITED: RawFd = 3;

/// A listening socket that never lets its owner wait.
#[derive(Debug)]
pub struct Listener {
    socket: UnixListener,
    /// The name to take away at the end; an inherited socket's is its maker's.
    path: Option<PathBuf>,
}

impl Listener {
    /// Listens at `path` for whom `mode` lets connect, or else the process's umask.
    ///
    /// A socket that nobody listens on any more is replaced; one that somebody listens on is an
    /// error. The name is taken away when the listener is dropped.
    pub fn bind(path: &Path, mode: Option<Mode>) -> io::Result<Self> {
        remove_stale(path)?;
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket =
            rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
        // Nobody can connect before it listens, so there is no moment with other permissions.
        if let Some(mode) = mode {
            rustix::fs::chmod(path, mode)?;
        }
        rustix::net::listen(&socket, BACKLOG)?;
        Ok(Self { socket: socket.into(), path: Some(path.to_owned()) })
    }

    /// The socket that a service manager passed under `name` (`FileDescriptorName=`), if it did.
    ///
    /// Call it once, before there is a second thread.
    pub fn inherited(name: &str) -> io::Result<Option<Self>> {
        static TAKEN: AtomicBool = AtomicBool::new(false);
        let Some(number) = inherited_number(name, |key| env::var(key).ok()) else {
            return Ok(None);
        };
        if TAKEN.swap(true, Ordering::Relaxed) {
            return Ok(None);
        }
        // SAFETY: the service manager opened it for this process and names it by this number, and
        // the flag above sees to it that nobody else takes it.
        let socket = unsafe { OwnedFd::from_raw_fd(number) };
        rustix::io::fcntl_setfd(&socket, FdFlags::CLOEXEC)?;
        let is_listening = sockopt::socket_domain(&socket)? == AddressFamily::UNIX
            && sockopt::socket_acceptconn(&socket)?;
        if !is_listening {
            let text = format!("the inherited descriptor {number} is no listening unix socket");
            return Err(io::Error::other(text));
        }
        let socket = UnixListener::from(socket);
        socket.set_nonblocking(true)?;
        Ok(Some(Self { socket, path: None }))
    }

    /// Lets the next client in, if one waits.
    pub fn accept(&self) -> io::Result<Option<UnixStream>> {
        match self.socket.accept() {
            Ok((client, _)) => Ok(Some(client)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error),
        }
    }
}

impl AsRawFd for Listener {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Some(path) = &self.path {
            // Whoever removed it before us did what we want.
            let _ = std::fs::remove_file(path);
        }
    }
}

/// Removes a socket of a process that has ended, and nothing else.
fn remove_stale(path: &Path) -> io::Result<()> {
    let is_socket = path.symlink_metadata().is_ok_and(|entry| entry.file_type().is_socket());
    if !is_socket {
        return Ok(());
    }
    // A process that is stopped takes no clients, and must not stop us.
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let probe = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    match rustix::net::connect(&probe, &SocketAddrUnix::new(path)?) {
        Err(Errno::CONNREFUSED) => std::fs::remove_file(path),
        Ok(()) | Err(Errno::AGAIN) => {
            let text = "another process listens there: stop it, or choose another name";
            Err(io::Error::new(io::ErrorKind::AddrInUse, text))
        }
        // Binding tells what is wrong.
        Err(_) => Ok(()),
    }
}

/// The descriptor that the environment gives this process under `name`.
fn inherited_number(name: &str, variable: impl Fn(&str) -> Option<String>) -> Option<RawFd> {
    if variable("LISTEN_PID")?.parse() != Ok(std::process::id()) {
        return None;
    }
    let count: RawFd = variable("LISTEN_FDS")?.parse().ok()?;
    let names = variable("LISTEN_FDNAMES").unwrap_or_default();
    let numbers = FIRST_INHERITED..FIRST_INHERITED.checked_add(count)?;
    numbers.zip(names.split(':')).find(|(_, other)| *other == name).map(|(number, _)| number)
}

#[cfg(test)]
mod test {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn only_its_owner_may_connect_and_its_name_goes_with_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let listener = Listener::bind(&path, Some(Mode::RUSR | Mode::WUSR)).unwrap();
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        assert!(listener.accept().unwrap().is_none());
        let _client = UnixStream::connect(&path).unwrap();
        assert!(listener.accept().unwrap().is_some());
        drop(listener);
        assert!(!path.exists());
    }

    #[test]
    fn a_dead_socket_is_replaced_and_a_live_one_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        drop(UnixListener::bind(&path).unwrap());
        let live = Listener::bind(&path, None).unwrap();
        let error = Listener::bind(&path, None).unwrap_err();
        assert!(error.to_string().contains("another process listens"), "{error}");
        assert!(UnixStream::connect(&path).is_ok(), "the live one is still there");
        drop(live);
        std::fs::write(&path, "a file").unwrap();
        assert!(Listener::bind(&path, None).is_err());
        assert_eq!(std::fs::read(&path).unwrap(), b"a file");
    }

    #[test]
    fn an_inherited_descriptor_is_found_by_its_name_and_process() {
        let own = std::process::id().to_string();
        let find = |id: &str, count: &str, names: &str| {
            inherited_number("control", |key| {
                Some(match key {
                    "LISTEN_PID" => id.to_owned(),
                    "LISTEN_FDS" => count.to_owned(),
                    _ => names.to_owned(),
                })
            })
        };
        assert_eq!(find(&own, "2", "other:control"), Some(4));
        assert_eq!(find(&own, "1", "control"), Some(3));
        for (id, count, names) in [
            ("1", "1", "control"),
            (&own, "1", "other:control"),
            (&own, "0", "control"),
            (&own, "-1", "control"),
            (&own, "2147483647", "control"),
            (&own, "x", "control"),
        ] {
            assert_eq!(find(id, count, names), None, "{id} {count} {names}");
        }
    }
}
