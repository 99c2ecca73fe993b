//! The fixed tables: FADT, MADT, MCFG, WDAT and XSDT (ACPI 6.5, chapter 5).

use acpi_tables::fadt::{FADT, FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, ProcessorLocalApic};
use acpi_tables::mcfg::MCFG;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use arch::platform::{PciHost, Power, Watchdog};
use arch::target::layout::{IOAPIC, LOCAL_APIC};
use zerocopy::IntoBytes;

use super::{Error, OEM_ID, OEM_REVISION, OEM_TABLE_ID};

/// There is neither a VGA adapter nor a CMOS clock to probe, nor, by absence of their bits, an
/// i8042 or any ISA device (ACPI 6.5, table 5.11).
const VGA_NOT_PRESENT: u16 = 1 << 2;
const CMOS_CLOCK_NOT_PRESENT: u16 = 1 << 5;

/// What every table starts with.
const SDT_HEADER_LEN: u32 = 36;

/// MADT of ACPI 6.5: its header, and the x2APIC structure that acpi_tables lacks.
const MADT_REVISION: u8 = 6;
const MADT_HEADER_LEN: u32 = 44;
const MADT_LOCAL_APIC_ADDRESS: usize = 36;
const X2APIC_KIND: u8 = 9;
const X2APIC_LEN: u8 = 16;
const X2APIC_ENABLED: u32 = 1;
/// APIC ids from this one on are announced as x2APIC: 255 means all processors.
const X2APIC_ID_MIN: u32 = 255;
/// The only I/O APIC; its global system interrupts start at 0.
const IOAPIC_ID: u8 = 0;

/// WDAT (Microsoft, Hardware Watchdog Timers Design Specification, 4.1): its header, a watchdog
/// that is no PCI function, and the one flag that it has at the start.
const WDAT_HEADER_LEN: u32 = 68;
const WDAT_REVISION: u8 = 1;
const WDAT_NO_PCI: [u8; 8] = [0xFF, 0, 0xFF, 0xFF, 0xFF, 0, 0, 0];
const WDAT_ENABLED: u32 = 1;

const BUS_LEN: u64 = 1 << 20;

/// Both APICs are below 4 GiB, where their fields reach.
const IOAPIC_ADDRESS: u32 = address_32(IOAPIC);
const LOCAL_APIC_ADDRESS: u32 = address_32(LOCAL_APIC);

/// Hardware-reduced ACPI: power and reset by three I/O ports, no SCI, no PM timer.
pub(super) fn fadt(power: &Power, dsdt: u64) -> FADT {
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::Wbinvd)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::ResetRegSup);
    fadt.iapc_boot_arch = (VGA_NOT_PRESENT | CMOS_CLOCK_NOT_PRESENT).into();
    fadt.reset_reg = byte_port(power.reset_port);
    fadt.reset_value = power.reset_value;
    fadt.sleep_control_reg = byte_port(power.sleep_control_port);
    fadt.sleep_status_reg = byte_port(power.sleep_status_port);
    fadt.hypervisor_vendor_identity = u64::from_le_bytes(*b"nixvmm\0\0").into();
    fadt.finalize()
}

fn byte_port(port: u16) -> GAS {
    GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, port.into())
}

/// Processors by their APIC ids, and the I/O APIC.
pub(super) fn madt(processors: u32) -> Sdt {
    let mut structures = Vec::new();
    for id in 0..processors {
        match u8::try_from(id) {
            Ok(short) if id < X2APIC_ID_MIN => {
                let local = ProcessorLocalApic::new(short, short, EnabledStatus::Enabled);
                structures.extend_from_slice(local.as_bytes());
            }
            _ => structures.extend(x2apic(id)),
        }
    }
    structures.extend_from_slice(IoApic::new(IOAPIC_ID, IOAPIC_ADDRESS, 0).as_bytes());

    let mut madt =
        Sdt::new(*b"APIC", MADT_HEADER_LEN, MADT_REVISION, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    madt.write_u32(MADT_LOCAL_APIC_ADDRESS, LOCAL_APIC_ADDRESS);
    madt.append_slice(&structures);
    madt
}

/// Processor local x2APIC structure (ACPI 6.5, 5.2.12.12).
fn x2apic(id: u32) -> Vec<u8> {
    let mut structure = vec![X2APIC_KIND, X2APIC_LEN, 0, 0];
    for field in [id, X2APIC_ENABLED, id] {
        structure.extend_from_slice(&field.to_le_bytes());
    }
    structure
}

/// Where the configuration space of segment 0 is (PCI Firmware 3.3, 4.1.2).
pub(super) fn mcfg(pci: &PciHost) -> Result<MCFG, Error> {
    let mut mcfg = MCFG::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    mcfg.add_ecam(pci.ecam.start, 0, 0, last_bus(pci)?);
    Ok(mcfg)
}

/// The last bus that the configuration space has room for.
pub(super) fn last_bus(pci: &PciHost) -> Result<u8, Error> {
    let range = &pci.ecam;
    let buses = range.end.saturating_sub(range.start) / BUS_LEN;
    buses.checked_sub(1).and_then(|bus| u8::try_from(bus).ok()).ok_or(Error::Range {
        what: "PCI configuration space",
        start: range.start,
        end: range.end,
    })
}

/// The watchdog's registers, and what a driver does with each.
pub(super) fn wdat(watchdog: &Watchdog) -> Sdt {
    const READ_VALUE: u8 = 0;
    const READ_COUNTDOWN: u8 = 1;
    const WRITE_VALUE: u8 = 2;
    const WRITE_COUNTDOWN: u8 = 3;
    let Watchdog { control_port, countdown_port, count_port, status_port, .. } = *watchdog;
    let all = u32::MAX;
    // Action, instruction, port, value, mask.
    let entries = [
        (0x01, WRITE_VALUE, count_port, 1, all),
        (0x04, READ_COUNTDOWN, count_port, 0, all),
        (0x05, READ_COUNTDOWN, countdown_port, 0, all),
        (0x06, WRITE_COUNTDOWN, countdown_port, 0, all),
        (0x08, READ_VALUE, control_port, 1, 1),
        (0x09, WRITE_VALUE, control_port, 1, 1),
        (0x0A, READ_VALUE, control_port, 0, 1),
        (0x0B, WRITE_VALUE, control_port, 0, 1),
        (0x20, READ_VALUE, status_port, 1, 1),
        (0x21, WRITE_VALUE, status_port, 0, 1),
    ];

    let mut body = (WDAT_HEADER_LEN - SDT_HEADER_LEN).to_le_bytes().to_vec();
    body.extend(WDAT_NO_PCI);
    let count = u32::try_from(entries.len()).unwrap_or(0);
    for field in [watchdog.count_milliseconds, watchdog.countdown_max, 1, WDAT_ENABLED, count] {
        body.extend(field.to_le_bytes());
    }
    for (action, instruction, port, value, mask) in entries {
        let register =
            GAS::new(AddressSpace::SystemIo, 32, 0, AccessSize::DwordAccess, port.into());
        body.extend([action, instruction, 0, 0]);
        body.extend_from_slice(register.as_bytes());
        body.extend([value, mask].map(u32::to_le_bytes).concat());
    }
    let mut wdat =
        Sdt::new(*b"WDAT", SDT_HEADER_LEN, WDAT_REVISION, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    wdat.append_slice(&body);
    wdat
}

pub(super) fn xsdt(tables: &[u64]) -> XSDT {
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    for address in tables {
        xsdt.add_entry(*address);
    }
    xsdt
}

#[expect(clippy::cast_possible_truncation, reason = "the assertion says that it does not")]
const fn address_32(address: u64) -> u32 {
    assert!(address <= u32::MAX as u64);
    address as u32
}
