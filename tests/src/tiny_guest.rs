//! What is the smallest guest that answers? A kernel and an initramfs with busybox, modules and the
//! agent: it is up in seconds even in an emulated host, and most tests need no more.

use std::fs;
use std::path::PathBuf;

use anyhow::Result;

use crate::archive::{self, Archive};
use crate::cache::Cache;
use crate::kernel::Kernel;
use crate::packages;

/// The test agent, which the larger guest has as well.
pub const AGENT: &str = include_str!("../../resources/guest/agent.sh");

const INIT: &str = include_str!("../../resources/guest/tiny-init.sh");

/// The modules of guests: every device a test boots with, the file systems of its disks, what
/// systemd wants, the power button, and how a panic is told.
pub const MODULES: [&str; 15] = [
    "virtio_pci",
    "virtio_mmio",
    "virtio_console",
    "virtio_blk",
    "virtio_net",
    "virtio_rng",
    "vmw_vsock_virtio_transport",
    "virtio_balloon",
    "erofs",
    "squashfs",
    "overlay",
    "autofs4",
    "button",
    "evdev",
    "pvpanic_mmio",
];

/// Modules that the tiny guest loads where a test asks for them: `sh /modules/more`.
const MORE_MODULES: [&str; 6] =
    ["virtio_mem", "virtio_pmem", "nd_pmem", "dax_pmem", "wdat_wdt", "virtiofs"];

/// The initramfs of the tiny guest for `kernel`.
///
/// # Errors
/// When busybox cannot be fetched or a module cannot be read.
pub fn initramfs(cache: &Cache, kernel: &Kernel) -> Result<PathBuf> {
    let busybox = packages::busybox(cache)?;
    let modules = [MODULES.concat(), MORE_MODULES.concat()].concat();
    let inputs = [&kernel.release, INIT, AGENT, &modules, archive::SOURCE].map(str::as_bytes);
    let folder = cache.entry("tiny-guest", &inputs, |folder| {
        let mut archive = Archive::new();
        archive.busybox(&busybox)?;
        archive.program("bin/agent", AGENT.as_bytes());
        archive.program("init", INIT.as_bytes());
        kernel.install_modules(&mut archive, &MODULES, &[])?;
        let mut more = String::new();
        let loaded = kernel.load_order(&MODULES)?;
        for module in kernel.load_order(&MORE_MODULES)? {
            if loaded.iter().any(|other| other.name == module.name) {
                continue;
            }
            let path = format!("modules/{}.ko", module.name);
            archive.file(&path, &module.content);
            more += &format!("insmod /{path}\n");
        }
        archive.file("modules/more", more.as_bytes());
        Ok(fs::write(folder.join("initramfs"), archive.finish())?)
    })?;
    Ok(folder.join("initramfs"))
}
