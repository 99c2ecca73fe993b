//! PCI: a host bridge whose configuration space is memory (ECAM), and the functions on its bus.
//!
//! There are no I/O ports, no bridges and no interrupt lines: one bus of functions with memory BARs
//! and message-signalled interrupts. Where BARs are is decided by the machine, as firmware would.

pub mod config;
pub mod msix;

use std::sync::{Arc, Mutex, PoisonError};

use crate::bus::Registers;
use config::{ConfigSpace, Identity};

/// Bytes of configuration space that a bus has in the ECAM window.
pub const BUS_SIZE: u64 = 1 << 20;

/// Functions that fit beside the host bridge: 31 slots with 8 functions each.
pub const FUNCTIONS_MAX: usize = SLOTS * FUNCTIONS;

const SLOTS: usize = 31;
const FUNCTIONS: usize = 8;

/// Offset of the header type, and its bit that makes a guest look for functions 1 to 7.
const HEADER_TYPE: usize = 0x0e;
const MULTI_FUNCTION: u8 = 0x80;

/// The generic host bridge that operating systems know without quirks.
const HOST_BRIDGE: Identity = Identity {
    vendor: 0x1b36,
    device: 0x0008,
    revision: 0,
    class: 0x06_0000,
    subsystem_vendor: 0,
    subsystem: 0,
};

/// A function on the bus, as its configuration space shows it.
pub trait PciFunction: Send {
    /// Reads `data.len()` bytes, 1 to 8, of the function's 4 KiB at `offset`.
    fn read_config(&mut self, offset: usize, data: &mut [u8]);
    /// Writes `data.len()` bytes, 1 to 8, of the function's 4 KiB at `offset`.
    fn write_config(&mut self, offset: usize, data: &[u8]);
}

/// A function, locked by one virtual processor at a time.
pub type SharedFunction = Arc<Mutex<dyn PciFunction>>;

/// More functions than a bus has places for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0} devices are more than the {FUNCTIONS_MAX} that fit on the PCI bus")]
pub struct BusFull(pub usize);

/// Where a function is on the bus.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PciAddress {
    /// Slot (device number), 0 to 31.
    pub slot: u8,
    /// Function in the slot, 0 to 7.
    pub function: u8,
}

/// The host bridge and its bus: the registers of the ECAM window.
pub struct PciHost {
    bridge: ConfigSpace,
    functions: Vec<SharedFunction>,
    functions_per_slot: usize,
}

impl PciHost {
    /// Places functions on the bus so that a guest finds them in their order.
    ///
    /// Each has a slot of its own as long as there are enough.
    pub fn new(functions: Vec<SharedFunction>) -> Result<Self, BusFull> {
        if functions.len() > FUNCTIONS_MAX {
            return Err(BusFull(functions.len()));
        }
        let functions_per_slot = functions.len().div_ceil(SLOTS).max(1);
        Ok(Self { bridge: ConfigSpace::new(HOST_BRIDGE), functions, functions_per_slot })
    }

    /// Where the function at `index` of the list is.
    pub fn address(&self, index: usize) -> Option<PciAddress> {
        let index = (index < self.functions.len()).then_some(index)?;
        let slot = u8::try_from(1 + index / self.functions_per_slot).ok()?;
        let function = u8::try_from(index % self.functions_per_slot).ok()?;
        Some(PciAddress { slot, function })
    }

    fn function(&self, address: PciAddress) -> Option<&SharedFunction> {
        let slot = usize::from(address.slot).checked_sub(1)?;
        let function = usize::from(address.function);
        let index = slot * self.functions_per_slot + function;
        self.functions.get(index).filter(|_| function < self.functions_per_slot)
    }
}

impl Registers for PciHost {
    /// What no function answers reads as ones, as on a real bus.
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        match locate(offset, data.len()) {
            Some((PciAddress { slot: 0, function: 0 }, register)) => {
                self.bridge.read(register, data);
            }
            Some((address, register)) if self.function(address).is_some() => {
                self.read_function(address, register, data);
            }
            _ => data.fill(0xff),
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        match locate(offset, data.len()) {
            Some((PciAddress { slot: 0, function: 0 }, register)) => {
                self.bridge.write(register, data);
            }
            Some((address, register)) => {
                if let Some(function) = self.function(address) {
                    let mut function = function.lock().unwrap_or_else(PoisonError::into_inner);
                    function.write_config(register, data);
                }
            }
            None => {}
        }
    }
}

impl PciHost {
    fn read_function(&self, address: PciAddress, register: usize, data: &mut [u8]) {
        let Some(function) = self.function(address) else { return };
        function.lock().unwrap_or_else(PoisonError::into_inner).read_config(register, data);
        let header_type = HEADER_TYPE.checked_sub(register).and_then(|at| data.get_mut(at));
        if let Some(header_type) = header_type.filter(|_| self.functions_per_slot > 1) {
            *header_type |= MULTI_FUNCTION;
        }
    }
}

/// The function on bus 0 and the register that an access of `len` bytes is wholly in.
fn locate(offset: u64, len: usize) -> Option<(PciAddress, usize)> {
    let register = usize::try_from(offset & 0xfff).ok()?;
    let slot = u8::try_from(offset >> 15).ok()?;
    let function = u8::try_from(offset >> 12 & 7).ok()?;
    (slot <= 31 && register + len <= config::SPACE_SIZE)
        .then_some((PciAddress { slot, function }, register))
}

#[cfg(test)]
mod test {
    use super::*;

    /// Shows its number as its vendor.
    struct Numbered(u16);

    impl PciFunction for Numbered {
        fn read_config(&mut self, offset: usize, data: &mut [u8]) {
            let number = self.0.to_le_bytes();
            for (at, byte) in (offset..).zip(data) {
                *byte = number.get(at).copied().unwrap_or(0);
            }
        }
        fn write_config(&mut self, _: usize, data: &[u8]) {
            self.0 = u16::from(data[0]);
        }
    }

    fn host(count: u16) -> PciHost {
        let function = |number| Arc::new(Mutex::new(Numbered(number))) as SharedFunction;
        PciHost::new((0..count).map(function).collect()).unwrap()
    }

    fn read(host: &mut PciHost, offset: u64) -> u16 {
        let mut data = [0; 2];
        host.read(offset, &mut data);
        u16::from_le_bytes(data)
    }

    /// Finds functions as a guest does: 1 to 7 only where the header of 0 says that there are more.
    fn scan(host: &mut PciHost) -> Vec<u16> {
        let mut found = Vec::new();
        for slot in 1..32 {
            for function in 0..8 {
                let at = slot << 15 | function << 12;
                let is_multi_function = read(host, (slot << 15) + 0x0e) & 0x80 != 0;
                if read(host, at) != 0xffff && (function == 0 || is_multi_function) {
                    found.push(read(host, at));
                }
            }
        }
        found
    }

    #[test]
    fn functions_are_found_in_their_order_however_many() {
        for count in [0, 1, 30, 31, 32, 100, 248] {
            assert_eq!(scan(&mut host(count)), (0..count).collect::<Vec<_>>());
        }
        assert_eq!(host(31).address(30), Some(PciAddress { slot: 31, function: 0 }));
        assert_eq!(host(32).address(31), Some(PciAddress { slot: 16, function: 1 }));
        assert_eq!(host(1).address(1), None);
    }

    #[test]
    fn more_functions_than_places_are_refused() {
        let function = Arc::new(Mutex::new(Numbered(0))) as SharedFunction;
        assert_eq!(PciHost::new(vec![function; 249]).err(), Some(BusFull(249)));
    }

    #[test]
    fn the_bridge_is_the_first_and_what_is_not_there_reads_as_ones() {
        let mut host = host(1);
        assert_eq!([read(&mut host, 0), read(&mut host, 10)], [0x1b36, 0x0600]);
        for absent in [1 << 12, 2 << 15, BUS_SIZE, 5 * BUS_SIZE, u64::MAX - 1] {
            assert_eq!(read(&mut host, absent), 0xffff);
            host.write(absent, &[0, 0]);
        }
    }

    #[test]
    fn an_access_across_two_functions_reaches_neither() {
        let mut host = host(1);
        assert_eq!(read(&mut host, (1 << 15) + 0xfff), 0xffff);
        host.write((1 << 15) + 0xfff, &[7, 7]);
        assert_eq!(read(&mut host, 1 << 15), 0);
        host.write(1 << 15, &[7, 7]);
        assert_eq!(read(&mut host, 1 << 15), 7);
    }
}
