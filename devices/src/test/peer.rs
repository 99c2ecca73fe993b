//! A vhost-user back-end as other people's are: it copies what it reads to what it writes.

use crate::virtio::feature::TRANSPORT_FEATURES;
use std::io::{self, Read as _, Write as _};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};

use tempfile::TempDir;
use vhost::vhost_user::Listener;
use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vhost_user_backend::{
    ShutdownHandle, VhostUserBackendMut, VhostUserDaemon, VringRwLock, VringT as _,
};
use virtio_queue::{QueueOwnedT as _, Reader, Writer};
use vm_memory::{GuestAddressSpace as _, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{
    EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier,
};

type Memory = GuestMemoryAtomic<GuestMemoryMmap>;

/// Queues that a peer serves.
pub(crate) const QUEUES: usize = 2;

const FEATURE_PROTOCOL: u64 = 1 << 30;
const BYTES_MAX: usize = 1 << 16;

/// A socket in a folder of its own, at which peers come and go.
pub(crate) struct Place {
    _folder: TempDir,
    path: PathBuf,
}

impl Place {
    pub(crate) fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        Self { path: folder.path().join("peer"), _folder: folder }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn listen(&self) -> UnixListener {
        let _ = std::fs::remove_file(&self.path);
        UnixListener::bind(&self.path).unwrap()
    }
}

/// A peer that serves one connection at a time until it is dropped.
pub(crate) struct Peer {
    shutdown: Arc<Mutex<Option<ShutdownHandle>>>,
    stopped: Arc<std::sync::atomic::AtomicBool>,
    path: PathBuf,
    thread: Option<JoinHandle<()>>,
}

impl Peer {
    pub(crate) fn start(place: &Place) -> Self {
        let listener = place.listen();
        let shutdown = Arc::<Mutex<Option<ShutdownHandle>>>::default();
        let stopped = Arc::<std::sync::atomic::AtomicBool>::default();
        let (current, is_over) = (Arc::clone(&shutdown), Arc::clone(&stopped));
        let thread = thread::spawn(move || {
            let mut listener = Listener::from(listener);
            while !is_over.load(std::sync::atomic::Ordering::SeqCst) {
                let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
                let echo = Arc::new(Mutex::new(Echo::new()));
                let exit = echo.lock().unwrap().exit.1.try_clone().unwrap();
                let mut daemon = VhostUserDaemon::new("echo".into(), echo, memory).unwrap();
                daemon.start(&mut listener).unwrap();
                *current.lock().unwrap() = daemon.shutdown_handle();
                // However the front-end leaves.
                let _ = daemon.wait();
                exit.notify().unwrap();
            }
        });
        let path = place.path().to_owned();
        Self { shutdown, stopped, path, thread: Some(thread) }
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        self.stopped.store(true, std::sync::atomic::Ordering::SeqCst);
        let current = self.shutdown.lock().unwrap().take();
        match current {
            Some(current) => current.shutdown(),
            // It waits for a connection.
            None => drop(std::os::unix::net::UnixStream::connect(&self.path)),
        }
        // One that was between connections waits for the next one.
        drop(std::os::unix::net::UnixStream::connect(&self.path));
        let _ = std::fs::remove_file(&self.path);
        self.thread.take().unwrap().join().unwrap();
    }
}

struct Echo {
    memory: Option<Memory>,
    exit: (EventConsumer, EventNotifier),
}

impl Echo {
    fn new() -> Self {
        Self { memory: None, exit: new_event_consumer_and_notifier(EventFlag::NONBLOCK).unwrap() }
    }

    /// What is not well-formed ends the batch: this peer is not the one under test.
    fn serve(&self, vring: &VringRwLock) -> Option<()> {
        let memory = self.memory.as_ref()?.memory();
        loop {
            let mut vring_state = vring.get_mut();
            vring_state.disable_notification().ok()?;
            loop {
                let chain = vring_state.get_queue_mut().iter(&*memory).ok()?.next();
                let Some(chain) = chain else { break };
                let head = chain.head_index();
                let mut bytes = vec![0; BYTES_MAX];
                let len = Reader::new(&*memory, chain.clone()).ok()?.read(&mut bytes).ok()?;
                let mut writer = Writer::new(&*memory, chain).ok()?;
                let room = writer.available_bytes().min(len);
                let written = writer.write(&bytes[..room]).ok()?;
                vring_state.add_used(head, u32::try_from(written).ok()?).ok()?;
            }
            if vring_state.needs_notification().ok()? {
                vring_state.signal_used_queue().ok()?;
            }
            if !vring_state.enable_notification().ok()? {
                return Some(());
            }
        }
    }
}

impl VhostUserBackendMut for Echo {
    type Bitmap = ();
    type Vring = VringRwLock;

    fn num_queues(&self) -> usize {
        QUEUES
    }

    fn max_queue_size(&self) -> usize {
        256
    }

    fn features(&self) -> u64 {
        TRANSPORT_FEATURES | FEATURE_PROTOCOL | 1 << 5
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIG
    }

    fn set_event_idx(&mut self, _enabled: bool) {}

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        (offset..).take(usize::try_from(size).unwrap()).map(|byte| byte.to_le_bytes()[0]).collect()
    }

    fn update_memory(&mut self, memory: Memory) -> io::Result<()> {
        self.memory = Some(memory);
        Ok(())
    }

    fn exit_event(&self, _thread: usize) -> Option<(EventConsumer, EventNotifier)> {
        Some((self.exit.0.try_clone().unwrap(), self.exit.1.try_clone().unwrap()))
    }

    fn handle_event(
        &mut self,
        queue: u16,
        _events: EventSet,
        vrings: &[VringRwLock],
        _thread: usize,
    ) -> io::Result<()> {
        if let Some(vring) = vrings.get(usize::from(queue)) {
            self.serve(vring);
        }
        Ok(())
    }
}
