use super::*;

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
fn only_small_pages_of_private_memory_are_merged() {
    let fixture = Fixture::new();
    let mergeable = Memory { mergeable: true, ..Memory::default() };
    assert!(fixture.resolved(|config| config.memory = mergeable).memory.mergeable);
    let refusal = "--memory mergeable: the host merges neither huge pages nor memory that other \
                   processes map, as those do that serve shares and networks: leave it out";
    fixture.refused(
        |config| {
            config.memory = mergeable;
            config.nets = vec![Net::new(NetLink::User)];
        },
        refusal,
    );
    fixture.refused(
        |config| config.memory = Memory { hugepages: Some(HugePages::Size2M), ..mergeable },
        refusal,
    );
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
