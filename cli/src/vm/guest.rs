//! Ways into a guest: its console, a shell, its log, its control socket.

use std::ffi::OsString;
use std::fs;
use std::io::{self, BufRead as _, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::fs::FileTypeExt as _;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use serde_json::{Value, json};

use super::folder::{Folder, Link, State};
use super::name::Name;
use super::programs::Program;
use super::units::Unit;
use super::vsock;
use crate::ctl::{self, Connection, Verb};

/// Where sshd listens in a guest, over vsock as elsewhere.
const SSH_PORT: &str = "22";

/// As long as the answer `OK PORT` of a vsock behind a socket can be.
const ANSWER_BYTES_MAX: u64 = 64;

/// Connects this terminal with the console.
pub(super) fn console(state: &State, name: &Name, serial: bool) -> Result<()> {
    control(state, name, &Verb::Console { serial }, false)
}

/// Does what `nixvmm ctl` does.
pub(super) fn control(state: &State, name: &Name, verb: &Verb, json: bool) -> Result<()> {
    let socket = control_socket(&state.guest(name)?)?;
    ctl::act(&socket, verb, json).with_context(|| name.to_string())
}

/// Prints what a running machine says about itself, if it does.
pub(super) fn print_state(folder: &Folder) {
    let printed = control_socket(folder).and_then(|socket| ctl::act(&socket, &Verb::State, false));
    if let Err(error) = printed {
        log::debug!("{}: {error:#}", folder.name());
    }
}

/// Becomes ssh.
pub(super) fn shell(state: &State, name: &Name, user: &str, arguments: &[OsString]) -> Result<()> {
    let folder = state.guest(name)?;
    // Says what is missing in better words than ssh could.
    Port::of(&folder)?;
    let program = std::env::current_exe().context("cannot tell where this program is")?;
    let proxy = [
        quoted(&program)?,
        "vm --state".to_owned(),
        quoted(state.path())?,
        format!("connect {name} {SSH_PORT}"),
    ];
    // A guest is who its context id or its socket says: keys have nothing to add, and change
    // whenever a guest without state starts.
    let options = [
        format!("ProxyCommand={}", proxy.join(" ")),
        "StrictHostKeyChecking=no".to_owned(),
        "UserKnownHostsFile=/dev/null".to_owned(),
        "LogLevel=ERROR".to_owned(),
        format!("User={user}"),
    ];
    let options = options.into_iter().flat_map(|option| ["-o".to_owned(), option]);
    let options = options.chain([name.to_string()]).map(OsString::from);
    Err(Program::Ssh.call(options.chain(arguments.iter().cloned())).replace())
}

/// Carries bytes between standard input and output and a port of the guest.
pub(super) fn connect(state: &State, name: &Name, port: u32) -> Result<()> {
    let folder = state.guest(name)?;
    let stream = Port::of(&folder)?
        .connect(port)
        .with_context(|| format!("{name}: cannot connect to port {port}: does it listen there?"))?;
    let mut to_guest = stream.try_clone()?;
    thread::spawn(move || {
        // Who closes standard input still wants the answer; a guest that has gone is noticed below.
        let _ = copy(&mut io::stdin().lock(), &mut to_guest);
        let _ = to_guest.shutdown(Shutdown::Write);
    });
    copy(&mut &stream, &mut io::stdout().lock()).with_context(|| name.to_string())
}

/// Becomes journalctl.
pub(super) fn logs(
    state: &State,
    name: &Name,
    follow: bool,
    lines: Option<u32>,
    arguments: &[OsString],
) -> Result<()> {
    state.guest(name)?;
    let mut call = Program::Journalctl.call(["--unit", &Unit::of(name)?.pattern()]);
    if follow {
        call = call.and("--follow");
    }
    if let Some(lines) = lines {
        call = call.and(format!("--lines={lines}"));
    }
    Err(arguments.iter().fold(call, |call, argument| call.and(argument)).replace())
}

/// Becomes the guest's runner.
pub(super) fn run(state: &State, name: &Name) -> Result<()> {
    let folder = state.guest(name)?;
    let unit = Unit::of(name).ok();
    ensure!(
        !unit.is_some_and(|unit| unit.is_up()),
        "{name}: runs already: `nixvmm vm stop {name}` stops it, `nixvmm vm console {name}` has \
         its console",
    );
    let program = folder.link(Link::Current).join("bin/microvm-run");
    let error = Command::new(&program).current_dir(folder.path()).exec();
    Err(anyhow!(error).context(format!("{name}: cannot run {}", program.display())))
}

/// Where the guest is controlled: what its runner says, or where upstream's option has it.
pub(super) fn control_socket(folder: &Folder) -> Result<PathBuf> {
    let name = folder.name();
    let machine: Value = note(folder, "machine.json")
        .and_then(|text| serde_json::from_str(&text).ok())
        .unwrap_or_default();
    let told = machine["control"].as_str().map(str::to_owned);
    let sockets = told.into_iter().chain([format!("{name}.sock")]);
    let mut sockets = sockets.map(|socket| folder.path().join(socket));
    if let Some(socket) = sockets.find(|socket| is_socket(socket)) {
        return Ok(socket);
    }
    let folder_shown = folder.path().display();
    match note(folder, "hypervisor") {
        Some(other) if other != "nixvmm" => {
            bail!("{name}: runs in {other}, which has nothing for this: use {other}'s own tools")
        }
        _ => bail!(
            "{name}: there is no control socket in {folder_shown}: `nixvmm vm start {name}` starts \
             the guest; one without `control` in its configuration has none",
        ),
    }
}

/// What the runner of a running guest says; one that runs without units is the current one.
fn note(folder: &Folder, file: &str) -> Option<String> {
    folder.note(Link::Booted, file).or_else(|| folder.note(Link::Current, file))
}

fn is_socket(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|file| file.file_type().is_socket())
}

/// How ports of a guest are reached.
#[derive(Debug, PartialEq, Eq)]
enum Port {
    /// Through the host's kernel.
    Kernel { cid: u32 },
    /// Through a unix socket.
    Socket(PathBuf),
}

impl Port {
    /// What the guest that runs has: it says so itself, or its runner does.
    fn of(folder: &Folder) -> Result<Self> {
        let name = folder.name();
        let configuration = control_socket(folder)
            .and_then(|socket| Connection::open(&socket)?.call("GetConfiguration", &json!({})));
        let noted = note(folder, "vsock-cid").and_then(|cid| cid.parse().ok());
        let port = match &configuration {
            Ok(reply) => Self::of_machine(&reply["configuration"]["vsock"], folder.path()),
            Err(_) => None,
        };
        if let Some(port) = port.or(noted.map(|cid| Self::Kernel { cid })) {
            return Ok(port);
        }
        let remedy = "give it microvm.vsock.cid, or --vsock with a context id or a socket";
        match configuration {
            Ok(_) => bail!("{name}: has no vsock, or one whose context id is not known: {remedy}"),
            Err(error) => Err(error.context(format!("{name}: how to reach it is not known"))),
        }
    }

    fn of_machine(vsock: &Value, folder: &Path) -> Option<Self> {
        if let Some(socket) = vsock["socket"].as_str() {
            return Some(Self::Socket(folder.join(socket)));
        }
        let cid = vsock["cid"].as_u64()?;
        Some(Self::Kernel { cid: cid.try_into().ok()? })
    }

    fn connect(&self, port: u32) -> Result<UnixStream> {
        match self {
            Self::Kernel { cid } => Ok(vsock::connect(*cid, port)?),
            Self::Socket(path) => {
                let mut stream =
                    UnixStream::connect(path).with_context(|| format!("{}", path.display()))?;
                writeln!(stream, "CONNECT {port}")?;
                // Nothing comes behind the answer before the guest has it: its programs may speak
                // first, so that the reader must take no byte too many.
                let answer = answer(&stream)?;
                ensure!(answer.starts_with("OK "), "it answers {answer:?}");
                Ok(stream)
            }
        }
    }
}

/// A line, and not a byte behind it.
fn answer(stream: &UnixStream) -> Result<String> {
    let mut line = String::new();
    // Capacity 1: what comes behind the line stays in the socket.
    BufReader::with_capacity(1, stream.take(ANSWER_BYTES_MAX)).read_line(&mut line)?;
    ensure!(line.ends_with('\n'), "the guest refuses the connection");
    Ok(line.trim().to_owned())
}

/// Moves bytes as they come, until there are no more.
fn copy(from: &mut impl Read, to: &mut impl Write) -> Result<()> {
    let mut bytes = [0; 16 << 10];
    loop {
        let count = match from.read(&mut bytes) {
            Ok(0) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            count => count?,
        };
        to.write_all(bytes.get(..count).unwrap_or_default())?;
        to.flush()?;
    }
}

/// A path as ssh's ProxyCommand takes it: a word of a shell, in which `%` is doubled.
fn quoted(path: &Path) -> Result<String> {
    let text = path.to_str().with_context(|| format!("{} is no text", path.display()))?;
    Ok(format!("'{}'", text.replace('\'', r"'\''").replace('%', "%%")))
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn ports_are_reached_as_the_machine_says() {
        let folder = Path::new("/state/web");
        let port = |vsock| Port::of_machine(&vsock, folder);
        assert_eq!(port(json!({ "cid": 7, "socket": null })), Some(Port::Kernel { cid: 7 }));
        let socket = Some(Port::Socket("/state/web/s".into()));
        assert_eq!(port(json!({ "cid": 7, "socket": "s" })), socket);
        for none in [json!(null), json!({ "cid": null }), json!({ "cid": 1_u64 << 40 })] {
            assert_eq!(port(none), None);
        }
    }

    #[test]
    fn the_answer_takes_nothing_of_what_comes_behind_it() {
        let (mut here, there) = UnixStream::pair().unwrap();
        here.write_all(b"OK 1024\nSSH-2.0").unwrap();
        drop(here);
        assert_eq!(answer(&there).unwrap(), "OK 1024");
        let mut rest = String::new();
        (&there).read_to_string(&mut rest).unwrap();
        assert_eq!(rest, "SSH-2.0");
        assert!(answer(&there).is_err());
    }

    #[test]
    fn paths_are_one_word_for_the_shell_and_mean_nothing_to_ssh() {
        assert_eq!(quoted(Path::new("/a b/%h/it's")).unwrap(), r"'/a b/%%h/it'\''s'");
    }
}
