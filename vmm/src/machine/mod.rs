//! The machine: built in numbered steps, then run until it ends.

mod children;
mod control;
mod devices;
mod file_server;
mod passt;
mod store_server;
mod virtiofsd;

use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use ::devices::event::{EventLoop, Registration};
use ::devices::host::program;
use ::devices::host::signals::{END_REQUESTS, IMAGES_CHANGED, Signals};
use anyhow::{Context as _, Result, ensure};
use arch::entry::Entry;
use arch::memory::{Backing, GuestMemory, HugePages};
use arch::platform::Platform;
use arch::target::start;
use boot::{EntryProtocol, Source};
use serde_json::Value;

use self::children::Children;
use self::control::{Control, Parts, Steering};
use self::devices::{Devices, Site};
use crate::address_plan::AddressPlan;
use crate::config::{self, BootProtocol, Config, OnReboot, Watchdog};
use crate::exit::Exit;
use crate::happenings::Happenings;
use crate::kvm::{Hypervisor, Vm};
use crate::machined::Enrolment;
use crate::notify::Notifier;
use crate::run_state::{Ending, Endings, Phase, RunState};
use crate::sandbox::{Sandbox, ThreadKind};
use crate::timing::Timing;
use crate::vcpu::{Buses, ExitCounts, Shared, VcpuThreads};

/// A guest's machine, ready to run.
pub(crate) struct Machine {
    config: Config,
    event_loop: EventLoop,
    platform: Platform,
    memory: GuestMemory,
    vm: Arc<Vm>,
    devices: Devices,
    images: Images,
    shared: Arc<Shared>,
    threads: VcpuThreads,
    timing: Timing,
    end_requested: Arc<AtomicBool>,
    happenings: Happenings,
    notifier: Notifier,
    _control: Registration,
    _reports: Vec<Registration>,
}

/// The opened files that a guest is loaded from, as often as it starts.
struct Images {
    kernel: File,
    initrd: Option<File>,
}

impl Machine {
    /// Builds the machine up to, and without, its processors.
    pub(crate) fn build(config: Config) -> Result<Self> {
        let mut timing = Timing::start();
        // 1. Signals are blocked before there is a second thread, so that no thread takes them.
        let signals = block_signals()?;
        let mut event_loop = EventLoop::new().context("cannot make the main event loop")?;
        let (endings, happenings) = (Endings::new()?, Happenings::new()?);
        let children = Children::start(&config)?;
        let sandbox = Sandbox::prepare(&config)?;
        timing.end_step("event loop and sandbox");

        // 2. Files, so that a wrong name is told before anything else is done.
        let images = Images::open(&config)?;
        let (listener, notifier) = (control::listener(&config)?, Notifier::from_environment()?);
        timing.end_step("open files");

        // 3. KVM and the plan of addresses.
        let hypervisor = Hypervisor::open()?;
        check_processors(&config, &hypervisor)?;
        let mut plan = AddressPlan::new(&config, hypervisor.address_bits())?;
        timing.end_step("open KVM");

        // 4. RAM, and a virtual machine that has it: KVM makes it during all of what follows.
        let memory = map_memory(&config, &plan)?;
        let vm = Vm::new(hypervisor, memory)?;
        timing.end_step("map memory");

        // 5. Devices on their buses, with doorbells and interrupts wired.
        let (mut devices, buses) = Devices::build(Site {
            config: &config,
            plan: &mut plan,
            memory,
            vm: &vm,
            main_loop: &mut event_loop,
            endings: &endings,
            children,
            is_controlled: listener.is_some(),
            sandbox: &sandbox,
            happenings: &happenings,
            notifier: &notifier,
        })?;
        timing.end_step("devices");

        // 6. Processor threads: nothing that the guest does makes another one.
        let (shared, threads) = spawn_processors(config.cpus, endings, buses, &sandbox)?;
        let steering = steering(&config, &shared, &happenings, &notifier, &threads, &mut devices)?;
        let control = Control::new(signals, listener, steering, event_loop.handle())?;
        let end_requested = control.end_requested();
        let control = event_loop.add(Box::new(control))?;
        let reports = reports(&config, &notifier, &devices, &mut event_loop)?;
        timing.end_step("processor threads");

        // 7. Everything is open: the last door closes.
        sandbox.enter_process()?;
        timing.end_step("close the sandbox");

        Ok(Self {
            config,
            event_loop,
            platform: plan.platform().clone(),
            memory,
            vm,
            devices,
            images,
            shared,
            threads,
            timing,
            end_requested,
            happenings,
            notifier,
            _control: control,
            _reports: reports,
        })
    }

    /// Runs the machine to its end, through as many restarts as the guest wants.
    pub(crate) fn run(mut self) -> Result<Exit> {
        self.start()?;
        self.timing.end_step("load and start");
        self.notifier.started(self.config.ready);
        let outcome = loop {
            self.event_loop.run()?;
            let Some(ending) = self.shared.endings.take() else { continue };
            self.stop_processors()?;
            self.happenings.report(ending.name(), Value::Null);
            if let Some(outcome) = self.outcome(ending) {
                break outcome;
            }
            self.restart()?;
        };
        self.devices.reset();
        self.event_loop.run_ready()?;
        self.devices.log_counts();
        self.remove_vsock_socket();
        if self.config.timing {
            eprint!("{}", self.timing.report(&self.shared.exits));
        }
        outcome
    }

    /// Takes the socket away that the guest's ports were behind: its device is on a bus that the
    /// processors' threads have, too, and is not dropped before the process ends.
    fn remove_vsock_socket(&self) {
        let socket = self.config.vsock.as_ref().and_then(|vsock| vsock.socket.as_ref());
        if let Some(socket) = socket {
            let _ = std::fs::remove_file(socket);
        }
    }

    /// Loads the guest into memory that reads as zeros, and lets the processors go.
    fn start(&mut self) -> Result<()> {
        let entry = self.images.load(&self.config, self.memory, &self.platform)?;
        start::write_reset_vector(self.memory, &self.platform.power)?;
        let processors = self.vm.create_processors(self.platform.processors, entry)?;
        program::release_start_up();
        self.threads.start(processors)?;
        self.happenings.report("started", Value::Null);
        Ok(())
    }

    /// Takes the processors out of the guest. One of them may be in a device that waits for the
    /// main loop, which therefore goes on.
    fn stop_processors(&mut self) -> Result<()> {
        let event_loop = &mut self.event_loop;
        self.threads.stop(|| Ok(event_loop.run_ready()?))
    }

    /// Starts the guest again as if it were switched on: devices stay open, RAM reads as zeros.
    fn restart(&mut self) -> Result<()> {
        log::info!("the guest restarts");
        self.devices.reset();
        self.event_loop.run_ready()?;
        self.memory.discard_all().context("cannot clear the guest's memory")?;
        self.devices.unplug_memory();
        self.vm.end_run()?;
        // What else the old run ended with is over with it.
        self.shared.endings.take();
        self.start()
    }

    /// What an ending means for the process; `None` restarts the guest.
    fn outcome(&self, ending: Ending) -> Option<Result<Exit>> {
        let ending = match ending {
            Ending::Watchdog if self.config.watchdog != Watchdog::Exit => Ending::Reset,
            ending => ending,
        };
        match ending {
            Ending::PowerOff => Some(Ok(Exit::PowerOff)),
            // Who was asked to power off and resets itself has ended, too.
            Ending::Reset if self.end_requested.load(Ordering::Relaxed) => Some(Ok(Exit::PowerOff)),
            Ending::Reset if self.config.on_reboot == OnReboot::Restart => None,
            Ending::Reset => Some(Ok(Exit::Reboot)),
            Ending::Panic => Some(Ok(Exit::Panic)),
            Ending::TripleFault => Some(Ok(Exit::TripleFault)),
            Ending::Killed => Some(Ok(Exit::Killed)),
            Ending::Watchdog => Some(Ok(Exit::Watchdog)),
            Ending::Failed(error) => Some(Err(error)),
        }
    }
}

fn block_signals() -> Result<Signals> {
    let signals = [&END_REQUESTS[..], &[IMAGES_CHANGED]].concat();
    Signals::block(&signals).context("cannot block signals")
}

/// Threads for the processors, with what they share.
fn spawn_processors(
    count: u32,
    endings: Endings,
    buses: Buses,
    sandbox: &Sandbox,
) -> Result<(Arc<Shared>, VcpuThreads)> {
    let (run_state, exits) = (RunState::new(Phase::Stopping)?, ExitCounts::of(count));
    let shared = Arc::new(Shared { run_state, endings, buses, exits });
    let rules = sandbox.clone();
    let threads = VcpuThreads::spawn(count, &shared, move || rules.enter_thread(ThreadKind::Vcpu))?;
    Ok((shared, threads))
}

/// Who keeps the host's service managers informed.
fn reports(
    config: &Config,
    notifier: &Notifier,
    devices: &Devices,
    event_loop: &mut EventLoop,
) -> Result<Vec<Registration>> {
    let mut reports = Vec::new();
    if let Some(heartbeat) = notifier.heartbeat()? {
        reports.push(event_loop.add(Box::new(heartbeat))?);
    }
    if let Some(delivery) = notifier.delivery() {
        reports.push(event_loop.add(Box::new(delivery))?);
    }
    if let Some(enrolment) = Enrolment::begin(config, devices.context_id()) {
        reports.push(event_loop.add(Box::new(enrolment))?);
    }
    Ok(reports)
}

/// The hands on the machine, with all that they hold.
fn steering(
    config: &Config,
    shared: &Shared,
    happenings: &Happenings,
    notifier: &Notifier,
    threads: &VcpuThreads,
    devices: &mut Devices,
) -> Result<Steering> {
    let mut config = config.clone();
    if let Some(vsock) = &mut config.vsock {
        vsock.cid = devices.context_id();
    }
    Ok(Steering::new(Parts {
        config,
        endings: shared.endings.clone(),
        happenings: happenings.clone(),
        pause: threads.pause(),
        button: devices.power_button(),
        watchdog: devices.watchdog(),
        disks: devices.take_disks(),
        cards: devices.cards(),
        counted: devices.take_counted(),
        notifier: notifier.clone(),
        sizer: devices.sizer(),
        inflator: devices.inflator(),
        additions: devices.take_additions(),
        consoles: devices.take_consoles(),
    })?)
}

impl Images {
    fn open(config: &Config) -> Result<Self> {
        let kernel = open("--kernel", &config.kernel)?;
        let initrd = config.initrd.as_ref().map(|path| open("--initrd", path)).transpose()?;
        Ok(Self { kernel, initrd })
    }

    fn load(&self, config: &Config, memory: GuestMemory, platform: &Platform) -> Result<Entry> {
        let source = Source {
            kernel: &self.kernel,
            initrd: self.initrd.as_ref(),
            command_line: &config.cmdline,
            protocol: match config.boot_protocol {
                BootProtocol::Auto => EntryProtocol::Auto,
                BootProtocol::Linux => EntryProtocol::Linux64,
                BootProtocol::Pvh => EntryProtocol::Pvh,
            },
        };
        boot::load(memory, platform, &source).map_err(|error| {
            let place = match &error {
                boot::Error::Kernel(_) => format!("--kernel {}", config.kernel.display()),
                boot::Error::Initrd(_) => match &config.initrd {
                    Some(path) => format!("--initrd {}", path.display()),
                    None => "--initrd".to_owned(),
                },
                boot::Error::CommandLine(_) => "--cmdline".to_owned(),
                boot::Error::Smbios(_) => "--uuid, --oem-string and --credential".to_owned(),
                _ => "cannot describe the machine to the guest".to_owned(),
            };
            anyhow::Error::new(error).context(place)
        })
    }
}

fn open(flag: &str, path: &Path) -> Result<File> {
    File::open(path).with_context(|| format!("{flag} {}: cannot be opened", path.display()))
}

fn check_processors(config: &Config, hypervisor: &Hypervisor) -> Result<()> {
    let max = hypervisor.processors_max();
    ensure!((1..=max).contains(&config.cpus), "--cpus {}: KVM runs 1 to {max} here", config.cpus);
    Ok(())
}

fn map_memory(config: &Config, plan: &AddressPlan) -> Result<GuestMemory> {
    let config::Memory { size, max: _, shared, hugepages, prealloc, mergeable } = config.memory;
    let backing = Backing {
        shared,
        prealloc,
        mergeable,
        huge_pages: hugepages.map(|pages| match pages {
            config::HugePages::Size2M => HugePages::Size2M,
            config::HugePages::Size1G => HugePages::Size1G,
        }),
    };
    let ram = &plan.platform().ram;
    GuestMemory::map_elastic(ram, plan.elastic(), backing).with_context(|| match hugepages {
        Some(_) => format!(
            "--memory {size}: cannot be mapped from huge pages; are as many set aside in \
             /sys/kernel/mm/hugepages/*/nr_hugepages?"
        ),
        None => format!("--memory {size}: cannot be mapped"),
    })
}
