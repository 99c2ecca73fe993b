//! What is in RAM when the first instruction runs?
//!
//! [`load`] puts a kernel, an initrd, a command line and the tables that describe the machine into
//! guest memory, and says where the first processor starts. This crate knows no device: it announces
//! what [`Platform`] lists.

use std::fs::File;

use arch::entry::Entry;
use arch::memory::GuestMemory;
use arch::platform::Platform;

pub mod cmdline;
pub mod unpack;

/// What a guest boots from: files that the caller opened.
#[derive(Clone, Copy, Debug)]
pub struct Source<'a> {
    /// A bzImage or an ELF file.
    pub kernel: &'a File,
    /// An initial RAM disk, in any form that the kernel unpacks.
    pub initrd: Option<&'a File>,
    /// The kernel's command line.
    pub command_line: &'a str,
    /// How the kernel is entered.
    pub protocol: EntryProtocol,
}

/// How a kernel is entered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum EntryProtocol {
    /// By the Linux 64-bit boot protocol, unless the file can only be entered by PVH.
    #[default]
    Auto,
    /// The Linux x86 64-bit boot protocol.
    Linux64,
    /// The Xen PVH boot ABI.
    Pvh,
}

/// Why a guest cannot be booted; each variant is the fault of one input.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kernel file.
    #[error("{0}")]
    Kernel(String),
    /// The initrd file.
    #[error("{0}")]
    Initrd(String),
    /// The command line.
    #[error(transparent)]
    CommandLine(#[from] cmdline::Error),
    /// The tables that describe the machine.
    #[error("{0}")]
    Tables(String),
}

/// Fills guest memory, which reads as zeros, with all that `source` and `platform` ask for.
///
/// Files are read from their beginning whatever their offset is, and the offset is left alone, so that a
/// restarted guest is loaded by the same call.
pub fn load(
    _memory: GuestMemory,
    _platform: &Platform,
    _source: &Source<'_>,
) -> Result<Entry, Error> {
    Err(Error::Kernel("kernels cannot be loaded yet".into()))
}
