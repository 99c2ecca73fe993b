//! Where do units run? On a host that a real systemd runs: the userland of the NixOS-shaped guest
//! as a container of this machine, with a process tree, file system and network of its own, and
//! with `/dev/kvm`.

use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Error, Result, anyhow, bail, ensure};
use tempfile::TempDir;

use crate::guest::{LONG_PATIENCE, PATIENCE};
use crate::testbed::Testbed;
use crate::tool;

const SCRIPT: &str = include_str!("../../resources/guest/systemd-host.sh");

/// The units as they are installed.
const UNITS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../resources/systemd");

/// Where programs of a test come first.
const PROGRAMS: &str = "/opt/bin:/usr/sbin:/usr/bin";

/// What a host and its guests said last.
const WORDS: &str = "journalctl --no-pager --lines=100; tail -n 20 /var/lib/microvms/*/console";

/// How often something is looked at that is waited for. A look starts programs, which take their
/// time from the guests.
const POLL: Duration = Duration::from_secs(1);

/// A running host. Dropping it ends everything in it.
pub struct SystemdHost {
    process: Child,
    /// Its systemd, as this machine counts processes.
    init: u32,
    group: PathBuf,
    folder: TempDir,
}

impl SystemdHost {
    /// Starts one that has in `/srv` the program, the kernel, the tiny guest's initrd and folders
    /// with passt and virtiofsd, and none of our units.
    ///
    /// # Errors
    /// When its systemd does not come up; this needs root.
    pub fn start(testbed: &Testbed) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        fs::set_permissions(folder.path(), Permissions::from_mode(0o755))?;
        let script = folder.path().join("host.sh");
        fs::write(&script, SCRIPT)?;
        let name = folder.path().file_name().context("a folder has a name")?;
        let group = groups()?.join(name);
        fs::create_dir(&group).with_context(|| format!("{}: are you root?", group.display()))?;

        let mut command = tool::command("setpriv");
        command.args(["--pdeathsig", "KILL", "--", "sh"]).arg(&script).arg("start");
        command.args([&testbed.nixos.erofs, &group, &folder.path().to_owned()]);
        let files = [
            ("nixvmm", &testbed.program),
            ("kernel", &testbed.vmlinux),
            ("initrd", &testbed.tiny),
            ("passt", &testbed.passt),
            ("virtiofsd", &testbed.virtiofsd),
        ];
        command.args(files.map(|(name, path)| format!("{name}={}", path.display())));
        let path = std::env::var("PATH").unwrap_or_default();
        command.env("PATH", format!("{path}:/usr/sbin:/sbin")).stdin(Stdio::null());
        let process = command.spawn().context("setpriv cannot be started")?;
        let mut host = Self { process, init: 0, group, folder };
        host.wait_for_systemd()?;
        Ok(host)
    }

    /// Installs units of ours, by their file names.
    ///
    /// # Errors
    /// When one is missing, or systemd does not take them.
    pub fn install(&self, units: &[&str]) -> Result<()> {
        for unit in units {
            let target = self.path(&format!("/etc/systemd/system/{unit}"));
            fs::copy(Path::new(UNITS).join(unit), target).with_context(|| (*unit).to_owned())?;
        }
        self.run(&["systemctl", "daemon-reload"]).map(drop)
    }

    /// Lays a drop-in of ours over one unit.
    ///
    /// # Errors
    /// When it is missing, or systemd does not take it.
    pub fn add_drop_in(&self, unit: &str, drop_in: &str) -> Result<()> {
        let folder = self.path(&format!("/etc/systemd/system/{unit}.d"));
        fs::create_dir_all(&folder)?;
        fs::copy(Path::new(UNITS).join(drop_in), folder.join(drop_in))?;
        self.run(&["systemctl", "daemon-reload"]).map(drop)
    }

    /// A file of the host, as this machine finds it; not for links, which lead elsewhere here.
    pub fn path(&self, path: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root{path}", self.init))
    }

    /// The folder that the host has as `/opt`.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Writes a program to `path`, which begins with `/opt`.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn write_program(&self, path: &str, text: &str) -> Result<()> {
        let path = self.path(path);
        fs::create_dir_all(path.parent().context("a program is in a folder")?)?;
        fs::write(&path, format!("#!/bin/sh\n{text}"))?;
        Ok(fs::set_permissions(path, Permissions::from_mode(0o755))?)
    }

    /// Runs a command of the host as its root, and returns how it ended and what it said.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn attempt(&self, words: &[&str]) -> Result<Output> {
        let mut command = tool::command("nsenter");
        command.arg("--target").arg(self.init.to_string());
        command.args(["--mount", "--pid", "--cgroup", "--net", "--ipc", "--uts", "--"]).args(words);
        command.env_clear().env("PATH", PROGRAMS).stdin(Stdio::null());
        command.output().with_context(|| format!("{words:?} cannot be started"))
    }

    /// Runs a command of the host as its root, and returns what it printed.
    ///
    /// # Errors
    /// When it fails.
    pub fn run(&self, words: &[&str]) -> Result<String> {
        let output = self.attempt(words)?;
        let (out, errors) = (text(&output.stdout), text(&output.stderr));
        ensure!(output.status.success(), "{words:?} failed: {}\n{out}{errors}", output.status);
        Ok(out)
    }

    /// Waits until `found` finds something, which is `what`.
    ///
    /// # Errors
    /// When it does not in time.
    pub fn wait_for<T>(
        &self,
        what: &str,
        mut found: impl FnMut() -> Result<Option<T>>,
    ) -> Result<T> {
        let deadline = Instant::now() + LONG_PATIENCE;
        loop {
            if let Some(found) = found()? {
                return Ok(found);
            }
            if Instant::now() > deadline {
                bail!("there is no {what}");
            }
            thread::sleep(POLL);
        }
    }

    /// `error` with the end of the host's log and of its guests' consoles.
    pub fn explain(&self, error: Error) -> Error {
        let words = ["sh", "-c", WORDS];
        let said = self.attempt(&words).map_or_else(|e| format!("{e:#}"), |all| text(&all.stdout));
        error.context(format!("the host of units said:\n{said}---"))
    }

    fn wait_for_systemd(&mut self) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        let id = self.process.id();
        while !self.has_systemd() {
            ensure!(self.process.try_wait()?.is_none(), "the host of units has ended early");
            ensure!(Instant::now() < deadline, "the systemd of the host of units does not come up");
            let children = fs::read_to_string(format!("/proc/{id}/task/{id}/children"))?;
            self.init = children.trim().parse().unwrap_or(0);
            thread::sleep(POLL);
        }
        let state = self.attempt(&["systemctl", "is-system-running", "--wait"])?;
        let state = text(&state.stdout);
        if state.trim() != "running" {
            return Err(self.explain(anyhow!("the host of units is {state}")));
        }
        Ok(())
    }

    /// Whether commands can be run. Before it is systemd, the first process may see this machine's.
    fn has_systemd(&self) -> bool {
        let name = fs::read_to_string(format!("/proc/{}/comm", self.init));
        name.is_ok_and(|name| name.trim() == "systemd")
            && self.path("/run/systemd/private").exists()
    }
}

impl Drop for SystemdHost {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        // The kernel ends what was in there by and by.
        let deadline = Instant::now() + PATIENCE;
        while remove_groups(&self.group).is_err() && Instant::now() < deadline {
            thread::sleep(POLL);
        }
    }
}

/// Where this machine has its control groups.
fn groups() -> Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/mounts")?;
    let mut words = mounts.lines().map(|line| line.split(' ').skip(1));
    let path = words.find_map(|mut words| {
        let path = words.next()?;
        (words.next() == Some("cgroup2")).then(|| PathBuf::from(path))
    });
    path.context("cgroup2 is not mounted here, which systemd needs")
}

fn remove_groups(group: &Path) -> io::Result<()> {
    for entry in fs::read_dir(group)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_groups(&entry.path())?;
        }
    }
    fs::remove_dir(group)
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
