//! What do the figures say? A table with a line for each goal, and where time goes.

use std::fmt::Write as _;

use super::Figures;
use super::vmm::Vmm;

/// What a row must be.
#[derive(Clone, Copy, Debug)]
enum Goal {
    /// At most so many of its unit.
    AtMost(f64),
    /// At most so many times the best QEMU, and no more than alioth.
    OfBest(f64),
    /// At least so many times the best QEMU.
    OverBest(f64),
    /// The work for a request is at most the best QEMU's divided by this.
    UnderBest(f64),
    /// Nothing was promised.
    Open,
}

const ROWS: [(&str, Goal); 50] = [
    ("exec to first guest instruction", Goal::AtMost(10.0)),
    ("bzImage, exec to user space", Goal::OfBest(0.85)),
    ("bzImage, kernel's own clock", Goal::Open),
    ("bzImage, exec to disk read", Goal::Open),
    ("bzImage, exec to exit", Goal::Open),
    ("ELF, exec to user space", Goal::OfBest(0.85)),
    ("ELF, kernel's own clock", Goal::Open),
    ("ELF, exec to disk read", Goal::Open),
    ("ELF, exec to exit", Goal::Open),
    ("exits until user space", Goal::AtMost(1500.0)),
    ("exits until disk read", Goal::Open),
    ("memory outside RAM, 1 vCPU", Goal::AtMost(1536.0)),
    ("memory per further vCPU", Goal::AtMost(32.0)),
    ("memory outside RAM, every device", Goal::AtMost(3072.0)),
    ("store server, exec to served root", Goal::AtMost(20.0)),
    ("store server, memory", Goal::AtMost(2048.0)),
    ("store server, memory of a known file", Goal::AtMost(100.0)),
    ("program size", Goal::AtMost(3.0)),
    ("4 KiB random read, 32 deep, per request", Goal::UnderBest(1.1)),
    ("4 KiB random write, 32 deep, per request", Goal::UnderBest(1.1)),
    ("4 KiB random read, 32 deep, in time", Goal::OverBest(1.1)),
    ("4 KiB random write, 32 deep, in time", Goal::OverBest(1.1)),
    ("tap, guest sends", Goal::OverBest(1.3)),
    ("tap, guest receives", Goal::OverBest(1.3)),
    ("tap, round trips", Goal::OverBest(1.3)),
    ("vhost-net, guest sends", Goal::OverBest(1.0)),
    ("vhost-net, guest receives", Goal::OverBest(1.0)),
    ("vhost-net, round trips", Goal::OverBest(1.0)),
    ("vsock, guest sends", Goal::OverBest(1.0)),
    ("vsock, guest receives", Goal::OverBest(1.0)),
    ("vsock, relayed message", Goal::AtMost(1.0)),
    ("vsock, round trips", Goal::OverBest(1.0)),
    ("unix vsock, guest sends", Goal::Open),
    ("unix vsock, guest receives", Goal::Open),
    ("unix vsock, relayed message", Goal::AtMost(1.0)),
    ("unix vsock, round trips", Goal::Open),
    ("tap, exits per MiB sent", Goal::Open),
    ("tap, exits per MiB received", Goal::Open),
    ("tap, exits per round trip", Goal::Open),
    ("vhost-net, exits per MiB sent", Goal::Open),
    ("vhost-net, exits per MiB received", Goal::Open),
    ("vhost-net, exits per round trip", Goal::Open),
    ("vsock, exits per MiB sent", Goal::Open),
    ("vsock, exits per MiB received", Goal::Open),
    ("vsock, exits per round trip", Goal::Open),
    ("vsock, exits per relayed message", Goal::Open),
    ("unix vsock, exits per MiB sent", Goal::Open),
    ("unix vsock, exits per MiB received", Goal::Open),
    ("unix vsock, exits per round trip", Goal::Open),
    ("unix vsock, exits per relayed message", Goal::Open),
];

/// The table.
pub fn table(figures: &Figures) -> String {
    let mut text = format!("{:42}", "");
    for vmm in Vmm::ALL {
        let _ = write!(text, "{:>14}", vmm.name());
    }
    let _ = writeln!(text, "{:>12}  goal", "to best QEMU");
    for (row, goal) in ROWS {
        let Some(unit) = figures.figures.iter().find(|f| f.row == row).map(|f| &f.unit) else {
            continue;
        };
        let _ = write!(text, "{row:42}");
        for vmm in Vmm::ALL {
            match figures.value(row, vmm) {
                Some(value) => {
                    let _ = write!(text, "{:>14}", number(value));
                }
                None => text.push_str(&format!("{:>14}", "-")),
            }
        }
        let best = best_qemu(figures, row, goal);
        let ours = figures.value(row, Vmm::Nixvmm);
        match ours.zip(best) {
            Some((ours, best)) => {
                let _ = write!(text, "{:>12.3}", ours / best);
            }
            None => text.push_str(&format!("{:>12}", "-")),
        }
        let alioth = figures.value(row, Vmm::Alioth);
        let _ = writeln!(text, "  {} ({unit})", verdict(goal, ours, best, alioth));
    }
    text
}

/// What takes long in the kernel's `log`, which was written with `initcall_debug`.
pub fn profile(log: &str) -> String {
    let mut calls: Vec<(f64, String)> = Vec::new();
    let mut gaps: Vec<(f64, String)> = Vec::new();
    let mut last: Option<(f64, &str)> = None;
    for line in log.lines() {
        let Some((prefix, message)) = line.split_once(';') else { continue };
        let time = prefix.split(',').nth(2).and_then(|time| time.parse::<f64>().ok());
        let Some(time) = time else { continue };
        let call = message.strip_prefix("initcall ").and_then(|rest| rest.split_once(" after "));
        if let Some((name, rest)) = call {
            let name = name.split(['+', ' ']).next().unwrap_or_default();
            let took = rest.split(' ').next().and_then(|took| took.parse::<f64>().ok());
            calls.push((took.unwrap_or(0.0) / 1000.0, name.to_owned()));
        }
        if let Some((before, earlier)) = last {
            gaps.push(((time - before) / 1000.0, format!("{earlier} → {message}")));
        }
        last = Some((time, message));
    }
    let mut text = String::from("initcalls of 10 ms and more:\n");
    for (took, name) in longest(calls, 10.0) {
        let _ = writeln!(text, "  {took:8.1} ms  {name}");
    }
    text.push_str("gaps of 10 ms and more between messages:\n");
    for (took, name) in longest(gaps, 10.0) {
        let _ = writeln!(text, "  {took:8.1} ms  {name}");
    }
    text
}

fn longest(mut all: Vec<(f64, String)>, least: f64) -> Vec<(f64, String)> {
    all.retain(|(took, _)| *took >= least);
    all.sort_by(|one, other| other.0.total_cmp(&one.0));
    all
}

fn best_qemu(figures: &Figures, row: &str, goal: Goal) -> Option<f64> {
    let modes = Vmm::ALL.into_iter().filter(|vmm| vmm.is_qemu());
    let values = modes.filter_map(|vmm| figures.value(row, vmm));
    match goal {
        Goal::OverBest(_) => values.max_by(f64::total_cmp),
        _ => values.min_by(f64::total_cmp),
    }
}

fn verdict(goal: Goal, ours: Option<f64>, best: Option<f64>, alioth: Option<f64>) -> String {
    let (met, text) = match goal {
        Goal::Open => return "none".to_owned(),
        Goal::AtMost(most) => (ours.map(|ours| ours <= most), format!("at most {most}")),
        Goal::OfBest(ratio) => {
            let met = ours.zip(best).map(|(ours, best)| {
                ours <= ratio * best && alioth.is_none_or(|alioth| ours <= alioth)
            });
            (met, format!("at most {ratio}, no later than alioth"))
        }
        Goal::OverBest(ratio) => {
            (ours.zip(best).map(|(ours, best)| ours >= ratio * best), format!("at least {ratio}"))
        }
        Goal::UnderBest(ratio) => {
            let most = 1.0 / ratio;
            (ours.zip(best).map(|(ours, best)| ours <= most * best), format!("at most {most:.2}"))
        }
    };
    match met {
        Some(true) => format!("met: {text}"),
        Some(false) => format!("MISSED: {text}"),
        None => text,
    }
}

fn number(value: f64) -> String {
    if value >= 100.0 { format!("{value:.0}") } else { format!("{value:.2}") }
}
