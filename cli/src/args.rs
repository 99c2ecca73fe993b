//! The command line as it is typed, and the machine that it describes.

use std::ffi::OsString;
use std::path::PathBuf;

use anyhow::Result;
use clap::builder::{PossibleValuesParser, TypedValueParser, ValueParser};
use clap::{CommandFactory as _, Parser, Subcommand};
use log::LevelFilter;
use vmm::config::{
    BootProtocol, Config, Console, Credential, Disk, Forward, Machined, Net, OnReboot, Pmem, Ready,
    Share, StoreShare, Transport, Vsock, Watchdog,
};

use crate::ctl::Control;
use crate::devices::{self, BalloonChange, MemoryChange};
use crate::key_values::on_or_off;
use crate::vm::{Microvm, Vm};

/// A virtual machine monitor for lightweight NixOS guests.
#[derive(Debug, Parser)]
#[command(name = "nixvmm", version, disable_help_subcommand = true)]
#[command(subcommand_required = true, arg_required_else_help = true)]
#[command(after_help = "`run` may be left out: `nixvmm --kernel FILE …` runs a guest. \
                        `nixvmm run --help` tells of its flags.")]
pub(crate) struct CommandLine {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    #[command(about = RUN)]
    Run(Machine),
    /// Validates a machine and prints it as JSON, as --config takes it.
    Check(Machine),
    /// Controls a running machine that was started with --control.
    Ctl(Control),
    /// Makes, updates, runs and enters guests that are units of systemd.
    Vm(Vm),
    /// Takes the ELF kernel out of a bzImage, so that no guest has to unpack it at each boot.
    UnpackKernel {
        /// The compressed kernel.
        bzimage: PathBuf,
        /// The ELF to write; - is standard output.
        vmlinux: PathBuf,
    },
    /// Serves a store to a machine, which starts this by itself.
    #[command(hide = true)]
    StoreServer {
        /// The store.
        #[arg(long)]
        store: PathBuf,
        /// The list of what is shown of it.
        #[arg(long)]
        closure: Option<PathBuf>,
        /// What the guest mounts it by.
        #[arg(long)]
        tag: String,
        /// Queues of requests.
        #[arg(long)]
        queues: u16,
        /// Whether it stays unconfined.
        #[arg(long)]
        no_sandbox: bool,
    },
    /// Prints completions for a shell.
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },
    /// Prints the manual page, for man(1).
    Man,
}

/// What `run` does, as its help says it.
const RUN: &str = "Runs a guest; this word may be left out";

/// A machine as flags; each has the name of its key in a configuration file.
#[derive(Debug, Parser)]
#[command(name = "nixvmm run", bin_name = "nixvmm run", about = RUN)]
pub(crate) struct Machine {
    /// Kernel: a bzImage or an ELF vmlinux.
    #[arg(long, value_name = "FILE")]
    kernel: Option<PathBuf>,
    /// Initial RAM disk.
    #[arg(long, value_name = "FILE")]
    initrd: Option<PathBuf>,
    /// Kernel command line.
    #[arg(long, value_name = "TEXT")]
    cmdline: Option<String>,
    /// How the kernel is entered [default: auto].
    #[arg(
        long,
        value_name = "PROTOCOL",
        value_parser = named::<BootProtocol>(&["auto", "linux", "pvh"])
    )]
    boot_protocol: Option<BootProtocol>,
    /// Read-only file system image (erofs or squashfs) that becomes the first disk.
    #[arg(long, value_name = "FILE")]
    root: Option<PathBuf>,
    /// A raw image or block device; may be given more than once, and adds to the disks of --config.
    #[arg(
        long = "disk",
        value_name = "[path=]FILE[,readonly][,serial=ID][,direct][,engine=auto|uring|sync]",
        value_parser = devices::disk
    )]
    disks: Vec<Disk>,
    /// A network card; may be given more than once, and adds to those of --config.
    #[arg(
        long = "net",
        value_name = "tap=NAME|fd=N[:M…]|type=macvtap,fd=N[:M…]|type=user|vhost-user=SOCKET\
                      [,mac=ADDRESS][,queues=PAIRS][,vhost=auto|on|off][,mtu=BYTES]",
        value_parser = devices::net
    )]
    nets: Vec<Net>,
    /// A file that the guest has in its memory, as /dev/pmem0 and so on, and whose pages guests
    /// share; may be given more than once, and adds to those of --config.
    #[arg(
        long = "pmem",
        value_name = "[file=]FILE[,readonly]",
        value_parser = devices::pmem
    )]
    pmems: Vec<Pmem>,
    /// A folder of the host that the guest mounts by its tag, served by a virtiofsd that is started
    /// here, or by the process at a socket; may be given more than once, and adds to those of
    /// --config.
    #[arg(
        long = "share",
        value_name = "[tag=]TAG,source=FOLDER|socket=SOCKET[,readonly]\
                      [,cache=auto|always|metadata|never][,xattr][,posix-acl]\
                      [,sandbox=namespace|chroot|none][,uid-map=MAP][,gid-map=MAP]\
                      [,translate-uid=MAP][,translate-gid=MAP][,program=FILE]",
        value_parser = devices::share
    )]
    shares: Vec<Share>,
    /// Store paths of the host that the guest mounts and reads: those that a file lists, or all.
    #[arg(
        long,
        value_name = "[closure=]FILE|store=FOLDER[,tag=TAG]",
        value_parser = devices::store_share
    )]
    store_share: Option<StoreShare>,
    /// Sockets between host and guest: by context id through the host's kernel, or through a unix
    /// socket of this process.
    #[arg(long, value_name = "[cid=]ID|auto[,socket=SOCKET]", value_parser = devices::vsock)]
    vsock: Option<Vsock>,
    /// Port of the host that leads to the guest of --net type=user; may be given more than once.
    #[arg(long = "forward", value_name = "tcp|udp:[ADDRESS:]PORT:GUESTPORT")]
    forwards: Vec<Forward>,
    /// Number of virtual processors [default: 1].
    #[arg(long, value_name = "NUMBER")]
    cpus: Option<u32>,
    /// RAM of the guest [default: 512M].
    #[arg(
        long,
        value_name = "[size=]SIZE[,max=SIZE][,shared][,hugepages=2M|1G][,prealloc][,mergeable]",
        value_parser = devices::memory
    )]
    memory: Option<MemoryChange>,
    /// Where the virtio console (hvc0) goes [default: stdio].
    #[arg(
        long,
        value_name = "off|stdio|pty[,link=LINK]|file,path=FILE|socket,path=SOCKET",
        value_parser = devices::console
    )]
    console: Option<Console>,
    /// Where a 16550 serial port (ttyS0) goes, as --console [default: off].
    #[arg(long, value_name = "PLACE", value_parser = devices::console)]
    serial: Option<Console>,
    /// Where the running machine is controlled, by `nixvmm ctl` and varlinkctl(1).
    #[arg(long, value_name = "SOCKET")]
    control: Option<PathBuf>,
    /// Registers the guest with systemd-machined, so that machinectl(1) knows it by this name.
    #[arg(long, value_name = "[name=]NAME[,socket=SOCKET]", value_parser = devices::machined)]
    machined: Option<Machined>,
    /// Virtio entropy device [default: on].
    #[arg(long, value_name = "on|off", value_parser = switch())]
    rng: Option<bool>,
    /// Memory balloon, which gives back to the host what the guest does not use [default: on].
    #[arg(
        long,
        value_name = "on|off[,deflate-on-oom=on|off][,free-page-reporting=on|off]\
                      [,statistics-interval=SECONDS]",
        value_parser = devices::balloon
    )]
    balloon: Option<BalloonChange>,
    /// Bus of the virtio devices [default: pci].
    #[arg(long, value_name = "BUS", value_parser = named::<Transport>(&["pci", "mmio"]))]
    transport: Option<Transport>,
    /// System UUID in SMBIOS.
    #[arg(long, value_name = "UUID")]
    uuid: Option<uuid::Uuid>,
    /// OEM string in SMBIOS, such as io.systemd.credential:NAME=VALUE; adds to those of --config.
    #[arg(long = "oem-string", value_name = "TEXT")]
    oem_strings: Vec<String>,
    /// A credential for systemd in the guest, by SMBIOS; adds to those of --config.
    #[arg(long = "credential", value_name = "NAME=VALUE|NAME=@FILE")]
    credentials: Vec<Credential>,
    /// When the service manager is told that this process is ready: when the guest runs
    /// (`started`), or when systemd in the guest says over vsock that all units of its boot have
    /// started or failed (`booted`), or that sshd listens (`reachable`) [default: started].
    #[arg(
        long,
        value_name = "WHEN",
        value_parser = named::<Ready>(&["started", "booted", "reachable"]),
    )]
    ready: Option<Ready>,
    /// What a reboot by the guest does [default: restart].
    #[arg(long, value_name = "ACTION", value_parser = named::<OnReboot>(&["restart", "exit"]))]
    on_reboot: Option<OnReboot>,
    /// Watchdog timer, and what its expiry does to the guest [default: off].
    #[arg(
        long,
        value_name = "off|reset|exit",
        value_parser = named::<Watchdog>(&["off", "reset", "exit"])
    )]
    watchdog: Option<Watchdog>,
    /// Seconds from the power button to the hard end [default: 80].
    #[arg(long, value_name = "SECONDS")]
    shutdown_timeout: Option<u32>,
    /// Whether seccomp, landlock and empty capabilities confine every thread [default: on].
    #[arg(long, value_name = "on|off", value_parser = switch())]
    sandbox: Option<bool>,
    /// Tells on standard error where start-up time went.
    #[arg(long)]
    timing: bool,
    /// Machine as JSON; of several files, later ones win, and flags win over all.
    #[arg(long = "config", value_name = "FILE")]
    configs: Vec<PathBuf>,
    /// What is logged on standard error [default: info].
    #[arg(
        long,
        value_name = "LEVEL",
        value_parser = named::<LevelFilter>(&["off", "error", "warn", "info", "debug", "trace"])
    )]
    pub(crate) log_level: Option<LevelFilter>,
}

/// What the process was called for.
pub(crate) enum Invocation {
    /// As itself.
    Nixvmm(Box<Command>),
    /// As the command of microvm.nix.
    Microvm(Microvm),
}

impl Invocation {
    /// Reads the process's arguments; prints what is wrong with them and ends the process with
    /// status 2, or prints the help that they ask for and ends it with 0.
    pub(crate) fn from_arguments() -> Self {
        let mut arguments: Vec<_> = std::env::args_os().collect();
        if !Microvm::is_called(arguments.first().map(OsString::as_os_str)) {
            return Self::nixvmm(with_command(arguments.into_iter()));
        }
        let word = arguments.get(1).and_then(|first| first.to_str());
        if word.is_none_or(|word| word.starts_with('-')) {
            return Self::Microvm(Microvm::parse_from(arguments));
        }
        arguments.insert(1, "vm".into());
        Self::nixvmm(arguments)
    }

    fn nixvmm(arguments: Vec<OsString>) -> Self {
        Self::Nixvmm(Box::new(Command::read(arguments).unwrap_or_else(|error| error.exit())))
    }
}

impl Command {
    /// Reads arguments that begin with the program's name. A guest waits for what `run` was given:
    /// that is read without the definitions of the other commands.
    fn read(mut arguments: Vec<OsString>) -> Result<Self, clap::Error> {
        if arguments.get(1).is_some_and(|word| word == "run") {
            arguments.remove(1);
            return Machine::try_parse_from(arguments).map(Self::Run);
        }
        CommandLine::try_parse_from(arguments).map(|line| line.command)
    }
}

impl CommandLine {
    /// The definitions for a manual page or completions: flags of `run` stand at the top too.
    pub(crate) fn flat() -> clap::Command {
        let mut command = Self::command();
        command.build();
        let flags: Vec<_> = command
            .find_subcommand("run")
            .into_iter()
            .flat_map(|run| run.get_arguments().filter(|flag| flag.get_id() != "help").cloned())
            .collect();
        command.args(flags)
    }
}

impl Machine {
    /// The machine that files and flags describe together.
    pub(crate) fn config(self) -> Result<Config> {
        let mut config = Config::from_files(&self.configs)?;
        replace(&mut config.kernel, self.kernel);
        config.initrd = self.initrd.or(config.initrd);
        replace(&mut config.cmdline, self.cmdline);
        replace(&mut config.boot_protocol, self.boot_protocol);
        config.root = self.root.or(config.root);
        config.disks.extend(self.disks);
        config.pmems.extend(self.pmems);
        config.nets.extend(self.nets);
        config.shares.extend(self.shares);
        config.store_share = self.store_share.or(config.store_share);
        config.vsock = self.vsock.or(config.vsock);
        config.add_forwards(self.forwards)?;
        replace(&mut config.cpus, self.cpus);
        if let Some(change) = self.memory {
            change.apply(&mut config.memory);
        }
        replace(&mut config.console, self.console);
        replace(&mut config.serial, self.serial);
        config.control = self.control.or(config.control);
        config.machined = self.machined.or(config.machined);
        replace(&mut config.rng, self.rng);
        if let Some(change) = self.balloon {
            change.apply(&mut config.balloon);
        }
        replace(&mut config.transport, self.transport);
        config.smbios.uuid = self.uuid.or(config.smbios.uuid);
        config.smbios.oem_strings.extend(self.oem_strings);
        config.credentials.extend(self.credentials);
        replace(&mut config.ready, self.ready);
        replace(&mut config.on_reboot, self.on_reboot);
        replace(&mut config.watchdog, self.watchdog);
        replace(&mut config.shutdown_timeout, self.shutdown_timeout);
        replace(&mut config.sandbox, self.sandbox);
        config.timing |= self.timing;
        Ok(config)
    }
}

fn replace<T>(place: &mut T, value: Option<T>) {
    if let Some(value) = value {
        *place = value;
    }
}

/// Puts `run` where no command is named: before a first argument that is a flag.
fn with_command(arguments: impl Iterator<Item = OsString>) -> Vec<OsString> {
    let mut arguments: Vec<_> = arguments.collect();
    let flag =
        arguments.get(1).and_then(|first| first.to_str()).filter(|text| text.starts_with('-'));
    if flag.is_some_and(|flag| !["-h", "--help", "-V", "--version"].contains(&flag)) {
        arguments.insert(1, "run".into());
    }
    arguments
}

/// A value that has one of `names`.
fn named<T>(names: &'static [&'static str]) -> ValueParser
where
    T: std::str::FromStr<Err: std::error::Error + Send + Sync> + Clone + Send + Sync + 'static,
{
    PossibleValuesParser::new(names).try_map(|name| name.parse::<T>()).into()
}

fn switch() -> ValueParser {
    PossibleValuesParser::new(["on", "off"]).try_map(|text| on_or_off(&text)).into()
}

#[cfg(test)]
mod test;
