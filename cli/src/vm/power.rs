//! Guests start and stop, as units.

use anyhow::{Context as _, Result, bail};

use super::folder::State;
use super::name::Name;
use super::programs::Program;
use super::units::Unit;

/// Lines of the log that tell why a start has failed.
const LAST_LINES: &str = "10";

/// The exit status of a machine that was ended by force.
const FORCED: u8 = 6;

/// What is asked of a unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Power {
    Start,
    Stop,
    Restart,
}

/// Does it to all guests at once, and waits for them.
pub(super) fn act(state: &State, names: &[Name], power: Power) -> Result<()> {
    for name in names {
        state.guest(name)?;
    }
    let units = Unit::of_all(names)?;
    match power {
        Power::Start => start(names, &units, "start"),
        Power::Stop => stop(&units),
        Power::Restart => start(names, &units, "restart"),
    }
}

fn start(names: &[Name], units: &[Unit], verb: &str) -> Result<()> {
    for unit in units {
        unit.ensure_installed()?;
        if unit.is_failed() {
            // Who starts it by hand need not wait until systemd has forgotten earlier failures.
            Program::Systemctl.call(["reset-failed", "--", &unit.id()]).run()?;
        }
    }
    let ids = units.iter().map(Unit::id);
    let call = Program::Systemctl.call([verb, "--"].map(str::to_owned).into_iter().chain(ids));
    let what = format!("waiting until {} is up", list(names));
    if let Err(error) = call.run_and_tell(&what) {
        return Err(explain(names)?).context(error);
    }
    log::info!(
        "{} runs; `nixvmm vm console NAME` has its console, `nixvmm vm shell NAME` a shell in it",
        list(names)
    );
    Ok(())
}

/// Stops units, and waits until they and their helpers have ended: those still need the folder.
pub(super) fn stop(units: &[Unit]) -> Result<()> {
    let names: Vec<_> = units.iter().map(|unit| unit.name().clone()).collect();
    let ids = units.iter().flat_map(|unit| [unit.id(), unit.pattern()]);
    let call = Program::Systemctl.call(["stop", "--"].map(str::to_owned).into_iter().chain(ids));
    call.run_and_tell(&format!("waiting until {} has powered off", list(&names)))?;
    for unit in Unit::of_all(&names)? {
        let name = unit.name();
        if unit.is_failed() && unit.exit_status() == Some(FORCED) && unit.is_ours() {
            log::warn!("{name}: did not power off in time, and was ended by force");
        } else {
            log::info!("{name}: has ended");
        }
    }
    Ok(())
}

/// Which of the guests did not come up, and why; the end of its log goes to standard error.
fn explain(names: &[Name]) -> Result<anyhow::Error> {
    for unit in Unit::of_all(names)? {
        if unit.state() == "running" {
            continue;
        }
        let name = unit.name();
        let (pattern, reason) = (unit.pattern(), unit.reason());
        let call = ["--no-pager", "--output=cat", "--lines", LAST_LINES, "--unit", &pattern];
        if let Err(error) = Program::Journalctl.call(call).run() {
            log::warn!("{name}: its log cannot be read: {error:#}");
        }
        return Ok(anyhow::anyhow!(
            "{name} did not come up: {reason}; `nixvmm vm logs {name}` has more",
        ));
    }
    bail!("all guests run by now")
}

/// Names for a sentence.
fn list(names: &[Name]) -> String {
    names.iter().map(Name::as_str).collect::<Vec<_>>().join(", ")
}
