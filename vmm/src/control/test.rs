//! The protocol through real sockets, and clients that do not behave.

use std::io::{Read as _, Write as _};
use std::os::fd::AsFd as _;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use devices::event::{Event, EventLoop, EventSet, Handler, Registration, Watch};
use devices::host::listener::Listener;
use devices::host::stream::Stream;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use serde_json::{Value, json};

use super::*;

const SERVER: u32 = 10;

/// A service that counts its calls.
struct Subject {
    calls: u64,
    stream: Stream,
}

const INTERFACE: Interface<Subject> = Interface {
    name: MACHINE_INTERFACE_NAME,
    description: MACHINE_INTERFACE,
    verbs: &[
        Verb {
            name: "Count",
            parameters: &["by", "large"],
            streams: false,
            serve: |subject, request| {
                subject.calls += request.number("by")?.unwrap_or(1);
                let large = request.number("large")?.unwrap_or_default();
                let filling = "x".repeat(usize::try_from(large).unwrap());
                Ok(Answer::Done(json!({ "calls": subject.calls, "filling": filling })))
            },
        },
        Verb {
            name: "Wait",
            parameters: &[],
            streams: false,
            serve: |_, _| Ok(Answer::Later(Occasion::Paused)),
        },
        Verb {
            name: "Follow",
            parameters: &[],
            streams: true,
            serve: |_, _| Ok(Answer::Events(json!({ "event": "first" }))),
        },
        Verb {
            name: "Attach",
            parameters: &[],
            streams: false,
            serve: |subject, request| {
                assert!(request.wants_upgrade());
                Ok(Answer::Bytes(json!({}), subject.stream.outlet().tap().unwrap()))
            },
        },
        Verb {
            name: "Read",
            parameters: &["file"],
            streams: false,
            serve: |_, request| {
                let mut text = String::new();
                std::fs::File::from(request.file("file")?).read_to_string(&mut text).unwrap();
                Ok(Answer::Done(json!({ "text": text })))
            },
        },
    ],
};

struct Service {
    server: Server,
    subject: Subject,
    announcement: Event,
    completion: Event,
}

impl Handler for Service {
    fn start(&mut self, watch: &mut Watch<'_, '_>) -> std::io::Result<()> {
        watch.add(&self.announcement, 0, EventSet::IN)?;
        watch.add(&self.completion, 1, EventSet::IN)?;
        self.server.start(watch)
    }

    fn ready(&mut self, token: u32, readiness: EventSet, watch: &mut Watch<'_, '_>) {
        match token {
            0 => {
                self.announcement.take();
                let event = json!({ "event": "second", "filling": "x".repeat(1000) });
                self.server.announce(&event, watch);
            }
            1 => {
                self.completion.take();
                self.server.complete(Occasion::Paused, watch);
            }
            token => self.server.ready(token, readiness, watch, &INTERFACE, &mut self.subject),
        }
    }
}

struct Fixture {
    event_loop: EventLoop,
    path: PathBuf,
    stream: Stream,
    announcement: Event,
    completion: Event,
    _registration: Registration,
    _folder: tempfile::TempDir,
}

impl Fixture {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("control");
        let mut event_loop = EventLoop::new().unwrap();
        let (announcement, completion) = (Event::new().unwrap(), Event::new().unwrap());
        let stream = Stream::null().unwrap();
        let registration = event_loop
            .add(Box::new(Service {
                server: Server::new(Listener::bind(&path, None).unwrap(), SERVER),
                subject: Subject { calls: 0, stream: stream.clone() },
                announcement: announcement.clone(),
                completion: completion.clone(),
            }))
            .unwrap();
        Self {
            event_loop,
            path,
            stream,
            announcement,
            completion,
            _registration: registration,
            _folder: folder,
        }
    }

    fn connect(&mut self) -> UnixStream {
        let client = UnixStream::connect(&self.path).unwrap();
        client.set_nonblocking(true).unwrap();
        self.event_loop.run_ready().unwrap();
        client
    }

    /// Sends `text`, in which `|` stands for the NUL, and returns what comes back.
    fn exchange(&mut self, client: &mut UnixStream, text: &str) -> Vec<Value> {
        client.write_all(text.replace('|', "\0").as_bytes()).unwrap();
        self.replies(client)
    }

    fn replies(&mut self, client: &mut UnixStream) -> Vec<Value> {
        let mut bytes = Vec::new();
        loop {
            self.event_loop.run_ready().unwrap();
            // An end, an error or nothing more.
            let before = bytes.len();
            let _ = client.read_to_end(&mut bytes);
            if bytes.len() == before {
                break;
            }
        }
        let messages = bytes.split_inclusive(|byte| *byte == 0);
        let parse = |message: &[u8]| serde_json::from_slice(message.strip_suffix(b"\0").unwrap());
        messages.map(|message| parse(message).unwrap()).collect()
    }

    /// Whether the service has closed the connection.
    fn has_closed(&mut self, client: &mut UnixStream) -> bool {
        self.event_loop.run_ready().unwrap();
        match client.read(&mut [0; 64]) {
            Ok(0) => true,
            Ok(_) => false,
            Err(error) => error.kind() != std::io::ErrorKind::WouldBlock,
        }
    }
}

fn call(method: &str, rest: &str) -> String {
    format!("{{\"method\": \"{MACHINE_INTERFACE_NAME}.{method}\"{rest}}}|")
}

fn error(reply: &Value) -> &str {
    reply["error"].as_str().unwrap()
}

#[test]
fn a_service_introduces_itself() {
    let mut fixture = Fixture::new();
    let mut client = fixture.connect();
    let info = fixture.exchange(&mut client, "{\"method\":\"org.varlink.service.GetInfo\"}|");
    assert_eq!(
        info[0]["parameters"]["interfaces"],
        json!(["org.varlink.service", MACHINE_INTERFACE_NAME])
    );
    for interface in ["org.varlink.service", MACHINE_INTERFACE_NAME] {
        let text = format!(
            "{{\"method\":\"org.varlink.service.GetInterfaceDescription\",\
              \"parameters\":{{\"interface\":\"{interface}\"}}}}|"
        );
        let replies = fixture.exchange(&mut client, &text);
        let description = replies[0]["parameters"]["description"].as_str().unwrap();
        assert!(description.contains(&format!("\ninterface {interface}\n")));
    }
}

#[test]
fn calls_may_come_in_pieces_and_in_one_piece_and_are_answered_in_order() {
    let mut fixture = Fixture::new();
    let mut client = fixture.connect();
    for byte in call("Count", "").replace('|', "\0").bytes() {
        assert_eq!(fixture.replies(&mut client), [] as [Value; 0]);
        client.write_all(&[byte]).unwrap();
    }
    assert_eq!(fixture.replies(&mut client)[0]["parameters"]["calls"], 1);
    let replies = fixture.exchange(&mut client, &call("Count", "").repeat(100));
    let counted: Vec<_> = replies.iter().map(|reply| &reply["parameters"]["calls"]).collect();
    assert_eq!(counted, (2..102).map(Value::from).collect::<Vec<_>>().iter().collect::<Vec<_>>());
}

#[test]
fn what_does_not_exist_or_has_the_wrong_type_is_refused_by_name() {
    let mut fixture = Fixture::new();
    let mut client = fixture.connect();
    for (text, expected, parameters) in [
        (
            "{\"method\": \"com.example.Other.Method\"}|".to_owned(),
            "InterfaceNotFound",
            json!({ "interface": "com.example.Other" }),
        ),
        ("{\"method\": \"nothing\"}|".into(), "InterfaceNotFound", json!({ "interface": "" })),
        (call("Nothing", ""), "MethodNotFound", json!({ "method": "io.nixvmm.Machine.Nothing" })),
        (
            "{\"method\": \"org.varlink.service.Nothing\"}|".into(),
            "MethodNotFound",
            json!({ "method": "org.varlink.service.Nothing" }),
        ),
        (
            call("Count", ", \"parameters\": {\"by\": \"two\"}"),
            "InvalidParameter",
            json!({ "parameter": "by" }),
        ),
        (
            call("Count", ", \"parameters\": {\"by\": -1}"),
            "InvalidParameter",
            json!({ "parameter": "by" }),
        ),
        (
            call("Count", ", \"parameters\": {\"bye\": 1}"),
            "InvalidParameter",
            json!({ "parameter": "bye" }),
        ),
        (
            call("Read", ", \"parameters\": {\"file\": 0}"),
            "InvalidParameter",
            json!({ "parameter": "file" }),
        ),
        (call("Follow", ""), "ExpectedMore", json!({})),
    ] {
        let replies = fixture.exchange(&mut client, &text);
        assert_eq!(error(&replies[0]), format!("org.varlink.service.{expected}"), "{text}");
        assert_eq!(replies[0]["parameters"], parameters, "{text}");
    }
    assert_eq!(fixture.exchange(&mut client, &call("Count", ""))[0]["parameters"]["calls"], 1);
}

#[test]
fn what_is_no_call_ends_the_connection_and_no_other() {
    let mut fixture = Fixture::new();
    let mut bystander = fixture.connect();
    for text in [
        "|".to_owned(),
        "nonsense|".to_owned(),
        "[]|".to_owned(),
        "[\"a.b\", {}, false, false, false]|".to_owned(),
        "{}|".to_owned(),
        "{\"method\": 1}|".to_owned(),
        "{\"method\": \"a.b\", \"parameters\": []}|".to_owned(),
        "{\"method\": \"a.b\", \"more\": \"yes\"}|".to_owned(),
        format!("{{\"method\": \"a.b\", \"parameters\": {{\"a\": {}|", "[".repeat(60_000)),
        "{\"a\":".repeat(10_000) + "|",
        "x".repeat(MESSAGE_BYTES_MAX + 1),
        " ".repeat(MESSAGE_BYTES_MAX + 1) + "|",
    ] {
        let mut client = fixture.connect();
        // A connection that is closed early cannot be written to its end.
        for part in text.replace('|', "\0").as_bytes().chunks(1000) {
            let _ = client.write_all(part);
            fixture.event_loop.run_ready().unwrap();
        }
        let start = text.get(..40).unwrap_or(&text);
        assert!(fixture.has_closed(&mut client), "{start}");
    }
    assert_eq!(fixture.exchange(&mut bystander, &call("Count", ""))[0]["parameters"]["calls"], 1);
}

#[test]
fn a_call_of_the_largest_size_is_served() {
    let mut fixture = Fixture::new();
    let mut client = fixture.connect();
    let text = call("Count", "");
    let filling = " ".repeat(MESSAGE_BYTES_MAX + 1 - text.len());
    for part in (filling + &text).replace('|', "\0").as_bytes().chunks(4096) {
        client.write_all(part).unwrap();
        fixture.event_loop.run_ready().unwrap();
    }
    assert_eq!(fixture.replies(&mut client)[0]["parameters"]["calls"], 1);
}

#[test]
fn oneway_calls_are_done_and_not_answered() {
    let mut fixture = Fixture::new();
    let mut client = fixture.connect();
    let oneway = [
        call("Count", ", \"oneway\": true"),
        call("Nothing", ", \"oneway\": true"),
        call("Follow", ", \"oneway\": true, \"more\": true"),
        call("Count", ""),
    ]
    .concat();
    let replies = fixture.exchange(&mut client, &oneway);
    assert_eq!(replies.len(), 1);
    assert_eq!(replies[0]["parameters"]["calls"], 2);
    // Who is gone by then has still asked.
    client.write_all(call("Count", ", \"oneway\": true").replace('|', "\0").as_bytes()).unwrap();
    drop(client);
    let mut other = fixture.connect();
    assert_eq!(fixture.exchange(&mut other, &call("Count", ""))[0]["parameters"]["calls"], 4);
}

#[test]
fn a_reply_that_has_to_wait_holds_back_the_calls_behind_it() {
    let mut fixture = Fixture::new();
    let (mut one, mut other) = (fixture.connect(), fixture.connect());
    let both = [call("Wait", ""), call("Count", "")].concat();
    assert_eq!(fixture.exchange(&mut one, &both), [] as [Value; 0]);
    assert_eq!(fixture.exchange(&mut other, &call("Count", ""))[0]["parameters"]["calls"], 1);
    fixture.completion.signal();
    let replies = fixture.replies(&mut one);
    assert_eq!(replies[0]["parameters"], json!({}));
    assert_eq!(replies[1]["parameters"]["calls"], 2);
}

#[test]
fn events_reach_those_who_asked_for_them() {
    let mut fixture = Fixture::new();
    let (mut one, mut other) = (fixture.connect(), fixture.connect());
    let replies = fixture.exchange(&mut one, &call("Follow", ", \"more\": true"));
    assert_eq!(replies[0]["parameters"]["event"], "first");
    assert_eq!(replies[0]["continues"], true);
    fixture.announcement.signal();
    assert_eq!(fixture.replies(&mut one)[0]["parameters"]["event"], "second");
    assert_eq!(fixture.replies(&mut other), [] as [Value; 0]);
}

#[test]
fn a_subscriber_that_does_not_read_is_sent_away() {
    let mut fixture = Fixture::new();
    let mut client = fixture.connect();
    let subscription = call("Follow", ", \"more\": true").replace('|', "\0");
    client.write_all(subscription.as_bytes()).unwrap();
    // More than the socket and the service keep together.
    for _ in 0..1000 {
        fixture.announcement.signal();
        fixture.event_loop.run_ready().unwrap();
    }
    let mut received = Vec::new();
    // It ends: with the end of the stream or, as something was left unread, an error.
    let _ = client.read_to_end(&mut received);
    assert!(received.len() < 1_000_000);
    assert!(fixture.has_closed(&mut client));
}

#[test]
fn a_caller_that_does_not_read_makes_the_service_keep_one_reply_only() {
    let mut fixture = Fixture::new();
    let mut client = fixture.connect();
    let text = call("Count", ", \"parameters\": {\"large\": 60000}").replace('|', "\0");
    let mut sent = 0;
    // Until the service reads no more, because nobody reads its replies.
    while client.write_all(text.as_bytes()).is_ok() {
        fixture.event_loop.run_ready().unwrap();
        sent += 1;
        assert!(sent < 100_000, "the service reads on and on");
    }
    let mut other = fixture.connect();
    let served = fixture.exchange(&mut other, &call("Count", "")).remove(0);
    assert!(served["parameters"]["calls"].as_u64().unwrap() < 100);
    assert!(fixture.replies_may_end_early(&mut client) > 1);
}

impl Fixture {
    /// How many whole replies there are.
    fn replies_may_end_early(&mut self, client: &mut UnixStream) -> usize {
        let mut bytes = Vec::new();
        loop {
            self.event_loop.run_ready().unwrap();
            let before = bytes.len();
            let _ = client.read_to_end(&mut bytes);
            if bytes.len() == before {
                return bytes.iter().filter(|byte| **byte == 0).count();
            }
        }
    }
}

#[test]
fn a_thousand_clients_are_no_more_than_some_and_the_next_one_is_served() {
    let mut fixture = Fixture::new();
    let mut follower = fixture.connect();
    fixture.exchange(&mut follower, &call("Follow", ", \"more\": true"));
    let mut crowd = Vec::new();
    for number in 0..1000 {
        let mut client = fixture.connect();
        if number % 2 == 0 {
            client.write_all(b"{\"method\": \"half a").unwrap();
        }
        crowd.push(client);
    }
    let mut client = fixture.connect();
    assert_eq!(fixture.exchange(&mut client, &call("Count", ""))[0]["parameters"]["calls"], 1);
    let open = crowd.iter_mut().filter_map(|client| (!fixture.has_closed(client)).then_some(()));
    assert!(open.count() < 32);
    fixture.announcement.signal();
    assert_eq!(fixture.replies(&mut follower).len(), 1, "who waits by right is not pushed out");
}

#[test]
fn a_descriptor_comes_with_its_call_and_others_are_closed() {
    let mut fixture = Fixture::new();
    let mut client = fixture.connect();
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(&file, "from a file").unwrap();
    let (file, other) = (std::fs::File::open(&file).unwrap(), std::fs::File::open("/dev/null"));
    let text = call("Read", ", \"parameters\": {\"file\": 0}").replace('|', "\0");
    let other = other.unwrap();
    for files in [&[file.as_fd()][..], &[file.as_fd(), other.as_fd(), other.as_fd()]] {
        std::io::Seek::rewind(&mut &file).unwrap();
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(3))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        assert!(ancillary.push(SendAncillaryMessage::ScmRights(files)));
        let bytes = [std::io::IoSlice::new(text.as_bytes())];
        rustix::net::sendmsg(&client, &bytes, &mut ancillary, SendFlags::empty()).unwrap();
        assert_eq!(fixture.replies(&mut client)[0]["parameters"]["text"], "from a file");
    }
    let again = fixture.exchange(&mut client, &call("Read", ", \"parameters\": {\"file\": 0}"));
    assert_eq!(again[0]["parameters"]["parameter"], "file", "it is there once");
}

#[test]
fn an_upgraded_connection_carries_the_bytes_of_a_stream_both_ways() {
    let mut fixture = Fixture::new();
    let mut client = fixture.connect();
    let text = call("Attach", ", \"upgrade\": true") + "typed at once";
    assert_eq!(fixture.exchange(&mut client, &text), [json!({ "parameters": {} })]);
    let mut typed = [0; 100];
    assert_eq!(fixture.stream.receive(&mut typed), 13);
    assert_eq!(&typed[..13], b"typed at once");
    client.write_all(b"and later").unwrap();
    fixture.stream.send(b"said by the guest");
    fixture.event_loop.run_ready().unwrap();
    assert_eq!(fixture.stream.receive(&mut typed), 9);
    let mut said = [0; 17];
    client.read_exact(&mut said).unwrap();
    assert_eq!(&said, b"said by the guest");
}

#[test]
fn a_stream_whose_bytes_nobody_reads_or_takes_goes_on() {
    let mut fixture = Fixture::new();
    let mut client = fixture.connect();
    fixture.exchange(&mut client, &call("Attach", ", \"upgrade\": true"));
    for _ in 0..1000 {
        assert_eq!(fixture.stream.send(&[b'x'; 4096]), 4096);
        fixture.event_loop.run_ready().unwrap();
    }
    // More than stream and sockets take.
    let mut written = 0;
    while let Ok(count) = client.write(&[b'y'; 4096]) {
        written += count;
        fixture.event_loop.run_ready().unwrap();
    }
    let mut taken = 0;
    loop {
        fixture.event_loop.run_ready().unwrap();
        match fixture.stream.receive(&mut [0; 4096]) {
            0 => break,
            count => taken += count,
        }
    }
    assert_eq!(taken, written, "nothing that was typed is lost");
    // Much is there to read before the end, which the last bytes of the guest are.
    fixture.stream.send(b"last words");
    let mut said = Vec::new();
    while !said.ends_with(b"last words") {
        fixture.event_loop.run_ready().unwrap();
        let _ = client.read_to_end(&mut said);
    }
    drop(client);
    fixture.event_loop.run_ready().unwrap();
    assert!(fixture.stream.has_room());
}
