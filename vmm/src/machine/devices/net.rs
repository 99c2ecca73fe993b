//! Network cards and what moves their frames.

use std::sync::Arc;

use anyhow::{Context as _, Result, bail};
use devices::event::Registration;
use devices::host::tap::{Queues, Tap};
use devices::virtio::device::VirtioDevice;
use devices::virtio::net::backend::Backend;
use devices::virtio::net::tap::{LinkMonitor, TapBackend};
use devices::virtio::net::{Net, NetHandle, NetOptions};

use super::Site;
use crate::config::{self, DEFAULT_QUEUE_PAIRS_MAX, NetLink};
use crate::loop_thread::LoopThread;
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

/// Makes all cards; `threads` are those of their workers.
pub(super) fn add(
    site: &mut Site<'_>,
    devices: &mut Vec<Box<dyn VirtioDevice>>,
    threads: &mut Vec<LoopThread>,
    cards: &mut Vec<Card>,
) -> Result<()> {
    for (index, net) in site.config.nets.iter().enumerate() {
        let name = format!("net{index}");
        let path = open(site, net, &name, threads)
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
    threads: &mut Vec<LoopThread>,
) -> Result<Path> {
    match &net.link {
        NetLink::Tap(_) | NetLink::Descriptors(_) | NetLink::Macvtap(_) => {
            let tap = Arc::new(open_tap(site, net)?);
            let is_macvtap = matches!(net.link, NetLink::Macvtap(_));
            let mac = if is_macvtap { tap.address() } else { None };
            let homes = spawn_threads(site, name, tap.queues().len(), threads)?;
            Ok(Path {
                mac,
                mtu: tap.mtu(),
                backend: Box::new(TapBackend::new(name, Arc::clone(&tap), homes)?),
                tap: Some(tap),
            })
        }
        NetLink::User | NetLink::VhostUser(_) => bail!("vhost-user cannot be used yet"),
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
    if let Some(mtu) = net.mtu {
        tap.set_mtu(mtu)?;
    }
    Ok(tap)
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
