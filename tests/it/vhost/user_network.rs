//! What has a guest whose network is the user's own? Addresses, names, a way out and forwarded
//! ports, by IPv4 and IPv6, and by TCP and UDP.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, TcpListener};
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use tempfile::TempDir;
use tests::datagram::{self, Answerer};
use tests::events::Events;
use tests::guest::Guest;
use tests::name_server;
use tests::namespace;
use tests::testbed::Testbed;

use super::{
    LOOPBACK, from_guest_to_the_host, from_host_into_guest, lease, path_with_passt, wait_for,
};
use crate::bulk::{self, MEBIBYTE, STREAM_END};
use crate::interface::{Interface, ip};
use crate::share::kill_children;

/// The interface that the host has its ways out by, and its network.
const WAY_OUT: &str = "nvout";
const NETWORK: u8 = 99;

/// The host's gateways, which do not exist. What the guest sends to them is the host's.
const GATEWAY: &str = "10.99.0.254";
const GATEWAY_SIX: &str = "fe80::fe";

/// An address of the host in no network that the guest is in.
const ELSEWHERE: Ipv6Addr = Ipv6Addr::new(0xFD98, 0, 0, 0, 0, 0, 0, 1);

/// Where only the host itself reaches what listens, by IPv6.
const LOOPBACK_SIX: IpAddr = IpAddr::V6(Ipv6Addr::LOCALHOST);

/// Ports of the host that are forwarded to ports of the guest.
const TCP_PORT: u16 = 2222;
const UDP_PORT: u16 = 5353;

/// What is asked by datagrams.
const QUESTION: &str = "who-is-there?";

/// The host of this test is its own, with ways out and with a name server: an emulated host has
/// neither, and those of any other are not to be touched.
pub(super) fn serves(testbed: &Testbed) -> Result<()> {
    let testbed = testbed.clone();
    namespace::in_own_network(move || {
        let _surroundings = Surroundings::make()?;
        serves_here(&testbed)
    })
}

fn serves_here(testbed: &Testbed) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let control = folder.path().join("control");
    let mut guest = bulk::launch(testbed)
        .environment("PATH", path_with_passt(testbed)?)
        .arguments(["--net", "type=user"])
        .arguments(["--forward", &format!("tcp:127.0.0.1:{TCP_PORT}:22")])
        .arguments(["--forward", &format!("tcp:[::1]:{TCP_PORT}:22")])
        .arguments(["--forward", &format!("udp:{UDP_PORT}:53")])
        .arguments([Path::new("--control"), &control])
        .boot()?;
    bulk::install(&mut guest)?;
    let gateway = lease(&mut guest)?;
    ensure!(gateway == GATEWAY, "the guest's gateway is {gateway}");
    from_guest_to_the_host(&mut guest, &gateway, LOOPBACK)?;
    from_host_into_guest(&mut guest, LOOPBACK, TCP_PORT)?;
    knows_names(&mut guest)?;
    has_ipv6(&mut guest)?;
    exchanges_datagrams(&mut guest)?;
    if let Some(bytes) = bulk::wanted() {
        let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0))?;
        bulk::sends(&mut guest, &gateway, &listener, bytes)?;
        // Longer connections into a slow guest are what passt can lose.
        let pieces = (bytes / MEBIBYTE).max(1);
        bulk::receives_in_pieces(&mut guest, &gateway, &listener, bytes, pieces)?;
    }
    // The network outlives a guest's restart.
    guest.tell("reboot -f")?;
    guest.wait_for_agent().context("after a reboot in place")?;
    let gateway = lease(&mut guest).context("after a reboot in place")?;
    from_guest_to_the_host(&mut guest, &gateway, LOOPBACK)?;
    from_host_into_guest(&mut guest, LOOPBACK, TCP_PORT)?;
    // The guest outlives its network.
    let mut events = Events::follow(&testbed.program, &control)?;
    kill_children(&guest)?;
    let lost = events.wait_for("process-lost").map_err(|error| guest.explain(error))?;
    ensure!(lost.contains("net0") && lost.contains("passt"), "the event says {lost}");
    wait_for(&mut guest, "[ $(cat /sys/class/net/eth0/carrier) = 0 ]")?;
    guest.power_off()
}

/// The lease brings a name server, and what it says is what the host's says.
fn knows_names(guest: &mut Guest) -> Result<()> {
    let said = guest.run(&format!("nslookup {}", name_server::NAME))?;
    let (four, six) = (name_server::FOUR.to_string(), name_server::SIX.to_string());
    let expected = [GATEWAY, &four, &six];
    ensure!(expected.iter().all(|word| said.contains(word)), "{said} lacks some of {expected:?}");
    Ok(())
}

/// The guest has an address of the host's network that it was told by the router, reaches by the
/// router what listens on the host's loopback interface, and is reached from there.
fn has_ipv6(guest: &mut Guest) -> Result<()> {
    let addresses = "ip -6 addr show dev eth0 scope global | grep -v tentative";
    wait_for(guest, &format!("{addresses} | grep -q 'inet6 fd{NETWORK}:'"))?;
    let route = guest.run("ip -6 route show dev eth0 | grep ^default")?;
    ensure!(route.contains(&format!("via {GATEWAY_SIX} ")), "the guest's way out is {route}");
    let host = format!("[{GATEWAY_SIX}%eth0]");
    from_guest_to_the_host(guest, &host, LOOPBACK_SIX)?;
    from_host_into_guest(guest, LOOPBACK_SIX, TCP_PORT)
}

/// Datagrams are answered out there, on the host's loopback interface and in the guest.
fn exchanges_datagrams(guest: &mut Guest) -> Result<()> {
    for (address, place) in
        [(GATEWAY.to_owned(), LOOPBACK), (ELSEWHERE.to_string(), IpAddr::from(ELSEWHERE))]
    {
        let host = Answerer::start((place, 0).into(), datagram::reversed)?;
        let port = host.place.port();
        let said = guest.run(&format!("{STREAM_END} ask {address} {port} {QUESTION}"))?;
        is_answer(said.as_bytes()).with_context(|| format!("{address} for the guest"))?;
    }
    guest.run(&format!("{STREAM_END} answer 53 > /dev/null 2>&1 &"))?;
    for address in [LOOPBACK, LOOPBACK_SIX] {
        let said = datagram::ask((address, UDP_PORT).into(), QUESTION.as_bytes())?;
        is_answer(&said).with_context(|| format!("the guest at {address}"))?;
    }
    Ok(())
}

fn is_answer(said: &[u8]) -> Result<()> {
    let expected = datagram::reversed(QUESTION.as_bytes());
    ensure!(expected.as_deref() == Some(said), "{:?}", String::from_utf8_lossy(said));
    Ok(())
}

/// A host that has its ways out by IPv4 and IPv6, and a name server that others do not reach.
struct Surroundings {
    _folder: TempDir,
    _way_out: Interface,
    _names: Answerer,
}

impl Surroundings {
    fn make() -> Result<Self> {
        ip(&["link", "set", "lo", "up"])?;
        ip(&["address", "add", &format!("{ELSEWHERE}/128"), "dev", "lo"])?;
        let way_out = Interface::add(&["link", "add", WAY_OUT, "type", "dummy"], WAY_OUT, NETWORK)?;
        for (family, gateway) in [("-4", GATEWAY), ("-6", GATEWAY_SIX)] {
            ip(&[family, "route", "add", "default", "via", gateway, "dev", WAY_OUT])?;
        }
        let folder = tempfile::tempdir()?;
        namespace::resolve_names_at(LOOPBACK, folder.path())?;
        let names = Answerer::start((LOOPBACK, 53).into(), name_server::answer)?;
        Ok(Self { _folder: folder, _way_out: way_out, _names: names })
    }
}
