//! Control calls: bytes that come in pieces, as a client that wants harm may send them.
#![no_main]

use libfuzzer_sys::fuzz_target;
use serde_json::json;
use vmm::control::{Answer, Call, Inbox, Interface, MESSAGE_BYTES_MAX, Verb};
use vmm::control::{MACHINE_INTERFACE, MACHINE_INTERFACE_NAME};

const INTERFACE: Interface<u64> = Interface {
    name: MACHINE_INTERFACE_NAME,
    description: MACHINE_INTERFACE,
    verbs: &[Verb {
        name: "GetState",
        parameters: &["text", "number", "switch", "file"],
        streams: false,
        serve: |calls, request| {
            request.optional_text("text")?;
            request.number("number")?;
            request.switch("switch")?;
            *calls += 1;
            request.file("file")?;
            Ok(Answer::Done(json!({})))
        },
    }],
};

fuzz_target!(|pieces: Vec<&[u8]>| {
    let (mut inbox, mut calls) = (Inbox::default(), 0);
    for piece in pieces {
        inbox.push(piece);
        loop {
            match inbox.take() {
                Ok(Some(message)) => {
                    assert!(message.len() <= MESSAGE_BYTES_MAX && !message.contains(&0));
                    let Ok(call) = Call::parse(&message) else { return };
                    if let Err(refusal) = INTERFACE.serve(&mut calls, call, None) {
                        let (error, parameters) = refusal.parts();
                        assert!(
                            error.starts_with("org.varlink.service.") && parameters.is_object()
                        );
                    }
                }
                Ok(None) => break,
                Err(_) => return,
            }
        }
    }
});
