//! What does a guest pay for its store, by who serves it? The same tree from the store server,
//! virtiofsd and an erofs disk: lists of it, searches in it, and a program that starts from it,
//! with nothing of it in the guest's memory and with all of it there.

use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, ensure};

use super::Figures;
use super::vmm::Vmm;
use crate::guest::{Guest, Launch};
use crate::packages::Program;
use crate::testbed::Testbed;
use crate::tool;

/// Store paths of the closure that a server is started with.
const PATHS: usize = 2000;

/// Starts of a server, of which the median counts.
const STARTS: usize = 21;

/// VHOST_USER_GET_FEATURES, of version 1 and without a body.
const GET_FEATURES: [u32; 3] = [1, 1, 0];

/// Who serves the tree, by the name in the table.
const SERVERS: [&str; 3] = ["store server", "virtiofsd", "erofs"];

/// The loads, as shell commands in the tree of the userland, whose links lead nowhere in the guest.
const LOADS: [(&str, &str); 3] = [
    ("find", "find . -newer /init"),
    ("grep -r", "grep -r no-file-has-this usr/share usr/lib/systemd"),
    (
        "start of systemctl",
        "usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2 --library-path \
         usr/lib/x86_64-linux-gnu:usr/lib/x86_64-linux-gnu/systemd:usr/lib/systemd \
         usr/bin/systemctl --version",
    ),
];

/// The guest's clock in nanoseconds; busybox's `date` has none.
const NOW: &str = "sed -n 's/^now at \\([0-9]*\\) nsecs$/\\1/p' /proc/timer_list";

/// What a load took in virtual milliseconds, by load and server: cold, then warm.
struct Taken {
    load: &'static str,
    server: &'static str,
    milliseconds: [f64; 2],
}

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

/// Measures all loads in the emulated host, whose memory the tree is copied to.
///
/// # Errors
/// When a guest does not boot or a load fails.
pub fn run(testbed: &Testbed, folder: &Path, beat: fn(), figures: &mut Figures) -> Result<()> {
    let mut testbed = testbed.clone();
    let ground = Ground::lay(folder, &mut testbed)?;
    let mut taken = Vec::new();
    for server in SERVERS {
        beat();
        tool::progress(&format!("store: {server}"));
        let mut guest = ground.boot(&testbed, server)?;
        for (load, command) in LOADS {
            beat();
            let milliseconds = measure(&mut guest, &ground.mount(server), command)?;
            tool::progress(&format!("  {load}: {milliseconds:.1?} ms cold and warm"));
            taken.push(Taken { load, server, milliseconds });
        }
        if server != "erofs" {
            let (nodes, size) = (ground.nodes, server_size(&guest)?);
            let row = format!("memory of {server} that {nodes} files are known to");
            figures.add(&row, Vmm::Nixvmm, "KiB", vec![size]);
        }
        guest.power_off()?;
    }
    for one in &taken {
        for (state, value) in ["cold", "warm"].into_iter().zip(one.milliseconds) {
            let row = format!("{} {state}, {}", one.load, one.server);
            figures.add(&row, Vmm::Nixvmm, "ms", vec![value]);
        }
    }
    figures.notes.push(table(&taken));
    Ok(())
}

/// Where the tree and the image are.
struct Ground {
    store: PathBuf,
    erofs: PathBuf,
    userland: String,
    nodes: usize,
}

impl Ground {
    fn lay(folder: &Path, testbed: &mut Testbed) -> Result<Self> {
        let (store, erofs) = (folder.join("tree"), folder.join("store.erofs"));
        let names = fs::read_dir(&testbed.nixos.store)?;
        let names: std::io::Result<Vec<_>> = names.map(|entry| Ok(entry?.file_name())).collect();
        let userland = names?.into_iter().filter_map(|name| name.into_string().ok());
        let userland = userland.into_iter().find(|name| name.ends_with("-debian-userland"));
        let userland = userland.context("the store has no userland")?;
        fs::create_dir_all(&store)?;
        let mut copy = tool::command("cp");
        tool::finish(copy.arg("-a").arg(testbed.nixos.store.join(&userland)).arg(&store))?;
        fs::copy(&testbed.nixos.erofs, &erofs)?;
        // Nothing may wait for the machine around, or the clock would run on meanwhile.
        for (file, name) in [
            (&mut testbed.program, "nixvmm"),
            (&mut testbed.bzimage, "bzImage"),
            (&mut testbed.tiny, "initramfs"),
        ] {
            let copy = folder.join(name);
            fs::copy(&*file, &copy).with_context(|| file.display().to_string())?;
            *file = copy;
        }
        tool::run(Program::Virtiofsd.name(), ["--version"])?;
        let found = tool::run("find", [&store])?;
        let nodes = found.iter().filter(|byte| **byte == b'\n').count();
        Ok(Self { store, erofs, userland, nodes })
    }

    fn boot(&self, testbed: &Testbed, server: &str) -> Result<Guest> {
        let store = self.store.display();
        let (flag, value) = match server {
            "store server" => ("--store-share", format!("store={store}")),
            "virtiofsd" => {
                ("--share", format!("store,source={store},cache=always,xattr,sandbox=chroot"))
            }
            _ => ("--disk", format!("path={},readonly", self.erofs.display())),
        };
        let launch = Launch::tiny(testbed, &testbed.bzimage).arguments([flag, &value]);
        let mut guest = launch.arguments(["--memory", "512M"]).boot()?;
        guest.run("sh /modules/more 2> /dev/null; mkdir -p /store")?;
        Ok(guest)
    }

    fn mount(&self, server: &str) -> String {
        let mount = match server {
            "erofs" => "mount -t erofs -o ro /dev/vda /store",
            _ => "mount -t virtiofs -o ro store /store",
        };
        format!("{mount} && cd /store/{}", self.userland)
    }
}

/// Milliseconds of `command` on a fresh mount, and then again.
fn measure(guest: &mut Guest, mount: &str, command: &str) -> Result<[f64; 2]> {
    let load = format!("{command} > /dev/null 2>&1");
    let said = guest.run(&format!(
        "sync; echo 3 > /proc/sys/vm/drop_caches; {mount}; {NOW}; {load}; {NOW}; {load}; {NOW}; \
         cd /; umount /store"
    ))?;
    let times: Vec<f64> =
        said.lines().map(|line| line.parse().context("a time")).collect::<Result<_>>()?;
    let [begin, middle, end] = times[..] else { anyhow::bail!("the guest said {said}") };
    ensure!(begin < middle && middle < end, "the guest's clock does not advance: {said}");
    Ok([(middle - begin) / 1e6, (end - middle) / 1e6])
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

/// The ratios that goals are about.
fn table(taken: &[Taken]) -> String {
    let find = |load: &str, server: &str, state: usize| {
        let found = taken.iter().find(|one| one.load == load && one.server == server);
        found.and_then(|one| one.milliseconds.get(state).copied()).unwrap_or(f64::NAN)
    };
    let mut text = "reading from a store, in virtual ms\n".to_owned();
    for (load, _) in LOADS {
        for (index, state) in ["cold", "warm"].into_iter().enumerate() {
            let [ours, theirs, disk] = SERVERS.map(|server| find(load, server, index));
            let (ratio, goal) = match state {
                "cold" => (theirs / ours, "of virtiofsd's speed, goal 1.5"),
                _ => (disk / ours, "of the erofs disk's speed, goal 1"),
            };
            text += &format!(
                "  {load:20} {state}: store server {ours:9.1}, virtiofsd {theirs:9.1}, \
                 erofs {disk:9.1}; {ratio:.2} {goal}\n"
            );
        }
    }
    text
}
