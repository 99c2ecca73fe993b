//! Requests of ioctl(2) about interfaces.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};

use libc::{c_char, c_int, c_short, ifreq};
use rustix::net::{AddressFamily, SocketFlags, SocketType};

const ATTACH_QUEUE: c_short = 0x0200;
const DETACH_QUEUE: c_short = 0x0400;

/// What is passed for most requests: a name and one value.
pub(super) struct InterfaceRequest(ifreq);

impl InterfaceRequest {
    /// Attaches `file` to the tap interface `name`.
    pub(super) fn attach(file: &File, name: &str, flags: c_short) -> io::Result<()> {
        let mut request = Self::new(name)?;
        request.0.ifr_ifru.ifru_flags = flags;
        request.make(file.as_raw_fd(), libc::TUNSETIFF)
    }

    /// Asks about the interface `name`.
    pub(super) fn of_interface(name: &str, question: libc::Ioctl) -> io::Result<Self> {
        let mut request = Self::new(name)?;
        request.make(socket()?.as_raw_fd(), question)?;
        Ok(request)
    }

    /// Asks about the interface that `file` is attached to.
    pub(super) fn of_descriptor(file: &File, question: libc::Ioctl) -> io::Result<Self> {
        let mut request = Self::new("")?;
        request.make(file.as_raw_fd(), question)?;
        Ok(request)
    }

    /// Gives the interface `name` an MTU.
    pub(super) fn set_mtu(name: &str, mtu: c_int) -> io::Result<()> {
        let mut request = Self::new(name)?;
        request.0.ifr_ifru.ifru_mtu = mtu;
        request.make(socket()?.as_raw_fd(), libc::SIOCSIFMTU)
    }

    /// Gives the interface that `file` is attached to an address.
    pub(super) fn set_address(file: &File, address: [u8; 6]) -> io::Result<()> {
        let mut request = Self::new("")?;
        let mut data = [0; 14];
        for (place, byte) in data.iter_mut().zip(address) {
            *place = byte.cast_signed() as c_char;
        }
        request.0.ifr_ifru.ifru_hwaddr =
            libc::sockaddr { sa_family: libc::ARPHRD_ETHER, sa_data: data };
        request.make(file.as_raw_fd(), libc::SIOCSIFHWADDR)
    }

    fn new(name: &str) -> io::Result<Self> {
        // SAFETY: all zeroes is a request for an interface without a name.
        let mut request: ifreq = unsafe { std::mem::zeroed() };
        let room = request.ifr_name.len();
        if name.len() >= room || name.contains('\0') {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        for (place, byte) in request.ifr_name.iter_mut().zip(name.bytes()) {
            *place = byte.cast_signed() as c_char;
        }
        Ok(Self(request))
    }

    fn make(&mut self, descriptor: RawFd, request: libc::Ioctl) -> io::Result<()> {
        // SAFETY: every request that is made here reads and writes one ifreq at the most.
        match unsafe { libc::ioctl(descriptor, request, &raw mut self.0) } {
            0.. => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// The interface's name in an answer.
    pub(super) fn name(&self) -> String {
        let bytes = self.0.ifr_name.iter().take_while(|letter| **letter != 0);
        let bytes: Vec<u8> = bytes.map(|letter| letter.cast_unsigned()).collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// The flags in an answer.
    pub(super) fn flags(&self) -> c_short {
        // SAFETY: any bytes are flags.
        unsafe { self.0.ifr_ifru.ifru_flags }
    }

    /// The number in an answer.
    pub(super) fn int(&self) -> c_int {
        // SAFETY: any bytes are a number.
        unsafe { self.0.ifr_ifru.ifru_mtu }
    }

    /// The address in an answer, where it is an Ethernet interface's.
    pub(super) fn address(&self) -> Option<[u8; 6]> {
        // SAFETY: any bytes are an address.
        let address = unsafe { self.0.ifr_ifru.ifru_hwaddr };
        let [a, b, c, d, e, f, ..] = address.sa_data.map(|byte| byte.cast_unsigned());
        (address.sa_family == libc::ARPHRD_ETHER).then_some([a, b, c, d, e, f])
    }
}

/// A request that passes a pointer to a number.
pub(super) fn set_int(file: &File, request: libc::Ioctl, value: c_int) -> io::Result<()> {
    // SAFETY: the requests that are made here read one int.
    match unsafe { libc::ioctl(file.as_raw_fd(), request, &raw const value) } {
        0.. => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// What the host leaves to the guest, in the kernel's bits.
pub(super) fn set_offloads(file: &File, offloads: u32) -> io::Result<()> {
    let offloads = libc::c_ulong::from(offloads);
    // SAFETY: this request passes its argument by value.
    match unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETOFFLOAD, offloads) } {
        0.. => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Takes a queue out of those that frames are spread over, or back among them.
pub(super) fn set_attached(file: &File, attached: bool) -> io::Result<()> {
    let mut request = InterfaceRequest::new("")?;
    request.0.ifr_ifru.ifru_flags = if attached { ATTACH_QUEUE } else { DETACH_QUEUE };
    request.make(file.as_raw_fd(), libc::TUNSETQUEUE)
}

/// Any socket: requests about interfaces need one.
fn socket() -> io::Result<std::os::fd::OwnedFd> {
    let (family, flags) = (AddressFamily::INET, SocketFlags::CLOEXEC);
    Ok(rustix::net::socket_with(family, SocketType::DGRAM, flags, None)?)
}
