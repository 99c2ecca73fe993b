//! Do the units run guests? A real systemd starts them with a runner that is made here, and
//! `nixvmm vm` drives them.

use std::fs;
use std::os::unix::net::UnixListener;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use tests::systemd_host::SystemdHost;
use tests::testbed::Testbed;

use crate::GuestTest;

pub(crate) const TESTS: &[GuestTest] = &[
    ("systemd::guests_start_together_and_one_is_updated_while_the_others_run_on", update),
    ("systemd::a_start_that_fails_says_why_and_helpers_come_and_go_with_their_guest", helpers),
];

const NIXVMM: &str = "/srv/nixvmm";

/// The units that every host has; the others are for who needs them.
const UNITS: [&str; 3] = ["nixvmm@.service", "nixvmm-booted@.service", "nixvmm.target"];

/// Builds what the file `built` names.
const NIX: &str = r#"
case "$*" in *diff-closures*) exit ;; esac
while [ "$1" != --out-link ]; do shift; done
ln -s -f -n "$(cat /opt/built)" "$2"
"#;

fn update(testbed: &Testbed) -> Result<()> {
    let host = SystemdHost::start(testbed)?;
    host.install(&UNITS)?;
    host.write_program("/opt/bin/nix", NIX)?;
    for version in [1, 2] {
        runner(&host, "a", version, &json!({}))?;
        runner(&host, "b", version, &json!({ "vsock": { "socket": "b.gate" } }))?;
        runner(&host, "c", version, &json!({ "vsock": { "socket": "c.gate" } }))?;
    }
    builds(&host, "a", 1)?;
    vm(&host, &["create", "a", "--flake", "/etc/guests"])?;
    vm(&host, &["create", "b", "--runner", "/opt/b-1"])?;
    adopt(&host, "c")?;

    let done = start_together(&host)
        .and_then(|()| change_one(&host))
        .and_then(|()| crash(&host))
        .and_then(|()| end(&host));
    done.map_err(|error| host.explain(error))
}

/// A folder that was there before, with sockets of one that is gone.
fn adopt(host: &SystemdHost, name: &str) -> Result<()> {
    let folder = format!("/var/lib/microvms/{name}");
    host.run(&["mkdir", &folder])?;
    host.run(&["ln", "-s", &format!("/opt/{name}-1"), &format!("{folder}/current")])?;
    for socket in ["sock", "gate"] {
        UnixListener::bind(host.path(&format!("{folder}/{name}.{socket}")))?;
    }
    host.run(&["systemd-sysusers", "--inline", &format!("u vm-{name} - \"Guest {name}\"")])
        .map(drop)
}

/// All come up, each as its own user, and are ready when they run.
fn start_together(host: &SystemdHost) -> Result<()> {
    host.run(&["systemctl", "enable", "nixvmm@a", "nixvmm@b", "nixvmm@c"])?;
    host.run(&["systemctl", "start", "nixvmm.target"])?;
    for name in ["a", "b", "c"] {
        let guest = guest(host, name)?;
        ensure!(guest["state"] == "running" && guest["status"] == "The guest runs.", "{guest}");
        ensure!(guest["booted"] == format!("/opt/{name}-1"), "{guest}");
        let process = guest["processId"].to_string();
        let user = host.run(&["stat", "--format=%U", &format!("/proc/{process}")])?;
        ensure!(user.trim() == format!("vm-{name}"), "{name} runs as {user}");
    }
    vm(host, &["ctl", "b", "state"]).map(drop)
}

/// An update changes what the next start runs, and nothing that runs; a rollback undoes it.
fn change_one(host: &SystemdHost) -> Result<()> {
    let others = [process(host, "b")?, process(host, "c")?];
    let before = process(host, "a")?;
    builds(host, "a", 2)?;
    vm(host, &["update", "a"])?;
    let updated = guest(host, "a")?;
    ensure!(updated["current"] == "/opt/a-2" && updated["booted"] == "/opt/a-1", "{updated}");
    ensure!(updated["needsRestart"] == true && process(host, "a")? == before, "{updated}");

    vm(host, &["restart", "a"])?;
    let restarted = guest(host, "a")?;
    ensure!(restarted["booted"] == "/opt/a-2", "{restarted}");

    vm(host, &["rollback", "a", "--restart"])?;
    let back = guest(host, "a")?;
    ensure!(back["booted"] == "/opt/a-1" && back["needsRestart"] == false, "{back}");
    ensure!(others == [process(host, "b")?, process(host, "c")?], "another guest was restarted");
    Ok(())
}

/// Who is killed starts again over what it left, with what it ran and not with what is current.
fn crash(host: &SystemdHost) -> Result<()> {
    let before = process(host, "b")?;
    host.run(&["ln", "-s", "-f", "-n", "/opt/b-2", "/var/lib/microvms/b/current"])?;
    for socket in ["b.sock", "b.gate"] {
        let socket = host.path("/var/lib/microvms/b").join(socket);
        ensure!(socket.exists(), "{} is not there", socket.display());
    }
    host.run(&["systemctl", "kill", "--kill-whom=main", "--signal=KILL", "nixvmm@b"])?;
    let restarted = host.wait_for("restart of a killed guest", || {
        let guest = guest(host, "b")?;
        let is_up = guest["state"] == "running" && guest["processId"] != before;
        Ok(is_up.then_some(guest))
    })?;
    ensure!(restarted["booted"] == "/opt/b-1", "{restarted}");
    Ok(())
}

/// Who is stopped leaves no trace of having run; who is removed is stopped.
fn end(host: &SystemdHost) -> Result<()> {
    vm(host, &["stop", "b", "c"])?;
    for name in ["b", "c"] {
        let guest = guest(host, name)?;
        ensure!(guest["state"] != "running" && guest["booted"].is_null(), "{guest}");
    }
    vm(host, &["destroy", "a"])?;
    let unit = host.attempt(&["systemctl", "is-active", "nixvmm@a"])?;
    ensure!(!unit.status.success(), "the unit of a removed guest is {unit:?}");
    let enabled = host.run(&["ls", "/etc/systemd/system/nixvmm.target.wants"])?;
    ensure!(!enabled.contains("nixvmm@a"), "a removed guest starts with the host: {enabled}");
    vm(host, &["destroy", "a", "--remove-state"])?;
    ensure!(!host.path("/var/lib/microvms/a").exists(), "its folder is still there");
    Ok(())
}

fn helpers(testbed: &Testbed) -> Result<()> {
    let host = SystemdHost::start(testbed)?;
    host.install(&UNITS)?;
    host.install(&["nixvmm-tap@.service"])?;
    let done = failures(&host).and_then(|()| tap(&host));
    done.map_err(|error| host.explain(error))
}

/// What is wrong before a guest runs is in the error of the start, in the log and in the status.
fn failures(host: &SystemdHost) -> Result<()> {
    for (name, more, reason, line) in [
        ("lost", json!({ "kernel": "/srv/lost" }), "its configuration is wrong", "/srv/lost: No"),
        ("odd", json!({ "kernel": "/srv/initrd" }), "did not come up", "/srv/initrd: is neither"),
    ] {
        runner(host, name, 1, &more)?;
        vm(host, &["create", name, "--runner", &format!("/opt/{name}-1")])?;
        let said = fails_to_start(host, name)?;
        ensure!(said.contains(reason) && said.contains(line), "{name}: {said}");
    }
    host.wait_for("end of a guest that cannot start", || {
        let lost = guest(host, "lost")?;
        Ok((lost["state"] == "failed" && lost["booted"].is_null()).then_some(()))
    })?;
    // What may be better next time is tried again.
    host.wait_for("second attempt", || {
        let unit = "nixvmm@odd.service";
        let count = host.run(&["systemctl", "show", "--value", "--property=NRestarts", unit])?;
        Ok((count.trim() != "0").then_some(()))
    })?;
    vm(host, &["stop", "odd"])?;
    ensure!(guest(host, "odd")?["state"] != "restarting", "it cannot be stopped");

    runner(host, "nobody", 1, &json!({}))?;
    let folder = "/var/lib/microvms/nobody";
    host.run(&["mkdir", folder])?;
    host.run(&["ln", "-s", "/opt/nobody-1", &format!("{folder}/current")])?;
    let said = fails_to_start(host, "nobody")?;
    ensure!(said.contains("its user does not exist"), "nobody: {said}");
    Ok(())
}

/// The interface is there before the guest, is its user's, and goes with it.
fn tap(host: &SystemdHost) -> Result<()> {
    let more = json!({ "nets": [{ "tap": "vm-net" }] });
    runner(host, "net", 1, &more)?;
    let up = "ip tuntap add vm-net mode tap user vm-net vnet_hdr multi_queue\n\
              ip link set vm-net up\n";
    host.write_program("/opt/net-1/bin/tap-up", up)?;
    host.write_program("/opt/net-1/bin/tap-down", "ip link delete vm-net\n")?;
    vm(host, &["create", "net", "--runner", "/opt/net-1"])?;
    vm(host, &["start", "net"])?;
    let link = host.run(&["ip", "-details", "link", "show", "vm-net"])?;
    ensure!(link.contains("user vm-net") && link.contains("LOWER_UP"), "{link}");
    vm(host, &["stop", "net"])?;
    let link = host.attempt(&["ip", "link", "show", "vm-net"])?;
    ensure!(!link.status.success(), "the interface is still there: {link:?}");
    Ok(())
}

/// What is said about a start that has to fail.
fn fails_to_start(host: &SystemdHost, name: &str) -> Result<String> {
    let output = host.attempt(&[NIXVMM, "vm", "start", name])?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(!output.status.success(), "{name} was started: {said}");
    Ok(said)
}

/// Makes `/opt/NAME-VERSION`, which runs the tiny guest with `more` in its machine.
fn runner(host: &SystemdHost, name: &str, version: u32, more: &Value) -> Result<()> {
    let folder = format!("/opt/{name}-{version}");
    let note = host.folder().join(format!("{name}-{version}/share/microvm"));
    fs::create_dir_all(&note)?;
    let mut machine = json!({
        "kernel": "/srv/kernel",
        "initrd": "/srv/initrd",
        "cmdline": format!("console=hvc0 loglevel=4 version={version}"),
        "memory": { "size": "128M" },
        "control": format!("{name}.sock"),
        "console": { "kind": "file", "path": "console" },
        "shutdown-timeout": 3,
    });
    let fields = machine.as_object_mut().context("a machine is an object")?;
    fields.extend(more.as_object().cloned().unwrap_or_default());
    fs::write(note.join("machine.json"), machine.to_string())?;
    fs::write(note.join("hypervisor"), "nixvmm\n")?;
    let run = format!("exec {NIXVMM} run --config {folder}/share/microvm/machine.json\n");
    host.write_program(&format!("{folder}/bin/microvm-run"), &run)?;
    let control = format!("{NIXVMM} ctl {name}.sock");
    let shutdown = format!("{control} power-off && {control} events > /dev/null 2>&1\n");
    host.write_program(&format!("{folder}/bin/microvm-shutdown"), &shutdown)
}

/// Lets the stand-in for nix build a version of a guest from now on.
fn builds(host: &SystemdHost, name: &str, version: u32) -> Result<()> {
    Ok(fs::write(host.folder().join("built"), format!("/opt/{name}-{version}"))?)
}

fn vm(host: &SystemdHost, words: &[&str]) -> Result<String> {
    host.run(&[&[NIXVMM, "vm"], words].concat())
}

/// What `nixvmm vm list` knows of a guest.
fn guest(host: &SystemdHost, name: &str) -> Result<Value> {
    let listed: Value = serde_json::from_str(&vm(host, &["list", "--json"])?)?;
    let guests = listed.as_array().context("a list is none")?;
    let found = guests.iter().find(|guest| guest["name"] == name);
    found.cloned().with_context(|| format!("{name} is not listed: {listed}"))
}

fn process(host: &SystemdHost, name: &str) -> Result<u64> {
    let guest = guest(host, name)?;
    guest["processId"].as_u64().with_context(|| format!("{name} has no process: {guest}"))
}
