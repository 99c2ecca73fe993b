//! Paths of a machine: made absolute, and checked before anything is built.

use std::fs::{self, File, Metadata};
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail, ensure};
use rustix::fs::{AtFlags, CWD};

/// Disks are read and written in sectors of this many bytes (virtio 1.3, 5.2.4).
const SECTOR_BYTES: u64 = 512;

/// Longest path of a unix socket: sun_path without its final NUL (unix(7)).
pub const MAX_SOCKET_PATH_BYTES: usize = 107;

/// What a machine does with a file.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Access {
    Read,
    ReadWrite,
}

/// Tells files apart whatever their names are.
#[derive(PartialEq, Eq)]
pub(super) struct Identity {
    block_device: bool,
    device: u64,
    inode: u64,
}

/// A kernel or an initrd.
pub(super) fn resolve_regular(flag: &str, path: &mut PathBuf) -> Result<()> {
    resolve(flag, path, |path| {
        ensure!(fs::metadata(path)?.is_file(), "not a regular file");
        File::open(path)?;
        Ok(())
    })
}

/// A folder to share.
pub(super) fn resolve_folder(flag: &str, path: &mut PathBuf) -> Result<()> {
    resolve(flag, path, |path| {
        ensure!(fs::metadata(path)?.is_dir(), "not a folder");
        Ok(())
    })
}

/// A disk: a raw image or a block device that can be opened for `access`.
pub(super) fn resolve_image(flag: &str, path: &mut PathBuf, access: Access) -> Result<Identity> {
    resolve(flag, path, |path| {
        let file = fs::metadata(path)?;
        let block_device = file.file_type().is_block_device();
        ensure!(
            block_device || file.is_file(),
            "neither a regular file nor a block device, so no disk",
        );
        if !block_device {
            check_length(&file)?;
        }
        let mode = match access {
            Access::Read => rustix::fs::Access::READ_OK,
            Access::ReadWrite => rustix::fs::Access::READ_OK | rustix::fs::Access::WRITE_OK,
        };
        // Not opened: who watches a block device looks at it anew when a writer has closed it.
        rustix::fs::accessat(CWD, path, mode, AtFlags::EACCESS)
            .map_err(|error| refusal(&error.into(), access))?;
        Ok(Identity {
            block_device,
            device: if block_device { file.rdev() } else { file.dev() },
            inode: if block_device { 0 } else { file.ino() },
        })
    })
}

/// A file that receives output; it need not exist.
pub(super) fn resolve_output(flag: &str, path: &mut PathBuf) -> Result<()> {
    resolve(flag, path, |path| match fs::metadata(path) {
        Ok(file) if file.is_dir() => bail!("a folder, and output needs a file"),
        Ok(_) => Ok(()),
        Err(_) => check_parent(path),
    })
}

/// A socket to listen on; one that a dead process left behind may be in its place.
pub(super) fn resolve_socket(flag: &str, path: &mut PathBuf) -> Result<()> {
    resolve(flag, path, |path| {
        check_socket_length(path)?;
        match fs::symlink_metadata(path) {
            Ok(file) if file.file_type().is_socket() => Ok(()),
            Ok(_) => bail!("exists and is no socket: remove it or choose another name"),
            Err(_) => check_parent(path),
        }
    })
}

/// A socket to connect to, where somebody may listen or not.
pub(super) fn resolve_server(flag: &str, path: &mut PathBuf) -> Result<()> {
    resolve(flag, path, check_socket_length)
}

/// A symbolic link to make; an older one may be in its place.
pub(super) fn resolve_link(flag: &str, path: &mut PathBuf) -> Result<()> {
    resolve(flag, path, |path| match fs::symlink_metadata(path) {
        Ok(file) if file.is_symlink() => Ok(()),
        Ok(_) => bail!("exists and is no symbolic link: remove it or choose another name"),
        Err(_) => check_parent(path),
    })
}

/// Makes `path` absolute and puts it, as the user wrote it, before any complaint about it.
fn resolve<T>(flag: &str, path: &mut PathBuf, check: impl FnOnce(&Path) -> Result<T>) -> Result<T> {
    ensure!(!path.as_os_str().is_empty(), "{flag}: the path is empty");
    let context = || format!("{flag} {}", path.display());
    let absolute = std::path::absolute(&path).with_context(context)?;
    let checked = check(&absolute).with_context(context)?;
    *path = absolute;
    Ok(checked)
}

fn check_socket_length(path: &Path) -> Result<()> {
    let length = path.as_os_str().as_bytes().len();
    ensure!(
        length <= MAX_SOCKET_PATH_BYTES,
        "{length} bytes long, and a socket's path has at most {MAX_SOCKET_PATH_BYTES}: \
         use a shorter folder",
    );
    Ok(())
}

fn check_parent(path: &Path) -> Result<()> {
    let parent = path.parent().unwrap_or(Path::new("/"));
    match fs::metadata(parent) {
        Ok(folder) if folder.is_dir() => Ok(()),
        Ok(_) => bail!("{} is no folder", parent.display()),
        Err(error) => bail!("the folder {} must exist: {error}", parent.display()),
    }
}

fn check_length(file: &Metadata) -> Result<()> {
    let length = file.len();
    ensure!(length != 0, "empty: give a disk a size first, for example with truncate(1)");
    ensure!(
        length.is_multiple_of(SECTOR_BYTES),
        "{length} bytes long, which is not a multiple of {SECTOR_BYTES}: \
         `truncate --size=%{SECTOR_BYTES} FILE` fills the last sector with zeroes",
    );
    Ok(())
}

/// Why a disk cannot be used, with the remedy where the guest need not write.
pub(super) fn refusal(error: &io::Error, access: Access) -> anyhow::Error {
    let remedy = match (error.kind(), access) {
        (
            io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem,
            Access::ReadWrite,
        ) => ": make it writable or add `readonly`",
        _ => "",
    };
    anyhow::anyhow!("{error}{remedy}")
}
