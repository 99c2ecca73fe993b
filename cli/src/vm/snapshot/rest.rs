//! A running machine that comes to rest for a moment.

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use crate::ctl::Connection;
use crate::vm::folder::Folder;
use crate::vm::guest;

/// A machine that can be asked to rest.
pub(super) struct Rest {
    connection: Connection,
    configuration: Value,
    /// Somebody else has paused it, who will resume it.
    is_paused: bool,
}

impl Rest {
    /// Connects to the machine of a guest, if one runs.
    pub(super) fn prepare(folder: &Folder) -> Option<Self> {
        let prepare = || -> Result<Self> {
            let mut connection = Connection::open(&guest::control_socket(folder)?)?;
            let state = connection.call("GetState", &json!({}))?;
            let mut reply = connection.call("GetConfiguration", &json!({}))?;
            let configuration = reply["configuration"].take();
            Ok(Self { connection, configuration, is_paused: state["state"] == "paused" })
        };
        prepare().inspect_err(|error| log::debug!("{}: {error:#}", folder.name())).ok()
    }

    /// The machine, as `nixvmm check` prints it.
    pub(super) fn configuration(&self) -> &Value {
        &self.configuration
    }

    /// Takes the processors out of the guest.
    pub(super) fn begin(mut self) -> Result<Resting> {
        if !self.is_paused {
            self.connection.call("Pause", &json!({})).context("the guest cannot be paused")?;
        }
        Ok(Resting { machine: self, has_ended: false })
    }
}

/// A machine that rests. Dropped, it goes on.
pub(super) struct Resting {
    machine: Rest,
    has_ended: bool,
}

impl Resting {
    /// Lets the guest go on.
    pub(super) fn end(mut self) -> Result<()> {
        self.has_ended = true;
        self.resume()
    }

    fn resume(&mut self) -> Result<()> {
        if self.machine.is_paused {
            return Ok(());
        }
        let resumed = self.machine.connection.call("Resume", &json!({}));
        resumed.map(drop).context("the guest cannot go on")
    }
}

impl Drop for Resting {
    fn drop(&mut self) {
        if !self.has_ended
            && let Err(error) = self.resume()
        {
            log::error!("{error:#}");
        }
    }
}
