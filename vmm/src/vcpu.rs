//! Virtual processors: one thread for each, which lives as long as the process.
//!
//! A thread is given a processor for each run of the guest and drops it when the run ends, so that
//! a restart makes no thread. A processor that cannot go on reports an [`Ending`] and leaves the
//! guest; it never takes the process down.
#![expect(unsafe_code, reason = "a signal handler reaches the processor that its thread runs")]

use std::cell::Cell;
use std::io;
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow};
use devices::bus::Bus;
use devices::event::Event;
use kvm_bindings::{
    KVM_SYSTEM_EVENT_CRASH, KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN, kvm_run,
};
use kvm_ioctls::{VcpuExit, VcpuFd};
use vmm_sys_util::signal::{Killable as _, SIGRTMIN, register_signal_handler};

use crate::run_state::{Ending, Endings, Phase, RunState};
use crate::thread;

/// How often what a processor may wait for is served while the processors leave the guest.
const SERVE_INTERVAL: Duration = Duration::from_millis(1);

/// What virtual processors read and write outside RAM.
pub(crate) struct Buses {
    /// Memory-mapped registers.
    pub(crate) memory: Bus,
    /// I/O ports.
    pub(crate) ports: Bus,
}

/// How often a processor left the guest for user space, by reason. No two share a cache line.
#[derive(Debug, Default)]
#[repr(align(64))]
pub(crate) struct ExitCounts {
    /// Reads from I/O ports.
    pub(crate) port_reads: AtomicU64,
    /// Writes to I/O ports.
    pub(crate) port_writes: AtomicU64,
    /// Reads from memory-mapped registers.
    pub(crate) memory_reads: AtomicU64,
    /// Writes to memory-mapped registers.
    pub(crate) memory_writes: AtomicU64,
    /// Interruptions by a signal.
    pub(crate) signals: AtomicU64,
    /// Everything else.
    pub(crate) others: AtomicU64,
}

impl ExitCounts {
    /// The counts of `processors` that have not run.
    pub(crate) fn of(processors: u32) -> Vec<Self> {
        (0..processors).map(|_| Self::default()).collect()
    }

    /// The counts by the name of their reason.
    pub(crate) fn read(&self) -> [(&'static str, u64); 6] {
        [
            ("port_reads", &self.port_reads),
            ("port_writes", &self.port_writes),
            ("memory_reads", &self.memory_reads),
            ("memory_writes", &self.memory_writes),
            ("signals", &self.signals),
            ("others", &self.others),
        ]
        .map(|(name, count)| (name, count.load(Ordering::Relaxed)))
    }
}

/// What all processor threads share.
pub(crate) struct Shared {
    /// What the processors are to do.
    pub(crate) run_state: RunState,
    /// Where they report how a run ended.
    pub(crate) endings: Endings,
    /// The devices.
    pub(crate) buses: Buses,
    /// Why each of them left the guest.
    pub(crate) exits: Vec<ExitCounts>,
}

/// The threads of all processors.
pub(crate) struct VcpuThreads {
    channels: Vec<Channels>,
    pause: Pause,
}

/// Stops and continues all processors from the main thread; clones are the same.
#[derive(Clone)]
pub(crate) struct Pause {
    threads: Arc<[JoinHandle<()>]>,
    shared: Arc<Shared>,
}

/// The way of processors to the thread that runs them, and of the news that one has left.
struct Channels {
    processors: Sender<VcpuFd>,
    left: Receiver<()>,
}

impl VcpuThreads {
    /// Makes `count` threads that wait for a processor each.
    ///
    /// `prepare` runs on each thread before anything else: it confines the thread.
    pub(crate) fn spawn(
        count: u32,
        shared: &Arc<Shared>,
        prepare: impl Fn() -> Result<()> + Clone + Send + 'static,
    ) -> Result<Self> {
        register_signal_handler(SIGRTMIN(), leave_guest)
            .map_err(io::Error::from)
            .context("cannot handle the signal that stops processors")?;
        let (report, prepared) = channel();
        let threads: Vec<_> = (0..count)
            .map(|id| spawn_thread(id, Arc::clone(shared), prepare.clone(), report.clone()))
            .collect::<Result<_>>()?;
        drop(report);
        prepared.iter().collect::<Result<()>>()?;
        let (threads, channels): (Vec<_>, _) = threads.into_iter().unzip();
        Ok(Self { channels, pause: Pause { threads: threads.into(), shared: Arc::clone(shared) } })
    }

    /// The way to pause the processors.
    pub(crate) fn pause(&self) -> Pause {
        self.pause.clone()
    }

    /// Starts a run of the guest: each thread gets its processor.
    pub(crate) fn start(&self, processors: Vec<VcpuFd>) -> Result<()> {
        self.pause.shared.run_state.set(Phase::Running);
        for (channels, processor) in self.channels.iter().zip(processors) {
            channels.processors.send(processor).map_err(|_| anyhow!("a vCPU thread is gone"))?;
        }
        Ok(())
    }

    /// Ends the run: when this returns every processor has left the guest and is dropped.
    ///
    /// Calls `serve` as long as it takes: a processor may be waiting for the calling thread.
    pub(crate) fn stop(&self, mut serve: impl FnMut() -> Result<()>) -> Result<()> {
        self.pause.shared.run_state.set(Phase::Stopping);
        self.pause.kick();
        for channels in &self.channels {
            // A thread that is gone, and its processor with it, disconnects.
            while channels.left.recv_timeout(SERVE_INTERVAL) == Err(RecvTimeoutError::Timeout) {
                serve()?;
            }
        }
        Ok(())
    }
}

impl Pause {
    /// Has the processors leave a guest that runs; [`RunState::rested`] tells of each.
    pub(crate) fn begin(&self) {
        if self.shared.run_state.phase() == Phase::Running {
            self.shared.run_state.set(Phase::Paused);
            self.kick();
        }
    }

    /// Lets the processors of a paused machine enter the guest.
    pub(crate) fn end(&self) {
        if self.shared.run_state.phase() == Phase::Paused {
            self.shared.run_state.set(Phase::Running);
        }
    }

    /// Whether the machine is paused or about to be.
    pub(crate) fn is_begun(&self) -> bool {
        self.shared.run_state.phase() == Phase::Paused
    }

    /// Whether the machine is paused and no processor is in the guest any more.
    pub(crate) fn is_complete(&self) -> bool {
        let resting = usize::try_from(self.shared.run_state.resting()).unwrap_or(usize::MAX);
        self.is_begun() && resting >= self.threads.len()
    }

    /// Signalled when [`Pause::is_complete`] may have become true.
    pub(crate) fn rested(&self) -> &Event {
        self.shared.run_state.rested()
    }

    /// Why each processor left the guest.
    pub(crate) fn exits(&self) -> &[ExitCounts] {
        &self.shared.exits
    }

    fn kick(&self) {
        // A thread that has ended needs no kick.
        for thread in self.threads.iter().filter(|thread| !thread.is_finished()) {
            let _ = thread.kill(SIGRTMIN());
        }
    }
}

fn spawn_thread(
    id: u32,
    shared: Arc<Shared>,
    prepare: impl Fn() -> Result<()> + Send + 'static,
    prepared: Sender<Result<()>>,
) -> Result<(JoinHandle<()>, Channels)> {
    let (processors, given) = channel();
    let (leave, left) = channel();
    let thread = thread::spawn(&format!("vcpu{id}"), move || {
        let outcome = prepare();
        let is_ready = outcome.is_ok();
        let _ = prepared.send(outcome);
        drop(prepared);
        if !is_ready {
            return;
        }
        for mut processor in given {
            run(&mut processor, id, &shared);
            drop(processor);
            let _ = leave.send(());
        }
    })?;
    Ok((thread, Channels { processors, left }))
}

/// Runs one processor until the machine stops.
fn run(processor: &mut VcpuFd, id: u32, shared: &Shared) {
    let running = Running::enter(processor);
    let uncounted = ExitCounts::default();
    let exits = shared.exits.get(id as usize).unwrap_or(&uncounted);
    loop {
        running.forget_kick();
        match shared.run_state.phase() {
            Phase::Running => {}
            Phase::Paused => {
                shared.run_state.rest();
                // The guest's watchdogs forgive the time in which it did not run. A guest that has
                // no clock of KVM's has nothing to be told.
                let _ = processor.kvmclock_ctrl();
                continue;
            }
            Phase::Stopping => return,
        }
        match step(processor, &running, shared, exits) {
            Leave::No => {}
            Leave::Ended(ending) => end(ending, shared),
            Leave::Failed(failure) => {
                let place = processor.get_regs().map(|registers| registers.rip).unwrap_or(0);
                let failure = anyhow!("virtual processor {id} at {place:#x}: {failure}");
                end(Ending::Failed(failure), shared);
            }
        }
    }
}

/// Reports an ending, and stays out of the guest until the main thread has decided what follows.
fn end(ending: Ending, shared: &Shared) {
    shared.endings.report(ending);
    shared.run_state.wait_while(Phase::Running);
}

/// Whether and why a processor leaves the guest.
enum Leave {
    No,
    Ended(Ending),
    Failed(String),
}

/// Enters the guest once and serves its exit.
fn step(processor: &mut VcpuFd, running: &Running, shared: &Shared, exits: &ExitCounts) -> Leave {
    let Shared { buses, .. } = shared;
    match processor.run() {
        Ok(VcpuExit::MmioRead(address, data)) => {
            count(&exits.memory_reads);
            log::trace!("{} bytes are read at {address:#x}", data.len());
            buses.memory.read(address, data);
        }
        Ok(VcpuExit::MmioWrite(address, data)) => {
            count(&exits.memory_writes);
            log::trace!("{data:x?} is written at {address:#x}");
            buses.memory.write(address, data);
        }
        // A string instruction is as many accesses of one width to one port.
        Ok(VcpuExit::IoIn(port, data)) => {
            count(&exits.port_reads);
            log::trace!("{} bytes are read from port {port:#x}", data.len());
            for element in data.chunks_mut(running.port_access_width()) {
                buses.ports.read(port.into(), element);
            }
        }
        Ok(VcpuExit::IoOut(port, data)) => {
            count(&exits.port_writes);
            log::trace!("{data:x?} is written to port {port:#x}");
            for element in data.chunks(running.port_access_width()) {
                buses.ports.write(port.into(), element);
            }
        }
        Ok(exit) => {
            count(&exits.others);
            return serve_rare(&exit, running);
        }
        Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => count(&exits.signals),
        Err(error) => return Leave::Failed(format!("KVM_RUN: {}", io::Error::from(error))),
    }
    Leave::No
}

/// Serves an exit that no device serves.
fn serve_rare(exit: &VcpuExit<'_>, running: &Running) -> Leave {
    match exit {
        VcpuExit::Hlt | VcpuExit::Intr | VcpuExit::IrqWindowOpen => Leave::No,
        VcpuExit::Shutdown => Leave::Ended(Ending::TripleFault),
        VcpuExit::SystemEvent(event, _) => match *event {
            KVM_SYSTEM_EVENT_SHUTDOWN => Leave::Ended(Ending::PowerOff),
            KVM_SYSTEM_EVENT_RESET => Leave::Ended(Ending::Reset),
            KVM_SYSTEM_EVENT_CRASH => Leave::Ended(Ending::Panic),
            event => Leave::Failed(format!("unknown system event {event}")),
        },
        VcpuExit::InternalError => Leave::Failed(running.internal_error()),
        VcpuExit::FailEntry(reason, _) => {
            Leave::Failed(format!("the host's processor refused to enter the guest: {reason:#x}"))
        }
        VcpuExit::MemoryFault { gpa, size, .. } => {
            Leave::Failed(format!("the host has no memory for {size} bytes at {gpa:#x}"))
        }
        other => Leave::Failed(format!("unknown exit {other:?}")),
    }
}

fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

thread_local! {
    /// The processor that this thread runs.
    static RUN: Cell<*mut kvm_run> = const { Cell::new(ptr::null_mut()) };
}

/// While it exists, a kick reaches the processor, also between two entries of the guest.
struct Running(*mut kvm_run);

impl Running {
    fn enter(processor: &mut VcpuFd) -> Self {
        let run = ptr::from_mut(processor.get_kvm_run());
        RUN.set(run);
        Self(run)
    }

    /// Lets the processor enter the guest again after a kick. The phase is looked at after this: a
    /// kick that comes later sets the flag again, and an earlier one came after the phase changed.
    fn forget_kick(&self) {
        // SAFETY: the pages that KVM shares stay mapped while the processor lives, which is longer.
        unsafe { (&raw mut (*self.0).immediate_exit).write_volatile(0) };
    }

    /// Width in bytes of the accesses of the port exit at hand; kvm-ioctls does not tell it.
    fn port_access_width(&self) -> usize {
        // SAFETY: as above; the union is plain data, and KVM filled this field of it at the exit.
        let width = unsafe { (&raw const (*self.0).__bindgen_anon_1.io.size).read_volatile() };
        usize::from(width).max(1)
    }

    /// What KVM says about the internal error at hand.
    fn internal_error(&self) -> String {
        // SAFETY: as above.
        let error = unsafe { (&raw const (*self.0).__bindgen_anon_1.internal).read_volatile() };
        let data = error.data.iter().take(error.ndata.try_into().unwrap_or(0));
        let data: Vec<_> = data.map(|word| format!("{word:#x}")).collect();
        format!("KVM internal error {}, data [{}]", error.suberror, data.join(", "))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        RUN.set(ptr::null_mut());
    }
}

extern "C" fn leave_guest(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    let run = RUN.get();
    if !run.is_null() {
        // SAFETY: the pointer is set only while the processor lives, and by this very thread.
        unsafe { (&raw mut (*run).immediate_exit).write_volatile(1) };
    }
}
