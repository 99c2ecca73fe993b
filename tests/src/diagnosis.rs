//! What does a silent guest do? When a test gives up on a guest that still runs, this tells where
//! each thread of `nixvmm` is, what the processors leave the guest for, and what nobody has taken.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use crate::tool;

/// Two looks at everything that counts are so far apart, so that one sees what goes on.
const INTERVAL: Duration = Duration::from_secs(1);

/// Within so long any kernel that lives does something, if only for its clocks.
const LIFE: Duration = Duration::from_secs(10);

/// Where KVM counts, a folder for each machine, named by the thread that made it and its
/// descriptor.
const KVM_STATISTICS: &str = "/sys/kernel/debug/kvm";

/// Where the host's kernel says why processors leave guests and which interrupts they get.
const TRACING: &str = "/sys/kernel/tracing";

/// Which machine this is: of an emulated host, the emulator and its version.
const MACHINE: &str = "/sys/class/dmi/id/product_version";

/// How much of a trace is shown, and of the host's kernel log.
const TRACE_TAIL: usize = 6000;
const LOG_TAIL: usize = 3000;

/// What the process `id` and the machine it runs do now; empty when it has ended.
///
/// It takes a second. What the user may not see, or the host's kernel does not have, is left out.
pub fn of(id: u32) -> String {
    let process = PathBuf::from(format!("/proc/{id}"));
    if !is_running(&process) {
        return String::new();
    }
    let trace = Trace::start();
    let (threads, statistics) = (threads(&process), statistics(id));
    thread::sleep(INTERVAL);
    let trace = trace.map(Trace::finish).unwrap_or_default();
    let log = tool::run("dmesg", [""; 0]).unwrap_or_default();
    let mut text = format!("the host's kernel log ends:\n{}", tool::tail(&log, LOG_TAIL));
    text += &format!("the end of KVM's trace:\n{trace}\n");
    text += &format!("signals that nobody took, and timers:\n{}", descriptors(&process));
    text += "KVM's statistics, and their growth within a second:\n ";
    for (name, now) in self::statistics(id).into_iter().filter(|(_, now)| *now > 0) {
        let grown = now.saturating_sub(statistics.get(&name).copied().unwrap_or(now));
        let _ = write!(text, " {name} {now} +{grown};");
    }
    // What tells most stands last, where it is found in the log of a long run.
    let machine = self::text(Path::new(MACHINE));
    let _ = write!(text, "\nthreads on {machine}, with what they did within a second:\n");
    for (name, now) in self::threads(&process) {
        let before = threads.get(&name);
        let ran = now.ticks.saturating_sub(before.map_or(0, |before| before.ticks));
        let switched = now.switches.saturating_sub(before.map_or(0, |before| before.switches));
        let _ = writeln!(text, "  {name}: {ran} ticks, {switched} switches; {}", now.place);
    }
    text
}

/// Whether no processor of the machine that the process `id` runs leaves its guest any more: they
/// sleep, and nothing will wake them. It takes ten seconds.
pub fn stands_still(id: u32) -> bool {
    let exits = || statistics(id).get("exits").copied();
    let before = exits();
    thread::sleep(LIFE);
    before.is_some() && before == exits()
}

/// Where a thread is, and how far it has come.
struct Thread {
    place: String,
    ticks: u64,
    switches: u64,
}

/// The threads of a process by name and id.
fn threads(process: &Path) -> BTreeMap<String, Thread> {
    let folders = fs::read_dir(process.join("task")).into_iter().flatten().flatten();
    folders
        .map(|folder| {
            let read = |name: &str| text(&folder.path().join(name));
            let name = format!("{} {}", folder.file_name().display(), read("comm"));
            let stack = read("stack").replace('\n', " ").replace("[<0>] ", "");
            let [wait, call] = ["wchan", "syscall"].map(read);
            let status = read("status");
            let lines = status.lines();
            let switches = lines.filter(|line| line.contains("ctxt_switches"));
            let fields = read("stat");
            let state = after_name(&fields).next().unwrap_or("?").to_owned();
            let thread = Thread {
                place: format!("{state} in {wait}; system call {call}; stack {stack}"),
                // User and system time, fields 14 and 15 of stat.
                ticks: after_name(&fields).skip(11).take(2).map(number).sum(),
                switches: switches.filter_map(|line| line.split('\t').nth(1)).map(number).sum(),
            };
            (name, thread)
        })
        .collect()
}

/// What KVM counts for the machine of a process and each of its processors. The thread that made
/// the machine may have ended: it is the first after the process.
fn statistics(id: u32) -> BTreeMap<String, u64> {
    let machines = fs::read_dir(KVM_STATISTICS).into_iter().flatten().flatten();
    let own = machines
        .filter_map(|folder| {
            let name = folder.file_name().into_string().ok()?;
            let (thread, descriptor) = name.split_once('-')?;
            let what = fs::read_link(format!("/proc/{id}/fd/{descriptor}")).ok()?;
            let thread: u32 = thread.parse().ok()?;
            (what == Path::new("anon_inode:kvm-vm") && thread >= id).then_some((thread, folder))
        })
        .min_by_key(|(thread, _)| *thread);
    let mut counters = BTreeMap::new();
    if let Some((_, machine)) = own {
        count_files(&machine.path(), "", &mut counters);
    }
    counters
}

fn count_files(folder: &Path, prefix: &str, counters: &mut BTreeMap<String, u64>) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let name = format!("{prefix}{}", entry.file_name().display());
        if entry.path().is_dir() {
            count_files(&entry.path(), &format!("{name}/"), counters);
        } else if let Ok(value) = text(&entry.path()).parse() {
            counters.insert(name, value);
        }
    }
}

/// Eventfds that are signalled, timers, and what polls wait for.
fn descriptors(process: &Path) -> String {
    let files = fs::read_dir(process.join("fdinfo")).into_iter().flatten().flatten();
    let mut all = String::new();
    for file in files {
        let information = text(&file.path());
        let interesting = |line: &&str| match line.split_once(':') {
            Some(("eventfd-count", count)) => count.trim() != "0",
            Some(("ticks" | "it_value" | "tfd", _)) => true,
            _ => false,
        };
        let lines = information.lines().filter(interesting);
        let lines: Vec<_> =
            lines.map(|line| line.split("pos:").next().unwrap_or_default()).collect();
        if !lines.is_empty() {
            let _ = writeln!(all, "  {}: {}", file.file_name().display(), lines.join("; "));
        }
    }
    all
}

/// KVM's trace events, switched on while this exists.
struct Trace;

impl Trace {
    fn start() -> Option<Self> {
        fs::write(Path::new(TRACING).join("events/kvm/enable"), "1").ok().map(|()| Self)
    }

    fn finish(self) -> String {
        drop(self);
        let trace = fs::read(Path::new(TRACING).join("trace")).unwrap_or_default();
        tool::tail(&trace, TRACE_TAIL)
    }
}

impl Drop for Trace {
    fn drop(&mut self) {
        let _ = fs::write(Path::new(TRACING).join("events/kvm/enable"), "0");
    }
}

fn is_running(process: &Path) -> bool {
    let fields = text(&process.join("stat"));
    after_name(&fields).next().is_some_and(|state| !["", "Z", "X"].contains(&state))
}

/// The fields of stat behind the name, which may hold anything: from the state on.
fn after_name(fields: &str) -> impl Iterator<Item = &str> {
    fields.rsplit_once(") ").map_or("", |(_, rest)| rest).split(' ')
}

fn text(file: &Path) -> String {
    fs::read_to_string(file).unwrap_or_default().trim().to_owned()
}

fn number(word: &str) -> u64 {
    word.trim().parse().unwrap_or(0)
}

#[cfg(test)]
mod test {
    use std::process;

    use super::*;

    #[test]
    fn a_running_process_shows_its_threads_and_its_signalled_events() {
        let event = rustix::event::eventfd(7, rustix::event::EventfdFlags::CLOEXEC).unwrap();
        let told = of(process::id());
        assert!(told.contains("switches;") && told.contains("eventfd-count"), "{told}");
        drop(event);
    }

    #[test]
    fn a_process_that_has_ended_shows_nothing() {
        assert_eq!(of(u32::MAX), "");
    }
}
