//! What boots? Every kernel format over every transport, and machines of every size.

use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, ensure};
use tests::emulated_host;
use tests::guest::{Guest, Launch};
use tests::testbed::Testbed;

use crate::GuestTest;

pub(crate) const TESTS: &[GuestTest] = &[
    ("boot::bzimage_over_pci", |testbed| boots(testbed, &testbed.bzimage, "pci", "linux")),
    ("boot::bzimage_over_mmio", |testbed| boots(testbed, &testbed.bzimage, "mmio", "linux")),
    ("boot::elf_over_pci", |testbed| boots(testbed, &testbed.vmlinux, "pci", "linux")),
    ("boot::elf_over_mmio", |testbed| boots(testbed, &testbed.vmlinux, "mmio", "linux")),
    ("boot::pvh_over_pci", |testbed| boots(testbed, &testbed.vmlinux, "pci", "pvh")),
    ("boot::pvh_over_mmio", |testbed| boots(testbed, &testbed.vmlinux, "mmio", "pvh")),
    ("boot::the_kernel_neither_complains_nor_waits_for_what_is_not_there", complaints),
];

/// What a kernel says when it looked for hardware in vain, or found tables or a processor faulty.
const COMPLAINTS: [&str; 15] = [
    "i8042: Probing ports directly",
    "i8042: No controller found",
    "i8042: Can't read CTR",
    "rtc_cmos: probe",
    "unable to read current time",
    "broken or not accessible",
    "floppy",
    "Unable to calibrate",
    "Fast TSC calibration failed",
    "ACPI Error",
    "ACPI BIOS Error",
    "ACPI BIOS Warning",
    "nobody cared",
    "Call Trace",
    "[Firmware Bug]",
];

/// The longest pause between two lines of the kernel's log, in seconds, before something was waited
/// for. In an emulated host the work between two lines takes seconds as well, and nothing follows.
const PAUSE_MAX: f64 = 0.2;

fn boots(testbed: &Testbed, kernel: &Path, transport: &str, protocol: &str) -> Result<()> {
    let options = ["--transport", transport, "--boot-protocol", protocol];
    let mut guest = Launch::tiny(testbed, kernel).arguments(options).boot()?;
    let drivers = guest.run("ls /sys/bus/virtio/drivers/virtio_console")?;
    ensure!(drivers.contains("virtio0"), "the console is no virtio device:\n{drivers}");
    guest.power_off()
}

fn complaints(testbed: &Testbed) -> Result<()> {
    let mut guest = Launch::tiny(testbed, &testbed.bzimage).arguments(["--cpus", "2"]).boot()?;
    let log = guest.run("dmesg")?;
    knows_the_time(&mut guest)?;
    guest.power_off()?;

    let found: Vec<&str> = log
        .lines()
        .filter(|line| COMPLAINTS.iter().any(|complaint| line.contains(complaint)))
        .collect();
    ensure!(found.is_empty(), "the kernel complains:\n{}", found.join("\n"));

    let stamps: Vec<(f64, &str)> = log.lines().filter_map(stamped).collect();
    ensure!(stamps.len() > 100, "the kernel's log has {} lines", stamps.len());
    for pair in stamps.windows(2) {
        let [(before, first), (after, second)] = pair else { continue };
        let waited = after - before > PAUSE_MAX && !emulated_host::is_inside();
        ensure!(!waited, "the kernel waited between these:\n{first}\n{second}");
    }
    Ok(())
}

/// How far a guest's clock may be from its host's: one that nobody sets is years behind, and an
/// emulated one goes wrong by seconds.
const CLOCKS_APART: u64 = 60;

/// The time of day is the host's, without any clock of the board.
fn knows_the_time(guest: &mut Guest) -> Result<()> {
    let before = unix_time()?;
    let said = guest.run("date +%s; ls /sys/class/rtc")?;
    let after = unix_time()?;
    let (time, clocks) = said.split_once('\n').context("no time")?;
    let time: u64 = time.parse().context("no time")?;
    let expected = before.saturating_sub(CLOCKS_APART)..=after + CLOCKS_APART;
    ensure!(expected.contains(&time), "the guest says {time}, and the host {before} to {after}");
    ensure!(clocks.is_empty(), "there is a clock of the board: {clocks}");
    Ok(())
}

fn unix_time() -> Result<u64> {
    Ok(SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs())
}

/// A line of the kernel's log and its time in seconds.
fn stamped(line: &str) -> Option<(f64, &str)> {
    let (stamp, _) = line.strip_prefix('[')?.split_once(']')?;
    Some((stamp.trim().parse().ok()?, line))
}
