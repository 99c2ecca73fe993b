//! Which Debian packages are needed, and how do they get here? Programs are installed; what a guest
//! consists of is downloaded and unpacked into the cache without touching this machine.

use std::collections::BTreeSet;
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;

use anyhow::{Context, Result, bail, ensure};

use crate::cache::Cache;
use crate::mended_emulator;
use crate::tool::{self, progress};

/// A program the testbed runs.
#[derive(Clone, Copy, Debug)]
pub enum Program {
    /// Runs the emulated host.
    Qemu,
    /// Shares this machine's file system with the emulated host.
    Virtiofsd,
    /// Makes the tree of a guest.
    Mmdebstrap,
    /// Makes erofs store images.
    MakeErofs,
    /// Makes squashfs store images.
    MakeSquashfs,
    /// Makes ext4 volumes.
    MakeExt4,
    /// Makes network interfaces.
    Ip,
    /// Logs in to guests.
    SecureShell,
    /// Evaluates Nix files.
    NixInstantiate,
    /// Judges units.
    SystemdAnalyze,
}

impl Program {
    /// Its name as a command.
    pub fn name(self) -> &'static str {
        match self {
            Self::Qemu => "qemu-system-x86_64",
            Self::Virtiofsd => "virtiofsd",
            Self::Mmdebstrap => "mmdebstrap",
            Self::MakeErofs => "mkfs.erofs",
            Self::MakeSquashfs => "mksquashfs",
            Self::MakeExt4 => "mke2fs",
            Self::Ip => "ip",
            Self::SecureShell => "ssh",
            Self::NixInstantiate => "nix-instantiate",
            Self::SystemdAnalyze => "systemd-analyze",
        }
    }

    fn package(self) -> &'static str {
        match self {
            Self::Qemu => "qemu-system-x86",
            // Until bookworm QEMU brought its own, later it is a project of its own.
            Self::Virtiofsd if codename() == "bookworm" => "qemu-system-common",
            Self::Virtiofsd => "virtiofsd",
            Self::Mmdebstrap => "mmdebstrap",
            Self::MakeErofs => "erofs-utils",
            Self::MakeSquashfs => "squashfs-tools",
            Self::MakeExt4 => "e2fsprogs",
            Self::Ip => "iproute2",
            Self::SecureShell => "openssh-client",
            Self::NixInstantiate => "nix-bin",
            Self::SystemdAnalyze => "systemd",
        }
    }
}

/// Makes sure that `programs` are installed, installing the packages of those that are missing.
///
/// # Errors
/// When one is missing and cannot be installed: the error has the command that would.
pub fn require(programs: &[Program]) -> Result<()> {
    // Tests run at once, and apt does not wait for another apt.
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _one = ONE_AT_A_TIME.lock();
    let missing = |program: &&Program| tool::find(program.name()).is_none();
    let packages: BTreeSet<&str> =
        programs.iter().filter(missing).map(|program| program.package()).collect();
    if packages.is_empty() {
        return Ok(());
    }

    let list = packages.into_iter().collect::<Vec<_>>().join(" ");
    let remedy = format!("apt-get update && apt-get install --no-install-recommends {list}");
    ensure!(
        tool::find("apt-get").is_some(),
        "these Debian packages are missing, and this machine has no apt-get: {list}"
    );
    ensure!(
        rustix::process::geteuid().is_root(),
        "these Debian packages are missing; as root, run: {remedy}"
    );
    progress(&format!("installing Debian packages: {list}"));
    let install = || {
        let mut command = apt_get();
        command.args(["install", "--yes", "--quiet", "--no-install-recommends"]);
        tool::finish(command.args(list.split(' ')))
    };
    if install().is_err() {
        update()?;
        install().with_context(|| format!("try it by hand: {remedy}"))?;
    }
    match programs.iter().find(missing) {
        None => Ok(()),
        Some(program) => bail!("{list} is installed, but there is no {}", program.name()),
    }
}

/// The files of Debian package `name` (for a package that only names others: of the first it
/// depends on), unpacked into the cache. This machine's own packages stay as they are.
///
/// # Errors
/// When apt does not know it or cannot fetch it.
pub fn unpacked(cache: &Cache, name: &str) -> Result<PathBuf> {
    cache.entry(&format!("package-{name}"), &[codename().as_bytes(), b"1"], |folder| {
        progress(&format!("fetching the Debian package {name}"));
        if fetch(name, folder).is_err() {
            update()?;
            fetch(name, folder).with_context(|| {
                format!("try `apt-get update` as root, then `apt-get download {name}`")
            })?;
        }
        Ok(())
    })
}

/// The folder of the programs of a package of crates.io, built once.
///
/// # Errors
/// When it cannot be fetched or built.
pub fn from_crates(cache: &Cache, package: &str, version: &str) -> Result<PathBuf> {
    let folder = cache.entry(package, &[version.as_bytes()], |folder| {
        progress(&format!("building {package} from crates.io, which takes minutes once"));
        let mut cargo = tool::command("cargo");
        cargo.args(["install", "--quiet", "--locked", package, "--version", version, "--root"]);
        // Its build folder would else be kept in this workspace.
        cargo.arg(folder).env("CARGO_TARGET_DIR", folder.join("target")).current_dir("/");
        tool::finish(&mut cargo)?;
        Ok(fs::remove_dir_all(folder.join("target"))?)
    })?;
    Ok(folder.join("bin"))
}

/// Debian's statically linked busybox, which may not be installed beside another one.
///
/// # Errors
/// As [`unpacked`].
pub fn busybox(cache: &Cache) -> Result<PathBuf> {
    let tree = unpacked(cache, "busybox-static")?;
    let places = ["usr/bin/busybox", "bin/busybox"].map(|place| tree.join(place));
    places.into_iter().find(|path| path.is_file()).context("busybox-static has no busybox")
}

/// The program that emulates hosts. Bookworm's forgets, when it enters a guest, that no interrupt
/// may come before the next instruction, and then a guest sleeps for ever now and then: there it is
/// the one of its backports, with the libraries of the installed one, where that can be fetched.
///
/// # Errors
/// When none is installed and none can be.
pub fn emulator(cache: &Cache) -> Result<PathBuf> {
    require(&[Program::Qemu])?;
    let installed = tool::find(Program::Qemu.name()).context("there is no QEMU")?;
    if codename() != "bookworm" {
        return Ok(installed);
    }
    let inputs = [BACKPORTS, QEMU, mended_emulator::SOURCE].map(str::as_bytes);
    let fetched = cache.entry("qemu", &inputs, |folder| {
        progress(&format!("fetching QEMU from Debian {BACKPORTS}"));
        fetch_from(BACKPORTS, &QEMU_PACKAGES, folder)?;
        mended_emulator::mend(&folder.join("usr/bin").join(Program::Qemu.name()))
            .unwrap_or_else(|error| progress(&format!("QEMU is left as it is: {error:#}")));
        let script = folder.join("qemu");
        fs::write(&script, QEMU)?;
        fs::set_permissions(&script, Permissions::from_mode(0o755))?;
        tool::run(&script.to_string_lossy(), ["--version"]).map(drop)
    });
    Ok(fetched.map_or_else(
        |error| {
            progress(&format!("the installed QEMU has to do: {error:#}"));
            installed
        },
        |folder| folder.join("qemu"),
    ))
}

/// A folder with a `passt` that speaks vhost-user. Bookworm's does not: there it is the one of the
/// next release, with the C library that it was built for, and nothing of it is installed.
///
/// # Errors
/// As [`unpacked`].
pub fn passt(cache: &Cache) -> Result<PathBuf> {
    if codename() != "bookworm" {
        return Ok(unpacked(cache, "passt")?.join("usr/bin"));
    }
    with_its_libraries(cache, &["usr/bin/passt"], &["passt", "libc6"])
}

/// A folder with a `virtiofsd` that needs no root and no libraries of the system that it runs on.
/// Bookworm's is QEMU's old one, which root alone can start.
///
/// # Errors
/// As [`unpacked`].
pub fn virtiofsd(cache: &Cache) -> Result<PathBuf> {
    let packages = ["virtiofsd", "libc6", "libcap-ng0", "libgcc-s1", "libseccomp2"];
    with_its_libraries(cache, &["usr/libexec/virtiofsd"], &packages)
}

/// A folder with programs of systemd that bookworm's has not got (its proxy for `ssh` and its
/// client of varlink), with a server of `ssh` for the guest, and with all libraries of theirs.
///
/// # Errors
/// As [`unpacked`].
pub fn systemd(cache: &Cache) -> Result<PathBuf> {
    let programs = ["usr/lib/systemd/systemd-ssh-proxy", "usr/bin/varlinkctl"];
    with_its_libraries(cache, &programs, &SYSTEMD_PACKAGES)
}

/// A folder with a script of the name of each of `programs`, which the first of `packages` has, and
/// with all of them. On bookworm they are those of the next release.
fn with_its_libraries(cache: &Cache, programs: &[&str], packages: &[&str]) -> Result<PathBuf> {
    let release = match codename().as_str() {
        "bookworm" => NEXT_RELEASE.to_owned(),
        other => other.to_owned(),
    };
    let name = packages.first().context("a package")?;
    let script = |program: &str| WITH_LIBRARIES.replace("PROGRAM", program);
    let inputs = [&release, &script(&programs.join(" "))];
    cache.entry(name, &inputs.map(String::as_bytes), |folder| {
        progress(&format!("fetching {name} from Debian {release}"));
        fetch_from(&release, packages, folder)?;
        for program in programs {
            let file = folder.join(Path::new(program).file_name().context("a name")?);
            fs::write(&file, script(program))?;
            fs::set_permissions(file, Permissions::from_mode(0o755))?;
        }
        Ok(())
    })
}

/// Debian's keys, as every Debian has them.
const KEYS: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// Where bookworm gets newer programs from, and what belongs to QEMU there.
const BACKPORTS: &str = "bookworm-backports";
const QEMU_PACKAGES: [&str; 4] =
    ["qemu-system-x86", "qemu-system-common", "qemu-system-data", "seabios"];

/// Runs QEMU with its own firmware.
const QEMU: &str = "\
#!/bin/sh
usr=${0%/*}/usr
exec \"$usr/bin/qemu-system-x86_64\" -L \"$usr/share/qemu\" -L \"$usr/share/seabios\" \"$@\"
";

/// The release that has a passt with vhost-user, and a virtiofsd of its own.
const NEXT_RELEASE: &str = "trixie";

/// What belongs to those programs of systemd, and to the smallest server of `ssh`.
const SYSTEMD_PACKAGES: [&str; 21] = [
    "systemd",
    "libsystemd-shared",
    "libacl1",
    "libaudit1",
    "libblkid1",
    "libc6",
    "libcap-ng0",
    "libcap2",
    "libcrypt1",
    "libmount1",
    "libpam0g",
    "libpcre2-8-0",
    "libseccomp2",
    "libselinux1",
    "libssl3t64",
    "libzstd1",
    "zlib1g",
    "dropbear-bin",
    "libgmp10",
    "libtomcrypt1",
    "libtommath1",
];

/// Where Debian has libraries.
pub const LIBRARIES: &str = "usr/lib/x86_64-linux-gnu";

/// Runs a program with its own loader and libraries.
const WITH_LIBRARIES: &str = "\
#!/bin/sh
root=${0%/*}
libraries=$root/usr/lib/x86_64-linux-gnu
set -- --library-path \"$libraries:$libraries/systemd\" \"$root/PROGRAM\" \"$@\"
exec \"$libraries/ld-linux-x86-64.so.2\" \"$@\"
";

/// The name of this machine's Debian release, such as `bookworm`.
pub fn codename() -> String {
    let release = fs::read_to_string("/etc/os-release").unwrap_or_default();
    let line = release.lines().find_map(|line| line.strip_prefix("VERSION_CODENAME="));
    line.unwrap_or("stable").trim_matches('"').to_owned()
}

fn fetch(name: &str, folder: &Path) -> Result<()> {
    let target = concrete(name)?;
    let work = tempfile::tempdir_in(folder)?;
    tool::finish(apt_get().args(["download", "--quiet", &target]).current_dir(work.path()))?;
    let archive = fs::read_dir(work.path())?.next().context("apt-get downloaded nothing")??;
    tool::run("dpkg-deb", [Path::new("--extract"), &archive.path(), folder])?;
    Ok(())
}

/// Unpacks packages of another release into `folder`. This machine's lists stay as they are: apt
/// works on lists of its own, from the mirror that this machine uses.
fn fetch_from(release: &str, names: &[&str], folder: &Path) -> Result<()> {
    let work = tempfile::tempdir_in(folder)?;
    let place = |name: &str| work.path().join(name);
    for part in ["lists/partial", "cache/archives/partial", "packages"] {
        fs::create_dir_all(place(part))?;
    }
    fs::write(
        place("sources.list"),
        format!("deb [signed-by={KEYS}] {} {release} main\n", mirror()?),
    )?;
    let apt_get = || {
        let mut command = apt_get();
        for (option, part) in [
            ("Dir::Etc::SourceList", "sources.list"),
            ("Dir::Etc::SourceParts", "none"),
            ("Dir::State::Lists", "lists"),
            ("Dir::Cache", "cache"),
        ] {
            command.arg("-o").arg(format!("{option}={}", place(part).display()));
        }
        command.args(["-o", "Acquire::Languages=none"]);
        command.args(["-o", "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false"]);
        command
    };
    tool::finish(apt_get().args(["update", "--quiet"]))?;
    let packages = place("packages");
    // A plain name would be of the release that is installed, where its version is higher.
    let targets = names.iter().map(|name| format!("{name}/{release}"));
    tool::finish(apt_get().args(["download", "--quiet"]).args(targets).current_dir(&packages))?;
    for archive in fs::read_dir(packages)? {
        tool::run("dpkg-deb", [Path::new("--extract"), &archive?.path(), folder])?;
    }
    Ok(())
}

/// The mirror from which this machine's own release comes.
fn mirror() -> Result<String> {
    let codename = format!("Codename: {}", codename());
    let format = "$(REPO_URI)";
    let arguments = ["indextargets", "--format", format, "Created-By: Packages", &codename];
    let listed = String::from_utf8(tool::run("apt-get", arguments)?)?;
    let first = listed.lines().next().context("apt knows no mirror of this release")?;
    Ok(first.trim().to_owned())
}

/// `name`, or the package behind it when it is a mere reference (as linux-image-cloud-amd64 is).
fn concrete(name: &str) -> Result<String> {
    if !name.starts_with("linux-image-") {
        return Ok(name.to_owned());
    }
    let depends = String::from_utf8(tool::run("apt-cache", ["depends", name])?)?;
    let first = depends.lines().find_map(|line| line.trim().strip_prefix("Depends: "));
    first.map(str::to_owned).with_context(|| format!("{name} depends on no kernel"))
}

fn update() -> Result<()> {
    ensure!(
        rustix::process::geteuid().is_root(),
        "the lists of Debian packages may be old or missing; as root, run: apt-get update"
    );
    progress("fetching the lists of Debian packages");
    tool::finish(apt_get().args(["update", "--quiet"])).map(drop)
}

fn apt_get() -> Command {
    let mut command = tool::command("apt-get");
    command.env("DEBIAN_FRONTEND", "noninteractive");
    command
}
