//! Do the units run guests? A real systemd starts them with a runner that is made here, and
//! `nixvmm vm` drives them.

use std::fs::{self, File};
use std::os::unix::net::UnixListener;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use tests::guest::PATIENCE;
use tests::systemd_host::SystemdHost;
use tests::testbed::Testbed;
use tests::tool;

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

/// What NixOS installs a guest by, as long as its host's configuration has it: when that changes it
/// runs again, and when it goes the guest stops.
const INSTALL: &str = "\
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=true
";

const CONFIGURED: &str = "\
[Unit]
Wants=install-microvm-NAME.service
After=install-microvm-NAME.service
StopPropagatedFrom=install-microvm-NAME.service
";

const VOLUME_SIZE: u64 = 32 << 20;

/// What a guest does when it has started. Where the host wants to hear of it, it says what a later
/// systemd than bookworm's would say.
const START: &str = r#"
echo "started $version" | tee -a witness
sync
port=$(tr -c '\040-\176' '\n' < /sys/firmware/dmi/tables/DMI |
    sed -n 's/^io.systemd.credential:vmm.notify_socket=vsock-stream:2://p')
said="STATUS=Version $version is up.\nREADY=1\n"
[ -z "$emergency" ] || said='STATUS=A disk is lost.\nX_SYSTEMD_UNIT_ACTIVE=emergency.target\n'
if [ "$children" = yes ]; then
    grep -E "fuse|virtiofs" /modules/more | sh
    mkdir -p /run/data
    mount -t virtiofs data /run/data
    ifconfig eth0 up
    printf '#!/bin/sh\n[ "$1" != bound ] || echo lease %s >> /run/data/word\n' \
        "$version" > /run/dhcp
    chmod +x /run/dhcp
    udhcpc -i eth0 -n -q -t 10 -s /run/dhcp
fi
[ -z "$port" ] || printf "$said" | ./vsock connect 2 "$port"
"#;

const STOP: &str = "\
    [ ! -e /sys/class/net/eth1 ] || cat /sys/class/net/eth1/address >> witness\n\
    echo stopped >> witness\n";

const TAP_UP: &str = "\
    ip tuntap add vm-net mode tap user vm-net vnet_hdr multi_queue\n\
    ip link set vm-net up\n";

const MACVTAP_ADDRESS: &str = "02:00:00:00:00:07";

/// As the NixOS module has it.
const MACVTAP_UP: &str = "
ip link add link far name vm-mac address 02:00:00:00:00:07 type macvtap mode bridge
ip link set dev vm-mac allmulticast on
ip link set dev vm-mac addrgenmode none
ip link set dev vm-mac up
device=/dev/tap$(cat /sys/class/net/vm-mac/ifindex)
until [ -c $device ]; do sleep 0.1; done
chown vm-net $device
";

/// Opens the device of the macvtap.
const MACVTAP_OPEN: &str = "exec 3<>/dev/tap$(cat /sys/class/net/vm-mac/ifindex)\n";

/// Does the kernel's part of making a device: makes the file in a `/dev` that is not the kernel's.
const DEVICE_FILE: &str = "
until [ -e /sys/class/net/vm-mac/ifindex ]; do sleep 0.1; done
index=$(cat /sys/class/net/vm-mac/ifindex)
numbers=$(cat /sys/class/net/vm-mac/tap$index/dev)
mknod -m 600 /dev/tap$index c ${numbers%:*} ${numbers#*:}
";

fn update(testbed: &Testbed) -> Result<()> {
    let host = SystemdHost::start(testbed)?;
    install(&host, &UNITS)?;
    host.write_program("/opt/bin/nix", NIX)?;
    for version in [1, 2] {
        runner(&host, "a", version, &json!({ "ready": "booted", "vsock": {} }))?;
        runner(&host, "b", version, &with_children(version))?;
        runner(&host, "c", version, &json!({ "vsock": { "socket": "c.gate" } }))?;
    }
    builds(&host, "a", 1)?;
    vm(&host, &["create", "a", "--flake", "/etc/guests"])?;
    vm(&host, &["create", "b", "--runner", "/opt/b-1"])?;
    adopt(&host, "c")?;
    for name in ["a", "b", "c"] {
        add_volume(testbed, &host, name)?;
    }
    host.run(&["install", "-d", "-o", "vm-b", "/var/lib/microvms/b/data"])?;
    host.add_drop_in("nixvmm@b.service", "child-processes.conf")?;

    let done = start_together(&host)
        .and_then(|()| change_one(&host))
        .and_then(|()| crash(&host))
        .and_then(|()| end(&host));
    done.map_err(|error| host.explain(error))
}

/// A machine for which nixvmm starts passt and virtiofsd, which shut themselves in.
fn with_children(version: u32) -> Value {
    json!({
        "ready": "booted",
        "vsock": { "socket": "b.gate" },
        "cmdline": format!("console=hvc0 loglevel=4 version={version} children=yes"),
        "nets": [{ "type": "user" }],
        "shares": [{ "tag": "data", "source": "data", "program": "/srv/virtiofsd/virtiofsd" }],
    })
}

/// A folder that was there before, with sockets of one that is gone. Its guest is one of the host's
/// configuration.
fn adopt(host: &SystemdHost, name: &str) -> Result<()> {
    let folder = format!("/var/lib/microvms/{name}");
    host.run(&["mkdir", &folder])?;
    host.run(&["ln", "-s", &format!("/opt/{name}-1"), &format!("{folder}/current")])?;
    for socket in ["sock", "gate"] {
        UnixListener::bind(host.path(&format!("{folder}/{name}.{socket}")))?;
    }
    host.run(&["systemd-sysusers", "--inline", &format!("u vm-{name} - \"Guest {name}\"")])?;
    let units = host.path("/etc/systemd/system");
    let drop_in = units.join(format!("nixvmm@{name}.service.d"));
    fs::create_dir_all(&drop_in)?;
    fs::write(drop_in.join("configured.conf"), CONFIGURED.replace("NAME", name))?;
    fs::write(units.join(format!("install-microvm-{name}.service")), INSTALL)?;
    host.run(&["systemctl", "daemon-reload"]).map(drop)
}

/// All come up at the same time, each as its own user; one is ready when it runs, the others when
/// their guests say so.
fn start_together(host: &SystemdHost) -> Result<()> {
    host.run(&["systemctl", "enable", "nixvmm@a", "nixvmm@b", "nixvmm@c"])?;
    host.run(&["systemctl", "start", "nixvmm.target"])?;
    let moment = |name: &str, property: &str| -> Result<u64> {
        let unit = format!("nixvmm@{name}");
        let text = host.run(&["systemctl", "show", "--value", "--property", property, &unit])?;
        text.trim().parse().with_context(|| format!("{property} of {name}: {text}"))
    };
    for name in ["a", "b"] {
        let ready = moment(name, "ActiveEnterTimestampMonotonic")?;
        for other in ["a", "b", "c"] {
            let begun = moment(other, "InactiveExitTimestampMonotonic")?;
            ensure!(begun < ready, "{other} was started after {name} was ready");
        }
    }
    for name in ["a", "b", "c"] {
        // Nobody waits for what the last one says.
        let guest = host.wait_for("word of the guest", || {
            let guest = guest(host, name)?;
            Ok((guest["status"] == "Version 1 is up.").then_some(guest))
        })?;
        ensure!(guest["state"] == "running", "{guest}");
        ensure!(guest["booted"] == format!("/opt/{name}-1"), "{guest}");
        let process = guest["processId"].to_string();
        let user = host.run(&["stat", "--format=%U", &format!("/proc/{process}")])?;
        ensure!(user.trim() == format!("vm-{name}"), "{name} runs as {user}");
    }
    vm(host, &["ctl", "b", "state"]).map(drop)
}

/// A guest that runs becomes a snapshot and goes on; stopped, it gets back what it had then, and
/// not what it wrote since.
fn go_back(host: &SystemdHost) -> Result<()> {
    vm(host, &["snapshot", "a", "running"])?;
    let state = vm(host, &["ctl", "a", "state"])?;
    ensure!(state.contains("running"), "{state}");
    vm(host, &["stop", "a"])?;
    ensure!(witness(host, "a")? == "started 1\nstopped\n", "{}", witness(host, "a")?);
    vm(host, &["restore", "a", "running"])?;
    let snapshots: Value = serde_json::from_str(&vm(host, &["snapshots", "a", "--json"])?)?;
    let (taken, kept) = (&snapshots[0], &snapshots[1]);
    ensure!(taken["running"] == true && taken["runner"] == "/opt/a-1", "{taken}");
    ensure!(kept["tag"] == "1" && kept["runner"] == "/opt/a-2", "{kept}");
    vm(host, &["snapshots", "a", "--remove", "1"]).map(drop)
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

    go_back(host)?;
    vm(host, &["start", "a"])?;
    let restarted = guest(host, "a")?;
    ensure!(restarted["booted"] == "/opt/a-2", "{restarted}");
    ensure!(restarted["status"] == "Version 2 is up.", "{restarted}");

    vm(host, &["rollback", "a", "--restart"])?;
    let back = guest(host, "a")?;
    ensure!(back["booted"] == "/opt/a-1" && back["needsRestart"] == false, "{back}");
    ensure!(back["status"] == "Version 1 is up.", "{back}");
    host.run(&["systemctl", "restart", "install-microvm-c"])?;
    ensure!(others == [process(host, "b")?, process(host, "c")?], "another guest was restarted");
    Ok(())
}

/// Who is killed starts again over what it left, with what it ran and not with what is current. So
/// do its children, by which its guest has a network and a share before and after.
fn crash(host: &SystemdHost) -> Result<()> {
    let before = process(host, "b")?;
    let word = host.path("/var/lib/microvms/b/data/word");
    ensure!(fs::read_to_string(&word)? == "lease 1\n", "{}", fs::read_to_string(&word)?);
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
    ensure!(restarted["status"] == "Version 1 is up.", "{restarted}");
    ensure!(fs::read_to_string(&word)? == "lease 1\nlease 1\n", "b has nothing after a crash");
    Ok(())
}

/// A stop lets the guests write what they have; so does a removal, from the configuration of the
/// host or by hand, which leaves that.
fn end(host: &SystemdHost) -> Result<()> {
    let console = host.path("/var/lib/microvms/c/console");
    host.wait_for("word of c", || {
        Ok(fs::read_to_string(&console)?.contains("started 1").then_some(()))
    })?;
    vm(host, &["stop", "b"])?;
    host.run(&["systemctl", "stop", "install-microvm-c"])?;
    host.wait_for("end of a guest that is no longer configured", || {
        Ok(guest(host, "c")?["booted"].is_null().then_some(()))
    })?;
    for name in ["b", "c"] {
        let guest = guest(host, name)?;
        ensure!(guest["state"] == "stopped" && guest["booted"].is_null(), "{guest}");
    }
    ensure!(witness(host, "b")? == "started 1\nstarted 1\nstopped\n", "{}", witness(host, "b")?);
    ensure!(witness(host, "c")? == "started 1\nstopped\n", "{}", witness(host, "c")?);

    vm(host, &["destroy", "a"])?;
    // The snapshot was taken before the first stop.
    let expected = "started 1\nstarted 2\nstopped\nstarted 1\nstopped\n";
    ensure!(witness(host, "a")? == expected, "{}", witness(host, "a")?);
    let unit = host.attempt(&["systemctl", "is-active", "nixvmm@a"])?;
    ensure!(unit.stdout == b"inactive\n", "the unit of a removed guest is {unit:?}");
    let enabled = host.run(&["ls", "/etc/systemd/system/nixvmm.target.wants"])?;
    ensure!(!enabled.contains("nixvmm@a"), "a removed guest starts with the host: {enabled}");
    vm(host, &["destroy", "a", "--remove-state"])?;
    for left in ["a", ".snapshots/a"] {
        let path = host.path("/var/lib/microvms").join(left);
        ensure!(!path.exists(), "{} is still there", path.display());
    }
    Ok(())
}

fn helpers(testbed: &Testbed) -> Result<()> {
    let host = SystemdHost::start(testbed)?;
    install(&host, &UNITS)?;
    install(&host, &["nixvmm-tap@.service", "nixvmm-macvtap@.service"])?;
    let done = failures(&host)
        .and_then(|()| emergency(testbed, &host))
        .and_then(|()| interfaces(testbed, &host));
    done.map_err(|error| host.explain(error))
}

/// What is wrong before a guest runs is in the error of the start, in the log and in the status.
fn failures(host: &SystemdHost) -> Result<()> {
    for (name, more, reason, line) in [
        ("lost", json!({ "kernel": "/srv/lost" }), "its configuration is wrong", "/srv/lost: No"),
        (
            "odd",
            json!({ "kernel": "/srv/initrd", "disks": [] }),
            "did not come up",
            "/srv/initrd: is neither",
        ),
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

/// A guest that does not come up in a way that it can tell.
fn emergency(testbed: &Testbed, host: &SystemdHost) -> Result<()> {
    let more = json!({
        "ready": "booted",
        "vsock": {},
        "cmdline": "console=hvc0 loglevel=4 version=1 emergency=yes",
        // The next attempt may not have a power button yet when it is stopped.
        "shutdown-timeout": 5,
    });
    runner(host, "ill", 1, &more)?;
    vm(host, &["create", "ill", "--runner", "/opt/ill-1"])?;
    add_volume(testbed, host, "ill")?;
    let said = fails_to_start(host, "ill")?;
    ensure!(said.contains("the guest came up in emergency mode: A disk is lost."), "{said}");
    vm(host, &["stop", "ill"]).map(drop)
}

/// The interfaces are there before the guest, are its user's, and go with it.
fn interfaces(testbed: &Testbed, host: &SystemdHost) -> Result<()> {
    let nets = json!([{ "tap": "vm-net" }, { "type": "macvtap", "fd": [3] }]);
    runner(host, "net", 1, &json!({ "ready": "booted", "vsock": {}, "nets": nets }))?;
    let file = host.path("/opt/net-1/bin/microvm-run");
    let run = fs::read_to_string(&file)?.replace("exec ", &format!("{MACVTAP_OPEN}exec "));
    fs::write(file, run)?;
    for (program, text) in [
        ("tap-up", TAP_UP),
        ("tap-down", "ip link delete vm-net\n"),
        ("macvtap-up", MACVTAP_UP),
        ("macvtap-down", "ip link delete vm-mac\n"),
    ] {
        host.write_program(&format!("/opt/net-1/bin/{program}"), text)?;
    }
    vm(host, &["create", "net", "--runner", "/opt/net-1"])?;
    add_volume(testbed, host, "net")?;
    host.run(&["ip", "link", "add", "far", "type", "dummy"])?;
    host.run(&["systemd-run", "--unit=device-files", "sh", "-c", DEVICE_FILE])?;
    vm(host, &["start", "net"])?;

    let link = host.run(&["ip", "-details", "link", "show", "vm-net"])?;
    ensure!(link.contains("user vm-net") && link.contains("LOWER_UP"), "{link}");
    let device = host.run(&["sh", "-c", "stat --format=%U:%a /dev/tap*"])?;
    ensure!(device == "vm-net:600\n", "the macvtap's device is {device}");
    vm(host, &["stop", "net"])?;
    for name in ["vm-net", "vm-mac"] {
        let link = host.attempt(&["ip", "link", "show", name])?;
        ensure!(!link.status.success(), "the interface is still there: {link:?}");
    }
    let witness = witness(host, "net")?;
    ensure!(witness == format!("started 1\n{MACVTAP_ADDRESS}\nstopped\n"), "{witness}");
    Ok(())
}

/// What is said about a start that has to fail.
fn fails_to_start(host: &SystemdHost, name: &str) -> Result<String> {
    let output = host.attempt(&[NIXVMM, "vm", "start", name])?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(!output.status.success(), "{name} was started: {said}");
    Ok(said)
}

/// Installs units as they are, but that guests on emulated processors may take longer.
fn install(host: &SystemdHost, units: &[&str]) -> Result<()> {
    let patient = host.path("/etc/systemd/system/nixvmm@.service.d/emulated.conf");
    fs::create_dir_all(patient.parent().context("a file is in a folder")?)?;
    fs::write(patient, "[Service]\nTimeoutStartSec=10min\nTimeoutStopSec=10min\n")?;
    host.install(units)
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
        "shutdown-timeout": PATIENCE.as_secs(),
        "disks": [{ "path": "state.img", "serial": "state" }],
    });
    let fields = machine.as_object_mut().context("a machine is an object")?;
    fields.extend(more.as_object().cloned().unwrap_or_default());
    fs::write(note.join("machine.json"), machine.to_string())?;
    fs::write(note.join("hypervisor"), "nixvmm\n")?;
    let run = format!(
        "export PATH=/srv/passt:$PATH\n\
         exec {NIXVMM} run --config {folder}/share/microvm/machine.json\n"
    );
    host.write_program(&format!("{folder}/bin/microvm-run"), &run)?;
    let control = format!("{NIXVMM} ctl {name}.sock");
    let shutdown = format!("{control} power-off && {control} events > /dev/null 2>&1\n");
    host.write_program(&format!("{folder}/bin/microvm-shutdown"), &shutdown)
}

/// Gives a guest's folder the volume that its runner expects.
fn add_volume(testbed: &Testbed, host: &SystemdHost, name: &str) -> Result<()> {
    let content = tempfile::tempdir()?;
    fs::write(content.path().join("start"), START)?;
    fs::write(content.path().join("stop"), STOP)?;
    fs::copy(&testbed.stream_end, content.path().join("vsock"))?;
    let volume = volume(host, name);
    File::create(&volume)?.set_len(VOLUME_SIZE)?;
    let options = ["-q", "-F", "-t", "ext4", "-d"].map(Path::new);
    tool::run("mke2fs", options.into_iter().chain([content.path(), &volume])).map(drop)
}

/// What a guest that has ended wrote down, on a file system without a fault.
fn witness(host: &SystemdHost, name: &str) -> Result<String> {
    let volume = volume(host, name);
    tool::run("e2fsck", [Path::new("-f"), Path::new("-n"), &volume])?;
    let words = [Path::new("-R"), Path::new("cat /witness"), &volume];
    Ok(String::from_utf8(tool::run("debugfs", words)?)?)
}

fn volume(host: &SystemdHost, name: &str) -> std::path::PathBuf {
    host.path(&format!("/var/lib/microvms/{name}/state.img"))
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
