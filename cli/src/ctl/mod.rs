//! `nixvmm ctl`: the verbs of a running machine, for people and scripts.

mod connection;
mod console;
pub(crate) mod print;
mod store;
mod swap;

use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;
use clap::{Args, Subcommand, ValueEnum};
use serde_json::{Value, json};
use vmm::config::ByteSize;

pub(crate) use self::connection::Connection;

/// What a guest is given to answer with new statistics: one that runs needs microseconds, one that
/// is paused or has no driver never answers.
const STATISTICS_PATIENCE: Duration = Duration::from_secs(1);

/// What is done to which machine.
#[derive(Args, Debug)]
#[command(disable_help_subcommand = true)]
pub(crate) struct Control {
    /// The socket that --control of the running machine names.
    #[arg(value_name = "SOCKET")]
    socket: PathBuf,
    /// Prints replies as JSON.
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    verb: Verb,
}

/// What is done to a running machine.
#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    /// Prints what the machine is doing.
    State,
    /// Prints the machine as JSON, as --config takes it.
    Config,
    /// Takes the processors out of the guest, and returns when they all are.
    Pause,
    /// Lets a paused guest run again.
    Resume,
    /// Presses the power button once; the guest does what it does then.
    PowerButton,
    /// Asks the guest to power off, as SIGTERM does, and ends it after --shutdown-timeout.
    PowerOff,
    /// Resets the machine at once.
    Reset,
    /// Ends the machine at once, with exit status 6.
    Stop,
    /// Lists the disks and their sizes.
    Disks,
    /// Tells the guest the size that a disk's image has by now (all disks: SIGUSR1), or grows it.
    Resize {
        /// The disk: its serial, or disk0 and so on where it has none.
        disk: String,
        /// Grows the image to this size first.
        size: Option<ByteSize>,
    },
    /// Puts another image into a disk, which the guest should have unmounted.
    Swap {
        /// The disk: its serial, or disk0 and so on where it has none.
        disk: String,
        /// The new image.
        image: PathBuf,
    },
    /// Shows the guest the store paths that a file lists, besides those of its closure.
    StoreAdd {
        /// The list, one path a line, as closureInfo writes it to store-paths.
        list: PathBuf,
    },
    /// Lists the network cards, or pulls the plug of one or puts it in again.
    Link {
        /// The card: net0 and so on.
        #[arg(requires = "plug")]
        card: Option<String>,
        /// Whether its plug shall be in.
        plug: Option<Plug>,
    },
    /// Connects this terminal with the guest's console; Ctrl-A x leaves, and the guest goes on.
    Console {
        /// The serial port instead.
        #[arg(long)]
        serial: bool,
    },
    /// Prints what devices and processors have counted.
    Stats,
    /// Prints the same in the text format of Prometheus.
    Metrics,
    /// Prints how much memory the guest has and can have, or asks it to have SIZE.
    Memory {
        /// How much memory the guest shall have.
        size: Option<ByteSize>,
    },
    /// Prints how large the balloon is and what the guest says about its memory, or asks the guest
    /// to put as much into the balloon.
    Balloon {
        /// How large the balloon shall be; 0 gives the guest all its memory.
        target: Option<ByteSize>,
    },
    /// Prints what happens to the machine until it ends.
    Events,
}

/// Where a plug is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Plug {
    /// In.
    On,
    /// Out.
    Off,
}

impl Control {
    /// Does it and prints the reply.
    pub(crate) fn run(self) -> Result<()> {
        act(&self.socket, &self.verb, self.json)
    }
}

/// Does it to the machine behind `socket`, and prints the reply.
pub(crate) fn act(socket: &Path, verb: &Verb, json: bool) -> Result<()> {
    let mut connection = Connection::open(socket)?;
    if let Verb::Console { serial } = verb {
        return console::attach(connection, *serial);
    }
    let (method, parameters) = verb.call();
    if let Verb::Events = verb {
        return connection.follow(method, |event| print::event(event, json));
    }
    let reply = match verb {
        Verb::Balloon { target: None } => fresh_balloon(&mut connection, method)?,
        Verb::Swap { disk, image } => swap::exchange(&mut connection, disk, image)?,
        Verb::StoreAdd { list } => store::add(&mut connection, method, list)?,
        _ => connection.call(method, &parameters)?,
    };
    if json && verb.has_reply() {
        return print::json(&reply);
    }
    match verb {
        Verb::State => print::state(&reply),
        Verb::Config => print::json(&reply["configuration"]),
        Verb::Disks => print::disks(&reply),
        Verb::Stats => print::statistics(&reply),
        Verb::Metrics => print::text(&reply["text"]),
        Verb::Resize { disk, .. } | Verb::Swap { disk, .. } => print::size(disk, &reply),
        Verb::Link { card: None, .. } => print::cards(&reply),
        Verb::Memory { .. } => print::memory(&reply),
        Verb::Balloon { target: None } => print::balloon(&reply),
        _ => Ok(()),
    }
}

impl Verb {
    /// The method and its parameters.
    fn call(&self) -> (&'static str, Value) {
        let method = match self {
            Self::State => "GetState",
            Self::Config => "GetConfiguration",
            Self::Pause => "Pause",
            Self::Resume => "Resume",
            Self::PowerButton => "PressPowerButton",
            Self::PowerOff => "PowerOff",
            Self::Reset => "Reset",
            Self::Stop => "Stop",
            Self::Disks => "ListDisks",
            Self::Resize { disk, size } => {
                let size = size.map(|size| size.0);
                return ("ResizeDisk", json!({ "disk": disk, "size": size }));
            }
            Self::Swap { .. } => "ExchangeImage",
            Self::StoreAdd { .. } => "AddStorePaths",
            Self::Link { card: None, .. } => "ListNetworkCards",
            Self::Link { card, plug } => {
                let is_plugged = *plug == Some(Plug::On);
                return ("SetNetworkLink", json!({ "card": card, "plugged": is_plugged }));
            }
            Self::Stats => "GetStatistics",
            Self::Metrics => "GetMetrics",
            Self::Memory { size: None } => "GetMemory",
            Self::Memory { size: Some(size) } => {
                return ("SetMemorySize", json!({ "size": size.0 }));
            }
            Self::Balloon { target: None } => "GetBalloon",
            Self::Balloon { target: Some(target) } => {
                return ("SetBalloonTarget", json!({ "target": target.0 }));
            }
            Self::Console { .. } => "AttachConsole",
            Self::Events => "Subscribe",
        };
        (method, json!({}))
    }

    /// Whether there is something to print.
    fn has_reply(&self) -> bool {
        !matches!(
            self,
            Self::Pause
                | Self::Resume
                | Self::PowerButton
                | Self::PowerOff
                | Self::Reset
                | Self::Stop
                | Self::StoreAdd { .. }
                | Self::Balloon { target: Some(_) }
                | Self::Link { card: Some(_), .. }
        )
    }
}

/// The balloon with statistics that the guest has sent since it was asked; with older ones, or
/// none, where it does not answer.
fn fresh_balloon(connection: &mut Connection, method: &str) -> Result<Value> {
    let start = Instant::now();
    loop {
        let reply = connection.call(method, &json!({}))?;
        let age = reply["ageUSec"].as_u64().map(Duration::from_micros);
        let is_fresh = age.is_some_and(|age| age < start.elapsed());
        if is_fresh || start.elapsed() > STATISTICS_PATIENCE {
            return Ok(reply);
        }
        thread::sleep(STATISTICS_PATIENCE / 20);
    }
}
