//! What does a guest pay for its store, by who serves it? The same tree from the store server,
//! virtiofsd and an erofs disk: lists of it, searches in it, and a program that starts from it,
//! with nothing of it in the guest's memory and with all of it there. The guest's interrupts say
//! how often it asked meanwhile.

use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use super::Figures;
use super::vmm::Vmm;
use crate::cache::Cache;
use crate::guest::{Guest, Launch};
use crate::packages::{self, Program};
use crate::testbed::Testbed;
use crate::tool;

/// Store paths of the closure that a server is started with.
const PATHS: usize = 2000;

/// Starts of a server, of which the median counts.
const STARTS: usize = 21;

/// VHOST_USER_GET_FEATURES, of version 1 and without a body.
const GET_FEATURES: [u32; 3] = [1, 1, 0];

/// Who serves the tree.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize, ValueEnum)]
pub enum Server {
    /// nixvmm's own.
    StoreServer,
    /// Nobody: an image on a disk.
    Erofs,
    /// A share.
    Virtiofsd,
}

impl Server {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::StoreServer, Self::Erofs, Self::Virtiofsd];

    /// Its name in tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::StoreServer => "store server",
            Self::Erofs => "erofs",
            Self::Virtiofsd => "virtiofsd",
        }
    }

    /// How a guest mounts it, with the options that NixOS has for its store.
    fn mount(self) -> &'static str {
        match self {
            Self::Erofs => "mount -t erofs -o ro,nosuid,nodev /dev/vda /store",
            _ => "mount -t virtiofs -o ro,nosuid,nodev store /store",
        }
    }
}

/// The one store path of the tree, and what of the NixOS-shaped guest's userland it has: a few
/// thousand files, of which most are small, and a large program with its libraries.
const NAME: &str = "00000000000000000000000000000000-userland";
const PARTS: [&str; 5] =
    ["etc", "usr/share", "usr/bin", "usr/lib/systemd", "usr/lib/x86_64-linux-gnu"];
const LEFT_OUT: &str = "usr/share/perl";

/// The loads, as shell commands in the store path, whose links lead nowhere in the guest.
const LOADS: [(&str, &str); 3] = [
    ("find", "find . -newer /init"),
    ("grep -r", "$LOADER usr/bin/grep -r no-file-has-this etc usr/share usr/lib/systemd"),
    ("start of systemctl", "$LOADER usr/bin/systemctl --version"),
];

/// Starts a program of the tree with its libraries.
const LOADER: &str = "LOADER='usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2 --library-path \
                      usr/lib/x86_64-linux-gnu:usr/lib/x86_64-linux-gnu/systemd:usr/lib/systemd'";

/// Files that are made to be known to a guest, what one folder of them has, and the length of their
/// names, which is that of a store's.
const KNOWN: usize = 100_000;
const KNOWN_OF_A_FOLDER: usize = 1000;
const NAME_BYTES: usize = 18;

/// What a step may take by a clock that counts instructions: some minutes of other clocks.
const STEP_MAX: Duration = Duration::from_secs(8);

/// The guest's clock in nanoseconds; busybox's `date` has none.
const NOW: &str = "sed -n 's/^now at \\([0-9]*\\) nsecs$/\\1/p' /proc/timer_list";

/// Answers of devices with files, each of which is an interrupt.
const ANSWERS: &str = "awk '/virtio[0-9]+-(hiprio|req)/ { n += $2 } END { print n + 0 }' \
                       /proc/interrupts";

/// What a load took in virtual milliseconds, and how many answers came meanwhile.
#[derive(Clone, Copy, Debug)]
struct Taken {
    milliseconds: f64,
    answers: f64,
}

/// In which state of the guest's memory a load is measured.
const STATES: [&str; 2] = ["cold", "warm"];

/// Milliseconds from exec until a server answers for a closure of `PATHS` paths, on this machine.
///
/// # Errors
/// When the server does not start.
pub fn start(program: &Path, figures: &mut Figures) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let store = folder.path().join("store");
    let mut list = String::new();
    for number in 0..PATHS {
        let path = store.join(format!("{number:032}-path"));
        fs::create_dir_all(&path)?;
        list += &format!("{}\n", path.display());
    }
    let closure = folder.path().join("store-paths");
    fs::write(&closure, list)?;
    let runs: Result<Vec<f64>> =
        (0..STARTS).map(|_| start_once(program, folder.path(), &store, &closure)).collect();
    figures.add("store server, exec to served root", Vmm::Nixvmm, "ms", runs?);
    Ok(())
}

fn start_once(program: &Path, folder: &Path, store: &Path, closure: &Path) -> Result<f64> {
    let name = folder.join("socket");
    let _ = fs::remove_file(&name);
    let listener = UnixListener::bind(&name)?;
    let mut socket = UnixStream::connect(&name)?;
    let mut command = Command::new(program);
    command.arg("store-server").arg("--store").arg(store).arg("--closure").arg(closure);
    command.args(["--tag", "store", "--queues", "1"]).stdin(OwnedFd::from(listener));
    let (_extension, theirs) = std::os::unix::net::UnixDatagram::pair()?;
    command.stdout(OwnedFd::from(theirs));
    let begin = Instant::now();
    let mut child = command.spawn()?;
    drop(command);
    socket.write_all(&GET_FEATURES.map(u32::to_ne_bytes).concat())?;
    let mut reply = [0; 20];
    socket.read_exact(&mut reply).context("the server did not answer")?;
    let taken = begin.elapsed();
    drop(socket);
    child.wait()?;
    Ok(taken.as_secs_f64() * 1000.0)
}

/// What is measured, as files of this machine.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Store {
    /// The guest that reads.
    pub testbed: Testbed,
    tar: PathBuf,
    erofs: PathBuf,
}

impl Store {
    /// Makes the tree, and everything else.
    ///
    /// # Errors
    /// What could not be fetched, installed or built.
    pub fn prepare(cache: &Cache, program: &Path) -> Result<Self> {
        let testbed = Testbed { program: program.to_owned(), ..Testbed::prepare(cache)? };
        let store = testbed.nixos.store.display().to_string();
        let parts = PARTS.join(" ");
        let inputs = [store.as_str(), &parts, LEFT_OUT, NAME].map(str::as_bytes);
        let folder = cache.entry("benchmark-store", &inputs, |folder| {
            packages::require(&[Program::MakeErofs])?;
            tool::progress("making the store that is measured");
            // Programs that become root are in it: nobody else may look.
            let store = folder.join("private");
            fs::create_dir(&store)?;
            fs::set_permissions(&store, fs::Permissions::from_mode(0o700))?;
            let (store, tar) = (store.join("store"), folder.join("store.tar"));
            copy_parts(&find_userland(&testbed.nixos.store)?, &store.join(NAME))?;
            let mut make = tool::command(Program::MakeErofs.name());
            tool::finish(
                make.args(["--quiet", "-T0"]).arg(folder.join("store.erofs")).arg(&store),
            )?;
            let mut pack = tool::command("tar");
            tool::finish(pack.arg("-cf").arg(tar).arg("-C").arg(&store).arg(NAME))?;
            Ok(fs::remove_dir_all(folder.join("private"))?)
        })?;
        Ok(Self { testbed, tar: folder.join("store.tar"), erofs: folder.join("store.erofs") })
    }
}

fn find_userland(store: &Path) -> Result<PathBuf> {
    let names: std::io::Result<Vec<_>> =
        fs::read_dir(store)?.map(|entry| Ok(entry?.path())).collect();
    let found =
        names?.into_iter().find(|path| path.to_string_lossy().ends_with("-debian-userland"));
    found.context("the store has no userland")
}

fn copy_parts(userland: &Path, target: &Path) -> Result<()> {
    for part in PARTS {
        let target = target.join(part);
        fs::create_dir_all(target.parent().context("a part is in a folder")?)?;
        tool::finish(tool::command("cp").arg("-a").arg(userland.join(part)).arg(&target))?;
    }
    Ok(fs::remove_dir_all(target.join(LEFT_OUT))?)
}

/// Measures all loads in the emulated host, whose memory the tree is copied to.
///
/// # Errors
/// When a guest does not boot or a load fails.
pub fn run(
    store: &Store,
    server: Server,
    folder: &Path,
    beat: fn(),
    figures: &mut Figures,
) -> Result<()> {
    beat();
    tool::progress("store: copying everything into the emulated host's memory");
    let ground = Ground::lay(folder, store, beat)?;
    beat();
    let name = server.name();
    tool::progress(&format!("store: {name}"));
    let mut guest = ground.boot(server)?;
    for (load, command) in LOADS {
        beat();
        let taken = match measure(&mut guest, server, command) {
            Ok(taken) => taken,
            Err(error) => {
                let note = format!("store, {name}, {load}: {error:#}");
                tool::progress(&note);
                figures.notes.push(note);
                guest = ground.boot(server)?;
                continue;
            }
        };
        for (state, Taken { milliseconds, answers }) in STATES.into_iter().zip(taken) {
            tool::progress(&format!("  {load} {state}: {milliseconds:.2} ms, {answers} answers"));
            figures.add(&row(load, state, name), Vmm::Nixvmm, "ms", vec![milliseconds]);
            let row = answers_row(load, state, name);
            figures.add(&row, Vmm::Nixvmm, "", vec![answers]);
        }
    }
    guest.power_off()?;
    match server {
        Server::StoreServer => measure_memory(&ground, beat, figures),
        Server::Erofs | Server::Virtiofsd => Ok(()),
    }
}

/// KiB of memory of the store server, before its guest knows a file and when it knows many.
fn measure_memory(ground: &Ground, beat: fn(), figures: &mut Figures) -> Result<()> {
    tool::progress(&format!("store: {KNOWN} files whose names have {NAME_BYTES} bytes"));
    for folder in 0..KNOWN / KNOWN_OF_A_FOLDER {
        beat();
        let folder = ground.tree.join(format!("{folder:032}-many"));
        fs::create_dir(&folder)?;
        for file in 0..KNOWN_OF_A_FOLDER {
            File::create(folder.join(format!("{file:0NAME_BYTES$}")))?;
        }
    }
    let mut guest = ground.boot(Server::StoreServer)?;
    let without = server_size(&guest)?;
    beat();
    let find = format!("{}; find /store -newer /init > /dev/null", Server::StoreServer.mount());
    guest.run(&find)?;
    beat();
    let known: usize = guest.run("awk '{ print $1 }' /proc/sys/fs/inode-nr")?.trim().parse()?;
    ensure!(known > KNOWN, "the guest knows {known} files, not {KNOWN}");
    let with = server_size(&guest)?;
    tool::progress(&format!("  {without} KiB, and {with} KiB when they are known"));
    figures.add("store server, memory", Vmm::Nixvmm, "KiB", vec![without]);
    let of_a_file = (with - without) * 1024.0 / KNOWN as f64;
    figures.add("store server, memory of a known file", Vmm::Nixvmm, "bytes", vec![of_a_file]);
    guest.power_off()
}

fn row(load: &str, state: &str, server: &str) -> String {
    format!("{load} {state}, {server}")
}

fn answers_row(load: &str, state: &str, server: &str) -> String {
    format!("answers to {load} {state}, {server}")
}

/// Everything that is read meanwhile, in the emulated host's memory: nothing may wait for the
/// machine around, or the clock would run on.
struct Ground {
    testbed: Testbed,
    tree: PathBuf,
    erofs: PathBuf,
}

impl Ground {
    fn lay(folder: &Path, store: &Store, beat: fn()) -> Result<Self> {
        let (tree, erofs) = (folder.join("tree"), folder.join("store.erofs"));
        fs::create_dir_all(&tree)?;
        let mut testbed = store.testbed.clone();
        for (file, name) in [
            (&mut testbed.program, "nixvmm"),
            (&mut testbed.bzimage, "bzImage"),
            (&mut testbed.tiny, "initramfs"),
            (&mut store.erofs.clone(), "store.erofs"),
            (&mut store.tar.clone(), "store.tar"),
        ] {
            beat();
            let copy = folder.join(name);
            fs::copy(&*file, &copy).with_context(|| file.display().to_string())?;
            *file = copy;
        }
        let mut unpack = tool::command("tar");
        tool::finish(unpack.arg("-xf").arg(folder.join("store.tar")).arg("-C").arg(&tree))?;
        tool::run(Program::Virtiofsd.name(), ["--version"])?;
        Ok(Self { testbed, tree, erofs })
    }

    fn boot(&self, server: Server) -> Result<Guest> {
        let store = self.tree.display();
        let (flag, value) = match server {
            Server::StoreServer => ("--store-share", format!("store={store}")),
            Server::Virtiofsd => {
                ("--share", format!("store,source={store},cache=always,xattr,sandbox=chroot"))
            }
            Server::Erofs => ("--disk", format!("path={},readonly", self.erofs.display())),
        };
        let launch = Launch::tiny(&self.testbed, &self.testbed.bzimage).arguments([flag, &value]);
        let mut guest = launch.arguments(["--memory", "512M"]).patience(STEP_MAX).boot()?;
        tool::progress("  the guest is up");
        guest.run("sh /modules/more 2> /dev/null; mkdir -p /store")?;
        Ok(guest)
    }
}

/// What `command` takes on a fresh mount, and then again.
fn measure(guest: &mut Guest, server: Server, command: &str) -> Result<[Taken; 2]> {
    let mount = server.mount();
    let load = format!("{ANSWERS}; {NOW}; {command} > /dev/null 2>&1; {NOW}; {ANSWERS}");
    let said = guest.run(&format!(
        "sync; echo 3 > /proc/sys/vm/drop_caches; {LOADER}; {mount} && cd /store/{NAME}; \
         {load}; {load}; cd /; umount /store"
    ))?;
    let numbers: Vec<f64> =
        said.lines().map(|line| line.parse().context("a number")).collect::<Result<_>>()?;
    let [cold, warm] = [numbers.get(..4), numbers.get(4..)].map(|numbers| {
        let [asked, begin, end, answered] = *numbers? else { return None };
        let milliseconds = (end - begin) / 1e6;
        Some(Taken { milliseconds, answers: answered - asked })
    });
    let taken = cold.zip(warm).map(|(cold, warm)| [cold, warm]);
    let taken = taken.with_context(|| format!("the guest said {said}"))?;
    let advances = taken.iter().all(|one| one.milliseconds > 0.0);
    ensure!(advances, "the guest's clock does not advance: {said}");
    Ok(taken)
}

/// KiB of memory of its own that the process has which serves `guest`, without the guest's RAM.
fn server_size(guest: &Guest) -> Result<f64> {
    let id = guest.process_id();
    let children = fs::read_to_string(format!("/proc/{id}/task/{id}/children"))?;
    let mut size = 0.0;
    for child in children.split_whitespace() {
        let mut text = String::new();
        File::open(format!("/proc/{child}/smaps_rollup"))?.read_to_string(&mut text)?;
        let fields = text
            .lines()
            .filter(|line| line.starts_with("Pss_Anon:") || line.starts_with("Pss_File:"));
        let numbers = fields.filter_map(|line| line.split_whitespace().nth(1)?.parse::<f64>().ok());
        size += numbers.sum::<f64>();
    }
    Ok(size)
}

/// The ratios that goals are about, if a store was measured.
pub fn table(figures: &Figures) -> Option<String> {
    let find = |row: &str| figures.value(row, Vmm::Nixvmm).unwrap_or(f64::NAN);
    let mut text =
        "reading from a store, in virtual ms (and answers that the guest got)\n".to_owned();
    let mut is_measured = false;
    for (load, _) in LOADS {
        for state in STATES {
            let of = |server: Server| {
                let name = server.name();
                [row(load, state, name), answers_row(load, state, name)].map(|row| find(&row))
            };
            let [ours, disk, theirs] = Server::ALL.map(of);
            is_measured |= [ours, disk, theirs].iter().any(|[time, _]| time.is_finite());
            let (ratio, goal) = match state {
                "cold" => (theirs[0] / ours[0], "of virtiofsd's speed, goal 1.5"),
                _ => (disk[0] / ours[0], "of the erofs disk's speed, goal 1"),
            };
            let show = |[time, answers]: [f64; 2]| format!("{time:9.2} ({answers:5})");
            text += &format!(
                "  {load:20} {state}: store server {}, virtiofsd {}, erofs {}; {ratio:.2} {goal}\n",
                show(ours),
                show(theirs),
                show(disk),
            );
        }
    }
    is_measured.then_some(text)
}
