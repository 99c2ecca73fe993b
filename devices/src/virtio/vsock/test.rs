use std::collections::VecDeque;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::thread;

use tempfile::TempDir;
use zerocopy::{FromBytes, IntoBytes};

use super::Vsock;
use super::connection::BUFFER_SPACE;
use super::muxer::RESETS_MAX;
use super::packet::{
    CID_HOST, HEADER_LEN, Header, Route, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, TYPE_STREAM, operation,
};
use crate::host::vsock::Gate;
use crate::test::LoopThread;
use crate::test::driver::{self, Driver, Sent};
use crate::test::hostile::Subject;
use crate::test::pci_wire::PciWire;
use crate::virtio::counters::Counters;
use crate::virtio::device::VirtioDevice as _;

const CID: u32 = 7;
/// What the guest says about its buffers, unless a test says otherwise.
const SPACE: u32 = 64 << 10;
/// Buffers that the guest provides.
const BUFFERS: usize = 64;
const GUEST_PORT: u32 = 5000;

/// A guest with a socket device, and the folder of its sockets on the host.
struct Guest {
    driver: Driver,
    buffers: VecDeque<Sent>,
    folder: TempDir,
    counters: Counters,
    home: LoopThread,
}

/// One end of a connection in the guest.
#[derive(Clone, Copy)]
struct End {
    route: Route,
    space: u32,
    /// Bytes that were sent, that were received, and what the host said of the former.
    sent: u32,
    received: u32,
    host_space: u32,
    host_forwarded: u32,
}

impl Guest {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let home = LoopThread::new();
        let gate = Gate::at(&folder.path().join("gate")).unwrap();
        let vsock = Vsock::new(CID, gate, home.handle());
        let counters = vsock.counters().unwrap();
        let mut driver = Driver::pci(Box::new(vsock));
        driver.start();
        Self { driver, buffers: VecDeque::new(), folder, counters, home }
    }

    fn with_buffers() -> Self {
        let mut guest = Self::new();
        for _ in 0..BUFFERS {
            guest.provide(4096);
        }
        guest
    }

    fn provide(&mut self, len: usize) {
        let sent = self.driver.send(0, &[], &[len]);
        self.buffers.push_back(sent);
    }

    fn path(&self, port: u32) -> PathBuf {
        self.folder.path().join(format!("gate_{port}"))
    }

    /// A program of the host that asks for `port` of the guest.
    fn program(&self, port: u32) -> UnixStream {
        let mut program = UnixStream::connect(self.folder.path().join("gate")).unwrap();
        writeln!(program, "CONNECT {port}").unwrap();
        program
    }

    /// Sends a packet with its payload in `parts`.
    fn send_parts(&mut self, header: &Header, parts: &[&[u8]]) {
        let all = [&[header.as_bytes()], parts].concat();
        self.driver.send(1, &all, &[]);
        self.driver.wait_used(1);
    }

    fn send(&mut self, end: &End, operation: u16, flags: u32) {
        self.send_parts(&end.packet(operation, flags, 0), &[]);
    }

    fn send_data(&mut self, end: &mut End, parts: &[&[u8]]) {
        let len: usize = parts.iter().map(|part| part.len()).sum();
        let len = u32::try_from(len).unwrap();
        self.send_parts(&end.packet(operation::DATA, 0, len), parts);
        end.sent += len;
    }

    /// Waits for the next packet from the device.
    fn receive(&mut self) -> (Header, Vec<u8>) {
        let (head, len) = self.driver.wait_used(0);
        let sent = self.buffers.pop_front().unwrap();
        assert_eq!(head, u32::from(sent.head), "buffers are used in order");
        let bytes = self.driver.answer(&sent);
        let (header, rest) = Header::read_from_prefix(&bytes).unwrap();
        let data_len = usize::try_from(header.len.get()).unwrap();
        assert_eq!(usize::try_from(len).unwrap(), HEADER_LEN + data_len);
        self.provide(4096);
        (header, rest[..data_len].to_vec())
    }

    /// Waits for a packet of a connection that has `operation`.
    fn expect(&mut self, end: &mut End, operation: u16) -> (Header, Vec<u8>) {
        let (header, data) = self.receive();
        assert_eq!(header.operation.get(), operation, "{header:?}");
        assert_eq!(header.source_port.get(), end.route.host_port);
        assert_eq!(header.destination_port.get(), end.route.guest_port);
        end.host_space = header.buffer_space.get();
        end.host_forwarded = header.forwarded.get();
        end.received += header.len.get();
        (header, data)
    }

    /// Receives `len` bytes, and tells of the room that they leave.
    fn receive_data(&mut self, end: &mut End, len: usize) -> Vec<u8> {
        let mut data = Vec::new();
        while data.len() < len {
            data.extend(self.expect(end, operation::DATA).1);
            self.send(end, operation::CREDIT_UPDATE, 0);
        }
        data
    }

    /// The guest's end of what a program asked for.
    fn accept(&mut self) -> End {
        let (header, _) = self.receive();
        assert_eq!(header.operation.get(), operation::REQUEST);
        assert_eq!(header.source_cid.get(), CID_HOST);
        assert_eq!(header.destination_cid.get(), u64::from(CID));
        let (guest_port, host_port) = (header.destination_port.get(), header.source_port.get());
        let mut end = End::new(Route { guest_port, host_port });
        end.host_space = header.buffer_space.get();
        self.send(&end, operation::RESPONSE, 0);
        end
    }

    /// The guest's end of a connection to a listening program, with that program's end.
    fn connect(&mut self, listener: &UnixListener, host_port: u32) -> (End, UnixStream) {
        let mut end = End::new(Route { guest_port: GUEST_PORT, host_port });
        self.send(&end, operation::REQUEST, 0);
        self.expect(&mut end, operation::RESPONSE);
        (end, listener.accept().unwrap().0)
    }

    fn connected(&mut self) -> (End, UnixStream) {
        let listener = UnixListener::bind(self.path(9)).unwrap();
        self.connect(&listener, 9)
    }
}

impl End {
    fn new(route: Route) -> Self {
        let (sent, received, host_space, host_forwarded) = (0, 0, 0, 0);
        Self { route, space: SPACE, sent, received, host_space, host_forwarded }
    }

    fn packet(&self, operation: u16, flags: u32, len: u32) -> Header {
        Header {
            source_cid: u64::from(CID).into(),
            destination_cid: CID_HOST.into(),
            source_port: self.route.guest_port.into(),
            destination_port: self.route.host_port.into(),
            len: len.into(),
            kind: TYPE_STREAM.into(),
            operation: operation.into(),
            flags: flags.into(),
            buffer_space: self.space.into(),
            forwarded: self.received.into(),
        }
    }

    fn credit(&self) -> u32 {
        self.host_space - (self.sent - self.host_forwarded)
    }
}

fn line(program: &mut UnixStream) -> String {
    let mut line = Vec::new();
    while line.last() != Some(&b'\n') {
        let mut byte = [0];
        program.read_exact(&mut byte).unwrap();
        line.extend(byte);
    }
    String::from_utf8(line).unwrap()
}

/// Bytes that are different wherever they are cut.
fn sample(len: usize) -> Vec<u8> {
    (0..len).map(|index| u8::try_from(index * 7 % 251).unwrap()).collect()
}

fn read(program: &mut UnixStream, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    program.read_exact(&mut bytes).unwrap();
    bytes
}

#[test]
fn all_queues_share_a_vector() {
    let home = LoopThread::new();
    let vsock = Vsock::new(CID, Gate::closed().unwrap(), home.handle());
    assert_eq!(PciWire::new(Box::new(vsock), driver::memory()).layout.vectors, 2);
}

#[test]
fn a_program_reaches_the_port_that_it_names_and_both_talk() {
    let mut guest = Guest::with_buffers();
    let mut program = guest.program(22);
    // What follows the line is for the guest, whether it has agreed yet or not.
    program.write_all(b"early").unwrap();
    let mut end = guest.accept();
    assert_eq!(end.route.guest_port, 22);
    assert_eq!(line(&mut program), format!("OK {}\n", end.route.host_port));
    assert_eq!(guest.receive_data(&mut end, 5), b"early");
    guest.send_data(&mut end, &[b"hello ", b"", b"w", b"orld"]);
    assert_eq!(read(&mut program, 11), b"hello world");
}

#[test]
fn what_passes_is_counted_as_the_guest_sees_it() {
    let mut guest = Guest::with_buffers();
    let (mut end, mut program) = guest.connected();
    let count = |guest: &Guest| {
        let readings = (guest.counters)();
        readings.iter().map(|reading| (reading.name, reading.value)).collect::<Vec<_>>()
    };
    // The guest asked and the host agreed.
    assert_eq!(count(&guest)[..2], [("sent_packets", 1), ("sent_bytes", 0)]);
    assert_eq!(count(&guest)[2..], [("received_packets", 1), ("received_bytes", 0)]);
    guest.send_data(&mut end, &[b"hello ", b"world"]);
    read(&mut program, 11);
    program.write_all(b"hello").unwrap();
    guest.receive_data(&mut end, 5);
    assert_eq!(count(&guest)[1], ("sent_bytes", 11));
    assert_eq!(count(&guest)[3], ("received_bytes", 5));
}

#[test]
fn a_header_and_its_payload_may_be_split_anywhere() {
    let mut guest = Guest::with_buffers();
    let (end, mut program) = guest.connected();
    let packet = [end.packet(operation::DATA, 0, 6).as_bytes(), b"abcdef"].concat();
    for cuts in [[1, 2, 43], [43, 44, 45], [44, 49, 50], [10, 46, 48]] {
        let [a, b, c] = cuts;
        let parts: [&[u8]; 4] = [&packet[..a], &packet[a..b], &packet[b..c], &packet[c..]];
        guest.driver.send(1, &parts, &[]);
        guest.driver.wait_used(1);
        assert_eq!(read(&mut program, 6), b"abcdef", "{cuts:?}");
    }
    // One descriptor for all, with bytes behind that are not part of it.
    guest.driver.send(1, &[&[&packet[..], b"rest"].concat()], &[]);
    guest.driver.wait_used(1);
    assert_eq!(read(&mut program, 6), b"abcdef");
}

#[test]
fn a_buffer_may_be_split_anywhere() {
    let mut guest = Guest::new();
    let listener = UnixListener::bind(guest.path(9)).unwrap();
    let end = End::new(Route { guest_port: GUEST_PORT, host_port: 9 });
    let sent = guest.driver.send(0, &[], &[40, 5]);
    guest.driver.send(0, &[], &[1, 45, 3, 1]);
    guest.send(&end, operation::REQUEST, 0);
    assert_eq!(guest.driver.wait_used(0), (u32::from(sent.head), 44));
    let (mut program, _) = listener.accept().unwrap();
    program.write_all(b"abcdef").unwrap();
    let (_, len) = guest.driver.wait_used(0);
    assert_eq!(len, 50);
    guest.buffers.clear();
    guest.provide(4096);
    program.write_all(b"g").unwrap();
    assert_eq!(guest.receive().1, b"g");
}

#[test]
fn what_one_read_brings_is_a_packet_in_each_buffer_that_it_fills() {
    let mut guest = Guest::new();
    let listener = UnixListener::bind(guest.path(9)).unwrap();
    // One more than are filled at once, of every size, and in one and in two pieces.
    let rooms = [100, 1, 7, 4096, 20, 1, 300, 2, 50];
    guest.provide(HEADER_LEN + 1);
    for (index, room) in rooms.into_iter().enumerate() {
        let pieces: &[usize] =
            if index % 2 == 0 { &[HEADER_LEN + room] } else { &[HEADER_LEN, room] };
        let sent = guest.driver.send(0, &[], pieces);
        guest.buffers.push_back(sent);
    }
    let (mut end, mut program) = guest.connect(&listener, 9);
    let data = sample(rooms.iter().sum());
    program.write_all(&data).unwrap();
    let mut came = Vec::new();
    for room in rooms {
        let (header, part) = guest.expect(&mut end, operation::DATA);
        assert_eq!(usize::try_from(header.len.get()).unwrap(), room);
        came.extend(part);
    }
    assert_eq!(came, data);
}

#[test]
fn the_guest_reaches_programs_that_listen_and_is_refused_elsewhere() {
    let mut guest = Guest::with_buffers();
    let (mut end, mut program) = guest.connected();
    guest.send_data(&mut end, &[b"ping"]);
    assert_eq!(read(&mut program, 4), b"ping");
    let mut nowhere = End::new(Route { guest_port: GUEST_PORT, host_port: 10 });
    guest.send(&nowhere, operation::REQUEST, 0);
    guest.expect(&mut nowhere, operation::RESET);
}

#[test]
fn what_a_slow_program_has_not_taken_never_exceeds_the_buffer_and_arrives_whole() {
    const LEN: usize = 4 << 20;
    let mut guest = Guest::with_buffers();
    let (mut end, mut program) = guest.connected();
    let data = sample(LEN);
    let mut rest = &data[..];
    // Nobody reads: the socket's buffer and ours fill up.
    while end.credit() > 0 {
        let (part, behind) = rest.split_at(usize::try_from(end.credit().min(60_000)).unwrap());
        guest.send_data(&mut end, &[part]);
        rest = behind;
        if end.credit() < 60_000 {
            guest.send(&end, operation::CREDIT_REQUEST, 0);
            guest.expect(&mut end, operation::CREDIT_UPDATE);
        } else if guest.driver.wire.take_interrupt(crate::test::wire::Source::Queue(0)) {
            while let Some((head, _)) = guest.driver.used(0) {
                let sent = guest.buffers.pop_front().unwrap();
                assert_eq!(head, u32::from(sent.head));
                let (header, _) = Header::read_from_prefix(&guest.driver.answer(&sent)).unwrap();
                end.host_forwarded = header.forwarded.get();
                guest.provide(4096);
            }
        }
    }
    assert!(rest.len() < LEN);
    let reader = thread::spawn(move || (read(&mut program, LEN), program));
    while !rest.is_empty() {
        while end.credit() == 0 {
            guest.expect(&mut end, operation::CREDIT_UPDATE);
        }
        let len = rest.len().min(usize::try_from(end.credit()).unwrap()).min(60_000);
        let (part, behind) = rest.split_at(len);
        guest.send_data(&mut end, &[part]);
        rest = behind;
    }
    assert!(reader.join().unwrap().0 == data);
}

#[test]
fn a_guest_that_sends_more_than_it_has_credit_for_is_cut_off() {
    let mut guest = Guest::with_buffers();
    let (mut end, _program) = guest.connected();
    let data = sample(usize::try_from(BUFFER_SPACE).unwrap() + 1);
    guest.send_data(&mut end, &[&data]);
    guest.expect(&mut end, operation::RESET);
}

#[test]
fn the_guest_gets_no_more_than_it_has_room_for() {
    let mut guest = Guest::with_buffers();
    let listener = UnixListener::bind(guest.path(9)).unwrap();
    let mut end = End::new(Route { guest_port: GUEST_PORT, host_port: 9 });
    end.space = 10;
    guest.send(&end, operation::REQUEST, 0);
    guest.expect(&mut end, operation::RESPONSE);
    let (mut program, _) = listener.accept().unwrap();
    program.write_all(&sample(25)).unwrap();
    let (_, first) = guest.expect(&mut end, operation::DATA);
    assert_eq!(first.len(), 10);
    guest.expect(&mut end, operation::CREDIT_REQUEST);
    // A guest that has read nothing yet is not asked again and again.
    end.received = 0;
    guest.send(&end, operation::CREDIT_UPDATE, 0);
    end.received = 4;
    guest.send(&end, operation::CREDIT_UPDATE, 0);
    let (_, second) = guest.expect(&mut end, operation::DATA);
    assert_eq!(second.len(), 4);
    guest.expect(&mut end, operation::CREDIT_REQUEST);
    end.received = 1 << 31;
    guest.send(&end, operation::CREDIT_UPDATE, 0);
    end.received = 14;
    end.space = 1000;
    guest.send(&end, operation::CREDIT_UPDATE, 0);
    let (_, third) = guest.expect(&mut end, operation::DATA);
    assert_eq!([first, second, third].concat(), sample(25));
}

#[test]
fn a_program_that_has_said_everything_still_hears_the_guest() {
    let mut guest = Guest::with_buffers();
    let (mut end, mut program) = guest.connected();
    program.write_all(b"question").unwrap();
    program.shutdown(Shutdown::Write).unwrap();
    assert_eq!(guest.receive_data(&mut end, 8), b"question");
    let (header, _) = guest.expect(&mut end, operation::SHUTDOWN);
    assert_eq!(header.flags.get(), SHUTDOWN_SEND);
    guest.send_data(&mut end, &[b"answer"]);
    guest.send(&end, operation::SHUTDOWN, SHUTDOWN_SEND | SHUTDOWN_RECEIVE);
    guest.expect(&mut end, operation::RESET);
    let mut heard = String::new();
    program.read_to_string(&mut heard).unwrap();
    assert_eq!(heard, "answer");
}

#[test]
fn a_guest_that_has_said_everything_still_hears_the_program() {
    let mut guest = Guest::with_buffers();
    let (mut end, mut program) = guest.connected();
    guest.send_data(&mut end, &[b"question"]);
    guest.send(&end, operation::SHUTDOWN, SHUTDOWN_SEND);
    let mut heard = String::new();
    program.read_to_string(&mut heard).unwrap();
    assert_eq!(heard, "question");
    program.write_all(b"answer").unwrap();
    drop(program);
    assert_eq!(guest.receive_data(&mut end, 6), b"answer");
    // That the program sends no more may be seen before that it is gone.
    while guest.expect(&mut end, operation::SHUTDOWN).0.flags.get() == SHUTDOWN_SEND {}
    guest.send(&end, operation::RESET, 0);
    // The ports are free again.
    guest.send(&end, operation::CREDIT_UPDATE, 0);
    guest.expect(&mut end, operation::RESET);
}

#[test]
fn a_guest_that_is_gone_leaves_nothing_unsaid() {
    let mut guest = Guest::with_buffers();
    let (mut end, mut program) = guest.connected();
    let data = sample(usize::try_from(BUFFER_SPACE).unwrap());
    let mut sent = 0;
    // More than the socket takes, so that something waits in the device.
    for _ in 0..8 {
        guest.send(&end, operation::CREDIT_REQUEST, 0);
        while guest.receive().0.operation.get() != operation::CREDIT_UPDATE {}
        let part = &data[..usize::try_from(BUFFER_SPACE / 4).unwrap()];
        guest.send_data(&mut end, &[part]);
        sent += part.len();
        end.host_forwarded = end.sent;
        if sent == data.len() {
            break;
        }
    }
    guest.send(&end, operation::SHUTDOWN, SHUTDOWN_SEND | SHUTDOWN_RECEIVE);
    guest.expect(&mut end, operation::RESET);
    let mut heard = Vec::new();
    program.read_to_end(&mut heard).unwrap();
    assert_eq!(heard.len(), sent);
}

#[test]
fn what_nobody_asked_for_is_reset_however_much_of_it_there_is() {
    let mut guest = Guest::new();
    let stray = End::new(Route { guest_port: 1, host_port: 2 });
    let mut other = stray.packet(operation::REQUEST, 0, 0);
    other.kind = 2.into();
    // The device takes no more than it can answer, and goes on when it can.
    for _ in 0..RESETS_MAX {
        guest.send_parts(&other, &[]);
    }
    for _ in 0..100 {
        guest.driver.send(1, &[other.as_bytes()], &[]);
    }
    guest.home.settle();
    assert!(guest.driver.used(1).is_none());
    guest.provide(128);
    for _ in 0..RESETS_MAX + 100 {
        let (header, _) = guest.receive();
        assert_eq!((header.operation.get(), header.kind.get()), (operation::RESET, 2));
    }
    guest.driver.wait_used(1);
}

#[test]
fn a_program_that_says_nonsense_is_shown_out() {
    let guest = Guest::with_buffers();
    for text in ["HELLO\n", "CONNECT x\n", "CONNECT 4294967295\n", &"x".repeat(100)] {
        let mut program = UnixStream::connect(guest.folder.path().join("gate")).unwrap();
        program.write_all(text.as_bytes()).unwrap();
        let mut answer = Vec::new();
        // What it said and nobody read makes the end a reset.
        let _ = program.read_to_end(&mut answer);
        assert_eq!(answer, b"", "{text}");
    }
}

#[test]
fn a_reset_of_the_device_ends_connections_and_programs_may_come_again() {
    let mut guest = Guest::with_buffers();
    let (_, mut program) = guest.connected();
    guest.driver.reset();
    assert_eq!(program.read(&mut [0]).unwrap(), 0);
    let mut early = guest.program(22);
    guest.driver.start();
    guest.buffers.clear();
    guest.provide(4096);
    let end = guest.accept();
    assert_eq!(line(&mut early), format!("OK {}\n", end.route.host_port));
}

#[test]
fn a_port_may_be_served_in_this_process() {
    let home = LoopThread::new();
    let mut gate = Gate::closed().unwrap();
    let visitors = gate.serve_locally(9).unwrap();
    let vsock = Vsock::new(CID, gate, home.handle());
    let counters = vsock.counters().unwrap();
    let mut driver = Driver::mmio(Box::new(vsock));
    driver.start();
    let folder = tempfile::tempdir().unwrap();
    let mut guest = Guest { driver, buffers: VecDeque::new(), folder, counters, home };
    guest.provide(4096);
    let mut end = End::new(Route { guest_port: GUEST_PORT, host_port: 9 });
    guest.send(&end, operation::REQUEST, 0);
    guest.expect(&mut end, operation::RESPONSE);
    guest.send_data(&mut end, &[b"READY=1"]);
    guest.send(&end, operation::SHUTDOWN, SHUTDOWN_SEND);
    assert!(visitors.arrived().take());
    let mut said = String::new();
    let mut visitor = visitors.next().unwrap();
    visitor.set_nonblocking(false).unwrap();
    visitor.read_to_string(&mut said).unwrap();
    assert_eq!(said, "READY=1");
}

#[test]
fn a_socket_device_survives_a_hostile_driver() {
    let subject = Subject {
        make: &|home| Box::new(Vsock::new(CID, Gate::closed().unwrap(), home)),
        served: &[1],
        works: &|driver| {
            let end = End::new(Route { guest_port: 1, host_port: 2 });
            let buffer = driver.send(0, &[], &[100]);
            driver.send(1, &[end.packet(operation::REQUEST, 0, 0).as_bytes()], &[]);
            driver.wait_used(0);
            let (header, _) = Header::read_from_prefix(&driver.answer(&buffer)).unwrap();
            assert_eq!(header.operation.get(), operation::RESET);
        },
    };
    subject.survives();
}
