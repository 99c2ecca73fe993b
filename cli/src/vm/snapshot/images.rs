//! The images of a guest: the files of its folder that its machine writes to.
//!
//! The folder is the guest's own, and whoever has broken out of it may have put anything there. So
//! nothing in it is opened through a link, and nothing but regular files.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::Read as _;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Component, Path, PathBuf};

use anyhow::{Context as _, Result, bail, ensure};
use rustix::fs::{
    AtFlags, CWD, Dir, Gid, Mode, OFlags, ResolveFlags, Uid, fchmod, fchown, fsync, openat2,
    renameat, unlinkat,
};
use rustix::io::Errno;
use serde_json::Value;
use vmm::config::Config;
use vmm::host::try_lock;

use super::copy::Copier;
use crate::vm::folder::{Folder, Link};

/// Far more than a machine has places for.
pub(super) const IMAGES_MAX: usize = 1024;

/// As long as `nixvmm run` lets a configuration file be.
const LAYER_BYTES_MAX: u64 = 1 << 20;

/// What an image that is being restored has behind its name.
const UNFINISHED: &str = ".restored";

const OPEN: OFlags = OFlags::CLOEXEC.union(OFlags::NOFOLLOW).union(OFlags::NONBLOCK);

/// The open folder of a guest.
pub(super) struct Home<'a> {
    folder: &'a Folder,
    directory: OwnedFd,
}

/// An image that is there.
pub(super) struct Image {
    /// Where it is in the guest's folder.
    pub(super) path: PathBuf,
    pub(super) file: File,
}

/// How images are opened, and who else may have them open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Hold {
    /// To be read while a machine that rests has them.
    Shared,
    /// To be read while no machine writes to them.
    Read,
    /// So that no machine can start with them.
    Alone,
}

impl<'a> Home<'a> {
    pub(super) fn open(folder: &'a Folder) -> Result<Self> {
        let flags = OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC;
        let directory = rustix::fs::openat(CWD, folder.path(), flags, Mode::empty());
        let directory = directory.with_context(|| format!("{}", folder.path().display()))?;
        Ok(Self { folder, directory })
    }

    /// The machine that the next start makes, of its runner and of what the folder lays over it.
    pub(super) fn machine(&self) -> Result<Value> {
        let name = self.folder.name();
        let file = "machine.json";
        let Some(text) = self.folder.note(Link::Current, file) else {
            bail!("{name}: its runner has no share/microvm/{file}: is it one of nixvmm?");
        };
        let mut texts = vec![(PathBuf::from(file), text)];
        texts.extend(self.layers()?);
        let texts: Vec<_> =
            texts.iter().map(|(file, text)| (file.as_path(), text.as_str())).collect();
        Ok(serde_json::to_value(Config::from_texts(&texts)?)?)
    }

    /// The writable files that `machine` names and that are in this folder; what is elsewhere is
    /// told of.
    pub(super) fn images(&self, machine: &Value, hold: Hold) -> Result<Vec<Image>> {
        let name = self.folder.name();
        let mut images: Vec<Image> = Vec::new();
        for path in writable(machine) {
            let found = match self.inside(&path) {
                Some(inside) if images.iter().any(|image| image.path == inside) => continue,
                Some(inside) => self.image(&inside, hold)?,
                None => None,
            };
            match found {
                Some(image) => images.push(image),
                None => log::warn!(
                    "{name}: {} is no file of the guest's folder, and not in the snapshot",
                    path.display(),
                ),
            }
            ensure!(images.len() <= IMAGES_MAX, "{name}: has more than {IMAGES_MAX} images");
        }
        Ok(images)
    }

    /// The image at `path`, if there is a regular file.
    pub(super) fn image(&self, path: &Path, hold: Hold) -> Result<Option<Image>> {
        let context = || format!("{}: cannot open {}", self.folder.name(), path.display());
        let access = if hold == Hold::Alone { OFlags::RDWR } else { OFlags::RDONLY };
        let file = match self.open_below(path, access) {
            Err(Errno::NOENT | Errno::LOOP | Errno::NXIO | Errno::ISDIR | Errno::NOTDIR) => {
                return Ok(None);
            }
            file => File::from(file.with_context(context)?),
        };
        if !file.metadata().with_context(context)?.is_file() {
            return Ok(None);
        }
        if hold != Hold::Shared {
            let is_ours = try_lock(file.as_fd(), hold == Hold::Read).unwrap_or(true);
            let name = self.folder.name();
            ensure!(
                is_ours,
                "{name}: {} is in use by a machine, and that cannot be asked to rest: stop it \
                 first",
                path.display(),
            );
        }
        Ok(Some(Image { path: path.to_owned(), file }))
    }

    /// Puts a copy of `source` beside the image at `path`, under another name.
    pub(super) fn stage(&self, path: &Path, source: &File, copier: &mut Copier) -> Result<Staged> {
        let context = || format!("{}: cannot restore {}", self.folder.name(), path.display());
        let inside = self.inside(path).with_context(context)?;
        let name = inside.file_name().with_context(context)?.to_owned();
        let parent = match inside.parent() {
            Some(parent) if parent != Path::new("") => parent,
            _ => Path::new("."),
        };
        let parent = self.open_below(parent, OFlags::DIRECTORY).with_context(context)?;
        let mut unfinished = name.clone();
        unfinished.push(UNFINISHED);
        match unlinkat(&parent, &unfinished, AtFlags::empty()) {
            Err(error) if error != Errno::NOENT => return Err(error).with_context(context),
            _ => {}
        }
        let file = create(&parent, &unfinished).with_context(context)?;
        let staged = Staged { parent, name, unfinished, is_finished: false };
        copier.copy(&path.display().to_string(), source, &file).with_context(context)?;
        self.own(&inside, &file).with_context(context)?;
        file.sync_all().with_context(context)?;
        Ok(staged)
    }

    /// Gives `file` to who has the image at `path`, or else the folder.
    fn own(&self, path: &Path, file: &File) -> Result<()> {
        let present = self.image(path, Hold::Shared)?;
        let (owner, mode) = match present {
            Some(image) => {
                let metadata = image.file.metadata()?;
                (metadata.clone(), metadata.mode() & 0o777)
            }
            None => (std::fs::metadata(self.folder.path())?, 0o600),
        };
        let fresh = file.metadata()?;
        if (fresh.uid(), fresh.gid()) != (owner.uid(), owner.gid()) {
            fchown(file, Some(Uid::from_raw(owner.uid())), Some(Gid::from_raw(owner.gid())))?;
        }
        Ok(fchmod(file, Mode::from_raw_mode(mode))?)
    }

    /// `machine.d`, in the order in which the runner takes it.
    fn layers(&self) -> Result<Vec<(PathBuf, String)>> {
        let folder = Path::new("machine.d");
        let directory = match self.open_below(folder, OFlags::DIRECTORY) {
            Err(Errno::NOENT) => return Ok(Vec::new()),
            directory => directory.with_context(|| folder.display().to_string())?,
        };
        let mut files = Vec::new();
        for entry in Dir::read_from(&directory)? {
            let name = PathBuf::from(OsString::from(entry?.file_name().to_string_lossy().as_ref()));
            let is_hidden = name.to_string_lossy().starts_with('.');
            if name.extension() == Some(OsStr::new("json")) && !is_hidden {
                files.push(folder.join(name));
            }
        }
        files.sort();
        let read = |file: PathBuf| {
            let text = self.layer(&file).with_context(|| file.display().to_string())?;
            Ok((file, text))
        };
        files.into_iter().map(read).collect()
    }

    fn layer(&self, path: &Path) -> Result<String> {
        let file = File::from(self.open_below(path, OFlags::RDONLY)?);
        ensure!(file.metadata()?.is_file(), "it is no regular file");
        let mut text = String::new();
        file.take(LAYER_BYTES_MAX + 1).read_to_string(&mut text)?;
        ensure!(text.len() as u64 <= LAYER_BYTES_MAX, "longer than {LAYER_BYTES_MAX} bytes");
        Ok(text)
    }

    fn open_below(&self, path: &Path, access: OFlags) -> rustix::io::Result<OwnedFd> {
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
        openat2(&self.directory, path, access | OPEN, Mode::empty(), resolve)
    }

    /// Where `path`, as the machine sees it, is in this folder.
    fn inside(&self, path: &Path) -> Option<PathBuf> {
        let path = path.strip_prefix(self.folder.path()).unwrap_or(path);
        let mut inside = PathBuf::new();
        for component in path.components() {
            match component {
                Component::Normal(name) => inside.push(name),
                Component::CurDir => {}
                _ => return None,
            }
        }
        Some(inside).filter(|inside| inside.file_name().is_some())
    }
}

/// A new file, for nobody else.
pub(super) fn create(directory: &OwnedFd, name: &OsStr) -> rustix::io::Result<File> {
    let flags = OFlags::CREATE | OFlags::EXCL | OFlags::RDWR | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let mode = Mode::RUSR | Mode::WUSR;
    rustix::fs::openat(directory, name, flags, mode).map(File::from)
}

/// What is to become an image. Dropped, it has never been.
pub(super) struct Staged {
    parent: OwnedFd,
    name: OsString,
    unfinished: OsString,
    is_finished: bool,
}

impl Staged {
    /// Takes the place of the image, at once.
    pub(super) fn finish(mut self) -> Result<()> {
        let context = || format!("cannot replace {}", self.name.display());
        renameat(&self.parent, &self.unfinished, &self.parent, &self.name).with_context(context)?;
        self.is_finished = true;
        fsync(&self.parent).with_context(|| format!("cannot replace {}", self.name.display()))
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        // What cannot be removed is out of the way: the next restore begins with removing it.
        if !self.is_finished {
            let _ = unlinkat(&self.parent, &self.unfinished, AtFlags::empty());
        }
    }
}

/// What a machine writes to.
fn writable(machine: &Value) -> Vec<PathBuf> {
    let named = |list: &str, key: &str| -> Vec<PathBuf> {
        let items = machine[list].as_array().into_iter().flatten();
        let items = items.filter(|item| item["readonly"] != true);
        items.filter_map(|item| item[key].as_str()).map(PathBuf::from).collect()
    };
    [named("disks", "path"), named("pmems", "file")].concat()
}
