//! Does a guest see the host's folders as they are, and what becomes of it when nobody serves them
//! any more?

mod rights;

use std::fs::{self, File, Permissions};
use std::io::{Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use rustix::fs::XattrFlags;
use rustix::process::{Pid, Signal, kill_process};
use tests::emulated_host;
use tests::events::Events;
use tests::guest::{Guest, Launch, PATIENCE};
use tests::packages::Program;
use tests::testbed::Testbed;
use tests::tool;

use self::rights::Rights;
use crate::GuestTest;

/// The load of a share: what it does, and how much of it.
const LOAD_SEED: &str = "4294967291";
const LOAD_STEPS: &str = "600";

/// The file system that it is on.
const VOLUME_BYTES: u64 = 96 << 20;

pub(crate) const TESTS: &[GuestTest] = &[(
    "share::folders_are_the_same_in_the_guest_and_outlive_who_serves_them",
    folders_are_the_same,
)];

/// Every fact about a tree: inodes, content and links.
pub(crate) const LISTING: &str = "\
    find . | LC_ALL=C sort | tr '\\n' '\\0' | xargs -0 stat -c '%n %f %u %g %s %b %h %Y' && \
    find . -type f | LC_ALL=C sort | xargs sha256sum && \
    find . -type l | LC_ALL=C sort | while read -r link; do readlink $link; done";

/// A name that the kernel lets root set on every file system, and its value.
const ATTRIBUTE: &str = "security.nixvmm";
const VALUE: &str = "seen from the guest";

/// Busybox has no program for attributes; this one is run from the share.
const PERL: &str = "/mnt/bin/ld.so --library-path /mnt/bin /mnt/bin/perl";

fn folders_are_the_same(testbed: &Testbed) -> Result<()> {
    let folder = tempfile::tempdir()?;
    // Not only root serves what is in it.
    fs::set_permissions(folder.path(), Permissions::from_mode(0o755))?;
    let (own, other) = (folder.path().join("own"), folder.path().join("other"));
    let tree = own.join("tree");
    let _volume = Mounted::image(&folder.path().join("volume"), &own)?;
    make_tree(&tree)?;
    bring_perl(&own.join("bin"))?;
    let rights = Rights::lay(testbed, folder.path(), &own)?;
    fs::create_dir(&other)?;
    fs::write(other.join("file"), "of another process")?;
    let socket = folder.path().join("socket");
    let process = Listening::start(&other, &socket)?;
    let control = folder.path().join("control");
    let mut guest = Launch::tiny(testbed, &testbed.bzimage)
        .arguments([Path::new("--control"), &control])
        .arguments(["--share", &format!("own,source={},xattr,sandbox=chroot", own.display())])
        .arguments(["--share", &format!("tag=other,socket={}", socket.display())])
        .arguments(rights.arguments())
        .boot()?;
    guest.run("sh /modules/more 2> /dev/null; mount -t virtiofs own /mnt")?;
    let listing = sees_the_tree(&mut guest, &tree)?;
    writes_what_the_host_reads(&mut guest, &own)?;
    rights.hold(&mut guest)?;
    builds_on_an_overlay(&mut guest, "/run/above", "")?;
    builds_on_an_overlay(&mut guest, "/mnt/above", ",userxattr")?;
    let kept = fs::read(own.join("above/upper/dir0/file0"))?;
    ensure!(kept.ends_with(b"more\n"), "the host has {} bytes", kept.len());
    ensure!(listing_of(&tree)? == listing, "a guest's overlay changed what is below it");
    bears_a_load(&mut guest, testbed, folder.path())?;
    let mut events = Events::follow(&testbed.program, &control)?;
    process_comes_back(&mut guest, process, &other, &socket)?;
    let lost = events.wait_for("process-lost")?;
    ensure!(lost.contains(socket.to_str().context("no UTF-8")?), "the event says {lost}");
    child_is_killed(&mut guest)?;
    // The process that came back has ended again by now, and the other children are killed too.
    let is_own = |lost: &str| lost.contains("share own") && lost.contains("virtiofsd");
    while !is_own(&events.wait_for("process-lost")?) {}
    guest.power_off()
}

fn sees_the_tree(guest: &mut Guest, tree: &Path) -> Result<String> {
    let expected = listing_of(tree)?;
    let seen = guest.run(&format!("cd /mnt/tree && {LISTING}"))?;
    if let Some((ours, theirs)) = expected.lines().zip(seen.lines()).find(|(a, b)| a != b) {
        anyhow::bail!("the host has\n{ours}\nand the guest sees\n{theirs}");
    }
    ensure!(seen == expected, "the guest sees other files:\n{seen}");
    let script = format!(
        "($path, $name, $value) = (\"/mnt/tree/plain\", \"{ATTRIBUTE}\", \"-\" x 64); \
         $n = syscall(191, $path, $name, $value, 64); print $n < 0 ? $! : substr($value, 0, $n)"
    );
    let value = guest.run(&format!("{PERL} -e '{script}'"))?;
    ensure!(value == VALUE, "the guest reads an attribute as: {value}");
    Ok(expected)
}

fn writes_what_the_host_reads(guest: &mut Guest, own: &Path) -> Result<()> {
    guest.run(
        "mkdir /mnt/written && cd /mnt/written && yes nixvmm | head -c 3000000 > new && \
         mv new moved && chmod 600 moved && ln -s moved link && ln moved hard && mkfifo pipe && \
         echo gone > gone && rm gone",
    )?;
    let written = own.join("written");
    let content = fs::read(written.join("moved"))?;
    ensure!(content.len() == 3_000_000, "the host finds {} bytes", content.len());
    ensure!(content.chunks(7).all(|line| b"nixvmm\n".starts_with(line)), "the host finds others");
    let file = written.join("moved").metadata()?;
    ensure!((file.mode() & 0o7777, file.nlink()) == (0o600, 2), "mode and links: {file:?}");
    ensure!(fs::read_link(written.join("link"))? == Path::new("moved"), "another link");
    ensure!(fs::read_dir(&written)?.count() == 4, "other names than the guest made");
    // What the host changes is seen when a file is opened again.
    fs::write(written.join("moved"), "by the host")?;
    let seen = guest.run("sleep 2; cat /mnt/written/link")?;
    ensure!(seen == "by the host", "the guest still sees {} bytes", seen.len());
    Ok(())
}

/// A load that checks each of its steps leaves the files that it leaves on the host.
fn bears_a_load(guest: &mut Guest, testbed: &Testbed, folder: &Path) -> Result<()> {
    let (shared, host) = (folder.join("own/load"), folder.join("load"));
    fs::create_dir(&shared)?;
    fs::create_dir(&host)?;
    fs::copy(&testbed.file_load, folder.join("own/bin/file-load"))?;
    guest.run(&format!("/mnt/bin/file-load {LOAD_SEED} {LOAD_STEPS} /mnt/load"))?;
    let mut command = Command::new(&testbed.file_load);
    tool::finish(command.args([LOAD_SEED, LOAD_STEPS]).arg(&host))?;
    let mut names: Vec<_> =
        fs::read_dir(&host)?.map(|entry| Ok(entry?.file_name())).collect::<Result<_>>()?;
    names.sort();
    ensure!(fs::read_dir(&shared)?.count() == names.len(), "other files than {names:?}");
    for name in &names {
        let (ours, theirs) = (fs::read(host.join(name))?, fs::read(shared.join(name))?);
        ensure!(ours == theirs, "{} differs on the host", name.display());
    }
    ensure!(names.len() > 1, "the load left {names:?}");
    Ok(())
}

/// Reads from below, writes to a folder above, and changes, renames and removes what is below.
fn builds_on_an_overlay(guest: &mut Guest, above: &str, options: &str) -> Result<()> {
    guest.run(&format!(
        "mkdir -p {above}/upper {above}/work /run/merged && mount -t overlay overlay -o \
         lowerdir=/mnt/tree,upperdir={above}/upper,workdir={above}/work{options} /run/merged",
    ))?;
    let build = "\
        cd /run/merged && for folder in dir*; do mkdir -p out/$folder; \
        for file in $folder/*; do tr a-z A-Z < $file > out/$file.o || exit 1; done; done; \
        cat out/*/*.o | sha256sum; cat dir*/* | tr a-z A-Z | sha256sum; \
        echo more >> dir0/file0 && chmod 600 dir0/file1 && mv dir1 renamed && rm -r dir2 && \
        rm large && ls -d dir* renamed large 2>&1; tail -n 1 dir0/file0";
    let said = guest.run(build)?;
    let lines: Vec<&str> = said.lines().collect();
    let [outcome, expected, rest @ ..] = lines.as_slice() else { anyhow::bail!("{said}") };
    ensure!(outcome == expected, "what was built is wrong:\n{said}");
    let expected = ["ls: large: No such file or directory", "dir0", "dir3", "renamed", "more"];
    ensure!(rest == expected, "the overlay has other names:\n{said}");
    guest.run("cd / && umount /run/merged").map(drop)
}

fn process_comes_back(
    guest: &mut Guest,
    process: Listening,
    folder: &Path,
    socket: &Path,
) -> Result<()> {
    guest.run("mkdir /other && mount -t virtiofs other /other && grep another /other/file")?;
    drop(process);
    guest.errors().wait_for("waiting for it to come back", PATIENCE)?;
    let _process = Listening::start(folder, socket)?;
    guest.errors().wait_for("who serves it is back", PATIENCE)?;
    guest.run("umount /other; mount -t virtiofs other /other && grep another /other/file")?;
    guest.run("umount /other").map(drop)
}

/// Whoever reads gets an error, then and later; nobody waits for ever.
fn child_is_killed(guest: &mut Guest) -> Result<()> {
    guest.run(
        "(while cat /mnt/tree/*/* > /dev/null 2>&1; do :; done; echo > /run/over) \
         > /dev/null 2>&1 &",
    )?;
    kill_children(guest)?;
    guest.errors().wait_for("no files any more", PATIENCE)?;
    guest.errors().wait_for("every request is refused", PATIENCE)?;
    guest.run("until [ -e /run/over ]; do sleep 0.1; done")?;
    let (status, said) = guest.attempt("ls /mnt/never-looked-for")?;
    ensure!(status != 0 && said.contains("not connected"), "a folder of nobody: {said}");
    let (status, said) = guest.attempt("echo more > /mnt/written/more")?;
    ensure!(status != 0, "a folder of nobody was written: {said}");
    guest.run("sync; cd / && umount /mnt; echo the guest goes on").map(drop)
}

/// Kills whoever serves the guest.
pub(crate) fn kill_children(guest: &Guest) -> Result<()> {
    let children = format!("/proc/{0}/task/{0}/children", guest.process_id());
    let children = fs::read_to_string(&children).context(children)?;
    ensure!(!children.trim().is_empty(), "nobody who serves the guest is a child");
    for child in children.split_whitespace() {
        let child = Pid::from_raw(child.parse()?).context("a process id is not 0")?;
        kill_process(child, Signal::KILL)?;
    }
    Ok(())
}

pub(crate) fn listing_of(tree: &Path) -> Result<String> {
    let output = Command::new("sh").args(["-c", LISTING]).current_dir(tree).output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout)?)
}

fn make_tree(tree: &Path) -> Result<()> {
    for folder in 0..4 {
        let folder = tree.join(format!("dir{folder}"));
        fs::create_dir_all(&folder)?;
        for file in 0..20_usize {
            let name = folder.join(format!("file{file}"));
            fs::write(name, format!("the file {file}\n").repeat(file * 40))?;
        }
    }
    for (name, mode) in [("plain", 0o644), ("private", 0o640), ("set-user", 0o4755), ("none", 0)] {
        fs::write(tree.join(name), name)?;
        fs::set_permissions(tree.join(name), Permissions::from_mode(mode))?;
    }
    fs::create_dir(tree.join("sticky"))?;
    fs::set_permissions(tree.join("sticky"), Permissions::from_mode(0o1777))?;
    for (name, target) in [("near", "dir0/file3"), ("far", "/bin/sh"), ("nowhere", "../missing")] {
        symlink(target, tree.join(name))?;
    }
    fs::hard_link(tree.join("plain"), tree.join("dir1/plain"))?;
    tool::run("mkfifo", [tree.join("pipe")])?;
    std::os::unix::fs::chown(tree.join("private"), Some(1234), Some(5678))?;
    rustix::fs::setxattr(tree.join("plain"), ATTRIBUTE, VALUE.as_bytes(), XattrFlags::CREATE)?;
    let mut sparse = File::create(tree.join("sparse"))?;
    sparse.seek(SeekFrom::Start(16 << 20))?;
    sparse.write_all(b"behind a hole")?;
    let large: Vec<u8> = (0..1_u32 << 20).flat_map(|word| word.to_le_bytes()).collect();
    fs::write(tree.join("large"), large)?;
    let time = UNIX_EPOCH + Duration::from_secs(1);
    Ok(File::options().write(true).open(tree.join("large"))?.set_modified(time)?)
}

/// A program that was not made for the tiny guest, with all that it needs.
fn bring_perl(folder: &Path) -> Result<()> {
    fs::create_dir(folder)?;
    let perl = tool::find("perl").context("there is no perl, which every Debian has")?;
    fs::copy(&perl, folder.join("perl"))?;
    let libraries = String::from_utf8(tool::run("ldd", [&perl])?)?;
    for path in libraries.split_whitespace().filter(|word| word.starts_with('/')) {
        let name = Path::new(path).file_name().context("a library has a name")?;
        let name = if path.contains("/ld-linux") { "ld.so".as_ref() } else { name };
        fs::copy(path, folder.join(name))?;
    }
    Ok(())
}

/// A file system that is mounted until it is dropped.
struct Mounted(PathBuf);

impl Mounted {
    /// An ext4 one: an overlay of a guest keeps its notes in attributes, which the file system of
    /// temporary files need not have.
    fn image(image: &Path, place: &Path) -> Result<Self> {
        fs::create_dir(place)?;
        File::create(image)?.set_len(VOLUME_BYTES)?;
        tool::finish(tool::command("mke2fs").args(["-q", "-F", "-t", "ext4"]).arg(image))?;
        tool::finish(tool::command("mount").args(["-o", "loop"]).args([image, place]))?;
        Ok(Self(place.to_owned()))
    }

    /// A folder that all may look into at another place, which has a path for all.
    fn bind(folder: &Path, place: &Path) -> Result<Self> {
        fs::create_dir(place)?;
        tool::finish(tool::command("mount").args(["-o", "bind,ro"]).args([folder, place]))?;
        Ok(Self(place.to_owned()))
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = tool::finish(tool::command("umount").arg("-l").arg(&self.0));
    }
}

/// A virtiofsd that listens at a socket; dropping it kills it.
struct Listening(Child);

impl Listening {
    fn start(folder: &Path, socket: &Path) -> Result<Self> {
        let _ = fs::remove_file(socket);
        let mut command = tool::command(Program::Virtiofsd.name());
        command.arg(format!("--socket-path={}", socket.display()));
        command.args(emulated_host::shared_folder(folder));
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let process = Self(command.spawn()?);
        let deadline = Instant::now() + PATIENCE;
        while !socket.exists() {
            ensure!(Instant::now() < deadline, "virtiofsd does not listen");
            thread::sleep(Duration::from_millis(20));
        }
        Ok(process)
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
