//! Does a NixOS guest run? systemd comes up from a store image without a failed unit, asks for a
//! login on the console, and goes down cleanly when it is told to.

use std::fs::File;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use tests::guest::{Guest, LONG_PATIENCE, Launch};
use tests::testbed::Testbed;
use tests::tool;

use crate::GuestTest;

pub(crate) const TESTS: &[GuestTest] = &[
    ("nixos::systemd_runs_from_erofs_and_stops_cleanly_at_the_power_button", erofs),
    ("nixos::a_user_logs_in_on_the_console_of_a_squashfs_guest_and_powers_off", squashfs),
];

const VOLUME_SIZE: u64 = 32 << 20;

/// What root is asked and answers.
const PASSWORD: &str = "root\n";

fn erofs(testbed: &Testbed) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let volume = folder.path().join("volume");
    let volume = volume.to_str().context("a path that is no UTF-8")?;
    File::create(volume)?.set_len(VOLUME_SIZE)?;
    tool::run("mke2fs", ["-q", "-F", "-t", "ext4", volume])?;

    let mut guest = Launch::nixos(testbed, &testbed.nixos.erofs)
        .command_line("agent=hvc0")
        .arguments(["--disk", &format!("path={volume},serial=data"), "--cpus", "2"])
        .boot()?;
    check_system(&mut guest)?;
    guest.signal(Signal::TERM)?;
    guest.expect_status(0)?;
    let witness = tool::run("debugfs", ["-R", "cat /witness", volume])?;
    let witness = String::from_utf8(witness)?;
    ensure!(witness == "started\nstopped\n", "the unit's ExecStop did not write: {witness:?}");
    tool::run("e2fsck", ["-f", "-n", volume]).map(drop)
}

/// Everything started, nothing failed, and the root is laid out as in NixOS.
fn check_system(guest: &mut Guest) -> Result<()> {
    let (_, state) = guest.attempt("systemctl is-system-running --wait")?;
    let failed = guest.run("systemctl --failed --no-legend")?;
    ensure!(state.trim() == "running" && failed.is_empty(), "{state}, failed units:\n{failed}");
    guest.run("systemctl is-active multi-user.target systemd-networkd systemd-logind witness")?;
    let store = guest.run("awk '$2 == \"/nix/store\" { print $1, $3, $4 }' /proc/mounts")?;
    ensure!(store.starts_with("/dev/vda erofs ro"), "/nix/store is {store:?}");
    let root = guest.run("awk '$2 == \"/\" { print $3 }' /proc/mounts | tail -1")?;
    ensure!(root.trim() == "tmpfs", "/ is {root:?}");
    let system = guest.run("readlink /run/current-system")?;
    ensure!(system.starts_with("/nix/store/"), "the system is {system:?}");
    Ok(())
}

fn squashfs(testbed: &Testbed) -> Result<()> {
    let mut guest = Launch::nixos(testbed, &testbed.nixos.squashfs).start()?;
    guest.wait_for("nixvmm-guest login: ")?;
    guest.console().write("root\n")?;
    guest.wait_for("Password: ")?;
    guest.console().write(PASSWORD)?;
    guest.wait_for("# ")?;
    guest.console().write("cat /proc/mounts; echo up=$((40 + 2))\n")?;
    let mounts = guest.wait_for("up=42")?;
    ensure!(mounts.contains("/dev/vda /nix/store squashfs ro"), "mounted:\n{mounts}");
    guest.console().write("poweroff\n")?;
    guest.expect_status(0)?;
    let rest = guest.console().wait_for_end(LONG_PATIENCE.min(Duration::from_secs(20)))?;
    let rest = String::from_utf8_lossy(&rest).into_owned();
    ensure!(rest.contains("System Power Off"), "systemd did not power off itself:\n{rest}");
    Ok(())
}
