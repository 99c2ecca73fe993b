//! The device: a virtio-fs back end over vhost-user, a thread for each queue of requests.

use std::io;
use std::os::unix::net::UnixListener;
use std::sync::{Arc, Mutex, PoisonError};

use vhost::vhost_user::Listener;
use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vhost_user_backend::{VhostUserBackend, VhostUserDaemon, VringRwLock, VringState, VringT as _};
use virtio_queue::{DescriptorChain, QueueOwnedT as _, QueueT as _};
use vm_memory::{
    GuestAddressSpace as _, GuestMemoryAtomic, GuestMemoryBackend as _, GuestMemoryMmap,
    VolatileSlice,
};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{
    EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier,
};

use super::reply::GuestReply;
use super::requests::{REQUEST_MAX, Requests};
use super::tree::Store;
use crate::warn_limited;

type Memory = GuestMemoryAtomic<GuestMemoryMmap>;

/// Bytes of a tag in the configuration (virtio 1.3, 5.11.4).
pub const TAG_BYTES: usize = 36;

/// What a queue holds; also bounds the descriptors of a request.
const QUEUE_SIZE_MAX: u16 = 1024;

/// Requests that are answered before whoever configures the queue gets a turn.
const BATCH: usize = 64;

/// VIRTIO_F_VERSION_1, VIRTIO_F_RING_EVENT_IDX, VIRTIO_F_RING_INDIRECT_DESC and
/// VHOST_USER_F_PROTOCOL_FEATURES.
const FEATURES: u64 = 1 << 32 | 1 << 29 | 1 << 28 | 1 << 30;

/// A server that runs.
pub struct Server(VhostUserDaemon<Arc<Device>>);

impl Server {
    /// Starts the threads of a device with `queues` queues of requests, for who is waiting at
    /// `listener`: no other connection is taken.
    ///
    /// # Errors
    ///
    /// Nobody is waiting there, or there are no threads.
    pub fn start(
        store: &Arc<Store>,
        tag: &[u8],
        queues: u16,
        listener: UnixListener,
    ) -> io::Result<Self> {
        let memory = Memory::new(GuestMemoryMmap::new());
        let device = Arc::new(Device::new(store, tag, queues, memory.clone()));
        let mut daemon = VhostUserDaemon::new("store".into(), device, memory).map_err(failed)?;
        daemon.start(&mut Listener::from(listener)).map_err(failed)?;
        Ok(Self(daemon))
    }

    /// Waits until the other end has gone.
    ///
    /// # Errors
    ///
    /// It broke the protocol.
    pub fn wait(mut self) -> io::Result<()> {
        use vhost::vhost_user::Error::{Disconnected, PartialMessage};
        use vhost_user_backend::Error::HandleRequest;
        match self.0.wait() {
            Ok(()) | Err(HandleRequest(Disconnected | PartialMessage)) => Ok(()),
            Err(error) => Err(failed(error)),
        }
    }
}

impl Drop for Server {
    /// The threads of queues are waited for.
    fn drop(&mut self) {
        for thread in self.0.get_epoll_handlers() {
            thread.send_exit_event();
        }
    }
}

#[expect(clippy::needless_pass_by_value, reason = "it is what map_err takes")]
fn failed(error: vhost_user_backend::Error) -> io::Error {
    io::Error::other(error.to_string())
}

struct Device {
    store: Arc<Store>,
    memory: Memory,
    configuration: Vec<u8>,
    /// Of each queue of requests, and so of each thread.
    threads: Vec<Mutex<Thread>>,
}

struct Thread {
    requests: Requests,
    request: Vec<u8>,
}

impl Device {
    fn new(store: &Arc<Store>, tag: &[u8], queues: u16, memory: Memory) -> Self {
        let queues = queues.clamp(1, QUEUES_MAX);
        let mut configuration = tag.to_vec();
        configuration.resize(TAG_BYTES, 0);
        configuration.extend(u32::from(queues).to_le_bytes());
        let thread = |_| {
            let requests = Requests::new(Arc::clone(store));
            Mutex::new(Thread { requests, request: Vec::new() })
        };
        let threads = (0..queues).map(thread).collect();
        Self { store: Arc::clone(store), memory, configuration, threads }
    }

    /// Answers what waits in a queue, or nothing any more where the rings cannot be read.
    fn serve(&self, vring: &VringRwLock, thread: &mut Thread) -> Option<()> {
        loop {
            // Nobody takes the queue away while requests are being answered.
            let mut vring = vring.get_mut();
            vring.get_queue_mut().ready().then_some(())?;
            vring.disable_notification().ok()?;
            let answered = self.serve_batch(&mut vring, thread)?;
            if answered > 0 && vring.needs_notification().ok()? {
                vring.signal_used_queue().ok()?;
            }
            if answered < BATCH && !vring.enable_notification().ok()? {
                return Some(());
            }
        }
    }

    fn serve_batch(&self, vring: &mut VringState<Memory>, thread: &mut Thread) -> Option<usize> {
        let memory = self.memory.memory();
        let memory = &*memory;
        let (mut readable, mut writable) = (Vec::new(), Vec::new());
        let mut answered = 0;
        while answered < BATCH {
            let queue = vring.get_queue_mut();
            let size = queue.size();
            let Some(chain) = queue.iter(memory).ok()?.next() else { break };
            let head = chain.head_index();
            readable.clear();
            writable.clear();
            let len = match gather(memory, chain, size, &mut readable, &mut writable) {
                Some(()) => thread.answer(&readable, &writable),
                None => {
                    warn_limited!("store: the descriptors of a request are broken");
                    0
                }
            };
            vring.add_used(head, u32::try_from(len).unwrap_or(u32::MAX)).ok()?;
            answered += 1;
        }
        Some(answered)
    }
}

impl Thread {
    fn answer(&mut self, readable: &[VolatileSlice<'_>], writable: &[VolatileSlice<'_>]) -> usize {
        self.request.resize(REQUEST_MAX, 0);
        let mut filled = 0;
        for slice in readable {
            let Some(rest) = self.request.get_mut(filled..) else { break };
            filled += slice.copy_to(rest);
        }
        let request = self.request.get(..filled).unwrap_or_default();
        self.requests.answer(request, &mut GuestReply::new(writable))
    }
}

/// The buffers of a request: first those with the request, then those for the reply.
fn gather<'m>(
    memory: &'m GuestMemoryMmap,
    chain: DescriptorChain<&GuestMemoryMmap>,
    descriptors_max: u16,
    readable: &mut Vec<VolatileSlice<'m>>,
    writable: &mut Vec<VolatileSlice<'m>>,
) -> Option<()> {
    let mut left = descriptors_max;
    let mut is_over = false;
    for descriptor in chain {
        left = left.checked_sub(1)?;
        is_over = !descriptor.has_next();
        let len = usize::try_from(descriptor.len()).ok()?;
        let slices = if descriptor.is_write_only() {
            &mut *writable
        } else if writable.is_empty() {
            &mut *readable
        } else {
            return None;
        };
        for slice in memory.get_slices(descriptor.addr(), len) {
            slices.push(slice.ok()?);
        }
    }
    is_over.then_some(())
}

/// A thread each; more than processors need.
const QUEUES_MAX: u16 = 16;

impl VhostUserBackend for Device {
    type Bitmap = ();
    type Vring = VringRwLock;

    fn num_queues(&self) -> usize {
        self.threads.len() + 1
    }

    fn max_queue_size(&self) -> usize {
        QUEUE_SIZE_MAX.into()
    }

    fn features(&self) -> u64 {
        FEATURES
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
            | VhostUserProtocolFeatures::RESET_DEVICE
    }

    fn reset_device(&self) {
        self.store.end_session();
    }

    fn set_event_idx(&self, _enabled: bool) {}

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        let (offset, size) = (usize::try_from(offset), usize::try_from(size));
        let bytes = self.configuration.iter().copied();
        bytes.skip(offset.unwrap_or(usize::MAX)).take(size.unwrap_or(0)).collect()
    }

    fn update_memory(&self, _memory: Memory) -> io::Result<()> {
        // It is the one that this device has.
        Ok(())
    }

    /// The first thread has the queue of urgent requests too, which are about forgetting.
    fn queues_per_thread(&self) -> Vec<u64> {
        let one = |index: usize| if index == 0 { 0b11 } else { 1 << (index + 1) };
        (0..self.threads.len()).map(one).collect()
    }

    fn exit_event(&self, _thread: usize) -> Option<(EventConsumer, EventNotifier)> {
        new_event_consumer_and_notifier(EventFlag::NONBLOCK | EventFlag::CLOEXEC).ok()
    }

    /// An error would end the thread for good, so that there is none.
    fn handle_event(
        &self,
        queue: u16,
        _events: EventSet,
        vrings: &[VringRwLock],
        thread: usize,
    ) -> io::Result<()> {
        let (vring, thread) = (vrings.get(usize::from(queue)), self.threads.get(thread));
        if let (Some(vring), Some(thread)) = (vring, thread) {
            let mut thread = thread.lock().unwrap_or_else(PoisonError::into_inner);
            if self.serve(vring, &mut thread).is_none() {
                warn_limited!("store: a queue cannot be served");
            }
        }
        Ok(())
    }
}
