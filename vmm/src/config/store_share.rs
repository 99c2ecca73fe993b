//! The host's store, or a closure of it, as a folder of the guest.

use std::path::PathBuf;

use anyhow::{Context as _, Result, ensure};
use serde::{Deserialize, Serialize};

use super::share::check_tag;
use super::{Config, files};

/// Store paths of the host that the guest mounts by a tag and reads
/// (`mount -t virtiofs -o ro,nosuid,nodev store /nix/store`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct StoreShare {
    /// What the guest calls it. Default: store.
    #[serde(default = "default_tag")]
    pub tag: String,
    /// The store. Default: /nix/store.
    #[serde(default = "default_store")]
    pub store: PathBuf,
    /// The file that lists the store paths that the guest sees, one a line, as closureInfo writes
    /// it to store-paths. Default: none, and the guest sees all.
    #[serde(default)]
    pub closure: Option<PathBuf>,
}

impl Default for StoreShare {
    fn default() -> Self {
        Self { tag: default_tag(), store: default_store(), closure: None }
    }
}

fn default_tag() -> String {
    "store".to_owned()
}

fn default_store() -> PathBuf {
    "/nix/store".into()
}

impl Config {
    pub(super) fn resolve_store_share(&mut self) -> Result<()> {
        let Some(share) = &mut self.store_share else { return Ok(()) };
        share.resolve().context("--store-share")?;
        let tag = &share.tag;
        ensure!(
            self.shares.iter().all(|other| other.tag != *tag),
            "--store-share: tag={tag} is also that of a share",
        );
        Ok(())
    }
}

impl StoreShare {
    fn resolve(&mut self) -> Result<()> {
        check_tag(&self.tag)?;
        // The list names paths as the user does: the name of the store is kept as it was given.
        files::resolve_folder("store", &mut self.store)?;
        match &mut self.closure {
            Some(closure) => files::resolve_regular("closure", closure),
            None => Ok(()),
        }
    }
}
