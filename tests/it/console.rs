//! Where may a console go? Standard streams are what every other test uses; here are the others,
//! and what happens when much is said or nobody listens.

use std::fs::{self, File};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use tests::guest::{Guest, Launch, PATIENCE};
use tests::testbed::Testbed;

use crate::GuestTest;

pub(crate) const TESTS: &[GuestTest] = &[
    ("console::a_pseudoterminal_is_named_and_works", pseudoterminal),
    ("console::a_file_gets_all_output", file),
    ("console::a_socket_lets_clients_come_and_go", socket),
    ("console::much_output_arrives_whole_and_in_order", much_output),
    ("console::a_serial_port_shows_the_kernel_from_its_first_line", serial),
];

fn pseudoterminal(testbed: &Testbed) -> Result<()> {
    let mut guest = tiny(testbed).arguments(["--console", "pty"]).start()?;
    guest.errors().wait_for("/dev/pts/", PATIENCE).map_err(|error| guest.explain(error))?;
    let number = guest.errors().wait_for("\n", PATIENCE)?;
    let digits: String = number.chars().take_while(char::is_ascii_digit).collect();
    let name = format!("/dev/pts/{digits}");
    let terminal =
        File::options().read(true).write(true).open(&name).with_context(|| name.clone())?;
    guest.use_console(terminal.try_clone()?, terminal);
    guest.wait_for_agent()?;
    let said = guest.run("echo through a pseudoterminal")?;
    ensure!(said == "through a pseudoterminal\n", "it said {said:?}");
    guest.power_off()
}

fn file(testbed: &Testbed) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("console");
    let argument = format!("file,path={}", path.display());
    let mut guest = tiny(testbed).arguments(["--console", &argument]).start()?;
    wait_for_text(&mut guest, &path, "agent: ready").map_err(|error| guest.explain(error))?;
    guest.signal(Signal::TERM)?;
    guest.expect_status(0)
}

fn socket(testbed: &Testbed) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("console");
    let argument = format!("socket,path={}", path.display());
    let mut guest = tiny(testbed).arguments(["--console", &argument]).start()?;
    let first = connect(&mut guest, &path).map_err(|error| guest.explain(error))?;
    join(&mut guest, &first)?;
    guest.wait_for_agent()?;
    ensure!(guest.run("echo first")? == "first\n", "the first client is not served");
    first.shutdown(std::net::Shutdown::Both)?;

    let second = connect(&mut guest, &path)?;
    join(&mut guest, &second)?;
    ensure!(guest.run("echo second")? == "second\n", "the second client is not served");
    guest.power_off()
}

fn much_output(testbed: &Testbed) -> Result<()> {
    const LINES: usize = 40_000;
    let mut guest = tiny(testbed).boot()?;
    let output = guest.run(&format!("seq {LINES}"))?;
    let expected: String = (1..=LINES).map(|number| format!("{number}\n")).collect();
    ensure!(
        output == expected,
        "{} of {} bytes are right",
        common(&output, &expected),
        output.len()
    );
    guest.power_off()
}

fn serial(testbed: &Testbed) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("serial");
    let command_line = "loglevel=7 earlycon=uart8250,io,0x3f8 console=ttyS0 agent=ttyS0";
    let mut guest = Launch::tiny_with(testbed, &testbed.bzimage, command_line)
        .arguments(["--serial", "stdio", "--console", &format!("file,path={}", path.display())])
        .boot()?;
    let log = guest.console().text();
    ensure!(log.contains("Linux version"), "the kernel's first line is missing:\n{log}");
    ensure!(guest.run("echo over the serial port")? == "over the serial port\n", "no echo");
    guest.power_off()
}

fn join(guest: &mut Guest, client: &UnixStream) -> Result<()> {
    guest.use_console(client.try_clone()?, client.try_clone()?);
    Ok(())
}

fn connect(guest: &mut Guest, path: &Path) -> Result<UnixStream> {
    let start = Instant::now();
    loop {
        match UnixStream::connect(path) {
            Ok(client) => return Ok(client),
            Err(error) if start.elapsed() > PATIENCE || !guest.is_running() => {
                return Err(error).context("connecting");
            }
            Err(_) => thread::sleep(PATIENCE / 1000),
        }
    }
}

fn wait_for_text(guest: &mut Guest, path: &Path, text: &str) -> Result<()> {
    let start = Instant::now();
    loop {
        let content = String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned();
        if content.contains(text) {
            return Ok(());
        }
        let goes_on = guest.is_running() && start.elapsed() < PATIENCE;
        ensure!(goes_on, "{} has no “{text}”:\n{content}", path.display());
        thread::sleep(PATIENCE / 1000);
    }
}

fn common(one: &str, other: &str) -> usize {
    one.bytes().zip(other.bytes()).take_while(|(one, other)| one == other).count()
}

fn tiny(testbed: &Testbed) -> Launch {
    Launch::tiny(testbed, &testbed.bzimage)
}
