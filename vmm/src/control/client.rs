//! One client: what came from it, what goes to it, and what it waits for.

use std::collections::VecDeque;
use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

use devices::event::{Event, EventSet};
use devices::host::stream::Tap;
use rustix::io::Errno;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendFlags, recvmsg, send};
use serde_json::{Value, json};

use super::interface::{Answer, Interface, Occasion, Refusal};
use super::message::{Call, Inbox, Malformed, Reply};

/// Bytes of one read.
const READ_BYTES: usize = 4096;

/// Calls and reads of one client before others have their turn.
const STEPS_PER_TURN: usize = 16;

/// Events that wait for a slow client in bytes, several hundred of them; one that lets more come
/// together is sent away. Who calls and does not read is no concern: the next call is looked at
/// when the reply to the last one is gone.
const EVENT_BYTES_MAX: usize = 64 << 10;

/// A client that has connected.
pub(super) struct Client {
    socket: UnixStream,
    inbox: Inbox,
    /// A descriptor that came; it belongs to the next call.
    file: Option<OwnedFd>,
    /// No more calls will come; replies may still be wanted.
    input_ended: bool,
    output: VecDeque<u8>,
    activity: Activity,
    /// The stream whose bytes the connection carries instead of calls.
    tap: Option<Tap>,
}

/// What a client is at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Activity {
    /// Calls are taken one by one.
    Calls,
    /// A reply waits.
    Waits { occasion: Occasion, oneway: bool },
    /// Every event is a reply.
    Events,
    /// There are no more calls.
    Bytes,
}

impl Activity {
    fn wants_reply(self) -> bool {
        matches!(self, Self::Waits { oneway: false, .. })
    }
}

/// The client has left, or has to leave.
pub(super) struct Gone;

impl Client {
    pub(super) fn new(socket: UnixStream) -> Self {
        Self {
            socket,
            inbox: Inbox::default(),
            file: None,
            input_ended: false,
            output: VecDeque::new(),
            activity: Activity::Calls,
            tap: None,
        }
    }

    /// Signalled when the stream that the connection carries has something for the client.
    pub(super) fn attention(&self) -> Option<&Event> {
        self.tap.as_ref().map(Tap::attention)
    }

    /// Whether it has subscribed to events.
    pub(super) fn wants_events(&self) -> bool {
        self.activity == Activity::Events
    }

    /// Whether a reply to it waits for `occasion`.
    pub(super) fn waits_for(&self, occasion: Occasion) -> bool {
        matches!(self.activity, Activity::Waits { occasion: awaited, .. } if awaited == occasion)
    }

    /// Whether it waits for what happens to the machine, so that it is quiet by right.
    pub(super) fn is_waiting(&self) -> bool {
        self.activity != Activity::Calls
    }

    /// Goes on as far as nothing has to be waited for; returns what the socket is to be watched
    /// for.
    pub(super) fn go_on<S>(
        &mut self,
        interface: &Interface<S>,
        subject: &mut S,
        readiness: EventSet,
    ) -> Result<EventSet, Gone> {
        let has_left = readiness.intersects(EventSet::HANG_UP | EventSet::ERROR);
        if self.activity == Activity::Bytes {
            let interest = self.pump()?;
            return if has_left { Err(Gone) } else { Ok(interest) };
        }
        // What a client that has left asked for is still done; what it waits for is not.
        if self.is_waiting() && has_left {
            return Err(Gone);
        }
        for _ in 0..STEPS_PER_TURN {
            self.flush()?;
            if !self.output.is_empty() {
                return Ok(EventSet::OUT);
            }
            if self.activity == Activity::Bytes {
                return self.pump();
            }
            if self.is_waiting() {
                // A hang-up is always reported, even when nothing is asked for.
                return Ok(EventSet::empty());
            }
            match self.inbox.take() {
                Ok(Some(message)) => self.answer(&message, interface, subject)?,
                Ok(None) if self.input_ended => return Err(Gone),
                Ok(None) if self.read()? => {}
                Ok(None) => return Ok(EventSet::IN),
                Err(error) => return Err(refuse(&error)),
            }
        }
        // The socket can be written, so that the next turn comes with the next round of the loop.
        Ok(EventSet::OUT)
    }

    /// Moves the bytes of a stream as far as nothing has to be waited for.
    fn pump(&mut self) -> Result<EventSet, Gone> {
        let Some(tap) = self.tap.take() else { return Err(Gone) };
        tap.attention().take();
        let outcome = self.pump_between(&tap);
        self.tap = Some(tap);
        outcome
    }

    fn pump_between(&mut self, tap: &Tap) -> Result<EventSet, Gone> {
        for _ in 0..STEPS_PER_TURN {
            tap.put(&self.inbox.take_all());
            self.flush()?;
            if self.output.is_empty() {
                tap.take(&mut self.output);
                self.flush()?;
            }
            // What there is no room for waits in the socket, and the tap tells of room.
            let has_room = tap.has_room(READ_BYTES);
            let has_read = has_room && self.read()?;
            if self.input_ended {
                return Err(Gone);
            }
            if !has_read {
                let output = if self.output.is_empty() { EventSet::empty() } else { EventSet::OUT };
                return Ok(output | if has_room { EventSet::IN } else { EventSet::empty() });
            }
        }
        Ok(EventSet::OUT)
    }

    /// Sends an event.
    pub(super) fn announce(&mut self, event: &Value) -> Result<(), Gone> {
        self.send(event, true);
        if self.output.len() > EVENT_BYTES_MAX {
            log::debug!("a control client that does not read is sent away");
            return Err(Gone);
        }
        Ok(())
    }

    /// Sends the reply that has waited.
    pub(super) fn complete(&mut self) {
        let activity = std::mem::replace(&mut self.activity, Activity::Calls);
        if activity.wants_reply() {
            self.send(&json!({}), false);
        }
    }

    /// Writes replies; returns what the socket is to be watched for.
    pub(super) fn flush_replies(&mut self) -> Result<EventSet, Gone> {
        self.flush()?;
        Ok(match (self.output.is_empty(), self.is_waiting()) {
            (false, _) => EventSet::OUT,
            (true, true) => EventSet::empty(),
            // The next call may have come already: a turn with the next round looks for it.
            (true, false) => EventSet::IN | EventSet::OUT,
        })
    }

    fn answer<S>(
        &mut self,
        message: &[u8],
        interface: &Interface<S>,
        subject: &mut S,
    ) -> Result<(), Gone> {
        let call = Call::parse(message).map_err(|error| refuse(&error))?;
        log::debug!("control: {}", call.method);
        let oneway = call.oneway;
        match interface.serve(subject, call, self.file.take()) {
            Ok(Answer::Later(occasion)) => self.activity = Activity::Waits { occasion, oneway },
            // Who wants no reply wants no events, which are replies.
            _ if oneway => {}
            Ok(Answer::Done(parameters)) => self.send(&parameters, false),
            Ok(Answer::Bytes(parameters, tap)) => {
                self.activity = Activity::Bytes;
                self.tap = Some(tap);
                self.send(&parameters, false);
            }
            Ok(Answer::Events(first)) => {
                self.activity = Activity::Events;
                self.send(&first, true);
            }
            Err(refusal) => self.send_refusal(&refusal),
        }
        Ok(())
    }

    fn send(&mut self, parameters: &Value, continues: bool) {
        self.output.extend(Reply { error: None, parameters, continues }.to_bytes());
    }

    fn send_refusal(&mut self, refusal: &Refusal) {
        let (error, parameters) = refusal.parts();
        self.output.extend(Reply { error: Some(error), parameters, continues: false }.to_bytes());
    }

    /// Writes as much as goes without waiting.
    fn flush(&mut self) -> Result<(), Gone> {
        while !self.output.is_empty() {
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            match send(&self.socket, self.output.as_slices().0, flags) {
                Ok(count) => drop(self.output.drain(..count)),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(()),
                Err(_) => return Err(Gone),
            }
        }
        // An idle client costs no memory.
        self.output.shrink_to(0);
        Ok(())
    }

    /// Reads once; says whether something came, be it the end.
    fn read(&mut self) -> Result<bool, Gone> {
        let mut bytes = [0; READ_BYTES];
        // One descriptor is taken; the kernel closes what has no room here, and we the rest.
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        let target = &mut [IoSliceMut::new(&mut bytes)];
        let received = match recvmsg(&self.socket, target, &mut ancillary, flags) {
            Ok(received) => received,
            Err(Errno::AGAIN | Errno::INTR) => return Ok(false),
            Err(_) => return Err(Gone),
        };
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(mut files) = message {
                self.file = files.next();
            }
        }
        self.input_ended = received.bytes == 0;
        self.inbox.push(bytes.get(..received.bytes).unwrap_or_default());
        Ok(true)
    }
}

impl AsRawFd for Client {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

fn refuse(error: &Malformed) -> Gone {
    log::debug!("a control client is sent away: {error}");
    Gone
}
