//! Streams with real pipes, sockets, terminals and files.

use std::fs::File;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use rustix::fs::OFlags;
use rustix::pty::OpenptFlags;
use rustix::termios::{OptionalActions, Termios};

use super::*;

/// A test that waits longer has failed; nothing is measured by it.
const PATIENCE: Duration = Duration::from_secs(60);

impl Stream {
    /// Puts bytes into the input, as an endpoint does.
    pub(crate) fn type_in(&self, bytes: &[u8]) {
        self.shared.put_input(bytes);
    }

    /// Sets the size of the window, as an endpoint does.
    pub(crate) fn resize(&self, columns: u16, rows: u16) {
        self.shared.set_window_size(WindowSize { columns, rows });
    }
}

/// A stream with pipes for files, and the other ends of the pipes.
struct Piped {
    event_loop: EventLoop,
    stream: Stream,
    typing: Option<File>,
    screen: File,
    quits: Receiver<()>,
}

fn pipe() -> (File, File) {
    let (reader, writer) = io::pipe().unwrap();
    (OwnedFd::from(reader).into(), OwnedFd::from(writer).into())
}

fn piped() -> Piped {
    let (input, typing) = pipe();
    let (screen, output) = pipe();
    let mut event_loop = EventLoop::new().unwrap();
    let (stream, quits) = inherited(&mut event_loop, input.as_fd(), output.as_fd());
    rustix::io::ioctl_fionbio(&screen, true).unwrap();
    Piped { event_loop, stream, typing: Some(typing), screen, quits }
}

fn inherited(
    event_loop: &mut EventLoop,
    input: std::os::fd::BorrowedFd<'_>,
    output: std::os::fd::BorrowedFd<'_>,
) -> (Stream, Receiver<()>) {
    let (sender, quits) = channel();
    let quit = Box::new(move || sender.send(()).unwrap());
    (Stream::inherited(event_loop, input, output, quit).unwrap(), quits)
}

/// Bytes that show when some are lost, doubled or moved.
fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|index| u8::try_from((index * 7 + index / 251) % 251).unwrap()).collect()
}

/// All input that is there now.
fn received(stream: &Stream) -> Vec<u8> {
    let mut bytes = vec![0; INPUT_BYTES_MAX];
    let count = stream.receive(&mut bytes);
    bytes.truncate(count);
    bytes
}

/// Everything that a non-blocking file has now.
fn read_all(file: &mut impl Read) -> Vec<u8> {
    let mut bytes = Vec::new();
    match file.read_to_end(&mut bytes) {
        Ok(_) => bytes,
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => bytes,
        Err(error) => panic!("{error}"),
    }
}

/// Runs the loop until `done`: terminals pass bytes on by and by.
fn run_until(event_loop: &mut EventLoop, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !done() {
        event_loop.run_ready().unwrap();
        std::thread::yield_now();
        assert!(Instant::now() < end, "nothing happens");
    }
}

#[test]
fn bytes_pass_both_ways_and_the_device_is_told() {
    let Piped { mut event_loop, stream, typing, mut screen, quits } = piped();
    assert_eq!(stream.send(b"login: "), 7);
    typing.as_ref().unwrap().write_all(b"root\x01x\n").unwrap();
    event_loop.run_ready().unwrap();
    assert_eq!(read_all(&mut screen), b"login: ");
    assert!(stream.attention().take());
    assert!(stream.has_input());
    assert_eq!(received(&stream), b"root\x01x\n", "a pipe has no escape keys");
    assert!(!stream.has_input());
    assert!(quits.try_recv().is_err());
}

#[test]
fn a_slow_reader_loses_nothing_and_costs_a_bounded_amount_of_memory() {
    let Piped { mut event_loop, stream, mut screen, .. } = piped();
    let all = pattern(1 << 20);
    let (mut sent, mut seen) = (0, Vec::new());
    while seen.len() < all.len() {
        loop {
            let count = stream.send(&all[sent..all.len().min(sent + 1000)]);
            sent += count;
            event_loop.run_ready().unwrap();
            if count == 0 {
                break;
            }
        }
        let state = stream.shared.state();
        assert!(state.output.len() + state.output_in_hand <= OUTPUT_BYTES_MAX);
        drop(state);
        assert!(!stream.has_room() || sent == all.len());
        stream.attention().take();
        let mut some = vec![0; 3 * OUTPUT_BYTES_MAX];
        let count = screen.read(&mut some).unwrap();
        seen.extend_from_slice(&some[..count]);
        event_loop.run_ready().unwrap();
        assert!(sent == all.len() || stream.attention().take(), "the device learns of the room");
    }
    assert!(seen == all);
}

#[test]
fn input_waits_for_a_slow_guest_and_none_is_lost() {
    let Piped { mut event_loop, stream, typing, .. } = piped();
    let all = pattern(1 << 20);
    let writer = std::thread::spawn({
        let (all, mut typing) = (all.clone(), typing);
        move || typing.take().unwrap().write_all(&all).unwrap()
    });
    let mut seen = Vec::new();
    run_until(&mut event_loop, || {
        assert!(stream.shared.state().input.len() <= INPUT_BYTES_MAX);
        let mut some = [0; 999];
        let count = stream.receive(&mut some);
        seen.extend_from_slice(&some[..count]);
        seen.len() == all.len()
    });
    writer.join().unwrap();
    assert!(seen == all);
}

#[test]
fn the_end_of_the_input_does_not_end_the_output() {
    let Piped { mut event_loop, stream, typing, mut screen, .. } = piped();
    typing.as_ref().unwrap().write_all(b"last").unwrap();
    drop(typing);
    event_loop.run_ready().unwrap();
    assert_eq!(received(&stream), b"last");
    stream.send(b"still here");
    event_loop.run_ready().unwrap();
    assert_eq!(read_all(&mut screen), b"still here");
}

#[test]
fn a_reader_that_is_gone_for_good_stops_neither_guest_nor_input() {
    let Piped { mut event_loop, stream, typing, screen, .. } = piped();
    drop(screen);
    for _ in 0..100 {
        assert_eq!(stream.send(&[0; 4096]), 4096);
        event_loop.run_ready().unwrap();
    }
    typing.as_ref().unwrap().write_all(b"typed").unwrap();
    event_loop.run_ready().unwrap();
    assert_eq!(received(&stream), b"typed");
}

#[test]
fn a_device_that_waits_for_a_reader_goes_on_when_the_reader_is_gone() {
    let Piped { mut event_loop, stream, screen, .. } = piped();
    while stream.send(&[0; 4096]) > 0 {
        event_loop.run_ready().unwrap();
    }
    stream.attention().take();
    drop(screen);
    event_loop.run_ready().unwrap();
    assert!(stream.attention().take());
    assert!(stream.has_room());
}

#[test]
fn input_may_be_a_regular_file_or_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("typed");
    let all = pattern(5 * INPUT_BYTES_MAX + 1);
    std::fs::write(&path, &all).unwrap();
    let null = File::options().read(true).write(true).open("/dev/null").unwrap();
    for (input, wanted) in [(File::open(&path).unwrap(), &all[..]), (null, &[])] {
        let mut event_loop = EventLoop::new().unwrap();
        let (_screen, output) = pipe();
        let (stream, _quits) = inherited(&mut event_loop, input.as_fd(), output.as_fd());
        let mut seen = Vec::new();
        while stream.has_input() {
            seen.extend(received(&stream));
            event_loop.run_ready().unwrap();
        }
        assert!(seen == wanted);
    }
}

#[test]
fn sockets_may_be_standard_input_and_output() {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    theirs.set_nonblocking(true).unwrap();
    let mut event_loop = EventLoop::new().unwrap();
    let (stream, _quits) = inherited(&mut event_loop, ours.as_fd(), ours.as_fd());
    stream.send(b"out");
    theirs.write_all(b"in").unwrap();
    event_loop.run_ready().unwrap();
    assert_eq!((received(&stream), read_all(&mut theirs)), (b"in".to_vec(), b"out".to_vec()));
}

/// A terminal: what the user has, and what a program has as its standard input and output.
fn terminal() -> (File, OwnedFd) {
    let user = rustix::pty::openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
    rustix::pty::unlockpt(&user).unwrap();
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY;
    let program = rustix::pty::ioctl_tiocgptpeer(&user, flags).unwrap();
    let mut modes = rustix::termios::tcgetattr(&program).unwrap();
    modes.make_raw();
    rustix::termios::tcsetattr(&program, OptionalActions::Now, &modes).unwrap();
    rustix::io::ioctl_fionbio(&user, true).unwrap();
    (user.into(), program)
}

fn modes(file: &OwnedFd) -> (OFlags, String) {
    let modes: Termios = rustix::termios::tcgetattr(file).unwrap();
    (rustix::fs::fcntl_getfl(file).unwrap(), format!("{modes:?}"))
}

#[test]
fn a_terminal_has_escape_keys_and_keeps_its_modes() {
    let (mut user, program) = terminal();
    let before = modes(&program);
    let mut event_loop = EventLoop::new().unwrap();
    let (stream, quits) = inherited(&mut event_loop, program.as_fd(), program.as_fd());
    assert_eq!(modes(&program), before, "others share this terminal");

    user.write_all(b"ls\x01h\x01\x01\x01x\n").unwrap();
    let mut typed = Vec::new();
    run_until(&mut event_loop, || {
        typed.extend(received(&stream));
        typed.ends_with(b"\n")
    });
    assert_eq!(typed, b"ls\x01\n");
    assert_eq!(quits.try_iter().count(), 1);
    stream.send(b"$ ");
    let mut shown = Vec::new();
    run_until(&mut event_loop, || {
        shown.extend(read_all(&mut user));
        shown.ends_with(b"$ ")
    });
    let help = String::from_utf8(shown).unwrap();
    assert!(help.contains("Ctrl-A x"), "{help}");

    drop((event_loop, stream));
    assert_eq!(modes(&program), before);
}

#[test]
fn escape_keys_work_when_the_guest_takes_no_input() {
    let (mut user, program) = terminal();
    let mut event_loop = EventLoop::new().unwrap();
    let (stream, quits) = inherited(&mut event_loop, program.as_fd(), program.as_fd());
    for _ in 0..100 {
        user.write_all(b"why does it not answer?\r").unwrap();
        event_loop.run_ready().unwrap();
    }
    user.write_all(b"\x01x").unwrap();
    run_until(&mut event_loop, || quits.try_recv().is_ok());
    drop(stream);
}

/// A stream with a socket, and its path.
fn listening(directory: &Path) -> (EventLoop, Stream, std::path::PathBuf) {
    let path = directory.join("console.sock");
    let mut event_loop = EventLoop::new().unwrap();
    let stream = Stream::socket(&mut event_loop, &path).unwrap();
    (event_loop, stream, path)
}

fn join(path: &Path) -> UnixStream {
    let client = UnixStream::connect(path).unwrap();
    client.set_nonblocking(true).unwrap();
    client
}

#[test]
fn clients_join_leave_and_join_again() {
    let directory = tempfile::tempdir().unwrap();
    let (mut event_loop, stream, path) = listening(directory.path());
    for round in 0..3 {
        let words = format!("nobody hears {round}");
        stream.send(words.as_bytes());
        event_loop.run_ready().unwrap();
        let mut client = join(&path);
        client.write_all(b"hello").unwrap();
        event_loop.run_ready().unwrap();
        assert_eq!(read_all(&mut client), words.as_bytes());
        assert_eq!(received(&stream), b"hello");
        stream.send(b"welcome");
        event_loop.run_ready().unwrap();
        assert_eq!(read_all(&mut client), b"welcome");
        drop(client);
        event_loop.run_ready().unwrap();
    }
}

#[test]
fn the_last_output_is_kept_for_the_next_client() {
    let directory = tempfile::tempdir().unwrap();
    let (mut event_loop, stream, path) = listening(directory.path());
    let all = pattern(5 * OUTPUT_BYTES_MAX + 17);
    for piece in all.chunks(1000) {
        assert_eq!(stream.send(piece), piece.len(), "nobody listens and the guest goes on");
        event_loop.run_ready().unwrap();
        assert!(stream.shared.state().output.len() <= OUTPUT_BYTES_MAX);
    }
    let mut client = join(&path);
    let mut seen = Vec::new();
    while seen.len() < OUTPUT_BYTES_MAX {
        event_loop.run_ready().unwrap();
        seen.extend(read_all(&mut client));
    }
    assert!(seen == all[all.len() - OUTPUT_BYTES_MAX..]);
}

#[test]
fn a_slow_client_stops_the_device_until_it_reads_or_leaves() {
    let directory = tempfile::tempdir().unwrap();
    let (mut event_loop, stream, path) = listening(directory.path());
    let client = join(&path);
    event_loop.run_ready().unwrap();
    while stream.send(&[7; 4096]) > 0 {
        event_loop.run_ready().unwrap();
    }
    stream.attention().take();
    drop(client);
    event_loop.run_ready().unwrap();
    assert!(stream.attention().take());
    stream.send(b"end");
    let mut client = join(&path);
    let mut seen = Vec::new();
    while !seen.ends_with(b"end") {
        event_loop.run_ready().unwrap();
        seen.extend(read_all(&mut client));
    }
    assert_eq!(seen.len(), OUTPUT_BYTES_MAX, "what the first client did not take is not lost");
}

#[test]
fn a_second_client_waits_for_its_turn() {
    let directory = tempfile::tempdir().unwrap();
    let (mut event_loop, stream, path) = listening(directory.path());
    let mut first = join(&path);
    let mut second = join(&path);
    second.write_all(b"second").unwrap();
    stream.send(b"to the first");
    event_loop.run_ready().unwrap();
    assert_eq!(read_all(&mut first), b"to the first");
    assert_eq!(read_all(&mut second), b"");
    assert_eq!(received(&stream), b"");
    drop(first);
    event_loop.run_ready().unwrap();
    stream.send(b"to the second");
    event_loop.run_ready().unwrap();
    assert_eq!(read_all(&mut second), b"to the second");
    assert_eq!(received(&stream), b"second");
}

#[test]
fn a_client_that_only_sends_is_heard_after_it_has_left() {
    let directory = tempfile::tempdir().unwrap();
    let (mut event_loop, stream, path) = listening(directory.path());
    stream.send(b"output that it does not wait for");
    let all = pattern(3 * INPUT_BYTES_MAX);
    let mut client = UnixStream::connect(&path).unwrap();
    client.write_all(&all).unwrap();
    drop(client);
    let mut seen = Vec::new();
    run_until(&mut event_loop, || {
        seen.extend(received(&stream));
        seen.len() >= all.len()
    });
    assert!(seen == all);
    let mut next = join(&path);
    next.write_all(b"next").unwrap();
    event_loop.run_ready().unwrap();
    assert_eq!(received(&stream), b"next");
}

#[test]
fn a_client_that_ends_its_input_still_gets_the_output() {
    let directory = tempfile::tempdir().unwrap();
    let (mut event_loop, stream, path) = listening(directory.path());
    let mut client = join(&path);
    client.write_all(b"uname\n").unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    event_loop.run_ready().unwrap();
    assert_eq!(received(&stream), b"uname\n");
    stream.send(b"Linux\n");
    event_loop.run_ready().unwrap();
    assert_eq!(read_all(&mut client), b"Linux\n");
    drop(client);
    event_loop.run_ready().unwrap();
    let mut next = join(&path);
    stream.send(b"$ ");
    event_loop.run_ready().unwrap();
    assert_eq!(read_all(&mut next), b"$ ");
}

#[test]
fn only_a_socket_that_nobody_listens_on_is_replaced() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let mut event_loop = EventLoop::new().unwrap();
    let live = UnixListener::bind(&path).unwrap();
    let refused = Stream::socket(&mut event_loop, &path).map(drop).unwrap_err();
    assert_eq!(refused.kind(), io::ErrorKind::AddrInUse);
    drop(live);
    let stream = Stream::socket(&mut event_loop, &path).unwrap();
    assert!(UnixStream::connect(&path).is_ok());
    drop(stream);
    event_loop.run_ready().unwrap();
    assert!(!path.exists(), "the socket ends with its stream");
    let file = directory.path().join("file");
    std::fs::write(&file, "precious").unwrap();
    assert!(Stream::socket(&mut event_loop, &file).is_err());
    assert_eq!(std::fs::read(&file).unwrap(), b"precious");
}

fn open_terminal(path: &Path) -> File {
    use std::os::unix::fs::OpenOptionsExt;
    let flags = libc::O_NOCTTY | libc::O_NONBLOCK;
    File::options().read(true).write(true).custom_flags(flags).open(path).unwrap()
}

#[test]
fn programs_open_and_close_a_pseudoterminal() {
    let directory = tempfile::tempdir().unwrap();
    let link = directory.path().join("console");
    std::os::unix::fs::symlink("/nowhere", &link).unwrap();
    let mut event_loop = EventLoop::new().unwrap();
    let (stream, path) = Stream::pty(&mut event_loop, Some(&link)).unwrap();
    assert_eq!(std::fs::read_link(&link).unwrap(), path);
    for round in 0..3 {
        let words = format!("nobody\r\nreads {round}");
        stream.send(words.as_bytes());
        event_loop.run_ready().unwrap();
        let mut program = open_terminal(&link);
        let mut shown = Vec::new();
        run_until(&mut event_loop, || {
            shown.extend(read_all(&mut program));
            shown.len() >= words.len()
        });
        assert_eq!(shown, words.as_bytes(), "nothing is lost and nothing is translated");
        program.write_all(b"ls\r\x03").unwrap();
        let mut typed = Vec::new();
        run_until(&mut event_loop, || {
            typed.extend(received(&stream));
            typed.len() >= 4
        });
        assert_eq!(typed, b"ls\r\x03");
        drop(program);
        event_loop.run_ready().unwrap();
    }
    drop(event_loop);
    assert!(!link.is_symlink(), "the link ends with the loop");
}

#[test]
fn a_pseudoterminal_that_nobody_opens_costs_a_bounded_amount_of_memory() {
    let mut event_loop = EventLoop::new().unwrap();
    let (stream, path) = Stream::pty(&mut event_loop, None).unwrap();
    for _ in 0..100 {
        assert_eq!(stream.send(&[b'x'; 4096]), 4096, "the guest goes on");
        event_loop.run_ready().unwrap();
    }
    stream.send(b"end");
    assert_eq!(stream.shared.state().output.len(), OUTPUT_BYTES_MAX);
    let mut program = open_terminal(&path);
    let mut shown = Vec::new();
    run_until(&mut event_loop, || {
        shown.extend(read_all(&mut program));
        shown.ends_with(b"end")
    });
    assert_eq!(shown.len(), OUTPUT_BYTES_MAX);
}
