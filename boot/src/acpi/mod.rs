//! ACPI: which tables there are, and where they go.

mod dsdt;
mod tables;

use std::ops::Range;

use acpi_tables::Aml;
use acpi_tables::rsdp::Rsdp;
use arch::memory::{GuestAddress, GuestMemory};
use arch::platform::Platform;
use arch::target::layout::FIRMWARE_TABLES;

/// Who made the tables: six and eight characters, padded with spaces.
const OEM_ID: [u8; 6] = *b"NIXVMM";
const OEM_TABLE_ID: [u8; 8] = *b"NIXVMM  ";
const OEM_REVISION: u32 = 1;

/// Names of processors in AML have three hexadecimal digits.
const PROCESSORS_MAX: u32 = 0x1000;
/// The same for virtio-mmio devices.
const MMIO_DEVICES_MAX: usize = 0x1000;
/// COM1 to COM4.
const SERIAL_PORTS_MAX: usize = 4;

/// Tables start where their first field is aligned for any processor.
const TABLE_ALIGNMENT: usize = 16;
const RSDP_LEN: usize = size_of::<Rsdp>().next_multiple_of(TABLE_ALIGNMENT);

/// A machine that ACPI tables cannot describe.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// More of something than has a name.
    #[error("{count} {what} are more than the {max} that firmware tables describe: use fewer")]
    TooMany {
        /// Of what.
        what: &'static str,
        /// How many.
        count: usize,
        /// How many are possible.
        max: usize,
    },
    /// The tables are longer than their place.
    #[error(
        "the machine's ACPI tables take {len} bytes and have room for {room}: \
         use fewer processors or devices"
    )]
    NoRoom {
        /// Their length in bytes.
        len: usize,
        /// What is there, in bytes.
        room: usize,
    },
    /// A range that a resource descriptor of its kind cannot hold.
    #[error("the {what} at {start:#x}..{end:#x} cannot be announced by ACPI")]
    Range {
        /// Of what.
        what: &'static str,
        /// First address.
        start: u64,
        /// Address after the last.
        end: u64,
    },
    /// The place for the tables is not RAM.
    #[error("the guest has too little memory for its tables: {0}")]
    NotRam(#[from] arch::memory::NotRam),
}

/// Writes the tables and returns where they are; the RSDP is first.
pub(crate) fn write(memory: GuestMemory, platform: &Platform) -> Result<Range<u64>, Error> {
    let bytes = build(platform, FIRMWARE_TABLES.start)?;
    let room = usize::try_from(FIRMWARE_TABLES.end - FIRMWARE_TABLES.start).unwrap_or(0);
    if bytes.len() > room {
        return Err(Error::NoRoom { len: bytes.len(), room });
    }
    memory.write_bytes(GuestAddress(FIRMWARE_TABLES.start), &bytes)?;
    Ok(FIRMWARE_TABLES.start..FIRMWARE_TABLES.start + bytes.len() as u64)
}

/// RSDP, DSDT, FADT, MADT, MCFG where there is PCI, WDAT where there is a watchdog, and the XSDT
/// that lists them.
fn build(platform: &Platform, start: u64) -> Result<Vec<u8>, Error> {
    check_counts(platform)?;
    let mut area = Area { start, bytes: vec![0; RSDP_LEN] };
    let dsdt = area.place(dsdt::dsdt(platform)?.as_slice());
    let mut listed = vec![
        area.place(&bytes_of(&tables::fadt(&platform.power, dsdt))),
        area.place(tables::madt(platform.processors.count).as_slice()),
    ];
    if let Some(pci) = &platform.pci {
        listed.push(area.place(&bytes_of(&tables::mcfg(pci)?)));
    }
    if let Some(watchdog) = &platform.watchdog {
        listed.push(area.place(tables::wdat(watchdog).as_slice()));
    }
    let xsdt = area.place(&bytes_of(&tables::xsdt(&listed)));
    let rsdp = bytes_of(&Rsdp::new(OEM_ID, xsdt));
    for (target, byte) in area.bytes.iter_mut().zip(rsdp) {
        *target = byte;
    }
    Ok(area.bytes)
}

fn check_counts(platform: &Platform) -> Result<(), Error> {
    let processors = usize::try_from(platform.processors.count).unwrap_or(usize::MAX);
    let counts = [
        ("processors", processors, PROCESSORS_MAX as usize),
        ("virtio-mmio devices", platform.virtio_mmio.len(), MMIO_DEVICES_MAX),
        ("serial ports", platform.serial.len(), SERIAL_PORTS_MAX),
    ];
    match counts.into_iter().find(|(_, count, max)| count > max) {
        Some((what, count, max)) => Err(Error::TooMany { what, count, max }),
        None => Ok(()),
    }
}

/// Tables one after another, each aligned.
struct Area {
    start: u64,
    bytes: Vec<u8>,
}

impl Area {
    /// Appends a table and returns its address.
    fn place(&mut self, table: &[u8]) -> u64 {
        self.bytes.resize(self.bytes.len().next_multiple_of(TABLE_ALIGNMENT), 0);
        let address = self.start + self.bytes.len() as u64;
        self.bytes.extend_from_slice(table);
        address
    }
}

fn bytes_of(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

#[cfg(test)]
mod test;
