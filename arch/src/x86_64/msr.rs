//! Model-specific registers at the first instruction: what firmware would have left there.

use kvm_bindings::kvm_msr_entry;

const IA32_MISC_ENABLE: u32 = 0x1A0;
const MISC_ENABLE_FAST_STRING: u64 = 1;

const MTRR_DEFAULT_TYPE: u32 = 0x2FF;
const MTRR_ENABLE: u64 = 1 << 11;
const MTRR_WRITE_BACK: u64 = 6;

/// The registers to set, the same for every processor.
///
/// Time stamp counters are left alone: KVM starts all of a machine's processors at one value, which
/// writes to them could only disturb.
pub fn boot_registers() -> [kvm_msr_entry; 2] {
    [
        register(IA32_MISC_ENABLE, MISC_ENABLE_FAST_STRING),
        register(MTRR_DEFAULT_TYPE, MTRR_ENABLE | MTRR_WRITE_BACK),
    ]
}

fn register(index: u32, data: u64) -> kvm_msr_entry {
    kvm_msr_entry { index, data, ..Default::default() }
}
