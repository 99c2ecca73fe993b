//! How large may a machine be? Processors and memory of every size that behaves differently.

use std::fs;

use anyhow::{Context, Result, ensure};
use tests::guest::{Guest, Launch, PATIENCE};
use tests::testbed::Testbed;

use crate::GuestTest;

pub(crate) const TESTS: &[GuestTest] = &[
    ("machine::one_processor_and_128_mib", |testbed| has(testbed, 1, "128M", 128)),
    ("machine::two_processors_and_exactly_2_gib", |testbed| has(testbed, 2, "2G", 2048)),
    ("machine::four_processors_and_3_gib_and_1_mib", |testbed| has(testbed, 4, "3073M", 3073)),
    ("machine::one_processor_and_5_gib", |testbed| has(testbed, 1, "5G", 5120)),
    ("machine::sixty_four_processors_and_1_gib", |testbed| has(testbed, 64, "1G", 1024)),
    ("machine::huge_pages_that_are_shared_and_taken_first", huge_pages),
];

/// How many huge pages of 2 MiB the host sets aside.
const HUGE_PAGES: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";

/// What a kernel keeps for itself before it counts, in MiB: its image, page structures, initramfs.
const RESERVED_MAX: u64 = 190;

fn has(testbed: &Testbed, processors: u32, memory: &str, mebibytes: u64) -> Result<()> {
    let count = processors.to_string();
    let mut guest = Launch::tiny(testbed, &testbed.bzimage)
        .arguments(["--cpus", count.as_str(), "--memory", memory])
        .boot()?;
    check_processors(&mut guest, processors)?;
    check_memory(&mut guest, mebibytes)?;
    guest.power_off()
}

/// The host sets huge pages aside, and the guest has them all before it starts.
fn huge_pages(testbed: &Testbed) -> Result<()> {
    let before = fs::read_to_string(HUGE_PAGES)?;
    let set = |count: &str| {
        fs::write(HUGE_PAGES, count).with_context(|| format!("{HUGE_PAGES}: only root sets it"))
    };
    set("160")?;
    let outcome = taken_first(testbed);
    set(before.trim())?;
    outcome
}

fn taken_first(testbed: &Testbed) -> Result<()> {
    for kind in ["hugepages=2M", "hugepages=2M,shared"] {
        let too_much = format!("512M,{kind}");
        // The static program cannot take a backtrace, and says what is wrong nevertheless.
        let mut guest = Launch::tiny(testbed, &testbed.bzimage)
            .arguments(["--memory", &too_much])
            .environment("RUST_BACKTRACE", "1")
            .start()?;
        guest.expect_status(1).with_context(|| format!("--memory {too_much} was not refused"))?;
        guest.errors().wait_for_end(PATIENCE)?;
        let said = guest.errors().text();
        ensure!(said.contains("nr_hugepages"), "the refusal of {too_much} lacks a remedy:\n{said}");
    }
    let mut guest = Launch::tiny(testbed, &testbed.bzimage)
        .arguments(["--memory", "256M,hugepages=2M,shared,prealloc"])
        .boot()?;
    let free = meminfo("HugePages_Free:")?;
    ensure!(free <= 160 - 128, "the guest's 128 huge pages are not taken: {free} are free");
    guest.tell("reboot -f")?;
    guest.wait_for_agent().context("after a reboot in place")?;
    guest.power_off()
}

fn meminfo(name: &str) -> Result<u64> {
    let text = fs::read_to_string("/proc/meminfo")?;
    let line = text.lines().find_map(|line| line.strip_prefix(name)).context("no such line")?;
    Ok(line.trim().parse()?)
}

/// All processors are online, and Linux thinks that they are cores of one socket.
fn check_processors(guest: &mut Guest, processors: u32) -> Result<()> {
    let online = guest.run("nproc")?;
    ensure!(online.trim() == processors.to_string(), "{processors} processors, online: {online}");
    let topology = "cat /sys/devices/system/cpu/cpu*/topology/physical_package_id | sort -u";
    let sockets = guest.run(topology)?;
    ensure!(sockets.lines().count() == 1, "{processors} processors in sockets {sockets:?}");
    let cores = guest.run("cat /sys/devices/system/cpu/cpu*/topology/core_id | sort -u")?;
    ensure!(cores.lines().count() == processors as usize, "cores: {cores:?}");
    let busy =
        "for p in $(seq 0 $(($(nproc) - 1))); do taskset -c $p sha256sum /init || exit 1; done";
    let sums = guest.run(busy)?;
    ensure!(sums.lines().count() == processors as usize, "not every processor works:\n{sums}");
    Ok(())
}

/// The memory is there, and what lies above 4 GiB can be written and read back.
fn check_memory(guest: &mut Guest, mebibytes: u64) -> Result<()> {
    let total = guest.run("awk '/MemTotal/ { print $2 }' /proc/meminfo")?;
    let total = total.trim().parse::<u64>().context("MemTotal")? / 1024;
    let expected = mebibytes.saturating_sub(RESERVED_MAX)..=mebibytes;
    ensure!(expected.contains(&total), "{total} MiB of {mebibytes} are usable");

    let tail = "dmesg | grep -c 'BIOS-e820: .*usable'";
    let ranges = guest.run(tail)?.trim().parse::<u32>()?;
    ensure!(ranges >= 2, "the memory map has {ranges} usable ranges");
    let pattern = "mount -t tmpfs -o size=32m memory /mnt && yes nixvmm | head -c 16000000 > \
                   /mnt/a && cp /mnt/a /mnt/b && cmp /mnt/a /mnt/b";
    guest.run(pattern).map(drop)
}
