use super::*;

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
            machined: rng.then(|| Machined::new("web.example")),
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
                mergeable: false,
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
            ready: if shared { Ready::Reachable } else { Ready::Started },
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
