//! The first instruction: registers, descriptor table and page tables.

use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};

use super::layout::{GDT_START, PAGE_SIZE, PAGE_TABLES, RESET_VECTOR};
use crate::entry::{Entry, EntryMode};
use crate::memory::{GuestAddress, GuestMemory, NotRam};
use crate::platform::Power;

// The selectors that the Linux boot protocol prescribes.
const CODE_SELECTOR: u16 = 0x10;
const DATA_SELECTOR: u16 = 0x18;
const TASK_SELECTOR: u16 = 0x20;

const CODE_TYPE: u8 = 0xB; // execute, read, accessed
const DATA_TYPE: u8 = 0x3; // read, write, accessed
const TASK_TYPE: u8 = 0xB; // busy task state segment

const CR0_PROTECTED: u64 = 1;
const CR0_EXTENSION_TYPE: u64 = 1 << 4;
const CR0_PAGING: u64 = 1 << 31;
const CR4_PHYSICAL_ADDRESS_EXTENSION: u64 = 1 << 5;
const EFER_LONG_MODE: u64 = 1 << 8 | 1 << 10; // enabled and active
const RFLAGS_RESERVED: u64 = 1 << 1;

const PAGE_PRESENT_WRITABLE: u64 = 0b11;
const PAGE_LARGE: u64 = 1 << 7;
const LARGE_PAGE_SIZE: u64 = 2 << 20;
const TABLE_ENTRIES: u64 = 512;
/// Page directories: each maps 1 GiB, together the 4 GiB in which kernels and their data are
/// loaded.
const PAGE_DIRECTORIES: u64 = 4;

/// Writes the tables that the first processor's registers point to.
pub fn write_tables(memory: GuestMemory, mode: EntryMode) -> Result<(), NotRam> {
    for (index, descriptor) in (0u64..).zip(descriptors(mode)) {
        memory.write(GuestAddress(GDT_START + index * 8), &descriptor)?;
    }
    match mode {
        EntryMode::Long64 => write_page_tables(memory),
        EntryMode::Protected32 => Ok(()),
    }
}

/// Writes the code that runs when a guest resets itself by a jump to the firmware: it uses the
/// reset register.
///
/// Linux with EFI support does so on hardware-reduced platforms, where it expects EFI to reset the
/// machine and has only the BIOS to fall back to.
pub fn write_reset_vector(memory: GuestMemory, power: &Power) -> Result<(), NotRam> {
    let [port_low, port_high] = power.reset_port.to_le_bytes();
    let code = [
        [0xBA, port_low, port_high].as_slice(), // mov dx, port
        &[0xB0, power.reset_value],             // mov al, value
        &[0xEE],                                // out dx, al
        &[0xF4, 0xEB, 0xFD],                    // hlt, for ever
    ]
    .concat();
    memory.write_bytes(GuestAddress(RESET_VECTOR), &code)
}

/// The general registers of the first processor.
pub fn registers(entry: Entry) -> kvm_regs {
    let mut registers =
        kvm_regs { rip: entry.instruction.0, rflags: RFLAGS_RESERVED, ..Default::default() };
    match entry.mode {
        EntryMode::Long64 => registers.rsi = entry.argument.0,
        EntryMode::Protected32 => registers.rbx = entry.argument.0,
    }
    registers
}

/// Changes a reset processor's system registers to those of the first instruction.
pub fn set_system_registers(registers: &mut kvm_sregs, mode: EntryMode) {
    let [_, _, code, data, task] = descriptors(mode);
    registers.cs = segment(code, CODE_SELECTOR);
    registers.tr = segment(task, TASK_SELECTOR);
    let data = segment(data, DATA_SELECTOR);
    registers.ds = data;
    registers.es = data;
    registers.fs = data;
    registers.gs = data;
    registers.ss = data;
    registers.gdt.base = GDT_START;
    registers.gdt.limit = 5 * 8 - 1;
    registers.idt.base = 0;
    registers.idt.limit = 0;
    registers.cr0 = CR0_PROTECTED | CR0_EXTENSION_TYPE;
    if mode == EntryMode::Long64 {
        registers.cr0 |= CR0_PAGING;
        registers.cr3 = PAGE_TABLES;
        registers.cr4 = CR4_PHYSICAL_ADDRESS_EXTENSION;
        registers.efer = EFER_LONG_MODE;
    }
}

/// Null, unused, code, data and task state segment: flat, 4 GiB each but the last.
fn descriptors(mode: EntryMode) -> [u64; 5] {
    const PRESENT: u64 = 1 << 47;
    const CODE_OR_DATA: u64 = 1 << 44;
    const LONG: u64 = 1 << 53;
    const DEFAULT_32: u64 = 1 << 54;
    const GRANULAR_LIMIT: u64 = 1 << 55 | 0xF << 48 | 0xFFFF;
    const TASK_LIMIT: u64 = 0x67;
    let flat = PRESENT | CODE_OR_DATA | GRANULAR_LIMIT;
    let code_size = match mode {
        EntryMode::Long64 => LONG,
        EntryMode::Protected32 => DEFAULT_32,
    };
    [
        0,
        0,
        flat | code_size | u64::from(CODE_TYPE) << 40,
        flat | DEFAULT_32 | u64::from(DATA_TYPE) << 40,
        PRESENT | TASK_LIMIT | u64::from(TASK_TYPE) << 40,
    ]
}

/// The processor's hidden copy of a descriptor whose base is 0.
fn segment(descriptor: u64, selector: u16) -> kvm_segment {
    let bit = |position: u32| u8::from(descriptor >> position & 1 == 1);
    let granular = bit(55) == 1;
    kvm_segment {
        base: 0,
        limit: if granular { u32::MAX } else { 0x67 },
        selector,
        type_: descriptor.to_le_bytes()[5] & 0xF,
        present: bit(47),
        dpl: 0,
        db: bit(54),
        s: bit(44),
        l: bit(53),
        g: bit(55),
        ..Default::default()
    }
}

/// Maps the first 4 GiB to themselves with 2 MiB pages.
fn write_page_tables(memory: GuestMemory) -> Result<(), NotRam> {
    let table = |index: u64| PAGE_TABLES + index * PAGE_SIZE;
    memory.write(GuestAddress(table(0)), &(table(1) | PAGE_PRESENT_WRITABLE))?;
    for directory in 0..PAGE_DIRECTORIES {
        let entry = table(2 + directory) | PAGE_PRESENT_WRITABLE;
        memory.write(GuestAddress(table(1) + directory * 8), &entry)?;
    }
    let pages = 0..PAGE_DIRECTORIES * TABLE_ENTRIES;
    let flags = PAGE_PRESENT_WRITABLE | PAGE_LARGE;
    let directories: Vec<u8> =
        pages.flat_map(|page| (page * LARGE_PAGE_SIZE + flags).to_le_bytes()).collect();
    memory.write_bytes(GuestAddress(table(2)), &directories)
}

#[cfg(test)]
mod test {
    use super::*;
    use crate::memory::Backing;

    fn memory() -> GuestMemory {
        GuestMemory::map(&[0..0x10_0000], Backing::default()).unwrap()
    }

    fn entry(mode: EntryMode) -> Entry {
        Entry { mode, instruction: GuestAddress(0x100_0200), argument: GuestAddress(0x7000) }
    }

    /// Translates an address as the processor would, through the tables in guest memory.
    fn translate(memory: GuestMemory, cr3: u64, address: u64) -> u64 {
        let next = |table: u64, shift: u32| {
            let index = address >> shift & (TABLE_ENTRIES - 1);
            let entry: u64 = memory.read(GuestAddress(table + index * 8)).unwrap();
            assert_eq!(entry & PAGE_PRESENT_WRITABLE, PAGE_PRESENT_WRITABLE);
            entry
        };
        let address_of = |entry: u64| entry & !0xFFF;
        let page = next(address_of(next(address_of(next(cr3, 39)), 30)), 21);
        assert_ne!(page & PAGE_LARGE, 0);
        address_of(page) | address & (LARGE_PAGE_SIZE - 1)
    }

    #[test]
    fn long_mode_maps_the_first_four_gibibytes_to_themselves() {
        let memory = memory();
        write_tables(memory, EntryMode::Long64).unwrap();
        let mut system = kvm_sregs::default();
        set_system_registers(&mut system, EntryMode::Long64);
        for address in [0, 0x1234_5678, 0xBFFF_FFFF, 0xFFFF_FFFF] {
            assert_eq!(translate(memory, system.cr3, address), address);
        }
    }

    #[test]
    fn long_mode_starts_with_the_zero_page_in_rsi() {
        let registers = registers(entry(EntryMode::Long64));
        assert_eq!((registers.rip, registers.rsi), (0x100_0200, 0x7000));
        let mut system = kvm_sregs::default();
        set_system_registers(&mut system, EntryMode::Long64);
        assert_eq!((system.cs.l, system.cs.db, system.cs.selector), (1, 0, 0x10));
        assert_ne!(system.cr0 & CR0_PAGING, 0);
    }

    #[test]
    fn protected_mode_starts_flat_and_unpaged_with_the_start_info_in_ebx() {
        let registers = registers(entry(EntryMode::Protected32));
        assert_eq!((registers.rip, registers.rbx), (0x100_0200, 0x7000));
        let mut system = kvm_sregs::default();
        set_system_registers(&mut system, EntryMode::Protected32);
        assert_eq!((system.cs.l, system.cs.db, system.cs.limit), (0, 1, u32::MAX));
        assert_eq!((system.tr.type_, system.tr.limit, system.tr.s), (0xB, 0x67, 0));
        assert_eq!((system.cr0 & CR0_PAGING, system.cr4, system.efer), (0, 0, 0));
    }

    #[test]
    fn the_reset_vector_fits_below_the_first_mebibyte_and_names_the_reset_register() {
        let memory = memory();
        let power = Power {
            sleep_control_port: 0x600,
            sleep_status_port: 0x601,
            reset_port: 0x602,
            reset_value: 7,
            button_interrupt: 9,
        };
        write_reset_vector(memory, &power).unwrap();
        let code: [u8; 9] = memory.read(GuestAddress(RESET_VECTOR)).unwrap();
        assert_eq!(code[..6], [0xBA, 0x02, 0x06, 0xB0, 7, 0xEE]);
    }

    #[test]
    fn descriptors_in_memory_are_the_linux_boot_protocols() {
        let memory = memory();
        write_tables(memory, EntryMode::Long64).unwrap();
        let descriptor = |selector: u16| {
            memory.read::<u64>(GuestAddress(GDT_START + u64::from(selector))).unwrap()
        };
        assert_eq!(descriptor(CODE_SELECTOR), 0x00AF_9B00_0000_FFFF);
        assert_eq!(descriptor(DATA_SELECTOR), 0x00CF_9300_0000_FFFF);
        assert_eq!(descriptor(TASK_SELECTOR), 0x0000_8B00_0000_0067);
    }
}
