//! Devices whose rings are served elsewhere: by a driver in the host's kernel, or by a process that
//! speaks vhost-user.
//!
//! A device's front is as any other. At `DRIVER_OK` it calls [`start`] with the queues that a
//! [`BackEnd`] takes over; what it keeps (a control queue, say) it serves as usual. The driver's
//! doorbells and interrupts are the very events that the back end gets, so that no data and no
//! notification passes through here. Only on virtio-mmio, where the reason of an interrupt is
//! written to a register first, each interrupt comes by way of the loop.

mod kernel;
mod refusal;
mod user;

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use arch::memory::{GuestAddress, GuestMemory, NotRam};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{GuestMemoryBackend as _, GuestMemoryRegion as _};

use super::device::{Activation, NeedsReset};
use super::queue::{Queue, QueueSetup};
use crate::event::{Event, EventSet, Handler, LoopHandle, Registration, Watch};
use crate::host::vhost::timer::Timer;
use crate::interrupt::Interrupt;

pub use self::kernel::KernelRings;
pub use self::refusal::Refusal;
use self::refusal::Refusing;
pub use self::user::{Conversations, UserRings};

/// Who was lost is looked for after this time, because a service manager may be quick,
const FIRST_RETRY: Duration = Duration::from_millis(50);
/// and then once in this time.
const RETRY_PERIOD: Duration = Duration::from_secs(1);

const GO: u32 = 0;
const RING_ERROR: u32 = 1;
const RETRY: u32 = 2;
/// From here on, a token is the index of a share.
const FIRST_LIFELINE: u32 = 1 << 8;
/// From here on, a token is the index of a ring.
const FIRST_RELAY: u32 = 1 << 16;
/// From here on, a token is the index of a share and that of a ring of its own.
const FIRST_REFUSED: u32 = 1 << 24;
/// How far the rings of two shares are apart there: more than a share has.
const REFUSED_STRIDE: u32 = 1 << 11;

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

    /// Takes the rings back from a back end that failed.
    fn give_up(&mut self, rings: &[usize]) {
        self.stop(rings);
    }

    /// What hangs up when the back end is gone; a driver of the kernel never is.
    fn lifeline(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// Says whether it is worth while to wait for a back end that is gone.
    fn may_come_back(&self) -> bool {
        false
    }

    /// Looks for a back end that is gone, without waiting.
    fn reconnect(&mut self) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Learns that the back end is gone, or serves its rings again.
    fn set_presence(&mut self, _is_present: bool) {}
}

/// A back end and the queues of the device that it takes over.
pub struct Share<B> {
    /// Locked by the loop's thread from activation to reset.
    pub back_end: Arc<Mutex<B>>,
    /// The index of the device's queue for each ring of the back end, in the order of the rings.
    /// Those that the driver left disabled are left out.
    pub queues: Vec<usize>,
    /// What answers requests when the back end is gone for good, where a driver would wait for
    /// them for ever; without it, the device asks for a reset.
    pub refusal: Option<Refusal>,
}

impl<B> Share<B> {
    /// Hands `queues` to a back end that may be used again after a reset.
    pub fn new(back_end: &Arc<Mutex<B>>, queues: impl IntoIterator<Item = usize>) -> Self {
        Self { back_end: Arc::clone(back_end), queues: queues.into_iter().collect(), refusal: None }
    }

    /// Lets `refusal` answer when the back end is gone for good.
    pub fn or_refuse(self, refusal: Refusal) -> Self {
        Self { refusal: Some(refusal), ..self }
    }
}

/// Hands queues to back ends until the registration is dropped: when the drop returns, none of them
/// touches guest memory.
///
/// The rings are checked here; set-up happens on the loop's thread after this has returned, because
/// a processor is waiting. A back end that is lost is waited for where it may come back; otherwise
/// requests are refused or the device asks for a reset.
pub fn start<B: BackEnd>(
    name: &str,
    shares: Vec<Share<B>>,
    activation: &mut Activation,
    home: &LoopHandle,
) -> io::Result<Registration> {
    let shares = shares.into_iter().map(|share| Shared::new(share, activation));
    home.add(Box::new(HandedOver {
        name: name.to_owned(),
        shares: shares.collect::<Result<_, _>>()?,
        features: activation.features,
        memory: activation.memory,
        needs_reset: activation.needs_reset.clone(),
        go: Event::new()?,
        ring_error: Event::new()?,
        retry: Timer::new()?,
    }))
}

/// A [`Share`] with the rings that the driver has set up.
struct Shared<B> {
    back_end: Arc<Mutex<B>>,
    rings: Vec<Ring>,
    state: State,
    refusal: Option<Refusal>,
    refusing: Option<Refusing>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    /// The back end has nothing of ours.
    Idle,
    /// It serves the rings, or begins to.
    Running,
    /// It is waited for.
    Away,
}

struct Ring {
    /// Its number at the back end.
    number: usize,
    setup: QueueSetup,
    /// What the back end signals.
    call: Event,
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
    /// Expires when back ends that are away are looked for.
    retry: Timer,
}

impl<B: BackEnd> Handler for HandedOver<B> {
    fn start(&mut self, watch: &mut Watch<'_, '_>) -> io::Result<()> {
        watch.add(&self.go, GO, EventSet::IN)?;
        watch.add(&self.ring_error, RING_ERROR, EventSet::IN)?;
        watch.add(&self.retry, RETRY, EventSet::IN)?;
        for (token, ring) in (FIRST_RELAY..).zip(self.rings()) {
            if !matches!(ring.setup.interrupt, Interrupt::Message(_)) {
                watch.add(&ring.call, token, EventSet::IN)?;
            }
        }
        self.go.signal();
        Ok(())
    }

    fn ready(&mut self, token: u32, _: EventSet, watch: &mut Watch<'_, '_>) {
        match token {
            GO if self.go.take() => self.hand_over(watch),
            RING_ERROR if self.ring_error.take() => {
                self.fail(&io::Error::other("the driver broke a rule of the rings"), watch);
            }
            RETRY if self.retry.take() => self.look_for_lost(watch),
            FIRST_LIFELINE..FIRST_RELAY => {
                if let Ok(index) = usize::try_from(token - FIRST_LIFELINE) {
                    self.lose(index, &io::Error::other("who serves it has ended"), watch);
                }
            }
            FIRST_RELAY..FIRST_REFUSED => self.relay(token - FIRST_RELAY),
            FIRST_REFUSED.. => self.refuse(token - FIRST_REFUSED, watch),
            _ => {}
        }
    }
}

impl<B: BackEnd> Drop for HandedOver<B> {
    fn drop(&mut self) {
        for share in &mut self.shares {
            share.stop();
        }
    }
}

impl<B: BackEnd> HandedOver<B> {
    fn hand_over(&mut self, watch: &mut Watch<'_, '_>) {
        for index in 0..self.shares.len() {
            if let Err(error) = self.set_up(index, false, watch) {
                self.lose(index, &error, watch);
            }
        }
    }

    /// Gives the rings of one share to its back end; `resumed` ones have been served before.
    fn set_up(&mut self, index: usize, resumed: bool, watch: &mut Watch<'_, '_>) -> io::Result<()> {
        let Some(share) = self.shares.get_mut(index) else { return Ok(()) };
        let back_end = &mut *lock(&share.back_end);
        share.state = State::Running;
        if let Some(lifeline) = back_end.lifeline() {
            watch.add(&lifeline, lifeline_token(index), EventSet::READ_HANG_UP)?;
        }
        let features = back_end.accepted_features(self.features);
        let regions = regions(self.memory);
        let places = share.rings.iter().map(|ring| ring.place(back_end, self.memory, resumed));
        let places = places.collect::<io::Result<Vec<_>>>()?;
        // All in one: whoever is slow at everything is slow once.
        back_end.exchange(&mut |vhost| {
            vhost.set_features(features)?;
            vhost.set_mem_table(&regions)?;
            let mut rings = share.rings.iter().zip(&places);
            rings.try_for_each(|(ring, place)| ring.set_up(vhost, place, &self.ring_error))
        })?;
        back_end.start(&share.numbers())?;
        back_end.set_presence(true);
        for ring in &share.rings {
            // The driver may have made buffers available before anybody looked.
            ring.setup.doorbell.signal();
            if resumed {
                // Whoever was lost may have used buffers without saying so.
                ring.call.signal();
            }
        }
        Ok(())
    }

    /// Takes the rings back from a back end that does not serve them, and waits for it to return.
    fn lose(&mut self, index: usize, error: &io::Error, watch: &mut Watch<'_, '_>) {
        let Some(share) = self.shares.get_mut(index) else { return };
        if share.state != State::Running {
            return;
        }
        share.give_up(watch);
        let mut back_end = lock(&share.back_end);
        back_end.set_presence(false);
        let may_come_back = back_end.may_come_back();
        drop(back_end);
        if !may_come_back || self.retry.set(FIRST_RETRY).is_err() {
            return self.end(index, error, watch);
        }
        crate::warn_limited!("{}: {error}; waiting for it to come back", self.name);
        share.state = State::Away;
    }

    fn look_for_lost(&mut self, watch: &mut Watch<'_, '_>) {
        for index in 0..self.shares.len() {
            let Some(share) = self.shares.get(index) else { continue };
            if share.state != State::Away {
                continue;
            }
            let found = lock(&share.back_end).reconnect();
            match found.and_then(|()| self.set_up(index, true, watch)) {
                Ok(()) => log::info!("{}: who serves it is back", self.name),
                Err(error) => {
                    log::debug!("{}: not back yet: {error}", self.name);
                    if let Some(share) = self.shares.get_mut(index) {
                        share.give_up(watch);
                        share.state = State::Away;
                    }
                    if let Err(error) = self.retry.set(RETRY_PERIOD) {
                        self.fail(&error, watch);
                    }
                }
            }
        }
    }

    /// Ends service for good: by refusing every request, or by asking for a reset.
    fn end(&mut self, index: usize, error: &io::Error, watch: &mut Watch<'_, '_>) {
        let (memory, features) = (self.memory, self.features);
        let Some(share) = self.shares.get_mut(index) else { return };
        let Some(refusal) = share.refusal else { return self.fail(error, watch) };
        crate::warn_limited!("{}: {error}; every request is refused", self.name);
        let refusing = Refusing::begin(&share.rings, memory, features, refusal);
        let watched = refusing.map_err(io::Error::other).and_then(|refusing| {
            refusing.watch(refused_token(index), watch)?;
            share.refusing = Some(refusing);
            Ok(())
        });
        if let Err(error) = watched {
            self.fail(&error, watch);
        }
    }

    /// Answers what came by the ring of a share that `place` has both indices of.
    fn refuse(&mut self, place: u32, watch: &mut Watch<'_, '_>) {
        let index = |number: u32| usize::try_from(number).unwrap_or(usize::MAX);
        let share = self.shares.get_mut(index(place / REFUSED_STRIDE));
        let Some(refusing) = share.and_then(|share| share.refusing.as_mut()) else { return };
        if let Err(error) = refusing.serve(index(place % REFUSED_STRIDE)) {
            self.fail(&io::Error::other(error), watch);
        }
    }

    /// Ends service until the driver resets the device.
    fn fail(&mut self, error: &io::Error, watch: &mut Watch<'_, '_>) {
        crate::warn_limited!("{}: {error}; the device needs a reset by its driver", self.name);
        for share in &mut self.shares {
            share.unwatch(watch);
            share.stop();
            share.refusing = None;
        }
        self.needs_reset.request();
    }

    fn relay(&self, index: u32) {
        let ring = usize::try_from(index).ok().and_then(|index| self.rings().nth(index));
        if let Some(ring) = ring {
            ring.call.take();
            ring.setup.interrupt.trigger();
        }
    }

    fn rings(&self) -> impl Iterator<Item = &Ring> {
        self.shares.iter().flat_map(|share| &share.rings)
    }
}

impl<B: BackEnd> Shared<B> {
    fn new(share: Share<B>, activation: &mut Activation) -> io::Result<Self> {
        let mut rings = Vec::new();
        for (number, index) in share.queues.iter().copied().enumerate() {
            if let Some(setup) = activation.queues.get_mut(index).and_then(Option::take) {
                // Whoever serves a ring later, its addresses are checked as for a worker of ours.
                Queue::new(setup.clone(), activation.memory, activation.features)
                    .map_err(io::Error::other)?;
                let call = match &setup.interrupt {
                    Interrupt::Message(event) => event.clone(),
                    _ => Event::new()?,
                };
                rings.push(Ring { number, setup, call });
            }
        }
        let Share { back_end, queues: _, refusal } = share;
        Ok(Self { back_end, rings, state: State::Idle, refusal, refusing: None })
    }

    fn numbers(&self) -> Vec<usize> {
        self.rings.iter().map(|ring| ring.number).collect()
    }

    fn stop(&mut self) {
        if std::mem::replace(&mut self.state, State::Idle) == State::Running {
            lock(&self.back_end).stop(&self.numbers());
        }
    }

    /// Takes the rings from a back end that may not listen any more.
    fn give_up(&mut self, watch: &mut Watch<'_, '_>) {
        self.unwatch(watch);
        if std::mem::replace(&mut self.state, State::Idle) == State::Running {
            lock(&self.back_end).give_up(&self.numbers());
        }
    }

    fn unwatch(&self, watch: &mut Watch<'_, '_>) {
        if self.state == State::Running
            && let Some(lifeline) = lock(&self.back_end).lifeline()
        {
            let _ = watch.remove(&lifeline);
        }
    }
}

/// Where a ring is, and which entry of it is served next.
struct Place {
    addresses: VringConfigData,
    base: u16,
}

impl Ring {
    /// Where a back end finds the ring; a resumed one has been served before.
    fn place<B: BackEnd>(
        &self,
        back_end: &B,
        memory: GuestMemory,
        resumed: bool,
    ) -> io::Result<Place> {
        let config = self.setup.config;
        let address =
            |guest| back_end.ring_address(memory, GuestAddress(guest)).map_err(io::Error::other);
        let addresses = VringConfigData {
            queue_max_size: config.size,
            queue_size: config.size,
            flags: 0,
            desc_table_addr: address(config.descriptor_table)?,
            used_ring_addr: address(config.used_ring)?,
            avail_ring_addr: address(config.available_ring)?,
            log_addr: None,
        };
        // What was taken and not used is served again.
        let base = if resumed { used_index(memory, config.used_ring)? } else { 0 };
        Ok(Place { addresses, base })
    }

    /// Tells a back end everything about the ring, short of starting it.
    fn set_up<V: VhostBackend>(
        &self,
        vhost: &V,
        place: &Place,
        ring_error: &Event,
    ) -> vhost::Result<()> {
        vhost.set_vring_num(self.number, self.setup.config.size)?;
        vhost.set_vring_addr(self.number, &place.addresses)?;
        vhost.set_vring_base(self.number, place.base)?;
        vhost.set_vring_err(self.number, ring_error.eventfd())?;
        vhost.set_vring_call(self.number, self.call.eventfd())?;
        vhost.set_vring_kick(self.number, self.setup.doorbell.eventfd())
    }
}

/// The index of a used ring (virtio 1.3, section 2.7.8).
fn used_index(memory: GuestMemory, used_ring: u64) -> io::Result<u16> {
    let address = GuestAddress(used_ring.saturating_add(2));
    memory.read(address).map(u16::from_le).map_err(io::Error::other)
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

fn lifeline_token(index: usize) -> u32 {
    FIRST_LIFELINE.saturating_add(u32::try_from(index).unwrap_or(u32::MAX)).min(FIRST_RELAY - 1)
}

fn refused_token(index: usize) -> u32 {
    let index = u32::try_from(index).unwrap_or(u32::MAX);
    index.saturating_mul(REFUSED_STRIDE).saturating_add(FIRST_REFUSED)
}

fn lock<T>(back_end: &Mutex<T>) -> MutexGuard<'_, T> {
    back_end.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
pub(crate) mod test;
