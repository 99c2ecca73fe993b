//! Can a running guest be controlled? By `nixvmm ctl`, and by clients that do not behave.

use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use serde_json::Value;
use tempfile::TempDir;
use tests::events::Events;
use tests::guest::{Guest, Launch, PATIENCE};
use tests::terminal::Terminal;
use tests::testbed::Testbed;

use crate::GuestTest;

pub(crate) const TESTS: &[GuestTest] = &[
    ("control::a_guest_is_asked_paused_grown_and_reset_and_powers_off", every_verb),
    ("control::hostile_clients_do_not_disturb_a_guest_that_can_be_stopped", hostile_clients),
    ("control::a_paused_guest_hears_the_power_button", paused_guest),
];

/// Exit statuses of `nixvmm`, as its manual has them.
const POWERED_OFF: i32 = 0;
const KILLED: i32 = 6;

const MEBIBYTE: u64 = 1 << 20;

const INTERFACE: &str = "io.nixvmm.Machine";

/// A guest that does not know that it was paused complains of such a time.
const LONGER_THAN_THE_WATCHDOG: Duration = Duration::from_secs(12);

/// A control socket in a folder of its own, and the program that is its client.
struct Control {
    folder: TempDir,
    program: PathBuf,
}

impl Control {
    fn new(testbed: &Testbed) -> Result<Self> {
        Ok(Self { folder: tempfile::tempdir()?, program: testbed.program.clone() })
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("control")
    }

    /// The tiny guest with two processors and this socket.
    fn launch(&self, testbed: &Testbed) -> Launch {
        Launch::tiny(testbed, &testbed.bzimage)
            .arguments(["--cpus", "2", "--control"])
            .arguments([self.socket()])
    }

    fn command(&self, verb: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        command.arg("ctl").arg(self.socket()).args(verb).stdin(Stdio::null());
        command
    }

    fn attempt(&self, verb: &[&str]) -> Result<Output> {
        self.command(verb).output().context("nixvmm ctl cannot be started")
    }

    /// Does it and returns what it prints.
    fn ctl(&self, verb: &[&str]) -> Result<String> {
        let Output { status, stdout, stderr } = self.attempt(verb)?;
        let errors = String::from_utf8_lossy(&stderr);
        ensure!(status.success() && stderr.is_empty(), "ctl {verb:?}: {status}, {errors}");
        Ok(String::from_utf8(stdout)?)
    }

    fn json(&self, verb: &[&str]) -> Result<Value> {
        Ok(serde_json::from_str(&self.ctl(&[verb, &["--json"]].concat())?)?)
    }

    /// Does it and returns why it is refused.
    fn refusal(&self, verb: &[&str]) -> Result<String> {
        let output = self.attempt(verb)?;
        ensure!(output.status.code() == Some(1), "ctl {verb:?}: {}", output.status);
        Ok(String::from_utf8(output.stderr)?)
    }

    fn state(&self) -> Result<String> {
        let state = self.json(&["state"])?;
        Ok(state["state"].as_str().context("no state")?.to_owned())
    }

    fn expect_state(&self, expected: &str) -> Result<()> {
        let state = self.state()?;
        ensure!(state == expected, "the machine is {state}, not {expected}");
        Ok(())
    }
}

fn every_verb(testbed: &Testbed) -> Result<()> {
    let control = Control::new(testbed)?;
    let (image, unnamed) = (control.folder.path().join("a"), control.folder.path().join("b"));
    for path in [&image, &unnamed] {
        std::fs::File::create(path)?.set_len(8 * MEBIBYTE)?;
    }
    let mut guest = control
        .launch(testbed)
        .arguments(["--disk", &format!("path={},serial=data", text(&image)?)])
        .arguments(["--disk", &format!("path={},readonly", text(&unnamed)?)])
        .boot()?;
    let mode = control.socket().metadata()?.permissions().mode() & 0o777;
    ensure!(mode == 0o600, "the control socket has the mode {mode:o}");

    let state = control.json(&["state"])?;
    ensure!(state["processId"] == guest.process_id(), "{state}");
    ensure!(state["processors"] == 2 && state["state"] == "running", "{state}");
    ensure!(control.ctl(&["state"])?.contains("memory      512 MiB"), "a size for people");
    let config = control.json(&["config"])?;
    ensure!(config["configuration"]["disks"][0]["serial"] == "data", "{config}");

    varlinkctl(testbed, &control, guest.process_id())?;

    let events = Events::follow(&control.program, &control.socket())?;
    pause_and_resume(&control, &mut guest)?;
    count(&control, &mut guest)?;
    attach(&control, &mut guest)?;
    resize(&control, &mut guest)?;
    swap(&control, &mut guest)?;

    let first = guest.run("cat /proc/sys/kernel/random/boot_id")?;
    control.ctl(&["reset"])?;
    guest.wait_for_agent()?;
    let second = guest.run("cat /proc/sys/kernel/random/boot_id")?;
    ensure!(first != second, "the guest was not reset");
    control.ctl(&["power-button"])?;
    guest.expect_status(POWERED_OFF)?;
    ensure!(!control.socket().exists(), "the control socket is still there");
    events.expect(&[
        "subscribed",
        "paused",
        "resumed",
        "disk-resized",
        "disk-resized",
        "disk-exchanged",
        "reset",
        "started",
        "power-off",
    ])?;
    let refusal = control.refusal(&["state"])?;
    ensure!(refusal.contains("does the guest run"), "{refusal}");
    Ok(())
}

/// A paused guest does nothing, and does not notice when it goes on.
fn pause_and_resume(control: &Control, guest: &mut Guest) -> Result<()> {
    // Both processors work, and a watchdog complains when one does not for ten seconds.
    guest.run("echo 5 > /proc/sys/kernel/watchdog_thresh")?;
    guest.run(
        "for i in 1 2; do (while :; do :; done) > /dev/null 2>&1 & echo $! >> /tmp/pids; done",
    )?;
    control.ctl(&["pause"])?;
    control.expect_state("paused")?;
    control.ctl(&["pause"])?;
    let before = processor_ticks(guest.process_id())?;
    std::thread::sleep(LONGER_THAN_THE_WATCHDOG);
    let after = processor_ticks(guest.process_id())?;
    ensure!(before == after, "processors worked for {} ticks while paused", after - before);
    control.ctl(&["resume"])?;
    control.expect_state("running")?;
    control.ctl(&["resume"])?;
    ensure!(guest.run("kill $(cat /tmp/pids); echo on")? == "on\n", "it does not go on");
    guest.run("echo 10 > /proc/sys/kernel/watchdog_thresh")?;
    let complaints = guest.run("dmesg | grep -ci -e 'soft lockup' -e stall || true")?;
    ensure!(complaints.trim() == "0", "the guest's watchdogs have seen the pause");
    Ok(())
}

/// Systemd's client understands the service: what it offers, a reply, and an error.
fn varlinkctl(testbed: &Testbed, control: &Control, process: u32) -> Result<()> {
    let socket = control.socket();
    let varlinkctl = |words: &[&str]| -> Result<Output> {
        let mut command = Command::new(testbed.systemd.join("varlinkctl"));
        command.arg(words[0]).arg(&socket).args(&words[1..]);
        command.stdin(Stdio::null()).output().context("varlinkctl cannot be started")
    };
    let offered = varlinkctl(&["introspect", INTERFACE])?;
    let text = String::from_utf8_lossy(&offered.stdout);
    let is_whole = text.contains("method GetState(") && text.contains("method PowerOff(");
    ensure!(offered.status.success() && is_whole, "{offered:?}");
    let state = varlinkctl(&["call", &format!("{INTERFACE}.GetState"), "{}"])?;
    let state: Value =
        serde_json::from_slice(&state.stdout).with_context(|| format!("{state:?}"))?;
    ensure!(state["processId"] == process, "varlinkctl is told {state}");
    let refused =
        varlinkctl(&["call", &format!("{INTERFACE}.SetBalloonTarget"), "{\"target\": \"much\"}"])?;
    ensure!(!refused.status.success(), "varlinkctl sees no error: {refused:?}");
    Ok(())
}

/// What the guest does is counted, for people, scripts and Prometheus.
fn count(control: &Control, guest: &mut Guest) -> Result<()> {
    let read = |control: &Control| -> Result<(u64, u64)> {
        let statistics = control.json(&["stats"])?;
        let disk = &statistics["devices"][0];
        ensure!(disk["name"] == "data" && disk["kind"] == "disk", "{statistics}");
        ensure!(statistics["processors"].as_array().map(Vec::len) == Some(2), "{statistics}");
        let count = |name: &str| disk["counters"][name].as_u64().context("no such counter");
        Ok((count("writes")?, count("written_bytes")?))
    };
    let before = read(control)?;
    guest.run("dd if=/dev/zero of=/dev/vda bs=64k count=4 oflag=direct")?;
    let after = read(control)?;
    ensure!(after.1 == before.1 + (256 << 10), "{before:?} {after:?}");
    ensure!(after.0 >= before.0 + 4, "{before:?} {after:?}");
    let metrics = control.ctl(&["metrics"])?;
    for line in [
        "# TYPE nixvmm_disk_written_bytes_total counter",
        &format!("nixvmm_disk_written_bytes_total{{device=\"data\"}} {}", after.1),
        "nixvmm_state{state=\"running\"} 1",
    ] {
        ensure!(metrics.lines().any(|other| other == line), "{line} is not in\n{metrics}");
    }
    ensure!(
        metrics.contains("nixvmm_exits_total{processor=\"1\",reason=\"signals\"}"),
        "{metrics}"
    );
    ensure!(control.ctl(&["stats"])?.contains("written bytes"), "a table for people");
    Ok(())
}

/// Who attaches sees what the other end of the console sees, and may type as well.
fn attach(control: &Control, guest: &mut Guest) -> Result<()> {
    let mut command = control.command(&["console"]);
    let mut process = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    let output = process.stdout.take().context("no standard output")?;
    let mut console = Terminal::new(output, process.stdin.take());
    console.write("run 900 echo typed by another\n")?;
    console.wait_for("agent: done 900 0", PATIENCE)?;
    console.wait_for("typed by another\n", PATIENCE)?;
    ensure!(guest.run("echo for both of us")? == "for both of us\n", "the first end");
    console.wait_for("for both of us\n", PATIENCE)?;
    // The end of what is typed is not the end of what is shown.
    console.close();
    guest.run("echo still shown")?;
    console.wait_for("still shown\n", PATIENCE)?;
    process.kill()?;
    process.wait()?;
    ensure!(guest.run("echo alone")? == "alone\n", "the guest misses who has left");
    let refusal = control.refusal(&["console", "--serial"])?;
    ensure!(refusal.contains("this machine has no serial"), "{refusal}");
    Ok(())
}

/// The time that the processors of a machine have worked, in ticks of the host.
fn processor_ticks(process: u32) -> Result<u64> {
    let mut ticks = 0;
    for thread in std::fs::read_dir(format!("/proc/{process}/task"))? {
        let folder = thread?.path();
        if std::fs::read_to_string(folder.join("comm"))?.starts_with("vcpu") {
            let stat = std::fs::read_to_string(folder.join("stat"))?;
            let fields = stat.rsplit_once(')').context("no name")?.1.split_whitespace();
            // Fields 14 and 15: in user mode and in the kernel (proc(5)); two are cut off.
            let times = fields.skip(11).take(2).map(str::parse::<u64>);
            ticks += times.sum::<Result<u64, _>>()?;
        }
    }
    Ok(ticks)
}

fn resize(control: &Control, guest: &mut Guest) -> Result<()> {
    let sectors = |guest: &mut Guest| -> Result<u64> {
        Ok(guest.run("cat /sys/block/vda/size")?.trim().parse()?)
    };
    ensure!(sectors(guest)? == 8 * MEBIBYTE / 512, "the disk's first size");
    ensure!(control.ctl(&["resize", "data", "12M"])? == "data has 12 MiB\n", "growing");
    guest.run("until [ $(cat /sys/block/vda/size) = 24576 ]; do sleep 0.1; done")?;
    let image = control.folder.path().join("a");
    std::fs::File::options().write(true).open(&image)?.set_len(16 * MEBIBYTE)?;
    ensure!(control.json(&["resize", "data"])?["size"] == 16 * MEBIBYTE, "it has grown already");
    guest.run("until [ $(cat /sys/block/vda/size) = 32768 ]; do sleep 0.1; done")?;
    let disks = control.ctl(&["disks"])?;
    let expected = "DISK   SIZE    ACCESS\n\
                    data   16 MiB  read-write\n\
                    disk1  8 MiB   read-only\n";
    ensure!(disks == expected, "{disks}");
    for (verb, expected) in [
        (["resize", "data", "4M"], "a disk cannot shrink"),
        (["resize", "data", "16777217"], "no multiple of 512"),
        (["resize", "disk1", "16M"], "it is only read"),
        (["resize", "other", "16M"], "there is no disk other"),
    ] {
        let refusal = control.refusal(&verb)?;
        ensure!(refusal.contains(expected), "{verb:?}: {refusal}");
    }
    Ok(())
}

/// The guest reads another image after it took the first one's place, and writes to that one only.
fn swap(control: &Control, guest: &mut Guest) -> Result<()> {
    let image = control.folder.path().join("successor");
    std::fs::write(&image, b"successor".repeat(1000))?;
    let old = std::fs::read(control.folder.path().join("a"))?;
    let refusal = control.refusal(&["swap", "data", text(&image)?])?;
    ensure!(refusal.contains("ends within a block"), "{refusal}");
    std::fs::File::options().write(true).open(&image)?.set_len(2 * MEBIBYTE)?;
    let said = control.ctl(&["swap", "data", text(&image)?])?;
    ensure!(said == "data has 2 MiB\n", "{said}");
    guest.run("until [ $(cat /sys/block/vda/size) = 4096 ]; do sleep 0.1; done")?;
    let start = guest.run("head -c 9 /dev/vda; printf written > /dev/vda; sync")?;
    ensure!(start == "successor", "the guest reads {start}");
    ensure!(std::fs::read(&image)?.starts_with(b"writtenor"), "the new image is not written");
    let unchanged = std::fs::read(control.folder.path().join("a"))? == old;
    ensure!(unchanged, "the old image was written");
    let refusal = control.refusal(&["swap", "data", text(&image)?])?;
    ensure!(refusal.contains("in use"), "{refusal}");
    let refusal = control.refusal(&["swap", "data", "/dev/null"])?;
    ensure!(refusal.contains("a file takes the place of a file"), "{refusal}");
    Ok(())
}

/// Clients that never read, never end what they say, or talk nonsense, while the guest works.
fn hostile_clients(testbed: &Testbed) -> Result<()> {
    let control = Control::new(testbed)?;
    let mut guest = control.launch(testbed).boot()?;
    let mut crowd = Vec::new();
    for number in 0..1000 {
        let mut client = UnixStream::connect(control.socket())?;
        client.set_nonblocking(true)?;
        let text: &[u8] = match number % 5 {
            0 => b"{\"method\": \"io.nixvmm.Machine.Subscribe\", \"more\": true}\0",
            1 => b"{\"method\": \"io.nixvmm.Machine.Get",
            2 => b"nonsense\0",
            3 => b"",
            _ => b"{\"method\": \"io.nixvmm.Machine.GetConfiguration\"}\0",
        };
        // One that has been sent away cannot be written to.
        let _ = client.write_all(&text.repeat(50));
        crowd.push(client);
        if number % 250 == 0 {
            ensure!(guest.run("echo works")? == "works\n", "the guest is disturbed");
            control.expect_state("running")?;
        }
    }
    control.ctl(&["pause"])?;
    control.ctl(&["resume"])?;
    ensure!(guest.run("echo works")? == "works\n", "the guest is disturbed");
    drop(crowd);
    control.ctl(&["pause"])?;
    control.expect_state("paused")?;
    control.ctl(&["stop"])?;
    guest.expect_status(KILLED)
}

fn paused_guest(testbed: &Testbed) -> Result<()> {
    let control = Control::new(testbed)?;
    let mut guest = control.launch(testbed).boot()?;
    control.ctl(&["pause"])?;
    guest.signal(Signal::TERM)?;
    guest.expect_status(POWERED_OFF)?;

    let mut guest = control.launch(testbed).command_line("power-button=ignored").boot()?;
    control.ctl(&["pause"])?;
    control.ctl(&["power-off"])?;
    control.expect_state("ending")?;
    let refusal = control.refusal(&["pause"])?;
    ensure!(refusal.contains("asked to power off"), "{refusal}");
    control.ctl(&["power-off"])?;
    ensure!(guest.run("echo still here")? == "still here\n", "asking twice ended it");
    guest.signal(Signal::TERM)?;
    guest.expect_status(KILLED)
}

fn text(path: &Path) -> Result<&str> {
    path.to_str().context("a path that is no UTF-8")
}
