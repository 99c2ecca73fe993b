//! The guest's own messages, taken over vsock and passed on to the service manager of the host.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{self, ErrorKind, Read as _};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;

use anyhow::anyhow;
use devices::event::{EventSet, Handler, Watch};
use devices::host::vsock::Visitors;
use devices::host::vsock_listener::VsockListener;

use super::Notifier;
use crate::config::{Config, OnReboot, Ready};
use crate::run_state::{Ending, Endings};

/// Longest message: systemd's own limit (`NOTIFY_BUFFER_MAX`).
const MESSAGE_BYTES_MAX: u64 = 4096;

/// Messages that are on their way at the same time; systemd sends one after the other.
const MESSAGES_MAX: usize = 16;

/// The token of the source; connections have those behind it.
const SOURCE: u32 = 0;

/// What is active when a boot has failed and a person is wanted.
const EMERGENCY: &str = "X_SYSTEMD_UNIT_ACTIVE=emergency.target";

/// What is active when sshd listens (systemd.special(7)).
const SSH_ACCESS: &str = "X_SYSTEMD_UNIT_ACTIVE=ssh-access.target";

/// What systemd says when no start of a unit is left to be done.
const BOOTED: &str = "READY=1";

/// Where the guest's messages come from.
pub(crate) enum GuestMessages {
    /// A port that our own socket device serves.
    Device(Visitors),
    /// A port of the host, to which other guests can connect as well.
    Host {
        /// Where they arrive.
        listener: VsockListener,
        /// The guest's context id.
        cid: u32,
    },
}

impl GuestMessages {
    /// The next message's connection; an event tells when there may be one.
    fn next(&self) -> Option<UnixStream> {
        match self {
            Self::Device(visitors) => {
                visitors.arrived().take();
                visitors.next()
            }
            Self::Host { listener, cid } => match listener.accept() {
                Ok(Some((stream, from))) if from == *cid => Some(stream),
                Ok(Some((_, from))) => {
                    log::debug!("context id {from} is not our guest's: its message is dropped");
                    None
                }
                Ok(None) => None,
                Err(error) => {
                    log::warn!("the guest's messages cannot be taken: {error}");
                    None
                }
            },
        }
    }

    /// Whether the next one is asked for before another event tells of it. The host's kernel goes
    /// on telling as long as connections wait, and makes who asks for one that is not there wait.
    fn may_be_asked_again(&self) -> bool {
        matches!(self, Self::Device(_))
    }
}

impl AsRawFd for GuestMessages {
    fn as_raw_fd(&self) -> RawFd {
        match self {
            Self::Device(visitors) => visitors.arrived().as_raw_fd(),
            Self::Host { listener, .. } => listener.as_raw_fd(),
        }
    }
}

const UNREACHABLE: &str = "The guest has booted without ssh-access.target: does its sshd listen, \
                           and is its systemd of version 256 or later?";

/// Passes messages on: each is one connection, and at its end one message to the service manager.
pub(crate) struct Relay {
    source: GuestMessages,
    messages: BTreeMap<u32, Incoming>,
    next_token: u32,
    judge: Judge,
}

/// A message that has not ended.
struct Incoming {
    stream: UnixStream,
    bytes: Vec<u8>,
}

impl Relay {
    pub(crate) fn new(
        source: GuestMessages,
        config: &Config,
        notifier: Notifier,
        endings: Endings,
    ) -> Self {
        let judge = Judge {
            notifier,
            endings,
            ready: config.ready,
            restarts: config.on_reboot == OnReboot::Restart,
            is_ready: false,
            status: String::new(),
        };
        Self { source, messages: BTreeMap::new(), next_token: SOURCE + 1, judge }
    }

    fn admit(&mut self, watch: &mut Watch<'_, '_>) {
        while let Some(stream) = self.source.next() {
            self.begin(stream, watch);
            if !self.source.may_be_asked_again() {
                return;
            }
        }
    }

    fn begin(&mut self, stream: UnixStream, watch: &mut Watch<'_, '_>) {
        let mut incoming = Incoming { stream, bytes: Vec::new() };
        // Everything may be there already.
        if self.read(&mut incoming) {
            return;
        }
        if self.messages.len() >= MESSAGES_MAX
            && let Some((_, oldest)) = self.messages.pop_first()
        {
            let _ = watch.remove(&oldest.stream);
        }
        let token = self.next_token;
        self.next_token = token.checked_add(1).unwrap_or(SOURCE + 1);
        if watch.add(&incoming.stream, token, EventSet::IN).is_ok() {
            self.messages.insert(token, incoming);
        }
    }

    fn go_on(&mut self, token: u32, watch: &mut Watch<'_, '_>) {
        let Some(mut incoming) = self.messages.remove(&token) else { return };
        if self.read(&mut incoming) {
            let _ = watch.remove(&incoming.stream);
        } else {
            self.messages.insert(token, incoming);
        }
    }

    /// Reads what is there; the result is whether the message has ended.
    fn read(&mut self, incoming: &mut Incoming) -> bool {
        let room = MESSAGE_BYTES_MAX.saturating_sub(incoming.bytes.len() as u64);
        let outcome = (&incoming.stream).take(room + 1).read_to_end(&mut incoming.bytes);
        match outcome {
            _ if incoming.bytes.len() as u64 > MESSAGE_BYTES_MAX => {
                log::warn!("a message of the guest is longer than {MESSAGE_BYTES_MAX} bytes");
                true
            }
            Ok(_) => {
                self.judge.hear(&incoming.bytes);
                true
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => false,
            Err(_) => true,
        }
    }
}

impl Handler for Relay {
    fn start(&mut self, watch: &mut Watch<'_, '_>) -> io::Result<()> {
        watch.add(&self.source, SOURCE, EventSet::IN)
    }

    fn ready(&mut self, token: u32, _: EventSet, watch: &mut Watch<'_, '_>) {
        match token {
            SOURCE => self.admit(watch),
            token => self.go_on(token, watch),
        }
    }
}

/// Knows what may be passed on and what follows from it.
struct Judge {
    notifier: Notifier,
    endings: Endings,
    /// Which readiness of the guest is ours.
    ready: Ready,
    /// The guest starts again in this process when it reboots.
    restarts: bool,
    is_ready: bool,
    /// What the guest said last about itself.
    status: String,
}

impl Judge {
    fn hear(&mut self, message: &[u8]) {
        let Ok(text) = str::from_utf8(message) else {
            log::debug!("a message of the guest is no text");
            return;
        };
        let says = |line: &str| text.lines().any(|said| said == line);
        let mut passed = String::new();
        for line in text.lines() {
            if let Some(status) = line.strip_prefix("STATUS=") {
                status.clone_into(&mut self.status);
            }
            if self.may_pass(line) {
                let _ = writeln!(passed, "{line}");
            }
            if self.is_awaited(line) && !self.is_ready {
                self.is_ready = true;
                log::info!("the guest is ready");
                if self.ready != Ready::Started {
                    let _ = writeln!(passed, "{BOOTED}");
                }
            }
        }
        if self.ready == Ready::Reachable && !self.is_ready && says(BOOTED) {
            // Systemd's own status would hide what is still waited for.
            let _ = writeln!(passed, "STATUS={UNREACHABLE}");
            log::warn!("{UNREACHABLE}");
        }
        if !passed.is_empty() {
            self.notifier.send(&passed);
        }
        if says(EMERGENCY) {
            self.fail();
        }
    }

    /// Whether this is what readiness means here.
    fn is_awaited(&self, line: &str) -> bool {
        match self.ready {
            Ready::Started | Ready::Booted => line == BOOTED,
            Ready::Reachable => line == SSH_ACCESS,
        }
    }

    /// Only what says something about the guest: the service manager must not take the guest for
    /// this process.
    fn may_pass(&self, line: &str) -> bool {
        let Some((key, value)) = line.split_once('=') else { return false };
        if value.chars().any(char::is_control) {
            return false;
        }
        match key {
            // Said when it is what is waited for.
            "READY" => false,
            // Who reboots goes on; a service that says that it stops is killed if it does not.
            "STOPPING" => !self.restarts,
            "STATUS" | "ERRNO" | "EXIT_STATUS" => true,
            _ => key.starts_with("X_SYSTEMD_"),
        }
    }

    /// The guest waits for a person instead of becoming ready.
    fn fail(&self) {
        let reason = match self.status.as_str() {
            "" => "the guest came up in emergency mode".to_owned(),
            status => format!("the guest came up in emergency mode: {status}"),
        };
        if self.ready != Ready::Started && !self.is_ready && self.notifier.is_heard() {
            self.notifier.send(&format!("STATUS={reason}"));
            self.endings.report(Ending::Failed(anyhow!(reason)));
        } else {
            log::error!("{reason}");
        }
    }
}

#[cfg(test)]
mod test {
    use std::io::Write as _;
    use std::os::unix::net::UnixDatagram;

    use devices::event::EventLoop;
    use devices::host::vsock::Gate;

    use super::super::test::listened;
    use super::*;

    fn judge(ready: Ready, restarts: bool) -> (UnixDatagram, Judge) {
        let (manager, notifier) = listened();
        let endings = Endings::new().unwrap();
        let (is_ready, status) = (false, String::new());
        (manager, Judge { notifier, endings, ready, restarts, is_ready, status })
    }

    fn heard(manager: &UnixDatagram) -> String {
        let mut bytes = [0; 8192];
        let len = manager.recv(&mut bytes).unwrap_or(0);
        String::from_utf8(bytes[..len].to_vec()).unwrap()
    }

    #[test]
    fn what_is_about_the_guest_is_passed_on_in_one_message_and_nothing_else() {
        let (manager, mut judge) = judge(Ready::Booted, false);
        judge.hear(
            b"READY=1\nSTATUS=Up.\nX_SYSTEMD_HOSTNAME=vm\nMAINPID=1\nWATCHDOG=1\nFDSTORE=1\nx\n\
              ERRNO=5\nSTATUS=\x1b[2J\nSTOPPING=1",
        );
        assert_eq!(
            heard(&manager),
            "READY=1\nSTATUS=Up.\nX_SYSTEMD_HOSTNAME=vm\nERRNO=5\nSTOPPING=1\n"
        );
        judge.hear(b"MAINPID=1");
        judge.hear(b"\xff\xfe");
        assert_eq!(heard(&manager), "");
    }

    #[test]
    fn readiness_counts_where_it_is_asked_for_and_a_reboot_is_no_stop() {
        let (manager, mut judge) = judge(Ready::Started, true);
        judge.hear(b"READY=1\nSTOPPING=1\nSTATUS=Up.");
        assert_eq!(heard(&manager), "STATUS=Up.\n");
    }

    #[test]
    fn who_waits_for_ssh_is_ready_when_sshd_listens_and_not_when_the_boot_is_finished() {
        let (manager, mut judge) = judge(Ready::Reachable, true);
        judge.hear(b"X_SYSTEMD_UNIT_ACTIVE=basic.target");
        assert_eq!(heard(&manager), "X_SYSTEMD_UNIT_ACTIVE=basic.target\n");
        judge.hear(b"READY=1\nSTATUS=Ready.");
        let told = heard(&manager);
        assert!(told.starts_with("STATUS=Ready.\nSTATUS=The guest has booted without"), "{told}");
        judge.hear(b"X_SYSTEMD_UNIT_ACTIVE=ssh-access.target\n");
        assert_eq!(heard(&manager), "X_SYSTEMD_UNIT_ACTIVE=ssh-access.target\nREADY=1\n");
        judge.hear(b"READY=1\nSTATUS=Ready.");
        assert_eq!(heard(&manager), "STATUS=Ready.\n");
        judge.hear(b"X_SYSTEMD_UNIT_ACTIVE=ssh-access.target\n");
        assert_eq!(heard(&manager), "X_SYSTEMD_UNIT_ACTIVE=ssh-access.target\n");
    }

    #[test]
    fn emergency_mode_before_readiness_is_the_end_with_its_reason() {
        let (manager, mut judge) = judge(Ready::Booted, true);
        judge.hear(b"STATUS=Cannot mount /data.");
        judge.hear(b"X_SYSTEMD_UNIT_ACTIVE=emergency.target\n");
        let reason = "the guest came up in emergency mode: Cannot mount /data.";
        assert_eq!(heard(&manager), "STATUS=Cannot mount /data.\n");
        assert_eq!(heard(&manager), "X_SYSTEMD_UNIT_ACTIVE=emergency.target\n");
        assert_eq!(heard(&manager), format!("STATUS={reason}"));
        match judge.endings.take() {
            Some(Ending::Failed(error)) => assert_eq!(error.to_string(), reason),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn emergency_mode_of_a_guest_that_was_ready_leaves_it_running() {
        let (_manager, mut judge) = judge(Ready::Booted, true);
        judge.hear(b"READY=1\n");
        judge.hear(b"X_SYSTEMD_UNIT_ACTIVE=emergency.target\n");
        assert!(judge.endings.take().is_none());
    }

    #[test]
    fn messages_come_in_parts_too_long_or_never_and_the_others_are_heard() {
        let mut event_loop = EventLoop::new().unwrap();
        let mut gate = Gate::closed().unwrap();
        let visitors = gate.serve_locally(9).unwrap();
        let (manager, judge) = judge(Ready::Booted, true);
        let source = GuestMessages::Device(visitors);
        let relay = Relay { source, messages: BTreeMap::new(), next_token: 1, judge };
        let _relay = event_loop.add(Box::new(relay)).unwrap();
        // The device's end of each connection, as a stream.
        let connect = || UnixStream::from(gate.connect(9).unwrap().into_descriptor());
        let silent: Vec<_> = (0..3 * MESSAGES_MAX).map(|_| connect()).collect();
        let mut long = connect();
        long.set_nonblocking(false).unwrap();
        long.write_all(&[b'x'; 8192]).unwrap();
        drop(long);
        let mut slow = connect();
        slow.write_all(b"READY").unwrap();
        event_loop.run_ready().unwrap();
        assert_eq!(heard(&manager), "");
        slow.write_all(b"=1\nSTATUS=Up.").unwrap();
        slow.shutdown(std::net::Shutdown::Write).unwrap();
        event_loop.run_ready().unwrap();
        assert_eq!(heard(&manager), "READY=1\nSTATUS=Up.\n");
        drop(silent);
        event_loop.run_ready().unwrap();
    }
}
