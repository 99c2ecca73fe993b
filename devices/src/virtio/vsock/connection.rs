//! One connection: what its two ends have said, and how much each may still say.

use std::collections::VecDeque;
use std::io::{self, ErrorKind};

use arch::memory::GuestSlice;

use super::packet::{Header, Route, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, operation};
use crate::event::EventSet;
use crate::host::vsock::Peer;

/// Bytes from the guest that wait for one program of the host. Linux sends 64 KiB at a time, so the
/// next packet can be on its way while one is taken.
pub(super) const BUFFER_SPACE: u32 = 128 << 10;

/// The guest is told of new room when it has used this much: a packet for each 64 KiB.
const CREDIT_STEP: u32 = BUFFER_SPACE / 2;

const SHUTDOWN_BOTH: u32 = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;

/// How far a connection has come.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Stage {
    /// A program of the host has not yet said which port it wants; this is what it said.
    Calling(Vec<u8>),
    /// The guest has been asked.
    Requested,
    /// Both ends are there.
    Open,
    /// The guest's end is gone; the program shall still get what it sent.
    Draining,
}

/// A packet to the guest, apart from what the worker knows.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Outgoing {
    pub(super) operation: u16,
    pub(super) flags: u32,
    pub(super) len: u32,
}

/// Why a connection cannot go on: the guest gets a reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Violation;

pub(super) struct Connection {
    pub(super) peer: Peer,
    pub(super) stage: Stage,
    pub(super) route: Route,
    /// It is among those whose turn comes.
    pub(super) has_turn: bool,
    /// An operation to send before anything else.
    owed: Option<u16>,
    owes_credit_update: bool,
    asked_for_credit: bool,

    is_readable: bool,
    is_writable: bool,
    is_hung_up: bool,
    /// What the guest sent and the program has not taken.
    pending: VecDeque<u8>,
    /// Bytes that the guest sent, that were handed on, and what it was told of the latter.
    received: u32,
    forwarded: u32,
    announced: u32,
    /// Bytes that were sent to the guest, and what it said about its side.
    sent: u32,
    guest_forwarded: u32,
    guest_space: u32,

    /// What either end does no more, and what the guest was told of it.
    guest_ended: u32,
    host_ended: u32,
    told_ended: u32,
}

impl Connection {
    pub(super) fn new(peer: Peer, stage: Stage, route: Route) -> Self {
        Self {
            peer,
            stage,
            route,
            has_turn: false,
            owed: None,
            owes_credit_update: false,
            asked_for_credit: false,
            is_readable: false,
            is_writable: true,
            is_hung_up: false,
            pending: VecDeque::new(),
            received: 0,
            forwarded: 0,
            announced: 0,
            sent: 0,
            guest_forwarded: 0,
            guest_space: 0,
            guest_ended: 0,
            host_ended: 0,
            told_ended: 0,
        }
    }

    /// Puts `operation` before everything else that the guest is sent.
    pub(super) fn owe(&mut self, operation: u16) {
        self.owed = Some(operation);
    }

    /// Takes over what the guest says about its buffer in every packet.
    pub(super) fn take_credit(&mut self, header: &Header) {
        self.guest_space = header.buffer_space.get();
        self.guest_forwarded = header.forwarded.get();
        // A guest that has no room answers, too, and is not asked again before it has some.
        self.asked_for_credit &= self.credit() == 0;
    }

    /// The guest wants to know how much room there is.
    pub(super) fn owe_credit_update(&mut self) {
        self.owes_credit_update = true;
    }

    /// The guest has agreed to a connection that it was asked for.
    pub(super) fn open(&mut self) -> Result<(), Violation> {
        if self.stage != Stage::Requested {
            return Err(Violation);
        }
        self.stage = Stage::Open;
        // A socket that nothing was written to has room for a line.
        let line = format!("OK {}\n", self.route.host_port);
        self.peer.send_bytes(line.as_bytes()).map(drop).map_err(|_| Violation)
    }

    /// Hands on what the guest sent, or keeps it: `slices` are `len` bytes.
    pub(super) fn take_data(&mut self, slices: &[GuestSlice], len: u32) -> Result<(), Violation> {
        let waiting = self.received.wrapping_sub(self.forwarded);
        let has_room = BUFFER_SPACE.checked_sub(waiting).is_some_and(|room| len <= room);
        if self.stage != Stage::Open || self.guest_ended & SHUTDOWN_SEND != 0 || !has_room {
            return Err(Violation);
        }
        self.received = self.received.wrapping_add(len);
        let mut done = 0;
        if self.pending.is_empty() && self.is_writable && self.host_ended & SHUTDOWN_RECEIVE == 0 {
            let sent = self.peer.send(slices);
            done = self.sent_to_host(sent);
        }
        for slice in slices {
            let skipped = done.min(slice.len());
            done -= skipped;
            if let Some((_, rest)) = slice.split_at(skipped) {
                self.keep(rest);
            }
        }
        self.flush();
        Ok(())
    }

    /// Gives the program what waits for it, as far as it takes it.
    pub(super) fn flush(&mut self) {
        while self.is_writable && self.host_ended & SHUTDOWN_RECEIVE == 0 {
            let (front, _) = self.pending.as_slices();
            if front.is_empty() {
                break;
            }
            let sent = self.peer.send_bytes(front);
            let count = self.sent_to_host(sent);
            self.pending.drain(..count);
        }
        if self.host_ended & SHUTDOWN_RECEIVE != 0 {
            self.forwarded = self.received;
            self.pending = VecDeque::new();
        }
        if self.pending.is_empty() {
            self.pending = VecDeque::new();
            if self.guest_ended & SHUTDOWN_SEND != 0 {
                self.peer.end_sending();
            }
        }
    }

    /// Nothing of what the guest sent is left.
    pub(super) fn is_flushed(&self) -> bool {
        self.pending.is_empty()
    }

    /// The guest sends or receives no more; the result is whether it does neither.
    pub(super) fn take_shutdown(&mut self, flags: u32) -> bool {
        self.guest_ended |= flags & SHUTDOWN_BOTH;
        if flags & SHUTDOWN_RECEIVE != 0 {
            self.peer.end_receiving();
        }
        self.flush();
        self.guest_ended == SHUTDOWN_BOTH
    }

    /// The guest's end is gone: only what waits for the program is left to do.
    pub(super) fn drain(&mut self) {
        self.stage = Stage::Draining;
        self.owed = None;
    }

    /// Takes over what the program's socket is ready for.
    pub(super) fn note(&mut self, readiness: EventSet) {
        let ended = readiness.intersects(EventSet::HANG_UP | EventSet::ERROR);
        self.is_hung_up |= ended;
        self.is_readable |= ended || readiness.intersects(EventSet::IN | EventSet::READ_HANG_UP);
        self.is_writable |= ended || readiness.contains(EventSet::OUT);
        let nothing_to_read =
            self.guest_ended & SHUTDOWN_RECEIVE != 0 || self.host_ended & SHUTDOWN_SEND != 0;
        if self.is_hung_up && nothing_to_read {
            self.host_ended = SHUTDOWN_BOTH;
        }
    }

    /// There may be something to tell the guest.
    pub(super) fn wants_turn(&self) -> bool {
        if self.owed.is_some() {
            return true;
        }
        let may_read = self.is_readable
            && (self.host_ended | self.told_ended) & SHUTDOWN_SEND == 0
            && self.guest_ended & SHUTDOWN_RECEIVE == 0;
        self.stage == Stage::Open
            && (self.must_announce()
                || self.told_ended != self.host_ended
                || may_read && (self.credit() > 0 || !self.asked_for_credit))
    }

    /// The next packet to the guest: its data, if any, is put into `room`, which is shortened, and
    /// is more than a packet's where the room is of several.
    pub(super) fn next_packet(&mut self, room: &mut Vec<GuestSlice>) -> Option<Outgoing> {
        let packet = self.find_packet(room)?;
        self.announced = self.forwarded;
        self.owes_credit_update = false;
        Some(packet)
    }

    /// Fills in the credit that the guest has.
    pub(super) fn put_credit(&self, header: &mut Header) {
        header.buffer_space = BUFFER_SPACE.into();
        header.forwarded = self.forwarded.into();
    }

    fn find_packet(&mut self, room: &mut Vec<GuestSlice>) -> Option<Outgoing> {
        let plain = |operation| Some(Outgoing { operation, ..Outgoing::default() });
        if let Some(owed) = self.owed.take() {
            return plain(owed);
        }
        if self.stage != Stage::Open {
            return None;
        }
        if self.guest_ended & SHUTDOWN_RECEIVE == 0
            && self.is_readable
            && self.host_ended & SHUTDOWN_SEND == 0
        {
            if self.credit() == 0 {
                if !self.asked_for_credit {
                    self.asked_for_credit = true;
                    return plain(operation::CREDIT_REQUEST);
                }
            } else if let Some(len) = self.read(room) {
                self.sent = self.sent.wrapping_add(len);
                return Some(Outgoing { operation: operation::DATA, flags: 0, len });
            }
        }
        if self.told_ended != self.host_ended {
            self.told_ended = self.host_ended;
            let flags = self.host_ended;
            return Some(Outgoing { operation: operation::SHUTDOWN, flags, len: 0 });
        }
        if self.must_announce() { plain(operation::CREDIT_UPDATE) } else { None }
    }

    fn must_announce(&self) -> bool {
        let behind = self.forwarded.wrapping_sub(self.announced);
        self.owes_credit_update || behind >= CREDIT_STEP
    }

    /// Bytes that the guest has room for.
    fn credit(&self) -> u32 {
        let in_flight = self.sent.wrapping_sub(self.guest_forwarded);
        self.guest_space.saturating_sub(in_flight)
    }

    /// Reads what the program says; `None` when it says nothing now or no more.
    fn read(&mut self, room: &mut Vec<GuestSlice>) -> Option<u32> {
        let max = usize::try_from(self.credit()).unwrap_or(usize::MAX);
        shorten(room, max);
        match self.peer.receive(room) {
            Ok(count @ 1..) => return u32::try_from(count).ok(),
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) if error.kind() == ErrorKind::Interrupted => return None,
            // An end, orderly or not: everything before it has been read.
            Ok(0) => self.host_ended |= SHUTDOWN_SEND,
            Err(_) => self.host_ended = SHUTDOWN_BOTH,
        }
        if self.is_hung_up && self.host_ended & SHUTDOWN_SEND != 0 {
            self.host_ended = SHUTDOWN_BOTH;
        }
        self.is_readable = false;
        self.flush();
        None
    }

    /// Takes over how a write to the program went, and returns how much it took.
    fn sent_to_host(&mut self, outcome: io::Result<usize>) -> usize {
        match outcome {
            Ok(count) => {
                let step = u32::try_from(count).unwrap_or(u32::MAX);
                self.forwarded = self.forwarded.wrapping_add(step);
                count
            }
            Err(error) => {
                match error.kind() {
                    ErrorKind::WouldBlock => self.is_writable = false,
                    ErrorKind::Interrupted => {}
                    _ => self.host_ended |= SHUTDOWN_RECEIVE,
                }
                0
            }
        }
    }

    fn keep(&mut self, slice: GuestSlice) {
        let start = self.pending.len();
        self.pending.resize(start + slice.len(), 0);
        let (front, back) = self.pending.as_mut_slices();
        // The new bytes are at the end, which the ring may have split.
        let (first, second) = match start.checked_sub(front.len()) {
            Some(start) => (back.get_mut(start..), None),
            None => (front.get_mut(start..), Some(back)),
        };
        let first = first.unwrap_or_default();
        let done = slice.copy_to(first);
        if let (Some(second), Some((_, rest))) = (second, slice.split_at(done)) {
            rest.copy_to(second);
        }
    }
}

/// Leaves the first `max` bytes of `slices`.
pub(super) fn shorten(slices: &mut Vec<GuestSlice>, max: usize) {
    let mut left = max;
    slices.retain_mut(|slice| {
        let len = slice.len().min(left);
        left -= len;
        match slice.sub_slice(0, len) {
            Some(part) => *slice = part,
            None => return false,
        }
        len > 0
    });
}
