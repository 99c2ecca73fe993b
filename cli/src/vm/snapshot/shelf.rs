//! Where the snapshots of a guest are: beside the folders of guests, out of reach of the guests.
//!
//! A snapshot is a folder: the images by number, what they are in a file, a link to the runner.

use std::ffi::OsStr;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{ErrorKind, Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, ensure};
use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::io::Errno;
use rustix::process::geteuid;
use serde::{Deserialize, Serialize};

use super::copy::{Copier, allocated};
use super::images::{IMAGES_MAX, Image, create};
use super::tag::Tag;
use crate::vm::folder::{Folder, Link, State};
use crate::vm::name::Name;

/// No guest's name begins with a dot.
const SHELVES: &str = ".snapshots";

const RECORD: &str = "snapshot.json";

/// Enough for as many images as a machine can have, each with the longest path.
const RECORD_BYTES_MAX: u64 = 8 << 20;

/// What a snapshot is.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Record {
    /// When it was taken, in seconds since 1970.
    pub(super) taken: u64,
    /// What the guest ran, or would have run next, and the link that led there.
    pub(super) runner: Option<PathBuf>,
    pub(super) link: String,
    /// Whether the guest ran, so that its file systems are as after a power cut.
    pub(super) running: bool,
    /// Why it was taken, where nobody asked for it.
    pub(super) note: Option<String>,
    pub(super) images: Vec<RecordedImage>,
}

/// An image of a snapshot.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct RecordedImage {
    /// Where it was in the guest's folder.
    pub(super) path: PathBuf,
    /// Its size in bytes.
    pub(super) size: u64,
}

/// All snapshots of a guest.
pub(super) struct Shelf {
    name: Name,
    path: PathBuf,
}

impl Shelf {
    pub(super) fn of(state: &State, name: &Name) -> Self {
        let path = state.path().join(SHELVES).join(name.as_str());
        Self { name: name.clone(), path }
    }

    /// What there is, the oldest first. One that cannot be read is told of.
    pub(super) fn snapshots(&self) -> Result<Vec<(Tag, Record)>> {
        let mut snapshots = Vec::new();
        for tag in self.tags()? {
            match self.open(&tag) {
                Ok(snapshot) => snapshots.push((tag, snapshot.record)),
                Err(error) => log::warn!("{error:#}"),
            }
        }
        snapshots.sort_by_key(|(_, record)| record.taken);
        Ok(snapshots)
    }

    /// The names of snapshots that exist.
    pub(super) fn tags(&self) -> Result<Vec<Tag>> {
        let context = || format!("cannot read {}", self.path.display());
        let entries = match fs::read_dir(&self.path) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.with_context(context)?,
        };
        let mut tags = Vec::new();
        for entry in entries {
            let name = entry.with_context(context)?.file_name();
            tags.extend(name.to_str().and_then(|name| name.parse().ok()));
        }
        Ok(tags)
    }

    /// A snapshot that exists.
    pub(super) fn open(&self, tag: &Tag) -> Result<Snapshot> {
        let (name, path) = (&self.name, self.path.join(tag.as_str()));
        ensure!(
            path.is_dir(),
            "{name}: has no snapshot {tag}: `nixvmm vm snapshots {name}` lists them",
        );
        let file = path.join(RECORD);
        let read = || -> Result<Record> {
            let mut text = Vec::new();
            File::open(&file)?.take(RECORD_BYTES_MAX).read_to_end(&mut text)?;
            let record: Record = serde_json::from_slice(&text)?;
            ensure!(record.images.len() <= IMAGES_MAX, "it has more than {IMAGES_MAX} images");
            Ok(record)
        };
        let record = read().with_context(|| format!("{name}: cannot read {}", file.display()))?;
        Ok(Snapshot { path, record })
    }

    /// A snapshot that is being made, out of sight.
    pub(super) fn stage(&self, tag: &Tag) -> Result<Stage> {
        let target = self.path.join(tag.as_str());
        let name = &self.name;
        ensure!(
            !target.exists(),
            "{name}: has a snapshot {tag}: choose another name, or remove it with `nixvmm vm \
             snapshots {name} --remove {tag}`",
        );
        let path = self.path.join(format!(".new-{tag}"));
        let make = || -> Result<OwnedFd> {
            self.make()?;
            remove_if_there(&path)?;
            DirBuilder::new().mode(0o700).create(&path)?;
            Ok(File::open(&path)?.into())
        };
        let directory = make().with_context(|| format!("cannot make {}", path.display()))?;
        Ok(Stage { path, directory, target, is_finished: false })
    }

    /// Removes a snapshot: it is gone at once, whatever becomes of its contents.
    pub(super) fn remove(&self, tag: &Tag) -> Result<()> {
        let path = self.path.join(tag.as_str());
        let doomed = self.path.join(format!(".old-{tag}"));
        let remove = || -> Result<()> {
            remove_if_there(&doomed)?;
            fs::rename(&path, &doomed)?;
            Ok(fs::remove_dir_all(&doomed)?)
        };
        remove().with_context(|| format!("{}: cannot remove {}", self.name, path.display()))
    }

    /// Removes all of them.
    pub(super) fn remove_all(&self) -> Result<()> {
        remove_if_there(&self.path)
            .with_context(|| format!("{}: cannot remove {}", self.name, self.path.display()))
    }

    /// Makes the folder, which nobody else may look into or have made.
    fn make(&self) -> Result<()> {
        let shelves = self.path.parent().context("a shelf is in a folder")?;
        for path in [shelves, &self.path] {
            match DirBuilder::new().mode(0o700).create(path) {
                Err(error) if error.kind() != ErrorKind::AlreadyExists => return Err(error.into()),
                _ => {}
            }
            let metadata = fs::symlink_metadata(path)?;
            ensure!(
                metadata.is_dir() && metadata.uid() == geteuid().as_raw(),
                "{} is somebody else's",
                path.display(),
            );
        }
        Ok(())
    }
}

/// A snapshot.
pub(super) struct Snapshot {
    path: PathBuf,
    pub(super) record: Record,
}

impl Snapshot {
    /// The images with where they were.
    pub(super) fn images(&self) -> Result<Vec<(&Path, File)>> {
        let open = |(index, image): (usize, &'_ RecordedImage)| {
            let path = self.path.join(file_name(index));
            let file = OpenOptions::new()
                .read(true)
                .custom_flags(libc::O_NOFOLLOW)
                .open(&path)
                .with_context(|| format!("cannot open {}", path.display()))?;
            Ok(file).and_then(|file| {
                let size = file.metadata()?.len();
                ensure!(size == image.size, "{} has {size} bytes", path.display());
                Ok(file)
            })
        };
        let images = self.record.images.iter().enumerate();
        images.map(|item| Ok((item.1.path.as_path(), open(item)?))).collect()
    }

    /// Bytes that the images take, those that they share with others included.
    pub(super) fn allocated(&self) -> u64 {
        let images = (0..self.record.images.len()).map(|index| self.path.join(file_name(index)));
        let bytes = images.map(|path| fs::metadata(path).map_or(0, |file| allocated(&file)));
        bytes.sum()
    }
}

/// A snapshot that is being made. Dropped, it is as if nobody had begun.
pub(super) struct Stage {
    path: PathBuf,
    directory: OwnedFd,
    target: PathBuf,
    is_finished: bool,
}

impl Stage {
    /// Copies images, whose machine must not write to them meanwhile.
    pub(super) fn fill(&self, images: &[Image], copier: &mut Copier) -> Result<Vec<File>> {
        let mut files = Vec::with_capacity(images.len());
        for (index, image) in images.iter().enumerate() {
            let what = image.path.display().to_string();
            let context = || format!("cannot copy {what}");
            let file = create(&self.directory, OsStr::new(&file_name(index)));
            let file = file.with_context(context)?;
            copier.copy(&what, &image.file, &file).with_context(context)?;
            files.push(file);
        }
        Ok(files)
    }

    /// Makes the snapshot appear, all at once and for good.
    pub(super) fn finish(mut self, record: &Record, files: &[File]) -> Result<()> {
        let write = || -> Result<()> {
            for file in files {
                file.sync_all()?;
            }
            if let Some(runner) = &record.runner {
                symlink(runner, self.path.join("runner"))?;
            }
            let mut file = create(&self.directory, OsStr::new(RECORD))?;
            file.write_all(&serde_json::to_vec_pretty(record)?)?;
            file.sync_all()?;
            rustix::fs::fsync(&self.directory)?;
            match renameat_with(CWD, &self.path, CWD, &self.target, RenameFlags::NOREPLACE) {
                // A file system that cannot do both at once.
                Err(Errno::INVAL | Errno::NOSYS) => fs::rename(&self.path, &self.target)?,
                renamed => renamed?,
            }
            let parent = self.target.parent().context("a snapshot is in a folder")?;
            Ok(File::open(parent)?.sync_all()?)
        };
        write().with_context(|| format!("cannot make {}", self.target.display()))?;
        self.is_finished = true;
        Ok(())
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        // What cannot be removed is out of sight.
        if !self.is_finished {
            let _ = fs::remove_dir_all(&self.path);
        }
    }
}

impl Record {
    /// What a snapshot of `images` is that is taken now.
    pub(super) fn new(folder: &Folder, images: &[Image], running: bool) -> Result<Self> {
        let booted = folder.target(Link::Booted)?.filter(|_| running);
        let link = if booted.is_some() { "booted" } else { "current" };
        let runner = match booted {
            Some(runner) => Some(runner),
            None => folder.target(Link::Current)?,
        };
        let recorded = |image: &Image| -> Result<RecordedImage> {
            Ok(RecordedImage { path: image.path.clone(), size: image.file.metadata()?.len() })
        };
        Ok(Self {
            taken: now(),
            runner,
            link: link.to_owned(),
            running,
            note: None,
            images: images.iter().map(recorded).collect::<Result<_>>()?,
        })
    }
}

/// Seconds since 1970.
pub(super) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs())
}

fn file_name(index: usize) -> String {
    format!("{index}.img")
}

fn remove_if_there(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error.into()),
        _ => Ok(()),
    }
}
