//! The zero page of the Linux x86 boot protocol.

use std::ops::Range;

use arch::memory::{GuestAddress, GuestMemory};
use arch::target::layout;
use linux_loader::bootparam::{boot_e820_entry, boot_params};
use vm_memory::ByteValued;

use crate::Error;
use crate::kernel::Kernel;
use crate::memory_map::{self, Entry};

/// "Loader of undefined type" (Documentation/arch/x86/boot.rst, type_of_loader).
const LOADER_UNDEFINED: u8 = 0xFF;

/// Writes the zero page and returns its address.
pub(crate) fn write(
    memory: GuestMemory,
    kernel: &Kernel,
    initrd: Option<Range<u64>>,
    rsdp: u64,
    map: &[Entry],
) -> Result<GuestAddress, Error> {
    let mut params = boot_params { hdr: kernel.header, acpi_rsdp_addr: rsdp, ..Default::default() };
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    (params.hdr.cmd_line_ptr, params.ext_cmd_line_ptr) = halves(layout::COMMAND_LINE.start);
    if let Some(initrd) = initrd {
        (params.hdr.ramdisk_image, params.ext_ramdisk_image) = halves(initrd.start);
        (params.hdr.ramdisk_size, params.ext_ramdisk_size) = halves(initrd.end - initrd.start);
    }

    let table = e820_table(map)?;
    params.e820_entries = table.len().try_into().unwrap_or(u8::MAX);
    for (slot, entry) in params.e820_table.iter_mut().zip(table) {
        *slot = entry;
    }
    let address = GuestAddress(layout::ZERO_PAGE);
    memory.write_bytes(address, params.as_slice())?;
    Ok(address)
}

fn e820_table(map: &[Entry]) -> Result<Vec<boot_e820_entry>, memory_map::Error> {
    let max = boot_params::default().e820_table.len();
    if map.len() > max {
        return Err(memory_map::Error { count: map.len(), max });
    }
    let entry = |Entry { range, kind }: &Entry| boot_e820_entry {
        addr: range.start,
        size: range.end - range.start,
        r#type: *kind as u32,
    };
    Ok(map.iter().map(entry).collect())
}

/// The low and the high 32 bits, which the protocol keeps apart.
#[expect(clippy::cast_possible_truncation, reason = "splits a number into its halves")]
const fn halves(value: u64) -> (u32, u32) {
    (value as u32, (value >> 32) as u32)
}
