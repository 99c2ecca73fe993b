//! A connection to the control socket of a running machine.

use std::io::{self, BufRead as _, BufReader, IoSlice, Read as _, Write as _};
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;

use anyhow::{Context as _, Result, anyhow, bail};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde_json::{Map, Value, json};
use vmm::control::MACHINE_INTERFACE_NAME;

/// Longest reply in bytes; that of a machine with a hundred devices has a hundredth.
const REPLY_BYTES_MAX: u64 = 4 << 20;

/// Calls go out, replies come in.
pub(crate) struct Connection {
    stream: BufReader<UnixStream>,
}

impl Connection {
    /// Connects to `socket`.
    pub(crate) fn open(socket: &Path) -> Result<Self> {
        let stream = UnixStream::connect(socket).map_err(|error| {
            let remedy = match error.kind() {
                io::ErrorKind::NotFound => {
                    ": does the guest run, and was it started with --control?"
                }
                io::ErrorKind::ConnectionRefused => ": the guest has ended",
                io::ErrorKind::PermissionDenied => ": only the owner of the machine may control it",
                _ => "",
            };
            anyhow!("{}: {error}{remedy}", socket.display())
        })?;
        Ok(Self { stream: BufReader::new(stream) })
    }

    /// Calls a method and returns the parameters of its reply.
    pub(crate) fn call(&mut self, method: &str, parameters: &Value) -> Result<Value> {
        self.send(method, &json!({ "parameters": parameters }))?;
        self.reply()?.context("the machine ended")
    }

    /// The same with an open file.
    pub(super) fn call_with(
        &mut self,
        method: &str,
        parameters: &Value,
        file: impl AsFd,
    ) -> Result<Value> {
        let bytes = message(method, &json!({ "parameters": parameters }))?;
        let (first, rest) = bytes.split_at_checked(1).context("an empty call")?;
        let files = [file.as_fd()];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        ancillary.push(SendAncillaryMessage::ScmRights(&files));
        let stream = self.stream.get_ref();
        sendmsg(stream, &[IoSlice::new(first)], &mut ancillary, SendFlags::NOSIGNAL)
            .map_err(io::Error::from)
            .and_then(|_| (&*stream).write_all(rest))
            .context("the machine takes no calls")?;
        self.reply()?.context("the machine ended")
    }

    /// Calls a method with many replies, and takes them until the machine ends.
    pub(super) fn follow(
        &mut self,
        method: &str,
        mut take: impl FnMut(&Value) -> Result<()>,
    ) -> Result<()> {
        self.send(method, &json!({ "more": true }))?;
        while let Some(parameters) = self.reply()? {
            take(&parameters)?;
        }
        Ok(())
    }

    /// Calls a method after which the connection carries something else; returns what has come of
    /// that already.
    pub(super) fn upgrade(
        mut self,
        method: &str,
        parameters: &Value,
    ) -> Result<(UnixStream, Vec<u8>)> {
        self.send(method, &json!({ "parameters": parameters, "upgrade": true }))?;
        self.reply()?.context("the machine ended")?;
        let early = self.stream.buffer().to_vec();
        Ok((self.stream.into_inner(), early))
    }

    fn send(&mut self, method: &str, rest: &Value) -> Result<()> {
        let bytes = message(method, rest)?;
        self.stream.get_ref().write_all(&bytes).context("the machine takes no calls")
    }

    /// The parameters of the next reply; `None` at the end.
    fn reply(&mut self) -> Result<Option<Value>> {
        let mut bytes = Vec::new();
        match (&mut self.stream).take(REPLY_BYTES_MAX).read_until(0, &mut bytes) {
            Err(error) if error.kind() != io::ErrorKind::ConnectionReset => {
                return Err(error).context("no reply");
            }
            _ => {}
        }
        if bytes.len() as u64 == REPLY_BYTES_MAX {
            bail!("the reply has more than {REPLY_BYTES_MAX} bytes: is this nixvmm?");
        }
        if bytes.pop() != Some(0) {
            return Ok(None);
        }
        // A list has no keys to ask for.
        let mut reply: Map<String, Value> = serde_json::from_slice(&bytes)
            .context("the reply is no JSON object: is this nixvmm?")?;
        let parameters = reply.remove("parameters").unwrap_or_default();
        match reply.get("error").and_then(Value::as_str) {
            None => Ok(Some(parameters)),
            Some(error) => bail!("{}", refusal(error, &parameters)),
        }
    }
}

/// A call as it is sent.
fn message(method: &str, rest: &Value) -> Result<Vec<u8>> {
    let mut call = rest.clone();
    call["method"] = format!("{MACHINE_INTERFACE_NAME}.{method}").into();
    let mut bytes = serde_json::to_vec(&call)?;
    bytes.push(0);
    Ok(bytes)
}

/// An error of the other side in words.
fn refusal(error: &str, parameters: &Value) -> String {
    let text = |name: &str| parameters[name].as_str().unwrap_or_default().to_owned();
    match error.rsplit_once('.').map_or(error, |(_, name)| name) {
        "NotPossible" => text("reason"),
        "NoSuchDisk" => format!("there is no disk {}: `disks` lists them", text("disk")),
        "InvalidParameter" => format!("the machine refuses the parameter {}", text("parameter")),
        "MethodNotFound" => {
            format!("the machine has no {}: its nixvmm is of another version", text("method"))
        }
        _ => format!("{error} {parameters}"),
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn refusals_are_told_in_words() {
        for (error, parameters, expected) in [
            ("io.nixvmm.Machine.NotPossible", json!({ "reason": "no" }), "no"),
            (
                "io.nixvmm.Machine.NoSuchDisk",
                json!({ "disk": "x" }),
                "there is no disk x: `disks` lists them",
            ),
            (
                "org.varlink.service.InvalidParameter",
                json!({ "parameter": "size" }),
                "the machine refuses the parameter size",
            ),
            ("com.example.Odd", json!({ "a": 1 }), "com.example.Odd {\"a\":1}"),
        ] {
            assert_eq!(refusal(error, &parameters), expected);
        }
    }

    #[test]
    fn who_cannot_connect_is_told_why() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let error = |path: &Path| Connection::open(path).err().unwrap().to_string();
        assert!(error(&path).contains("was it started with --control?"), "{}", error(&path));
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        assert!(error(&path).contains("the guest has ended"), "{}", error(&path));
    }

    #[test]
    fn who_answers_with_something_else_than_an_object_is_told_so() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        for reply in ["[]", "\"parameters\"", "{"] {
            let mut connection = Connection::open(&path).unwrap();
            let (mut server, _) = listener.accept().unwrap();
            server.write_all(format!("{reply}\0").as_bytes()).unwrap();
            let error = connection.call("GetState", &json!({})).unwrap_err();
            assert_eq!(error.to_string(), "the reply is no JSON object: is this nixvmm?");
        }
    }

    #[test]
    fn a_reply_without_end_is_not_waited_for() {
        let (client, mut server) = UnixStream::pair().unwrap();
        let mut connection = Connection { stream: BufReader::new(client) };
        let endless = std::thread::spawn(move || while server.write_all(&[b' '; 4096]).is_ok() {});
        let error = connection.call("GetState", &json!({})).unwrap_err().to_string();
        assert!(error.starts_with("the reply has more than"), "{error}");
        drop(connection);
        endless.join().unwrap();
    }
}
