//! A port of the host that leads to a port of the guest.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::num::NonZeroU16;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A forwarded port, as in `tcp:127.0.0.1:2222:22`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Forward {
    /// What is forwarded.
    pub protocol: Protocol,
    /// The host's address to listen at; all of them when there is none.
    pub address: Option<IpAddr>,
    /// The port of the host.
    pub port: NonZeroU16,
    /// The port of the guest.
    pub guest_port: NonZeroU16,
}

/// What is forwarded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// Connections.
    Tcp,
    /// Datagrams.
    Udp,
}

/// Why a text is no forward.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ForwardError {
    /// It has other parts.
    #[error(
        "not a forward: write tcp|udp:[ADDRESS:]PORT:GUESTPORT, as in tcp:127.0.0.1:2222:22 or \
         udp:[::1]:5353:53"
    )]
    Form,
    /// There is no such port.
    #[error("a port is a number from 1 to 65535")]
    Port,
}

impl FromStr for Forward {
    type Err = ForwardError;

    fn from_str(text: &str) -> Result<Self, ForwardError> {
        let (protocol, rest) = text.split_once(':').ok_or(ForwardError::Form)?;
        let protocol = match protocol {
            "tcp" => Protocol::Tcp,
            "udp" => Protocol::Udp,
            _ => return Err(ForwardError::Form),
        };
        let (rest, guest_port) = rest.rsplit_once(':').ok_or(ForwardError::Form)?;
        let (address, port) = match rest.rsplit_once(':') {
            Some((address, port)) => (Some(address_of(address)?), port),
            None => (None, rest),
        };
        let number = |text: &str| text.parse().map_err(|_| ForwardError::Port);
        Ok(Self { protocol, address, port: number(port)?, guest_port: number(guest_port)? })
    }
}

/// An address, of version 6 in brackets.
fn address_of(text: &str) -> Result<IpAddr, ForwardError> {
    let inner = text.strip_prefix('[').and_then(|text| text.strip_suffix(']'));
    let address = match inner {
        Some(inner) => inner.parse::<Ipv6Addr>().map(IpAddr::V6),
        None => text.parse::<Ipv4Addr>().map(IpAddr::V4),
    };
    address.map_err(|_| ForwardError::Form)
}

impl fmt::Display for Forward {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self.protocol {
            Protocol::Tcp => "tcp:",
            Protocol::Udp => "udp:",
        })?;
        match self.address {
            None => {}
            Some(IpAddr::V4(address)) => write!(formatter, "{address}:")?,
            Some(IpAddr::V6(address)) => write!(formatter, "[{address}]:")?,
        }
        write!(formatter, "{}:{}", self.port, self.guest_port)
    }
}

impl TryFrom<String> for Forward {
    type Error = ForwardError;

    fn try_from(text: String) -> Result<Self, ForwardError> {
        text.parse()
    }
}

impl From<Forward> for String {
    fn from(forward: Forward) -> Self {
        forward.to_string()
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn a_forward_is_written_as_it_is_read() {
        for text in ["tcp:2222:22", "tcp:127.0.0.1:2222:22", "udp:[::1]:5353:53", "udp:1:65535"] {
            assert_eq!(text.parse::<Forward>().unwrap().to_string(), text);
        }
        let forward: Forward = "tcp:[fe80::1]:80:8080".parse().unwrap();
        assert_eq!(forward.address, Some("fe80::1".parse().unwrap()));
        assert_eq!((forward.port.get(), forward.guest_port.get()), (80, 8080));
    }

    #[test]
    fn what_is_no_forward_is_refused_with_the_form() {
        let forms =
            ["", "tcp", "tcp:22", "sctp:1:2", "tcp:host:1:2", "tcp:::1:1:2", "tcp:[::1:2:3"];
        for text in forms {
            assert_eq!(text.parse::<Forward>(), Err(ForwardError::Form), "{text}");
        }
        for text in ["tcp:0:1", "tcp:1:65536", "tcp:a:b", "udp:127.0.0.1::1", "tcp:1:+2 "] {
            assert_eq!(text.parse::<Forward>(), Err(ForwardError::Port), "{text}");
        }
    }
}
