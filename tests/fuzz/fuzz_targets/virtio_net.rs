//! Whatever a driver does with a network card, and whatever arrives meanwhile, it works after a
//! reset.
#![no_main]

use std::os::unix::net::UnixDatagram;
use std::sync::{Arc, Mutex};

use arbitrary::Arbitrary;
use devices::host::tap::Tap;
use devices::virtio::net::tap::TapBackend;
use devices::virtio::net::{Net, NetHandle, NetOptions};
use fuzz::virtio::{Descriptor, Step, drive_with};
use libfuzzer_sys::fuzz_target;

const PAIRS: usize = 2;
/// Where control commands are put for descriptors to find.
const COMMANDS: u32 = 0x400;
const COMMAND_SIZE: u32 = 64;

/// One thing that a driver of cards, or the world around it, does.
#[derive(Arbitrary, Debug)]
enum NetStep {
    /// Anything that can be done to any device.
    Any(Step),
    /// Makes buffers for frames available.
    Receive { pair: u8, head: u8, lens: [u16; 3], parts: u8 },
    /// Sends a frame of which the memory's content is the header.
    Transmit { pair: u8, head: u8, lens: [u16; 3], parts: u8 },
    /// Sends a control command.
    Command { class: u8, number: u8, data: [u8; 14], len: u8, head: u8 },
    /// A frame arrives.
    Arrive { pair: u8, len: u16 },
    /// The plug is pulled or put in.
    Plug(bool),
    /// The host asks for an announcement.
    Announce,
}

fuzz_target!(|steps: Vec<NetStep>| {
    let (wires, ends): (Vec<_>, Vec<_>) = (0..PAIRS).map(|_| UnixDatagram::pair().unwrap()).unzip();
    wires.iter().chain(&ends).for_each(|end| end.set_nonblocking(true).unwrap());
    let handle: Mutex<Option<NetHandle>> = Mutex::new(None);
    drive_with(
        |home| {
            let tap = Arc::new(Tap::stand_in("wire", ends.into_iter().map(Into::into).collect()));
            let backend = TapBackend::new("net0", tap, vec![home.clone()]).unwrap();
            let card = Net::new(
                NetOptions {
                    name: "net0".to_owned(),
                    mac: [2; 6],
                    mtu: Some(1500),
                    backend: Box::new(backend),
                },
                home,
            );
            *handle.lock().unwrap() = Some(card.handle());
            Box::new(card)
        },
        |driver| {
            for step in steps {
                expand(step, &wires, &handle).iter().for_each(|step| driver.take(step));
                // A wire holds a few frames; what it does not take stays with the card.
                wires.iter().for_each(|wire| while wire.recv(&mut [0; 16]).is_ok() {});
            }
        },
    );
});

fn expand(step: NetStep, wires: &[UnixDatagram], handle: &Mutex<Option<NetHandle>>) -> Vec<Step> {
    let handle = handle.lock().unwrap();
    match step {
        NetStep::Any(step) => return vec![step],
        NetStep::Receive { pair, head, lens, parts } => {
            return send(2 * (pair % 2), head, &lens, parts, 2);
        }
        NetStep::Transmit { pair, head, lens, parts } => {
            return send(2 * (pair % 2) + 1, head, &lens, parts, 0);
        }
        NetStep::Command { class, number, data, len, head } => {
            let at = COMMANDS + COMMAND_SIZE * u32::from(head % 8);
            let mut words = [0; 16];
            words[0] = class % 7;
            words[1] = number % 7;
            words[2..].copy_from_slice(&data);
            let half = |from: usize| words[from..from + 8].try_into().unwrap();
            return vec![
                Step::Write { address: at, bytes: half(0) },
                Step::Write { address: at + 8, bytes: half(8) },
                Step::Send {
                    queue: 4,
                    head,
                    descriptors: vec![
                        Descriptor::new(at, u16::from(len % 17), 1),
                        Descriptor::new(0x300, 1, 2),
                    ],
                },
                Step::Settle,
            ];
        }
        NetStep::Arrive { pair, len } => {
            let frame = vec![len.to_le_bytes()[0]; usize::from(len)];
            let _ = wires[usize::from(pair) % PAIRS].send(&frame);
        }
        NetStep::Plug(is_in) => handle.iter().for_each(|card| card.set_plugged(is_in)),
        NetStep::Announce => handle.iter().for_each(NetHandle::announce),
    }
    vec![Step::Settle]
}

/// A chain of up to three buffers of these lengths.
fn send(queue: u8, head: u8, lens: &[u16; 3], parts: u8, flags: u8) -> Vec<Step> {
    let count = 1 + usize::from(parts % 3);
    let descriptors = (0..).zip(&lens[..count]).map(|(index, len)| {
        let next = u8::from(index + 1 < count);
        let address = 0x4_0000 + 0x1_0000 * u32::try_from(index).unwrap();
        Descriptor::new(address, *len, flags | next)
    });
    vec![Step::Send { queue, head, descriptors: descriptors.collect() }, Step::Settle]
}
