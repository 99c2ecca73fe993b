//! The server of `--store-share`: this program again, in a process and a sandbox of its own.

use std::ffi::OsStr;
use std::fs;
use std::io::ErrorKind;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::net::UnixDatagram;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};
use devices::host::child;
use devices::store::closure::Closure;

use super::file_server::{FileServer, waiting_connection};
use crate::config::StoreShare;
use crate::sealed_list::SealedList;

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
    /// Adds the paths that `list` has, all at once, and returns how many lines it has.
    ///
    /// # Errors
    ///
    /// It can still be changed, or is too long, or a path is not in the store or does not exist, or
    /// the server takes none now; nothing has been added then.
    pub(crate) fn add(&self, list: OwnedFd) -> Result<usize> {
        let list = SealedList::check(list)?;
        let lines = list.read()?;
        Closure::parse(&lines, &self.store)?;
        let paths = lines.split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
        let paths: Vec<_> = paths.map(|path| Path::new(OsStr::from_bytes(path))).collect();
        check_existence(&paths)?;
        list.send(&self.socket).context("the store's server takes no paths now")?;
        Ok(paths.len())
    }
}

/// Nothing of a list is added whose paths are not all there.
fn check_existence(paths: &[&Path]) -> Result<()> {
    // Asking needs no right to open.
    let is_missing = |path: &&&Path| {
        fs::symlink_metadata(path).is_err_and(|error| error.kind() == ErrorKind::NotFound)
    };
    let missing: Vec<&&Path> = paths.iter().filter(is_missing).collect();
    let named: Vec<String> =
        missing.iter().take(NAMED_MAX).map(|path| path.display().to_string()).collect();
    let named = named.join(", ");
    let others = missing.len().saturating_sub(NAMED_MAX);
    let others = if others > 0 { format!(" and {others} others") } else { String::new() };
    ensure!(missing.is_empty(), "not on this host: {named}{others}; nothing was added");
    Ok(())
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
    use std::os::fd::AsFd as _;

    use super::*;

    fn sealed(paths: &[String]) -> OwnedFd {
        let list = SealedList::new(paths.join("\n").as_bytes()).unwrap();
        list.as_fd().try_clone_to_owned().unwrap()
    }

    #[test]
    fn a_list_is_added_whole_or_not_at_all() {
        let folder = tempfile::tempdir().unwrap();
        let (socket, theirs) = UnixDatagram::pair().unwrap();
        theirs.set_nonblocking(true).unwrap();
        let store = folder.path().to_owned();
        let additions = Additions { store: store.clone(), socket };
        let path = |name: &str| store.join(name).display().to_string();
        fs::write(path("here"), "").unwrap();
        std::os::unix::fs::symlink("nowhere", path("link")).unwrap();
        let refused = |list: &[String]| additions.add(sealed(list)).unwrap_err().to_string();
        assert_eq!(
            refused(&[path("here"), path("gone")]),
            format!("not on this host: {}; nothing was added", path("gone"))
        );
        let many: Vec<String> = (0..12).map(|number| path(&format!("gone{number}"))).collect();
        assert!(refused(&many).contains("gone9 and 2 others;"));
        assert!(refused(&["/etc/passwd".to_owned()]).contains("line 1 is no path in"));
        assert!(SealedList::receive(&theirs).is_err(), "nothing was sent");
        // Far more than a message holds.
        let names: Vec<String> = (0..5000).map(|_| path("here")).chain([path("link")]).collect();
        assert_eq!(additions.add(sealed(&names)).unwrap(), 5001);
        let list = SealedList::receive(&theirs).unwrap();
        assert_eq!(list.read().unwrap(), names.join("\n").as_bytes());
    }
}
