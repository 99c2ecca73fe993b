//! Which server for `ssh` has a guest that has nothing? Debian's smallest, as an archive that is a
//! disk: the guest unpacks it over its root, and may log in everybody who asks.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::archive::{self, Archive};
use crate::cache::Cache;
use crate::packages::LIBRARIES;
use crate::tool;

/// The server, in the tree that it comes from and in the guest.
const SERVER: &str = "usr/sbin/dropbear";

/// What reads it first.
const LOADER: &str = "ld-linux-x86-64.so.2";

/// Bytes of the largest block of a disk.
const BLOCK: usize = 4096;

/// Makes a server of the guest's second disk that listens on TCP port 22 of the guest itself.
pub const START: &str = "cd / && cpio -id < /dev/vdb 2> /dev/null; ip link set lo up; \
    mkdir -p /etc/dropbear /root; echo root::0:0::/root:/bin/sh > /etc/passwd; \
    dropbear -R -B -E -p 127.0.0.1:22";

/// The archive of the server in `tree` and of its libraries.
///
/// # Errors
/// When a file of it is missing.
pub fn disk(cache: &Cache, tree: &Path) -> Result<PathBuf> {
    let inputs = [tree.as_os_str().as_encoded_bytes(), archive::SOURCE.as_bytes()];
    let folder = cache.entry("ssh-server", &inputs, |folder| {
        let mut archive = Archive::default();
        let mut add = |path: &str, from: &Path| -> Result<()> {
            let content = fs::read(from).with_context(|| from.display().to_string())?;
            archive.program(path, &content);
            Ok(())
        };
        let libraries = tree.join(LIBRARIES);
        let loader = libraries.join(LOADER);
        add(SERVER, &tree.join(SERVER))?;
        add(&format!("lib64/{LOADER}"), &loader)?;
        let mut listing = tool::command(&loader.to_string_lossy());
        listing.arg("--library-path").arg(&libraries).arg("--list").arg(tree.join(SERVER));
        let listed = String::from_utf8(tool::finish(&mut listing)?)?;
        for (name, _) in listed.lines().filter_map(|line| line.trim().split_once(" => ")) {
            if !name.contains('/') {
                add(&format!("{LIBRARIES}/{name}"), &libraries.join(name))?;
            }
        }
        let mut bytes = archive.finish();
        bytes.resize(bytes.len().next_multiple_of(BLOCK), 0);
        Ok(fs::write(folder.join("disk"), bytes)?)
    })?;
    Ok(folder.join("disk"))
}
