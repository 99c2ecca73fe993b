//! Network cards: what is behind one, and the address that it has when nobody chose one.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use anyhow::{Context as _, Result, ensure};
use serde::{Deserialize, Serialize};

use super::{Config, Forward, files};

/// Most queue pairs of a card; with more processors some share a pair.
pub const MAX_QUEUE_PAIRS: u16 = 64;

/// Queue pairs of a card for which nobody chose a number, at the most: beyond it they cost memory
/// in the guest and bring nothing.
pub const DEFAULT_QUEUE_PAIRS_MAX: u16 = 16;

/// Smallest MTU that Ethernet knows, and largest that a tap does, in bytes.
const MTUS: std::ops::RangeInclusive<u16> = 68..=65521;

/// Longest name of an interface in bytes (`IFNAMSIZ` without the terminating zero).
const MAX_NAME_BYTES: usize = 15;

/// Standard input, output and error; no card can be there.
const FIRST_DESCRIPTOR: i32 = 3;

/// Where a Linux host has an identity of its own.
const MACHINE_ID: &str = "/etc/machine-id";

/// One network card; an object with one of the keys `tap`, `fd`, `vhost-user` and `type`, or with
/// `fd` and `type`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(try_from = "Keys", into = "Keys")]
pub struct Net {
    /// What carries its frames.
    pub link: NetLink,
    /// Its address. Default: derived from the host, the machine's UUID and the card's place; of a
    /// macvtap: the interface's own.
    pub mac: Option<Mac>,
    /// Queue pairs. Default: one for each processor, as far as what is behind the card has them.
    pub queues: Option<u16>,
    /// Whether the host's kernel moves the frames. Default: `auto`.
    pub vhost: VhostNet,
    /// Largest packet in bytes. Default: the interface's own.
    pub mtu: Option<u16>,
    /// Ports of the host that lead to the guest through a network of the user's own. Default: none.
    pub forwards: Vec<Forward>,
}

/// What carries the frames of a card.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NetLink {
    /// A tap interface of this name (`tap`).
    Tap(String),
    /// Descriptors of a tap interface that this process inherits, one for each queue pair (`fd`).
    Descriptors(Vec<i32>),
    /// Descriptors of a macvtap interface (`type` macvtap, `fd`).
    Macvtap(Vec<i32>),
    /// A network of the user's own, without privileges (`type` user).
    User,
    /// A process that listens on this socket (`vhost-user`).
    VhostUser(PathBuf),
}

/// Whether vhost-net of the host's kernel moves the frames of a tap.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "kebab-case")]
pub enum VhostNet {
    /// Where /dev/vhost-net can be opened.
    #[default]
    Auto,
    /// Always: without it the machine does not start.
    On,
    /// Never.
    Off,
}

/// The address of a network card, as in `52:54:00:12:34:56`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Mac(pub [u8; 6]);

/// Why a text is no address of a card.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MacError {
    /// It is not six bytes.
    #[error("not an address: write six bytes, as in 52:54:00:12:34:56")]
    Form,
    /// It is for groups, or nobody's.
    #[error("no address of one card: the first byte must be even, and not all may be zero")]
    Group,
}

impl Net {
    /// A card on `link` with every default.
    #[must_use]
    pub fn new(link: NetLink) -> Self {
        let forwards = Vec::new();
        Self { link, mac: None, queues: None, vhost: VhostNet::Auto, mtu: None, forwards }
    }
}

impl NetLink {
    /// What tells this link from the others of the machine, as a user wrote it.
    #[must_use]
    pub fn name(&self) -> String {
        let list = |descriptors: &[i32]| {
            descriptors.iter().map(ToString::to_string).collect::<Vec<_>>().join(":")
        };
        match self {
            Self::Tap(name) => format!("tap={name}"),
            Self::Descriptors(descriptors) => format!("fd={}", list(descriptors)),
            Self::Macvtap(descriptors) => format!("type=macvtap,fd={}", list(descriptors)),
            Self::User => "type=user".to_owned(),
            Self::VhostUser(socket) => format!("vhost-user={}", socket.display()),
        }
    }

    /// The descriptors that it is given by.
    #[must_use]
    pub fn descriptors(&self) -> &[i32] {
        match self {
            Self::Descriptors(descriptors) | Self::Macvtap(descriptors) => descriptors,
            Self::Tap(_) | Self::User | Self::VhostUser(_) => &[],
        }
    }

    /// The link that the keys of a flag or of JSON name together.
    ///
    /// # Errors
    ///
    /// None or more than one is named.
    pub fn from_keys(keys: LinkKeys) -> Result<Self, &'static str> {
        let LinkKeys { kind, tap, fd, vhost_user } = keys;
        match (kind, tap, fd, vhost_user) {
            (None | Some(LinkKind::Tap), Some(name), None, None) => Ok(Self::Tap(name)),
            (None | Some(LinkKind::Tap), None, Some(fd), None) => Ok(Self::Descriptors(fd)),
            (Some(LinkKind::Macvtap), None, Some(fd), None) => Ok(Self::Macvtap(fd)),
            (Some(LinkKind::User), None, None, None) => Ok(Self::User),
            (None | Some(LinkKind::VhostUser), None, None, Some(path)) => Ok(Self::VhostUser(path)),
            (Some(LinkKind::Macvtap), ..) => {
                Err("a macvtap is given by descriptors alone: type=macvtap,fd=N")
            }
            (None, None, None, None) => {
                Err("give one of tap=NAME, fd=N, type=user and vhost-user=SOCKET")
            }
            _ => Err("tap, fd, vhost-user and type=user exclude one another"),
        }
    }
}

/// The keys that say what is behind a card.
#[derive(Clone, Debug, Default)]
pub struct LinkKeys {
    /// `type`.
    pub kind: Option<LinkKind>,
    /// `tap`.
    pub tap: Option<String>,
    /// `fd`.
    pub fd: Option<Vec<i32>>,
    /// `vhost-user`.
    pub vhost_user: Option<PathBuf>,
}

/// What can be behind a card.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "kebab-case")]
pub enum LinkKind {
    /// A tap interface.
    Tap,
    /// A macvtap interface.
    Macvtap,
    /// A network of the user's own.
    User,
    /// A process of its own.
    VhostUser,
}

impl Config {
    /// Checks every card and gives an address to those that have none.
    pub(super) fn resolve_nets(&mut self) -> Result<()> {
        if self.nets.is_empty() {
            return Ok(());
        }
        let uuid = self.smbios.uuid.unwrap_or_default();
        // Hosts without one give the same addresses: then a UUID tells their guests apart.
        let host = std::fs::read(MACHINE_ID).unwrap_or_default();
        for (index, net) in self.nets.iter_mut().enumerate() {
            net.resolve().with_context(|| format!("--net {}", net.link.name()))?;
            // A macvtap passes the frames for its own address alone, which is read when it is open.
            if net.mac.is_none() && !matches!(net.link, NetLink::Macvtap(_)) {
                let (name, index) = (net.link.name(), index.to_string());
                let identity: [&[u8]; 4] =
                    [&host, uuid.as_bytes(), name.as_bytes(), index.as_bytes()];
                net.mac = Some(Mac::derived(&identity));
            }
        }
        self.check_that_nets_differ()
    }

    /// Adds forwards to the one network of the user's own.
    ///
    /// # Errors
    ///
    /// There is none, or more than one.
    pub fn add_forwards(&mut self, forwards: Vec<Forward>) -> Result<()> {
        let Some(first) = forwards.first() else { return Ok(()) };
        let mut networks = self.nets.iter_mut().filter(|net| net.link == NetLink::User);
        match (networks.next(), networks.next()) {
            (Some(net), None) => net.forwards.extend(forwards),
            (None, _) => anyhow::bail!("--forward {first}: needs a card with --net type=user"),
            (Some(_), Some(_)) => anyhow::bail!(
                "--forward {first}: to which of the cards with type=user? Say it by the key \
                 `forwards` of a card in a --config file"
            ),
        }
        Ok(())
    }

    fn check_that_nets_differ(&self) -> Result<()> {
        for (index, net) in self.nets.iter().enumerate() {
            let name = net.link.name();
            for other in self.nets.iter().take(index) {
                ensure!(
                    net.link != other.link || net.link == NetLink::User,
                    "--net {name}: given twice, and one card alone can have it",
                );
                let shared =
                    net.link.descriptors().iter().find(|fd| other.link.descriptors().contains(fd));
                if let Some(descriptor) = shared {
                    anyhow::bail!(
                        "--net {name}: descriptor {descriptor} is also that of another card"
                    );
                }
                if let (Some(mac), true) = (net.mac, net.mac == other.mac) {
                    anyhow::bail!(
                        "--net {name}: mac={mac} is also that of {}: each card needs its own",
                        other.link.name(),
                    );
                }
            }
        }
        Ok(())
    }
}

impl Net {
    fn resolve(&mut self) -> Result<()> {
        match &mut self.link {
            NetLink::Tap(name) => check_name(name)?,
            NetLink::Descriptors(fds) | NetLink::Macvtap(fds) => check_descriptors(fds)?,
            NetLink::User => {}
            NetLink::VhostUser(socket) => files::resolve_socket("vhost-user", socket)?,
        }
        if let Some(queues) = self.queues {
            ensure!(
                (1..=MAX_QUEUE_PAIRS).contains(&queues),
                "queues={queues}: a card has 1 to {MAX_QUEUE_PAIRS} queue pairs",
            );
            let given = self.link.descriptors().len();
            ensure!(
                given == 0 || given == usize::from(queues),
                "queues={queues}: a card has a queue pair for each descriptor, and {given} are \
                 given: leave queues out",
            );
        }
        if let Some(mtu) = self.mtu {
            ensure!(
                MTUS.contains(&mtu),
                "mtu={mtu}: an interface carries packets of {} to {} bytes",
                MTUS.start(),
                MTUS.end(),
            );
        }
        ensure!(
            self.forwards.is_empty() || self.link == NetLink::User,
            "forwards: ports are forwarded to the network of type=user only",
        );
        ensure!(
            self.vhost != VhostNet::On
                || !matches!(self.link, NetLink::User | NetLink::VhostUser(_)),
            "vhost=on: the host's kernel moves the frames of a tap or macvtap only",
        );
        Ok(())
    }
}

/// A name that the kernel could have given to an interface.
fn check_name(name: &str) -> Result<()> {
    let is_possible = |letter: char| !letter.is_whitespace() && letter != '/' && letter != '\0';
    ensure!(
        (1..=MAX_NAME_BYTES).contains(&name.len())
            && name.chars().all(is_possible)
            && !matches!(name, "." | "..")
            && !name.contains(['%', ':']),
        "no name of an interface: it has 1 to {MAX_NAME_BYTES} bytes without spaces, slashes, \
         colons and percent signs",
    );
    Ok(())
}

fn check_descriptors(descriptors: &[i32]) -> Result<()> {
    ensure!(
        (1..=usize::from(MAX_QUEUE_PAIRS)).contains(&descriptors.len()),
        "{} descriptors: a card has 1 to {MAX_QUEUE_PAIRS}",
        descriptors.len(),
    );
    for (index, descriptor) in descriptors.iter().enumerate() {
        ensure!(
            *descriptor >= FIRST_DESCRIPTOR,
            "descriptor {descriptor}: inherited ones begin at {FIRST_DESCRIPTOR}, behind standard \
             input, output and error",
        );
        ensure!(
            !descriptors.iter().take(index).any(|other| other == descriptor),
            "descriptor {descriptor} is given twice",
        );
    }
    Ok(())
}

/// A [`Net`] as JSON has it.
#[derive(Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct Keys {
    /// What is behind the card, where no other key says it.
    #[serde(default, rename = "type", skip_serializing_if = "Option::is_none")]
    kind: Option<LinkKind>,
    /// The name of a tap interface.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    tap: Option<String>,
    /// Descriptors of a tap or macvtap that this process inherits, one for each queue pair.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    fd: Option<Vec<i32>>,
    /// The socket at which a process serves the card.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    vhost_user: Option<PathBuf>,
    /// Its address. Default: one that is the same at each start; of a macvtap the interface's own.
    #[serde(default)]
    mac: Option<Mac>,
    /// Queue pairs. Default: one for each processor, as far as what is behind the card has them.
    #[serde(default)]
    queues: Option<u16>,
    /// Whether the host's kernel moves the frames. Default: `auto`.
    #[serde(default)]
    vhost: VhostNet,
    /// Largest packet in bytes. Default: the interface's own.
    #[serde(default)]
    mtu: Option<u16>,
    /// Ports of the host that lead to a guest whose card has type `user`. Default: none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    forwards: Vec<Forward>,
}

impl TryFrom<Keys> for Net {
    type Error = &'static str;

    fn try_from(keys: Keys) -> Result<Self, Self::Error> {
        let Keys { kind, tap, fd, vhost_user, mac, queues, vhost, mtu, forwards } = keys;
        let link = NetLink::from_keys(LinkKeys { kind, tap, fd, vhost_user })?;
        Ok(Self { link, mac, queues, vhost, mtu, forwards })
    }
}

impl From<Net> for Keys {
    fn from(net: Net) -> Self {
        let Net { link, mac, queues, vhost, mtu, forwards } = net;
        let (kind, tap, fd, vhost_user) = match link {
            NetLink::Tap(name) => (None, Some(name), None, None),
            NetLink::Descriptors(fd) => (None, None, Some(fd), None),
            NetLink::Macvtap(fd) => (Some(LinkKind::Macvtap), None, Some(fd), None),
            NetLink::User => (Some(LinkKind::User), None, None, None),
            NetLink::VhostUser(path) => (None, None, None, Some(path)),
        };
        Self { kind, tap, fd, vhost_user, mac, queues, vhost, mtu, forwards }
    }
}

impl Mac {
    /// A locally administered address that is always the same for the same `identity`.
    #[must_use]
    pub fn derived(identity: &[&[u8]]) -> Self {
        // FNV-1a: nobody attacks it, and it never changes with a library.
        let mut hash: u64 = 0xcbf2_9ce4_8422_2325;
        for part in identity {
            for byte in part.iter().chain(&[0]) {
                hash = (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
            }
        }
        let [a, b, c, d, e, f, g, h] = hash.to_be_bytes();
        // Bit 1 says that no manufacturer gave it, bit 0 would make it a group's.
        Self([(a ^ g) & !3 | 2, b ^ h, c, d, e, f])
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, f] = self.0;
        write!(formatter, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}")
    }
}

impl FromStr for Mac {
    type Err = MacError;

    fn from_str(text: &str) -> Result<Self, MacError> {
        let mut bytes = [0; 6];
        let mut parts = text.split([':', '-']);
        for byte in &mut bytes {
            let part = parts.next().filter(|part| part.len() == 2).ok_or(MacError::Form)?;
            if !part.bytes().all(|letter| letter.is_ascii_hexdigit()) {
                return Err(MacError::Form);
            }
            *byte = u8::from_str_radix(part, 16).map_err(|_| MacError::Form)?;
        }
        match (parts.next(), bytes) {
            (Some(_), _) => Err(MacError::Form),
            (None, [0, 0, 0, 0, 0, 0]) => Err(MacError::Group),
            (None, [first, ..]) if first & 1 != 0 => Err(MacError::Group),
            (None, _) => Ok(Self(bytes)),
        }
    }
}

impl TryFrom<String> for Mac {
    type Error = MacError;

    fn try_from(text: String) -> Result<Self, MacError> {
        text.parse()
    }
}

impl From<Mac> for String {
    fn from(mac: Mac) -> Self {
        mac.to_string()
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn an_address_is_six_bytes_of_one_card() {
        let mac: Mac = "52:54:00:aB:cd:ef".parse().unwrap();
        assert_eq!(mac, Mac([0x52, 0x54, 0, 0xab, 0xcd, 0xef]));
        assert_eq!(mac.to_string(), "52:54:00:ab:cd:ef");
        for text in
            ["", "52:54:00:ab:cd", "52:54:00:ab:cd:ef:00", "52:54:00:ab:cd:+f", "5:4:0:a:b:c"]
        {
            assert_eq!(text.parse::<Mac>(), Err(MacError::Form), "{text}");
        }
        for text in ["00:00:00:00:00:00", "ff:ff:ff:ff:ff:ff", "01:00:5e:00:00:01"] {
            assert_eq!(text.parse::<Mac>(), Err(MacError::Group), "{text}");
        }
    }

    #[test]
    fn a_derived_address_is_stable_locally_administered_and_its_own() {
        let one = Mac::derived(&[b"host", b"tap=a", b"0"]);
        assert_eq!(one, Mac::derived(&[b"host", b"tap=a", b"0"]));
        let others: [&[&[u8]]; 3] =
            [&[b"host", b"tap=b", b"0"], &[b"host", b"tap=a", b"1"], &[b"hostt", b"ap=a", b"0"]];
        for other in others {
            let other = Mac::derived(other);
            assert_ne!(one, other);
            assert_eq!(other.0[0] & 3, 2);
            assert_eq!(other.to_string().parse(), Ok(other));
        }
    }

    #[test]
    fn a_card_says_what_is_behind_it_once() {
        for (text, expected) in [
            (r#"{"tap": "a"}"#, NetLink::Tap("a".into())),
            (r#"{"type": "tap", "fd": [3, 4]}"#, NetLink::Descriptors(vec![3, 4])),
            (r#"{"type": "macvtap", "fd": [3]}"#, NetLink::Macvtap(vec![3])),
            (r#"{"type": "user"}"#, NetLink::User),
            (r#"{"vhost-user": "/s"}"#, NetLink::VhostUser("/s".into())),
        ] {
            let net: Net = serde_json::from_str(text).unwrap();
            assert_eq!(net, Net::new(expected), "{text}");
            let back = serde_json::to_string(&net).unwrap();
            assert_eq!(serde_json::from_str::<Net>(&back).unwrap(), net);
        }
        for (text, expected) in [
            ("{}", "give one of tap=NAME"),
            (r#"{"tap": "a", "fd": [3]}"#, "exclude one another"),
            (r#"{"type": "macvtap", "tap": "a"}"#, "by descriptors alone"),
            (r#"{"type": "user", "vhost-user": "/s"}"#, "exclude one another"),
            (r#"{"tap": "a", "mac": "x"}"#, "not an address"),
            (r#"{"tap": "a", "name": "x"}"#, "unknown field"),
        ] {
            let error = serde_json::from_str::<Net>(text).unwrap_err().to_string();
            assert!(error.contains(expected), "{text}: {error}");
        }
    }
}
