use arch::entry::EntryMode;
use linux_loader::elf::{Elf64_Ehdr, Elf64_Phdr, PT_LOAD, PT_NOTE};
use linux_loader::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};

use super::*;

const TEXT: u64 = 0x100_0000;
const LINUX_MAP: u64 = 0xFFFF_FFFF_8000_0000;
const PVH_ENTRY: u64 = TEXT + 0x40;

/// An ELF file: its entry, and its segments with their content.
#[derive(Clone)]
struct Elf {
    entry: u64,
    segments: Vec<(Elf64_Phdr, Vec<u8>)>,
}

impl Elf {
    /// Text and data as in a vmlinux, with more memory than bytes for the data.
    fn linux() -> Self {
        let data = vec![3; 0x100];
        Self { entry: TEXT, segments: Vec::new() }
            .load(TEXT, LINUX_MAP + TEXT, vec![0x90; 0x200], 0x200)
            .load(TEXT + 0x1000, LINUX_MAP + TEXT + 0x1000, data, 0x3000)
    }

    fn load(mut self, physical: u64, virtual_address: u64, bytes: Vec<u8>, memory: u64) -> Self {
        let header = Elf64_Phdr {
            p_type: PT_LOAD,
            p_paddr: physical,
            p_vaddr: virtual_address,
            p_memsz: memory,
            ..Default::default()
        };
        self.segments.push((header, bytes));
        self
    }

    fn notes(mut self, notes: &[(&[u8], u32, &[u8])]) -> Self {
        let mut bytes = Vec::new();
        for (name, kind, description) in notes {
            for field in [name.len(), description.len(), *kind as usize] {
                bytes.extend(u32::try_from(field).unwrap().to_le_bytes());
            }
            for part in [name, description] {
                bytes.extend_from_slice(part);
                bytes.resize(bytes.len().next_multiple_of(4), 0);
            }
        }
        self.segments.push((Elf64_Phdr { p_type: PT_NOTE, ..Default::default() }, bytes));
        self
    }

    fn pvh(self) -> Self {
        self.notes(&[(b"GNU\0", 3, &[1; 20]), (b"Xen\0", 18, &PVH_ENTRY.to_le_bytes())])
    }

    fn header(&self) -> Elf64_Ehdr {
        let mut e_ident = [0; 16];
        e_ident[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
        Elf64_Ehdr {
            e_ident,
            e_type: 2,
            e_machine: 62,
            e_version: 1,
            e_entry: self.entry,
            e_phoff: 64,
            e_phentsize: 56,
            e_phnum: u16::try_from(self.segments.len()).unwrap(),
            ..Default::default()
        }
    }

    fn bytes(&self) -> Vec<u8> {
        let mut image = self.header().as_slice().to_vec();
        let mut offset = (64 + 56 * self.segments.len()) as u64;
        for (mut header, bytes) in self.segments.iter().cloned() {
            header.p_offset = offset;
            header.p_filesz = bytes.len() as u64;
            offset += header.p_filesz;
            image.extend_from_slice(header.as_slice());
        }
        image.extend(self.segments.iter().flat_map(|(_, bytes)| bytes));
        image
    }

    fn guest(&self) -> Guest {
        Guest::new(&self.bytes())
    }

    /// The file with one field of a program header changed.
    fn changed(&self, segment: usize, change: impl FnOnce(&mut Elf64_Phdr)) -> Guest {
        let mut image = self.bytes();
        let at = 64 + 56 * segment;
        let mut header = Elf64_Phdr::default();
        header.as_mut_slice().copy_from_slice(&image[at..at + 56]);
        change(&mut header);
        image[at..at + 56].copy_from_slice(header.as_slice());
        Guest::new(&image)
    }
}

fn read<T: ByteValued + Default>(guest: &Guest, address: u64) -> T {
    let mut value = T::default();
    value.as_mut_slice().copy_from_slice(&guest.bytes(address, size_of::<T>()));
    value
}

#[test]
fn a_vmlinux_is_entered_in_64_bit_mode_even_with_a_pvh_note() {
    let guest = Elf::linux().pvh().guest();
    let entry = guest.load().unwrap();
    assert_eq!((entry.mode, entry.instruction.0), (EntryMode::Long64, TEXT));
    assert_eq!(guest.bytes(TEXT, 2), [0x90; 2]);
    assert_eq!(
        guest.bytes(TEXT + 0x10FE, 4),
        [3, 3, 0, 0],
        "memory beyond the file's bytes is zero"
    );
    let header = guest.zero_page().hdr;
    let (boot_flag, version) = (header.boot_flag, header.version);
    assert_eq!((boot_flag, header.type_of_loader, version), (0xAA55, 0xFF, 0x20F));
}

#[test]
fn a_vmlinux_is_entered_by_pvh_when_asked() {
    let guest = Elf::linux().pvh().guest().by(EntryProtocol::Pvh).with_initrd(5000);
    let entry = guest.load().unwrap();
    assert_eq!((entry.mode, entry.instruction.0), (EntryMode::Protected32, PVH_ENTRY));

    let info: hvm_start_info = read(&guest, entry.argument.0);
    assert_eq!((info.magic, info.version, info.nr_modules), (0x336E_C578, 1, 1));
    assert_eq!(info.cmdline_paddr, layout::COMMAND_LINE.start);
    assert_eq!(guest.bytes(info.rsdp_paddr, 8), b"RSD PTR ");
    let module: hvm_modlist_entry = read(&guest, info.modlist_paddr);
    assert_eq!((module.paddr, module.size), (64 * MIB - 8192, 5000));
    assert_eq!(info.memmap_entries, 4);
    let entry: hvm_memmap_table_entry = read(&guest, info.memmap_paddr + 2 * 24);
    assert_eq!((entry.addr, entry.size, entry.type_), (MIB, 63 * MIB, 1));
}

#[test]
fn a_kernel_that_is_not_linux_is_entered_by_its_pvh_note() {
    let kernel = Elf { entry: TEXT, segments: Vec::new() };
    let kernel = kernel.load(TEXT, TEXT, vec![0x90; 0x200], 0x200).pvh();
    let entry = kernel.guest().load().unwrap();
    assert_eq!((entry.mode, entry.instruction.0), (EntryMode::Protected32, PVH_ENTRY));
}

#[test]
fn a_kernel_without_any_note_is_entered_in_64_bit_mode() {
    let kernel = Elf { entry: TEXT + 8, segments: Vec::new() };
    let entry = kernel.load(TEXT, TEXT, vec![0x90; 0x200], 0x200).guest().load().unwrap();
    assert_eq!((entry.mode, entry.instruction.0), (EntryMode::Long64, TEXT + 8));
}

#[test]
fn a_pvh_note_is_found_before_and_after_other_notes() {
    let gnu: &[(&[u8], u32, &[u8])] = &[(b"GNU\0", 3, &[1; 20])];
    for kernel in [Elf::linux().pvh().notes(gnu), Elf::linux().notes(gnu).pvh()] {
        let entry = kernel.guest().by(EntryProtocol::Pvh).load().unwrap();
        assert_eq!(entry.instruction.0, PVH_ENTRY);
    }
}

#[test]
fn a_pvh_entry_of_32_bits_is_taken() {
    let note: (&[u8], u32, &[u8]) = (b"Xen\0", 18, &0x100_0010u32.to_le_bytes());
    let guest = Elf::linux().notes(&[note]).guest().by(EntryProtocol::Pvh);
    assert_eq!(guest.load().unwrap().instruction.0, 0x100_0010);
}

#[test]
fn pvh_without_a_note_is_refused() {
    let broken: &[(&[u8], u32, &[u8])] = &[(b"Xen\0", 18, &[1; 9]), (b"Xem\0", 18, &[1; 8])];
    for kernel in [Elf::linux(), Elf::linux().notes(broken)] {
        let refusal = kernel.guest().by(EntryProtocol::Pvh).refusal();
        assert!(refusal.contains("no PVH entry"), "{refusal}");
    }
}

#[test]
fn an_entry_outside_of_all_segments_is_refused() {
    let mut kernel = Elf::linux();
    kernel.entry = LINUX_MAP + TEXT;
    assert!(kernel.guest().refusal().contains("entry point"));
    let far: (&[u8], u32, &[u8]) = (b"Xen\0", 18, &[0xFF; 8]);
    let guest = Elf::linux().notes(&[far]).guest().by(EntryProtocol::Pvh);
    assert!(guest.refusal().contains("entry point"));
}

#[test]
fn the_initrd_is_kept_above_the_memory_of_all_segments() {
    let kernel = Elf::linux().load(0x200_0000, LINUX_MAP, vec![1], 31 << 20);
    assert!(kernel.guest().with_initrd(MIB).load().is_ok());
    let refusal = kernel.guest().with_initrd(MIB + 1).refusal();
    assert!(refusal.contains("at least 65 MiB"), "{refusal}");
}

#[test]
fn segments_that_lie_are_refused() {
    let kernel = Elf::linux();
    for (guest, text) in [
        (kernel.changed(0, |segment| segment.p_memsz = 0x1FF), "more bytes in the file"),
        (kernel.changed(0, |segment| segment.p_memsz = 0x1001), "overlap"),
        (kernel.changed(0, |segment| segment.p_paddr = 0xF_F000), "first MiB"),
        (kernel.changed(0, |segment| segment.p_paddr = u64::MAX), "no guest has RAM there"),
        (kernel.changed(1, |segment| segment.p_memsz = 64 << 20), "at least 81 MiB"),
        (kernel.changed(1, |segment| segment.p_memsz = u64::MAX), "no guest has RAM there"),
        (kernel.changed(0, |segment| segment.p_offset = u64::MAX), "truncated"),
        (kernel.changed(1, |segment| segment.p_offset += 1), "truncated"),
    ] {
        let refusal = guest.refusal();
        assert!(refusal.contains(text), "{text}: {refusal}");
    }
}

#[test]
fn nothing_is_loaded_from_a_file_with_a_bad_segment() {
    let guest = Elf::linux().changed(1, |segment| segment.p_memsz = 64 << 20);
    guest.load().unwrap_err();
    assert_eq!(guest.bytes(TEXT, 0x200), [0; 0x200]);
}

#[test]
fn elf_headers_that_no_kernel_has_are_refused() {
    let image = Elf::linux().bytes();
    for (offset, byte, text) in [
        (4, 1, "32-bit"),
        (5, 2, "big-endian"),
        (18, 183, "not x86_64"),
        (54, 32, "program headers"),
        (57, 1, "program headers"),
        (39, 0x80, "truncated"),
        (56, 0, "entry point"),
    ] {
        let mut image = image.clone();
        image[offset] = byte;
        let refusal = Guest::new(&image).refusal();
        assert!(refusal.contains(text), "{offset}: {refusal}");
    }
}

#[test]
fn notes_longer_than_any_kernels_are_refused() {
    let kernel = Elf::linux().notes(&[(b"x", 1, &[0; 70_000])]);
    assert!(kernel.guest().by(EntryProtocol::Pvh).refusal().contains("notes"));
}
