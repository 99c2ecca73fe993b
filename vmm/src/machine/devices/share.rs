//! Shares: file systems that other processes serve.

use anyhow::{Context as _, Result};
use devices::event::LoopHandle;
use devices::host::vhost::user::UserVhost;
use devices::virtio::device::VirtioDevice;
use devices::virtio::fs::{FileSystem, FileSystemOptions};

use super::{Site, vhost_user};
use crate::loop_thread::LoopThread;
use crate::machine::file_server::{self, FileServer};

/// Makes all of them, first those of processes that listen; `threads` are those that speak to them.
pub(super) fn add(
    site: &mut Site<'_>,
    devices: &mut Vec<Box<dyn VirtioDevice>>,
    threads: &mut Vec<LoopThread>,
) -> Result<()> {
    let config = site.config;
    for share in &config.shares {
        let Some(socket) = &share.socket else { continue };
        let context = || format!("--share tag={}", share.tag);
        let [home, watch] = spawn(site, devices.len(), threads).with_context(context)?;
        let options = options(site, &share.tag);
        let vhost =
            UserVhost::connect(socket, FileSystem::ring_count(options.request_queues), watch)
                .with_context(|| format!("no vhost-user process serves {}", socket.display()))
                .with_context(context)?;
        let (name, process) = (options.name.clone(), socket.display().to_string());
        let happenings = site.happenings.clone();
        let on_loss = move || happenings.process_lost(&name, &process, None);
        let device = FileSystem::new(options, vhost, home, on_loss).with_context(context)?;
        devices.push(Box::new(device));
    }
    for server in std::mem::take(&mut site.children.file_servers) {
        let context = format!("share \"{}\"", server.tag);
        let device = serve(site, server, devices.len(), threads).context(context)?;
        devices.push(Box::new(device));
    }
    Ok(())
}

/// The device of a child.
fn serve(
    site: &Site<'_>,
    server: FileServer,
    index: usize,
    threads: &mut Vec<LoopThread>,
) -> Result<FileSystem> {
    let [home, watch] = spawn(site, index, threads)?;
    let options = options(site, &server.tag);
    let (name, program) = (options.name.clone(), server.program.clone());
    let rings = FileSystem::ring_count(options.request_queues);
    let (vhost, mut child) = server.connect(rings, watch)?;
    let happenings = site.happenings.clone();
    let on_loss = move || file_server::report_end(&name, &program, &mut child, &happenings);
    Ok(FileSystem::new(options, vhost, home, on_loss)?)
}

/// The thread that speaks to a process, and the one that watches the time meanwhile.
fn spawn(site: &Site<'_>, index: usize, threads: &mut Vec<LoopThread>) -> Result<[LoopHandle; 2]> {
    vhost_user::spawn(site, &format!("share{index}"), threads)
}

/// A request queue for each processor, as far as the process has them.
fn options(site: &Site<'_>, tag: &str) -> FileSystemOptions {
    FileSystemOptions {
        name: format!("share {tag}"),
        tag: tag.to_owned(),
        request_queues: u16::try_from(site.config.cpus).unwrap_or(u16::MAX),
    }
}
