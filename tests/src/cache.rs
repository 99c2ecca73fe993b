//! Where are images and packages kept between runs? Outside the source tree, each under a name that
//! is made from everything it was made of, so that nothing in the cache is ever out of date.

use std::env;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::tool;

/// How much of an entry's digest is in its name: 80 bits, which no accident repeats.
const DIGEST_LENGTH: usize = 20;

/// The folder that holds everything fetched and built.
#[derive(Clone, Debug)]
pub struct Cache {
    root: PathBuf,
}

impl Cache {
    /// Opens `$NIXVMM_CACHE`, `$XDG_CACHE_HOME/nixvmm` or `~/.cache/nixvmm`, making it when needed.
    ///
    /// # Errors
    /// When none of the three variables is set or the folder cannot be made.
    pub fn open() -> Result<Self> {
        let below = |variable: &str, folder: &str| {
            let value = env::var_os(variable).filter(|value| !value.is_empty())?;
            Some(PathBuf::from(value).join(folder))
        };
        let root = below("NIXVMM_CACHE", "")
            .or_else(|| below("XDG_CACHE_HOME", "nixvmm"))
            .or_else(|| below("HOME", ".cache/nixvmm"))
            .context("there is no place for the cache: set NIXVMM_CACHE to a folder")?;
        fs::create_dir_all(&root)
            .with_context(|| format!("the cache {} cannot be made", root.display()))?;
        Ok(Self { root: root.canonicalize()? })
    }

    /// The folder that holds the entries.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The folder `name`, made from `inputs`. When it is not there, `build` fills an empty folder
    /// that becomes the entry only if it succeeds; two runs at once build it once.
    ///
    /// # Errors
    /// What `build` says, and failures of the file system.
    pub fn entry(
        &self,
        name: &str,
        inputs: &[&[u8]],
        build: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<PathBuf> {
        let digest = tool::digest(inputs)?;
        let short = digest.get(..DIGEST_LENGTH).unwrap_or(&digest);
        let entry = self.root.join(format!("{name}-{short}"));
        if entry.exists() {
            return Ok(entry);
        }

        let lock = File::create(self.root.join(format!("{name}.lock")))?;
        lock.lock().with_context(|| format!("{name} in the cache cannot be locked"))?;
        if entry.exists() {
            return Ok(entry);
        }
        let unfinished = self.root.join(format!("{name}.unfinished"));
        remove_tree(&unfinished)?;
        fs::create_dir_all(&unfinished)?;
        build(&unfinished).with_context(|| format!("{name} cannot be made"))?;
        fs::rename(&unfinished, &entry)
            .with_context(|| format!("{} cannot be named", entry.display()))?;
        Ok(entry)
    }
}

fn remove_tree(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("{} cannot be removed", path.display()))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn an_entry_is_built_once_and_again_when_an_input_changes() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let cache = Cache { root: folder.path().to_owned() };
        let first = cache.entry("a", &[b"1"], |path| Ok(fs::write(path.join("f"), "first")?))?;
        let again = cache.entry("a", &[b"1"], |_| anyhow::bail!("built twice"))?;
        let other = cache.entry("a", &[b"2"], |path| Ok(fs::write(path.join("f"), "other")?))?;
        assert_eq!(first, again);
        assert_eq!(fs::read_to_string(first.join("f"))?, "first");
        assert_eq!(fs::read_to_string(other.join("f"))?, "other");
        Ok(())
    }

    #[test]
    fn a_failed_build_leaves_no_entry() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let cache = Cache { root: folder.path().to_owned() };
        let failed = cache.entry("a", &[b"1"], |path| {
            fs::write(path.join("half"), "")?;
            anyhow::bail!("no")
        });
        assert!(failed.is_err());
        let built = cache.entry("a", &[b"1"], |_| Ok(()))?;
        assert!(!built.join("half").exists());
        Ok(())
    }
}
