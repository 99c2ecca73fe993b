//! Processes that serve devices: started first, before anything is given up that they may need, and
//! confined by themselves.

use anyhow::{Context as _, Result};

use super::file_server::FileServer;
use super::passt::Passt;
use super::store_server::{self, Additions};
use super::virtiofsd;
use crate::config::Config;

/// What serves a machine's devices, each of which becomes one.
pub(crate) struct Children {
    /// The networks of the user's own, in the order of their cards.
    pub(super) passts: Vec<Passt>,
    /// Whoever serves files.
    pub(super) file_servers: Vec<FileServer>,
    /// Where further paths of the store go, if the guest sees a closure.
    pub(super) additions: Option<Additions>,
}

impl Children {
    /// Starts all that the machine needs.
    pub(super) fn start(config: &Config) -> Result<Self> {
        let passts = Passt::start_all(config)?;
        let (mut file_servers, mut additions) = (Vec::new(), None);
        for share in &config.shares {
            if let Some(source) = &share.source {
                let server = virtiofsd::start(share, source);
                file_servers.push(server.with_context(|| format!("--share tag={}", share.tag))?);
            }
        }
        if let Some(share) = &config.store_share {
            let started = store_server::start(share, config.cpus, config.sandbox);
            let (server, extension) = started.context("--store-share")?;
            file_servers.push(server);
            additions = extension;
        }
        Ok(Self { passts, file_servers, additions })
    }
}
