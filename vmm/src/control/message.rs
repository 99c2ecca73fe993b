//! Messages: bytes from and to JSON objects.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::object::Object;

/// Longest call in bytes. The longest of ours has a few hundred.
pub const MESSAGE_BYTES_MAX: usize = 64 << 10;

/// Why what a client sent is no call. There is no telling where the next one would begin.
#[derive(Debug, thiserror::Error)]
pub enum Malformed {
    /// It does not end.
    #[error("a message is longer than {MESSAGE_BYTES_MAX} bytes")]
    TooLong,
    /// It is not JSON, or JSON of another shape.
    #[error("a message is no call: {0}")]
    NoCall(#[from] serde_json::Error),
}

/// What a client asks for.
#[derive(Debug, Deserialize)]
pub struct Call {
    /// The method with the name of its interface.
    pub method: String,
    /// Its parameters.
    #[serde(default)]
    pub parameters: Option<Map<String, Value>>,
    /// No reply is wanted.
    #[serde(default)]
    pub oneway: bool,
    /// More than one reply is welcome.
    #[serde(default)]
    pub more: bool,
    /// After the reply the connection shall carry something else.
    #[serde(default)]
    pub upgrade: bool,
}

impl Call {
    /// Reads a message, which has no NUL.
    ///
    /// # Errors
    ///
    /// What is no JSON object of this shape, or is nested too deeply.
    pub fn parse(message: &[u8]) -> Result<Self, Malformed> {
        let Object(call) = serde_json::from_slice(message)?;
        Ok(call)
    }
}

/// One reply, as it is written.
#[derive(Serialize)]
pub(super) struct Reply<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) error: Option<&'a str>,
    pub(super) parameters: &'a Value,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub(super) continues: bool,
}

impl Reply<'_> {
    /// The bytes of the reply with the NUL behind them.
    pub(super) fn to_bytes(&self) -> Vec<u8> {
        // A value that has been built in memory can be written.
        let mut bytes = serde_json::to_vec(self).unwrap_or_default();
        bytes.push(0);
        bytes
    }
}

/// Bytes that have come, cut into messages.
#[derive(Debug, Default)]
pub struct Inbox {
    bytes: Vec<u8>,
    /// So many of the bytes have no NUL among them.
    searched: usize,
}

impl Inbox {
    /// Takes what has come. The caller stops reading while there is a message to take, which bounds
    /// what is kept.
    pub fn push(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// Takes the next whole message without its NUL.
    ///
    /// # Errors
    ///
    /// More bytes have come than a message may have, and its end is not among them.
    pub fn take(&mut self) -> Result<Option<Vec<u8>>, Malformed> {
        let unsearched = self.bytes.get(self.searched..).unwrap_or_default();
        let Some(offset) = unsearched.iter().position(|byte| *byte == 0) else {
            self.searched = self.bytes.len();
            let is_too_long = self.searched > MESSAGE_BYTES_MAX;
            return if is_too_long { Err(Malformed::TooLong) } else { Ok(None) };
        };
        let end = self.searched.saturating_add(offset);
        if end > MESSAGE_BYTES_MAX {
            return Err(Malformed::TooLong);
        }
        let mut rest = self.bytes.split_off(end);
        rest.remove(0);
        self.searched = 0;
        Ok(Some(std::mem::replace(&mut self.bytes, rest)))
    }

    /// Takes all that has come, where it is no messages.
    pub(super) fn take_all(&mut self) -> Vec<u8> {
        std::mem::take(self).bytes
    }
}
