//! The start info of the Xen PVH boot ABI (xen/include/public/arch-x86/hvm/start_info.h).

use std::ops::Range;

use arch::memory::{GuestAddress, GuestMemory};
use arch::target::layout::{self, PAGE_SIZE};
use linux_loader::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use vm_memory::ByteValued;

use crate::Error;
use crate::memory_map::{self, Entry};

/// "xEn3" with bit 7 of the E set.
const MAGIC: u32 = 0x336E_C578;
/// The first version with a memory map.
const VERSION: u32 = 1;
/// Start info, module list and memory map share a page, in this order.
const MODULES: u64 = layout::PVH_START_INFO + size_of::<hvm_start_info>() as u64;
const MEMORY_MAP: u64 = MODULES + size_of::<hvm_modlist_entry>() as u64;
#[expect(clippy::cast_possible_truncation, reason = "less than a page")]
const MEMORY_MAP_ENTRIES_MAX: usize = (layout::PVH_START_INFO + PAGE_SIZE - MEMORY_MAP) as usize
    / size_of::<hvm_memmap_table_entry>();

/// Writes the start info with its lists and returns its address.
pub(crate) fn write(
    memory: GuestMemory,
    initrd: Option<Range<u64>>,
    rsdp: u64,
    map: &[Entry],
) -> Result<GuestAddress, Error> {
    let count = map.len();
    if count > MEMORY_MAP_ENTRIES_MAX {
        return Err(memory_map::Error { count, max: MEMORY_MAP_ENTRIES_MAX }.into());
    }
    let address = GuestAddress(layout::PVH_START_INFO);
    let start_info = hvm_start_info {
        magic: MAGIC,
        version: VERSION,
        cmdline_paddr: layout::COMMAND_LINE.start,
        rsdp_paddr: rsdp,
        nr_modules: initrd.is_some().into(),
        modlist_paddr: if initrd.is_some() { MODULES } else { 0 },
        memmap_paddr: MEMORY_MAP,
        memmap_entries: count.try_into().unwrap_or(u32::MAX),
        ..Default::default()
    };
    memory.write_bytes(address, start_info.as_slice())?;
    if let Some(initrd) = initrd {
        let module = hvm_modlist_entry {
            paddr: initrd.start,
            size: initrd.end - initrd.start,
            ..Default::default()
        };
        memory.write_bytes(GuestAddress(MODULES), module.as_slice())?;
    }
    let table: Vec<u8> = map.iter().flat_map(memory_map_entry).collect();
    memory.write_bytes(GuestAddress(MEMORY_MAP), &table)?;
    Ok(address)
}

fn memory_map_entry(Entry { range, kind }: &Entry) -> Vec<u8> {
    let entry = hvm_memmap_table_entry {
        addr: range.start,
        size: range.end - range.start,
        type_: *kind as u32,
        ..Default::default()
    };
    entry.as_slice().to_vec()
}
