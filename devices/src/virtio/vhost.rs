//! Devices whose rings are served elsewhere: by a driver in the host's kernel, or by a process that
//! speaks vhost-user.
//!
//! A device's front is as any other. At `DRIVER_OK` it calls [`start`] with the queues that a
//! [`BackEnd`] takes over; what it keeps (a control queue, say) it serves as usual. The driver's
//! doorbells and interrupts are the very events that the back end gets, so that no data and no
//! notification passes through here. Only on virtio-mmio, where the reason of an interrupt is
//! written to a register first, each interrupt comes by way of the loop.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use arch::memory::{GuestAddress, GuestMemory, NotRam};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{GuestMemoryBackend as _, GuestMemoryRegion as _};

use super::device::{Activation, NeedsReset, QueueSetup};
use super::queue::{Queue, QueueError};
use crate::event::{Event, EventSet, Handler, LoopHandle, Registration, Watch};
use crate::host::vhost::kernel::KernelVhost;
use crate::interrupt::Interrupt;

const GO: u32 = 0;
const RING_ERROR: u32 = 1;
const FIRST_RELAY: u32 = 2;

/// Requests to a back end that belong together.
pub type Exchange<'a, V> = dyn FnMut(&mut V) -> vhost::Result<()> + 'a;

/// What serves rings in place of a worker of ours.
pub trait BackEnd: Send + 'static {
    /// The protocol that drivers in the kernel and processes have in common.
    type Vhost: VhostBackend;

    /// Lets `exchange` speak to the back end, for a limited time where that is a process.
    fn exchange(&mut self, work: &mut Exchange<'_, Self::Vhost>) -> io::Result<()>;

    /// What the back end is told of the features that driver and device agreed on.
    fn accepted_features(&self, agreed: u64) -> u64;

    /// How the back end calls a guest-physical address.
    fn ring_address(&self, memory: GuestMemory, address: GuestAddress) -> Result<u64, NotRam>;

    /// Lets the rings with these numbers go, which are set up.
    fn start(&mut self, rings: &[usize]) -> io::Result<()>;

    /// Stops the rings with these numbers; when this returns, guest memory is not touched.
    fn stop(&mut self, rings: &[usize]);
}

/// A back end and the queues of the device that it takes over.
pub struct Share<B> {
    /// Locked by the loop's thread from activation to reset.
    pub back_end: Arc<Mutex<B>>,
    /// The index of the device's queue for each ring of the back end, in the order of the rings.
    /// Those that the driver left disabled are left out.
    pub queues: Vec<usize>,
}

impl<B> Share<B> {
    /// Hands `queues` to a back end that may be used again after a reset.
    pub fn new(back_end: &Arc<Mutex<B>>, queues: impl IntoIterator<Item = usize>) -> Self {
        Self { back_end: Arc::clone(back_end), queues: queues.into_iter().collect() }
    }
}

/// Hands queues to back ends until the registration is dropped: when the drop returns, none of them
/// touches guest memory.
///
/// The rings are checked here; set-up happens on the loop's thread after this has returned, because
/// a processor is waiting. A back end that fails makes the device ask for a reset.
pub fn start<B: BackEnd>(
    name: &str,
    shares: Vec<Share<B>>,
    activation: &mut Activation,
    home: &LoopHandle,
) -> io::Result<Registration> {
    let shares = shares.into_iter().map(|share| Shared::new(share, activation));
    home.add(Box::new(HandedOver {
        name: name.to_owned(),
        shares: shares.collect::<Result<_, _>>().map_err(io::Error::other)?,
        features: activation.features,
        memory: activation.memory,
        needs_reset: activation.needs_reset.clone(),
        go: Event::new()?,
        ring_error: Event::new()?,
        relays: Vec::new(),
    }))
}

/// A [`Share`] with the rings that the driver has set up.
struct Shared<B> {
    back_end: Arc<Mutex<B>>,
    rings: Vec<(usize, QueueSetup)>,
    is_running: bool,
}

impl<B: BackEnd> Shared<B> {
    fn new(share: Share<B>, activation: &mut Activation) -> Result<Self, QueueError> {
        let mut rings = Vec::new();
        for (ring, index) in share.queues.into_iter().enumerate() {
            if let Some(setup) = activation.queues.get_mut(index).and_then(Option::take) {
                // Whoever serves a ring later, its addresses are checked as for a worker of ours.
                Queue::new(setup.clone(), activation.memory, activation.features)?;
                rings.push((ring, setup));
            }
        }
        Ok(Self { back_end: share.back_end, rings, is_running: false })
    }
}

struct HandedOver<B: BackEnd> {
    name: String,
    shares: Vec<Shared<B>>,
    features: u64,
    memory: GuestMemory,
    needs_reset: NeedsReset,
    /// Signalled once, for set-up to happen when nobody waits.
    go: Event,
    ring_error: Event,
    /// What back ends signal, and the interrupt that it stands for.
    relays: Vec<(Event, Interrupt)>,
}

impl<B: BackEnd> Handler for HandedOver<B> {
    fn start(&mut self, watch: &mut Watch<'_, '_>) -> io::Result<()> {
        watch.add(&self.go, GO, EventSet::IN)?;
        watch.add(&self.ring_error, RING_ERROR, EventSet::IN)?;
        self.go.signal();
        Ok(())
    }

    fn ready(&mut self, token: u32, _: EventSet, watch: &mut Watch<'_, '_>) {
        let outcome = match token {
            GO if self.go.take() => self.set_up(watch),
            RING_ERROR if self.ring_error.take() => {
                Err(io::Error::other("the driver broke a rule of the rings"))
            }
            _ => {
                self.relay(token);
                Ok(())
            }
        };
        if let Err(error) = outcome {
            self.fail(&error);
        }
    }
}

impl<B: BackEnd> Drop for HandedOver<B> {
    fn drop(&mut self) {
        self.stop();
    }
}

impl<B: BackEnd> HandedOver<B> {
    fn set_up(&mut self, watch: &mut Watch<'_, '_>) -> io::Result<()> {
        let regions = regions(self.memory);
        for share in &mut self.shares {
            let back_end = &mut *lock(&share.back_end);
            share.is_running = true;
            let features = back_end.accepted_features(self.features);
            back_end.exchange(&mut |vhost| {
                vhost.set_features(features)?;
                vhost.set_mem_table(&regions).map(|_| ())
            })?;
            let mut numbers = Vec::with_capacity(share.rings.len());
            for (ring, setup) in &share.rings {
                let call = match &setup.interrupt {
                    Interrupt::Message(event) => event.clone(),
                    interrupt => {
                        let event = Event::new()?;
                        let token = FIRST_RELAY.saturating_add(token(self.relays.len()));
                        watch.add(&event, token, EventSet::IN)?;
                        self.relays.push((event.clone(), interrupt.clone()));
                        event
                    }
                };
                set_up_ring(back_end, self.memory, *ring, setup, &call, &self.ring_error)?;
                numbers.push(*ring);
            }
            back_end.start(&numbers)?;
        }
        for (_, setup) in self.shares.iter().flat_map(|share| &share.rings) {
            // The driver may have made buffers available before anybody looked.
            setup.doorbell.signal();
        }
        Ok(())
    }

    fn relay(&self, token: u32) {
        let index = token.checked_sub(FIRST_RELAY).and_then(|index| usize::try_from(index).ok());
        if let Some((event, interrupt)) = index.and_then(|index| self.relays.get(index)) {
            event.take();
            interrupt.trigger();
        }
    }

    fn fail(&mut self, error: &io::Error) {
        crate::warn_limited!("{}: {error}; the device needs a reset by its driver", self.name);
        self.stop();
        self.needs_reset.request();
    }

    fn stop(&mut self) {
        for share in &mut self.shares {
            if std::mem::take(&mut share.is_running) {
                let rings: Vec<_> = share.rings.iter().map(|(ring, _)| *ring).collect();
                lock(&share.back_end).stop(&rings);
            }
        }
    }
}

/// A driver of the host's kernel as a back end.
pub struct KernelRings {
    vhost: KernelVhost,
    outlet: Outlet,
}

/// What is behind the rings of a driver in the kernel.
enum Outlet {
    /// A queue of a tap: ring 0 receives and ring 1 sends.
    Tap(OwnedFd),
    /// The host's sockets.
    Vsock,
}

impl KernelRings {
    /// The rings of a network card's queue pair, in front of a queue of a tap.
    pub fn net(vhost: KernelVhost, tap: OwnedFd) -> Self {
        Self { vhost, outlet: Outlet::Tap(tap) }
    }

    /// The receive and transmit rings of a socket device, whose guest has its address already.
    pub fn vsock(vhost: KernelVhost) -> Self {
        Self { vhost, outlet: Outlet::Vsock }
    }

    fn switch(&self, rings: &[usize], running: bool) -> io::Result<()> {
        match &self.outlet {
            Outlet::Tap(tap) => rings.iter().try_for_each(|ring| {
                let ring = u32::try_from(*ring).map_err(io::Error::other)?;
                self.vhost.set_net_back_end(ring, running.then(|| tap.as_fd()))
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

/// Tells a back end everything about one ring, short of starting it.
fn set_up_ring<B: BackEnd>(
    back_end: &mut B,
    memory: GuestMemory,
    ring: usize,
    setup: &QueueSetup,
    call: &Event,
    ring_error: &Event,
) -> io::Result<()> {
    let config = setup.config;
    let address = |guest| back_end.ring_address(memory, GuestAddress(guest));
    let addresses = VringConfigData {
        queue_max_size: config.size,
        queue_size: config.size,
        flags: 0,
        desc_table_addr: address(config.descriptor_table).map_err(io::Error::other)?,
        used_ring_addr: address(config.used_ring).map_err(io::Error::other)?,
        avail_ring_addr: address(config.available_ring).map_err(io::Error::other)?,
        log_addr: None,
    };
    back_end.exchange(&mut |vhost| {
        vhost.set_vring_num(ring, config.size)?;
        vhost.set_vring_addr(ring, &addresses)?;
        vhost.set_vring_base(ring, 0)?;
        vhost.set_vring_err(ring, ring_error.eventfd())?;
        vhost.set_vring_call(ring, call.eventfd())?;
        vhost.set_vring_kick(ring, setup.doorbell.eventfd())
    })
}

/// All of RAM, as back ends are told about it.
fn regions(memory: GuestMemory) -> Vec<VhostUserMemoryRegionInfo> {
    let (regions, files) = (memory.regions(), memory.backend().iter());
    let regions = regions.zip(files).map(|(region, mapped)| {
        let file = mapped.file_offset().map_or(-1, |file| file.file().as_raw_fd());
        VhostUserMemoryRegionInfo {
            guest_phys_addr: region.start.0,
            memory_size: mapped.len(),
            userspace_addr: region.slice.as_ptr().addr() as u64,
            mmap_offset: region.file_offset,
            mmap_handle: file,
        }
    });
    regions.collect()
}

fn token(index: usize) -> u32 {
    u32::try_from(index).unwrap_or(u32::MAX)
}

fn lock<T>(back_end: &Mutex<T>) -> MutexGuard<'_, T> {
    back_end.lock().unwrap_or_else(PoisonError::into_inner)
}
