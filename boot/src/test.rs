//! Whole loads, with small hand-made kernels.

use arch::platform::{Identity, PciHost, Platform, Power, Processors};
use arch::target::layout;

/// A small machine with PCI.
pub(crate) fn platform() -> Platform {
    let ram = layout::ram_ranges(64 << 20).unwrap();
    Platform {
        processors: Processors { count: 2 },
        pci: Some(PciHost {
            ecam: layout::PCI_ECAM_START..layout::PCI_ECAM_START + (4 << 20),
            window_32: layout::PCI_WINDOW_32,
            window_64: layout::pci_window_64(&ram, 40),
        }),
        ram,
        virtio_mmio: Vec::new(),
        serial: Vec::new(),
        power: Power {
            sleep_control_port: 0x600,
            sleep_status_port: 0x601,
            reset_port: 0x602,
            reset_value: 1,
            button_interrupt: layout::POWER_INTERRUPT,
        },
        panic_port: None,
        identity: Identity::default(),
    }
}
