//! Whatever a driver does with a console, it works after a reset.
#![no_main]

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Mutex, OnceLock};

use devices::host::stream::Stream;
use devices::virtio::console::Console;
use fuzz::virtio::{Step, build_home, drive};
use libfuzzer_sys::fuzz_target;

/// The console's stream, and the client at its other end.
fn ends() -> &'static Mutex<(Stream, UnixStream)> {
    static ENDS: OnceLock<Mutex<(Stream, UnixStream)>> = OnceLock::new();
    ENDS.get_or_init(|| {
        let path = std::env::temp_dir().join(format!("fuzz-console-{}", std::process::id()));
        let socket = path.clone();
        let (_, stream) =
            build_home(move |event_loop| Stream::socket(event_loop, &socket).unwrap());
        let client = UnixStream::connect(&path).unwrap();
        std::fs::remove_file(path).unwrap();
        client.set_nonblocking(true).unwrap();
        Mutex::new((stream, client))
    })
}

fuzz_target!(|input: (&[u8], bool, Vec<Step>)| {
    let (typed, is_read, steps) = input;
    let mut ends = ends().lock().unwrap();
    let stream = ends.0.clone();
    // Neither need be complete: the socket may be full or empty.
    let _ = ends.1.write(typed);
    if is_read {
        let _ = ends.1.read_to_end(&mut Vec::new());
    }
    drive(|home| Box::new(Console::new(stream, home)), &steps);
});
