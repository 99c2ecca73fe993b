//! What does the host's kernel see of a VMM? The tracing of Linux (its
//! Documentation/trace/ftrace.rst) has the moment of every event that is asked for.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};

use super::mark::{MARK, Stage};

const FOLDER: &str = "/sys/kernel/tracing";

/// What was traced so far, as text.
pub const FILE: &str = "/sys/kernel/tracing/trace";

/// Enough for every exit of a boot.
const BUFFER_KIB: &str = "65536";

/// An event and, if it has one, its trigger.
pub type Request<'a> = (&'a str, Option<&'a str>);

/// One line of a trace.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    /// Microseconds of the host's clock.
    pub time: f64,
    /// The thread.
    pub thread: u32,
    /// Its name without the subsystem, such as `kvm_exit`.
    pub name: String,
    /// The rest of the line.
    pub text: String,
}

/// What the guest told, and when.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Mark {
    /// A [`Stage`].
    pub stage: u64,
    /// What belongs to it.
    pub first: u64,
    /// What belongs to it.
    pub second: u64,
}

/// Starts to trace `requests` and nothing else.
///
/// # Errors
/// When the kernel does not know one of them, or its tracing is not there.
pub fn start(requests: &[Request<'_>]) -> Result<()> {
    write("tracing_on", "0")?;
    // What a trigger has enabled outlives the trigger.
    write("events/enable", "0")?;
    write("buffer_size_kb", BUFFER_KIB)?;
    write("trace", "")?;
    for (event, trigger) in requests {
        if let Some(trigger) = trigger {
            write(&format!("events/{event}/trigger"), trigger)?;
        }
        write(&format!("events/{event}/enable"), "1")?;
    }
    write("tracing_on", "1")
}

/// Stops to trace `requests` and returns what was seen.
///
/// # Errors
/// When the trace cannot be read or the kernel had to leave events out.
pub fn stop(requests: &[Request<'_>]) -> Result<Vec<Event>> {
    write("tracing_on", "0")?;
    for (event, trigger) in requests {
        if let Some(trigger) = trigger {
            write(&format!("events/{event}/trigger"), &format!("!{trigger}"))?;
        }
        write(&format!("events/{event}/enable"), "0")?;
    }
    let text = fs::read_to_string(FILE)?;
    ensure!(!text.contains("LOST"), "the trace's buffer is too small");
    Ok(text.lines().filter_map(parse).collect())
}

/// The marks of the guest in `event`.
pub fn mark(event: &Event) -> Option<Mark> {
    if event.name != "kvm_hypercall" {
        return None;
    }
    let mut words = event.text.split_whitespace();
    let mut field = |name: &str| {
        words.find(|word| *word == name)?;
        u64::from_str_radix(words.next()?.trim_start_matches("0x"), 16).ok()
    };
    if field("nr")? != MARK {
        return None;
    }
    Some(Mark { stage: field("a1")?, first: field("a2")?, second: field("a3")? })
}

/// Where and what the mark for `stage` is.
///
/// # Errors
/// When the guest did not get there.
pub fn find_mark(events: &[Event], stage: Stage) -> Result<(usize, Mark)> {
    let marks = events.iter().enumerate().filter_map(|(at, event)| Some((at, mark(event)?)));
    let mut wanted = marks.filter(|(_, mark)| mark.stage == stage as u64);
    wanted.next().with_context(|| {
        let failed = events.iter().filter_map(mark).find(|mark| mark.stage == Stage::Failed as u64);
        format!("the guest did not reach {stage:?} (its own error: {failed:?})")
    })
}

/// Microseconds between `start` and `end` that the only processor spent on tasks with one of
/// `names`, by the switches in `events`.
pub fn time_of(events: &[Event], names: &[&str], start: f64, end: f64) -> f64 {
    let switches = events.iter().filter(|event| event.name == "sched_switch");
    let (mut sum, mut since) = (0.0, None);
    for event in switches.filter(|event| (start..end).contains(&event.time)) {
        if let Some(since) = since.take() {
            sum += event.time - since;
        }
        let next = event.text.split_once("next_comm=").and_then(|(_, next)| next.split(' ').next());
        if next.is_some_and(|next| names.contains(&next)) {
            since = Some(event.time);
        }
    }
    sum
}

fn write(file: &str, text: &str) -> Result<()> {
    let path = Path::new(FOLDER).join(file);
    fs::write(&path, text).with_context(|| format!("{text:?} to {}", path.display()))
}

/// `   name-123     [000] d..2.    12.345678: kvm_exit: reason …`
fn parse(line: &str) -> Option<Event> {
    if line.starts_with('#') {
        return None;
    }
    let (task, rest) = line.split_once(" [")?;
    let thread = task.trim().rsplit_once('-')?.1.parse().ok()?;
    let (_, rest) = rest.split_once(char::is_whitespace)?;
    let (_flags, rest) = rest.trim_start().split_once(char::is_whitespace)?;
    let (time, rest) = rest.trim_start().split_once(": ")?;
    let (name, text) = rest.split_once(':')?;
    let time = time.parse::<f64>().ok()? * 1e6;
    Some(Event { time, thread, name: name.to_owned(), text: text.trim().to_owned() })
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn a_line_of_a_trace_is_taken_apart() {
        let line = " qemu-system-x86-210     [000] d..2.    31.000250: kvm_hypercall: nr \
            0x6e697876 a0 0x7ff a1 0x1 a2 0x4d2 a3 0x0";
        let event = parse(line).expect("an event");
        assert_eq!((event.thread, event.name.as_str()), (210, "kvm_hypercall"));
        assert!((event.time - 31_000_250.0).abs() < 0.5);
        assert_eq!(mark(&event), Some(Mark { stage: 1, first: 1234, second: 0 }));
        assert_eq!(parse("# tracer: nop"), None);
    }

    #[test]
    fn the_time_of_others_is_known_by_the_switches() {
        let switch = |time, next: &str| Event {
            time,
            thread: 0,
            name: "sched_switch".to_owned(),
            text: format!("prev_comm=a prev_pid=1 ==> next_comm={next} next_pid=2"),
        };
        let events = [switch(1.0, "swapper/0"), switch(3.0, "a"), switch(10.0, "swapper/0")];
        let idle = |start| time_of(&events, &["swapper/0"], start, 20.0);
        assert!((idle(0.0) - 2.0).abs() < 1e-9);
        assert!(idle(2.0).abs() < 1e-9);
        assert!((time_of(&events, &["a", "swapper/0"], 0.0, 20.0) - 9.0).abs() < 1e-9);
    }

    #[test]
    fn a_hypercall_of_the_guests_kernel_is_no_mark() {
        let event = Event {
            time: 0.0,
            thread: 1,
            name: "kvm_hypercall".to_owned(),
            text: "nr 0x5 a0 0x1 a1 0x1 a2 0x0 a3 0x0".to_owned(),
        };
        assert_eq!(mark(&event), None);
    }
}
