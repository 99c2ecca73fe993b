//! Registration with systemd-machined of the host, so that machinectl(1) knows the guest.
//!
//! The first call is sent before the sandbox closes, and its reply is read in the main loop: no
//! start waits for it, and a guest that is not registered runs as well. Machined forgets the guest
//! by itself when its process has ended.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use anyhow::{Context as _, Result, bail, ensure};
use devices::event::{EventSet, Handler, Watch};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use serde_json::{Map, Value, json};

use crate::config::{Config, Machined};
use crate::control::Inbox;

const INTERFACE: &str = "io.systemd.Machine";

/// What machined says has registered the guest.
const SERVICE: &str = "nixvmm";

/// Bytes of one read; a reply has some hundreds.
const READ_BYTES: usize = 4096;

/// A conversation with machined.
pub(crate) struct Enrolment {
    machined: Machined,
    /// Until all is said.
    socket: Option<OwnedFd>,
    inbox: Inbox,
    /// What the guest is, for machined.
    machine: Value,
    /// The service that this process is, if it is one.
    unit: Option<String>,
    asked: Call,
}

/// The call whose reply is next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Call {
    Register,
    /// Who has the name already.
    List,
    /// The machine that this process was before it was restarted.
    Unregister,
    RegisterAgain,
}

impl Call {
    fn method(self) -> &'static str {
        match self {
            Self::Register | Self::RegisterAgain => "Register",
            Self::List => "List",
            Self::Unregister => "Unregister",
        }
    }
}

impl Enrolment {
    /// Asks machined to know the guest, if the configuration wants that; `context_id` is the
    /// guest's in the host's kernel. What goes wrong is logged.
    pub(crate) fn begin(config: &Config, context_id: Option<u32>) -> Option<Self> {
        let machined = config.machined.clone()?;
        let unit = fs::read_to_string("/proc/self/cgroup").ok().and_then(|text| service(&text));
        let mut enrolment = Self {
            machine: machine(&machined.name, config, context_id),
            machined,
            socket: None,
            inbox: Inbox::default(),
            unit,
            asked: Call::Register,
        };
        match enrolment.open() {
            Ok(()) => Some(enrolment),
            Err(error) => {
                enrolment.complain(&error);
                None
            }
        }
    }

    fn open(&mut self) -> Result<()> {
        let path = &self.machined.socket;
        let socket = dial(path).with_context(|| {
            let path = path.display();
            format!("{path} cannot be reached; is systemd 256 or later, and machined, running")
        })?;
        self.socket = Some(socket);
        self.ask(Call::Register)
    }

    fn ask(&mut self, call: Call) -> Result<()> {
        let name = &self.machined.name;
        let parameters = match call {
            Call::Register | Call::RegisterAgain => self.machine.clone(),
            Call::List | Call::Unregister => json!({ "name": name }),
        };
        let method = format!("{INTERFACE}.{}", call.method());
        let mut message =
            serde_json::to_vec(&json!({ "method": method, "parameters": parameters }))?;
        message.push(0);
        let socket = self.socket.as_ref().context("the conversation is over")?;
        let written = rustix::io::write(socket, &message).context("it takes no calls")?;
        ensure!(written == message.len(), "it takes no calls");
        self.asked = call;
        Ok(())
    }

    /// Takes what has come; returns whether all is said.
    fn go_on(&mut self) -> Result<bool> {
        let mut bytes = [0; READ_BYTES];
        loop {
            let socket = self.socket.as_ref().context("the conversation is over")?;
            match rustix::io::read(socket, &mut bytes) {
                Ok(0) => bail!("it has hung up"),
                Ok(count) => self.inbox.push(bytes.get(..count).unwrap_or_default()),
                Err(Errno::AGAIN) => return Ok(false),
                Err(Errno::INTR) => {}
                Err(error) => return Err(io::Error::from(error).into()),
            }
            while let Some(message) = self.inbox.take()? {
                if self.answer(&serde_json::from_slice(&message)?)? {
                    return Ok(true);
                }
            }
        }
    }

    /// Goes on from a reply; returns whether it was the last.
    fn answer(&mut self, reply: &Value) -> Result<bool> {
        ensure!(reply.is_object(), "what it says is no reply");
        let error = reply.get("error").map(|error| error.as_str().unwrap_or("an unknown error"));
        match (self.asked, error) {
            (Call::Register | Call::RegisterAgain, None) => return Ok(true),
            (Call::Register, Some("io.systemd.Machine.MachineExists")) => self.ask(Call::List)?,
            (Call::List, None) => {
                let other = reply.get("parameters").unwrap_or(&Value::Null);
                ensure!(self.was(other), "another machine has this name");
                self.ask(Call::Unregister)?;
            }
            // It may have been forgotten in between.
            (Call::Unregister, _) => self.ask(Call::RegisterAgain)?,
            (call, Some(error)) => bail!("{}: {}", call.method(), refusal(error)),
        }
        Ok(false)
    }

    /// Whether a machine is what this service was before it was restarted: machined keeps that as
    /// long as the unit is not at rest.
    fn was(&self, other: &Value) -> bool {
        let text = |key: &str| other.get(key).and_then(Value::as_str);
        text("service") == Some(SERVICE)
            && self.unit.is_some()
            && text("unit") == self.unit.as_deref()
    }

    fn complain(&self, error: &anyhow::Error) {
        let name = &self.machined.name;
        log::warn!("--machined {name}: machinectl does not know the guest: {error:#}");
    }
}

impl Handler for Enrolment {
    fn start(&mut self, watch: &mut Watch<'_, '_>) -> io::Result<()> {
        self.socket.as_ref().map_or(Ok(()), |socket| watch.add(socket, 0, EventSet::IN))
    }

    fn ready(&mut self, _: u32, _: EventSet, watch: &mut Watch<'_, '_>) {
        let is_over = self.go_on().unwrap_or_else(|error| {
            self.complain(&error);
            true
        });
        if is_over && let Some(socket) = self.socket.take() {
            // A file that cannot be removed is not watched.
            let _ = watch.remove(&socket);
        }
    }
}

/// What machined is told of the guest. Its process is the leader, whose unit machinectl stops.
fn machine(name: &str, config: &Config, context_id: Option<u32>) -> Value {
    let mut machine = Map::new();
    machine.insert("name".to_owned(), name.into());
    machine.insert("class".to_owned(), "vm".into());
    machine.insert("service".to_owned(), SERVICE.into());
    machine.insert("leader".to_owned(), std::process::id().into());
    if let Some(uuid) = config.smbios.uuid {
        machine.insert("id".to_owned(), uuid.simple().to_string().into());
    }
    let socket = config.vsock.as_ref().and_then(|vsock| vsock.socket.as_ref());
    // As systemd-ssh-proxy(1) takes it.
    let address = match (socket, context_id) {
        (Some(path), _) => Some(format!("vsock-mux{}", path.display())),
        (None, Some(cid)) => {
            machine.insert("vSockCid".to_owned(), cid.into());
            Some(format!("vsock/{cid}"))
        }
        (None, None) => None,
    };
    if let Some(address) = address {
        machine.insert("sshAddress".to_owned(), address.into());
    }
    machine.into()
}

/// A connection that nothing waits for.
fn dial(path: &Path) -> io::Result<OwnedFd> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket)
}

/// The service that a control group of systemd belongs to.
fn service(cgroup: &str) -> Option<String> {
    let path = cgroup.lines().find_map(|line| line.strip_prefix("0::"))?;
    let unit = path.rsplit('/').next()?;
    unit.ends_with(".service").then(|| unit.to_owned())
}

/// An error of machined in words.
fn refusal(error: &str) -> String {
    match error.rsplit_once('.').map_or(error, |(_, name)| name) {
        "PermissionDenied" | "InteractiveAuthenticationRequired" => {
            "this user may not: install the polkit rule nixvmm-machined.rules".to_owned()
        }
        _ => error.to_owned(),
    }
}

#[cfg(test)]
pub(crate) mod test;
