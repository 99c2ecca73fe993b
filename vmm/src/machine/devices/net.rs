//! Network cards and what moves their frames.

use std::io;
use std::sync::Arc;

use anyhow::{Context as _, Result};
use devices::event::Registration;
use devices::host::tap::{Queues, Tap};
use devices::host::vhost::kernel::{self, KernelVhost};
use devices::virtio::device::VirtioDevice;
use devices::virtio::net::backend::Backend;
use devices::virtio::net::tap::{LinkMonitor, TapBackend};
use devices::virtio::net::vhost::VhostBackend;
use devices::virtio::net::{Net, NetHandle, NetOptions};

use super::{Site, vhost_user};
use crate::config::{self, DEFAULT_QUEUE_PAIRS_MAX, NetLink, VhostNet};
use crate::loop_thread::LoopThread;
use crate::machine::passt::Passt;
use crate::sandbox::ThreadKind;

/// What is kept of a card after it is on its bus.
pub(crate) struct Card {
    /// What is asked of it at run time.
    pub(crate) handle: NetHandle,
    /// Tells it whether its interface is up.
    _monitor: Option<Registration>,
}

impl Card {
    /// Tells the log what went through the card.
    pub(crate) fn log_counts(&self) {
        let (sent, received) = self.handle.counts();
        log::debug!("{}: sent {sent}; received {received}", self.handle.name());
    }
}

/// What a card's frames take, and what that says about the card.
struct Path {
    backend: Box<dyn Backend>,
    /// The interface behind it, if it is one of this host.
    tap: Option<Arc<Tap>>,
    /// The address that the host's end insists on.
    mac: Option<[u8; 6]>,
    /// The largest packet that the host's end takes in bytes.
    mtu: Option<u16>,
}

impl Path {
    /// A path that begins and ends in another process.
    fn elsewhere(backend: impl Backend + 'static) -> Self {
        Self { backend: Box::new(backend), tap: None, mac: None, mtu: None }
    }
}

/// Makes all cards; `threads` are those of their workers.
pub(super) fn add(
    site: &mut Site<'_>,
    devices: &mut Vec<Box<dyn VirtioDevice>>,
    threads: &mut Vec<LoopThread>,
    cards: &mut Vec<Card>,
) -> Result<()> {
    let mut passts = std::mem::take(&mut site.children.passts).into_iter();
    for (index, net) in site.config.nets.iter().enumerate() {
        let name = format!("net{index}");
        let path = open(site, net, &name, &mut passts, threads)
            .with_context(|| format!("--net {}", net.link.name()))?;
        let mac = net.mac.map(|mac| mac.0).or(path.mac).unwrap_or_default();
        let mtu = net.mtu.or(path.mtu);
        let options = NetOptions { name: name.clone(), mac, mtu, backend: path.backend };
        let card = Net::new(options, site.main_loop.handle());
        let handle = card.handle();
        let monitor = path.tap.and_then(|tap| monitor(site, &name, &tap, &handle));
        cards.push(Card { handle, _monitor: monitor });
        devices.push(Box::new(card));
    }
    Ok(())
}

/// Opens the path of a card; threads that it needs are added to `threads`.
fn open(
    site: &Site<'_>,
    net: &config::Net,
    name: &str,
    passts: &mut impl Iterator<Item = Passt>,
    threads: &mut Vec<LoopThread>,
) -> Result<Path> {
    match &net.link {
        NetLink::Tap(_) | NetLink::Descriptors(_) | NetLink::Macvtap(_) => {
            let tap = Arc::new(open_tap(site, net)?);
            let backend: Box<dyn Backend> = match open_vhost(site, net, name, &tap)? {
                // Nothing is left to do here but to set it up.
                Some(vhost) => {
                    let home = site.main_loop.handle();
                    Box::new(VhostBackend::kernel(name, &tap, vhost, home))
                }
                None => {
                    let homes = spawn_threads(site, name, tap.queues().len(), threads)?;
                    Box::new(TapBackend::new(name, Arc::clone(&tap), homes)?)
                }
            };
            Ok(Path { mac: tap.guest_address(), mtu: tap.mtu(), backend, tap: Some(tap) })
        }
        NetLink::User => {
            let passt = passts.next().context("passt was not started")?;
            Ok(Path::elsewhere(vhost_user::passt(site, name, passt, threads)?))
        }
        NetLink::VhostUser(socket) => {
            let processors = u16::try_from(site.config.cpus).unwrap_or(u16::MAX);
            let pairs = net.queues.unwrap_or(processors.min(DEFAULT_QUEUE_PAIRS_MAX));
            let card = vhost_user::listening(site, name, socket, pairs, threads)?;
            Ok(Path::elsewhere(card))
        }
    }
}

fn open_tap(site: &Site<'_>, net: &config::Net) -> Result<Tap> {
    let processors = u16::try_from(site.config.cpus).unwrap_or(u16::MAX);
    let tap = match &net.link {
        NetLink::Tap(name) => {
            let queues = match net.queues {
                Some(queues) => Queues::Exactly(queues),
                None => Queues::UpTo(processors.min(DEFAULT_QUEUE_PAIRS_MAX)),
            };
            Tap::open(name, queues)?
        }
        link => Tap::inherit(link.descriptors())?,
    };
    if let Some(mac) = net.mac {
        tap.set_guest_address(mac.0)?;
    }
    if let Some(mtu) = net.mtu {
        tap.set_mtu(mtu)?;
    }
    Ok(tap)
}

/// vhost-net of the host's kernel, one device for each queue; `None` where this process moves the
/// frames.
fn open_vhost(
    site: &Site<'_>,
    net: &config::Net,
    name: &str,
    tap: &Tap,
) -> Result<Option<Vec<KernelVhost>>> {
    if net.vhost == VhostNet::Off {
        return Ok(None);
    }
    let open = |_| KernelVhost::open(kernel::NET, site.memory);
    match tap.queues().iter().map(open).collect::<io::Result<Vec<_>>>() {
        Ok(devices) => Ok(Some(devices)),
        Err(error) if net.vhost == VhostNet::Auto => {
            log::debug!("{name}: frames are moved here, because {} fails: {error}", kernel::NET);
            Ok(None)
        }
        Err(error) => Err(error).context(
            "vhost=on: /dev/vhost-net cannot be used: load the module vhost_net, give this user \
             access, or let vhost=auto choose",
        ),
    }
}

/// Threads for `pairs` queue pairs: one for each, but no more than there are processors to keep
/// them busy.
fn spawn_threads(
    site: &Site<'_>,
    name: &str,
    pairs: usize,
    threads: &mut Vec<LoopThread>,
) -> Result<Vec<devices::event::LoopHandle>> {
    let processors = usize::try_from(site.config.cpus).unwrap_or(usize::MAX);
    let mut homes = Vec::new();
    for index in 0..pairs.min(processors).max(1) {
        let sandbox = site.sandbox.clone();
        let thread = LoopThread::spawn(&format!("{name}-{index}"), move || {
            sandbox.enter_thread(ThreadKind::Net)
        })?;
        homes.push(thread.handle());
        threads.push(thread);
    }
    Ok(homes)
}

/// Watches the interface of a card, as far as it can be seen from here.
fn monitor(site: &mut Site<'_>, name: &str, tap: &Tap, handle: &NetHandle) -> Option<Registration> {
    let monitor = LinkMonitor::new(name, tap, handle.link());
    let added = monitor.and_then(|monitor| site.main_loop.add(Box::new(monitor)));
    added.inspect_err(|error| log::warn!("{name}: its interface cannot be watched: {error}")).ok()
}
