//! A process that speaks vhost-user, as its front-end sees it.

use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use vhost::VhostBackend;
use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserProtocolFeatures, VhostUserVirtioFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};

use super::deadline::Deadline;
use crate::event::LoopHandle;

/// How long an answer, or a few that belong together, may take. A healthy process needs less than a
/// millisecond; on a host out of breath it may need a second.
pub const PATIENCE: Duration = Duration::from_secs(if cfg!(test) { 1 } else { 5 });

/// `VHOST_F_LOG_ALL`, for migration by those who know dirty logs.
const FEATURE_LOG_ALL: u64 = 1 << 26;
/// `VIRTIO_F_VERSION_1`: nothing older is spoken here.
const FEATURE_VERSION_1: u64 = 1 << 32;

/// Where a process is found.
#[derive(Clone, Debug)]
pub enum Origin {
    /// It listens at this path, and may be found there again after it has ended.
    Path(PathBuf),
    /// It was given a socket at its start and is not found again.
    Child,
}

/// A conversation with a vhost-user back-end.
pub struct UserVhost {
    origin: Origin,
    ring_count: u64,
    watch: LoopHandle,
    conversation: Conversation,
}

/// What ends when the process does.
struct Conversation {
    frontend: Frontend,
    socket: UnixStream,
    deadline: Deadline,
    features: u64,
    protocol: VhostUserProtocolFeatures,
    ring_count: u64,
}

impl UserVhost {
    /// Connects to the process that listens at `path` and asks what it can do, for a device with at
    /// most `ring_count` rings. `watch` is the loop of a thread that does not use the connection.
    ///
    /// # Errors
    ///
    /// Nobody listens there, or who does is no vhost-user back-end for virtio 1.
    pub fn connect(path: &Path, ring_count: u64, watch: LoopHandle) -> io::Result<Self> {
        Self::new(connect(path)?, Origin::Path(path.into()), ring_count, watch)
    }

    /// The same with a socket whose other end a child of ours has.
    ///
    /// # Errors
    ///
    /// As for [`UserVhost::connect`].
    pub fn with_child(socket: UnixStream, ring_count: u64, watch: LoopHandle) -> io::Result<Self> {
        Self::new(socket, Origin::Child, ring_count, watch)
    }

    fn new(
        socket: UnixStream,
        origin: Origin,
        ring_count: u64,
        watch: LoopHandle,
    ) -> io::Result<Self> {
        let conversation = Conversation::open(socket, ring_count, &watch)?;
        Ok(Self { origin, ring_count, watch, conversation })
    }

    /// The virtio features of the process.
    pub fn features(&self) -> u64 {
        let of_vhost = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() | FEATURE_LOG_ALL;
        self.conversation.features & !of_vhost
    }

    /// What the process is told of the features that a driver agreed to.
    pub fn accepted_features(&self, agreed: u64) -> u64 {
        let of_vhost = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        (agreed | of_vhost) & self.conversation.features
    }

    /// How many rings the process serves, at most as many as were asked for.
    pub fn ring_count(&self) -> u64 {
        self.conversation.ring_count
    }

    /// Says whether the process may have more rings than one device of its kind at least has.
    pub fn has_many_queues(&self) -> bool {
        self.conversation.protocol.contains(VhostUserProtocolFeatures::MQ)
    }

    /// Asks for `len` bytes of the device's configuration space; `None` from a process that leaves
    /// it to us.
    pub fn config(&mut self, len: u32) -> io::Result<Option<Vec<u8>>> {
        if !self.conversation.protocol.contains(VhostUserProtocolFeatures::CONFIG) {
            return Ok(None);
        }
        let zeros = vec![0; usize::try_from(len).map_err(io::Error::other)?];
        let answer = self.conversation.exchange(|frontend| {
            frontend.get_config(0, len, VhostUserConfigFlags::empty(), &zeros)
        })?;
        Ok(Some(answer.1))
    }

    /// Speaks to the process, and stops listening after [`PATIENCE`].
    pub fn exchange<T>(
        &mut self,
        work: impl FnOnce(&mut Frontend) -> vhost::Result<T>,
    ) -> io::Result<T> {
        self.conversation.exchange(work)
    }

    /// Lets rings go that are set up.
    pub fn enable(&mut self, rings: &[usize]) -> io::Result<()> {
        if !self.conversation.has_protocol_features() {
            return Ok(());
        }
        self.exchange(|frontend| {
            rings.iter().try_for_each(|ring| frontend.set_vring_enable(*ring, true))
        })
    }

    /// Stops rings; the answer to the last request says that the process has let go of them. Who
    /// can be told of a reset then forgets the device's state too. One that does not answer is not
    /// spoken to any more.
    pub fn stop(&mut self, rings: &[usize]) -> io::Result<()> {
        let has_enable = self.conversation.has_protocol_features();
        let has_reset =
            self.conversation.protocol.contains(VhostUserProtocolFeatures::RESET_DEVICE);
        let outcome = self.exchange(|frontend| {
            for ring in rings {
                if has_enable {
                    frontend.set_vring_enable(*ring, false)?;
                }
                frontend.get_vring_base(*ring)?;
            }
            if has_reset { frontend.reset_device() } else { Ok(()) }
        });
        if outcome.is_err() {
            self.hang_up();
        }
        outcome
    }

    /// Ends the conversation.
    pub fn hang_up(&mut self) {
        let _ = self.conversation.socket.shutdown(Shutdown::Both);
    }

    /// Looks for the process again; it must be able to do what it could before.
    pub fn reconnect(&mut self) -> io::Result<()> {
        let Origin::Path(path) = &self.origin else {
            return Err(io::Error::new(io::ErrorKind::Unsupported, "the process has ended"));
        };
        let old = (self.features(), self.ring_count());
        self.conversation = Conversation::open(connect(path)?, self.ring_count, &self.watch)?;
        let new = (self.features(), self.ring_count());
        if old.0 & !new.0 != 0 || new.1 < old.1 {
            self.hang_up();
            return Err(io::Error::other("the process that came back can do less than before"));
        }
        Ok(())
    }

    /// Says whether [`UserVhost::reconnect`] may find the process.
    pub fn may_come_back(&self) -> bool {
        matches!(self.origin, Origin::Path(_))
    }

    /// The socket, which hangs up when the process ends.
    pub fn socket(&self) -> BorrowedFd<'_> {
        self.conversation.socket.as_fd()
    }
}

impl Conversation {
    fn open(socket: UnixStream, ring_count: u64, watch: &LoopHandle) -> io::Result<Self> {
        let frontend = Frontend::from_stream(socket.try_clone()?, ring_count);
        let deadline = Deadline::new(socket.try_clone()?, watch)?;
        let (features, protocol) = (0, VhostUserProtocolFeatures::empty());
        let mut conversation = Self { frontend, socket, deadline, features, protocol, ring_count };
        conversation.introduce()?;
        Ok(conversation)
    }

    /// Owner, features and numbers, before any device is set up.
    fn introduce(&mut self) -> io::Result<()> {
        let wanted = VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::RESET_DEVICE
            | VhostUserProtocolFeatures::CONFIG;
        let ring_count = self.ring_count;
        let found = self.exchange(|frontend| {
            frontend.set_owner()?;
            let features = frontend.get_features()?;
            let mut protocol = VhostUserProtocolFeatures::empty();
            if features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() != 0 {
                protocol = frontend.get_protocol_features()? & wanted;
                frontend.set_protocol_features(protocol)?;
            }
            if protocol.contains(VhostUserProtocolFeatures::REPLY_ACK) {
                frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
            }
            let count = match protocol.contains(VhostUserProtocolFeatures::MQ) {
                true => frontend.get_queue_num()?,
                false => ring_count,
            };
            Ok((features, protocol, ring_count.min(count)))
        })?;
        (self.features, self.protocol, self.ring_count) = found;
        if self.features & FEATURE_VERSION_1 == 0 {
            return Err(io::Error::other("the process does not speak virtio 1"));
        }
        Ok(())
    }

    fn has_protocol_features(&self) -> bool {
        self.features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() != 0
    }

    fn exchange<T>(
        &mut self,
        work: impl FnOnce(&mut Frontend) -> vhost::Result<T>,
    ) -> io::Result<T> {
        let frontend = &mut self.frontend;
        let outcome = self.deadline.limit(PATIENCE, || work(frontend))?;
        outcome.map_err(|error| {
            if self.deadline.has_passed() {
                let message = format!("the process did not answer for {} s", PATIENCE.as_secs());
                io::Error::new(io::ErrorKind::TimedOut, message)
            } else {
                io::Error::other(error)
            }
        })
    }
}

/// Connects without waiting: not even for one who listens and does not accept.
fn connect(path: &Path) -> io::Result<UnixStream> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
    let socket = UnixStream::from(socket);
    socket.set_nonblocking(false)?;
    Ok(socket)
}
