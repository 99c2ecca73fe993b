use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};

use devices::event::EventLoop;

use super::*;
use crate::config::Vsock;

const NAME_TAKEN: &str = r#"{"error": "io.systemd.Machine.MachineExists", "parameters": {}}"#;
const DONE: &str = r#"{"parameters": {}}"#;

/// A machined that says what it is told to, a guest's loop, and the service that it runs in.
struct Conversation {
    event_loop: EventLoop,
    server: BufReader<UnixStream>,
    _enrolment: devices::event::Registration,
}

impl Conversation {
    fn begin(config: &Config, context_id: Option<u32>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("machined");
        let listener = UnixListener::bind(&socket).unwrap();
        let machined = Some(Machined { name: "web".to_owned(), socket });
        let config = Config { machined, ..config.clone() };
        let mut enrolment = Enrolment::begin(&config, context_id).unwrap();
        enrolment.unit = Some("nixvmm@web.service".to_owned());
        let mut event_loop = EventLoop::new().unwrap();
        let enrolment = event_loop.add(Box::new(enrolment)).unwrap();
        let server = BufReader::new(listener.accept().unwrap().0);
        Self { event_loop, server, _enrolment: enrolment }
    }

    /// The next call, or nothing when the client has left.
    fn call(&mut self) -> Option<Value> {
        let mut message = Vec::new();
        self.server.read_until(0, &mut message).unwrap();
        message.pop().map(|_| serde_json::from_slice(&message).unwrap())
    }

    fn reply(&mut self, reply: &str) {
        let stream = self.server.get_mut();
        stream.write_all(reply.as_bytes()).unwrap();
        stream.write_all(&[0]).unwrap();
        self.event_loop.run_ready().unwrap();
    }

    #[track_caller]
    fn expect(&mut self, method: &str) {
        assert_eq!(self.call().unwrap()["method"], format!("io.systemd.Machine.{method}"));
    }
}

#[test]
fn a_guest_is_told_with_its_identity_and_the_way_to_its_shell() {
    let mut config = Config::default();
    config.smbios.uuid = Some("00112233-4455-6677-8899-aabbccddeeff".parse().unwrap());
    config.vsock = Some(Vsock::default());
    let mut conversation = Conversation::begin(&config, Some(7));
    let call = conversation.call().unwrap();
    assert_eq!(call["method"], "io.systemd.Machine.Register");
    let expected = json!({
        "name": "web",
        "id": "00112233445566778899aabbccddeeff",
        "class": "vm",
        "service": "nixvmm",
        "leader": std::process::id(),
        "vSockCid": 7,
        "sshAddress": "vsock/7",
    });
    assert_eq!(call["parameters"], expected);
    conversation.reply(DONE);
    assert_eq!(conversation.call(), None, "nothing is left to say");
}

#[test]
fn a_guest_behind_a_socket_of_this_process_has_no_context_id() {
    let socket = Some("/run/web.vsock".into());
    let config = Config { vsock: Some(Vsock { cid: None, socket }), ..Config::default() };
    let parameters = Conversation::begin(&config, Some(3)).call().unwrap()["parameters"].take();
    assert_eq!(parameters["sshAddress"], "vsock-mux/run/web.vsock");
    assert_eq!(parameters.get("vSockCid"), None);
    assert_eq!(parameters.get("id"), None);
}

#[test]
fn a_service_that_was_restarted_takes_the_place_of_what_it_was() {
    longest()();
}

/// The longest conversation: begun, and still to be had.
pub(crate) fn longest() -> impl FnOnce() {
    let mut conversation = Conversation::begin(&Config::default(), None);
    move || have(&mut conversation)
}

fn have(conversation: &mut Conversation) {
    conversation.expect("Register");
    conversation.reply(NAME_TAKEN);
    conversation.expect("List");
    conversation.reply(
        r#"{"parameters": {"name": "web", "service": "nixvmm", "unit": "nixvmm@web.service"}}"#,
    );
    conversation.expect("Unregister");
    conversation.reply(r#"{"error": "io.systemd.Machine.NoSuchMachine"}"#);
    conversation.expect("Register");
    conversation.reply(DONE);
    assert_eq!(conversation.call(), None);
}

#[test]
fn somebody_elses_machine_keeps_its_name() {
    for other in [
        r#"{"parameters": {"service": "systemd-nspawn", "unit": "nixvmm@web.service"}}"#,
        r#"{"parameters": {"service": "nixvmm", "unit": "session-1.scope"}}"#,
        r#"{"parameters": {}}"#,
        r#"{"error": "org.varlink.service.MethodNotFound"}"#,
    ] {
        let mut conversation = Conversation::begin(&Config::default(), None);
        conversation.expect("Register");
        conversation.reply(NAME_TAKEN);
        conversation.expect("List");
        conversation.reply(other);
        assert_eq!(conversation.call(), None, "{other}");
    }
}

#[test]
fn what_is_no_reply_ends_the_conversation_and_nothing_else() {
    for reply in ["", "[]", "{", "\u{1}", r#"{"error": "io.systemd.System"}"#, r#"{"error": 1}"#] {
        let mut conversation = Conversation::begin(&Config::default(), None);
        conversation.expect("Register");
        conversation.reply(reply);
        assert_eq!(conversation.call(), None, "{reply}");
        conversation.event_loop.run_ready().unwrap();
    }
}

#[test]
fn a_host_without_machined_is_no_reason_not_to_run() {
    let machined = Machined { socket: "/no/such/socket".into(), ..Machined::new("web") };
    let config = Config { machined: Some(machined), ..Config::default() };
    assert!(Enrolment::begin(&config, None).is_none());
    assert!(Enrolment::begin(&Config::default(), None).is_none());
}

#[test]
fn a_unit_is_known_by_its_control_group() {
    let expected = Some("nixvmm@web.service".to_owned());
    assert_eq!(service("0::/machine.slice/nixvmm@web.service\n"), expected);
    assert_eq!(service("0::/user.slice/user-0.slice/session-2.scope\n"), None);
    assert_eq!(service("1:name=systemd:/a.service\n"), None);
}
