//! `nixvmm vm`: guests that have a folder each, are built by Nix and run as units of systemd.
//!
//! What is done here is done to links and files of that folder; the work is that of `nix`,
//! `systemctl` and `journalctl`, and of the control socket of a guest that runs.

mod change;
mod flake;
mod folder;
mod guest;
mod list;
mod microvm;
mod name;
mod power;
mod programs;
mod roots;
mod snapshot;
mod units;
mod vsock;

use std::ffi::OsString;
use std::path::PathBuf;

use anyhow::Result;
use clap::{Args, Subcommand};
use vmm::config::ByteSize;

use self::change::Source;
use self::flake::Flake;
use self::folder::State;
use self::name::Name;
use self::power::Power;
use self::snapshot::Tag;
use crate::ctl::Verb as Control;

pub(crate) use self::microvm::Microvm;

/// What is done to which guest.
#[derive(Args, Debug)]
#[command(disable_help_subcommand = true)]
pub(crate) struct Vm {
    /// The folder that has a folder for each guest; the units know the default only.
    #[arg(long, global = true, value_name = "DIR", default_value = folder::STATE)]
    state: PathBuf,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Builds a new guest and puts it in place, all of it or nothing.
    Create {
        /// The guest, and the system of the flake unless that names another.
        name: Name,
        /// The flake whose nixosConfigurations.NAME is built, or .SYSTEM where that is given
        /// [default: git+file:///etc/nixos].
        #[arg(long, short, value_name = "FLAKE[#SYSTEM]")]
        flake: Option<Flake>,
        /// A runner that is built already, in place of a flake.
        #[arg(long, value_name = "DIR", conflicts_with = "flake")]
        runner: Option<PathBuf>,
        /// A guest whose system this one has too, as it is now; nothing is built.
        #[arg(long, short, value_name = "EXISTING", conflicts_with_all = ["flake", "runner"])]
        instance_of: Option<Name>,
        /// Starts it too.
        #[arg(long)]
        start: bool,
    },
    /// Builds guests anew from their flakes; what they run now stays for `rollback`.
    Update {
        /// The guests.
        #[arg(required_unless_present = "all")]
        names: Vec<Name>,
        /// All guests that have a flake.
        #[arg(long, conflicts_with = "names")]
        all: bool,
        /// Restarts those that run and have changed.
        #[arg(long, short = 'R')]
        restart: bool,
    },
    /// Makes current what was current before the last update; a second rollback undoes it.
    Rollback {
        /// The guest.
        name: Name,
        /// Restarts it if it runs.
        #[arg(long, short = 'R')]
        restart: bool,
    },
    /// Lists guests, what they do, and whether a restart or an update would change them.
    List {
        /// Prints JSON.
        #[arg(long)]
        json: bool,
        /// Evaluates each flake to find out whether an update would change the guest, which takes
        /// a while.
        #[arg(long)]
        outdated: bool,
    },
    /// Tells what a guest does; status 0 if it runs, 3 if not.
    Status {
        /// The guest.
        name: Name,
        /// Prints JSON, as `list` does.
        #[arg(long)]
        json: bool,
    },
    /// Starts guests and waits until they are up.
    Start {
        /// The guests.
        #[arg(required = true)]
        names: Vec<Name>,
    },
    /// Asks guests to power off, and waits until they have ended.
    Stop {
        /// The guests.
        #[arg(required = true)]
        names: Vec<Name>,
    },
    /// Stops guests and starts them with what is current.
    Restart {
        /// The guests.
        #[arg(required = true)]
        names: Vec<Name>,
    },
    /// Stops a guest and forgets it; its images stay unless --remove-state is given.
    Destroy {
        /// The guest.
        name: Name,
        /// Removes its folder with everything in it.
        #[arg(long)]
        remove_state: bool,
    },
    /// Connects this terminal with the guest's console; Ctrl-A x leaves, and the guest goes on.
    Console {
        /// The guest.
        name: Name,
        /// The serial port instead.
        #[arg(long)]
        serial: bool,
    },
    /// Opens a shell in the guest, or runs a command there, by ssh over vsock.
    #[command(visible_alias = "ssh")]
    Shell {
        /// The guest.
        name: Name,
        /// The user in the guest.
        #[arg(long, default_value = "root")]
        user: String,
        /// What ssh takes behind a host: its options, and the command.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<OsString>,
    },
    /// Connects standard input and output with a port of the guest, over vsock.
    Connect {
        /// The guest.
        name: Name,
        /// The port, at which a program of the guest listens.
        port: u32,
    },
    /// Shows the log of a guest and its helpers.
    Logs {
        /// The guest.
        name: Name,
        /// Waits for more.
        #[arg(long, short)]
        follow: bool,
        /// The last lines only.
        #[arg(long, short = 'n')]
        lines: Option<u32>,
        /// What else journalctl takes.
        #[arg(last = true)]
        arguments: Vec<OsString>,
    },
    /// Grows a disk of a running guest, or changes its memory.
    Resize {
        /// The guest.
        name: Name,
        /// The disk: its serial, or disk0 and so on where it has none.
        #[arg(required_unless_present = "memory")]
        disk: Option<String>,
        /// Grows the disk's image to this size first; else the guest learns the size it has.
        size: Option<ByteSize>,
        /// How much memory the guest shall have.
        #[arg(long, value_name = "SIZE", conflicts_with = "disk")]
        memory: Option<ByteSize>,
    },
    /// Copies a guest's images, those that its machine writes to and that are in its folder.
    ///
    /// A guest that runs is paused for that moment, and its file systems are in the copy as after
    /// a power cut: everything that the guest knows to be written is there, and what it has asked
    /// for and not heard of may be. Copies share extents with the originals where the file system
    /// can do that (btrfs, xfs); elsewhere the guest is paused for as long as it takes to copy what
    /// is in the images.
    /// All of a snapshot appears, or nothing. It is no snapshot of memory.
    Snapshot {
        /// The guest.
        name: Name,
        /// What the snapshot is called [default: the next number].
        tag: Option<Tag>,
    },
    /// Gives a stopped guest the images of a snapshot; what it had becomes a snapshot itself.
    Restore {
        /// The guest.
        name: Name,
        /// The snapshot.
        tag: Tag,
        /// Keeps nothing of what is replaced.
        #[arg(long)]
        discard: bool,
    },
    /// Lists the snapshots of a guest, or removes some.
    Snapshots {
        /// The guest.
        name: Name,
        /// Prints JSON.
        #[arg(long)]
        json: bool,
        /// Removes this one; can be given more than once.
        #[arg(long, value_name = "TAG", conflicts_with = "json")]
        remove: Vec<Tag>,
    },
    /// Does to a running guest what `nixvmm ctl` does.
    Ctl {
        /// The guest.
        name: Name,
        /// Prints replies as JSON.
        #[arg(long, global = true)]
        json: bool,
        #[command(subcommand)]
        verb: Control,
    },
    /// Runs a guest on this terminal, without systemd.
    Run {
        /// The guest.
        name: Name,
    },
}

impl Vm {
    /// Does it; returns the status to end with.
    pub(crate) fn run(self) -> Result<u8> {
        let state = State::new(&self.state)?;
        self.verb.run(&state)
    }
}

impl Verb {
    fn run(self, state: &State) -> Result<u8> {
        let done = match self {
            Self::Status { name, json } => return list::status(state, &name, json),
            Self::Create { name, flake, runner, instance_of, start } => {
                create(state, &name, Source::new(flake, runner, instance_of)?, start)
            }
            Self::Update { names, all, restart } => {
                let names = if all { change::updatable(state)? } else { names };
                return change::update_all(state, &names, restart);
            }
            Self::Rollback { name, restart } => change::rollback(state, &name, restart),
            Self::List { json, outdated } => list::list(state, json, outdated),
            Self::Start { names } => power::act(state, &names, Power::Start),
            Self::Stop { names } => power::act(state, &names, Power::Stop),
            Self::Restart { names } => power::act(state, &names, Power::Restart),
            Self::Destroy { name, remove_state } => change::destroy(state, &name, remove_state),
            Self::Console { name, serial } => guest::console(state, &name, serial),
            Self::Shell { name, user, arguments } => guest::shell(state, &name, &user, &arguments),
            Self::Connect { name, port } => guest::connect(state, &name, port),
            Self::Logs { name, follow, lines, arguments } => {
                guest::logs(state, &name, follow, lines, &arguments)
            }
            Self::Resize { name, disk, size, memory } => {
                let verb = match disk {
                    Some(disk) => Control::Resize { disk, size },
                    None => Control::Memory { size: memory },
                };
                guest::control(state, &name, &verb, false)
            }
            Self::Snapshot { name, tag } => snapshot::take(state, &name, tag),
            Self::Restore { name, tag, discard } => snapshot::restore(state, &name, &tag, discard),
            Self::Snapshots { name, json, remove } if remove.is_empty() => {
                snapshot::list(state, &name, json)
            }
            Self::Snapshots { name, remove, .. } => snapshot::remove(state, &name, &remove),
            Self::Ctl { name, json, verb } => guest::control(state, &name, &verb, json),
            Self::Run { name } => guest::run(state, &name),
        };
        done.map(|()| 0)
    }
}

fn create(state: &State, name: &Name, source: Source, start: bool) -> Result<()> {
    change::create(state, name, source)?;
    if start { power::act(state, std::slice::from_ref(name), Power::Start) } else { Ok(()) }
}
