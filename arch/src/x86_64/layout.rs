//! The guest-physical address map of x86_64 guests.
//!
//! ```text
//! 0             ┌ RAM: boot structures in the first MiB, kernel from 1 MiB or where it asks
//! 3 GiB         ├ PCI memory window below 4 GiB
//! 3.5 GiB       ├ PCI configuration space (ECAM)
//! 3.5 GiB+256M  ├ virtio-mmio registers
//! 4 GiB - 20 M  ├ IOAPIC, local APIC, KVM's own pages
//! 4 GiB         ├ the rest of RAM
//! end of RAM    ├ memory that comes at run time, aligned to 2 GiB
//!               ├ persistent memory, each aligned to 128 MiB
//!               └ PCI memory window above all, aligned to 1 GiB
//! ```

use std::ops::Range;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// Size of a small page in bytes.
pub const PAGE_SIZE: u64 = 4 * KIB;

/// Global descriptor table of the first instruction.
pub const GDT_START: u64 = 0x500;
/// Zero page of the Linux boot protocol (4 KiB).
pub const ZERO_PAGE: u64 = 0x7000;
/// PVH start info, its memory map and module list (4 KiB).
pub const PVH_START_INFO: u64 = 0x6000;
/// Identity-mapping page tables of the first instruction (PML4, PDPT, four PDs: 24 KiB).
pub const PAGE_TABLES: u64 = 0x9000;
/// Kernel command line.
pub const COMMAND_LINE: Range<u64> = 0x2_0000..0x3_0000;
/// ACPI tables (RSDP first) and SMBIOS tables: the BIOS area that kernels scan and never allocate
/// from.
pub const FIRMWARE_TABLES: Range<u64> = 0xE_0000..RESET_VECTOR;
/// Where a processor in real mode starts after a reset (F000:FFF0): the last 16 bytes of the BIOS
/// area.
pub const RESET_VECTOR: u64 = 0xF_FFF0;
/// End of conventional memory; from here to 1 MiB is reserved in the memory map.
pub const CONVENTIONAL_MEMORY_END: u64 = 0x9_FC00;
/// Where RAM for kernels starts.
pub const HIGH_MEMORY: u64 = MIB;

/// Where memory that comes at run time may start: kernels take memory in blocks of up to 2 GiB,
/// which start at multiples of their size.
pub const ELASTIC_ALIGNMENT: u64 = 2 * GIB;
/// Size in bytes of which a range that comes at run time is a multiple: the memory block that
/// Linux adds and removes as a whole.
pub const ELASTIC_GRANULE: u64 = 128 * MIB;
/// Where persistent memory may start: in a memory block of its own.
pub const PMEM_ALIGNMENT: u64 = 128 * MIB;

/// The hole below 4 GiB in which no RAM is.
pub const HOLE: Range<u64> = 3 * GIB..4 * GIB;
/// PCI memory window below 4 GiB.
pub const PCI_WINDOW_32: Range<u64> = 3 * GIB..3 * GIB + 512 * MIB;
/// PCI configuration space: 256 buses of 1 MiB at the most.
pub const PCI_ECAM_START: u64 = 3 * GIB + 512 * MIB;
/// virtio-mmio registers, one page for each device.
pub const VIRTIO_MMIO: Range<u64> = 0xF000_0000..0xF010_0000;
/// I/O APIC registers.
pub const IOAPIC: u64 = 0xFEC0_0000;
/// Local APIC registers.
pub const LOCAL_APIC: u64 = 0xFEE0_0000;
/// KVM's identity-map page, needed by Intel processors without unrestricted guest mode.
pub const KVM_IDENTITY_MAP: u64 = 0xFFFB_C000;
/// KVM's task state segment (three pages).
pub const KVM_TSS: u64 = 0xFFFB_D000;

/// Number of IOAPIC pins; global system interrupts below it are lines, those above are messages.
pub const IOAPIC_PINS: u32 = 24;
/// First serial port (ttyS0).
pub const SERIAL_PORT: u16 = 0x3F8;
/// Interrupt of the first serial port.
pub const SERIAL_INTERRUPT: u32 = 4;
/// Interrupt of the generic event device (power button).
pub const POWER_INTERRUPT: u32 = 9;
/// First interrupt line for virtio-mmio devices; the last is 23, and the power button's is left
/// out.
pub const MMIO_INTERRUPTS: Range<u32> = 5..IOAPIC_PINS;
/// I/O ports of sleep control, sleep status and reset.
pub const POWER_PORTS: Range<u16> = 0x600..0x603;
/// I/O ports of the watchdog timer.
pub const WATCHDOG_PORTS: Range<u16> = 0x610..0x620;
/// I/O port of the pvpanic device.
pub const PANIC_PORT: u16 = 0x505;

const _: () = assert!(PCI_WINDOW_32.end == PCI_ECAM_START);
const _: () = assert!(PCI_ECAM_START + 256 * MIB <= VIRTIO_MMIO.start);
const _: () = assert!(VIRTIO_MMIO.end <= IOAPIC);
const _: () = assert!(PAGE_TABLES + 6 * PAGE_SIZE <= COMMAND_LINE.start);

/// The ranges of RAM for a guest with `size` bytes: below the hole and above it.
///
/// `None` when the size is not a multiple of the page size, is zero, or overflows the address
/// space.
pub fn ram_ranges(size: u64) -> Option<Vec<Range<u64>>> {
    if size == 0 || !size.is_multiple_of(PAGE_SIZE) {
        return None;
    }
    if size <= HOLE.start {
        return Some(vec![0..size]);
    }
    let high_end = HOLE.end.checked_add(size - HOLE.start)?;
    Some(vec![0..HOLE.start, HOLE.end..high_end])
}

/// The first address above RAM and above the hole.
pub fn end_of_memory(ram: &[Range<u64>]) -> u64 {
    ram.last().map_or(0, |range| range.end).max(HOLE.end)
}

/// The PCI window from above `end_of_memory` to where the processor's addresses end.
pub fn pci_window_64(end_of_memory: u64, address_bits: u8) -> Range<u64> {
    let start = end_of_memory.next_multiple_of(GIB);
    start..end_of_addresses(address_bits).max(start)
}

/// The first address that a processor with `address_bits` bits of addresses does not have.
pub fn end_of_addresses(address_bits: u8) -> u64 {
    1u64.checked_shl(u32::from(address_bits)).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn ram_of_up_to_three_gibibytes_is_one_range() {
        assert_eq!(ram_ranges(2 * GIB), Some(vec![0..2 * GIB]));
        assert_eq!(ram_ranges(3 * GIB), Some(vec![0..3 * GIB]));
    }

    #[test]
    fn ram_beyond_the_hole_continues_at_four_gibibytes() {
        let ranges = ram_ranges(3 * GIB + PAGE_SIZE).unwrap();
        assert_eq!(ranges, vec![0..3 * GIB, 4 * GIB..4 * GIB + PAGE_SIZE]);
    }

    #[test]
    fn ram_of_odd_sizes_is_refused() {
        assert_eq!(ram_ranges(0), None);
        assert_eq!(ram_ranges(3 * GIB + 1), None);
        assert_eq!(ram_ranges(u64::MAX - (PAGE_SIZE - 1)), None);
    }
}
