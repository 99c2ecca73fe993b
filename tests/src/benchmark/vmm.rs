//! Which VMMs are measured, and how is each told the same machine?

use std::path::{Path, PathBuf};

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use super::stage::PERSISTENT;

/// A VMM, or one of its modes.
#[derive(Clone, Copy, Debug, Deserialize, Eq, Ord, PartialEq, PartialOrd, Serialize, ValueEnum)]
pub enum Vmm {
    /// nixvmm with virtio-pci, its default.
    Nixvmm,
    /// nixvmm with virtio-mmio.
    NixvmmMmio,
    /// QEMU's common machine.
    QemuQ35,
    /// QEMU's machine for micro-VMs.
    QemuMicrovm,
    /// The same without its legacy devices.
    QemuTrimmed,
    /// Alioth.
    Alioth,
}

/// Where the programs are.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Programs {
    /// As it ships.
    pub nixvmm: PathBuf,
    /// Debian's.
    pub qemu: PathBuf,
    /// From crates.io.
    pub alioth: PathBuf,
}

/// A machine that every VMM can be told.
#[derive(Clone, Copy, Debug)]
pub struct Machine<'a> {
    /// What the machine boots.
    pub kernel: &'a Path,
    /// Whether it is an ELF file with a PVH entry, not a bzImage.
    pub is_elf: bool,
    /// The initramfs.
    pub initrd: &'a Path,
    /// A raw image, written to.
    pub disk: &'a Path,
    /// How many processors.
    pub processors: u32,
    /// Memory in MiB.
    pub memory: u32,
    /// What the guest does once it is up, and further words of the kernel command line.
    pub measure: &'a str,
    /// Whether QEMU gives the disk an I/O thread: faster disk, slower start.
    pub io_thread: bool,
    /// What connects it with the host.
    pub link: Option<Link>,
    /// Whether it has one of each kind of device that nixvmm has, besides the link.
    pub has_every_device: bool,
}

/// What connects a guest with its host.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize, ValueEnum)]
pub enum Link {
    /// A card on a tap, whose frames the VMM moves.
    Tap,
    /// The same card, and the host's kernel moves its frames.
    VhostNet,
    /// Vsock through the host's kernel.
    Vsock,
    /// Vsock through unix sockets: nixvmm only.
    UnixVsock,
}

impl Link {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Tap, Self::VhostNet, Self::Vsock, Self::UnixVsock];

    /// Its name in tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Tap => "tap",
            Self::VhostNet => "vhost-net",
            Self::Vsock => "vsock",
            Self::UnixVsock => "unix vsock",
        }
    }

    /// What the guest does that has it.
    pub fn measure(self) -> &'static str {
        match self {
            Self::Tap | Self::VhostNet => "tap",
            Self::Vsock | Self::UnixVsock => "vsock",
        }
    }
}

/// The tap of guests that have one.
pub const TAP: &str = "nvbench";

/// Where unix sockets of the host's ports are, in the root of the VMMs.
pub const GATE: &str = "/tmp/vsock";

/// What gives nixvmm the devices that a benchmark's guest does not need, besides [`PERSISTENT`].
const FURTHER_DEVICES: [&str; 12] = [
    "--memory",
    "256M,max=512M",
    "--vsock",
    "socket=/tmp/gate",
    "--store-share",
    "store=/volume",
    "--serial",
    "file,path=/tmp/serial",
    "--control",
    "/tmp/control",
    "--watchdog",
    "exit",
];

/// Where a service manager listens, in the root of the VMMs.
pub const SERVICE_MANAGER: &str = "/tmp/notify";

/// The guest's context id.
const CID: u32 = 42;

impl Vmm {
    /// All of them.
    pub const ALL: [Self; 6] = [
        Self::Nixvmm,
        Self::NixvmmMmio,
        Self::QemuQ35,
        Self::QemuMicrovm,
        Self::QemuTrimmed,
        Self::Alioth,
    ];

    /// Its name in tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Nixvmm => "nixvmm",
            Self::NixvmmMmio => "nixvmm mmio",
            Self::QemuQ35 => "QEMU q35",
            Self::QemuMicrovm => "QEMU microvm",
            Self::QemuTrimmed => "QEMU trimmed",
            Self::Alioth => "alioth",
        }
    }

    /// Whether it is a mode of QEMU.
    pub fn is_qemu(self) -> bool {
        matches!(self, Self::QemuQ35 | Self::QemuMicrovm | Self::QemuTrimmed)
    }

    /// Whether it is measured with `link`. One QEMU is enough: its machines do not differ in their
    /// cards.
    pub fn has(self, link: Link) -> bool {
        match self {
            Self::Nixvmm => true,
            Self::QemuQ35 => link != Link::UnixVsock,
            _ => false,
        }
    }

    /// Whether it passes on to the service manager what its guest says over `link`.
    pub fn relays(self, link: Link) -> bool {
        self == Self::Nixvmm && link.measure() == Link::Vsock.measure()
    }

    /// Variables of its environment.
    pub fn environment(self, machine: &Machine<'_>) -> Option<(&'static str, &'static str)> {
        let relays = machine.link.is_some_and(|link| self.relays(link));
        relays.then_some(("NOTIFY_SOCKET", SERVICE_MANAGER))
    }

    /// Its program.
    pub fn program(self, programs: &Programs) -> &Path {
        match self {
            Self::Nixvmm | Self::NixvmmMmio => &programs.nixvmm,
            Self::Alioth => &programs.alioth,
            _ => &programs.qemu,
        }
    }

    /// Its arguments for `machine`.
    pub fn arguments(self, machine: &Machine<'_>) -> Vec<String> {
        // A restart by triple fault ends each of them, and needs no device.
        let command_line =
            format!("console=hvc0 quiet reboot=t panic=-1 measure={}", machine.measure);
        let arguments = match self {
            Self::Nixvmm => nixvmm(machine, "pci"),
            Self::NixvmmMmio => nixvmm(machine, "mmio"),
            Self::Alioth => alioth(machine),
            Self::QemuQ35 => qemu(machine, "q35", "pci"),
            Self::QemuMicrovm => qemu(machine, "microvm", "device"),
            Self::QemuTrimmed => {
                let kind = "microvm,pit=off,pic=off,rtc=off,isa-serial=off";
                qemu(machine, kind, "device")
            }
        };
        let name = match self {
            Self::Nixvmm | Self::NixvmmMmio | Self::Alioth => "--cmdline",
            _ => "-append",
        };
        arguments.into_iter().chain([name.to_owned(), command_line]).collect()
    }
}

fn nixvmm(machine: &Machine<'_>, transport: &str) -> Vec<String> {
    let disk = format!("path={}", machine.disk.display());
    let (processors, memory) = (machine.processors.to_string(), format!("{}M", machine.memory));
    let mut words = kernel_and_initrd(machine, "--kernel", "--initrd");
    words.extend(["--disk", &disk, "--cpus", &processors].map(str::to_owned));
    match machine.has_every_device {
        true => {
            words.extend(FURTHER_DEVICES.map(str::to_owned));
            words.extend(["--pmem".to_owned(), format!("file={PERSISTENT},readonly")]);
        }
        false => words.extend(["--memory", &memory].map(str::to_owned)),
    }
    words.extend(["--transport", transport, "--on-reboot", "exit"].map(str::to_owned));
    let link = |flag: &str, value: String| [flag.to_owned(), value];
    words.extend(machine.link.into_iter().flat_map(|kind| match kind {
        Link::Tap => link("--net", format!("tap={TAP},vhost=off")),
        Link::VhostNet => link("--net", format!("tap={TAP},vhost=on")),
        Link::Vsock => link("--vsock", format!("cid={CID}")),
        Link::UnixVsock => link("--vsock", format!("socket={GATE}")),
    }));
    words
}

fn alioth(machine: &Machine<'_>) -> Vec<String> {
    let kernel = if machine.is_elf { "--pvh" } else { "--kernel" };
    let disk = format!("file,path={}", machine.disk.display());
    let processors = format!("count={}", machine.processors);
    let memory = format!("size={}M", machine.memory);
    let mut words = vec!["boot".to_owned()];
    words.extend(kernel_and_initrd(machine, kernel, "--initramfs"));
    words.extend(["--blk", &disk, "--cpu", &processors, "--memory", &memory].map(str::to_owned));
    words
}

fn qemu(machine: &Machine<'_>, kind: &str, bus: &str) -> Vec<String> {
    let options = "-accel kvm -cpu host -nodefaults -no-user-config -no-reboot -display none";
    let mut words: Vec<String> = options.split(' ').map(str::to_owned).collect();
    words.extend(kernel_and_initrd(machine, "-kernel", "-initrd"));
    let (engine, thread) = match machine.io_thread {
        true => (",aio=io_uring", ",iothread=thread"),
        false => ("", ""),
    };
    if machine.io_thread {
        words.extend(["-object", "iothread,id=thread"].map(str::to_owned));
    }
    let disk = format!("driver=file,node-name=disk,filename={}{engine}", machine.disk.display());
    let (processors, memory) = (machine.processors.to_string(), format!("{}M", machine.memory));
    let block = format!("virtio-blk-{bus},drive=disk{thread}");
    let serial = format!("virtio-serial-{bus}");
    words.extend(["-machine", kind, "-smp", &processors, "-m", &memory].map(str::to_owned));
    words.extend(["-blockdev", &disk, "-device", &block, "-device", &serial].map(str::to_owned));
    let console = ["-chardev", "stdio,id=console,signal=off", "-device"];
    words.extend(console.map(str::to_owned));
    words.push("virtconsole,chardev=console".to_owned());
    words.extend(machine.link.into_iter().flat_map(|link| qemu_link(link, bus)));
    words
}

fn qemu_link(link: Link, bus: &str) -> Vec<String> {
    let tap = |vhost: &str| {
        let netdev =
            format!("tap,id=net,ifname={TAP},script=no,downscript=no,queues=1,vhost={vhost}");
        // Nobody boots from it: the firmware that would is not installed everywhere.
        let firmware = if bus == "pci" { ",romfile=" } else { "" };
        let card = format!("virtio-net-{bus},netdev=net{firmware}");
        ["-netdev".to_owned(), netdev, "-device".to_owned(), card].to_vec()
    };
    match link {
        Link::Tap => tap("off"),
        Link::VhostNet => tap("on"),
        Link::Vsock => {
            vec!["-device".to_owned(), format!("vhost-vsock-{bus},guest-cid={CID}")]
        }
        // It has no such device.
        Link::UnixVsock => Vec::new(),
    }
}

fn kernel_and_initrd(machine: &Machine<'_>, kernel: &str, initrd: &str) -> Vec<String> {
    let path = |path: &Path| path.display().to_string();
    vec![kernel.to_owned(), path(machine.kernel), initrd.to_owned(), path(machine.initrd)]
}
