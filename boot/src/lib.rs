//! What is in RAM when the first instruction runs?
//!
//! [`load`] puts a kernel, an initrd, a command line and the tables that describe the machine into
//! guest memory, and says where the first processor starts. This crate knows no device: it
//! announces what [`Platform`] lists.

mod acpi;
mod boot_params;
pub mod cmdline;
mod initrd;
mod kernel;
mod memory_map;
mod smbios;
mod start_info;

use std::fs::File;

use arch::entry::{Entry, EntryMode};
use arch::memory::{GuestAddress, GuestMemory, NotRam};
use arch::platform::Platform;
use arch::target::layout;

pub use crate::acpi::Error as AcpiError;
pub use crate::initrd::Error as InitrdError;
pub use crate::kernel::{Error as KernelError, unpack};
pub use crate::memory_map::Error as MemoryMapError;
pub use crate::smbios::Error as SmbiosError;

use crate::kernel::Protocol;

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

/// Why a guest cannot be booted; the variant names the input whose fault it is.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kernel file.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// The initrd file.
    #[error(transparent)]
    Initrd(#[from] InitrdError),
    /// The command line.
    #[error(transparent)]
    CommandLine(#[from] cmdline::Error),
    /// The ranges of RAM.
    #[error(transparent)]
    MemoryMap(#[from] MemoryMapError),
    /// The machine's size, as ACPI describes it.
    #[error(transparent)]
    Acpi(#[from] AcpiError),
    /// The machine's identity.
    #[error(transparent)]
    Smbios(#[from] SmbiosError),
    /// The first MiB, where boot structures go, is not RAM.
    #[error("the guest has too little memory to boot anything: {0}")]
    TooLittleMemory(#[from] NotRam),
}

/// Fills guest memory, which reads as zeros, with all that `source` and `platform` ask for.
///
/// Files are read by position: their own offset neither matters nor moves, so that a restarted
/// guest is loaded by the same call.
pub fn load(memory: GuestMemory, platform: &Platform, source: &Source<'_>) -> Result<Entry, Error> {
    let map = memory_map::entries(platform);
    let kernel = kernel::load(memory, source.kernel, source.protocol)?;
    let initrd =
        source.initrd.map(|file| initrd::load(memory, platform, file, &kernel)).transpose()?;
    cmdline::write(memory, source.command_line, kernel.command_line_max)?;
    let tables = acpi::write(memory, platform)?;
    smbios::write(memory, &platform.identity, tables.end)?;

    let argument = match kernel.protocol {
        Protocol::Linux64 => boot_params::write(memory, &kernel, initrd, tables.start, &map)?,
        Protocol::Pvh => start_info::write(memory, initrd, tables.start, &map)?,
    };
    let mode = match kernel.protocol {
        Protocol::Linux64 => EntryMode::Long64,
        Protocol::Pvh => EntryMode::Protected32,
    };
    Ok(Entry { mode, instruction: GuestAddress(kernel.instruction), argument })
}

const _: () = assert!(layout::COMMAND_LINE.end <= layout::CONVENTIONAL_MEMORY_END);

#[cfg(test)]
mod test;
