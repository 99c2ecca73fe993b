//! The end of a stream that reads and writes files, as a handler in an event loop.

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::Timespec;

use super::descriptor::Descriptor;
use super::escape::{self, EscapeAction, EscapeKeys};
use super::{Reader, Shared};
use crate::event::{EventSet, Handler, Watch};

/// How long the last output waits for a slow reader when the machine ends.
const FLUSH_AT_END: Duration = Duration::from_secs(2);

/// Bytes of one read.
const READ_BYTES: usize = 4096;

const PUMP: u32 = 0;
const INPUT: u32 = 1;
const OUTPUT: u32 = 2;
const ARRIVAL: u32 = 3;
const WINDOW: u32 = 4;

/// Moves the bytes of a stream from and to files.
pub(super) struct Endpoint {
    /// For the log: what the stream is connected with.
    name: String,
    shared: Arc<Shared>,
    input: Option<Side>,
    output: Option<Side>,
    /// Output taken from the stream and not yet written.
    in_hand: VecDeque<u8>,
    arrivals: Option<Box<dyn Arrivals>>,
    keys: Option<(EscapeKeys, QuitRequest)>,
    window: Option<Box<dyn Window>>,
}

/// What the escape keys for the end of the machine call, on the loop's thread.
pub type QuitRequest = Box<dyn FnMut() + Send>;

/// The files of somebody who reads our output and writes our input.
pub(super) struct Peer {
    pub(super) input: Option<Descriptor>,
    pub(super) output: Option<Descriptor>,
}

/// Where peers come from that may also leave; the file is readable when one may have come.
pub(super) trait Arrivals: AsRawFd + Send {
    /// Lets the next peer in, if there is one.
    fn admit(&mut self) -> io::Result<Option<Peer>>;
    /// Whether the peer is gone for good now that its input has ended.
    fn has_left(&self, input: &Descriptor) -> bool;
    /// Cleans up behind a peer that has left.
    fn dismiss(&mut self) {}
}

/// A terminal whose size may change; the file is readable when it has.
pub(super) trait Window: AsRawFd + Send {
    /// Takes the announcement and reads the size.
    fn size(&mut self) -> super::WindowSize;
}

/// One file of a peer, and what it is watched for.
struct Side {
    file: Descriptor,
    token: u32,
    watched: Option<EventSet>,
}

impl Endpoint {
    /// Makes an endpoint with neither files nor arrivals.
    pub(super) fn new(name: impl Into<String>, shared: Arc<Shared>) -> Self {
        Self {
            name: name.into(),
            shared,
            input: None,
            output: None,
            in_hand: VecDeque::new(),
            arrivals: None,
            keys: None,
            window: None,
        }
    }

    /// Connects the stream for good.
    pub(super) fn with_peer(mut self, peer: Peer) -> Self {
        self.set_peer(peer);
        self
    }

    /// Connects the stream with those who come.
    pub(super) fn with_arrivals(mut self, arrivals: impl Arrivals + 'static) -> Self {
        self.arrivals = Some(Box::new(arrivals));
        self
    }

    /// Looks for escape keys in the input.
    pub(super) fn with_keys(mut self, quit: QuitRequest) -> Self {
        self.keys = Some((EscapeKeys::default(), quit));
        self
    }

    /// Follows the size of a terminal.
    pub(super) fn with_window(mut self, window: impl Window + 'static) -> Self {
        self.window = Some(Box::new(window));
        self
    }

    fn set_peer(&mut self, peer: Peer) {
        let side = |token| move |file| Side { file, token, watched: None };
        self.input = peer.input.map(side(INPUT));
        self.output = peer.output.map(side(OUTPUT));
    }
}

impl Handler for Endpoint {
    fn start(&mut self, watch: &mut Watch<'_, '_>) -> io::Result<()> {
        watch.add(&self.shared.pump, PUMP, EventSet::IN)?;
        if let Some(window) = &mut self.window {
            self.shared.set_window_size(window.size());
            watch.add(&window.as_raw_fd(), WINDOW, EventSet::IN)?;
        }
        if let Some(arrivals) = &self.arrivals {
            watch.add(&arrivals.as_raw_fd(), ARRIVAL, EventSet::IN)?;
        }
        self.pump(watch);
        Ok(())
    }

    fn ready(&mut self, token: u32, _: EventSet, watch: &mut Watch<'_, '_>) {
        match token {
            PUMP => {
                self.shared.pump.take();
                self.pump(watch);
            }
            INPUT => self.pump_input(watch),
            OUTPUT => self.pump_output(watch),
            ARRIVAL => self.admit(watch),
            WINDOW => {
                if let Some(window) = &mut self.window {
                    self.shared.set_window_size(window.size());
                }
            }
            _ => {}
        }
    }
}

impl Endpoint {
    fn pump(&mut self, watch: &mut Watch<'_, '_>) {
        self.pump_output(watch);
        self.pump_input(watch);
    }

    /// Writes until there is nothing more or the reader is slow.
    fn pump_output(&mut self, watch: &mut Watch<'_, '_>) {
        while let Some(output) = &mut self.output {
            if self.in_hand.is_empty() && !self.shared.take_output(&mut self.in_hand) {
                return output.watch(None, watch).unwrap_or_else(|error| self.lose(&error, watch));
            }
            match output.file.write(self.in_hand.as_slices().0) {
                Ok(count) => {
                    self.in_hand.drain(..count);
                    self.shared.note_written(self.in_hand.len());
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    match output.watch(Some(EventSet::OUT), watch) {
                        Ok(()) => return,
                        Err(error) => self.lose(&error, watch),
                    }
                }
                Err(error) => self.lose(&error, watch),
            }
        }
    }

    /// Reads until there is nothing more or the guest is slow.
    fn pump_input(&mut self, watch: &mut Watch<'_, '_>) {
        let mut bytes = [0; READ_BYTES];
        while let Some(input) = &mut self.input {
            let room = self.shared.input_room().min(READ_BYTES);
            if room == 0 {
                return self.rest_input(None, watch);
            }
            let Some(target) = bytes.get_mut(..room) else { return };
            match input.file.read(target) {
                Ok(0) => return self.end_input(watch),
                Ok(count) => self.take_input(target.get_mut(..count).unwrap_or_default()),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return self.rest_input(Some(EventSet::IN), watch);
                }
                Err(error) if self.arrivals.is_none() => {
                    log::warn!("{}: no more input: {error}", self.name);
                    return self.end_input(watch);
                }
                Err(_) => return self.leave(watch),
            }
        }
    }

    fn rest_input(&mut self, interest: Option<EventSet>, watch: &mut Watch<'_, '_>) {
        let Some(input) = &mut self.input else { return };
        if let Err(error) = input.watch(interest, watch) {
            log::warn!("{}: no more input: {error}", self.name);
            self.input = None;
        }
    }

    fn take_input(&mut self, bytes: &mut [u8]) {
        let mut kept = bytes.len();
        if let Some((keys, quit)) = &mut self.keys {
            let shared = &self.shared;
            kept = keys.filter(bytes, |action| match action {
                EscapeAction::Quit => quit(),
                EscapeAction::Help => shared.put_note(escape::HELP),
            });
        }
        self.shared.put_input(bytes.get(..kept).unwrap_or_default());
    }

    /// There is no more input. A peer that only closed its writing side stays for the output.
    fn end_input(&mut self, watch: &mut Watch<'_, '_>) {
        let Some(input) = &self.input else { return };
        match &self.arrivals {
            Some(arrivals) if arrivals.has_left(&input.file) => self.leave(watch),
            // A hang-up is always reported, even when nothing is asked for.
            Some(_) => self.rest_input(Some(EventSet::empty()), watch),
            None => {
                self.rest_input(None, watch);
                self.input = None;
            }
        }
    }

    /// The output cannot be written any more; what a peer wrote before it left is still read.
    fn lose(&mut self, error: &io::Error, watch: &mut Watch<'_, '_>) {
        if let Some(mut output) = self.output.take() {
            // A file that cannot be removed is not watched.
            let _ = output.watch(None, watch);
        }
        if self.arrivals.is_some() {
            self.shared.set_reader(Reader::Absent, &mut self.in_hand);
            return self.pump_input(watch);
        }
        log::warn!("{}: cannot write, output is dropped from here on: {error}", self.name);
        self.shared.set_reader(Reader::Never, &mut self.in_hand);
    }

    /// The peer is gone; others may come.
    fn leave(&mut self, watch: &mut Watch<'_, '_>) {
        for mut side in [self.input.take(), self.output.take()].into_iter().flatten() {
            // A file that cannot be removed is not watched.
            let _ = side.watch(None, watch);
        }
        self.shared.set_reader(Reader::Absent, &mut self.in_hand);
        if let Some(arrivals) = &mut self.arrivals {
            arrivals.dismiss();
            if let Err(error) = watch.add(&arrivals.as_raw_fd(), ARRIVAL, EventSet::IN) {
                log::warn!("{}: cannot wait for clients: {error}", self.name);
            }
        }
    }

    fn admit(&mut self, watch: &mut Watch<'_, '_>) {
        let Some(arrivals) = &mut self.arrivals else { return };
        if self.input.is_some() || self.output.is_some() {
            return;
        }
        match arrivals.admit() {
            Ok(Some(peer)) => {
                // One peer at a time: the next one waits until this one has left.
                let _ = watch.remove(&arrivals.as_raw_fd());
                self.set_peer(peer);
                self.shared.set_reader(Reader::Present, &mut self.in_hand);
                self.pump(watch);
            }
            Ok(None) => {}
            Err(error) => crate::warn_limited!("{}: cannot let a client in: {error}", self.name),
        }
    }
}

impl Drop for Endpoint {
    /// Writes the last output, so that a guest's last words are not lost.
    fn drop(&mut self) {
        let Some(output) = &self.output else { return };
        let end = Instant::now() + FLUSH_AT_END;
        while !self.in_hand.is_empty() || self.shared.take_output(&mut self.in_hand) {
            let left = end.saturating_duration_since(Instant::now());
            let timeout = Timespec::try_from(left).unwrap_or_default();
            match output.file.write(self.in_hand.as_slices().0) {
                Ok(count) => drop(self.in_hand.drain(..count)),
                Err(error) if error.kind() != io::ErrorKind::WouldBlock => return,
                Err(_) if left.is_zero() || !output.file.wait_writable(&timeout) => {
                    let len = self.in_hand.len();
                    return log::warn!("{}: {len} bytes of output that nobody read", self.name);
                }
                Err(_) => {}
            }
        }
    }
}

impl Side {
    /// Changes what the file is watched for; not at all when `interest` is `None`.
    fn watch(&mut self, interest: Option<EventSet>, watch: &mut Watch<'_, '_>) -> io::Result<()> {
        if self.watched == interest || !self.file.is_pollable() {
            return Ok(());
        }
        match (self.watched, interest) {
            (None, Some(interest)) => watch.add(&self.file, self.token, interest)?,
            (Some(_), Some(interest)) => watch.modify(&self.file, self.token, interest)?,
            (Some(_), None) => watch.remove(&self.file)?,
            (None, None) => {}
        }
        self.watched = interest;
        Ok(())
    }
}
