//! Taps: those who look on at a stream, and may type, beside whoever it is connected with.
//!
//! A tap never slows the stream down: what it does not take in time is lost to it, oldest first.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Mutex};

use super::{INPUT_BYTES_MAX, OUTPUT_BYTES_MAX, Shared, Stream, WindowSize, lock};
use crate::event::Event;

/// Output that who looks on gets to see from before it came: a screen and a half of text.
pub(super) const RECENT_BYTES_MAX: usize = 4 << 10;

/// Where taps are put on a stream; it does not keep the stream open.
#[derive(Clone)]
pub struct Outlet(Arc<Shared>);

/// Somebody who looks on. Dropped, they do so no more.
pub struct Tap {
    shared: Arc<Shared>,
    waiting: Arc<Waiting>,
}

/// Output for one tap.
pub(super) struct Waiting {
    bytes: Mutex<VecDeque<u8>>,
    attention: Event,
}

impl Stream {
    /// The place for taps. From now on the last output is kept for them.
    pub fn outlet(&self) -> Outlet {
        self.shared.state().recent.get_or_insert_default();
        Outlet(Arc::clone(&self.shared))
    }
}

impl Outlet {
    /// Puts a tap on the stream; it begins with the last output.
    pub fn tap(&self) -> io::Result<Tap> {
        let attention = Event::new()?;
        attention.signal();
        let mut state = self.0.state();
        let bytes = Mutex::new(state.recent.clone().unwrap_or_default());
        let waiting = Arc::new(Waiting { bytes, attention });
        state.taps.push(Arc::clone(&waiting));
        Ok(Tap { shared: Arc::clone(&self.0), waiting })
    }
}

impl Tap {
    /// Signalled when there is output, or room for input that was asked for.
    pub fn attention(&self) -> &Event {
        &self.waiting.attention
    }

    /// Moves all waiting output behind `target`.
    pub fn take(&self, target: &mut VecDeque<u8>) {
        target.append(&mut lock(&self.waiting.bytes));
    }

    /// Whether so much can be typed; if not, [`Tap::attention`] is signalled when it can.
    pub fn has_room(&self, len: usize) -> bool {
        let mut state = self.shared.state();
        let has_room = INPUT_BYTES_MAX.saturating_sub(state.input.len()) >= len;
        state.input_stalled |= !has_room;
        has_room
    }

    /// Types `bytes`, for which there is room.
    pub fn put(&self, bytes: &[u8]) {
        self.shared.put_input(bytes);
    }

    /// Gives the stream the size of the terminal from which somebody looks on.
    pub fn set_window_size(&self, size: WindowSize) {
        self.shared.set_window_size(size);
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        self.shared.state().taps.retain(|other| !Arc::ptr_eq(other, &self.waiting));
    }
}

impl Waiting {
    /// Takes output, and drops the oldest when there is too much.
    pub(super) fn put(&self, bytes: &[u8]) {
        keep_last(&mut lock(&self.bytes), bytes, OUTPUT_BYTES_MAX);
        self.attention.signal();
    }

    /// Tells that there is room for input.
    pub(super) fn wake(&self) {
        self.attention.signal();
    }
}

/// Appends `bytes` to `kept` and keeps the last `max` of all.
pub(super) fn keep_last(kept: &mut VecDeque<u8>, bytes: &[u8], max: usize) {
    let bytes = bytes.get(bytes.len().saturating_sub(max)..).unwrap_or_default();
    let excess = (kept.len() + bytes.len()).saturating_sub(max);
    kept.drain(..excess.min(kept.len()));
    kept.extend(bytes);
}

#[cfg(test)]
mod test {
    use super::*;

    fn output(tap: &Tap) -> Vec<u8> {
        let mut bytes = VecDeque::new();
        tap.take(&mut bytes);
        bytes.into()
    }

    #[test]
    fn who_looks_on_sees_the_last_output_and_all_that_follows() {
        let stream = Stream::null().unwrap();
        stream.send(b"nobody keeps this;");
        let outlet = stream.outlet();
        stream.send(&[b'.'; RECENT_BYTES_MAX]);
        stream.send(b"recent");
        let tap = outlet.tap().unwrap();
        assert!(tap.attention().take());
        stream.send(b", now");
        assert!(tap.attention().take());
        let seen = output(&tap);
        assert_eq!(seen.len(), RECENT_BYTES_MAX + 5);
        assert!(seen.ends_with(b"..recent, now"));
        assert_eq!(output(&tap), b"");
        drop(tap);
        stream.send(b"unseen");
        assert!(stream.shared.state().taps.is_empty());
    }

    #[test]
    fn who_does_not_take_output_loses_the_oldest_and_nobody_waits() {
        let stream = Stream::null().unwrap();
        let tap = stream.outlet().tap().unwrap();
        for number in 0..100_u8 {
            assert_eq!(stream.send(&[number; 1024]), 1024);
        }
        let seen = output(&tap);
        assert_eq!((seen.len(), seen[0], seen[seen.len() - 1]), (OUTPUT_BYTES_MAX, 36, 99));
    }

    #[test]
    fn what_is_typed_reaches_the_device_within_its_limit() {
        let stream = Stream::null().unwrap();
        let tap = stream.outlet().tap().unwrap();
        tap.attention().take();
        assert!(!stream.has_input());
        assert!(tap.has_room(INPUT_BYTES_MAX));
        tap.put(&[b'x'; INPUT_BYTES_MAX]);
        assert!(stream.attention().take());
        assert!(!tap.has_room(1));
        assert!(!tap.attention().take());
        assert_eq!(stream.receive(&mut [0; INPUT_BYTES_MAX]), INPUT_BYTES_MAX);
        assert!(tap.attention().take());
        assert!(tap.has_room(1));
    }
}
