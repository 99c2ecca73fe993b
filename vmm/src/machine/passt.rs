//! passt: a network of the user's own, for a guest without privileges on the host.
//!
//! A child process, started before anything is given up that it may need: as root it changes to
//! another user. It has one end of a socket pair, and ends when the other one does. Its own sandbox
//! is its own affair.

use std::ffi::OsString;
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command, ExitStatus, Stdio};

use anyhow::{Context as _, Error, Result, anyhow};
use devices::event::LoopHandle;
use devices::host::vhost::user::UserVhost;
use rustix::io::FdFlags;

use crate::config::{Config, Forward, NetLink, Protocol};
use crate::happenings::Happenings;

const PROGRAM: &str = "passt";

/// What passt needs to know of vhost-user; older ones have no such flag.
const VHOST_USER: &str = "--vhost-user";

/// Rings of a card with one queue pair, which is what passt has.
const RINGS: u64 = 2;

/// A passt that runs.
pub(crate) struct Passt {
    child: Child,
    socket: UnixStream,
}

impl Passt {
    /// Starts one for each card that wants a network of the user's own, in their order.
    pub(crate) fn start_all(config: &Config) -> Result<Vec<Self>> {
        let nets = config.nets.iter().filter(|net| net.link == NetLink::User);
        nets.map(|net| Self::start(&net.forwards).context("--net type=user")).collect()
    }

    fn start(forwards: &[Forward]) -> Result<Self> {
        let (socket, theirs) = UnixStream::pair()?;
        let theirs = OwnedFd::from(theirs);
        rustix::io::fcntl_setfd(&theirs, FdFlags::empty())?;
        let child = Command::new(PROGRAM)
            .args(["--foreground", "--quiet", VHOST_USER, "--fd"])
            .arg(theirs.as_raw_fd().to_string())
            .args(forwards.iter().flat_map(flag))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            // Keys that end a guest in a terminal shall not end its network first.
            .process_group(0)
            .spawn();
        match child {
            Ok(child) => Ok(Self { child, socket }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Err(anyhow!(
                "{PROGRAM} is not in PATH: install the package {PROGRAM}, of 2025 or later"
            )),
            Err(error) => Err(error).context("passt cannot be started"),
        }
    }

    /// The conversation with it, and its process.
    pub(crate) fn connect(self, watch: LoopHandle) -> Result<(UserVhost, Child)> {
        let Self { mut child, socket } = self;
        match UserVhost::with_child(socket, RINGS, watch) {
            Ok(vhost) => Ok((vhost, child)),
            Err(error) => Err(refusal(error, &mut child)),
        }
    }
}

/// Says why a passt that was lost has ended.
pub(crate) fn report_end(name: &str, child: &mut Child, happenings: &Happenings) {
    let status = child.try_wait().ok().flatten();
    match status {
        Some(status) => log::error!("{name}: passt has ended ({status}): no network any more"),
        None => log::error!("{name}: passt does not speak to us any more: no network"),
    }
    happenings.process_lost(name, PROGRAM, status);
}

/// A forward as passt takes it.
fn flag(forward: &Forward) -> [OsString; 2] {
    let Forward { protocol, address, port, guest_port } = forward;
    let name = match protocol {
        Protocol::Tcp => "--tcp-ports",
        Protocol::Udp => "--udp-ports",
    };
    let place = address.map_or_else(String::new, |address: IpAddr| format!("{address}/"));
    [name.into(), format!("{place}{port}:{guest_port}").into()]
}

/// Why a passt that was just started does not answer.
fn refusal(error: io::Error, child: &mut Child) -> Error {
    let _ = child.kill();
    let status = child.wait();
    if !knows_vhost_user() {
        return anyhow!(
            "the passt that is installed is too old: it has no vhost-user, which needs passt of \
             2025 or later, as in Debian 13"
        );
    }
    match status {
        Ok(status) if ended_by_itself(status) => {
            anyhow!("passt has ended with {status}; what it says about that is above")
        }
        _ => Error::new(error).context("passt does not speak vhost-user"),
    }
}

fn ended_by_itself(status: ExitStatus) -> bool {
    status.code().is_some()
}

fn knows_vhost_user() -> bool {
    let help = Command::new(PROGRAM).arg("--help").stdin(Stdio::null()).output();
    let says = |text: &[u8]| String::from_utf8_lossy(text).contains(VHOST_USER);
    help.is_ok_and(|help| says(&help.stdout) || says(&help.stderr))
}

#[cfg(test)]
mod test {
    use std::ffi::OsStr;

    use super::*;

    #[test]
    fn forwards_are_written_as_passt_reads_them() {
        for (forward, expected) in [
            ("tcp:2222:22", ["--tcp-ports", "2222:22"]),
            ("tcp:127.0.0.1:80:8080", ["--tcp-ports", "127.0.0.1/80:8080"]),
            ("udp:[::1]:53:5353", ["--udp-ports", "::1/53:5353"]),
        ] {
            let words = flag(&forward.parse().unwrap());
            assert_eq!(words.each_ref().map(|word| word.as_os_str()), expected.map(OsStr::new));
        }
    }
}
