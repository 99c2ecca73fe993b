//! Where and how the first processor starts.

use crate::memory::GuestAddress;

/// The state of the processor at a kernel's first instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EntryMode {
    /// Paging on, long mode, RSI holds the zero page (Linux x86 boot protocol, "64-bit boot
    /// protocol").
    Long64,
    /// Flat 32-bit protected mode, paging off, EBX holds the start info (Xen PVH boot ABI).
    Protected32,
}

/// What `boot` promises the first processor: an instruction, its mode and one argument.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The state in which the kernel expects to be entered.
    pub mode: EntryMode,
    /// Guest-physical address of the first instruction.
    pub instruction: GuestAddress,
    /// Guest-physical address of the zero page or of the PVH start info.
    pub argument: GuestAddress,
}
