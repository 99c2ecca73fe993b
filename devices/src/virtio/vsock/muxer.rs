//! The back of the socket device: packets to connections, and connections to packets.

use std::collections::{BTreeMap, VecDeque};
use std::io::{self, ErrorKind};
use std::str;
use std::sync::Arc;

use arch::memory::GuestSlice;
use vmm_sys_util::epoll::EpollEvent;
use zerocopy::IntoBytes;

use super::connection::{Connection, Stage, Violation, shorten};
use super::packet::{CID_HOST, HEADER_LEN, Header, PORT_ANY, Route, TYPE_STREAM, operation};
use crate::event::EventSet;
use crate::host::vsock::{ARRIVAL, Gate};
use crate::virtio::chain::Chain;
use crate::virtio::counters::Totals;
use crate::virtio::queue::Queue;
use crate::virtio::worker::{Fault, Worker, WorkerWatch};

/// Most connections at once: with their buffers they bound what a guest can make the host keep.
const CONNECTIONS_MAX: usize = 512;

/// Resets that wait for the guest to provide buffers. When there are more, its packets wait.
pub(super) const RESETS_MAX: usize = 256;

/// Longest first line of a program: `CONNECT` and a port, and some room for spaces.
const LINE_MAX: usize = 32;

/// Ports of the host's ends of connections that the host began.
const FIRST_HOST_PORT: u32 = 1 << 30;

/// Sockets that are served before the queues get their turn.
const READY_MAX: usize = 32;

/// Buffers of the guest that one read from a program may fill: where each has its payload in one
/// piece, as Linux's have, no more vectors than the host's kernel takes without an allocation
/// (`UIO_FASTIOV`).
const BURST: usize = 8;

/// The one file that is watched besides the doorbells.
const GATE: u32 = 0;

/// What is counted, as the guest sees it: what it sent and what it received.
pub(super) const COUNTED: [&str; 4] =
    ["sent_packets", "sent_bytes", "received_packets", "received_bytes"];

pub(super) struct VsockWorker {
    queues: [Queue; 2],
    cid: u64,
    gate: Arc<Gate>,
    connections: BTreeMap<u64, Connection>,
    routes: BTreeMap<Route, u64>,
    /// Connections that may have something for the guest, in turn.
    turns: VecDeque<u64>,
    /// Resets of what has no connection.
    resets: VecDeque<Header>,
    next_id: u64,
    next_host_port: u32,
    incoming: Chain,
    /// Chains that were taken from their queue and are not filled yet.
    outgoing: VecDeque<Chain>,
    spare: Vec<Chain>,
    slices: Vec<GuestSlice>,
    totals: Arc<Totals<{ COUNTED.len() }>>,
    /// What is not in the totals yet.
    batch: [u64; COUNTED.len()],
}

impl VsockWorker {
    pub(super) fn new(
        cid: u64,
        queues: [Queue; 2],
        gate: Arc<Gate>,
        totals: Arc<Totals<{ COUNTED.len() }>>,
    ) -> Self {
        let [receive, transmit] = &queues;
        let spare = (0..BURST).map(|_| Chain::with_capacity(receive.size())).collect();
        let incoming = Chain::with_capacity(transmit.size());
        Self {
            queues,
            cid,
            gate,
            connections: BTreeMap::new(),
            routes: BTreeMap::new(),
            turns: VecDeque::new(),
            resets: VecDeque::new(),
            next_id: 0,
            next_host_port: FIRST_HOST_PORT,
            incoming,
            outgoing: VecDeque::with_capacity(BURST),
            spare,
            slices: Vec::new(),
            totals,
            batch: [0; COUNTED.len()],
        }
    }
}

impl Worker for VsockWorker {
    fn queues(&mut self) -> &mut [Queue] {
        &mut self.queues
    }

    fn watch(&mut self, watch: &mut WorkerWatch<'_, '_, '_>) -> io::Result<()> {
        watch.add(&*self.gate, GATE, EventSet::IN)?;
        self.admit();
        Ok(())
    }

    fn doorbell(&mut self, _index: usize) -> Result<(), Fault> {
        self.serve_both()
    }

    fn ready(
        &mut self,
        _token: u32,
        _readiness: EventSet,
        _watch: &mut WorkerWatch<'_, '_, '_>,
    ) -> Result<(), Fault> {
        let gate = Arc::clone(&self.gate);
        for (token, readiness) in gate.ready(&mut [EpollEvent::default(); READY_MAX]) {
            match token {
                ARRIVAL => self.admit(),
                id => self.serve_peer(id, readiness),
            }
        }
        self.serve_both()
    }
}

impl VsockWorker {
    /// Serves the queues until neither has anything that can be done.
    fn serve_both(&mut self) -> Result<(), Fault> {
        loop {
            let outcome = self.exchange_packets();
            // Who sees what came finds it counted.
            self.totals.add(&mut self.batch);
            for queue in &mut self.queues {
                queue.notify_driver();
            }
            let is_stalled = outcome?;
            if !is_stalled || self.resets.len() >= RESETS_MAX {
                return Ok(());
            }
        }
    }

    /// The result is whether packets wait for resets to be taken.
    fn exchange_packets(&mut self) -> Result<bool, Fault> {
        self.take_packets()?;
        let is_stalled = self.resets.len() >= RESETS_MAX;
        self.give_packets()?;
        Ok(is_stalled)
    }

    /// Lets programs of the host in: all that wait, because there is no second event for them.
    fn admit(&mut self) {
        loop {
            match self.gate.accept() {
                Ok(Some(_)) if self.connections.len() >= CONNECTIONS_MAX => {
                    crate::warn_limited!("vsock: {CONNECTIONS_MAX} connections are all there are");
                }
                Ok(Some(peer)) => {
                    let host_port = self.free_host_port();
                    let route = Route { guest_port: PORT_ANY, host_port };
                    let connection = Connection::new(peer, Stage::Calling(Vec::new()), route);
                    self.add(connection);
                }
                Ok(None) => return,
                Err(error) => {
                    crate::warn_limited!("vsock: a program cannot be let in: {error}");
                    return;
                }
            }
        }
    }

    /// A program of the host has something to say, or takes more, or is gone.
    fn serve_peer(&mut self, id: u64, readiness: EventSet) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        connection.note(readiness);
        match &mut connection.stage {
            Stage::Calling(line) => match connection.peer.read_line(line, LINE_MAX) {
                Ok(false) if line.len() < LINE_MAX => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Ok(true) if let Some(port) = wanted_port(line) => self.request(id, port),
                _ => self.forget(id),
            },
            _ => {
                connection.flush();
                if connection.stage == Stage::Draining && connection.is_flushed() {
                    self.forget(id);
                } else {
                    self.give_turn(id);
                }
            }
        }
    }

    /// Asks the guest for a connection to its `port`.
    fn request(&mut self, id: u64, port: u32) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        connection.route.guest_port = port;
        connection.stage = Stage::Requested;
        connection.owe(operation::REQUEST);
        self.routes.insert(connection.route, id);
        self.give_turn(id);
    }

    /// Takes what the guest sent. It stops while too many resets wait.
    fn take_packets(&mut self) -> Result<(), Fault> {
        while self.resets.len() < RESETS_MAX {
            let [_, transmit] = &mut self.queues;
            if !transmit.pop(&mut self.incoming)? {
                break;
            }
            let header: Header =
                self.incoming.take().ok_or(Fault::Request("a packet without its header"))?;
            let len = usize::try_from(header.len.get()).unwrap_or(usize::MAX);
            if self.incoming.readable_len() < len {
                return Err(Fault::Request("a packet shorter than its header says"));
            }
            self.take_packet(&header, len);
            let [sent_packets, sent_bytes, ..] = &mut self.batch;
            *sent_packets += 1;
            *sent_bytes += u64::from(header.len.get());
            let [_, transmit] = &mut self.queues;
            transmit.complete(self.incoming.head(), 0);
        }
        Ok(())
    }

    fn take_packet(&mut self, header: &Header, len: usize) {
        let is_ours = header.destination_cid.get() == CID_HOST
            && header.source_cid.get() == self.cid
            && header.kind.get() == TYPE_STREAM;
        let route = Route::of(header);
        let operation = header.operation.get();
        if !is_ours {
            return self.refuse(header);
        }
        let Some(id) = self.routes.get(&route).copied() else {
            return match operation {
                operation::REQUEST => self.connect(route, header),
                _ => self.refuse(header),
            };
        };
        let Some(connection) = self.connections.get_mut(&id) else { return };
        connection.take_credit(header);
        let outcome = match operation {
            operation::RESET => return self.detach(id),
            operation::RESPONSE => connection.open(),
            operation::DATA => {
                self.slices.clear();
                self.slices.extend_from_slice(self.incoming.readable());
                shorten(&mut self.slices, len);
                connection.take_data(&self.slices, header.len.get())
            }
            operation::SHUTDOWN => {
                if connection.take_shutdown(header.flags.get()) {
                    // The guest need not wait until a slow program has taken everything.
                    self.refuse(header);
                    return self.detach(id);
                }
                Ok(())
            }
            operation::CREDIT_UPDATE => Ok(()),
            operation::CREDIT_REQUEST => {
                connection.owe_credit_update();
                Ok(())
            }
            _ => Err(Violation),
        };
        match outcome {
            Ok(()) => self.give_turn(id),
            Err(Violation) => {
                self.refuse(header);
                self.detach(id);
            }
        }
    }

    /// The guest asks for a connection to a port of the host.
    fn connect(&mut self, route: Route, header: &Header) {
        let is_full = self.connections.len() >= CONNECTIONS_MAX || route.guest_port == PORT_ANY;
        if is_full {
            crate::warn_limited!("vsock: {CONNECTIONS_MAX} connections are all there are");
            return self.refuse(header);
        }
        let peer = match self.gate.connect(route.host_port) {
            Ok(peer) => peer,
            Err(error) => {
                log::debug!("vsock: the guest cannot reach port {}: {error}", route.host_port);
                return self.refuse(header);
            }
        };
        let mut connection = Connection::new(peer, Stage::Open, route);
        connection.take_credit(header);
        connection.owe(operation::RESPONSE);
        if let Some(id) = self.add(connection) {
            self.routes.insert(route, id);
            self.give_turn(id);
        } else {
            self.refuse(header);
        }
    }

    /// Answers a packet by a reset; a reset is not answered.
    fn refuse(&mut self, header: &Header) {
        if header.operation.get() == operation::RESET {
            return;
        }
        self.resets.push_back(Header {
            source_cid: header.destination_cid,
            destination_cid: self.cid.into(),
            source_port: header.destination_port,
            destination_port: header.source_port,
            kind: header.kind,
            operation: operation::RESET.into(),
            ..Header::default()
        });
    }

    /// Sends the guest what there is for it, connection by connection.
    fn give_packets(&mut self) -> Result<(), Fault> {
        while (!self.resets.is_empty() || !self.turns.is_empty()) && self.has_room()? {
            if let Some((header, data_len)) = self.next_packet() {
                self.fill(header, data_len);
            }
        }
        Ok(())
    }

    /// There is a buffer for the next packet; and more, as far as one read fills them.
    fn has_room(&mut self) -> Result<bool, Fault> {
        let [receive, _] = &mut self.queues;
        while let Some(mut chain) = self.spare.pop() {
            if !receive.pop(&mut chain)? {
                self.spare.push(chain);
                break;
            }
            if chain.writable_len() <= HEADER_LEN {
                return Err(Fault::Request("a buffer without room for a packet"));
            }
            self.outgoing.push_back(chain);
        }
        Ok(!self.outgoing.is_empty())
    }

    /// Gives the guest a packet, or one for each buffer where its data, which is there already, is
    /// longer than the first.
    fn fill(&mut self, mut header: Header, data_len: u32) {
        let [receive, _] = &mut self.queues;
        let [.., received_packets, received_bytes] = &mut self.batch;
        let mut left = data_len;
        while let Some(chain) = self.outgoing.pop_front() {
            let room = chain.writable_len().saturating_sub(HEADER_LEN);
            let len = left.min(u32::try_from(room).unwrap_or(u32::MAX));
            header.len = len.into();
            chain.write(header.as_bytes());
            let written = u32::try_from(HEADER_LEN).unwrap_or(0).saturating_add(len);
            receive.complete(chain.head(), written);
            self.spare.push(chain);
            *received_packets += 1;
            *received_bytes += u64::from(len);
            left -= len;
            if left == 0 {
                break;
            }
        }
    }

    /// The next packet; `None` when the one whose turn it is has nothing to say.
    fn next_packet(&mut self) -> Option<(Header, u32)> {
        if let Some(header) = self.resets.pop_front() {
            return Some((header, 0));
        }
        let id = self.turns.pop_front()?;
        let connection = self.connections.get_mut(&id)?;
        connection.has_turn = false;
        self.slices.clear();
        for chain in &self.outgoing {
            add_behind_header(chain.writable(), &mut self.slices);
        }
        let packet = connection.next_packet(&mut self.slices);
        let header = packet.map(|packet| {
            let mut header = connection.route.packet(self.cid, packet.operation);
            header.flags = packet.flags.into();
            connection.put_credit(&mut header);
            (header, packet.len)
        });
        self.give_turn(id);
        header
    }

    /// Lines a connection up if it may have something for the guest.
    fn give_turn(&mut self, id: u64) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        if !connection.has_turn && connection.wants_turn() {
            connection.has_turn = true;
            self.turns.push_back(id);
        }
    }

    /// Parts with the guest's end; a program that has not taken everything yet stays.
    fn detach(&mut self, id: u64) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        self.routes.remove(&connection.route);
        connection.drain();
        if connection.is_flushed() {
            self.connections.remove(&id);
        }
    }

    fn forget(&mut self, id: u64) {
        self.connections.remove(&id);
    }

    fn add(&mut self, connection: Connection) -> Option<u64> {
        let id = self.next_id;
        if let Err(error) = self.gate.watch(&connection.peer, id) {
            crate::warn_limited!("vsock: a socket cannot be watched: {error}");
            return None;
        }
        self.next_id += 1;
        self.connections.insert(id, connection);
        Some(id)
    }

    fn free_host_port(&mut self) -> u32 {
        loop {
            let port = self.next_host_port;
            self.next_host_port = match port.checked_add(1) {
                Some(next) if next != PORT_ANY => next,
                _ => FIRST_HOST_PORT,
            };
            // There are far more ports than connections.
            if self.connections.values().all(|other| other.route.host_port != port) {
                return port;
            }
        }
    }
}

/// The port that a program's first line names.
fn wanted_port(line: &[u8]) -> Option<u32> {
    let line = str::from_utf8(line).ok()?;
    let port = line.trim().strip_prefix("CONNECT ")?.trim().parse().ok()?;
    (port != PORT_ANY).then_some(port)
}

/// Adds what follows a header in `slices` to `rest`.
fn add_behind_header(slices: &[GuestSlice], rest: &mut Vec<GuestSlice>) {
    let mut skip = HEADER_LEN;
    for slice in slices {
        let skipped = slice.len().min(skip);
        skip -= skipped;
        let part = slice.split_at(skipped).map(|(_, part)| part);
        rest.extend(part.filter(|part| part.len() > 0));
    }
}
