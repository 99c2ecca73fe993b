//! Where start-up time goes: `--timing`.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::vcpu::ExitCounts;

/// The steps of a start and how long each took.
pub(crate) struct Timing {
    step_start: Instant,
    steps: Vec<(&'static str, Duration)>,
}

impl Timing {
    /// Starts the first step.
    pub(crate) fn start() -> Self {
        Self { step_start: Instant::now(), steps: Vec::new() }
    }

    /// Ends a step, and starts the next one.
    pub(crate) fn end_step(&mut self, name: &'static str) {
        let now = Instant::now();
        self.steps.push((name, now - self.step_start));
        self.step_start = now;
    }

    /// The steps and the exits to user space as a table.
    pub(crate) fn report(&self, exits: &ExitCounts) -> String {
        let mut lines = String::from("nixvmm: timing (microseconds)\n");
        for (name, time) in &self.steps {
            lines += &line(name, time.as_micros());
        }
        let total: Duration = self.steps.iter().map(|(_, time)| *time).sum();
        lines += &line("total until the guest runs", total.as_micros());
        lines += &line("the guest ran for", self.step_start.elapsed().as_micros());
        lines += "nixvmm: exits to user space\n";
        for (name, counter) in kinds(exits) {
            lines += &line(name, counter.load(Ordering::Relaxed));
        }
        lines
    }
}

fn line(name: &str, value: impl fmt::Display) -> String {
    format!("  {name:<28} {value:>10}\n")
}

fn kinds(exits: &ExitCounts) -> [(&'static str, &AtomicU64); 6] {
    [
        ("reads from ports", &exits.port_reads),
        ("writes to ports", &exits.port_writes),
        ("reads from memory registers", &exits.memory_reads),
        ("writes to memory registers", &exits.memory_writes),
        ("signals", &exits.signals),
        ("others", &exits.others),
    ]
}
