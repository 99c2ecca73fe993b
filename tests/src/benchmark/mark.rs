//! What does the measured guest tell? How far it got, as the registers of a hypercall: RAX is
//! [`MARK`], RCX the stage, RDX and RSI what belongs to it.

/// The number of the hypercall, which KVM does not know.
pub const MARK: u64 = 0x6e69_7876;

/// How far the guest is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u64)]
pub enum Stage {
    /// The first program runs; RDX is the time since the kernel started, in nanoseconds.
    UserSpace = 1,
    /// Drivers are loaded and the disk was read; RDX as before.
    Devices = 2,
    /// Nothing happens any more.
    Idle = 3,
    /// A load is done: RDX is its kind shifted by 32 and the number of requests, RSI the
    /// nanoseconds they took.
    Load = 4,
    /// Something failed; RDX is the error number.
    Failed = 5,
    /// A load over a network begins; RDX is its kind.
    Begun = 6,
}
