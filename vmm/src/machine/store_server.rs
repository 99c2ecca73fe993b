//! The server of `--store-share`: this program again, in a process and a sandbox of its own.

use std::fs;
use std::io::ErrorKind;
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

/// Paths that an error names.
const NAMED_MAX: usize = 10;

/// Where a server is told of further paths of its closure.
pub(crate) struct Additions {
    store: PathBuf,
    socket: UnixDatagram,
}

impl Additions {
    /// Says whether all of `paths` are in the store.
    ///
    /// # Errors
    ///
    /// Which are not, or do not exist.
    pub(crate) fn check(&self, paths: &[&str]) -> Result<()> {
        Closure::parse(paths.join("\n").as_bytes(), &self.store)?;
        // Asking needs no right to open.
        let is_missing = |path: &&&str| {
            fs::symlink_metadata(path).is_err_and(|error| error.kind() == ErrorKind::NotFound)
        };
        let missing: Vec<&str> = paths.iter().filter(is_missing).copied().collect();
        let named = missing.iter().take(NAMED_MAX).copied().collect::<Vec<_>>().join(", ");
        let others = missing.len().saturating_sub(NAMED_MAX);
        let others = if others > 0 { format!(" and {others} others") } else { String::new() };
        ensure!(missing.is_empty(), "not on this host: {named}{others}; nothing was added");
        Ok(())
    }

    /// Adds `paths`.
    ///
    /// # Errors
    ///
    /// As for [`Additions::check`], or the server takes none now; nothing has been added then.
    pub(crate) fn add(&self, paths: &[&str]) -> Result<()> {
        self.check(paths)?;
        let list = paths.join("\n");
        let list = list.as_bytes();
        ensure!(list.len() <= ADDITION_BYTES_MAX, "more than {ADDITION_BYTES_MAX} bytes of paths");
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

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn a_path_that_does_not_exist_is_named_and_nothing_is_added() {
        let folder = tempfile::tempdir().unwrap();
        let (socket, theirs) = UnixDatagram::pair().unwrap();
        theirs.set_nonblocking(true).unwrap();
        let store = folder.path().to_owned();
        let additions = Additions { store: store.clone(), socket };
        let path = |name: &str| store.join(name).display().to_string();
        fs::write(path("here"), "").unwrap();
        std::os::unix::fs::symlink("nowhere", path("link")).unwrap();
        let refused = additions.add(&[&path("here"), &path("gone")]).unwrap_err().to_string();
        assert_eq!(refused, format!("not on this host: {}; nothing was added", path("gone")));
        let many: Vec<String> = (0..12).map(|number| path(&format!("gone{number}"))).collect();
        let many: Vec<&str> = many.iter().map(String::as_str).collect();
        let refused = additions.check(&many).unwrap_err().to_string();
        assert!(refused.contains("gone9 and 2 others;"), "{refused}");
        assert!(additions.add(&["/etc/passwd"]).is_err());
        let mut list = vec![0; 4096];
        assert!(theirs.recv(&mut list).is_err(), "nothing was sent");
        additions.check(&[&path("here")]).unwrap();
        assert!(theirs.recv(&mut list).is_err(), "nothing was sent");
        additions.add(&[&path("here"), &path("link")]).unwrap();
        let len = theirs.recv(&mut list).unwrap();
        assert_eq!(list[..len], *[path("here"), path("link")].join("\n").as_bytes());
    }
}
