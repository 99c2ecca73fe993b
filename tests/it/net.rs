//! Do frames arrive? Cards on taps and macvtaps of the host, with every number of queues, and what
//! happens to a guest whose link goes away.

use std::fs;
use std::io::{Read, Write};
use std::net::{IpAddr, TcpListener};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::thread::{self, JoinHandle};

use anyhow::{Context, Result, anyhow, ensure};
use tests::guest::{Guest, Launch};
use tests::testbed::Testbed;
use tests::tool;

use crate::GuestTest;

pub(crate) const TESTS: &[GuestTest] = &[
    ("net::a_tap_of_four_queues_carries_everything_and_may_go_away", four_queues),
    ("net::eight_inherited_queues_serve_two_processors_over_mmio", eight_queues),
    ("net::a_macvtap_and_a_tap_of_one_queue_serve_three_processors", macvtap_and_one_queue),
    ("net::what_cannot_be_a_card_is_refused", refusals),
];

/// What the data of all connections consists of, in the guest and here.
const PATTERN: &str = "yes nixvmm";
const LINE: &[u8] = b"nixvmm\n";

const MEBIBYTE: usize = 1 << 20;

fn four_queues(testbed: &Testbed) -> Result<()> {
    let tap = Interface::add(&["tuntap", "add", "nvt4", "mode", "tap", "multi_queue"], "nvt4", 90)?;
    tap.set(&["mtu", "9000"])?;
    let folder = tempfile::tempdir()?;
    let control = folder.path().join("control").display().to_string();
    let mut guest = Launch::tiny(testbed, &testbed.bzimage)
        .arguments(["--cpus", "4", "--net", "tap=nvt4,vhost=off", "--control", &control])
        .boot()?;
    set_up(&mut guest, "eth0", 90)?;
    let facts = "cat /sys/class/net/eth0/mtu; ls -d /sys/class/net/eth0/queues/*x-* | wc -l; \
                 cut -c 2 /sys/class/net/eth0/address";
    let facts = guest.run(facts)?;
    let facts: Vec<&str> = facts.split_whitespace().collect();
    ensure!(facts.first() == Some(&"9000"), "the guest knows no jumbo frames: {facts:?}");
    ensure!(facts.get(1) == Some(&"8"), "the guest has not four queue pairs: {facts:?}");
    let is_local = facts.get(2).is_some_and(|digit| "26ae".contains(digit));
    ensure!(is_local, "the address is not locally administered: {facts:?}");
    carries_everything(&mut guest, 90, 8 * MEBIBYTE)?;
    guest.run("ping -c 1 -s 8900 10.90.0.1")?;

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

    guest.tell("reboot -f")?;
    guest.wait_for_agent().context("after a reboot in place")?;
    set_up(&mut guest, "eth0", 90)?;
    guest.run("ping -c 1 10.90.0.1")?;

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
    let mut guest = Launch::tiny(&testbed, &testbed.bzimage)
        .arguments(["--cpus", "2", "--transport", "mmio", "--sandbox", "on"])
        .arguments(["--net", "fd=20:21:22:23:24:25:26:27,vhost=off,mac=52:54:00:12:34:56"])
        .boot()?;
    set_up(&mut guest, "eth0", 91)?;
    let facts = "cat /sys/class/net/eth0/address; ls -d /sys/class/net/eth0/queues/rx-* | wc -l";
    let facts = guest.run(facts)?;
    let facts: Vec<&str> = facts.split_whitespace().collect();
    // Linux uses as many of the eight as it has processors.
    ensure!(facts == ["52:54:00:12:34:56", "2"], "the address and the queues: {facts:?}");
    carries_everything(&mut guest, 91, 2 * MEBIBYTE)?;
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
    let mut guest = Launch::tiny(&testbed, &testbed.bzimage)
        .arguments(["--cpus", "3", "--net", "type=macvtap,fd=3:4,vhost=off"])
        .arguments(["--net", "tap=nvt1,mtu=1400,vhost=off"])
        .boot()?;
    let address = guest.run("cat /sys/class/net/eth0/address")?;
    let expected = fs::read_to_string("/sys/class/net/nvfar/address")?;
    ensure!(address == expected, "the guest has {address}, the macvtap {expected}");
    set_up(&mut guest, "eth0", 93)?;
    carries_everything(&mut guest, 93, 2 * MEBIBYTE)?;

    let mtus =
        [fs::read_to_string("/sys/class/net/nvt1/mtu")?, guest.run("cat /sys/class/net/eth1/mtu")?];
    ensure!(mtus.iter().all(|mtu| mtu.trim() == "1400"), "MTUs outside and inside: {mtus:?}");
    let queues = guest.run("ls -d /sys/class/net/eth1/queues/rx-* | wc -l")?;
    ensure!(queues.trim() == "1", "a tap of one queue has {queues} in the guest");
    set_up(&mut guest, "eth1", 92)?;
    carries_everything(&mut guest, 92, 2 * MEBIBYTE)?;
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

/// Pings and connections of IPv4 and IPv6, both ways and several at once, with every byte checked.
fn carries_everything(guest: &mut Guest, network: u8, bytes: usize) -> Result<()> {
    let (four, six) = (format!("10.{network}.0.1"), format!("fd{network}::1"));
    guest.run(&format!("ping -c 2 {four} && ping -c 2 {six}"))?;
    for (address, bytes) in [(&four, bytes), (&six, bytes / 4)] {
        sends(guest, address, bytes).with_context(|| format!("from the guest to {address}"))?;
        receives(guest, address, bytes).with_context(|| format!("from {address} to the guest"))?;
    }
    Ok(())
}

fn sends(guest: &mut Guest, address: &str, bytes: usize) -> Result<()> {
    let parts = 4;
    let (port, received) = serve(address, parts, move |stream| {
        let mut data = Vec::new();
        stream.read_to_end(&mut data)?;
        let expected = LINE.iter().cycle().take(bytes / parts);
        ensure!(data.iter().eq(expected), "{} bytes came, not all as they were sent", data.len());
        Ok(())
    })?;
    let part = format!("{PATTERN} | head -c {} | nc {address} {port}", bytes / parts);
    guest.run(&format!("for i in 1 2 3 4; do ({part}) & done; wait"))?;
    received.join().map_err(|_| anyhow!("the receiver panicked"))?
}

fn receives(guest: &mut Guest, address: &str, bytes: usize) -> Result<()> {
    let (port, sent) = serve(address, 1, move |stream| {
        let data: Vec<u8> = LINE.iter().copied().cycle().take(bytes).collect();
        Ok(stream.write_all(&data)?)
    })?;
    let sums = guest.run(&format!(
        "nc {address} {port} < /dev/null | sha256sum; {PATTERN} | head -c {bytes} | sha256sum"
    ))?;
    sent.join().map_err(|_| anyhow!("the sender panicked"))??;
    let sums: Vec<&str> = sums.lines().collect();
    ensure!(sums.len() == 2 && sums.first() == sums.get(1), "sums of what came: {sums:?}");
    Ok(())
}

/// Serves so many connections, each on its own thread; returns the port.
fn serve(
    address: &str,
    connections: usize,
    serve_one: impl Fn(&mut std::net::TcpStream) -> Result<()> + Send + Sync + Clone + 'static,
) -> Result<(u16, JoinHandle<Result<()>>)> {
    let address: IpAddr = address.parse()?;
    let listener = TcpListener::bind((address, 0)).context("the host's address is not there")?;
    let port = listener.local_addr()?.port();
    let thread = thread::spawn(move || {
        let mut threads = Vec::new();
        for _ in 0..connections {
            let (mut stream, _) = listener.accept()?;
            let serve_one = serve_one.clone();
            threads.push(thread::spawn(move || serve_one(&mut stream)));
        }
        threads.into_iter().try_for_each(|thread| {
            thread.join().map_err(|_| anyhow!("a connection's thread panicked"))?
        })
    });
    Ok((port, thread))
}

/// Gives a card of the guest its addresses in network `number`.
fn set_up(guest: &mut Guest, card: &str, number: u8) -> Result<()> {
    guest
        .run(&format!(
            "echo 0 > /proc/sys/net/ipv6/conf/{card}/accept_dad; ip addr add 10.{number}.0.2/24 \
             dev {card}; ip addr add fd{number}::2/64 dev {card}; ip link set {card} up; \
             until grep -q 1 /sys/class/net/{card}/carrier; do sleep 0.1; done"
        ))
        .map(drop)
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

/// An interface of the host, which goes when it is dropped.
struct Interface(&'static str);

impl Interface {
    /// Makes an interface with `arguments` of ip(8) and gives it addresses in network `number`.
    fn add(arguments: &[&str], name: &'static str, number: u8) -> Result<Self> {
        // A test that was ended may have left it.
        let _ = ip(&["link", "delete", name]);
        ip(arguments)?;
        let interface = Self(name);
        interface.set(&["up"])?;
        interface.address(number)?;
        Ok(interface)
    }

    fn address(&self, number: u8) -> Result<()> {
        for address in [format!("10.{number}.0.1/24"), format!("fd{number}::1/64")] {
            ip(&["addr", "replace", &address, "dev", self.0, "nodad"])
                .or_else(|_| ip(&["addr", "replace", &address, "dev", self.0]))?;
        }
        Ok(())
    }

    fn set(&self, arguments: &[&str]) -> Result<()> {
        ip(&[&["link", "set", self.0][..], arguments].concat())
    }
}

impl Drop for Interface {
    fn drop(&mut self) {
        let _ = ip(&["link", "delete", self.0]);
    }
}

fn ip(arguments: &[&str]) -> Result<()> {
    tool::run("ip", arguments.iter().map(Path::new)).map(drop)
}
