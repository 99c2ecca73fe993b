//! What a guest cannot do, however it asks.

use std::sync::LazyLock;

use proptest::prelude::*;

use super::*;
use crate::store::requests::REQUEST_MAX;

#[test]
fn a_node_that_nobody_was_told_of_leads_nowhere() {
    let tree = Tree::new();
    let mut client = Client::new(&tree.shown());
    let shown = client.lookup(ROOT_ID, "shown").unwrap().node;
    let hidden = fs::metadata(tree.path().join("hidden")).unwrap().ino();
    for node in [0, shown + 1, 77, hidden, u64::from(u32::MAX), u64::MAX] {
        assert_eq!(client.lookup(node, "bin").unwrap_err(), libc::ESTALE, "{node}");
        assert_eq!(client.attributes(node).unwrap_err(), libc::ESTALE, "{node}");
        assert_eq!(client.read(node, 0, 8), Err(libc::ESTALE), "{node}");
        assert_eq!(client.call(READLINK, node, &[]), Err(libc::ESTALE), "{node}");
        let list = ReadRequest { bytes: 4096, ..ReadRequest::default() };
        for opcode in [READDIR, READDIRPLUS] {
            assert_eq!(client.call(opcode, node, list.as_bytes()), Err(libc::ESTALE), "{node}");
        }
        assert_eq!(client.send(&request(FORGET, node, u64::MAX.as_bytes())), None);
    }
    // What was told of is still there, and the root stays however often it is forgotten.
    assert_eq!(client.send(&request(FORGET, ROOT_ID, u64::MAX.as_bytes())), None);
    assert!(client.lookup(shown, "bin").is_ok());
    assert_eq!(client.lookup(ROOT_ID, "shown").unwrap().node, shown);
}

#[test]
fn nothing_leads_out_of_the_tree() {
    let tree = Tree::new();
    let mut client = Client::new(&tree.shown());
    let shown = client.lookup(ROOT_ID, "shown").unwrap().node;
    for node in [ROOT_ID, shown] {
        for name in ["..", ".", "", "/", "/etc", "bin/program", "../hidden", "shown/../hidden"] {
            assert_eq!(client.lookup(node, name).unwrap_err(), libc::EINVAL, "{name:?}");
        }
        let long = "x".repeat(256);
        assert_eq!(client.lookup(node, long).unwrap_err(), libc::ENAMETOOLONG);
    }
    for link in ["out", "beside", "link"] {
        let link = client.lookup(shown, link).unwrap().node;
        assert!(client.call(READLINK, link, &[]).is_ok());
        assert_eq!(client.lookup(link, "program").unwrap_err(), libc::ENOTDIR);
        assert_eq!(client.read(link, 0, 10), Err(libc::EINVAL));
        let list = ReadRequest { bytes: 4096, ..ReadRequest::default() };
        assert_eq!(client.call(READDIR, link, list.as_bytes()), Err(libc::EINVAL));
    }
}

#[test]
fn a_tree_that_is_changed_under_a_guest_is_stale_and_not_followed() {
    let tree = Tree::new();
    let mut client = Client::new(&tree.shown());
    let bin = client.find(Path::new("shown/bin")).unwrap().node;
    let program = client.lookup(bin, "program").unwrap().node;
    fs::rename(tree.path().join("shown/bin"), tree.path().join("shown/gone")).unwrap();
    symlink("../hidden/bin", tree.path().join("shown/bin")).unwrap();
    // A thread that has nothing open yet.
    let mut other =
        Client { requests: Requests::new(Arc::clone(&client.requests.store)), ..client };
    assert!(other.read(program, 0, 10).is_err());
    assert!(other.lookup(bin, "program").is_err());
    assert!(other.attributes(program).is_err());
}

#[test]
fn wrong_requests_are_errors_and_nothing_else() {
    let tree = Tree::new();
    let mut client = Client::new(&tree.whole());
    assert_eq!(client.send(&[]), Some(Err(libc::EINVAL)));
    assert_eq!(client.send(&[0xFF; 39]), Some(Err(libc::EINVAL)));
    for len in [0, 39, 41, 1000, u32::MAX] {
        let mut request = request(GETATTR, ROOT_ID, &[]);
        request[..4].copy_from_slice(&len.to_ne_bytes());
        assert_eq!(client.send(&request), Some(Err(libc::EINVAL)), "{len}");
    }
    // A write of which only the first part is looked at.
    let write = request(16, ROOT_ID, &vec![0; REQUEST_MAX * 2]);
    assert_eq!(client.send(&write[..REQUEST_MAX]), Some(Err(libc::EROFS)));
    assert_eq!(client.call(LOOKUP, ROOT_ID, b"no end"), Err(libc::EINVAL));
    assert_eq!(client.call(READ, ROOT_ID, &[0; 39]), Err(libc::EINVAL));
    let file = client.lookup(ROOT_ID, "file").unwrap().node;
    assert_eq!(client.read(file, u64::MAX, 1), Err(libc::EINVAL));
    assert_eq!(client.read(file, 0, u32::MAX), Err(libc::EINVAL), "there is no room for it");
    let bytes = 8;
    let list = ReadRequest { bytes, ..ReadRequest::default() };
    assert_eq!(client.call(READDIR, ROOT_ID, list.as_bytes()), Err(libc::EINVAL));
    let old = InitRequest { major: 7, minor: 8, ..InitRequest::default() };
    assert_eq!(client.call(INIT, 0, old.as_bytes()), Err(libc::EPROTO));
    // Whatever the room is.
    for room in 0..64 {
        client.room = room;
        for opcode in 0..60 {
            let len = client.requests.answer(
                &request(opcode, ROOT_ID, b"file\0file\0file\0file\0file\0file\0"),
                &mut Bytes(vec![0; room]),
            );
            assert!(len <= room);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 1000,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    /// Whatever is sent, a reply fits and says how long it is.
    #[test]
    fn garbage_is_answered(
        requests in prop::collection::vec(
            (0_u32..60, 0_u64..8, prop::collection::vec(any::<u8>(), 0..96), 0_usize..512), 1..12,
        ),
    ) {
        static TREE: LazyLock<(Tree, Arc<Store>)> = LazyLock::new(|| {
            let tree = Tree::new();
            let store = tree.shown();
            (tree, store)
        });
        let mut client = Client::new(&TREE.1);
        for name in ["shown", "file"] {
            client.lookup(ROOT_ID, name).unwrap();
        }
        for (opcode, node, body, room) in requests {
            client.room = room;
            client.send(&request(opcode, node, &body));
        }
    }
}
