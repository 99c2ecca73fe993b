//! The state folder and the folder of each guest in it, as microvm.nix lays them out.

use std::fs::{self, DirBuilder, File};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{DirBuilderExt as _, symlink};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, anyhow, bail, ensure};

use super::name::Name;

/// Where all guests have their state.
pub(super) const STATE: &str = "/var/lib/microvms";

/// What a guest's folder is for others: its units give it this mode too.
const FOLDER_MODE: u32 = 0o750;

/// A link to a runner in a guest's folder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Link {
    /// What the next start runs. A guest is a folder that has it.
    Current,
    /// What runs: the units make it and take it away.
    Booted,
    /// What was current before.
    Old,
    /// What has just been built.
    New,
}

impl Link {
    fn name(self) -> &'static str {
        match self {
            Self::Current => "current",
            Self::Booted => "booted",
            Self::Old => "old",
            Self::New => "new",
        }
    }
}

/// The folder that has all guests.
pub(super) struct State {
    path: PathBuf,
}

impl State {
    pub(super) fn new(path: &Path) -> Result<Self> {
        let path = std::path::absolute(path).context("--state")?;
        Ok(Self { path })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// The folder of a guest, whether there is one or not.
    pub(super) fn folder(&self, name: &Name) -> Folder {
        Folder { name: name.clone(), path: self.path.join(name.as_str()) }
    }

    /// The folder of a guest that exists.
    pub(super) fn guest(&self, name: &Name) -> Result<Folder> {
        let folder = self.folder(name);
        let state = self.path.display();
        ensure!(
            folder.has_guest()?,
            "{name}: there is no such guest in {state}: `nixvmm vm list` tells which there are, \
             `nixvmm vm create {name}` makes one",
        );
        Ok(folder)
    }

    /// All guests by name; none where there is no such folder.
    pub(super) fn guests(&self) -> Result<Vec<Folder>> {
        let context = || format!("cannot read {}", self.path.display());
        let entries = match fs::read_dir(&self.path) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.with_context(context)?,
        };
        let mut folders = Vec::new();
        for entry in entries {
            let name = entry.with_context(context)?.file_name();
            let Some(Ok(name)) = name.to_str().map(str::parse) else { continue };
            let folder = self.folder(&name);
            if folder.has_guest()? {
                folders.push(folder);
            }
        }
        folders.sort_by(|one, other| one.name.cmp(&other.name));
        Ok(folders)
    }

    /// A folder where a guest is made, out of sight, and which nobody else works in.
    pub(super) fn stage(&self, name: &Name) -> Result<Stage> {
        // No guest's name begins with a dot.
        let path = self.path.join(format!(".create-{name}"));
        let context = || {
            format!("{name}: cannot make {}: is this user allowed to make guests?", path.display())
        };
        fs::create_dir_all(&self.path).with_context(context)?;
        match DirBuilder::new().mode(FOLDER_MODE).create(&path) {
            Err(error) if error.kind() != ErrorKind::AlreadyExists => {
                return Err(error).with_context(context);
            }
            _ => {}
        }
        let folder = Folder { name: name.clone(), path: path.clone() };
        let lock = folder.lock()?;
        let stage = Stage { folder, _lock: lock, is_finished: false };
        stage.clear().with_context(context)?;
        Ok(stage)
    }
}

/// The folder of a guest.
pub(super) struct Folder {
    name: Name,
    path: PathBuf,
}

impl Folder {
    pub(super) fn name(&self) -> &Name {
        &self.name
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Whether there is a guest; one that may not be looked into is one.
    pub(super) fn has_guest(&self) -> Result<bool> {
        match fs::symlink_metadata(self.link(Link::Current)) {
            Ok(_) => Ok(true),
            Err(error)
                if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) =>
            {
                Ok(false)
            }
            Err(error) if error.kind() == ErrorKind::PermissionDenied => Ok(true),
            Err(error) => Err(error).with_context(|| self.cannot("look at")),
        }
    }

    /// Keeps other commands from changing this guest until the lock is dropped.
    pub(super) fn lock(&self) -> Result<File> {
        let file = File::open(&self.path).with_context(|| self.cannot("open"))?;
        match file.try_lock() {
            Ok(()) => Ok(file),
            Err(fs::TryLockError::WouldBlock) => {
                bail!("{}: another command is at work on it: try again when it is done", self.name)
            }
            Err(fs::TryLockError::Error(error)) => Err(error).with_context(|| self.cannot("lock")),
        }
    }

    pub(super) fn link(&self, link: Link) -> PathBuf {
        self.path.join(link.name())
    }

    /// Where a link leads, if there is one.
    pub(super) fn target(&self, link: Link) -> Result<Option<PathBuf>> {
        match fs::read_link(self.link(link)) {
            Ok(target) => Ok(Some(target)),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error).with_context(|| {
                format!("{}: cannot read the link {}", self.name, self.link(link).display())
            }),
        }
    }

    /// Lets a link lead to `target`: at every moment it leads somewhere.
    pub(super) fn set_target(&self, link: Link, target: &Path) -> Result<()> {
        let path = self.link(link);
        let fresh = self.path.join(format!(".{}", link.name()));
        let replace = || -> io::Result<()> {
            remove_if_there(&fresh)?;
            symlink(target, &fresh)?;
            fs::rename(&fresh, &path)
        };
        replace().with_context(|| {
            format!("{}: cannot let {} lead to {}", self.name, path.display(), target.display())
        })
    }

    /// Removes a link or file of the folder, if there is one.
    pub(super) fn remove(&self, path: &Path) -> Result<()> {
        remove_if_there(path)
            .with_context(|| format!("{}: cannot remove {}", self.name, path.display()))
    }

    /// Where the guest's flake is written down.
    pub(super) fn flake_file(&self) -> PathBuf {
        self.path.join("flake")
    }

    /// The flake that the guest is built from, if it was made from one.
    pub(super) fn flake(&self) -> Result<Option<String>> {
        let path = self.flake_file();
        match fs::read_to_string(&path) {
            Ok(text) => Ok(Some(text.trim().to_owned()).filter(|text| !text.is_empty())),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => {
                Err(error).with_context(|| format!("{}: cannot read {}", self.name, path.display()))
            }
        }
    }

    /// Whether the host's own configuration has the guest.
    pub(super) fn is_declared(&self) -> bool {
        fs::symlink_metadata(self.path.join("toplevel")).is_ok()
    }

    /// What the runner behind `link` says about itself in `share/microvm/FILE`.
    pub(super) fn note(&self, link: Link, file: &str) -> Option<String> {
        let path = self.link(link).join("share/microvm").join(file);
        let text = fs::read_to_string(path).ok()?;
        Some(text.trim().to_owned()).filter(|text| !text.is_empty())
    }

    fn cannot(&self, what: &str) -> String {
        format!("{}: cannot {what} {}", self.name, self.path.display())
    }
}

/// A guest that is being made. Dropped, it is as if nobody had begun; where even that is not
/// possible, the next command that makes this guest begins with an empty folder.
pub(super) struct Stage {
    folder: Folder,
    _lock: File,
    is_finished: bool,
}

impl Stage {
    pub(super) fn folder(&self) -> &Folder {
        &self.folder
    }

    /// Makes the guest appear in `folder`, all at once.
    pub(super) fn finish(mut self, folder: &Folder) -> Result<()> {
        let context = || {
            format!(
                "{}: cannot rename {} to {}",
                folder.name,
                self.folder.path.display(),
                folder.path.display()
            )
        };
        match fs::rename(&self.folder.path, &folder.path) {
            Err(error) if error.kind() == ErrorKind::DirectoryNotEmpty => {
                self.fill(folder).with_context(context)
            }
            outcome => {
                self.is_finished = outcome.is_ok();
                outcome.with_context(context)
            }
        }
    }

    /// The folder has been there before, with images of a guest that is no more; what makes it a
    /// guest's comes last.
    fn fill(&self, folder: &Folder) -> io::Result<()> {
        let mut links = Vec::new();
        for entry in fs::read_dir(&self.folder.path)? {
            links.push(entry?.file_name());
        }
        links.sort_by_key(|name| name == Link::Current.name());
        for name in links {
            fs::rename(self.folder.path.join(&name), folder.path.join(&name))?;
        }
        Ok(())
    }

    /// Empties the folder of what somebody left who was interrupted.
    fn clear(&self) -> io::Result<()> {
        for entry in fs::read_dir(&self.folder.path)? {
            fs::remove_file(entry?.path())?;
        }
        Ok(())
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        // What cannot be removed is out of sight.
        if !self.is_finished {
            let _ = fs::remove_dir_all(&self.folder.path);
        }
    }
}

fn remove_if_there(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Takes the whole folder of a guest away, images and all: it is gone at once, whatever becomes of
/// its contents.
pub(super) fn remove_folder(state: &State, folder: &Folder) -> Result<()> {
    let name = folder.name();
    let doomed = state.path().join(format!(".destroy-{name}"));
    let shown = folder.path().display();
    ensure!(
        !folder.path().is_symlink(),
        "{name}: {shown} is a link: remove what it leads to, and then the link, by hand",
    );
    if doomed.exists() {
        fs::remove_dir_all(&doomed)
            .with_context(|| format!("{name}: cannot remove {}", doomed.display()))?;
    }
    fs::rename(folder.path(), &doomed)
        .map_err(|error| match error.kind() {
            ErrorKind::ResourceBusy => anyhow!("{error}: is it a file system of its own?"),
            _ => anyhow!(error),
        })
        .with_context(|| format!("{name}: cannot remove {shown}"))?;
    fs::remove_dir_all(&doomed).with_context(|| {
        format!("{name}: cannot remove all of {}: remove it by hand", doomed.display())
    })
}
