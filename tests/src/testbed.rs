//! What does a test boot? Everything that is fetched or built, as paths: made once before the first
//! guest, and handed as a file to the process that runs the tests in the emulated host.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::cache::Cache;
use crate::kernel::Kernel;
use crate::nixos_guest::NixosGuest;
use crate::packages::{self, Program};
use crate::{program, tiny_guest, tool};

/// All that guests are made of.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Testbed {
    /// The built `nixvmm`.
    pub program: PathBuf,
    /// Debian's kernel as it is shipped.
    pub bzimage: PathBuf,
    /// The ELF inside it, taken out by `nixvmm unpack-kernel`.
    pub vmlinux: PathBuf,
    /// The tiny guest's initramfs.
    pub tiny: PathBuf,
    /// The NixOS-shaped guest.
    pub nixos: NixosGuest,
}

impl Testbed {
    /// Fetches and builds everything, which may take minutes the first time.
    ///
    /// # Errors
    /// What could not be fetched, installed or built.
    pub fn prepare(cache: &Cache) -> Result<Self> {
        packages::require(&[Program::MakeExt4])?;
        let kernel = Kernel::fetch(cache)?;
        let program = program::build()?;
        let vmlinux = cache.root().join(format!("vmlinux-{}", kernel.release));
        let unpack = [Path::new("unpack-kernel"), &kernel.image, &vmlinux];
        let _ = fs::remove_file(&vmlinux);
        tool::finish(tool::command(&program.to_string_lossy()).args(unpack))
            .context("the kernel's ELF cannot be unpacked")?;
        let tiny = tiny_guest::initramfs(cache, &kernel)?;
        let nixos = NixosGuest::prepare(cache, &kernel)?;
        Ok(Self { program, bzimage: kernel.image, vmlinux, tiny, nixos })
    }

    /// Writes it to `path`.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn save(&self, path: &Path) -> Result<()> {
        let text = serde_json::to_string_pretty(self)?;
        fs::write(path, text).with_context(|| path.display().to_string())
    }

    /// Reads what [`Self::save`] wrote.
    ///
    /// # Errors
    /// When the file cannot be read or is not of this version.
    pub fn load(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path).with_context(|| path.display().to_string())?;
        Ok(serde_json::from_str(&text)?)
    }
}
