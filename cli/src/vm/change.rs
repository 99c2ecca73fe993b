//! Guests come, change and go: each step leaves a whole guest or none.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, chown};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail, ensure};

use super::flake::{self, Flake};
use super::folder::{self, Folder, Link, State};
use super::name::Name;
use super::power::{self, Power};
use super::programs::Program;
use super::roots;
use super::snapshot;
use super::units::{self, Unit};

/// What a new guest is made from.
pub(super) enum Source {
    Flake(Flake),
    Runner(PathBuf),
    /// The runner that another guest has by now: one system, several machines.
    InstanceOf(Name),
}

impl Source {
    /// What was asked for, with paths that are right from every folder.
    pub(super) fn new(
        flake: Option<Flake>,
        runner: Option<PathBuf>,
        instance_of: Option<Name>,
    ) -> Result<Self> {
        if let Some(other) = instance_of {
            return Ok(Self::InstanceOf(other));
        }
        match (flake, runner) {
            (_, Some(runner)) => {
                let path = fs::canonicalize(&runner)
                    .with_context(|| format!("--runner {}", runner.display()))?;
                Ok(Self::Runner(path))
            }
            (Some(flake), None) => flake.absolute().map(Self::Flake),
            (None, None) => flake::DEFAULT.parse().map(Self::Flake),
        }
    }
}

/// Makes a guest.
pub(super) fn create(state: &State, name: &Name, source: Source) -> Result<()> {
    let folder = state.folder(name);
    ensure_vacant(&folder)?;
    let unit = Unit::of(name).inspect_err(|error| log::warn!("{error:#}")).ok();
    let stage = state.stage(name)?;
    // Somebody else may have been faster until now, and cannot be from here on.
    ensure_vacant(&folder)?;
    fill(stage.folder(), state, source)?;
    prepare(stage.folder(), state, unit.as_ref())?;
    let finish = || {
        roots::add(&folder)?;
        stage.finish(&folder)
    };
    if let Err(error) = finish() {
        // What counts is why it failed; a root that leads nowhere keeps nothing.
        let _ = roots::remove(name);
        return Err(error);
    }
    let path = folder.path().display();
    log::info!("{name}: is in {path}; start it with `nixvmm vm start {name}`");
    if let Some(unit) = unit.filter(Unit::is_ours) {
        log::info!("{name}: `systemctl enable {}` starts it with the host", unit.id());
    }
    Ok(())
}

fn ensure_vacant(folder: &Folder) -> Result<()> {
    let name = folder.name();
    ensure!(
        !folder.has_guest()?,
        "{name}: {} has a guest: `nixvmm vm update {name}` builds it anew, `nixvmm vm destroy \
         {name}` forgets it",
        folder.path().display(),
    );
    Ok(())
}

/// Puts a built guest into `folder`.
fn fill(folder: &Folder, state: &State, source: Source) -> Result<()> {
    let name = folder.name();
    let current = folder.link(Link::Current);
    match source {
        Source::Flake(flake) => {
            log::info!("{name}: building it from {flake}");
            flake.build(name, &current)?;
            let file = folder.flake_file();
            fs::write(&file, format!("{flake}\n"))
                .with_context(|| format!("{name}: cannot write {}", file.display()))?;
        }
        Source::Runner(runner) => folder.set_target(Link::Current, &runner)?,
        Source::InstanceOf(other) => {
            let runner = state.guest(&other)?.link(Link::Current);
            let runner = fs::canonicalize(&runner)
                .with_context(|| format!("{other}: {} leads nowhere", runner.display()))?;
            folder.set_target(Link::Current, &runner)?;
            let values = state.folder(name).path().join("machine.d");
            log::info!(
                "{name}: has the system of {other}; what shall differ, such as `memory` and the \
                 `mac` of `nets`, goes into {}/*.json",
                values.display(),
            );
        }
    }
    flake::check(name, &current)
}

/// What the units need: a user of the guest's own, or for upstream's the owner of the state folder.
fn prepare(folder: &Folder, state: &State, unit: Option<&Unit>) -> Result<()> {
    let name = folder.name();
    let Some(unit) = unit.filter(|unit| unit.is_installed()) else {
        log::warn!("{name}: no unit for it is installed: `nixvmm vm run {name}` runs it here");
        return Ok(());
    };
    if unit.is_ours() {
        let user = name.user()?;
        let line = format!("u {user} - \"Guest {name}\"");
        return Program::Sysusers
            .call(["--inline", &line])
            .run()
            .with_context(|| format!("{name}: its user {user} cannot be made: are you root?"));
    }
    let context = || format!("{name}: cannot give {} to upstream's user", folder.path().display());
    let owner = fs::metadata(state.path()).with_context(context)?;
    chown(folder.path(), Some(owner.uid()), Some(owner.gid())).with_context(context)
}

/// The guests that have a flake to be built from.
pub(super) fn updatable(state: &State) -> Result<Vec<Name>> {
    let mut names = Vec::new();
    for folder in state.guests()? {
        if !folder.is_declared() && folder.flake()?.is_some() {
            names.push(folder.name().clone());
        }
    }
    Ok(names)
}

/// Updates each; one that fails keeps none of the others from it. Returns the status to end with.
pub(super) fn update_all(state: &State, names: &[Name], restart: bool) -> Result<u8> {
    let mut failures = 0_u8;
    for name in names {
        if let Err(error) = update(state, name, restart) {
            failures = failures.saturating_add(1);
            crate::log::report(&error);
        }
    }
    Ok(failures.min(1))
}

fn update(state: &State, name: &Name, restart: bool) -> Result<()> {
    let folder = state.guest(name)?;
    let shown = folder.path().display();
    ensure!(
        !folder.is_declared(),
        "{name}: the host's configuration has it ({shown} has `toplevel`): change it there and \
         rebuild the host",
    );
    let _lock = folder.lock()?;
    let Some(flake) = flake::of(&folder)? else {
        bail!(
            "{name}: {shown} has no file `flake` that tells what to build it from: write one, such \
             as {}",
            flake::DEFAULT,
        );
    };
    let new = folder.link(Link::New);
    folder.remove(&new)?;
    log::info!("{name}: building it from {flake}");
    let built = flake.build(name, &new).and_then(|()| flake::check(name, &new));
    if built.is_err() {
        folder.remove(&new)?;
    }
    built?;
    let after = folder.target(Link::New)?.context("nix has built nothing")?;
    let before = folder.target(Link::Current)?;
    let has_changed = before.as_ref() != Some(&after);
    if has_changed {
        make_current(&folder, &after)?;
        if let Some(before) = before {
            flake::tell_difference(&before, &after);
        }
    }
    folder.remove(&new)?;
    roots::add(&folder)?;
    if !has_changed {
        log::info!("{name}: nothing has changed");
    }
    restart_or_tell(state, &folder, restart)
}

/// Goes back to what was current before.
pub(super) fn rollback(state: &State, name: &Name, restart: bool) -> Result<()> {
    let folder = state.guest(name)?;
    let _lock = folder.lock()?;
    let old = folder.link(Link::Old);
    let Some(target) = folder.target(Link::Old)? else {
        bail!("{name}: there is nothing to go back to: {} is made by an update", old.display());
    };
    flake::check(name, &target).context("what was current before is gone")?;
    make_current(&folder, &target)?;
    roots::add(&folder)?;
    log::info!("{name}: current is {} again", target.display());
    if folder.is_declared() {
        log::warn!("{name}: the host's configuration has it, and its next switch undoes this");
    }
    restart_or_tell(state, &folder, restart)
}

/// Lets the next start run `target`; what was current is what a rollback goes back to.
fn make_current(folder: &Folder, target: &Path) -> Result<()> {
    if let Some(before) = folder.target(Link::Current)?
        && before != target
    {
        folder.set_target(Link::Old, &before)?;
    }
    folder.set_target(Link::Current, target)
}

fn restart_or_tell(state: &State, folder: &Folder, restart: bool) -> Result<()> {
    let name = folder.name();
    if !flake::needs_restart(folder)? {
        return Ok(());
    }
    if restart {
        return power::act(state, std::slice::from_ref(name), Power::Restart);
    }
    log::info!("{name}: runs what it ran before; `nixvmm vm restart {name}` changes that");
    Ok(())
}

/// Forgets a guest, and with `remove_state` removes everything it had.
pub(super) fn destroy(state: &State, name: &Name, remove_state: bool) -> Result<()> {
    let folder = state.folder(name);
    // A guest that is forgotten already still has what it wrote.
    if !(remove_state && folder.path().is_dir()) {
        state.guest(name)?;
    }
    let lock = folder.lock()?;
    ensure!(
        !folder.is_declared() || !units::is_installed_by_host(name)?,
        "{name}: the host's configuration has it: remove it there and rebuild the host, and then \
         destroy what is left",
    );
    let unit = Unit::of(name)?;
    if unit.is_up() {
        power::stop(std::slice::from_ref(&unit))?;
    }
    if unit.is_enabled() {
        Program::Systemctl.call(["disable", "--", &unit.id()]).run()?;
    }
    let path = folder.path().display();
    if remove_state {
        folder::remove_folder(state, &folder)?;
        snapshot::forget(state, name)?;
        log::info!("{name}: is gone, and {path} with it");
    } else {
        for link in [Link::Current, Link::Old, Link::New, Link::Booted] {
            folder.remove(&folder.link(link))?;
        }
        folder.remove(&folder.flake_file())?;
        folder.remove(&folder.path().join("toplevel"))?;
        log::info!(
            "{name}: is forgotten; what it wrote is in {path}, which `nixvmm vm destroy {name} \
             --remove-state` removes and a new {name} takes over",
        );
    }
    drop(lock);
    roots::remove(name)
}
