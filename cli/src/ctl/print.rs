//! Replies for people: words, tables and sizes; or as JSON.

use std::io::{self, Write as _};
use std::time::Duration;

use anyhow::Result;
use serde_json::Value;

/// A reply as it came.
pub(crate) fn json(reply: &Value) -> Result<()> {
    let text = serde_json::to_string_pretty(reply)?;
    Ok(writeln!(io::stdout(), "{text}")?)
}

/// What the machine is doing.
pub(super) fn state(reply: &Value) -> Result<()> {
    let number = |name: &str| reply[name].as_u64().unwrap_or_default();
    let rows = [
        ["state".to_owned(), word(&reply["state"])],
        ["up for".to_owned(), duration(number("uptimeUSec"))],
        ["processors".to_owned(), number("processors").to_string()],
        ["memory".to_owned(), size_text(number("memory"))],
        ["process".to_owned(), number("processId").to_string()],
        ["nixvmm".to_owned(), word(&reply["version"])],
    ];
    table(&rows)
}

/// The disks, one a line.
pub(super) fn disks(reply: &Value) -> Result<()> {
    let mut rows = vec![["DISK", "SIZE", "ACCESS"].map(str::to_owned)];
    for disk in reply["disks"].as_array().into_iter().flatten() {
        let access = if disk["readOnly"] == true { "read-only" } else { "read-write" };
        let size = size_text(disk["size"].as_u64().unwrap_or_default());
        rows.push([word(&disk["name"]), size, access.to_owned()]);
    }
    table(&rows)
}

/// The network cards, one a line.
pub(super) fn cards(reply: &Value) -> Result<()> {
    let mut rows = vec![["CARD", "PLUG", "LINK"].map(str::to_owned)];
    for card in reply["cards"].as_array().into_iter().flatten() {
        let plug = if card["plugged"] == true { "in" } else { "out" };
        let link = if card["up"] == true { "up" } else { "down" };
        rows.push([word(&card["name"]), plug.to_owned(), link.to_owned()]);
    }
    table(&rows)
}

/// The size that a disk has now.
pub(super) fn size(disk: &str, reply: &Value) -> Result<()> {
    let size = size_text(reply["size"].as_u64().unwrap_or_default());
    Ok(writeln!(io::stdout(), "{disk} has {size}")?)
}

/// How much memory there is and can be.
pub(super) fn memory(reply: &Value) -> Result<()> {
    let row = |name: &str, key: &str| {
        [name.to_owned(), size_text(reply[key].as_u64().unwrap_or_default())]
    };
    table(&[row("size", "size"), row("requested", "requested"), row("at most", "max")])
}

/// The balloon and what the guest says about its memory.
pub(super) fn balloon(reply: &Value) -> Result<()> {
    let row = |name: &str, key: &str| {
        [name.to_owned(), size_text(reply[key].as_u64().unwrap_or_default())]
    };
    let mut rows = vec![
        row("target", "target"),
        row("size", "size"),
        row("given back by inflating", "inflated"),
        row("given back when freed", "reported"),
    ];
    match reply["ageUSec"].as_u64() {
        Some(age) => {
            rows.push(["the guest's report is from".to_owned(), format!("{} ago", duration(age))]);
        }
        None => rows.push(["the guest's report".to_owned(), "has not come".to_owned()]),
    }
    for (name, value) in reply["statistics"].as_object().into_iter().flatten() {
        let value = value.as_u64().unwrap_or_default();
        rows.push(match name.strip_suffix("-bytes") {
            Some(name) => [name.replace('-', " "), size_text(value)],
            None => [name.replace('-', " "), value.to_string()],
        });
    }
    table(&rows)
}

/// All counters, one a line.
pub(super) fn statistics(reply: &Value) -> Result<()> {
    let mut rows = vec![["DEVICE", "COUNTER", "VALUE"].map(str::to_owned)];
    for device in reply["devices"].as_array().into_iter().flatten() {
        add_counters(&mut rows, &word(&device["name"]), &device["counters"]);
    }
    for processor in reply["processors"].as_array().into_iter().flatten() {
        let name = format!("processor {}", processor["id"]);
        add_counters(&mut rows, &name, &processor["exits"]);
    }
    table(&rows)
}

fn add_counters(rows: &mut Vec<[String; 3]>, name: &str, counters: &Value) {
    for (counter, value) in counters.as_object().into_iter().flatten() {
        let number = value.as_u64().unwrap_or_default();
        let is_size = counter.ends_with("bytes") && number >= 1 << 20;
        let value = if is_size { size_text(number) } else { number.to_string() };
        rows.push([name.to_owned(), counter.replace('_', " "), value]);
    }
}

/// A text as it came.
pub(super) fn text(text: &Value) -> Result<()> {
    Ok(write!(io::stdout(), "{}", word(text))?)
}

/// Something that has happened, at once.
pub(super) fn event(event: &Value, as_json: bool) -> Result<()> {
    let mut output = io::stdout().lock();
    match &event["details"] {
        _ if as_json => writeln!(output, "{event}")?,
        Value::Null => writeln!(output, "{}", word(&event["event"]))?,
        details => writeln!(output, "{} {details}", word(&event["event"]))?,
    }
    Ok(output.flush()?)
}

/// Rows of columns, each as wide as its widest cell.
pub(crate) fn table<const COLUMNS: usize>(rows: &[[String; COLUMNS]]) -> Result<()> {
    Ok(io::stdout().lock().write_all(table_text(rows).as_bytes())?)
}

fn table_text<const COLUMNS: usize>(rows: &[[String; COLUMNS]]) -> String {
    let mut widths = [0; COLUMNS];
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let line = |row: &[String; COLUMNS]| {
        let cells = row.iter().zip(widths);
        let line: String = cells.map(|(cell, width)| format!("{cell:<width$}  ")).collect();
        format!("{}\n", line.trim_end())
    };
    rows.iter().map(line).collect()
}

fn word(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

/// A size in the unit that suits it.
pub(crate) fn size_text(bytes: u64) -> String {
    const UNITS: [(u64, &str); 3] = [(1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB")];
    let fitting = UNITS.iter().find(|(unit, _)| bytes >= *unit);
    let &(unit, name) = fitting.unwrap_or(&(1 << 10, "KiB"));
    // One decimal place, where there is something behind the point.
    match (bytes / unit, bytes % unit * 10 / unit) {
        (whole, 0) => format!("{whole} {name}"),
        (whole, tenth) => format!("{whole}.{tenth} {name}"),
    }
}

/// A time in the two units that suit it.
pub(crate) fn duration(microseconds: u64) -> String {
    let seconds = Duration::from_micros(microseconds).as_secs();
    let (days, hours, minutes) = (seconds / 86400, seconds / 3600 % 24, seconds / 60 % 60);
    match (days, hours, minutes, seconds % 60) {
        (0, 0, 0, seconds) => format!("{seconds} s"),
        (0, 0, minutes, seconds) => format!("{minutes} min {seconds} s"),
        (0, hours, minutes, _) => format!("{hours} h {minutes} min"),
        (days, hours, ..) => format!("{days} d {hours} h"),
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn sizes_have_the_unit_that_suits_them() {
        for (bytes, expected) in [
            (0, "0 KiB"),
            (512, "0.5 KiB"),
            (64 << 20, "64 MiB"),
            ((1 << 30) + (512 << 20), "1.5 GiB"),
            (u64::MAX, "16777215.9 TiB"),
        ] {
            assert_eq!(size_text(bytes), expected);
        }
    }

    #[test]
    fn times_are_short() {
        for (seconds, expected) in
            [(7, "7 s"), (61, "1 min 1 s"), (3661, "1 h 1 min"), (90_000, "1 d 1 h")]
        {
            assert_eq!(duration(seconds * 1_000_000), expected);
        }
    }

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let rows = [["a", "long", "x"], ["longer", "b", ""]].map(|row| row.map(str::to_owned));
        assert_eq!(table_text(&rows), "a       long  x\nlonger  b\n");
    }
}
