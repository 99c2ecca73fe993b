//! The file system device (virtio 1.3, section 5.11), whose requests another process answers.
//!
//! Its front has the tag and the number of queues; every ring is the process's, and no request is
//! looked at here. There is no notification queue and no DAX window: nobody has the other half of
//! either (ARCHITECTURE.md). What is counted is how often the process was lost and set up.
//!
//! When a process is gone for good, requests get an error here: Linux does not reset the device,
//! and who waited for an answer could not even be killed.

use std::io;
use std::sync::{Arc, Mutex};

use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::chain::Chain;
use super::counters::Counters;
use super::device::{Activation, DeviceKind, Offer, VirtioDevice};
use super::feature::TRANSPORT_FEATURES;
use super::vhost::{self, Conversations, Share, UserRings};
use crate::event::{LoopHandle, Registration};
use crate::host::vhost::user::UserVhost;

/// Longest tag in bytes.
pub const MAX_TAG_BYTES: usize = 36;

/// Rings besides those for requests: the one for what must not wait behind them.
const OTHER_RINGS: u64 = 1;

/// FORGET and INTERRUPT are short.
const URGENT_SIZE: u16 = 128;

/// Largest request: 1 MiB in pages and a few headers is what Linux asks for without indirect
/// descriptors, and a few such requests wait at once.
const REQUEST_SIZE: u16 = 1024;

/// The configuration space: the tag, and the number of request queues.
const CONFIG_BYTES: usize = MAX_TAG_BYTES + 4;

/// How a file system is set up.
#[derive(Clone, Debug)]
pub struct FileSystemOptions {
    /// What the log calls the device.
    pub name: String,
    /// What the guest mounts it by: 1 to [`MAX_TAG_BYTES`] bytes.
    pub tag: String,
    /// Most request queues that it has; a process that serves fewer decides.
    pub request_queues: u16,
}

/// A file system device.
pub struct FileSystem {
    name: String,
    config: [u8; CONFIG_BYTES],
    request_queues: u16,
    transport_features: u64,
    rings: Arc<Mutex<UserRings>>,
    conversations: Arc<Conversations>,
    home: LoopHandle,
    worker: Option<Registration>,
}

impl FileSystem {
    /// How many rings a process is asked for, for a device with `request_queues`.
    #[must_use]
    pub fn ring_count(request_queues: u16) -> u64 {
        OTHER_RINGS + u64::from(request_queues)
    }

    /// The device whose rings the process behind `vhost` serves; it is spoken to on the thread of
    /// `home`. `on_loss` is called there when it is lost.
    ///
    /// # Errors
    ///
    /// The process has no queue for requests.
    pub fn new(
        options: FileSystemOptions,
        vhost: UserVhost,
        home: LoopHandle,
        mut on_loss: impl FnMut() + Send + 'static,
    ) -> io::Result<Self> {
        let served = vhost.ring_count().saturating_sub(OTHER_RINGS);
        let served = if vhost.has_many_queues() { served } else { served.min(1) };
        let served = u16::try_from(served).unwrap_or(u16::MAX);
        let request_queues = options.request_queues.min(served);
        if request_queues == 0 {
            return Err(io::Error::other("the process has no queue for requests"));
        }
        let transport_features = vhost.features() & TRANSPORT_FEATURES;
        let rings = UserRings::new(vhost, move |is_present| {
            if !is_present {
                on_loss();
            }
        });
        Ok(Self {
            name: options.name,
            config: config(&options.tag, request_queues),
            request_queues,
            transport_features,
            conversations: rings.conversations(),
            rings: Arc::new(Mutex::new(rings)),
            home,
            worker: None,
        })
    }

    fn queue_count(&self) -> usize {
        1 + usize::from(self.request_queues)
    }
}

impl VirtioDevice for FileSystem {
    fn offer(&self) -> Offer {
        let mut queue_sizes = vec![REQUEST_SIZE; self.queue_count()];
        if let Some(urgent) = queue_sizes.first_mut() {
            *urgent = URGENT_SIZE;
        }
        Offer { kind: DeviceKind::FileSystem, features: 0, queue_sizes }
    }

    fn transport_features(&self) -> u64 {
        self.transport_features
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn counters(&self) -> Option<Counters> {
        let conversations = Arc::clone(&self.conversations);
        Some(Box::new(move || conversations.read()))
    }

    fn activate(&mut self, mut activation: Activation) -> io::Result<()> {
        let shares = vec![Share::new(&self.rings, 0..self.queue_count()).or_refuse(refuse)];
        self.worker = Some(vhost::start(&self.name, shares, &mut activation, &self.home)?);
        Ok(())
    }

    fn reset(&mut self) {
        self.worker = None;
    }
}

/// What each request begins with (`struct fuse_in_header` of Linux), as far as it is needed here.
#[derive(FromBytes, IntoBytes, Immutable)]
#[repr(C)]
struct RequestHeader {
    len: u32,
    opcode: u32,
    unique: u64,
}

/// What each answer begins with (`struct fuse_out_header`).
#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct AnswerHeader {
    len: u32,
    error: i32,
    unique: u64,
}

/// What Linux says for a file system whose server has ended.
const NOT_CONNECTED: i32 = -rustix::io::Errno::NOTCONN.raw_os_error();

/// Answers a request as a file system without a server; some want no answer.
fn refuse(chain: &mut Chain) -> u32 {
    let Some(request) = chain.take::<RequestHeader>() else { return 0 };
    let len = u32::try_from(size_of::<AnswerHeader>()).unwrap_or(u32::MAX);
    let (len, error) = (len.to_le(), NOT_CONNECTED.to_le());
    let answer = AnswerHeader { len, error, unique: request.unique };
    match chain.writable_len() >= answer.as_bytes().len() {
        true => u32::try_from(chain.write(answer.as_bytes())).unwrap_or_default(),
        false => 0,
    }
}

/// The configuration space; what of `tag` is too long is left out.
fn config(tag: &str, request_queues: u16) -> [u8; CONFIG_BYTES] {
    let mut config = [0; CONFIG_BYTES];
    let (name, number) = config.split_at_mut(MAX_TAG_BYTES);
    name.iter_mut().zip(tag.bytes()).for_each(|(place, byte)| *place = byte);
    number.copy_from_slice(&u32::from(request_queues).to_le_bytes());
    config
}

#[cfg(test)]
mod test;
