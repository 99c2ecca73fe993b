use super::*;

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
