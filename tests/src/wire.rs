//! What does a frame look like when it has left the host? A wire that ends in a network of its own,
//! and on which every frame is looked at: the interface at the host's end can nothing, so that the
//! host's kernel cuts large frames and completes checksums as it would for a real card.
#![expect(unsafe_code, reason = "interfaces are opened by system calls")]

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::TcpListener;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use anyhow::{Context, Result, ensure};

use crate::namespace::in_own_network;
use crate::tool;

/// The largest frame: such an interface takes none that is longer than its MTU says.
const FRAME_BYTES_MAX: usize = 4096;

const ETHERNET_BYTES: usize = 14;
const IPV4: [u8; 2] = [0x08, 0x00];
const IPV6: [u8; 2] = [0x86, 0xDD];
const TCP: u8 = 6;

/// A wire between this host and a network that nobody else is in.
pub struct Wire {
    seen: Arc<Seen>,
    /// The host's end.
    name: &'static str,
}

/// What came along the wire, in both directions.
#[derive(Default)]
struct Seen {
    /// Frames of TCP with a right checksum.
    right: AtomicU64,
    /// Those with a wrong one.
    wrong: AtomicU64,
}

impl Wire {
    /// Lays a wire from the interface `name` of this host, which is made, in network `number`:
    /// the host's address is 10.N.0.1 and fdN::1, the far end's 10.N.0.2 and fdN::2.
    ///
    /// The result is the wire and a listener for connections to the far end.
    ///
    /// # Errors
    /// When one of the interfaces cannot be made.
    pub fn lay(name: &'static str, number: u8) -> Result<(Self, TcpListener)> {
        let near = open_interface(name)?;
        set_up(name, number, 1)?;
        let (far, listener) = in_own_network(move || {
            let far = open_interface("far")?;
            set_up("far", number, 2)?;
            for (family, gateway) in
                [("-4", format!("10.{number}.0.1")), ("-6", format!("fd{number}::1"))]
            {
                ip(&[family, "route", "add", "default", "via", &gateway])?;
            }
            Ok((far, TcpListener::bind("[::]:0")?))
        })?;
        let seen = Arc::new(Seen::default());
        for (from, to) in [(near.try_clone()?, far.try_clone()?), (far, near)] {
            let seen = Arc::clone(&seen);
            thread::spawn(move || carry(&from, &to, &seen));
        }
        Ok((Self { seen, name }, listener))
    }

    /// How many frames of TCP it has carried.
    ///
    /// # Errors
    /// When the checksum of one of them was wrong.
    pub fn frames(&self) -> Result<u64> {
        let (right, wrong) =
            (self.seen.right.load(Ordering::Relaxed), self.seen.wrong.load(Ordering::Relaxed));
        ensure!(wrong == 0, "{wrong} of {} frames have a wrong checksum", right + wrong);
        Ok(right)
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        // The threads notice, or end with this process.
        let _ = ip(&["link", "delete", self.name]);
    }
}

/// Opens a new tap that takes no checksum and no segment unfinished.
fn open_interface(name: &str) -> Result<File> {
    let file = File::options().read(true).write(true).open("/dev/net/tun")?;
    let mut request = [0_u8; 40];
    request
        .get_mut(..name.len())
        .filter(|_| name.len() < libc::IFNAMSIZ)
        .context("too long a name")?
        .copy_from_slice(name.as_bytes());
    let flags = u16::try_from(libc::IFF_TAP | libc::IFF_NO_PI)?;
    request[libc::IFNAMSIZ..][..2].copy_from_slice(&flags.to_ne_bytes());
    // SAFETY: the request is as long as the kernel's structure.
    match unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF as _, request.as_mut_ptr()) } {
        0 => Ok(file),
        _ => Err(io::Error::last_os_error()).with_context(|| format!("the interface {name}")),
    }
}

fn set_up(name: &str, number: u8, end: u8) -> Result<()> {
    ip(&["link", "set", name, "up"])?;
    ip(&["address", "add", &format!("10.{number}.0.{end}/24"), "dev", name])?;
    ip(&["address", "add", &format!("fd{number}::{end}/64"), "dev", name, "nodad"])
}

fn ip(arguments: &[&str]) -> Result<()> {
    tool::run("ip", arguments.iter().map(Path::new)).map(drop)
}

/// Carries frames one way until one of the ends is gone.
fn carry(mut from: &File, mut to: &File, seen: &Seen) {
    let mut frame = [0; FRAME_BYTES_MAX];
    while let Ok(length) = from.read(&mut frame) {
        let frame = frame.get(..length).unwrap_or_default();
        match has_right_checksum(frame) {
            Some(true) => seen.right.fetch_add(1, Ordering::Relaxed),
            Some(false) => seen.wrong.fetch_add(1, Ordering::Relaxed),
            None => 0,
        };
        if to.write(frame).is_err() {
            return;
        }
    }
}

/// Whether the TCP checksum of `frame` is right, and the IPv4 header's; `None` for what is no TCP.
fn has_right_checksum(frame: &[u8]) -> Option<bool> {
    let kind: [u8; 2] = frame.get(12..ETHERNET_BYTES)?.try_into().ok()?;
    let packet = frame.get(ETHERNET_BYTES..)?;
    let (addresses, header, length) = match kind {
        IPV4 if *packet.get(9)? == TCP => {
            let header = usize::from(packet.first()? & 15) * 4;
            let total = usize::from(u16::from_be_bytes(packet.get(2..4)?.try_into().ok()?));
            if sum(packet.get(..header)?, 0) != 0xFFFF {
                return Some(false);
            }
            (packet.get(12..20)?, header, total.checked_sub(header)?)
        }
        IPV6 if *packet.get(6)? == TCP => {
            let length = u16::from_be_bytes(packet.get(4..6)?.try_into().ok()?);
            (packet.get(8..40)?, 40, usize::from(length))
        }
        _ => return None,
    };
    let segment = packet.get(header..header + length)?;
    let pseudo = sum(addresses, u64::from(TCP) + length as u64);
    Some(sum(segment, u64::from(pseudo)) == 0xFFFF)
}

/// The sum of RFC 1071 over `bytes`, begun with `start`.
fn sum(bytes: &[u8], start: u64) -> u16 {
    let words = bytes.chunks(2).map(|word| {
        let [high, low] = [word.first(), word.get(1)].map(|byte| byte.copied().unwrap_or(0));
        u64::from(u16::from_be_bytes([high, low]))
    });
    let mut sum = start + words.sum::<u64>();
    loop {
        match u16::try_from(sum) {
            Ok(sum) => return sum,
            Err(_) => sum = (sum & 0xFFFF) + (sum >> 16),
        }
    }
}

#[cfg(test)]
mod test {
    use super::*;

    /// A segment without data from 10.0.0.1 port 1 to 10.0.0.2 port 2; its sums were made apart.
    const FRAME: [u8; 54] = [
        0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 2, 8, 0, // Ethernet
        0x45, 0, 0, 40, 0, 0, 0, 0, 64, 6, 0x66, 0xCE, 10, 0, 0, 1, 10, 0, 0, 2, // IPv4
        0, 1, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0x50, 0x10, 0, 0, 0x9B, 0xCF, 0, 0, // TCP
    ];

    #[test]
    fn a_wrong_bit_anywhere_behind_the_addresses_of_a_frame_is_seen() {
        assert_eq!(has_right_checksum(&FRAME), Some(true));
        for place in 34..FRAME.len() {
            let mut frame = FRAME;
            frame[place] ^= 0x10;
            assert_eq!(has_right_checksum(&frame), Some(false), "byte {place}");
        }
        assert_eq!(has_right_checksum(&FRAME[..20]), None);
        assert_eq!(has_right_checksum(&[0; 60]), None);
    }
}
