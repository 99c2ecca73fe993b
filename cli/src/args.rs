//! The command line: flags as typed, and what they make of a [`Config`].

use std::path::PathBuf;

use clap::Parser;
use vmm::config::{ByteSize, Config, Disk, Memory};

/// A virtual machine monitor for lightweight NixOS guests.
#[derive(Debug, Parser)]
#[command(version)]
pub(crate) struct Args {
    /// Kernel to boot: a bzImage or an ELF vmlinux.
    #[arg(long, value_name = "FILE")]
    kernel: PathBuf,
    /// Initial RAM disk.
    #[arg(long, value_name = "FILE")]
    initrd: Option<PathBuf>,
    /// Kernel command line.
    #[arg(long, default_value = "")]
    cmdline: String,
    /// Read-only file system image that becomes the first disk.
    #[arg(long, value_name = "FILE")]
    root: Option<PathBuf>,
    /// A further disk.
    #[arg(long, value_name = "FILE")]
    disk: Vec<PathBuf>,
    /// Number of virtual processors.
    #[arg(long, default_value_t = 1)]
    cpus: u32,
    /// RAM of the guest.
    #[arg(long, default_value = "512M")]
    memory: ByteSize,
}

impl Args {
    pub(crate) fn into_config(self) -> Config {
        Config {
            kernel: self.kernel,
            initrd: self.initrd,
            cmdline: self.cmdline,
            root: self.root,
            disks: self.disk.into_iter().map(Disk::new).collect(),
            cpus: self.cpus,
            memory: Memory { size: self.memory, ..Memory::default() },
            ..Config::default()
        }
    }
}
