//! Persistent memory: files that the guest has in its memory.

use std::sync::Arc;

use anyhow::{Context as _, Result};
use arch::target::layout;
use devices::host::file_window::FileWindow;
use devices::virtio::device::VirtioDevice;
use devices::virtio::pmem::Pmem;

use super::Site;
use crate::config;
use crate::loop_thread::LoopThread;
use crate::sandbox::ThreadKind;

/// Makes all persistent memory; `threads` are those of the files that are written to.
pub(super) fn add(
    site: &mut Site<'_>,
    devices: &mut Vec<Box<dyn VirtioDevice>>,
    threads: &mut Vec<LoopThread>,
) -> Result<()> {
    for (index, pmem) in site.config.pmems.iter().enumerate() {
        let device = pmem_device(site, &format!("pmem{index}"), pmem, threads);
        devices.push(device.with_context(|| format!("--pmem {}", pmem.file.display()))?);
    }
    Ok(())
}

fn pmem_device(
    site: &mut Site<'_>,
    name: &str,
    pmem: &config::Pmem,
    threads: &mut Vec<LoopThread>,
) -> Result<Box<dyn VirtioDevice>> {
    let window = FileWindow::open(&pmem.file, pmem.readonly)?;
    let range = site.plan.take_memory_window(window.len(), layout::PMEM_ALIGNMENT)?;
    site.vm.connect_window(range.start, &window)?;
    let home = if pmem.readonly {
        site.main_loop.handle()
    } else {
        // A flush waits for the disk below the file.
        let sandbox = site.sandbox.clone();
        let thread = LoopThread::spawn(name, move || sandbox.enter_thread(ThreadKind::Block))?;
        let home = thread.handle();
        threads.push(thread);
        home
    };
    Ok(Box::new(Pmem::new(name.to_owned(), Arc::new(window), range.start, home)))
}
