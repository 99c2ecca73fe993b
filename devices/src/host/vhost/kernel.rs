//! A vhost driver of the host's kernel, through its device file.
#![expect(unsafe_code, reason = "ioctls that the vhost crate has for its own types only")]

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;

use arch::memory::GuestMemory;
use vhost::vhost_kern::VhostKernBackend;
use vhost::vhost_kern::vhost_binding::{
    VHOST_NET_SET_BACKEND, VHOST_VSOCK_SET_GUEST_CID, VHOST_VSOCK_SET_RUNNING, vhost_vring_file,
};
use vhost::{VhostBackend, VringConfigData};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::ioctl::ioctl_with_ref;

use crate::host::tap::TapQueue;

/// The driver for network cards.
pub const NET: &str = "/dev/vhost-net";
/// The driver for socket devices.
pub const VSOCK: &str = "/dev/vhost-vsock";

/// One device of a vhost driver, owned by this process. It lets go of everything when dropped.
pub struct KernelVhost {
    file: File,
    features: u64,
    memory: &'static GuestMemoryMmap,
}

impl KernelVhost {
    /// Opens a device at `path`, which is [`NET`] or [`VSOCK`], for a guest with this `memory`.
    ///
    /// # Errors
    ///
    /// The host has no such driver, or this user may not use it.
    pub fn open(path: &str, memory: GuestMemory) -> io::Result<Self> {
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
        let file = OpenOptions::new().read(true).write(true).custom_flags(flags).open(path)?;
        let mut device = Self { file, features: 0, memory: memory.backend() };
        device.set_owner().map_err(io::Error::other)?;
        device.features = device.get_features().map_err(io::Error::other)?;
        Ok(device)
    }

    /// The feature bits that the driver knows.
    pub fn features(&self) -> u64 {
        self.features
    }

    /// Connects ring `ring` of [`NET`] to a queue of a tap and starts it; `None` stops it.
    ///
    /// When a stop returns, the driver touches neither the ring nor its buffers.
    pub fn set_net_back_end(&self, ring: u32, tap: Option<&TapQueue>) -> io::Result<()> {
        let fd = tap.map_or(-1, |tap| tap.as_raw_fd());
        let file = vhost_vring_file { index: ring, fd };
        // SAFETY: the request takes a vhost_vring_file, which the kernel only reads.
        outcome(unsafe { ioctl_with_ref(self, VHOST_NET_SET_BACKEND(), &file) })
    }

    /// Gives the guest behind [`VSOCK`] its address; an address in use is refused.
    pub fn set_guest_cid(&self, cid: u64) -> io::Result<()> {
        // SAFETY: the request takes a 64-bit number, which the kernel only reads.
        outcome(unsafe { ioctl_with_ref(self, VHOST_VSOCK_SET_GUEST_CID(), &cid) })
    }

    /// Starts or stops all rings of [`VSOCK`].
    ///
    /// When a stop returns, the driver touches neither the rings nor their buffers.
    pub fn set_vsock_running(&self, running: bool) -> io::Result<()> {
        let running = libc::c_int::from(running);
        // SAFETY: the request takes an int, which the kernel only reads.
        outcome(unsafe { ioctl_with_ref(self, VHOST_VSOCK_SET_RUNNING(), &running) })
    }
}

impl VhostKernBackend for KernelVhost {
    type AS = &'static GuestMemoryMmap;

    fn mem(&self) -> &Self::AS {
        &self.memory
    }

    /// Rings are checked before they come here, and may end where RAM ends.
    fn is_valid(&self, _ring: &VringConfigData) -> bool {
        true
    }
}

impl AsRawFd for KernelVhost {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

fn outcome(returned: libc::c_int) -> io::Result<()> {
    if returned < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
