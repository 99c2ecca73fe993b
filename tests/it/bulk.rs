//! Does much arrive as it was sent? A pattern goes through each path of the network and is compared
//! as it comes, whatever the amount.

use std::env;
use std::net::{IpAddr, TcpListener, TcpStream};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use tests::emulated_host;
use tests::guest::{Guest, Launch, PATIENCE};
use tests::pattern;
use tests::testbed::Testbed;
use tests::tool::progress;

pub(crate) const MEBIBYTE: u64 = 1 << 20;

/// What goes through each path in each direction: as many mebibytes as this variable says, or a
/// gibibyte, for which an emulated host needs minutes.
const AMOUNT: &str = "NIXVMM_TEST_MIB";
const AMOUNT_DEFAULT: u64 = 1024 * MEBIBYTE;
const AMOUNT_EMULATED: u64 = 2 * MEBIBYTE;

/// What a wanted mebibyte may take in addition, on the slowest path of an emulated host.
const PATIENCE_OF_MEBIBYTE: Duration = Duration::from_secs(2);

/// Either end of a connection, where the guest has it.
pub(crate) const STREAM_END: &str = "/run/stream-end";

/// Bytes that go through each path in each direction.
pub(crate) fn amount() -> u64 {
    wanted().unwrap_or(AMOUNT_EMULATED)
}

/// The same for paths that have carried some already: nothing in an emulated host, unless somebody
/// asks for an amount.
pub(crate) fn wanted() -> Option<u64> {
    asked_for().or_else(|| (!emulated_host::is_inside()).then_some(AMOUNT_DEFAULT))
}

/// What somebody's amount takes longer than ours.
pub(crate) fn longer() -> Duration {
    let mebibytes = asked_for().map_or(0, |bytes| bytes / MEBIBYTE);
    PATIENCE_OF_MEBIBYTE.saturating_mul(u32::try_from(mebibytes).unwrap_or(u32::MAX))
}

fn asked_for() -> Option<u64> {
    let mebibytes = env::var(AMOUNT).ok()?;
    let mebibytes: u64 = mebibytes.parse().expect("NIXVMM_TEST_MIB is a number");
    mebibytes.checked_mul(MEBIBYTE)
}

/// The tiny guest with a disk that is the program of [`STREAM_END`], and time for what is asked.
pub(crate) fn launch(testbed: &Testbed) -> Launch {
    Launch::tiny(testbed, &testbed.bzimage)
        .arguments(["--disk", &format!("path={},readonly", testbed.stream_end.display())])
        .patience(PATIENCE.saturating_add(longer()))
}

/// Makes a program of the guest's first disk.
pub(crate) fn install(guest: &mut Guest) -> Result<()> {
    let copy = format!("dd if=/dev/vda of={STREAM_END} bs=64k && chmod +x {STREAM_END}");
    guest.run(&copy).map(drop)
}

/// Pings and connections of IPv4 and IPv6, both ways and several at once, with every byte checked.
pub(crate) fn carries_everything(guest: &mut Guest, network: u8, bytes: u64) -> Result<()> {
    let (four, six) = (format!("10.{network}.0.1"), format!("fd{network}::1"));
    guest.run(&format!("ping -c 1 {four} && ping -c 1 {six}"))?;
    for (address, bytes) in [(&four, bytes), (&six, bytes / 4)] {
        let place: IpAddr = address.parse()?;
        let listener = TcpListener::bind((place, 0)).context("the host's address is not there")?;
        sends(guest, address, &listener, bytes)?;
        receives(guest, address, &listener, bytes)?;
    }
    Ok(())
}

/// The guest sends `bytes` to `listener`, which it reaches at `address`, over four connections, or
/// over one where somebody asked for an amount.
pub(crate) fn sends(
    guest: &mut Guest,
    address: &str,
    listener: &TcpListener,
    bytes: u64,
) -> Result<()> {
    // Processors that share one, as those of an emulated host's guest, wait for one another.
    let parts = if asked_for().is_some() { 1 } else { 4 };
    let part = bytes / parts;
    let start = Instant::now();
    let (port, received) = serve(listener, parts, move |stream| Ok(pattern::check(stream, part)?))?;
    let send = format!("{STREAM_END} send {address} {port} {part}");
    let said = guest.run(&format!("for i in $(seq {parts}); do {send} & done; wait"))?;
    let received = received.join().map_err(|_| anyhow!("the receiver panicked"))?;
    received.with_context(|| format!("from the guest to {address}; its programs said: {said}"))?;
    report(&format!("from the guest to {address}"), bytes, start);
    Ok(())
}

/// The guest receives `bytes` from `listener`, which it reaches at `address`.
pub(crate) fn receives(
    guest: &mut Guest,
    address: &str,
    listener: &TcpListener,
    bytes: u64,
) -> Result<()> {
    receives_in_pieces(guest, address, listener, bytes, 1)
}

/// The same in so many connections, one after the other, that bring a part each.
pub(crate) fn receives_in_pieces(
    guest: &mut Guest,
    address: &str,
    listener: &TcpListener,
    bytes: u64,
    pieces: u64,
) -> Result<()> {
    let start = Instant::now();
    let piece = bytes / pieces;
    let (port, sent) = serve(listener, pieces, move |stream| Ok(pattern::write(stream, piece)?))?;
    let receive = format!("{STREAM_END} receive {address} {port} {piece}");
    guest.run(&format!("for i in $(seq {pieces}); do {receive} || exit 1; done"))?;
    sent.join().map_err(|_| anyhow!("the sender panicked"))??;
    report(&format!("from {address} to the guest"), bytes, start);
    Ok(())
}

/// Tells who asked for an amount what has gone where since `start`.
pub(crate) fn report(way: &str, bytes: u64, start: Instant) {
    if asked_for().is_some() {
        let mebibytes = bytes / MEBIBYTE;
        progress(&format!("{mebibytes} MiB {way}, all right, in {} s", start.elapsed().as_secs()));
    }
}

/// Serves so many connections, each on its own thread; returns the port.
fn serve(
    listener: &TcpListener,
    connections: u64,
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
