//! Shares: folders of the host that the guest mounts.

use std::path::PathBuf;

use anyhow::{Context as _, Result, ensure};
use serde::{Deserialize, Serialize};

use super::{Config, files};

/// Longest tag (virtio 1.3, section 5.11.4).
const MAX_TAG_BYTES: usize = 36;

/// A folder that the guest mounts by its tag (`mount -t virtiofs TAG PLACE`). Either a `source`,
/// for which this process starts a virtiofsd, or the `socket` of a vhost-user process that runs;
/// the keys after `source` are for that virtiofsd.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Share {
    /// What the guest calls it, at most 36 bytes. Needed.
    pub tag: String,
    /// Where a vhost-user process listens that serves it. Default: none.
    #[serde(default)]
    pub socket: Option<PathBuf>,
    /// The folder that a virtiofsd of our own serves. Default: none.
    #[serde(default)]
    pub source: Option<PathBuf>,
    /// Whether the guest may only read. Default: no.
    #[serde(default)]
    pub readonly: bool,
    /// What the guest may remember of files. Default: virtiofsd's own, which is `auto`.
    #[serde(default)]
    pub cache: Option<ShareCache>,
    /// Whether the guest sees extended attributes. Default: no.
    #[serde(default)]
    pub xattr: bool,
    /// Whether the guest sees access control lists, which takes extended attributes. Default: no.
    #[serde(default)]
    pub posix_acl: bool,
    /// How users of virtiofsd's namespace are those of the host (`--uid-map`). Default: none.
    #[serde(default)]
    pub uid_map: Option<String>,
    /// The same for groups (`--gid-map`). Default: none.
    #[serde(default)]
    pub gid_map: Option<String>,
    /// How users of the guest become those of the host (`--translate-uid`). Default: none.
    #[serde(default)]
    pub translate_uid: Option<String>,
    /// The same for groups (`--translate-gid`). Default: none.
    #[serde(default)]
    pub translate_gid: Option<String>,
    /// How virtiofsd confines itself. Default: its own, which is `namespace`.
    #[serde(default)]
    pub sandbox: Option<ShareSandbox>,
    /// The virtiofsd. Default: the one in `PATH`, or where distributions keep it.
    #[serde(default)]
    pub program: Option<PathBuf>,
    /// Further arguments for it. Default: none.
    #[serde(default)]
    pub arguments: Vec<String>,
}

/// What a guest may remember of a share's files.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "kebab-case")]
pub enum ShareCache {
    /// Data until a file is opened again, names and attributes for a second.
    Auto,
    /// Everything, for ever: the host must not change anything.
    Always,
    /// Names and attributes, for a day; data never.
    Metadata,
    /// Nothing.
    Never,
}

/// How a virtiofsd confines itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "kebab-case")]
pub enum ShareSandbox {
    /// By namespaces of its own and pivot_root.
    Namespace,
    /// By chroot, where the host's root cannot be pivoted.
    Chroot,
    /// Not at all: only its user's rights keep it from other files.
    None,
}

impl Config {
    pub(super) fn resolve_shares(&mut self) -> Result<()> {
        for (index, share) in self.shares.iter_mut().enumerate() {
            share.resolve().with_context(|| format!("--share tag={}", share.tag))?;
            ensure!(index < MAX_SHARES, "--share: a machine has {MAX_SHARES} shares at the most");
        }
        for (index, share) in self.shares.iter().enumerate() {
            let tag = &share.tag;
            let others = || self.shares.iter().take(index);
            ensure!(
                others().all(|other| other.tag != *tag),
                "--share tag={tag}: given twice, and the guest could not tell them apart",
            );
            ensure!(
                share.socket.is_none() || others().all(|other| other.socket != share.socket),
                "--share tag={tag}: its socket is also that of another share",
            );
        }
        Ok(())
    }
}

/// More processes and threads than this are a mistake.
const MAX_SHARES: usize = 64;

impl Share {
    fn resolve(&mut self) -> Result<()> {
        check_tag(&self.tag)?;
        match (&mut self.source, &mut self.socket) {
            (Some(source), None) => files::resolve_folder("source", source)?,
            (None, Some(socket)) => files::resolve_socket("socket", socket)?,
            _ => anyhow::bail!("give either source=FOLDER or socket=SOCKET"),
        }
        if let Some(key) = self.first_server_key().filter(|_| self.source.is_none()) {
            anyhow::bail!("{key}: is for whoever started the process at the socket to say");
        }
        match &mut self.program {
            Some(program) => files::resolve_regular("program", program),
            None => Ok(()),
        }
    }

    /// A key that is given and that a virtiofsd of our own alone can obey.
    fn first_server_key(&self) -> Option<&'static str> {
        let given = [
            ("readonly", self.readonly),
            ("cache", self.cache.is_some()),
            ("xattr", self.xattr),
            ("posix-acl", self.posix_acl),
            ("uid-map", self.uid_map.is_some()),
            ("gid-map", self.gid_map.is_some()),
            ("translate-uid", self.translate_uid.is_some()),
            ("translate-gid", self.translate_gid.is_some()),
            ("sandbox", self.sandbox.is_some()),
            ("program", self.program.is_some()),
            ("arguments", !self.arguments.is_empty()),
        ];
        given.into_iter().find(|(_, is_given)| *is_given).map(|(key, _)| key)
    }
}

/// Refuses what is no name for the guest to mount by.
pub(super) fn check_tag(tag: &str) -> Result<()> {
    ensure!((1..=MAX_TAG_BYTES).contains(&tag.len()), "a tag has 1 to {MAX_TAG_BYTES} bytes");
    ensure!(
        !tag.contains(|letter: char| letter.is_control() || letter.is_whitespace()),
        "a tag has neither spaces nor control characters",
    );
    Ok(())
}
