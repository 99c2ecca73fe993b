//! Linux bzImage, entered in 64-bit mode (Documentation/arch/x86/boot.rst).

use std::io::{Read, Seek, SeekFrom};

use arch::memory::GuestMemory;
use arch::target::layout::HIGH_MEMORY;
use linux_loader::bootparam::{self, setup_header};
use vm_memory::ByteValued;

use super::{Error, Image, Kernel, Protocol, room};
use crate::EntryProtocol;

const SECTOR: u64 = 512;
/// Where the setup header starts, and where its length is counted from.
const HEADER_START: usize = 0x1F1;
const HEADER_LEN_FROM: usize = 0x202;
/// The header's own length is the second byte of the jump over it.
const JUMP_DISTANCE: usize = 0x201;
const HEADER_MAGIC: u32 = u32::from_le_bytes(*b"HdrS");
const HEADER_MAGIC_AT: usize = 0x202;
/// The setup code has this many sectors where the header says 0.
const SETUP_SECTORS_DEFAULT: u8 = 4;
/// The first protocol version with `xloadflags`.
const VERSION_MIN: u16 = 0x20C;
/// The 64-bit entry point is this far into the protected-mode code.
const ENTRY_64: u64 = 0x200;

pub(super) fn is_bzimage(head: &[u8]) -> bool {
    head.get(HEADER_MAGIC_AT..HEADER_MAGIC_AT + 4) == Some(&HEADER_MAGIC.to_le_bytes())
}

/// Reads the protected-mode code to where it decompresses itself without moving first.
pub(super) fn load(
    memory: GuestMemory,
    image: &Image<'_>,
    protocol: EntryProtocol,
) -> Result<Kernel, Error> {
    if protocol == EntryProtocol::Pvh {
        return Err(Error::BzImageByPvh);
    }
    let header = parse(&image.head)?;
    check_entry(&header)?;

    let code_start = code_start(&header);
    let syssize = u64::from(header.syssize) * 16;
    // The last paragraph may be cut short, and a signature may follow.
    image.require(code_start, syssize.saturating_sub(15), "the protected-mode code")?;
    let code_len = syssize.min(image.len - code_start);
    if code_len <= ENTRY_64 {
        return Err(Error::Invalid("it has no protected-mode code"));
    }

    let start = load_address(&header)?;
    let memory_len = code_len.max(header.init_size.into());
    let target = room(memory, start, memory_len)?;
    image.read_to(target, code_start, code_len)?;
    Ok(Kernel {
        protocol: Protocol::Linux64,
        instruction: start + ENTRY_64,
        end: start + memory_len,
        initrd_end_max: u64::from(header.initrd_addr_max) + 1,
        command_line_max: usize::try_from(header.cmdline_size).unwrap_or(usize::MAX),
        header,
    })
}

/// Where the compressed kernel is in a bzImage, as an offset in the file and a length.
pub(super) fn payload(file: &mut (impl Read + Seek)) -> Result<(u64, u64), Error> {
    let file_len = file.seek(SeekFrom::End(0))?;
    file.rewind()?;
    let mut head = Vec::new();
    file.by_ref().take(super::HEAD_LEN as u64).read_to_end(&mut head)?;
    if head.starts_with(super::elf::MAGIC) {
        return Err(Error::Invalid("it is an ELF file already, use it as it is"));
    }
    if !is_bzimage(&head) {
        return Err(Error::UnknownFormat);
    }
    let header = parse(&head)?;
    if header.version < VERSION_MIN {
        return Err(Error::No64BitEntry("its boot protocol is older than 2.12"));
    }
    let start = code_start(&header) + u64::from(header.payload_offset);
    let len = u64::from(header.payload_length);
    if len == 0 {
        return Err(Error::Invalid("it has no payload"));
    }
    if start + len > file_len {
        return Err(Error::Truncated { part: "the payload", end: start + len, file_len });
    }
    Ok((start, len))
}

/// The setup header; what an older protocol does not have is zero.
fn parse(head: &[u8]) -> Result<setup_header, Error> {
    let jump = head.get(JUMP_DISTANCE).ok_or(Error::Invalid("its setup header is cut short"))?;
    let end = HEADER_LEN_FROM + usize::from(*jump);
    let bytes =
        head.get(HEADER_START..end).ok_or(Error::Invalid("its setup header is cut short"))?;
    let mut header = setup_header::default();
    for (target, byte) in header.as_mut_slice().iter_mut().zip(bytes) {
        *target = *byte;
    }
    Ok(header)
}

fn check_entry(header: &setup_header) -> Result<(), Error> {
    if header.version < VERSION_MIN {
        return Err(Error::No64BitEntry("its boot protocol is older than 2.12"));
    }
    if header.xloadflags & bootparam::XLF_KERNEL_64 == 0 {
        return Err(Error::No64BitEntry("it is a 32-bit kernel"));
    }
    if header.loadflags & bootparam::LOADED_HIGH == 0 {
        return Err(Error::No64BitEntry("it is a zImage"));
    }
    if header.init_size == 0 {
        return Err(Error::Invalid("its init_size is zero"));
    }
    Ok(())
}

/// Offset in the file of the protected-mode code.
fn code_start(header: &setup_header) -> u64 {
    let sectors = match header.setup_sects {
        0 => SETUP_SECTORS_DEFAULT,
        sectors => sectors,
    };
    (u64::from(sectors) + 1) * SECTOR
}

/// The address that the kernel prefers: anywhere lower it would move itself there first.
fn load_address(header: &setup_header) -> Result<u64, Error> {
    let preferred = header.pref_address.max(HIGH_MEMORY);
    if header.relocatable_kernel == 0 {
        return Ok(preferred);
    }
    let alignment = u64::from(header.kernel_alignment);
    if !alignment.is_power_of_two() {
        return Err(Error::Invalid("its kernel_alignment is not a power of two"));
    }
    preferred.checked_next_multiple_of(alignment).ok_or(Error::Invalid("its pref_address"))
}
