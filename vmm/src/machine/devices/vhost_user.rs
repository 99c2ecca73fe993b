//! Devices that a process serves.

use std::path::Path;

use anyhow::{Context as _, Result};
use devices::event::LoopHandle;
use devices::host::vhost::user::UserVhost;
use devices::virtio::net::vhost::VhostBackend;
use devices::virtio::vhost::UserRings;

use super::Site;
use crate::loop_thread::LoopThread;
use crate::machine::passt::{self, Passt};
use crate::sandbox::ThreadKind;

/// A card of the process that listens at `socket`, with up to `pairs` queue pairs.
pub(super) fn listening(
    site: &Site<'_>,
    name: &str,
    socket: &Path,
    pairs: u16,
    threads: &mut Vec<LoopThread>,
) -> Result<VhostBackend<UserRings>> {
    let [home, watch] = spawn(site, name, threads)?;
    let vhost = UserVhost::connect(socket, 2 * u64::from(pairs), watch)
        .context("no vhost-user process serves this socket")?;
    let (card, process) = (name.to_owned(), socket.display().to_string());
    let happenings = site.happenings.clone();
    let on_loss = move || happenings.process_lost(&card, &process, None);
    Ok(VhostBackend::user(name, vhost, pairs, home, on_loss))
}

/// A card of a passt of our own.
pub(super) fn passt(
    site: &Site<'_>,
    name: &str,
    passt: Passt,
    threads: &mut Vec<LoopThread>,
) -> Result<VhostBackend<UserRings>> {
    let [home, watch] = spawn(site, name, threads)?;
    let (vhost, mut child) = passt.connect(watch)?;
    let (card, happenings) = (name.to_owned(), site.happenings.clone());
    let on_loss = move || passt::report_end(&card, &mut child, &happenings);
    Ok(VhostBackend::user(name, vhost, 1, home, on_loss))
}

/// The thread that speaks to a process, and the one that watches the time meanwhile.
pub(super) fn spawn(
    site: &Site<'_>,
    name: &str,
    threads: &mut Vec<LoopThread>,
) -> Result<[LoopHandle; 2]> {
    let mut spawn = |name: &str| -> Result<LoopHandle> {
        let sandbox = site.sandbox.clone();
        let thread = LoopThread::spawn(name, move || sandbox.enter_thread(ThreadKind::VhostUser))?;
        let handle = thread.handle();
        threads.push(thread);
        Ok(handle)
    };
    Ok([spawn(name)?, spawn(&format!("{name}-watch"))?])
}
