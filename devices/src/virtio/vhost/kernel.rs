//! Rings that a driver of the host's kernel serves.

use std::io;
use std::sync::Arc;

use arch::memory::{GuestAddress, GuestMemory, NotRam};

use super::{BackEnd, Exchange};
use crate::host::tap::Tap;
use crate::host::vhost::kernel::KernelVhost;

/// A driver of the host's kernel as a back end.
pub struct KernelRings {
    vhost: KernelVhost,
    outlet: Outlet,
}

/// What is behind the rings of a driver in the kernel.
enum Outlet {
    /// A tap and the index of one of its queues: ring 0 receives and ring 1 sends.
    Tap(Arc<Tap>, usize),
    /// The host's sockets.
    Vsock,
}

impl KernelRings {
    /// The rings of a network card's queue pair, in front of the queue of a tap at `index`.
    pub fn net(vhost: KernelVhost, tap: Arc<Tap>, index: usize) -> Self {
        Self { vhost, outlet: Outlet::Tap(tap, index) }
    }

    /// The receive and transmit rings of a socket device, whose guest has its address already.
    pub fn vsock(vhost: KernelVhost) -> Self {
        Self { vhost, outlet: Outlet::Vsock }
    }

    fn switch(&self, rings: &[usize], running: bool) -> io::Result<()> {
        match &self.outlet {
            Outlet::Tap(tap, index) => rings.iter().try_for_each(|ring| {
                let ring = u32::try_from(*ring).map_err(io::Error::other)?;
                let queue = tap.queues().get(*index).filter(|_| running);
                self.vhost.set_net_back_end(ring, queue)
            }),
            Outlet::Vsock => self.vhost.set_vsock_running(running),
        }
    }
}

impl BackEnd for KernelRings {
    type Vhost = KernelVhost;

    fn exchange(&mut self, work: &mut Exchange<'_, KernelVhost>) -> io::Result<()> {
        work(&mut self.vhost).map_err(io::Error::other)
    }

    fn accepted_features(&self, agreed: u64) -> u64 {
        agreed & self.vhost.features()
    }

    /// The vhost crate makes it an address of this process.
    fn ring_address(&self, _: GuestMemory, address: GuestAddress) -> Result<u64, NotRam> {
        Ok(address.0)
    }

    fn start(&mut self, rings: &[usize]) -> io::Result<()> {
        self.switch(rings, true)
    }

    fn stop(&mut self, rings: &[usize]) {
        if let Err(error) = self.switch(rings, false) {
            log::error!("vhost: the kernel does not let go of a device: {error}");
        }
    }
}
