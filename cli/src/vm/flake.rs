//! What a guest is built from, and the building.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::{Context as _, Result, ensure};

use super::folder::{Folder, Link};
use super::name::Name;
use super::programs::{Call, Program};

/// Where a host's configuration is, which usually has its guests.
pub(super) const DEFAULT: &str = "git+file:///etc/nixos";

/// A runner's program.
const RUN: &str = "bin/microvm-run";

/// A flake and the system in it, `FLAKE[#SYSTEM]`; the system has the guest's name otherwise.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Flake(String);

impl Flake {
    /// The same with a path that is right from every folder.
    pub(super) fn absolute(self) -> Result<Self> {
        let (scheme, path) = match self.0.strip_prefix("path:") {
            Some(path) => ("path:", path),
            None => ("", self.0.as_str()),
        };
        let is_relative = path.starts_with('.') || !scheme.is_empty() && !path.starts_with('/');
        if !is_relative {
            return Ok(self);
        }
        let (path, system) = path.split_once('#').map_or((path, None), |(a, b)| (a, Some(b)));
        let (path, query) = path.split_once('?').map_or((path, None), |(a, b)| (a, Some(b)));
        let absolute =
            fs::canonicalize(path).with_context(|| format!("--flake {path}: no such folder"))?;
        let mut text = format!("{scheme}{}", absolute.display());
        for (sign, rest) in [('?', query), ('#', system)] {
            if let Some(rest) = rest {
                text.push(sign);
                text.push_str(rest);
            }
        }
        text.parse()
    }

    /// Builds the runner of `name`, and lets `link` lead to it; nix tells how far it is.
    pub(super) fn build(&self, name: &Name, link: &Path) -> Result<()> {
        nix(["build", "--out-link"])
            .and(link)
            .and(self.installable(name))
            .run()
            .with_context(|| format!("{name}: cannot be built from {self}"))
    }

    /// The runner that building would come to.
    pub(super) fn evaluate(&self, name: &Name) -> Result<PathBuf> {
        nix(["eval", "--raw"])
            .and(format!("{}.outPath", self.installable(name)))
            .output()
            .map(PathBuf::from)
            .with_context(|| format!("{name}: {self} cannot be evaluated"))
    }

    fn installable(&self, name: &Name) -> String {
        let (flake, system) = self.0.split_once('#').unwrap_or((&self.0, name.as_str()));
        format!("{flake}#nixosConfigurations.\"{system}\".config.microvm.declaredRunner")
    }
}

impl FromStr for Flake {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        ensure!(
            !text.is_empty() && !text.starts_with(['-', '#']),
            "a flake is a folder or a URL, such as {DEFAULT}",
        );
        ensure!(
            !text.contains(|character: char| character.is_control() || character == '"'),
            "a flake has no quotes and no control characters",
        );
        Ok(Self(text.to_owned()))
    }
}

impl fmt::Display for Flake {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0)
    }
}

/// What the flake's file of a guest says.
pub(super) fn of(folder: &Folder) -> Result<Option<Flake>> {
    let Some(text) = folder.flake()? else { return Ok(None) };
    let file = folder.flake_file();
    text.parse().map(Some).with_context(|| format!("{}: {}", folder.name(), file.display()))
}

/// Whether `runner` is a runner.
pub(super) fn check(name: &Name, runner: &Path) -> Result<()> {
    ensure!(
        runner.join(RUN).exists(),
        "{name}: {} is no runner: it has no {RUN}; a flake's system needs the guest module",
        runner.display(),
    );
    Ok(())
}

/// Tells which packages differ between two runners, as far as nix knows them.
pub(super) fn tell_difference(before: &Path, after: &Path) {
    let system = |runner: &Path| {
        let system = runner.join("share/microvm/system");
        fs::canonicalize(system).unwrap_or_else(|_| runner.to_owned())
    };
    let call = nix(["store", "diff-closures"]).and(system(before)).and(system(after));
    if let Err(error) = call.run() {
        log::warn!("what has changed is not known: {error:#}");
    }
}

/// Whether the guest runs something else than its next start would.
pub(super) fn needs_restart(folder: &Folder) -> Result<bool> {
    let booted = folder.target(Link::Booted)?;
    Ok(booted.is_some() && booted != folder.target(Link::Current)?)
}

fn nix<const COUNT: usize>(arguments: [&str; COUNT]) -> Call {
    let features = ["--extra-experimental-features", "nix-command flakes"];
    Program::Nix.call(features.into_iter().chain(arguments))
}

#[cfg(test)]
mod test {
    use super::*;

    fn installable(flake: &str) -> String {
        flake.parse::<Flake>().unwrap().installable(&"web".parse().unwrap())
    }

    #[test]
    fn the_system_is_the_guests_unless_another_is_named() {
        let rest = "config.microvm.declaredRunner";
        assert_eq!(installable("/etc/x"), format!("/etc/x#nixosConfigurations.\"web\".{rest}"));
        assert_eq!(installable("a:b#c.d"), format!("a:b#nixosConfigurations.\"c.d\".{rest}"));
    }

    #[test]
    fn flakes_that_nix_would_take_for_something_else_are_refused() {
        for bad in ["", "--help", "#web", "a\nb", "a#b\".c"] {
            assert!(bad.parse::<Flake>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn relative_folders_become_absolute_and_others_stay() {
        let here = std::env::current_dir().unwrap().display().to_string();
        for (flake, expected) in [
            (".", here.clone()),
            ("./#web", format!("{here}#web")),
            ("path:.?dir=a#web", format!("path:{here}?dir=a#web")),
            ("github:a/b", "github:a/b".to_owned()),
            ("nixpkgs", "nixpkgs".to_owned()),
            ("/etc/nixos", "/etc/nixos".to_owned()),
        ] {
            let flake: Flake = flake.parse().unwrap();
            assert_eq!(flake.absolute().unwrap().0, expected);
        }
        assert!("./none".parse::<Flake>().unwrap().absolute().is_err());
    }
}
