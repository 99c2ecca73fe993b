//! Whole loads of small hand-made kernels.

mod bzimage;
mod elf;

use std::fs::File;
use std::io::{Seek, SeekFrom, Write};

use arch::entry::Entry;
use arch::memory::{Backing, GuestAddress, GuestMemory};
use arch::platform::{Identity, PciHost, Platform, Power, Processors};
use arch::target::layout;
use linux_loader::bootparam::boot_params;
use vm_memory::ByteValued;

pub(crate) use self::bzimage::bzimage_with;
use crate::{EntryProtocol, Error, MemoryMapError, Source, load};

const MIB: u64 = 1 << 20;

/// A small machine with PCI.
pub(crate) fn platform() -> Platform {
    let ram = layout::ram_ranges(64 * MIB).unwrap();
    Platform {
        processors: Processors { count: 2 },
        pci: Some(PciHost {
            ecam: layout::PCI_ECAM_START..layout::PCI_ECAM_START + (4 << 20),
            window_32: layout::PCI_WINDOW_32,
            window_64: layout::pci_window_64(layout::end_of_memory(&ram), 40),
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
        watchdog: None,
        identity: Identity::default(),
    }
}

/// One guest's memory, and what is to be loaded into it.
struct Guest {
    platform: Platform,
    memory: GuestMemory,
    kernel: File,
    initrd: Option<File>,
    command_line: String,
    protocol: EntryProtocol,
}

impl Guest {
    fn new(kernel: &[u8]) -> Self {
        let platform = platform();
        Self {
            memory: GuestMemory::map(&platform.ram, Backing::default()).unwrap(),
            platform,
            kernel: file(kernel),
            initrd: None,
            command_line: "quiet".into(),
            protocol: EntryProtocol::Auto,
        }
    }

    fn by(mut self, protocol: EntryProtocol) -> Self {
        self.protocol = protocol;
        self
    }

    fn with_initrd(mut self, len: u64) -> Self {
        let mut initrd = file(b"initrd");
        initrd.seek(SeekFrom::End(0)).unwrap();
        initrd.set_len(len).unwrap();
        self.initrd = Some(initrd);
        self
    }

    fn load(&self) -> Result<Entry, Error> {
        let source = Source {
            kernel: &self.kernel,
            initrd: self.initrd.as_ref(),
            command_line: &self.command_line,
            protocol: self.protocol,
        };
        load(self.memory, &self.platform, &source)
    }

    fn refusal(&self) -> String {
        self.load().unwrap_err().to_string()
    }

    fn bytes(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.slice(GuestAddress(address), len).unwrap().copy_to(&mut bytes);
        bytes
    }

    fn zero_page(&self) -> boot_params {
        let mut params = boot_params::default();
        let page = self.bytes(layout::ZERO_PAGE, size_of::<boot_params>());
        params.as_mut_slice().copy_from_slice(&page);
        params
    }
}

/// A file whose own offset is at its end, where no reader must start.
fn file(content: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(content).unwrap();
    file
}

#[test]
fn a_restarted_guest_is_loaded_again_as_it_was() {
    let guest = Guest::new(&bzimage_with(b"")).with_initrd(5000);
    let entry = guest.load().unwrap();
    let images: Vec<_> = (0..2)
        .map(|_| {
            guest.memory.discard_all().unwrap();
            assert_eq!(guest.load().unwrap(), entry);
            [guest.bytes(0, 1 << 20), guest.bytes(entry.instruction.0 - 512, 4096)]
        })
        .collect();
    assert_eq!(images[0], images[1]);
    assert!(images[0][1].iter().any(|byte| *byte != 0));
}

#[test]
fn the_command_line_arrives_with_its_end() {
    let guest = Guest::new(&bzimage_with(b""));
    guest.load().unwrap();
    assert_eq!(guest.bytes(layout::COMMAND_LINE.start, 6), b"quiet\0");
    let pointer = guest.zero_page().hdr.cmd_line_ptr;
    assert_eq!(u64::from(pointer), layout::COMMAND_LINE.start);
}

#[test]
fn the_zero_page_has_the_memory_map_and_the_tables() {
    let guest = Guest::new(&bzimage_with(b""));
    guest.load().unwrap();
    let params = guest.zero_page();
    let (rsdp, table) = (params.acpi_rsdp_addr, params.e820_table);
    assert_eq!(guest.bytes(rsdp, 8), b"RSD PTR ");
    let map: Vec<_> = table[..params.e820_entries.into()]
        .iter()
        .map(|entry| (entry.addr, entry.size, entry.r#type))
        .collect();
    let expected = [
        (0, 0x9_FC00, 1),
        (0x9_FC00, 0x6_0400, 2),
        (0x10_0000, 63 * MIB, 1),
        (layout::PCI_ECAM_START, 4 * MIB, 2),
    ];
    assert_eq!(map, expected);
}

#[test]
fn smbios_is_found_where_kernels_scan_for_it() {
    let guest = Guest::new(&bzimage_with(b""));
    guest.load().unwrap();
    let found = (0xF_0000..0x10_0000u64).step_by(16).find(|at| guest.bytes(*at, 5) == b"_SM3_");
    let entry_point = guest.bytes(found.unwrap(), 24);
    let structures = u64::from_le_bytes(entry_point[16..].try_into().unwrap());
    assert_eq!(guest.bytes(structures, 2), [0, 26], "type 0 comes first");
}

#[test]
fn credentials_beyond_the_room_for_tables_are_refused() {
    let mut guest = Guest::new(&bzimage_with(b""));
    guest.platform.identity.oem_strings = vec!["x".repeat(60_000); 2];
    guest.load().unwrap();
    guest.platform.identity.oem_strings = vec!["x".repeat(70_000); 2];
    assert!(guest.refusal().contains("SMBIOS"), "{}", guest.refusal());
}

#[test]
fn a_memory_map_that_no_protocol_takes_is_refused() {
    let mut guest = Guest::new(&bzimage_with(b""));
    guest.platform.ram = (0..200).map(|index| index * MIB..index * MIB + MIB / 2).collect();
    let refusal = guest.load().unwrap_err();
    assert!(
        matches!(refusal, Error::MemoryMap(MemoryMapError { count: 202, max: 128 })),
        "{refusal}"
    );
}

#[test]
fn a_guest_of_less_than_a_mebibyte_is_refused() {
    let mut guest = Guest::new(&bzimage_with(b""));
    guest.memory = GuestMemory::map(&[0..0x8000], Backing::default()).unwrap();
    assert!(guest.refusal().contains("memory"), "{}", guest.refusal());
}

#[test]
fn an_initrd_of_the_wrong_kind_is_refused() {
    let mut guest = Guest::new(&bzimage_with(b"")).with_initrd(0);
    assert!(guest.refusal().contains("empty"));
    guest.initrd = Some(File::open("/").unwrap());
    assert!(guest.refusal().contains("not a regular file"));
}

#[test]
fn files_that_are_no_kernels_are_refused_for_what_they_are() {
    let mut arm = vec![0; 0x100];
    arm[0x38..0x3C].copy_from_slice(b"ARM\x64");
    for (content, text) in [
        (b"".as_slice(), "neither a bzImage nor an ELF"),
        (b"#!/bin/sh\n", "neither a bzImage nor an ELF"),
        (&arm, "arm64"),
        (b"\x7fELF", "truncated"),
    ] {
        let refusal = Guest::new(content).refusal();
        assert!(refusal.contains(text), "{refusal}");
    }
    let mut guest = Guest::new(b"");
    guest.kernel = File::open("/").unwrap();
    assert!(guest.refusal().contains("not a regular file"));
}
