//! What systemd-machined of the host knows the guest by.

use std::path::PathBuf;

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};

use super::{Config, files};

/// Longest name of a host (Linux's `HOST_NAME_MAX`), which machined measures names by.
const MAX_NAME_BYTES: usize = 64;

/// A registration with systemd-machined, so that machinectl(1) knows the guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Machined {
    /// What machinectl calls the guest.
    pub name: String,
    /// Where machined listens. Default: /run/systemd/machine/io.systemd.Machine, the host's.
    #[serde(default = "default_socket")]
    pub socket: PathBuf,
}

impl Machined {
    /// The host's machined, which calls the guest `name`.
    #[must_use]
    pub fn new(name: impl Into<String>) -> Self {
        Self { name: name.into(), socket: default_socket() }
    }
}

fn default_socket() -> PathBuf {
    "/run/systemd/machine/io.systemd.Machine".into()
}

impl Config {
    /// Nothing has to listen there: a guest that nobody lists runs as well.
    pub(super) fn resolve_machined(&mut self) -> Result<()> {
        let Some(machined) = &mut self.machined else { return Ok(()) };
        let name = &machined.name;
        ensure!(
            is_host_name(name),
            "--machined {name}: not a name: use letters, digits and - _, at most {MAX_NAME_BYTES}",
        );
        files::resolve_server("--machined", &mut machined.socket)
    }
}

/// Whether machined takes `name`: words with dots between them.
fn is_host_name(name: &str) -> bool {
    let is_inner = |letter: u8| letter.is_ascii_alphanumeric() || matches!(letter, b'-' | b'_');
    let is_word = |word: &str| {
        !word.is_empty()
            && word.bytes().all(is_inner)
            && !word.starts_with('-')
            && !word.ends_with('-')
    };
    name.len() <= MAX_NAME_BYTES && name.split('.').all(is_word)
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn a_name_is_one_that_a_host_could_have() {
        for name in ["web", "web-1", "my_guest", "a.b", &"x".repeat(64)] {
            assert!(is_host_name(name), "{name}");
        }
        for name in ["", ".", "a..b", "-a", "a-", "a b", "a/b", "ü", &"x".repeat(65)] {
            assert!(!is_host_name(name), "{name}");
        }
    }
}
