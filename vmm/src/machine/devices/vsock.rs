//! The socket device and what is behind it: unix sockets or the host's kernel.

use std::io::ErrorKind;
use std::path::Path;

use anyhow::{Context as _, Result, anyhow, bail};
use devices::event::Registration;
use devices::host::vhost::kernel::{self, KernelVhost};
use devices::host::vsock::Gate;
use devices::host::vsock_listener::VsockListener;
use devices::virtio::device::VirtioDevice;
use devices::virtio::vhost::KernelRings;
use devices::virtio::vsock::Vsock;

use super::Site;
use crate::config::{NOTIFY_SOCKET_CREDENTIAL, Ready};
use crate::loop_thread::LoopThread;
use crate::notify::{GuestMessages, Relay};
use crate::sandbox::ThreadKind;

/// The guest's context id behind a unix socket, where nothing depends on it.
const UNIX_CID: u32 = 3;

/// Context ids that are tried until one is free, from the first that a guest can have.
const FREE_CIDS: std::ops::Range<u32> = 3..3 + 4096;

/// The host's context id.
const HOST_CID: u32 = 2;

/// The port of the host that this process serves itself behind a unix socket, for the guest's
/// systemd: far from what programs choose.
const NOTIFY_PORT: u32 = 0x6e78_766d;

/// Where messages of the guest's systemd come from, and the port that it sends them to.
type Messages = (GuestMessages, u32);

/// What is kept of the device after it is on its bus.
#[derive(Default)]
pub(super) struct Socket {
    /// What hears the guest's systemd.
    _relay: Option<Registration>,
    /// The guest's context id, which may have been chosen here.
    pub(super) context_id: Option<u32>,
}

/// Makes the device, if there is to be one; `threads` are those of workers.
pub(super) fn add(
    site: &mut Site<'_>,
    devices: &mut Vec<Box<dyn VirtioDevice>>,
    threads: &mut Vec<LoopThread>,
) -> Result<Socket> {
    let Some(vsock) = &site.config.vsock else { return Ok(Socket::default()) };
    let (device, messages) = match &vsock.socket {
        Some(path) => behind_socket(site, vsock.cid.unwrap_or(UNIX_CID), path, threads)?,
        None => behind_kernel(site, vsock.cid)?,
    };
    let context_id = u32::try_from(device.context_id()).ok();
    devices.push(Box::new(device));
    let Some((messages, port)) = messages else { return Ok(Socket { _relay: None, context_id }) };
    let address = format!("vsock-stream:{HOST_CID}:{port}");
    site.plan.add_credential(NOTIFY_SOCKET_CREDENTIAL, &address);
    let (notifier, endings) = (site.notifier.clone(), site.endings.clone());
    let relay = Relay::new(messages, site.config, notifier, endings);
    let relay = site.main_loop.add(Box::new(relay))?;
    Ok(Socket { _relay: Some(relay), context_id })
}

/// Whether the guest's systemd is told to report: somebody wants to know, and it does not report
/// elsewhere.
fn wants_messages(site: &Site<'_>) -> bool {
    (site.notifier.is_heard() || site.config.ready != Ready::Started)
        && !site.config.has_credential(NOTIFY_SOCKET_CREDENTIAL)
}

/// A thread of its own: it may connect to sockets, which no other thread can.
fn behind_socket(
    site: &Site<'_>,
    cid: u32,
    path: &Path,
    threads: &mut Vec<LoopThread>,
) -> Result<(Vsock, Option<Messages>)> {
    let mut gate = Gate::at(path).with_context(|| format!("--vsock {}", path.display()))?;
    let messages = match wants_messages(site) {
        true => Some((GuestMessages::Device(gate.serve_locally(NOTIFY_PORT)?), NOTIFY_PORT)),
        false => None,
    };
    let sandbox = site.sandbox.clone();
    let thread = LoopThread::spawn("vsock", move || sandbox.enter_thread(ThreadKind::Vsock))?;
    let device = Vsock::new(cid, gate, thread.handle());
    threads.push(thread);
    Ok((device, messages))
}

fn behind_kernel(site: &Site<'_>, cid: Option<u32>) -> Result<(Vsock, Option<Messages>)> {
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
    let messages = match wants_messages(site) {
        true => {
            let listener = VsockListener::new().context("--vsock: no port for the guest")?;
            let port = listener.port();
            Some((GuestMessages::Host { listener, cid }, port))
        }
        false => None,
    };
    let features = vhost.features();
    let rings = KernelRings::vsock(vhost);
    Ok((Vsock::in_kernel(cid, features, rings, site.main_loop.handle()), messages))
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
