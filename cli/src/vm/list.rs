//! What there is, for people and for programs.

use std::io::{self, Write as _};
use std::path::PathBuf;

use anyhow::Result;
use serde::Serialize;

use super::flake;
use super::folder::{Folder, Link, State};
use super::guest;
use super::name::Name;
use super::units::Unit;
use crate::ctl::print::table;

/// The status of `status` where the guest does not run, as systemctl's.
const NOT_RUNNING: u8 = 3;

/// A guest as `list --json` tells of it.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Guest {
    name: String,
    /// running, starting, restarting, stopping, stopped, failed; unknown without systemd.
    state: &'static str,
    /// When it came up, in systemd's words.
    since: Option<String>,
    /// Why it failed.
    reason: Option<String>,
    /// What its own systemd last said.
    status: Option<String>,
    process_id: Option<u32>,
    unit: Option<String>,
    folder: PathBuf,
    /// What it is built from; none where the host's configuration has it, or a runner was given.
    flake: Option<String>,
    /// Whether the host's configuration has it.
    declared: bool,
    hypervisor: Option<String>,
    /// What the next start runs, what runs, and what a rollback goes back to.
    current: Option<PathBuf>,
    booted: Option<PathBuf>,
    old: Option<PathBuf>,
    needs_restart: bool,
    /// Whether an update would change it; none where that was not asked for, or is not known.
    outdated: Option<bool>,
}

/// Prints all guests.
pub(super) fn list(state: &State, json: bool, outdated: bool) -> Result<()> {
    let folders = state.guests()?;
    let names: Vec<_> = folders.iter().map(|folder| folder.name().clone()).collect();
    let units = match Unit::of_all(&names) {
        Ok(units) => units.into_iter().map(Some).collect(),
        Err(error) => {
            log::warn!("what guests do is not known: {error:#}");
            vec![None; names.len()]
        }
    };
    let guests: Vec<_> = folders
        .iter()
        .zip(&units)
        .map(|(folder, unit)| Guest::new(folder, unit.as_ref(), outdated))
        .collect();
    if json {
        return print_json(&guests);
    }
    if guests.is_empty() {
        log::info!(
            "there are no guests in {}: `nixvmm vm create NAME` makes one",
            state.path().display()
        );
        return Ok(());
    }
    let mut rows = vec![["NAME", "STATE", "FROM", "NOTE"].map(str::to_owned)];
    rows.extend(guests.iter().map(Guest::row));
    table(&rows)
}

/// Prints one guest; returns the status to end with.
pub(super) fn status(state: &State, name: &Name, json: bool) -> Result<u8> {
    let folder = state.guest(name)?;
    let unit = Unit::of(name)?;
    let guest = Guest::new(&folder, Some(&unit), false);
    if json {
        print_json(&guest)?;
    } else {
        table(&guest.rows())?;
        if guest.state == "running" {
            guest::print_state(&folder);
        }
    }
    Ok(if guest.state == "running" { 0 } else { NOT_RUNNING })
}

impl Guest {
    /// A guest whose folder cannot be read has nothing in it.
    fn new(folder: &Folder, unit: Option<&Unit>, evaluate: bool) -> Self {
        let name = folder.name();
        let target = |link| folder.target(link).ok().flatten();
        let (current, booted) = (target(Link::Current), target(Link::Booted));
        if current.is_none() {
            log::warn!("{name}: {} cannot be read: are you root?", folder.path().display());
        }
        let flake = folder.flake().ok().flatten();
        let declared = folder.is_declared();
        let outdated = match evaluate && !declared && flake.is_some() {
            true => is_outdated(folder, current.as_ref()),
            false => None,
        };
        Self {
            name: name.to_string(),
            state: unit.map_or("unknown", Unit::state),
            since: unit.and_then(Unit::since).map(str::to_owned),
            reason: unit.filter(|unit| unit.is_failed()).map(Unit::reason),
            status: unit.and_then(Unit::status_text).map(str::to_owned),
            process_id: unit.and_then(Unit::process),
            unit: unit.filter(|unit| unit.is_installed()).map(Unit::id),
            folder: folder.path().to_owned(),
            flake,
            declared,
            hypervisor: folder.note(Link::Current, "hypervisor"),
            needs_restart: flake::needs_restart(folder).unwrap_or(false),
            old: target(Link::Old),
            current,
            booted,
            outdated,
        }
    }

    fn origin(&self) -> String {
        match &self.flake {
            _ if self.declared => "the host's configuration".to_owned(),
            Some(flake) => flake.clone(),
            None => "a runner".to_owned(),
        }
    }

    fn note(&self) -> String {
        let mut notes = Vec::new();
        if let Some(reason) = &self.reason {
            notes.push(reason.clone());
        }
        if self.needs_restart {
            notes.push(format!("changed: `nixvmm vm restart {}`", self.name));
        }
        if self.outdated == Some(true) {
            notes.push(format!("outdated: `nixvmm vm update {}`", self.name));
        }
        notes.join("; ")
    }

    fn row(&self) -> [String; 4] {
        [self.name.clone(), self.state.to_owned(), self.origin(), self.note()]
    }

    fn rows(&self) -> Vec<[String; 2]> {
        let path = |path: &Option<PathBuf>| path.as_ref().map(|path| path.display().to_string());
        let rows = [
            ("guest", Some(self.name.clone())),
            ("state", Some(self.state.to_owned())),
            ("since", self.since.clone()),
            ("says", self.status.clone()),
            ("unit", self.unit.clone()),
            ("folder", Some(self.folder.display().to_string())),
            ("from", Some(self.origin())),
            ("hypervisor", self.hypervisor.clone()),
            ("next start", path(&self.current)),
            ("runs", path(&self.booted)),
            ("rollback", path(&self.old)),
            ("note", Some(self.note()).filter(|note| !note.is_empty())),
        ];
        let known = rows.into_iter().filter_map(|(key, value)| Some([key.to_owned(), value?]));
        known.collect()
    }
}

fn is_outdated(folder: &Folder, current: Option<&PathBuf>) -> Option<bool> {
    let name = folder.name();
    log::info!("{name}: evaluating its flake");
    match flake::of(folder).and_then(|flake| flake.map(|flake| flake.evaluate(name)).transpose()) {
        Ok(runner) => runner.map(|runner| current != Some(&runner)),
        Err(error) => {
            log::warn!("{error:#}");
            None
        }
    }
}

pub(super) fn print_json(value: &impl Serialize) -> Result<()> {
    let text = serde_json::to_string_pretty(value)?;
    Ok(writeln!(io::stdout(), "{text}")?)
}
