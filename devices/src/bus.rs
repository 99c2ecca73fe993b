//! Buses: which device answers an address.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use arch::range_map::{Overlap, RangeMap};

/// Anything that a virtual processor can read and write at an offset: a UART, a transport, PCI.
///
/// An access never fails: what a device does not understand reads as it sees fit and is else
/// ignored.
pub trait Registers: Send {
    /// Answers a read of `data.len()` bytes, 1 to 8, at `offset`.
    fn read(&mut self, offset: u64, data: &mut [u8]);
    /// Takes a write of `data.len()` bytes, 1 to 8, at `offset`.
    fn write(&mut self, offset: u64, data: &[u8]);
}

/// A device on a bus: locked by one virtual processor at a time.
pub type SharedRegisters = Arc<Mutex<dyn Registers>>;

/// The devices of one address space: memory or I/O ports.
#[derive(Clone, Default)]
pub struct Bus {
    devices: RangeMap<SharedRegisters>,
}

impl Bus {
    /// Makes an empty bus.
    pub fn new() -> Self {
        Self::default()
    }

    /// Puts a device at `range`.
    pub fn insert(&mut self, range: Range<u64>, device: SharedRegisters) -> Result<(), Overlap> {
        self.devices.insert(range, device)
    }

    /// Reads from the device at `address`; what nobody claims, in part or in whole, reads as ones.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        match self.find(address, data.len()) {
            Some((offset, device)) => {
                device.lock().unwrap_or_else(PoisonError::into_inner).read(offset, data);
            }
            None => data.fill(0xff),
        }
    }

    /// Writes to the device at `address`; a write that nobody claims is ignored.
    pub fn write(&self, address: u64, data: &[u8]) {
        if let Some((offset, device)) = self.find(address, data.len()) {
            device.lock().unwrap_or_else(PoisonError::into_inner).write(offset, data);
        }
    }

    fn find(&self, address: u64, len: usize) -> Option<(u64, &SharedRegisters)> {
        let (range, device) = self.devices.get(address)?;
        let end = address.checked_add(u64::try_from(len).ok()?)?;
        (end <= range.end).then(|| (address - range.start, device))
    }
}

#[cfg(test)]
mod test {
    use super::*;

    struct Echo(Vec<(u64, Vec<u8>)>);

    impl Registers for Echo {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            data.fill(u8::try_from(offset).unwrap());
        }
        fn write(&mut self, offset: u64, data: &[u8]) {
            self.0.push((offset, data.to_vec()));
        }
    }

    #[test]
    fn routes_by_address_and_reads_ones_where_nobody_answers() {
        let echo = Arc::new(Mutex::new(Echo(Vec::new())));
        let mut bus = Bus::new();
        bus.insert(0x100..0x110, Arc::clone(&echo) as SharedRegisters).unwrap();
        let mut data = [0; 2];
        bus.read(0x104, &mut data);
        assert_eq!(data, [4, 4]);
        for outside in [0xff, 0x110, 0x10f, u64::MAX] {
            bus.read(outside, &mut data);
            assert_eq!(data, [0xff, 0xff]);
            bus.write(outside, &data);
        }
        bus.write(0x10e, &[1, 2]);
        assert_eq!(echo.lock().unwrap().0, vec![(0xe, vec![1, 2])]);
    }
}
