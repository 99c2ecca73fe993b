//! What is an initramfs? A cpio archive in the `newc` format (the kernel's
//! Documentation/driver-api/early-userspace/buffer-format.rst), written here so that no root is
//! needed for its device nodes and the same inputs give the same bytes.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

const REGULAR: u32 = 0o100_000;
const FOLDER: u32 = 0o040_000;
const LINK: u32 = 0o120_000;
const CHARACTER_DEVICE: u32 = 0o020_000;

/// What an archive of these sources contains depends on them: an input of everything cached.
pub const SOURCE: &str = include_str!("archive.rs");

/// Busybox is called by these names in initramfs.
const COMMANDS: &str = "sh awk base64 blkdiscard blkid cat chmod cmp cp cut date dd devmem df \
    dmesg echo env false findfs free grep head hexdump hostname id insmod \
    ip kill ls lsmod md5sum mkdir mknod mount mv nproc od poweroff printf \
    ps pwd readlink reboot rm sed seq setsid sh sha256sum sleep sort stat \
    stty switch_root sync tail taskset tee test timeout touch tr true \
    truncate umount uname uniq uptime wc xargs yes";

/// An archive under construction.
#[derive(Debug, Default)]
pub struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

impl Archive {
    /// An archive with folders for the kernel's file systems, and a console and a null device to
    /// use before they are mounted.
    pub fn new() -> Self {
        let mut archive = Self::default();
        for folder in ["bin", "dev", "proc", "sys", "run", "tmp", "mnt"] {
            archive.folder(folder);
        }
        archive.append("dev/console", CHARACTER_DEVICE | 0o600, (5, 1), &[]);
        // Rust's start-up opens it in place of a console that is not there yet.
        archive.append("dev/null", CHARACTER_DEVICE | 0o666, (1, 3), &[]);
        archive
    }

    /// Adds busybox and a link for each of its commands that the scripts of the testbed use.
    ///
    /// # Errors
    /// When `busybox` cannot be read.
    pub fn busybox(&mut self, busybox: &Path) -> Result<()> {
        let content = fs::read(busybox).with_context(|| busybox.display().to_string())?;
        self.program("bin/busybox", &content);
        for command in COMMANDS.split_whitespace() {
            self.link(&format!("bin/{command}"), "busybox");
        }
        Ok(())
    }

    /// Adds an empty folder.
    pub fn folder(&mut self, path: &str) {
        self.append(path, FOLDER | 0o755, (0, 0), &[]);
    }

    /// Adds a file that can be executed.
    pub fn program(&mut self, path: &str, content: &[u8]) {
        self.append(path, REGULAR | 0o755, (0, 0), content);
    }

    /// Adds a file.
    pub fn file(&mut self, path: &str, content: &[u8]) {
        self.append(path, REGULAR | 0o644, (0, 0), content);
    }

    /// Adds a symbolic link.
    pub fn link(&mut self, path: &str, target: &str) {
        self.append(path, LINK | 0o777, (0, 0), target.as_bytes());
    }

    /// The finished archive.
    pub fn finish(mut self) -> Vec<u8> {
        self.append("TRAILER!!!", 0, (0, 0), &[]);
        self.bytes
    }

    fn append(&mut self, path: &str, mode: u32, device: (u32, u32), content: &[u8]) {
        self.entries += 1;
        let size = u32::try_from(content.len()).expect("a file of an initramfs is below 4 GiB");
        let name_size = u32::try_from(path.len() + 1).expect("a path is short");
        let (major, minor) = device;
        let fields = [self.entries, mode, 0, 0, 1, 0, size, 0, 0, major, minor, name_size, 0];
        let mut header = String::from("070701");
        for field in fields {
            write!(header, "{field:08x}").expect("writing to a string does not fail");
        }
        self.bytes.extend(header.as_bytes());
        self.bytes.extend(path.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}
