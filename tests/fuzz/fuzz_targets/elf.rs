//! Whatever an ELF file says, it is loaded or refused, by each protocol.
#![no_main]

use boot::EntryProtocol;
use fuzz::boot::{changed, elf, load_kernel};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: (u8, &[u8])| {
    let (protocol, changes) = input;
    let protocol = match protocol % 3 {
        0 => EntryProtocol::Auto,
        1 => EntryProtocol::Linux64,
        _ => EntryProtocol::Pvh,
    };
    load_kernel(&changed(elf(), changes), protocol);
});
