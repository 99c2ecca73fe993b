//! Do frames arrive? Cards on taps and macvtaps of the host, with every number of queues, and what
//! happens to a guest whose link goes away.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use tests::guest::{Guest, Launch};
use tests::testbed::Testbed;
use tests::tool;
use tests::wire::Wire;

use crate::GuestTest;
use crate::bulk::{self, MEBIBYTE, carries_everything};
use crate::interface::{Interface, set_up};

pub(crate) const TESTS: &[GuestTest] = &[
    ("net::a_tap_of_four_queues_carries_everything_and_may_go_away", four_queues),
    ("net::eight_inherited_queues_serve_two_processors_over_mmio", eight_queues),
    ("net::a_macvtap_and_a_tap_of_one_queue_serve_three_processors", macvtap_and_one_queue),
    ("net::what_cannot_be_a_card_is_refused", refusals),
];

fn four_queues(testbed: &Testbed) -> Result<()> {
    let tap = Interface::add(&["tuntap", "add", "nvt4", "mode", "tap", "multi_queue"], "nvt4", 90)?;
    tap.set(&["mtu", "9000"])?;
    let folder = tempfile::tempdir()?;
    let control = folder.path().join("control").display().to_string();
    let mut guest = bulk::launch(testbed)
        .arguments(["--cpus", "4", "--net", "tap=nvt4,vhost=off", "--control", &control])
        .boot()?;
    bulk::install(&mut guest)?;
    set_up(&mut guest, "eth0", 90)?;
    let facts = "cat /sys/class/net/eth0/mtu; ls -d /sys/class/net/eth0/queues/*x-* | wc -l; \
                 cut -c 2 /sys/class/net/eth0/address";
    let facts = guest.run(facts)?;
    let facts: Vec<&str> = facts.split_whitespace().collect();
    ensure!(facts.first() == Some(&"9000"), "the guest knows no jumbo frames: {facts:?}");
    ensure!(facts.get(1) == Some(&"8"), "the guest has not four queue pairs: {facts:?}");
    let is_local = facts.get(2).is_some_and(|digit| "26ae".contains(digit));
    ensure!(is_local, "the address is not locally administered: {facts:?}");
    carries_everything(&mut guest, 90, bulk::amount())?;
    guest.run("ping -c 1 -s 8900 10.90.0.1")?;
    leaves_the_host(&mut guest, testbed, &control)?;

    refused(testbed, "tap=nvt4", &["--net tap=nvt4", "in use"])?;

    let link = |words: &[&str]| {
        tool::finish(Command::new(&testbed.program).args(["ctl", &control, "link"]).args(words))
            .map(|output| String::from_utf8_lossy(&output).into_owned())
    };
    link(&["net0", "off"])?;
    guest.run("until grep -q 0 /sys/class/net/eth0/carrier; do sleep 0.1; done")?;
    let listed = link(&[])?;
    ensure!(listed.contains("net0  out   down"), "the pulled plug is not listed: {listed}");
    ensure!(link(&["net1", "on"]).is_err(), "there is no second card");
    link(&["net0", "on"])?;
    guest.run("until grep -q 1 /sys/class/net/eth0/carrier; do sleep 0.1; done")?;
    guest.run("ping -c 1 10.90.0.1")?;

    tap.set(&["down"])?;
    guest.run("until grep -q 0 /sys/class/net/eth0/carrier; do sleep 0.1; done")?;
    tap.set(&["up"])?;
    tap.address(90)?;
    guest.run("until grep -q 1 /sys/class/net/eth0/carrier; do sleep 0.1; done")?;
    guest.run("ping -c 1 10.90.0.1 && ping -c 1 fd90::1")?;

    drop(tap);
    guest.run("until grep -q 0 /sys/class/net/eth0/carrier; do sleep 0.1; done")?;
    guest.run("ping -c 1 -W 1 10.90.0.1 && exit 1; exit 0")?;
    guest.errors().wait_for("vanished", tests::guest::PATIENCE)?;
    guest.power_off()
}

fn eight_queues(testbed: &Testbed) -> Result<()> {
    let _tap =
        Interface::add(&["tuntap", "add", "nvt8", "mode", "tap", "multi_queue"], "nvt8", 91)?;
    // TUNSETIFF with IFF_TAP, IFF_NO_PI, IFF_VNET_HDR and IFF_MULTI_QUEUE.
    let opener = r#"#!/usr/bin/perl
        use POSIX;
        for my $descriptor (20 .. 27) {
            open(my $file, "+<", "/dev/net/tun") or die "tun: $!";
            my $request = pack("a16 s x22", "nvt8", 0x5102);
            ioctl($file, 0x400454ca, $request) or die "TUNSETIFF: $!";
            POSIX::dup2(fileno($file), $descriptor) or die "dup2: $!";
        }
        exec("PROGRAM", @ARGV) or die "exec: $!";"#;
    let (_folder, testbed) = started_by(testbed, opener)?;
    let mut guest = bulk::launch(&testbed)
        .arguments(["--cpus", "2", "--transport", "mmio", "--sandbox", "on"])
        .arguments(["--net", "fd=20:21:22:23:24:25:26:27,vhost=off,mac=52:54:00:12:34:56"])
        .boot()?;
    bulk::install(&mut guest)?;
    set_up(&mut guest, "eth0", 91)?;
    let facts = "cat /sys/class/net/eth0/address; ls -d /sys/class/net/eth0/queues/rx-* | wc -l";
    let facts = guest.run(facts)?;
    let facts: Vec<&str> = facts.split_whitespace().collect();
    // Linux uses as many of the eight as it has processors.
    ensure!(facts == ["52:54:00:12:34:56", "2"], "the address and the queues: {facts:?}");
    carries_everything(&mut guest, 91, MEBIBYTE)?;
    guest.tell("reboot -f")?;
    guest.wait_for_agent().context("after a reboot in place")?;
    set_up(&mut guest, "eth0", 91)?;
    guest.run("ping -c 1 10.91.0.1 && ping -c 1 fd91::1")?;
    guest.power_off()
}

fn macvtap_and_one_queue(testbed: &Testbed) -> Result<()> {
    let tap = Interface::add(&["tuntap", "add", "nvt1", "mode", "tap"], "nvt1", 92)?;
    let _parent = Interface::add(&["link", "add", "nvdummy", "type", "dummy"], "nvdummy", 95)?;
    let link = ["link", "add", "link", "nvdummy", "name"];
    let kind = |name, kind| [&link[..], &[name, "type", kind, "mode", "bridge"]].concat();
    let _near = Interface::add(&kind("nvnear", "macvlan"), "nvnear", 93)?;
    let _far = Interface::add(&kind("nvfar", "macvtap"), "nvfar", 94)?;
    let index = fs::read_to_string("/sys/class/net/nvfar/ifindex")?;
    let opener =
        format!("#!/bin/sh\nexec 3<>/dev/tap{0} 4<>/dev/tap{0}\nexec PROGRAM \"$@\"", index.trim());
    let (_folder, testbed) = started_by(testbed, &opener)?;
    let mut guest = bulk::launch(&testbed)
        .arguments(["--cpus", "3", "--net", "type=macvtap,fd=3:4,vhost=off"])
        .arguments(["--net", "tap=nvt1,mtu=1400,vhost=off"])
        .boot()?;
    bulk::install(&mut guest)?;
    let address = guest.run("cat /sys/class/net/eth0/address")?;
    let expected = fs::read_to_string("/sys/class/net/nvfar/address")?;
    ensure!(address == expected, "the guest has {address}, the macvtap {expected}");
    set_up(&mut guest, "eth0", 93)?;
    carries_everything(&mut guest, 93, bulk::wanted().unwrap_or(MEBIBYTE))?;

    let mtus =
        [fs::read_to_string("/sys/class/net/nvt1/mtu")?, guest.run("cat /sys/class/net/eth1/mtu")?];
    ensure!(mtus.iter().all(|mtu| mtu.trim() == "1400"), "MTUs outside and inside: {mtus:?}");
    let queues = guest.run("ls -d /sys/class/net/eth1/queues/rx-* | wc -l")?;
    ensure!(queues.trim() == "1", "a tap of one queue has {queues} in the guest");
    set_up(&mut guest, "eth1", 92)?;
    carries_everything(&mut guest, 92, MEBIBYTE)?;
    drop(tap);
    guest.power_off()
}

fn refusals(testbed: &Testbed) -> Result<()> {
    let _tap = Interface::add(&["tuntap", "add", "nvtr", "mode", "tap"], "nvtr", 96)?;
    refused(testbed, "tap=no-such", &["--net tap=no-such", "there is no interface", "ip tuntap"])?;
    refused(testbed, "tap=lo", &["--net tap=lo", "no tap"])?;
    refused(testbed, "tap=nvtr,queues=2", &["nvtr has one queue", "multi_queue"])?;
    refused(testbed, "fd=77", &["descriptor 77 is not open"])
}

/// What leaves the host for a network that has no offloads leaves it whole, though the guest lets
/// others cut its frames and complete their checksums; and what comes from there arrives.
fn leaves_the_host(guest: &mut Guest, testbed: &Testbed, control: &str) -> Result<()> {
    let _forwarding = FORWARDING.map(Setting::turn_on);
    let (wire, listener) = Wire::lay("nvwire", 98)?;
    guest.run("ip route add default via 10.90.0.1; ip -6 route add default via fd90::1")?;
    let sent = || -> Result<[u64; 2]> {
        let mut command = Command::new(&testbed.program);
        let said = tool::finish(command.args(["ctl", control, "stats", "--json"]))?;
        let stats: Value = serde_json::from_slice(&said)?;
        let devices = stats["devices"].as_array().context("no devices")?;
        let card = devices.iter().find(|device| device["name"] == "net0").context("no card")?;
        let count = |name: &str| card["counters"][name].as_u64().context("no such counter");
        Ok([count("sent_frames")?, count("sent_bytes")?])
    };
    let places = ["10.98.0.2", "fd98::2"];
    let [frames, bytes] = sent()?;
    for address in places {
        bulk::sends(guest, address, &listener, MEBIBYTE)?;
    }
    let after = sent()?;
    let (frames, bytes) = (after[0] - frames, after[1] - bytes);
    let segments = wire.frames()?;
    // With the few that only acknowledge, the guest's frames are longer than the wire takes.
    let is_cut = bytes > FRAME_BYTES * frames && segments > bytes / FRAME_BYTES;
    ensure!(is_cut, "{bytes} bytes in {frames} frames were {segments} on the wire");
    for address in places {
        bulk::receives(guest, address, &listener, MEBIBYTE)?;
    }
    wire.frames()?;
    guest.run("ip route del default; ip -6 route del default").map(drop)
}

/// The longest frame of an interface with the usual MTU.
const FRAME_BYTES: u64 = 1514;

/// What makes the host a router.
const FORWARDING: [&str; 2] =
    ["/proc/sys/net/ipv4/ip_forward", "/proc/sys/net/ipv6/conf/all/forwarding"];

/// A setting of the host's kernel, which is as it was when this is dropped.
struct Setting {
    path: &'static str,
    before: Option<String>,
}

impl Setting {
    fn turn_on(path: &'static str) -> Self {
        let before = fs::read_to_string(path).ok();
        // Who may not set it finds it set, or gets nothing through.
        let _ = fs::write(path, "1");
        Self { path, before }
    }
}

impl Drop for Setting {
    fn drop(&mut self) {
        if let Some(before) = &self.before {
            let _ = fs::write(self.path, before);
        }
    }
}

/// Expects an error that has all `words` when `nixvmm` is given a card.
fn refused(testbed: &Testbed, net: &str, words: &[&str]) -> Result<()> {
    let mut guest = Launch::tiny(testbed, &testbed.bzimage).arguments(["--net", net]).start()?;
    guest.expect_status(1).with_context(|| format!("--net {net} was not refused"))?;
    guest.errors().wait_for_end(tests::guest::PATIENCE)?;
    let said = guest.errors().text();
    ensure!(words.iter().all(|word| said.contains(word)), "the refusal lacks {words:?}:\n{said}");
    Ok(())
}

/// A testbed whose `nixvmm` is started by `script`, which has its path for the word `PROGRAM`.
fn started_by(testbed: &Testbed, script: &str) -> Result<(tempfile::TempDir, Testbed)> {
    let folder = tempfile::tempdir()?;
    let program = folder.path().join("opener");
    fs::write(&program, script.replace("PROGRAM", &testbed.program.to_string_lossy()))?;
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755))?;
    Ok((folder, Testbed { program, ..testbed.clone() }))
}
