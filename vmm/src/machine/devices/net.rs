//! Network cards and what moves their frames.

use anyhow::{Context as _, Result, bail};
use devices::virtio::device::VirtioDevice;
use devices::virtio::net::backend::Backend;
use devices::virtio::net::{Net, NetHandle, NetOptions};

use super::Site;
use crate::config::{self, NetLink};
use crate::loop_thread::LoopThread;

/// What a card's frames take, and what that says about the card.
struct Path {
    backend: Box<dyn Backend>,
    /// The address that the host's end insists on.
    mac: Option<[u8; 6]>,
    /// The largest packet that the host's end takes.
    mtu: Option<u16>,
}

/// Makes all cards; `threads` are those of their workers, and `handles` are theirs too.
pub(super) fn add(
    site: &Site<'_>,
    devices: &mut Vec<Box<dyn VirtioDevice>>,
    threads: &mut Vec<LoopThread>,
    handles: &mut Vec<NetHandle>,
) -> Result<()> {
    for (index, net) in site.config.nets.iter().enumerate() {
        let name = format!("net{index}");
        let path = open(site, net, &name, threads)
            .with_context(|| format!("--net {}", net.link.name()))?;
        let mac = net.mac.map(|mac| mac.0).or(path.mac).unwrap_or_default();
        let options = NetOptions { name, mac, mtu: net.mtu.or(path.mtu), backend: path.backend };
        let card = Net::new(options, site.main_loop.handle());
        handles.push(card.handle());
        devices.push(Box::new(card));
    }
    Ok(())
}

/// Opens the path of a card; workers that it needs are added to `threads`.
fn open(
    _site: &Site<'_>,
    net: &config::Net,
    _name: &str,
    _threads: &mut Vec<LoopThread>,
) -> Result<Path> {
    match net.link {
        NetLink::Tap(_) | NetLink::Descriptors(_) | NetLink::Macvtap(_) => {
            bail!("a tap cannot be used yet")
        }
        NetLink::User | NetLink::VhostUser(_) => bail!("vhost-user cannot be used yet"),
    }
}
