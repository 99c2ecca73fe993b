//! Every device of the machine, on its bus and wired.

use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context as _, Result, bail};
use arch::memory::GuestMemory;
use arch::target::layout;
use devices::bus::Bus;
use devices::event::{Event, EventLoop, Registration};
use devices::host::stream::Stream;
use devices::panic::PanicPort;
use devices::power::{PowerButton, PowerRegisters, PowerRequest};
use devices::serial::{self, SerialAttendant, SerialPort};
use devices::virtio::console;
use devices::virtio::device::VirtioDevice;
use devices::virtio::mmio::MmioTransport;
use devices::virtio::rng::Entropy;

use crate::address_plan::AddressPlan;
use crate::config::{Config, Console};
use crate::kvm::Vm;
use crate::run_state::{Ending, Endings};
use crate::vcpu::Buses;

/// The devices that something is asked of after they are on their bus.
pub(crate) struct Devices {
    power_button: PowerButton,
    serial: Option<(Arc<Mutex<SerialPort>>, Registration)>,
    mmio_transports: Vec<Arc<Mutex<MmioTransport>>>,
}

impl Devices {
    /// Makes every device that `config` asks for.
    pub(crate) fn build(
        config: &Config,
        plan: &mut AddressPlan,
        memory: GuestMemory,
        vm: &Arc<Vm>,
        main_loop: &mut EventLoop,
        endings: &Endings,
    ) -> Result<(Self, Buses)> {
        let mut buses = Buses { memory: Bus::new(), ports: Bus::new() };
        let mut devices =
            Self { power_button: PowerButton::new()?, serial: None, mmio_transports: Vec::new() };
        devices.add_power(&mut buses, vm, endings)?;
        add_panic_port(&mut buses, endings)?;
        if let Some(stream) = stream(&config.serial, main_loop, endings)? {
            devices.add_serial(stream, &mut buses, plan, vm, main_loop)?;
        }
        for device in virtio_devices(config, main_loop, endings)? {
            devices.add_mmio(device, memory, &mut buses, plan, vm)?;
        }
        Ok((devices, buses))
    }

    /// The guest's power button.
    pub(crate) fn power_button(&self) -> PowerButton {
        self.power_button.clone()
    }

    /// Puts every device where it is at power on; when this returns nothing touches guest memory.
    pub(crate) fn reset(&self) {
        for transport in &self.mmio_transports {
            transport.lock().unwrap_or_else(PoisonError::into_inner).reset();
        }
        if let Some((serial, _)) = &self.serial {
            serial.lock().unwrap_or_else(PoisonError::into_inner).reset();
        }
    }

    fn add_power(&mut self, buses: &mut Buses, vm: &Vm, endings: &Endings) -> Result<()> {
        vm.connect_line(layout::POWER_INTERRUPT, self.power_button.interrupt().clone())?;
        let endings = endings.clone();
        let registers = PowerRegisters::new(move |request| {
            endings.report(match request {
                PowerRequest::PowerOff => Ending::PowerOff,
                PowerRequest::Reset => Ending::Reset,
            });
        });
        let ports = u64::from(layout::POWER_PORTS.start)..u64::from(layout::POWER_PORTS.end);
        Ok(buses.ports.insert(ports, Arc::new(Mutex::new(registers)))?)
    }

    fn add_serial(
        &mut self,
        stream: Stream,
        buses: &mut Buses,
        plan: &mut AddressPlan,
        vm: &Vm,
        main_loop: &mut EventLoop,
    ) -> Result<()> {
        let place = plan.take_serial_port();
        let interrupt = Event::new()?;
        vm.connect_line(place.interrupt, interrupt.clone())?;
        let port = Arc::new(Mutex::new(SerialPort::new(interrupt, stream)));
        let first = u64::from(place.port);
        buses.ports.insert(first..first + u64::from(serial::PORTS), port.clone())?;
        let attendant = main_loop.add(Box::new(SerialAttendant::new(port.clone())))?;
        self.serial = Some((port, attendant));
        Ok(())
    }

    fn add_mmio(
        &mut self,
        device: Box<dyn VirtioDevice>,
        memory: GuestMemory,
        buses: &mut Buses,
        plan: &mut AddressPlan,
        vm: &Vm,
    ) -> Result<()> {
        let place = plan.take_mmio_device()?;
        let interrupt = Event::new()?;
        vm.connect_line(place.interrupt, interrupt.clone())?;
        let transport = MmioTransport::new(device, memory, interrupt)?;
        for doorbell in transport.doorbells() {
            vm.connect_doorbell(place.registers.start, doorbell)?;
        }
        let transport = Arc::new(Mutex::new(transport));
        buses.memory.insert(place.registers, transport.clone())?;
        self.mmio_transports.push(transport);
        Ok(())
    }
}

fn add_panic_port(buses: &mut Buses, endings: &Endings) -> Result<()> {
    let endings = endings.clone();
    let port = PanicPort::new(move || endings.report(Ending::Panic));
    let first = u64::from(layout::PANIC_PORT);
    Ok(buses.ports.insert(first..first + 1, Arc::new(Mutex::new(port)))?)
}

/// Virtio devices in the order in which the guest finds them.
fn virtio_devices(
    config: &Config,
    main_loop: &mut EventLoop,
    endings: &Endings,
) -> Result<Vec<Box<dyn VirtioDevice>>> {
    let mut devices: Vec<Box<dyn VirtioDevice>> = Vec::new();
    if let Some(stream) = stream(&config.console, main_loop, endings)? {
        devices.push(Box::new(console::Console::new(stream, main_loop.handle())));
    }
    if config.rng {
        devices.push(Box::new(Entropy::new(main_loop.handle())));
    }
    Ok(devices)
}

/// What is behind a console or serial port; the escape keys of a terminal end the machine.
fn stream(
    console: &Console,
    main_loop: &mut EventLoop,
    endings: &Endings,
) -> Result<Option<Stream>> {
    Ok(Some(match console {
        Console::Off => return Ok(None),
        Console::Stdio => {
            let endings = endings.clone();
            Stream::stdio(main_loop, Box::new(move || endings.report(Ending::Killed)))
                .context("cannot use standard input and output")?
        }
        Console::File { path } => Stream::file(main_loop, path)
            .with_context(|| format!("cannot write to `{}`", path.display()))?,
        Console::Pty { .. } | Console::Socket { .. } => bail!("pty and socket are not made yet"),
    }))
}
