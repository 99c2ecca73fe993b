//! On what ground do the VMMs run? A root in the emulated host's memory with their programs, their
//! libraries and the guest's files, so that no measurement waits for the file system of the machine
//! around.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::Plan;
use crate::packages::Program;
use crate::tool;

/// Where QEMU looks for its firmware.
const FIRMWARE: [&str; 2] = ["/usr/share/qemu", "/usr/share/seabios"];

/// The files of the guest, as the VMMs name them. They are files of ext4, as kernels and disks are,
/// and all of them are in the page cache.
pub const DISK: &str = "/volume/disk.raw";
/// Debian's kernel.
pub const BZIMAGE: &str = "/volume/bzImage";
/// The ELF inside it.
pub const VMLINUX: &str = "/volume/vmlinux";
/// The initramfs.
pub const INITRD: &str = "/volume/initrd";
/// The same with the drivers of every device.
pub const INITRD_OF_DEVICES: &str = "/volume/initrd-of-devices";
/// An image for a device of persistent memory.
pub const PERSISTENT: &str = "/volume/persistent.raw";
const DISK_MIB: usize = 256;
const PERSISTENT_MIB: usize = 16;
const VOLUME: &str = "448M";

/// A root for [`chroot`](https://man7.org/linux/man-pages/man1/chroot.1.html).
pub struct Stage {
    /// Its path.
    pub root: PathBuf,
}

impl Stage {
    /// Fills `root`, which is on a tmpfs.
    ///
    /// # Errors
    /// When a file cannot be copied or a file system cannot be mounted.
    pub fn set(root: &Path, plan: &Plan) -> Result<Self> {
        let stage = Self { root: root.to_owned() };
        for folder in ["dev", "proc", "sys", "tmp", "volume"] {
            fs::create_dir_all(root.join(folder))?;
        }
        for folder in ["dev", "proc", "sys"] {
            let source = Path::new("/").join(folder);
            rustix::mount::mount_bind_recursive(&source, root.join(folder))?;
        }
        let programs = [&plan.programs.nixvmm, &plan.programs.qemu, &plan.programs.alioth];
        for program in programs {
            stage.copy(program)?;
            for library in libraries(program)? {
                stage.copy(&library)?;
            }
        }
        stage.copy(&plan.busybox)?;
        for folder in FIRMWARE {
            stage.copy_folder(Path::new(folder))?;
        }
        stage.make_volume()?;
        for (file, name) in [
            (&plan.bzimage, BZIMAGE),
            (&plan.vmlinux, VMLINUX),
            (&plan.initrd, INITRD),
            (&plan.initrd_of_devices, INITRD_OF_DEVICES),
        ] {
            fs::copy(file, stage.path(Path::new(name))?)?;
        }
        Ok(stage)
    }

    /// Where the copy of `file` is.
    ///
    /// # Errors
    /// When `file` is no absolute path.
    pub fn path(&self, file: &Path) -> Result<PathBuf> {
        Ok(self.root.join(file.strip_prefix("/")?))
    }

    fn copy(&self, file: &Path) -> Result<()> {
        let target = self.path(file)?;
        fs::create_dir_all(target.parent().context("a file is in a folder")?)?;
        fs::copy(file, &target).with_context(|| format!("{} cannot be copied", file.display()))?;
        Ok(())
    }

    fn copy_folder(&self, folder: &Path) -> Result<()> {
        for entry in fs::read_dir(folder).with_context(|| folder.display().to_string())? {
            let path = entry?.path();
            if path.is_file() {
                self.copy(&path)?;
            }
        }
        Ok(())
    }

    fn make_volume(&self) -> Result<()> {
        let image = self.root.join("volume.ext4");
        let options = ["-q", "-F", "-t", "ext4", "-E", "lazy_itable_init=0,lazy_journal_init=0"];
        let mut make = tool::command(Program::MakeExt4.name());
        tool::finish(make.args(options).arg(&image).arg(VOLUME))?;
        let mut mount = tool::command("mount");
        tool::finish(mount.args(["-o", "loop,noatime"]).arg(&image).arg(self.root.join("volume")))?;
        for (image, mebibytes) in [(DISK, DISK_MIB), (PERSISTENT, PERSISTENT_MIB)] {
            let mut image = File::create(self.path(Path::new(image))?)?;
            for _ in 0..mebibytes {
                image.write_all(&vec![0x5a; 1 << 20])?;
            }
            image.sync_all()?;
        }
        Ok(())
    }
}

/// The shared libraries that `program` loads.
fn libraries(program: &Path) -> Result<Vec<PathBuf>> {
    let mut command = tool::command("ldd");
    let output = command.arg(program).output().context("ldd cannot be started")?;
    let text = String::from_utf8(output.stdout)?;
    let words = text.split_whitespace().filter(|word| word.starts_with('/'));
    Ok(words.map(|word| PathBuf::from(word.trim_end_matches(':'))).collect())
}
