//! Every device of the machine, on its bus and wired.

mod balloon;
mod disk;
mod mem;
mod net;
mod pmem;
mod share;
mod stream;
mod vhost_user;
mod vsock;
mod watchdog;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::Result;
use arch::memory::GuestMemory;
use arch::target::layout;
use devices::bus::Bus;
use devices::event::{Event, EventLoop, Registration};
use devices::host::stream::{Outlet, Stream};
use devices::interrupt::MessageRoutes;
use devices::panic::PanicPort;
use devices::pci::{self, PciHost, SharedFunction};
use devices::power::{PowerButton, PowerRegisters, PowerRequest};
use devices::serial::{self, SerialAttendant, SerialPort};
use devices::virtio::balloon::Inflator;
use devices::virtio::console;
use devices::virtio::counters::Counters;
use devices::virtio::device::{DeviceKind, VirtioDevice};
use devices::virtio::mem::Sizer;
use devices::virtio::mmio::MmioTransport;
use devices::virtio::net::NetHandle;
use devices::virtio::pci::PciTransport;
use devices::virtio::rng::Entropy;
use devices::virtio::{self};

pub(super) use self::disk::Handle as Disk;
pub(super) use self::watchdog::SharedWatchdog;
use crate::address_plan::AddressPlan;
use crate::config::{Config, Transport};
use crate::happenings::Happenings;
use crate::kvm::Vm;
use crate::loop_thread::LoopThread;
use crate::machine::children::Children;
use crate::machine::store_server::Additions;
use crate::notify::Notifier;
use crate::run_state::{Ending, Endings};
use crate::sandbox::Sandbox;
use crate::vcpu::Buses;

/// The devices that something is asked of after they are on their bus.
pub(crate) struct Devices {
    power_button: PowerButton,
    serial: Option<(Arc<Mutex<SerialPort>>, Registration)>,
    watchdog: Option<(SharedWatchdog, Registration)>,
    mmio_transports: Vec<Arc<Mutex<MmioTransport>>>,
    pci_transports: Vec<Arc<Mutex<PciTransport>>>,
    pci_host: Option<Arc<Mutex<PciHost>>>,
    disks: Vec<Disk>,
    counted: Vec<Counted>,
    consoles: Vec<(&'static str, Outlet)>,
    sizer: Option<Sizer>,
    inflator: Option<Inflator>,
    /// Where further paths of a closure go, if the guest has one.
    additions: Option<Additions>,
    cards: Vec<net::Card>,
    socket: vsock::Socket,
    // Dropped after the devices, whose workers run on them.
    worker_threads: Vec<LoopThread>,
}

/// A device that counts what it does.
pub(crate) struct Counted {
    /// What it is called.
    pub(crate) name: String,
    /// What it is.
    pub(crate) kind: &'static str,
    /// Its numbers.
    pub(crate) counters: Counters,
}

/// What devices are built from and into.
pub(crate) struct Site<'a> {
    /// Which devices there are.
    pub(crate) config: &'a Config,
    /// Where they go.
    pub(crate) plan: &'a mut AddressPlan,
    /// The guest's memory.
    pub(crate) memory: GuestMemory,
    /// Who connects doorbells and interrupts.
    pub(crate) vm: &'a Arc<Vm>,
    /// The loop of the devices that have no thread of their own.
    pub(crate) main_loop: &'a mut EventLoop,
    /// Where the guest's end is reported.
    pub(crate) endings: &'a Endings,
    /// Processes that serve some of them.
    pub(crate) children: Children,
    /// Whether there is a control socket.
    pub(crate) is_controlled: bool,
    /// What confines the threads of workers.
    pub(crate) sandbox: &'a Sandbox,
    /// Where what happens to the devices is reported.
    pub(crate) happenings: &'a Happenings,
    /// Who is told what becomes of the guest.
    pub(crate) notifier: &'a Notifier,
}

impl Devices {
    /// Makes every device that the configuration asks for.
    pub(crate) fn build(mut site: Site<'_>) -> Result<(Self, Buses)> {
        let mut buses = Buses { memory: Bus::new(), ports: Bus::new() };
        let mut devices = Self {
            power_button: PowerButton::new()?,
            serial: None,
            watchdog: None,
            mmio_transports: Vec::new(),
            pci_transports: Vec::new(),
            pci_host: None,
            disks: Vec::new(),
            counted: Vec::new(),
            consoles: Vec::new(),
            sizer: None,
            inflator: None,
            additions: None,
            cards: Vec::new(),
            socket: vsock::Socket::default(),
            worker_threads: Vec::new(),
        };
        devices.add_power(&mut buses, &site)?;
        add_panic_port(&mut buses, site.endings)?;
        devices.add_serial(&mut buses, &mut site)?;
        devices.watchdog = watchdog::add(&mut buses, &mut site)?;
        let virtio_devices = devices.make_virtio_devices(&mut site)?;
        devices.counted = counted(&virtio_devices, &devices.disks);
        devices.count_serial();
        match site.config.transport {
            Transport::Pci => devices.add_pci(virtio_devices, &mut buses, &mut site)?,
            Transport::Mmio => devices.add_mmio(virtio_devices, &mut buses, &mut site)?,
        }
        Ok((devices, buses))
    }

    /// The guest's power button.
    pub(crate) fn power_button(&self) -> PowerButton {
        self.power_button.clone()
    }

    /// The guest's watchdog.
    pub(crate) fn watchdog(&self) -> Option<SharedWatchdog> {
        self.watchdog.as_ref().map(|(watchdog, _)| Arc::clone(watchdog))
    }

    /// The disks as control clients know them; there once.
    pub(crate) fn take_disks(&mut self) -> Vec<Disk> {
        std::mem::take(&mut self.disks)
    }

    /// What all devices count; there once.
    pub(crate) fn take_counted(&mut self) -> Vec<Counted> {
        std::mem::take(&mut self.counted)
    }

    /// What changes the size of the guest's memory, where it can change.
    pub(crate) fn sizer(&self) -> Option<Sizer> {
        self.sizer.clone()
    }

    /// What inflates the balloon, where there is one.
    pub(crate) fn inflator(&self) -> Option<Inflator> {
        self.inflator.clone()
    }

    /// Where further paths of a closure go, if the guest has one; there once.
    pub(crate) fn take_additions(&mut self) -> Option<Additions> {
        self.additions.take()
    }

    /// The guest's context id, if it has one.
    pub(crate) fn context_id(&self) -> Option<u32> {
        self.socket.context_id
    }

    /// Where control clients can look on at the console and the serial port; there once.
    pub(crate) fn take_consoles(&mut self) -> Vec<(&'static str, Outlet)> {
        std::mem::take(&mut self.consoles)
    }

    /// Puts every device where it is at power on; when this returns nothing touches guest memory.
    pub(crate) fn reset(&self) {
        for transport in &self.mmio_transports {
            lock(transport).reset();
        }
        for transport in &self.pci_transports {
            lock(transport).reset();
        }
        if let Some((serial, _)) = &self.serial {
            lock(serial).reset();
        }
        if let Some((watchdog, _)) = &self.watchdog {
            lock(watchdog).reset();
        }
    }

    /// Takes away all memory that came at run time: after a reset, when nothing uses it.
    pub(crate) fn unplug_memory(&self) {
        if let Some(sizer) = &self.sizer {
            sizer.switch_off();
        }
    }

    /// The network cards, as they are seen from outside the guest.
    pub(crate) fn cards(&self) -> Vec<NetHandle> {
        self.cards.iter().map(|card| card.handle.clone()).collect()
    }

    /// Tells the log what went through the network cards.
    pub(crate) fn log_counts(&self) {
        self.cards.iter().for_each(net::Card::log_counts);
    }

    fn add_power(&mut self, buses: &mut Buses, site: &Site<'_>) -> Result<()> {
        site.vm.connect_line(layout::POWER_INTERRUPT, self.power_button.interrupt().clone());
        let endings = site.endings.clone();
        let registers = PowerRegisters::new(move |request| {
            endings.report(match request {
                PowerRequest::PowerOff => Ending::PowerOff,
                PowerRequest::Reset => Ending::Reset,
            });
        });
        let ports = u64::from(layout::POWER_PORTS.start)..u64::from(layout::POWER_PORTS.end);
        Ok(buses.ports.insert(ports, Arc::new(Mutex::new(registers)))?)
    }

    fn add_serial(&mut self, buses: &mut Buses, site: &mut Site<'_>) -> Result<()> {
        let Some(stream) = stream::open("--serial", &site.config.serial, site)? else {
            return Ok(());
        };
        self.keep_outlet("serial", &stream, site);
        let place = site.plan.take_serial_port();
        let interrupt = Event::new()?;
        site.vm.connect_line(place.interrupt, interrupt.clone());
        let port = Arc::new(Mutex::new(SerialPort::new(interrupt, stream)));
        let first = u64::from(place.port);
        buses.ports.insert(first..first + u64::from(serial::PORTS), port.clone())?;
        let attendant = site.main_loop.add(Box::new(SerialAttendant::new(port.clone())))?;
        self.serial = Some((port, attendant));
        Ok(())
    }

    fn count_serial(&mut self) {
        let Some((serial, _)) = &self.serial else { return };
        let counters = lock(serial).counters();
        self.counted.push(Counted { name: "serial".to_owned(), kind: "serial", counters });
    }

    /// Virtio devices in the order in which the guest finds them.
    fn make_virtio_devices(&mut self, site: &mut Site<'_>) -> Result<Vec<Box<dyn VirtioDevice>>> {
        let mut devices: Vec<Box<dyn VirtioDevice>> = Vec::new();
        // First, because no thread may be there yet that takes the signals of a terminal.
        let console = stream::open("--console", &site.config.console, site)?;
        disk::add(site, &mut devices, &mut self.worker_threads, &mut self.disks)?;
        net::add(site, &mut devices, &mut self.worker_threads, &mut self.cards)?;
        self.additions = site.children.additions.take();
        share::add(site, &mut devices, &mut self.worker_threads)?;
        self.socket = vsock::add(site, &mut devices, &mut self.worker_threads)?;
        if let Some(stream) = console {
            self.keep_outlet("console", &stream, site);
            devices.push(Box::new(console::Console::new(stream, site.main_loop.handle())));
        }
        if site.config.rng {
            devices.push(Box::new(Entropy::new(site.main_loop.handle())));
        }
        self.inflator = balloon::add(site, &mut devices)?;
        pmem::add(site, &mut devices, &mut self.worker_threads)?;
        self.sizer = mem::add(site, &mut devices)?;
        Ok(devices)
    }

    /// Lets control clients look on, if there can be any.
    fn keep_outlet(&mut self, name: &'static str, stream: &Stream, site: &Site<'_>) {
        if site.is_controlled {
            self.consoles.push((name, stream.outlet()));
        }
    }

    fn add_mmio(
        &mut self,
        virtio_devices: Vec<Box<dyn VirtioDevice>>,
        buses: &mut Buses,
        site: &mut Site<'_>,
    ) -> Result<()> {
        for device in virtio_devices {
            let place = site.plan.take_mmio_device()?;
            let interrupt = Event::new()?;
            site.vm.connect_line(place.interrupt, interrupt.clone());
            let transport = MmioTransport::new(device, site.memory, interrupt)?;
            for doorbell in transport.doorbells() {
                site.vm.connect_doorbell(place.registers.start, doorbell)?;
            }
            let transport = Arc::new(Mutex::new(transport));
            buses.memory.insert(place.registers, transport.clone())?;
            self.mmio_transports.push(transport);
        }
        Ok(())
    }

    fn add_pci(
        &mut self,
        virtio_devices: Vec<Box<dyn VirtioDevice>>,
        buses: &mut Buses,
        site: &mut Site<'_>,
    ) -> Result<()> {
        let configuration = site.plan.take_pci_host(pci::BUS_SIZE);
        let mut functions: Vec<SharedFunction> = Vec::new();
        for device in virtio_devices {
            let bar = site.plan.take_pci_window(virtio::pci::BAR_SIZE)?;
            let routes = Arc::clone(site.vm) as Arc<dyn MessageRoutes>;
            let transport = PciTransport::new(device, site.memory, routes, bar.start)?;
            for doorbell in transport.doorbells() {
                site.vm.connect_doorbell(bar.start, doorbell)?;
            }
            let transport = Arc::new(Mutex::new(transport));
            buses.memory.insert(bar, transport.clone())?;
            functions.push(transport.clone());
            self.pci_transports.push(transport);
        }
        let host = Arc::new(Mutex::new(PciHost::new(functions)?));
        buses.memory.insert(configuration, host.clone())?;
        self.pci_host = Some(host);
        Ok(())
    }
}

fn lock<T>(device: &Mutex<T>) -> MutexGuard<'_, T> {
    device.lock().unwrap_or_else(PoisonError::into_inner)
}

fn add_panic_port(buses: &mut Buses, endings: &Endings) -> Result<()> {
    let endings = endings.clone();
    let port = PanicPort::new(move || endings.report(Ending::Panic));
    let first = u64::from(layout::PANIC_PORT);
    Ok(buses.ports.insert(first..first + 1, Arc::new(Mutex::new(port)))?)
}

/// What devices count. A disk has its own name, and of other kinds with several devices each one
/// has its number.
fn counted(virtio_devices: &[Box<dyn VirtioDevice>], disks: &[Disk]) -> Vec<Counted> {
    let mut seen: Vec<DeviceKind> = Vec::new();
    let mut counted = Vec::new();
    for device in virtio_devices {
        let kind = device.offer().kind;
        let index = seen.iter().filter(|other| **other == kind).count();
        seen.push(kind);
        let Some(counters) = device.counters() else { continue };
        let name = match kind {
            DeviceKind::Block => {
                disks.get(index).map_or_else(String::new, |disk| disk.name.clone())
            }
            DeviceKind::Net | DeviceKind::FileSystem | DeviceKind::Pmem => {
                format!("{}{index}", kind.name())
            }
            _ => kind.name().to_owned(),
        };
        counted.push(Counted { name, kind: kind.name(), counters });
    }
    counted
}
