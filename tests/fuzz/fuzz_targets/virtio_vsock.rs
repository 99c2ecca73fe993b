//! Whatever a driver does with a socket device, and programs of the host at the same time, it works
//! after a reset.
#![no_main]

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::OnceLock;

use arbitrary::Arbitrary;
use devices::host::vsock::Gate;
use devices::virtio::vsock::Vsock;
use fuzz::virtio::{Descriptor, Step, drive};
use libfuzzer_sys::fuzz_target;

const CID: u32 = 3;
/// Where headers are put for descriptors to find.
const HEADERS: u32 = 0x400;
/// Where a program listens.
const PORT: u32 = 9;

/// One thing that a driver of socket devices does.
#[derive(Arbitrary, Debug)]
enum SocketStep {
    /// Anything that can be done to any device.
    Any(Step),
    /// Sends a packet that is nearly right.
    Packet { ports: u8, operation: u8, flags: u8, len: u16, sent_len: u16, space: u32, taken: u32 },
    /// Provides a buffer.
    Buffer { head: u8, len: u16 },
}

fuzz_target!(|input: (Vec<u8>, u8, bool, Vec<SocketStep>)| {
    let (line, callers, listens, steps) = input;
    let gate = Gate::at(&path("")).unwrap();
    let listener = listens.then(|| {
        let name = path(&format!("_{PORT}"));
        let _ = std::fs::remove_file(&name);
        let listener = UnixListener::bind(name).unwrap();
        listener.set_nonblocking(true).unwrap();
        listener
    });
    let mut programs: Vec<_> = (0..callers % 4).map(|number| call(number, &line)).collect();
    let steps: Vec<_> = steps.into_iter().flat_map(expand).collect();
    drive(|home| Box::new(Vsock::new(CID, gate, home)), &steps);
    while let Some(Ok((program, _))) = listener.as_ref().map(UnixListener::accept) {
        program.set_nonblocking(true).unwrap();
        programs.push(program);
    }
    for program in &mut programs {
        // Neither need be complete.
        let _ = program.write(&line);
        let _ = program.read_to_end(&mut Vec::new());
    }
});

fn path(suffix: &str) -> PathBuf {
    static PATH: OnceLock<String> = OnceLock::new();
    let path = PATH.get_or_init(|| {
        let name = format!("fuzz-vsock-{}", std::process::id());
        std::env::temp_dir().join(name).to_str().unwrap().to_owned()
    });
    format!("{path}{suffix}").into()
}

/// A program of the host that asks for a port of the guest, or says what the input says.
fn call(number: u8, line: &[u8]) -> UnixStream {
    let mut program = UnixStream::connect(path("")).unwrap();
    program.set_nonblocking(true).unwrap();
    if number != 0 {
        let _ = writeln!(program, "CONNECT {number}");
    }
    let _ = program.write(line);
    program
}

fn expand(step: SocketStep) -> Vec<Step> {
    match step {
        SocketStep::Any(step) => vec![step],
        SocketStep::Packet { ports, operation, flags, len, sent_len, space, taken } => {
            let (guest_port, host_port) = match ports % 4 {
                0 => (1000, PORT),
                1 => (1001, PORT),
                // What programs of the host are given.
                other => (u32::from(other) - 1, (1 << 30) + u32::from(ports >> 4)),
            };
            let at = HEADERS;
            let words = [
                u64::from(CID),
                2,
                u64::from(guest_port) | u64::from(host_port) << 32,
                u64::from(len) | 1 << 32 | u64::from(operation % 9) << 48,
                u64::from(flags) | u64::from(space) << 32,
                u64::from(taken),
            ];
            let write = |(index, word): (u32, u64)| Step::Write {
                address: at + 8 * index,
                bytes: word.to_le_bytes(),
            };
            let mut steps: Vec<_> = (0..).zip(words).map(write).collect();
            let descriptors =
                vec![Descriptor::new(at, 44, 1), Descriptor::new(at + 44, sent_len, 0)];
            steps.push(Step::Send { queue: 1, head: 0, descriptors });
            steps.push(Step::Settle);
            steps
        }
        SocketStep::Buffer { head, len } => {
            let descriptors = vec![Descriptor::new(0x8000, len, 2)];
            vec![Step::Send { queue: 0, head, descriptors }]
        }
    }
}
