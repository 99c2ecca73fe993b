//! Whether an interface is up, as the kernel tells it (rtnetlink(7)).

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use rustix::io::Errno;
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};

use super::request::InterfaceRequest;

/// The group of messages about interfaces.
const GROUP_LINK: u32 = 1;

const NEW_LINK: u16 = 16;
const DELETE_LINK: u16 = 17;
const GET_LINK: u16 = 18;
const REQUEST: u16 = 1;

const HEADER_BYTES: usize = 16;
const LINK_BYTES: usize = 16;
/// The kernel's messages are this long at the most, unless more is asked for.
const MESSAGE_BYTES_MAX: usize = 32 << 10;
/// Messages in one look, so that a storm of them does not keep a loop.
const MESSAGES_MAX: usize = 64;

/// What has become of an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Somebody has set it up.
    Up,
    /// Nobody has, or somebody has set it down.
    Down,
    /// It is not there any more.
    Gone,
}

/// Tells of the changes of one interface; readable when there is something to tell.
#[derive(Debug)]
pub struct Monitor {
    socket: OwnedFd,
    index: i32,
}

impl AsRawFd for Monitor {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

impl Monitor {
    /// Watches the interface `name`; the first look tells what it is now.
    pub fn new(name: &str) -> io::Result<Self> {
        let index = InterfaceRequest::of_interface(name, libc::SIOCGIFINDEX)?.int();
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        // Protocol 0 is NETLINK_ROUTE.
        let socket =
            rustix::net::socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, None)?;
        rustix::net::bind(&socket, &SocketAddrNetlink::new(0, GROUP_LINK))?;
        let monitor = Self { socket, index };
        monitor.ask()?;
        Ok(monitor)
    }

    /// What has become of the interface since the last look; `None` when nothing has.
    pub fn look(&self) -> io::Result<Option<State>> {
        let mut state = None;
        let mut message = vec![0; MESSAGE_BYTES_MAX];
        for _ in 0..MESSAGES_MAX {
            match rustix::net::recv(&self.socket, &mut message[..], RecvFlags::empty()) {
                Ok((len, _)) => {
                    let message = message.get(..len).unwrap_or_default();
                    state = last_state(message, self.index).or(state);
                }
                Err(Errno::AGAIN) => break,
                Err(Errno::INTR) => {}
                // Messages were lost.
                Err(Errno::NOBUFS) => self.ask()?,
                Err(error) => return Err(error.into()),
            }
        }
        Ok(state)
    }

    /// Asks for the state of now.
    fn ask(&self) -> io::Result<()> {
        let len = u32::try_from(HEADER_BYTES + LINK_BYTES).unwrap_or_default();
        let mut request = Vec::with_capacity(HEADER_BYTES + LINK_BYTES);
        request.extend(len.to_ne_bytes());
        request.extend(GET_LINK.to_ne_bytes());
        request.extend(REQUEST.to_ne_bytes());
        // Sequence number and port, family and kind: none matters.
        request.extend([0; 12]);
        request.extend(self.index.to_ne_bytes());
        request.extend([0; 8]);
        rustix::net::send(&self.socket, &request, SendFlags::empty())?;
        Ok(())
    }
}

/// What the last of `messages` that is about interface `index` says of it.
fn last_state(mut messages: &[u8], index: i32) -> Option<State> {
    let mut state = None;
    while let Some(len) = number(messages, 0) {
        let len = usize::try_from(len).ok().filter(|len| *len >= HEADER_BYTES)?;
        if let Some(message) = messages.get(..len) {
            state = state_in(message, index).or(state);
        }
        messages = messages.get(len.next_multiple_of(4)..).unwrap_or_default();
    }
    state
}

fn state_in(message: &[u8], index: i32) -> Option<State> {
    let [low, high] = message.get(4..6)?.try_into().ok()?;
    let about = number(message, HEADER_BYTES + 4)?.cast_signed();
    let flags = number(message, HEADER_BYTES + 8)?;
    let is_up = flags & libc::IFF_UP.cast_unsigned() != 0;
    match u16::from_ne_bytes([low, high]) {
        _ if about != index => None,
        NEW_LINK if is_up => Some(State::Up),
        NEW_LINK => Some(State::Down),
        DELETE_LINK => Some(State::Gone),
        _ => None,
    }
}

fn number(message: &[u8], offset: usize) -> Option<u32> {
    let bytes = message.get(offset..offset.checked_add(4)?)?;
    Some(u32::from_ne_bytes(bytes.try_into().ok()?))
}

#[cfg(test)]
mod test {
    use super::*;

    fn message(kind: u16, index: i32, flags: u32, padding: usize) -> Vec<u8> {
        let mut bytes = vec![0; HEADER_BYTES + LINK_BYTES + padding];
        let len = u32::try_from(bytes.len()).unwrap();
        bytes[..4].copy_from_slice(&len.to_ne_bytes());
        bytes[4..6].copy_from_slice(&kind.to_ne_bytes());
        bytes[20..24].copy_from_slice(&index.to_ne_bytes());
        bytes[24..28].copy_from_slice(&flags.to_ne_bytes());
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    #[test]
    fn the_last_message_about_the_interface_counts() {
        let up = message(NEW_LINK, 7, 1, 5);
        let down = message(NEW_LINK, 7, 2, 0);
        let other = message(DELETE_LINK, 8, 0, 9);
        let gone = message(DELETE_LINK, 7, 1, 0);
        assert_eq!(last_state(&up, 7), Some(State::Up));
        assert_eq!(last_state(&[up.clone(), down.clone()].concat(), 7), Some(State::Down));
        assert_eq!(last_state(&[down, up.clone(), other.clone()].concat(), 7), Some(State::Up));
        assert_eq!(last_state(&[up, gone].concat(), 7), Some(State::Gone));
        assert_eq!(last_state(&other, 7), None);
    }

    #[test]
    fn half_a_message_says_nothing() {
        let up = message(NEW_LINK, 7, 1, 0);
        for len in 0..up.len() {
            assert_eq!(last_state(&up[..len], 7), None, "{len}");
        }
        assert_eq!(last_state(&[0; 64], 0), None, "a length of nothing");
    }

    #[test]
    fn the_loopback_interface_is_told_of_at_first() {
        let monitor = Monitor::new("lo").unwrap();
        // The kernel answers within the request.
        assert!(matches!(monitor.look().unwrap(), Some(State::Up | State::Down)));
        assert_eq!(monitor.look().unwrap(), None);
        assert!(Monitor::new("no-such-interf").is_err());
    }
}
