//! Does much arrive as it was sent? Lines of a pattern that go through each path of the network and
//! are compared as they come, whatever the amount.

use std::env;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::thread::{self, JoinHandle};

use anyhow::{Context, Result, anyhow, ensure};
use tests::emulated_host;
use tests::guest::Guest;

/// How the guest makes the pattern.
const PATTERN: &str = "yes nixvmm";

/// What it consists of: neither powers of two nor segments are multiples of its length, so that
/// lost and swapped parts are seen.
const LINE: &[u8] = b"nixvmm\n";

pub(crate) const MEBIBYTE: usize = 1 << 20;

/// What goes through each path in each direction: as many mebibytes as this variable says, or a
/// gibibyte, for which an emulated host would need hours.
const AMOUNT: &str = "NIXVMM_TEST_MIB";
const AMOUNT_DEFAULT: usize = 1024 * MEBIBYTE;
const AMOUNT_EMULATED: usize = 2 * MEBIBYTE;

/// Bytes that are compared at once.
const CHUNK: usize = LINE.len() * 8192;

/// Bytes that go through each path in each direction.
pub(crate) fn amount() -> usize {
    wanted().unwrap_or(AMOUNT_EMULATED)
}

/// The same for paths that have carried some already: nothing in an emulated host, unless somebody
/// asks for an amount.
pub(crate) fn wanted() -> Option<usize> {
    match env::var(AMOUNT) {
        Ok(mebibytes) => {
            let mebibytes: usize = mebibytes.parse().expect("NIXVMM_TEST_MIB is a number");
            mebibytes.checked_mul(MEBIBYTE)
        }
        Err(_) => (!emulated_host::is_inside()).then_some(AMOUNT_DEFAULT),
    }
}

/// Writes `bytes` of the pattern.
pub(crate) fn write(stream: &mut impl Write, bytes: usize) -> Result<()> {
    let chunk = LINE.repeat(CHUNK / LINE.len());
    let mut left = bytes;
    while left > 0 {
        let part = chunk.get(..left).unwrap_or(&chunk);
        stream.write_all(part)?;
        left -= part.len();
    }
    Ok(())
}

/// Reads to the end, and expects `bytes` of the pattern.
pub(crate) fn check(stream: &mut impl Read, bytes: usize) -> Result<()> {
    let expected = LINE.repeat(CHUNK / LINE.len() + 1);
    let mut chunk = vec![0; CHUNK];
    let mut done = 0;
    loop {
        let length = stream.read(&mut chunk)?;
        if length == 0 {
            break;
        }
        let start = done % LINE.len();
        let is_right = chunk.get(..length) == expected.get(start..start + length);
        ensure!(is_right, "of {bytes} bytes others came after {done}");
        done += length;
    }
    ensure!(done == bytes, "{done} of {bytes} bytes came");
    Ok(())
}

/// The guest sends `bytes` to `listener`, which it reaches at `address`, over four connections.
pub(crate) fn sends(
    guest: &mut Guest,
    address: &str,
    listener: &TcpListener,
    bytes: usize,
) -> Result<()> {
    let parts = 4;
    let part = bytes / parts;
    let (port, received) = serve(listener, parts, move |stream| check(stream, part))?;
    let part = format!("{PATTERN} | head -c {part} | nc {address} {port}");
    guest.run(&format!("for i in 1 2 3 4; do ({part}) & done; wait"))?;
    let received = received.join().map_err(|_| anyhow!("the receiver panicked"))?;
    received.with_context(|| format!("from the guest to {address}"))
}

/// The guest receives `bytes` from `listener`, which it reaches at `address`.
pub(crate) fn receives(
    guest: &mut Guest,
    address: &str,
    listener: &TcpListener,
    bytes: usize,
) -> Result<()> {
    let (port, sent) = serve(listener, 1, move |stream| write(stream, bytes))?;
    let sums = guest.run(&format!(
        "nc {address} {port} < /dev/null | sha256sum; {PATTERN} | head -c {bytes} | sha256sum"
    ))?;
    sent.join().map_err(|_| anyhow!("the sender panicked"))??;
    let sums: Vec<&str> = sums.lines().collect();
    let is_whole = sums.len() == 2 && sums.first() == sums.get(1);
    ensure!(is_whole, "from {address} to the guest: sums of what came: {sums:?}");
    Ok(())
}

/// Serves so many connections, each on its own thread; returns the port.
fn serve(
    listener: &TcpListener,
    connections: usize,
    serve_one: impl Fn(&mut TcpStream) -> Result<()> + Send + Sync + Clone + 'static,
) -> Result<(u16, JoinHandle<Result<()>>)> {
    let port = listener.local_addr()?.port();
    let listener = listener.try_clone()?;
    let thread = thread::spawn(move || {
        let mut threads = Vec::new();
        for _ in 0..connections {
            let (mut stream, _) = listener.accept()?;
            let serve_one = serve_one.clone();
            threads.push(thread::spawn(move || serve_one(&mut stream)));
        }
        threads.into_iter().try_for_each(|thread| {
            thread.join().map_err(|_| anyhow!("a connection's thread panicked"))?
        })
    });
    Ok((port, thread))
}
