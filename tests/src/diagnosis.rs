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

/// How much of the host's kernel log is shown.
const LOG_TAIL: usize = 3000;

/// How many kinds of events of a trace are shown, those that came most often.
const EVENTS: usize = 12;

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
    text += "what KVM traced within that second, by how often:\n";
    for (event, count) in most_frequent(&trace, EVENTS) {
        let _ = writeln!(text, "  {count} {event}");
    }
    text
}

/// Whether no processor of the machine that the process `id` runs leaves its guest any more, but
/// for the host's own interrupts: they sleep and nothing will wake them, or each goes round where
/// it is and asks for nothing. It takes ten seconds.
pub fn stands_still(id: u32) -> bool {
    let before = statistics(id);
    thread::sleep(LIFE);
    own_exits_grew(&before, &statistics(id)) == Some(false)
}

/// Whether guests were left for a reason of their own between two looks; `None` where KVM does
/// not count.
fn own_exits_grew(before: &BTreeMap<String, u64>, after: &BTreeMap<String, u64>) -> Option<bool> {
    let own = |counters: &BTreeMap<String, u64>| {
        Some(counters.get("exits")?.saturating_sub(*counters.get("irq_exits")?))
    };
    // The look may find each processor between the two counters of one interrupt.
    let processors = after.keys().filter(|name| name.ends_with("/pid")).count() as u64;
    Some(own(after)? > own(before)?.saturating_add(processors))
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
        // All events end at once: switched off one by one, the last ones would fill the end.
        let _ = fs::write(Path::new(TRACING).join("tracing_on"), "0");
        let trace = fs::read(Path::new(TRACING).join("trace")).unwrap_or_default();
        String::from_utf8_lossy(&trace).into_owned()
    }
}

impl Drop for Trace {
    fn drop(&mut self) {
        for (file, value) in [("events/kvm/enable", "0"), ("trace", ""), ("tracing_on", "1")] {
            let _ = fs::write(Path::new(TRACING).join(file), value);
        }
    }
}

/// The events of `trace` that are the same but for their time, with how many there were: at most
/// `count` of them, the most frequent first. Of an exit the reason and the place count.
fn most_frequent(trace: &str, count: usize) -> Vec<(&str, usize)> {
    let mut events: BTreeMap<&str, usize> = BTreeMap::new();
    for line in trace.lines().filter(|line| !line.starts_with('#')) {
        let event = line.find("kvm_").and_then(|start| line.get(start..)).unwrap_or_default();
        let event = event.split(" info1 ").next().unwrap_or_default();
        *events.entry(event).or_default() += 1;
    }
    events.remove("");
    let mut events: Vec<_> = events.into_iter().collect();
    events.sort_by_key(|(_, times)| std::cmp::Reverse(*times));
    events.truncate(count);
    events
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
    fn events_are_counted_by_reason_and_place() {
        let trace = "# tracer: nop\n\
            vcpu0-1 [000] ..... 1.5: kvm_exit: vcpu 0 reason hlt rip 0x10 info1 0x1\n\
            vcpu0-1 [000] ..... 1.6: kvm_exit: vcpu 0 reason io rip 0x20 info1 0x1\n\
            vcpu0-1 [000] ..... 1.7: kvm_exit: vcpu 0 reason io rip 0x20 info1 0x2\n";
        let io = "kvm_exit: vcpu 0 reason io rip 0x20";
        assert_eq!(most_frequent(trace, 1), [(io, 2)]);
        assert_eq!(most_frequent(trace, 5).len(), 2);
    }

    #[test]
    fn a_guest_that_only_the_hosts_interrupts_leave_stands_still() {
        let look = |exits: u64, interrupts: u64| {
            let counters = [("exits", exits), ("irq_exits", interrupts), ("vcpu0/pid", 7)];
            counters.map(|(name, count)| (name.to_owned(), count)).into_iter().collect()
        };
        assert_eq!(own_exits_grew(&look(900, 500), &look(5000, 4599)), Some(false));
        assert_eq!(own_exits_grew(&look(900, 500), &look(902, 500)), Some(true));
        assert_eq!(own_exits_grew(&BTreeMap::new(), &look(1, 1)), None);
    }

    #[test]
    fn a_process_that_has_ended_shows_nothing() {
        assert_eq!(of(u32::MAX), "");
    }
}
