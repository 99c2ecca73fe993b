//! ELF kernels: a Linux vmlinux by its 64-bit entry, others by PVH.

use std::ops::Range;

use arch::memory::GuestMemory;
use arch::range_map::RangeMap;
use linux_loader::bootparam::{LOADED_HIGH, setup_header};
use linux_loader::elf::{
    EI_CLASS, EI_DATA, ELFCLASS64, ELFDATA2LSB, EM_X86_64, Elf64_Ehdr, Elf64_Phdr, PT_LOAD, PT_NOTE,
};
use vm_memory::ByteValued;

use super::{Error, Image, Kernel, Protocol, room};
use crate::EntryProtocol;

pub(super) const MAGIC: &[u8] = b"\x7fELF";

/// A vmlinux has about five program headers; more than this is no kernel.
const PROGRAM_HEADERS_MAX: u16 = 64;
/// The notes of a vmlinux are a few hundred bytes.
const NOTES_LEN_MAX: u64 = 64 << 10;
/// Name and type of the note with the 32-bit entry (xen/include/public/elfnote.h).
const XEN_NAME: &[u8] = b"Xen\0";
const XEN_PHYS32_ENTRY: u32 = 18;
/// Linux links its code this far above its physical addresses.
const LINUX_MAP_BASE: u64 = 0xFFFF_FFFF_8000_0000;
/// x86 Linux keeps 2048 bytes of the command line, NUL included (COMMAND_LINE_SIZE).
const LINUX_COMMAND_LINE_MAX: usize = 2047;
/// Up to where x86 Linux takes an initrd unless its header says otherwise.
const LINUX_INITRD_END_MAX: u64 = 0x8000_0000;
/// The boot protocol that a vmlinux is told it was loaded by: 2.15.
const PROTOCOL_VERSION: u16 = 0x20F;

pub(super) fn load(
    memory: GuestMemory,
    image: &Image<'_>,
    protocol: EntryProtocol,
) -> Result<Kernel, Error> {
    let header = file_header(image)?;
    let program_headers = program_headers(image, &header)?;
    let segments = segments(memory, image, &program_headers)?;
    let (protocol, instruction) = entry(image, &program_headers, header.e_entry, protocol)?;
    if segments.get(instruction).is_none() {
        return Err(Error::NoEntry);
    }
    for (range, segment) in segments.iter() {
        let target = room(memory, range.start, segment.p_memsz)?;
        image.read_to(target, segment.p_offset, segment.p_filesz)?;
    }
    Ok(Kernel {
        protocol,
        instruction,
        end: segments.iter().map(|(range, _)| range.end).max().unwrap_or(0),
        initrd_end_max: LINUX_INITRD_END_MAX,
        command_line_max: LINUX_COMMAND_LINE_MAX,
        header: setup_header {
            boot_flag: 0xAA55,
            header: u32::from_le_bytes(*b"HdrS"),
            version: PROTOCOL_VERSION,
            loadflags: LOADED_HIGH,
            kernel_alignment: 0x20_0000,
            ..Default::default()
        },
    })
}

fn file_header(image: &Image<'_>) -> Result<Elf64_Ehdr, Error> {
    let bytes = image.bytes(0, size_of::<Elf64_Ehdr>(), "the ELF header")?;
    let mut header = Elf64_Ehdr::default();
    header.as_mut_slice().copy_from_slice(&bytes);
    if header.e_ident.get(EI_CLASS) != Some(&ELFCLASS64) {
        return Err(Error::WrongProcessor("a 32-bit one"));
    }
    if header.e_ident.get(EI_DATA) != Some(&ELFDATA2LSB) {
        return Err(Error::WrongProcessor("a big-endian one"));
    }
    if header.e_machine != EM_X86_64 {
        return Err(Error::WrongProcessor("not x86_64"));
    }
    Ok(header)
}

fn program_headers(image: &Image<'_>, header: &Elf64_Ehdr) -> Result<Vec<Elf64_Phdr>, Error> {
    const SIZE: usize = size_of::<Elf64_Phdr>();
    if usize::from(header.e_phentsize) != SIZE {
        return Err(Error::Invalid("its program headers have an unknown size"));
    }
    if header.e_phnum > PROGRAM_HEADERS_MAX {
        return Err(Error::Invalid("it has more than 64 program headers"));
    }
    let len = usize::from(header.e_phnum) * SIZE;
    let table = image.bytes(header.e_phoff, len, "the program header table")?;
    let parse = |bytes: &[u8]| {
        let mut program_header = Elf64_Phdr::default();
        program_header.as_mut_slice().copy_from_slice(bytes);
        program_header
    };
    Ok(table.chunks_exact(SIZE).map(parse).collect())
}

/// The segments to load by their physical addresses, all checked against the file and against RAM.
fn segments<'a>(
    memory: GuestMemory,
    image: &Image<'_>,
    program_headers: &'a [Elf64_Phdr],
) -> Result<RangeMap<&'a Elf64_Phdr>, Error> {
    let mut segments = RangeMap::new();
    for segment in program_headers.iter().filter(|segment| is_loaded(segment)) {
        if segment.p_filesz > segment.p_memsz {
            return Err(Error::Invalid("a segment has more bytes in the file than in memory"));
        }
        image.require(segment.p_offset, segment.p_filesz, "a segment")?;
        room(memory, segment.p_paddr, segment.p_memsz)?;
        let range = segment.p_paddr..segment.p_paddr + segment.p_memsz;
        segments.insert(range, segment).map_err(|_| Error::Invalid("its segments overlap"))?;
    }
    Ok(segments)
}

fn is_loaded(segment: &Elf64_Phdr) -> bool {
    segment.p_type == PT_LOAD && segment.p_memsz > 0
}

/// Chooses the protocol and returns it with the physical address of the first instruction.
fn entry(
    image: &Image<'_>,
    program_headers: &[Elf64_Phdr],
    elf_entry: u64,
    protocol: EntryProtocol,
) -> Result<(Protocol, u64), Error> {
    let linux = (Protocol::Linux64, elf_entry);
    match protocol {
        EntryProtocol::Linux64 => Ok(linux),
        EntryProtocol::Auto if is_linux(program_headers, elf_entry) => Ok(linux),
        EntryProtocol::Auto => {
            let pvh = pvh_entry(image, program_headers)?;
            Ok(pvh.map_or(linux, |entry| (Protocol::Pvh, entry)))
        }
        EntryProtocol::Pvh => {
            let pvh = pvh_entry(image, program_headers)?;
            Ok((Protocol::Pvh, pvh.ok_or(Error::NoPvhEntry)?))
        }
    }
}

/// Whether the entry is physical, in a segment that Linux maps where it maps its code.
///
/// Other kernels that have a PVH note enter at a virtual address, or have no such mapping.
fn is_linux(program_headers: &[Elf64_Phdr], elf_entry: u64) -> bool {
    program_headers.iter().filter(|segment| is_loaded(segment)).any(|segment| {
        physical_range(segment).contains(&elf_entry)
            && segment.p_vaddr.checked_sub(segment.p_paddr) == Some(LINUX_MAP_BASE)
    })
}

fn physical_range(segment: &Elf64_Phdr) -> Range<u64> {
    segment.p_paddr..segment.p_paddr.saturating_add(segment.p_memsz)
}

/// The 32-bit entry that a Xen note gives, in whichever of the note segments it is.
fn pvh_entry(image: &Image<'_>, program_headers: &[Elf64_Phdr]) -> Result<Option<u64>, Error> {
    for segment in program_headers.iter().filter(|segment| segment.p_type == PT_NOTE) {
        if segment.p_filesz > NOTES_LEN_MAX {
            return Err(Error::Invalid("its notes are longer than 64 KiB"));
        }
        let len = usize::try_from(segment.p_filesz).unwrap_or(0);
        let notes = image.bytes(segment.p_offset, len, "the notes")?;
        let entry = Notes(&notes).find(|note| {
            note.name == XEN_NAME && note.kind == XEN_PHYS32_ENTRY && note.description.len() <= 8
        });
        if let Some(note) = entry {
            let mut address = [0; 8];
            for (target, byte) in address.iter_mut().zip(note.description) {
                *target = *byte;
            }
            return Ok(Some(u64::from_le_bytes(address)));
        }
    }
    Ok(None)
}

struct Note<'a> {
    kind: u32,
    name: &'a [u8],
    description: &'a [u8],
}

/// The notes of a segment; ends early where one does not fit.
struct Notes<'a>(&'a [u8]);

impl<'a> Iterator for Notes<'a> {
    type Item = Note<'a>;

    fn next(&mut self) -> Option<Note<'a>> {
        let name_len = self.word()?;
        let description_len = self.word()?;
        let kind = self.word()?;
        let name = self.padded(name_len)?;
        let description = self.padded(description_len)?;
        Some(Note { kind, name, description })
    }
}

impl<'a> Notes<'a> {
    fn word(&mut self) -> Option<u32> {
        let (word, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(u32::from_le_bytes(*word))
    }

    /// The next `len` bytes, with the padding to 4 bytes skipped; the last note may lack it.
    fn padded(&mut self, len: u32) -> Option<&'a [u8]> {
        let len = usize::try_from(len).ok()?;
        let bytes = self.0.get(..len)?;
        let next = len.checked_next_multiple_of(4)?;
        self.0 = self.0.get(next..).unwrap_or(&[]);
        Some(bytes)
    }
}
