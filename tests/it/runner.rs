//! Does a runner do what its guest's options say? The scripts that the Nix modules make are run,
//! without Nix, with a stand-in for nixvmm that writes down what it is called with.

use std::fs::{self, File, Permissions};
use std::io::Write as _;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use anyhow::{Context as _, Result, ensure};
use libtest_mimic::Trial;
use serde_json::Value;
use tempfile::TempDir;
use tests::tool;

use crate::{HostTest, nix};

pub(crate) fn trials() -> Vec<Trial> {
    let checks: &[HostTest] = &[
        ("nix::a_runner_makes_and_grows_volumes_and_starts_one_nixvmm_with_its_layers", start),
        ("nix::a_runner_stops_its_guest_by_the_control_socket", stop),
        ("nix::a_runner_makes_interfaces_for_its_user_and_removes_them", interfaces),
        ("nix::a_guest_is_installed_whole_or_not_at_all_here_and_on_another_host", install),
        ("nix::every_script_is_one_to_the_shell", grammar),
    ];
    checks.iter().map(nix::evaluated_trial).collect()
}

/// What every start of the guest has; `STORE` is where the store would be.
const ARGUMENTS: &str = "run --config STORE/microvm-guest-machine.json";

/// A user that no system has, with the capabilities of the units that make interfaces.
const HELPER: &str = "setpriv --reuid=12345 --regid=12345 --clear-groups \
    --inh-caps=-all,+net_admin,+chown --ambient-caps=-all,+net_admin,+chown \
    --bounding-set=-all,+net_admin,+chown bash";

/// Makes a network of its own, and what a host has there before its guests come. The kernel makes
/// the device files of macvtaps in a `/dev` of its own only, so that this one has it beforehand.
const NETWORK: &str = "
mount -t sysfs sys /sys && mount -t tmpfs dev /dev && mkdir /dev/net || exit 1
mknod -m 666 /dev/net/tun c 10 200 && mknod -m 666 /dev/null c 1 3 || exit 1
ip link add br0 type bridge && ip tuntap add eth0 mode tap || exit 3
set -e
cd STORE
HELPER tap-up
HELPER tap-up
ip -details link show vm-tap
ip -details link show vm-bridge
device=/dev/tap$(($(cat /sys/class/net/*/ifindex | sort -n | tail -n 1) + 1))
mknod -m 600 $device c 1 3
HELPER macvtap-up
ip -details link show vm-macvtap
stat --format='device of %u' $device
HELPER tap-down
HELPER macvtap-down
echo left: $(ls /sys/class/net)
";

const MEBIBYTE: u64 = 1 << 20;

fn start() -> Result<()> {
    let runner = Runner::new()?;
    unfinished(&runner)?;
    let said = runner.run("microvm-run", &["--cpus", "4"])?;
    let expected =
        format!("{ARGUMENTS} --credential token=@/run/secrets/token --timing --ready started");
    ensure!(runner.calls()? == [format!("{expected} --cpus 4")], "{:?}", runner.calls()?);
    ensure!(runner.file("prepared").exists(), "preStart was not run");
    ensure!(said.contains("data.img of 8 MiB"), "{said}");
    ensure!(describe(&runner.file("data.img"))?.contains("volume name:   data\n"), "no label");
    let small = describe(&runner.file("small blocks.img"))?;
    ensure!(small.contains("Block size:               1024\n"), "{small}");
    ensure!(!runner.file("foreign.img").exists(), "it made an image that it should not");

    keeps_what_is_there(&runner)?;
    layers(&runner)
}

/// A volume that could not be made is not there half.
fn unfinished(runner: &Runner) -> Result<()> {
    let broken = runner.folder.path().join("store/e2fsprogs/bin/mkfs.ext4");
    program(&broken, "echo no >&2; exit 1\n")?;
    let output = runner.attempt("microvm-run", &[])?;
    ensure!(!output.status.success() && runner.calls()?.is_empty(), "it starts without volumes");
    ensure!(!runner.file("data.img").exists(), "half a volume is there");
    Ok(fs::remove_file(broken)?)
}

/// A second start makes nothing anew, a volume that shall be larger grows, and none is cut.
fn keeps_what_is_there(runner: &Runner) -> Result<()> {
    let image = runner.file("data.img");
    let before = fs::read(&image)?;
    let said = runner.run("microvm-run", &[])?;
    ensure!(fs::read(&image)? == before && said.is_empty(), "a start changes a volume: {said}");

    File::options().write(true).open(&image)?.set_len(4 * MEBIBYTE)?;
    let said = runner.run("microvm-run", &[])?;
    ensure!(said.contains("data.img has grown to 8 MiB"), "{said}");
    ensure!(fs::metadata(&image)?.len() == 8 * MEBIBYTE, "it has not grown");

    File::options().write(true).open(&image)?.set_len(16 * MEBIBYTE)?;
    let said = runner.run("microvm-run", &[])?;
    ensure!(said.contains("data.img stays larger than 8 MiB"), "{said}");
    ensure!(fs::metadata(&image)?.len() == 16 * MEBIBYTE, "it was cut");
    Ok(())
}

/// Values of an instance come after those of the build, and secrets from where systemd has them.
fn layers(runner: &Runner) -> Result<()> {
    fs::create_dir_all(runner.file("machine.d"))?;
    for layer in ["20-network.json", "10-memory.json", "notes"] {
        fs::write(runner.file("machine.d").join(layer), "{}")?;
    }
    let secrets = runner.folder.path().join("secrets");
    fs::create_dir(&secrets)?;
    fs::write(secrets.join("token"), "secret")?;
    File::create(runner.folder.path().join("calls"))?;
    let mut command = runner.command("microvm-run")?;
    tool::finish(command.env("CREDENTIALS_DIRECTORY", &secrets))?;
    let expected = format!(
        "{ARGUMENTS} --config machine.d/10-memory.json --config machine.d/20-network.json \
         --credential token=@{}/token --timing --ready started",
        secrets.display()
    );
    ensure!(runner.calls()? == [expected], "{:?}", runner.calls()?);
    Ok(())
}

fn stop() -> Result<()> {
    let runner = Runner::new()?;
    runner.run("microvm-shutdown", &[])?;
    runner.run("microvm-balloon", &["64"])?;
    runner.run("microvm-console", &[])?;
    let expected = ["power-off", "events", "balloon 64M", "console"];
    let expected = expected.map(|verb| format!("ctl guest.sock {verb}"));
    ensure!(runner.calls()? == expected, "{:?}", runner.calls()?);
    let output = runner.attempt("microvm-balloon", &[])?;
    ensure!(output.status.code() == Some(2), "a balloon of no size: {output:?}");
    Ok(())
}

fn interfaces() -> Result<()> {
    let runner = Runner::new()?;
    if !rustix::process::geteuid().is_root() {
        eprintln!("\nNOT CHECKED: what makes interfaces, because only root may have a network");
        return Ok(());
    }
    let store = runner.folder.path().join("store");
    fs::set_permissions(runner.folder.path(), Permissions::from_mode(0o755))?;
    for (name, text) in runner.scripts["others"].as_object().context("scripts")? {
        program(&store.join(name), text.as_str().context("a text")?)?;
    }
    for (program, package) in [("ip", "iproute2"), ("id", "coreutils"), ("chown", "coreutils")] {
        let found = tool::find(program).with_context(|| format!("{program} is not installed"))?;
        let folder = store.join(package).join("bin");
        fs::create_dir_all(&folder)?;
        symlink(found, folder.join(program))?;
    }
    let script =
        NETWORK.replace("HELPER", HELPER).replace("STORE", store.to_str().context("a path")?);
    let output =
        tool::command("unshare").args(["--net", "--mount", "sh", "-c", &script]).output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    if output.status.code() == Some(3) {
        eprintln!("\nNOT CHECKED: what makes interfaces, which this kernel lacks: {said}");
        return Ok(());
    }
    let made = String::from_utf8_lossy(&output.stdout);
    ensure!(output.status.success(), "{made}{said}");
    for expected in [
        "vm-tap: <",
        "multi_queue",
        "vnet_hdr on",
        "user 12345",
        "master br0",
        "macvtap mode bridge",
        "ALLMULTI",
        "device of 12345\n",
        "left: br0 eth0 lo\n",
    ] {
        ensure!(made.contains(expected), "no {expected}: {made}{said}");
    }
    Ok(())
}

fn install() -> Result<()> {
    let runner = Runner::new()?;
    let folder = runner.folder.path();
    let user = String::from_utf8(tool::run("id", ["-u", "-n"])?)?;
    for (name, text) in runner.scripts["others"].as_object().context("scripts")? {
        let text = text.as_str().context("a text")?.replace("vm-web", user.trim());
        let text = text.replace("/var/lib/microvms", &format!("{}/guests", folder.display()));
        let text = text.replace("/nix/var", &format!("{}/var", folder.display()));
        program(&folder.join("store").join(name), &text)?;
    }
    runner.run("install", &[])?;
    runner.run("install", &[])?;
    let link = |name: &str| fs::read_link(folder.join(name)).map(|link| link.display().to_string());
    let current = link("guests/web/current")?;
    ensure!(current.ends_with("store/microvm-nixvmm-guest"), "current is {current}");
    ensure!(link("guests/web/toplevel")?.ends_with("store/toplevel"), "no toplevel");
    let root = fs::canonicalize(folder)?.join("var/nix/gcroots/microvm/booted-web");
    ensure!(fs::read_link(root)? == folder.join("guests/web/booted"), "booted is no root");

    deploy(&runner)
}

/// Installs a guest by a stand-in for ssh, whose other host is this one, and for nix, which builds
/// what the file `built` names.
fn deploy(runner: &Runner) -> Result<()> {
    let folder = runner.folder.path();
    program(&folder.join("bin/ssh"), "[ \"$1\" = root@host ] && shift 2 && exec \"$@\"\n")?;
    let nix = format!(
        "echo \"nix $1\" >> {0}/calls\n[ \"$1\" != build ] || {{ [ -e {0}/built ] && \
         ln -s \"$(cat {0}/built)\" new; }}\n",
        folder.display()
    );
    program(&folder.join("bin/nix"), &nix)?;
    let path = format!("{}/bin:{}", folder.display(), std::env::var("PATH")?);
    let deploy = || -> Result<Output> {
        Ok(runner.command("installOnHost")?.arg("root@host").env("PATH", &path).output()?)
    };
    let links = || {
        ["current", "old", "new"].map(|name| {
            let link = fs::read_link(folder.join("guests/guest").join(name));
            link.map(|link| link.display().to_string()).unwrap_or_default()
        })
    };
    for (built, expected, word) in [
        ("/first", ["/first", "", ""], "is installed"),
        ("/first", ["/first", "", ""], "is up to date"),
        ("/second", ["/second", "/first", ""], "is installed"),
    ] {
        fs::write(folder.join("built"), built)?;
        let output = deploy()?;
        let said = String::from_utf8_lossy(&output.stdout);
        ensure!(output.status.success() && said.contains(word), "{built}: {output:?}");
        ensure!(links() == expected, "{built}: {:?}", links());
    }
    ensure!(runner.calls()?.starts_with(&["nix copy".to_owned(), "nix build".to_owned()]), "order");
    fs::remove_file(folder.join("built"))?;
    ensure!(!deploy()?.status.success(), "a build that fails is installed");
    ensure!(links() == ["/second", "/first", ""], "a build that fails changes {:?}", links());
    Ok(())
}

fn grammar() -> Result<()> {
    let runner = Runner::new()?;
    for kind in ["run", "others"] {
        let scripts = runner.scripts[kind].as_object().context("scripts")?;
        ensure!(scripts.len() >= 4, "only {} scripts of {kind}", scripts.len());
        for (name, text) in scripts {
            let file = runner.file("script");
            fs::write(&file, text.as_str().context("a text")?)?;
            tool::run("bash", [Path::new("-n"), &file]).with_context(|| name.clone())?;
        }
    }
    Ok(())
}

/// A guest's folder, and its programs.
struct Runner {
    /// Has `store`, in place of the store, `state`, the guest's folder, and `calls` of nixvmm.
    folder: TempDir,
    scripts: Value,
}

impl Runner {
    fn new() -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let store = folder.path().join("store");
        let mut evaluated = nix::evaluated(&store)?;
        fs::create_dir_all(folder.path().join("state"))?;
        let calls = File::create(folder.path().join("calls"));
        calls.and_then(|mut calls| calls.flush())?;
        let stand_in = format!("echo \"$@\" >> {}/calls\n", folder.path().display());
        program(&store.join("nixvmm/bin/nixvmm"), &stand_in)?;
        program(&store.join("more-arguments"), "echo --ready started\n")?;
        let scripts = evaluated["scripts"].take();
        let runner = Self { folder, scripts };
        for (name, text) in runner.scripts["run"].as_object().context("scripts")? {
            program(&store.join(name), text.as_str().context("a text")?)?;
        }
        Ok(runner)
    }

    /// A file of the guest's folder.
    fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join("state").join(name)
    }

    fn command(&self, name: &str) -> Result<Command> {
        let mut command = Command::new("bash");
        let path = std::env::var("PATH")?;
        command.arg(self.folder.path().join("store").join(name));
        command.current_dir(self.folder.path().join("state"));
        command.env("PATH", format!("{path}:/usr/sbin:/sbin")).env_remove("CREDENTIALS_DIRECTORY");
        Ok(command)
    }

    fn attempt(&self, name: &str, arguments: &[&str]) -> Result<Output> {
        Ok(self.command(name)?.args(arguments).output()?)
    }

    /// Runs a program and returns what it says to people, without the words of mkfs.
    fn run(&self, name: &str, arguments: &[&str]) -> Result<String> {
        let output = self.attempt(name, arguments)?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(output.status.success(), "{name} {arguments:?}: {}\n{said}", output.status);
        Ok(said)
    }

    /// What nixvmm was called with, one line for each call.
    fn calls(&self) -> Result<Vec<String>> {
        let calls = fs::read_to_string(self.folder.path().join("calls"))?;
        let store = self.folder.path().join("store").display().to_string();
        Ok(calls.lines().map(|line| line.replace(&store, "STORE")).collect())
    }
}

fn program(file: &Path, text: &str) -> Result<()> {
    fs::create_dir_all(file.parent().context("a program is in a folder")?)?;
    fs::write(file, format!("#!/bin/sh\n{text}"))?;
    Ok(fs::set_permissions(file, Permissions::from_mode(0o755))?)
}

/// What the file system of an image says about itself.
fn describe(image: &Path) -> Result<String> {
    let words = [Path::new("-h"), image];
    Ok(String::from_utf8_lossy(&tool::run("dumpe2fs", words)?).into_owned())
}
