//! Streams: what stands behind a console or a serial port.
//!
//! A [`Stream`] is the device's end: bytes go out and come in, without waiting and within limits.
//! Its endpoint, the other end, lives in an event loop and moves the bytes from and to files of the
//! host. The endpoint lives as long as the stream, so a reset of the device, a restart of the guest
//! or a guest without a driver loses nothing, and the escape keys always work.
//!
//! Output that a slow reader does not take stays with the device, which is told when there is room
//! again. Where a reader may come and go, the last bytes are kept for the next one.

mod descriptor;
mod endpoint;
pub mod escape;
mod file;
mod pty;
mod socket;
mod stdio;
mod tap;
#[cfg(test)]
mod test;
mod window;

use std::collections::VecDeque;
use std::io::{self, Read as _};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::event::{Event, EventLoop, Registration};
use endpoint::Endpoint;

pub use endpoint::QuitRequest;
pub use tap::{Outlet, Tap};

/// Output that waits for its reader; more stays with the guest, or pushes the oldest out when
/// nobody reads. A boot's messages fit.
pub const OUTPUT_BYTES_MAX: usize = 64 << 10;

/// Input that waits for the guest; more stays in the host's file. Much more than anybody types, so
/// that the escape keys are seen even when a guest takes nothing.
pub const INPUT_BYTES_MAX: usize = 16 << 10;

/// A terminal's size in characters; zeros where it is not known.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WindowSize {
    /// Characters in a row.
    pub columns: u16,
    /// Number of rows.
    pub rows: u16,
}

/// The device's end of a stream; clones are the same end.
#[derive(Clone)]
pub struct Stream {
    shared: Arc<Shared>,
    _endpoint: Option<Arc<Registration>>,
}

impl Stream {
    /// A stream whose output nobody sees and that has no input.
    pub fn null() -> io::Result<Self> {
        let shared = Shared::new(Reader::Never)?;
        Ok(Self { shared: Arc::new(shared), _endpoint: None })
    }

    /// Takes output and returns how many of `bytes` it took.
    ///
    /// When it did not take all, [`Stream::attention`] is signalled once there is room again.
    pub fn send(&self, bytes: &[u8]) -> usize {
        let mut state = self.shared.state();
        let taken = match state.reader {
            Reader::Never => bytes.len(),
            Reader::Present => {
                let taken = bytes.len().min(state.output_room());
                state.output.extend(bytes.get(..taken).unwrap_or_default());
                taken
            }
            Reader::Absent => {
                state.output.extend(bytes);
                state.drop_oldest();
                bytes.len()
            }
        };
        state.show(bytes.get(..taken).unwrap_or_default());
        state.room_wanted |= taken < bytes.len();
        if state.output_wanted && taken > 0 {
            state.output_wanted = false;
            self.shared.pump.signal();
        }
        taken
    }

    /// Whether [`Stream::send`] would take at least one byte.
    pub fn has_room(&self) -> bool {
        let mut state = self.shared.state();
        let has_room = state.reader != Reader::Present || state.output_room() > 0;
        state.room_wanted |= !has_room;
        has_room
    }

    /// Whether there is input; if not, [`Stream::attention`] is signalled when there is.
    pub fn has_input(&self) -> bool {
        let mut state = self.shared.state();
        state.input_wanted = state.input.is_empty();
        !state.input_wanted
    }

    /// Moves input to `target` and returns how many bytes there were.
    pub fn receive(&self, target: &mut [u8]) -> usize {
        let mut state = self.shared.state();
        let mut count = 0;
        // A ring is read in at most two parts.
        while let Ok(part @ 1..) = state.input.read(target.get_mut(count..).unwrap_or_default()) {
            count += part;
        }
        if state.input.is_empty() && state.input_stalled {
            state.input_stalled = false;
            self.shared.pump.signal();
            state.taps.iter().for_each(|tap| tap.wake());
        }
        count
    }

    /// Signalled when there is input or room that was asked for.
    ///
    /// It belongs to one device, which takes the signal.
    pub fn attention(&self) -> &Event {
        &self.shared.attention
    }

    /// Calls `changed` on the loop's thread whenever [`Stream::window_size`] has changed.
    pub fn on_resize(&self, changed: Box<dyn FnMut() + Send>) {
        *lock(&self.shared.resized) = Some(changed);
    }

    /// The size of the terminal behind the stream.
    pub fn window_size(&self) -> WindowSize {
        self.shared.state().window_size
    }

    fn start(
        shared: Shared,
        event_loop: &mut EventLoop,
        endpoint: impl FnOnce(Arc<Shared>) -> Endpoint,
    ) -> io::Result<Self> {
        let shared = Arc::new(shared);
        let registration = event_loop.add(Box::new(endpoint(Arc::clone(&shared))))?;
        Ok(Self { shared, _endpoint: Some(Arc::new(registration)) })
    }
}

/// What both ends share: bytes behind a lock that is never held while a file is used.
struct Shared {
    state: Mutex<State>,
    /// Signalled for the endpoint: there is output, or room for input.
    pump: Event,
    /// Signalled for the device.
    attention: Event,
    /// Called when the window has another size.
    resized: Mutex<Option<Box<dyn FnMut() + Send>>>,
}

struct State {
    output: VecDeque<u8>,
    /// Output that the endpoint has taken and not yet written.
    output_in_hand: usize,
    input: VecDeque<u8>,
    reader: Reader,
    window_size: WindowSize,
    /// The endpoint has nothing to write and waits for output.
    output_wanted: bool,
    /// The endpoint stopped reading for want of room.
    input_stalled: bool,
    /// The device waits for room.
    room_wanted: bool,
    /// The device waits for input.
    input_wanted: bool,
    /// Those who look on.
    taps: Vec<Arc<tap::Waiting>>,
    /// The last output, where somebody may want to look on.
    recent: Option<VecDeque<u8>>,
}

/// Whether somebody takes the output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reader {
    /// Yes, at their own pace.
    Present,
    /// Not now; the last of the output is kept.
    Absent,
    /// Nobody ever; output is dropped.
    Never,
}

impl Shared {
    fn new(reader: Reader) -> io::Result<Self> {
        let state = State {
            output: VecDeque::new(),
            output_in_hand: 0,
            input: VecDeque::new(),
            reader,
            window_size: WindowSize::default(),
            output_wanted: true,
            input_stalled: false,
            room_wanted: false,
            input_wanted: true,
            taps: Vec::new(),
            recent: None,
        };
        Ok(Self {
            state: Mutex::new(state),
            pump: Event::new()?,
            attention: Event::new()?,
            resized: Mutex::default(),
        })
    }

    /// Moves all waiting output to the empty `target`; asks to be woken when there is none.
    fn take_output(&self, target: &mut VecDeque<u8>) -> bool {
        let mut state = self.state();
        std::mem::swap(&mut state.output, target);
        state.output_in_hand = target.len();
        state.output_wanted = target.is_empty();
        !target.is_empty()
    }

    /// Takes note that `left` bytes of the output in hand are still to be written.
    fn note_written(&self, left: usize) {
        let mut state = self.state();
        state.output_in_hand = left;
        // Waking the device for every byte would cost more than the bytes.
        if state.room_wanted && state.output_room() >= OUTPUT_BYTES_MAX / 2 {
            state.room_wanted = false;
            self.attention.signal();
        }
    }

    /// Room for input; asks to be woken when there is none.
    fn input_room(&self) -> usize {
        let mut state = self.state();
        let room = INPUT_BYTES_MAX.saturating_sub(state.input.len());
        // Others may wait for the same.
        state.input_stalled |= room == 0;
        room
    }

    fn put_input(&self, bytes: &[u8]) {
        let mut state = self.state();
        state.input.extend(bytes);
        if state.input_wanted && !bytes.is_empty() {
            state.input_wanted = false;
            self.attention.signal();
        }
    }

    /// Puts a note of our own into the output, unless the reader is too slow for it.
    fn put_note(&self, note: &[u8]) {
        let mut state = self.state();
        if note.len() <= state.output_room() {
            state.output.extend(note);
            if std::mem::take(&mut state.output_wanted) {
                self.pump.signal();
            }
        }
    }

    /// Changes who reads; output in hand goes back to the front of what waits.
    fn set_reader(&self, reader: Reader, in_hand: &mut VecDeque<u8>) {
        let mut state = self.state();
        in_hand.append(&mut state.output);
        state.output = std::mem::take(in_hand);
        state.output_in_hand = 0;
        state.reader = reader;
        match reader {
            Reader::Present => {}
            Reader::Absent => state.drop_oldest(),
            Reader::Never => state.output = VecDeque::new(),
        }
        if std::mem::take(&mut state.room_wanted) {
            self.attention.signal();
        }
    }

    fn set_window_size(&self, window_size: WindowSize) {
        let old = std::mem::replace(&mut self.state().window_size, window_size);
        if old != window_size
            && let Some(resized) = lock(&self.resized).as_mut()
        {
            resized();
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }
}

impl State {
    /// Lets those who look on see output.
    fn show(&mut self, bytes: &[u8]) {
        if let Some(recent) = &mut self.recent {
            tap::keep_last(recent, bytes, tap::RECENT_BYTES_MAX);
        }
        for tap in &self.taps {
            tap.put(bytes);
        }
    }

    fn output_room(&self) -> usize {
        OUTPUT_BYTES_MAX.saturating_sub(self.output.len() + self.output_in_hand)
    }

    fn drop_oldest(&mut self) {
        let excess = self.output.len().saturating_sub(OUTPUT_BYTES_MAX);
        self.output.drain(..excess);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
