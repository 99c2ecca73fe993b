//! Which addresses are RAM and which are taken: the one list behind e820 and PVH's memory map.

use std::ops::Range;

use arch::platform::Platform;
use arch::target::layout;

/// A range of addresses and what it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) range: Range<u64>,
    pub(crate) kind: Kind,
}

/// What a range is, in the numbers that e820 and PVH share (ACPI 6.5, table 15.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum Kind {
    /// The kernel may use it.
    Ram = 1,
    /// The kernel keeps away from it.
    Reserved = 2,
}

/// A memory map that the boot protocol has no room for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the memory map has {count} ranges and the boot protocol takes {max}: use fewer")]
pub struct Error {
    /// Number of ranges.
    pub count: usize,
    /// What fits.
    pub max: usize,
}

/// The memory map of a platform, ascending.
pub(crate) fn entries(platform: &Platform) -> Vec<Entry> {
    let mut entries = Vec::with_capacity(platform.ram.len() + 3);
    for ram in &platform.ram {
        let conventional = ram.start..ram.end.min(layout::CONVENTIONAL_MEMORY_END);
        let high = ram.start.max(layout::HIGH_MEMORY)..ram.end;
        for range in [conventional, high] {
            entries.push(Entry { range, kind: Kind::Ram });
        }
    }
    let bios = layout::CONVENTIONAL_MEMORY_END..layout::HIGH_MEMORY;
    entries.push(Entry { range: bios, kind: Kind::Reserved });
    if let Some(pci) = &platform.pci {
        entries.push(Entry { range: pci.ecam.clone(), kind: Kind::Reserved });
    }
    entries.retain(|entry| !entry.range.is_empty());
    entries.sort_by_key(|entry| entry.range.start);
    entries
}

#[cfg(test)]
mod test {
    use super::*;
    use crate::test::platform;

    const GIB: u64 = 1 << 30;

    #[test]
    fn the_bios_area_and_configuration_space_are_reserved() {
        let mut platform = platform();
        platform.ram = layout::ram_ranges(5 * GIB).unwrap();
        let ecam = platform.pci.as_ref().unwrap().ecam.clone();
        let expected = [
            (0..0x9_FC00, Kind::Ram),
            (0x9_FC00..0x10_0000, Kind::Reserved),
            (0x10_0000..3 * GIB, Kind::Ram),
            (ecam, Kind::Reserved),
            (4 * GIB..6 * GIB, Kind::Ram),
        ];
        assert_eq!(entries(&platform), expected.map(|(range, kind)| Entry { range, kind }));
    }

    #[test]
    fn a_machine_without_pci_reserves_the_bios_area_only() {
        let mut platform = platform();
        platform.pci = None;
        let kinds: Vec<_> = entries(&platform).iter().map(|entry| entry.kind).collect();
        assert_eq!(kinds, [Kind::Ram, Kind::Reserved, Kind::Ram]);
    }
}
