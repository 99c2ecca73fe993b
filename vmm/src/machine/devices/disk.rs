//! Disks: each has a thread of its own.

use anyhow::{Context as _, Result};
use devices::event::LoopHandle;
use devices::host::disk::Engine;
use devices::host::disk::image::{Access, Image};
use devices::virtio::block::{Block, BlockOptions, Resizer};
use devices::virtio::device::VirtioDevice;

use super::Site;
use crate::config::{self, Disk};
use crate::loop_thread::LoopThread;
use crate::sandbox::ThreadKind;

/// A disk as control clients know it.
pub(crate) struct Handle {
    /// Its serial, or its place among the disks where it has none.
    pub(crate) name: String,
    /// What gives it another size.
    pub(crate) resizer: Resizer,
}

/// Makes all disks; `threads` are those of their workers, and `handles` are theirs too.
pub(super) fn add(
    site: &Site<'_>,
    devices: &mut Vec<Box<dyn VirtioDevice>>,
    threads: &mut Vec<LoopThread>,
    handles: &mut Vec<Handle>,
) -> Result<()> {
    for (index, disk) in site.config.disks.iter().enumerate() {
        let sandbox = site.sandbox.clone();
        let thread = LoopThread::spawn(&format!("disk{index}"), move || {
            sandbox.enter_thread(ThreadKind::Block)
        })?;
        let block = block_device(disk, site.config.cpus, thread.handle())?;
        let name = disk.serial.clone().unwrap_or_else(|| format!("disk{index}"));
        handles.push(Handle { name, resizer: block.resizer() });
        devices.push(Box::new(block));
        threads.push(thread);
    }
    Ok(())
}

/// A disk with a queue for each processor.
fn block_device(disk: &Disk, processors: u32, home: LoopHandle) -> Result<Block> {
    let access = Access { read_only: disk.readonly, direct: disk.direct };
    let flag = match disk.serial.as_deref() {
        Some(config::ROOT_SERIAL) => "--root",
        _ => "--disk",
    };
    let image = Image::open(&disk.path, access).context(flag)?;
    let options = BlockOptions {
        image,
        serial: disk.serial.clone().unwrap_or_default(),
        engine: match disk.engine {
            config::Engine::Auto => Engine::Auto,
            config::Engine::Uring => Engine::Uring,
            config::Engine::Sync => Engine::Sync,
        },
        queues: u16::try_from(processors).unwrap_or(u16::MAX),
    };
    Block::new(options, home).with_context(|| format!("{flag} {}", disk.path.display()))
}
