use std::fs;
use std::path::Path;

use proptest::prelude::*;

use super::super::{
    Balloon, BootProtocol, Credential, Engine, Forward, HugePages, Memory, Net, NetLink, OnReboot,
    Pmem, Ready, Share, ShareCache, ShareSandbox, Smbios, StoreShare, Transport, VhostNet, Vsock,
    Watchdog,
};
use super::*;

/// A folder with a kernel and disks, and the smallest machine made of them.
struct Fixture {
    folder: tempfile::TempDir,
}

impl Fixture {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("kernel"), "kernel").unwrap();
        fs::write(folder.path().join("initrd"), "initrd").unwrap();
        for disk in ["a.img", "b.img"] {
            fs::write(folder.path().join(disk), [0; 1024]).unwrap();
        }
        let mut erofs = vec![0; 4096];
        erofs[1024..1028].copy_from_slice(&0xe0f5_e1e2_u32.to_le_bytes());
        fs::write(folder.path().join("store.erofs"), erofs).unwrap();
        fs::write(folder.path().join("store.squashfs"), [b"hsqs".as_slice(), &[0; 508]].concat())
            .unwrap();
        fs::write(folder.path().join("odd.img"), [0; 513]).unwrap();
        fs::write(folder.path().join("empty.img"), []).unwrap();
        Self { folder }
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.folder.path().join(name)
    }

    fn config(&self) -> Config {
        Config { kernel: self.path("kernel"), ..Config::default() }
    }

    /// Changes the smallest machine into one that must be refused with `expected`, in which `@`
    /// stands for the folder.
    #[track_caller]
    fn refused(&self, change: impl FnOnce(&mut Config), expected: &str) {
        let mut config = self.config();
        change(&mut config);
        let error = format!("{:#}", config.resolve().unwrap_err());
        let folder = self.folder.path().to_str().unwrap();
        assert_eq!(error, expected.replace('@', folder));
    }

    fn resolved(&self, change: impl FnOnce(&mut Config)) -> Config {
        let mut config = self.config();
        change(&mut config);
        config.resolve().unwrap()
    }
}

#[test]
fn persistent_memory_is_a_file_that_is_there() {
    let fixture = Fixture::new();
    let pmem = |name: &str| Pmem { file: fixture.path(name), readonly: true };
    fixture.refused(
        |config| config.pmems = vec![pmem("a.img"), pmem("none")],
        "--pmem @/none: No such file or directory (os error 2)",
    );
    let config = fixture.resolved(|config| config.pmems = vec![pmem("a.img"), pmem("a.img")]);
    assert_eq!(config.pmems.len(), 2);
}

#[test]
fn memory_grows_by_blocks_of_the_kernel_and_the_host() {
    let fixture = Fixture::new();
    let grown =
        |max: u64, hugepages| Memory { max: Some(ByteSize(max)), hugepages, ..Memory::default() };
    fixture.refused(
        |config| config.memory = grown(256 << 20, None),
        "--memory max=256M: less than size=512M",
    );
    fixture.refused(
        |config| config.memory = grown(600 << 20, None),
        "--memory max=600M: 88M more than size=512M, and memory grows by multiples of 128M",
    );
    fixture.refused(
        |config| {
            config.memory = grown(3 << 29, Some(HugePages::Size1G));
            config.memory.size = ByteSize(1 << 30);
        },
        "--memory max=1536M: 512M more than size=1G, and memory grows by multiples of 1G",
    );
    let config = fixture.resolved(|config| config.memory = grown(512 << 20, None));
    assert!(!config.cmdline.contains("memhp"), "{}", config.cmdline);
}

#[test]
fn a_kernel_is_told_to_use_memory_that_comes_unless_the_user_tells_it() {
    let fixture = Fixture::new();
    let grown = |config: &mut Config| config.memory.max = Some(ByteSize(2 << 30));
    let config = fixture.resolved(grown);
    let expected = "memhp_default_state=online memory_hotplug.online_policy=auto-movable";
    assert!(config.cmdline.ends_with(expected), "{}", config.cmdline);
    assert_eq!(config.clone().resolve().unwrap(), config);
    let config = fixture.resolved(|config| {
        grown(config);
        config.cmdline = "memhp_default_state=offline".into();
    });
    assert!(!config.cmdline.contains("auto-movable"), "{}", config.cmdline);
}

#[test]
fn boot_files_must_be_readable_files() {
    let fixture = Fixture::new();
    fixture.refused(
        |config| config.kernel = "".into(),
        "no kernel: give --kernel FILE, a bzImage or an ELF vmlinux",
    );
    fixture.refused(
        |config| config.kernel = fixture.path("none"),
        "--kernel @/none: No such file or directory (os error 2)",
    );
    fixture.refused(
        |config| config.initrd = Some(fixture.folder.path().into()),
        "--initrd @: not a regular file",
    );
    fixture.refused(|config| config.initrd = Some("".into()), "--initrd: the path is empty");
}

#[test]
fn a_root_image_becomes_the_first_disk_and_the_kernel_mounts_it() {
    let fixture = Fixture::new();
    for kind in ["erofs", "squashfs"] {
        let image = fixture.path(&format!("store.{kind}"));
        let config = fixture.resolved(|config| {
            config.root = Some(image.clone());
            config.disks = vec![Disk::new(fixture.path("a.img"))];
        });
        let root = Disk { readonly: true, serial: Some("root".into()), ..Disk::new(image) };
        assert_eq!(config.disks, [root, Disk::new(fixture.path("a.img"))]);
        assert_eq!(config.root, None);
        assert_eq!(config.cmdline, format!("root=/dev/vda ro rootfstype={kind} console=hvc0"));
    }
}

#[test]
fn an_initrd_or_a_root_parameter_keeps_the_command_line() {
    let fixture = Fixture::new();
    let image = fixture.path("store.erofs");
    let config = fixture.resolved(|config| {
        config.root = Some(image.clone());
        config.initrd = Some(fixture.path("initrd"));
    });
    assert_eq!(config.cmdline, "console=hvc0");
    let config = fixture.resolved(|config| {
        config.root = Some(image);
        config.cmdline = "quiet root=/dev/vdb console=ttyS0 -- single".into();
    });
    assert_eq!(config.cmdline, "quiet root=/dev/vdb console=ttyS0 -- single");
}

#[test]
fn parameters_come_before_the_arguments_of_init() {
    let fixture = Fixture::new();
    let config = fixture.resolved(|config| config.cmdline = "quiet  -- single".into());
    assert_eq!(config.cmdline, "quiet console=hvc0 -- single");
    let config = fixture.resolved(|config| config.cmdline = "x=\" -- \" a".into());
    assert_eq!(config.cmdline, "x=\" -- \" a console=hvc0");
    let config = fixture.resolved(|config| {
        config.cmdline = " quiet".into();
        config.console = Console::Off;
    });
    assert_eq!(config.cmdline, " quiet");
}

#[test]
fn a_root_image_of_another_file_system_is_refused() {
    let fixture = Fixture::new();
    fixture.refused(
        |config| config.root = Some(fixture.path("a.img")),
        "--root @/a.img: neither erofs nor squashfs: \
         give another file system as --disk path=FILE,readonly",
    );
}

#[test]
fn disks_are_images_of_whole_sectors_or_block_devices() {
    let fixture = Fixture::new();
    let disk = |name: &str| vec![Disk::new(fixture.path(name))];
    fixture.refused(
        |config| config.disks = disk("odd.img"),
        "--disk @/odd.img: 513 bytes long, which is not a multiple of 512: \
         `truncate --size=%512 FILE` fills the last sector with zeroes",
    );
    fixture.refused(
        |config| config.disks = disk("empty.img"),
        "--disk @/empty.img: empty: give a disk a size first, for example with truncate(1)",
    );
    fixture.refused(
        |config| config.disks = vec![Disk::new("/dev/null")],
        "--disk /dev/null: neither a regular file nor a block device, so no disk",
    );
    fixture.refused(
        |config| config.disks = disk("none"),
        "--disk @/none: No such file or directory (os error 2)",
    );
}

#[test]
fn a_refused_write_access_proposes_readonly() {
    let error = std::io::Error::from(std::io::ErrorKind::ReadOnlyFilesystem);
    let text = files::refusal(&error, Access::ReadWrite).to_string();
    assert!(text.ends_with(": make it writable or add `readonly`"), "{text}");
    assert_eq!(files::refusal(&error, Access::Read).to_string(), error.to_string());
}

#[test]
fn a_disk_is_given_once_unless_nobody_writes_to_it() {
    let fixture = Fixture::new();
    fs::hard_link(fixture.path("a.img"), fixture.path("c.img")).unwrap();
    let both = || vec![Disk::new(fixture.path("a.img")), Disk::new(fixture.path("c.img"))];
    fixture.refused(
        |config| config.disks = both(),
        "--disk @/c.img: a writable disk is given twice, also as @/a.img: \
         give it once, or readonly each time",
    );
    let config = fixture.resolved(|config| {
        config.disks = both();
        config.disks.iter_mut().for_each(|disk| disk.readonly = true);
    });
    assert_eq!(config.disks.len(), 2);
}

#[test]
fn serials_are_short_printable_and_different() {
    let fixture = Fixture::new();
    let disk = |name: &str, serial: &str| Disk {
        serial: Some(serial.into()),
        ..Disk::new(fixture.path(name))
    };
    fixture.refused(
        |config| config.disks = vec![disk("a.img", "data"), disk("b.img", "data")],
        "--disk @/b.img: serial \"data\" is also that of @/a.img: each disk needs its own",
    );
    fixture.refused(
        |config| {
            config.root = Some(fixture.path("store.erofs"));
            config.disks = vec![disk("a.img", "root")];
        },
        "--disk @/a.img: serial \"root\" is also that of @/store.erofs: each disk needs its own",
    );
    fixture.refused(
        |config| config.disks = vec![disk("a.img", "123456789012345678901")],
        "--disk @/a.img: serial \"123456789012345678901\": a serial has 1 to 20 bytes",
    );
    fixture.refused(
        |config| config.disks = vec![disk("a.img", "a/b")],
        "--disk @/a.img: serial \"a/b\": a serial has printable ASCII without spaces and slashes",
    );
}

#[test]
fn processors_and_memory_have_bounds() {
    let fixture = Fixture::new();
    for cpus in [0, 255] {
        fixture.refused(
            |config| config.cpus = cpus,
            &format!("--cpus {cpus}: a machine has 1 to 254 processors"),
        );
    }
    fixture.refused(
        |config| config.memory.size = ByteSize(1 << 20),
        "--memory 1M: too little, give at least 16M",
    );
    fixture.refused(
        |config| config.memory.size = ByteSize((3 << 30) + 1),
        "--memory 3221225473: not a multiple of its pages of 4K, the next larger size is 3145732K",
    );
    fixture.refused(
        |config| {
            config.memory = Memory { hugepages: Some(HugePages::Size1G), ..Memory::default() };
        },
        "--memory 512M: not a multiple of its pages of 1G, the next larger size is 1G",
    );
    fixture.refused(
        |config| config.memory.size = ByteSize(u64::MAX),
        "--memory 18446744073709551615: not a multiple of its pages of 4K, \
         the next larger size is 18014398509481980K",
    );
}

#[test]
fn consoles_have_a_place_each() {
    let fixture = Fixture::new();
    fixture.refused(
        |config| config.serial = Console::Stdio,
        "--serial: standard input and output is already the place of --console: \
         give one of them another",
    );
    fixture.refused(
        |config| {
            config.console = Console::File { path: fixture.path("log") };
            config.serial = Console::File { path: fixture.path("log") };
        },
        "--serial: @/log is already the place of --console: give one of them another",
    );
    fixture.refused(
        |config| config.console = Console::File { path: fixture.path("none/log") },
        "--console @/none/log: the folder @/none must exist: \
         No such file or directory (os error 2)",
    );
    fixture.refused(
        |config| config.console = Console::File { path: fixture.folder.path().into() },
        "--console @: a folder, and output needs a file",
    );
    fixture.refused(
        |config| config.serial = Console::Socket { path: fixture.path("kernel") },
        "--serial @/kernel: exists and is no socket: remove it or choose another name",
    );
    fixture.refused(
        |config| config.console = Console::Pty { link: Some(fixture.path("kernel/pty")) },
        "--console @/kernel/pty: @/kernel is no folder",
    );
    fixture.refused(
        |config| config.console = Console::Pty { link: Some(fixture.path("kernel")) },
        "--console @/kernel: exists and is no symbolic link: remove it or choose another name",
    );
    let long = format!("/tmp/{}", "x".repeat(103));
    fixture.refused(
        |config| config.console = Console::Socket { path: (&long).into() },
        &format!(
            "--console {long}: 108 bytes long, and a socket's path has at most 107: \
             use a shorter folder"
        ),
    );
}

#[test]
fn a_control_socket_has_a_place_of_its_own() {
    let fixture = Fixture::new();
    fixture.refused(
        |config| config.control = Some(fixture.path("kernel")),
        "--control @/kernel: exists and is no socket: remove it or choose another name",
    );
    fixture.refused(
        |config| {
            config.console = Console::Socket { path: fixture.path("socket") };
            config.control = Some(fixture.path("socket"));
        },
        "--control: @/socket is already the place of a console: give one of them another",
    );
}

#[test]
fn smbios_strings_have_bounds() {
    let fixture = Fixture::new();
    let strings = |strings: Vec<String>| Smbios { oem_strings: strings, ..Smbios::default() };
    fixture.refused(
        |config| config.smbios = strings(vec!["a\0b".into()]),
        "--oem-string \"a\\u{0}b\": SMBIOS can hold no empty string and none with a NUL",
    );
    fixture.refused(
        |config| config.smbios = strings(vec!["x".into(); 256]),
        "--oem-string and --credential: 256 strings, and SMBIOS has room for 255",
    );
    fixture.refused(
        |config| config.smbios = strings(vec!["x".repeat(40 << 10); 2]),
        "--oem-string and --credential: 81920 bytes together, and SMBIOS has room for 61440: \
         give large data by a disk",
    );
}

#[test]
fn a_command_line_is_one_line_with_closed_quotes() {
    let fixture = Fixture::new();
    fixture.refused(
        |config| config.cmdline = "quiet\nsplash".into(),
        "--cmdline \"quiet\\nsplash\": a kernel command line has no control characters",
    );
    fixture.refused(
        |config| config.cmdline = "dyndbg=\"file x".into(),
        "--cmdline 'dyndbg=\"file x': a quote is not closed",
    );
}

#[test]
fn a_socket_device_has_an_id_of_a_guest_and_a_socket_with_a_short_path() {
    let fixture = Fixture::new();
    for cid in [0, 2, u32::MAX] {
        fixture.refused(
            |config| config.vsock = Some(Vsock { cid: Some(cid), socket: None }),
            &format!("--vsock cid={cid}: a guest has one from 3 to 4294967294, or cid=auto"),
        );
    }
    fixture.refused(
        |config| config.vsock = Some(Vsock { cid: None, socket: Some(fixture.path("kernel")) }),
        "--vsock @/kernel: exists and is no socket: remove it or choose another name",
    );
    let long = format!("/{}", "s".repeat(100));
    fixture.refused(
        |config| config.vsock = Some(Vsock { cid: None, socket: Some(long.as_str().into()) }),
        &format!(
            "--vsock {long}: with _PORT behind it 112 bytes long, and a socket's path has at most \
             107: use a shorter folder"
        ),
    );
}

#[test]
fn credentials_have_names_of_their_own_and_room_in_smbios() {
    let fixture = Fixture::new();
    let given = |texts: &[&str]| -> Vec<Credential> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    };
    fixture.refused(
        |config| config.credentials = given(&["a/b=x"]),
        "--credential a/b: not a name: use letters, digits and . _ -, at most 255",
    );
    fixture.refused(
        |config| config.credentials = given(&["a=x", "a=y"]),
        "--credential a: given twice",
    );
    fixture.refused(
        |config| config.credentials = given(&["a=@/none"]),
        "--credential /none: No such file or directory (os error 2)",
    );
    let long = "x".repeat(61 << 10);
    fixture.refused(
        |config| config.credentials = given(&[&format!("a={long}")]),
        "--oem-string and --credential: 62488 bytes together, and SMBIOS has room for 61440: \
         give large data by a disk",
    );
}

#[test]
fn readiness_of_the_guest_needs_a_way_to_hear_it() {
    let fixture = Fixture::new();
    fixture.refused(
        |config| config.ready = Ready::Booted,
        "--ready booted: the guest tells over vsock: add --vsock auto or --vsock socket=PATH",
    );
    fixture.refused(
        |config| {
            config.ready = Ready::Booted;
            config.vsock = Some(Vsock::default());
            config.credentials = vec!["vmm.notify_socket=vsock:2:9".parse().unwrap()];
        },
        "--ready booted: the credential vmm.notify_socket is given already, so that the guest \
         would tell somebody else: leave it out",
    );
}

proptest! {
    #[test]
    fn a_resolved_machine_survives_json_and_resolves_to_itself(
        (cpus, megabytes, shared, prealloc) in
            (1..=MAX_CPUS, 16_u64..1 << 20, any::<bool>(), any::<bool>()),
        (readonly, direct, serial) in (any::<bool>(), any::<bool>(), "[a-z0-9]{1,20}"),
        cmdline in "([ !#-~]{0,9}| -- |\"[ a-]{0,5}\"){0,4}",
        (root, initrd, rng, timing) in any::<(bool, bool, bool, bool)>(),
        engine in prop::sample::select(&[Engine::Auto, Engine::Uring, Engine::Sync][..]),
        console in 0..5,
        oem_strings in prop::collection::vec("[^\0]{1,10}", 0..3),
        uuid in any::<Option<[u8; 16]>>(),
    ) {
        prop_assume!(serial != "root");
        let fixture = Fixture::new();
        let config = Config {
            kernel: fixture.path("kernel"),
            initrd: initrd.then(|| fixture.path("initrd")),
            cmdline,
            boot_protocol: if rng { BootProtocol::Pvh } else { BootProtocol::Linux },
            root: root.then(|| fixture.path("store.erofs")),
            disks: vec![
                Disk {
                    path: fixture.path("a.img"),
                    readonly,
                    serial: Some(serial),
                    direct,
                    engine,
                },
                Disk::new(fixture.path("b.img")),
            ],
            pmems: vec![Pmem { file: fixture.path("store.erofs"), readonly }],
            nets: vec![
                Net { queues: Some(2), mtu: Some(1500), ..Net::new(NetLink::Tap("tap".into())) },
                Net { vhost: VhostNet::Off, ..Net::new(NetLink::Macvtap(vec![7, 5])) },
                Net::new(NetLink::User),
            ],
            store_share: oem_strings.len().checked_sub(1).map(|more| StoreShare {
                tag: "store".into(),
                store: fixture.path(""),
                closure: (more > 0).then(|| fixture.path("initrd")),
            }),
            shares: vec![
                Share {
                    tag: "folder".into(),
                    source: Some(fixture.path("")),
                    readonly,
                    cache: direct.then_some(ShareCache::Metadata),
                    sandbox: rng.then_some(ShareSandbox::Chroot),
                    uid_map: timing.then(|| ":0:1000:1:".into()),
                    program: Some(fixture.path("kernel")),
                    arguments: vec!["--thread-pool-size=4".into()],
                    ..Share::default()
                },
                Share {
                    tag: "process".into(),
                    socket: Some(fixture.path("share")),
                    ..Share::default()
                },
            ],
            vsock: Some(Vsock { cid: Some(cpus + 2), socket: Some(fixture.path("vsock")) }),
            cpus,
            memory: Memory {
                size: ByteSize(megabytes << 20),
                max: prealloc.then_some(ByteSize((megabytes + 256) << 20)),
                shared,
                hugepages: (megabytes % 2 == 0).then_some(HugePages::Size2M),
                prealloc,
            },
            console: match console {
                0 => Console::Off,
                1 => Console::Stdio,
                2 => Console::Pty { link: Some(fixture.path("pty")) },
                3 => Console::File { path: fixture.path("log") },
                _ => Console::Socket { path: fixture.path("socket") },
            },
            serial: Console::Pty { link: None },
            control: timing.then(|| fixture.path("control")),
            rng,
            balloon: Balloon { enabled: rng, statistics_interval: cpus, ..Balloon::default() },
            transport: if shared { Transport::Mmio } else { Transport::Pci },
            smbios: Smbios { uuid: uuid.map(uuid::Uuid::from_bytes), oem_strings },
            credentials: vec![
                "text=a=b,c".parse().unwrap(),
                format!("file=@{}", fixture.path("kernel").display()).parse().unwrap(),
            ],
            ready: if shared { Ready::Booted } else { Ready::Started },
            on_reboot: if direct { OnReboot::Exit } else { OnReboot::Restart },
            watchdog: if direct { Watchdog::Exit } else { Watchdog::Reset },
            shutdown_timeout: cpus,
            sandbox: readonly,
            timing,
        };
        let once = config.resolve().unwrap();
        let text = serde_json::to_string_pretty(&once).unwrap();
        let file = fixture.path("machine.json");
        fs::write(&file, &text).unwrap();
        let twice = Config::from_files(&[&file]).unwrap().resolve().unwrap();
        prop_assert_eq!(&serde_json::to_string_pretty(&twice).unwrap(), &text);
        prop_assert_eq!(&twice, &once);
        let layered = Config::from_files(&[&file, Path::new(&file)]).unwrap();
        prop_assert_eq!(layered, once);
    }
}

#[test]
fn a_card_without_an_address_gets_one_that_stays() {
    let fixture = Fixture::new();
    let taps = |config: &mut Config| {
        config.nets = ["a", "b"].map(|name| Net::new(NetLink::Tap(name.into()))).into();
        config.nets.push(Net::new(NetLink::Macvtap(vec![3])));
    };
    let config = fixture.resolved(taps);
    let macs: Vec<_> = config.nets.iter().map(|net| net.mac).collect();
    assert!(macs[0].is_some() && macs[1].is_some() && macs[0] != macs[1]);
    assert_eq!(macs[2], None, "a macvtap has its own");
    assert_eq!(fixture.resolved(taps), config);
    assert_eq!(config.clone().resolve().unwrap(), config);
    let other = fixture.resolved(|config| {
        taps(config);
        config.smbios.uuid = Some("00112233-4455-6677-8899-aabbccddeeff".parse().unwrap());
    });
    assert_ne!(other.nets[0].mac, macs[0], "another machine has others");
}

#[test]
fn a_card_that_a_process_serves_shares_the_guests_memory_with_it() {
    let fixture = Fixture::new();
    let shared =
        |link: NetLink| fixture.resolved(|config| config.nets = vec![Net::new(link)]).memory.shared;
    assert!(!shared(NetLink::Tap("a".into())));
    assert!(shared(NetLink::User));
    assert!(shared(NetLink::VhostUser(fixture.path("socket"))));
}

#[test]
fn ports_are_forwarded_to_the_one_network_of_the_users_own() {
    let forwards: Vec<Forward> = vec!["tcp:2222:22".parse().unwrap()];
    let mut config = Config::default();
    config.add_forwards(Vec::new()).unwrap();
    let error = config.add_forwards(forwards.clone()).unwrap_err().to_string();
    assert!(error.contains("--forward tcp:2222:22: needs a card with --net type=user"), "{error}");
    config.nets = vec![Net::new(NetLink::Tap("a".into())), Net::new(NetLink::User)];
    config.add_forwards(forwards.clone()).unwrap();
    assert_eq!(config.nets[1].forwards, forwards);
    config.nets.push(Net::new(NetLink::User));
    let error = config.add_forwards(forwards).unwrap_err().to_string();
    assert!(error.contains("to which of the cards"), "{error}");
}

#[test]
fn a_share_shares_the_guests_memory_with_who_serves_it() {
    let fixture = Fixture::new();
    let share = Share { tag: "a".into(), source: Some(fixture.path("")), ..Share::default() };
    let config = fixture.resolved(|config| config.shares = vec![share]);
    assert!(config.memory.shared);
}

#[test]
fn a_store_is_shared_as_a_folder_is() {
    let fixture = Fixture::new();
    let share = StoreShare { store: fixture.path(""), ..StoreShare::default() };
    let config = fixture.resolved(|config| config.store_share = Some(share.clone()));
    assert!(config.memory.shared);
    let closure = |name: &str| Some(fixture.path(name));
    for (share, expected) in [
        (
            StoreShare { tag: String::new(), ..share.clone() },
            "--store-share: a tag has 1 to 36 bytes",
        ),
        (
            StoreShare { store: fixture.path("kernel"), ..share.clone() },
            "--store-share: store @/kernel: not a folder",
        ),
        (
            StoreShare { closure: closure("none"), ..share.clone() },
            "--store-share: closure @/none: No such file or directory (os error 2)",
        ),
        (
            StoreShare { tag: "folder".into(), ..share.clone() },
            "--store-share: tag=folder is also that of a share",
        ),
    ] {
        let folder =
            Share { tag: "folder".into(), source: Some(fixture.path("")), ..Share::default() };
        let change = |config: &mut Config| {
            (config.store_share, config.shares) = (Some(share), vec![folder]);
        };
        fixture.refused(change, expected);
    }
}

#[test]
fn shares_that_cannot_be_are_refused() {
    let fixture = Fixture::new();
    let tagged = |tag: &str| Share { tag: tag.into(), ..Share::default() };
    let folder = |tag: &str| Share { source: Some(fixture.path("")), ..tagged(tag) };
    let socket = |tag: &str| Share { socket: Some(fixture.path("socket")), ..tagged(tag) };
    let of = |name: &str| Share { source: Some(fixture.path(name)), ..tagged("a") };
    let long = "x".repeat(37);
    for (shares, expected) in [
        (vec![tagged("a")], "--share tag=a: give either source=FOLDER or socket=SOCKET"),
        (
            vec![Share { source: Some(fixture.path("")), ..socket("a") }],
            "--share tag=a: give either source=FOLDER or socket=SOCKET",
        ),
        (vec![folder("")], "--share tag=: a tag has 1 to 36 bytes"),
        (vec![folder(&long)], &format!("--share tag={long}: a tag has 1 to 36 bytes")),
        (vec![folder("a b")], "--share tag=a b: a tag has neither spaces nor control characters"),
        (vec![of("kernel")], "--share tag=a: source @/kernel: not a folder"),
        (vec![of("none")], "--share tag=a: source @/none: No such file or directory (os error 2)"),
        (
            vec![folder("a"), socket("a")],
            "--share tag=a: given twice, and the guest could not tell them apart",
        ),
        (vec![socket("a"), socket("b")], "--share tag=b: its socket is also that of another share"),
        (
            vec![Share { readonly: true, ..socket("a") }],
            "--share tag=a: readonly: is for whoever started the process at the socket to say",
        ),
        (
            vec![Share { arguments: vec!["-d".into()], ..socket("a") }],
            "--share tag=a: arguments: is for whoever started the process at the socket to say",
        ),
        (
            vec![Share { program: Some(fixture.path("none")), ..folder("a") }],
            "--share tag=a: program @/none: No such file or directory (os error 2)",
        ),
        (
            (0..65).map(|index| folder(&format!("tag{index}"))).collect(),
            "--share: a machine has 64 shares at the most",
        ),
    ] {
        fixture.refused(|config| config.shares = shares, expected);
    }
}

#[test]
fn cards_that_cannot_be_are_refused() {
    let fixture = Fixture::new();
    let net = |link| Net::new(link);
    let tap = |name: &str| net(NetLink::Tap(name.to_owned()));
    let mac = "52:54:00:00:00:01".parse().ok();
    for (nets, expected) in [
        (vec![tap("a"), tap("a")], "--net tap=a: given twice, and one card alone can have it"),
        (
            vec![Net { mac, ..tap("a") }, Net { mac, ..tap("b") }],
            "--net tap=b: mac=52:54:00:00:00:01 is also that of tap=a: each card needs its own",
        ),
        (
            vec![net(NetLink::Descriptors(vec![3])), net(NetLink::Macvtap(vec![4, 3]))],
            "--net type=macvtap,fd=4:3: descriptor 3 is also that of another card",
        ),
        (
            vec![net(NetLink::Descriptors(vec![2]))],
            "--net fd=2: descriptor 2: inherited ones begin at 3, behind standard input, output \
             and error",
        ),
        (vec![net(NetLink::Descriptors(vec![3, 3]))], "--net fd=3:3: descriptor 3 is given twice"),
        (
            vec![tap("a-name-that-is-too-long")],
            "--net tap=a-name-that-is-too-long: no name of an interface: it has 1 to 15 bytes \
             without spaces, slashes, colons and percent signs",
        ),
        (
            vec![Net { queues: Some(0), ..tap("a") }],
            "--net tap=a: queues=0: a card has 1 to 64 queue pairs",
        ),
        (
            vec![Net { queues: Some(3), ..net(NetLink::Descriptors(vec![3, 4])) }],
            "--net fd=3:4: queues=3: a card has a queue pair for each descriptor, and 2 are given: \
             leave queues out",
        ),
        (
            vec![Net { mtu: Some(67), ..tap("a") }],
            "--net tap=a: mtu=67: an interface carries packets of 68 to 65521 bytes",
        ),
        (
            vec![Net { vhost: VhostNet::On, ..net(NetLink::User) }],
            "--net type=user: vhost=on: the host's kernel moves the frames of a tap or macvtap \
             only",
        ),
    ] {
        fixture.refused(|config| config.nets = nets, expected);
    }
}
