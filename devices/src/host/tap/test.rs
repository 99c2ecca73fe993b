//! Interfaces that are there, and descriptors that are not.

use std::os::fd::IntoRawFd;

use super::*;

#[test]
fn what_is_no_tap_is_named_with_a_remedy() {
    let error = Tap::open("no-such-tap0", Queues::UpTo(1)).unwrap_err().to_string();
    assert!(error.contains("there is no interface no-such-tap0: make it with"), "{error}");
    let error = Tap::open("lo", Queues::UpTo(1)).unwrap_err().to_string();
    assert!(error.contains("lo is no tap interface"), "{error}");
    let error = Tap::inherit(&[-1]).unwrap_err().to_string();
    assert!(error.contains("descriptor -1 is not open"), "{error}");
    let error = Tap::inherit(&[9999]).unwrap_err().to_string();
    assert!(error.contains("descriptor 9999 is not open"), "{error}");
    let file = tempfile::tempfile().unwrap().into_raw_fd();
    let error = Tap::inherit(&[file]).unwrap_err().to_string();
    assert!(error.contains("is no tap: it must be attached"), "{error}");
}

#[test]
fn offloads_are_sets() {
    let both = Offloads::CHECKSUM.with(Offloads::TSO4);
    assert!(both.contains(Offloads::CHECKSUM) && !both.contains(Offloads::TSO6));
    assert!(Offloads::ALL.contains(both) && Offloads::ALL.contains(Offloads::USO));
    assert!(!Offloads::ALL.without(Offloads::USO).contains(Offloads::USO));
    assert_eq!(both.without(Offloads::TSO4), Offloads::CHECKSUM);
}
