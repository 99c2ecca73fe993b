//! The configuration space of a function: a header of type 0 and capabilities (PCI 3.0, chapter 6).

/// Bytes of a function's configuration space in the ECAM window.
pub const SPACE_SIZE: usize = 0x1000;

/// Bytes that have a meaning; the extended space behind them is empty and reads as zeros.
const HEADER_SPACE: usize = 0x100;

const COMMAND: usize = 0x04;
/// Lower byte of the status register.
const STATUS: usize = 0x06;
const CACHE_LINE_SIZE: usize = 0x0c;
const BARS: usize = 0x10;
const BAR_COUNT: usize = 6;
const SUBSYSTEM: usize = 0x2c;
const CAPABILITIES: usize = 0x34;
const INTERRUPT_LINE: usize = 0x3c;
const FIRST_CAPABILITY: usize = 0x40;

const COMMAND_MEMORY: u8 = 1 << 1;
const COMMAND_BUS_MASTER: u8 = 1 << 2;
/// Bit 10 of the command register: no interrupt lines, of which there are none anyway.
const COMMAND_INTERRUPT_DISABLE_HIGH: u8 = 1 << 2;
const STATUS_CAPABILITIES: u8 = 1 << 4;

const BAR_MEMORY_64: u32 = 0b100;

/// Who a function says it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Vendor id.
    pub vendor: u16,
    /// Device id.
    pub device: u16,
    /// Revision.
    pub revision: u8,
    /// Base class, subclass and interface, 24 bits.
    pub class: u32,
    /// Subsystem vendor id.
    pub subsystem_vendor: u16,
    /// Subsystem id.
    pub subsystem: u16,
}

/// Width of the addresses that a BAR can hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BarKind {
    /// One register: memory below 4 GiB.
    Memory32,
    /// Two registers: memory anywhere.
    Memory64,
}

/// The configuration space of one function.
///
/// A BAR stays where the machine has put it: a guest may ask for its size and write its address
/// back, and nothing else.
pub struct ConfigSpace {
    bytes: [u8; HEADER_SPACE],
    /// The bits that a guest can write.
    writable: [u8; HEADER_SPACE],
    bars: [BarRegister; BAR_COUNT],
    /// Where the next capability goes, and the byte that will point to it.
    next_capability: usize,
    last_link: usize,
    move_reported: bool,
}

impl ConfigSpace {
    /// Makes a function without BARs and capabilities.
    pub fn new(identity: Identity) -> Self {
        let mut space = Self {
            bytes: [0; HEADER_SPACE],
            writable: [0; HEADER_SPACE],
            bars: [BarRegister::default(); BAR_COUNT],
            next_capability: FIRST_CAPABILITY,
            last_link: CAPABILITIES,
            move_reported: false,
        };
        let [class_low, class_middle, class_high, _] = identity.class.to_le_bytes();
        space.put(0, &identity.vendor.to_le_bytes());
        space.put(2, &identity.device.to_le_bytes());
        space.put(8, &[identity.revision, class_low, class_middle, class_high]);
        space.put(SUBSYSTEM, &identity.subsystem_vendor.to_le_bytes());
        space.put(SUBSYSTEM + 2, &identity.subsystem.to_le_bytes());
        let command = [COMMAND_MEMORY | COMMAND_BUS_MASTER, COMMAND_INTERRUPT_DISABLE_HIGH];
        space.allow(COMMAND, &command);
        space.allow(CACHE_LINE_SIZE, &[0xff]);
        space.allow(INTERRUPT_LINE, &[0xff]);
        space.reset();
        space
    }

    /// Adds a BAR of `size` bytes, a power of two, at an `address` aligned to it.
    pub fn add_bar(&mut self, index: usize, kind: BarKind, address: u64, size: u64) {
        let ([low, high], [mask_low, mask_high]) = (halves(address), halves(!(size - 1)));
        let flags = if kind == BarKind::Memory64 { BAR_MEMORY_64 } else { 0 };
        let mut registers = self.bars.iter_mut().skip(index);
        if let Some(bar) = registers.next() {
            *bar = BarRegister { flags, address: low, mask: mask_low, is_sizing: false };
        }
        if let (BarKind::Memory64, Some(bar)) = (kind, registers.next()) {
            *bar = BarRegister { flags: 0, address: high, mask: mask_high, is_sizing: false };
        }
    }

    /// Appends a capability: `body` follows its id and its link, `writable` are the bits of the
    /// body that a guest can write. Returns the offset of the capability.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> usize {
        let offset = self.next_capability;
        self.put(self.last_link, &[u8::try_from(offset).unwrap_or(0)]);
        self.put(offset, &[id, 0]);
        self.put(offset + 2, body);
        self.allow(offset + 2, writable);
        self.put(STATUS, &[STATUS_CAPABILITIES]);
        self.last_link = offset + 1;
        self.next_capability = (offset + 2 + body.len()).next_multiple_of(4);
        offset
    }

    /// The function answers accesses to its BARs.
    pub fn is_memory_enabled(&self) -> bool {
        self.byte(COMMAND) & COMMAND_MEMORY != 0
    }

    /// The byte at `offset`.
    pub fn byte(&self, offset: usize) -> u8 {
        self.bytes.get(offset).copied().unwrap_or(0)
    }

    /// The 32-bit word at `offset`.
    pub fn word(&self, offset: usize) -> u32 {
        let mut word = [0; 4];
        self.read(offset, &mut word);
        u32::from_le_bytes(word)
    }

    /// Reads at `offset`.
    pub fn read(&self, offset: usize, data: &mut [u8]) {
        for (at, byte) in (offset..).zip(data) {
            *byte = match self.bar_at(at) {
                Some((bar, shift)) => u8::try_from(bar.read() >> shift & 0xff).unwrap_or(0),
                None => self.byte(at),
            };
        }
    }

    /// Writes at `offset` what a guest may write.
    pub fn write(&mut self, offset: usize, data: &[u8]) {
        for (at, byte) in (offset..).zip(data) {
            if let (Some(target), Some(mask)) = (self.bytes.get_mut(at), self.writable.get(at)) {
                *target = *target & !mask | byte & mask;
            }
        }
        for index in 0..BAR_COUNT {
            self.write_bar(index, offset, data);
        }
    }

    /// Returns to the state at power-on.
    pub fn reset(&mut self) {
        for (byte, mask) in self.bytes.iter_mut().zip(self.writable) {
            *byte &= !mask;
        }
        // Firmware leaves the BARs that it has placed enabled.
        self.put(COMMAND, &[COMMAND_MEMORY]);
        for bar in &mut self.bars {
            bar.is_sizing = false;
        }
    }

    /// Writes the part of `data` that is in a BAR register.
    fn write_bar(&mut self, index: usize, offset: usize, data: &[u8]) {
        let start = BARS + 4 * index;
        let Some(bar) = self.bars.get_mut(index) else { return };
        let mut word = bar.read().to_le_bytes();
        let mut is_written = false;
        for (at, byte) in (offset..).zip(data) {
            if let Some(target) = at.checked_sub(start).and_then(|at| word.get_mut(at)) {
                *target = *byte;
                is_written = true;
            }
        }
        if is_written && !bar.write(u32::from_le_bytes(word)) && !self.move_reported {
            self.move_reported = true;
            let [vendor, device] =
                [0, 2].map(|at| u16::from_le_bytes([self.byte(at), self.byte(at + 1)]));
            crate::warn_limited!("pci {vendor:04x}:{device:04x}: BAR {index} stays where it is");
        }
    }

    /// The BAR register that holds the byte at `offset`, and by how many bits the byte is shifted.
    fn bar_at(&self, offset: usize) -> Option<(&BarRegister, usize)> {
        let offset = offset.checked_sub(BARS)?;
        Some((self.bars.get(offset / 4)?, 8 * (offset % 4)))
    }

    fn put(&mut self, offset: usize, bytes: &[u8]) {
        for (target, byte) in self.bytes.iter_mut().skip(offset).zip(bytes) {
            *target = *byte;
        }
    }

    fn allow(&mut self, offset: usize, masks: &[u8]) {
        for (target, mask) in self.writable.iter_mut().skip(offset).zip(masks) {
            *target = *mask;
        }
    }
}

/// One 32-bit register of a BAR. Those that are not there hold zeros and take nothing.
#[derive(Clone, Copy, Default)]
struct BarRegister {
    flags: u32,
    address: u32,
    /// The address bits that the size leaves to the address.
    mask: u32,
    /// The guest wrote ones and will read the size.
    is_sizing: bool,
}

impl BarRegister {
    fn read(self) -> u32 {
        if self.is_sizing { self.mask | self.flags } else { self.address | self.flags }
    }

    /// Says whether the write is a part of the sizing protocol (PCI 3.0, 6.2.5.1).
    fn write(&mut self, value: u32) -> bool {
        let address = value & self.mask;
        self.is_sizing = address == self.mask && self.mask != 0;
        self.is_sizing || address == self.address
    }
}

fn halves(value: u64) -> [u32; 2] {
    [value & 0xffff_ffff, value >> 32].map(|half| u32::try_from(half).unwrap_or(u32::MAX))
}

#[cfg(test)]
mod test {
    use super::*;

    fn space() -> ConfigSpace {
        let mut space = ConfigSpace::new(Identity {
            vendor: 0x1af4,
            device: 0x1042,
            revision: 1,
            class: 0x01_8000,
            subsystem_vendor: 0x1af4,
            subsystem: 0x1042,
        });
        space.add_bar(0, BarKind::Memory32, 0xc001_0000, 0x1_0000);
        space.add_bar(2, BarKind::Memory64, 0x12_4000_0000, 0x4000_0000);
        space
    }

    #[test]
    fn a_bar_tells_its_size_and_takes_its_address_back() {
        let mut space = space();
        assert_eq!(space.word(0x10), 0xc001_0000);
        space.write(0x10, &[0xff; 4]);
        assert_eq!(space.word(0x10), 0xffff_0000);
        space.write(0x10, &0xc001_0000u32.to_le_bytes());
        assert_eq!(space.word(0x10), 0xc001_0000);
    }

    #[test]
    fn a_bar_of_64_bits_tells_its_size_in_two_registers() {
        let mut space = space();
        assert_eq!([space.word(0x18), space.word(0x1c)], [0x4000_0004, 0x12]);
        space.write(0x18, &[0xff; 4]);
        space.write(0x1c, &[0xff; 4]);
        assert_eq!([space.word(0x18), space.word(0x1c)], [0xc000_0004, 0xffff_ffff]);
        space.write(0x18, &0x4000_0000u32.to_le_bytes());
        space.write(0x1c, &0x12u32.to_le_bytes());
        assert_eq!([space.word(0x18), space.word(0x1c)], [0x4000_0004, 0x12]);
    }

    #[test]
    fn a_bar_stays_where_the_machine_has_put_it() {
        let mut space = space();
        for address in [0u32, 0xc002_0000, 0x8000_0000] {
            space.write(0x10, &address.to_le_bytes());
            assert_eq!(space.word(0x10), 0xc001_0000);
        }
        space.write(0x12, &[0x55]);
        assert_eq!(space.word(0x10), 0xc001_0000);
    }

    #[test]
    fn nothing_else_can_be_written_but_a_few_bits() {
        let mut space = space();
        let capability = space.add_capability(9, &[8, 1, 2, 3, 4, 5], &[0, 0, 0xf0]);
        let mut before = [0; 0x100];
        space.read(0, &mut before);
        for offset in (0..0x100).filter(|offset| !(0x10..0x28).contains(offset)) {
            space.write(offset, &[0xff]);
        }
        let mut after = [0; 0x100];
        space.read(0, &mut after);
        let changed: Vec<_> = (0..0x100).filter(|at| before[*at] != after[*at]).collect();
        assert_eq!(changed, vec![4, 5, 0x0c, 0x3c, capability + 4]);
        assert_eq!(space.word(4) & 0xffff, 0x0406);
        assert_eq!(after[capability + 4], 0xf2);
        space.reset();
        let mut reset = [0; 0x100];
        space.read(0, &mut reset);
        assert_eq!(reset[..capability], before[..capability]);
    }

    #[test]
    fn the_extended_space_is_empty_and_odd_accesses_are_harmless() {
        let mut space = space();
        let mut data = [0xaa; 8];
        space.read(0xffc, &mut data);
        assert_eq!(data, [0; 8]);
        space.write(0xfc, &[0xff; 8]);
        space.write(0x0e, &[0xff; 8]);
        space.read(0xfd, &mut data);
        assert_eq!(data, [0; 8]);
    }
}
