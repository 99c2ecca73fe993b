//! The measurements, made in the emulated host.

mod exits;
mod idle;
mod network;

use std::collections::BTreeMap;
use std::env;
use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::mount::MountFlags;
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};

use self::network::Network;
use super::mark::Stage as Reached;
use super::stage::{BZIMAGE, DISK, INITRD, Stage, VMLINUX};
use super::trace::{self, Event, Request};
use super::vmm::{Machine, Vmm};
use super::{Figures, Plan, Topic, store};
use crate::emulated_host::HEARTBEAT;
use crate::tool;

const MEMORY_MIB: u32 = 256;

/// What a boot may take by the host's clock, which stands still or is slow.
const PATIENCE: Duration = Duration::from_secs(120);

/// The same with a network. A peer that does not come to its end must not keep the others waiting.
const PATIENCE_WITH_LINK: Duration = Duration::from_secs(20);

/// After how long a step that goes on says so.
const BEAT: Duration = Duration::from_secs(5);

/// How often a VMM is looked at; looking costs instructions of the processor it runs on.
const POLL: Duration = Duration::from_millis(100);

/// Alternating runs of each VMM, where time is measured by a clock that is not exact.
const PAIRS: usize = 5;

const EXEC: Request<'_> = ("sched/sched_process_exec", None);
const SWITCHES: Request<'_> = ("sched/sched_switch", None);
const TRACE_OFF_AT_EXIT: Request<'_> = ("kvm/kvm_exit", Some("traceoff:1"));
const MARKS: Request<'_> = ("kvm/kvm_hypercall", None);
const END: Request<'_> = ("sched/sched_process_exit", None);

/// Measures what `plan` says, writing what there is after each topic.
///
/// # Errors
/// When the ground cannot be laid. A VMM that fails a measurement is a note, not an error.
pub fn run(plan: &Plan) -> Result<()> {
    beat();
    let folder = Path::new("/run/benchmark");
    fs::create_dir_all(folder)?;
    let _ = rustix::mount::mount("t", "/sys/kernel/tracing", "tracefs", MountFlags::empty(), None);
    let mut figures = Figures::default();
    stores(plan, folder, &mut figures)?;
    let of_vmms: Vec<_> = plan.topics.iter().filter(|topic| **topic != Topic::Store).collect();
    if of_vmms.is_empty() {
        return Ok(());
    }
    tool::progress("copying the VMMs into the emulated host's memory");
    let host = Host { plan, stage: Stage::set(folder, plan)? };
    // Its servers listen as long as this process lives.
    let mut network = None;
    let set_up = |network: &mut Option<Network>| -> Result<()> {
        if network.is_none() {
            *network = Some(Network::set_up(&host.stage)?);
        }
        Ok(())
    };
    for topic in of_vmms {
        match topic {
            Topic::Start => host.each(&mut figures, "start", Host::start),
            Topic::Boot => host.each(&mut figures, "boot", Host::boots),
            Topic::Exits => host.each(&mut figures, "exits", Host::exits),
            Topic::Memory => host.each(&mut figures, "memory", Host::memory),
            Topic::Block => host.each(&mut figures, "block", Host::block),
            Topic::Pairs => host.pairs(&mut figures)?,
            Topic::Store | Topic::StoreStart => {}
            Topic::Devices => {
                set_up(&mut network)?;
                host.each(&mut figures, "devices", Host::every_device);
            }
            Topic::Net | Topic::NetExits => {
                set_up(&mut network)?;
                for link in &plan.links {
                    let what = format!("{topic:?}, {}", link.name());
                    let measure = |host: &Host<'_>, vmm: Vmm, figures: &mut _| match topic {
                        Topic::Net => host.network(vmm, *link, figures),
                        _ => host.network_exits(vmm, *link, figures),
                    };
                    host.each(&mut figures, &what, measure);
                    figures.save(&plan.results)?;
                }
            }
            Topic::Profile => host.each(&mut figures, "profile", Host::profile),
        }
        figures.save(&plan.results)?;
    }
    Ok(())
}

fn stores(plan: &Plan, folder: &Path, figures: &mut Figures) -> Result<()> {
    let is_asked = |_: &&_| plan.topics.contains(&Topic::Store);
    let Some(store) = plan.store.as_ref().filter(is_asked) else { return Ok(()) };
    for server in &plan.servers {
        let folder = folder.join(format!("store-{}", server.name()));
        if let Err(error) = store::run(store, *server, &folder, beat, figures) {
            let note = format!("store, {}: {error:#}", server.name());
            tool::progress(&note);
            figures.notes.push(note);
        }
        figures.save(&plan.results)?;
    }
    Ok(())
}

struct Host<'a> {
    plan: &'a Plan,
    stage: Stage,
}

/// What is known of a VMM that ran.
struct Run {
    events: Vec<Event>,
    id: u32,
    status: ExitStatus,
}

impl Host<'_> {
    fn each(
        &self,
        figures: &mut Figures,
        what: &str,
        measure: impl Fn(&Self, Vmm, &mut Figures) -> Result<()>,
    ) {
        for vmm in &self.plan.vmms {
            beat();
            tool::progress(&format!("{what}: {}", vmm.name()));
            let before = figures.figures.len();
            if let Err(error) = measure(self, *vmm, figures) {
                let note = format!("{what}, {}: {error:#}; {}", vmm.name(), self.said());
                tool::progress(&note);
                figures.notes.push(note);
            }
            for figure in figures.figures.iter().skip(before) {
                tool::progress(&format!("  {}: {:.2} {}", figure.row, figure.value, figure.unit));
            }
        }
    }

    /// Ends the VMM right after the guest's first instructions. The clock runs on while everyone
    /// waits, as for a grace period of the host's kernel; that is no instruction of anybody.
    fn start(&self, vmm: Vmm, figures: &mut Figures) -> Result<()> {
        let requests = [EXEC, SWITCHES, ("kvm/kvm_entry", None), TRACE_OFF_AT_EXIT];
        let own = fs::read_to_string("/proc/self/comm")?.trim().to_owned();
        let mut runs = Vec::new();
        // The first run finds nothing in the processor's caches of translated code.
        for _ in 0..4 {
            let machine = self.bzimage("nothing");
            trace::start(&requests)?;
            let mut child = self.spawn(vmm, &machine)?;
            let entered =
                wait_for(PATIENCE, || Ok(fs::read_to_string(trace::FILE)?.contains("kvm_entry:")));
            let _ = child.kill();
            child.wait()?;
            let events = trace::stop(&requests)?;
            entered.context("the guest was not entered")?;
            let start = started(&events, child.id())?;
            let entry = events.iter().find(|event| event.name == "kvm_entry");
            let entry = entry.context("the guest was not entered")?.time;
            let others = trace::time_of(&events, &["swapper/0", &own], start, entry);
            runs.push((entry - start - others) / 1000.0);
        }
        figures.add("exec to first guest instruction", vmm, "M instructions", runs.split_off(1));
        Ok(())
    }

    fn boots(&self, vmm: Vmm, figures: &mut Figures) -> Result<()> {
        for (kind, machine) in [("bzImage", self.bzimage("boot")), ("ELF", self.elf("boot"))] {
            let requests = [EXEC, MARKS, END];
            let run = self.run(vmm, &machine, &requests)?;
            let start = started(&run.events, run.id)?;
            let mut add = |what: &str, value: f64| {
                figures.add(&format!("{kind}, {what}"), vmm, "ms", vec![value / 1000.0]);
            };
            let nanoseconds = |value: u64| u32::try_from(value / 1000).map_or(0.0, f64::from);
            let (at, mark) = trace::find_mark(&run.events, Reached::UserSpace)?;
            add("exec to user space", run.events[at].time - start);
            add("kernel's own clock", nanoseconds(mark.first));
            let (at, _) = trace::find_mark(&run.events, Reached::Devices)?;
            add("exec to disk read", run.events[at].time - start);
            let end = run.events.iter().rev().find(|event| {
                event.name == "sched_process_exit"
                    && event.text.contains(&format!("pid={} ", run.id))
            });
            add("exec to exit", end.context("the VMM's end was not seen")?.time - start);
        }
        Ok(())
    }

    fn exits(&self, vmm: Vmm, figures: &mut Figures) -> Result<()> {
        let requests = [
            MARKS,
            ("kvm/kvm_userspace_exit", None),
            ("kvm/kvm_pio", None),
            ("kvm/kvm_mmio", None),
        ];
        let run = self.run(vmm, &self.bzimage("boot"), &requests)?;
        for (stage, what) in [(Reached::UserSpace, "user space"), (Reached::Devices, "disk read")] {
            let (at, _) = trace::find_mark(&run.events, stage)?;
            let kinds = exits::by_kind(&run.events[..at]);
            let figure =
                figures.add(&format!("exits until {what}"), vmm, "", vec![kinds.values().sum()]);
            figure.parts = kinds;
        }
        Ok(())
    }

    fn block(&self, vmm: Vmm, figures: &mut Figures) -> Result<()> {
        for (row, nanoseconds) in self.loads(vmm)? {
            figures.add(
                &format!("{row}, per request"),
                vmm,
                "K instructions",
                vec![nanoseconds / 1000.0],
            );
        }
        Ok(())
    }

    fn pairs(&self, figures: &mut Figures) -> Result<()> {
        let mut runs: BTreeMap<(String, Vmm), Vec<f64>> = BTreeMap::new();
        for round in 1..=PAIRS {
            for vmm in &self.plan.vmms {
                tool::progress(&format!("block in time, round {round} of {PAIRS}: {}", vmm.name()));
                match self.loads(*vmm) {
                    Ok(loads) => {
                        for (row, nanoseconds) in loads {
                            let row = format!("{row}, in time");
                            runs.entry((row, *vmm)).or_default().push(1e9 / nanoseconds);
                        }
                    }
                    Err(error) => figures.notes.push(format!("{}: {error:#}", vmm.name())),
                }
            }
        }
        for ((row, vmm), values) in runs {
            figures.add(&row, vmm, "IOPS", values);
        }
        Ok(())
    }

    /// Nanoseconds for each request of each load.
    fn loads(&self, vmm: Vmm) -> Result<Vec<(String, f64)>> {
        let machine = Machine { io_thread: true, ..self.bzimage("block") };
        let run = self.run(vmm, &machine, &[MARKS])?;
        let marks = run.events.iter().filter_map(trace::mark);
        let mut loads = Vec::new();
        for mark in marks.filter(|mark| mark.stage == Reached::Load as u64) {
            let row = match mark.first >> 32 {
                1 => "4 KiB random read, 32 deep",
                2 => "4 KiB random write, 32 deep",
                _ => "4 KiB random read, 1 deep",
            };
            let requests = u32::try_from(mark.first & 0xffff_ffff)?;
            loads.push((row.to_owned(), mark.second as f64 / f64::from(requests)));
        }
        ensure!(loads.len() == 3, "{} of 3 loads came to an end", loads.len());
        Ok(loads)
    }

    fn profile(&self, vmm: Vmm, figures: &mut Figures) -> Result<()> {
        let requests = [EXEC, MARKS];
        let machine = self.bzimage("log initcall_debug log_buf_len=2M");
        let run = self.run(vmm, &machine, &requests)?;
        let log = self.output("console")?;
        let note = format!("{}: {}", vmm.name(), super::report::profile(&log));
        figures.notes.push(note);
        ensure!(run.status.success() || !log.is_empty(), "no log came");
        Ok(())
    }

    /// Runs `vmm` to its end.
    fn run(&self, vmm: Vmm, machine: &Machine<'_>, requests: &[Request<'_>]) -> Result<Run> {
        beat();
        trace::start(requests)?;
        let mut child = self.spawn(vmm, machine)?;
        let mut status = None;
        let patience = if machine.link.is_some() { PATIENCE_WITH_LINK } else { PATIENCE };
        let ended = wait_for(patience, || {
            status = child.try_wait()?;
            Ok(status.is_some())
        });
        let _ = child.kill();
        child.wait()?;
        let events = trace::stop(requests)?;
        ended.with_context(|| {
            let marks = events.iter().filter_map(trace::mark).count();
            format!("it did not finish; its guest got as far as mark {marks}")
        })?;
        let status = status.context("no status")?;
        Ok(Run { events, id: child.id(), status })
    }

    fn spawn(&self, vmm: Vmm, machine: &Machine<'_>) -> Result<Child> {
        let output = |name: &str| File::create(self.stage.root.join(name));
        // Alioth wants a terminal.
        let (input, console) = match vmm {
            Vmm::Alioth => terminal(output("console")?)?,
            _ => (Stdio::piped(), output("console")?.into()),
        };
        // Nothing here may wait for the machine around: the clock would run on to the next alarm.
        Command::new(self.stage.path(&self.plan.busybox)?)
            .arg("chroot")
            .arg(&self.stage.root)
            .arg(vmm.program(&self.plan.programs))
            .args(vmm.arguments(machine))
            .env_clear()
            .envs(vmm.environment(machine))
            .stdin(input)
            .stdout(console)
            .stderr(output("errors")?)
            .spawn()
            .with_context(|| format!("{} cannot be started", vmm.name()))
    }

    fn bzimage<'a>(&'a self, measure: &'a str) -> Machine<'a> {
        Machine {
            kernel: Path::new(BZIMAGE),
            is_elf: false,
            initrd: Path::new(INITRD),
            disk: Path::new(DISK),
            processors: 1,
            memory: MEMORY_MIB,
            measure,
            io_thread: false,
            link: None,
            has_every_device: false,
        }
    }

    fn elf<'a>(&'a self, measure: &'a str) -> Machine<'a> {
        Machine { kernel: Path::new(VMLINUX), is_elf: true, ..self.bzimage(measure) }
    }

    fn output(&self, name: &str) -> Result<String> {
        let bytes = fs::read(self.stage.root.join(name))?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// The end of what the last VMM said.
    fn said(&self) -> String {
        let said = [self.output("console"), self.output("errors")].map(Result::unwrap_or_default);
        format!("it said: {}", tool::tail(said.concat().as_bytes(), 800))
    }
}

/// A terminal whose output goes to `file`.
fn terminal(mut file: File) -> Result<(Stdio, Stdio)> {
    let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY)?;
    grantpt(&master)?;
    unlockpt(&master)?;
    let name = ptsname(&master, Vec::new())?;
    let terminal =
        OpenOptions::new().read(true).write(true).open(OsStr::from_bytes(name.as_bytes()))?;
    let mut master = File::from(master);
    // It ends when the VMM has closed the terminal.
    thread::spawn(move || io::copy(&mut master, &mut file));
    Ok((terminal.try_clone()?.into(), terminal.into()))
}

/// When process `id` became the VMM: its last exec, since the first was that of `chroot`.
fn started(events: &[Event], id: u32) -> Result<f64> {
    let mut execs = events.iter().rev().filter(|event| event.name == "sched_process_exec");
    let exec = execs.find(|event| event.thread == id);
    Ok(exec.context("the VMM was not started")?.time)
}

fn wait_for(patience: Duration, mut condition: impl FnMut() -> Result<bool>) -> Result<()> {
    let start = Instant::now();
    let mut next_beat = BEAT;
    while !condition()? {
        if start.elapsed() > patience {
            bail!("nothing happened for {} s", patience.as_secs());
        }
        if start.elapsed() > next_beat {
            beat();
            next_beat += BEAT;
        }
        thread::sleep(POLL);
    }
    Ok(())
}

/// Shows the outside that this goes on.
fn beat() {
    if let Some(path) = env::var_os(HEARTBEAT) {
        let _ = fs::write(path, "on");
    }
}
