//! Do programs of host and guest reach each other? Through unix sockets of the host, and through
//! the host's kernel, with every byte compared.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::thread;

use anyhow::{Context, Result, ensure};
use tests::guest::{Guest, Launch, PATIENCE};
use tests::testbed::Testbed;

use crate::GuestTest;

pub(crate) const TESTS: &[GuestTest] = &[
    ("vsock::programs_of_host_and_guest_talk_through_unix_sockets", unix),
    ("vsock::programs_of_host_and_guest_talk_through_the_hosts_kernel", kernel),
];

/// What goes through a connection in each direction at once.
const BULK: usize = 8 << 20;

/// Connections that are open at the same time.
const MANY: usize = 60;

fn unix(testbed: &Testbed) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let gate = folder.path().join("vsock");
    let mut guest = with_client(testbed, folder.path())?
        .arguments(["--vsock", &format!("socket={}", gate.display())])
        .boot()?;
    serve(&mut guest)?;
    bulk(&gate)?;
    many(&gate)?;
    let mut refused = call(&gate, 1234)?;
    let mut nothing = Vec::new();
    refused.read_to_end(&mut nothing)?;
    ensure!(nothing.is_empty(), "a port that nobody serves answers {nothing:?}");
    guest_initiated(&mut guest, &gate)?;
    guest.power_off()?;
    ensure!(!gate.exists(), "the socket is still there");
    Ok(())
}

/// Much data goes to an echo in the guest and comes back, whole, at the same time; the half that is
/// closed first does not end the other.
fn bulk(gate: &Path) -> Result<()> {
    let mut connection = connect(gate, 7)?;
    let mut sender = connection.try_clone()?;
    let sending = thread::spawn(move || {
        sender.write_all(&sample(BULK))?;
        sender.shutdown(Shutdown::Write)
    });
    let mut back = Vec::new();
    connection.read_to_end(&mut back)?;
    sending.join().ok().context("sending panicked")??;
    ensure!(back == sample(BULK), "{} of {BULK} bytes came back, or others", back.len());
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
    guest.run(&format!("head -c {BULK} /dev/urandom > /run/data"))?;
    guest.run("/run/vsock connect 2 5000 < /run/data > /run/back && cmp /run/data /run/back")?;
    echo.join().ok().context("the echo panicked")??;
    let (status, _) = guest.attempt("/run/vsock connect 2 5001 < /dev/null")?;
    ensure!(status != 0, "a port of the host that nobody serves was reached");
    Ok(())
}

fn kernel(testbed: &Testbed) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let launch = with_client(testbed, folder.path())?;
    let mut guest = launch.arguments(["--vsock", "auto", "--transport", "mmio"]).boot()?;
    guest.errors().wait_for("context id ", PATIENCE).map_err(|error| guest.explain(error))?;
    let cid = guest.errors().wait_for("\n", PATIENCE)?.trim().to_owned();

    let mut other = with_client(testbed, folder.path())?
        .arguments(["--vsock", &format!("cid={cid}")])
        .start()?;
    other.errors().wait_for("another guest has it", PATIENCE)?;
    other.expect_status(1)?;

    serve(&mut guest)?;
    let back = through_kernel(testbed, &cid, "7", &sample(BULK))?;
    ensure!(back.stdout == sample(BULK), "{} of {BULK} bytes came back", back.stdout.len());
    // What ssh says first, and a server that speaks before its client does.
    let banner = through_kernel(testbed, &cid, "22", b"SSH-2.0-client\r\n")?;
    ensure!(banner.stdout == b"SSH-2.0-server\r\nSSH-2.0-client\r\n", "{banner:?}");
    let nobody = through_kernel(testbed, &cid, "1234", b"")?;
    ensure!(!nobody.status.success(), "a port that nobody serves was reached");
    guest.power_off()
}

/// Sends `data` to a port of the guest by its context id and returns what comes back.
fn through_kernel(testbed: &Testbed, cid: &str, port: &str, data: &[u8]) -> Result<Output> {
    let mut client = Command::new(&testbed.vsock_program)
        .args(["connect", cid, port])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut input = client.stdin.take().context("no standard input")?;
    let data = data.to_vec();
    // Who is refused does not read.
    let sending = thread::spawn(move || drop(input.write_all(&data)));
    let output = client.wait_with_output()?;
    sending.join().ok().context("sending panicked")?;
    Ok(output)
}

/// The tiny guest with a disk that is the client.
fn with_client(testbed: &Testbed, folder: &Path) -> Result<Launch> {
    let disk = folder.join("program");
    fs::copy(&testbed.vsock_program, &disk)?;
    let file = File::options().write(true).open(&disk)?;
    file.set_len(file.metadata()?.len().next_multiple_of(4096))?;
    let disk = format!("path={},readonly", disk.display());
    Ok(Launch::tiny(testbed, &testbed.bzimage).arguments(["--disk", &disk]))
}

/// Starts an echo on port 7 of the guest, and what looks like a secure shell on port 22.
fn serve(guest: &mut Guest) -> Result<()> {
    guest.run("dd if=/dev/vda of=/run/vsock bs=64k && chmod +x /run/vsock")?;
    for (port, command) in [(7, "cat"), (22, r"printf 'SSH-2.0-server\r\n'; cat")] {
        guest.run(&format!("/run/vsock serve {port} \"{command}\" > /dev/null 2>&1 &"))?;
    }
    // Both listen when they can be reached from inside.
    guest.run("sleep 1").map(drop)
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

/// Bytes that differ wherever they are cut.
fn sample(len: usize) -> Vec<u8> {
    (0..len).map(|index| u8::try_from(index * 7 % 251).unwrap_or(0)).collect()
}
