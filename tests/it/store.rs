//! Does a guest see the closure that it was given, all of it, and nothing else?

use std::fs::{self, File, Permissions};
use std::io::{Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use tests::events::Events;
use tests::guest::{Guest, Launch};
use tests::testbed::Testbed;
use tests::tool;

use crate::GuestTest;
use crate::share::{LISTING, kill_children, listing_of};

pub(crate) const TESTS: &[GuestTest] =
    &[("store::a_guest_sees_its_closure_as_the_host_does_and_nothing_else", closure_only)];

/// Files in one folder: more than a few replies of names hold.
const MANY: usize = 2000;

fn closure_only(testbed: &Testbed) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let store = folder.path().join("store");
    let paths = ["0a-program", "0b-many", "0c-file"];
    make_store(&store)?;
    let list = folder.path().join("store-paths");
    let lines = paths.map(|path| format!("{}\n", store.join(path).display())).concat();
    fs::write(&list, lines)?;
    let share = format!("closure={},store={}", list.display(), store.display());
    let control = folder.path().join("control");
    let mut guest = Launch::tiny(testbed, &testbed.bzimage)
        .arguments(["--store-share", &share, "--control", &control.display().to_string()])
        .boot()?;
    guest.run("sh /modules/more 2> /dev/null; mount -t virtiofs -o ro store /mnt")?;

    let names = guest.run("ls -a /mnt")?;
    let expected = [".", "..", "0a-program", "0b-many", "0c-file"];
    ensure!(names.lines().eq(expected), "the guest sees {names}");
    for path in ["0a-program", "0b-many"] {
        let (ours, theirs) = (listing_of(&store.join(path))?, listing_in(&mut guest, path)?);
        if let Some((ours, theirs)) = ours.lines().zip(theirs.lines()).find(|(a, b)| a != b) {
            anyhow::bail!("the host has\n{ours}\nand the guest sees\n{theirs}");
        }
        ensure!(ours == theirs, "{path} differs in length");
    }
    asks_only_once(&mut guest, &store)?;
    reaches_nothing_else(&mut guest)?;
    is_shown_more(&mut guest, testbed, &store, &control)?;
    changes_nothing(&mut guest)?;

    // The guest has dropped everything when it mounted anew.
    let expected = listing_of(&store.join("0a-program"))?;
    ensure!(guest.run(&format!("cd /kept && {LISTING}"))? == expected, "other files than before");
    let mut events = Events::follow(&testbed.program, &control)?;
    kill_children(&guest)?;
    let lost = events.wait_for("process-lost").map_err(|error| guest.explain(error))?;
    ensure!(lost.contains("store"), "the event says {lost}");
    guest.errors().wait_for("no files any more", tests::guest::PATIENCE)?;
    guest.errors().wait_for("every request is refused", tests::guest::PATIENCE)?;
    let (status, said) = guest.attempt("ls /mnt/0a-program/never-looked-for")?;
    ensure!(status != 0, "a server that is dead found a file: {said}");
    // What the guest has it need not ask for.
    ensure!(guest.run(&format!("cd /kept && {LISTING}"))? == expected, "the guest kept less");
    guest.run("cd / && umount /kept && umount /mnt; echo the guest goes on")?;
    guest.power_off()
}

/// Requests that the guest has had answers to: with one processor, and one request at a time, each
/// is an interrupt.
const ANSWERS: &str = "awk '/virtio[0-9]+-(hiprio|requests)/ { n += $2 } END { print n + 0 }' \
                       /proc/interrupts";

/// What the guest has seen it keeps: names, attributes, links, directories and data are there
/// without a request, and closing files makes none either.
fn asks_only_once(guest: &mut Guest, store: &Path) -> Result<()> {
    let expected = listing_of(&store.join("0a-program"))?;
    guest.run("mkdir /kept && mount --bind /mnt/0a-program /kept && cd /kept")?;
    let first: u64 = guest.run(ANSWERS)?.trim().parse()?;
    ensure!(first > 10, "{first} interrupts for a whole tree");
    ensure!(guest.run(&format!("cd /kept && {LISTING}"))? == expected, "other files than before");
    let later: u64 = guest.run(ANSWERS)?.trim().parse()?;
    ensure!(later == first, "{} requests for what the guest has", later - first);
    guest.run("cd /").map(drop)
}

fn reaches_nothing_else(guest: &mut Guest) -> Result<()> {
    for path in [
        "0d-hidden",
        "0d-hidden/secret",
        "0a-program/out",
        "0a-program/../0d-hidden/secret",
        "../store-paths",
        "0a-program/up/store-paths",
        "0a-program/up/store/0d-hidden/secret",
    ] {
        let (status, said) = guest.attempt(&format!("cat /mnt/{path}"))?;
        ensure!(status != 0 && !said.contains("hidden away"), "{path}: {said}");
    }
    Ok(())
}

/// A path that is added at run time is seen; what is none of the store is refused.
fn is_shown_more(guest: &mut Guest, testbed: &Testbed, store: &Path, control: &Path) -> Result<()> {
    let list = store.with_file_name("more-paths");
    let add = |line: String| {
        fs::write(&list, line)?;
        let mut command = Command::new(&testbed.program);
        tool::finish(command.arg("ctl").arg(control).arg("store-add").arg(&list))
    };
    ensure!(add("/etc/passwd\n".to_owned()).is_err(), "a path outside the store was added");
    fs::create_dir(store.join("0f-added"))?;
    fs::write(store.join("0f-added/file"), "added later\n")?;
    // More than a message holds; the last one does not exist.
    let line = |name: &str| format!("{}\n", store.join(name).display());
    let list = line("0f-added").repeat(4000);
    let refused = add(list.clone() + &line("0g-missing"));
    let refused = refused.err().context("a path that does not exist was added")?.to_string();
    ensure!(refused.contains("0g-missing; nothing was added"), "{refused}");
    let names = guest.run("sleep 2; ls /mnt")?;
    ensure!(!names.contains("0f-added"), "half of a list was added: {names}");
    add(list)?;
    guest.run("until grep added /mnt/0f-added/file; do sleep 0.5; done")?;
    let (status, said) = guest.attempt("cat /mnt/0d-hidden/secret")?;
    ensure!(status != 0, "what was not added is seen: {said}");
    Ok(())
}

fn changes_nothing(guest: &mut Guest) -> Result<()> {
    guest.run("mount -o remount,rw /mnt")?;
    for command in [
        "echo more >> /mnt/0c-file",
        "touch /mnt/new",
        "mkdir /mnt/0a-program/new",
        "rm /mnt/0c-file",
        "mv /mnt/0c-file /mnt/0e-file",
        "chmod 777 /mnt/0a-program",
        "ln -s /bin /mnt/link",
        "truncate -s 0 /mnt/0c-file",
    ] {
        let (status, said) = guest.attempt(command)?;
        ensure!(status != 0 && said.contains("Read-only"), "{command}: {status}, {said}");
    }
    guest.run("mount -o remount,ro /mnt").map(drop)
}

fn listing_in(guest: &mut Guest, path: &str) -> Result<String> {
    guest.run(&format!("cd /mnt/{path} && {LISTING}"))
}

/// Three paths, one of them a file, and one that no closure has.
fn make_store(store: &Path) -> Result<()> {
    let program = store.join("0a-program");
    fs::create_dir_all(program.join("bin"))?;
    for (name, mode) in [("bin/tool", 0o555), ("bin/set", 0o2555), ("share", 0o444)] {
        fs::write(program.join(name), name.repeat(10_000))?;
        fs::set_permissions(program.join(name), Permissions::from_mode(mode))?;
    }
    for (name, target) in
        [("lib", "../0b-many"), ("out", "../0d-hidden/secret"), ("up", "../.."), ("sh", "bin/tool")]
    {
        symlink(target, program.join(name))?;
    }
    fs::hard_link(program.join("share"), program.join("bin/share"))?;
    let mut sparse = File::create(program.join("sparse"))?;
    sparse.seek(SeekFrom::Start(16 << 20))?;
    sparse.write_all(b"behind a hole")?;
    let large: Vec<u8> = (0..1_u32 << 20).flat_map(u32::to_le_bytes).collect();
    fs::write(program.join("large"), large)?;

    fs::create_dir(store.join("0b-many"))?;
    for number in 0..MANY {
        fs::write(store.join(format!("0b-many/file-{number}")), number.to_string())?;
    }
    fs::write(store.join("0c-file"), "a path that is a file\n")?;
    fs::create_dir(store.join("0d-hidden"))?;
    Ok(fs::write(store.join("0d-hidden/secret"), "hidden away\n")?)
}
