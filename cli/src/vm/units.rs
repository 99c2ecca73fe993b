//! The unit of each guest, and what systemd says about it.

use std::collections::HashMap;

use anyhow::{Context as _, Result, ensure};

use super::name::Name;
use super::programs::Program;

/// Templates that run guests: ours, and upstream's where that is installed.
const TEMPLATES: [&str; 2] = ["nixvmm", "microvm"];

/// What has to have started before our template runs a guest.
const HELPER: &str = "nixvmm-booted";

const PROPERTIES: &str = "--property=Id,LoadState,ActiveState,SubState,Result,StatusText,MainPID,\
                          ExecMainStatus,ActiveEnterTimestamp,UnitFileState";

/// A guest's unit as systemd sees it.
#[derive(Clone, Debug)]
pub(super) struct Unit {
    template: &'static str,
    name: Name,
    properties: HashMap<String, String>,
    /// Those of what it needs.
    helper: HashMap<String, String>,
}

impl Unit {
    /// The unit of a guest.
    pub(super) fn of(name: &Name) -> Result<Self> {
        let units = Self::of_all(std::slice::from_ref(name))?;
        units.into_iter().next().with_context(|| format!("{name}: systemctl tells nothing"))
    }

    /// The units of guests, in the same order.
    pub(super) fn of_all(names: &[Name]) -> Result<Vec<Self>> {
        if names.is_empty() {
            return Ok(Vec::new());
        }
        let [ours, theirs] = TEMPLATES;
        let units =
            names.iter().flat_map(|name| [ours, theirs, HELPER].map(|template| id(template, name)));
        let call = ["show", PROPERTIES, "--"].map(str::to_owned).into_iter().chain(units);
        let text = Program::Systemctl.call(call).output()?;
        let mut known: HashMap<String, HashMap<String, String>> = parse(&text);
        Ok(names.iter().map(|name| Self::choose(name, &mut known)).collect())
    }

    /// Of the units that could run a guest, the one that does; else the first that is installed.
    fn choose(name: &Name, known: &mut HashMap<String, HashMap<String, String>>) -> Self {
        let helper = known.remove(&id(HELPER, name)).unwrap_or_default();
        let mut units = TEMPLATES.map(|template| {
            let properties = known.remove(&id(template, name)).unwrap_or_default();
            Self { template, name: name.clone(), properties, helper: helper.clone() }
        });
        units.sort_by_key(|unit| (!unit.is_up(), !unit.is_installed()));
        let [first, ..] = units;
        first
    }

    /// The guest.
    pub(super) fn name(&self) -> &Name {
        &self.name
    }

    /// Its name for systemctl.
    pub(super) fn id(&self) -> String {
        id(self.template, &self.name)
    }

    /// Its name and those of its helpers, as a pattern.
    pub(super) fn pattern(&self) -> String {
        format!("{}*@{}.service", self.template, self.name)
    }

    /// Whether nixvmm's own units run the guest.
    pub(super) fn is_ours(&self) -> bool {
        self.template == TEMPLATES[0]
    }

    pub(super) fn is_installed(&self) -> bool {
        self.property("LoadState") == "loaded"
    }

    pub(super) fn is_enabled(&self) -> bool {
        self.property("UnitFileState") == "enabled"
    }

    /// Whether the guest runs, is about to, or is about to end.
    pub(super) fn is_up(&self) -> bool {
        !matches!(self.property("ActiveState"), "inactive" | "failed" | "")
    }

    pub(super) fn is_failed(&self) -> bool {
        self.property("ActiveState") == "failed"
    }

    /// What the guest does, in a word.
    pub(super) fn state(&self) -> &'static str {
        match (self.property("ActiveState"), self.property("SubState")) {
            ("activating", "auto-restart" | "auto-restart-queued") => "restarting",
            ("activating", _) => "starting",
            ("active" | "reloading" | "refreshing", _) => "running",
            ("deactivating", _) => "stopping",
            ("failed", _) => "failed",
            _ => "stopped",
        }
    }

    /// When it came up, in systemd's words.
    pub(super) fn since(&self) -> Option<&str> {
        Some(self.property("ActiveEnterTimestamp")).filter(|text| !text.is_empty() && self.is_up())
    }

    /// What the guest last told of itself.
    pub(super) fn status_text(&self) -> Option<&str> {
        Some(self.property("StatusText")).filter(|text| !text.is_empty())
    }

    pub(super) fn process(&self) -> Option<u32> {
        self.property("MainPID").parse().ok().filter(|process| *process != 0)
    }

    /// The status that the guest's process last ended with.
    pub(super) fn exit_status(&self) -> Option<u8> {
        self.property("ExecMainStatus").parse().ok()
    }

    /// Why it failed, in words.
    pub(super) fn reason(&self) -> String {
        let helper = self.helper.get("ActiveState").filter(|state| *state == "failed");
        if !self.is_failed() && self.is_ours() && helper.is_some() {
            let (helper, reason) = (id(HELPER, &self.name), reason(&self.helper));
            return format!("{helper}, which it needs, failed: {reason}");
        }
        let reason = match self.property("Result") {
            "success" if self.is_up() => "its start failed, and systemd starts it again",
            "success" => "something that it needs failed",
            _ => reason(&self.properties),
        };
        match self.status_text() {
            Some(text) => format!("{reason}; it said: {text}"),
            None => reason.to_owned(),
        }
    }

    /// Refuses what needs a unit where none is installed.
    pub(super) fn ensure_installed(&self) -> Result<()> {
        ensure!(
            self.is_installed(),
            "{}: systemd knows neither {} nor {}: import the host module, or copy the units of \
             nixvmm to /etc/systemd/system and run `systemctl daemon-reload`",
            self.name,
            id(TEMPLATES[0], &self.name),
            id(TEMPLATES[1], &self.name),
        );
        Ok(())
    }

    fn property(&self, name: &str) -> &str {
        self.properties.get(name).map_or("", String::as_str)
    }
}

/// Whether the host's configuration makes this guest: then it has a unit that puts it in place.
pub(super) fn is_installed_by_host(name: &Name) -> Result<bool> {
    let unit = format!("install-microvm-{name}.service");
    let text = Program::Systemctl.call(["show", "--property=LoadState", "--", &unit]).output()?;
    Ok(text.lines().any(|line| line == "LoadState=loaded"))
}

fn id(template: &str, name: &Name) -> String {
    format!("{template}@{name}.service")
}

/// What `systemctl show` prints: blocks of `KEY=VALUE`, by their `Id`.
fn parse(text: &str) -> HashMap<String, HashMap<String, String>> {
    let block = |block: &str| {
        let pairs = block.lines().filter_map(|line| line.split_once('='));
        let properties: HashMap<_, _> =
            pairs.map(|(key, value)| (key.to_owned(), value.to_owned())).collect();
        Some((properties.get("Id")?.clone(), properties))
    };
    text.split("\n\n").filter_map(block).collect()
}

/// Why a unit failed, by its properties.
fn reason(properties: &HashMap<String, String>) -> &str {
    let property = |name: &str| properties.get(name).map_or("", String::as_str);
    match (property("Result"), property("ExecMainStatus").parse()) {
        ("exit-code", Ok(status)) => exit_reason(status),
        ("timeout", _) => "it was not ready in time",
        ("start-limit-hit", _) => "it was started too often",
        ("watchdog", _) => "nixvmm itself hung",
        ("oom-kill", _) => "the host ran out of memory",
        ("protocol", _) => "it ended before it was ready",
        ("", _) => "systemd gives no reason",
        (result, _) => result,
    }
}

/// What an exit status of `nixvmm run` says.
fn exit_reason(status: u8) -> &'static str {
    match status {
        1 => "the machine could not be built, or could not go on",
        2 => "its configuration is wrong",
        4 => "its kernel panicked",
        5 => "one of its processors met a triple fault",
        6 => "it had to be ended by force",
        7 => "its watchdog expired",
        203 => "its runner could not be executed",
        217 => "its user does not exist",
        _ => "its process failed",
    }
}

#[cfg(test)]
mod test {
    use super::*;

    fn chosen(text: &str) -> Unit {
        Unit::choose(&"a".parse().unwrap(), &mut parse(text))
    }

    #[test]
    fn our_unit_is_taken_unless_upstreams_is_the_one_that_is_installed_or_runs() {
        let ours = "Id=nixvmm@a.service\nLoadState=loaded\nActiveState=inactive\n";
        let theirs = "Id=microvm@a.service\nLoadState=loaded\nActiveState=inactive\n";
        let none = |text: &str| text.replace("=loaded", "=not-found");
        let up = |text: &str| text.replace("=inactive", "=activating");
        for (blocks, expected) in [
            ([ours.to_owned(), theirs.to_owned()], "nixvmm@a.service"),
            ([none(ours), theirs.to_owned()], "microvm@a.service"),
            ([ours.to_owned(), up(theirs)], "microvm@a.service"),
            ([up(ours), up(theirs)], "nixvmm@a.service"),
            ([none(ours), none(theirs)], "nixvmm@a.service"),
        ] {
            assert_eq!(chosen(&blocks.join("\n")).id(), expected, "{blocks:?}");
        }
        assert!(chosen("").ensure_installed().is_err());
    }

    #[test]
    fn a_value_may_have_anything_in_it() {
        let unit = chosen(
            "Id=nixvmm@a.service\nActiveState=failed\nResult=exit-code\nExecMainStatus=4\n\
             StatusText=a=b c\n\nId=other",
        );
        assert_eq!(unit.state(), "failed");
        assert_eq!(unit.reason(), "its kernel panicked; it said: a=b c");
    }

    #[test]
    fn a_unit_that_was_not_even_tried_did_not_come_up_because_of_its_helper() {
        let ours = "Id=nixvmm@a.service\nLoadState=loaded\nActiveState=inactive\nResult=success\n";
        let helper = "Id=nixvmm-booted@a.service\nActiveState=failed\nResult=exit-code\n\
                      ExecMainStatus=217\n";
        let unit = chosen(&[ours, helper].join("\n"));
        let reason = "nixvmm-booted@a.service, which it needs, failed: its user does not exist";
        assert_eq!(unit.reason(), reason);
    }
}
