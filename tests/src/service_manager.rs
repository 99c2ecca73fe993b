//! What does a service manager hear of the unit that it started? A socket in the place of systemd's
//! (sd_notify(3)).

use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::guest::Launch;

/// Longest message that is taken whole.
const MESSAGE_BYTES_MAX: usize = 8192;

/// Stands in for the service manager that starts `nixvmm` as a unit. It takes each message at once:
/// the kernel keeps ten of them, signs of life among them, and who is told never waits.
pub struct ServiceManager {
    messages: Receiver<String>,
    path: PathBuf,
}

impl ServiceManager {
    /// Listens at a socket in `folder`.
    ///
    /// # Errors
    /// When the socket cannot be made.
    pub fn new(folder: &Path) -> Result<Self> {
        let path = folder.join("notify");
        let socket = UnixDatagram::bind(&path).context("the service manager's socket")?;
        let (heard, messages) = channel();
        thread::spawn(move || hear(&socket, &heard));
        Ok(Self { messages, path })
    }

    /// Tells a `nixvmm` where to report.
    pub fn starts(&self, launch: Launch) -> Launch {
        launch.environment("NOTIFY_SOCKET", &self.path)
    }

    /// Waits for a message that begins with `start`, passes over those before it, and returns it.
    ///
    /// # Errors
    /// When it does not come within `limit`, whatever else does: a sign of life is a message, too.
    pub fn wait_for(&self, start: &str, limit: Duration) -> Result<String> {
        let deadline = Instant::now() + limit;
        let mut seen = Vec::new();
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.messages.recv_timeout(left) {
                Ok(message) if message.starts_with(start) => return Ok(message),
                Ok(message) => seen.push(message),
                Err(_) => bail!("the service manager waits for {start:?} and was told {seen:?}"),
            }
        }
    }
}

/// Takes messages until nobody wants to know of the next one.
fn hear(socket: &UnixDatagram, heard: &Sender<String>) {
    let mut bytes = [0; MESSAGE_BYTES_MAX];
    while let Ok(length) = socket.recv(&mut bytes) {
        let message = String::from_utf8_lossy(bytes.get(..length).unwrap_or_default());
        if heard.send(message.into_owned()).is_err() {
            return;
        }
    }
}
