//! Where start-up time goes: `--timing`.

use std::fmt;
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
    pub(crate) fn report(&self, exits: &[ExitCounts]) -> String {
        let mut lines = String::from("nixvmm: timing (microseconds)\n");
        for (name, time) in &self.steps {
            lines += &line(name, time.as_micros());
        }
        let total: Duration = self.steps.iter().map(|(_, time)| *time).sum();
        lines += &line("total until the guest runs", total.as_micros());
        lines += &line("the guest ran for", self.step_start.elapsed().as_micros());
        lines += "nixvmm: exits to user space\n";
        for (index, name) in KINDS.iter().enumerate() {
            let of = |exits: &ExitCounts| exits.read().get(index).map_or(0, |(_, count)| *count);
            lines += &line(name, exits.iter().map(of).sum::<u64>());
        }
        lines
    }
}

fn line(name: &str, value: impl fmt::Display) -> String {
    format!("  {name:<28} {value:>10}\n")
}

/// What reasons are called here, in the order of [`ExitCounts::read`].
const KINDS: [&str; 6] = [
    "reads from ports",
    "writes to ports",
    "reads from memory registers",
    "writes to memory registers",
    "signals",
    "others",
];
