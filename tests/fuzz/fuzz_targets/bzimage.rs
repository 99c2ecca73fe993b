//! Whatever a file with a setup header says, it is loaded or refused.
#![no_main]

use boot::EntryProtocol;
use fuzz::boot::{bzimage, changed, load_kernel};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    // The setup code before the header holds nothing that anybody reads.
    let mut changes = vec![0; 0x1F1];
    changes.extend_from_slice(data);
    load_kernel(&changed(bzimage(&[]), &changes), EntryProtocol::Auto);
});
