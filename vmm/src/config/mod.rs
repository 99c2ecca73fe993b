//! What a machine is, as plain data.
//!
//! The command line and `--config` files are two ways to write the same [`Config`]. In JSON every
//! key is in kebab-case and has the name of its flag; unknown keys are refused. A key that is left
//! out has the default that is documented here, and nowhere else.

mod balloon;
mod byte_size;
mod console;
mod credential;
mod files;
mod forward;
mod layers;
mod machined;
mod names;
mod net;
mod resolve;
mod root;
#[cfg(test)]
mod schema;
mod share;
mod store_share;
mod vsock;

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

pub use balloon::Balloon;
pub use byte_size::{ByteSize, ByteSizeError};
pub use console::Console;
pub use credential::{Credential, CredentialContent};
pub use files::MAX_SOCKET_PATH_BYTES;
pub use forward::{Forward, ForwardError, Protocol};
pub use machined::Machined;
pub use names::nearest;
pub use net::{DEFAULT_QUEUE_PAIRS_MAX, MAX_QUEUE_PAIRS};
pub use net::{LinkKeys, LinkKind, Mac, MacError, Net, NetLink, VhostNet};
pub(crate) use resolve::NOTIFY_SOCKET_CREDENTIAL;
pub use resolve::{MAX_CPUS, MAX_SERIAL_BYTES, MIN_MEMORY};
pub(crate) use root::SERIAL as ROOT_SERIAL;
pub use share::{Share, ShareCache, ShareSandbox};
pub use store_share::StoreShare;
pub use vsock::Vsock;

use crate::object::{object, objects, optional_object};

/// One machine: everything that `nixvmm run` needs to know.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Config {
    /// The kernel: a bzImage or an ELF vmlinux. Needed; empty means that none was given.
    pub kernel: PathBuf,
    /// The initial RAM disk. Default: none.
    pub initrd: Option<PathBuf>,
    /// The kernel command line. Default: empty.
    pub cmdline: String,
    /// How the kernel is entered. Default: `auto`.
    pub boot_protocol: BootProtocol,
    /// A read-only file system image that becomes the first disk. Default: none.
    pub root: Option<PathBuf>,
    /// Further disks, in the order in which the guest finds them. Default: none.
    #[serde(deserialize_with = "objects")]
    pub disks: Vec<Disk>,
    /// Network cards, in the order in which the guest finds them. Default: none.
    #[serde(deserialize_with = "objects")]
    pub nets: Vec<Net>,
    /// Files that the guest has in its memory, in the order of /dev/pmem0 and so on. Default: none.
    #[serde(deserialize_with = "objects")]
    pub pmems: Vec<Pmem>,
    /// Folders of the host that the guest mounts. Default: none.
    #[serde(deserialize_with = "objects")]
    pub shares: Vec<Share>,
    /// Store paths of the host that the guest mounts. Default: none.
    #[serde(deserialize_with = "optional_object")]
    pub store_share: Option<StoreShare>,
    /// The socket device. Default: none.
    #[serde(deserialize_with = "optional_object")]
    pub vsock: Option<Vsock>,
    /// Number of virtual processors. Default: 1.
    pub cpus: u32,
    /// RAM of the guest.
    #[serde(deserialize_with = "object")]
    pub memory: Memory,
    /// Where the guest's virtio console (hvc0) goes. Default: `stdio`.
    #[serde(deserialize_with = "object")]
    pub console: Console,
    /// Where the guest's 16550 serial port (ttyS0) goes. Default: `off`.
    #[serde(deserialize_with = "object")]
    pub serial: Console,
    /// The unix socket at which the running machine is controlled. Default: none.
    pub control: Option<PathBuf>,
    /// What systemd-machined of the host knows the guest by. Default: it does not.
    #[serde(deserialize_with = "optional_object")]
    pub machined: Option<Machined>,
    /// Whether there is a virtio entropy device. Default: yes.
    pub rng: bool,
    /// The memory balloon, which gives memory back to the host.
    #[serde(deserialize_with = "object")]
    pub balloon: Balloon,
    /// The bus of the virtio devices. Default: `pci`.
    pub transport: Transport,
    /// What SMBIOS tables say about the machine.
    #[serde(deserialize_with = "object")]
    pub smbios: Smbios,
    /// Credentials for systemd in the guest. Default: none.
    #[serde(deserialize_with = "objects")]
    pub credentials: Vec<Credential>,
    /// When the unit that started this process has started. Default: `started`.
    pub ready: Ready,
    /// What a reboot by the guest does. Default: `restart`.
    pub on_reboot: OnReboot,
    /// Whether there is a watchdog timer, and what its expiry does. Default: `off`.
    pub watchdog: Watchdog,
    /// Seconds from the power button to the hard end. Default: 80, so that a unit whose
    /// TimeoutStopSec is systemd's 90 seconds ends with our status and not by SIGKILL.
    pub shutdown_timeout: u32,
    /// Whether every thread is confined by seccomp, landlock and empty capabilities. Default: yes.
    pub sandbox: bool,
    /// Whether standard error tells where start-up time went. Default: no.
    pub timing: bool,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            kernel: PathBuf::new(),
            initrd: None,
            cmdline: String::new(),
            boot_protocol: BootProtocol::Auto,
            root: None,
            disks: Vec::new(),
            pmems: Vec::new(),
            nets: Vec::new(),
            shares: Vec::new(),
            store_share: None,
            vsock: None,
            cpus: 1,
            memory: Memory::default(),
            console: Console::Stdio,
            serial: Console::Off,
            control: None,
            machined: None,
            rng: true,
            balloon: Balloon::default(),
            transport: Transport::Pci,
            smbios: Smbios::default(),
            credentials: Vec::new(),
            ready: Ready::Started,
            on_reboot: OnReboot::Restart,
            watchdog: Watchdog::Off,
            shutdown_timeout: 80,
            sandbox: true,
            timing: false,
        }
    }
}

/// How the kernel is entered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "kebab-case")]
pub enum BootProtocol {
    /// What suits the kernel's format: PVH for an ELF that has its note, else the Linux protocol.
    #[default]
    Auto,
    /// The 64-bit entry of the Linux boot protocol.
    Linux,
    /// The PVH entry that an ELF note names.
    Pvh,
}

/// One disk: a raw image or a block device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Disk {
    /// The image or block device.
    pub path: PathBuf,
    /// Whether the guest may only read. Default: no.
    #[serde(default)]
    pub readonly: bool,
    /// What the guest reads by GET_ID, at most 20 bytes; `/dev/disk/by-id/virtio-SERIAL` in the
    /// guest. Default: none.
    #[serde(default)]
    pub serial: Option<String>,
    /// Whether the host's page cache is bypassed (O_DIRECT). Default: no.
    #[serde(default)]
    pub direct: bool,
    /// How the host reads and writes. Default: `auto`.
    #[serde(default)]
    pub engine: Engine,
}

impl Disk {
    /// The disk at `path` with every default.
    #[must_use]
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            readonly: false,
            serial: None,
            direct: false,
            engine: Engine::Auto,
        }
    }
}

/// One virtio persistent memory device: a file in the guest's memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Pmem {
    /// The file or block device. Guests with the same one share its pages.
    pub file: PathBuf,
    /// Whether the guest may only read. Default: no.
    #[serde(default)]
    pub readonly: bool,
}

/// How the host reads and writes a disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "kebab-case")]
pub enum Engine {
    /// io_uring where the kernel has it, else `sync`.
    #[default]
    Auto,
    /// io_uring.
    Uring,
    /// preadv and pwritev on the disk's thread.
    Sync,
}

/// RAM of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Memory {
    /// How much. Default: 512M.
    pub size: ByteSize,
    /// How much it may become at run time; the rest is a virtio memory device. Default: no more.
    pub max: Option<ByteSize>,
    /// Whether it is one sealed memfd that other processes may map. Default: no.
    pub shared: bool,
    /// The size of the huge pages that back it. Default: none, transparent huge pages.
    pub hugepages: Option<HugePages>,
    /// Whether the host sets it aside before the guest starts. Default: no.
    pub prealloc: bool,
    /// Whether the host may keep pages once that are equal to those of other guests (KSM). How long
    /// a write takes then tells one guest what another has. Default: no.
    pub mergeable: bool,
}

impl Default for Memory {
    fn default() -> Self {
        Self {
            size: ByteSize(512 << 20),
            max: None,
            shared: false,
            hugepages: None,
            prealloc: false,
            mergeable: false,
        }
    }
}

/// The size of huge pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub enum HugePages {
    /// 2 MiB.
    #[serde(rename = "2M")]
    Size2M,
    /// 1 GiB.
    #[serde(rename = "1G")]
    Size1G,
}

impl HugePages {
    /// Bytes of one page.
    #[must_use]
    pub fn bytes(self) -> u64 {
        match self {
            Self::Size2M => 2 << 20,
            Self::Size1G => 1 << 30,
        }
    }
}

/// The bus of the virtio devices.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "kebab-case")]
pub enum Transport {
    /// virtio-pci with message-signalled interrupts.
    #[default]
    Pci,
    /// virtio-mmio, for kernels without PCI and for the smallest boot.
    Mmio,
}

/// What SMBIOS tables say about the machine.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Smbios {
    /// System UUID (type 1). Default: none.
    pub uuid: Option<Uuid>,
    /// OEM strings (type 11), for example `io.systemd.credential:NAME=VALUE`. Default: none.
    pub oem_strings: Vec<String>,
}

/// What tells the service manager of the host that this process is ready.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "kebab-case")]
pub enum Ready {
    /// The guest's processors run.
    #[default]
    Started,
    /// systemd in the guest has finished its boot: no start of a unit is left to be done, as it
    /// tells over vsock by `READY=1`.
    Booted,
    /// systemd in the guest (256 or later) has `ssh-access.target`, as it tells over vsock: sshd
    /// listens. Other units may still start.
    Reachable,
}

/// What a reboot by the guest does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "kebab-case")]
pub enum OnReboot {
    /// The guest starts again in the same process.
    #[default]
    Restart,
    /// The process ends with the status of a reboot.
    Exit,
}

/// What the expiry of the guest's watchdog does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "kebab-case")]
pub enum Watchdog {
    /// There is no watchdog.
    #[default]
    Off,
    /// The guest is reset, as if it had rebooted.
    Reset,
    /// The process ends with the status of a watchdog.
    Exit,
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn an_empty_object_is_the_default_and_unknown_keys_are_refused() {
        assert_eq!(serde_json::from_str::<Config>("{}").unwrap(), Config::default());
        for text in [
            r#"{"kernl": "k"}"#,
            r#"{"memory": {"sise": "1G"}}"#,
            r#"{"disks": [{"path": "d", "read-only": true}]}"#,
            r#"{"console": {"kind": "stdio", "path": "x"}}"#,
        ] {
            let error = serde_json::from_str::<Config>(text).unwrap_err().to_string();
            assert!(
                error.contains("unknown field") || error.contains("takes no"),
                "{text}: {error}"
            );
        }
    }
}
