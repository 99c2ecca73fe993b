//! Does memory come and go? Free pages that go back to the host by themselves, a size and a balloon
//! that change at run time, and files that guests share as memory.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use tempfile::TempDir;
use tests::events::Events;
use tests::guest::{Guest, Launch, PATIENCE};
use tests::testbed::Testbed;
use tests::tool;

use crate::GuestTest;

pub(crate) const TESTS: &[GuestTest] = &[
    ("memory::page_cache_that_a_guest_drops_goes_back_to_the_host", page_cache_goes_back),
    ("memory::shared_memory_that_a_guest_frees_goes_back_to_the_host", shared_memory_goes_back),
    ("memory::memory_grows_and_shrinks_and_a_balloon_is_inflated_and_emptied", grows_and_shrinks),
    ("memory::guests_share_the_pages_of_a_persistent_memory_file", guests_share_a_file),
    ("memory::a_persistent_memory_file_that_is_cut_ends_the_guest_with_an_error", cut_file),
];

const MEBIBYTE: u64 = 1 << 20;

/// How often the host is asked how much memory a guest has.
const POLL: Duration = Duration::from_millis(500);

/// A gibibyte of page cache, with nobody asking for it.
fn page_cache_goes_back(testbed: &Testbed) -> Result<()> {
    let folder = tempfile::tempdir_in("/dev/shm")?;
    let image = folder.path().join("image");
    File::create(&image)?.set_len(1024 * MEBIBYTE)?;
    let disk = format!("path={},readonly", image.to_str().context("no UTF-8")?);
    let mut guest = Launch::tiny(testbed, &testbed.bzimage)
        .arguments(["--memory", "1536M", "--disk", &disk])
        .boot()?;
    // A disk that nobody has open has no page cache.
    guest.run("sleep 9999 < /dev/vda > /dev/null 2>&1 &")?;
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

/// Memory that other processes map, over virtio-mmio, of which a part came at run time.
fn shared_memory_goes_back(testbed: &Testbed) -> Result<()> {
    let control = Control::new(testbed)?;
    let mut guest = control
        .launch(testbed, "256M,max=512M,shared")
        .arguments(["--transport", "mmio"])
        .boot()?;
    guest.run("sh /modules/more")?;
    control.ask(&["memory", "512M"])?;
    control.wait("memory", |memory| memory["size"] == 512 * MEBIBYTE)?;
    let before = settled(&guest)?;
    guest.run(&format!("mount -t tmpfs -o size=400m memory /mnt && {}", fill(256)))?;
    let full = resident(&guest)?;
    ensure!(full - before > 240 * MEBIBYTE, "{} MiB were written", (full - before) / MEBIBYTE);
    guest.run("rm /mnt/file")?;
    wait_until(&guest, |left| left < full - (full - before) / 100 * 95)?;
    guest.run("dd if=/dev/urandom of=/mnt/a bs=1M count=8 && cp /mnt/a /mnt/b")?;
    control.ask(&["memory", "256M"])?;
    control.wait("memory", |memory| memory["size"] == 256 * MEBIBYTE)?;
    guest.run("cmp /mnt/a /mnt/b")?;
    guest.power_off()
}

fn grows_and_shrinks(testbed: &Testbed) -> Result<()> {
    let control = Control::new(testbed)?;
    let mut guest = control.launch(testbed, "512M,max=2G").boot()?;
    guest.run("sh /modules/more")?;
    let mut events = Events::follow(&control.program, &control.socket())?;
    control.ask(&["memory", "2G"])?;
    let reached = events.wait_for("memory-resized")?;
    ensure!(reached.contains(&(2048 * MEBIBYTE).to_string()), "the event says {reached}");
    control.wait("memory", |memory| memory["size"] == 2048 * MEBIBYTE)?;
    guest.run(HAS_NEARLY_2_GIB)?;
    let before = resident(&guest)?;
    guest.run(&format!("mount -t tmpfs -o size=1700m memory /mnt && {}", fill(1024)))?;
    let full = resident(&guest)?;
    ensure!(full - before > 1000 * MEBIBYTE, "{} MiB were used", (full - before) / MEBIBYTE);
    guest.run("umount /mnt")?;
    control.ask(&["memory", "512M"])?;
    control.wait("memory", |memory| memory["size"] == 512 * MEBIBYTE)?;
    wait_until(&guest, |left| left < 512 * MEBIBYTE)?;

    control.ask(&["balloon", "256M"])?;
    let reached = events.wait_for("balloon-target-reached")?;
    ensure!(reached.contains(&(256 * MEBIBYTE).to_string()), "the event says {reached}");
    let balloon = control.wait("balloon", |balloon| balloon["size"] == 256 * MEBIBYTE)?;
    let number = |name: &str| balloon["statistics"][name].as_u64().unwrap_or_default();
    let (total, free) = (number("total-bytes"), number("free-bytes"));
    ensure!(
        (300 * MEBIBYTE..=512 * MEBIBYTE).contains(&total) && free < 256 * MEBIBYTE,
        "the guest says that {free} of {total} bytes are free"
    );
    // More than the balloon leaves.
    guest.run(&format!("mount -t tmpfs -o size=400m memory /mnt && {}", fill(250)))?;
    let balloon = control.ask(&["balloon"])?;
    let size = balloon["size"].as_u64().unwrap_or_default();
    ensure!(size < 256 * MEBIBYTE, "the guest needed memory and left it in the balloon: {balloon}");
    guest.run("umount /mnt")?;
    control.ask(&["balloon", "0"])?;
    control.wait("balloon", |balloon| balloon["size"] == 0)?;

    for (verb, expected) in
        [(["memory", "3G"], "from"), (["memory", "513M"], "blocks"), (["balloon", "1P"], "balloon")]
    {
        let refusal = control.refusal(&verb)?;
        ensure!(refusal.contains(expected), "{verb:?}: {refusal}");
    }
    control.ask(&["memory", "2G"])?;
    guest.tell("reboot -f")?;
    guest.wait_for_agent().context("after a reboot in place")?;
    let memory = control.ask(&["memory"])?;
    ensure!(memory["size"] == 512 * MEBIBYTE, "a guest that starts again has {memory}");
    guest.run(&format!("sh /modules/more && {HAS_NEARLY_2_GIB}"))?;
    guest.power_off()
}

/// Waits in the guest until its kernel uses what it was given.
const HAS_NEARLY_2_GIB: &str = "until awk '/MemTotal/ { exit $2 < 1850 * 1024 }' /proc/meminfo; \
                                do sleep 0.1; done";

/// A command that fills as many mebibytes of the file system at /mnt.
fn fill(mebibytes: u64) -> String {
    format!("dd if=/dev/zero of=/mnt/file bs=1M count={mebibytes}")
}

/// A control socket in a folder of its own, and the program that is its client.
struct Control {
    folder: TempDir,
    program: PathBuf,
}

impl Control {
    fn new(testbed: &Testbed) -> Result<Self> {
        Ok(Self { folder: tempfile::tempdir()?, program: testbed.program.clone() })
    }

    /// The tiny guest with this socket.
    fn launch(&self, testbed: &Testbed, memory: &str) -> Launch {
        let launch = Launch::tiny(testbed, &testbed.bzimage).arguments(["--memory", memory]);
        launch.arguments(["--control"]).arguments([self.socket()])
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("control")
    }

    /// Does it and returns the reply, or null where there is none.
    fn ask(&self, verb: &[&str]) -> Result<Value> {
        let output = self.attempt(verb)?;
        let errors = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "ctl {verb:?}: {}, {errors}", output.status);
        match output.stdout.as_slice() {
            [] => Ok(Value::Null),
            text => Ok(serde_json::from_slice(text)?),
        }
    }

    /// Does it and returns why it is refused.
    fn refusal(&self, verb: &[&str]) -> Result<String> {
        let output = self.attempt(verb)?;
        ensure!(output.status.code() == Some(1), "ctl {verb:?}: {}", output.status);
        Ok(String::from_utf8(output.stderr)?)
    }

    fn attempt(&self, verb: &[&str]) -> Result<Output> {
        let mut command = Command::new(&self.program);
        command.arg("ctl").arg(self.socket()).args(verb).arg("--json").stdin(Stdio::null());
        command.output().context("nixvmm ctl cannot be started")
    }

    /// Asks until the reply is as it shall be.
    fn wait(&self, verb: &str, is_enough: impl Fn(&Value) -> bool) -> Result<Value> {
        let start = Instant::now();
        loop {
            let reply = self.ask(&[verb])?;
            if is_enough(&reply) {
                return Ok(reply);
            }
            ensure!(start.elapsed() < PATIENCE, "ctl {verb} still says {reply}");
            thread::sleep(POLL);
        }
    }
}

/// A store image with DAX in two guests, and a file that one of them writes.
fn guests_share_a_file(testbed: &Testbed) -> Result<()> {
    let folder = tempfile::tempdir_in("/dev/shm")?;
    let (tree, store) = (folder.path().join("tree"), folder.path().join("store"));
    fs::create_dir(&tree)?;
    fs::write(tree.join("file"), noise(24 * MEBIBYTE))?;
    tool::run("mkfs.erofs", [&store, &tree])?;
    let content = fs::read(&store)?;
    let written = folder.path().join("written");
    File::create(&written)?.set_len(4 * MEBIBYTE)?;
    let (store, written) = (text(&store)?, text(&written)?);

    let shared = format!("file={store},readonly");
    let launch = || Launch::tiny(testbed, &testbed.bzimage).arguments(["--pmem", &shared]);
    let mut first = launch().arguments(["--pmem", written]).boot()?;
    let mut second = launch().arguments(["--transport", "mmio"]).boot()?;
    for guest in [&mut first, &mut second] {
        guest.run("sh /modules/more && mount -t erofs -o ro,dax /dev/pmem0 /mnt")?;
        guest.run("grep /mnt /proc/mounts | grep dax=always")?;
        let sum = "cat /mnt/file | sha256sum && umount /mnt";
        let found = guest.run(sum)?;
        let expected = String::from_utf8(tool::run("sha256sum", [&tree.join("file")])?)?;
        ensure!(found.split(' ').next() == expected.split(' ').next(), "{found}, not {expected}");
    }
    let (whole, own) = resident_of(&first, store)?;
    ensure!(whole > 24 * MEBIBYTE, "only {whole} bytes of the store are mapped");
    ensure!(own < whole / 100 * 60, "{own} of {whole} bytes of the store are counted twice");

    // Nobody but root writes to a device, and not even root changes what is read-only.
    second.attempt("dd if=/dev/zero of=/dev/pmem0 bs=4096 count=1 conv=fsync")?;
    second.run("true").context("after a write to read-only memory")?;
    ensure!(fs::read(store)? == content, "a read-only file was written");

    first.run("yes nixvmm | dd of=/dev/pmem1 bs=4096 count=256 iflag=fullblock conv=fsync")?;
    let expected: Vec<u8> = "nixvmm\n".bytes().cycle().take(1 << 20).collect();
    ensure!(fs::read(written)?.starts_with(&expected), "the file lacks what the guest wrote");
    first.tell("reboot -f")?;
    first.wait_for_agent().context("after a reboot in place")?;
    first.run("sh /modules/more && head -c 7 /dev/pmem1 | grep nixvmm")?;
    first.power_off()?;
    second.power_off()
}

fn cut_file(testbed: &Testbed) -> Result<()> {
    let folder = tempfile::tempdir_in("/dev/shm")?;
    let path = folder.path().join("file");
    fs::write(&path, noise(4 * MEBIBYTE))?;
    let pmem = format!("file={},readonly", text(&path)?);
    let mut guest = Launch::tiny(testbed, &testbed.bzimage).arguments(["--pmem", &pmem]).boot()?;
    guest.run("sh /modules/more && dd if=/dev/pmem0 of=/dev/null bs=1M count=1")?;
    File::options().write(true).open(&path)?.set_len(4096)?;
    guest.tell("dd if=/dev/pmem0 of=/dev/null bs=1M")?;
    guest.expect_status(1)?;
    guest.errors().wait_for_end(PATIENCE)?;
    let said = guest.errors().text();
    ensure!(said.contains("virtual processor 0"), "nixvmm does not say what happened:\n{said}");
    Ok(())
}

/// Bytes that no compression and no merging of pages shortens.
fn noise(len: u64) -> Vec<u8> {
    let mut state = 1u64;
    let next = |_| {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        state.to_be_bytes()
    };
    (0..len / 8).flat_map(next).collect()
}

/// Bytes that `nixvmm` maps of `file`, and its proportional share of them.
fn resident_of(guest: &Guest, file: &str) -> Result<(u64, u64)> {
    let maps = fs::read_to_string(format!("/proc/{}/smaps", guest.process_id()))?;
    let (mut whole, mut own, mut is_file) = (0, 0, false);
    for line in maps.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words.as_slice() {
            [_, _, _, _, _, path] => is_file = *path == file,
            [_, _, _, _, _] => is_file = false,
            ["Rss:", size, "kB"] if is_file => whole += size.parse::<u64>()? * 1024,
            ["Pss:", size, "kB"] if is_file => own += size.parse::<u64>()? * 1024,
            _ => {}
        }
    }
    Ok((whole, own))
}

fn text(path: &Path) -> Result<&str> {
    path.to_str().context("a path that is no UTF-8")
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
