//! What devices and processors have counted: as JSON, and as Prometheus reads it.

use std::collections::BTreeMap;
use std::fmt::{Display, Write as _};

use serde_json::{Map, Value, json};

use super::steering::Steering;

/// All counters of all devices and processors.
pub(super) fn as_json(machine: &Steering) -> Value {
    let devices = machine.parts.counted.iter().map(|device| {
        let readings = (device.counters)();
        let counters =
            readings.iter().map(|reading| (reading.name.to_owned(), reading.value.into()));
        json!({
            "name": device.name,
            "kind": device.kind,
            "counters": counters.collect::<Map<String, Value>>(),
        })
    });
    let processors = machine.parts.pause.exits().iter().enumerate().map(|(id, exits)| {
        let exits = exits.read().map(|(name, count)| (name.to_owned(), count.into()));
        json!({ "id": id, "exits": Map::<String, Value>::from_iter(exits) })
    });
    json!({
        "devices": devices.collect::<Vec<_>>(),
        "processors": processors.collect::<Vec<_>>(),
    })
}

/// The same in Prometheus' text format (version 0.0.4).
pub(super) fn as_metrics(machine: &Steering) -> String {
    let mut metrics = Metrics::default();
    let uptime = machine.started.elapsed().as_secs_f64();
    metrics.now("nixvmm_uptime_seconds", "", uptime);
    for state in ["running", "pausing", "paused", "ending"] {
        let labels = format!("{{state=\"{state}\"}}");
        metrics.now("nixvmm_state", &labels, u8::from(machine.state() == state));
    }
    for device in &machine.parts.counted {
        let labels = format!("{{device=\"{}\"}}", escaped(&device.name));
        for reading in (device.counters)() {
            let name = format!("nixvmm_{}_{}", device.kind, reading.name);
            match reading.is_total {
                true => metrics.total(&name, &labels, reading.value),
                false => metrics.now(&name, &labels, reading.value),
            }
        }
    }
    for (id, exits) in machine.parts.pause.exits().iter().enumerate() {
        for (reason, count) in exits.read() {
            let labels = format!("{{processor=\"{id}\",reason=\"{reason}\"}}");
            metrics.total("nixvmm_exits", &labels, count);
        }
    }
    metrics.text()
}

/// Metrics by name, each with its type and its samples, which have to stand together.
#[derive(Default)]
struct Metrics(BTreeMap<String, (&'static str, String)>);

impl Metrics {
    fn total(&mut self, name: &str, labels: &str, value: u64) {
        self.add("counter", format!("{name}_total"), labels, value);
    }

    fn now(&mut self, name: &str, labels: &str, value: impl Display) {
        self.add("gauge", name.to_owned(), labels, value);
    }

    fn add(&mut self, kind: &'static str, name: String, labels: &str, value: impl Display) {
        let line = format!("{name}{labels} {value}\n");
        self.0.entry(name).or_insert((kind, String::new())).1 += &line;
    }

    fn text(&self) -> String {
        let mut text = String::new();
        for (name, (kind, samples)) in &self.0 {
            // Writing into a string cannot fail.
            let _ = write!(text, "# TYPE {name} {kind}\n{samples}");
        }
        text
    }
}

/// A label's value: a disk's serial may have any printable character.
fn escaped(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"")
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn samples_of_a_metric_stand_together_under_its_type() {
        let mut metrics = Metrics::default();
        metrics.total("reads", "{device=\"a\"}", 1);
        metrics.now("up", "", 1.5);
        metrics.total("reads", "{device=\"b\"}", 2);
        let expected = "# TYPE reads_total counter\n\
                        reads_total{device=\"a\"} 1\n\
                        reads_total{device=\"b\"} 2\n\
                        # TYPE up gauge\n\
                        up 1.5\n";
        assert_eq!(metrics.text(), expected);
        assert_eq!(escaped(r#"a"b\c"#), r#"a\"b\\c"#);
    }
}
