//! The server of `--store-share`: this program again, in a process and a sandbox of its own.

use std::os::unix::process::CommandExt as _;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result};
use devices::host::child;

use super::file_server::{FileServer, waiting_connection};
use crate::config::StoreShare;

/// Whatever has become of the file since it was started.
const THIS_PROGRAM: &str = "/proc/self/exe";

/// Threads that read files at the same time.
const QUEUES_MAX: u32 = 4;

/// Starts one for a machine with `cpus` processors.
pub(super) fn start(share: &StoreShare, cpus: u32, sandbox: bool) -> Result<FileServer> {
    let (listener, socket) = waiting_connection().context("cannot make a socket")?;
    let mut command = Command::new(THIS_PROGRAM);
    command
        .arg("store-server")
        .arg("--store")
        .arg(&share.store)
        .args(["--tag", &share.tag])
        .args(["--queues", &cpus.clamp(1, QUEUES_MAX).to_string()])
        .stdin(listener)
        .stdout(Stdio::null())
        // Keys that end a guest in a terminal shall not end its files first.
        .process_group(0);
    if let Some(closure) = &share.closure {
        command.arg("--closure").arg(closure);
    }
    if !sandbox {
        command.arg("--no-sandbox");
    }
    child::end_with_us(&mut command);
    let child = command.spawn().context("cannot start this program again")?;
    let program = "the store's server".to_owned();
    Ok(FileServer { tag: share.tag.clone(), program, child, socket })
}
