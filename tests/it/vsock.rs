//! Do programs of host and guest reach each other? Through unix sockets of the host, and through
//! the host's kernel, with every byte compared; and so do a guest's messages the service manager.

use std::fs;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use serde_json::{Value, json};
use tests::guest::{Guest, PATIENCE};
use tests::packages::Program;
use tests::pattern;
use tests::service_manager::ServiceManager;
use tests::ssh_server;
use tests::testbed::Testbed;
use tests::tool;

use crate::GuestTest;
use crate::bulk::{self, STREAM_END};

pub(crate) const TESTS: &[GuestTest] = &[
    ("vsock::unix_sockets_carry_bytes_and_the_guests_readiness", unix),
    ("vsock::the_hosts_kernel_carries_bytes_and_the_reason_of_a_failed_boot", kernel),
];

/// A credential, and what becomes of it on its way.
const SECRET: &[u8] = b"\x00not for everybody\xff";
const SECRET_IN_BASE64: &str = "AG5vdCBmb3IgZXZlcnlib2R5/w==";

/// Prints the strings of SMBIOS as the guest's kernel found them.
const STRINGS: &str = r"tr -c '\040-\176' '\n' < /sys/firmware/dmi/tables/DMI";

/// What a message may take to the service manager.
const HEARD: Duration = Duration::from_secs(60);

/// Bytes that a command in the guest reads.
const TYPED: u64 = 100_000;

/// Connections that are open at the same time.
const MANY: usize = 60;

fn unix(testbed: &Testbed) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let gate = folder.path().join("vsock");
    let secret = folder.path().join("secret");
    fs::write(&secret, SECRET)?;
    let manager = ServiceManager::new(folder.path())?;
    let mut guest = manager
        .starts(bulk::launch(testbed))
        .environment("WATCHDOG_USEC", "2000000")
        .arguments(["--vsock", &format!("socket={}", gate.display()), "--ready", "booted"])
        .arguments(["--credential", &format!("secret=@{}", secret.display())])
        .boot()?;
    serve(&mut guest)?;
    credential(&mut guest)?;
    readiness(&mut guest, &manager)?;
    echo(&gate)?;
    many(&gate)?;
    let mut refused = call(&gate, 1234)?;
    let mut nothing = Vec::new();
    refused.read_to_end(&mut nothing)?;
    ensure!(nothing.is_empty(), "a port that nobody serves answers {nothing:?}");
    guest_initiated(&mut guest, &gate)?;
    guest.signal(Signal::TERM)?;
    let stopping = "STOPPING=1\nSTATUS=The guest was asked to power off.";
    manager.wait_for(stopping, HEARD).map_err(|error| guest.explain(error))?;
    guest.expect_status(0)?;
    ensure!(!gate.exists(), "the socket is still there");
    Ok(())
}

/// A credential is in SMBIOS and not on the kernel command line.
fn credential(guest: &mut Guest) -> Result<()> {
    let string = format!("io.systemd.credential.binary:secret={SECRET_IN_BASE64}");
    let strings = guest.run(STRINGS)?;
    ensure!(strings.lines().any(|line| line == string), "SMBIOS has no {string}:\n{strings}");
    let line = guest.run("cat /proc/cmdline")?;
    ensure!(!line.contains("secret"), "everybody in the guest sees {line}");
    Ok(())
}

/// What the guest says to the address that it is given reaches the service manager, as far as it is
/// about the guest, and nothing counts as readiness before it; this process's own signs of life go
/// on.
fn readiness(guest: &mut Guest, manager: &ServiceManager) -> Result<()> {
    manager.wait_for("STATUS=The guest boots.", HEARD)?;
    say(guest, r"READY=1\nSTATUS=Up.\nMAINPID=1\nX_SYSTEMD_HOSTNAME=vm\n")?;
    let told = manager.wait_for("READY=1", HEARD)?;
    ensure!(told == "READY=1\nSTATUS=Up.\nX_SYSTEMD_HOSTNAME=vm\n", "it was told {told:?}");
    manager.wait_for("WATCHDOG=1", HEARD).map(drop)
}

/// Sends a message as systemd of a guest does: in a connection of its own.
fn say(guest: &mut Guest, message: &str) -> Result<()> {
    guest.run(&saying(message)).map(drop)
}

/// The command that sends a message to the address in the credential.
fn saying(message: &str) -> String {
    let port = r"sed -n 's/^io.systemd.credential:vmm.notify_socket=vsock-stream:2://p'";
    format!("printf '{message}' | {STREAM_END} connect 2 $({STRINGS} | {port})")
}

/// Much data goes to an echo in the guest and comes back, whole, at the same time; the half that is
/// closed first does not end the other.
fn echo(gate: &Path) -> Result<()> {
    let start = Instant::now();
    let mut connection = connect(gate, 7)?;
    let mut sender = connection.try_clone()?;
    let sending = thread::spawn(move || {
        pattern::write(&mut sender, bulk::amount())?;
        sender.shutdown(Shutdown::Write)
    });
    pattern::check(&mut connection, bulk::amount())?;
    sending.join().ok().context("sending panicked")??;
    bulk::report("to the guest and back through unix sockets", bulk::amount(), start);
    Ok(())
}

fn many(gate: &Path) -> Result<()> {
    let mut connections = Vec::new();
    for _ in 0..MANY {
        connections.push(connect(gate, 7)?);
    }
    for (number, connection) in connections.iter_mut().enumerate() {
        writeln!(connection, "connection {number}")?;
    }
    for (number, connection) in connections.iter_mut().enumerate().rev() {
        let said = line(connection)?;
        ensure!(said == format!("connection {number}\n"), "connection {number} said {said:?}");
    }
    Ok(())
}

/// The guest reaches a program that listens on the host, and nobody where none does.
fn guest_initiated(guest: &mut Guest, gate: &Path) -> Result<()> {
    let listener = UnixListener::bind(format!("{}_5000", gate.display()))?;
    let echo = thread::spawn(move || -> std::io::Result<()> {
        let (mut connection, _) = listener.accept()?;
        let mut data = Vec::new();
        connection.read_to_end(&mut data)?;
        connection.write_all(&data)
    });
    guest.run("head -c 8000000 /dev/urandom > /run/data")?;
    let connect = format!("{STREAM_END} connect 2");
    guest.run(&format!("{connect} 5000 < /run/data > /run/back && cmp /run/data /run/back"))?;
    echo.join().ok().context("the echo panicked")??;
    let (status, _) = guest.attempt(&format!("{connect} 5001 < /dev/null"))?;
    ensure!(status != 0, "a port of the host that nobody serves was reached");
    Ok(())
}

fn kernel(testbed: &Testbed) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let manager = ServiceManager::new(folder.path())?;
    let machined = folder.path().join("machined");
    let registry = UnixListener::bind(&machined)?;
    let mut guest = manager
        .starts(bulk::launch(testbed))
        .arguments(["--disk", &format!("path={},readonly", testbed.ssh_server.display())])
        .arguments(["--vsock", "auto", "--transport", "mmio", "--ready", "booted"])
        .arguments(["--machined", &format!("web,socket={}", machined.display())])
        .boot()?;
    guest.errors().wait_for("context id ", PATIENCE).map_err(|error| guest.explain(error))?;
    let cid = guest.errors().wait_for("\n", PATIENCE)?.trim().to_owned();

    registration(&registry, &cid, guest.process_id()).map_err(|error| guest.explain(error))?;

    let mut other = bulk::launch(testbed).arguments(["--vsock", &format!("cid={cid}")]).start()?;
    other.errors().wait_for("another guest has it", PATIENCE)?;
    other.expect_status(1)?;

    serve(&mut guest)?;
    echo_through_kernel(testbed, &cid)?;
    secure_shell(&mut guest, testbed, &cid)?;
    let nobody = through_kernel(testbed, &cid, "1234", b"")?;
    ensure!(!nobody.status.success(), "a port that nobody serves was reached");
    emergency(&mut guest, &manager)
}

/// Who listens in machined's place has been told of the guest, and its reply ends the conversation
/// and nothing else.
fn registration(registry: &UnixListener, cid: &str, process: u32) -> Result<()> {
    registry.set_nonblocking(true)?;
    let (mut client, _) = registry.accept().context("nobody registers the guest")?;
    client.set_nonblocking(false)?;
    client.set_read_timeout(Some(PATIENCE))?;
    let mut call = Vec::new();
    while call.last() != Some(&0) {
        let mut byte = [0];
        client.read_exact(&mut byte).with_context(|| format!("after {call:?}"))?;
        call.extend(byte);
    }
    call.pop();
    let call: Value = serde_json::from_slice(&call)?;
    let expected = json!({
        "name": "web",
        "class": "vm",
        "service": "nixvmm",
        "leader": process,
        "vSockCid": cid.parse::<u32>()?,
        "sshAddress": format!("vsock/{cid}"),
    });
    ensure!(call["method"] == "io.systemd.Machine.Register", "{call}");
    ensure!(call["parameters"] == expected, "{call} is not {expected}");
    client.write_all(b"{\"parameters\": {}}\0")?;
    ensure!(client.read(&mut [0])? == 0, "there is more to say");
    Ok(())
}

/// A boot that needs a person is a failed start with its reason.
fn emergency(guest: &mut Guest, manager: &ServiceManager) -> Result<()> {
    say(guest, r"STATUS=Cannot mount /data.\n")?;
    manager.wait_for("STATUS=Cannot mount /data.", HEARD)?;
    guest.tell(&saying(r"X_SYSTEMD_UNIT_ACTIVE=emergency.target\n"))?;
    let reason = "the guest came up in emergency mode: Cannot mount /data.";
    let told = manager.wait_for(&format!("STATUS={reason}"), HEARD);
    told.map_err(|error| guest.explain(error))?;
    guest.errors().wait_for(reason, PATIENCE)?;
    guest.expect_status(1)
}

/// The same as [`echo`] by the guest's context id.
fn echo_through_kernel(testbed: &Testbed, cid: &str) -> Result<()> {
    let start = Instant::now();
    let mut client = client(testbed, cid, "7")?;
    let mut input = client.stdin.take().context("no standard input")?;
    let sending = thread::spawn(move || pattern::write(&mut input, bulk::amount()));
    let mut output = client.stdout.take().context("no standard output")?;
    pattern::check(&mut output, bulk::amount())?;
    sending.join().ok().context("sending panicked")??;
    ensure!(client.wait()?.success(), "the client failed");
    bulk::report("to the guest and back through the kernel", bulk::amount(), start);
    Ok(())
}

/// A program that sends what it is told to a port of the guest, and tells what comes back.
fn client(testbed: &Testbed, cid: &str, port: &str) -> Result<Child> {
    let mut command = Command::new(&testbed.stream_end);
    command.args(["connect", cid, port]).stdin(Stdio::piped()).stdout(Stdio::piped());
    command.spawn().context("the client cannot be started")
}

/// Sends `data` to a port of the guest by its context id and returns what comes back.
fn through_kernel(testbed: &Testbed, cid: &str, port: &str, data: &[u8]) -> Result<Output> {
    let mut client = client(testbed, cid, port)?;
    let mut input = client.stdin.take().context("no standard input")?;
    let data = data.to_vec();
    // Who is refused does not read.
    let sending = thread::spawn(move || drop(input.write_all(&data)));
    let output = client.wait_with_output()?;
    sending.join().ok().context("sending panicked")?;
    Ok(output)
}

/// Starts an echo on port 7 of the guest.
fn serve(guest: &mut Guest) -> Result<()> {
    bulk::install(guest)?;
    offer(guest, 7, "cat")
}

/// Runs a command of the guest for whoever connects to `port`.
fn offer(guest: &mut Guest, port: u32, command: &str) -> Result<()> {
    guest.run(&format!("{STREAM_END} serve {port} \"{command}\" > /dev/null 2>&1 &"))?;
    // It listens when it can be reached from inside.
    guest.run("sleep 1").map(drop)
}

/// `ssh` logs in to the guest through systemd's proxy, which hands it the connection.
fn secure_shell(guest: &mut Guest, testbed: &Testbed, cid: &str) -> Result<()> {
    guest.run(ssh_server::START)?;
    offer(guest, 22, "nc 127.0.0.1 22")?;
    let proxy = testbed.systemd.join("systemd-ssh-proxy");
    let proxy = format!("ProxyCommand={} %h %p", proxy.display());
    let options = [
        &proxy,
        "ProxyUseFdpass=yes",
        "CheckHostIP=no",
        "StrictHostKeyChecking=no",
        "UserKnownHostsFile=/dev/null",
        "BatchMode=yes",
        "LogLevel=ERROR",
    ];
    let mut command = tool::command(Program::SecureShell.name());
    command.args(["-F", "none"]).args(options.into_iter().flat_map(|option| ["-o", option]));
    command.args([&format!("root@vsock/{cid}"), "cat /proc/sys/kernel/osrelease; wc -c"]);
    let mut client = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    let mut input = client.stdin.take().context("no standard input")?;
    let typing = thread::spawn(move || pattern::write(&mut input, TYPED));
    let output = client.wait_with_output()?;
    typing.join().ok().context("typing panicked")??;
    let release = guest.run("cat /proc/sys/kernel/osrelease")?;
    let said = String::from_utf8(output.stdout)?;
    ensure!(said == format!("{release}{TYPED}\n"), "ssh: {}: {said:?}", output.status);
    Ok(())
}

/// Asks for a port of the guest.
fn call(gate: &Path, port: u32) -> Result<UnixStream> {
    let mut connection = UnixStream::connect(gate)?;
    connection.set_read_timeout(Some(PATIENCE))?;
    writeln!(connection, "CONNECT {port}")?;
    Ok(connection)
}

fn connect(gate: &Path, port: u32) -> Result<UnixStream> {
    let mut connection = call(gate, port)?;
    let answer = line(&mut connection)?;
    ensure!(answer.starts_with("OK "), "the guest's port {port} answers {answer:?}");
    Ok(connection)
}

fn line(connection: &mut UnixStream) -> Result<String> {
    let mut line = Vec::new();
    while line.last() != Some(&b'\n') {
        let mut byte = [0];
        connection.read_exact(&mut byte).with_context(|| format!("after {line:?}"))?;
        line.extend(byte);
    }
    Ok(String::from_utf8(line)?)
}
