//! The machine as plain data: what `vmm` decided and `boot` announces to the guest.

use std::ops::Range;

/// Everything that tables tell a guest's kernel about its machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Platform {
    /// How many processors start, and how they are grouped.
    pub processors: Processors,
    /// Guest-physical ranges of RAM, ascending.
    pub ram: Vec<Range<u64>>,
    /// The PCI host bridge, where there is one.
    pub pci: Option<PciHost>,
    /// Virtio devices on the virtio-mmio transport.
    pub virtio_mmio: Vec<MmioDevice>,
    /// 16550 serial ports, in the order of their ttyS numbers.
    pub serial: Vec<SerialPort>,
    /// The registers and the interrupt by which the guest ends and is asked to.
    pub power: Power,
    /// The I/O port of a pvpanic device (QEMU0001), where there is one.
    pub panic_port: Option<u16>,
    /// The watchdog timer, where there is one.
    pub watchdog: Option<Watchdog>,
    /// Identity shown by SMBIOS.
    pub identity: Identity,
}

/// The processors of one guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Processors {
    /// Number of virtual processors; their APIC ids are 0 to `count - 1`.
    pub count: u32,
}

/// A PCI host bridge with memory-mapped configuration space (ECAM) and no I/O ports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PciHost {
    /// Configuration space: 1 MiB for each bus from bus 0.
    pub ecam: Range<u64>,
    /// Memory below 4 GiB for the devices' registers.
    pub window_32: Range<u64>,
    /// Memory above RAM for large windows (persistent memory, shared memory).
    pub window_64: Range<u64>,
}

/// A device on the virtio-mmio transport.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MmioDevice {
    /// Guest-physical range of its registers.
    pub registers: Range<u64>,
    /// Its global system interrupt, edge triggered.
    pub interrupt: u32,
}

/// A 16550 serial port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SerialPort {
    /// First of its eight I/O ports.
    pub port: u16,
    /// Its global system interrupt, edge triggered.
    pub interrupt: u32,
}

/// How the guest powers off and resets itself, and hears the power button (ACPI 6.5, 4.8.3.7).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Power {
    /// I/O port of the sleep control register (1 byte).
    pub sleep_control_port: u16,
    /// I/O port of the sleep status register (1 byte).
    pub sleep_status_port: u16,
    /// I/O port of the reset register (1 byte).
    pub reset_port: u16,
    /// What the guest writes to the reset register.
    pub reset_value: u8,
    /// Global system interrupt of the generic event device: the power button, edge triggered.
    pub button_interrupt: u32,
}

/// A watchdog timer: four I/O ports of 32 bits, as ACPI's watchdog action table describes them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Watchdog {
    /// I/O port of the control register: 1 is running, 0 is stopped.
    pub control_port: u16,
    /// I/O port of the countdown that starts with each sign of life, in counts.
    pub countdown_port: u16,
    /// I/O port of the counts that are left; a write is a sign of life.
    pub count_port: u16,
    /// I/O port of the status register: 1 when the watchdog ended the last run; 0 is written.
    pub status_port: u16,
    /// Length of a count in milliseconds.
    pub count_milliseconds: u32,
    /// The longest countdown, in counts.
    pub countdown_max: u32,
}

/// Who the guest is, as SMBIOS says it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Identity {
    /// System UUID (type 1), where the user gave one.
    pub uuid: Option<[u8; 16]>,
    /// OEM strings (type 11), among them systemd's credentials.
    pub oem_strings: Vec<String>,
}
