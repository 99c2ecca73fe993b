//! Every device of the machine, on its bus and wired.

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context as _, Result, bail};
use arch::memory::GuestMemory;
use arch::target::layout;
use devices::bus::Bus;
use devices::event::{Event, EventLoop};
use devices::panic::PanicPort;
use devices::power::{PowerButton, PowerRegisters, PowerRequest};
use devices::serial::{self, SerialPort};
use devices::virtio::device::VirtioDevice;
use devices::virtio::mmio::MmioTransport;

use crate::address_plan::AddressPlan;
use crate::config::{Config, Console};
use crate::kvm::Vm;
use crate::run_state::{Ending, Endings};
use crate::vcpu::Buses;

/// The devices that something is asked of after they are on their bus.
pub(crate) struct Devices {
    power_button: PowerButton,
    serial: Option<Arc<Mutex<SerialPort>>>,
    mmio_transports: Vec<Arc<Mutex<MmioTransport>>>,
}

impl Devices {
    /// Makes every device that `config` asks for.
    pub(crate) fn build(
        config: &Config,
        plan: &mut AddressPlan,
        memory: GuestMemory,
        vm: &Arc<Vm>,
        _main_loop: &mut EventLoop,
        endings: &Endings,
    ) -> Result<(Self, Buses)> {
        let mut buses = Buses { memory: Bus::new(), ports: Bus::new() };
        let mut devices =
            Self { power_button: PowerButton::new()?, serial: None, mmio_transports: Vec::new() };
        devices.add_power(&mut buses, vm, endings)?;
        add_panic_port(&mut buses, endings)?;
        if let Some(output) = serial_output(&config.serial)? {
            devices.add_serial(output, &mut buses, plan, vm)?;
        }
        for device in virtio_devices(config)? {
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
        if let Some(serial) = &self.serial {
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
        output: Box<dyn Write + Send>,
        buses: &mut Buses,
        plan: &mut AddressPlan,
        vm: &Vm,
    ) -> Result<()> {
        let place = plan.take_serial_port();
        let interrupt = Event::new()?;
        vm.connect_line(place.interrupt, interrupt.clone())?;
        let port = Arc::new(Mutex::new(SerialPort::new(interrupt, Event::new()?, output)));
        let first = u64::from(place.port);
        buses.ports.insert(first..first + u64::from(serial::PORTS), port.clone())?;
        self.serial = Some(port);
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

fn serial_output(console: &Console) -> Result<Option<Box<dyn Write + Send>>> {
    Ok(match console {
        Console::Off => None,
        Console::Stdio => Some(Box::new(io::stdout())),
        Console::File { path } => {
            let file = OpenOptions::new().append(true).create(true).open(path);
            Some(Box::new(file.with_context(|| format!("cannot open `{}`", path.display()))?))
        }
        Console::Pty { .. } | Console::Socket { .. } => {
            bail!("`--serial` goes to `stdio` or to a file; use `--console` for the rest")
        }
    })
}

fn virtio_devices(_config: &Config) -> Result<Vec<Box<dyn VirtioDevice>>> {
    Ok(Vec::new())
}
