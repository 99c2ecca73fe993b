//! Links that keep the garbage collector of Nix from runners of guests.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use super::folder::{Folder, Link};
use super::name::Name;

/// The links in a guest's folder that have to keep what they lead to, and how their roots begin.
const KEPT: [(Link, &str); 3] =
    [(Link::Current, ""), (Link::Booted, "booted-"), (Link::Old, "old-")];

/// Makes the roots of the guest in `folder`; nothing where there is no Nix.
pub(super) fn add(folder: &Folder) -> Result<()> {
    let Some(roots) = roots_folder() else { return Ok(()) };
    let context =
        |path: &Path| format!("{}: cannot make the root {}", folder.name(), path.display());
    fs::create_dir_all(&roots).with_context(|| context(&roots))?;
    for (link, prefix) in KEPT {
        let root = root(&roots, folder.name(), prefix);
        let target = folder.link(link);
        if fs::read_link(&root).is_ok_and(|existing| existing == target) {
            continue;
        }
        remove_root(&root)
            .and_then(|()| Ok(symlink(&target, &root)?))
            .with_context(|| context(&root))?;
    }
    Ok(())
}

/// Removes the roots of a guest.
pub(super) fn remove(name: &Name) -> Result<()> {
    let Some(roots) = roots_folder() else { return Ok(()) };
    for (_, prefix) in KEPT {
        remove_root(&root(&roots, name, prefix))?;
    }
    Ok(())
}

fn remove_root(root: &Path) -> Result<()> {
    match fs::remove_file(root) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove the root {}", root.display()))
        }
        _ => Ok(()),
    }
}

fn root(roots: &Path, name: &Name, prefix: &str) -> PathBuf {
    roots.join(format!("{prefix}{name}"))
}

/// Where roots of guests are. Nix's own variable moves them with the rest of its state.
fn roots_folder() -> Option<PathBuf> {
    let state = std::env::var_os("NIX_STATE_DIR").map(PathBuf::from);
    let roots = state.unwrap_or_else(|| PathBuf::from("/nix/var/nix")).join("gcroots");
    roots.is_dir().then(|| roots.join("microvm"))
}
