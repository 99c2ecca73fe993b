//! Does a NixOS guest run? systemd comes up from a store, be it an image or a share, without a
//! failed unit, asks for a login on the console, and goes down cleanly when it is told to. What it
//! writes to the store goes to an overlay.

use std::fs::{self, File};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use tests::guest::{Guest, LONG_PATIENCE, Launch};
use tests::testbed::Testbed;
use tests::tool;

use crate::GuestTest;

pub(crate) const TESTS: &[GuestTest] = &[
    ("nixos::systemd_runs_from_erofs_builds_on_an_overlay_and_stops_cleanly", erofs),
    ("nixos::a_user_logs_in_on_the_console_of_a_squashfs_guest_and_powers_off", squashfs),
    ("nixos::systemd_runs_from_a_closure_that_the_store_server_shows", store_server),
    ("nixos::systemd_runs_from_a_store_that_virtiofsd_shares", virtiofsd),
];

const VOLUME_SIZE: u64 = 32 << 20;

/// What root is asked and answers.
const PASSWORD: &str = "root\n";

/// Files in each folder of what a guest builds.
const SOURCES: usize = 60;

fn erofs(testbed: &Testbed) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let (data, upper) = (make_volume(folder.path(), "data")?, make_volume(folder.path(), "rw")?);
    let mut guest = Launch::nixos(testbed, &testbed.nixos.erofs)
        .command_line("agent=hvc0 store-overlay=rw")
        .arguments(["--disk", &format!("path={data},serial=data"), "--cpus", "2"])
        .arguments(["--disk", &format!("path={upper},serial=rw")])
        .boot()?;
    check_system(&mut guest)?;
    check_store(&mut guest, &["/nix/.ro-store erofs ro", "/nix/store overlay rw"])?;
    let system = builds_on_the_store(&mut guest)?;
    guest.signal(Signal::TERM)?;
    guest.expect_status(0)?;

    let read = |volume: &str, file: &str| -> Result<String> {
        let content = tool::run("debugfs", ["-R", &format!("cat {file}"), volume])?;
        Ok(String::from_utf8(content)?)
    };
    let witness = read(&data, "/witness")?;
    ensure!(witness == "started\nstopped\n", "the unit's ExecStop did not write: {witness:?}");
    tool::run("e2fsck", ["-f", "-n", &data])?;
    // The system runs from this one to its end, so that what is left is a journal to replay.
    let mut replay = tool::command("e2fsck");
    let status = replay.args(["-p", &upper]).output()?.status.code();
    ensure!(matches!(status, Some(0 | 1)), "e2fsck finds more than a journal: {status:?}");
    let changed = read(&upper, &format!("/store/{system}/system"))?;
    ensure!(changed == "x86_64-linux\nchanged\n", "the volume has {changed:?}");
    let built = read(&upper, "/store/build/moved/1")?;
    ensure!(built == "b 1\n", "the volume has {built:?}");
    Ok(())
}

/// The guest is shown all paths of the store but one that is beside them.
fn store_server(testbed: &Testbed) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let store = &testbed.nixos.store;
    let names =
        fs::read_dir(store)?.map(|entry| entry?.file_name().into_string().ok().context("name"));
    let mut names: Vec<String> = names.collect::<Result<_>>()?;
    names.retain(|name| !name.ends_with("-initrd"));
    names.sort();
    let line = |name: &String| format!("{}\n", store.join(name).display());
    let list = folder.path().join("store-paths");
    fs::write(&list, names.iter().map(line).collect::<String>())?;
    let share = format!("closure={},store={}", list.display(), store.display());
    let mut guest = Launch::nixos_with_share(testbed)
        .command_line("agent=hvc0 store=store store-overlay=tmpfs")
        .arguments(["--store-share", &share])
        .boot()?;
    check_system(&mut guest)?;
    check_store(&mut guest, &["/nix/.ro-store virtiofs ro", "/nix/store overlay rw"])?;
    let seen = guest.run("ls /nix/.ro-store")?;
    ensure!(seen.lines().eq(&names), "the guest sees {seen}");
    let system = builds_on_the_store(&mut guest)?;
    ensure!(
        fs::read_to_string(store.join(system).join("system"))? == "x86_64-linux",
        "a guest's overlay changed what is below it"
    );
    guest.signal(Signal::TERM)?;
    guest.expect_status(0)
}

fn virtiofsd(testbed: &Testbed) -> Result<()> {
    let store = testbed.nixos.store.display();
    let mut guest = Launch::nixos_with_share(testbed)
        .command_line("agent=hvc0 store=ro-store")
        .arguments(["--share", &format!("ro-store,source={store},cache=always,sandbox=chroot")])
        .boot()?;
    check_system(&mut guest)?;
    check_store(&mut guest, &["/nix/store virtiofs ro"])?;
    let (status, said) = guest.attempt("touch /nix/store/new")?;
    ensure!(status != 0 && said.contains("Read-only"), "{status}, {said}");
    guest.signal(Signal::TERM)?;
    guest.expect_status(0)
}

/// An empty ext4 volume.
fn make_volume(folder: &Path, name: &str) -> Result<String> {
    let volume = folder.join(name);
    let volume = volume.to_str().context("a path that is no UTF-8")?;
    File::create(volume)?.set_len(VOLUME_SIZE)?;
    tool::run("mke2fs", ["-q", "-F", "-t", "ext4", volume])?;
    Ok(volume.to_owned())
}

/// Everything started, nothing failed, and the root is laid out as in NixOS.
fn check_system(guest: &mut Guest) -> Result<()> {
    let (_, state) = guest.attempt("systemctl is-system-running --wait")?;
    let failed = guest.run("systemctl --failed --no-legend")?;
    ensure!(state.trim() == "running" && failed.is_empty(), "{state}, failed units:\n{failed}");
    guest.run("systemctl is-active multi-user.target systemd-networkd systemd-logind witness")?;
    let root = guest.run("awk '$2 == \"/\" { print $3 }' /proc/mounts | tail -1")?;
    ensure!(root.trim() == "tmpfs", "/ is {root:?}");
    let system = guest.run("readlink /run/current-system")?;
    ensure!(system.starts_with("/nix/store/"), "the system is {system:?}");
    Ok(())
}

/// What is mounted where the store is, below an overlay and above it.
fn check_store(guest: &mut Guest, expected: &[&str]) -> Result<()> {
    let mounts = "awk '$2 ~ /^\\/nix\\// { print $2, $3, $4 }' /proc/mounts";
    let mounts = guest.run(mounts)?;
    let stores = mounts.lines().filter(|line| !line.starts_with("/nix/.rw-store "));
    let is_expected = |(line, expected): (&str, &&str)| line.starts_with(*expected);
    ensure!(stores.clone().count() == expected.len(), "mounted:\n{mounts}");
    ensure!(stores.zip(expected).all(is_expected), "mounted:\n{mounts}");
    Ok(())
}

/// Writes to the store as a build does: many small files, copies, links, renames, and changes of
/// what is below; then all of it is read from where it lies. Returns the name of the system, whose
/// file `system` is changed.
fn builds_on_the_store(guest: &mut Guest) -> Result<String> {
    guest.run(&format!(
        "set -e; cd /nix/store; mkdir build; cd build; mkdir a b c; for folder in a b c; do i=0; \
         while [ $i -lt {SOURCES} ]; do echo $folder $i > $folder/$i; i=$((i + 1)); done; done; \
         cp -r a copied; cp -al b linked; mv b moved; mv a/0 c/a; rm -r c/1 a/1; ln -s moved link; \
         cd $(readlink /run/current-system); echo >> system; echo changed >> system; \
         mv kernel-params renamed; rm initrd; mkdir initrd; sync; echo 3 > /proc/sys/vm/drop_caches"
    ))?;
    let seen = guest.run("cd /nix/store/build; cat a/* copied/* link/* c/*")?;
    let expected = [("a", 2), ("a", 0), ("b", 0), ("c", 0)].map(|(letter, first)| {
        let numbers = (first..SOURCES).filter(|number| (letter, *number) != ("c", 1));
        let mut names: Vec<String> = numbers.map(|number| number.to_string()).collect();
        names.sort();
        names.into_iter().map(|name| format!("{letter} {name}\n")).collect::<String>()
    });
    ensure!(seen == expected.concat() + "a 0\n", "what was built is wrong:\n{seen}");
    let rest = guest.run(
        "cd /nix/store/build; stat -c %h moved/5 linked/5; cat c/a; cd /run/current-system; \
         cat system; stat -c %F initrd; ls renamed kernel-params 2> /dev/null || :; \
         basename $(readlink /run/current-system)",
    )?;
    let (rest, system) = rest.trim_end().rsplit_once('\n').context("fewer lines")?;
    let expected = "2\n2\na 0\nx86_64-linux\nchanged\ndirectory\nrenamed";
    ensure!(rest == expected, "after the build there is:\n{rest}");
    Ok(system.to_owned())
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
