use super::*;

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
        |config| config.ready = Ready::Reachable,
        "--ready reachable: the guest tells over vsock: add --vsock auto or --vsock socket=PATH",
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
