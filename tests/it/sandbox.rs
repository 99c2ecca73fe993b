//! Is the running VMM confined? What the kernel says about each of its threads while a guest runs.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use tests::guest::{Guest, Launch, PATIENCE};
use tests::testbed::Testbed;

use crate::GuestTest;

pub(crate) const TESTS: &[GuestTest] = &[
    ("sandbox::every_thread_is_filtered_and_without_capabilities", confined),
    ("sandbox::without_it_nixvmm_says_so", off),
    ("sandbox::a_user_without_any_privilege_runs_a_guest", nobody),
];

/// A user whom nothing belongs to.
const NOBODY: u32 = 65534;

fn confined(testbed: &Testbed) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let disk = folder.path().join("disk");
    fs::write(&disk, vec![0; 1 << 20])?;
    let mut guest = Launch::tiny(testbed, &testbed.bzimage)
        .arguments(["--cpus", "2", "--disk", &format!("path={}", disk.display())])
        .boot()?;
    guest.run("dd if=/dev/vda of=/dev/null bs=64k")?;
    let threads = threads(&guest)?;
    ensure!(threads.len() >= 3, "nixvmm has {} threads", threads.len());
    for status in threads {
        let name = field(&status, "Name")?;
        ensure!(field(&status, "Seccomp")? == "2", "thread {name} has no seccomp filter");
        ensure!(field(&status, "NoNewPrivs")? == "1", "thread {name} may gain privileges");
        for set in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
            let capabilities = u64::from_str_radix(field(&status, set)?, 16)?;
            ensure!(capabilities == 0, "thread {name} has {set} {capabilities:x}");
        }
    }
    guest.power_off()
}

fn off(testbed: &Testbed) -> Result<()> {
    let mut guest =
        Launch::tiny(testbed, &testbed.bzimage).arguments(["--sandbox", "off"]).boot()?;
    for status in threads(&guest)? {
        ensure!(field(&status, "Seccomp")? == "0", "a filter in spite of --sandbox off");
    }
    guest.errors().wait_for("sandbox", PATIENCE).map_err(|error| guest.explain(error))?;
    guest.power_off()
}

/// Somebody else than root needs the right to open KVM, and nothing more.
fn nobody(testbed: &Testbed) -> Result<()> {
    let folder = tempfile::tempdir_in("/tmp")?;
    let share = |path: &Path| -> Result<PathBuf> {
        let copy = folder.path().join(path.file_name().context("a file has a name")?);
        fs::copy(path, &copy)?;
        fs::set_permissions(&copy, Permissions::from_mode(0o755))?;
        Ok(copy)
    };
    fs::set_permissions(folder.path(), Permissions::from_mode(0o755))?;
    let copies = Testbed {
        program: share(&testbed.program)?,
        bzimage: share(&testbed.bzimage)?,
        tiny: share(&testbed.tiny)?,
        ..testbed.clone()
    };
    let kvm = Path::new("/dev/kvm");
    let mode = fs::metadata(kvm)?.permissions();
    fs::set_permissions(kvm, Permissions::from_mode(0o666)).context("only root changes it")?;
    let booted = Launch::tiny(&copies, &copies.bzimage).user(NOBODY).boot();
    fs::set_permissions(kvm, mode)?;
    let guest = booted?;
    for status in threads(&guest)? {
        ensure!(field(&status, "Uid")?.starts_with(&NOBODY.to_string()), "another user");
        ensure!(field(&status, "Seccomp")? == "2", "a thread without a filter");
    }
    guest.power_off()
}

/// What `/proc` says about each thread of `nixvmm`.
fn threads(guest: &Guest) -> Result<Vec<String>> {
    let tasks = fs::read_dir(format!("/proc/{}/task", guest.process_id()))?;
    tasks.map(|task| Ok(fs::read_to_string(task?.path().join("status"))?)).collect()
}

fn field<'a>(status: &'a str, name: &str) -> Result<&'a str> {
    let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    line.map(str::trim).with_context(|| format!("/proc has no {name}"))
}
