//! Whatever machine, initrd and command line a kernel is loaded with, it is loaded or refused.
#![no_main]

use std::ops::Range;

use arbitrary::Arbitrary;
use arch::platform::{Identity, MmioDevice, Processors, SerialPort};
use boot::{EntryProtocol, Source};
use fuzz::boot::{bzimage, check, elf, file, memory, platform};
use libfuzzer_sys::fuzz_target;

#[derive(Arbitrary, Debug)]
struct Input {
    kernel: u8,
    initrd_len: Option<u32>,
    command_line: String,
    processors: u16,
    ecam: Option<Range<u64>>,
    window_32: Range<u64>,
    window_64: Range<u64>,
    ram: Vec<Range<u64>>,
    virtio_mmio: Vec<(Range<u64>, u32)>,
    serial: Vec<(u16, u32)>,
    panic_port: Option<u16>,
    uuid: Option<[u8; 16]>,
    oem_strings: Vec<String>,
}

fuzz_target!(|input: Input| {
    let (kernel, protocol) = match input.kernel % 3 {
        0 => (bzimage(&[]), EntryProtocol::Auto),
        1 => (elf(), EntryProtocol::Linux64),
        _ => (elf(), EntryProtocol::Pvh),
    };
    let kernel = file(&kernel);
    let initrd = input.initrd_len.map(|len| {
        let initrd = file(b"");
        initrd.set_len(len.into()).unwrap();
        initrd
    });

    let mut platform = platform();
    platform.processors = Processors { count: input.processors.into() };
    match (input.ecam, &mut platform.pci) {
        (Some(ecam), Some(pci)) => {
            pci.ecam = ecam;
            (pci.window_32, pci.window_64) = (input.window_32, input.window_64);
        }
        (_, pci) => *pci = None,
    }
    platform.ram.extend(input.ram);
    let mmio = |(registers, interrupt)| MmioDevice { registers, interrupt };
    platform.virtio_mmio = input.virtio_mmio.into_iter().map(mmio).collect();
    let serial = |(port, interrupt)| SerialPort { port, interrupt };
    platform.serial = input.serial.into_iter().map(serial).collect();
    platform.panic_port = input.panic_port;
    platform.identity = Identity { uuid: input.uuid, oem_strings: input.oem_strings };

    let (initrd, command_line) = (initrd.as_ref(), input.command_line.as_str());
    let source = Source { kernel: &kernel, initrd, command_line, protocol };
    check(boot::load(memory(), &platform, &source));
});
