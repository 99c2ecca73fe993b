//! Hands out windows and interrupt lines, and becomes the [`Platform`] that the guest is told of.

use std::ops::Range;

use anyhow::{Context as _, Result, ensure};
use arch::platform::{
    Identity, MmioDevice, PciHost, Platform, Power, Processors, SerialPort, Watchdog,
};
use arch::target::layout;
use devices::power::RESET_VALUE;
use devices::virtio::mmio;
use devices::watchdog;

use crate::config::{self, ByteSize, Config};

/// What of the machine's addresses is taken so far.
pub(crate) struct AddressPlan {
    platform: Platform,
    elastic: Option<Range<u64>>,
    end_of_memory: u64,
    address_bits: u8,
    pci_window_32: Range<u64>,
}

impl AddressPlan {
    /// Plans RAM, processors and the devices that every machine has.
    ///
    /// Processors have `address_bits` bits of guest-physical addresses.
    pub(crate) fn new(config: &Config, address_bits: u8) -> Result<Self> {
        let [sleep_control_port, sleep_status_port, reset_port] = power_ports();
        let power = Power {
            sleep_control_port,
            sleep_status_port,
            reset_port,
            reset_value: RESET_VALUE,
            button_interrupt: layout::POWER_INTERRUPT,
        };
        let identity = Identity {
            uuid: config.smbios.uuid.map(uuid::Uuid::into_bytes),
            oem_strings: config.oem_strings()?,
        };
        let ram = ram(config)?;
        let mut plan = Self {
            end_of_memory: layout::end_of_memory(&ram),
            platform: Platform {
                processors: Processors { count: config.cpus },
                ram,
                pci: None,
                virtio_mmio: Vec::new(),
                serial: Vec::new(),
                power,
                panic_port: Some(layout::PANIC_PORT),
                watchdog: None,
                identity,
            },
            elastic: None,
            address_bits,
            pci_window_32: layout::PCI_WINDOW_32,
        };
        plan.take_elastic(&config.memory)?;
        Ok(plan)
    }

    /// Gives the guest a credential besides those of the configuration.
    pub(crate) fn add_credential(&mut self, name: &str, value: &str) {
        let text = format!("io.systemd.credential:{name}={value}");
        self.platform.identity.oem_strings.push(text);
    }

    /// The range of memory that the guest may be given at run time.
    pub(crate) fn elastic(&self) -> Option<&Range<u64>> {
        self.elastic.as_ref()
    }

    /// Takes `size` bytes above RAM that start at a multiple of `alignment`, a power of two.
    pub(crate) fn take_memory_window(&mut self, size: u64, alignment: u64) -> Result<Range<u64>> {
        let end_of_addresses = layout::end_of_addresses(self.address_bits);
        let start = self.end_of_memory.checked_next_multiple_of(alignment);
        let range = start.and_then(|start| Some(start..start.checked_add(size)?));
        let range = range.filter(|range| range.end <= end_of_addresses).with_context(|| {
            let bits = self.address_bits;
            format!("no room for {} more: guests have {bits} bits of addresses", ByteSize(size))
        })?;
        self.end_of_memory = range.end;
        Ok(range)
    }

    fn take_elastic(&mut self, memory: &config::Memory) -> Result<()> {
        if let Some(max) = memory.max.filter(|max| *max > memory.size) {
            let size = max.0 - memory.size.0;
            let range = self.take_memory_window(size, layout::ELASTIC_ALIGNMENT);
            self.elastic = Some(range.with_context(|| format!("--memory max={max}"))?);
        }
        Ok(())
    }

    /// Takes the first serial port.
    pub(crate) fn take_serial_port(&mut self) -> SerialPort {
        let port = SerialPort { port: layout::SERIAL_PORT, interrupt: layout::SERIAL_INTERRUPT };
        self.platform.serial.push(port);
        port
    }

    /// Takes the ports of the watchdog timer.
    pub(crate) fn take_watchdog(&mut self) -> Range<u16> {
        let ports = layout::WATCHDOG_PORTS;
        self.platform.watchdog = Some(Watchdog {
            control_port: ports.start + watchdog::CONTROL,
            countdown_port: ports.start + watchdog::COUNTDOWN,
            count_port: ports.start + watchdog::COUNT,
            status_port: ports.start + watchdog::STATUS,
            count_milliseconds: watchdog::COUNT_MILLISECONDS,
            countdown_max: watchdog::COUNTDOWN_MAX,
        });
        ports
    }

    /// Takes the registers and the line of a virtio-mmio device.
    ///
    /// Further devices than there are lines share them, which edges and status registers allow.
    pub(crate) fn take_mmio_device(&mut self) -> Result<MmioDevice> {
        let taken = self.platform.virtio_mmio.len();
        let lines: Vec<u32> =
            layout::MMIO_INTERRUPTS.filter(|line| *line != layout::POWER_INTERRUPT).collect();
        let interrupt = lines.iter().cycle().nth(taken).context("no interrupt line is left")?;
        let start = layout::VIRTIO_MMIO.start + u64::try_from(taken)? * mmio::REGISTERS_SIZE;
        let registers = start..start + mmio::REGISTERS_SIZE;
        ensure!(
            registers.end <= layout::VIRTIO_MMIO.end,
            "too many devices for `--transport mmio`: {taken} fit; use `--transport pci`"
        );
        let device = MmioDevice { registers, interrupt: *interrupt };
        self.platform.virtio_mmio.push(device.clone());
        Ok(device)
    }

    /// Takes `size` bytes of configuration space for the PCI host.
    pub(crate) fn take_pci_host(&mut self, size: u64) -> Range<u64> {
        let ecam = layout::PCI_ECAM_START..layout::PCI_ECAM_START + size;
        self.platform.pci = Some(PciHost {
            ecam: ecam.clone(),
            window_32: layout::PCI_WINDOW_32,
            window_64: layout::pci_window_64(self.end_of_memory, self.address_bits),
        });
        ecam
    }

    /// Takes a BAR of `size` bytes, a power of two, below 4 GiB.
    pub(crate) fn take_pci_window(&mut self, size: u64) -> Result<Range<u64>> {
        let start = self.pci_window_32.start.next_multiple_of(size);
        let end = start + size;
        ensure!(end <= self.pci_window_32.end, "no room is left for the registers of PCI devices");
        self.pci_window_32.start = end;
        Ok(start..end)
    }

    /// The plan as the guest is told of it.
    pub(crate) fn platform(&self) -> &Platform {
        &self.platform
    }
}

fn ram(config: &Config) -> Result<Vec<Range<u64>>> {
    let size = config.memory.size;
    layout::ram_ranges(size.0)
        .with_context(|| format!("--memory {size}: is not a number of pages that a guest can have"))
}

fn power_ports() -> [u16; 3] {
    let first = layout::POWER_PORTS.start;
    [first, first + 1, first + 2]
}

#[cfg(test)]
mod test {
    use super::*;
    use crate::config::Memory;

    fn config(size: u64) -> Config {
        Config { memory: Memory { size: ByteSize(size), ..Memory::default() }, ..Config::default() }
    }

    #[test]
    fn mmio_devices_have_their_own_registers_and_never_the_power_buttons_line() {
        let mut plan = AddressPlan::new(&config(128 << 20), 46).unwrap();
        let devices: Vec<_> = (0..40).map(|_| plan.take_mmio_device().unwrap()).collect();
        assert!(devices.windows(2).all(|pair| pair[0].registers.end <= pair[1].registers.start));
        assert!(devices.iter().all(|device| device.interrupt != layout::POWER_INTERRUPT));
        assert!(devices.iter().all(|device| layout::MMIO_INTERRUPTS.contains(&device.interrupt)));
        assert_eq!(plan.platform().virtio_mmio, devices);
    }

    #[test]
    fn bars_are_aligned_to_their_size_and_apart() {
        let mut plan = AddressPlan::new(&config(128 << 20), 46).unwrap();
        let sizes = [0x8000, 0x10_0000, 0x8000];
        let bars = sizes.map(|size| plan.take_pci_window(size).unwrap());
        assert!(bars.iter().zip(sizes).all(|(bar, size)| bar.start.is_multiple_of(size)));
        assert!(bars.windows(2).all(|pair| pair[0].end <= pair[1].start));
        assert!(plan.take_pci_window(1 << 30).is_err());
    }

    #[test]
    fn more_mmio_devices_than_fit_are_refused() {
        let mut plan = AddressPlan::new(&config(128 << 20), 46).unwrap();
        let fitting = (0..1000).take_while(|_| plan.take_mmio_device().is_ok()).count();
        assert_eq!(fitting, 256);
    }

    #[test]
    fn memory_that_no_guest_can_have_is_refused_with_its_flag() {
        for size in [0, (128 << 20) + 1, (3 << 30) + 1, u64::MAX - 4095] {
            let error = AddressPlan::new(&config(size), 46).err().unwrap().to_string();
            assert!(error.contains("--memory"), "{error}");
        }
    }

    #[test]
    fn memory_that_may_come_is_above_ram_and_below_the_window_of_pci() {
        let mut config = config(5 << 30);
        config.memory.max = Some(ByteSize(7 << 30));
        let mut plan = AddressPlan::new(&config, 40).unwrap();
        assert_eq!(plan.elastic(), Some(&(6 << 30..8 << 30)));
        let mut pmem = || plan.take_memory_window(3 << 20, layout::PMEM_ALIGNMENT).unwrap();
        assert_eq!(pmem(), 8 << 30..(8 << 30) + (3 << 20));
        assert_eq!(pmem().start, (8 << 30) + (128 << 20));
        plan.take_pci_host(1 << 20);
        let pci = plan.platform().pci.as_ref().unwrap();
        assert_eq!(pci.window_64, 9 << 30..1 << 40);
        assert_eq!(plan.platform().ram.last().unwrap().end, 6 << 30);
    }

    #[test]
    fn memory_beyond_the_processors_addresses_is_refused() {
        let mut config = config(1 << 30);
        config.memory.max = Some(ByteSize(1 << 40));
        let error = format!("{:#}", AddressPlan::new(&config, 40).err().unwrap());
        assert_eq!(
            error,
            "--memory max=1T: no room for 1023G more: guests have 40 bits of addresses"
        );
        let mut plan = AddressPlan::new(&self::config(1 << 30), 40).unwrap();
        for (size, alignment) in [(1 << 40, 1 << 21), (u64::MAX, 1), (1, 1 << 63)] {
            assert!(plan.take_memory_window(size, alignment).is_err());
        }
    }

    #[test]
    fn memory_around_the_hole_is_planned_exactly() {
        let ram = |mebibytes: u64| {
            let plan = AddressPlan::new(&config(mebibytes << 20), 46).unwrap();
            plan.platform().ram.iter().map(|range| range.end - range.start).sum::<u64>() >> 20
        };
        for size in [128, 2047, 2048, 2049, 3071, 3072, 3073, 5120, 512 * 1024] {
            assert_eq!(ram(size), size);
        }
    }
}
