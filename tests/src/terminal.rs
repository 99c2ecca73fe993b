//! What does the other end of a console say? Everything that was read from it is kept, a test waits
//! for what it expects to see next, and writes to it.

use std::io::{Read, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::tool;

/// How much of a console is shown when a test fails.
const TAIL_LENGTH: usize = 3000;

/// One end of a console, or any other stream.
pub struct Terminal {
    transcript: Arc<Transcript>,
    input: Option<Box<dyn Write + Send>>,
    /// How much of the transcript was already waited for.
    seen: usize,
}

#[derive(Default)]
struct Transcript {
    read: Mutex<Reading>,
    grown: Condvar,
}

#[derive(Default)]
struct Reading {
    bytes: Vec<u8>,
    ended: bool,
}

impl Terminal {
    /// Reads `output` from now on, in a thread that ends with it; `input` is what is written to.
    pub fn new(
        output: impl Read + Send + 'static,
        input: Option<impl Write + Send + 'static>,
    ) -> Self {
        let transcript = Arc::new(Transcript::default());
        let record = Arc::clone(&transcript);
        thread::spawn(move || record.fill(output));
        let input = input.map(|input| Box::new(input) as Box<dyn Write + Send>);
        Self { transcript, input, seen: 0 }
    }

    /// Writes `text`.
    ///
    /// # Errors
    /// When it has no input or nobody reads it any more.
    pub fn write(&mut self, text: &str) -> Result<()> {
        let input = self.input.as_mut().context("this console takes no input")?;
        input
            .write_all(text.as_bytes())
            .and_then(|()| input.flush())
            .context("writing to a console")
    }

    /// Closes the input.
    pub fn close(&mut self) {
        self.input = None;
    }

    /// Waits until `pattern` comes after all that was waited for before, and returns what came up
    /// to its end.
    ///
    /// # Errors
    /// When it did not come within `limit` or before the stream ended.
    pub fn wait_for(&mut self, pattern: &str, limit: Duration) -> Result<String> {
        let found = |bytes: &[u8]| {
            let position = bytes.windows(pattern.len()).position(|at| at == pattern.as_bytes())?;
            Some(position + pattern.len())
        };
        let what = format!("“{}”", pattern.trim());
        String::from_utf8(self.take(found, &what, limit)?).context("the console's text is no UTF-8")
    }

    /// Waits for `length` more bytes.
    ///
    /// # Errors
    /// As [`Self::wait_for`].
    pub fn wait_for_bytes(&mut self, length: usize, limit: Duration) -> Result<Vec<u8>> {
        let enough = |bytes: &[u8]| (bytes.len() >= length).then_some(length);
        self.take(enough, &format!("{length} bytes"), limit)
    }

    /// Waits until the stream ends and returns all of it.
    ///
    /// # Errors
    /// When it does not end within `limit`.
    pub fn wait_for_end(&self, limit: Duration) -> Result<Vec<u8>> {
        let deadline = Instant::now() + limit;
        let mut reading = self.transcript.lock();
        while !reading.ended {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                bail!("the stream did not end within {} s", limit.as_secs());
            }
            reading = self.transcript.wait(reading, left);
        }
        Ok(reading.bytes.clone())
    }

    /// Everything that came so far.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.transcript.lock().bytes).into_owned()
    }

    /// The end of what came so far.
    pub fn tail(&self) -> String {
        tool::tail(&self.transcript.lock().bytes, TAIL_LENGTH)
    }

    fn take(
        &mut self,
        find: impl Fn(&[u8]) -> Option<usize>,
        what: &str,
        limit: Duration,
    ) -> Result<Vec<u8>> {
        let deadline = Instant::now() + limit;
        let mut reading = self.transcript.lock();
        loop {
            let new = reading.bytes.get(self.seen..).unwrap_or_default();
            if let Some(length) = find(new) {
                self.seen += length;
                return Ok(new.get(..length).unwrap_or_default().to_vec());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                bail!("{what} did not come within {} s", limit.as_secs());
            }
            if reading.ended {
                bail!("the stream ended before {what} came");
            }
            reading = self.transcript.wait(reading, left);
        }
    }
}

impl Transcript {
    fn fill(&self, mut output: impl Read) {
        let mut buffer = vec![0; 64 << 10];
        loop {
            // A pseudoterminal whose other end is closed answers with an error.
            let length = output.read(&mut buffer).unwrap_or(0);
            let mut reading = self.lock();
            reading.bytes.extend(buffer.get(..length).unwrap_or_default());
            reading.ended = length == 0;
            self.grown.notify_all();
            if length == 0 {
                return;
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Reading> {
        self.read.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, guard: MutexGuard<'a, Reading>, limit: Duration) -> MutexGuard<'a, Reading> {
        let waited = self.grown.wait_timeout(guard, limit);
        waited.unwrap_or_else(PoisonError::into_inner).0
    }
}
