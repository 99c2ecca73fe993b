//! Does memory come and go? The balloon, free pages that go back to the host by themselves.

use std::fs::{self, File};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use tests::guest::{Guest, Launch, PATIENCE};
use tests::testbed::Testbed;

use crate::GuestTest;

pub(crate) const TESTS: &[GuestTest] = &[
    ("memory::page_cache_that_a_guest_drops_goes_back_to_the_host", page_cache_goes_back),
    ("memory::shared_memory_that_a_guest_frees_goes_back_to_the_host", shared_memory_goes_back),
];

const MEBIBYTE: u64 = 1 << 20;

/// How often the host is asked how much memory a guest has.
const POLL: Duration = Duration::from_millis(100);

/// A gibibyte of page cache, with nobody asking for it.
fn page_cache_goes_back(testbed: &Testbed) -> Result<()> {
    let folder = tempfile::tempdir_in("/dev/shm")?;
    let image = folder.path().join("image");
    File::create(&image)?.set_len(1024 * MEBIBYTE)?;
    let disk = format!("path={},readonly", image.to_str().context("no UTF-8")?);
    let mut guest = Launch::tiny(testbed, &testbed.bzimage)
        .arguments(["--memory", "1536M", "--disk", &disk])
        .boot()?;
    let before = settled(&guest)?;
    guest.run("dd if=/dev/vda of=/dev/null bs=1M")?;
    let full = resident(&guest)?;
    ensure!(full - before > 1000 * MEBIBYTE, "{} MiB of page cache", (full - before) / MEBIBYTE);
    let dropped = Instant::now();
    guest.run("echo 3 > /proc/sys/vm/drop_caches")?;
    let left = wait_until(&guest, |left| left < full - (full - before) / 100 * 95)?;
    eprintln!(
        "{} of {} MiB came back in {:.1} s of the host's clock",
        (full - left) / MEBIBYTE,
        (full - before) / MEBIBYTE,
        dropped.elapsed().as_secs_f64(),
    );
    guest.power_off()
}

/// Memory that other processes map, over virtio-mmio.
fn shared_memory_goes_back(testbed: &Testbed) -> Result<()> {
    let mut guest = Launch::tiny(testbed, &testbed.bzimage)
        .arguments(["--memory", "384M,shared", "--transport", "mmio"])
        .boot()?;
    let before = settled(&guest)?;
    guest.run(
        "mount -t tmpfs -o size=200m memory /mnt && dd if=/dev/zero of=/mnt/file bs=1M count=192",
    )?;
    let full = resident(&guest)?;
    ensure!(full - before > 180 * MEBIBYTE, "{} MiB were written", (full - before) / MEBIBYTE);
    guest.run("rm /mnt/file")?;
    wait_until(&guest, |left| left < full - (full - before) / 100 * 95)?;
    guest.run(
        "dd if=/dev/urandom of=/mnt/a bs=1M count=8 && cp /mnt/a /mnt/b && cmp /mnt/a /mnt/b",
    )?;
    guest.power_off()
}

/// Bytes of memory that the host has for `nixvmm` and its guest.
fn resident(guest: &Guest) -> Result<u64> {
    let path = format!("/proc/{}/status", guest.process_id());
    let status = fs::read_to_string(Path::new(&path))?;
    let mut bytes = 0;
    for line in status.lines() {
        if let Some(("RssAnon" | "RssShmem", value)) = line.split_once(':') {
            let number = value.trim().trim_end_matches(" kB");
            bytes += number.parse::<u64>().context("resident memory")? * 1024;
        }
    }
    Ok(bytes)
}

/// The same when the guest has reported what it no longer needed to start.
fn settled(guest: &Guest) -> Result<u64> {
    let mut last = resident(guest)?;
    loop {
        thread::sleep(POLL * 30);
        let now = resident(guest)?;
        if now.abs_diff(last) < MEBIBYTE {
            return Ok(now);
        }
        last = now;
    }
}

/// Waits until the host has `enough` memory back.
fn wait_until(guest: &Guest, enough: impl Fn(u64) -> bool) -> Result<u64> {
    let start = Instant::now();
    loop {
        let now = resident(guest)?;
        if enough(now) {
            return Ok(now);
        }
        ensure!(start.elapsed() < PATIENCE, "the guest still has {} MiB", now / MEBIBYTE);
        thread::sleep(POLL);
    }
}
