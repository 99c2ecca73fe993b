//! `nixvmm unpack-kernel`.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};

/// Writes the ELF inside `bzimage` to `vmlinux`, which is whole or not there at all; `-` is
/// standard output.
pub(crate) fn unpack_kernel(bzimage: &Path, vmlinux: &Path) -> Result<()> {
    let mut kernel =
        File::open(bzimage).with_context(|| format!("cannot open {}", bzimage.display()))?;
    if vmlinux == Path::new("-") {
        let mut out = BufWriter::new(io::stdout().lock());
        return unpack(&mut kernel, bzimage, &mut out);
    }
    let cannot_write = || format!("cannot write {}", vmlinux.display());
    let (mut unfinished, file) = Unfinished::beside(vmlinux).with_context(cannot_write)?;
    let mut out = BufWriter::new(file);
    unpack(&mut kernel, bzimage, &mut out)?;
    out.into_inner()
        .map_err(io::IntoInnerError::into_error)?
        .sync_all()
        .with_context(cannot_write)?;
    unfinished.rename(vmlinux).with_context(cannot_write)
}

fn unpack(kernel: &mut File, bzimage: &Path, out: &mut impl Write) -> Result<()> {
    boot::unpack::unpack_kernel(kernel, out)
        .with_context(|| format!("cannot unpack {}", bzimage.display()))?;
    out.flush().context("cannot write the kernel")
}

/// A file that is removed unless it gets its name.
struct Unfinished {
    path: Option<PathBuf>,
}

impl Unfinished {
    /// Makes a new file in the folder of `target`.
    fn beside(target: &Path) -> Result<(Self, File)> {
        let mut name = target.file_name().context("not the name of a file")?.to_owned();
        ensure!(!target.is_dir(), "a folder is in its place");
        name.push(format!(".{}", std::process::id()));
        let path = target.with_file_name(name);
        let file = OpenOptions::new().write(true).create_new(true).open(&path)?;
        Ok((Self { path: Some(path) }, file))
    }

    fn rename(&mut self, target: &Path) -> Result<()> {
        if let Some(path) = &self.path {
            fs::rename(path, target)?;
            self.path = None;
        }
        Ok(())
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        if let Some(path) = &self.path {
            // What remains of a failure that is reported already.
            let _ = fs::remove_file(path);
        }
    }
}
