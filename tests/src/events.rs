//! What is said to happen to a machine? `nixvmm ctl SOCKET events`, which runs until it ends.

use std::path::Path;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, ensure};

use crate::guest::PATIENCE;
use crate::terminal::Terminal;

/// The events of a machine from now on.
pub struct Events {
    process: Child,
    lines: Terminal,
}

impl Events {
    /// Follows the machine behind a control socket; `program` is `nixvmm`.
    ///
    /// # Errors
    /// When the machine lets nobody subscribe.
    pub fn follow(program: &Path, socket: &Path) -> Result<Self> {
        let mut command = Command::new(program);
        command.arg("ctl").arg(socket).arg("events").stdin(Stdio::null()).stdout(Stdio::piped());
        let mut process = command.spawn().context("nixvmm ctl cannot be started")?;
        let output = process.stdout.take().context("no standard output")?;
        let mut lines = Terminal::new(output, None::<std::io::Sink>);
        lines.wait_for("subscribed\n", PATIENCE)?;
        Ok(Self { process, lines })
    }

    /// Waits for the next `event` and returns what is said about it.
    ///
    /// # Errors
    /// When it does not come.
    pub fn wait_for(&mut self, event: &str) -> Result<String> {
        let name = format!("{event} ");
        self.lines.wait_for(&name, PATIENCE).with_context(|| format!("no event {event}"))?;
        self.lines.wait_for("\n", PATIENCE)
    }

    /// Waits until the machine ends, and expects exactly these events, however long ago.
    ///
    /// # Errors
    /// When there are others.
    pub fn expect(mut self, expected: &[&str]) -> Result<()> {
        let bytes = self.lines.wait_for_end(PATIENCE)?;
        let text = String::from_utf8(bytes)?;
        let names: Vec<_> = text.lines().filter_map(|line| line.split(' ').next()).collect();
        ensure!(names == expected, "the events were {names:?}");
        ensure!(self.process.wait()?.success(), "ctl events failed");
        Ok(())
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
