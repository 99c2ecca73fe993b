//! Snapshots: the images of a guest as they were at a moment, which the guest can have back.
//!
//! While images of a running guest are copied its processors rest, so that what the guest issues
//! after it has heard of an end comes in no copy without what had ended: the images together are
//! what a power cut leaves. Requests that are under way when the processors come to rest go on;
//! the guest has heard the end of none of them, and each may be in the copy or not. nixvmm keeps
//! nothing back that it has reported as written, and a copy through the page cache of the same
//! host sees that, whether it is on the disk or not.

mod copy;
mod images;
mod rest;
mod shelf;
mod tag;

use std::fs::File;

use anyhow::{Context as _, Result, ensure};
use serde::Serialize;

use self::copy::Copier;
use self::images::{Hold, Home, Image};
use self::rest::Rest;
use self::shelf::{Record, Shelf, now};
use super::folder::{Folder, Link, State};
use super::list::print_json;
use super::name::Name;
use super::units::Unit;
use crate::ctl::print::{duration, size_text, table};

pub(crate) use self::tag::Tag;

/// Takes a snapshot of a guest, running or not.
pub(super) fn take(state: &State, name: &Name, tag: Option<Tag>) -> Result<()> {
    let folder = state.guest(name)?;
    let _lock = folder.lock()?;
    let shelf = Shelf::of(state, name);
    let tag = tag.map_or_else(|| shelf.tags().map(|tags| Tag::next(&tags)), Ok)?;
    let stage = shelf.stage(&tag)?;
    let home = Home::open(&folder)?;
    let mut copier = Copier::new()?;
    let machine = Rest::prepare(&folder);
    let images = match &machine {
        Some(machine) => home.images(machine.configuration(), Hold::Shared)?,
        None => home.images(&home.machine()?, Hold::Read)?,
    };
    ensure!(!images.is_empty(), "{name}: its machine writes to no file of its folder");
    let record = Record::new(&folder, &images, machine.is_some())?;
    let files = match machine {
        Some(machine) => copy_at_rest(machine, || stage.fill(&images, &mut copier)),
        None => stage.fill(&images, &mut copier),
    };
    let files = files.with_context(|| name.to_string())?;
    stage.finish(&record, &files).with_context(|| name.to_string())?;
    log::info!("{name}: has a snapshot; `nixvmm vm restore {name} {tag}` goes back to it");
    Ok(())
}

/// Does `copy` while the guest's processors rest.
fn copy_at_rest(machine: Rest, copy: impl FnOnce() -> Result<Vec<File>>) -> Result<Vec<File>> {
    let resting = machine.begin()?;
    let files = copy()?;
    resting.end()?;
    Ok(files)
}

/// Gives a guest that does not run the images of a snapshot; what it had becomes a snapshot, unless
/// it shall be lost.
pub(super) fn restore(state: &State, name: &Name, tag: &Tag, discard: bool) -> Result<()> {
    let folder = state.guest(name)?;
    let _lock = folder.lock()?;
    ensure!(
        !Unit::of(name).is_ok_and(|unit| unit.is_up()),
        "{name}: runs: `nixvmm vm stop {name}` stops it",
    );
    let shelf = Shelf::of(state, name);
    let snapshot = shelf.open(tag)?;
    let home = Home::open(&folder)?;
    let present = present(&home, &snapshot.record)?;
    let mut copier = Copier::new()?;
    let mut staged = Vec::new();
    for (path, file) in snapshot.images()? {
        staged.push(home.stage(path, &file, &mut copier)?);
    }
    if !discard && !present.is_empty() {
        keep(&shelf, &folder, &present, tag, &mut copier)?;
    }
    let count = staged.len();
    for (index, image) in staged.into_iter().enumerate() {
        image.finish().with_context(|| {
            format!("{name}: {index} of {count} images are those of {tag}: restore it once more")
        })?;
    }
    tell(&folder, tag, &snapshot.record)
}

/// The images that a machine would start with and those that are to be replaced, so that none can
/// start until they are closed.
fn present(home: &Home<'_>, record: &Record) -> Result<Vec<Image>> {
    let mut present = match home.machine() {
        Ok(machine) => home.images(&machine, Hold::Alone)?,
        Err(error) => {
            log::warn!("{error:#}");
            Vec::new()
        }
    };
    for recorded in &record.images {
        if present.iter().all(|image| image.path != recorded.path) {
            present.extend(home.image(&recorded.path, Hold::Alone)?);
        }
    }
    Ok(present)
}

/// Makes a snapshot of what a restore replaces.
fn keep(
    shelf: &Shelf,
    folder: &Folder,
    present: &[Image],
    tag: &Tag,
    copier: &mut Copier,
) -> Result<()> {
    let name = folder.name();
    let kept = Tag::next(&shelf.tags()?);
    let stage = shelf.stage(&kept)?;
    let files = stage.fill(present, copier).with_context(|| {
        format!("{name}: what is there cannot be kept; --discard restores without that")
    })?;
    let mut record = Record::new(folder, present, false)?;
    record.note = Some(format!("before {tag} was restored"));
    stage.finish(&record, &files).with_context(|| name.to_string())?;
    log::info!("{name}: what was there is the snapshot {kept}");
    Ok(())
}

fn tell(folder: &Folder, tag: &Tag, record: &Record) -> Result<()> {
    let name = folder.name();
    let current = folder.target(Link::Current)?;
    if let Some(runner) = &record.runner
        && Some(runner) != current.as_ref()
    {
        log::warn!(
            "{name}: {tag} was taken of {}, and the next start runs another system: `nixvmm vm \
             rollback {name}` may have the older one",
            runner.display(),
        );
    }
    log::info!("{name}: has the images of {tag}; `nixvmm vm start {name}` starts it");
    Ok(())
}

/// A snapshot as `snapshots --json` tells of it.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Listed {
    tag: String,
    #[serde(flatten)]
    record: Record,
    /// Bytes that it takes, those that it shares with the guest and other snapshots included.
    allocated: u64,
}

/// Prints the snapshots of a guest, the oldest first.
pub(super) fn list(state: &State, name: &Name, json: bool) -> Result<()> {
    let shelf = Shelf::of(state, name);
    let mut snapshots = Vec::new();
    for (tag, record) in shelf.snapshots()? {
        let allocated = shelf.open(&tag)?.allocated();
        snapshots.push(Listed { tag: tag.to_string(), record, allocated });
    }
    if snapshots.is_empty() {
        state.guest(name)?;
    }
    if json {
        return print_json(&snapshots);
    }
    if snapshots.is_empty() {
        log::info!("{name}: has no snapshots: `nixvmm vm snapshot {name}` takes one");
        return Ok(());
    }
    let mut rows = vec![["SNAPSHOT", "AGE", "SIZE", "RUNNER", "NOTE"].map(str::to_owned)];
    rows.extend(snapshots.iter().map(Listed::row));
    table(&rows)
}

impl Listed {
    fn row(&self) -> [String; 5] {
        let seconds = now().saturating_sub(self.record.taken);
        let runner = self.record.runner.as_ref().map(|path| path.display().to_string());
        let note = match &self.record.note {
            Some(note) => note.clone(),
            None if self.record.running => "while it ran".to_owned(),
            None => String::new(),
        };
        [
            self.tag.clone(),
            duration(seconds.saturating_mul(1_000_000)),
            size_text(self.allocated),
            runner.unwrap_or_default(),
            note,
        ]
    }
}

/// Removes snapshots.
pub(super) fn remove(state: &State, name: &Name, tags: &[Tag]) -> Result<()> {
    let folder = state.folder(name);
    let _lock = folder.path().is_dir().then(|| folder.lock()).transpose()?;
    let shelf = Shelf::of(state, name);
    for tag in tags {
        // Says that there is none where there is none; one that cannot be read can be removed.
        ensure!(
            shelf.tags()?.contains(tag),
            "{name}: has no snapshot {tag}: `nixvmm vm snapshots {name}` lists them",
        );
        shelf.remove(tag)?;
        log::info!("{name}: the snapshot {tag} is gone");
    }
    Ok(())
}

/// Removes all snapshots of a guest that is no more.
pub(super) fn forget(state: &State, name: &Name) -> Result<()> {
    Shelf::of(state, name).remove_all()
}
