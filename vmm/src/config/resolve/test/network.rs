use super::*;

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
