//! A PCI function takes any access to its configuration space and its BAR, and works after a reset.
#![no_main]

use std::io;
use std::sync::{Arc, Mutex};

use arbitrary::Arbitrary;
use devices::bus::Registers;
use devices::event::Event;
use devices::interrupt::{Message, MessageRoutes};
use devices::pci::{PciHost, SharedFunction};
use devices::virtio::pci::{BAR_SIZE, PciTransport};
use devices::virtio::rng::Entropy;
use fuzz::virtio;
use libfuzzer_sys::fuzz_target;

const BAR: u64 = 0xc000_0000;
/// Configuration space of slot 1, function 0.
const FUNCTION: u64 = 1 << 15;

#[derive(Arbitrary, Debug)]
enum Step {
    Start,
    ReadConfig { offset: u32, width: u8 },
    WriteConfig { offset: u16, width: u8, value: u64 },
    ReadBar { offset: u16, width: u8 },
    WriteBar { offset: u16, width: u8, value: u64 },
    WriteCommon { offset: u8, width: u8, value: u16 },
    WriteVector { vector: u8, word: u8, value: u32 },
    Restart,
}

fuzz_target!(|steps: Vec<Step>| {
    let routes = Arc::new(Routes::default());
    let device = Box::new(Entropy::new(virtio::home().clone()));
    let wired = Arc::clone(&routes) as Arc<dyn MessageRoutes>;
    let transport = PciTransport::new(device, virtio::memory(), wired, BAR).unwrap();
    let transport = Arc::new(Mutex::new(transport));
    let host = PciHost::new(vec![Arc::clone(&transport) as SharedFunction]).unwrap();
    let mut driver = Driver { transport, host };
    for step in &steps {
        driver.take(step);
    }
    driver.take(&Step::Restart);
    assert_eq!(routes.attached.lock().unwrap().len(), 0, "nothing is left behind");
    driver.start();
    assert_eq!(driver.status(), 15, "the device works after a restart");
    let mut bar = [0; 4];
    driver.host.read(FUNCTION + 0x10, &mut bar);
    assert_eq!(u64::from(u32::from_le_bytes(bar)), BAR);
});

/// The messages that are attached, each once.
#[derive(Default)]
struct Routes {
    attached: Mutex<Vec<Event>>,
}

impl MessageRoutes for Routes {
    fn set(&self, changes: &[(Event, Option<Message>)]) -> io::Result<()> {
        let mut attached = self.attached.lock().unwrap();
        for (event, message) in changes {
            attached.retain(|other| !other.is_same(event));
            attached.extend(message.is_some().then(|| event.clone()));
        }
        assert!(attached.len() <= 2, "the device has two vectors");
        Ok(())
    }
}

struct Driver {
    transport: Arc<Mutex<PciTransport>>,
    host: PciHost,
}

impl Driver {
    fn take(&mut self, step: &Step) {
        match step {
            Step::Start => self.start(),
            Step::ReadConfig { offset, width } => {
                self.host.read(u64::from(*offset), &mut [0; 8][..bytes(*width)]);
            }
            Step::WriteConfig { offset, width, value } => {
                let offset = FUNCTION + u64::from(*offset % 0x110);
                self.host.write(offset, &value.to_le_bytes()[..bytes(*width)]);
            }
            Step::ReadBar { offset, width } => {
                let offset = u64::from(*offset) % BAR_SIZE;
                self.transport.lock().unwrap().read(offset, &mut [0; 8][..bytes(*width)]);
            }
            Step::WriteBar { offset, width, value } => {
                let offset = u64::from(*offset) % BAR_SIZE;
                self.write(offset, &value.to_le_bytes()[..bytes(*width)]);
            }
            Step::WriteCommon { offset, width, value } => {
                let offset = u64::from(*offset % 0x38);
                self.write(offset, &u64::from(*value).to_le_bytes()[..bytes(*width)]);
            }
            Step::WriteVector { vector, word, value } => {
                let offset = 0x2000 + 16 * u64::from(vector % 3) + 4 * u64::from(word % 4);
                self.write(offset, &value.to_le_bytes());
            }
            Step::Restart => self.transport.lock().unwrap().reset(),
        }
    }

    /// The handshake of section 3.1 with one queue, and both vectors.
    fn start(&mut self) {
        self.host.write(FUNCTION + 4, &[6, 0]);
        self.write(0x14, &[0]);
        for status in [1, 3] {
            self.write(0x14, &[status]);
        }
        self.write(8, &1u32.to_le_bytes());
        self.write(0xc, &1u32.to_le_bytes());
        self.write(0x14, &[11]);
        self.write(0x10, &[0, 0]);
        self.write(0x16, &[0, 0]);
        self.write(0x1a, &[1, 0]);
        for (offset, address) in [(0x20, 0x1000u64), (0x28, 0x2000), (0x30, 0x3000)] {
            self.write(offset, &address.to_le_bytes());
        }
        self.write(0x1c, &[1, 0]);
        self.write(0x14, &[15]);
    }

    fn status(&self) -> u8 {
        let mut status = [0];
        self.transport.lock().unwrap().read(0x14, &mut status);
        status[0]
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.transport.lock().unwrap().write(offset, data);
    }
}

fn bytes(width: u8) -> usize {
    1 + usize::from(width % 8)
}
