//! Children that serve files to the guest: each has one end of a connection, and becomes a file
//! system device ([`devices::share`](super::devices)).

use std::env;
use std::fs::{self, DirBuilder};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::{self, Child, ExitStatus};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Error, Result, anyhow};
use devices::event::LoopHandle;
use devices::host::vhost::user::UserVhost;

use crate::happenings::Happenings;

/// What a child that hangs up before the guest has started may take to end, and how often it is
/// looked at meanwhile.
const LAST_WORDS: Duration = Duration::from_millis(500);
const POLL: Duration = Duration::from_millis(10);

/// Folders of other processes that may have the name of ours, at the most.
const FOLDER_ATTEMPTS: u32 = 100;

/// A child that serves files by vhost-user.
pub(crate) struct FileServer {
    /// What the guest mounts it by.
    pub(crate) tag: String,
    /// What messages call the child.
    pub(crate) program: String,
    /// The child, which ends when its end of the connection hangs up.
    pub(crate) child: Child,
    /// Our end of the connection. The other one may be accepted later: the child has
    /// [`PATIENCE`](devices::host::vhost::user::PATIENCE) from the time at which devices are made.
    pub(crate) socket: UnixStream,
}

impl FileServer {
    /// The conversation with it, for a device with at most `ring_count` rings, and its process.
    pub(crate) fn connect(self, ring_count: u64, watch: LoopHandle) -> Result<(UserVhost, Child)> {
        let Self { program, mut child, socket, .. } = self;
        match UserVhost::with_child(socket, ring_count, watch) {
            Ok(vhost) => Ok((vhost, child)),
            Err(error) => Err(refusal(error.into(), &program, &mut child)),
        }
    }
}

/// Says why a server that was lost has ended.
pub(crate) fn report_end(name: &str, program: &str, child: &mut Child, happenings: &Happenings) {
    let status = child.try_wait().ok().flatten();
    match status {
        Some(status) => log::error!("{name}: {program} has ended ({status}): no files any more"),
        None => log::error!("{name}: {program} speaks to us no more: no files any more"),
    }
    happenings.process_lost(name, program, status);
}

/// Why a server that was just started does not serve.
fn refusal(error: Error, program: &str, child: &mut Child) -> Error {
    match end_within(LAST_WORDS, child) {
        Some(status) => {
            anyhow!("{program} has ended with {status}; what it says about that is above")
        }
        None => {
            let _ = child.kill();
            let _ = child.wait();
            error.context(format!("{program} does not serve files by vhost-user"))
        }
    }
}

/// How a child has ended, if it ends within `limit`.
fn end_within(limit: Duration, child: &mut Child) -> Option<ExitStatus> {
    let deadline = Instant::now() + limit;
    loop {
        match child.try_wait() {
            Ok(None) if Instant::now() < deadline => thread::sleep(POLL),
            outcome => return outcome.ok().flatten(),
        }
    }
}

/// A socket that listens and has no name any more, and the one connection that waits there.
pub(super) fn waiting_connection() -> io::Result<(OwnedFd, UnixStream)> {
    let folder = private_folder()?;
    let path = folder.join("socket");
    let pair = UnixListener::bind(&path).and_then(|listener| {
        let socket = UnixStream::connect(&path)?;
        Ok((listener.into(), socket))
    });
    // What is left of a folder that cannot be removed is not worth an error.
    let _ = fs::remove_file(&path);
    let _ = fs::remove_dir(&folder);
    pair
}

/// A folder that no other user can look into.
fn private_folder() -> io::Result<PathBuf> {
    let mut attempt = 0;
    loop {
        let folder = env::temp_dir().join(format!("nixvmm-{}-{attempt}", process::id()));
        match DirBuilder::new().mode(0o700).create(&folder) {
            Ok(()) => return Ok(folder),
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            Err(error) if attempt == FOLDER_ATTEMPTS => return Err(error),
            Err(_) => attempt += 1,
        }
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn one_connection_waits_at_a_socket_without_a_name() {
        use std::io::{Read as _, Write as _};

        let (listener, mut socket) = waiting_connection().unwrap();
        let (mut other, _) = UnixListener::from(listener).accept().unwrap();
        socket.write_all(b"ours").unwrap();
        let mut bytes = [0; 4];
        other.read_exact(&mut bytes).unwrap();
        assert_eq!(&bytes, b"ours");
        let name = socket.peer_addr().unwrap();
        assert!(!name.as_pathname().unwrap().parent().unwrap().exists());
    }
}
