//! Do disks keep what they are given? Store images, volumes that outlive their guest, every engine,
//! and as many disks as a guest may want.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use tempfile::TempDir;
use tests::guest::{Guest, Launch};
use tests::testbed::Testbed;
use tests::tool;

use crate::GuestTest;

pub(crate) const TESTS: &[GuestTest] = &[
    ("disk::root_is_the_first_disk_and_readonly_in_both_formats", root_is_first),
    ("disk::a_volume_survives_a_reboot_and_a_killed_vmm", volume_survives),
    ("disk::thirty_disks_are_all_there_over_pci", |testbed| thirty_disks(testbed, "pci")),
    ("disk::thirty_disks_are_all_there_over_mmio", |testbed| thirty_disks(testbed, "mmio")),
    ("disk::every_engine_writes_what_the_guest_wrote", engines_agree),
    ("disk::an_image_that_grows_is_a_disk_that_grows", grows),
    ("disk::what_cannot_be_a_disk_is_refused", refusals),
];

const MEBIBYTE: u64 = 1 << 20;

fn root_is_first(testbed: &Testbed) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let tree = folder.path().join("tree");
    fs::create_dir(&tree)?;
    fs::write(tree.join("file"), "from the host".repeat(1000))?;
    let (erofs, squashfs) = (folder.path().join("erofs"), folder.path().join("squashfs"));
    tool::run("mkfs.erofs", [&erofs, &tree])?;
    tool::run("mksquashfs", [&tree, &squashfs])?;

    let mut guest = Launch::tiny(testbed, &testbed.bzimage)
        .arguments(["--root", text(&erofs)?])
        .arguments(["--disk", &format!("path={},readonly,serial=second", text(&squashfs)?)])
        .boot()?;
    let facts = guest
        .run("cd /sys/block; for d in vda vdb; do echo $(cat $d/serial) $(cat $d/ro); done")?;
    let facts: Vec<&str> = facts.split_whitespace().collect();
    ensure!(facts == ["root", "1", "second", "1"], "serials and read-only flags: {facts:?}");
    for (format, disk) in [("erofs", "vda"), ("squashfs", "vdb")] {
        guest.run(&format!("mount -t {format} -o ro /dev/{disk} /mnt"))?;
        let length = guest.run("wc -c < /mnt/file")?;
        ensure!(length.trim() == "13000", "the file on {format} has {length} bytes");
        guest.run("umount /mnt")?;
    }
    let (status, said) = guest.attempt("dd if=/dev/zero of=/dev/vda bs=512 count=1")?;
    ensure!(status != 0, "a read-only disk was written:\n{said}");
    guest.power_off()
}

fn volume_survives(testbed: &Testbed) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let volume = sparse(&folder, "volume", 64 * MEBIBYTE)?;
    tool::run("mke2fs", ["-q", "-F", "-t", "ext4", text(&volume)?])?;
    let disk = format!("path={},serial=data", text(&volume)?);
    let launch = || Launch::tiny(testbed, &testbed.bzimage).arguments(["--disk", &disk]);

    let mut guest = launch().boot()?;
    guest.run("mount -t ext4 /dev/vda /mnt && echo first > /mnt/first && umount /mnt")?;
    guest.tell("reboot -f")?;
    guest.wait_for_agent().context("after a reboot in place")?;
    guest.run("mount -t ext4 /dev/vda /mnt && grep first /mnt/first")?;
    guest.run("yes second | head -c 5000000 > /mnt/second && sync /mnt/second && sync")?;
    guest.signal(rustix::process::Signal::KILL)?;
    let end = guest.end()?;
    ensure!(end.code().is_none(), "a killed nixvmm ended with {end}");

    let mut guest = launch().boot().context("after the kill")?;
    let sum = "mount -t ext4 /dev/vda /mnt && cat /mnt/first && sha256sum < /mnt/second";
    let found = guest.run(sum)?;
    let expected = guest.run("yes second | head -c 5000000 | sha256sum")?;
    ensure!(found == format!("first\n{expected}"), "after the kill the volume has:\n{found}");
    guest.run("umount /mnt")?;
    guest.power_off()?;
    tool::run("e2fsck", ["-f", "-n", text(&volume)?]).map(drop)
}

fn thirty_disks(testbed: &Testbed, transport: &str) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let mut launch = Launch::tiny(testbed, &testbed.bzimage).arguments(["--transport", transport]);
    for number in 0..30 {
        let path = sparse(&folder, &format!("disk{number}"), MEBIBYTE)?;
        fs::write(&path, format!("content-{number:<502}"))?;
        File::options().write(true).open(&path)?.set_len(MEBIBYTE)?;
        launch = launch.arguments(["--disk", &format!("path={},serial=s{number}", text(&path)?)]);
    }
    let mut guest = launch.boot()?;
    let listed = guest.run(
        "for d in /sys/block/vd*; do echo $(cat $d/serial) $(cat $d/size) \
         $(head -c 20 /dev/${d##*/}); done | sort -u",
    )?;
    ensure!(listed.lines().count() == 30, "the guest has these disks:\n{listed}");
    for number in 0..30 {
        let line = format!("s{number} 2048 content-{number}");
        ensure!(listed.lines().any(|found| found == line), "{line} is not among:\n{listed}");
    }
    guest.power_off()
}

/// Bytes that each engine writes in one go: no whole number of pages.
const WRITTEN: usize = 900_000;

fn engines_agree(testbed: &Testbed) -> Result<()> {
    const OPTIONS: [&str; 4] = ["engine=sync", "engine=uring", "engine=sync,direct", "direct"];
    // O_DIRECT needs a file system on a disk, which a tmpfs is not.
    let folder = TempDir::new_in(testbed.vmlinux.parent().context("no folder")?)?;
    let mut launch =
        Launch::tiny(testbed, &testbed.bzimage).arguments(["--cpus", "2", "--memory", "256M"]);
    for (number, options) in OPTIONS.iter().enumerate() {
        let path = sparse(&folder, &number.to_string(), 16 * MEBIBYTE)?;
        launch = launch.arguments(["--disk", &format!("path={},{options}", text(&path)?)]);
    }
    let mut guest = launch.boot()?;
    for (disk, options) in ["vda", "vdb", "vdc", "vdd"].iter().zip(OPTIONS) {
        write_and_check(&mut guest, disk).with_context(|| options.to_owned())?;
    }
    guest.power_off()?;
    for (number, options) in OPTIONS.iter().enumerate() {
        let content = fs::read(folder.path().join(number.to_string()))?;
        let expected = "nixvmm\n".bytes().cycle().take(WRITTEN);
        let written = content.iter().skip(4096).take(WRITTEN).copied();
        ensure!(written.eq(expected), "{options}: the file is not what the guest wrote");
        let discarded = content.iter().skip(8 * 1024 * 1024).take(4096);
        ensure!(discarded.eq([0; 4096].iter()), "{options}: discarded blocks are not zero");
    }
    Ok(())
}

/// Writes with the guest's cache, reads without, and discards what it wrote elsewhere.
fn write_and_check(guest: &mut Guest, disk: &str) -> Result<()> {
    let pattern = &format!("yes nixvmm | head -c {WRITTEN}");
    guest.run(&format!("{pattern} | dd of=/dev/{disk} bs=4096 seek=1 conv=fsync"))?;
    guest.run(&format!("{pattern} | dd of=/dev/{disk} bs=1M seek=8 conv=fsync"))?;
    guest.run("echo 3 > /proc/sys/vm/drop_caches")?;
    let read = format!("dd if=/dev/{disk} bs=4096 skip=1 | head -c {WRITTEN} | sha256sum");
    let found = guest.run(&format!("{read} 2> /dev/null"))?;
    let expected = guest.run(&format!("{pattern} | sha256sum"))?;
    ensure!(found.contains(expected.trim()), "read back: {found}, expected: {expected}");
    guest.run(&format!("blkdiscard -o 8388608 -l 1048576 /dev/{disk}")).map(drop)
}

fn grows(testbed: &Testbed) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let image = sparse(&folder, "image", MEBIBYTE)?;
    let disk = format!("path={}", text(&image)?);
    let mut guest = Launch::tiny(testbed, &testbed.bzimage).arguments(["--disk", &disk]).boot()?;
    let file = File::options().write(true).open(&image)?;
    file.set_len(3 * MEBIBYTE)?;
    guest.signal(rustix::process::Signal::USR1)?;
    // The driver is interrupted; how soon it has read the capacity is its own affair.
    guest.run("until grep -qx 6144 /sys/block/vda/size; do sleep 0.1; done")?;
    guest.run("echo tail | dd of=/dev/vda bs=512 seek=6143 conv=sync,fsync")?;
    guest.power_off()?;
    let content = fs::read(&image)?;
    let tail = content.get(6143 * 512..).unwrap_or_default();
    ensure!(tail.starts_with(b"tail"), "the last sector is not what the guest wrote");
    Ok(())
}

fn refusals(testbed: &Testbed) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let odd = sparse(&folder, "odd", MEBIBYTE + 1)?;
    refused(testbed, &format!("path={}", text(&odd)?), 2, &["--disk", "odd", "truncate"])?;
    let missing = folder.path().join("missing");
    refused(testbed, &format!("path={}", text(&missing)?), 2, &["--disk", "missing"])?;

    let locked = sparse(&folder, "locked", MEBIBYTE)?;
    let disk = format!("path={}", text(&locked)?);
    let guest = Launch::tiny(testbed, &testbed.bzimage).arguments(["--disk", &disk]).boot()?;
    refused(testbed, &disk, 1, &["locked", "in use"])?;
    guest.power_off()
}

/// Expects that `nixvmm` ends with `status` and an error that has all `words` when given `disk`.
fn refused(testbed: &Testbed, disk: &str, status: i32, words: &[&str]) -> Result<()> {
    let mut guest = Launch::tiny(testbed, &testbed.bzimage).arguments(["--disk", disk]).start()?;
    guest.expect_status(status).with_context(|| format!("--disk {disk} was not refused"))?;
    guest.errors().wait_for_end(tests::guest::PATIENCE)?;
    let said = guest.errors().text();
    ensure!(words.iter().all(|word| said.contains(word)), "the refusal lacks {words:?}:\n{said}");
    Ok(())
}

fn sparse(folder: &TempDir, name: &str, length: u64) -> Result<PathBuf> {
    let path = folder.path().join(name);
    File::create(&path)?.set_len(length)?;
    Ok(path)
}

fn text(path: &Path) -> Result<&str> {
    path.to_str().context("a path that is no UTF-8")
}
