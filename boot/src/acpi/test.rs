use arch::platform::{MmioDevice, SerialPort, Watchdog};
use arch::target::layout;

use super::*;
use crate::test::platform;

const START: u64 = 0xE_0000;

/// The tables as an operating system finds them: from the RSDP through the XSDT.
struct Found<'a>(&'a [u8]);

impl<'a> Found<'a> {
    fn at(&self, address: u64) -> &'a [u8] {
        &self.0[usize::try_from(address - START).unwrap()..]
    }

    fn table(&self, address: u64) -> &'a [u8] {
        let table = self.at(address);
        let table = &table[..u32_at(table, 4) as usize];
        assert_eq!(sum(table), 0, "checksum of {:?}", str::from_utf8(&table[..4]));
        table
    }

    /// The tables in the XSDT's order, and the DSDT that the FADT points to.
    fn tables(&self) -> Vec<&'a [u8]> {
        assert!(self.0.starts_with(b"RSD PTR "));
        assert_eq!((sum(&self.0[..20]), sum(&self.0[..36])), (0, 0));
        let xsdt = self.table(u64_at(self.0, 24));
        assert!(xsdt.starts_with(b"XSDT"));
        let mut tables: Vec<_> =
            xsdt[36..].chunks_exact(8).map(|entry| self.table(u64_at(entry, 0))).collect();
        tables.push(self.table(u64_at(tables[0], 140)));
        tables
    }

    fn named(&self, signature: &[u8; 4]) -> &'a [u8] {
        self.tables().into_iter().find(|table| table.starts_with(signature)).unwrap()
    }
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}

fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    u32::from_le_bytes(bytes[offset..offset + 4].try_into().unwrap())
}

fn u64_at(bytes: &[u8], offset: usize) -> u64 {
    u64::from_le_bytes(bytes[offset..offset + 8].try_into().unwrap())
}

fn contains(bytes: &[u8], text: &str) -> bool {
    bytes.windows(text.len()).any(|window| window == text.as_bytes())
}

fn mmio(index: u64) -> MmioDevice {
    let start = layout::VIRTIO_MMIO.start + index * 0x1000;
    MmioDevice {
        registers: start..start + 0x1000,
        interrupt: 5 + u32::from(index.is_multiple_of(2)),
    }
}

#[test]
fn every_table_is_found_and_sums_to_zero() {
    let bytes = build(&platform(), START).unwrap();
    let signatures: Vec<_> = Found(&bytes).tables().iter().map(|table| &table[..4]).collect();
    assert_eq!(signatures, [b"FACP", b"APIC", b"MCFG", b"DSDT"]);
}

#[test]
fn a_machine_without_pci_has_neither_mcfg_nor_host_bridge() {
    let mut platform = platform();
    platform.pci = None;
    let bytes = build(&platform, START).unwrap();
    let signatures: Vec<_> = Found(&bytes).tables().iter().map(|table| &table[..4]).collect();
    assert_eq!(signatures, [b"FACP", b"APIC", b"DSDT"]);
    assert!(!contains(Found(&bytes).named(b"DSDT"), "PCI0"));
}

#[test]
fn the_fadt_names_power_registers_and_no_legacy_hardware() {
    let bytes = build(&platform(), START).unwrap();
    let fadt = Found(&bytes).named(b"FACP");
    let [reset, sleep_control, sleep_status] =
        [116, 244, 256].map(|offset| u64_at(fadt, offset + 4));
    assert_eq!((reset, sleep_control, sleep_status), (0x602, 0x600, 0x601));
    assert_eq!((fadt[116], fadt[128]), (1, 1), "a port, and the value to write there");
    let hardware_reduced = 1 << 20;
    let reset_register = 1 << 10;
    assert_eq!(u32_at(fadt, 112) & (hardware_reduced | reset_register), 0x10_0400);
    assert_eq!(fadt[109..111], [0b10_0100, 0], "no VGA, no CMOS clock, no i8042, no ISA");
}

#[test]
fn processors_from_id_255_on_are_announced_as_x2apic() {
    let mut platform = platform();
    platform.processors.count = 257;
    let bytes = build(&platform, START).unwrap();
    let madt = Found(&bytes).named(b"APIC");
    let mut structures = &madt[44..];
    let mut found = Vec::new();
    while let [kind, len, ..] = structures {
        let (structure, rest) = structures.split_at(usize::from(*len));
        match kind {
            0 => found.push((structure[3].into(), structure[2].into(), u32_at(structure, 4))),
            9 => found.push((u32_at(structure, 4), u32_at(structure, 12), u32_at(structure, 8))),
            1 => assert_eq!(u32_at(structure, 4), 0xFEC0_0000),
            _ => unreachable!("kind {kind}"),
        }
        structures = rest;
    }
    let expected: Vec<_> = (0..257).map(|id| (id, id, 1)).collect();
    assert_eq!(found, expected, "APIC id, processor id, enabled");
}

#[test]
fn the_mcfg_covers_the_buses_that_have_configuration_space() {
    let bytes = build(&platform(), START).unwrap();
    let mcfg = Found(&bytes).named(b"MCFG");
    assert_eq!(u64_at(mcfg, 44), layout::PCI_ECAM_START);
    assert_eq!(mcfg[52..56], [0, 0, 0, 3], "segment, first bus, last bus");
}

#[test]
fn the_wdat_says_what_a_driver_writes_where() {
    let mut platform = platform();
    platform.watchdog = Some(Watchdog {
        control_port: 0x610,
        countdown_port: 0x614,
        count_port: 0x618,
        status_port: 0x61C,
        count_milliseconds: 100,
        countdown_max: 0xFFFF,
    });
    let bytes = build(&platform, START).unwrap();
    let wdat = Found(&bytes).named(b"WDAT");
    assert_eq!([36, 48, 52, 56, 60, 64].map(|at| u32_at(wdat, at)), [32, 100, 0xFFFF, 1, 1, 10]);
    assert_eq!(wdat[40..48], [0xFF, 0, 0xFF, 0xFF, 0xFF, 0, 0, 0], "no PCI function");
    let entries: Vec<_> = wdat[68..].chunks_exact(24).collect();
    assert!(entries.iter().all(|entry| entry[4..8] == [1, 32, 0, 3]), "ports of 32 bits");
    let found = |action| {
        let entry = entries.iter().find(|entry| entry[0] == action).unwrap();
        (entry[1], u64_at(entry, 8), u32_at(entry, 16), u32_at(entry, 20))
    };
    assert_eq!(found(9), (2, 0x610, 1, 1), "start");
    assert_eq!(found(11), (2, 0x610, 0, 1), "stop");
    assert_eq!(found(6), (3, 0x614, 0, u32::MAX), "set the countdown");
    assert_eq!(found(1), (2, 0x618, 1, u32::MAX), "a sign of life");
}

#[test]
fn the_dsdt_has_the_devices_of_the_platform_and_no_others() {
    let optional = ["LNRO0005", "COM1", "QEMU0001"];
    let bytes = build(&platform(), START).unwrap();
    let dsdt = Found(&bytes).named(b"DSDT");
    assert!(["PWRB", "ACPI0013", "PCI0", "C001", "_S5_"].iter().all(|name| contains(dsdt, name)));
    assert!(optional.iter().all(|name| !contains(dsdt, name)));

    let mut platform = platform();
    platform.virtio_mmio = (0..3).map(mmio).collect();
    platform.serial = vec![SerialPort { port: 0x3F8, interrupt: 4 }];
    platform.panic_port = Some(0x505);
    let bytes = build(&platform, START).unwrap();
    let dsdt = Found(&bytes).named(b"DSDT");
    assert!(optional.iter().all(|name| contains(dsdt, name)));
    assert!(contains(dsdt, "V002") && !contains(dsdt, "V003"));
}

#[test]
fn devices_on_one_interrupt_line_share_it() {
    const SHARED: u8 = 1 << 3;
    let mut platform = platform();
    platform.virtio_mmio = (0..3).map(mmio).collect();
    let bytes = build(&platform, START).unwrap();
    let dsdt = Found(&bytes).named(b"DSDT");
    let sharing = |interrupt| {
        let lines = dsdt.windows(9).filter(|line| line[..3] == [0x89, 6, 0]);
        let lines = lines.filter(|line| u32_at(line, 5) == interrupt);
        lines.map(|line| line[3] & SHARED != 0).collect::<Vec<_>>()
    };
    assert_eq!(sharing(6), [true, true]);
    assert_eq!(sharing(5), [false]);
}

#[test]
fn a_thousand_processors_fit() {
    let mut platform = platform();
    platform.processors.count = 1024;
    platform.virtio_mmio = (0..32).map(mmio).collect();
    let room = FIRMWARE_TABLES.end - FIRMWARE_TABLES.start;
    assert!((build(&platform, START).unwrap().len() as u64) < room);
}

#[test]
fn more_than_tables_can_describe_is_refused() {
    let mut platform = platform();
    platform.processors.count = 0x1001;
    let refusal = build(&platform, START).unwrap_err();
    assert_eq!(refusal, Error::TooMany { what: "processors", count: 0x1001, max: 0x1000 });
}

#[test]
fn windows_beyond_their_descriptors_are_refused() {
    let mut platform = platform();
    platform.pci.as_mut().unwrap().window_32 = 0xC000_0000..0x1_0000_0001;
    assert!(matches!(build(&platform, START), Err(Error::Range { .. })));
}
