//! The command line of microvm.nix: what this program takes when it is called `microvm`.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};
use clap::{ArgGroup, Parser};

use super::Verb;
use super::flake::Flake;
use super::folder::{self, State};
use super::name::Name;

/// The name that makes the difference.
const NAME: &str = "microvm";

/// Makes, updates, lists and enters guests, as microvm.nix has it; `microvm VERB …` is
/// `nixvmm vm VERB …`.
#[derive(Debug, Parser)]
#[command(name = NAME, version, arg_required_else_help = true)]
#[command(group = ArgGroup::new("action").required(true))]
pub(crate) struct Microvm {
    /// Creates a guest.
    #[arg(short = 'c', value_name = "NAME", group = "action")]
    create: Option<Name>,
    /// Updates guests: builds them anew.
    #[arg(short = 'u', group = "action", requires = "rest")]
    update: bool,
    /// Runs a guest on this terminal.
    #[arg(short = 'r', value_name = "NAME", group = "action")]
    run: Option<Name>,
    /// Opens a shell in a guest, or runs a command there.
    #[arg(short = 's', value_name = "NAME", group = "action")]
    shell: Option<Name>,
    /// Lists guests, and evaluates which of them an update would change.
    #[arg(short = 'l', group = "action")]
    list: bool,
    /// Flake for -c.
    #[arg(short = 'f', value_name = "FLAKE", requires = "create")]
    flake: Option<Flake>,
    /// Guest whose system -c takes, in place of a flake.
    #[arg(short = 'i', value_name = "EXISTING", requires = "create", conflicts_with = "flake")]
    instance_of: Option<Name>,
    /// Restarts what -u has changed.
    #[arg(short = 'R', requires = "update")]
    restart: bool,
    /// The folder that has a folder for each guest.
    #[arg(long, value_name = "DIR", default_value = folder::STATE)]
    state: PathBuf,
    /// Guests for -u; a command, or -- and what else ssh takes, for -s.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    rest: Vec<OsString>,
}

impl Microvm {
    /// Whether a program that is called `program` is meant to be upstream's.
    pub(crate) fn is_called(program: Option<&OsStr>) -> bool {
        program.and_then(|program| Path::new(program).file_name()) == Some(OsStr::new(NAME))
    }

    /// Does it; returns the status to end with.
    pub(crate) fn run(self) -> Result<u8> {
        let state = State::new(&self.state)?;
        self.verb()?.run(&state)
    }

    fn verb(self) -> Result<Verb> {
        if let Some(name) = self.shell {
            return Ok(Verb::Shell { name, user: "root".to_owned(), arguments: self.rest });
        }
        if self.update {
            let names: Result<_> =
                self.rest.iter().map(|name| name.to_string_lossy().parse()).collect();
            return Ok(Verb::Update { names: names?, all: false, restart: self.restart });
        }
        ensure!(self.rest.is_empty(), "only -u and -s take more names or words");
        Ok(match (self.create, self.run) {
            (Some(name), _) => Verb::Create {
                name,
                flake: self.flake,
                runner: None,
                instance_of: self.instance_of,
                start: false,
            },
            (_, Some(name)) => Verb::Run { name },
            _ => Verb::List { json: false, outdated: true },
        })
    }
}

#[cfg(test)]
mod test {
    use clap::CommandFactory as _;

    use super::*;

    fn verb(arguments: &[&str]) -> Verb {
        let arguments = [NAME].iter().chain(arguments);
        Microvm::try_parse_from(arguments).unwrap().verb().unwrap()
    }

    #[test]
    fn the_flags_of_upstream_are_verbs_of_ours() {
        Microvm::command().debug_assert();
        let Verb::Create { name, flake, .. } = verb(&["-f", "/etc/x", "-c", "web"]) else {
            panic!("-c creates")
        };
        assert_eq!((name.as_str(), flake), ("web", Some("/etc/x".parse().unwrap())));
        let Verb::Create { instance_of, .. } = verb(&["-c", "db", "-i", "web"]) else {
            panic!("-c creates")
        };
        assert_eq!(instance_of.unwrap().as_str(), "web");
        let Verb::Update { names, restart, .. } = verb(&["-Ru", "web", "db"]) else {
            panic!("-u updates")
        };
        assert_eq!((names.len(), restart), (2, true));
        assert!(matches!(verb(&["-l"]), Verb::List { outdated: true, .. }));
        assert!(matches!(verb(&["-r", "web"]), Verb::Run { .. }));
    }

    #[test]
    fn a_shell_takes_a_command_or_what_ssh_takes() {
        for (given, expected) in [
            (&["-s", "web", "ls", "-l"][..], &["ls", "-l"][..]),
            (&["-s", "web", "--", "-L", "1:a:2"], &["-L", "1:a:2"]),
            (&["-s", "web"], &[]),
        ] {
            let Verb::Shell { arguments, .. } = verb(given) else { panic!("-s is a shell") };
            assert_eq!(arguments, expected);
        }
    }

    #[test]
    fn what_is_no_command_of_upstream_is_refused() {
        for bad in [
            &["-u"][..],
            &["-c", "../x"],
            &["-c", "a", "-l"],
            &["-R", "-l"],
            &["-f", "x"],
            &["-i", "x"],
        ] {
            let arguments = [NAME].iter().chain(bad);
            assert!(Microvm::try_parse_from(arguments).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn only_the_last_part_of_a_path_is_the_programs_name() {
        for (path, expected) in [
            ("microvm", true),
            ("/run/current-system/sw/bin/microvm", true),
            ("nixvmm", false),
            ("/microvm/nixvmm", false),
        ] {
            assert_eq!(Microvm::is_called(Some(OsStr::new(path))), expected);
        }
    }
}
