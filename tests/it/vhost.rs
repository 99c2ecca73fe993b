//! Do processes and the host's kernel serve devices in our place? A network of the user's own by
//! passt, and a vhost-user process that comes and goes.

mod user_network;

use std::env;
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use tests::guest::{Guest, Launch, PATIENCE};
use tests::testbed::Testbed;
use tests::tool;

use crate::GuestTest;
use crate::bulk::{self, MEBIBYTE};
use crate::interface::{Interface, set_up};

pub(crate) const TESTS: &[GuestTest] = &[
    ("vhost::passt_gives_the_guest_addresses_a_way_out_and_forwarded_ports", user_network::serves),
    ("vhost::a_vhost_user_process_that_is_killed_and_restarted_serves_again", comes_back),
    ("vhost::the_hosts_kernel_moves_frames_over_pci", |testbed| kernel_moves(testbed, "pci", 2)),
    ("vhost::the_hosts_kernel_moves_frames_over_mmio", |testbed| kernel_moves(testbed, "mmio", 1)),
    ("vhost::a_passt_that_cannot_serve_is_refused_with_the_reason", passt_refusals),
];

/// The tap of a guest whose frames the host's kernel moves, its network and the addresses there.
const TAP: &str = "nvvhost";
const NETWORK: u8 = 97;
const HOST: Ipv4Addr = Ipv4Addr::new(10, NETWORK, 0, 1);
const GUEST: Ipv4Addr = Ipv4Addr::new(10, NETWORK, 0, 2);

/// Bytes that go each way: several times what any ring holds.
const BYTES: usize = 2 << 20;

/// Where only the host itself reaches what listens, and passt's guests at their gateway's address.
const LOOPBACK: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

/// Brings the card up and asks for an address and name servers; prints the address and the gateway.
const DHCP: &str = "\
    printf '#!/bin/sh\\n[ \"$1\" = bound ] || exit 0\\nifconfig $interface $ip netmask $subnet\\n\
    ifconfig $interface mtu ${mtu:-1500}\\n\
    route add default gw $router $interface 2>/dev/null\\n\
    for server in $dns; do echo nameserver $server; done > /etc/resolv.conf\\n\
    echo $ip $router > /run/lease\\n' \
    > /run/dhcp; chmod +x /run/dhcp; mkdir -p /etc; rm -f /run/lease; \
    ifconfig lo up; ifconfig eth0 up; \
    udhcpc -i eth0 -O mtu -n -q -t 10 -s /run/dhcp > /run/udhcpc 2>&1 || cat /run/udhcpc; \
    cat /run/lease";

fn comes_back(testbed: &Testbed) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let socket = folder.path().join("socket");
    let process = ListeningPasst::start(testbed, &socket)?;
    let mut guest = Launch::tiny(testbed, &testbed.bzimage)
        .arguments(["--transport", "mmio", "--net"])
        .arguments([format!("vhost-user={}", socket.display())])
        .boot()?;
    let gateway = lease(&mut guest)?;
    from_guest_to_the_host(&mut guest, &gateway, LOOPBACK)?;
    drop(process);
    wait_for(&mut guest, "[ $(cat /sys/class/net/eth0/carrier) = 0 ]")?;
    let _process = ListeningPasst::start(testbed, &socket)?;
    wait_for(&mut guest, "[ $(cat /sys/class/net/eth0/carrier) = 1 ]")?;
    let gateway = lease(&mut guest).context("after the process came back")?;
    from_guest_to_the_host(&mut guest, &gateway, LOOPBACK)?;
    guest.power_off()
}

fn kernel_moves(testbed: &Testbed, transport: &str, processors: u32) -> Result<()> {
    let tuntap = ["tuntap", "add", TAP, "mode", "tap", "multi_queue"];
    let _tap = Interface::add(&tuntap, TAP, NETWORK)?;
    let mut guest = bulk::launch(testbed)
        .arguments(["--cpus", &processors.to_string(), "--transport", transport])
        .arguments(["--net", &format!("tap={TAP},vhost=on")])
        .boot()?;
    let worker = format!("vhost-{}", guest.process_id());
    ensure!(
        is_running(&worker, guest.process_id())?,
        "there is no {worker}: who moves the frames?"
    );
    set_up(&mut guest, "eth0", NETWORK)?;
    bulk::install(&mut guest)?;
    bulk::carries_everything(&mut guest, NETWORK, bulk::wanted().unwrap_or(MEBIBYTE))?;
    from_guest_to_the_host(&mut guest, &HOST.to_string(), HOST.into())?;
    from_host_into_guest(&mut guest, GUEST.into(), 22)?;
    guest.tell("reboot -f")?;
    guest.wait_for_agent().context("after a reboot in place")?;
    set_up(&mut guest, "eth0", NETWORK)?;
    guest.run(&format!("ping -c 1 fd{NETWORK}::1"))?;
    from_guest_to_the_host(&mut guest, &HOST.to_string(), HOST.into())?;
    let pairs = guest.run("ls -d /sys/class/net/eth0/queues/rx-* | wc -l")?;
    ensure!(pairs.trim() == processors.to_string(), "the guest has {pairs} queue pairs");
    guest.power_off()
}

fn passt_refusals(testbed: &Testbed) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let old = folder.path().join("passt");
    std::fs::write(&old, "#!/bin/sh\necho 'Usage: passt' >&2\nexit 1\n")?;
    std::fs::set_permissions(&old, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    let taken = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let forward = format!("tcp:127.0.0.1:{}:22", taken.local_addr()?.port());
    let old = format!("{}:{}", folder.path().display(), env::var("PATH")?);
    for (path, arguments, expected) in [
        ("/nowhere".to_owned(), &[][..], "passt is not in PATH: install the package passt"),
        (old, &[], "passt that is installed is too old"),
        (path_with_passt(testbed)?, &["--forward", &forward], "passt has ended with"),
    ] {
        let mut guest = Launch::tiny(testbed, &testbed.bzimage)
            .environment("PATH", path)
            .arguments(["--net", "type=user"])
            .arguments(arguments)
            .start()?;
        guest.errors().wait_for(expected, PATIENCE)?;
        ensure!(guest.status()? == 1, "a guest without its network was started");
    }
    Ok(())
}

/// `PATH` with the testbed's passt in front.
fn path_with_passt(testbed: &Testbed) -> Result<String> {
    Ok(format!("{}:{}", testbed.passt.display(), env::var("PATH")?))
}

/// Has the guest take an address, and returns its gateway: the host.
fn lease(guest: &mut Guest) -> Result<String> {
    let lease = guest.run(DHCP)?;
    let (_address, gateway) = lease.trim().split_once(' ').with_context(|| lease.clone())?;
    Ok(gateway.to_owned())
}

/// The guest fetches bytes from a server that listens at `place` of the host, which the guest calls
/// `host`, and finds them whole.
fn from_guest_to_the_host(guest: &mut Guest, host: &str, place: IpAddr) -> Result<()> {
    let server = TcpListener::bind((place, 0))?;
    let port = server.local_addr()?.port();
    let sender = thread::spawn(move || -> Result<()> {
        let (mut client, _) = server.accept()?;
        let mut request = Vec::new();
        while !request.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            client.read_exact(&mut byte)?;
            request.extend(byte);
        }
        let header = format!("HTTP/1.0 200 OK\r\nContent-Length: {BYTES}\r\n\r\n");
        client.write_all(header.as_bytes())?;
        Ok(client.write_all(&content())?)
    });
    let fetch = format!("wget -q -O /run/bytes http://{host}:{port}/");
    let got = guest.run(&format!("{fetch} && sha256sum < /run/bytes | cut -c -64"))?;
    sender.join().ok().context("the server panicked")??;
    ensure!(got.contains(&digest()?), "the guest fetched other bytes: {got}");
    Ok(())
}

/// The host fetches from a server in the guest what the guest has got.
fn from_host_into_guest(guest: &mut Guest, address: IpAddr, port: u16) -> Result<()> {
    guest.run("pidof httpd > /dev/null || httpd -p 22 -h /run")?;
    let mut client = TcpStream::connect((address, port))?;
    client.set_read_timeout(Some(PATIENCE))?;
    client.write_all(b"GET /bytes HTTP/1.0\r\n\r\n")?;
    let mut answer = Vec::new();
    client.read_to_end(&mut answer).context("the guest's server does not answer")?;
    let (content, length) = (content(), answer.len());
    let end = length.checked_sub(content.len()).and_then(|start| answer.get(start..));
    ensure!(end == Some(&content), "the host fetched other bytes from the guest, {length} of them");
    Ok(())
}

fn wait_for(guest: &mut Guest, condition: &str) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while guest.attempt(condition)?.0 != 0 {
        ensure!(Instant::now() < deadline, "`{condition}` did not come true in the guest");
        thread::sleep(Duration::from_millis(100));
    }
    Ok(())
}

/// Bytes in which a lost or swapped part is seen.
fn content() -> Vec<u8> {
    let mut state = 1u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state.to_le_bytes()
    };
    (0..BYTES / 4).flat_map(|_| next()).collect()
}

/// The digest of [`content`].
fn digest() -> Result<String> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("content");
    std::fs::write(&path, content())?;
    let output = String::from_utf8(tool::run("sha256sum", [&path])?)?;
    Ok(output.split(' ').next().context("sha256sum says nothing")?.to_owned())
}

/// Whether the kernel has a thread of this name: its own or, since Linux 6.4, the process's.
fn is_running(name: &str, process: u32) -> Result<bool> {
    let mut folders = vec![std::fs::read_dir("/proc")?];
    folders.push(std::fs::read_dir(format!("/proc/{process}/task"))?);
    for entry in folders.into_iter().flatten() {
        // Others end while they are looked at.
        let comm = std::fs::read_to_string(entry?.path().join("comm")).unwrap_or_default();
        if comm.trim() == name {
            return Ok(true);
        }
    }
    Ok(false)
}

/// A passt that listens at a socket; dropping it kills it.
struct ListeningPasst(Child);

impl ListeningPasst {
    fn start(testbed: &Testbed, socket: &Path) -> Result<Self> {
        let _ = std::fs::remove_file(socket);
        let process = Command::new(testbed.passt.join("passt"))
            .args(["--foreground", "--quiet", "--vhost-user", "--socket"])
            .arg(socket)
            .stdin(Stdio::null())
            .spawn()?;
        let process = Self(process);
        let deadline = Instant::now() + PATIENCE;
        while !socket.exists() {
            ensure!(Instant::now() < deadline, "passt does not listen");
            thread::sleep(Duration::from_millis(20));
        }
        Ok(process)
    }
}

impl Drop for ListeningPasst {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
