use super::*;

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
