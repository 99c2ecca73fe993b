//! A whole tree, as a guest sees it and as the host has it.

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;

use super::*;

#[test]
fn thousands_of_entries_are_as_the_host_has_them() {
    let tree = Tree::new();
    grow(&tree.path().join("shown"));
    let mut client = Client::new(&tree.shown());
    let root = tree.path().join("shown");
    let mut compared = 0;
    let mut pending = vec![(root.clone(), client.lookup(ROOT_ID, "shown").unwrap())];
    while let Some((path, entry)) = pending.pop() {
        compared += 1;
        compare(&mut client, &path, &entry);
        if !entry_is(&entry, 0o040_000) {
            continue;
        }
        let host: BTreeMap<Vec<u8>, PathBuf> = fs::read_dir(&path)
            .unwrap()
            .map(|entry| entry.unwrap())
            .map(|entry| (entry.file_name().as_bytes().to_vec(), entry.path()))
            .collect();
        let mut plain = client.names(entry.node);
        assert!(plain.remove(&b"."[..]) && plain.remove(&b".."[..]));
        assert!(plain.iter().eq(plain.iter().filter(|name| host.contains_key(*name))));
        assert_eq!(plain.len(), host.len(), "{}", path.display());
        let listed = client.list(READDIRPLUS, entry.node, 1 << 14);
        assert_eq!(listed.len(), host.len() + 2);
        for (name, entry, inode) in listed {
            if entry.node != 0 {
                assert_eq!(inode, entry.attributes.inode);
                pending.push((host[&name].clone(), entry));
            }
        }
    }
    assert!(compared > 5000, "{compared}");
}

/// A tree with everything that a store has, and more.
fn grow(root: &Path) {
    let huge = root.join("huge");
    fs::create_dir(&huge).unwrap();
    for number in 0..5000 {
        let name = format!("{number}-{}", "x".repeat(number % 200));
        fs::write(huge.join(&name), vec![1; number % 32]).unwrap();
    }
    let mut deep = root.to_owned();
    for level in 0..40 {
        deep.push(format!("level-{level}"));
        fs::create_dir(&deep).unwrap();
        fs::write(deep.join("file"), level.to_string()).unwrap();
        symlink(format!("../level-{level}/file"), deep.join("link")).unwrap();
        fs::hard_link(deep.join("file"), deep.join("hard")).unwrap();
        let mode = fs::Permissions::from_mode([0o444, 0o555, 0o644, 0o755][level % 4]);
        fs::set_permissions(deep.join("file"), mode).unwrap();
        let file = fs::File::open(deep.join("file")).unwrap();
        let time = std::time::UNIX_EPOCH + std::time::Duration::new(level as u64, 5);
        file.set_times(fs::FileTimes::new().set_modified(time)).unwrap();
    }
    fs::write(root.join("large"), vec![7; 3 << 20]).unwrap();
    fs::write(root.join("sp ace\n\u{e9}"), "odd").unwrap();
}

fn compare(client: &mut Client, path: &Path, entry: &Entry) {
    let host = fs::symlink_metadata(path).unwrap();
    let told = client.attributes(entry.node).unwrap().attributes;
    for told in [told, entry.attributes] {
        assert_eq!(
            (told.inode, told.bytes, told.blocks, told.mode, told.links, told.user, told.group),
            (
                host.ino(),
                host.size(),
                host.blocks(),
                host.mode(),
                u32::try_from(host.nlink()).unwrap(),
                host.uid(),
                host.gid()
            )
        );
        assert_eq!(
            (told.modified.cast_signed(), i64::from(told.modified_nanoseconds)),
            (host.mtime(), host.mtime_nsec())
        );
        assert_eq!(u64::from(told.block_bytes), host.blksize());
    }
    if host.is_symlink() {
        let target = client.call(READLINK, entry.node, &[]).unwrap();
        assert_eq!(target, fs::read_link(path).unwrap().as_os_str().as_bytes());
    } else if host.is_file() {
        let expected = fs::read(path).unwrap();
        let mut read = Vec::new();
        while read.len() < expected.len() {
            read.extend(client.read(entry.node, read.len() as u64, 1 << 17).unwrap());
        }
        assert!(read == expected, "{}", path.display());
    }
}

fn entry_is(entry: &Entry, kind: u32) -> bool {
    entry.attributes.mode & 0o170_000 == kind
}
