//! Tap and macvtap interfaces: opened by name or inherited as descriptors (linux/if_tun.h).
//!
//! Every frame has a header before it that says what is left to do about checksums and segments;
//! its layout is that of virtio, which is why frames pass without a look at them.
#![expect(unsafe_code, reason = "requests of ioctl(2) and raw iovecs of guest memory")]

mod error;
mod frame;
mod monitor;
mod request;
#[cfg(test)]
mod test;

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::{Mutex, PoisonError};

use libc::{c_int, c_short};
use rustix::fs::{FlockOperation, Mode, OFlags};
use rustix::io::Errno;

pub use self::error::TapError;
pub use self::frame::{FRAME_BYTES_MAX, FrameIo, SLICES_MAX};
pub use self::monitor::{Monitor, State};
use self::request::InterfaceRequest;

/// What opens tap interfaces.
const CLONE_DEVICE: &str = "/dev/net/tun";

/// Its device number.
const MISC_MAJOR: u32 = 10;
const TUN_MINOR: u32 = 200;

/// What every queue is opened for: Ethernet frames (`IFF_TAP`), no further header (`IFF_NO_PI`).
/// Requests have shorts for flags that libc has as ints.
const FLAGS: c_short = 0x0002 | 0x1000 | VNET_HDR;
const VNET_HDR: c_short = 0x4000;
const MULTI_QUEUE: c_short = 0x0100;

/// Work on frames that the host leaves to the guest, in the bits of `TUNSETOFFLOAD`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offloads(u32);

impl Offloads {
    /// None.
    pub const NONE: Self = Self(0);
    /// Checksums that are not complete. Without it there is nothing else.
    pub const CHECKSUM: Self = Self(0x01);
    /// TCP over IPv4 in segments larger than a frame.
    pub const TSO4: Self = Self(0x02);
    /// The same over IPv6.
    pub const TSO6: Self = Self(0x04);
    /// The same with congestion notification.
    pub const TSO_ECN: Self = Self(0x08);
    /// UDP datagrams larger than a frame.
    pub const UFO: Self = Self(0x10);
    /// UDP segments that belong together, over both; since Linux 6.2.
    pub const USO: Self = Self(0x20 | 0x40);

    const ALL: Self = Self(0x7f);

    /// Whether all of `other` are among them.
    #[must_use]
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// Both together.
    #[must_use]
    pub const fn with(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    const fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }
}

/// How many queues are opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Queues {
    /// So many, or an error.
    Exactly(u16),
    /// So many, or one where the interface has no more.
    UpTo(u16),
}

/// An open interface. At first its first queue alone is in use.
#[derive(Debug)]
pub struct Tap {
    name: String,
    /// Its queues are not an interface's: there is nothing to tell a kernel.
    is_stand_in: bool,
    queues: Vec<TapQueue>,
    offloads: Offloads,
    /// How many queues the kernel spreads frames over.
    used: Mutex<u16>,
    /// Keeps others that ask away from an interface which the kernel would share.
    _lock: Option<OwnedFd>,
}

/// One queue of an interface.
#[derive(Debug)]
pub struct TapQueue(File);

impl AsRawFd for TapQueue {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

impl Tap {
    /// Opens the interface `name`, which must exist.
    pub fn open(name: &str, queues: Queues) -> Result<Self, TapError> {
        let flags = tun_flags(name)?;
        let has_many = flags & i64::from(MULTI_QUEUE) != 0;
        let count = match queues {
            Queues::Exactly(count) if count > 1 && !has_many => {
                return Err(TapError::OneQueue { name: name.to_owned(), count });
            }
            _ if !has_many => 1,
            Queues::Exactly(count) | Queues::UpTo(count) => count.max(1),
        };
        let lock = lock(name)?;
        let flags = if has_many { FLAGS | MULTI_QUEUE } else { FLAGS };
        let mut files = Vec::new();
        for _ in 0..count {
            files.push(attach(name, flags)?);
        }
        Self::new(name.to_owned(), files, Some(lock))
    }

    /// Takes over descriptors that this process has inherited, all of one interface.
    pub fn inherit(descriptors: &[RawFd]) -> Result<Self, TapError> {
        let mut name: Option<String> = None;
        let mut files = Vec::new();
        for descriptor in descriptors {
            let (file, found) = inherited(*descriptor)?;
            match &name {
                Some(name) if *name != found => {
                    return Err(TapError::Mixed { one: name.clone(), other: found });
                }
                _ => name = Some(found),
            }
            files.push(file);
        }
        Self::new(name.unwrap_or_default(), files, None)
    }

    fn new(name: String, files: Vec<File>, lock: Option<OwnedFd>) -> Result<Self, TapError> {
        let failed = |source| TapError::SetUp { name: name.clone(), source };
        for file in &files {
            request::set_int(file, libc::TUNSETVNETHDRSZ, frame::HEADER_BYTES).map_err(failed)?;
            // Older kernels are little-endian here anyway.
            let _ = request::set_int(file, libc::TUNSETVNETLE, 1);
        }
        let count = u16::try_from(files.len()).unwrap_or(u16::MAX);
        let queues: Vec<_> = files.into_iter().map(TapQueue).collect();
        let offloads = queues.first().map(probe_offloads).unwrap_or_default();
        let used = Mutex::new(count);
        let tap = Self { name, is_stand_in: false, queues, offloads, used, _lock: lock };
        tap.use_queues(1).map_err(|source| TapError::SetUp { name: tap.name.clone(), source })?;
        Ok(tap)
    }

    /// A stand-in for an interface with every offload: each of its queues is a datagram socket that
    /// carries frames with their headers. For tests on machines where no interface may be made.
    pub fn stand_in(name: &str, sockets: Vec<OwnedFd>) -> Self {
        let used = Mutex::new(u16::try_from(sockets.len()).unwrap_or(u16::MAX));
        let queues = sockets.into_iter().map(|socket| TapQueue(socket.into())).collect();
        let (name, offloads) = (name.to_owned(), Offloads::ALL);
        Self { name, is_stand_in: true, queues, offloads, used, _lock: None }
    }

    /// The interface's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// All queues that were opened.
    pub fn queues(&self) -> &[TapQueue] {
        &self.queues
    }

    /// What the host can leave to the guest.
    pub fn offloads(&self) -> Offloads {
        self.offloads
    }

    /// Leaves exactly `offloads` to the guest, for frames that arrive from now on.
    pub fn set_offloads(&self, offloads: Offloads) -> io::Result<()> {
        let offloads =
            if offloads.contains(Offloads::CHECKSUM) { offloads } else { Offloads::NONE };
        if self.is_stand_in {
            return Ok(());
        }
        // Of a tap they are the interface's, of a macvtap each queue's.
        self.queues.iter().try_for_each(|queue| request::set_offloads(&queue.0, offloads.0))
    }

    /// Lets the kernel spread frames over the first `count` queues.
    pub fn use_queues(&self, count: u16) -> io::Result<()> {
        let mut used = self.used.lock().unwrap_or_else(PoisonError::into_inner);
        let count = count.clamp(1, u16::try_from(self.queues.len()).unwrap_or(u16::MAX));
        while *used < count {
            self.set_attached(*used, true)?;
            *used += 1;
        }
        while *used > count {
            self.set_attached(*used - 1, false)?;
            *used -= 1;
        }
        Ok(())
    }

    /// How many queues the kernel spreads frames over.
    pub fn used_queues(&self) -> u16 {
        *self.used.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set_attached(&self, index: u16, attached: bool) -> io::Result<()> {
        match self.queues.get(usize::from(index)) {
            Some(queue) if !self.is_stand_in => request::set_attached(&queue.0, attached),
            _ => Ok(()),
        }
    }

    /// The largest packet that the interface carries in bytes; `None` where it is in a network
    /// namespace that this process does not see.
    pub fn mtu(&self) -> Option<u16> {
        let request = InterfaceRequest::of_interface(&self.name, libc::SIOCGIFMTU).ok()?;
        u16::try_from(request.int()).ok()
    }

    /// Gives the interface another MTU, unless it has it already.
    pub fn set_mtu(&self, mtu: u16) -> Result<(), TapError> {
        if self.mtu() == Some(mtu) {
            return Ok(());
        }
        InterfaceRequest::set_mtu(&self.name, c_int::from(mtu)).map_err(|source| TapError::Mtu {
            name: self.name.clone(),
            mtu,
            source,
        })
    }

    /// The address that a guest must use: that of a macvtap, which passes no frames for others.
    pub fn guest_address(&self) -> Option<[u8; 6]> {
        let queue = self.queues.first().filter(|_| self.is_macvtap())?;
        InterfaceRequest::of_descriptor(&queue.0, libc::SIOCGIFHWADDR).ok()?.address()
    }

    /// Makes the interface pass frames for a guest with this address, which a tap always does.
    pub fn set_guest_address(&self, address: [u8; 6]) -> Result<(), TapError> {
        if self.guest_address().is_none_or(|own| own == address) {
            return Ok(());
        }
        let Some(queue) = self.queues.first() else { return Ok(()) };
        InterfaceRequest::set_address(&queue.0, address)
            .map_err(|source| TapError::Address { name: self.name.clone(), source })
    }

    /// A macvtap has a device file of its own, taps come from one that they have in common.
    fn is_macvtap(&self) -> bool {
        let file = self.queues.first().filter(|_| !self.is_stand_in);
        let file = file.and_then(|queue| rustix::fs::fstat(&queue.0).ok());
        file.is_some_and(|file| file.st_rdev != rustix::fs::makedev(MISC_MAJOR, TUN_MINOR))
    }
}

/// The flags of the tap interface `name`, as the kernel shows them.
fn tun_flags(name: &str) -> Result<i64, TapError> {
    let path = format!("/sys/class/net/{name}/tun_flags");
    match std::fs::read_to_string(&path) {
        Ok(text) => {
            let digits = text.trim().trim_start_matches("0x");
            Ok(i64::from_str_radix(digits, 16).unwrap_or(0))
        }
        Err(_) if InterfaceRequest::of_interface(name, libc::SIOCGIFMTU).is_ok() => {
            // A host without sysfs here, or an interface of another kind: attaching tells.
            Ok(0)
        }
        Err(_) => Err(TapError::Missing(name.to_owned())),
    }
}

/// The kernel lets several processes share an interface with many queues, and its frames would go
/// to either. Whoever locks its flags in sysfs is alone among those who ask.
fn lock(name: &str) -> Result<OwnedFd, TapError> {
    let path = format!("/sys/class/net/{name}/tun_flags");
    let busy = || TapError::Busy(name.to_owned());
    let file = rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty());
    let file = file.map_err(|_| TapError::NoTap(name.to_owned()))?;
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Err(Errno::WOULDBLOCK) => Err(busy()),
        _ => Ok(file),
    }
}

/// Opens one queue of the interface `name`.
fn attach(name: &str, flags: c_short) -> Result<File, TapError> {
    let mode = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = rustix::fs::open(CLONE_DEVICE, mode, Mode::empty());
    let file = File::from(file.map_err(|error| TapError::Device(error.into()))?);
    match InterfaceRequest::attach(&file, name, flags) {
        Ok(()) => Ok(file),
        Err(error) => {
            let name = name.to_owned();
            Err(match error.raw_os_error() {
                Some(libc::EBUSY) => TapError::Busy(name),
                Some(libc::EPERM) => TapError::Permission(name),
                Some(libc::EINVAL) => TapError::NoTap(name),
                _ => TapError::SetUp { name, source: error },
            })
        }
    }
}

/// Takes over one descriptor, and says which interface it is of.
fn inherited(descriptor: RawFd) -> Result<(File, String), TapError> {
    if descriptor < 0 {
        return Err(TapError::NotOpen(descriptor));
    }
    // SAFETY: it is not negative, and it is only looked at; one that is not open is an error of the
    // call.
    let borrowed = unsafe { BorrowedFd::borrow_raw(descriptor) };
    if rustix::io::fcntl_getfd(borrowed).is_err() {
        return Err(TapError::NotOpen(descriptor));
    }
    // SAFETY: the command line gives it to this card alone, and nobody else in this process knows
    // of it.
    let file = File::from(unsafe { OwnedFd::from_raw_fd(descriptor) });
    let failed = |source| TapError::Inherit { descriptor, source };
    let found = InterfaceRequest::of_descriptor(&file, libc::TUNGETIFF);
    let found = found.map_err(|_| TapError::NoTapDescriptor(descriptor))?;
    if found.flags() & VNET_HDR == 0 {
        // A macvtap can be told now, a tap had to be told when it was attached.
        InterfaceRequest::attach(&file, &found.name(), FLAGS)
            .map_err(|_| TapError::NoHeader { descriptor, name: found.name() })?;
    }
    rustix::io::fcntl_setfd(&file, rustix::io::FdFlags::CLOEXEC).map_err(|e| failed(e.into()))?;
    rustix::io::ioctl_fionbio(&file, true).map_err(|e| failed(e.into()))?;
    Ok((file, found.name()))
}

/// The offloads that the kernel knows; afterwards none is on.
fn probe_offloads(queue: &TapQueue) -> Offloads {
    let candidates = [
        Offloads::ALL,
        Offloads::ALL.without(Offloads::USO),
        Offloads::ALL.without(Offloads::USO).without(Offloads::UFO),
        Offloads::CHECKSUM,
    ];
    let known = candidates.into_iter().find(|all| request::set_offloads(&queue.0, all.0).is_ok());
    let _ = request::set_offloads(&queue.0, 0);
    known.unwrap_or_default()
}
