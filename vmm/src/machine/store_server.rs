//! The server of `--store-share`: this program again, in a process and a sandbox of its own.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};
use devices::host::child;
use devices::store::closure::Closure;

use super::file_server::{FileServer, waiting_connection};
use crate::config::StoreShare;
use crate::store_server::ADDITION_BYTES_MAX;

/// Whatever has become of the file since it was started.
const THIS_PROGRAM: &str = "/proc/self/exe";

/// Threads that read files at the same time.
const QUEUES_MAX: u32 = 4;

/// Where a server is told of further paths of its closure.
pub(crate) struct Additions {
    store: PathBuf,
    socket: UnixDatagram,
}

impl Additions {
    /// Adds the paths of `list`, one a line.
    ///
    /// # Errors
    ///
    /// One of them is not in the store, or the server takes none now; nothing has been added then.
    pub(crate) fn add(&self, list: &[u8]) -> Result<()> {
        ensure!(list.len() <= ADDITION_BYTES_MAX, "more than {ADDITION_BYTES_MAX} bytes of paths");
        Closure::parse(list, &self.store)?;
        // An empty message would be the end.
        if !list.is_empty() {
            self.socket.send(list).context("the store's server takes no paths now")?;
        }
        Ok(())
    }
}

/// Starts one for a machine with `cpus` processors. A closure that it serves can be extended.
pub(super) fn start(
    share: &StoreShare,
    cpus: u32,
    sandbox: bool,
) -> Result<(FileServer, Option<Additions>)> {
    let (listener, socket) = waiting_connection().context("cannot make a socket")?;
    let mut command = Command::new(THIS_PROGRAM);
    command
        .arg("store-server")
        .arg("--store")
        .arg(&share.store)
        .args(["--tag", &share.tag])
        .args(["--queues", &cpus.clamp(1, QUEUES_MAX).to_string()])
        .stdin(listener)
        // Keys that end a guest in a terminal shall not end its files first.
        .process_group(0);
    command.stdout(Stdio::null());
    let mut additions = None;
    if let Some(closure) = &share.closure {
        command.arg("--closure").arg(closure);
        let (socket, theirs) = UnixDatagram::pair().context("cannot make a socket")?;
        socket.set_nonblocking(true)?;
        command.stdout(OwnedFd::from(theirs));
        additions = Some(Additions { store: share.store.clone(), socket });
    }
    if !sandbox {
        command.arg("--no-sandbox");
    }
    child::end_with_us(&mut command);
    let child = command.spawn().context("cannot start this program again")?;
    let program = "the store's server".to_owned();
    Ok((FileServer { tag: share.tag.clone(), program, child, socket }, additions))
}
