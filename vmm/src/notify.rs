//! What the service manager of the host is told (sd_notify(3)).
//!
//! The socket is connected before the sandbox closes, which is why this is not the sd-notify crate:
//! it opens the socket for each message.

mod relay;

use std::collections::VecDeque;
use std::env;
use std::io;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use devices::event::{EventSet, Handler, Watch};
use vmm_sys_util::timerfd::TimerFd;

pub(crate) use self::relay::{GuestMessages, Relay};
use crate::config::Ready;

/// Messages that wait while the service manager is behind; a guest can be the cause of more.
const WAITING_MAX: usize = 64;

/// A sign of life, which a later one replaces.
const WATCHDOG: &str = "WATCHDOG=1";

/// The way to the service manager; clones are the same, and without one messages go nowhere.
#[derive(Clone, Default)]
pub(crate) struct Notifier {
    outbox: Option<Arc<Outbox>>,
    watchdog: Option<Duration>,
}

/// The socket, and what it has not taken.
struct Outbox {
    socket: UnixDatagram,
    /// In their order; locked by the main loop's handlers alone.
    waiting: Mutex<VecDeque<String>>,
}

impl Notifier {
    /// Connects to the socket that the environment names.
    pub(crate) fn from_environment() -> Result<Self> {
        let Some(name) = env::var_os("NOTIFY_SOCKET").filter(|name| !name.is_empty()) else {
            return Ok(Self::default());
        };
        let name = name.into_string().ok().context("NOTIFY_SOCKET is no text")?;
        let socket = connect(&name)
            .with_context(|| format!("NOTIFY_SOCKET={name}: the service manager is not there"))?;
        let watchdog = watchdog(
            env::var("WATCHDOG_USEC").ok().as_deref(),
            env::var("WATCHDOG_PID").ok().as_deref(),
        )?;
        Ok(Self { outbox: Some(Outbox::new(socket)), watchdog })
    }

    /// Whether anybody is told.
    pub(crate) fn is_heard(&self) -> bool {
        self.outbox.is_some()
    }

    /// Tells the service manager, in one message. It never waits: what a service manager that is
    /// behind does not take at once goes out by [`Notifier::delivery`].
    pub(crate) fn send(&self, message: &str) {
        if let Some(outbox) = &self.outbox {
            outbox.send(message);
        }
    }

    /// Sends in a loop what had to wait, as soon as there is room.
    pub(crate) fn delivery(&self) -> Option<Delivery> {
        self.outbox.clone().map(Delivery)
    }

    /// Tells that the guest runs.
    pub(crate) fn started(&self, ready: Ready) {
        self.send(match ready {
            Ready::Started => "READY=1\nSTATUS=The guest runs.",
            Ready::Booted | Ready::Reachable => "STATUS=The guest boots.",
        });
    }

    /// Tells that the guest was asked to end.
    pub(crate) fn stopping(&self) {
        self.send("STOPPING=1\nSTATUS=The guest was asked to power off.");
    }

    /// Proves to the service manager that the main loop runs, if it wants to know.
    pub(crate) fn heartbeat(&self) -> Result<Option<Heartbeat>> {
        let Some(interval) = self.watchdog else { return Ok(None) };
        let mut timer = TimerFd::new().map_err(io::Error::from)?;
        // Half of the time after which the service manager gives up, as sd_notify(3) advises.
        let interval = interval / 2;
        timer.reset(interval, Some(interval)).map_err(io::Error::from)?;
        Ok(Some(Heartbeat { timer, notifier: self.clone() }))
    }
}

/// Says `WATCHDOG=1` at an interval.
pub(crate) struct Heartbeat {
    timer: TimerFd,
    notifier: Notifier,
}

impl Handler for Heartbeat {
    fn start(&mut self, watch: &mut Watch<'_, '_>) -> io::Result<()> {
        watch.add(&self.timer, 0, EventSet::IN)
    }

    fn ready(&mut self, _: u32, _: EventSet, _: &mut Watch<'_, '_>) {
        // The timer is ready, so this does not wait.
        let _ = self.timer.wait();
        self.notifier.send(WATCHDOG);
    }
}

impl Outbox {
    fn new(socket: UnixDatagram) -> Arc<Self> {
        Arc::new(Self { socket, waiting: Mutex::default() })
    }

    /// Sends `message` behind those that wait, or lets it wait: a sign of life is then not needed.
    fn send(&self, message: &str) {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        self.flush(&mut waiting);
        if waiting.is_empty() && self.is_done(message) || message == WATCHDOG {
            return;
        }
        if waiting.len() < WAITING_MAX {
            waiting.push_back(message.to_owned());
        } else {
            log::warn!("the service manager takes no messages: one is lost");
        }
    }

    fn flush(&self, waiting: &mut VecDeque<String>) {
        while waiting.front().is_some_and(|message| self.is_done(message)) {
            waiting.pop_front();
        }
    }

    /// Whether nothing is left to do with `message`: it was taken, or nobody is there.
    fn is_done(&self, message: &str) -> bool {
        match self.socket.send(message.as_bytes()) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => false,
            Err(error) => {
                log::warn!("the service manager cannot be told: {error}");
                true
            }
            Ok(_) => true,
        }
    }
}

/// Sends what had to wait.
pub(crate) struct Delivery(Arc<Outbox>);

impl Handler for Delivery {
    /// The kernel tells an edge to who was refused, when there is room again.
    fn start(&mut self, watch: &mut Watch<'_, '_>) -> io::Result<()> {
        watch.add(&self.0.socket, 0, EventSet::OUT | EventSet::EDGE_TRIGGERED)
    }

    fn ready(&mut self, _: u32, _: EventSet, _: &mut Watch<'_, '_>) {
        let mut waiting = self.0.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        self.0.flush(&mut waiting);
    }
}

fn connect(name: &str) -> Result<UnixDatagram> {
    let socket = UnixDatagram::unbound()?;
    let address = match name.strip_prefix('@') {
        Some(name) => SocketAddr::from_abstract_name(name)?,
        None => {
            ensure!(name.starts_with('/'), "neither a path nor an abstract name");
            SocketAddr::from_pathname(name)?
        }
    };
    socket.connect_addr(&address)?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}

/// After which time without a sign the service manager gives this process up.
fn watchdog(microseconds: Option<&str>, process: Option<&str>) -> Result<Option<Duration>> {
    let Some(text) = microseconds else { return Ok(None) };
    if process.is_some_and(|process| process.parse() != Ok(std::process::id())) {
        return Ok(None);
    }
    let microseconds: u64 =
        text.parse().with_context(|| format!("WATCHDOG_USEC={text}: not a number"))?;
    Ok((microseconds > 1).then(|| Duration::from_micros(microseconds)))
}

#[cfg(test)]
mod test {
    use devices::event::EventLoop;

    use super::*;

    /// A service manager and the way to it.
    pub(super) fn listened() -> (UnixDatagram, Notifier) {
        let (ours, theirs) = UnixDatagram::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        theirs.set_nonblocking(true).unwrap();
        (theirs, Notifier { outbox: Some(Outbox::new(ours)), watchdog: None })
    }

    #[test]
    fn a_service_manager_is_found_by_path_or_abstract_name() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("notify");
        let manager = UnixDatagram::bind(&path).unwrap();
        connect(path.to_str().unwrap()).unwrap().send(b"READY=1").unwrap();
        let mut message = [0; 7];
        manager.recv(&mut message).unwrap();
        assert_eq!(&message, b"READY=1");

        let name = format!("nixvmm-test-{}", std::process::id());
        let address = SocketAddr::from_abstract_name(&name).unwrap();
        let manager = UnixDatagram::bind_addr(&address).unwrap();
        connect(&format!("@{name}")).unwrap().send(b"READY=1").unwrap();
        manager.recv(&mut message).unwrap();
        assert!(connect("vsock:2:9").is_err());
    }

    #[test]
    fn the_watchdog_is_for_the_process_that_it_names() {
        let own = std::process::id().to_string();
        let interval = Some(Duration::from_secs(2));
        assert_eq!(watchdog(Some("2000000"), Some(&own)).unwrap(), interval);
        assert_eq!(watchdog(Some("2000000"), None).unwrap(), interval);
        assert_eq!(watchdog(Some("2000000"), Some("1")).unwrap(), None);
        assert_eq!(watchdog(None, None).unwrap(), None);
        assert!(watchdog(Some("soon"), None).is_err());
    }

    #[test]
    fn a_service_manager_that_is_behind_misses_nothing_but_signs_of_life() {
        let mut event_loop = EventLoop::new().unwrap();
        let (manager, notifier) = listened();
        let _delivery = event_loop.add(Box::new(notifier.delivery().unwrap())).unwrap();
        event_loop.run_ready().unwrap();
        let waits = || !notifier.outbox.as_ref().unwrap().waiting.lock().unwrap().is_empty();
        let mut sent = 0;
        while !waits() {
            notifier.send(&format!("STATUS={sent}"));
            sent += 1;
        }
        notifier.send(WATCHDOG);
        notifier.send("READY=1");
        event_loop.run_ready().unwrap();
        assert!(waits());
        let mut heard = Vec::new();
        let mut message = [0; 64];
        while let Ok(len) = manager.recv(&mut message) {
            heard.push(String::from_utf8(message[..len].to_vec()).unwrap());
            event_loop.run_ready().unwrap();
        }
        let expected = (0..sent).map(|number| format!("STATUS={number}"));
        assert_eq!(heard, expected.chain(["READY=1".to_owned()]).collect::<Vec<_>>());
        for _ in 0..2 * WAITING_MAX + sent {
            notifier.send("STATUS=A flood.");
        }
        assert_eq!(notifier.outbox.as_ref().unwrap().waiting.lock().unwrap().len(), WAITING_MAX);
    }

    #[test]
    fn nobody_is_told_where_nobody_listens() {
        Notifier::default().send("READY=1");
        let (manager, notifier) = listened();
        drop(manager);
        notifier.send("READY=1");
    }
}
