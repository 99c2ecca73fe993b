//! The process that serves a store to a guest, started by the machine that the guest runs in.
//!
//! It is this program again. All that it can do when it serves is to read below the store: it has
//! no capabilities, landlock lets it open nothing else and write nothing, and its threads have one
//! filter of system calls, which has none that makes threads, processes, sockets or changes. Where
//! it was started with the right to, the store is all of the file system that it has.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::fd::AsFd as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context as _, Result, bail, ensure};
use devices::host::program;
use devices::store::closure::Closure;
use devices::store::server::Server;
use devices::store::tree::Store;

use crate::sandbox::StoreSandbox;
use crate::sealed_list::SealedList;
use crate::thread;

/// More than the list of any closure has.
const LIST_BYTES_MAX: u64 = 256 << 20;

/// What such a process is started with, besides a socket as its standard input, at which the one
/// connection waits that it serves, and one as its standard output, by which further paths come.
#[derive(Clone, Debug)]
pub struct StoreServer {
    /// The folder.
    pub store: PathBuf,
    /// The file that lists the paths in it that the guest sees; without, it sees all.
    pub closure: Option<PathBuf>,
    /// What the guest mounts it by.
    pub tag: String,
    /// Queues of requests, a thread each.
    pub queues: u16,
    /// Whether to confine itself.
    pub sandbox: bool,
}

impl StoreServer {
    /// Serves until the other end hangs up.
    ///
    /// # Errors
    ///
    /// Why the store cannot be served.
    pub fn run(self) -> Result<()> {
        let closure = self.closure.as_deref().map(|list| read(list, &self.store)).transpose()?;
        let store = Store::open(&self.store, closure);
        let store = Arc::new(store.with_context(|| self.store.display().to_string())?);
        self.check_closure(&store)?;
        let listener = UnixListener::from(io::stdin().as_fd().try_clone_to_owned()?);
        let sandbox = self.sandbox.then(|| StoreSandbox::enter(&self.store)).transpose()?;
        let server = Server::start(&store, self.tag.as_bytes(), self.queues, listener)
            .context("nobody to serve: this is for nixvmm itself to start")?;
        if self.closure.is_some() {
            take_additions(store, self.store).context("cannot wait for further paths")?;
        }
        if let Some(sandbox) = sandbox {
            sandbox.close()?;
        }
        program::release_start_up();
        server.wait().context("the machine breaks the protocol")
    }
}

impl StoreServer {
    /// A guest that lacks a part of its system fails late and in odd ways.
    fn check_closure(&self, store: &Store) -> Result<()> {
        let (Some(list), Some((count, name))) = (&self.closure, store.missing()) else {
            return Ok(());
        };
        bail!(
            "closure {}: {count} of its paths are not in {}: the first is {}; build them, or give \
             the list of a system that is built",
            list.display(),
            self.store.display(),
            self.store.join(OsStr::from_bytes(&name)).display(),
        )
    }
}

/// Takes lists of further paths from the other end of the standard output, a message each, as long
/// as this process lives.
fn take_additions(served: Arc<Store>, store: PathBuf) -> Result<()> {
    let messages = UnixDatagram::from(io::stdout().as_fd().try_clone_to_owned()?);
    let take = move || {
        while let Ok(list) = SealedList::receive(&messages) {
            let added = list.read().and_then(|lines| Ok(served.extend(&lines, &store)?));
            if let Err(error) = added {
                log::error!("the closure stays as it is: {error}");
            }
        }
    };
    thread::spawn("additions", take).map(drop)
}

fn read(list: &Path, store: &Path) -> Result<Closure> {
    let context = || format!("closure {}", list.display());
    let bytes = fs::metadata(list).with_context(context)?.len();
    ensure!(bytes <= LIST_BYTES_MAX, "{}: too long for a list of paths", context());
    let lines = fs::read(list).with_context(context)?;
    Closure::parse(&lines, store).with_context(context)
}
