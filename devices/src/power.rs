//! How the guest ends, and how it is asked to: the registers of ACPI's hardware-reduced model
//! (ACPI 6.5, section 4.8.3.7) and the power button.

use std::io;

use crate::bus::Registers;
use crate::event::Event;

/// What the reset register is told in order to reset.
pub const RESET_VALUE: u8 = 1;

/// The type of the sleep state S5 (soft off), as the DSDT's `\_S5` object names it.
const SLEEP_TYPE_SOFT_OFF: u8 = 5;
const SLEEP_TYPE_SHIFT: u8 = 2;
const SLEEP_TYPE_MASK: u8 = 0b111;
const SLEEP_ENABLE: u8 = 1 << 5;

const SLEEP_CONTROL: u64 = 0;
const RESET: u64 = 2;

/// What a guest asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PowerRequest {
    /// To be powered off.
    PowerOff,
    /// To be reset.
    Reset,
}

/// The sleep control, sleep status and reset registers, a byte each.
pub struct PowerRegisters<F> {
    request_fn: F,
}

impl<F: FnMut(PowerRequest) + Send> PowerRegisters<F> {
    /// Makes registers that call `request_fn` on the thread of the processor that asks.
    pub fn new(request_fn: F) -> Self {
        Self { request_fn }
    }
}

impl<F: FnMut(PowerRequest) + Send> Registers for PowerRegisters<F> {
    /// All registers read as zero: nothing woke the machine.
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let &[value] = data else { return };
        match offset {
            SLEEP_CONTROL if is_soft_off(value) => (self.request_fn)(PowerRequest::PowerOff),
            RESET if value == RESET_VALUE => (self.request_fn)(PowerRequest::Reset),
            _ => {}
        }
    }
}

fn is_soft_off(value: u8) -> bool {
    value & SLEEP_ENABLE != 0 && value >> SLEEP_TYPE_SHIFT & SLEEP_TYPE_MASK == SLEEP_TYPE_SOFT_OFF
}

/// The power button: an interrupt of the generic event device, which the guest's ACPI handles.
#[derive(Clone)]
pub struct PowerButton {
    interrupt: Event,
}

impl PowerButton {
    /// Makes a button that nobody has pressed.
    pub fn new() -> io::Result<Self> {
        Ok(Self { interrupt: Event::new()? })
    }

    /// Asks the guest to power off.
    pub fn press(&self) {
        self.interrupt.signal();
    }

    /// The interrupt, edge triggered, for the hypervisor.
    pub fn interrupt(&self) -> &Event {
        &self.interrupt
    }
}

#[cfg(test)]
mod test {
    use std::sync::mpsc::channel;

    use super::*;

    fn requests_after(writes: &[(u64, &[u8])]) -> Vec<PowerRequest> {
        let (sender, requests) = channel();
        let mut registers = PowerRegisters::new(move |request| sender.send(request).unwrap());
        for (offset, data) in writes {
            registers.write(*offset, data);
        }
        drop(registers);
        requests.iter().collect()
    }

    #[test]
    fn soft_off_needs_its_type_and_the_enable_bit() {
        assert_eq!(requests_after(&[(0, &[0x34])]), [PowerRequest::PowerOff]);
        assert_eq!(requests_after(&[(0, &[0x14]), (0, &[0x20]), (1, &[0x34])]), []);
    }

    #[test]
    fn only_the_reset_value_resets() {
        assert_eq!(requests_after(&[(2, &[1])]), [PowerRequest::Reset]);
        assert_eq!(requests_after(&[(2, &[0]), (2, &[6])]), []);
    }

    #[test]
    fn accesses_of_other_widths_and_places_do_nothing() {
        assert_eq!(requests_after(&[(0, &[0x34, 0]), (2, &[1, 0, 0, 0]), (9, &[1]), (2, &[])]), []);
        let mut data = [0xAA; 4];
        PowerRegisters::new(|_| {}).read(0, &mut data);
        assert_eq!(data, [0; 4]);
    }
}
