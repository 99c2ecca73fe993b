//! Whatever a driver does with a watchdog's ports, and however wide its accesses are, the watchdog
//! counts within its limits, and says that it runs exactly while it counts.
#![no_main]

use arbitrary::Arbitrary;
use devices::bus::Registers;
use devices::watchdog::{CONTROL, COUNT, COUNTDOWN, COUNTDOWN_MAX, PORTS, STATUS, Watchdog};
use libfuzzer_sys::fuzz_target;

/// What is done next: mostly by the driver.
#[derive(Arbitrary, Debug)]
enum Step {
    Read { offset: u64, width: u8 },
    Write { offset: u64, data: [u8; 8], width: u8 },
    /// Of a register, as drivers do.
    Set { register: u8, value: u32 },
    Hold,
    Release,
    Reset,
}

fuzz_target!(|steps: Vec<Step>| {
    let mut watchdog = Watchdog::new().unwrap();
    for step in steps {
        match step {
            Step::Read { offset, width } => {
                let mut data = [0xFF; 8];
                watchdog.read(offset, &mut data[..usize::from(width % 9)]);
            }
            Step::Write { offset, data, width } => {
                watchdog.write(offset, &data[..usize::from(width % 9)]);
            }
            Step::Set { register, value } => {
                let offset = u16::from(register) * 4 % PORTS;
                watchdog.write(offset.into(), &value.to_le_bytes());
            }
            Step::Hold => watchdog.hold(),
            Step::Release => watchdog.release(),
            Step::Reset => watchdog.reset(),
        }
        check(&mut watchdog);
    }
});

fn check(watchdog: &mut Watchdog) {
    let [control, countdown, count, status] =
        [CONTROL, COUNTDOWN, COUNT, STATUS].map(|register| {
            let mut data = [0xFF; 4];
            watchdog.read(register.into(), &mut data);
            u32::from_le_bytes(data)
        });
    assert!((1..=COUNTDOWN_MAX).contains(&countdown));
    // Nobody looks at the timer here: it does not expire.
    assert!(count <= countdown && status == 0);
    assert!(control == 1 || (control == 0 && count == 0));
}
