//! Children that serve files to the guest: each has one end of a connection, and becomes a file
//! system device ([`devices::share`](super::devices)).
//!
//! They are started before anything is given up that they may need, and confine themselves.

use std::os::unix::net::UnixStream;
use std::process::{Child, ExitStatus};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Error, Result, anyhow};
use devices::event::LoopHandle;
use devices::host::vhost::user::UserVhost;

use super::virtiofsd;
use crate::config::Config;

/// What a child that hangs up before the guest has started may take to end, and how often it is
/// looked at meanwhile.
const LAST_WORDS: Duration = Duration::from_millis(500);
const POLL: Duration = Duration::from_millis(10);

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
    /// Starts all that the machine needs.
    pub(crate) fn start_all(config: &Config) -> Result<Vec<Self>> {
        let mut servers = Vec::new();
        for share in &config.shares {
            if let Some(source) = &share.source {
                let server = virtiofsd::start(share, source);
                servers.push(server.with_context(|| format!("--share tag={}", share.tag))?);
            }
        }
        Ok(servers)
    }

    /// The conversation with it, for a device with at most `ring_count` rings, and its process.
    pub(crate) fn connect(self, ring_count: u64, watch: LoopHandle) -> Result<(UserVhost, Child)> {
        let Self { tag: _, program, mut child, socket } = self;
        match UserVhost::with_child(socket, ring_count, watch) {
            Ok(vhost) => Ok((vhost, child)),
            Err(error) => Err(refusal(error.into(), &program, &mut child)),
        }
    }
}

/// Says why a server that was lost has ended.
pub(crate) fn report_end(name: &str, program: &str, child: &mut Child) {
    match child.try_wait() {
        Ok(Some(status)) => {
            log::error!("{name}: {program} has ended ({status}): no files any more");
        }
        _ => log::error!("{name}: {program} speaks to us no more: no files any more"),
    }
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
