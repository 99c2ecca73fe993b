//! The pvpanic device (ACPI id QEMU0001): one port by which a kernel says that it panicked.

use crate::bus::Registers;

/// The kernel panicked and will do nothing more.
const PANICKED: u8 = 1 << 0;
/// The kernel panicked and runs a crash kernel.
const CRASH_LOADED: u8 = 1 << 1;

/// The port: reads tell which events are known, writes report events.
pub struct PanicPort<F> {
    panicked_fn: F,
}

impl<F: FnMut() + Send> PanicPort<F> {
    /// Makes a port that calls `panicked_fn` when the kernel gave up.
    pub fn new(panicked_fn: F) -> Self {
        Self { panicked_fn }
    }
}

impl<F: FnMut() + Send> Registers for PanicPort<F> {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(events) = data.first_mut() {
            *events = PANICKED | CRASH_LOADED;
        }
    }

    fn write(&mut self, _offset: u64, data: &[u8]) {
        // A crash kernel still has its work to do, so that event ends nothing.
        match data.first() {
            Some(events) if events & PANICKED != 0 => (self.panicked_fn)(),
            Some(events) if events & CRASH_LOADED != 0 => {
                crate::warn_limited!("the guest's kernel panicked and starts its crash kernel");
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn a_panic_is_reported_and_a_crash_kernel_is_left_to_work() {
        let mut panics = 0;
        let mut port = PanicPort::new(|| panics += 1);
        for data in [&[CRASH_LOADED][..], &[0], &[], &[PANICKED]] {
            port.write(0, data);
        }
        assert_eq!(panics, 1);
    }

    #[test]
    fn the_known_events_can_be_read() {
        let mut data = [0xFF; 2];
        PanicPort::new(|| {}).read(0, &mut data);
        assert_eq!(data, [PANICKED | CRASH_LOADED, 0]);
    }
}
