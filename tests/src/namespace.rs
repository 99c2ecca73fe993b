//! Where can a test change the network or the name servers of a host without anybody noticing? On a
//! thread that has a network and mounts of its own, and so have the processes that it starts.
#![expect(unsafe_code, reason = "namespaces are left by system calls")]

use std::ffi::CString;
use std::fs::{self, Permissions};
use std::io;
use std::net::IpAddr;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::thread::{self, JoinHandle};

use anyhow::{Context, Result, anyhow};
use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};

/// Runs `act` on a thread that is in a network of its own, whose interfaces are all down, and that
/// mounts for nobody else.
///
/// # Errors
/// Those of `act`; and without the rights of root.
pub fn in_own_network<T: Send + 'static>(
    act: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    let thread: JoinHandle<Result<T>> = thread::spawn(move || {
        // SAFETY: it changes nothing but what the calling thread sees.
        if unsafe { libc::unshare(libc::CLONE_NEWNET | libc::CLONE_NEWNS) } != 0 {
            return Err(io::Error::last_os_error()).context("no network of its own");
        }
        // Else what it mounts would be mounted for others as well.
        mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
        act()
    });
    thread.join().map_err(|_| anyhow!("the thread with a network of its own panicked"))?
}

/// Makes `server` the only name server of the calling thread, which mounts for nobody else: its
/// `/etc` has another `resolv.conf`, which is in `folder`.
///
/// # Errors
/// When nothing can be mounted.
pub fn resolve_names_at(server: IpAddr, folder: &Path) -> Result<()> {
    // Whatever reads it need not be root.
    fs::set_permissions(folder, Permissions::from_mode(0o755))?;
    fs::write(folder.join("resolv.conf"), format!("nameserver {server}\n"))?;
    // A folder above the other hides a link as well as a file.
    let layers = CString::new(format!("lowerdir={}:/etc", folder.display()))?;
    mount("overlay", "/etc", "overlay", MountFlags::RDONLY, layers.as_c_str())
        .context("/etc cannot have another resolv.conf")
}
