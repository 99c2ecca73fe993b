//! The socket device and what is behind it: unix sockets or the host's kernel.

use std::io::ErrorKind;
use std::path::Path;

use anyhow::{Context as _, Result, anyhow, bail};
use devices::host::vhost::kernel::{self, KernelVhost};
use devices::host::vsock::Gate;
use devices::virtio::device::VirtioDevice;
use devices::virtio::vhost::KernelRings;
use devices::virtio::vsock::Vsock;

use super::Site;
use crate::loop_thread::LoopThread;
use crate::sandbox::ThreadKind;

/// The guest's context id behind a unix socket, where nothing depends on it.
const UNIX_CID: u32 = 3;

/// Context ids that are tried until one is free, from the first that a guest can have.
const FREE_CIDS: std::ops::Range<u32> = 3..3 + 4096;

/// Makes the device, if there is to be one; `threads` are those of workers.
pub(super) fn add(
    site: &Site<'_>,
    devices: &mut Vec<Box<dyn VirtioDevice>>,
    threads: &mut Vec<LoopThread>,
) -> Result<()> {
    let Some(vsock) = &site.config.vsock else { return Ok(()) };
    let device = match &vsock.socket {
        Some(path) => behind_socket(site, vsock.cid.unwrap_or(UNIX_CID), path, threads)?,
        None => behind_kernel(site, vsock.cid)?,
    };
    devices.push(Box::new(device));
    Ok(())
}

/// A thread of its own: it may connect to sockets, which no other thread can.
fn behind_socket(
    site: &Site<'_>,
    cid: u32,
    path: &Path,
    threads: &mut Vec<LoopThread>,
) -> Result<Vsock> {
    let gate = Gate::at(path).with_context(|| format!("--vsock {}", path.display()))?;
    let sandbox = site.sandbox.clone();
    let thread = LoopThread::spawn("vsock", move || sandbox.enter_thread(ThreadKind::Vsock))?;
    let device = Vsock::new(cid, gate, thread.handle());
    threads.push(thread);
    Ok(device)
}

fn behind_kernel(site: &Site<'_>, cid: Option<u32>) -> Result<Vsock> {
    let vhost = KernelVhost::open(kernel::VSOCK, site.memory).map_err(|error| {
        anyhow!(error).context(format!(
            "--vsock: {} cannot be used: load the module vhost_vsock and give this user access, \
             or give socket=PATH, which needs neither",
            kernel::VSOCK
        ))
    })?;
    let cid = match cid {
        Some(cid) => take_cid(&vhost, cid)?,
        None => take_free_cid(&vhost)?,
    };
    log::info!("--vsock: the guest has context id {cid}");
    let features = vhost.features();
    Ok(Vsock::in_kernel(cid, features, KernelRings::vsock(vhost), site.main_loop.handle()))
}

fn take_cid(vhost: &KernelVhost, cid: u32) -> Result<u32> {
    match vhost.set_guest_cid(cid.into()) {
        Ok(()) => Ok(cid),
        Err(error) if error.kind() == ErrorKind::AddrInUse => {
            bail!("--vsock cid={cid}: another guest has it: choose another one, or cid=auto")
        }
        Err(error) => Err(anyhow!(error).context(format!("--vsock cid={cid}"))),
    }
}

fn take_free_cid(vhost: &KernelVhost) -> Result<u32> {
    for cid in FREE_CIDS {
        match vhost.set_guest_cid(cid.into()) {
            Ok(()) => return Ok(cid),
            Err(error) if error.kind() == ErrorKind::AddrInUse => {}
            Err(error) => return Err(anyhow!(error).context(format!("--vsock cid={cid}"))),
        }
    }
    bail!(
        "--vsock: context ids {} to {} are all in use: give cid=N",
        FREE_CIDS.start,
        FREE_CIDS.end - 1
    )
}
