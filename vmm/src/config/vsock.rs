//! The socket device: connections between programs of the host and of the guest.

use std::path::PathBuf;

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};

use super::{Config, files};

/// Context ids that a guest can have: those below are the hypervisor's, this process's and the
/// host's, and the last one stands for any.
const CIDS: std::ops::RangeInclusive<u32> = 3..=u32::MAX - 1;

/// Longest suffix of a socket that the guest reaches: an underscore and a port.
const PORT_SUFFIX_BYTES: usize = 11;

/// A socket device. Without a socket, the host's kernel moves the data (vhost-vsock).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Vsock {
    /// The guest's context id. Default: one that is free.
    pub cid: Option<u32>,
    /// A unix socket in place of the host's: a program that connects and says `CONNECT PORT`
    /// reaches the guest, which reaches port N where a program listens at `SOCKET_N`. Default:
    /// none.
    pub socket: Option<PathBuf>,
}

impl Config {
    pub(super) fn resolve_vsock(&mut self) -> Result<()> {
        let Some(vsock) = &mut self.vsock else { return Ok(()) };
        if let Some(cid) = vsock.cid {
            ensure!(
                CIDS.contains(&cid),
                "--vsock cid={cid}: a guest has one from {} to {}, or cid=auto",
                CIDS.start(),
                CIDS.end(),
            );
        }
        let Some(socket) = &mut vsock.socket else { return Ok(()) };
        files::resolve_socket("--vsock", socket)?;
        let length = socket.as_os_str().len() + PORT_SUFFIX_BYTES;
        ensure!(
            length <= files::MAX_SOCKET_PATH_BYTES,
            "--vsock {}: with _PORT behind it {length} bytes long, and a socket's path has at \
             most {}: use a shorter folder",
            socket.display(),
            files::MAX_SOCKET_PATH_BYTES,
        );
        Ok(())
    }
}
