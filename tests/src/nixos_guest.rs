//! What is booted where Nix cannot be had? A guest in the shape of a NixOS guest, made of Debian
//! packages: everything lives under `/nix/store/HASH-NAME` in a read-only image, an initrd mounts
//! it and starts `init=/nix/store/HASH-nixos-system-guest/init`, and systemd is the first process.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rustix::process::geteuid;
use serde::{Deserialize, Serialize};

use crate::archive::{self, Archive};
use crate::cache::Cache;
use crate::kernel::Kernel;
use crate::packages::{self, Program};
use crate::tiny_guest::{AGENT, MODULES};
use crate::tool::{self, progress};

/// Debian packages of the userland, besides those that every Debian has.
const PACKAGES: &str =
    "systemd,systemd-sysv,udev,dbus,kmod,iproute2,util-linux,e2fsprogs,login,passwd";

/// What stage 1 loads besides the modules of all guests.
const MORE_MODULES: [&str; 1] = ["virtiofs"];

const STAGE_1: &str = include_str!("../../resources/guest/stage-1.sh");
const STAGE_2: &str = include_str!("../../resources/guest/stage-2.sh");
const ASSEMBLE: &str = include_str!("../../resources/guest/assemble-store.sh");

/// What an init system of NixOS is called with besides `init=`.
const KERNEL_PARAMETERS: &str = "console=hvc0 loglevel=4";

/// A NixOS-shaped guest as files of this machine.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct NixosGuest {
    /// The initrd with stage 1.
    pub initrd: PathBuf,
    /// The store as an erofs image.
    pub erofs: PathBuf,
    /// The store as a squashfs image.
    pub squashfs: PathBuf,
    /// The store as a folder.
    pub store: PathBuf,
    /// The kernel command line: `init=` and the system's own parameters.
    pub command_line: String,
}

impl NixosGuest {
    /// Builds the guest for `kernel`.
    ///
    /// # Errors
    /// When packages cannot be had or an image cannot be made.
    pub fn prepare(cache: &Cache, kernel: &Kernel) -> Result<Self> {
        let initrd = initrd(cache, kernel)?;
        let busybox = packages::busybox(cache)?;
        let userland = userland(cache)?;
        let inputs = [&initrd, &busybox, &userland, &kernel.image];
        let inputs: Vec<String> = inputs.iter().map(|path| path.display().to_string()).collect();
        let digest = tool::digest(&[
            inputs.join(" ").as_bytes(),
            STAGE_2.as_bytes(),
            ASSEMBLE.as_bytes(),
            AGENT.as_bytes(),
            KERNEL_PARAMETERS.as_bytes(),
        ])?;
        let names = Names::new(&digest)?;
        let folder = cache.entry("nixos-guest", &[digest.as_bytes()], |folder| {
            packages::require(&[Program::MakeErofs, Program::MakeSquashfs])?;
            progress("building the store images of the NixOS-shaped guest");
            let input = folder.join("input");
            names.lay_out(&input, &busybox, &kernel.image, &initrd)?;
            assemble(&userland, &names.userland, &input, folder)?;
            Ok(fs::remove_dir_all(&input)?)
        })?;
        Ok(Self {
            initrd,
            erofs: folder.join("store.erofs"),
            squashfs: folder.join("store.squashfs"),
            store: folder.join("private/store"),
            command_line: format!("init=/nix/store/{}/init {KERNEL_PARAMETERS}", names.system),
        })
    }
}

/// The store paths of the guest, without `/nix/store/`.
struct Names {
    busybox: String,
    userland: String,
    kernel: String,
    initrd: String,
    agent: String,
    system: String,
}

impl Names {
    fn new(digest: &str) -> Result<Self> {
        let name = |name: &str| -> Result<String> {
            let digest = tool::digest(&[digest.as_bytes(), name.as_bytes()])?;
            Ok(format!("{}-{name}", store_hash(&digest)))
        };
        Ok(Self {
            busybox: name("busybox-static")?,
            userland: name("debian-userland")?,
            kernel: name("linux")?,
            initrd: name("initrd")?,
            agent: name("test-agent")?,
            system: name("nixos-system-guest")?,
        })
    }

    /// Makes all store paths but the userland's in `folder`.
    fn lay_out(&self, folder: &Path, busybox: &Path, kernel: &Path, initrd: &Path) -> Result<()> {
        let absolute = |name: &str| format!("/nix/store/{name}");

        let programs = folder.join(&self.busybox).join("bin");
        fs::create_dir_all(&programs)?;
        fs::copy(busybox, programs.join("busybox"))?;
        for command in ["sh", "mkdir", "chmod", "ln", "mount", "tr", "cat"] {
            symlink("busybox", programs.join(command))?;
        }

        for (name, file, source) in
            [(&self.kernel, "bzImage", kernel), (&self.initrd, "initrd", initrd)]
        {
            fs::create_dir_all(folder.join(name))?;
            fs::copy(source, folder.join(name).join(file))?;
        }

        let agent = folder.join(&self.agent);
        fs::create_dir_all(&agent)?;
        write_program(&agent.join("agent"), AGENT)?;
        let command = format!("{}/bin/sh {}/agent", absolute(&self.busybox), absolute(&self.agent));
        fs::write(agent.join("command"), command)?;

        let system = folder.join(&self.system);
        fs::create_dir_all(&system)?;
        let init = STAGE_2
            .replace("@busybox@", &absolute(&self.busybox))
            .replace("@userland@", &absolute(&self.userland))
            .replace("@system@", &absolute(&self.system));
        write_program(&system.join("init"), &init)?;
        fs::write(system.join("kernel-params"), KERNEL_PARAMETERS)?;
        fs::write(system.join("system"), "x86_64-linux")?;
        let userland = absolute(&self.userland);
        symlink(absolute(&self.kernel) + "/bzImage", system.join("kernel"))?;
        symlink(absolute(&self.initrd) + "/initrd", system.join("initrd"))?;
        symlink(format!("{userland}/usr"), system.join("systemd"))?;
        symlink(format!("{userland}/usr"), system.join("sw"))?;
        Ok(symlink(format!("{userland}/etc"), system.join("etc"))?)
    }
}

fn initrd(cache: &Cache, kernel: &Kernel) -> Result<PathBuf> {
    let busybox = packages::busybox(cache)?;
    let names = [&MODULES[..], &MORE_MODULES].concat();
    let modules = names.concat();
    let inputs = [&kernel.release, STAGE_1, &modules, archive::SOURCE].map(str::as_bytes);
    let folder = cache.entry("nixos-initrd", &inputs, |folder| {
        let mut archive = Archive::new();
        archive.busybox(&busybox)?;
        archive.program("init", STAGE_1.as_bytes());
        kernel.install_modules(&mut archive, &names, &[])?;
        Ok(fs::write(folder.join("initrd"), archive.finish())?)
    })?;
    Ok(folder.join("initrd"))
}

/// A tar of the userland's file system.
fn userland(cache: &Cache) -> Result<PathBuf> {
    let codename = packages::codename();
    let inputs = [codename.as_bytes(), PACKAGES.as_bytes(), b"1"];
    let folder = cache.entry("userland", &inputs, |folder| {
        packages::require(&[Program::Mmdebstrap])?;
        progress("installing Debian packages into the NixOS-shaped guest (about a minute)");
        let mut command = tool::command(Program::Mmdebstrap.name());
        command
            .args(["--quiet", "--variant=essential", &format!("--include={PACKAGES}")])
            .args(
                ["doc", "man", "locale", "info"]
                    .map(|name| format!("--dpkgopt=path-exclude=/usr/share/{name}/*")),
            )
            .arg(r#"--customize-hook=echo root:root | chroot "$1" chpasswd"#)
            .arg(&codename)
            .arg(folder.join("userland.tar"));
        let own = ["/etc/apt/sources.list.d/debian.sources", "/etc/apt/sources.list"];
        command.args(own.iter().find(|path| Path::new(path).is_file()));
        tool::finish(&mut command).map(drop)
    })?;
    Ok(folder.join("userland.tar"))
}

/// Runs the script that makes the images; files of the guest belong to its root, so it runs as root
/// or as what looks like it in a user namespace.
fn assemble(userland: &Path, name: &str, input: &Path, out: &Path) -> Result<()> {
    let script = out.join("assemble");
    write_program(&script, ASSEMBLE)?;
    let mut command = match geteuid().is_root() {
        true => tool::command("sh"),
        false => {
            let mut command = tool::command("unshare");
            command.args(["--map-root-user", "--map-auto", "sh"]);
            command
        }
    };
    let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default());
    command.env("PATH", path).arg(&script).arg(userland).arg(name).arg(input).arg(out);
    tool::finish(&mut command).context("the store images cannot be made")?;
    Ok(fs::remove_file(script)?)
}

/// The first 160 bits of a hexadecimal `digest` in the 32 letters with which Nix writes hashes.
fn store_hash(digest: &str) -> String {
    const LETTERS: &[u8; 32] = b"0123456789abcdfghijklmnpqrsvwxyz";
    let digits = digest.chars().filter_map(|digit| digit.to_digit(16));
    let bits: Vec<usize> =
        digits.flat_map(|digit| (0..4).rev().map(move |bit| (digit >> bit & 1) as usize)).collect();
    let letter = |bits: &[usize]| bits.iter().fold(0, |value, bit| value * 2 + bit);
    bits.chunks(5).take(32).map(|bits| char::from(LETTERS[letter(bits)])).collect()
}

fn write_program(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text)?;
    Ok(fs::set_permissions(path, fs::Permissions::from_mode(0o755))?)
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn a_store_hash_has_32_letters_of_nix_alphabet() {
        assert_eq!(store_hash(&"0".repeat(64)), "0".repeat(32));
        assert_eq!(store_hash(&"f".repeat(64)), "z".repeat(32));
        assert_eq!(store_hash(&format!("08421{}", "0".repeat(59)))[..4], *"1111");
    }
}
