//! Privileges, given up for good.

use anyhow::{Context as _, Result};
use rustix::io::Errno;
use rustix::process::{DumpableBehavior, Resource, Rlimit, set_dumpable_behavior, setrlimit};
use rustix::thread::{
    CapabilitySet, CapabilitySets, clear_ambient_capability_set,
    remove_capability_from_bounding_set, set_capabilities, set_no_new_privs,
};

/// What threads inherit: call it before there is a second one. Files can still be opened as before.
pub(super) fn give_up_inheritance() -> Result<()> {
    set_no_new_privs(true).context("no_new_privs")?;
    clear_ambient_capability_set().context("ambient capabilities")?;
    for number in 0..u64::BITS {
        match remove_capability_from_bounding_set(CapabilitySet::from_bits_retain(1 << number)) {
            Ok(()) => {}
            // The first number that this kernel does not have.
            Err(Errno::INVAL) => break,
            // Without CAP_SETPCAP it stays, and no_new_privs lets nobody take from it.
            Err(Errno::PERM) => break,
            Err(error) => return Err(error).context("capability bounding set"),
        }
    }
    Ok(())
}

/// Gives up every capability of the calling thread.
pub(super) fn give_up() -> Result<()> {
    let none = CapabilitySet::empty();
    let sets = CapabilitySets { effective: none, permitted: none, inheritable: none };
    set_capabilities(None, sets).context("capabilities")
}

/// Lets no other process of the user look into this one: guest memory is in it.
pub(super) fn close_process() -> Result<()> {
    set_dumpable_behavior(DumpableBehavior::NotDumpable).context("dumpable")?;
    let none = Rlimit { current: Some(0), maximum: Some(0) };
    setrlimit(Resource::Core, none).context("core limit")
}
